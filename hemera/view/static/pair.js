"use strict";
// The page of a pair: both stains, overlays, the decision.

const TILE_PX = 512, FIELDS = 8, MOVE = 0.2;
const state = { pairs: [], facts: null, mode: "swipe", amount: { swipe: 50, blend: 50 }, layers: {}, engine: "" };
const boxes = [...document.querySelectorAll(".viewer")];
const viewers = ["first", "second"].map((id) => OpenSeadragon({
  id, drawer: "canvas", showNavigationControl: false, showNavigator: false, animationTime: 0.4,
  maxZoomPixelRatio: 8, minZoomImageRatio: 0.5, visibilityRatio: 0.3, imageLoaderLimit: 4,
  gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true }, crossOriginPolicy: false,
  loadTilesWithAjax: false, timeout: 120000,
}));
const overlays = viewers.map((viewer, k) => new Overlay(viewer, boxes[k].querySelector(":scope > canvas"), state));
let following = false;

function source(stain) {
  const { pair, width, height, level_max: maxLevel, version } = state.facts;
  return {
    width, height, tileSize: TILE_PX, tileOverlap: 0, minLevel: 0, maxLevel,
    getTileUrl: (level, x, y) => `tile/${pair}/${stain}/${level}/${x}/${y}?v=${version}`,
  };
}

async function open(name) {
  const row = state.pairs.find((each) => each.pair === name);
  if (!row) return;
  $("#pair").value = name;
  $("#name").textContent = name;
  $("#loading").textContent = "opening";
  $("#note").textContent = "";
  showDecision(row);
  try {
    const facts = await get(`api/pair/${name}`);
    if ($("#pair").value !== name) return;
    facts.tiles.forEach((tile) => { tile.pixels = tile.size_px; });
    state.facts = { ...facts, pair: name };
  } catch (error) {
    state.facts = null;
    viewers.forEach((viewer) => viewer.close());
    $("#note").textContent = error.message;
    $("#loading").textContent = "";
    return;
  }
  history.replaceState(null, "", `#${name}`);
  $("#note").textContent = state.facts.note;
  $("#engine").replaceChildren(...state.facts.engines.map((engine) => element("option", {}, engine)));
  $("#engine").hidden = state.facts.engines.length < 2;
  state.engine = $("#engine").value;
  overlays.forEach((overlay) => overlay.reset());
  showSignals();
  showLegend();
  viewers[0].open([source("he"), source("her2")]);
  viewers[1].open([source("her2")]);
}

function showDecision(row) {
  for (const [id, verdict] of [["accept", "accept"], ["refuse", "refuse"], ["clear", ""]]) {
    $(`#${id}`).setAttribute("aria-pressed", row.verdict === verdict);
  }
  $("#reason").value = row.verdict_reason;
  const score = row.score ? `, HER2 ${row.score}` : "";
  $("#about").textContent = `${row.dataset}, case ${row.case}${score}; ${row.accepted} of ${plural(row.tiles, "tile")} accepted`;
  const decided = state.pairs.filter((each) => each.verdict).length;
  const place = state.pairs.indexOf(row) + 1;
  $("#progress").textContent = `${place} of ${state.pairs.length}, worst registration first; ${decided} decided`;
}

function showSignals() {
  const { signals, registration, why } = state.facts;
  const rows = signals.map((signal) => element("tr", {},
    element("td", {}, signal.words),
    element("td", { class: "n" }, signal.shown),
    element("td", {}, signal.grade ? element("span", { class: `state ${signal.grade}` }, signal.grade) : "")));
  const head = registration
    ? element("p", {}, element("span", { class: `state ${registration}` }, registration), why ? `: ${why}` : "")
    : element("p", { class: "quiet" }, "No certificate: the pair came registered, or register has not run.");
  $("#signals").replaceChildren(head, element("table", {}, element("tbody", {}, ...rows)));
}

function showLegend() {
  const { tiles, reasons, classes, squares, landmarks } = state.facts, items = [];
  const count = (reason) => tiles.filter((tile) => tile.reason === reason).length;
  if (tiles.length) items.push(swatch("#0072b2", `accepted: ${plural(count(null), "tile")}`));
  for (const [name, reason] of Object.entries(reasons)) {
    if (count(name)) items.push(swatch(reason.color, `${reason.words}: ${plural(count(name), "tile")}`));
  }
  if (landmarks.length) items.push(swatch("#d6007a", "landmark on H&E", "dot"), swatch("#009e73", "the same on HER2, mapped", "dot"));
  if (state.layers.errors && squares.length) {
    items.push(...classes.map(([words, color]) => swatch(color, `error ${words}`)));
    items.push(swatch("#d55e00", "framed: another position matches better"));
  }
  if (state.layers.cells) {
    ["0", "1+", "2+", "3+"].forEach((name, k) => items.push(swatch(["#009e73", "#e69f00", "#d55e00", "#d6007a"][k], `cell ${name}`, "dot")));
  }
  if (state.layers.masks || state.layers.cells) items.push(element("li", { class: "quiet" }, "masks and cells appear when zoomed in"));
  $("#legend").replaceChildren(element("ul", { class: "legend" }, ...items));
}

// How both stains are shown

function setMode(mode) {
  state.mode = mode;
  document.querySelectorAll("[data-mode]").forEach((button) => {
    button.setAttribute("aria-pressed", button.dataset.mode === mode);
  });
  const hasAmount = mode === "swipe" || mode === "blend";
  $("#amount").hidden = !hasAmount;
  if (hasAmount) $("#amount").value = state.amount[mode];
  boxes[1].hidden = mode !== "beside";
  $("#divider").hidden = mode !== "swipe";
  boxes[0].querySelector(".stain").textContent = { swipe: "H&E | HER2", beside: "H&E" }[mode] || "H&E, HER2";
  show();
  requestAnimationFrame(() => { viewers[0].forceResize?.(); viewers[1].forceResize?.(); follow(0); });
}

function show() {
  const her2 = viewers[0].world.getItemAt(1);
  $("#divider").style.left = `${state.amount.swipe}%`;
  if (!her2) return;
  const { mode } = state, box = viewers[0].container.getBoundingClientRect();
  her2.setOpacity({ blend: state.amount.blend / 100, beside: 0 }[mode] ?? 1);
  her2.resetCroppingPolygons();
  const { width, height } = state.facts;
  const image = (x, y) => her2.viewerElementToImageCoordinates(new OpenSeadragon.Point(x, y));
  if (mode === "swipe") {
    const left = Math.min(Math.max(image(box.width * state.amount.swipe / 100, 0).x, 0), width);
    // A clip without area would show everything.
    her2.setOpacity(left < width ? 1 : 0);
    her2.setClip(left < width ? new OpenSeadragon.Rect(left, 0, width - left, height) : null);
    return;
  }
  her2.setClip(null);
  if (mode !== "checkerboard") return;
  const side = box.width / FIELDS, polygons = [];
  for (let column = 0; column < FIELDS; column += 1) {
    for (let row = column % 2; row * side < box.height; row += 2) {
      const a = image(column * side, row * side), b = image((column + 1) * side, (row + 1) * side);
      polygons.push([{ x: a.x, y: a.y }, { x: b.x, y: a.y }, { x: b.x, y: b.y }, { x: a.x, y: b.y }]);
    }
  }
  her2.setCroppingPolygons(polygons);
}

function follow(from) {
  if (following || state.mode !== "beside") return;
  const [leader, other] = from ? [viewers[1], viewers[0]] : viewers;
  if (!leader.world.getItemCount() || !other.world.getItemCount()) return;
  following = true;
  other.viewport.zoomTo(leader.viewport.getZoom(), null, true);
  other.viewport.panTo(leader.viewport.getCenter(), true);
  following = false;
}

viewers.forEach((viewer, k) => {
  viewer.addHandler("viewport-change", () => { follow(k); if (k === 0) show(); });
  viewer.addHandler("canvas-key", (event) => { event.preventDefaultAction = true; });
  boxes[k].addEventListener("pointermove", (event) => showCursor(event, k));
  boxes[k].addEventListener("pointerleave", () => boxes.forEach((box) => { box.querySelector(".cross").style.display = "none"; }));
});
viewers[0].addHandler("open", () => {
  show();
  $("#loading").textContent = "";
  document.body.dataset.opened = state.facts.pair;
});
viewers[0].addHandler("tile-drawn", () => { document.body.dataset.drawn = state.facts?.pair ?? ""; });
viewers[0].addHandler("tile-load-failed", (event) => { $("#loading").textContent = `tile not read: ${event.message}`; });

function showCursor(event, k) {
  const box = boxes[k].getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  const cross = boxes[1 - k].querySelector(".cross");
  cross.style.display = state.mode === "beside" ? "block" : "none";
  Object.assign(cross.style, { left: `${x}px`, top: `${y}px` });
  const item = viewers[k].world.getItemAt(0);
  if (!item || !state.facts) return;
  const at = item.viewerElementToImageCoordinates(new OpenSeadragon.Point(x, y));
  const tile = state.facts.tiles.find((each) => at.x >= each.x && at.y >= each.y && at.x < each.x + each.side && at.y < each.y + each.side);
  const why = tile?.reason ? `refused: ${state.facts.reasons[tile.reason].words}` : "accepted";
  const error = tile && tile.error_um !== null ? `, error about ${number(tile.error_um)} µm` : "";
  $("#place").textContent = `x ${Math.round(at.x)}, y ${Math.round(at.y)} px` + (tile ? `; tile ${tile.tile}, ${why}${error}` : "");
}

// Decisions

async function decide(verdict) {
  const pair = $("#pair").value, reason = $("#reason").value;
  const row = state.pairs.find((each) => each.pair === pair);
  if (!row) return;
  try {
    const done = await post("api/decide", { pair, verdict, reason });
    Object.assign(row, { verdict, verdict_reason: reason });
    const words = verdict ? `${pair}: ${verdict}` : `${pair}: undecided`;
    $("#written").textContent = `${words}, written to ${done.sheet}` + (done.backup ? `; backup ${done.backup}` : "");
    $("#written").className = "";
    if ($("#pair").value === pair) showDecision(row);
    showOptions();
    plan();
  } catch (error) {
    $("#written").textContent = `not written: ${error.message}`;
    $("#written").className = "error";
  }
}

let planned = 0;
async function plan() {
  const number_ = planned += 1;
  $("#plan").replaceChildren("calculating");
  delete document.body.dataset.planned;
  await new Promise((done) => setTimeout(done, 300));
  // Only the last of several decisions in a row.
  if (number_ !== planned) return;
  let found;
  try { found = await get("api/plan"); } catch (error) { found = { error: error.message }; }
  if (number_ !== planned) return;
  $("#plan").replaceChildren(...planRows(found));
  document.body.dataset.planned = number_;
}

function showOptions() {
  const marks = { accept: "✓ ", refuse: "✕ ", "": "" }, chosen = $("#pair").value;
  $("#pair").replaceChildren(...state.pairs.map((row) => element("option", { value: row.pair },
    `${marks[row.verdict]}${row.pair}${row.registration ? ` (${row.registration})` : ""}`)));
  if (chosen) $("#pair").value = chosen;
}

function step(by) {
  const place = state.pairs.findIndex((row) => row.pair === $("#pair").value);
  const next = state.pairs[place + by];
  if (next) open(next.pair);
}

function nextWorst() {
  const place = state.pairs.findIndex((row) => row.pair === $("#pair").value);
  // After the last one again from the first.
  const order = [...state.pairs.slice(place + 1), ...state.pairs.slice(0, place)];
  const next = order.find((row) => !row.verdict);
  if (next) open(next.pair);
  else $("#written").textContent = "every pair has a decision";
}

function setAmount(value) {
  state.amount[state.mode] = Math.min(Math.max(value, 0), 100);
  $("#amount").value = state.amount[state.mode];
  show();
}

function toggle(layer) {
  const box = $(`[data-layer=${layer}]`);
  box.checked = !box.checked;
  box.dispatchEvent(new Event("change"));
}

const pan = (x, y) => viewers[0].viewport.panBy(new OpenSeadragon.Point(x * MOVE / viewers[0].viewport.getZoom(), y * MOVE / viewers[0].viewport.getZoom()));
const zoom = (by) => viewers[0].viewport.zoomBy(by).applyConstraints();
const KEYS = {
  a: () => decide("accept"), r: () => decide("refuse"), u: () => decide(""),
  n: nextWorst, p: () => step(-1),
  1: () => setMode("swipe"), 2: () => setMode("blend"), 3: () => setMode("checkerboard"), 4: () => setMode("beside"),
  "[": () => setAmount(state.amount[state.mode] - 5), "]": () => setAmount(state.amount[state.mode] + 5),
  "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: () => viewers[0].viewport.goHome(),
  ArrowLeft: () => pan(-1, 0), ArrowRight: () => pan(1, 0), ArrowUp: () => pan(0, -1), ArrowDown: () => pan(0, 1),
  t: () => toggle("tiles"), e: () => toggle("errors"), l: () => toggle("landmarks"), m: () => toggle("masks"), c: () => toggle("cells"),
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("select, input:not([type=checkbox])");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
  if (["[", "]"].includes(event.key) && !(state.mode in state.amount)) return;
  event.preventDefault();
  KEYS[event.key]();
});
$("#accept").onclick = KEYS.a;
$("#refuse").onclick = KEYS.r;
$("#clear").onclick = KEYS.u;
$("#next").onclick = nextWorst;
$("#previous").onclick = KEYS.p;
$("#closer").onclick = KEYS["+"];
$("#farther").onclick = KEYS["-"];
$("#home").onclick = KEYS[0];
$("#pair").onchange = () => { open($("#pair").value); $("#pair").blur(); };
$("#engine").onchange = () => { state.engine = $("#engine").value; overlays.forEach((overlay) => { overlay.reset(); overlay.draw(); }); };
$("#amount").oninput = () => setAmount(Number($("#amount").value));
$("#reason").onchange = () => {
  const row = state.pairs.find((each) => each.pair === $("#pair").value);
  if (row?.verdict) decide(row.verdict);
  $("#reason").blur();
};
document.querySelectorAll("[data-mode]").forEach((button) => { button.onclick = () => setMode(button.dataset.mode); });
document.querySelectorAll("[data-layer]").forEach((box) => {
  const set = () => { state.layers[box.dataset.layer] = box.checked; showFacts(); };
  box.onchange = set;
  state.layers[box.dataset.layer] = box.checked;
});
function showFacts() {
  if (state.facts) showLegend();
  overlays.forEach((overlay) => overlay.draw());
}
$("#divider").onpointerdown = (event) => {
  $("#divider").setPointerCapture(event.pointerId);
  $("#divider").onpointermove = (move) => {
    const box = boxes[0].getBoundingClientRect();
    setAmount(100 * (move.clientX - box.left) / box.width);
  };
  $("#divider").onpointerup = () => { $("#divider").onpointermove = null; };
};

setMode("swipe");
get("api/pairs").then((pairs) => {
  state.pairs = pairs;
  if (!pairs.length) throw new Error("The sheet has no pair with HER2.");
  showOptions();
  const wanted = decodeURIComponent(location.hash.slice(1));
  const first = pairs.find((row) => row.pair === wanted) || pairs.find((row) => !row.verdict) || pairs[0];
  open(first.pair);
  plan();
}).catch((error) => { $("#note").textContent = error.message; });
