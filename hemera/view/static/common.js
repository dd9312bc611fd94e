"use strict";
// What the pages share: requests, elements, numbers.

const $ = (selector) => document.querySelector(selector);

async function get(address) {
  const answer = await fetch(address);
  return read(answer);
}

async function post(address, content) {
  const answer = await fetch(address, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content),
  });
  return read(answer);
}

async function read(answer) {
  if (!answer.ok) {
    const text = await answer.text();
    let words = text;
    try { words = JSON.parse(text).error; } catch { /* plain text */ }
    throw new Error(words.trim() || `status ${answer.status}`);
  }
  return answer.json();
}

// An element with attributes and children; a text is never read as HTML.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function swatch(color, words, kind = "") {
  const mark = element("i", { class: kind });
  mark.style.background = color;
  return element("li", {}, mark, words);
}

function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 1000 ? String(Math.round(value)) : String(Number(value.toPrecision(digits)));
}

function duration(hours) {
  if (hours === null) return "";
  if (hours >= 1) return `${number(hours, 2)} h`;
  return hours >= 1 / 60 ? `${number(60 * hours, 2)} min` : `${Math.ceil(3600 * hours)} s`;
}

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

// A text whose paths and names break behind / and _ alone.
function breakable(text) {
  return text.split(/(?<=[/_])/).flatMap((part) => [part, element("wbr")]);
}

// What the next run would do, as `hemera plan --json` writes it.
function planRows(found) {
  if (found.error) return [element("p", { class: "error" }, found.error)];
  if (!found.stages.length) return [element("p", {}, "Nothing: all results are up to date.")];
  const again = found.stages.filter((stage) => stage.replaced_bytes), first = found.stages.filter((stage) => !stage.replaced_bytes);
  const jobs = (stages) => plural(stages.reduce((sum, stage) => sum + stage.jobs, 0), "job");
  // The reasons have a row of their own: a column beside three others is too narrow for paths.
  const rows = again.flatMap((stage) => [
    element("tr", { class: "stage-row" },
      element("td", {}, stage.stage),
      element("td", {}, ...breakable(stage.units.every(Boolean) && stage.jobs <= 3 ? stage.units.join(", ") : plural(stage.jobs, "job"))),
      element("td", { class: "n" }, duration(stage.hours))),
    element("tr", {}, element("td", { class: "reasons", colspan: 3 }, ...breakable(Object.keys(stage.reasons).join("; ")))),
  ]);
  const head = element("thead", {}, element("tr", {}, ...["stage", "of", "time"].map((name) => element("th", {}, name))));
  const command = element("code", {}, "hemera run");
  const lines = again.length ? [element("p", {}, command, ` will run ${jobs(again)} again:`), element("table", {}, head, element("tbody", {}, ...rows))] : [];
  if (first.length) lines.push(element("p", {}, command.cloneNode(true), ` will run ${jobs(first)} for the first time: ${first.map((stage) => stage.stage).join(", ")}.`));
  return lines.concat(found.missing.map((line) => element("p", { class: "error" }, `missing: ${line}`)));
}
