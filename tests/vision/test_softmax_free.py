"""SOFT: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from tests.golden_runner import call_args, compare_gradients, golden, graded, run, run_backward
from tests.laws import law_tests, rejects
from tests.vision import laws_softmax_free

globals().update(law_tests(laws_softmax_free))

S = ref.softmax_free


def turned(params):
    """The linear weights transposed: the golden files store [out, in]."""
    return params._replace(w_q=params.w_q.T, w_v=params.w_v.T, w_out=params.w_out.T)


BUILD = {"params": lambda raw: turned(S.SoftParams(**{n: raw.get(n) for n in S.SoftParams._fields}))}


def stored(case, result):
    """Gradients of parameters in the golden's layout."""
    return (result[0], turned(result[1])) if case.meta["fn"] == "soft_layer_backward" else result


@golden("softmax_free")
def test_softmax_free_golden_ref(case):
    run(case, S, build=BUILD, outs=stored)


@graded("softmax_free", always=("newton_inverse",))
def test_softmax_free_golden_gradients_ref(case):
    """The stored gradients, by ref's own backward passes; that of the inverse takes the inverse."""
    if case.meta["fn"] == "newton_inverse":
        inverse, (cotangent,) = S.newton_inverse(**call_args(case, S.newton_inverse)), case.meta["cotangents"]
        compare_gradients(case, {"A": S.newton_inverse_vjp(inverse, case[cotangent])})
    else:
        run_backward(case, S, build=BUILD, outs={"params": turned})


P = laws_softmax_free.layer(0)
X, A, Q, V = np.ones((1, 12, 8)), np.eye(3), np.ones((12, 4)), np.ones((12, 2))
AT = {"height": 4, "width": 3, "num_heads": 2, "ratio": 2, "conv_size": 3}
LAYER = lambda x=X, p=P, **o: S.soft_layer(x, p, **{**AT, **o})
BAD = {
    "map": (lambda: LAYER(height=5), "height \\* width must be the number of tokens 12, got 5 x 3"),
    "heads": (lambda: LAYER(num_heads=3), "num_heads must divide the width 8"),
    "no_heads": (lambda: LAYER(num_heads=0), "num_heads must divide"),
    "ratio": (lambda: LAYER(ratio=4), r"ratio must be in 1\.\.3"),
    "no_ratio": (lambda: LAYER(ratio=0), r"ratio must be in 1\.\.3"),
    "even": (lambda: LAYER(conv_size=2), "conv_size must be odd, got 2"),
    "filter": (lambda: LAYER(conv_size=5), r"w_local\.shape\[2\] = 3, but must be 5"),
    "anchor_kernel": (lambda: LAYER(ratio=3), r"w_landmark\.shape\[2\] = 2, but must be 3"),
    "nan": (lambda: LAYER(x=X * np.nan), "x must be finite"),
    "weights": (lambda: LAYER(p=P._replace(w_q=P.w_q[:4])), r"w_q\.shape\[0\] = 4"),
    "backward": (lambda: S.soft_layer_backward(X, X, P, **{**AT, "ratio": 4}), r"ratio must be in 1\.\.3"),
    "square": (lambda: S.newton_inverse(A[:2]), r"A\.shape\[1\] = 3, but axis m is 2"),
    "infinite": (lambda: S.newton_inverse(A + np.inf), "A must be finite"),
    "iters": (lambda: S.newton_inverse(A, iters=0), "iters must be at least 1, got 0"),
    "ridge": (lambda: S.newton_residuals(A, ridge=-0.1), "ridge must not be negative"),
    "init": (lambda: S.newton_inverse(A, init="trace"), "init must be one of row_sum, halving, got 'trace'"),
    "kernel": (lambda: S.gaussian_kernel(Q, V), r"b\.shape\[1\] = 2, but axis d is 4 in a"),
    "attention": (lambda: S.soft_attention(Q, Q[:3], V[:5]), r"v\.shape\[0\] = 5"),
    "values": (lambda: S.soft_attention(Q, Q[:3], V * np.inf), "v must be finite"),
    "anchors": (lambda: S.soft_attention(Q, Q[:3] * np.nan, V), "q_tilde must be finite"),
    "image": (lambda: S.soft_forward(np.ones((1, 32, 32, 1)), None, None), "but must be 3"),
}

test_softmax_free_rejects_bad_input = rejects(BAD)


def test_softmax_free_edges():
    """A single token, no tokens, an empty batch, equal and very distant tokens."""
    one = S.soft_attention(Q[:1], Q[:1], V[:1], ridge=0.0)
    np.testing.assert_allclose(one, V[:1], rtol=1e-12)  # K = A = 1
    assert S.soft_attention(Q[:0], Q[:3], V[:0]).shape == (0, 2)
    assert LAYER(x=X[:0]).shape == (0, 12, 8)
    far = 1e6 * np.arange(12.0)[:, None] * Q
    for normalize in (False, True):  # K = A = I
        y = S.soft_attention(far, far, V, ridge=0.0, normalize=normalize)
        np.testing.assert_allclose(y, V, rtol=1e-12)
    # the released step, 2 over the row sum squared, falls to 0 here and stays there
    assert not S.newton_inverse(A, ridge=0.0, normalize=True, batch_alpha=True).any()
    assert not S.newton_inverse(np.zeros((3, 3)), ridge=0.0).any()
    assert np.isfinite(S.soft_attention(Q, Q[:3], V, normalize=True)).all()  # A of rank 1, no ridge
