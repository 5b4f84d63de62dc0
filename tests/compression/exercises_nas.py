"""The exercises of the chapter on architecture search: stubs for the reader, what their solutions must do,
solutions.

The page runs `check_<name>` on the reader's `<name>`; tests/test_exercises.py asserts that every stub fails
its check and that every `solve_<name>` passes.
"""

from itertools import pairwise

# --8<-- [start:slice_gradient]
import numpy as np


def slice_gradient(x, w, grad_out):
    """Gradient of the whole shared weight w [out, in] when a step used its front
    slice: x [T, i], grad_out [T, o], y = x w[:o, :i]^T. As it stands it is the
    slice's alone.
    """
    return grad_out.T @ x
    # --8<-- [end:slice_gradient]


# --8<-- [start:solve_slice_gradient]
def solve_slice_gradient(x, w, grad_out):
    grad = np.zeros(w.shape)
    grad[: grad_out.shape[1], : x.shape[1]] = grad_out.T @ x
    return grad
    # --8<-- [end:solve_slice_gradient]


def check_slice_gradient(slice_gradient):
    """The library's gradient: as large as the weight, 0 outside of the slice."""
    from ref.compression.nas import super_linear_vjp

    rng = np.random.default_rng(0)
    for o, i in ((2, 3), (1, 5), (4, 5)):
        x, w, g = rng.standard_normal((6, i)), rng.standard_normal((4, 5)), rng.standard_normal((6, o))
        got = np.asarray(slice_gradient(x, w, g))
        assert got.shape == w.shape, f"the optimiser needs a gradient of shape {w.shape}, not {got.shape}"
        assert not got[o:].any(), f"rows from {o} on were not used, but have a gradient"
        assert not got[:, i:].any(), f"columns from {i} on were not used, but have a gradient"
        assert np.allclose(got, super_linear_vjp(x, w, None, g)[1], rtol=0, atol=1e-12), "the slice is wrong"


# --8<-- [start:synflow]
def synflow(weights):
    """Synflow's score of a ReLU network without biases: weights [out, in], first to
    last. As it stands it adds up sizes of weights and knows nothing of their order.
    """
    return sum(abs(w).sum() for w in weights)
    # --8<-- [end:synflow]


# --8<-- [start:solve_synflow]
def solve_synflow(weights):
    flow = np.ones(weights[0].shape[1])
    for w in weights:
        flow = np.abs(w) @ flow  # all positive: no ReLU is off
    return len(weights) * flow.sum()  # each layer's share is R
    # --8<-- [end:solve_synflow]


def check_synflow(synflow):
    """The library's score, whatever the depth and the signs."""
    from ref.compression.nas import MlpParams, zero_cost_score

    rng = np.random.default_rng(0)
    for sizes in ((3, 2), (4, 5, 3), (2, 6, 6, 2)):
        w = tuple(rng.standard_normal((b, a)) for a, b in pairwise(sizes))
        params = MlpParams(w, tuple(np.zeros(len(m)) for m in w))
        want = zero_cost_score(params, np.ones((1, sizes[0])), np.zeros(1, int), kind="synflow")
        got = synflow(w)
        assert abs(got - want) < 1e-9 * want, f"layers {sizes}: the score is {want:.4f}, not {got:.4f}"


# --8<-- [start:front]
def front(points):
    """Indices of the points (loss, latency) that no other point beats in both
    coordinates, or in one and equals in the other. As it stands only the best of
    each coordinate is found.
    """
    return sorted({min(range(len(points)), key=lambda i: points[i][c]) for c in (0, 1)})
    # --8<-- [end:front]


# --8<-- [start:solve_front]
def solve_front(points):
    def beats(p, q):
        return p[0] <= q[0] and p[1] <= q[1] and (p[0] < q[0] or p[1] < q[1])

    return [i for i, q in enumerate(points) if not any(beats(p, q) for p in points)]
    # --8<-- [end:solve_front]


def check_front(front):
    """The library's front, on drawn points with ties."""
    from hypothesis import given
    from hypothesis import strategies as st

    from ref.compression.nas import pareto_front

    pairs = st.tuples(st.integers(0, 5), st.integers(0, 5))

    @given(st.lists(pairs, min_size=1, max_size=7))
    def no_other_is_better(points):
        got, want = sorted(front(points)), pareto_front(points).tolist()
        assert got == want, f"of {points} the front is {want}, not {got}"

    no_other_is_better()
