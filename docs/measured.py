"""What chapters show of records that a GPU made: `load`, `where`, `missing`; flash's table and figures."""

import json
from pathlib import Path

import charts
from pipeline import drawn, noted

DATA = Path(__file__).resolve().parent / "data"


# (record, what its script measures, command, chapter), of the scripts that need a GPU.
EXPERIMENTS = (
    ("flash_op_gpu", "attention alone", "flash_gpu op", "attention/flash"),
    ("flash_masks_gpu", "attention with hidden keys", "flash_gpu masks", "attention/flash"),
    ("flash_inside_gpu", "the kernels taken apart", "flash_inside", "attention/flash"),
    ("flash_counters_gpu", "what the hardware counts", "flash_counters", "attention/flash"),
    ("flash_memory_gpu", "memory and time up to 1,048,576 tokens", "flash_memory_gpu", "attention/flash"),
    ("flash_gpt2_gpu", "a training step of GPT-2", "flash_gpu gpt2", "attention/flash"),
    ("flash_reviews_gpu", "reviews, told apart", "flash_gpu reviews --csv FILE", "attention/flash"),
    ("flash_plays_gpu", "loss against context", "flash_gpu plays", "attention/flash"),
    ("many_devices_gpu", "a ring of devices", "many_devices --gpu", "attention/flash"),
    ("block_sparse_flash_gpu", "windows and block masks", "block_sparse_flash --gpu",
     "attention/block_sparse_flash"),
    ("block_sparse_flash_paths_gpu", "training on curves", "block_sparse_flash --gpu --paths",
     "attention/block_sparse_flash"),
    ("lean_gpu", "decoding", "lean --gpu", "attention/lean"),
    ("llm_int8_gpu", "int8 against bfloat16", "llm_int8_gpu", "compression/llm_int8"),
    ("rum_gpu", "copying, recall, stories", "rum --gpu", "memory/rum"),
    ("pitome_gpu", "images a second, all emoji", "pitome --gpu", "vision/pitome"),
    ("mesa_gpu", "activations of a training step", "mesa --gpu", "training/mesa"),
    ("edge_moe_gpu", "ways to run experts", "edge_moe --gpu", "devices/edge_moe"),
    ("smollm2_h200", "tokens a second", "smollm2 --gpu", "language/smollm2"),
    ("hw_gpu_h200", "the cost model against the card", "hw_gpu --gpu", "hw/gpu"),
    ("hw_ir_h200", "op programs against the card", "hw_ir --gpu", "hw/ir"),
)  # fmt: skip


def experiments(folder=DATA):
    """Markdown lines, for a page of docs/start: every experiment on a GPU, and whether it is stored."""
    yield "| `python -m tests.claims.` | measures | chapter | stored |"
    yield "|---|---|---|---|"
    for name, what, command, chapter in EXPERIMENTS:
        record = load(name, folder)
        stored = f"{record['date']}, {record['device'].split(';')[0]}" if record else "not yet"
        yield f"| `{command}` | {what} | [{chapter.split('/')[1]}](../../{chapter}/) | {stored} |"


def load(name, folder=DATA):
    """The record docs/data/<name>.json, or None."""
    path = Path(folder) / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def where(record):
    """On what and when a record was made, with JAX's version: "1 x NVIDIA H200, 2026-11-26, jax 0.11.2"."""
    return f"{record['device'].split(';')[0]}, {record['date']}, jax {record['versions']['jax']}"


def missing(command, what="No figures of a GPU are stored"):
    """A line for where a record would be."""
    return f"*{what} for this page yet; `{command}` makes them, on a GPU.*"


def attention_table(record):
    """Markdown lines: TFLOP/s of attention alone, and the times of others over ours."""
    rows, dense = {}, []
    for r in record["results"]["op"]:
        rows.setdefault((r["width"], r["tokens"], r["causal"]), {})[r["backward"]] = r
    head = "TFLOP/s | cuDNN | Triton"
    yield f"| d | N | | forward: {head} | with gradients: {head} |"
    yield "|--:|--:|---|" + "--:|" * 6
    for (width, tokens, causal), passes in sorted(rows.items()):
        cells = []
        for backward in (False, True):
            r = passes[backward]
            s = r["seconds"]
            ours = s.get("hopper")
            cells.append(f"{r['flops'] / ours / 1e12:.0f}" if ours else "")
            cells += [f"{s[n] / ours:.2f}" if ours and s.get(n) else "" for n in ("cudnn", "triton")]
            dense += [s["dense"] / ours] if ours and s.get("dense") else []
        yield f"| {width} | {tokens:,} | {'causal' if causal else 'full'} | " + " | ".join(cells) + " |"
    if dense:
        yield ""
        yield f"Where its scores fit, the dense form takes {min(dense):.1f} to {max(dense):.1f} times ours."


def masks_table(record, backward):
    """Markdown lines of a pass: TFLOP/s of what is visible where keys are hidden, as a share of the plain
    kernel's, which share of what the kernels compute is visible, and cuDNN.
    """
    words = {"plain": "all visible", "lengths": "lengths of keys", "packed": "texts side by side",
             "blocks": "tiles of 128, half of them", "random": "single pairs, half of them",
             "bias": "none, a bias for each head", "learnt bias": "the same, with its gradient"}  # fmt: skip
    place = lambda r: (r["width"], r["tokens"], r["causal"])
    rows = [r for r in record["results"]["masks"] if r["backward"] == backward]
    speed = lambda r: r["flops"] / r["seconds"]["hopper"]
    plain = {place(r): speed(r) for r in rows if r["case"] == "plain"}
    yield "| d | N | | hidden | TFLOP/s | of all visible | of pairs computed | cuDNN |"
    yield "|--:|--:|---|---|--:|--:|--:|--:|"
    for r in rows:
        ours, them = speed(r), r["seconds"].get("cudnn")
        shares = f"{ours / plain[place(r)]:.2f}", f"{r['useful']:.2f}" if "useful" in r else ""
        them = f"{them / r['seconds']['hopper']:.2f}" if them else ""
        shape, what = "causal" if r["causal"] else "full", words.get(r["case"], r["case"])
        cells = f"{ours / 1e12:.0f}", *shares, them
        yield f"| {r['width']} | {r['tokens']:,} | {shape} | {what} | " + " | ".join(cells) + " |"


def left_out(record):
    """Markdown lines: time of the forward kernel with something switched or left out, and of the whole."""
    forward, shape = record["results"]["forward"], record["results"]["shape"]
    yield "| | " + " | ".join(f"d = {d}: µs | of the whole" for d in forward) + " |"
    yield "|---|" + "--:|--:|" * len(forward)
    names = dict.fromkeys(n for ways in forward.values() for n in ways)
    for name in sorted(names, key="cuDNN".__eq__):
        cells = [
            f"{ways[name] * 1e6:,.0f} | {ways[name] / ways['as it is']:.2f}" if name in ways else " | "
            for ways in forward.values()
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"
    B, N, H = shape
    rate = lambda d: 4 * B * H * N**2 * int(d) / forward[d]["without exponentials"] / 1e12
    p = record["results"]["product"]
    yield ""
    yield (
        "Without exponentials the two products run at "
        + " and ".join(f"{rate(d):.0f} TFLOP/s (d = {d})" for d in forward)
        + f"; XLA's product of two matrices of {p['n']:,} squared, in the same process, at "
        f"{2 * p['n'] ** 3 / p['seconds'] / 1e12:.0f}."
    )


def backward_kernels(record):
    """Markdown lines: the kernels of a forward and backward pass, and how fast their products are."""
    (B, N, H), products = record["results"]["shape"], {"flash_forward": 2, "flash_dkv": 4, "flash_dq": 3}
    passes = record["results"]["backward"]
    yield "| kernel | products a tile | " + " | ".join(f"d = {d}: µs | TFLOP/s" for d in passes) + " |"
    yield "|---|--:|" + "--:|--:|" * len(passes)
    part = lambda took, name: sum(t for kernel, t in took.items() if kernel.startswith(name))
    for name, count in products.items():
        cells = []
        for d, took in passes.items():
            t = part(took, name)
            cells.append(f"{t * 1e6:,.0f} | {count * 2 * B * H * N**2 * int(d) / t / 1e12:.0f}")
        yield f"| `{name}` | {count} | " + " | ".join(cells) + " |"
    rest = [(sum(took.values()) - sum(part(took, n) for n in products)) * 1e6 for took in passes.values()]
    yield "| the rest: $D_i$, padding | | " + " | ".join(f"{t:,.0f} | " for t in rest) + " |"


def counters(record):
    """Markdown lines of two tables, forward and backward: how long each kernel takes and which share of that
    its units are busy.
    """
    few = "tensor", "shared memory", "L2"
    shown = {"flash_dkv": few, "flash_dq": few}
    shown["flash_forward"] = "tensor", "exponentials", "issue", "shared memory", "L2"
    words = {"flash_forward": "forward", "flash_dkv": "$dK$, $dV$", "flash_dq": "$dQ$"}
    units = {"tensor": "tensor cores", "issue": "instructions issued"}
    found = record["results"]["widths"]
    for kernels in (["flash_forward"], ["flash_dkv", "flash_dq"]):
        heads = [f"{words[k]}: µs | " + " | ".join(units.get(m, m) for m in shown[k]) for k in kernels]
        yield "| d | | " + " | ".join(heads) + " |"
        yield "|--:|---|" + "--:|" * sum(1 + len(shown[k]) for k in kernels)
        for d, cases in found.items():
            for case, counted in cases.items():
                cells = []
                for k in kernels:
                    cells.append(f"{counted[k]['microseconds']:,.0f}")
                    cells += [f"{counted[k][m]:.2f}" for m in shown[k]]
                yield f"| {d} | {case} | " + " | ".join(cells) + " |"
        yield ""
    full = {d: cases["full"] for d, cases in found.items()}
    clocks = ", ".join(f"{k[n]['gigahertz']:.2f}" for k in full.values() for n in words)
    yield f"The clock, GHz, in the three kernels of full attention: {clocks} (d = {' and '.join(full)})."


def clocked(record, cycles=6000):
    """A Figure of what the groups of a block do, by the core's own clock."""
    panels = []
    for d, t in record["results"]["timeline"].items():
        words = f"d = {d}, {t['groups']} groups: {t['bare']:,.0f} cycles a tile"
        panels.append((words, t["groups"], noted(t), 0, min(t["length"], cycles)))
    slow = max(t["cycles"]["a tile"] / t["bare"] for t in record["results"]["timeline"].values())
    return drawn(
        "What the groups of a block note of themselves on the device",
        "Noted on the device by the core's clock, to scale. S: from the issue of a tile's scores until they "
        "are there; the filled bar: its softmax; dotted: waiting for a barrier. What is left are the wait "
        "for the values and the rescaling. Notes take time: with all of these a tile takes up to "
        f"{slow:.2f} times as long as with one note a tile, which the headings tell. On {where(record)}.",
        panels,
    )  # fmt: skip


FITS = {
    "bytes over N": ("peak memory", "GB", 1e-9, 1),
    "seconds over N^2": ("forward and backward", "ms", 1e3, 2),
    "decode seconds over N": ("decoding", "ms", 1e3, 1),
}


def growth(record):
    """Figures of memory and time over the number of tokens, and of how far the fits are off."""
    r = record["results"]
    sizes = {
        "bytes over N": [x["tokens"] for x in r["growth"]],
        "decode seconds over N": [x["keys"] for x in r["decoding"]],
    }
    sizes["seconds over N^2"] = sizes["bytes over N"]
    peak = [(x["peak_bytes"] or x["operands"] + x["temporary_bytes"]) / 1e9 for x in r["growth"]]
    took = [(x["tokens"], 1e3 * x["seconds"]) for x in r["growth"]]
    ticks = {2**e: name for e, name in ((13, "8k"), (15, "32k"), (17, "128k"), (20, "1M"))}
    wide = {t: n for t, n in ticks.items() if t >= sizes["bytes over N"][0]}
    yield charts.lines(
        "Peak memory of forward and backward over the number of tokens",
        f"What the device's allocator held at most, {r['heads']} heads of {r['width']}, causal, bfloat16. "
        f"On {where(record)}.",
        {"peak": list(zip(sizes["bytes over N"], peak, strict=True))},
        x="tokens", y="GB", log="xy", ticks=wide, yticks=_decades(peak), height=220,
    )  # fmt: skip
    steps = [(x["keys"], 1e3 * x["seconds"]) for x in r["decoding"]]
    yield charts.lines(
        "Time over the number of tokens",
        "One call, both axes logarithmic: attention grows with the square, the decoding of a token with "
        f"the length. The longest call reaches {r['growth'][-1]['tflops']:.0f} TFLOP/s, the longest cache is "
        f"read at {r['decoding'][-1]['gbps']:,.0f} GB/s. On {where(record)}.",
        {"forward and backward": took, "decoding, 32 on 8 heads": steps},
        x="tokens", y="ms", log="xy", ticks=ticks, yticks=_decades([t for _, t in took + steps]), height=250,
    )  # fmt: skip
    words = []
    for name, (what, unit, scale, power) in FITS.items():
        f, n = r["fits"][name], {1: "n", 2: "n²"}[power]
        b = f["b"] * scale * 2.0 ** (20 * power)
        start = f"{f['a'] * scale:.3g} + " if f["a"] * scale > 1e-6 else ""
        words.append(f"{what} = {start}{b:.4g} {n} {unit}, within {f['worst']:.1%}")
    off = {
        what: list(zip(sizes[name], [100 * e for e in r["fits"][name]["residuals"]], strict=True))
        for name, (what, *_) in FITS.items()
    }
    yield charts.lines(
        "How far the fits are off, in per cent of what was measured",
        f"With n = N / 2²⁰: {'; '.join(words)}.",
        off, x="tokens", y="fit off by, %", log="x", ticks=ticks, height=220,
    )  # fmt: skip


def _decades(values):
    from math import ceil, floor, log10

    span = range(floor(log10(min(values))), ceil(log10(max(values))) + 1)
    return {10.0**e: f"{10.0**e:g}" for e in span}


def speed_up(record):
    """A Figure: how many times as fast all devices are as one, over the number of tokens."""
    f = record["results"]
    curve = lambda b: sorted((x["tokens"], x["one"] / x["all"]) for x in f["scaling"] if x["backward"] is b)
    return charts.lines(
        f"Attention in a ring of {f['devices']} devices over the number of tokens",
        f"Time of one device over that of {f['devices']}, causal, zigzag, 16 heads of 128 in bfloat16; "
        f"{f['devices']} would be perfect. On {where(record)}.",
        {"forward": curve(False), "with gradients": curve(True)},
        x="tokens", y="times as fast", log="x", height=240,
        ticks={x["tokens"]: f"{x['tokens'] // 1024}k" for x in f["scaling"]},
        yticks={t / 4: f"{t / 4:g}" for t in range(4, 4 * f["devices"] + 1, 1 if f["devices"] < 4 else 4)},
    )  # fmt: skip


def learning(record, task, model_names, *, floor=None):
    """A Figure of the training loss of a task of RUM's record, the mean over the seeds, by step."""
    found = record["results"][task]
    steps, curves = found["options"]["steps"], {}
    for model, name in model_names.items():
        runs = found["models"][model]["losses"]
        mean = [sum(v) / len(v) for v in zip(*runs, strict=True)]
        curves[name] = [(steps * i / (len(mean) - 1), v) for i, v in enumerate(mean)]
    words = f"Mean training loss of {len(runs)} seeds, in nats. On {where(record)}."
    fig = charts.lines(
        f"Training loss of {task} by step", words, curves, x="steps", y="loss", height=250, dots=False
    )
    if floor:
        left, right = fig.px(0), fig.px(steps)
        fig.line(left, fig.py(floor), right, fig.py(floor), stroke_opacity=0.5)
        fig.text(right, fig.py(floor) - 5, "remembers nothing", "end", font_size=12)
    return fig
