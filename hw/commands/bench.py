"""`triptych bench SLUG`: implementations and peers race on the technique's example."""

import numpy as np
from rich.text import Text

import ref
from hw.commands.shared import (
    Refusal,
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


def bench(options):
    """Race, and show who was how fast."""
    import jax.numpy as jnp

    import accel
    from accel.race import implementations, on_device, peers, race

    if options.seconds <= 0:
        raise Refusal(f"--seconds must be positive, got {options.seconds:g}")
    t = technique(options.slug)
    if not has_accel(t):
        raise Refusal(f"accel.{t.slug} is not written yet: nothing to race")
    races = []
    with progress() as bar:
        task = bar.add_task(t.slug, total=None)
        for e in getattr(ref, t.slug).example():
            reference, fast = getattr(getattr(ref, t.slug), e.fn), getattr(getattr(accel, t.slug), e.fn)
            args = on_device(e.args, getattr(jnp, options.dtype))
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
        "slug": t.slug, "device": jax_device(), "dtype": options.dtype,
        "races": [
            {**r, "entries": [{"name": x.name, "seconds": x.seconds, "spread": x.spread, "why_not": x.why_not}
                              for x in r["entries"]]} for r in races
        ],
    }  # fmt: skip

    def show(out):
        out.print(Text(f"{t.title} on {value['device']}, {options.dtype}", style="bold"))
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
