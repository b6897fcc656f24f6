"use strict";
// Decisions on the rows of a list. They stay in this browser, under the hash of the list, until they are saved.
(() => {
  let active = null; // the review that keys are for

  const saved = (name, text, type) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const csvLine = (fields) => fields.map((text) => /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text).join(",") + "\n";

  const review = (box) => {
    const data = JSON.parse(box.querySelector("script").textContent);
    const list = box.querySelector("ol"), select = box.querySelector("select");
    const key = `siftune review ${data.key}`, decisions = new Map(); // number of a row -> { selected } or { completion }
    let now = 0;

    // ---- one row: its decision, and what is shown of it
    const isSelected = (number) => {
      const decision = decisions.get(number);
      if (decision === undefined) return data.rows[number].selected;
      return decision.selected ?? false; // the corrected row is in the other file
    };
    const correction = (number) => decisions.get(number)?.completion;
    const items = data.rows.map((row) => {
      const item = box.querySelector("template").content.firstElementChild.cloneNode(true);
      for (const [name, text] of [["place", row.about], ["numbers", row.numbers], ["prompt", row.prompt], ["completion", row.completion], ["reason", row.reason]]) {
        item.querySelector(`.${name}`).textContent = text;
      }
      item.querySelector(".place").title = row.fields[data.header.indexOf("place")];
      item.querySelector("[value=correct]").disabled = row.around === null;
      return item;
    });
    const show = (number) => {
      const item = items[number], decision = decisions.get(number), text = correction(number);
      item.classList.toggle("out", !isSelected(number));
      item.classList.toggle("corrected", text !== undefined);
      item.querySelector(".state").textContent = text !== undefined ? "✎ corrected" : isSelected(number) ? "✓ selected" : "✕ left out";
      item.querySelector(".correction").textContent = text ?? "";
      for (const part of item.querySelectorAll(".new")) part.hidden = text === undefined;
      const pressed = { keep: decision?.selected === true, drop: decision?.selected === false, correct: text !== undefined };
      for (const [name, is] of Object.entries(pressed)) item.querySelector(`[value=${name}]`).setAttribute("aria-pressed", is);
    };

    // ---- all rows: how many are decided, and which are shown
    const hiddenOut = data.others.reduce((sum, [, numbers]) => sum + numbers.length, 0);
    const count = () => {
      const numbers = [...data.rows.keys()], corrected = numbers.filter((number) => correction(number) !== undefined).length;
      const out = hiddenOut + numbers.filter((number) => !isSelected(number)).length;
      const written = (value) => value.toLocaleString("en");
      box.querySelector(".count").textContent =
        `${written(decisions.size)} of ${written(data.rows.length)} decided, ${written(out)} of ${written(data.total)} left out, ${written(corrected)} corrected`;
      box.querySelector(".save-corrected").disabled = corrected === 0;
    };
    const parts = [...data.parts, ["all rows", [...data.rows.keys()]]];
    select.replaceChildren(...parts.map(([name, numbers], at) => new Option(`${name} (${numbers.length.toLocaleString("en")})`, at)), new Option("rows with a decision", "decided"));
    const filter = () => {
      const shown = new Set(select.value === "decided" ? decisions.keys() : parts[select.value][1]);
      items.forEach((item, number) => { item.hidden = !shown.has(number); });
      if (items[now].hidden) mark(Math.max(0, items.findIndex((item) => !item.hidden)));
    };
    const mark = (number) => {
      items[now].removeAttribute("aria-current");
      now = number;
      items[now].setAttribute("aria-current", "true");
    };
    // rows get their real heights in the frames after they come into view
    const reveal = (frames) => {
      items[now].scrollIntoView({ block: "nearest", behavior: "instant" });
      if (frames) requestAnimationFrame(() => reveal(frames - 1));
    };
    const go = (number) => {
      mark(number);
      items[now].focus({ preventScroll: true });
      reveal(5);
    };
    const move = (step) => {
      let next = now + step;
      while (items[next]?.hidden) next += step;
      if (items[next]) go(next);
    };

    // ---- storage
    const stored = (work) => {
      try { work(); } catch (error) { if (error instanceof DOMException) box.querySelector(".not-stored").hidden = false; }
    };
    const keep = () => stored(() => localStorage.setItem(key, JSON.stringify([...decisions])));
    const decide = (number, decision) => {
      if (decision === undefined) decisions.delete(number); else decisions.set(number, decision);
      show(number);
      count();
      keep();
    };
    const isDecision = (number, decision) =>
      typeof decision?.selected === "boolean" || (typeof decision?.completion === "string" && data.rows[number].around !== null);
    stored(() => {
      for (const [number, decision] of JSON.parse(localStorage.getItem(key) ?? "[]")) {
        if (data.rows[number] && isDecision(number, decision)) decisions.set(number, decision);
      }
    });

    // ---- correction of a completion; white space around it stays
    const edges = (text) => [text.match(/^\s*/)[0], text.trim() === "" ? "" : text.match(/\s*$/)[0]];
    const editor = (number) => items[number].querySelector("textarea");
    const correct = (number) => {
      if (data.rows[number].around === null) return;
      const area = editor(number);
      if (area.hidden && area.value === "") area.value = (correction(number) ?? data.rows[number].completion).trim();
      area.hidden = false;
      mark(number);
      area.focus();
      area.select();
      area.scrollIntoView({ block: "nearest", behavior: "instant" });
      change(number);
    };
    const change = (number) => {
      const { completion } = data.rows[number], text = editor(number).value.trim();
      const [before, after] = edges(completion);
      if (text !== "" && text !== completion.trim().replaceAll("\r\n", "\n")) decide(number, { completion: before + text + after });
      else if (correction(number) !== undefined) decide(number, undefined);
    };
    const settle = (number, decision) => {
      editor(number).hidden = true;
      decide(number, decision);
    };
    const acts = {
      keep: (number) => { settle(number, { selected: true }); move(1); },
      drop: (number) => { settle(number, { selected: false }); move(1); },
      correct,
      undo: (number) => { editor(number).value = ""; settle(number, undefined); },
    };

    // ---- files
    const decisionsFile = () => {
      const place = data.header.indexOf("place"), selected = data.header.indexOf("selected");
      const lines = data.rows.map((row, number) => row.fields.map((field, at) => at === selected ? (isSelected(number) ? "yes" : "no") : field));
      for (const [file, numbers] of data.others) {
        for (const number of numbers) lines.push(data.header.map((_, at) => at === place ? file + number : at === selected ? "no" : ""));
      }
      return [data.header, ...lines].map(csvLine).join("");
    };
    const correctedFile = () => data.rows.map((row, number) => {
      const text = correction(number);
      return text === undefined ? "" : `${row.around[0]}${JSON.stringify(text)}${row.around[1]}\n`;
    }).join("");

    list.append(...items);
    items.forEach((item, number) => {
      show(number);
      item.addEventListener("click", (event) => {
        const button = event.target.closest("button");
        mark(number);
        if (!button || button.disabled) return;
        const again = button.getAttribute("aria-pressed") === "true" && button.value !== "correct";
        acts[again ? "undo" : button.value](number);
      });
      editor(number).addEventListener("input", () => change(number));
    });
    select.addEventListener("change", filter);
    box.querySelector(".save").addEventListener("click", () => saved("decisions.csv", decisionsFile(), "text/csv"));
    box.querySelector(".save-corrected").addEventListener("click", () => saved("corrected.jsonl", correctedFile(), "application/jsonl"));
    mark(0);
    filter();
    count();
    const self = { list, acts, move, go, now: () => now, close: () => { editor(now).hidden = true; go(now); } };
    for (const kind of ["pointerdown", "focusin"]) box.addEventListener(kind, () => { active = self; });
    return self;
  };

  for (const box of document.querySelectorAll(".review")) {
    const one = review(box);
    active ??= one;
  }
  const ACTS = { k: "keep", d: "drop", c: "correct", u: "undo" }, MOVES = { n: 1, ArrowDown: 1, p: -1, ArrowUp: -1 };
  document.addEventListener("keydown", (event) => {
    const { key, target } = event;
    if (!active || event.ctrlKey || event.metaKey || event.altKey || target.matches("select")) return;
    if (target.matches("textarea")) {
      if (key === "Escape") active.close();
      return;
    }
    const inside = active.list.contains(document.activeElement);
    if (!(key in ACTS || key in MOVES) || (key.startsWith("Arrow") && !inside)) return;
    event.preventDefault();
    if (!inside) active.go(active.now()); // the first key only leads to the row
    else if (key in ACTS) active.acts[ACTS[key]](active.now());
    else active.move(MOVES[key]);
  });
})();
