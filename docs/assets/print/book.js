// The whole book as one document, for paper: every chapter of the navigation in its order, tabs one after the other,
// folded parts open, links between chapters as links inside the document, equations set. `triptych book --pdf` prints
// it, twice: the second time with the numbers of pages that the first gave (`triptychBook.number`). Opened in a
// browser it can be printed from there.
// ?only=attention/flash,memory/rum takes some chapters; ?without=api/ leaves out what begins so (the default).
const root = new URL("../../", import.meta.url);
const main = document.querySelector("main");

function make(tag, attributes = {}, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

async function page(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} cannot be read: ${answer.status}`);
  return new DOMParser().parseFromString(await answer.text(), "text/html");
}

// [{ url, title, part }] of the navigation.
function chapters(home, only, without) {
  const found = [];
  for (const link of home.querySelectorAll(".md-nav--primary a.md-nav__link[href]")) {
    const url = new URL(link.getAttribute("href"), root);
    if (url.hash || found.some((x) => x.url.pathname === url.pathname)) continue;
    const path = url.pathname.slice(root.pathname.length).replace(/(index\.html|\/)$/, "");
    if (only.length ? !only.includes(path) : without.some((start) => path.startsWith(start))) continue;
    const folders = [];
    for (let at = link.closest("nav"); at?.matches("[aria-labelledby]"); at = at.parentElement.closest("nav")) {
      folders.unshift(at.querySelector("label.md-nav__title").textContent.trim());
    }
    found.push({ url, path, part: folders[0] ?? "", title: link.textContent.trim() });
  }
  const unknown = only.filter((path) => !found.some((x) => x.path === path));
  if (unknown.length) throw new Error(`the book has no page ${unknown.join(", ")}`);
  return found;
}

const name = (path, id = "") => `${path.replaceAll("/", ".") || "home"}${id ? `--${id}` : ""}`;

// One chapter's content, made for paper; ids get the chapter's name in front.
function content(doc, chapter, all) {
  const article = document.adoptNode(doc.querySelector("article.md-content__inner"));
  const gone = ".headerlink, .md-content__button, script, noscript, style, form, button";
  for (const node of article.querySelectorAll(gone)) node.remove();
  for (const node of article.querySelectorAll('a[href$=".ipynb"]')) node.closest("p")?.remove();
  for (const node of article.querySelectorAll('a[id^="__codelineno"]')) node.remove();
  // Of code only comments, strings, numbers and keywords are told apart: every span is an entry of the tagged PDF.
  for (const node of article.querySelectorAll(".highlight code span")) {
    if (/^(c|s|m|k|ow)/.test(node.className)) continue;
    node.replaceWith(...node.childNodes);
  }
  for (const code of article.querySelectorAll(".highlight code")) code.normalize();
  for (let node = article.querySelector("h2#api"); node; ) { // links to the reference, which is not printed
    const next = node.nextElementSibling;
    node.remove();
    node = next?.localName === "h2" ? null : next;
  }
  for (const set of [...article.querySelectorAll(".tabbed-set")].reverse()) {
    const labels = [...set.querySelectorAll(":scope > .tabbed-labels > label")];
    const blocks = [...set.querySelectorAll(":scope > .tabbed-content > .tabbed-block")];
    set.replaceWith(...blocks.map((block, i) => make("section", { className: "print-panel" },
      make("h3", { className: "print-tab" }, labels[i]?.textContent ?? ""), ...block.childNodes)));
  }
  for (const fold of [...article.querySelectorAll("details")].reverse()) {
    const title = make("p", { className: "admonition-title" }, ...(fold.querySelector(":scope > summary")?.childNodes ?? []));
    fold.querySelector(":scope > summary")?.remove();
    fold.replaceWith(make("div", { className: `admonition ${fold.className}` }, title, ...fold.childNodes));
  }
  for (const node of article.querySelectorAll("[id]")) node.id = name(chapter.path, node.id);
  for (const node of article.querySelectorAll("*")) {
    for (const { name: key, value } of [...node.attributes]) {
      if (/^aria-(labelledby|describedby)$/.test(key)) node.setAttribute(key, value.split(" ").map((id) => name(chapter.path, id)).join(" "));
      else if (value.includes("url(#")) node.setAttribute(key, value.replace(/url\(#([^)]+)\)/g, (_, id) => `url(#${name(chapter.path, id)})`));
      else if (node.namespaceURI.endsWith("svg") && /href$/.test(key) && value.startsWith("#")) node.setAttribute(key, `#${name(chapter.path, value.slice(1))}`);
    }
  }
  for (const link of article.querySelectorAll("a[href]")) {
    const url = new URL(link.getAttribute("href"), chapter.url);
    if (url.origin !== root.origin) continue;
    const target = all.find((x) => x.url.pathname === url.pathname);
    if (target) link.setAttribute("href", `#${name(target.path, decodeURIComponent(url.hash.slice(1)))}`);
    else link.replaceWith(...link.childNodes); // a page that is not in this document
  }
  // Parts are headings of the first level, chapters of the second.
  for (const node of [...article.querySelectorAll("h1, h2, h3, h4, h5")]) {
    const lower = make(`h${Number(node.localName[1]) + 1}`, { id: node.id, className: node.className }, ...node.childNodes);
    node.replaceWith(lower);
  }
  const title = article.querySelector("h2") ?? article.insertBefore(make("h2", {}, chapter.title), article.firstChild);
  title.id = name(chapter.path);
  chapter.title = title.textContent.trim();
  return make("section", { className: "print-chapter" }, ...article.childNodes);
}

const load = (tag, attributes) =>
  new Promise((done) => document.head.append(Object.assign(document.createElement(tag), attributes, { onload: () => done(true), onerror: () => done(false) })));

async function equations() {
  const base = new URL("assets/vendor/katex/", root);
  const manifest = await fetch(new URL("../manifest.json", base)).catch(() => null);
  if (!manifest?.ok) return false; // they stay readable TeX
  await load("link", { rel: "stylesheet", href: new URL("katex.min.css", base).href });
  if (!(await load("script", { src: new URL("katex.min.js", base).href }))) return false;
  for (const node of main.querySelectorAll(".arithmatex")) {
    const text = node.textContent.trim();
    window.katex.render(text.slice(2, -2), node, { displayMode: text.startsWith("\\["), throwOnError: false, output: "html" });
  }
  return true;
}

// What is wider than the page is made smaller, down to half; figures do that by themselves.
function fit() {
  for (const node of main.querySelectorAll(".arithmatex:has(.katex-display), table")) {
    const box = node.localName === "table" ? node.closest(".md-typeset__scrollwrap, .admonition, li, section") ?? main : node;
    const bases = [...node.querySelectorAll(".katex-html > .base")].map((x) => x.offsetWidth);
    const width = node.localName === "table" ? node.offsetWidth : bases.reduce((a, b) => a + b, 0);
    const room = box.clientWidth - 2.5 * (node.querySelector(".katex-html > .tag")?.offsetWidth ?? 0); // the equation is centred
    if (width > room) node.style.fontSize = `${Math.max(50, Math.floor((97 * room) / width))}%`;
  }
}

async function book() {
  const home = await page(root);
  const query = new URLSearchParams(location.search);
  const list = (key, other) => (query.get(key) ?? other).split(",").filter(Boolean);
  const styles = [...home.querySelectorAll('link[rel="stylesheet"]')].map((x) => new URL(x.getAttribute("href"), root));
  const own = document.querySelector("link");
  await Promise.all(styles.map((href) => load("link", { rel: "stylesheet", href })));
  document.head.append(own); // the last word is paper's
  const all = chapters(home, list("only", ""), list("without", "api"));
  const index = make("nav", { className: "print-contents" }, make("h1", {}, "Contents"));
  const words = home.querySelector('meta[name="description"]')?.content ?? "";
  main.append(make("header", { className: "print-title" }, make("p", {}, "triptych"), make("p", {}, words)), index);
  let part;
  for (const [i, chapter] of all.entries()) {
    const section = content(await page(chapter.url), chapter, all);
    if (chapter.part !== part) {
      part = chapter.part;
      section.prepend(make("h1", { className: "print-part", id: `part-${i}` }, part));
      index.append(make("p", { className: "print-part" }, part));
    }
    const entry = make("a", { href: `#${name(chapter.path)}` }, make("span", {}, chapter.title), make("span", { className: "print-page" }));
    index.append(make("p", {}, entry));
    main.append(section);
  }
  const set = await equations();
  await document.fonts.ready;
  fit();
  const missing = [...main.querySelectorAll('a[href^="#"]')].filter((a) => !document.getElementById(decodeURIComponent(a.getAttribute("href").slice(1))));
  for (const link of missing) link.replaceWith(...link.childNodes);
  main.removeAttribute("aria-busy");
  return {
    chapters: all.map(({ path, title }) => ({ id: name(path), path, title })),
    equations: set ? main.querySelectorAll(".katex").length : 0,
    wrong: [...main.querySelectorAll(".katex-error")].map((node) => node.textContent),
    missing: missing.map((a) => a.textContent),
  };
}

// Numbers of pages into the table of contents: { id: number }.
function number(pages) {
  for (const entry of main.querySelectorAll(".print-contents a")) {
    entry.querySelector(".print-page").textContent = pages[decodeURIComponent(entry.getAttribute("href").slice(1))] ?? "";
  }
}

window.triptychBook = { ready: book(), number };
