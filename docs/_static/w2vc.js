document.addEventListener("DOMContentLoaded", () => {
  // The menus of small screens: Space opens and closes them (they are checkboxes), Escape closes.
  const menus = [...document.querySelectorAll(".sidebar-toggle")];
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    for (const box of menus.filter((menu) => menu.checked)) {
      box.checked = false;
      box.focus();
    }
  });
  // What scrolls sideways can be scrolled by keyboard: code, tables, mathematics.
  for (const wide of document.querySelectorAll(".highlight pre, .output pre, .table-wrapper, div.math")) {
    if (wide.scrollWidth > wide.clientWidth) wide.tabIndex = 0;
  }
});
