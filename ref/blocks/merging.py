"""Merging tokens: what a plan is, what it does to tokens, how attention then counts; and ToMe's matching.

Source: Bolya et al. 2023 (arXiv 2210.09461, ToMe): section 3 (bipartite soft matching), equation 1
(proportional attention). A plan is one integer a token, the output slot it goes to; tokens that share a slot
are merged.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.quantize import check_finite
from ref.blocks.softmax import softmax
from ref.dims import dims, float64

MODES = ("wavg", "mean", "sum", "max", "prune")


class MergePlan(NamedTuple):
    """Who merges with whom: group [..., N] int32, the output slot of every token; n_out slots."""

    group: np.ndarray
    n_out: int


def merge_tokens(x, group, n_out, *, size=None, mode="wavg"):
    """One token a slot: sum(x size) / sum(size) over the tokens of the slot, and the sizes summed.

    Args: x [..., N, C]; group [..., N] ints in 0..n_out - 1, every slot used; size [..., N] > 0, None = ones.
      mode: "wavg"; "mean", "sum" or "max" of x without sizes; "prune": the largest token of the slot (the
        first of equals) stays as it is, with its own size, and the others are dropped.
    Returns: (x' [..., n_out, C], size' [..., n_out]) float64.
    Raises: ValueError for an unknown mode, a size <= 0, or a slot outside the range or without a token.
    """
    n = dims(x=(x, "... N C"), group=(group, "... N"))
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    x = float64(x)
    size = np.ones(group.shape) if size is None else check_size(size)
    dims(size=(size, "... N"), group=(group, "... N"))
    x, size, group = (a.reshape(-1, *a.shape[len(n["..."]) :]) for a in (x, size, group))
    slot = (np.arange(len(group))[:, None], group)
    members = np.zeros((len(group), n_out))
    if group.min(initial=0) < 0 or group.max(initial=0) >= n_out:
        raise ValueError(f"group must be in 0..{n_out - 1}, got {group.min()}..{group.max()}")
    np.add.at(members, slot, 1.0)
    if not members.all():
        raise ValueError(f"group leaves some of the n_out={n_out} slots empty")
    total = np.zeros((len(group), n_out))
    np.add.at(total, slot, size)
    if mode == "max":
        out = np.full_like(x, -np.inf, shape=(len(x), n_out, x.shape[-1]))
        np.maximum.at(out, slot, x)
    elif mode == "prune":
        survivor = _survivors(size, group, n_out)
        out, total = take_rows(x, survivor), np.take_along_axis(size, survivor, axis=-1)
    else:
        out = np.zeros_like(x, shape=(len(x), n_out, x.shape[-1]))
        np.add.at(out, slot, x * size[..., None] if mode == "wavg" else x)
        out = out / {"wavg": total, "mean": members, "sum": np.ones(total.shape)}[mode][..., None]
    return out.reshape(*n["..."], n_out, n["C"]), total.reshape(*n["..."], n_out)


def merge_tokens_vjp(x, group, n_out, size, dy, d_size):
    """-> (dx, dsize) of `merge_tokens` in mode "wavg", for dy [..., n_out, C] and d_size [..., n_out].

    With y = sum(s x) / S: dx = s dy / S and ds = (x - y) dy / S + dS, each at the token's own slot.
    """
    y, total = merge_tokens(x, group, n_out, size=size)
    share = float64(size) / np.take_along_axis(total, group, axis=-1)
    dy_back = unmerge_tokens(dy, group)
    d_weight = np.sum((x - unmerge_tokens(y, group)) * dy_back, axis=-1)
    d_weight = d_weight / np.take_along_axis(total, group, axis=-1)
    return share[..., None] * dy_back, d_weight + np.take_along_axis(d_size, group, axis=-1)


def unmerge_tokens(y, group):
    """Give every input token the value of its slot: y [..., n_out, C], group [..., N] -> [..., N, C]."""
    dims(y=(y, "... M C"), group=(group, "... N"))
    return take_rows(float64(y), group)


def proportional_attention(q, k, v, size, *, scale=None):
    """softmax(scale q k^T + log size) v: a key that stands for n tokens counts n times.

    Args: q, k, v [..., N, D] (leading axes batch, then heads). size > 0: [N], or [B, N] with the batch axes
      of q; it is the same for all heads. scale: None is 1 / sqrt(D).
    """
    n = dims(q=(q, "... L D"), k=(k, "... S D"), v=(v, "... S Dv"))
    q, k, v = float64(q, k, v)
    size = np.expand_dims(check_size(size), expand_axes(size.shape, q.shape, n["S"]))
    scale = 1 / np.sqrt(n["D"]) if scale is None else scale
    return softmax(scale * q @ np.swapaxes(k, -1, -2) + np.log(size)) @ v


def bipartite_soft_matching(metric, *, r, class_token=False, distill_token=False):
    """ToMe: tokens at even places may merge into tokens at odd places; the r most similar pairs do.

    Args: metric [..., N, D]. r >= 0, cut to half of the tokens that may merge. class_token: token 0 stays;
      the others that stay are then in their old order, else by similarity. distill_token: token 1 stays.
    Returns: MergePlan; output order [a's that stay, all b], with distill_token [a0, b0, other a's, other
      b's].
    """
    N = dims(metric=(metric, "... N D"))["N"]
    check_finite("metric", metric)
    if r < 0:
        raise ValueError(f"r must be at least 0, got {r}")
    r = min(r, (N - class_token - distill_token) // 2)
    if r <= 0:
        return identity_plan(metric)
    unit = unit_rows(metric)
    scores = unit[..., 0::2, :] @ np.swapaxes(unit[..., 1::2, :], -1, -2)
    if class_token:
        scores[..., 0, :] = -np.inf
    if distill_token:
        scores[..., :, 0] = -np.inf
    ranked = descending(scores.max(axis=-1))
    target = np.take_along_axis(scores.argmax(axis=-1), ranked, axis=-1)[..., :r]
    moved, kept = ranked[..., :r], ranked[..., r:]
    if class_token:
        kept = np.sort(kept, axis=-1)
    b = np.broadcast_to(np.arange(N // 2), (*metric.shape[:-2], N // 2))
    plan = plan_of(N, 2 * kept, 2 * b + 1, 2 * moved, target, False)
    if not distill_token:
        return plan
    n_kept = kept.shape[-1]  # the first b moves up to place 1, the a's behind it move down
    place = np.r_[0, np.arange(2, n_kept + 1), 1, np.arange(n_kept + 1, plan.n_out)].astype(np.int32)
    return MergePlan(place[plan.group], plan.n_out)


def tome_schedule(depth, *, r, inflect=0.0):
    """Tokens removed in each layer: list of `depth` ints.

    Args: r: int, the mean a layer, or a list, padded with zeros. inflect: -1..1, the slope: 0 is constant, 1
      runs from 0 to 2r, -1 from 2r to 0.
    """
    if isinstance(r, list | tuple):
        if inflect != 0 or len(r) > depth or min(r, default=0) < 0:
            raise ValueError(
                f"a list r has at most {depth=} entries >= 0 and no inflect, got {r}, {inflect=}"
            )
        return [int(n) for n in r] + [0] * (depth - len(r))
    if r < 0 or not -1 <= inflect <= 1:
        raise ValueError(f"r must be at least 0 and inflect in -1..1, got {r=}, {inflect=}")
    low = int(r * (1.0 - inflect))
    step = (2 * r - low - low) / (depth - 1) if depth > 1 else 0.0
    return [int(low + step * layer) for layer in range(depth)] if depth > 1 else [int(r)]


def random_plan(rng, n, r, *, batch=1, class_token=True):
    """The baseline: r random tokens go to random survivors. -> MergePlan, group [batch, n].

    The class token neither moves nor receives. Survivors keep their order.
    """
    first = int(class_token)
    if not 0 <= r < n - first:
        raise ValueError(f"r must be in 0..{n - first - 1}, so that a survivor is left, got {r}")
    group = np.empty((batch, n), np.int32)
    for row in group:
        moved = first + rng.permutation(n - first)[:r]
        stays = np.setdiff1d(np.arange(n), moved)
        row[stays] = np.arange(n - r)
        row[moved] = rng.integers(first, n - r, size=r)
    return MergePlan(group, n - r)


def identity_plan(metric):
    """The plan that merges nothing, for metric [..., N, D]."""
    N = metric.shape[-2]
    return MergePlan(np.broadcast_to(np.arange(N, dtype=np.int32), metric.shape[:-1]).copy(), N)


def plan_of(N, kept, b, a, target, class_token):
    """The plan with output [class token, kept, b], where a[i] joins b[target[i]]."""
    first, n_kept = int(class_token), kept.shape[-1]
    group = np.zeros((*kept.shape[:-1], N), np.int32)
    for tokens, slots in (
        (kept, np.arange(n_kept)),
        (b, n_kept + np.arange(b.shape[-1])),
        (a, n_kept + target),
    ):
        slots = np.broadcast_to(first + slots, tokens.shape).astype(np.int32)
        np.put_along_axis(group, first + tokens, slots, axis=-1)
    return MergePlan(group, first + n_kept + b.shape[-1])


def row_lengths(x):
    """Row lengths [..., 1], and 1 for a row of zeros, which then is similar to nothing."""
    unit = _largest(x)
    length = unit * np.sqrt(np.sum((x / unit) ** 2, axis=-1, keepdims=True))
    return np.where(length == 0, 1.0, length)


def unit_rows(metric):
    """Rows of length 1, scaled by their largest entry first so that no square overflows; zeros stay zeros."""
    metric = float64(metric)
    metric = metric / _largest(metric)
    return metric / row_lengths(metric)


def descending(values):
    """Indices by falling value; equal values by rising index."""
    return np.argsort(-values, axis=-1, kind="stable")


def take_rows(x, index):
    """x[index] along the tokens: x [..., N, C], index [..., M] -> [..., M, C]."""
    return np.take_along_axis(x, index[..., None], axis=-2)


def check_size(size):
    """Sizes in float64; ValueError unless all are positive."""
    if not (np.asarray(size) > 0).all():
        raise ValueError(f"size must be positive, got a smallest of {np.min(size)}")
    return float64(size)


def expand_axes(size_shape, q_shape, keys):
    """Where size [batch..., S] needs axes to fit logits [batch..., heads..., L, S]: before its last axis."""
    lead = q_shape[: len(size_shape) - 1]
    if size_shape[-1:] != (keys,) or size_shape[:-1] != lead or len(size_shape) > len(q_shape) - 1:
        raise ValueError(
            f"size must be [{keys}] or have the first axes of q {list(q_shape)}, got {list(size_shape)}"
        )
    return tuple(range(len(lead), len(q_shape) - 1))


def _largest(x):
    """The largest |x| of every row, [..., 1]; 1 for a row of zeros."""
    largest = np.abs(x).max(axis=-1, keepdims=True, initial=0)
    return np.where(largest == 0, 1.0, largest)


def _survivors(size, group, n_out):
    """The largest token of every slot, the first of equals: [B, n_out]."""
    order = descending(size)
    slots = np.take_along_axis(group, order, axis=-1)
    first = lambda row: np.unique(row, return_index=True)[1]
    best = [order[b, first(row)] for b, row in enumerate(slots)]
    return np.array(best).reshape(len(group), n_out)
