"""What frames a report: style (it names the classes `report.py` writes), script and escaping."""

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path

MARKERS = (  # circle, square, triangle, diamond: a second cue beside colour
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    "M-3.6,-3.6H3.6V3.6H-3.6Z",
    "M0,-5L4.6,3.6H-4.6Z",
    "M0,-5.2L5.2,0L0,5.2L-5.2,0Z",
)
# Colours: Okabe and Ito's palette (legible to the colour-blind), brightened for the dark ground.
PALETTE = """\
:root{color-scheme:light dark;--bg:#fff;--ink:#1b1f24;--soft:#59636e;--rule:#dfe3e8;--panel:#f6f7f9;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b5598c;--c4:#c58500;--c5:#3b9ad0;--c6:#555;
--good:47,128,196;--bad:222,92,66;--full:.68}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--ink:#e6e9ed;--soft:#9aa5b1;--rule:#2b3138;
--panel:#1c2026;--c0:#56b4e9;--c1:#f0803c;--c2:#2fc39a;--c3:#e39ac6;--c4:#f0b840;--c5:#9fd0f5;
--c6:#b9c0c8;--good:52,132,208;--bad:214,82,58;--full:.76}}
"""
# The policy forbids every load, so that the page stays self-contained whatever a section holds.
PAGE_HEAD = (
    """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
"""
    + PALETTE
    + """*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:24px 20px 64px;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","PingFang SC",
"Microsoft YaHei","Noto Sans CJK SC",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.25;margin:.4em 0 1em}
h2{font-size:1.2rem;margin:0 0 .4em}
section{border-top:1px solid var(--rule);padding:20px 0 12px}
.lead{max-width:72ch;margin:0 0 .8em;color:var(--soft)}
.body{display:flex;flex-wrap:wrap;gap:16px 28px}.body>*{flex:1 1 100%;min-width:0}
.body>.chart{flex:1 1 min(420px,100%);max-width:640px;margin:8px 0;container-type:inline-size}
.body>.wide{flex-basis:100%;max-width:none}
figcaption{font-weight:600;margin-bottom:2px}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.82rem;margin-bottom:6px}
.legend span{display:inline-flex;align-items:center;gap:6px}.legend svg{width:26px;height:14px}
.chart>svg{display:block;width:100%}.chart text{font-size:13.5px;fill:var(--soft)}
@container(max-width:440px){.chart text{font-size:18px}}
.chart .name,.chart .label{fill:var(--ink)}.chart .mid{text-anchor:middle}
.chart .label{paint-order:stroke;stroke:var(--bg);stroke-width:4px;stroke-linejoin:round}
.chart path{fill:none}.grid{stroke:var(--rule)}.axis,.diagonal{stroke:var(--soft)}
.diagonal{stroke-dasharray:5 4}.line{stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.chart .band{fill:var(--c);opacity:.18}.bar{stroke:var(--c);stroke-width:1.4}
.chart .mark{fill:var(--c);stroke:var(--bg)}.hit{fill:transparent}.hit:hover{stroke:var(--soft)}
.table{overflow-x:auto}table{border-collapse:collapse;font-size:.92rem}
th,td{padding:6px 14px;text-align:left;border-bottom:1px solid var(--rule);overflow-wrap:normal}
th{color:var(--soft);font-weight:600;border-bottom-width:2px}tbody tr:hover{background:var(--panel)}
.chart .end{text-anchor:end}th.end,td.end{text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums}
.text{background:var(--panel);border-radius:8px;padding:14px 18px}
.text p{margin:0;line-height:1.9;white-space:pre-wrap}.prompt{color:var(--soft)}
.text i{font-style:normal;opacity:.45}.token{padding:2px 0;border-radius:3px;cursor:default;
-webkit-box-decoration-break:clone;box-decoration-break:clone;print-color-adjust:exact}
.token:hover,.token:focus{outline:2px solid var(--soft)}
.good{background:rgba(var(--good),calc(var(--a)*var(--full)))}
.bad{background:rgba(var(--bad),calc(var(--a)*var(--full)))}
.key{display:flex;gap:10px;align-items:center;margin-top:12px;font-size:.8rem;color:var(--soft)}
.ramp{width:120px;height:10px;border-radius:3px;background:linear-gradient(90deg,
rgba(var(--bad),var(--full)),rgba(var(--bad),0) 50%,rgba(var(--good),0) 50%,
rgba(var(--good),var(--full)))}
#tip{position:fixed;z-index:9;max-width:min(340px,90vw);padding:7px 11px;border-radius:6px;
background:var(--ink);color:var(--bg);font-size:.82rem;line-height:1.45;white-space:pre-line;
pointer-events:none}
</style>
"""
)
# Hover texts are titles; the script shows them at once, and on touch, in a box of the page's own.
PAGE_TAIL = """<div id="tip" role="tooltip" hidden></div><script>
const tip=document.getElementById("tip");
for(const e of document.querySelectorAll("[title],.hit")){const t=e.querySelector("title");
e.dataset.tip=t?t.textContent:e.title;t?t.remove():e.removeAttribute("title")}
const show=({target})=>{const e=target.closest?.("[data-tip]");tip.hidden=!e;if(!e)return;
tip.textContent=e.dataset.tip;
const r=e.getBoundingClientRect(),w=tip.offsetWidth,h=tip.offsetHeight;
tip.style.left=Math.max(8,Math.min(r.left+r.width/2-w/2,innerWidth-w-8))+"px";
tip.style.top=(r.top>h+12?r.top-h-8:r.bottom+8)+"px"};
addEventListener("pointerover",show);addEventListener("focusin",show);
addEventListener("scroll",()=>tip.hidden=true,{passive:true})
</script></body></html>
"""


def side_by_side(cells: Sequence[tuple[str, str]]) -> str:
    """(caption, HTML) pairs in one row, below each other where the screen is narrow."""
    columns = "repeat(auto-fit,minmax(min(320px,100%),1fr))"
    inner = "".join(f"<div><figcaption>{escape(c)}</figcaption>{body}</div>" for c, body in cells)
    return f'<div style="display:grid;gap:12px;grid-template-columns:{columns}">{inner}</div>'


def escape(value: object) -> str:
    """Text safe in HTML and in attributes; control characters and lone surrogates are replaced."""
    unprintable = "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]"
    return html.escape(re.sub(unprintable, "\ufffd", str(value)))


def write_page(path: str | Path, page: str) -> Path:
    """Write a page whole or not at all; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8", errors="replace")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
