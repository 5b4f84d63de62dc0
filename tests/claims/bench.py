"""The races of `triptych bench` on one GPU, stored: `python -m tests.claims.bench [SLUG ..]`.

Each technique's default problems, forward and, where it has a backward pass, with gradients; peers are those
that are installed. One to four minutes a technique, most of them compilation; writes
docs/data/bench_<slug>_gpu.json and prints the tables' rows. --one-pass races forward, or with gradients,
alone, and keeps what a fresh record holds of the other: two GPUs share the work, or two days. --shape and
--set as of the command replace the default problems; --only names entries.
"""

import argparse

from hw.commands.bench import PROBLEMS, _shape, race_problems, share_memory
from hw.commands.shared import assignment
from tests.claims.record import DATA, ROOT, is_fresh, load, store

PASSES = {"forward": False, "forward + backward": True}
BACKWARD = ("flash", "block_sparse_flash", "rum", "mesa")
COMMAND = ("bench", "bench_attention", "bench_clock", "bench_others", "bench_problem")
PARTS = {
    "flash": "attention", "block_sparse_flash": "attention", "lean": "attention", "llm_int8": "compression",
    "rum": "memory", "pitome": "vision", "mesa": "training",
}  # fmt: skip


def files(slug):
    """The code whose change makes a race stale: the technique in accel, its kernels, the race itself."""
    kernels = sorted(p.name for p in (ROOT / "accel" / "kernels").glob(f"{slug}_*.py"))
    if slug == "block_sparse_flash":  # windows are flash's
        kernels += sorted(p.name for p in (ROOT / "accel" / "kernels").glob("flash_*.py"))
    mine = [f"accel/{PARTS[slug]}/{slug}.py", *(f"accel/kernels/{k}" for k in kernels)]
    if PARTS[slug] == "attention":
        mine.append("accel/attention/drop_in.py")
    return (*mine, *(f"hw/commands/{c}.py" for c in COMMAND), "tests/claims/bench.py")


FILES = {slug: files(slug) for slug in PROBLEMS}


def rows(found):
    """One line an entry, to read while it runs."""
    for r in found["races"]:
        yield r["title"]
        for e in sorted(r["entries"], key=lambda e: e["seconds"] or float("inf")):
            if not e["seconds"]:
                yield f"  {e['name']}: {e['why_not']}"
                continue
            speed = f"{e['tflops']:.0f} TFLOP/s, {e['gbps']:.0f} GB/s, {e['roof']:.0%} of the roof"
            took = f"{e['seconds'] * 1e3:.4f} ms, {e['ratio']:.2f}x"
            yield f"  {e['name']}: {took}, {speed}, error {e['error']:.0e}"


def keep(slug, passes):
    """Store the races of these passes, and beside them those of the other that a fresh record holds."""
    name = f"bench_{slug}_gpu"
    held = load(name)["results"] if (DATA / f"{name}.json").exists() and is_fresh(name) else {}
    found = held | passes
    return store(name, {p: found[p] for p in PASSES if p in found}, FILES[slug])


def main():
    """Race and store."""
    share_memory()
    import jax

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("slug", nargs="*", help="all if none is named")
    parser.add_argument("--seconds", type=float, default=0.5, help="spent on each entry")
    parser.add_argument("--shape", action="append", default=[], help="race this and store nothing")
    parser.add_argument("--set", action="append", default=[], help="an option of it")
    parser.add_argument("--only", action="append", default=[], help="entries that hold this word")
    parser.add_argument("--one-pass", choices=("forward", "backward"), help="of those that have two")
    args = parser.parse_args()
    if unknown := [s for s in args.slug if s not in PROBLEMS]:
        parser.error(f"no race of {', '.join(unknown)}; there are {', '.join(PROBLEMS)}")
    if jax.default_backend() != "gpu":
        parser.error("JAX sees no GPU")
    cases = [(_shape(s), dict(map(assignment, args.set))) for s in args.shape] or None
    for slug in args.slug or PROBLEMS:
        passes = {}
        for name, backward in PASSES.items():
            asked = args.one_pass in (None, "backward" if backward else "forward")
            if not asked or (backward and slug not in BACKWARD):
                continue
            passes[name] = race_problems(
                slug, cases, backward=backward, seconds=args.seconds, only=tuple(args.only)
            )
            print("\n".join(rows(passes[name])), flush=True)
        if passes and cases is None and not args.only:
            print(keep(slug, passes), flush=True)


if __name__ == "__main__":
    main()
