"""Which keys a query may see. One polarity everywhere: True = visible."""

import numpy as np

from ref.checks import at_least_one
from ref.dims import dims


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


def fixed_sparse_mask(n, *, block, stride, keep_from=None, causal=False):
    """[n, n], True where j <= i is in i's block, a multiple of stride, or has j mod stride >= keep_from.

    Unless causal, i sees j too if j sees i. keep_from None keeps no such columns. Source: Child et al. 2019
    (arXiv 1904.10509), the fixed pattern, with the options of Long Range Arena.
    """
    j = np.arange(n)
    summary = (j % stride == 0) | (j % stride >= (stride if keep_from is None else keep_from))
    seen = (block_window_mask(n, block=block) | summary) & (j <= j[:, None])
    return seen if causal else seen | seen.T


def longformer_mask(n, *, window, dilation=1, global_mask=None, causal=False):
    """bool [..., n, n], who sees whom: |i - j| <= dilation window / 2 in steps of dilation, or i or j global.

    Args: global_mask bool [..., n]; window even, at least 2; causal keeps j <= i and needs global_mask None.
    """
    check_window(window, dilation, causal, global_mask)
    near = dilated_window_mask(n, window=window, dilation=dilation, causal=causal)
    if global_mask is None:
        return near
    dims(global_mask=(global_mask, f"... {n}"))
    g = np.asarray(global_mask, bool)
    return near | g[..., :, None] | g[..., None, :]


def bigbird_block_mask(num_blocks, rand_blocks=None, *, num_global_blocks=0):
    """bool [..., n, n], n = num_global_blocks + num_blocks: block i sees block j.

    The first and last block and those in front see and are seen by all; block i sees i - 1, i, i + 1 and the
    rand_blocks of row i - 1, int [..., num_blocks - 2, r], which do not count the blocks in front.
    Raises: ValueError for a random block that is already seen, or twice the same.
    """
    if num_blocks < 1 or num_global_blocks < 0:
        raise ValueError(
            f"need num_blocks >= 1 and num_global_blocks >= 0, got {num_blocks=}, {num_global_blocks=}"
        )
    i = np.arange(num_blocks)
    ends = (i == 0) | (i == num_blocks - 1)
    mask = (np.abs(i[:, None] - i) <= 1) | ends[:, None] | ends
    if rand_blocks is not None:
        rand = check_rand_blocks(rand_blocks, num_blocks)
        mask = np.broadcast_to(mask, (*rand.shape[:-2], num_blocks, num_blocks)).copy()
        np.put_along_axis(mask[..., 1:-1, :], rand, True, axis=-1)
    front = [(0, 0)] * (mask.ndim - 2) + [(num_global_blocks, 0)] * 2
    return np.pad(mask, front, constant_values=True)


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


def check_window(window, dilation, causal=False, global_mask=None):
    """Raise ValueError for a window that is not even, a dilation below 1, or global tokens with causal."""
    if window < 2 or window % 2:
        raise ValueError(f"window must be even and at least 2 (half on each side), got {window}")
    at_least_one(dilation=dilation)
    if causal and global_mask is not None:
        raise ValueError("causal attention has no global tokens: global_mask must be None")


def bigbird_rand_blocks(uniforms, *, num_rand, plan="uniform"):
    """int32 [H, nb - 2, r]: for every middle row the r legal blocks with the smallest numbers, ascending.

    Args: uniforms [H, nb - 2, nb], drawn by the caller; row i - 1 is block i. Legal is a block that neither
      is at an end nor in the window. plan: "uniform" draws from all of them; "hf" as transformers does, from
      the first 2 r + 5 blocks if there are more, else half from the first r + 5 and the rest beyond, if there
      are more, else from all; the last block of each part counts as an end.
    Raises: ValueError if a row has fewer than r legal blocks.
    """
    nb = dims(uniforms=(uniforms, "H rows nb"))["nb"]
    dims(uniforms=(uniforms, f"H {nb - 2} nb"))
    if plan not in ("uniform", "hf"):
        raise ValueError(f'plan must be "uniform" or "hf", got {plan!r}')
    r, i, j = num_rand, np.arange(1, nb - 1)[:, None], np.arange(nb)
    parts = [(0, nb, r)]
    if plan == "hf" and nb > 2 * r + 5:
        parts = [(0, 2 * r + 5, r)]
    elif plan == "hf" and nb > r + 5:
        parts = [(0, r + 5, r // 2), (r + 5, nb, r - r // 2)]
    chosen = []
    for start, end, count in parts:
        legal = (np.abs(i - j) > 1) & (j > 0) & (j >= start) & (j < end - 1)
        if plan == "hf":
            legal &= ~((i == 1) & (j == end - 2)) & ~((i == end - 2) & (j == 1))
        if count < 0 or (nb > 2 and legal.sum(axis=-1).min() < count):
            raise ValueError(
                f"num_rand={r} needs that many legal blocks in every row; {nb} blocks are too few"
            )
        chosen.append(np.argsort(np.where(legal, uniforms, np.inf), axis=-1, kind="stable")[..., :count])
    return np.sort(np.concatenate(chosen, axis=-1), axis=-1).astype(np.int32)


def check_rand_blocks(rand_blocks, nb):
    """The table as an array; ValueError unless every row's random blocks are legal and distinct."""
    rand = np.asarray(rand_blocks)
    if rand.ndim < 2 or rand.dtype.kind not in "iu" or rand.shape[-2] != max(nb - 2, 0):
        raise ValueError(
            f"rand_blocks must be integers [..., nb - 2={max(nb - 2, 0)}, r], got {list(rand.shape)} of "
            f"{rand.dtype}"
        )
    row = np.arange(1, rand.shape[-2] + 1)[:, None]
    legal = (rand > 0) & (rand < nb - 1) & (np.abs(rand - row) > 1)
    if not legal.all() or (np.diff(np.sort(rand, axis=-1), axis=-1) == 0).any():
        raise ValueError(
            f"rand_blocks of block i must be distinct, in 1..{nb - 2} and not i - 1, i or i + 1: those are "
            "seen already"
        )
    return rand
