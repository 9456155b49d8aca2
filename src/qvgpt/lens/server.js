// The server's page: the same prompt to the base and to the guided model, both streamed.
"use strict";

{
  const by = (id) => document.getElementById(id);
  const ALTERNATIVES = 5;
  const MOST_UNDER_BUDGET = 64;
  const page = new Lens.Page();
  page.key.hidden = true;

  // The key, where one is asked for, is kept here and nowhere else.
  const state = { model: null, met: null, dialogue: [], turns: [], running: null };

  // ── asking the server ──────────────────────────────────────────────────────────────────────

  class Fault extends Error {
    constructor(tell, status = 0) {
      super("fault");
      this.tell = tell;
      this.status = status;
    }
  }

  async function ask(path, body, signal) {
    const headers = {};
    if (body) headers["Content-Type"] = "application/json";
    if (by("key").value) headers.Authorization = `Bearer ${by("key").value}`;
    const how = body ? { method: "POST", body: JSON.stringify(body) } : {};
    let response;
    try {
      response = await fetch(path, { ...how, headers, signal });
    } catch (error) {
      throw error.name === "AbortError" ? error : new Fault(() => Words.get("unreachable"));
    }
    if (response.ok) return response;
    const { status } = response;
    if (status === 401) throw new Fault(() => Words.get("wrongKey"), status);
    if (status === 429) {
      const seconds = response.headers.get("Retry-After");
      throw new Fault(() => Words.get("busy", seconds), status);
    }
    const said = (await response.json().catch(() => ({}))).error?.message;
    throw new Fault(() => `${status}: ${said ?? response.statusText}`, status);
  }

  // The JSON of each server-sent event, until [DONE].
  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let waiting = "";
    for (;;) {
      const { value, done } = await reader.read();
      waiting += value ?? "";
      const lines = waiting.split(/\r?\n/);
      waiting = lines.pop();
      for (const line of lines) {
        if (line === "data: [DONE]") return;
        if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
      }
      if (done) throw new Fault(() => Words.get("broken"));
    }
  }

  // ── what is asked for ──────────────────────────────────────────────────────────────────────

  const way = () => document.querySelector("[name=way]:checked").value;
  const amount = (id) => Number(by(id).value);

  // What the model recommends, with what the page says put over it.
  function guidance() {
    const said = Object.entries(state.model?.guidance ?? {}).filter(([, value]) => value !== null);
    const chosen = Object.fromEntries(said);
    for (const name of ["beta", "kl_budget", "beta_end", "beta_tokens"]) delete chosen[name];
    chosen.temperature = amount("temperature");
    if (!by("limited").checked) return { ...chosen, beta: amount("beta") };
    const top = Math.min(chosen.top_k ?? 40, MOST_UNDER_BUDGET);
    return { ...chosen, kl_budget: amount("budget"), top_k: top, candidates: "base" };
  }

  // The same without values: whatever differs is their doing.
  function plain(guided) {
    const { kl_budget, ...rest } = guided;
    return { ...rest, beta: 0 };
  }

  function request(settings) {
    const shared = {
      guidance: settings,
      max_tokens: amount("length") || null, // null: what the context holds, at most 256
      seed: amount("seed"),
      values: ALTERNATIVES,
      stream: true,
    };
    if (way() === "chat") return ["/v1/chat/completions", { ...shared, messages: state.dialogue }];
    return ["/v1/completions", { ...shared, prompt: by("prompt").value }];
  }

  // ── what comes ─────────────────────────────────────────────────────────────────────────────

  // A place for a text: its name, the lens, what went wrong.
  function pane(tellName) {
    const text = page.text();
    const name = Words.tell(Lens.make("h3"), tellName);
    const fault = Lens.make("p", "error");
    fault.setAttribute("role", "alert");
    return { text, fault, element: Lens.make("section", "pane", name, text.element, fault) };
  }

  async function stream({ text, fault }, settings, signal) {
    const records = [];
    let content = "";
    let drawn = 0;
    const draw = () => {
      drawn = 0;
      text.show(records, false);
    };
    try {
      const [path, body] = request(settings);
      for await (const event of events(await ask(path, body, signal))) {
        if (event.error) throw new Fault(() => event.error.message);
        for (const choice of event.choices) {
          const piece = choice.text ?? choice.delta?.content ?? "";
          content += piece;
          records.push(...(choice.values ?? (piece ? [{ token: piece }] : [])));
        }
        drawn ||= requestAnimationFrame(draw);
      }
    } catch (error) {
      if (error.name !== "AbortError") report(error, fault);
    }
    cancelAnimationFrame(drawn);
    text.show(records, true);
    return content;
  }

  function report(error, place) {
    if (!(error instanceof Fault)) throw error;
    if (error.status === 401) {
      by("key-field").hidden = false;
      by("key").focus();
    }
    Words.tell(place, error.tell);
  }

  async function both(signal, ...above) {
    const guided = guidance();
    const name = () =>
      "kl_budget" in guided
        ? Words.get("guidedWithin", guided.kl_budget)
        : Words.get("guidedBy", guided.beta);
    const panes = [pane("plain")];
    if (state.model?.has_values ?? true) panes.push(pane(name));
    place(panes, ...above);
    const settings = [plain(guided), guided];
    return Promise.all(panes.map((one, i) => stream(one, settings[i], signal)));
  }

  async function judge(signal) {
    const one = pane("judged");
    place([one]);
    const body = {
      prompt: by("prompt").value,
      completion: by("completion").value,
      ended: true,
      alternatives: ALTERNATIVES,
      guidance: guidance(),
    };
    try {
      const answer = await (await ask("/v1/values", body, signal)).json();
      one.text.show(answer.values, true);
    } catch (error) {
      if (error.name !== "AbortError") report(error, one.fault);
    }
  }

  // Panes side by side: in a dialogue the newest first, else in the place of those before.
  function place(panes, ...above) {
    const pair = Lens.make("div", "pair", ...panes.map((one) => one.element));
    if (way() !== "chat") clear();
    state.turns.push(...panes);
    by("answers").prepend(...above, pair);
  }

  function clear() {
    for (const { text } of state.turns) page.forget(text);
    [state.turns, state.dialogue] = [[], []];
    by("answers").replaceChildren();
  }

  async function chat(signal) {
    const said = by("prompt").value;
    const before = state.dialogue;
    state.dialogue = [...before, { role: "user", content: said }];
    by("prompt").value = "";
    const you = Words.tell(Lens.make("strong"), "you");
    const answers = await both(signal, Lens.make("p", "said", you, " ", said));
    const answer = answers.at(-1);
    if (answer) state.dialogue.push({ role: "assistant", content: answer });
    else [state.dialogue, by("prompt").value] = [before, said];
  }

  async function go() {
    if (state.running || !by("form").reportValidity()) return;
    state.running = new AbortController();
    by("fault").replaceChildren();
    enable();
    Words.tell(by("status"), "writing");
    const { signal } = state.running;
    await state.met; // else a quick hand would write with another β than is recommended
    const work = { complete: both, chat, judge }[way()];
    try {
      await work(signal);
    } finally {
      Words.tell(by("status"), signal.aborted ? "stopped" : "done");
      state.running = null;
      enable();
    }
    if (!state.model) await meet();
  }

  // ── the form ───────────────────────────────────────────────────────────────────────────────

  function enable() {
    const busy = Boolean(state.running);
    by("go").disabled = busy;
    by("stop").disabled = !busy;
    for (const input of document.querySelectorAll("[name=way], #anew")) input.disabled = busy;
    by("beta").disabled = by("beta-slide").disabled = by("limited").checked;
    by("budget").disabled = !by("limited").checked;
  }

  function turn() {
    const chosen = way();
    clear();
    page.rescale();
    by("status").replaceChildren();
    by("completion-field").hidden = chosen !== "judge";
    by("anew").hidden = chosen !== "chat";
    for (const id of ["length", "seed"]) by(id).closest(".field").hidden = chosen === "judge";
    Words.tell(by("prompt-name"), chosen === "chat" ? "message" : "prompt");
    Words.tell(by("go"), { complete: "write", chat: "send", judge: "read" }[chosen]);
    by("prompt").required = chosen !== "judge";
    by("prompt").focus();
  }

  // The slide goes from 0.01 to 1000 by factors; at its left end it is 0.
  const slid = (place) => (place === 0 ? 0 : Number((10 ** (place / 20 - 2)).toPrecision(2)));
  const slide = (beta) => (beta > 0 ? Math.max(1, Math.round(20 * (Math.log10(beta) + 2))) : 0);

  // What the model is called and recommends.
  async function meet() {
    try {
      const [model] = (await (await ask("/v1/models")).json()).data;
      state.model = model;
      by("name").textContent = model.id;
      document.title = `${model.id} · qvgpt`;
      const { beta, kl_budget: budget, temperature } = model.guidance;
      by("beta").value = beta || (model.has_values ? 1 : 0);
      by("beta-slide").value = slide(amount("beta"));
      by("temperature").value = temperature;
      by("limited").checked = Boolean(budget);
      if (budget) by("budget").value = budget;
      for (const id of ["beta", "limited"]) by(id).closest(".field").hidden = !model.has_values;
      by("key-field").hidden = true;
      by("fault").replaceChildren();
      enable();
    } catch (error) {
      report(error, by("fault"));
    }
  }

  for (const element of document.querySelectorAll("[data-say]")) {
    Words.tell(element, element.dataset.say);
  }
  by("legend").append(page.key);
  by("beta").value = by("temperature").value = 1;
  by("beta-slide").value = slide(1);
  by("beta-slide").addEventListener("input", () => (by("beta").value = slid(amount("beta-slide"))));
  by("beta").addEventListener("input", () => (by("beta-slide").value = slide(amount("beta"))));
  by("limited").addEventListener("change", enable);
  by("key").addEventListener("change", () => state.model || (state.met = meet()));
  by("stop").addEventListener("click", () => state.running?.abort());
  by("anew").addEventListener("click", turn);
  for (const input of document.querySelectorAll("[name=way]")) input.addEventListener("change", turn);
  by("form").addEventListener("submit", (event) => {
    event.preventDefault();
    go();
  });
  by("form").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    go();
  });
  Words.button(by("language"));
  turn();
  enable();
  state.met = meet();
}
