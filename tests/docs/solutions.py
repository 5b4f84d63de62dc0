"""Solutions of the exercises in the opening chapters: shown there, run by test_opening.py."""

import numpy as np

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
