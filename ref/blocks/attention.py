"""Dense attention, which materialises the scores, and the checks that all attention shares."""

import numpy as np

from ref.blocks.masks import visible
from ref.blocks.softmax import finalize, logsumexp, softmax, softmax_state, softmax_vjp, weigh
from ref.dims import dims, float64


def attention_dense(q, k, v, *, mask=None, key_lengths=None, causal=False, scale=None,
                    dropout_mask=None, dropout_p=0.0, return_lse=False):  # fmt: skip
    """softmax(scale q k^T over the visible keys) v: the baseline, [L, S] scores and all.

    Args: q [..., H, L, D], k [..., Hkv, S, D], v [..., Hkv, S, Dv], H a multiple of Hkv (query head h uses
        key head h // (H / Hkv)); without heads [L, D], [S, D], [S, Dv].
      mask: bool, True = visible, broadcastable to [..., H, L, S].
      key_lengths: int, broadcastable to [..., H], 0 <= n <= S: keys from n on are invisible.
      causal: key j is visible to query i if j <= i + (n - L), n the number of keys (bottom-right alignment).
      scale: factor of the scores; None is 1 / sqrt(D).
      dropout_mask: bool [..., H, L, S], True = keep; probabilities kept are divided by 1 - dropout_p.
    Returns: o [..., H, L, Dv] float64, and with return_lse (o, lse [..., H, L]): log-sum-exp of the scaled
      visible scores, natural log. A query that sees no key gives o = 0 and lse = -inf.
    Raises: ValueError naming the argument at fault.
    """
    q, k, v, opt = prepare(q, k, v, mask, key_lengths, scale, dropout_mask, dropout_p)
    L, S = q.shape[-2], k.shape[-2]
    seen = visible(np.arange(L), np.arange(S), num_queries=L, num_keys=S, causal=causal, **opt.visibility)
    s = np.where(seen, opt.scale * q @ np.swapaxes(k, -1, -2), -np.inf)
    if dropout_mask is None:
        o, lse = finalize(softmax_state(s, v))
    else:
        lse = logsumexp(s)
        p = np.exp(s - np.where(np.isneginf(lse), 0.0, lse)[..., None])
        o = weigh(p * opt.keep(slice(None), slice(None)), v)
    return (o, lse) if return_lse else o


def attention_dense_vjp(q, k, v, do, *, mask=None, key_lengths=None, causal=False, scale=None):
    """(dq, dk, dv) of `attention_dense` for the cotangent do [..., H, L, Dv], the probabilities
    recomputed.

    dS = P * (dP - sum_j P dP) with dP = do v^T; a query that sees no key has zero gradients.
    """
    kv_heads = k.shape[-3] if k.ndim > 2 else 1
    q, k, v, opt = prepare(q, k, v, mask, key_lengths, scale)
    L, S = q.shape[-2], k.shape[-2]
    seen = visible(np.arange(L), np.arange(S), num_queries=L, num_keys=S, causal=causal, **opt.visibility)
    p = softmax(np.where(seen, opt.scale * q @ np.swapaxes(k, -1, -2), -np.inf))
    ds = opt.scale * softmax_vjp(p, do @ np.swapaxes(v, -1, -2))
    dk, dv = np.swapaxes(ds, -1, -2) @ q, np.swapaxes(p, -1, -2) @ do
    return ds @ k, sum_groups(dk, kv_heads), sum_groups(dv, kv_heads)


class Prepared:
    """Checked options of an attention call: scale, what is visible, and the factor of dropout."""

    def __init__(self, scale, mask, key_lengths, dropout_mask, dropout_p):
        self.scale = scale
        self.visibility = {"mask": mask, "key_lengths": key_lengths}
        self.dropout_mask, self.dropout_p = dropout_mask, dropout_p

    def keep(self, rows, cols):
        """What dropout multiplies a tile of probabilities by: 1 / (1 - p) where kept, else 0."""
        if self.dropout_mask is None:
            return 1.0
        return self.dropout_mask[..., rows, cols] / (1.0 - self.dropout_p)


def prepare(q, k, v, mask=None, key_lengths=None, scale=None, dropout_mask=None, dropout_p=0.0):
    """Check an attention call, repeat grouped keys to q's heads -> (q, k, v, Prepared), in float64."""
    n = check_attention(q, k, v, mask, key_lengths, dropout_mask, dropout_p)
    q, k, v = float64(q, k, v)
    lead = q.shape[:-2]
    if key_lengths is not None:
        key_lengths = np.broadcast_to(key_lengths, lead)
    k, v = repeat_heads(k, n["H"]), repeat_heads(v, n["H"])
    return (
        q,
        k,
        v,
        Prepared(1 / np.sqrt(n["D"]) if scale is None else scale, mask, key_lengths, dropout_mask, dropout_p),
    )


def check_attention(q, k, v, mask=None, key_lengths=None, dropout_mask=None, dropout_p=0.0):
    """Raise ValueError for a bad attention call; return the axes, H = Hkv = 1 where there is no head axis.

    Reads shapes and dtypes only, except for key_lengths, whose values are checked unless traced.
    """
    heads = q.ndim > 2
    spec = ("... H L D", "... Hkv S D", "... Hkv S Dv") if heads else ("L D", "S D", "S Dv")
    n = {"H": 1, "Hkv": 1, "...": (), **dims(q=(q, spec[0]), k=(k, spec[1]), v=(v, spec[2]))}
    check_width(n["D"], n["Dv"])
    if n["Hkv"] == 0 or n["H"] % n["Hkv"]:
        raise ValueError(f"q has H={n['H']} heads, not a multiple of the Hkv={n['Hkv']} heads of k and v")
    lead = q.shape[:-2]
    if mask is not None:
        check_mask("mask", mask, (*lead, n["L"], n["S"]))
    if key_lengths is not None:
        check_lengths("key_lengths", key_lengths, lead, n["S"])
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0 and dropout_mask is None:
        raise ValueError(f"dropout_p={dropout_p} needs dropout_mask, a boolean array that says what to keep")
    if dropout_mask is not None:
        check_mask("dropout_mask", dropout_mask, (*lead, n["L"], n["S"]))
    return n


def check_width(D, Dv):
    """Raise ValueError for heads of width 0, which have no scores to scale or nothing to return."""
    if D < 1 or Dv < 1:
        raise ValueError(f"heads must be at least 1 wide, got q and k with D={D}, v with Dv={Dv}")


def check_lengths(name, lengths, lead, S, *, least=0):
    """Raise ValueError unless `lengths` are integers in least..S, broadcastable to `lead`."""
    lengths = lengths if hasattr(lengths, "dtype") else np.asarray(lengths)
    dtype, shape = lengths.dtype, np.shape(lengths)
    if not np.issubdtype(dtype, np.integer):
        raise ValueError(f"{name} must be integers, got dtype {dtype}")
    if not broadcasts(shape, lead):
        raise ValueError(f"{name} of shape {list(shape)} does not broadcast to the leading axes {list(lead)}")
    if isinstance(lengths, np.ndarray | np.integer):  # traced values cannot be looked at
        values = np.asarray(lengths)
        if values.size and (values.min() < least or values.max() > S):
            raise ValueError(f"{name} must be in {least}..{S}, got {values.min()}..{values.max()}")


def repeat_heads(x, num_heads):
    """Give each key head to its group of query heads: [..., Hkv, S, D] -> [..., H, S, D]."""
    if x.ndim == 2 or x.shape[-3] == num_heads:
        return x
    return np.repeat(x, num_heads // x.shape[-3], axis=-3)


def sum_groups(dx, kv_heads):
    """The transpose of `repeat_heads`: [..., H, S, D] -> [..., Hkv, S, D], summed over each group."""
    if dx.ndim == 2 or dx.shape[-3] == kv_heads:
        return dx
    return dx.reshape(*dx.shape[:-3], kv_heads, -1, *dx.shape[-2:]).sum(axis=-3)


def split_heads(x, num_heads):
    """[..., L, H*D] -> [..., H, L, D]."""
    return np.swapaxes(x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads), -2, -3)


def join_heads(x):
    """[..., H, L, D] -> [..., L, H*D]."""
    x = np.swapaxes(x, -2, -3)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def check_mask(name, mask, shape):
    """Raise ValueError unless `mask` is boolean, has at least two axes and broadcasts to `shape`."""
    if mask.dtype != bool:
        raise ValueError(f"{name} must be boolean (True = visible or kept), got dtype {mask.dtype}")
    if mask.ndim < 2 or not broadcasts(mask.shape, shape):
        raise ValueError(f"{name} of shape {list(mask.shape)} does not broadcast to {list(shape)}")


def broadcasts(shape, to):
    """Whether an array of that shape broadcasts to exactly `to`."""
    if len(shape) > len(to):
        return False
    return all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))
