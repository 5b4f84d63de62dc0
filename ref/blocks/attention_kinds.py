"""Ten kinds of attention in one call: dense, patterns, mixtures of tokens, feature maps, fixed weights.

Source: the list of Long Range Arena (Tay et al. 2020, arXiv 2011.04006) without Reformer. "local" takes
contiguous blocks, where the arena's code strides.
"""

import numpy as np

from ref.blocks.attention import attention_dense, attention_dense_vjp
from ref.blocks.linear_attention import linear_attention, linear_attention_vjp, performer_attention
from ref.blocks.masks import bigbird_block_mask, block_window_mask, fixed_sparse_mask, longformer_mask
from ref.blocks.mixed_attention import (
    linformer_attention,
    linformer_attention_vjp,
    sinkhorn_attention,
    synthesizer_attention,
)
from ref.blocks.padding import token_rows
from ref.checks import one_of
from ref.dims import dims

# kind -> the options it takes, and the arrays it needs
KINDS = {
    "dense": (),
    "local": ("block", "neighbors"),
    "sparse": ("block", "stride", "keep_from", "causal"),
    "longformer": ("window", "global_tokens"),
    "bigbird": ("block",),
    "linformer": (),
    "linear": (),
    "performer": ("kernel", "eps"),
    "sinkhorn": ("block", "iterations"),
    "synthesizer": (),
}
EXTRAS = {
    "bigbird": ("rand_blocks",),  # may be left out
    "linformer": ("e_k", "e_v"),
    "performer": ("proj",),
    "synthesizer": ("r1", "r2"),
}
MASKED = ("local", "sparse", "longformer", "bigbird")


def attention_mask(
    kind,
    length,
    *,
    block=None,
    neighbors=0,
    window=None,
    global_tokens=(),
    rand_blocks=None,
    stride=None,
    keep_from=None,
    causal=False,
):
    """bool [T, T], True = seen, of a kind "local", "sparse", "longformer" or "bigbird".

    local: blocks of `block` tokens see themselves and `neighbors` blocks on each side. sparse: see
      `fixed_sparse_mask`. longformer: |i - j| <= window / 2, and global_tokens (indices). bigbird: see
      `bigbird_block_mask`; rand_blocks [..., nb - 2, r] gives [..., T, T].
    Raises: ValueError for another kind, or an option that is missing or out of range.
    """
    if kind not in MASKED:
        raise ValueError(f"kind must be one of {', '.join(MASKED)} to have a mask, got {kind!r}")
    needed = {"longformer": {"window": window}, "sparse": {"block": block, "stride": stride}}
    for name, value in needed.get(kind, {"block": block}).items():
        if value is None or value < 1:
            raise ValueError(f"kind {kind!r} needs {name} >= 1, got {value}")
    if kind == "local":
        return block_window_mask(length, block=block, neighbors=neighbors)
    if kind == "sparse":
        return fixed_sparse_mask(length, block=block, stride=stride, keep_from=keep_from, causal=causal)
    if kind == "longformer":
        global_mask = np.isin(np.arange(length), global_tokens)
        return longformer_mask(length, window=window, global_mask=global_mask)
    if length % block:
        raise ValueError(f"block must divide the {length} tokens (pad and mask them), got {block}")
    blocks = bigbird_block_mask(length // block, rand_blocks)
    return np.repeat(np.repeat(blocks, block, axis=-1), block, axis=-2)


def attend(q, k, v, *, kind="dense", mask=None, extras=None, options=None):
    """Attention of any kind: q, k, v [..., H, T, D] -> [..., H, T, D].

    Args: kind: dense, local, sparse, longformer, bigbird, linformer, linear, performer, sinkhorn or
      synthesizer. mask: bool [..., T], True = real keys; padded ones have no influence.
      extras: arrays by name: bigbird rand_blocks [H, nb - 2, r] (or none), linformer e_k, e_v [T, n],
      performer proj [m, D], synthesizer r1 [H, T, n], r2 [H, n, T].
      options: local block, neighbors; sparse block, stride, keep_from, causal; longformer window,
      global_tokens; bigbird block; performer kernel, eps; sinkhorn block, iterations.
    Raises: ValueError for an unknown kind or option, or extras that are missing.
    """
    n = dims(q=(q, "... H T D"), k=(k, "... H T D"), v=(v, "... H T Dv"))
    options, extras = check_kind(kind, options, extras)
    keys = key_mask(mask, n["..."], n["T"])
    if kind in ("dense", *MASKED):
        return attention_dense(q, k, v, mask=seen_by_kind(kind, n["T"], keys, extras, options))
    if kind == "synthesizer":
        return synthesizer_attention(v, extras["r1"], extras["r2"], mask=keys)
    fn = {
        "linear": linear_attention,
        "linformer": linformer_attention,
        "performer": performer_attention,
        "sinkhorn": sinkhorn_attention,
    }[kind]
    return fn(q, k, v, **extras, **options, mask=keys)


def attend_vjp(q, k, v, do, *, kind="dense", mask=None, extras=None, options=None):
    """(dq, dk, dv) of `attend` for do [..., H, T, D]: dense, the patterns, linear and linformer.

    Raises: ValueError as `attend`; NotImplementedError for the other kinds.
    """
    options, extras = check_kind(kind, options, extras)
    keys = key_mask(mask, q.shape[:-3], q.shape[-2])
    if kind in ("dense", *MASKED):
        return attention_dense_vjp(q, k, v, do, mask=seen_by_kind(kind, q.shape[-2], keys, extras, options))
    if kind == "linear":
        return linear_attention_vjp(q, k, v, do, mask=keys)
    if kind == "linformer":
        return linformer_attention_vjp(q, k, v, **extras, do=do, mask=keys)[:3]
    raise NotImplementedError(f"kind {kind!r} has no hand-written backward pass")


def check_kind(kind, options, extras):
    """(options, extras) as dicts, those the kind reads; ValueError for others, or extras that are missing."""
    one_of("kind", kind, KINDS)
    options, extras = dict(options or {}), dict(extras or {})
    unknown = set(options) - set(KINDS[kind])
    if unknown:
        raise ValueError(f"kind {kind!r} has the options {KINDS[kind]}, got {sorted(unknown)}")
    names = EXTRAS.get(kind, ())
    missing = [name for name in names if name not in extras and name != "rand_blocks"]
    if missing:
        raise ValueError(
            f"extras of kind {kind!r} must hold {', '.join(names)}; it lacks {', '.join(missing)}"
        )
    return options, {name: extras[name] for name in names if name in extras}


def key_mask(mask, lead, T):
    """bool [..., 1, T], one for all heads; None stays None."""
    if mask is None:
        return None
    return token_rows("mask", mask, (*lead, T))[..., None, :]


def seen_by_kind(kind, T, keys, extras, options):
    """What every query sees, broadcast to [..., H, T, T], or None for everything."""
    pattern = None if kind == "dense" else attention_mask(kind, T, **extras, **options)
    if keys is None:
        return pattern
    return keys[..., None, :] if pattern is None else pattern & keys[..., None, :]
