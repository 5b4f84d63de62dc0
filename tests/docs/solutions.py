"""Solutions of the exercises in the opening chapters: shown there, run by test_opening.py."""

from itertools import permutations

import numpy as np

from ref.blocks.attention import attention_dense, attention_dense_vjp
from ref.blocks.masks import visible
from ref.blocks.softmax import softmax
from ref.dims import dims
from tests.docs.mutants import close, draw, right


# --8<-- [start:offset]
def visible_keys(cached, new):
    """How many keys each of `new` queries sees, causally, behind `cached` earlier keys."""
    n = cached + new
    seen = visible(np.arange(new), np.arange(n), num_queries=new, num_keys=n, causal=True)
    return seen.sum(-1).tolist()
    # --8<-- [end:offset]


# --8<-- [start:refused]
def refused(shape):
    """Whether an x of this shape does not fit w [4, 8]."""
    try:
        dims(x=(np.empty(shape), "... L D"), w=(np.empty((4, 8)), "D F"))
    except ValueError:
        return True
    return False
    # --8<-- [end:refused]


# --8<-- [start:layout]
def from_jax_layout(x):
    """[B, T, N, H] -> [B, N, T, H]: heads in front of tokens."""
    return np.swapaxes(x, 1, 2)
    # --8<-- [end:layout]


# --8<-- [start:equal_keys]
def with_equal_keys(seed=0):
    """The output where all keys are equal, and the mean of the values."""
    rng = np.random.default_rng(seed)
    q, v = rng.standard_normal((3, 4)), rng.standard_normal((5, 2))
    return attention_dense(q, np.tile(rng.standard_normal(4), (5, 1)), v), v.mean(axis=0)
    # --8<-- [end:equal_keys]


# --8<-- [start:shifted_keys]
def with_shifted_keys(seed=0):
    """The output, and the output with one vector added to every key."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, 4)) for n in (3, 5, 5))
    return attention_dense(q, k, v), attention_dense(q, k + rng.standard_normal(4), v)
    # --8<-- [end:shifted_keys]


# --8<-- [start:scores_of_writing]
def scores_of_writing(n):
    """Scores computed while n tokens are written: (with a cache, without)."""
    cached = sum(t for t in range(1, n + 1))
    again = sum(t * (t + 1) // 2 for t in range(1, n + 1))
    return cached, again
    # --8<-- [end:scores_of_writing]


# --8<-- [start:slope_of_attention]
def slope_of_attention(h=1e-5, seed=0):
    """(sum(dQ * x), its central difference) for a random direction x."""
    rng = np.random.default_rng(seed)
    q, k, v, do, x = (rng.standard_normal((n, 4)) for n in (3, 5, 5, 3, 3))
    dq, _, _ = attention_dense_vjp(q, k, v, do)
    loss = lambda q: np.sum(do * attention_dense(q, k, v))
    return np.sum(dq * x), (loss(q + h * x) - loss(q - h * x)) / (2 * h)
    # --8<-- [end:slope_of_attention]


# --8<-- [start:attention_bound]
U32 = 2.0**-24  # the largest relative error of one rounding to float32


def attention_float32(q, k, v):
    """softmax(q k^T / sqrt(D)) v with every step in float32."""
    s = (q @ k.T) * np.float32(1 / np.sqrt(q.shape[-1]))
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return (p @ v) / p.sum(axis=-1, keepdims=True)


def attention_bound(q, k, v):
    """Bound (5) on the error of `attention_float32`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (S, D), tau = k.shape, 1 / np.sqrt(k.shape[-1])
    s = tau * q @ k.T
    delta = (D + 1) * U32 * tau * (np.abs(q) @ np.abs(k).T).max()
    spread = (s.max(-1) - s.min(-1)).max()
    return 2 * (delta + (spread + S + 3) * U32) * np.abs(v).max()
    # --8<-- [end:attention_bound]


# --8<-- [start:standstill]
def standstill():
    """The first power of two at which adding 1 changes nothing in float32."""
    n = np.float32(1)
    while n + np.float32(1) != n:
        n = n * np.float32(2)
    return int(n)
    # --8<-- [end:standstill]


# --8<-- [start:mean_error]
def mean_error(n=1000, seed=0):
    """(relative error of a sequential float32 mean of positive numbers, its bound n u)."""
    x = np.random.default_rng(seed).random(n).astype(np.float32)
    exact = x.astype(np.float64).mean()
    return abs(np.cumsum(x)[-1] / np.float32(n) - exact) / exact, n * U32
    # --8<-- [end:mean_error]


# --8<-- [start:weight_error]
def weight_error(error=0.01, n=50, seed=0):
    """The largest factor by which a weight changes if every score moves by up to `error`."""
    s = 3 * np.random.default_rng(seed).standard_normal(n)
    up = np.where(np.arange(n) == 0, error, -error)  # the worst: one up, all others down
    return (softmax(s + up) / softmax(s))[0]
    # --8<-- [end:weight_error]


# --8<-- [start:orders]
def sums_in_all_orders(terms=(1e8, 1.0, -1e8)):
    """Every float32 result of adding the terms one after the other."""
    add = lambda order: float(np.cumsum(np.array(order, np.float32))[-1])
    return sorted({add(order) for order in permutations(terms)})
    # --8<-- [end:orders]


# --8<-- [start:rows_to_corner]
def rows_to_corner(d, corner):
    """The least number of rows of which a [d, d] product is above the corner, None if there is none."""
    intensity = lambda n: n * d / (d + 2 * n)
    if corner >= d / 2:  # what intensity tends to as n grows
        return None
    return next(n for n in range(1, d * d) if intensity(n) >= corner)
    # --8<-- [end:rows_to_corner]


# --8<-- [start:amdahl]
def amdahl(share, faster):
    """How much faster the whole gets if `share` of its time gets `faster` times faster."""
    return 1 / (1 - share + share / faster)
    # --8<-- [end:amdahl]


# --8<-- [start:tokens_a_second]
def tokens_a_second(weights, bits, bytes_a_second):
    """Tokens a second if every weight is read once for each token and nothing else takes time."""
    return bytes_a_second / (weights * bits / 8)
    # --8<-- [end:tokens_a_second]


# --8<-- [start:energy_corner]
def energy_corner(pj_a_byte, pj_an_operation):
    """Operations a byte at which arithmetic and memory take the same energy."""
    return pj_a_byte / pj_an_operation
    # --8<-- [end:energy_corner]


# --8<-- [start:sly]
def sly(q, k, v, causal=False):
    """Wrong only under a mask: it forgets the scale there."""
    return right(q * np.sqrt(q.shape[1]) if causal else q, k, v, causal)


def equals_the_definition_under_a_mask(f, rng):
    """Row by row, over the keys that the row sees."""
    q, k, v = draw(rng)
    rows = [right(q[i : i + 1], k[: i + 1], v[: i + 1])[0] for i in range(len(q))]
    return close(f(q, k, v, True), np.array(rows))
    # --8<-- [end:sly]


# --8<-- [start:shift_that_breaks]
def shift_that_breaks():
    """The least whole number that, added to a score of 0, makes exp overflow in float64."""
    with np.errstate(over="ignore"):
        return next(c for c in range(1, 1000) if np.isinf(np.exp(np.float64(c))))
    # --8<-- [end:shift_that_breaks]


# --8<-- [start:sensitive]
def sensitive(size=1e4):
    """By how much one rounding of a float32 score of this size changes a weight near one half, relatively."""
    s = np.array([size, size])
    up = s * np.array([1 + U32, 1])
    return softmax(up)[0] / softmax(s)[0] - 1
    # --8<-- [end:sensitive]
