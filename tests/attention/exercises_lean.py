"""The exercises of the chapter on LeanAttention: a stub for the reader, what its solution must do, a
solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

# --8<-- [start:combine]
import numpy as np


def combine(o, lse):
    """The output over all keys from those over parts of them: o [parts, D], lse
    [parts], the log of each part's sum of exponentials. As it stands every part
    has the same say.
    """
    return np.mean(o, axis=0)
    # --8<-- [end:combine]


# --8<-- [start:solve_combine]
def solve_combine(o, lse):
    weight = np.exp(lse - lse.max())  # the largest is 1, so nothing overflows
    return weight @ o / weight.sum()
    # --8<-- [end:solve_combine]


def check_combine(combine):
    """Parts of any sizes, combined, give the softmax over all keys, also where scores are large."""
    from hypothesis import given
    from hypothesis import strategies as st

    @given(
        st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=3), min_size=1, max_size=3), st.booleans()
    )
    def parts_make_the_whole(parts, large):
        parts = [np.array(s, float) + 900.0 * large for s in parts]
        values, v, outputs = np.arange(9.0), 0, []
        for s in parts:
            p = np.exp(s - s.max())
            outputs.append((p @ values[v : v + len(s)] / p.sum(), s.max() + np.log(p.sum())))
            v += len(s)
        s = np.concatenate(parts)
        p = np.exp(s - s.max())
        want = p @ values[: len(s)] / p.sum()
        with np.errstate(all="ignore"):
            got = combine(np.array([[o] for o, _ in outputs]), np.array([lse for _, lse in outputs]))
        # values below 9; lse near 900 is off by 1e-13, and its exponential by as much of itself
        assert np.allclose(got, want, rtol=0, atol=1e-11), (
            f"combined {got}, softmax over all keys gives {want:.6g}"
        )

    parts_make_the_whole()


# --8<-- [start:makespan]
def makespan(outputs, tiles, workers, parts):
    """Tiles that the busiest worker computes when each output's tiles are cut
    in `parts` and parts are dealt out in rounds. As it stands it forgets that
    neither rounds nor tiles come in halves.
    """
    return outputs * parts / workers * tiles / parts
    # --8<-- [end:makespan]


# --8<-- [start:solve_makespan]
def solve_makespan(outputs, tiles, workers, parts):
    rounds, tiles_a_part = -(-outputs * parts // workers), -(-tiles // parts)
    return rounds * tiles_a_part
    # --8<-- [end:solve_makespan]


def check_makespan(makespan):
    """The library's schedule of a fixed split."""
    from ref.attention.lean import decode_makespan

    for outputs, tiles, workers, parts in (
        (108, 3, 108, 1),
        (108, 3, 108, 2),
        (56, 64, 108, 4),
        (1, 40, 9, 8),
    ):
        want = decode_makespan(
            [tiles], outputs, block_n=1, num_workers=workers, method="flash_decoding", num_splits=parts
        )["makespan"]
        got = makespan(outputs, tiles, workers, parts)
        assert got == want, f"{outputs = }, {tiles = }, {workers = }, {parts = } take {want} tiles, not {got}"
