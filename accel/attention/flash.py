"""FlashAttention in JAX: exact attention by tiles, the score matrix never in memory.

Query tiles outside, key tiles inside (FlashAttention-2's order, Dao 2023), the state of the running softmax
in float32 (float64 for float64 input). impl="xla" is plain JAX (accel/blocks/tiled_attention.py): it takes
every option, and may be differentiated in both modes and any number of times. "triton" and "tpu" are Pallas
kernels: no dropout, no float64, reverse mode once. Definitions: ref/attention/flash.py.
"""

from functools import partial

import jax
import jax.numpy as jnp

from accel.blocks.attention import attention_dense
from accel.blocks.backend import choose_impl
from accel.blocks.shapes import lift
from accel.blocks.softmax import SoftmaxState, finalize, merge, online_softmax
from accel.blocks.tiled_attention import tiled_attention, tiled_attention_bwd
from ref.attention.flash import block_sizes, check_blocks, example, hbm_accesses
from ref.blocks.attention import check_attention
from ref.dims import dims

__all__ = [
    "SoftmaxState",
    "attention_dense",
    "block_sizes",
    "example",
    "finalize",
    "flash_attention",
    "flash_attention_bwd",
    "hbm_accesses",
    "merge",
    "online_softmax",
]

STATIC = ("causal", "scale", "dropout_p", "tiles", "impl", "interpret")


def flash_attention(
    q,
    k,
    v,
    *,
    mask=None,
    key_lengths=None,
    causal=False,
    scale=None,
    block_q=128,
    block_k=128,
    dropout_mask=None,
    dropout_p=0.0,
    order="q_outer",
    return_lse=False,
    impl="auto",
    interpret=False,
):
    """softmax(scale q k^T over the visible keys) v by tiles; as ref, o in q's dtype, lse float32 (float64).

    block_q, block_k: both 128, the default, leaves the choice to impl="xla" (256 x 2048 fits a core's cache).
    order: "q_outer"; the paper's "k_outer" exists in ref only.
    impl: "auto" is a kernel on a GPU or TPU that can run the call, else "xla".
    Raises: ValueError naming the argument; NotImplementedError for an impl that cannot run, saying why.
    """
    check_blocks(block_q, block_k)
    check_attention(q, k, v, mask, key_lengths, dropout_mask, dropout_p)
    if order != "q_outer":
        raise ValueError(f'order must be "q_outer" in accel ("k_outer" is in ref), got {order!r}')
    o, lse = _flash(
        *map(jnp.asarray, (q, k, v)),
        mask,
        key_lengths,
        dropout_mask,
        **_static(q, causal, scale, block_q, block_k, dropout_p, impl, interpret),
    )
    return (o, lse) if return_lse else o


def flash_attention_bwd(
    do,
    q,
    k,
    v,
    o,
    lse,
    *,
    mask=None,
    key_lengths=None,
    causal=False,
    scale=None,
    block_q=128,
    block_k=128,
    dropout_mask=None,
    dropout_p=0.0,
    impl="auto",
    interpret=False,
):
    """(dq, dk, dv) for the cotangent do of o, probabilities recomputed by tiles from lse; in q's, k's, v's
    dtypes.
    """
    check_blocks(block_q, block_k)
    check_attention(q, k, v, mask, key_lengths, dropout_mask, dropout_p)
    rows = "... H L" if q.ndim > 2 else "L"
    like_v = (v, "... Hkv S Dv" if q.ndim > 2 else "S Dv")
    dims(q=(q, rows + " D"), v=like_v, do=(do, rows + " Dv"), o=(o, rows + " Dv"), lse=(lse, rows))
    return _flash_bwd(
        *map(jnp.asarray, (do, q, k, v, o, lse)),
        mask,
        key_lengths,
        dropout_mask,
        **_static(q, causal, scale, block_q, block_k, dropout_p, impl, interpret),
    )


def _static(q, causal, scale, block_q, block_k, dropout_p, impl, interpret):
    obstacle = _obstacle(q, dropout_p)
    impl = choose_impl(
        impl,
        interpret=interpret,
        auto=("triton", "tpu"),
        obstacles={"hopper": 'is not there yet; use "triton"', "triton": obstacle, "tpu": obstacle},
    )
    tiles = (None, None) if impl == "xla" and (block_q, block_k) == (128, 128) else (block_q, block_k)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return {
        "causal": bool(causal),
        "scale": scale,
        "dropout_p": float(dropout_p),
        "tiles": tiles,
        "impl": impl,
        "interpret": bool(interpret),
    }


def _obstacle(q, dropout_p):
    """Why no kernel can run the call, or None."""
    if dropout_p > 0:
        return 'has no dropout; use impl="xla"'
    if jnp.result_type(q) == jnp.float64:
        return 'has no float64; use impl="xla"'
    return None


@partial(jax.jit, static_argnames=STATIC)
def _flash(q, k, v, mask, key_lengths, keep, *, causal, scale, dropout_p, tiles, impl, interpret):
    heads = _with_heads(q, k, v)
    options = _sight(*heads[:2], mask, key_lengths, causal)
    o, lse = tiled_attention(
        *heads,
        scale=scale,
        keep=None if keep is None else lift(jnp.asarray(keep), heads[0].ndim),
        dropout_p=dropout_p,
        block_q=tiles[0],
        block_k=tiles[1],
        **options,
    )
    return o.astype(q.dtype).reshape(*q.shape[:-1], -1), lse.reshape(q.shape[:-1])


@partial(jax.jit, static_argnames=STATIC)
def _flash_bwd(
    do, q, k, v, o, lse, mask, key_lengths, keep, *, causal, scale, dropout_p, tiles, impl, interpret
):
    *heads, lse = *_with_heads(do, q, k, v, o), lse.reshape(*(lse.shape if q.ndim > 2 else (1, -1)))
    options = _sight(heads[1], heads[2], mask, key_lengths, causal)
    grads = tiled_attention_bwd(
        *heads,
        lse,
        scale=scale,
        keep=None if keep is None else lift(jnp.asarray(keep), heads[1].ndim),
        dropout_p=dropout_p,
        block_q=tiles[0],
        block_k=tiles[1],
        **options,
    )
    return tuple(g.astype(x.dtype).reshape(x.shape) for g, x in zip(grads, (q, k, v), strict=True))


def _with_heads(*arrays):
    """[L, D] -> [1, L, D]; with heads as they are."""
    return tuple(x[None] if x.ndim == 2 else x for x in arrays)


def _sight(q, k, mask, key_lengths, causal):
    """The visible set as `tiled_attention` takes it: {"mask", "row_end", "hi"}, for q, k with heads."""
    L, S = q.shape[-2], k.shape[-2]
    mask = None if mask is None else lift(jnp.asarray(mask), q.ndim)
    hi = S - L if causal else None
    if key_lengths is None:
        return {"mask": mask, "row_end": None, "hi": hi}
    end = lift(jnp.asarray(key_lengths, jnp.int32), q.ndim - 2)[..., None]  # [..., H or 1, 1]
    if causal:
        row = lift(jnp.arange(L, dtype=jnp.int32), q.ndim - 1)
        end = jnp.maximum(jnp.minimum(end, row + end - L + 1), 0)
    return {"mask": mask, "row_end": end, "hi": hi}
