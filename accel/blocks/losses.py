"""Cross-entropy of a linear head in JAX, the logits of a chunk of rows at a time; see ref/blocks/losses.py.

In one pass over the chunks the logits are made, reduced and turned into both gradients, so that no array of
all logits is kept: the backward pass only scales what the forward pass left.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from accel.blocks.shapes import alike
from accel.blocks.softmax import logsumexp, wide
from ref.blocks.losses import rows_at_a_time
from ref.dims import dims

__all__ = ["linear_cross_entropy"]

UNSCORED, WRONG = -1, -2  # what stands for a label that is not scored, or that no row of w has
LANES = 128  # rows of logits of another length keep matrix products on a GPU off their fast path


def linear_cross_entropy(x, w, labels, *, ignore=None, chunk=None):
    """Mean of -log softmax(x w^T)[label], nats, without an array of all logits; float32 (or float64).

    Args: x [..., d]; w [V, d], cast to x's dtype; labels int [...]; ignore: the label of what is not scored,
        whatever its x; chunk: rows of logits at a time, None for as many as have 2^27.
    Logits and sums are float32 (float64); the gradient of the logits is rounded to x's dtype before it meets
    w and x. What ref refuses for its value gives NaN, in the loss and in the gradients it enters: another
    label outside 0..V-1, or none that is scored. Reverse mode, any number of times; no forward mode.
    Raises: ValueError if an axis disagrees, labels are not integers or none, or chunk < 1.
    """
    V = dims(x=(x, "... d"), w=(w, "V d"), labels=(labels, "..."))["V"]
    chunk = rows_at_a_time(V, chunk)
    x, w, labels = map(jnp.asarray, (x, w, labels))
    for name, a in (("x", x), ("w", w)):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating, got {a.dtype}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers in 0..{V - 1}, got {labels.dtype}")
    if labels.size == 0:
        raise ValueError("labels must hold at least one that is scored")
    x, w = alike((x, w), x, w, labels)
    target = _target(labels.reshape(-1), ignore, V)
    return _mean(chunk, x.reshape(-1, x.shape[-1]), w, target)


def _target(labels, ignore, V):
    """int32 labels with UNSCORED and WRONG in place of those that have no row."""
    if labels.dtype.itemsize < 4:  # too narrow for V, perhaps
        labels = labels.astype(jnp.int32)
    known = (labels >= 0) & (labels < V)
    target = jnp.where(known, labels.astype(jnp.int32), WRONG)
    within = np.iinfo(labels.dtype)
    if ignore is None or not within.min <= ignore <= within.max:
        return target
    return jnp.where(labels == ignore, UNSCORED, target)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean(chunk, x, w, target):
    total, _ = _over_chunks(partial(_loss, len(w)), chunk, x, w, target)
    return total / _count(target, total.dtype)


def _mean_fwd(chunk, x, w, target):
    (total, dw), dx = _over_chunks(partial(_loss_and_gradients, len(w)), chunk, x, w, target)
    n = _count(target, total.dtype)
    return total / n, (dx, dw[: len(w)], n, jnp.zeros((0,), w.dtype))


def _mean_rev(chunk, saved, dloss):
    dx, dw, n, like_w = saved
    scale = dloss / n  # last, in float32: a gradient over n in half precision may vanish
    return (dx.astype(scale.dtype) * scale).astype(dx.dtype), (dw * scale).astype(like_w.dtype), None


_mean.defvjp(_mean_fwd, _mean_rev)


def _count(target, dtype):
    return jnp.sum(target != UNSCORED).astype(dtype)


def _over_chunks(part, chunk, x, w, target):
    """(sums, rows [T, ..] joined) of part(x, w, target) over chunks of rows of even size."""
    T, d = x.shape
    more = -len(w) % LANES if len(w) > 8 * LANES else 0  # where it costs little
    w = jnp.pad(w.astype(x.dtype), ((0, more), (0, 0)))
    x = jnp.where(target[:, None] == UNSCORED, jnp.zeros((), x.dtype), x)  # it may hold anything
    count = -(-T // chunk)
    if count == 1:
        return part(x, w, target)
    size = -(-T // count)
    x = jnp.pad(x, ((0, count * size - T), (0, 0))).reshape(count, size, d)
    target = jnp.pad(target, (0, count * size - T), constant_values=UNSCORED).reshape(count, size)
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(part, x[0], w, target[0])[0])

    def step(sums, rows):
        found, out = part(rows[0], w, rows[1])
        return jax.tree.map(jnp.add, sums, found), out

    sums, rows = lax.scan(step, alike(start, x, w, target), (x, target))
    return sums, jax.tree.map(lambda r: r.reshape(count * size, *r.shape[2:])[:T], rows)


def _logits(V, x, w, target):
    """(logits of V columns, the others -inf; their logsumexp [T]; the sum of losses)."""
    z = jnp.matmul(x, w.T, preferred_element_type=wide(x.dtype))
    if len(w) > V:
        z = jnp.where(lax.broadcasted_iota(jnp.int32, z.shape, 1) < V, z, -jnp.inf)
    lse = logsumexp(z)
    own = jnp.take_along_axis(z, jnp.maximum(target, 0)[:, None], axis=-1)[:, 0]
    loss = jnp.where(target == WRONG, jnp.nan, lse - own)
    return z, lse, jnp.sum(jnp.where(target == UNSCORED, 0, loss))


def _loss(V, x, w, target):
    """(sum of losses, nothing by rows)."""
    return _logits(V, x, w, target)[2], None


def _loss_and_gradients(V, x, w, target):
    """((sum of losses, its gradient by w), its gradient by x)."""
    z, lse, total = _logits(V, x, w, target)
    row = target[:, None]
    own = lax.broadcasted_iota(jnp.int32, z.shape, 1) == row
    p = jnp.exp(z - lse[:, None]) - own.astype(z.dtype)
    p = jnp.where(row == WRONG, jnp.nan, jnp.where(row == UNSCORED, 0, p)).astype(x.dtype)
    dw = jnp.matmul(p.T, x, preferred_element_type=z.dtype)
    return (total, dw), jnp.matmul(p, w)
