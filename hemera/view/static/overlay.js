"use strict";
// Draws tiles, errors, landmarks, masks and cells on a canvas over a viewer.

const MASK_SIDE_MIN = 90;  // of a tile on the screen, from which masks and cells are shown
const KEPT_MAX = 300;

class Overlay {
  constructor(viewer, canvas, state) {
    Object.assign(this, { viewer, canvas, state, masks: new Map(), cells: new Map() });
    viewer.addHandler("update-viewport", () => this.draw());
    viewer.addHandler("resize", () => this.draw());
  }

  reset() {
    this.masks.clear();
    this.cells.clear();
  }

  draw() {
    const { canvas, state } = this, ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (canvas.width !== width * ratio || canvas.height !== height * ratio) {
      canvas.width = width * ratio;
      canvas.height = height * ratio;
    }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const item = this.viewer.world.getItemAt(0);
    if (!item || !state.facts) return;
    const corner = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(0, 0));
    const other = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(1000, 1000));
    const scale = (other.x - corner.x) / 1000;
    const at = (x, y) => [corner.x + x * scale, corner.y + y * scale];
    const isShown = (x, y, w, h) => x < width && y < height && x + w > 0 && y + h > 0;
    const { facts, layers } = state;
    if (layers.errors) this.squares(context, facts.squares, at, scale, isShown);
    for (const tile of facts.tiles) {
      const [x, y] = at(tile.x, tile.y), side = tile.side * scale;
      if (!isShown(x, y, side, side)) continue;
      if (side >= MASK_SIDE_MIN && layers.masks) this.mask(context, tile.tile, x, y, side);
      if (side >= MASK_SIDE_MIN && layers.cells) this.dots(context, tile, x, y, side);
      if (layers.tiles) this.tile(context, tile, x, y, side);
    }
    if (layers.landmarks) this.points(context, facts.landmarks, at);
  }

  tile(context, tile, x, y, side) {
    const refused = tile.reason !== null;
    const color = refused ? this.state.facts.reasons[tile.reason].color : "#0072b2";
    context.lineWidth = 1.5;
    context.strokeStyle = color;
    context.strokeRect(x + 1, y + 1, side - 2, side - 2);
    if (!refused) return;
    context.fillStyle = color + "38";
    context.fillRect(x + 1, y + 1, side - 2, side - 2);
    if (side < 40) return;
    context.beginPath();
    context.moveTo(x + 4, y + 4);
    context.lineTo(x + 14, y + 14);
    context.moveTo(x + 14, y + 4);
    context.lineTo(x + 4, y + 14);
    context.stroke();
  }

  squares(context, squares, at, scale, isShown) {
    for (const square of squares) {
      const [x, y] = at(square.x, square.y), w = square.width * scale, h = square.height * scale;
      if (!isShown(x, y, w, h)) continue;
      context.fillStyle = this.state.facts.classes[square.kind][1] + "90";
      context.fillRect(x, y, w, h);
      if (!square.misaligned && !square.worse) continue;
      context.lineWidth = square.misaligned ? 3 : 1.5;
      context.strokeStyle = "#d55e00";
      context.strokeRect(x, y, w, h);
    }
  }

  points(context, points, at) {
    context.lineWidth = 2;
    for (const point of points) {
      const [x, y] = at(point.x, point.y);
      context.strokeStyle = "#d6007a";
      context.beginPath();
      context.arc(x, y, 6, 0, 7);
      context.stroke();
      if (point.to_x === null) continue;
      context.strokeStyle = "#009e73";
      const [u, v] = at(point.to_x, point.to_y);
      context.beginPath();
      context.moveTo(x, y);
      context.lineTo(u, v);
      context.moveTo(u - 5, v);
      context.lineTo(u + 5, v);
      context.moveTo(u, v - 5);
      context.lineTo(u, v + 5);
      context.stroke();
    }
  }

  mask(context, name, x, y, side) {
    if (!this.masks.has(name)) {
      this.trim(this.masks);
      const image = new Image();
      image.onload = () => this.draw();
      image.src = `contours/${name}/${this.state.engine}`;
      this.masks.set(name, image);
    }
    const image = this.masks.get(name);
    if (image.complete && image.naturalWidth) context.drawImage(image, x, y, side, side);
  }

  dots(context, tile, x, y, side) {
    if (!this.cells.has(tile.tile)) {
      this.trim(this.cells);
      this.cells.set(tile.tile, []);
      get(`api/cells/${tile.tile}/${this.state.engine}`)
        .then((cells) => { this.cells.set(tile.tile, cells); this.draw(); })
        .catch(() => {});
    }
    const step = side / tile.pixels, colors = ["#009e73", "#e69f00", "#d55e00", "#d6007a"];
    const radius = Math.max(1.5, Math.min(4, 5 * step));
    for (const cell of this.cells.get(tile.tile)) {
      context.fillStyle = colors[cell.intensity];
      context.beginPath();
      context.arc(x + cell.x_px * step, y + cell.y_px * step, radius, 0, 7);
      context.fill();
    }
  }

  trim(kept) {
    while (kept.size >= KEPT_MAX) kept.delete(kept.keys().next().value);
  }
}
