"""Solutions of the exercises in the opening chapters: shown there, run by test_opening.py."""

import numpy as np

from ref.blocks.attention import attention_dense, attention_dense_vjp
from ref.blocks.masks import visible
from ref.dims import dims


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
