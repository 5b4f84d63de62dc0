"""HiLo: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from tests.golden_runner import golden, graded, run, run_backward
from tests.laws import law_tests, rejects
from tests.vision import laws_hilo

globals().update(law_tests(laws_hilo))

S = ref.hilo


def turned(params):
    """The linear weights transposed: the golden files store [out, in]."""
    return S.HiLoParams(*(x if x is None or x.ndim < 2 else x.T for x in params))


BUILD = {"params": lambda raw: turned(S.HiLoParams(**{n: raw.get(n) for n in S.HiLoParams._fields}))}
BUILD |= {name: lambda w: w.T for name in ("w_qkv", "w_q", "w_kv", "w_proj")}


def stored(case, result):
    """Gradients of parameters in the golden's layout."""
    return (result[0], turned(result[1])) if case.meta["fn"] == "hilo_attention_backward" else result


@golden("hilo")
def test_hilo_golden_ref(case):
    run(case, S, build=BUILD, outs=stored)


@graded("hilo", always=("hilo_attention",))
def test_hilo_golden_gradients_ref(case):
    run_backward(case, S, build=BUILD, outs={"params": turned})


X, P = laws_hilo.image(0), laws_hilo.layer(0)
LAYER = lambda x=X, p=P, **o: S.hilo_attention(x, p, **{"num_heads": 4, **o})
IMG, CFG = np.ones((1, 32, 32, 3)), S.LITv2Config(4, (1, 1, 1, 1), (1, 1, 2, 2))
NET = S.init_litv2(np.random.default_rng(0), CFG)
BAD = {
    "sides": (lambda: LAYER(x=X[:, :3]), r"window must divide the sides of x, got 2 for 3 x 6; pad=True"),
    "window": (lambda: LAYER(window=0), "window must be at least 1, got 0"),
    "heads": (lambda: LAYER(num_heads=3), "num_heads must divide the width 8"),
    "no_heads": (lambda: LAYER(num_heads=0), "num_heads must divide"),
    "alpha": (lambda: LAYER(alpha=1.1), r"alpha must be in \[0, 1\], got 1.1"),
    "nan_alpha": (lambda: LAYER(alpha=np.nan), r"alpha must be in \[0, 1\]"),
    "split": (lambda: LAYER(alpha=0.25), r"w_qkv\.shape\[1\] = 12, but must be 18"),
    "channels": (lambda: LAYER(x=X[..., :4], num_heads=2), r"w_qkv\.shape\[0\] = 8, but axis C is 4"),
    "map": (lambda: LAYER(x=X[0]), "x must have shape"),
    "cotangent": (
        lambda: S.hilo_attention_backward(X[:, :2], X, P, num_heads=4),
        r"dy\.shape\[1\] = 2, but axis H is 4",
    ),
    "hifi": (lambda: S.hifi_attention(X, *P[6:], num_heads=3, window=2), "num_heads must divide the width 4"),
    "hifi_columns": (
        lambda: S.hifi_attention(X, P.w_qkv[:, :10], None, *P[8:], num_heads=1, window=2),
        r"w_qkv\.shape\[1\] = 10, but must be 9",
    ),
    "lofi_queries": (
        lambda: S.lofi_attention(X, P.w_q[:, :2], None, *P[2:6], num_heads=2, window=2),
        r"w_q\.shape\[1\] = 2, but must be 4",
    ),
    "hifi_projection": (
        lambda: S.hifi_attention(X, *P[6:8], P.w_hproj[:2], None, num_heads=2, window=2),
        r"w_proj\.shape\[0\] = 2, but must be 4",
    ),
    "hifi_window": (lambda: S.hifi_attention(X, *P[6:], num_heads=2, window=4), "window must divide"),
    "lofi": (lambda: S.lofi_attention(X, *P[:6], num_heads=2, window=5), "window must divide"),
    "pool": (lambda: S.avg_pool_tokens(X, 3), "window must divide"),
    "offsets": (
        lambda: S.deformable_token_merge(X, np.zeros((2, 2, 3, 3, 2)), np.ones((5, 8, 2, 2)), np.ones(5)),
        r"offsets\.shape\[3\] = 3, but must be 4",
    ),
    "cost": (lambda: S.hilo_flops(4, 4, 8, num_heads=3, window=2, alpha=0.5), "num_heads must divide"),
    "config": (lambda: S.litv2_config("t"), "name must be one of s, m, b, got 't'"),
    "image": (lambda: S.litv2_forward(IMG[:, :30], NET, CFG), "sides that 4 divides, got 30 x 32"),
    "odd": (lambda: S.litv2_forward(IMG[:, :20], NET, CFG), "window must divide the sides of x, got 2 for 5"),
    "colours": (lambda: S.litv2_forward(IMG[..., :1], NET, CFG), "but must be 3"),
}

test_hilo_rejects_bad_input = rejects(BAD)


def test_hilo_edges():
    """A single pixel, an empty batch, huge logits, and a NaN, which the windows keep to themselves."""
    one = LAYER(x=X[:, :1, :1], pad=True)
    v = X[:, 0, 0] @ P.w_kv[:, 4:] + P.b_kv[4:]
    np.testing.assert_allclose(one[:, 0, 0, 4:], v @ P.w_lproj + P.b_lproj, rtol=1e-12)
    assert LAYER(x=X[:0]).shape == (0, 4, 6, 8)
    assert np.isfinite(LAYER(x=1e6 * X)).all()
    bad, p = X.copy(), laws_hilo.layer(0, alpha=0.0)
    bad[0, 0, 0, 0] = np.nan
    seen = np.isnan(LAYER(x=bad, p=p, alpha=0.0)).any(axis=-1)
    assert seen[0, :2, :2].all()
    assert seen.sum() == 4
