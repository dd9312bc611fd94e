"use strict";
// The page of the cohort.

const VERDICTS = { pass: "#009e73", review: "#e69f00", fail: "#d55e00" };
const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function tableOf(names, rows) {
  const cells = (row) => row.map((cell) => element("td", typeof cell === "string" ? {} : { class: "n" },
    typeof cell === "number" ? number(cell) : cell));
  return element("div", { class: "scroll" }, element("table", {},
    element("thead", {}, element("tr", {}, ...names.map((name) => element("th", {}, name)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells(row))))));
}

function bar(fraction, color) {
  const made = element("i", { class: "bar-part" });
  made.style.width = `${100 * Math.min(1, fraction || 0)}%`;
  made.style.background = color;
  return element("div", { class: "bars-cell" }, made);
}

function showFunnel({ states, steps, tiles, reasons }, known) {
  const pairs = Object.values(states).reduce((sum, count) => sum + count, 0);
  const rows = [["pairs", pairs, pairs, ""]];
  for (const [name, count] of Object.entries(states)) if (count) rows.push([`  ${name.replace("_", " ")}`, count, pairs, ""]);
  const grid = steps.tiles_grid;
  rows.push(["grid positions", grid, grid, ""], ["above the tissue floor", steps.tiles_tissue, grid, ""], ["written", steps.tiles_written, grid, ""]);
  let left = tiles;
  for (const [name, count] of Object.entries(reasons)) {
    if (!count) continue;
    left -= count;
    rows.push([`not: ${known[name].words}`, left, grid, `−${count}`]);
  }
  $("#funnel").replaceChildren(tableOf(["", "left", "", ""], rows.map(([words, count, whole, less]) => [words, count, less, bar(count / whole, "#0072b2")])));
}

function showScatter(pairs) {
  const known = pairs.filter((row) => row.tile_ok !== null && row.error_p90_um !== null);
  if (!known.length) {
    $("#scatter").replaceChildren(element("p", { class: "quiet" }, "No pair was registered here."));
    return;
  }
  const width = 520, height = 300, left = 56, bottom = 44, top = 10, right = 14;
  const logs = known.map((row) => Math.log10(Math.max(row.error_p90_um, 1)));
  const low = Math.floor(Math.min(...logs)), high = Math.max(Math.ceil(Math.max(...logs)), low + 1);
  const x = (value) => left + (Math.log10(Math.max(value, 1)) - low) / (high - low) * (width - left - right);
  const y = (value) => height - bottom - value * (height - bottom - top);
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "scatter", role: "img", "aria-label": "Registrations of the pairs" });
  for (let power = low; power <= high; power += 1) {
    drawn.append(svg("line", { x1: x(10 ** power), x2: x(10 ** power), y1: y(0), y2: y(1) }),
      svg("text", { x: x(10 ** power), y: height - bottom + 18, "text-anchor": "middle" }, String(10 ** power)));
  }
  for (const value of [0, 0.25, 0.5, 0.75, 1]) {
    drawn.append(svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, `${100 * value} %`));
  }
  drawn.append(svg("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, "estimated error, 90th percentile, µm"),
    svg("text", { x: 12, y: height / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${height / 2})` }, "squares matching in place"));
  for (const row of known) {
    const title = svg("title", {}, `${row.pair}: ${row.registration}, ${number(100 * row.tile_ok)} % of the squares, ${number(row.error_p90_um)} µm`);
    const point = svg("circle", { cx: x(row.error_p90_um), cy: y(row.tile_ok), r: 6, fill: VERDICTS[row.registration], "fill-opacity": 0.75, stroke: row.verdict ? "#000" : "none" }, title);
    drawn.append(svg("a", { href: `index.html#${row.pair}` }, point));
  }
  const legend = element("ul", { class: "legend" }, ...Object.entries(VERDICTS).map(([name, color]) =>
    swatch(color, `${name}: ${known.filter((row) => row.registration === name).length}`, "dot")), element("li", { class: "quiet" }, "framed: decided by a person"));
  $("#scatter").replaceChildren(drawn, legend);
}

function box([p5, p25, p50, p75, p95]) {
  const width = 160, scale = (value) => value * width;
  return svg("svg", { viewBox: `0 0 ${width} 16`, width, height: 16, class: "box" },
    svg("line", { x1: scale(p5), x2: scale(p95), y1: 8, y2: 8 }),
    svg("rect", { x: scale(p25), width: Math.max(1, scale(p75 - p25)), y: 3, height: 10 }),
    svg("line", { x1: scale(p50), x2: scale(p50), y1: 1, y2: 15, class: "median" }));
}

function showScores({ groups, biases, staining }, known) {
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  $("#groups").replaceChildren(tableOf(["data set", "score", "tiles", "accepted", ""], groups.map((group) => [
    group.dataset, group.score, group.tiles, group.accepted, bar(group.accepted / group.tiles, "#0072b2")])));
  $("#biases").replaceChildren(...biases.map((bias) => element("li", {},
    `${bias.dataset}, ${bias.score}: ${percent(bias.fraction)} of the tiles are accepted, of the other scores ${percent(bias.other_fraction)}; mainly by: ${known[bias.reason].words}.`)));
  $("#staining").replaceChildren(...Object.entries(staining).flatMap(([engine, rows]) => [
    element("p", { class: "quiet" }, `Masks of ${engine}, accepted tiles. Line: 5th to 95th percentile of the positive fraction of a tile, 0 to 100 %; box: quartiles.`),
    tableOf(["data set", "score", "tiles", "positive fraction", "median", "cells/mm²", "positive cells"], rows.map((row) => [
      row.dataset, row.score, row.tiles, box(row.percentiles), percent(row.median), Math.round(row.cells_per_mm2), row.positive === null ? "–" : percent(row.positive)])),
  ]));
}

function showExamples(rows, engines, networks) {
  lightbox.rows = () => rows;
  lightbox.about = (row) => `${row.dataset}, HER2 ${row.score}`;
  $("#drawn").textContent = rows.length ? `${rows.length} drawn, data sets and scores in turn; a click shows H&E, HER2, mask${networks.length ? " and the outputs of the networks" : ""}.` : "No tile is accepted.";
  $("#examples").replaceChildren(...rows.map((row) => {
    const button = element("button", { title: row.tile },
      element("img", { src: `picture/${row.tile}/he?side=160`, loading: "lazy", alt: "H&E" }),
      element("img", { src: `picture/${row.tile}/her2?side=160`, loading: "lazy", alt: "HER2" }),
      element("span", {}, `${row.dataset}, ${row.score}`));
    button.onclick = () => lightbox.open(row, engines, networks);
    return button;
  }));
}

Promise.all([get("api/pairs"), get("api/controls"), get("api/cohort")]).then(([pairs, controls, cohort]) => {
  lightbox.demo = controls.demo;
  showFunnel(cohort, controls.reasons);
  showScatter(pairs);
  showScores(cohort, controls.reasons);
  showExamples(cohort.examples, controls.engines, controls.networks);
  document.body.dataset.loaded = "yes";
}).catch((error) => { $("#error").textContent = error.message; });
