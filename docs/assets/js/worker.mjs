// The Python of the live cells, in a worker: nothing of it is fetched before a reader's first Run.
// In: {id, kind, what, edits, wheels}, or of prices {id, kind: "price", what, programs}. Out: {id, status} |
// {id, text} | {id, html} | {id, done: true, ok}.
import { loadPyodide } from "../vendor/pyodide/pyodide.mjs";

const vendor = new URL("../vendor/", import.meta.url);
const quiet = { messageCallback: () => {} };
const said = [];
let python;
let laws; // Hypothesis, once a chapter's laws or exercises are asked for

async function start(id) {
  const zip = fetch(new URL("library.zip", vendor)).then((r) => {
    if (!r.ok) throw new Error(`library.zip: ${r.status}`);
    return r.arrayBuffer();
  });
  postMessage({ id, status: "starting Python" });
  const py = await loadPyodide({
    indexURL: new URL("pyodide/", vendor).href,
    stdout: (line) => said.push(line),
    stderr: (line) => said.push(line),
  });
  postMessage({ id, status: "loading NumPy" });
  await py.loadPackage("numpy", quiet);
  py.FS.mkdirTree("/library/assets/programs");
  py.unpackArchive(await zip, "zip", { extractDir: "/library" });
  py.runPython("import sys; sys.path.insert(0, '/library'); import numpy, live");
  return py;
}

// The op programs of a panel, once.
async function store(py, slug) {
  const path = `/library/assets/programs/${slug}.gz`;
  if (py.FS.analyzePath(path).exists) return;
  const answer = await fetch(new URL(`../programs/${slug}.gz`, import.meta.url));
  if (!answer.ok) throw new Error(`${slug}.gz: ${answer.status}`);
  py.FS.writeFile(path, new Uint8Array(await answer.arrayBuffer()));
}

onmessage = async ({ data: { id, kind, what, edits, wheels, programs } }) => {
  try {
    python ??= start(id);
    const py = await python;
    if (kind === "price") {
      if (programs) await store(py, programs);
      postMessage({ id, status: "pricing" });
      postMessage({ id, html: py.pyimport(programs ? "panel" : "price").answer(what), done: true, ok: true });
      return;
    }
    if (kind === "laws" || kind === "exercise") {
      if (!laws) postMessage({ id, status: "loading Hypothesis" });
      laws ??= py.loadPackage(wheels.map((name) => new URL(`pyodide/${name}`, vendor).href), quiet);
      await laws;
    }
    postMessage({ id, status: { laws: "looking for a counterexample", exercise: "checking" }[kind] ?? "running" });
    const live = py.pyimport("live");
    const given = py.toPy(edits);
    const ok = live.run(kind, what, given, (text) => postMessage({ id, text }));
    given.destroy();
    postMessage({ id, done: true, ok });
  } catch (error) {
    postMessage({ id, text: `Python did not start here: ${error.message}\n${said.join("\n")}`, done: true, ok: false, dead: true });
  }
};
