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

function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}
