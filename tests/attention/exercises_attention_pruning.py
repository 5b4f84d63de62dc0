"""The exercises of the chapter on attention pruning: a stub for the reader, what its solution must do, a
solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:observe]
import numpy as np


def observe(avg, seen, probs):
    """(average, number of examples) after a batch: avg [H, n, n] is the average
    over `seen` examples so far, probs [b, H, n, n] the attention of b more. As
    it stands the last batch weighs as much as all before it.
    """
    if len(probs) == 0:
        return avg, seen
    return (avg + np.mean(probs, axis=0)) / 2, seen + len(probs)
    # --8<-- [end:observe]


# --8<-- [start:solve_observe]
def solve_observe(avg, seen, probs):
    new = seen + len(probs)
    return (seen * avg + np.sum(probs, axis=0)) / max(new, 1), new
    # --8<-- [end:solve_observe]


def check_observe(observe):
    """However the examples are cut into batches, the plain mean comes out."""
    from hypothesis import given
    from hypothesis import strategies as st

    @given(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    def batches_do_not_matter(sizes):
        probs = np.arange(1.0, 1 + sum(sizes) * 4).reshape(-1, 1, 2, 2)
        avg, seen, at = np.zeros((1, 2, 2)), 0, 0
        for b in sizes:
            avg, seen = observe(avg, seen, probs[at : at + b])
            at += b
        assert seen == len(probs), f"batches of {sizes} hold {len(probs)} examples, not {seen}"
        want = probs.mean(axis=0) if len(probs) else np.zeros((1, 2, 2))
        # a dozen numbers up to 48, a few roundings each
        assert np.allclose(avg, want, rtol=0, atol=1e-11), (
            f"after batches of {sizes} the first cell averages {want[0, 0, 0]:g}, not {avg[0, 0, 0]:g}"
        )

    batches_do_not_matter()


# --8<-- [start:keep]
import numpy as np


def keep(avg, p, visible):
    """The mask bool [H, n, m] of the cells above the p-quantile (nearest rank)
    of avg [H, n, m], over all heads together; a query may see the keys of
    visible, bool [n, m]. As it stands p counts cells that nobody sees.
    """
    tau = np.percentile(avg, 100 * p, method="nearest")
    return (avg > tau) & visible
    # --8<-- [end:keep]


# --8<-- [start:solve_keep]
def solve_keep(avg, p, visible):
    tau = np.percentile(avg[:, visible], 100 * p, method="nearest")
    return (avg > tau) & visible
    # --8<-- [end:solve_keep]


def check_keep(keep):
    """The library's mask where the future does not count."""
    from ref.attention.attention_pruning import pruning_mask

    visible = np.tri(6, dtype=bool)
    avg = np.random.default_rng(0).random((2, 6, 6)) * visible
    for p in (0.0, 0.3, 0.5, 0.9):
        want = pruning_mask(
            avg[None], p, bounds="exact", count_masked=False, visible=visible, empty_rows="zero"
        )[0]
        got = keep(avg, p, visible)
        assert np.array_equal(got, want), (
            f"p = {p}: {np.sum(want)} of {2 * visible.sum()} visible cells stay, not {np.sum(got)}"
        )


# --8<-- [start:tiles]
import numpy as np


def tiles(mask, b):
    """bool [T, T]: the b x b tiles of mask [n, n] that a kernel must visit; n is
    a multiple of b. As it stands a tile is visited only if it is kept whole.
    """
    T = len(mask) // b
    return mask.reshape(T, b, T, b).all(axis=(1, 3))
    # --8<-- [end:tiles]


# --8<-- [start:solve_tiles]
def solve_tiles(mask, b):
    T = len(mask) // b
    return mask.reshape(T, b, T, b).any(axis=(1, 3))
    # --8<-- [end:solve_tiles]


def check_tiles(tiles):
    """No kept cell is lost, no tile is visited in vain."""
    from ref.attention.attention_pruning import to_block_mask

    for seed, b, share in ((0, 2, 0.1), (1, 4, 0.1), (2, 4, 0.5), (3, 8, 0.02)):
        mask = np.random.default_rng(seed).random((8, 8)) < share
        want = to_block_mask(mask[None], None, block_q=b, block_k=b)[0]
        got = tiles(mask, b)
        assert np.array_equal(got, want), (
            f"{mask.sum()} kept cells lie in {want.sum()} tiles of {b} x {b}, not in {np.sum(got)}"
        )
