"""ATLAS: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from tests.golden_runner import golden, run
from tests.laws import law_tests, rejects
from tests.memory import laws_atlas

globals().update(law_tests(laws_atlas))


@golden("atlas")
def test_atlas_golden_ref(case):
    run(case, ref.atlas)


A = ref.atlas
Q, V, G = np.ones((5, 3)), np.ones((5, 2)), np.full(5, 0.5)
W = A.DeepMemory(np.ones((1, 3, 4)), np.ones((1, 4, 2)))
P = A.init_atlas(0, 4, heads=2)


def scan(**options):
    return A.omega_scan(Q, Q, V, **{"eta": G, "alpha": G, **options})


def update(**options):
    rates = {"lr": G[None], "decay": G[None], "momentum": G[None], **options}
    return A.deep_memory_update(Q[None], V[None], rates.pop("weights0", W), **rates)


BAD = {
    "vector": (lambda: A.newton_schulz(np.ones(3)), r"g must have shape \[\.\.\., m, n\]"),
    "steps": (lambda: A.newton_schulz(Q, steps=-1), "steps >= 0"),
    "floor": (lambda: A.newton_schulz(Q, eps=0), "eps > 0"),
    "cotangent": (lambda: A.newton_schulz_vjp(Q, V), r"dx\.shape\[1\] = 2"),
    "degree": (lambda: A.poly_features(Q, degree=0), "degree must be at least 1"),
    "mode": (lambda: A.poly_features(Q, mode="fourier"), "mode must be one of"),
    "coefs": (lambda: A.poly_features(Q, coefs=np.ones(2)), "coefs"),
    "negative": (lambda: A.poly_features(Q, coefs=-np.ones(3)), "coefs must not be negative"),
    "coefs_mode": (lambda: A.poly_features(Q, mode="identity", coefs=np.ones(3)), "coefs weigh the degrees"),
    "window": (lambda: scan(window=0), "window and chunk must be at least 1"),
    "chunk": (lambda: scan(chunk=0), "window and chunk must be at least 1"),
    "eta": (lambda: scan(eta=G + 1), r"eta must be in \[0, 1\]"),
    "alpha": (lambda: scan(alpha=-G), r"alpha must be in \[0, 1\]"),
    "theta": (lambda: scan(theta=G * np.nan), r"theta must be in \[0, 1\]"),
    "gamma": (lambda: scan(gamma=G + 1), r"gamma must be in \[0, 1\]"),
    "gamma_shape": (lambda: scan(gamma=np.ones(4)), "gamma"),
    "momentum_lr": (lambda: scan(momentum_lr="both"), "momentum_lr must be"),
    "read": (lambda: scan(read="during"), "read must be"),
    "memory0": (lambda: scan(memory0=np.ones((3, 2))), r"memory0\.shape\[0\] = 3, but must be 2"),
    "momentum0": (lambda: scan(momentum0=np.ones((2, 2))), r"momentum0\.shape\[1\] = 2, but must be 3"),
    "tail0": (lambda: scan(window=3, tail0=(Q[:1], V[:1], G[:1])), r"tail0\[0\]\.shape\[0\] = 1"),
    "values": (lambda: A.omega_scan(Q, Q, np.ones((4, 2)), eta=G, alpha=G), r"v\.shape\[0\] = 4"),
    "dy": (lambda: A.omega_scan_vjp(Q, Q, V, Q, eta=G, alpha=G), r"dy\.shape\[1\] = 3"),
    "uneven": (lambda: update(chunk=2), "chunk must divide the length T=5"),
    "deep_loss": (lambda: update(loss="huber"), "loss must be"),
    "decay": (lambda: update(decay=G[None] + 1), r"decay must be in \[0, 1\]"),
    "deep_shape": (lambda: update(weights0=A.DeepMemory(W.w_in, W.w_in)), r"weights0\.w_out"),
    "deep_window": (
        lambda: A.deep_memory_scan(
            Q[None], Q[None], V[None], W, lr=G[None], decay=G[None], momentum=G[None], window=0
        ),
        "window must be at least 1",
    ),
    "dot_window": (lambda: A.dot_memory(Q, Q, V, window=0), "window must be at least 1"),
    "dot_loss": (lambda: A.dot_memory(Q, Q, V, window=1, loss="l1"), "loss must be"),
    "heads": (lambda: A.atlas_layer(np.ones((1, 5, 4)), P, heads=3), "b_gates"),
    "divisor": (
        lambda: A.atlas_layer(np.ones((1, 5, 4)), P._replace(b_gates=np.zeros(12)), heads=3),
        "heads must divide the width 4, got 3",
    ),
    "init": (lambda: A.init_atlas(0, 4, heads=3), "heads must divide"),
    "width": (lambda: A.atlas_layer(np.ones((1, 5, 3)), P, heads=2), "w_q"),
}

test_atlas_rejects_bad_input = rejects(BAD)
