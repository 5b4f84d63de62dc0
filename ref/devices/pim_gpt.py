"""PIM-GPT: a GPT decoded one token at a time by DRAM banks that multiply and a small chip that does the rest.

Source: PIM-GPT (arXiv 2310.09385; npj Unconventional Computing 1, 2024). Every product with weights, keys or
values is computed where these lie, in the order of the units' adders (ref/blocks/lanes.py); softmax, layer
norm, GELU, biases and sums of partial results run on adders and multipliers (ref/blocks/asic.py). What it
takes in ticks: ref/blocks/dram.py. The paper gives the method; orders of the polynomials, seeds and roundings
are ours.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.asic import (
    asic_cycles,
    asic_work,
    exp_taylor,
    gelu_asic,
    layernorm_asic,
    reciprocal_newton,
    rsqrt_newton,
    softmax_asic,
)
from ref.blocks.dram import (
    GPTS,
    DramTiming,
    GptShape,
    KvTicks,
    VmmTicks,
    gpt2_large,
    gpt2_medium,
    gpt2_small,
    gpt2_xl,
    gpt3_large,
    gpt3_medium,
    gpt3_small,
    gpt3_xl,
    kv_ticks,
    long_run,
    tile_ticks,
    token_ticks,
    vmm_ticks,
)
from ref.blocks.formats import round_bf16
from ref.blocks.lanes import vmm_bf16
from ref.dims import dims
from ref.example import Example
from ref.models.gpt import GPTParams, init_gpt

__all__ = [
    "GPTS", "DramTiming", "GPTParams", "GptShape", "KvTicks", "PimCache", "VmmTicks", "asic_cycles",
    "asic_work", "example", "exp_taylor", "gelu_asic", "gpt2_large", "gpt2_medium", "gpt2_small",
    "gpt2_xl", "gpt3_large", "gpt3_medium", "gpt3_small", "gpt3_xl", "init_cache", "init_gpt", "kv_ticks",
    "layernorm_asic", "long_run", "pim_gpt_decode", "reciprocal_newton", "rsqrt_newton", "softmax_asic",
    "tile_ticks", "token_ticks", "vmm_bf16", "vmm_ticks",
]  # fmt: skip


class PimCache(NamedTuple):
    """What the banks keep of the text: keys [layers, H, S, d], a row a token; values [layers, H, d, S], a row
    a feature; length [] int, the tokens that are there. S tokens are reserved.
    """

    k: np.ndarray
    v: np.ndarray
    length: np.ndarray


def init_cache(params: GPTParams, reserved, *, num_heads) -> PimCache:
    """No tokens yet, room for `reserved`. Raises: ValueError unless num_heads divides the width."""
    dim, depth = params.wte.shape[1], len(params.blocks)
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide the width {dim}, got {num_heads}")
    if reserved < 1:
        raise ValueError(f"reserved must be at least 1, got {reserved}")
    d = dim // num_heads
    empty = lambda *shape: np.zeros((depth, num_heads, *shape), np.float32)
    return PimCache(empty(reserved, d), empty(d, reserved), np.int32(0))


def pim_gpt_decode(params: GPTParams, token, cache: PimCache, *, acc="f32"):
    """(logits [V], cache with the token in it) of one token [] at position cache.length.

    params: a GPT's; the banks hold bfloat16, so weights are rounded when they are written. acc: of all
      accumulators and registers, "f32" or "bf16".
    Returns: logits float32, bfloat16 numbers; keys and values likewise.
    Raises: ValueError naming what is wrong: heads that do not fill the width, a text beyond the reservation
    or
      the positions, a token outside the vocabulary, weights that are no real numbers.
    """
    check_decode(params, cache)
    n = int(cache.length)
    check_place(n, cache.k.shape[2], len(params.wpe))
    check_token(int(token), len(params.wte))
    bf = lambda a: round_bf16(np.asarray(a, np.float32))
    add = lambda a, b: round_bf16(bf(a) + bf(b))
    layer = lambda x, w, b: add(vmm_bf16(x, w, acc=acc), b)
    norm = lambda x, g, b: layernorm_asic(x, g, b, acc=acc)
    k_all, v_all = bf(cache.k), bf(cache.v)
    _, H, _, d = k_all.shape
    x = add(params.wte[int(token)], params.wpe[n])
    for i, p in enumerate(blocks_of(params)):
        h = norm(x, p.ln1_scale, p.ln1_bias)
        q, k, v = (layer(h, w, b).reshape(H, d) for w, b in ((p.w_q, p.b_q), (p.w_k, p.b_k), (p.w_v, p.b_v)))
        k_all[i, :, n], v_all[i, :, :, n] = k, v
        heads = []
        for j in range(H):
            scores = round_bf16(vmm_bf16(q[j], k_all[i, j, : n + 1].T, acc=acc) * np.float32(d**-0.5))
            heads.append(vmm_bf16(softmax_asic(scores, acc=acc), v_all[i, j, :, : n + 1].T, acc=acc))
        x = add(x, layer(np.concatenate(heads), p.w_o, p.b_o))
        h = norm(x, p.ln2_scale, p.ln2_bias)
        x = add(x, layer(gelu_asic(layer(h, p.w_fc1, p.b_fc1), acc=acc), p.w_fc2, p.b_fc2))
    x = norm(x, params.lnf_scale, params.lnf_bias)
    return vmm_bf16(x, np.transpose(params.wte), acc=acc), PimCache(k_all, v_all, np.int32(n + 1))


def check_decode(params, cache):
    """Raise ValueError unless cache and params are of one shape and the weights are real numbers."""
    n = dims(wte=(params.wte, "V D"), wpe=(params.wpe, "P D"))
    c = dims(k=(cache.k, "layers H S d"), v=(cache.v, "layers H d S"))
    if c["H"] * c["d"] != n["D"]:
        raise ValueError(f"cache has {c['H']} heads of {c['d']}, which is not the width {n['D']} of wte")
    if c["layers"] != depth_of(params):
        raise ValueError(f"cache has {c['layers']} layers, params {depth_of(params)}")
    blocks = params.blocks if is_tuple(params) else (params.blocks,)
    for name, a in [*params._asdict().items(), *(f for b in blocks for f in b._asdict().items())]:
        if name != "blocks" and np.dtype(a.dtype).kind not in "fV":  # bfloat16 is a kind of its own
            raise ValueError(f"{name} must be real weights, kept in bfloat16 by the banks, got {a.dtype}")


def is_tuple(params):
    """Are the blocks a tuple, or one block with a leading axis of layers?"""
    return not hasattr(params.blocks, "_fields")


def blocks_of(params):
    """The blocks, one after another."""
    if is_tuple(params):
        return params.blocks
    b = params.blocks
    return tuple(type(b)(*(a[i] for a in b)) for i in range(depth_of(params)))


def depth_of(params):
    """Layers of a GPT."""
    return len(params.blocks) if is_tuple(params) else params.blocks.w_q.shape[0]


def check_place(n, reserved, positions):
    """Raise ValueError unless there is room for the token at position n."""
    if not 0 <= n < min(reserved, positions):
        raise ValueError(
            f"cache.length = {n}: no room for another token, {reserved} reserved and {positions} positions"
        )


def check_token(token, vocab):
    """Raise ValueError unless the token is in the vocabulary."""
    if not 0 <= token < vocab:
        raise ValueError(f"token must be in 0..{vocab - 1}, got {token}")


def example(seed=0):
    """Calls of the core functions: a product of 40 inputs, vectors of 8, a network of two layers of 8.

    Weights are multiples of 1/16: sums are then exact in float32, whatever their order.
    """
    rng = np.random.default_rng(seed)
    grid = lambda *shape, most=8: rng.integers(-most, most + 1, shape) / 16
    x = round_bf16(2 * rng.standard_normal((2, 8)))
    g, b = grid(8) + 1, grid(8)
    params = init_gpt(rng, vocab=24, context=8, dim=8, depth=2, hidden=32)
    snap = lambda a: np.clip(np.round(a * 16 / 0.06) / 16, -0.5, 0.5) if a.std() else a
    blocks = type(params.blocks[0])(*(snap(np.stack(a)) for a in zip(*params.blocks, strict=True)))
    params = params._replace(wte=snap(params.wte), wpe=snap(params.wpe), blocks=blocks)
    cache = PimCache(grid(2, 2, 4, 4), grid(2, 2, 4, 4), np.int32(2))
    return [
        Example("vmm_bf16", (grid(2, 40), grid(40, 9))),
        Example("softmax_asic", (x,)),
        Example("layernorm_asic", (x, g, b)),
        Example("gelu_asic", (x,)),
        Example("exp_taylor", (-np.abs(4 * x),)),
        Example("reciprocal_newton", (1 + np.abs(x),)),
        Example("rsqrt_newton", (1 + np.abs(x),)),
        Example("pim_gpt_decode", (params, np.int32(5), cache)),
    ]
