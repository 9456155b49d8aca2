// What the pages say, in English and Chinese. A word may be a function of what it is about.
"use strict";

const WORDS = {
  en: {
    heading: "What the model values",
    language: "中文",
    key: "Colours: A = Q − V, what the token adds to the return to be expected",
    worse: "worse than the model on average",
    better: "better",
    curve: "V: return expected so far",
    chosen: "Q: with the token",
    returns: "return that came",
    tokens: (n) => `${n} token${n === 1 ? "" : "s"}`,
    reward: (x) => `reward ${x}`,
    sum: (x) => `Σ A = ${x}`,
    first: (v) => `V at first ${v}`,
    kl: (x) => `KL ${x} nats`,
    likelihood: (base, guided) => `log p: base ${base}, guided ${guided}`,
    text: "The text, token by token. Arrow keys go from token to token.",
    table: "As a table",
    token: "token",
    q: "Q",
    v: "V",
    advantage: "A = Q − V",
    base: "base",
    guided: "guided",
    alternatives: "likeliest",
    joined: (n) => `${n} tokens that share a character`,
    space: "space",
    line: "line break",
    noValues: "no values known here",
  },
  zh: {
    heading: "模型看重什么",
    language: "English",
    key: "颜色：A = Q − V，即该词元使期望回报增加多少",
    worse: "低于模型平均水平",
    better: "更好",
    curve: "V：至此的期望回报",
    chosen: "Q：选此词元后",
    returns: "实际回报",
    tokens: (n) => `${n} 个词元`,
    reward: (x) => `奖励 ${x}`,
    sum: (x) => `Σ A = ${x}`,
    first: (v) => `起始 V ${v}`,
    kl: (x) => `KL ${x} 奈特`,
    likelihood: (base, guided) => `log p：基础 ${base}，引导 ${guided}`,
    text: "逐个词元的文本。用方向键在词元之间移动。",
    table: "以表格显示",
    token: "词元",
    q: "Q",
    v: "V",
    advantage: "A = Q − V",
    base: "基础",
    guided: "引导",
    alternatives: "最可能",
    joined: (n) => `${n} 个词元共同组成一个字符`,
    space: "空格",
    line: "换行",
    noValues: "此处没有价值",
  },
};

const Words = {
  lang: (navigator.language || "en").startsWith("zh") ? "zh" : "en",
  changed: [],

  get(name, ...about) {
    const word = WORDS[this.lang][name];
    return typeof word === "function" ? word(...about) : word;
  },

  // Let an element say something, in whichever language is chosen, now and later.
  tell(element, make) {
    element.dataset.told = "";
    element.told = typeof make === "string" ? () => this.get(make) : make;
    element.textContent = element.told();
    return element;
  },

  choose(lang) {
    this.lang = lang;
    document.documentElement.lang = lang === "zh" ? "zh-CN" : "en";
    for (const element of document.querySelectorAll("[data-told]")) {
      element.textContent = element.told();
    }
    for (const hear of this.changed) hear();
  },

  // A button that says the other language and chooses it.
  button(element) {
    this.tell(element, "language");
    element.addEventListener("click", () => this.choose(this.lang === "en" ? "zh" : "en"));
    this.choose(this.lang);
  },
};
