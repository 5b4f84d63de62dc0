"""Attention pruning: one fixed mask of attention cells, taken from the average pattern over a data set.

Source: Rugina et al. 2020 (arXiv 2012.02030) and the code released with it: train, average the attention of
every (head, query position, key position) over the training set, prune the smallest cells, train again with
the mask. The mask does not depend on the input. Ours: masks keep (True = kept), pruned scores are exactly
-inf where the code adds a large negative number, and a rule says what a row without a kept key returns.
"""

from dataclasses import dataclass, replace

import numpy as np

from ref.blocks.attention import (
    attention_dense_vjp,
    check_attention,
    check_mask,
    join_heads,
    prepare,
    split_heads,
    sum_groups,
)
from ref.blocks.importance import without_smallest
from ref.blocks.masks import causal_mask
from ref.blocks.softmax import softmax, weigh
from ref.blocks.transformer import QKVParams, qkv, qkv_vjp
from ref.checks import check_num_heads, one_of
from ref.dims import dims, float64
from ref.example import Example

BOUNDS = ("official", "exact")
PER = ("layer", "head", "global")
EMPTY_ROWS = ("official", "zero", "keep_max")
RULES = ("any", "mean")


def attention_probs(q, k, *, mask=None, causal=False, scale=None):
    """softmax(scale q k^T) over the visible keys, zeros for a query that sees none: what is observed.

    Args: q [..., H, n, D], k [..., Hkv, m, D], H a multiple of Hkv; mask bool, True = visible,
      broadcastable to [..., H, n, m]; causal needs n = m. scale: None is 1 / sqrt(D).
    Returns: [..., H, n, m]. Raises: ValueError naming the argument at fault.
    """
    seen = _seen(q, k, k, mask, causal)
    q, k, _, options = prepare(q, k, k, scale=scale)
    return softmax(np.where(seen, options.scale * q @ np.swapaxes(k, -1, -2), -np.inf))


def running_average(avg, count, probs):
    """(avg, count) after a batch: (c avg + sum of probs) / (c + b) in the corner that the batch covers.

    Args: avg [H, N, M]; count int [H, N, M]: examples a cell has seen; probs [b, H, n, m], n <= N, m <= M.
    Raises: ValueError if a shape disagrees, or probs does not fit the corner.
    """
    b = dims(avg=(avg, "H N M"), count=(count, "H N M"), probs=(probs, "b H n m"))["b"]
    return _average(avg, count, float64(probs).sum(axis=0), b)


def _average(avg, count, total, seen):
    """running_average from the sum over a batch, total [H, n, m], and how many examples have each cell."""
    n, m = total.shape[-2:]
    if n > avg.shape[-2] or m > avg.shape[-1]:
        raise ValueError(f"probs covers {n} x {m} positions, avg only {avg.shape[-2]} x {avg.shape[-1]}")
    avg, count, corner = np.array(avg, np.float64), np.array(count), (..., slice(n), slice(m))
    new = count[corner] + seen
    avg[corner] = (count[corner] * avg[corner] + total) / np.maximum(new, 1)
    count[corner] = new
    return avg, count


@dataclass(frozen=True)
class PatternObserver:
    """Averages of attention by layer, avg and count [L, H, N, M]; observe with dropout off."""

    num_layers: int
    num_heads: int
    n_max: int
    m_max: int
    avg: np.ndarray | None = None
    count: np.ndarray | None = None

    def __post_init__(self):
        """Zeros before the first batch."""
        shape = (self.num_layers, self.num_heads, self.n_max, self.m_max)
        if min(shape) < 1:
            raise ValueError(f"num_layers, num_heads, n_max and m_max must be at least 1, got {shape}")
        if self.avg is None:
            object.__setattr__(self, "avg", np.zeros(shape))
            object.__setattr__(self, "count", np.zeros(shape, np.int64))

    def update(self, layer, probs, *, lengths=None):
        """The observer after probs [b, H, n, m] of a layer.

        lengths: int [b], the examples' true lengths: a cell from there on, of query or key, does not count.
        """
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be in 0..{self.num_layers - 1}, got {layer}")
        avg, count = self.avg.copy(), self.count.copy()
        if lengths is None:
            avg[layer], count[layer] = running_average(avg[layer], count[layer], probs)
            return replace(self, avg=avg, count=count)
        n, m = (dims(probs=(probs, "b H n m"), lengths=(lengths, "b"))[axis] for axis in "nm")
        lengths = np.asarray(lengths)[:, None, None, None]
        there = (np.arange(n)[:, None] < lengths) & (np.arange(m) < lengths)  # [b, 1, n, m]
        total = np.where(there, float64(probs), 0.0).sum(axis=0)
        avg[layer], count[layer] = _average(avg[layer], count[layer], total, there.sum(axis=0))
        return replace(self, avg=avg, count=count)

    def average(self):
        """[L, H, N, M]; 0 where nothing was seen."""
        return self.avg


def pruning_bounds(avg, *, mode="official"):
    """(n1, n2): the box [0, n1) x [0, n2) that holds every cell which is not 0 in all layers and heads.

    avg [L, H, N, M] >= 0. "exact" is that box; "official" is the released code's, which loses the last row
    (column) when there is no padding after it.
    """
    avg = _check_avg(avg)
    one_of("mode", mode, BOUNDS)
    some = (avg != 0).any(axis=(0, 1))
    ends = [int(np.flatnonzero(x)[-1]) + 1 if x.any() else 0 for x in (some.any(axis=1), some.any(axis=0))]
    if mode == "official":
        ends = [min(end, n - 1) for end, n in zip(ends, some.shape, strict=True)]
    return tuple(ends)


def pruning_threshold(
    avg, fraction, *, bounds="official", count_masked=True, visible=None, per="layer"
) -> np.ndarray:
    """tau, the `fraction` quantile (nearest rank) of the cells in the box: cells <= tau are pruned.

    Args: avg [L, H, N, M] >= 0; fraction in [0, 1); bounds as `pruning_bounds`, layer by layer.
      count_masked: True counts cells that causality or padding hides, with their average 0, as the released
      code does; False counts the cells of visible, bool [N, M]. per: "layer", "head" or "global".
    Returns: [L], [L, H] or []. Raises: ValueError naming the argument at fault, or if the box is empty.
    """
    avg = _check_avg(avg)
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    one_of("per", per, PER)
    if visible is not None or not count_masked:
        _check_visible(visible, avg.shape[-2:])

    def rank(cells):
        n1, n2 = pruning_bounds(cells, mode=bounds)
        inside = cells[..., :n1, :n2]
        if not count_masked:
            inside = inside[..., visible[:n1, :n2]]
        if inside.size == 0:
            raise ValueError(f'avg has no cell to rank in its "{bounds}" bounds {n1} x {n2}')
        return np.percentile(inside, 100 * fraction, method="nearest")

    if per == "global":
        return rank(avg)
    parts = [[l[None, None, h] for h in range(avg.shape[1])] if per == "head" else l[None] for l in avg]
    taus = [[rank(x) for x in part] if per == "head" else rank(part) for part in parts]
    return np.array(taus)


def pruning_mask(
    avg, fraction, *, bounds="official", count_masked=True, visible=None, per="layer", empty_rows="keep_max"
):
    """bool [L, H, N, M], True = kept: avg > tau, and the cell is visible; options of `pruning_threshold`.

    empty_rows: "keep_max" keeps the largest visible cell of every row (the first of equals); "official" and
      "zero" leave the mask as thresholded, for `pruned_attention` to say what an empty row gives.
    """
    one_of("empty_rows", empty_rows, EMPTY_ROWS)
    options = {"bounds": bounds, "count_masked": count_masked, "visible": visible, "per": per}
    tau = pruning_threshold(avg, fraction, **options)
    avg = float64(avg)
    seen = np.broadcast_to(True if visible is None else visible, avg.shape)
    keep = (avg > tau.reshape(tau.shape + (1,) * (4 - tau.ndim))) & seen
    if empty_rows == "keep_max":
        best = np.argmax(np.where(seen, avg, -1.0), axis=-1)[..., None]
        keep = keep | ((np.arange(avg.shape[-1]) == best) & seen)
    return keep


def pruned_attention(
    q, k, v, keep_mask, *, mask=None, causal=False, scale=None, empty_rows="zero", return_probs=False
):
    """softmax(scale q k^T over the visible keys that are kept) v.

    Args: q [..., H, n, D], k [..., Hkv, m, D], v [..., Hkv, m, Dv]; keep_mask bool, True = kept,
      broadcastable to [..., H, n, m]; mask, causal, scale as `attention_probs`.
      empty_rows: a query whose visible keys are all pruned gives 0 ("zero") or attends to all of them, as if
      nothing were pruned ("official": what adding -1e9 to every score comes to).
    Returns: o [..., H, n, Dv], and with return_probs (o, probs [..., H, n, m]).
    """
    kept = _kept(q, k, v, keep_mask, mask, causal, empty_rows)
    p = attention_probs(q, k, mask=kept, scale=scale)
    o = weigh(p, prepare(q, k, v)[2])
    return (o, p) if return_probs else o


def pruned_attention_bwd(do, q, k, v, keep_mask, *, mask=None, causal=False, scale=None, empty_rows="zero"):
    """(dq, dk, dv) of `pruned_attention` for do [..., H, n, Dv]; what no kept cell touches gets exactly 0."""
    kept = _kept(q, k, v, keep_mask, mask, causal, empty_rows)
    kv_heads = k.shape[-3]
    q, k, v, _ = prepare(q, k, v)
    dims(do=(do, "... n Dv"), q=(q, "... n D"), v=(v, "... m Dv"))
    used = kept.any(axis=-2)[..., None]
    q, k, v = np.where(kept.any(axis=-1)[..., None], q, 0.0), np.where(used, k, 0.0), np.where(used, v, 0.0)
    dq, dk, dv = attention_dense_vjp(q, k, v, float64(do), mask=kept, scale=scale)
    return dq, sum_groups(dk, kv_heads), sum_groups(dv, kv_heads)


def pruned_self_attention(
    x, params: QKVParams, keep_mask, *, num_heads, causal=False, empty_rows="zero", return_probs=False
):
    """`pruned_attention` of x [B, N, C] with itself, heads joined, no output projection -> o [B, N, C].

    With return_probs (o, probs [B, H, N, N]). keep_mask broadcasts to [B, H, N, N].
    """
    q, k, v = _heads(x, params, num_heads)
    o, p = pruned_attention(q, k, v, keep_mask, causal=causal, empty_rows=empty_rows, return_probs=True)
    return (join_heads(o), p) if return_probs else join_heads(o)


def pruned_self_attention_vjp(
    x, params: QKVParams, keep_mask, do, *, num_heads, causal=False, empty_rows="zero"
):
    """(dx, dparams: QKVParams) of `pruned_self_attention` for do [B, N, C]."""
    heads = _heads(x, params, num_heads)
    options = {"causal": causal, "empty_rows": empty_rows}
    d = pruned_attention_bwd(split_heads(float64(do), num_heads), *heads, keep_mask, **options)
    return qkv_vjp(float64(x), params, d)


def _heads(x, params, num_heads):
    """q, k, v [B, H, N, D] of x."""
    width = dims(x=(x, "B N C"), w_q=(params.w_q, "C width"))["width"]
    check_num_heads(width, num_heads)
    return qkv(float64(x), params, num_heads=num_heads)


def to_block_mask(keep_mask, avg, *, block_q, block_k, rule="any", fraction=None):
    """bool [H, Tr, Tc], True = visited, for `block_sparse_attention`: the mask rounded to tiles.

    Args: keep_mask bool [H, N, M] and avg [H, N, M]; the one that the rule does not need may be None.
      rule: "any" visits a tile that keeps a cell (the cells are pruned inside it); "mean" prunes the
      floor(fraction tiles + 1/2) tiles of smallest mean average, over all heads, the first of equals first.
    """
    one_of("rule", rule, RULES)
    if min(block_q, block_k) < 1:
        raise ValueError(f"block_q and block_k must be at least 1, got {block_q=}, {block_k=}")
    given = keep_mask if rule == "any" else avg
    if given is None:
        raise ValueError(f'rule="{rule}" needs {"keep_mask" if rule == "any" else "avg"}')
    n = dims(**{"keep_mask" if rule == "any" else "avg": (given, "H N M")})
    rows, cols = np.arange(0, n["N"], block_q), np.arange(0, n["M"], block_k)
    total = np.add.reduceat(np.add.reduceat(float64(given), rows, axis=1), cols, axis=2)
    if rule == "any":
        return total > 0
    if fraction is None or not 0 <= fraction < 1:
        raise ValueError(f'fraction must be in [0, 1) with rule="mean", got {fraction}')
    cells = np.minimum(block_q, n["N"] - rows)[:, None] * np.minimum(block_k, n["M"] - cols)
    return _without_share(total / cells, fraction)


def random_keep_mask(uniforms, fraction, *, visible=None):
    """bool, the shape of uniforms [..., N, M]: the visible cells but the floor(fraction n + 1/2) smallest."""
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}")
    uniforms = float64(uniforms)
    if visible is None:
        return _without_share(uniforms, fraction)
    _check_visible(visible, uniforms.shape[-2:])
    keep = np.zeros(uniforms.shape, bool)
    keep[..., visible] = _without_share(uniforms[..., visible], fraction)
    return keep


def _without_share(x, fraction):
    """bool, the shape of x: False for the floor(fraction n + 1/2) smallest, the first of equals first."""
    return without_smallest(x, int(np.floor(fraction * x.size + 0.5)))


def pruning_report(keep_mask):
    """Shares of kept cells of a mask [L, H, N, M]: {"density", "per_layer" [L], "per_head" [L, H],
    "diagonal_profile" [N + M - 1]}, the last by key minus query position, -(N - 1) .. M - 1.
    """
    n = dims(keep_mask=(keep_mask, "L H N M"))
    flat = np.asarray(keep_mask).mean(axis=(0, 1))
    diagonals = [np.diagonal(flat, offset).mean() for offset in range(1 - n["N"], n["M"])]
    return {
        "density": float(np.mean(keep_mask)),
        "per_layer": np.mean(keep_mask, axis=(1, 2, 3)),
        "per_head": np.mean(keep_mask, axis=(2, 3)),
        "diagonal_profile": np.array(diagonals),
    }


def _seen(q, k, v, mask, causal):
    """What causality and mask show, [n, m] or wider. Raises: ValueError for a bad call, or causal, n != m."""
    n = check_attention(q, k, v, mask)
    if q.ndim < 3:
        raise ValueError(f"q must have shape [..., H, n, D], got {list(q.shape)}")
    if causal and n["L"] != n["S"]:
        raise ValueError(f"causal needs as many keys as queries, got {n['L']} queries and {n['S']} keys")
    seen = causal_mask(n["L"], n["S"]) if causal else np.ones((n["L"], n["S"]), bool)
    return seen if mask is None else seen & mask


def _kept(q, k, v, keep_mask, mask, causal, empty_rows):
    """The cells that take part, bool [..., n, m] broadcastable to the scores."""
    if empty_rows not in EMPTY_ROWS[:2]:
        raise ValueError(f'empty_rows must be "official" or "zero", got {empty_rows!r}')
    seen = _seen(q, k, v, mask, causal)
    check_mask("keep_mask", keep_mask, (*q.shape[:-1], k.shape[-2]))
    kept = seen & keep_mask
    if empty_rows == "official":
        kept = np.where(kept.any(axis=-1, keepdims=True), kept, seen)
    return kept


def _check_avg(avg):
    dims(avg=(avg, "L H N M"))
    avg = float64(avg)
    if not (avg >= 0).all():  # also NaN
        raise ValueError("avg must hold averages of probabilities, without a negative number or NaN")
    return avg


def _check_visible(visible, shape):
    if visible is None:
        raise ValueError("count_masked=False needs visible, bool [N, M]")
    if visible.dtype != bool or visible.shape != tuple(shape):
        raise ValueError(f"visible must be bool {list(shape)}, got {visible.dtype} {list(visible.shape)}")


def example(seed=0):
    """SmolLM2 on six windows of 16 tokens; half of the average pattern of four of them pruned."""
    from ref.data import attention_inputs, hidden_states

    rng = np.random.default_rng(seed)
    q, k, v = (np.swapaxes(x.reshape(-1, 6, 16, 64), 0, 1) for x in attention_inputs())
    probs = attention_probs(q, k, causal=True)
    avg, count = running_average(np.zeros((9, 16, 16)), np.zeros((9, 16, 16), np.int64), probs[:4])
    visible = causal_mask(16, 16)
    options = {"bounds": "exact", "count_masked": False, "visible": visible}
    keep = pruning_mask(avg[None], 0.5, **options)[0]
    x = hidden_states()[None, 1:17, :30]
    params = QKVParams(*(rng.standard_normal(s) / 6 for s in ((30, 30), 30) * 3))
    small = {"num_heads": 3, "causal": True}
    return [
        Example("attention_probs", (q, k), {"causal": True}, (0, 1)),
        Example("running_average", (avg, count, probs[4:])),
        Example("pruned_attention", (q, k, v, keep), {"causal": True}, (0, 1, 2)),
        Example("pruned_attention_bwd", (q, q, k, v, keep), {"causal": True}),
        Example("pruned_self_attention", (x, params, keep[::3]), small, (0, 1)),
        Example("pruned_self_attention_vjp", (x, params, keep[::3], x), small),
    ]
