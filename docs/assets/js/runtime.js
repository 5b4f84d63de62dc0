// The Python worker that all live parts of a page share: it starts at the first request, and lives through instant
// navigation. Nothing of it is fetched before.
const vendor = new URL("../vendor/", import.meta.url);
const waiting = new Map(); // id -> who hears the answers
let library;
let worker;
let ids = 0;

// {files: {fingerprint: path}, exercises: {fingerprint: [module, name]}, laws: {"part/slug": module}, wheels}; null
// where there is no runtime.
export async function runtime() {
  if (library === undefined) {
    const answer = await fetch(new URL("library.json", vendor)).catch(() => null);
    const found = answer?.ok ? await answer.json() : null;
    library = found?.wheels.length && "Worker" in window ? found : null;
  }
  return library;
}

// hear({status} | {text} | {html} | {done: true, ok, dead, stopped}) is called until it is done.
export function ask(request, hear) {
  if (!worker) {
    worker = new Worker(new URL("worker.mjs", import.meta.url), { type: "module" });
    worker.onmessage = ({ data }) => {
      const hears = waiting.get(data.id);
      if (data.done) waiting.delete(data.id);
      hears?.(data);
      if (data.dead) end();
    };
    worker.onerror = (event) => end({ text: `The runtime could not be loaded. ${event.message ?? ""}`, dead: true });
  }
  const id = ++ids;
  waiting.set(id, hear);
  worker.postMessage({ id, wheels: library.wheels, ...request });
}

// Ends the worker; all who wait hear that they are done.
export function end(how = { stopped: true }) {
  worker?.terminate();
  worker = undefined;
  const hears = [...waiting.values()];
  waiting.clear();
  for (const hear of hears) hear({ done: true, ok: false, ...how });
}
