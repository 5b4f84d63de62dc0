// Makes the code of a chapter run: the cells whose output the page shows, the files of ref that it includes, and the
// stubs of its exercises. Without the vendored runtime, or without JavaScript, they stay what they are: text.
import { ask, end, runtime } from "./runtime.js";

const vendor = new URL("../vendor/", import.meta.url);
const NEEDS_JAX = /\b(jax|accel)\b|hw\.(trace|from_onnx)/; // JAX has no build for the browser

let current; // the panel whose run is going on
let edits = new Map(); // path -> the reader's text, on this page

function fingerprint(text) {
  let h = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text.trim())) h = Math.imul(h ^ byte, 0x01000193);
  return (h >>> 0).toString(16).padStart(8, "0");
}

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// Bytes in a link: deflated, in the alphabet of URLs.
async function pass(data, through) {
  return new Uint8Array(await new Response(new Blob([data]).stream().pipeThrough(through)).arrayBuffer());
}

async function packed(value) {
  const bytes = await pass(JSON.stringify(value), new CompressionStream("deflate-raw"));
  return btoa(String.fromCharCode(...bytes)).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
}

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text.replace(/-/g, "+").replace(/_/g, "/")), (c) => c.charCodeAt(0));
  return JSON.parse(new TextDecoder().decode(await pass(bytes, new DecompressionStream("deflate-raw"))));
}

// An edit: the lines kept at both ends and what stands between them, so that a long file makes a short link.
function difference(own, text) {
  const [a, b] = [own.split("\n"), text.split("\n")];
  const most = Math.min(a.length, b.length);
  let head = 0;
  while (head < most && a[head] === b[head]) head += 1;
  let tail = 0;
  while (tail < most - head && a.at(-1 - tail) === b.at(-1 - tail)) tail += 1;
  return { of: fingerprint(own), head, tail, text: b.slice(head, b.length - tail).join("\n"), none: head + tail === b.length };
}

function patched(own, { head, tail, text, none }) {
  const lines = own.split("\n");
  return [...lines.slice(0, head), ...(none ? [] : [text]), ...lines.slice(lines.length - tail)].join("\n");
}

class Panel {
  // block: the div of the code; key: its name on the page; path: of the file it shows, none for a cell; laws: the
  // module that can break it; exercise: [module, name] of the check; result: the output that the page shows.
  constructor(block, { key, path, laws, exercise, result }) {
    Object.assign(this, { block, path, laws, exercise, result });
    this.own = block.querySelector("code").textContent.replace(/\n$/, "");
    this.text = this.own;
    const button = (label, action, title) =>
      element("button", { type: "button", className: "live-button", title, onclick: () => action.call(this) }, label);
    this.runButton = exercise
      ? button("Check", this.run, "Run the exercise's test on this code (Ctrl+Enter in the editor)")
      : button("Run", this.run, path ? "Run the file's example" : "Run this code (Ctrl+Enter in the editor)");
    this.editButton = button(exercise ? "Solve" : "Edit", this.edit, "Edit this code");
    this.breakButton = laws && button("Break it", this.breakIt, "Search for an input on which the chapter's laws fail");
    this.stopButton = button("Stop", () => end(), "End the run");
    this.resetButton = button("Reset", this.reset, "Back to the text as it was");
    this.shareButton = button("Share", this.share, "Make a link that holds your edit");
    this.stopButton.hidden = this.resetButton.hidden = this.shareButton.hidden = true;
    this.status = element("span", { className: "live-status", role: "status" });
    this.output = element("pre", { className: "live-output", hidden: true, tabIndex: 0, "aria-label": "Output" });
    for (const starts of [this.runButton, this.breakButton]) starts?.classList.add("live-start");
    const buttons = [this.runButton, this.breakButton, this.editButton, this.stopButton, this.resetButton, this.shareButton];
    const label = exercise ? `Exercise ${exercise[1]}` : path ? `Run ${path}` : "Run this code";
    this.bar = element(
      "div", { className: "live-bar", role: "group", "aria-label": label },
      ...buttons.filter(Boolean), this.status,
    );
    this.key = block.dataset.live = this.bar.dataset.of = this.output.dataset.of = key;
    if (path) {
      // Files are long: the buttons stay in view, as far as the file goes.
      const whole = element("div", {});
      block.replaceWith(whole);
      whole.append(element("div", { className: "live-head" }, this.bar, this.output), block);
    } else block.after(this.bar, this.output);
    if (laws) this.say("Change a line and the laws will look for an input that shows it.");
    if (exercise) this.say("The test fails until you have solved it.");
  }

  say(text) {
    this.status.textContent = text;
  }

  async edit() {
    this.editButton.disabled = true;
    const { edit } = await import(new URL("codemirror/codemirror.mjs", vendor).href);
    this.place = element("div", { className: this.path ? "live-editor live-file" : "live-editor" });
    this.place.dataset.of = this.key;
    this.block.after(this.place);
    this.block.hidden = true;
    const label = this.path ? `Editor of ${this.path}` : this.exercise ? `Your ${this.exercise[1]}` : "Code editor";
    this.editor = edit(this.place, this.text, label, {
      onChange: (text) => this.changed(text),
      onRun: () => this.run(),
    });
    this.editButton.hidden = true;
    this.resetButton.hidden = false;
    this.editor.focus();
  }

  changed(text) {
    this.text = text;
    this.shareButton.hidden = text === this.own;
    if (!this.path) return;
    if (text === this.own) edits.delete(this.path);
    else edits.set(this.path, text.endsWith("\n") ? text : `${text}\n`);
  }

  reset() {
    this.changed(this.own);
    this.editor?.destroy();
    this.place?.remove();
    this.editor = this.place = undefined;
    this.block.hidden = this.editButton.hidden = this.editButton.disabled = false;
    this.output.hidden = this.resetButton.hidden = true;
    if (this.result) this.result.hidden = false;
    this.say("");
    this.runButton.focus();
    if (location.hash.startsWith("#live=")) history.replaceState(history.state, "", location.pathname + location.search);
  }

  async share() {
    const link = new URL(`#live=${await packed(difference(this.own, this.text))}`, location.href).href;
    history.replaceState(history.state, "", link);
    const copied = await navigator.clipboard?.writeText(link).then(() => true, () => false);
    this.say(copied ? "the link to your edit is copied" : "the link to your edit is in the address bar");
  }

  async open(edit) {
    this.changed(patched(this.own, edit));
    for (let at = this.block.parentElement; at; at = at.parentElement) if (at.matches("details")) at.open = true;
    const tab = this.block.closest(".tabbed-block");
    tab?.closest(".tabbed-set").querySelectorAll(":scope > input")[[...tab.parentElement.children].indexOf(tab)]?.click();
    await this.edit();
    this.bar.scrollIntoView({ block: "center" });
    this.say("The link brought this edit; it has not run. Reset goes back to the page's own text.");
  }

  run() {
    if (this.exercise) start(this, "exercise", JSON.stringify([...this.exercise, this.text]));
    else if (this.path) start(this, "file", this.path);
    else start(this, "cell", this.text);
  }

  breakIt() {
    start(this, "laws", this.laws);
  }
}

function busy(panel, on) {
  current = on ? panel : undefined;
  for (const b of document.querySelectorAll(".live-start")) b.disabled = on;
  panel.stopButton.hidden = !on;
}

function start(panel, kind, what) {
  if (current) return;
  busy(panel, true);
  panel.output.textContent = "";
  panel.broken = undefined;
  panel.output.hidden = panel.resetButton.hidden = false;
  panel.output.classList.remove("live-failed");
  if (panel.result) panel.result.hidden = true;
  panel.since = performance.now();
  ask({ kind, what, edits: Object.fromEntries(edits) }, (data) => hear(panel, data));
}

// Follows what comes in; a law that breaks is marked, so that the reader is led to it at the end.
function show(panel, text) {
  const at = text.indexOf("BROKEN ");
  if (at < 0) panel.output.append(text);
  else {
    panel.broken = element("strong", {}, "BROKEN");
    panel.output.append(text.slice(0, at), panel.broken, text.slice(at + 6));
  }
  panel.output.scrollTop = panel.output.scrollHeight;
}

// What a run printed as SVG is drawn; nothing in it may act, and the page's policy would not let it.
function draw(panel) {
  const figures = panel.output.textContent.split(/(<svg\b[^]*?<\/svg>)/);
  if (figures.length < 3) return;
  panel.output.textContent = "";
  for (const [i, part] of figures.entries()) {
    if (i % 2 === 0) {
      panel.output.append(part.trim() ? part : "");
      continue;
    }
    const source = /^<svg[^>]*\sxmlns=/.test(part) ? part : part.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"');
    const svg = new DOMParser().parseFromString(source, "image/svg+xml").documentElement;
    const bad = svg.localName !== "svg" || svg.querySelector("parsererror");
    for (const node of bad ? [] : [svg, ...svg.querySelectorAll("*")]) {
      if (/^(script|foreignobject|style)$/i.test(node.localName)) node.remove();
      for (const { name } of [...node.attributes]) if (/^(on|style$)/i.test(name) || /href$/i.test(name)) node.removeAttribute(name);
    }
    panel.output.append(bad ? part : document.importNode(svg, true));
  }
}

function hear(panel, data) {
  if (panel !== current) return;
  if (data.status) panel.say(`${data.status} …`);
  if (data.text) show(panel, data.text);
  if (!data.done) return;
  busy(panel, false);
  if (data.dead || data.stopped) {
    panel.say(data.dead ? "failed" : "stopped");
    panel.runButton.focus();
    return;
  }
  const seconds = ((performance.now() - panel.since) / 1000).toFixed(2);
  const changed = [...edits.keys()].filter((path) => path !== panel.path);
  const note = changed.length ? `, with your edit of ${changed.join(", ")}` : "";
  panel.output.classList.toggle("live-failed", !data.ok);
  if (!panel.path) draw(panel);
  if (panel.broken) panel.output.scrollTop = panel.broken.offsetTop - 8; // the output is positioned
  panel.say(`${data.ok ? "done" : "failed"} in ${seconds} s${note}`);
}

async function attach() {
  if (current) end(); // its page is gone
  edits = new Map();
  const blocks = [...document.querySelectorAll(".md-content .highlight:not(.result .highlight)")];
  if (!blocks.length) return;
  const library = await runtime();
  if (!library) return;
  const chapter = location.pathname.split("/").filter((part) => part && part !== "index.html").slice(-2).join("/");
  let cells = 0;
  const panels = [];
  for (const block of blocks) {
    const code = block.querySelector("code");
    if (!code || block.dataset.live || !block.isConnected) continue;
    const result = block.nextElementSibling?.matches(".result") ? block.nextElementSibling : undefined;
    const mark = fingerprint(code.textContent);
    const path = result ? undefined : library.files[mark];
    const exercise = result || path ? undefined : library.exercises[mark];
    if (!path && !exercise && (!result || NEEDS_JAX.test(code.textContent))) continue;
    const key = path ?? (exercise ? `exercise ${exercise[1]}` : `cell ${++cells}`);
    const laws = path === `ref/${chapter}.py` ? library.laws[chapter] : undefined;
    panels.push(new Panel(block, { key, path, exercise, result, laws }));
  }
  if (location.hash.startsWith("#live=")) await follow(location.hash.slice(6), panels);
}

// A link that holds an edit.
async function follow(text, panels) {
  const edit = await unpacked(text).catch(() => null);
  const panel = panels.find((p) => fingerprint(p.own) === edit?.of);
  if (panel) return panel.open(edit);
  const told = "This link holds an edit of another version of this page, which cannot be shown.";
  document.querySelector(".md-content__inner")?.prepend(element("p", { className: "live-told", role: "status" }, told));
}

if (typeof window.document$ !== "undefined") window.document$.subscribe(attach);
else attach();
