"use strict";
// The page of the tiles: limits of filter, what they decide, and each tile.

const TILES_ACCEPTED = "#0072b2", DELAY_MS = 120, SLIDE_VH = 38;
const state = { limits: {}, controls: [], reasons: {}, outcome: null, facts: null };
let table = null, waiting = null, asked = 0;

const words = (decision) => (decision === "accepted" ? "accepted" : state.reasons[decision].words);
const color = (decision) => (decision === "accepted" ? TILES_ACCEPTED : state.reasons[decision].color);

// Limits

function controlRow(control) {
  const { option, help, value, sign, optional, low, high } = control;
  const label = element("label", { for: option, title: `${help}.` }, option.replaceAll("_", " "));
  if (control.switch) {
    const box = element("input", { type: "checkbox", id: option });
    box.checked = value;
    box.onchange = () => change(option, box.checked);
    return element("div", { class: "control" }, label, box);
  }
  const step = (high - low) / 200;
  const slider = element("input", { type: "range", min: low, max: high, step, "aria-label": option });
  const field = element("input", { type: "number", step: "any", id: option });
  slider.value = value ?? (sign === "≥" ? low : high);
  field.value = value ?? "";
  if (optional) field.placeholder = "none";
  slider.oninput = () => { field.value = Number(Number(slider.value).toPrecision(4)); change(option, Number(field.value)); };
  field.onchange = () => {
    if (field.value === "" && !optional) return;
    if (field.value !== "") slider.value = field.value;
    change(option, field.value === "" ? null : Number(field.value));
  };
  return element("div", { class: "control" }, label, element("span", {}, sign), field, slider);
}

function showControls() {
  $("#controls").replaceChildren(...state.controls.map(controlRow));
  state.limits = {};
  mark();
}

function change(option, value) {
  const { value: configured } = state.controls.find((each) => each.option === option);
  if (value === configured) delete state.limits[option];
  else state.limits[option] = value;
  mark();
  clearTimeout(waiting);
  waiting = setTimeout(() => { update(); table.setData(); }, DELAY_MS);
}

function mark() {
  const changed = Object.keys(state.limits);
  $("#save").disabled = $("#reset").disabled = !changed.length;
  for (const row of $("#controls").children) {
    const input = row.querySelector("[id]");
    row.classList.toggle("changed", changed.includes(input.id));
  }
}

async function update() {
  const own = asked += 1;
  try {
    const outcome = await post("api/limits", { limits: state.limits, pair: $("#pair").value });
    if (own !== asked) return;
    state.outcome = outcome;
    $("#error").textContent = "";
    showOutcome();
    drawMap();
    document.body.dataset.updated = own;
  } catch (error) {
    if (own === asked) $("#error").textContent = error.message;
  }
}

function showOutcome() {
  const { tiles, accepted, reasons, groups, biases, changed } = state.outcome;
  const percent = (part, whole) => (whole ? `${(100 * part / whole).toFixed(1)} %` : "–");
  $("#summary").textContent = `${accepted} of ${plural(tiles, "tile")} accepted` +
    (Object.keys(state.limits).length ? `; ${changed} decided otherwise than in results/filter` : "");
  let left = tiles;
  const rows = [["tiles", tiles, tiles, ""], ...Object.entries(reasons).map(([name, count]) => {
    left -= count;
    return [state.reasons[name].words, left, -count, state.reasons[name].color, name];
  })].filter((row) => row[2] !== 0);
  $("#funnel").replaceChildren(element("table", {}, element("tbody", {}, ...rows.map(([text, rest, change_, color_, name]) => {
    const bar = element("i", { class: "bar-part" });
    bar.style.width = `${100 * rest / (tiles || 1)}%`;
    const row = element("tr", name ? { "data-reason": name, "data-tiles": -change_ } : {},
      element("td", {}, element("i", { class: "chip" }), text), element("td", { class: "n" }, name ? `−${-change_}` : ""),
      element("td", { class: "n" }, String(rest)), element("td", { class: "bars" }, bar));
    row.querySelector(".chip").style.background = color_ || TILES_ACCEPTED;
    return row;
  }))));
  const head = element("thead", {}, element("tr", {}, ...["data set", "score", "tiles", "accepted"].map((name) => element("th", {}, name))));
  $("#groups").replaceChildren(element("table", {}, head, element("tbody", {}, ...groups.map((group) => element("tr", {},
    element("td", {}, group.dataset), element("td", {}, group.score), element("td", { class: "n" }, String(group.tiles)),
    element("td", { class: "n" }, `${group.accepted} (${percent(group.accepted, group.tiles)})`))))));
  $("#biases").replaceChildren(...biases.map((bias) => element("li", {},
    `${bias.dataset}, ${bias.score}: ${percent(bias.fraction, 1)} of the tiles are accepted, of the other scores ${percent(bias.other_fraction, 1)}; mainly by: ${words(bias.reason)}.`)));
}

// The slide

async function openPair() {
  const pair = $("#pair").value;
  state.facts = null;
  try {
    const facts = await get(`api/pair/${pair}`);
    if ($("#pair").value !== pair) return;
    state.facts = facts;
    $("#slide").style.width = `min(100%, ${SLIDE_VH * facts.width / facts.height}vh)`;
    $("#slide").src = `tile/${pair}/he/0/0/0?v=${facts.version}`;
    $("#place").textContent = "";
  } catch (error) {
    $("#place").textContent = error.message;
  }
  drawMap();
}

function drawMap() {
  const { facts, outcome } = state, canvas = $("#map"), ratio = window.devicePixelRatio || 1;
  const box = $("#slide").getBoundingClientRect();
  Object.assign(canvas, { width: box.width * ratio, height: box.height * ratio });
  Object.assign(canvas.style, { width: `${box.width}px`, height: `${box.height}px` });
  if (!facts || !outcome || !box.width) return;
  const context = canvas.getContext("2d"), scale = box.width * ratio / facts.width;
  for (const tile of facts.tiles) {
    const reason = outcome.decisions[tile.tile];
    if (reason === undefined) continue;
    const side = tile.side * scale;
    context.fillStyle = `${color(reason || "accepted")}66`;
    context.fillRect(tile.x * scale, tile.y * scale, side - 1, side - 1);
    context.strokeStyle = lightbox.shown === tile.tile ? "#000" : color(reason || "accepted");
    context.lineWidth = (lightbox.shown === tile.tile ? 3 : 1) * ratio;
    context.strokeRect(tile.x * scale + 0.5, tile.y * scale + 0.5, side - 2, side - 2);
  }
}

function tileAt(event) {
  const { facts } = state, box = $("#map").getBoundingClientRect();
  if (!facts) return undefined;
  const x = (event.clientX - box.left) / box.width * facts.width, y = (event.clientY - box.top) / box.width * facts.width;
  return facts.tiles.find((tile) => x >= tile.x && y >= tile.y && x < tile.x + tile.side && y < tile.y + tile.side);
}

// The table

function columns(found) {
  const text = { headerFilter: "input", headerFilterLiveFilter: true };
  const picture = (cell, parameters) => {
    const image = element("img", { loading: "lazy", width: 56, height: 56, alt: "",
      src: `picture/${cell.getRow().getData().tile}/${parameters.picture}?side=112` });
    return image;
  };
  const look = (name, title) => ({ title, formatter: picture, formatterParams: { picture: name }, headerSort: false, width: 72, cellClick: (_, cell) => enlarge(cell.getRow().getData()) });
  const named = { tile: "tile", pair: "pair", dataset: "data set", score: "score", decision: "decision" };
  const decision = (cell) => {
    const mark_ = element("i", { class: "chip" }), value = cell.getValue();
    mark_.style.background = color(value);
    return element("span", {}, mark_, words(value));
  };
  return [
    look("he", "H&E"), look("her2", "HER2"), ...found.engines.slice(0, 1).map((engine) => look(engine, "mask")),
    ...found.columns.map((field) => ({
      field, title: named[field] || found.titles[field] || field.replaceAll("_", " "),
      ...(field in named ? text : { headerFilter: "input", headerFilterPlaceholder: "at least", hozAlign: "right", formatter: (cell) => number(cell.getValue()) }),
      ...(field === "decision" ? { formatter: decision } : {}),
    })),
  ];
}

function makeTable(found) {
  table = new Tabulator("#table", {
    columns: columns(found), layout: "fitDataFill", rowHeight: 64, placeholder: "no tiles",
    ajaxURL: "api/tiles", pagination: true, paginationMode: "remote", sortMode: "remote", filterMode: "remote",
    paginationSize: 50, paginationCounter: "rows",
    ajaxRequestFunc: (address, _, query) => post(address, {
      limits: state.limits,
      query: { page: query.page, size: query.size, sort: query.sort || [], filter: (query.filter || []).map(({ field, value }) => ({ field, value })) },
    }),
  });
  table.on("dataLoadError", (error) => { $("#error").textContent = error.message; });
  table.on("dataLoaded", () => { document.body.dataset.loaded = "yes"; });
}

const enlarge = (row) => lightbox.open(row, state.engines, state.networks);

async function save() {
  try {
    const done = await post("api/save", { limits: state.limits });
    $("#saved").textContent = `written to ${done.configfile}` + (done.backup ? `; backup ${done.backup}` : "");
    await load();
    $("#plan").textContent = "calculating what the next run repeats";
    $("#plan").replaceChildren(...planRows(await get("api/plan")));
  } catch (error) {
    $("#error").textContent = error.message;
  }
}

async function load() {
  const found = await get("api/controls");
  Object.assign(state, { controls: found.controls, reasons: found.reasons, engines: found.engines, networks: found.networks });
  $("#save").textContent = `Save to ${found.configfile}`;
  lightbox.demo = found.demo;
  showControls();
  if (!table) makeTable(found);
  await update();
}

$("#save").onclick = save;
$("#reset").onclick = () => { showControls(); update(); table.setData(); };
$("#pair").onchange = () => { openPair(); update(); };
$("#slide").onload = drawMap;
lightbox.rows = () => table.getData();
lightbox.about = (row) => words(row.decision);
lightbox.changed = drawMap;
$("#map").onclick = (event) => {
  const tile = tileAt(event);
  if (tile) enlarge({ tile: tile.tile, decision: state.outcome.decisions[tile.tile] || "accepted" });
};
$("#map").onpointermove = (event) => {
  const tile = tileAt(event);
  $("#place").textContent = tile ? `${tile.tile}: ${words(state.outcome.decisions[tile.tile] || "accepted")}` : "";
};
window.addEventListener("resize", drawMap);

get("api/pairs").then(async (pairs) => {
  const tiled = pairs.filter((row) => row.tiles);
  $("#pair").replaceChildren(...tiled.map((row) => element("option", { value: row.pair }, `${row.pair}: ${row.tiles} tiles`)));
  await load();
  if (tiled.length) openPair();
}).catch((error) => { $("#error").textContent = error.message; });
