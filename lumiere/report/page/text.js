// The explorer: the tokens of the text, and the computation at the chosen token.

function drawTextChoice() {
  const options = data.texts.map((text, index) => {
    const start = text.tokens.slice(1, 9).map(label).join("").replaceAll("·", " ").trim();
    return element("option", { value: index }, `${start} … (${text.source})`);
  });
  find("text").replaceChildren(...options);
  find("text").addEventListener("change", (event) => showText(Number(event.target.value)));
}

// Start at the last token but one: most of the text is read, and the next token is known.
function showText(index) {
  choose({ text: index, position: lastButOne(data.texts[index]), word: 0 });
}

function lastButOne(text) {
  return Math.max(0, text.tokens.length - 2);
}

function drawTokens() {
  const buttons = currentText().tokens.map((token, position) =>
    element(
      "button",
      { type: "button", class: "token", "data-key": position, onclick: () => choose({ position, word: 0 }) },
      label(token),
    ),
  );
  redraw(find("tokens"), ...buttons);
  shadeTokens();
}

// Attention from the chosen position, by the chosen head or averaged over all heads.
function shadeTokens() {
  const { position, head } = state;
  const text = currentText();
  const rows = text.patterns.flatMap((layer, l) =>
    layer.filter((_, h) => !head || (head[0] === l && head[1] === h)).map((rows) => rows[position]),
  );
  const shares = meanRow(rows);
  [...find("tokens").children].forEach((button, index) => {
    const isChosen = index === position;
    button.setAttribute("aria-pressed", isChosen);
    button.tabIndex = isChosen ? 0 : -1;
    button.classList.toggle("later", index > position);
    button.title = index > position ? "later: not visible" : `${percent(Math.round(shares[index]))} of the attention`;
    shaded(button, index > position ? 0 : Math.sqrt(shares[index] / 1000));
  });
  drawSaid();
}

function drawSaid() {
  const { position, head } = state;
  const text = currentText();
  const word = text.words[0];
  const parts = ["After ", tokenSpan(text.tokens[position]), " the model predicts "];
  parts.push(tokenSpan(word.tokens[position]), ` (${percent(word.probabilities[position])}). `);
  if (position + 1 < text.tokens.length) {
    parts.push("The next token is ", tokenSpan(text.tokens[position + 1]));
    parts.push(` (${percent(text.words.at(-1).probabilities[position])}). `);
  }
  parts.push(`Shaded: the attention of ${head ? `head ${headName(...head)}` : "all heads, averaged"}.`);
  redraw(find("said"), ...parts);
}

// A grid of layers by heads: where each attends most.
function drawLooks() {
  const { position } = state;
  const text = currentText();
  const grid = element("div", { class: "looks", role: "group", "aria-label": "Heads. Arrow keys move." });
  const columns = Math.min(data.heads, 4);
  grid.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
  text.patterns.forEach((layer, l) =>
    layer.forEach((rows, h) => {
      const row = rows[position];
      const source = argmax(row);
      const isChosen = state.head?.[0] === l && state.head?.[1] === h;
      const button = element(
        "button",
        {
          type: "button",
          "data-key": headName(l, h),
          "aria-pressed": isChosen,
          title: `${headName(l, h)} attends ${percent(row[source])} to position ${source}`,
          onclick: () => choose({ head: isChosen ? null : [l, h] }),
        },
        element("span", { class: "name" }, `${headName(l, h)} `),
        percent(row[source]),
        element("span", { class: "token" }, label(text.tokens[source])),
      );
      grid.append(shaded(button, row[source] / 1000));
    }),
  );
  roving(grid, () => columns, false);
  redraw(find("looks"), grid);
}

function drawSays() {
  const { position } = state;
  const { lens } = currentText();
  const grid = element("div", { class: "guesses" });
  for (let stage = lens.stages.length - 1; stage >= 0; stage--) {
    grid.append(element("div", { class: "name" }, lens.stages[stage]));
    lens.tokens[stage][position].forEach((token, rank) => {
      const share = lens.probabilities[stage][position][rank];
      const cell = element("div", { title: label(token) }, element("span", { class: "token" }, label(token)), percent(share));
      grid.append(shaded(cell, share / 1000));
    });
  }
  const depth = lens.decisions[position];
  const decided = element("p", { class: "note" }, `From ${lens.stages[depth]} on, the top-1 prediction stays the same.`);
  redraw(find("says"), grid, decided);
}

views.push({ on: ["text"], draw: drawTokens }, { on: ["position", "head"], draw: shadeTokens });
views.push({ on: ["text", "position", "head"], draw: drawLooks }, { on: ["text", "position"], draw: drawSays });
