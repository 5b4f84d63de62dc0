// Opens every built page in headless Chromium and fails on what a reader would stumble over: a request to another
// host, an error in the console, an equation KaTeX could not set, a page wider than a phone, an axe violation, a
// technique's file or an exercise that cannot be run, anything that the page's content-security policy stops (the
// browser reports it in the console). On two chapters it runs cells, edits, shares and stops them, breaks the laws,
// solves an exercise and moves the sliders of the prices.
// Usage: node tests/browser/check.mjs SITE_FOLDER [PART_OF_A_PATH]
// (CHROMIUM names the browser; playwright-core and axe-core are in NODE_PATH)
import { createRequire } from "node:module";
import { createServer } from "node:http";
import { readFile, readdir, stat } from "node:fs/promises";
import { gzipSync } from "node:zlib";
import { extname, join, relative } from "node:path";

const require = createRequire(import.meta.url);
const { chromium } = require("playwright-core");
const axeSource = await readFile(require.resolve("axe-core/axe.min.js"), "utf8");

const site = process.argv[2] ?? "site";
const types = {
  ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".css": "text/css", ".json": "application/json",
  ".svg": "image/svg+xml", ".png": "image/png", ".woff2": "font/woff2", ".wasm": "application/wasm", ".xml": "text/xml",
};

async function pages(folder) {
  const found = [];
  for (const entry of await readdir(folder, { withFileTypes: true })) {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) found.push(...(await pages(path)));
    else if (entry.name === "index.html") found.push("/" + relative(site, path).replace(/index\.html$/, ""));
  }
  return found.sort();
}

const library = JSON.parse(await readFile(join(site, "assets/vendor/library.json"), "utf8"));
const exercises = {}; // "part/slug": names
for (const [module, name] of Object.values(library.exercises)) {
  const [, part, file] = module.split(".");
  (exercises[`${part}/${file.replace("exercises_", "")}`] ??= []).push(name);
}

const server = createServer(async (request, response) => {
  let path = join(site, decodeURIComponent(new URL(request.url, "http://localhost").pathname));
  try {
    if ((await stat(path)).isDirectory()) path = join(path, "index.html");
    let body = await readFile(path);
    // The theme follows links without a reload to pages that the site map names at this very address.
    if (path.endsWith("sitemap.xml")) body = body.toString().replace(/<loc>https?:\/\/[^/]+/g, `<loc>${origin}`);
    response.writeHead(200, { "content-type": types[extname(path)] ?? "application/octet-stream" }).end(body);
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
const origin = `http://127.0.0.1:${server.address().port}`;

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync"],
});

// A page that reports what must never happen on any: foreign requests, errors.
async function open(colorScheme, problems) {
  const context = await browser.newContext({ colorScheme, viewport: { width: 1280, height: 900 } });
  const page = await context.newPage();
  page.on("request", (r) => {
    if (!r.url().startsWith(origin) && !r.url().startsWith("data:") && !r.url().startsWith("blob:")) problems.push(`asks for ${r.url()}`);
  });
  page.on("console", (m) => m.type() === "error" && problems.push(`console: ${m.text()}`));
  page.on("pageerror", (e) => problems.push(`error: ${e.message}`));
  return { context, page };
}

// axe looks at every word of the code for seconds: of long code it needs the lines that bring a new kind of word. Of
// hundreds of entries of the reference, all of one form, it needs some.
function thin() {
  for (const entry of [...document.querySelectorAll(".doc-function, .doc-class")].slice(24)) entry.remove();
  const seen = new Set();
  for (const code of document.querySelectorAll(".highlight code")) {
    const lines = [...code.children];
    for (const [i, line] of lines.entries()) {
      const kinds = [...line.querySelectorAll("[class]")].map((node) => node.className);
      if (i > 9 && kinds.every((kind) => seen.has(kind))) line.remove();
      for (const kind of kinds) seen.add(kind);
    }
  }
}

async function problemsOf(path) {
  const problems = [];
  const { context, page } = await open("light", problems);
  await page.goto(origin + path, { waitUntil: "load" });
  const maths = await page.locator(".arithmatex").count();
  if (maths) {
    await page.waitForSelector(".arithmatex .katex", { state: "attached", timeout: 30000 })
      .catch(() => problems.push("equations were not set"));
  }
  const wrong = await page.locator(".katex-error").allTextContents();
  problems.push(...wrong.map((text) => `KaTeX cannot set ${text}`));
  const file = `ref${path.replace(/\/$/, "")}.py`;
  if (Object.values(library.files).includes(file)) {
    await page.waitForSelector(`[data-live="${file}"]`, { state: "attached", timeout: 30000 })
      .catch(() => problems.push(`shows no ${file} that can be run, or another text than the library's`));
  }
  for (const name of exercises[path.slice(1, -1)] ?? []) {
    if (!(await page.locator(`[data-live="exercise ${name}"]`).count())) problems.push(`shows no exercise ${name} that can be checked`);
  }
  for (const href of await page.locator('a[href$=".ipynb"]').evaluateAll((links) => links.map((a) => a.href))) {
    const book = await (await page.request.get(href)).json().catch(() => null);
    if (!(book?.nbformat === 4 && book.cells.length > 3)) problems.push(`offers ${href}, which is no notebook`);
  }
  await page.setViewportSize({ width: 390, height: 844 });
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  if (wide > 0) problems.push(`is ${wide} px wider than a phone of 390 px`);
  await page.setViewportSize({ width: 1280, height: 900 });
  await page.evaluate(thin);
  await page.evaluate(axeSource); // by the debugger: the page's policy would stop it
  const axe = async (runOnly, scheme) => {
    const { violations } = await page.evaluate((runOnly) =>
      window.axe.run(document.querySelector(".md-content") ?? document, { runOnly, resultTypes: ["violations"] }), runOnly);
    problems.push(...violations.map((v) => `axe ${scheme}: ${v.id} at ${v.nodes[0].target.join(" ")}`));
  };
  await axe(["wcag2a", "wcag2aa"], "light");
  // The other scheme changes colours alone.
  await page.locator('input[data-md-color-scheme="slate"]').evaluate((input) => input.click());
  await page.waitForSelector('body[data-md-color-scheme="slate"]', { timeout: 10000 })
    .catch(() => problems.push("does not change to the dark scheme"));
  await axe(["color-contrast"], "dark");
  await context.close();
  return problems;
}

// Two chapters, each with an edit of its file that its laws must catch, and an exercise.
const LIVE = [
  { path: "/attention/flash/", from: "opt.scale * qi @", to: "qi @", exercise: "merge", refusal: /runs no Pallas kernel/ },
  { path: "/memory/rum/", from: "def _turn(plane, v):", to: "def _turn(plane, v):\n    return v\n\n\ndef _unused(plane, v):", exercise: "turn", refusal: /DoesNotFit: stm32f746: .* B short/ },
];

async function liveProblems({ path, from, to, exercise, refusal }) {
  const problems = [];
  const asked = [];
  const sizes = []; // compressed, as hosts send them
  const { context, page } = await open("light", problems);
  page.on("request", (r) => asked.push(new URL(r.url()).pathname));
  page.on("response", (r) => sizes.push(r.body().then((body) => gzipSync(body).length, () => 0)));
  const loaded = async () => (await Promise.all(sizes)).reduce((a, b) => a + b, 0);
  const expect = (truth, what) => truth || problems.push(what);
  await page.goto(origin + path, { waitUntil: "networkidle" });

  const panel = (key) => {
    const bar = page.locator(`.live-bar[data-of="${key}"]`);
    const press = (name) => bar.getByRole("button", { name, exact: true }).click();
    const done = async () => {
      await bar.locator(".live-status", { hasText: /^(done|failed|stopped)/ }).waitFor({ timeout: 90000 });
      return (await page.locator(`.live-output[data-of="${key}"]`).textContent()).trim();
    };
    const write = async (text) => {
      const editor = page.locator(`.live-editor[data-of="${key}"] .cm-content`);
      await editor.focus();
      await page.keyboard.press("Control+A");
      await editor.evaluate((node, text) => {
        const clipboardData = new DataTransfer();
        clipboardData.setData("text/plain", text);
        node.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
      }, text);
    };
    return { bar, press, done, write };
  };

  const cell = panel("cell 1");
  await cell.bar.waitFor({ timeout: 30000 });
  const shown = (await page.locator('[data-live="cell 1"] ~ .result').first().textContent()).trim();
  expect(!asked.some((p) => /vendor\/(pyodide|codemirror)|library\.zip/.test(p)), "loads the runtime before the first Run");
  const first = await loaded();
  expect(first < 1.2e6, `loads ${first} bytes before the first Run`);

  let since = Date.now();
  await cell.press("Run");
  expect((await cell.done()) === shown, "a cell prints another thing than the page shows");
  const cold = Date.now() - since;
  await cell.press("Edit");
  await cell.write("x = 6\nprint(x * 7)");
  since = Date.now();
  await cell.press("Run");
  expect((await cell.done()) === "42", "an edited cell does not print 42");
  const warm = Date.now() - since;
  await cell.write("print('<svg viewBox=\"0 0 9 9\"><script>alert(1)</script><rect width=\"9\" height=\"9\"/></svg>')");
  await cell.press("Run");
  await cell.done();
  const drawn = page.locator('.live-output[data-of="cell 1"] svg');
  expect((await drawn.locator("rect").count()) === 1, "a figure in SVG is not drawn");
  expect((await drawn.evaluate((node) => node.outerHTML)).search(/script/) < 0, "a figure may bring scripts");
  await cell.write("x = 1\nx / 0");
  await cell.press("Run");
  expect(/line 2[^]*ZeroDivisionError/.test(await cell.done()), "a traceback does not name the line of the cell");

  const slug = path.replace(/\/$/, "");
  const file = panel(`ref${slug}.py`);
  await file.press("Edit");
  const source = await readFile(`ref${slug}.py`, "utf8");
  expect(source.split(from).length === 2, `ref${slug}.py holds no single ${from}`);
  await file.write(source.replace(from, to));
  since = Date.now();
  await file.press("Break it");
  const broken = await file.done();
  const caught = Date.now() - since;
  expect(/BROKEN[^]*counterexample[^]*laws held/.test(broken), `the laws miss a broken edit: ${broken.slice(-300)}`);
  await file.press("Reset");
  await file.press("Run");
  expect(/ = .*ms$/m.test(await file.done()), "a file's example does not run");

  const task = panel(`exercise ${exercise}`);
  await task.press("Check");
  expect(/^Not yet: /.test(await task.done()), "an exercise's stub passes its test");
  const stem = slug.split("/").at(-1);
  const texts = await readFile(`tests${slug.replace(stem, `exercises_${stem}`)}.py`, "utf8");
  const solution = texts.match(new RegExp(`\\[start:solve_${exercise}\\]\n([^]*?)# --8<-- \\[end`))[1];
  await task.press("Solve");
  await task.write(`import numpy as np\n${solution.replace("solve_", "")}`);
  since = Date.now();
  await task.press("Check");
  expect((await task.done()) === "Solved.", "an exercise's solution does not pass its test");
  const solved = Date.now() - since;

  // A link to an edit, opened by another reader: it shows the text and runs nothing before Run.
  await cell.write("print('from a link')");
  await cell.press("Share");
  await page.waitForURL(/#live=/, { timeout: 10000 });
  const { context: elsewhere, page: other } = await open("light", problems);
  const fetched = [];
  other.on("request", (r) => fetched.push(r.url()));
  await other.goto(page.url(), { waitUntil: "networkidle" });
  await other.locator('.live-editor[data-of="cell 1"]', { hasText: "from a link" }).waitFor({ timeout: 30000 })
    .catch(() => problems.push("a shared link does not bring the edit"));
  expect(!fetched.some((url) => url.includes("/pyodide/")), "a shared link runs by itself");
  await elsewhere.close();

  await cell.write("while True: pass");
  await cell.press("Run");
  await cell.press("Stop");
  expect((await cell.bar.locator(".live-status").textContent()) === "stopped", "Stop does not stop");
  await cell.press("Reset");
  await cell.press("Run");
  expect((await cell.done()) === shown, "a cell does not run after Stop and Reset");

  // A slider prices the chapter's program anew, by keyboard too; Reset brings back what the page was built with.
  const price = page.locator("[data-price]");
  await page.locator(".tabbed-labels label", { hasText: "hw: what it costs" }).first().click();
  const priced = async () => {
    await page.waitForFunction(() => document.querySelector("[data-price] [role=status]").textContent === "", null, { timeout: 60000 });
    return page.locator(".price-result").innerHTML();
  };
  const built = await price.locator(".price-result").innerHTML();
  const slider = price.locator("[data-size][type=range]").first();
  await slider.focus();
  since = Date.now();
  await page.keyboard.press(await slider.evaluate((node) => (node.value === node.min ? "ArrowRight" : "ArrowLeft")));
  const moved = await priced();
  const repriced = Date.now() - since;
  expect(moved !== built && /<dd>.* bound by /.test(moved), "a slider that moves changes no price");
  expect(/^[\d,]+$/.test(await slider.getAttribute("aria-valuetext")), "a slider does not say its value");
  await price.getByRole("radio", { name: /mcu/ }).check();
  await price.locator('[data-size="width"]').press("End");
  expect(refusal.test(await priced()), `a microcontroller does not say ${refusal} of the greatest width`);
  await price.getByRole("button", { name: "Reset" }).click();
  await page.waitForFunction((html) => document.querySelector(".price-result").innerHTML === html, built, { timeout: 10000 })
    .catch(() => problems.push("Reset does not bring back the panel's first prices"));

  // Another chapter, by a link: the same Python goes on.
  const starts = () => asked.filter((p) => p.endsWith("pyodide.asm.wasm")).length;
  const before = starts();
  const next = LIVE.find((x) => x.path !== path).path;
  await page.locator(`.md-nav a[href$="${next}"], .md-nav a[href*="${next.slice(1)}"]`).first().evaluate((a) => a.click());
  await page.locator(`[data-live="ref${next.replace(/\/$/, "")}.py"]`).waitFor({ state: "attached", timeout: 30000 });
  await cell.press("Run");
  await cell.done();
  expect(starts() === before, "instant navigation starts Python again");

  // A program of one's own, in the same Python: priced, and told in a line what is wrong.
  if (path === LIVE[0].path) {
    await page.locator('.md-nav a[href$="start/price/"]').first().evaluate((a) => a.click());
    const text = page.locator("#own-text");
    await text.waitFor({ timeout: 30000 });
    await page.selectOption("#own-preset", { label: "softmax" });
    await page.selectOption("#own-device", "zcu102");
    await page.locator("#own-fields").fill("mhz = 100");
    await page.getByRole("button", { name: "Price", exact: true }).click();
    expect(/your_device: .*reduce_max/s.test(await priced()), "a preset on a changed device is not priced");
    await text.fill((await text.inputValue()).replace("np.exp", "np.sinh"));
    await text.press("Control+Enter");
    expect(/^<p class="price-refused">line 2: UnsupportedPrimitive[^<]*<\/p>$/.test(await priced()), "a wrong program is not told in a line");
  }
  console.log(`${path}: first output after ${cold} ms, again after ${warm} ms, broken law after ${caught} ms, exercise after ${solved} ms, prices after ${repriced} ms, ${(first / 1e6).toFixed(2)} MB before the first run, ${((await loaded()) / 1e6).toFixed(1)} in all`);
  await context.close();
  return problems;
}

let failed = 0;
let passed = 0;
const begin = Date.now();
const chosen = (path) => path.includes(process.argv[3] ?? "");
const waiting = (await pages(site)).filter(chosen);

async function work() {
  for (let path = waiting.shift(); path !== undefined; path = waiting.shift()) {
    const problems = await problemsOf(path).catch((e) => [e.message.split("\n")[0]]);
    for (const problem of problems) console.log(`FAIL ${path}: ${problem}`);
    if (problems.length) failed += 1;
    else passed += 1;
  }
}

for (const chapter of LIVE.filter(({ path }) => chosen(path))) {
  const problems = await liveProblems(chapter).catch((e) => [e.message]);
  for (const problem of problems) console.log(`FAIL ${chapter.path}, live: ${problem}`);
  if (problems.length) failed += 1;
  else passed += 1;
}

await Promise.all([work(), work(), work()]); // each page waits for the browser about as long as it keeps it busy
await browser.close();
server.close();
console.log(`browser: ${passed} passed, ${failed} failed in ${((Date.now() - begin) / 1000).toFixed(0)} s`);
process.exit(failed || !passed ? 1 : 0);
