"""ViDiT-Q: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from tests.compression import laws_vidit_q
from tests.golden_runner import golden, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_vidit_q))
V = ref.vidit_q


@golden("vidit_q")
def test_vidit_q_golden_ref(case):
    run(case, V)


X, W = laws_vidit_q.tokens(0)
A = V.calibrate_act_max(X[None])
NET = V.init_dit(np.random.default_rng(0), laws_vidit_q.CFG)
P8 = V.quant_params(X, bits=8)
PLAN = {"blocks.0.attn.q": (4, 8)}
TABLE, HALVES = laws_vidit_q.rows_of(0), laws_vidit_q.RANGES
BIG = V.QParams(np.ones((1, 1)), np.zeros((1, 1)), 0, 2**16 - 1)
BAD = {
    "bits_low": (lambda: V.quant_params(X, bits=1), r"bits must be in 2\.\.16"),
    "bits_high": (lambda: V.fake_quant(X, bits=17), r"bits must be in 2\.\.16"),
    "bits_half": (lambda: V.fake_quant(X, bits=2.5), r"bits must be in 2\.\.16"),
    "nan": (lambda: V.quant_params(X * np.nan, bits=8), "x must be finite"),
    "empty": (lambda: V.quant_params(X[:0], bits=8), "groups not empty"),
    "empty_token": (lambda: V.quant_params(X[..., :0], bits=8, granularity="token"), "groups not empty"),
    "empty_pool": (
        lambda: V.quant_params(X[:0], bits=8, granularity="token", pool_batch=True),
        "groups not empty",
    ),
    "granularity": (lambda: V.quant_params(X, bits=8, granularity="group"), "granularity must be one of"),
    "token": (lambda: V.quant_params(W, bits=8, granularity="token"), r"x must have shape \[B, N, C\]"),
    "channel": (lambda: V.quant_params(X, bits=8, granularity="channel"), r"x must have shape \[out, in\]"),
    "overflow": (lambda: V.int_matmul(np.ones((1, 4), int), BIG, np.ones((1, 4), int), BIG), "beyond int32"),
    "inner": (lambda: V.int_matmul(X, P8, W[:, :4], P8), r"qw\.shape\[1\] = 4"),
    "momentum": (lambda: V.update_act_max(None, X, momentum=1.5), r"momentum in \[0, 1\]"),
    "no_batch": (lambda: V.calibrate_act_max(X[None][:0]), "at least one batch"),
    "no_static_batch": (lambda: V.calibrate_act_params(X[None][:0], bits=8), "at least one batch"),
    "no_token": (lambda: V.dynamic_channel_scale(X[:, :0], W, alpha=0.5), "x must hold a token"),
    "bias": (lambda: V.quantized_linear(X, W, np.ones(4)), r"b\.shape\[0\] = 4"),
    "scale": (lambda: V.quantized_linear(X, W, None, scale=A[:4]), r"scale\.shape\[0\] = 4"),
    "scale_zero": (lambda: V.quantized_linear(X, W, None, scale=0 * A), "must be positive"),
    "class": (
        lambda: V.dit_forward(np.ones((1, 4, 4, 1)), 0, [4], NET, laws_vidit_q.CFG),
        r"y must be in 0\.\.3",
    ),
    "steps_left": (lambda: V.published_plan(laws_vidit_q.CFG, 20), r"steps_left must be in 0\.\.19"),
    "alpha": (lambda: V.channel_scale(A, W, alpha=1.5), r"alpha must be in \[0, 1\]"),
    "mask_alpha": (lambda: V.channel_mask(A, W, alpha=-0.1), r"alpha must be in \[0, 1\]"),
    "act_max": (lambda: V.channel_scale(0 * A, W, alpha=0.5), "act_max must be positive"),
    "zero_column": (lambda: V.channel_scale(A, W * (np.arange(16) > 0), alpha=0.5), "or NaN: channel 0"),
    "both": (lambda: V.quantized_linear(X, W, None, scale=A, mask=A), "scale or mask, not both"),
    "width": (lambda: V.quantized_linear(X, W[:, :4], None), r"w\.shape\[1\] = 4"),
    "block": (lambda: V.hadamard_transform(X, block=3), "block must divide the 16 channels"),
    "order": (lambda: V.hadamard_matrix(22), r"n = 2\^k"),
    "signs": (lambda: V.hadamard_transform(X, signs=np.ones(4)), r"signs\.shape\[0\] = 4"),
    "gap": (lambda: V.timestep_range(3, ((0, 400), (501, 1000))), "one after the other"),
    "short": (lambda: V.timestep_range(3, ((0, 999),)), r"cover 0\.\.1000"),
    "step": (lambda: V.timestep_range(1001, HALVES), r"t must be in 0\.\.1000"),
    "unseen": (
        lambda: V.calibrate(lambda s, project: project("a", X, W.T, 0), [(3, 0)], ranges=HALVES, alpha=0.5),
        "a step of every range",
    ),
    "layer": (lambda: V.quantize_dit(NET, None, {"blocks.9.attn.q": (8, 8)}), r"unknown layers \['blocks.9"),
    "plans": (lambda: V.quantize_dit(NET, None, (PLAN, PLAN)), "each of 1 ranges"),
    "metric": (lambda: V.sensitivity(lambda p: 0, {"a": W}, {"g": ["a"]}, {}, bits=(4,)), "for group 'g'"),
    "budget": (lambda: V.allocate_bits(TABLE, budget_bits=3), "budget_bits must be at least 4"),
    "candidate": (lambda: V.allocate_bits(TABLE, budget_bits=8, candidates=(2, 4)), r"table hold \(2, 4\)"),
    "dim": (lambda: V.rotation_for(0, 0), "dim must be at least 1"),
}  # fmt: skip

test_vidit_q_rejects_bad_input = rejects(BAD)


def test_vidit_q_edges():
    """Constant zeros, one token, one sign only, an empty batch, other dtypes, a step below the floor."""
    zero = V.quant_params(np.zeros((1, 2, 3)), bits=8, granularity="token")
    assert (zero.delta == 1e-6).all()
    assert not V.fake_quant(np.zeros((1, 2, 3)), bits=8, granularity="token").any()
    positive = np.array([[[1.0, 2.0, 3.0]]])
    assert V.quant_params(positive, bits=8).zero == 0
    negative = V.quant_params(-positive, bits=8)
    assert negative.zero == 255
    assert V.fake_quant(np.array([[[1e6, -1e6, 0.0]]]), bits=8)[0, 0, 2] == 0
    none = V.quantized_linear(X[:0], W, None, signs=np.ones(16))
    assert none.shape == (0, 5, 6)
    whole = V.fake_quant(np.arange(4)[None], bits=2, granularity="channel")
    np.testing.assert_array_equal(whole, [[0, 1, 2, 3]])
    assert whole.dtype == np.float64
    assert V.fake_quant(X.astype(np.float32), bits=8).dtype == np.float32
    assert V.quant_params(X.astype(np.float16), bits=16).delta.dtype == np.float32  # 65535 is inf in float16
    mixed = np.array([[[1e-9, 0.0], [1.0, -1.0]]])
    delta = V.quant_params(mixed, bits=8, granularity="token").delta
    assert delta[0, 0] == 1e-6  # raised alone; the released code would raise every token's
    assert delta[0, 1] == 2 / 255
