// What neither builder of the site does: keys for what scrolls and folds, and definitions first.
(() => {
  "use strict";

  // Whatever scrolls sideways can be reached by the keyboard, and nothing else is a stop.
  const boxes = "main :is(pre, div, p, figure, table, .katex-display)";
  const reach = () => {
    for (const box of document.querySelectorAll(boxes)) {
      const scrolls =
        box.scrollWidth > box.clientWidth && /auto|scroll/.test(getComputedStyle(box).overflowX);
      if (scrolls && !box.hasAttribute("tabindex")) {
        box.tabIndex = 0;
        box.dataset.scrolls = "";
      } else if (!scrolls && "scrolls" in box.dataset) {
        box.removeAttribute("tabindex");
        delete box.dataset.scrolls;
      }
    }
  };
  let asked = 0;
  const later = () => {
    clearTimeout(asked);
    asked = setTimeout(reach, 100);
  };
  window.addEventListener("load", reach);
  window.addEventListener("resize", later);
  document.addEventListener("toggle", later, true);
  document.addEventListener("shown.bs.collapse", later);

  // The title of a box that folds is a button.
  document.addEventListener("keydown", (event) => {
    const button = event.target.closest('.callout-header[role="button"]');
    if (button && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      button.click();
    }
  });

  // A search for a name finds the section of that name first, the reference's before a lesson's.
  const search = window.Fuse && window.Fuse.prototype.search;
  if (search) {
    const rank = ({ item }, name) =>
      (item.section || "").toLowerCase() !== name ? 2 : /ref-api/.test(item.href) ? 0 : 1;
    window.Fuse.prototype.search = function (query, options = {}) {
      const hits = search.call(this, query, { ...options, limit: -1 });
      if (typeof query === "string") {
        const name = query.trim().toLowerCase();
        hits.sort((a, b) => rank(a, name) - rank(b, name));
      }
      return options.limit > 0 ? hits.slice(0, options.limit) : hits;
    };
  }
})();
