"""The exercises of the chapter on MCUFormer: a stub for the reader, what its solution must do, a solution.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""


# --8<-- [start:largest_rank]
def largest_rank(n_in, n_out, factors):
    """The largest rank at which two or three factors hold fewer weights than the
    dense layer, 0 if none does. It forgets the factor [R, R] in the middle.
    """
    return (n_in * n_out - 1) // (n_in + n_out)
    # --8<-- [end:largest_rank]


# --8<-- [start:solve_largest_rank]
def solve_largest_rank(n_in, n_out, factors):
    weights = lambda R: R * (n_in + n_out) + (R * R if factors == 3 else 0)
    R = 0
    while weights(R + 1) < n_in * n_out:
        R += 1
    return R
    # --8<-- [end:solve_largest_rank]


def check_largest_rank(largest_rank):
    """The sizes of the factors that the library makes, at that rank and one above."""
    from ref.devices.mcuformer import LowRank, fold_factors, svd_init

    for n_in, n_out in ((10, 10), (12, 36), (12, 48), (1, 5)):
        dense = np.ones((n_out, n_in))
        for factors in (2, 3):
            R = largest_rank(n_in, n_out, factors)
            for rank, fewer in ((R, True), (R + 1, False)):
                three = LowRank(*svd_init(dense, rank), None) if rank else ()
                held = three if factors == 3 or not rank else fold_factors(three)
                size = sum(f.size for f in held if f is not None)
                assert (size < dense.size) == fewer, (
                    f"{n_in} to {n_out}, {factors} factors of rank {rank}: {size} weights, dense {dense.size}"
                )


# --8<-- [start:naive_peak]
def naive_peak(N, E, h, F, S):
    """Bytes alive at the peak of the naive schedule in int8: N tokens of width E, h
    heads of 64, F hidden, an image of S x S x 3. It takes the scores for the
    largest thing there is, and counts them once.
    """
    return N * E + N * 64 * h + h * N * N
    # --8<-- [end:naive_peak]


# --8<-- [start:solve_naive_peak]
def solve_naive_peak(N, E, h, F, S):
    patches = 3 * S * S + N * E
    softmax = N * E + N * 64 * h + 2 * h * N * N  # tokens, values, scores and weights
    gelu = N * E + 2 * N * F
    return max(patches, softmax, gelu)
    # --8<-- [end:solve_naive_peak]


def check_naive_peak(naive_peak):
    """The most of all operators of the schedule, for networks of the published space."""
    from ref.devices.mcuformer import SubnetConfig, peak_memory, token_count

    for patch in (16, 20, 24, 28, 32):
        for E, h, ratio in ((168, 4, 3.5), (192, 3, 4.0), (216, 4, 4.0)):
            net = SubnetConfig(E, (h,), (ratio,))
            want = peak_memory(net, img=240, patch=patch, rank_ratio=0.9, schedule="naive")
            N = token_count(240, patch)
            got = naive_peak(N, E, h, int(E * ratio), 240)
            assert got == want.bytes, (
                f"{N} tokens of width {E}, {h} heads: {want.bytes:,} bytes at {want.op}, not {got:,}"
            )


# --8<-- [start:slopes]
import numpy as np


def slopes(rho, patch, error):
    """(slope by rank ratio, slope by patch size) of the error of the spaces tried,
    arrays [n] each. It draws a line through each coordinate by itself.
    """
    line = lambda x: np.polyfit(x, error, 1)[0]
    return line(rho), line(patch)
    # --8<-- [end:slopes]


# --8<-- [start:solve_slopes]
def solve_slopes(rho, patch, error):
    plane = np.column_stack([np.ones(len(rho)), rho, patch])
    return tuple(np.linalg.lstsq(plane, error, rcond=None)[0][1:])
    # --8<-- [end:solve_slopes]


def check_slopes(slopes):
    """The search's own slopes, on spaces where patches grow with the rank."""
    from ref.devices.mcuformer import evolution_step

    rng = np.random.default_rng(0)
    for _ in range(5):
        rho = rng.uniform(0.4, 0.95, 5)
        patch = 16 + 24 * (rho - 0.4) + rng.uniform(-3, 3, 5)
        error = 30 - 20 * rho + 1.5 * patch + rng.standard_normal(5) / 10
        points = np.column_stack([rho, patch, 100 - error, np.ones(5)])
        want = evolution_step(points, rho=0.7, patch=24).w_error
        got = np.asarray(slopes(rho, patch, error), float)
        assert np.allclose(got, want, rtol=1e-8, atol=1e-8), (
            f"the plane rises by {want[0]:.2f} with the rank and {want[1]:.2f} with the patch, "
            f"not {got[0]:.2f} and {got[1]:.2f}"
        )
