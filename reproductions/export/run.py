"""How faithful is each form of an export? Every form and precision of two trained models.

    python reproductions/export/run.py runs/demo MODEL DATA.jsonl --beta 2
    python reproductions/export/run.py --quick         a demo cut short, nothing written

The first directory is that of `qvgpt demo`, MODEL a model with values of
reproductions/translation/run.py (`en-de/seed-0/values-…` of its --work), as β is chosen there;
DATA.jsonl are rows with held-out prompts. KL and
greedy agreement are those of `export.json`. Beside them stand the greedy texts of engines, and how
many of them are ours by exact guidance: `transformers` writes those of hf and lora in float32 by
its `generate`; else an engine (llama.cpp, where llama-cpp-python is installed) is asked for its
best token at each place of our text, which comes to the same. Where texts differ first, the two
candidates of a tie are closer than 1e-4. Writes results.json and table.md beside itself.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qvgpt.decode.engine import generate
from qvgpt.decode.policy import Guidance, next_token
from qvgpt.demo import DemoConfig, demo
from qvgpt.envs.random_walk import RandomWalks
from qvgpt.export import ExportOptions, export_model
from qvgpt.export.hf import load_language_model
from qvgpt.export.lora import load_adapted
from qvgpt.export.write import ADAPTER_GGUF, MODEL_GGUF
from qvgpt.models.value_model import ValueModel
from qvgpt.sampling import load_prompts

HERE = Path(__file__).parent
PROMPTS, MAX_TOKENS, TIE = 200, 48, 1e-4
FORMS: tuple[dict[str, Any], ...] = (
    {"to": "hf"},
    {"to": "hf", "dtype": "bfloat16"},
    {"to": "hf", "dtype": "float16"},
    {"to": "lora"},
    {"to": "lora", "rank": 16},
    {"to": "lora", "rank": 256},
    {"to": "gguf"},
    {"to": "gguf", "dtype": "float16"},
    {"to": "gguf", "dtype": "q8_0"},
    {"to": "gguf_lora"},
    {"to": "critic"},
)
QUICK = (FORMS[0], FORMS[10])
COLUMNS = (
    "model", "to", "dtype", "rank", "mean_kl", "recommended_kl", "greedy_agreement", "v_rmse",
    "v_r2", "engine", "texts", "same_texts", "ties", "engine_kl",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A trained model, how it is guided, and prompts it has not seen."""

    name: str
    path: Path
    beta: float
    prompts: list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", nargs="?", type=Path, help="directory of `qvgpt demo`")
    parser.add_argument("translation", nargs="?", type=Path, help="directory with values")
    parser.add_argument("data", nargs="?", type=Path, help="rows with held-out prompts")
    parser.add_argument("--beta", type=float, default=2.0, help="of the translation model")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "demo"
            short = DemoConfig(str(path), steps=20, samples=2, walks=200)
            demo(short, Console(file=io.StringIO()))
            case = _demo(path)
            print(json.dumps(measure([replace(case, prompts=case.prompts[:4])], QUICK), indent=1))
        return
    if options.data is None:
        parser.error("say where the two models and the prompts are, or --quick")
    model = ValueModel.from_pretrained(options.translation)
    _, prompts = load_prompts(options.data, model, 1, PROMPTS)
    translation = Case("translation", options.translation, options.beta, prompts)
    results = measure([_demo(options.demo), translation], FORMS)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "table.md").write_text(_table(results["rows"]))
    print((HERE / "table.md").read_text())


def _demo(path: Path) -> Case:
    summary = json.loads((path / "summary.json").read_text())
    tokenizer = ValueModel.from_pretrained(path).tokenizer
    assert tokenizer is not None
    starts = RandomWalks.draw(summary["seed"]).starts
    prompts = [tokenizer.encode_prompt(start) for start in starts]
    return Case("random walks", path, summary["guidance"]["beta"], prompts)


def measure(cases: list[Case], forms: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Export every model in every form, and let engines write."""
    rows = []
    for case in cases:
        model = ValueModel.from_pretrained(case.path).eval()
        guidance = Guidance(case.beta, temperature=0.0)
        room = min(MAX_TOKENS, model.trunk.seq_len - max(map(len, case.prompts)))
        ours = [c.tokens for c in generate(model, case.prompts, guidance, max_tokens=room)]
        for form in forms:
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as directory:
                out = Path(directory) / "out"
                critic = form["to"] == "critic"
                more = {} if critic else {"beta": case.beta, "value_rows": True}
                made = export_model(
                    case.path, out, ExportOptions(**form, **more), prompts=case.prompts
                )
                row = {"model": case.name, "beta": None if critic else case.beta, **_row(made)}
                if not critic:
                    row |= _engine(model, case, form, made, out, ours)
            row["seconds"] = round(time.perf_counter() - started, 1)
            rows.append(row)
            print({name: row.get(name) for name in COLUMNS}, flush=True)
    return {"rows": rows}


def _row(made: dict[str, Any]) -> dict[str, Any]:
    said = made["fidelity"]
    v = said if made["format"] == "critic" else said["v"]
    row = {"to": made["format"], "dtype": made["dtype"], **(made.get("adapter") or {})}
    row |= {"v_rmse": v["rmse"], "v_max_error": v["max_error"], "v_r2": v["r2"]}
    row |= {name: said[name] for name in ("states", "twins_kl", "recommended_kl") if name in said}
    shown = ("mean_kl", "max_kl", "greedy_agreement", "value_rows_mass")
    return row | {name: said[name] for name in shown if name in said}


def _engine(
    model: ValueModel,
    case: Case,
    form: dict[str, Any],
    made: dict[str, Any],
    out: Path,
    ours: list[list[int]],
) -> dict[str, Any]:
    """Greedy texts of the engine against ours."""
    if made["format"].startswith("gguf"):
        name, follow = "llama.cpp", _llama_cpp(out, model.trunk.seq_len)
    else:
        writes = made["dtype"] == "float32" and "rank" not in form
        name, follow = "transformers", _transformers(out, made["format"] == "lora", writes)
    if follow is None:
        return {}
    banned, known = made["value_rows"]["ids"], model.trunk.vocab_size
    same, ties, kl, states = 0, 0, 0.0, 0
    for prompt, text in zip(case.prompts, ours, strict=True):
        tokens = torch.tensor([*prompt, *text[:-1]])
        with torch.no_grad():
            hidden = model.trunk.hidden(tokens[None])[0, len(prompt) - 1 :]
            exact = next_token(model, hidden, Guidance(case.beta)).logprob
        written, logits = follow(prompt, text)
        logits = logits[len(prompt) - 1 :]
        logits[:, banned] = -torch.inf
        found = logits.log_softmax(-1)[:, :known]
        p = exact.exp()
        kl += float((p * (exact - found)).where(p > 0, 0.0).sum())
        states += len(exact)
        if written is None:  # an engine that was only asked for its best token at each place
            written = found.argmax(-1).tolist()
        apart = next((i for i, (a, b) in enumerate(zip(text, written)) if a != b), None)  # noqa: B905
        if apart is None:
            same += 1
        elif float((exact[apart, text[apart]] - exact[apart, written[apart]]).abs()) < TIE:
            ties += 1
    count = len(ours)
    return {
        "engine": name, "texts": count, "same_texts": same, "ties": ties, "engine_kl": kl / states,
    }  # fmt: skip


Follow = Callable[[list[int], list[int]], tuple[list[int] | None, torch.Tensor]]


def _transformers(out: Path, adapted: bool, writes: bool) -> Follow:
    loaded = load_adapted(out) if adapted else load_language_model(out)

    @torch.no_grad()
    def follow(prompt: list[int], text: list[int]) -> tuple[list[int] | None, torch.Tensor]:
        whole = torch.tensor([[*prompt, *text[:-1]]])
        logits = loaded(whole, attention_mask=torch.ones_like(whole)).logits[0].float()
        if not writes:
            return None, logits
        tokens = torch.tensor([prompt])
        how: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "do_sample": False}
        written = loaded.generate(tokens, max_new_tokens=len(text), **how)
        return written[0, len(prompt) :].tolist(), logits

    return follow


def _llama_cpp(out: Path, context: int) -> Follow | None:
    try:
        from llama_cpp import Llama
    except ImportError:
        return None
    adapter = out / ADAPTER_GGUF
    with contextlib.redirect_stderr(io.StringIO()):
        llm = Llama(
            str(out / MODEL_GGUF), n_ctx=context, logits_all=True, verbose=False, type_k=0,
            type_v=0, flash_attn=False, lora_path=str(adapter) if adapter.exists() else None,
        )  # fmt: skip

    def follow(prompt: list[int], text: list[int]) -> tuple[None, torch.Tensor]:
        tokens = [*prompt, *text[:-1]]
        llm.reset()
        llm.eval(tokens)
        return None, torch.tensor(llm.scores[: len(tokens)].copy())

    return follow


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(_short(row.get(c)) for c in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.4g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
