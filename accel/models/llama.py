"""The llama family in JAX: one compiled block scanned over the stacked layers, a cache of fixed shape.

Weights are ref's `LlamaWeights`, a pytree. Residual stream, norms and softmax are float32 (float64 for
float64 weights) whatever the matrices are; products take the matrices' dtype and add up in float32.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from accel.blocks.attention import attention_dense, join_heads, split_heads
from accel.blocks.formats import dequantize
from accel.blocks.mlp import silu
from accel.blocks.norms import rms_norm
from accel.blocks.rope import rope
from accel.blocks.softmax import logsumexp, wide
from ref.dims import dims
from ref.models.llama import (
    ROWS,
    VOCAB_CHUNK,
    LlamaBlock,
    LlamaConfig,
    LlamaWeights,
    Rows,
    check_call,
    check_ids,
    check_length,
    continue_text,
    half_split,
    init_llama,
    llama_costs,
    llama_from_gguf,
    sample,
)

__all__ = [
    "ROWS",
    "LlamaBlock",
    "LlamaConfig",
    "LlamaWeights",
    "Rows",
    "candidate_logits",
    "decode_step",
    "forward",
    "generate",
    "half_split",
    "init_cache",
    "init_llama",
    "llama_costs",
    "llama_from_gguf",
    "prefill",
    "sample",
    "to_device",
]

BUCKET = 64  # generate pads prompts and caches to a multiple, so that few shapes are compiled


class _Result(NamedTuple):
    """What a run leaves: final states [T, d] or [d], the cache, hidden states or None."""

    x: jax.Array
    cache: jax.Array
    hidden: jax.Array | None


def to_device(weights: LlamaWeights, dtype=jnp.float32) -> LlamaWeights:
    """The weights on JAX's device: matrices in `dtype`; norms, angles and eps at least float32; bytes as
    they are.
    """
    rest = wide(jnp.dtype(dtype))
    matrix = lambda w: type(w)(jnp.asarray(w.raw)) if isinstance(w, Rows) else jnp.asarray(w, dtype)
    norms = ("attn_norm", "ffn_norm")
    blocks = {
        n: jnp.asarray(w, rest) if n in norms else matrix(w) for n, w in weights.blocks._asdict().items()
    }
    vectors = {n: jnp.asarray(getattr(weights, n), rest) for n in ("norm", "angles", "eps")}
    return LlamaWeights(embed=matrix(weights.embed), blocks=LlamaBlock(**blocks), **vectors)


def init_cache(weights, length):
    """An empty cache for `length` tokens: zeros [n, 2, Hkv, length, D] in the dtype of the matrices."""
    depth, kv_heads, D, dtype = _cache_form(weights)
    return jnp.zeros((depth, 2, kv_heads, length, D), dtype)


def forward(weights: LlamaWeights, ids, *, cache=None, position=0, return_hidden=False):
    """(logits [T, V], cache) of tokens at positions from `position` on; as ref, logits at least float32.

    The cache's length S is fixed: one that is too short is replaced by a longer one, of a multiple of 64, if
    the position is known; a position that is traced and does not fit gives NaN.
    """
    ids, cache, position = _prepare(weights, ids, cache, position)
    run = _forward(weights, ids, cache, position, return_hidden=return_hidden)
    return run[:2] if not return_hidden else run


def prefill(weights: LlamaWeights, ids, *, return_hidden=False):
    """(logits [V], cache [n, 2, Hkv, T, D]) of a whole text, the last position only; with return_hidden also
    hidden [n + 2, d].
    """
    ids, _, _ = _prepare(weights, ids, None, 0)
    run = _prefill(weights, ids, return_hidden=return_hidden)
    return run[:2] if not return_hidden else run


def decode_step(weights: LlamaWeights, id, cache, position):
    """(logits [V], cache) of one token [] at `position`, after the tokens in the cache."""
    logits, cache = forward(weights, jnp.reshape(id, (1,)), cache=cache, position=position)
    return logits[0], cache


def candidate_logits(weights: LlamaWeights, ids, candidates):
    """(logits [T, k] of the candidates, logsumexp [T] of all), the head taken 4096 rows at a time."""
    ids, _, _ = _prepare(weights, ids, None, 0)
    dims(ids=(ids, "T"), candidates=(candidates, "T k"))
    if _known(candidates):
        check_ids("candidates", candidates, weights)
    return _candidates(weights, ids, candidates)


def generate(
    weights: LlamaWeights,
    ids,
    *,
    max_new_tokens,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    stop=(2,),
    on_token=None,
):
    """The tokens that follow `ids`, int64; as ref, with the cache updated in place."""
    _prepare(weights, ids, None, 0)
    n, context = len(ids), len(weights.angles)
    up = lambda x: min(-(-x // BUCKET) * BUCKET, context)
    padded = np.zeros(up(n), np.int32)
    padded[:n] = ids
    logits, cache = _start(weights, padded, np.int32(n), length=up(n + max(max_new_tokens, 0)))
    step = lambda token, cache, position: _step(weights, np.int32(token), cache, np.int32(position))
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return continue_text(logits, cache, step, n, context, max_new_tokens, options, seed, stop, on_token)


def _prepare(weights, ids, cache, position):
    """Check what is known of the arguments: (ids, a cache that is long enough, the position)."""
    ids = np.asarray(ids) if isinstance(ids, list | tuple) else ids
    known = _known(position)
    position = int(position) if known else position
    T = check_length(weights, ids, position if known else 0)
    check_call(weights, ids if _known(ids) else None, cache, position if known else None)
    if cache is None:
        return ids, None, 0
    short = position + T - cache.shape[-2] if known else 0
    if short > 0:
        longer = min(-(-(position + T) // BUCKET) * BUCKET, len(weights.angles))
        cache = jnp.pad(cache, [(0, 0)] * 3 + [(0, longer - cache.shape[-2]), (0, 0)])
    return ids, cache, position


def _known(x):
    return not isinstance(x, jax.core.Tracer)


@partial(jax.jit, static_argnames="return_hidden")
def _forward(weights, ids, cache, position, *, return_hidden):
    run = _run(weights, ids, cache, position, return_hidden)
    logits = _head(weights, run.x)
    if cache is not None:  # a slice that does not fit would be moved; better no number than a wrong one
        fits = position + len(ids) <= min(cache.shape[-2], len(weights.angles))
        logits = jnp.where(fits, logits, jnp.nan)
    return logits, run.cache, run.hidden


@partial(jax.jit, static_argnames="return_hidden")
def _prefill(weights, ids, *, return_hidden):
    run = _run(weights, ids, None, 0, return_hidden)
    return _head(weights, run.x[-1]), run.cache, run.hidden[:, -1] if return_hidden else None


@partial(jax.jit, static_argnames="length")
def _start(weights, ids, n, *, length):
    """Prefill of n tokens, padded behind, into a cache of that length; the logits of token n - 1."""
    run = _run(weights, ids, None, 0, False)
    cache = jnp.pad(run.cache, [(0, 0)] * 3 + [(0, length - len(ids)), (0, 0)])
    return _head(weights, jax.lax.dynamic_index_in_dim(run.x, n - 1, keepdims=False)), cache


@partial(jax.jit, donate_argnums=2)
def _step(weights, token, cache, position):
    run = _run(weights, token[None], cache, position, False)
    return _head(weights, run.x[0]), run.cache


@jax.jit
def _candidates(weights, ids, candidates):
    x = _run(weights, ids, None, 0, False).x
    logits = jnp.einsum("td,tkd->tk", x, _rows(weights.embed, candidates).astype(x.dtype))
    table = weights.embed.raw if isinstance(weights.embed, Rows) else weights.embed
    V = len(table)
    chunk = min(VOCAB_CHUNK, V)
    chunks = -(-V // chunk)
    table = jnp.pad(table, [(0, chunks * chunk - V), (0, 0)]).reshape(chunks, chunk, -1)

    def part(first_and_rows):
        first, rows = first_and_rows
        s = _head(LlamaWeights(_like(weights.embed, rows), None, None, None, None), x)
        return logsumexp(jnp.where((first + jnp.arange(chunk))[None] < V, s, -jnp.inf))

    parts = jax.lax.map(part, (jnp.arange(chunks) * chunk, table))
    return logits, logsumexp(parts, axis=0)


def _run(weights, ids, cache, position, return_hidden):
    """Final norm of the tokens, the cache with them in it (without one: their keys and values), hidden."""
    T, position = len(ids), jnp.asarray(position, jnp.result_type(int))
    depth, _, D, dtype = _cache_form(weights)
    x = _rows(weights.embed, ids)
    x = x.astype(wide(x.dtype))
    eps = weights.eps.astype(x.dtype)
    angles = jax.lax.dynamic_slice_in_dim(weights.angles, position, T)

    def block(carry, layer):
        x, cache = carry
        l, b = layer
        h = rms_norm(x, b.attn_norm, eps=eps)
        heads = lambda w: split_heads(project(h, w), w.shape[-1] // D)
        q = rope(heads(b.w_q), angles).astype(dtype)
        new = jnp.stack([rope(heads(b.w_k), angles), heads(b.w_v)]).astype(dtype)
        if cache is None:
            o = attention_dense(q, *new, causal=True)
        else:
            cache = jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype)[None], (l, 0, 0, position, 0))
            k, v = jax.lax.dynamic_index_in_dim(cache, l, keepdims=False).astype(dtype)
            o = attention_dense(q, k, v, causal=True, key_lengths=position + T)
        x = x + project(join_heads(o), b.w_o).astype(x.dtype)
        h = rms_norm(x, b.ffn_norm, eps=eps)
        x = x + project(silu(project(h, b.w_gate)) * project(h, b.w_up), b.w_down).astype(x.dtype)
        return (x, cache), (new if cache is None else None, x if return_hidden else None)

    first = x
    (x, cache), (fresh, after) = jax.lax.scan(block, (x, cache), (jnp.arange(depth), weights.blocks))
    x = rms_norm(x, weights.norm, eps=eps)
    hidden = jnp.concatenate([first[None], after, x[None]]) if return_hidden else None
    return _Result(x, fresh if cache is None else cache, hidden)


def project(x, w):
    """x w for a matrix [in, out] or `Rows` of it: inputs in the matrix's dtype, sums at least float32."""
    if isinstance(w, Rows):
        return _times_rows(x, dequantize(w.raw, kind=w.kind))
    return jnp.matmul(x.astype(w.dtype), w, preferred_element_type=wide(w.dtype))


def _head(weights, x):
    """Logits of final states [..., d] -> [..., V]: the embedding transposed."""
    e = weights.embed
    return _times_rows(x, dequantize(e.raw, kind=e.kind) if isinstance(e, Rows) else e)


def _times_rows(x, rows):
    """x [..., d] against rows [n, d] -> [..., n]."""
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x.astype(rows.dtype), rows, contract, preferred_element_type=wide(rows.dtype))


def _rows(embed, ids):
    if isinstance(embed, Rows):
        return dequantize(embed.raw[ids], kind=embed.kind)
    return embed[ids]


def _like(embed, rows):
    return type(embed)(rows) if isinstance(embed, Rows) else rows


def _cache_form(weights):
    """(blocks, key heads, head size, dtype) of the cache; the bytes of a format compute in float32."""
    D = 2 * weights.angles.shape[-1]
    w = weights.blocks.w_k
    depth, _, kv = w.shape
    return depth, kv // D, D, jnp.dtype(jnp.float32) if isinstance(w, Rows) else w.dtype
