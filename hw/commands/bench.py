"""`triptych bench SLUG`: implementations and other people's race, values checked first.

Techniques with a problem of their own (PROBLEMS) take shapes and options from the command line; the others,
and --example, race on the technique's example.
"""

import os

import numpy as np
from rich.text import Text

import ref
from hw.commands import bench_attention, bench_others
from hw.commands.bench_clock import listed, measured
from hw.commands.bench_figure import race_figure
from hw.commands.bench_problem import contest
from hw.commands.shared import (
    Refusal,
    assignment,
    columns,
    emit,
    has_accel,
    head,
    jax_device,
    leaves,
    progress,
    shapes,
    si,
)
from ref.catalog import technique

PROBLEMS = {
    "flash": bench_attention.flash,
    "block_sparse_flash": bench_attention.block_sparse_flash,
    "lean": bench_attention.lean,
    "llm_int8": bench_others.llm_int8,
    "rum": bench_others.rum,
    "pitome": bench_others.pitome,
    "mesa": bench_others.mesa,
}
# (shape, options) that are raced when none is named: on a CPU, and on anything faster.
CAUSAL = {"causal": True}
SMALL = {
    "flash": [((1, 1024, 8, 64), {}), ((1, 1024, 8, 64), CAUSAL)],
    "block_sparse_flash": [((1, 2048, 4, 64), {"mask": "butterfly"})],
    "lean": [((1, 4096, 8, 64), {"kv_heads": 2})],
    "llm_int8": [((64, 512, 512), {"outliers": 0.01})],
    "rum": [((4, 64, 64), {})],
    "pitome": [((8, 197, 64), {})],
    "mesa": [((1024, 512), {})],
}
LARGE = {
    "flash": [
        (s, o) for s in ((4, 4096, 16, 128), (1, 16384, 16, 128), (4, 4096, 16, 64)) for o in ({}, CAUSAL)
    ],
    "block_sparse_flash": [((1, 32768, 16, 128), {"window": 256}), ((1, 16384, 16, 128), {"mask": "random"})],
    "lean": [
        ((1, 524288, 32, 128), {"kv_heads": 8}),
        ((1, 65536, 32, 128), {"kv_heads": 8}),
        ((8, 8192, 32, 128), {"kv_heads": 8}),
        ((16, 131072, 32, 128), {"kv_heads": 8, "lengths": "ragged"}),
    ],
    "llm_int8": [((m, 4096, 16384), {}) for m in (16, 4096)] + [((4096, 12288, 12288), {})],
    "rum": [((128, 256, 128), {})],
    "pitome": [((256, 577, 64), {})],
    "mesa": [((65536, 1536), {})],
}


def bench(options):
    """Race, and show who was how fast."""
    if options.seconds <= 0:
        raise Refusal(f"--seconds must be positive, got {options.seconds:g}")
    if options.rounds < 1:
        raise Refusal(f"--rounds must be at least 1, got {options.rounds}")
    t = technique(options.slug)
    if not has_accel(t):
        raise Refusal(f"accel.{t.slug} is not written yet: nothing to race")
    if t.slug in PROBLEMS and not options.example:
        return _problems(t, options)
    asked = {
        "--shape": options.shape,
        "--set": options.set,
        "--backward": options.backward,
        "--plot": options.plot,
    }
    if named := [n for n, x in asked.items() if x]:
        raise Refusal(f"{', '.join(named)}: for {', '.join(PROBLEMS)}, without --example")
    return _example(t, options)


# ---- problems of their own


def race_problems(
    slug, cases=None, *, dtype=None, backward=False, seed=None, ceilings="auto", say=None, **clock
):
    """{slug, device, dtype, seed, versions, ceilings, races} of (shape, options) cases; what --json prints.

    cases: None for the default ones of the device. dtype: None is bfloat16, on a CPU and for rum float32.
    seed: None draws one. ceilings: "parts" (hw's data sheet), "measured", or "auto": the first that there is.
    clock: `seconds` an entry, `count` of rounds, `only` these entries.
    """
    share_memory()
    import jax

    cpu = jax.default_backend() == "cpu"
    dtype = dtype or ("float32" if cpu or slug == "rum" else "bfloat16")  # rum's kernels are float32
    seed = int(np.random.SeedSequence().entropy % 2**31) if seed is None else seed
    make = PROBLEMS[slug]
    known = bench_attention.options_of(make)
    races, problems = [], []
    for n, (shape, options) in enumerate(cases or (SMALL if cpu else LARGE)[slug]):
        for name in options:
            if name not in known:
                raise Refusal(f"{slug} has no option {name!r}; there are {', '.join(known)}")
        problems.append(
            lambda n=n, shape=shape, options=options: make(
                shape, dtype=dtype, seed=seed + n, **({"backward": True} if backward else {}), **options
            )
        )
    roofs = None
    for build in problems:  # one at a time: their arrays are large
        problem = build()
        if roofs is None:
            roofs = _ceilings(ceilings, problem.dtype, clock.get("seconds", 0.3))
        races.append(contest(problem, roofs, say=say or (lambda name: None), **clock))
        del problem
    return {
        "slug": slug, "device": jax_device(), "dtype": dtype, "seed": seed, "backward": bool(backward),
        "versions": _versions(), "races": races,
        "ceilings": {"basis": roofs.basis, "rates": roofs.rates, "bandwidth": roofs.bandwidth},
    }  # fmt: skip


def share_memory():
    """Leave room for the arrays of PyTorch on the same GPU, and let its compiler work in this process, where
    workers would first start for a minute; before JAX looks at its devices and PyTorch is imported.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def _problems(t, options):
    cases = None
    sets = dict(assignment(text) for text in options.set)
    if options.shape:
        cases = [(_shape(text), sets) for text in options.shape]
    elif sets:
        raise Refusal("--set needs a --shape")
    if options.plot and not options.plot.endswith(".svg"):
        raise Refusal(f"--plot writes an .svg, got {options.plot!r}")
    with progress() as bar:
        task = bar.add_task(t.slug, total=None)
        value = race_problems(
            t.slug, cases, dtype=options.dtype, backward=options.backward, seed=options.seed,
            ceilings=options.ceilings, seconds=options.seconds, count=options.rounds, only=options.only,
            say=lambda words: bar.update(task, description=f"{t.slug}: {words}"),
        )  # fmt: skip
    if options.plot:
        with open(options.plot, "w", encoding="utf-8") as f:
            f.write(race_figure(value))
    emit(options, value, lambda out: _show(out, t, value))


def _show(out, t, value):
    out.print(Text(f"{t.title} on {value['device']}", style="bold"))
    for r in value["races"]:
        head(out, r["title"])
        rate, unit = ("tflops", "TFLOP/s") if by_arithmetic(r) else ("gbps", "GB/s")
        table = columns("entry", "ms", "±", unit, "time", "roof", "error")
        ran = [e for e in r["entries"] if e["seconds"]]
        for e in sorted(ran, key=lambda e: e["seconds"]):
            table.add_row(
                e["name"], f"{e['seconds'] * 1e3:.4g}", f"{e['spread'] * 1e3:.1g}", f"{e[rate]:.4g}",
                f"{e['ratio']:.2f}x", f"{e['roof']:.1%}", f"{e['error']:.0e}",
            )  # fmt: skip
        out.print(table)
        for e in r["entries"]:
            if not e["seconds"]:
                out.print(Text(f"{e['name']} did not run: {e['why_not']}", style="dim"))
    c = value["ceilings"]
    out.print()
    words = (
        "time: of the first entry that ran; roof: share of what the device could do "
        f"({c['basis']}); error: relative, against float64; inputs drawn with seed {value['seed']}."
    )
    out.print(Text(words, style="dim"))


def by_arithmetic(race):
    """Whether a race is told in operations a second: if the roof of its entries is that of arithmetic."""
    bound = [e["bound_by"] for e in race["entries"] if e["seconds"]]
    return bool(race["flops"]) and "arithmetic" in bound[:1]


def _shape(text):
    try:
        return tuple(int(n) for n in text.lower().split("x"))
    except ValueError:
        raise Refusal(f"--shape {text!r} must look like 4x4096x16x128") from None


def _ceilings(how, dtype, seconds):
    import jax

    found = None if how == "measured" else listed(jax.devices()[0].device_kind)
    if found is None and how == "parts":
        raise Refusal(f"hw.parts has no {jax.devices()[0].device_kind!r}; use --ceilings measured")
    return found or measured([dtype], seconds=min(seconds, 1.0), small=seconds < 0.01)


def _versions():
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "torch", "flash-attn", "flash-attn-4", "fla", "tokamax", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# ---- the technique's example


def _example(t, options):
    import jax.numpy as jnp

    import accel
    from accel.race import implementations, on_device, peers, race

    dtype = options.dtype or "float32"
    races = []
    with progress() as bar:
        task = bar.add_task(t.slug, total=None)
        for e in getattr(ref, t.slug).example():
            reference, fast = getattr(getattr(ref, t.slug), e.fn), getattr(getattr(accel, t.slug), e.fn)
            args = on_device(e.args, getattr(jnp, dtype))
            entries = {"accel (auto)": lambda fast=fast, args=args, e=e: fast(*args, **e.kwargs)}
            for impl in implementations(fast):
                entries[f"accel ({impl})"] = lambda fast=fast, args=args, e=e, impl=impl: fast(
                    *args, **{**e.kwargs, "impl": impl}
                )
            entries |= peers(t.slug, e, args)
            entries["ref (NumPy, float64)"] = lambda reference=reference, e=e: reference(*e.args, **e.kwargs)
            say = lambda name, e=e: bar.update(task, description=f"{t.slug}.{e.fn}: {name}")
            results = race(entries, budget=options.seconds, progress=say)
            races.append(
                {"fn": e.fn, "shapes": [list(np.shape(x)) for x in leaves(args)], "entries": results}
            )
    value = {
        "slug": t.slug, "device": jax_device(), "dtype": dtype,
        "races": [
            {**r, "entries": [{"name": x.name, "seconds": x.seconds, "spread": x.spread, "why_not": x.why_not}
                              for x in r["entries"]]} for r in races
        ],
    }  # fmt: skip

    def show(out):
        out.print(Text(f"{t.title} on {value['device']}, {dtype}", style="bold"))
        for r in races:
            head(out, f"{r['fn']} {shapes(r['shapes'])}")
            best = min((x.seconds for x in r["entries"] if x.seconds), default=0.0)
            table = columns("entry", "median", "spread", "of the best")
            ran = [x for x in r["entries"] if x.seconds]
            for x in sorted(ran, key=lambda x: x.seconds):
                spread = f"±{si(x.spread, 's')}"
                table.add_row(x.name, si(x.seconds, "s"), spread, f"{x.seconds / best:.2f}x")
            out.print(table)
            for x in r["entries"]:
                if not x.seconds:
                    out.print(Text(f"{x.name} did not run: {x.why_not}", style="dim"))

    emit(options, value, show)
