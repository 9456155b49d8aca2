// The curve of a text: V before each token, Q with it, the return that came.
"use strict";

class Curve {
  static HEIGHT = 132;
  static EDGE = { left: 52, right: 12, top: 10, bottom: 10 };

  constructor(text) {
    this.text = text;
    this.svg = Lens.draw("svg", { height: Curve.HEIGHT, role: "img", class: "plot" });
    const name = (kind, word) =>
      Lens.make("span", kind, Lens.make("i", ""), Words.tell(Lens.make("span"), word));
    this.returns = name("returns", "returns");
    const names = Lens.make("figcaption", "", name("v", "curve"), name("q", "chosen"), this.returns);
    this.element = Lens.make("figure", "curve", this.svg, names);
    this.svg.addEventListener("pointermove", (event) => this.hover(event));
    this.svg.addEventListener("pointerleave", () => this.text.lookBack());
    this.svg.addEventListener("click", (event) => this.text.choose(this.place(event), true));
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  draw() {
    const { text, svg } = this;
    const actions = text.records.filter(Lens.acts);
    const v = actions.map((record) => record.v);
    if (Lens.known(text.endValue)) v.push(text.endValue);
    const q = actions.map((record) => record.q);
    const returns = text.returns ?? [];
    const all = [...v, ...q, ...returns].filter(Lens.known);
    this.element.hidden = all.length < 2;
    this.returns.hidden = !returns.length;
    const width = this.element.clientWidth;
    if (all.length < 2 || !width) return;
    this.frame(actions.length, Math.min(...all), Math.max(...all), width);
    svg.setAttribute("width", width);
    svg.replaceChildren();
    svg.setAttribute("aria-label", Words.get("curve"));
    for (const tick of this.ticks) {
      const y = this.y(tick);
      const { left, right } = Curve.EDGE;
      svg.append(Lens.draw("line", { x1: left, x2: width - right, y1: y, y2: y, class: "grid" }));
      const label = Lens.draw("text", { x: left - 8, y: y + 4, class: "tick" });
      label.append(Lens.number(Number(tick.toPrecision(6))));
      svg.append(label);
    }
    this.line(returns, "returns");
    this.cursor = Lens.draw("line", {
      y1: Curve.EDGE.top, y2: Curve.HEIGHT - Curve.EDGE.bottom, class: "cursor", visibility: "hidden",
    });
    svg.append(this.cursor);
    actions.forEach((record, i) => {
      if (!Lens.known(record.q) || !Lens.known(record.v)) return;
      const sign = record.q < record.v ? "bad" : "good";
      const [x, from, to] = [this.x(i), this.y(record.v), this.y(record.q)];
      svg.append(Lens.draw("line", { x1: x, x2: x, y1: from, y2: to, class: `stem ${sign}` }));
      svg.append(Lens.draw("circle", { cx: x, cy: to, r: actions.length > 150 ? 2 : 3, class: `dot ${sign}` }));
    });
    this.line(v, "v");
  }

  // Axes: tokens to the right, values up to ticks of 1, 2 or 5 × 10ⁿ.
  frame(count, low, high, width) {
    const rough = (high - low || Math.abs(high) || 1) / 3;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((m) => m * power >= rough * 0.999);
    const [first, last] = [Math.floor(low / step + 1e-9), Math.ceil(high / step - 1e-9)];
    this.ticks = [];
    for (let i = first; i <= Math.max(last, first + 1); i++) this.ticks.push(i * step);
    const { left, right, top, bottom } = Curve.EDGE;
    const [low_, span] = [this.ticks[0], this.ticks.at(-1) - this.ticks[0]];
    this.gap = (width - left - right) / Math.max(count, 1);
    this.x = (i) => left + (i + 0.5) * this.gap;
    this.y = (value) => top + (1 - (value - low_) / span) * (Curve.HEIGHT - top - bottom);
  }

  line(values, kind) {
    let d = "";
    values.forEach((value, i) => {
      if (!Lens.known(value)) return;
      const end = i === values.length - 1 && kind === "v" && Lens.known(this.text.endValue);
      const x = end ? this.x(i - 0.5) : this.x(i);
      d += `${d && Lens.known(values[i - 1]) ? "L" : "M"}${x.toFixed(1)},${this.y(value).toFixed(1)}`;
    });
    if (d) this.svg.append(Lens.draw("path", { d, class: `line ${kind}` }));
  }

  // Where a span stands among the actions; null: nowhere.
  point(part) {
    if (!this.cursor) return;
    this.cursor.setAttribute("visibility", part ? "visible" : "hidden");
    if (!part) return;
    const before = this.text.records.slice(0, part.to).filter(Lens.acts).length - 1;
    this.cursor.setAttribute("x1", this.x(before));
    this.cursor.setAttribute("x2", this.x(before));
  }

  place(event) {
    const x = event.clientX - this.svg.getBoundingClientRect().left - Curve.EDGE.left;
    const count = this.text.records.filter(Lens.acts).length;
    const action = Math.max(0, Math.min(count - 1, Math.floor(x / this.gap)));
    let seen = -1;
    const at = this.text.records.findIndex((record) => Lens.acts(record) && ++seen === action);
    return this.text.tokens.findIndex((part) => part.from <= at && at < part.to);
  }

  hover(event) {
    const { top, bottom } = this.svg.getBoundingClientRect();
    this.text.look(this.place(event), { left: event.clientX + 12, top, bottom });
  }
}
