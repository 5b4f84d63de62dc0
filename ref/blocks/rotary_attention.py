"""The attention sub-layer of llama-like models: grouped keys, rotary positions, no biases; a window.

Source: Su et al. 2021 for rotary positions (halves of the channels are paired here), Ainslie et al. 2023 for
grouped keys, Beltagy et al. 2020 for the window.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.attention import attention_dense, attention_dense_vjp, join_heads, split_heads
from ref.blocks.masks import window_mask
from ref.blocks.mlp import linear_vjp
from ref.blocks.rope import rope, rope_angles
from ref.blocks.transformer import AttentionParams
from ref.dims import dims, float64


class WindowCache(NamedTuple):
    """The last W keys (rotated) and values [..., Hkv, <= W, D] of a sliding window."""

    keys: np.ndarray
    values: np.ndarray


def sliding_window_mixer(x, params: AttentionParams, *, num_heads, window, num_kv_heads=None, rope_base=1e6):
    """Causal attention to the last `window` tokens, itself included, with rotary positions. x [..., L, C].

    Raises: ValueError naming the argument at fault.
    """
    return sliding_window(x, params, None, num_heads=num_heads, window=window, num_kv_heads=num_kv_heads,
                          rope_base=rope_base)[0]  # fmt: skip


def sliding_window(x, params: AttentionParams, past, *, num_heads, window, num_kv_heads=None, rope_base=1e6,
                   start=0):  # fmt: skip
    """(y, WindowCache): `sliding_window_mixer` from position `start` on, behind a WindowCache or None."""
    check_window(window)
    q, k, v = rotary_qkv(x, params, num_heads=num_heads, num_kv_heads=num_kv_heads, rope_base=rope_base,
                         start=start)  # fmt: skip
    if past is not None:
        k, v = np.concatenate([past.keys, k], axis=-2), np.concatenate([past.values, v], axis=-2)
    mask = window_mask(q.shape[-2], k.shape[-2], left=window - 1, right=0)
    y = join_heads(attention_dense(q, k, v, mask=mask)) @ params.w_o
    return y, WindowCache(k[..., -window:, :], v[..., -window:, :])


def sliding_window_mixer_vjp(x, params: AttentionParams, dy, *, num_heads, window, num_kv_heads=None,
                             rope_base=1e6):  # fmt: skip
    """(dx, AttentionParams) of `sliding_window_mixer` for dy [..., L, C]."""
    check_window(window)
    mask = window_mask(x.shape[-2], x.shape[-2], left=window - 1, right=0)
    forth = lambda q, k, v: attention_dense(q, k, v, mask=mask)
    back = lambda q, k, v, do: attention_dense_vjp(q, k, v, do, mask=mask)
    return rotary_attention_vjp(x, params, dy, forth, back, num_heads=num_heads, num_kv_heads=num_kv_heads,
                                rope_base=rope_base)  # fmt: skip


def rotary_qkv(x, params: AttentionParams, *, num_heads, num_kv_heads=None, rope_base=1e6, start=0):
    """(rotated queries [..., H, L, D], rotated keys, values [..., Hkv, L, D]) of x [..., L, C]."""
    kv_heads = check_rotary(x, params, num_heads, num_kv_heads)
    x = float64(x)
    q, k, v = (
        split_heads(x @ w, n)
        for w, n in ((params.w_q, num_heads), (params.w_k, kv_heads), (params.w_v, kv_heads))
    )
    angles = rope_angles(start + np.arange(x.shape[-2]), q.shape[-1], base=rope_base)
    return rope(q, angles, pairs="halves"), rope(k, angles, pairs="halves"), v


def rotary_attention_vjp(x, params: AttentionParams, dy, forth, back, *, num_heads, num_kv_heads=None,
                         rope_base=1e6):  # fmt: skip
    """(dx, AttentionParams) of forth(q, k, v) w_o, whose backward pass is back(q, k, v, do)."""
    x, p = float64(x), params
    q, k, v = rotary_qkv(x, p, num_heads=num_heads, num_kv_heads=num_kv_heads, rope_base=rope_base)
    do, dw_o, _ = linear_vjp(join_heads(forth(q, k, v)), p.w_o, dy, bias=False)
    dq, dk, dv = back(q, k, v, split_heads(do, num_heads))
    angles = -rope_angles(np.arange(x.shape[-2]), q.shape[-1], base=rope_base)  # turned back
    dq, dk = rope(dq, angles, pairs="halves"), rope(dk, angles, pairs="halves")
    maps = ((p.w_q, dq), (p.w_k, dk), (p.w_v, dv))
    parts = [linear_vjp(x, w, join_heads(d), bias=False)[:2] for w, d in maps]
    return sum(dx for dx, _ in parts), AttentionParams(*(dw for _, dw in parts), dw_o)


def check_rotary(x, p, heads, kv_heads=None):
    """Raise ValueError unless x, the maps and the heads fit; return the number of key heads."""
    C = dims(x=(x, "... L C"), w_q=(p.w_q, "C Cq"), w_o=(p.w_o, "Cq C"))["C"]
    kv_heads = check_heads(p.w_q.shape[1], heads, kv_heads)
    width = p.w_q.shape[1] // heads * kv_heads
    dims(w_k=(p.w_k, f"{C} {width}"), w_v=(p.w_v, f"{C} {width}"))
    return kv_heads


def check_heads(width, heads, kv_heads=None):
    """Raise ValueError unless the heads split the width into pairs; return the number of key heads."""
    kv_heads = heads if kv_heads is None else kv_heads
    if heads < 1 or width % heads or width // heads % 2:
        raise ValueError(
            f"num_heads must split the width {width} into even parts (rotary pairs), got {heads}"
        )
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"num_kv_heads must divide the {heads} heads, got {kv_heads}")
    return kv_heads


def check_window(window):
    """Raise ValueError unless the window holds a key."""
    if window is None or window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
