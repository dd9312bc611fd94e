"use strict";
// A tile in full size: both stains, masks, and what the networks make of it.

document.body.append(element("dialog", { id: "lightbox" },
  element("form", { method: "dialog" }, element("strong", { id: "shown" }), " ", element("span", { id: "why" }), " ",
    element("span", { class: "group" },
      element("button", { type: "button", id: "before", title: "key ←" }, "Previous"),
      element("button", { type: "button", id: "after", title: "key →" }, "Next"),
      element("button", { title: "key Esc" }, "Close"))),
  element("div", { id: "pictures" })));

const lightbox = {
  shown: null,
  rows: () => [],  // in which the arrows move
  about: (row) => row.pair,
  changed: () => {},
  demo: false,  // networks of demo sizes

  open(row, engines, networks) {
    Object.assign(this, { shown: row.tile, engines, networks });
    $("#shown").textContent = row.tile;
    $("#why").textContent = this.about(row);
    const demo = this.demo ? "; demo sizes, not meaningful" : "";
    const titles = { virtual: `virtual HER2${demo}`, prediction: `predicted probability of HER2-positive${demo}` };
    const names = [["he", "H&E"], ["her2", "HER2"], ...engines.map((engine) => [engine, `mask of ${engine}`]),
      ...networks.map((name) => [name, titles[name]])];
    $("#pictures").replaceChildren(...names.map(([name, title]) => {
      const image = element("img", { class: "waiting", src: `picture/${row.tile}/${name}`, alt: `${title} of ${row.tile}` });
      const wait = element("span", { class: "quiet" }, networks.includes(name) ? ": being computed" : "");
      image.onload = () => { image.classList.remove("waiting"); wait.remove(); };
      image.onerror = () => { image.replaceWith(element("p", { class: "error" }, "cannot be read")); wait.remove(); };
      return element("figure", {}, image, element("figcaption", {}, title, wait));
    }));
    if (networks.length) this.split(row.tile);
    if (!$("#lightbox").open) $("#lightbox").showModal();
    this.changed();
  },

  // What a network makes of a tile that it was trained on is better than of others.
  async split(tile) {
    const splits = await get(`api/split/${tile}`).catch(() => ({}));
    if (this.shown !== tile) return;
    for (const [network, split] of Object.entries(splits)) {
      const seen = { train: ": was trained on it", val: ": its weights were chosen by it" }[split] || "";
      $("#why").textContent += split ? `; ${network}, split ${split}${seen}` : `; not used by ${network}`;
    }
  },

  turn(by) {
    const rows = this.rows(), next = rows[rows.findIndex((row) => row.tile === this.shown) + by];
    if (next) this.open(next, this.engines, this.networks);
  },
};

$("#before").onclick = () => lightbox.turn(-1);
$("#after").onclick = () => lightbox.turn(1);
$("#lightbox").addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) lightbox.turn(by);
});
