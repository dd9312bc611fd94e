// Pictures open in their full size by a click or Enter; the arrow keys go to the next or previous
// one, Escape or a click closes. Headings of sortable tables react to Enter, too.
document.addEventListener("DOMContentLoaded", () => {
  const pictures = [...document.querySelectorAll(".tile img, .overlays img")];
  const dialog = document.createElement("dialog");
  dialog.className = "picture";
  document.body.append(dialog);
  let shown = 0;

  function show(place) {
    shown = (place + pictures.length) % pictures.length;
    const image = pictures[shown].cloneNode();
    const words = document.createElement("p");
    words.textContent = image.alt;
    image.removeAttribute("tabindex");
    dialog.replaceChildren(image, words);
    if (!dialog.open) dialog.showModal();
  }

  pictures.forEach((image, place) => {
    image.tabIndex = 0;
    image.addEventListener("click", () => show(place));
    image.addEventListener("keydown", (event) => event.key === "Enter" && show(place));
  });
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => pictures[shown].focus());
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") show(shown + 1);
    if (event.key === "ArrowLeft") show(shown - 1);
  });

  document.querySelectorAll("table.sortable th").forEach((heading) => {
    heading.tabIndex = 0;
    heading.addEventListener("keydown", (event) => event.key === "Enter" && heading.click());
  });
});
