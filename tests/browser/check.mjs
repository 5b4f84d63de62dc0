// Opens every built page in headless Chromium and fails on what a reader would stumble over: a request to another
// host, an error in the console, an equation KaTeX could not set, a page wider than a phone, an axe violation.
// Usage: node tests/browser/check.mjs SITE_FOLDER   (CHROMIUM names the browser; playwright-core, axe-core in NODE_PATH)
import { createRequire } from "node:module";
import { createServer } from "node:http";
import { readFile, readdir, stat } from "node:fs/promises";
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

const server = createServer(async (request, response) => {
  let path = join(site, decodeURIComponent(new URL(request.url, "http://localhost").pathname));
  try {
    if ((await stat(path)).isDirectory()) path = join(path, "index.html");
    const body = await readFile(path);
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
async function problemsOf(path, colorScheme) {
  const problems = [];
  const context = await browser.newContext({ colorScheme, viewport: { width: 1280, height: 900 } });
  const page = await context.newPage();
  page.on("request", (r) => {
    if (!r.url().startsWith(origin) && !r.url().startsWith("data:") && !r.url().startsWith("blob:")) problems.push(`asks for ${r.url()}`);
  });
  page.on("console", (m) => m.type() === "error" && problems.push(`console: ${m.text()}`));
  page.on("pageerror", (e) => problems.push(`error: ${e.message}`));
  await page.goto(origin + path, { waitUntil: "load" });
  const maths = await page.locator(".arithmatex").count();
  if (maths) {
    await page.waitForSelector(".arithmatex .katex", { state: "attached", timeout: 30000 })
      .catch(() => problems.push("equations were not set"));
  }
  const wrong = await page.locator(".katex-error").allTextContents();
  problems.push(...wrong.map((text) => `KaTeX cannot set ${text}`));
  await page.addScriptTag({ content: axeSource });
  const { violations } = await page.evaluate(() =>
    window.axe.run(document.querySelector(".md-content") ?? document, { runOnly: ["wcag2a", "wcag2aa"] }),
  );
  problems.push(...violations.map((v) => `axe ${colorScheme}: ${v.id} at ${v.nodes[0].target.join(" ")}`));
  await page.setViewportSize({ width: 390, height: 844 });
  const overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  if (overflow > 0) problems.push(`is ${overflow} px wider than a phone of 390 px (${colorScheme})`);
  await context.close();
  return problems;
}

let failed = 0;
let passed = 0;
const waiting = await pages(site);

async function work() {
  for (let path = waiting.shift(); path !== undefined; path = waiting.shift()) {
    const problems = [...(await problemsOf(path, "light")), ...(await problemsOf(path, "dark"))];
    for (const problem of problems) console.log(`FAIL ${path}: ${problem}`);
    if (problems.length) failed += 1;
    else passed += 1;
  }
}

await Promise.all([work(), work(), work()]); // each page waits for the browser about as long as it keeps it busy
await browser.close();
server.close();
console.log(`browser: ${passed} passed, ${failed} failed`);
process.exit(failed || !passed ? 1 : 0);
