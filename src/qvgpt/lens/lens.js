// The lens: a text each of whose tokens shows what the values say of it.
//
//   const page = new Lens.Page();                       scale, card and key that texts share
//   const text = page.text({title, reward, returns});   text.element goes into the document
//   text.show(records, true);                           records: see records.py; true: all there
"use strict";

const Lens = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const acts = (record) => "base_logprob" in record;
  const known = (x) => typeof x === "number" && Number.isFinite(x);

  // ── words and numbers ──────────────────────────────────────────────────────────────────────

  function make(name, className, ...inside) {
    const element = document.createElement(name);
    if (className) element.className = className;
    element.append(...inside);
    return element;
  }

  function draw(name, attributes) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  }

  // Four significant digits, "–" for what is unknown.
  function number(x, sign = false) {
    if (!known(x)) return "–";
    const text = x === 0 || Math.abs(x) < 1e-9 ? "0" : String(Number(x.toPrecision(4)));
    return (sign && x > 0 && text !== "0" ? "+" : "") + text.replace("-", "−");
  }

  // A probability out of its logarithm; no logarithm: 0.
  function chance(logprob) {
    const p = 100 * (logprob === null ? 0 : Math.exp(logprob));
    if (p > 0 && p < 0.01) return "< 0.01 %";
    return `${p >= 99.95 || p === 0 ? Math.round(p) : p.toFixed(p < 10 ? 2 : 1)} %`;
  }

  // A token to be read by itself: spaces and bytes are seen.
  function label(record) {
    const { token, bytes } = record;
    if (bytes?.length && (token === "" || token.includes("\ufffd"))) {
      return bytes.map((b) => b.toString(16).toUpperCase().padStart(2, "0")).join(" ") || "∅";
    }
    return (token || "∅").replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
  }

  const same = (a, b) =>
    a.bytes?.length && b.bytes ? String(a.bytes) === String(b.bytes) : a.token === b.token;

  // ── from tokens to characters ──────────────────────────────────────────────────────────────

  // Whether bytes end where a character does, as far as they can be told apart.
  function whole(bytes) {
    for (let back = 1; back <= Math.min(3, bytes.length); back++) {
      const byte = bytes[bytes.length - back];
      if (byte < 0x80) return true;
      if (byte >= 0xc0) return back >= (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2);
    }
    return bytes.length > 0;
  }

  // A token with a name and no bytes, such as the end.
  const isSpecial = ({ token, bytes }) => token !== "" && bytes !== undefined && !bytes?.length;

  // Which characters belong to which tokens: [{from, to, text, special}]. Tokens that share what a
  // reader takes for one character are one span. Unless `finished`, half a character waits.
  function spans(records, finished = true) {
    const found = [];
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    let bytes = [];
    let from = 0;
    const close = (to) => {
      if (to > from) found.push({ from, to, text: decoder.decode(new Uint8Array(bytes)) });
      [from, bytes] = [to, []];
    };
    records.forEach((record, i) => {
      if (isSpecial(record)) {
        close(i);
        found.push({ from: i, to: i + 1, text: record.token, special: true });
        from = i + 1;
      } else {
        bytes.push(...(record.bytes ?? new TextEncoder().encode(record.token)));
        if (whole(bytes)) close(i + 1);
      }
    });
    if (finished) close(records.length);
    return graphemes(found);
  }

  function graphemes(parts) {
    const plain = parts.filter((part) => !part.special).map((part) => part.text).join("");
    if (!/[^\0-\x7f]|\r/.test(plain) || !Intl.Segmenter) return parts;
    const segments = new Intl.Segmenter("und", { granularity: "grapheme" }).segment(plain);
    const begins = new Set(Array.from(segments, (segment) => segment.index));
    const joined = [];
    let at = 0;
    for (const part of parts) {
      const before = joined.at(-1);
      if (!part.special && before && !before.special && at > 0 && !begins.has(at)) {
        joined[joined.length - 1] = { ...before, to: part.to, text: before.text + part.text };
      } else {
        joined.push(part);
      }
      at += part.special ? 0 : part.text.length;
    }
    return joined;
  }

  // ── the card ───────────────────────────────────────────────────────────────────────────────

  function table(heads, rows) {
    const cell = (name, content, i) => make(name, i ? "number" : "", content);
    const head = make("tr", "", ...heads.map((h, i) => cell("th", h, i)));
    const body = rows.map(({ cells, className }) =>
      make("tr", className ?? "", ...cells.map((c, i) => cell("td", c, i))),
    );
    return make("table", "", make("thead", "", head), make("tbody", "", ...body));
  }

  const figures = (record) => [
    number(record.q),
    number(record.v),
    number(record.advantage, true),
    chance(record.base_logprob),
    chance(record.logprob),
  ];

  function card(records) {
    const names = ["q", "v", "advantage", "base", "guided"];
    const word = (name) => Words.get(name);  // map hands more than the name
    if (records.length > 1) {
      const rows = records.map((r) => ({ cells: [label(r), ...(acts(r) ? figures(r) : [])] }));
      const heads = ["token", ...names].map(word);
      return [make("strong", "", Words.get("joined", records.length)), table(heads, rows)];
    }
    const [record] = records;
    const list = make("dl");
    figures(record).forEach((figure, i) => {
      const pair = make("div", "", make("dt", "", word(names[i])), make("dd", "", figure));
      pair.dataset.figure = names[i];
      list.append(pair);
    });
    const parts = [make("strong", "", label(record)), list];
    if (record.alternatives?.length) {
      const rows = record.alternatives.map((other) => ({
        cells: [label(other), number(other.q), chance(other.base_logprob), chance(other.logprob)],
        className: same(other, record) ? "same" : "",
      }));
      parts.push(table(["alternatives", "q", "base", "guided"].map(word), rows));
    }
    return parts;
  }

  // ── what texts share ───────────────────────────────────────────────────────────────────────

  class Page {
    constructor() {
      this.texts = [];
      this.card = make("div", "card");
      this.card.id = "lens-card";
      this.card.setAttribute("role", "tooltip");
      this.card.hidden = true;
      document.body.append(this.card);
      this.low = make("span");
      this.high = make("span");
      const about = Words.tell(make("span"), "key");
      this.key = make("div", "key", about, make("div", "scale", this.low, make("i", "ramp"), this.high));
      addEventListener("scroll", () => this.hide(), { passive: true, capture: true });
      Words.changed.push(() => this.hide());
    }

    text(options = {}) {
      const text = new Text(this, options);
      this.texts.push(text);
      return text;
    }

    forget(text) {
      this.texts = this.texts.filter((other) => other !== text);
    }

    // Full colour is reached at the 95th percentile of |A| over all texts.
    rescale() {
      const advantages = this.texts.flatMap((text) => text.records.map((r) => r.advantage));
      const sorted = advantages.filter(known).map(Math.abs).sort((a, b) => a - b);
      const full = sorted[Math.ceil(0.95 * sorted.length) - 1] || sorted.at(-1) || 1;
      for (const text of this.texts) text.element.style.setProperty("--scale", full);
      this.key.hidden = !sorted.length;
      Words.tell(this.low, () => `${Words.get("worse")} −${number(full)}`);
      Words.tell(this.high, () => `+${number(full)} ${Words.get("better")}`);
    }

    show(records, box) {
      const { card: shown } = this;
      shown.replaceChildren(...card(records));
      shown.hidden = false;
      const [w, h] = [shown.offsetWidth, shown.offsetHeight];
      const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - w - 8));
      const below = box.bottom + 8 + h <= innerHeight || box.top < h + 8;
      shown.style.left = `${left}px`;
      shown.style.top = `${below ? Math.min(box.bottom + 8, innerHeight - h - 8) : box.top - h - 8}px`;
    }

    hide() {
      this.card.hidden = true;
    }
  }

  // ── a text ─────────────────────────────────────────────────────────────────────────────────

  class Text {
    constructor(page, { title = "", reward = null, returns = null, endValue = null } = {}) {
      Object.assign(this, { page, reward, returns, endValue, records: [], parts: [], current: -1 });
      this.figures = make("p", "figures");
      this.curve = new Curve(this);
      this.body = make("p", "text");
      this.body.setAttribute("role", "group");
      this.body.dir = "auto";
      this.table = make("details", "", Words.tell(make("summary"), "table"));
      this.table.addEventListener("toggle", () => this.tabulate());
      const heading = make("h3", "", title);
      heading.hidden = !title;
      this.element = make("article", "lens", heading, this.figures, this.curve.element, this.body, this.table);
      this.listen();
      const spoken = () => {
        this.body.setAttribute("aria-label", Words.get("text"));
        this.tabulate();
      };
      spoken();
      Words.changed.push(spoken);
    }

    show(records, finished = true) {
      this.records = records;
      const parts = runs(records, spans(records, finished));
      let same = 0;
      while (same < parts.length && alike(parts[same], this.parts[same])) same++;
      for (const gone of this.parts.slice(same)) gone.element.remove();
      this.parts = [...this.parts.slice(0, same), ...parts.slice(same).map((p) => this.span(p))];
      this.body.append(...this.parts.slice(same).map((part) => part.element));
      this.tokens = this.parts.filter((part) => part.acts);
      this.tokens.forEach((part, i) => (part.place = i));
      if (this.current >= this.tokens.length) this.current = -1;
      if (this.tokens.length && this.current < 0) this.tokens[0].element.tabIndex = 0;
      this.page.rescale();
      this.count();
      this.curve.draw();
      this.tabulate();
    }

    span(part) {
      const records = this.records.slice(part.from, part.to);
      const element = make("span", part.acts ? "token" : "prompt", part.text);
      if (part.special) element.classList.add("special");
      if (part.acts) {
        const advantages = records.map((r) => r.advantage).filter(known);
        const advantage = advantages.reduce((a, b) => a + b, 0);
        if (advantages.length) {
          element.classList.add(advantage < 0 ? "bad" : "good");
          element.style.setProperty("--size", Math.abs(advantage));
        }
        element.setAttribute("role", "button");
        element.setAttribute("aria-describedby", this.page.card.id);
        element.tabIndex = -1;
        if (/^\s+$/.test(part.text)) {
          element.setAttribute("aria-label", Words.get(part.text.includes("\n") ? "line" : "space"));
          element.classList.toggle("line", part.text.includes("\n"));
        }
      }
      return { ...part, element };
    }

    // The token at a place is looked at: its card, its point of the curve.
    look(place, box = null) {
      for (const gone of this.body.querySelectorAll(".at")) gone.classList.remove("at");
      const part = this.tokens[place];
      this.curve.point(part ?? null);
      if (!part) return this.page.hide();
      part.element.classList.add("at");
      this.page.show(this.records.slice(part.from, part.to), box ?? firstBox(part.element));
    }

    lookBack() {
      this.look(this.body.contains(document.activeElement) ? this.current : -1);
    }

    listen() {
      const { body } = this;
      const place = (event) => {
        const element = event.target.closest?.(".token");
        return this.tokens?.findIndex((part) => part.element === element) ?? -1;
      };
      body.addEventListener("pointerover", (event) => {
        const at = place(event);
        if (at >= 0) this.look(at);
        else this.lookBack();
      });
      body.addEventListener("pointerleave", () => this.lookBack());
      body.addEventListener("focusin", (event) => this.choose(place(event), false));
      body.addEventListener("focusout", () => this.look(-1));
      body.addEventListener("keydown", (event) => {
        const at = this.current;
        const rtl = getComputedStyle(body).direction === "rtl" ? -1 : 1;
        const to = {
          ArrowRight: at + rtl,
          ArrowLeft: at - rtl,
          ArrowDown: this.beyond(at, 1),
          ArrowUp: this.beyond(at, -1),
          Home: 0,
          End: this.tokens.length - 1,
        }[event.key];
        if (event.key === "Escape") this.page.hide();
        if (event.key === "Enter" || event.key === " ") this.look(at);
        if (event.key === " ") event.preventDefault();
        if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
        event.preventDefault();
        if (to >= 0 && to < this.tokens.length) this.choose(to, true);
      });
    }

    // Let a token have the keyboard.
    choose(place, focus) {
      if (place < 0) return;
      for (const part of this.tokens) part.element.tabIndex = part.place === place ? 0 : -1;
      this.current = place;
      if (focus) this.tokens[place].element.focus();
      else this.look(place);
    }

    // The token above or below: the nearest of the next line in that direction.
    beyond(place, step) {
      const here = firstBox(this.tokens[place].element);
      let [best, distance, line] = [place, Infinity, null];
      for (let i = place + step; this.tokens[i]; i += step) {
        const box = firstBox(this.tokens[i].element);
        if (Math.abs(box.top - here.top) < here.height / 2) continue;
        line ??= box.top;
        if (Math.abs(box.top - line) > here.height / 2) break;
        if (Math.abs(box.left - here.left) < distance) {
          [best, distance] = [i, Math.abs(box.left - here.left)];
        }
      }
      return best;
    }

    count() {
      const actions = this.records.filter(acts);
      const sum = (name) => actions.reduce((total, r) => total + (r[name] ?? NaN), 0);
      Words.tell(this.figures, () => {
        const parts = [Words.get("tokens", actions.length)];
        if (known(this.reward)) parts.push(Words.get("reward", number(this.reward)));
        if (known(actions[0]?.v)) parts.push(Words.get("first", number(actions[0].v)));
        if (known(sum("advantage"))) parts.push(Words.get("sum", number(sum("advantage"), true)));
        const [base, guided] = [sum("base_logprob"), sum("logprob")].map((x) => number(x));
        parts.push(Words.get("likelihood", base, guided));
        if (sum("kl") > 0) parts.push(Words.get("kl", number(sum("kl"))));
        return parts.join(" · ");
      });
    }

    // For those who do not look: the same figures as a table, made when it is opened.
    tabulate() {
      this.table.querySelector(".wide")?.remove();
      if (!this.table.open) return;
      const names = ["token", "q", "v", "advantage", "base", "guided"];
      const heads = [...names.map((name) => Words.get(name)), "KL", Words.get("alternatives")];
      const rows = this.records.filter(acts).map((r) => {
        const others = (r.alternatives ?? []).filter((other) => !same(other, r));
        const named = others.map((o) => `${label(o)} ${chance(o.base_logprob)} → ${chance(o.logprob)}`);
        return { cells: [label(r), ...figures(r), number(r.kl), named.join(", ")] };
      });
      this.table.append(make("div", "wide", table(heads, rows)));
    }
  }

  // Spans of the prompt one after another are one; the others know whether they act.
  function runs(records, parts) {
    const found = [];
    for (const part of parts) {
      const acting = records.slice(part.from, part.to).some(acts);
      const before = found.at(-1);
      if (before && !acting && !before.acts && !part.special && !before.special) {
        found[found.length - 1] = { ...before, to: part.to, text: before.text + part.text };
      } else {
        found.push({ ...part, acts: acting });
      }
    }
    return found;
  }

  const alike = (a, b) => Boolean(b) && ["from", "to", "text", "acts"].every((k) => a[k] === b[k]);
  const firstBox = (element) => element.getClientRects()[0] ?? element.getBoundingClientRect();

  return { Page, make, draw, number, chance, label, spans, acts, known };
})();
