// Render the equations of every page with the vendored KaTeX; without it they stay readable as TeX.
// Nothing is fetched from another host.
const base = new URL("../vendor/katex/", import.meta.url);

function load(tag, attributes) {
  return new Promise((resolve) => {
    const node = Object.assign(document.createElement(tag), attributes);
    node.onload = () => resolve(true);
    node.onerror = () => resolve(false);
    document.head.append(node);
  });
}

let ready;

// KaTeX writes the styles of its copy for screen readers as attributes, which the pages' content-security policy
// forbids; the same styles may be set through the object.
function withoutStyleAttributes(work) {
  const own = Element.prototype.setAttribute;
  Element.prototype.setAttribute = function (name, value) {
    if (name === "style" && this.style) this.style.cssText = value;
    else own.call(this, name, value);
  };
  try {
    work();
  } finally {
    Element.prototype.setAttribute = own;
  }
}

async function render() {
  if (!document.querySelector(".arithmatex")) return;
  ready ??= (async () => {
    // One small request says whether the vendored files are there; a missing folder is no error of the page.
    const manifest = await fetch(new URL("../vendor/manifest.json", import.meta.url)).catch(() => null);
    if (!manifest?.ok) return false;
    await load("link", { rel: "stylesheet", href: new URL("katex.min.css", base).href });
    return (await load("script", { src: new URL("katex.min.js", base).href })) === true;
  })();
  if (!(await ready)) return;
  for (const node of document.querySelectorAll(".arithmatex:not([data-done])")) {
    const text = node.textContent.trim();
    const display = text.startsWith("\\[");
    node.dataset.done = "1";
    if (display) node.tabIndex = 0; // wide equations scroll, also by keyboard
    withoutStyleAttributes(() =>
      window.katex.render(text.slice(2, -2), node, { displayMode: display, throwOnError: false }),
    );
  }
}

if (typeof window.document$ !== "undefined") window.document$.subscribe(render);
else render();
