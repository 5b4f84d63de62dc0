// A table that is wider than the page scrolls inside itself: let the keyboard reach it, only while it does.
const observer = new ResizeObserver((entries) => {
  for (const { target } of entries) target.tabIndex = target.scrollWidth > target.clientWidth ? 0 : -1;
});

function watch() {
  for (const table of document.querySelectorAll(".md-content table")) observer.observe(table);
}

if (typeof window.document$ !== "undefined") window.document$.subscribe(watch);
else watch();
