// The page that `qvgpt lens` writes: its texts stand in the page itself.
"use strict";

{
  const { texts } = JSON.parse(document.getElementById("lens-data").textContent);
  const page = new Lens.Page();
  const title = document.getElementById("title");
  if (!title.textContent) Words.tell(title, "heading");
  const main = document.getElementById("texts");
  main.append(page.key);
  for (const { tokens, ...about } of texts) {
    const text = page.text(about);
    main.append(text.element);
    text.show(tokens);
  }
  Words.button(document.getElementById("language"));
}
