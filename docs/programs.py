"""Trace the op programs of the chapters' panels over small grids of sizes: docs/assets/programs/<slug>.gz.

`python docs/programs.py` writes them all, `python docs/programs.py flash lean` some. It needs JAX; the panels
(docs/panel.py) read the files with NumPy alone. A test compares every program with a fresh trace under the
JAX that the file names. Programs that differ in numbers alone are stored once, each such number as a list;
the JSON text is compressed.
"""

import gzip
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hw  # noqa: E402
from hw.program import Block, Program  # noqa: E402
from ref.blocks.transformer import BlockParams  # noqa: E402

HOME = ROOT / "docs" / "assets" / "programs"


@dataclass(frozen=True)
class Grid:
    """The programs of a technique: `trace(**choice)` for every choice of the axes; `first` is shown first.

    what: the sentence over the panel. axes: {name: values}, numbers in rising order or words. devices: {kind:
    preset} where the chapter's device is another than the first of its kind.
    """

    what: str
    axes: dict[str, tuple]
    first: dict
    trace: Callable
    devices: dict = field(default_factory=dict)

    def choices(self):
        """Every choice, the last axis varying fastest."""
        return [dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]


def array(*shape, dtype="float32"):
    """An argument by its shape."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


class Blank:
    """Draws zeros: parameters whose shapes alone are wanted."""

    def standard_normal(self, shape):
        """Zeros of a shape."""
        return np.zeros(shape)


def shapes(tree, dtype="float32"):
    """The arguments of a tree of arrays."""
    return jax.tree.map(lambda a: array(*np.shape(a), dtype=dtype), tree)


def block(width, hidden, dtype="float32"):
    """Parameters of a transformer block by their shapes."""
    sizes = {"w_fc1": (width, hidden), "b_fc1": (hidden,), "w_fc2": (hidden, width)}
    sizes |= {name: (width, width) for name in ("w_q", "w_k", "w_v", "w_o")}
    return BlockParams(**{n: array(*sizes.get(n, (width,)), dtype=dtype) for n in BlockParams._fields})


def flash(form, length, width, heads, format):
    from accel.attention.flash import attention_dense, flash_attention
    from accel.kernels import flash_triton

    kernel = lambda q, k, v: flash_triton.forward(q, k, v, scale=width**-0.5, hi=0)
    tiles = lambda q, k, v: flash_attention(q, k, v, causal=True, impl="xla")
    dense = lambda q, k, v: attention_dense(q, k, v, causal=True)
    x = array(heads, length, width, dtype=format)
    if form == "one kernel":
        return hw.trace(kernel, array(heads, 1, length, width, dtype=format), x, x)
    return hw.trace(tiles if form == "tiles by XLA" else dense, x, x, x)


def block_sparse_flash(tiles, length, width, heads):
    from accel.attention.block_sparse_flash import block_sparse_attention
    from ref.attention.block_sparse_flash import butterfly_block_mask, local_block_mask

    n = length // 128
    mask = {"all": lambda: np.ones((n, n), bool), "butterfly": lambda: butterfly_block_mask(n),
            "local": lambda: local_block_mask(n, 3)}[tiles]()  # fmt: skip
    attend = lambda q, k, v: block_sparse_attention(q, k, v, mask, block_q=128, block_k=128, impl="xla")
    return hw.trace(attend, *[array(heads, length, width)] * 3)


def lean(form, keys, heads, format):
    from accel.attention.lean import flash_decoding_attention, lean_attention

    attend = lean_attention if form == "equal runs of tiles (lean)" else flash_decoding_attention
    options = {"block_n": 256, "num_workers": 16, "impl": "xla"}
    q, k = array(1, 4 * heads, 64, dtype=format), array(1, heads, keys, 64, dtype=format)
    run = lambda q, cache: attend(q, *cache, **options)
    return hw.trace(run, q, (k, k), weights=("cache",))


def rum(memory, steps, width, batch):
    from accel.memory.rum import rum as run
    from ref.memory.rum import RumParams

    wide, long, square = array(2 * width, width), array(width), array(width, width)
    params = RumParams(wide, long, wide, long, square, long)
    step = lambda x, params: run(x, params, lambda_=int(memory == "kept (λ = 1)"), impl="xla")
    return hw.trace(step, array(batch, steps, width), params, weights=("params",))


def pitome(ratio, length, width, batch):
    from accel.vision.pitome import merged_block

    one = lambda x, params: merged_block(
        x, params, num_heads=width // 64, ratio=ratio, margin=0.5, impl="xla"
    )
    return hw.trace(one, array(batch, length, width), block(width, 4 * width), weights=("params",))


def llm_int8(layer, tokens, width):
    from accel.compression.llm_int8 import llm_int8_linear
    from ref.compression.llm_int8 import Int8Linear

    if layer in ("float32", "bfloat16"):
        x, w = array(tokens, width, dtype=layer), array(width, width, dtype=layer)
        return hw.trace(lambda x, layer: x @ layer, x, w, weights=("layer",))
    threshold = 6.0 if layer == "int8 with outliers" else 0.0
    run = lambda x, layer: llm_int8_linear(x, layer, threshold=threshold, impl="xla")
    weights = Int8Linear(array(width, width, dtype="int8"), array(width))
    return hw.trace(run, array(tokens, width), weights, weights=("layer",))


def mesa(form, rows, width):
    from accel.blocks.mlp import mlp
    from accel.training import mesa as m
    from ref.training.mesa import RangeState

    heads, hidden = width // 64, 4 * width
    one = {"groups": heads}
    x, params = array(rows, width), (array(width, hidden), array(hidden), array(hidden, width), array(width))

    def exact(x, params, grad):
        return jax.vjp(lambda x, params: mlp(x, *params), x, params)[1](grad)

    def stored(x, params, states, grad):
        (w1, b1, w2, b2), (s1, s2, s3) = params, states
        h, kept1, s1 = m.mesa_linear(x, w1, b1, s1, **one)
        h, kept2, s2 = m.mesa_gelu(h, s2, **one)
        _, kept3, s3 = m.mesa_linear(h, w2, b2, s3, **one)
        grad, *of_second = m.mesa_linear_backward(grad, kept3)
        grad, *of_first = m.mesa_linear_backward(m.mesa_gelu_backward(grad, kept2), kept1)
        return grad, of_first, of_second, (s1, s2, s3)

    if form == "kept exactly":
        return hw.trace(exact, x, params, x, weights=("params",))
    states = (RangeState(array(heads), array(heads), array(dtype="int32")),) * 3
    return hw.trace(stored, x, params, states, x, weights=("params",))


def smollm2(phase, context, format):
    from hw.commands.models import model_programs

    return next(iter(model_programs("smollm2", phase, context, format).values()))


def pim_gpt(model, token):
    from hw.pim_decode import GPTS
    from tests.claims.pim_gpt import program

    return program(GPTS[model](), token)


def edge_moe(tokens, width, experts, rows):
    from accel.devices.edge_moe import moe_ffn

    run = lambda x, indices, scores, params: moe_ffn(x, indices, scores, *params, block_t=rows)
    choice = array(tokens, 2, dtype="int32"), array(tokens, 2)
    params = (array(experts, 2 * width, width), array(experts, 2 * width), array(experts, width, 2 * width),
              array(experts, width))  # fmt: skip
    return hw.trace(run, array(tokens, width), *choice, params, weights=("params",))


def mcuformer(image, width, depth, rank):
    from accel.devices.mcuformer import mcuformer_forward
    from ref.devices.mcuformer import SubnetConfig, init_mcuformer

    subnet = SubnetConfig(width, (3,) * depth, (4.0,) * depth)
    sizes = {"image_size": image, "patch": 16, "embed_dim": width, "depth": depth, "heads": 3}
    params = init_mcuformer(Blank(), rank_ratio=rank, num_classes=10, **sizes)
    options = {"subnet": subnet, "patch": 16, "rank_ratio": rank, "relative_position": False}
    run = lambda img, params: mcuformer_forward(img, params, **options)
    return hw.trace(run, array(image, image, 3), shapes(params), weights=("params",))


GRIDS = {
    "flash": Grid(
        "One causal forward pass of attention.",
        {"form": ("one kernel", "tiles by XLA", "scores in memory"), "length": (128, 512, 2048),
         "width": (64, 128), "heads": (1, 16), "format": ("bfloat16", "float32")},
        {"form": "one kernel", "length": 2048, "width": 64, "heads": 16, "format": "bfloat16"},
        flash,
    ),
    "block_sparse_flash": Grid(
        "One forward pass by tiles of 128, written for XLA: the tiles that are seen, one after the other.",
        {"tiles": ("all", "butterfly", "local"), "length": (512, 1024, 2048), "width": (64, 128),
         "heads": (1, 8)},
        {"tiles": "butterfly", "length": 1024, "width": 64, "heads": 8},
        block_sparse_flash,
    ),
    "lean": Grid(
        "One step of decoding for four query heads on each key head of 64, by the walk for XLA: 16 workers, "
        "tiles of 256 keys. The cache lies in the memory of the device.",
        {"form": ("equal runs of tiles (lean)", "fixed split"), "keys": (1024, 8192, 65536), "heads": (1, 8),
         "format": ("bfloat16", "float32")},
        {"form": "equal runs of tiles (lean)", "keys": 8192, "heads": 8, "format": "bfloat16"},
        lean,
    ),
    "rum": Grid(
        "A rotational unit of memory over a sequence, with inputs as wide as its state.",
        {"memory": ("not kept (λ = 0)", "kept (λ = 1)"), "steps": (16, 128), "width": (64, 256, 1024),
         "batch": (1, 32)},
        {"memory": "not kept (λ = 0)", "steps": 128, "width": 256, "batch": 1},
        rum,
    ),
    "pitome": Grid(
        "One transformer block with heads of 64 that merges its tokens to a share of them.",
        {"ratio": (0.7, 0.9, 1.0), "length": (65, 197, 577), "width": (192, 384), "batch": (1, 16)},
        {"ratio": 0.9, "length": 197, "width": 384, "batch": 1},
        pitome,
    ),
    "llm_int8": Grid(
        "One square linear layer.",
        {"layer": ("int8", "int8 with outliers", "bfloat16", "float32"), "tokens": (1, 16, 512),
         "width": (576, 1024, 4096)},
        {"layer": "int8", "tokens": 1, "width": 1024},
        llm_int8,
    ),
    "mesa": Grid(
        "Forward and backward through the MLP of a transformer block, four times as wide inside.",
        {"form": ("kept exactly", "kept in 8 bits (Mesa)"), "rows": (16, 197, 3152, 25216),
         "width": (192, 384, 768)},
        {"form": "kept in 8 bits (Mesa)", "rows": 3152, "width": 384},
        mesa,
    ),
    "smollm2": Grid(
        "SmolLM2-135M: reading a prompt, or one token after it. The weights and the cache lie in the memory.",
        {"phase": ("prefill", "decode"), "context": (64, 512, 2048), "format": ("bfloat16", "float32")},
        {"phase": "decode", "context": 512, "format": "bfloat16"},
        smollm2,
    ),
    "pim_gpt": Grid(
        "One token through all layers of a GPT, its weights and cache in the memory, in 16-bit numbers.",
        {"model": ("gpt2_small", "gpt2_medium", "gpt2_large", "gpt2_xl"), "token": (128, 512, 1024)},
        {"model": "gpt2_small", "token": 512},
        pim_gpt,
        {"pim": "pim_gpt"},
    ),
    "edge_moe": Grid(
        "One layer of experts, two of them a token, the tokens sorted by expert and cut into tiles of rows.",
        {"tokens": (17, 129), "width": (96, 192, 384), "experts": (4, 16), "rows": (8, 32)},
        {"tokens": 129, "width": 192, "experts": 16, "rows": 32},
        edge_moe,
    ),
    "mcuformer": Grid(
        "One image through a vision transformer of low rank, with patches of 16 and 3 heads.",
        {"image": (96, 160, 240), "width": (168, 216), "depth": (2, 6), "rank": (0.4, 0.9)},
        {"image": 160, "width": 168, "depth": 2, "rank": 0.4},
        mcuformer,
    ),
}  # fmt: skip


# Storing


def bare(program: Program) -> Program:
    """The program without lines of source, which move with every edit and have no price."""
    strip = lambda b: replace(b, ops=tuple(op(o) for o in b.ops))

    def op(o):
        return replace(o, source="", dims=inside(o.dims))

    def inside(x):
        if isinstance(x, Block):
            return strip(x)
        if isinstance(x, tuple):
            return tuple(map(inside, x))
        names = ("body", "cond", "branches", "operands", "index_map")
        held = {n: inside(v) for n in names if (v := getattr(x, n, None)) is not None}
        return replace(x, **held) if held else x

    return replace(program, body=strip(program.body))


def pack(programs) -> list[dict]:
    """Groups {"of": indices, "lists": [[...]], "program": tree}: programs of one form are one tree, in which
    {"#": n} stands for the n-th list, an entry a program.
    """
    trees = [json.loads(p.to_json()) for p in programs]
    forms = {}
    for i, tree in enumerate(trees):
        forms.setdefault(json.dumps(_form(tree)), []).append(i)
    groups = []
    for members in forms.values():
        lists = {}
        tree = _merge([trees[i] for i in members], lists)
        groups.append({"of": members, "lists": [json.loads(x) for x in lists], "program": tree})
    return groups


def _form(x):
    if isinstance(x, dict):
        return {k: _form(v) for k, v in x.items()}
    return [_form(v) for v in x] if isinstance(x, list) else 0


def _merge(trees, lists):
    first = trees[0]
    if isinstance(first, dict):
        return {k: _merge([t[k] for t in trees], lists) for k in first}
    if isinstance(first, list):
        return [_merge([t[n] for t in trees], lists) for n in range(len(first))]
    if all(t == first and type(t) is type(first) for t in trees):
        return first
    return {"#": lists.setdefault(json.dumps(trees), len(lists))}


def traced(slug) -> list[Program]:
    """The programs of a grid in the order of its choices."""
    grid = GRIDS[slug]
    return [bare(grid.trace(**choice)) for choice in grid.choices()]


def record(slug) -> dict:
    """What the file of a slug holds, traced afresh."""
    grid = GRIDS[slug]
    axes = {name: list(values) for name, values in grid.axes.items()}
    return {"jax": jax.__version__, "what": grid.what, "axes": axes, "first": grid.first,
            "devices": grid.devices, "groups": pack(traced(slug))}  # fmt: skip


def write(slug) -> Path:
    """Trace and store; the file is the same bytes for the same programs."""
    HOME.mkdir(parents=True, exist_ok=True)
    path = HOME / f"{slug}.gz"
    text = json.dumps(record(slug), ensure_ascii=False, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


def main():
    """Write the files of the slugs on the command line, or all."""
    for slug in sys.argv[1:] or GRIDS:
        print(f"{slug}: {write(slug).stat().st_size:,} B")


if __name__ == "__main__":
    main()
