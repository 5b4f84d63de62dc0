"""Pruning: which weights to remove, by size, by structure, by N:M groups, by movement, by second order.

Source: a survey of inference optimisation (arXiv 2307.07982, 2023). Magnitude: Han et al. 2015; heads: Michel
et al. 2019, section 4.1; N:M: Mishra et al. 2021; movement: Sanh et al. 2020, equations 3 and 5; schedule:
Zhu and Gupta 2017, equation 1; second order: Hassibi and Stork 1993, equation 5. Masks are boolean, True =
kept; weights are [out, in], because N:M groups run along a row's inputs.
"""

import numpy as np

from ref.blocks.importance import without_smallest
from ref.blocks.mlp import sigmoid
from ref.checks import check_share
from ref.dims import dims, float64
from ref.example import Example


def magnitude_mask(w, *, sparsity):
    """Keep all but the round(sparsity * size) smallest |w|; of equals the first in flat order goes first.

    Raises: ValueError if sparsity is outside [0, 1].
    """
    check_share("sparsity", sparsity)
    w = np.asarray(w)
    return without_smallest(np.abs(w), round(sparsity * w.size))


def global_magnitude_masks(ws, *, sparsity):
    """A tuple of masks with one threshold for all weights: layers of small weights lose more than others."""
    check_share("sparsity", sparsity)
    sizes = [np.size(w) for w in ws]
    flat = np.concatenate([np.abs(np.asarray(w)).ravel() for w in ws])
    mask = without_smallest(flat, round(sparsity * flat.size))
    parts = np.split(mask, np.cumsum(sizes)[:-1])
    return tuple(m.reshape(np.shape(w)) for m, w in zip(parts, ws, strict=True))


def structured_mask(w, *, sparsity, axis, order=2):
    """Drop the round(sparsity * count) slices along `axis` with the smallest `order`-norm.

    Raises: ValueError for a sparsity outside [0, 1] or an axis w does not have.
    """
    check_share("sparsity", sparsity)
    w = np.asarray(w)
    if not -w.ndim <= axis < w.ndim:
        raise ValueError(f"axis must be in {-w.ndim}..{w.ndim - 1}, got {axis}")
    slices = np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1)
    kept = without_smallest(np.linalg.norm(slices, ord=order, axis=1), round(sparsity * len(slices)))
    shape = [1] * w.ndim
    shape[axis] = -1
    return np.broadcast_to(kept.reshape(shape), w.shape).copy()


def nm_mask(w, *, n=2, m=4):
    """Keep the n largest |w| of every m consecutive inputs of a row; of equals the later one stays.

    Args: w [out, in], in a multiple of m. Raises: ValueError if it is not, or unless 1 <= n <= m.
    """
    groups = _nm_groups(w, n, m)
    order = np.argsort(np.abs(groups), axis=-1, kind="stable")
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order[..., m - n :], True, axis=-1)
    return mask.reshape(np.shape(w))


def nm_pack(w, mask, *, n=2, m=4):
    """(values, indices), both [out, in * n / m]: kept values in input order, and their places in the group.

    values keep the dtype of w, which is to be stored; indices are int32 in 0..m-1.
    Raises: ValueError if the mask does not keep exactly n of every m.
    """
    groups, kept = _nm_groups(w, n, m), np.asarray(mask, bool).reshape(-1, np.shape(w)[1] // m, m)
    if not (kept.sum(axis=-1) == n).all():
        raise ValueError(f"mask must keep exactly n={n} of every m={m} inputs")
    indices = np.nonzero(kept)[2].reshape(len(groups), -1)
    return groups[kept].reshape(len(groups), -1), indices.astype(np.int32)


def nm_matmul(x, values, indices, *, n=2, m=4, in_features):
    """x W^T from the packed form: x [..., in], values and indices [out, in * n / m] -> [..., out]."""
    size = dims(x=(x, f"... {in_features}"), values=(values, "O P"), indices=(indices, "O P"))
    if size["P"] * m != in_features * n:
        raise ValueError(
            f"values has {size['P']} columns, expected in_features * n / m = {in_features * n / m:g}"
        )
    columns = np.arange(size["P"]) // n * m + indices  # [out, P]: the input that each value multiplies
    dense = np.zeros((size["O"], in_features))
    np.put_along_axis(dense, columns, float64(values), axis=1)
    return float64(x) @ dense.T


def head_importance(ctx, grad_ctx):
    """mean_b |sum over tokens and channels of ctx * dL/dctx|, scaled to norm 1 over the heads.

    Args: ctx, grad_ctx [B, H, N, d]: the output of every head and the loss's gradient there. Returns: [H].
    It is |dL/dm_h| of a factor m_h = 1 on head h (Michel et al. 2019, equation 2).
    Raises: ValueError for an empty batch.
    """
    if dims(ctx=(ctx, "B H N d"), grad_ctx=(grad_ctx, "B H N d"))["B"] < 1:
        raise ValueError("ctx must hold at least one example")
    importance = np.abs((float64(ctx) * grad_ctx).sum(axis=(2, 3))).mean(axis=0)
    norm = np.linalg.norm(importance)
    return importance / norm if norm > 0 else importance


def prune_heads(params, keep):
    """BlockParams with only the heads `keep` (bool [H]): columns of w_q, w_k, w_v and rows of w_o go.

    Raises: ValueError if no head is kept or the width is no multiple of H.
    """
    keep = np.asarray(keep, bool)
    width = params.w_q.shape[1]
    if not keep.any():
        raise ValueError("keep must leave at least one head")
    if width % len(keep):
        raise ValueError(f"keep names {len(keep)} heads, but the width {width} is no multiple of that")
    columns = np.repeat(keep, width // len(keep))
    cut = lambda b: None if b is None else b[columns]
    return params._replace(
        w_q=params.w_q[:, columns], b_q=cut(params.b_q), w_k=params.w_k[:, columns], b_k=cut(params.b_k),
        w_v=params.w_v[:, columns], b_v=cut(params.b_v), w_o=params.w_o[columns],
    )  # fmt: skip


def prune_ffn(params, keep):
    """BlockParams with only the hidden neurons `keep` (bool [F]): columns of w_fc1 and rows of w_fc2 go."""
    keep = np.asarray(keep, bool)
    if keep.shape != (params.w_fc1.shape[1],):
        raise ValueError(f"keep must have shape [{params.w_fc1.shape[1]}], got {list(keep.shape)}")
    b = None if params.b_fc1 is None else params.b_fc1[keep]
    return params._replace(w_fc1=params.w_fc1[:, keep], b_fc1=b, w_fc2=params.w_fc2[keep])


def movement_mask(scores, *, keep=None, threshold=None):
    """The int(keep * size) largest scores, or those with sigmoid(score) > threshold: exactly one is given."""
    scores = np.asarray(scores)
    if (keep is None) == (threshold is None):
        raise ValueError(f"give exactly one of keep and threshold, got {keep=}, {threshold=}")
    if threshold is not None:
        return sigmoid(scores) > threshold
    check_share("keep", keep)
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores.ravel(), kind="stable")[: int(keep * scores.size)]] = True
    return mask.reshape(scores.shape)


def movement_linear(x, w, scores, *, keep=None, threshold=None):
    """x (W * M)^T with M = movement_mask(scores): x [..., in], w and scores [out, in] -> [..., out]."""
    dims(x=(x, "... in"), w=(w, "out in"), scores=(scores, "out in"))
    return float64(x) @ (float64(w) * movement_mask(scores, keep=keep, threshold=threshold)).T


def movement_linear_vjp(x, w, scores, grad_out, *, keep=None, threshold=None):
    """(grad_x, grad_w, grad_scores): straight through the mask, dS = dL/d(W*M) * W even where M = 0.

    So a score falls when its weight moves towards zero, and rises when it moves away (Sanh et al. 2020,
    section 4).
    """
    mask = movement_mask(scores, keep=keep, threshold=threshold)
    w, grad_out = float64(w, grad_out)
    rows = float64(x).reshape(-1, x.shape[-1])
    grad = grad_out.reshape(-1, grad_out.shape[-1]).T @ rows  # dL / d(W * M)
    return grad_out @ (w * mask), grad * mask, grad * w


def cubic_sparsity(step, *, start, end, initial=0.0, final):
    """initial until `start`, final from `end`, in between final + (initial - final) (1 - progress)^3."""
    if end <= start:
        raise ValueError(f"end must come after start, got {start=}, {end=}")
    if step <= start:
        return float(initial)
    progress = min((step - start) / (end - start), 1.0)
    return float(final + (initial - final) * (1 - progress) ** 3)


def obs_prune_row(w, h_inv, *, count):
    """Remove `count` weights of a row, each time the one that costs least; the others make up for it.

    Cost of w_i: w_i^2 / (2 [H^-1]_ii); correction: -w_i / [H^-1]_ii H^-1[:, i]; then i leaves H^-1 by
    elimination.
    Args: w [n]; h_inv [n, n], the inverse of H = X X^T + damping.
    Returns: (w [n] with zeros, mask [n], True = kept).
    Raises: ValueError unless 0 <= count <= n.
    """
    n = dims(w=(w, "n"), h_inv=(h_inv, "n n"))["n"]
    if not 0 <= count <= n:
        raise ValueError(f"count must be in 0..{n}, got {count}")
    w, h_inv = float64(w).copy(), float64(h_inv).copy()
    kept = np.ones(n, bool)
    for _ in range(count):
        diagonal = np.where(kept, np.diag(h_inv), 1.0)
        i = int(np.argmin(np.where(kept, w**2 / (2 * diagonal), np.inf)))
        w -= w[i] / h_inv[i, i] * h_inv[:, i]
        h_inv -= np.outer(h_inv[:, i], h_inv[i]) / h_inv[i, i]
        kept[i] = False
        w[~kept] = 0.0
    return w, kept


def bsr_matmul(x, blocks, block_rows, block_cols, *, shape):
    """x W^T with W [out, in] given by its nonzero blocks; blocks of 1 x 1 are unstructured sparsity.

    Args: x [..., in]; blocks [n, b, c]; block_rows, block_cols int [n]; shape (out, in). Returns: [..., out].
    Raises: ValueError if a block lies outside the shape.
    """
    size = dims(x=(x, f"... {shape[1]}"), blocks=(blocks, "n b c"), block_rows=(block_rows, "n"))
    b, c = size["b"], size["c"]
    rows, cols = np.asarray(block_rows), np.asarray(block_cols)
    if len(rows) and (max(rows) * b + b > shape[0] or max(cols) * c + c > shape[1] or min(*rows, *cols) < 0):
        raise ValueError(f"blocks of {b} x {c} must lie inside a weight of shape {list(shape)}")
    x = float64(x)
    y = np.zeros((*x.shape[:-1], shape[0]))
    for block, i, j in zip(float64(blocks), rows, cols, strict=True):
        y[..., i * b : i * b + b] += x[..., j * c : j * c + c] @ block.T
    return y


def sparse_bytes(shape, *, kind="bitmap", sparsity, itemsize, n=2, m=4, block=32):
    """Bytes of an [out, in] weight stored as "dense", "bitmap", "csr", "bsr" or "nm".

    bitmap: values and one bit an entry. csr: values, int32 columns, int32 row starts. bsr: whole blocks of
    `block` a side with the same two indices. nm: in * n / m values a row and ceil(log2 m) bits each.
    Raises: ValueError for an unknown kind or a sparsity outside [0, 1].
    """
    check_share("sparsity", sparsity)
    rows, cols = shape
    size = rows * cols
    kept = size - round(sparsity * size)
    if kind == "dense":
        return size * itemsize
    if kind == "bitmap":
        return kept * itemsize + -(-size // 8)
    if kind == "csr":
        return kept * (itemsize + 4) + 4 * (rows + 1)
    if kind == "bsr":
        across, down = -(-cols // block), -(-rows // block)
        blocks = across * down - round(sparsity * across * down)
        return blocks * (block * block * itemsize + 4) + 4 * (down + 1)
    if kind == "nm":
        packed = rows * (cols // m) * n
        return packed * itemsize + -(-packed * (m - 1).bit_length() // 8)
    raise ValueError(f'kind must be "dense", "bitmap", "csr", "bsr" or "nm", got {kind!r}')


def _nm_groups(w, n, m):
    columns = dims(w=(w, "out in"))["in"]
    if not 1 <= n <= m:
        raise ValueError(f"need 1 <= n <= m, got {n=}, {m=}")
    if columns % m:
        raise ValueError(f"w has {columns} inputs, not a multiple of m={m}")
    return np.asarray(w).reshape(len(w), columns // m, m)


def example(seed=0):
    """A 16 x 32 weight and hidden states of SmolLM2 as its input."""
    from ref.data import hidden_states

    rng = np.random.default_rng(seed)
    x = hidden_states()[1:9, :32]
    w = rng.standard_normal((16, 32))
    scores = rng.standard_normal((16, 32))
    values, indices = nm_pack(w, nm_mask(w))
    h = x.T @ x + np.eye(32)
    heads = x[:6].reshape(1, 6, 4, 8).swapaxes(1, 2)
    return [
        Example("magnitude_mask", (w,), {"sparsity": 0.5}),
        Example("global_magnitude_masks", ((w, 2 * scores),), {"sparsity": 0.5}),
        Example("structured_mask", (w,), {"sparsity": 0.25, "axis": 0}),
        Example("nm_mask", (w,)),
        Example("nm_pack", (w, nm_mask(w))),
        Example("nm_matmul", (x, values, indices), {"in_features": 32}, (0, 1)),
        Example("head_importance", (heads, rng.standard_normal(heads.shape))),
        Example("movement_mask", (scores,), {"keep": 0.3}),
        Example("movement_linear", (x, w, scores), {"keep": 0.3}, (0,)),
        Example("movement_linear_vjp", (x, w, scores, rng.standard_normal((8, 16))), {"keep": 0.3}),
        Example("obs_prune_row", (w[0], np.linalg.inv(h)), {"count": 8}),
        Example(
            "bsr_matmul",
            (x, rng.standard_normal((3, 4, 8)), np.array([0, 1, 3]), np.array([2, 0, 3])),
            {"shape": (16, 32)},
            (0, 1),
        ),
    ]
