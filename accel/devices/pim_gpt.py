"""PIM-GPT in JAX: one decode step as the banks and the chip compute it; see ref/devices/pim_gpt.py.

The cache is updated in place and read whole; what lies beyond the text is masked, and adds nothing. Blocks
may be a tuple, or one block with a leading axis of layers, which is scanned.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from accel.blocks.asic import (
    asic_cycles,
    asic_work,
    exp_taylor,
    gelu_asic,
    layernorm_asic,
    reciprocal_newton,
    rsqrt_newton,
    softmax_asic,
)
from accel.blocks.lanes import round_bf16, vmm_bf16
from accel.models.gpt import GPTParams, init_gpt
from ref.blocks.asic import check_acc
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
from ref.blocks.quantize import known
from ref.devices.pim_gpt import (
    PimCache,
    blocks_of,
    check_decode,
    check_place,
    check_token,
    depth_of,
    example,
    init_cache,
    is_tuple,
)

__all__ = [
    "GPTS", "DramTiming", "GPTParams", "GptShape", "KvTicks", "PimCache", "VmmTicks", "asic_cycles",
    "asic_work", "blocks_of", "check_decode", "check_place", "check_token", "depth_of", "example",
    "exp_taylor", "gelu_asic", "gpt2_large", "gpt2_medium", "gpt2_small", "gpt2_xl", "gpt3_large",
    "gpt3_medium", "gpt3_small", "gpt3_xl", "init_cache", "init_gpt", "is_tuple", "kv_ticks",
    "layernorm_asic", "long_run", "pim_gpt_decode", "reciprocal_newton", "rsqrt_newton", "softmax_asic",
    "tile_ticks", "token_ticks", "vmm_bf16", "vmm_ticks",
]  # fmt: skip


def pim_gpt_decode(params: GPTParams, token, cache: PimCache, *, acc="f32"):
    """(logits [V], cache with the token in it) of one token [] at position cache.length.

    Where values are known only when it runs, no room for the token, or a token outside the vocabulary, gives
    NaN. Returns: float32, bfloat16 numbers.
    """
    check_decode(params, cache)
    check_acc(acc)
    if known(cache.length):
        check_place(int(cache.length), cache.k.shape[2], len(params.wpe))
    if known(token):
        check_token(int(token), len(params.wte))
    return _decode(params, jnp.asarray(token, jnp.int32), cache, acc=acc)


@partial(jax.jit, static_argnames="acc")
def _decode(params, token, cache, *, acc):
    n = jnp.asarray(cache.length, jnp.int32)
    k_all, v_all = round_bf16(cache.k), round_bf16(cache.v)
    row = lambda table, i: round_bf16(table.at[i].get(mode="fill", fill_value=jnp.nan))
    x = round_bf16(row(params.wte, token) + row(params.wpe, n))
    zero = np.int32(0)
    if is_tuple(params):
        for i, p in enumerate(params.blocks):
            q, k, v = _qkv(x, p, cache.k.shape, acc)
            at = np.int32(i), zero
            k_all = lax.dynamic_update_slice(k_all, k[None, :, None, :], (*at, n, zero))
            v_all = lax.dynamic_update_slice(v_all, v[None, :, :, None], (*at, zero, n))
            x = _rest(x, q, k_all[i], v_all[i], p, n, acc)
    else:

        def step(x, given):
            p, k_all, v_all = given
            q, k, v = _qkv(x, p, cache.k.shape, acc)
            k_all = lax.dynamic_update_slice(k_all, k[:, None, :], (zero, n, zero))
            v_all = lax.dynamic_update_slice(v_all, v[:, :, None], (zero, zero, n))
            return _rest(x, q, k_all, v_all, p, n, acc), (k_all, v_all)

        x, (k_all, v_all) = lax.scan(step, x, (params.blocks, k_all, v_all))
    x = layernorm_asic(x, params.lnf_scale, params.lnf_bias, acc=acc)
    logits = vmm_bf16(x, params.wte.T, acc=acc)
    room = min(cache.k.shape[2], len(params.wpe))
    return jnp.where(n < room, logits, np.float32(np.nan)), PimCache(k_all, v_all, n + np.int32(1))


def _qkv(x, p, shape, acc):
    """Queries, keys and values [H, d] of a token x [D]."""
    _, H, _, d = shape
    h = layernorm_asic(x, p.ln1_scale, p.ln1_bias, acc=acc)
    return (_map(h, w, b, acc).reshape(H, d) for w, b in ((p.w_q, p.b_q), (p.w_k, p.b_k), (p.w_v, p.b_v)))


def _rest(x, q, k_all, v_all, p, n, acc):
    """x [D] after attention over keys [H, S, d] and values [H, d, S] up to place n, and after the MLP."""
    H, S, d = k_all.shape
    each = jax.vmap(partial(vmm_bf16, acc=acc))
    scores = round_bf16(each(q, k_all.swapaxes(1, 2)) * np.float32(d**-0.5))
    seen = jnp.arange(S, dtype=jnp.int32) <= n
    scores = jnp.where(seen[None], scores, np.float32(-np.inf))
    heads = each(softmax_asic(scores, acc=acc), v_all.swapaxes(1, 2))
    x = round_bf16(x + _map(heads.reshape(H * d), p.w_o, p.b_o, acc))
    h = _map(layernorm_asic(x, p.ln2_scale, p.ln2_bias, acc=acc), p.w_fc1, p.b_fc1, acc)
    return round_bf16(x + _map(gelu_asic(h, acc=acc), p.w_fc2, p.b_fc2, acc))


def _map(x, w, b, acc):
    """x w + b, rounded."""
    return round_bf16(vmm_bf16(x, w, acc=acc) + round_bf16(b))
