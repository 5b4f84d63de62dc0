"""Which keys a query may see. One polarity everywhere: True = visible."""

import numpy as np


def causal_mask(num_queries, num_keys):
    """[L, S], True where key j <= query i + S - L: the last query sees every key (bottom-right alignment)."""
    return np.arange(num_keys) <= np.arange(num_queries)[:, None] + (num_keys - num_queries)


def window_mask(num_queries, num_keys, *, left, right):
    """[L, S], True where -left <= j - (i + S - L) <= right, aligned bottom-right as `causal_mask`."""
    offset = np.arange(num_keys) - (np.arange(num_queries)[:, None] + (num_keys - num_queries))
    return (-left <= offset) & (offset <= right)


def dilated_window_mask(n, *, window, dilation=1, causal=False):
    """[n, n], True where j = i + dilation t with |t| <= window / 2 (even), and t <= 0 if causal."""
    offset = np.arange(n) - np.arange(n)[:, None]
    seen = (np.abs(offset) <= dilation * (window // 2)) & (offset % dilation == 0)
    return seen & (offset <= 0) if causal else seen


def block_window_mask(n, *, block, neighbors=0):
    """[n, n], True where the blocks of i and j, runs of `block` tokens, are at most `neighbors` apart."""
    at = np.arange(n) // block
    return np.abs(at[:, None] - at) <= neighbors


def length_mask(lengths, num_keys):
    """[..., 1, S], True for the first `lengths` keys: int lengths [...] with 0 <= length <= S."""
    return np.arange(num_keys) < np.asarray(lengths)[..., None, None]


def visible(rows, cols, *, num_queries, num_keys, mask=None, key_lengths=None, causal=False):
    """What queries `rows` may see of keys `cols`: bool, broadcastable to [..., len(rows), len(cols)].

    Args: rows, cols: index arrays. mask: bool [..., L or 1, S or 1] or None.
      key_lengths: int [...] or None; keys from there on are invisible. causal: key j <= row i + (length - L).
    """
    n = np.asarray(num_keys if key_lengths is None else key_lengths)[..., None, None]
    seen = cols < n
    if causal:
        seen = seen & (cols <= rows[:, None] + (n - num_queries))
    if mask is not None:
        mask = np.broadcast_to(mask, (*np.shape(mask)[:-2], num_queries, num_keys))
        seen = seen & mask[..., rows[:, None], cols]
    return np.broadcast_to(seen, (*seen.shape[:-2], len(rows), len(cols)))
