"""Clipped softmax and gated attention: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from ref.blocks.quantize import RangeState
from ref.blocks.transformer import init_block
from tests.compression import laws_quantizable
from tests.golden_runner import golden, graded, run, run_backward
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_quantizable))

Z = ref.quantizable


def parameters(raw):
    """A gate as stored, or GatedAttentionParams with its maps [out, in] turned."""
    if "gate" not in raw:
        return Z.GateParams(**{"w": None, **raw})
    maps = {n: x.T if n.startswith("w") else x for n, x in raw.items() if n != "gate"}
    biases = dict.fromkeys(("b_q", "b_k", "b_v"))
    return Z.GatedAttentionParams(**biases | maps, gate=parameters(raw["gate"]))


@golden("quantizable")
def test_quantizable_golden_ref(case):
    run(case, Z, build={"params": parameters})


def stored(d):
    """GatedAttentionParams of gradients in the golden's layout."""
    return {n: g.T if n.startswith("w") else g for n, g in d._asdict().items()}


@graded("quantizable", always=("gated_self_attention",))
def test_quantizable_golden_layer_gradients(case):
    """The stored gradients of x, the maps and the gate against the hand-written backward pass."""
    run_backward(case, Z, build={"params": parameters}, outs={"params": stored})


RNG = np.random.default_rng(0)
X, HEADS, S = np.ones((2, 4, 6)), np.ones((2, 2, 4, 3)), np.ones((2, 5))
GATE = Z.init_gate(RNG, 2, 3)
MAPS = Z.GatedAttentionParams(*(np.ones(s) for s in ((6, 6), 6) * 3), GATE)
BLOCK = Z.OutlierFreeBlock(init_block(RNG, 6, 8))
ONES, ZERO = np.ones(()), np.zeros((), int)
RANGES = {"input": RangeState(-ONES, ONES, ZERO)}
clip = lambda **o: Z.clipped_softmax(S, **o)
attend = lambda **o: Z.outlier_free_attention(HEADS, HEADS, HEADS, **o)
BAD = {
    "gamma": (lambda: clip(gamma=0.1), "gamma <= 0 and zeta >= 1, got gamma=0.1"),
    "zeta": (lambda: clip(zeta=0.9), "zeta=0.9"),
    "gamma_nan": (lambda: clip(gamma=np.nan), "need gamma <= 0"),
    "back": (lambda: Z.clipped_softmax_vjp(S, S, gamma=1.0, zeta=1.0), "need gamma <= 0"),
    "mask": (lambda: clip(mask=np.ones((2, 5))), "mask must be boolean"),
    "mask_shape": (lambda: clip(mask=np.ones((2, 4), bool)), r"broadcastable to \[2, 5\]"),
    "attention_mask": (lambda: attend(mask=np.ones((3, 1, 1, 4), bool)), "mask must be boolean"),
    "alpha": (lambda: Z.gamma_from_alpha(-1, 4), "need alpha >= 0"),
    "length": (lambda: Z.gamma_from_alpha(1, 0), "seq_len >= 1"),
    "pi": (lambda: Z.init_gate(RNG, 2, 3, pi_init=1.0), r"pi_init must be in \(0, 1\)"),
    "kind": (lambda: Z.init_gate(RNG, 2, 3, kind="tanh"), "kind must be one of linear, mlp"),
    "gate_kind": (lambda: Z.attention_gate(HEADS, GATE, kind="tanh"), "kind must be one of"),
    "gate_heads": (lambda: Z.attention_gate(HEADS[:, :1], GATE), r"b\.shape\[0\] = 2, but must be 1"),
    "gate_width": (lambda: Z.attention_gate(HEADS[..., :2], GATE), r"w\.shape\[1\] = 3, but must be 2"),
    "gate_all": (lambda: Z.attention_gate(HEADS, GATE, kind="all_heads"), "but must be 6"),
    "gate_mlp": (lambda: Z.attention_gate(HEADS, GATE, kind="mlp"), "needs w_out and b_out"),
    "gate_none": (lambda: Z.attention_gate(HEADS, Z.GateParams(None, np.zeros(2))), 'kind="linear" needs w'),
    "gate_grad": (lambda: Z.attention_gate_vjp(HEADS, GATE, HEADS), r"grad_gate\.shape\[3\] = 3"),
    "gate_shape": (lambda: attend(gate=np.ones((2, 3, 1, 1))), r"broadcastable to \[2, 2, 4, 1\]"),
    "keys": (lambda: Z.outlier_free_attention(HEADS, HEADS, HEADS[:, :, :3]), r"v\.shape\[2\] = 3"),
    "cotangent": (
        lambda: Z.outlier_free_attention_vjp(HEADS, HEADS, HEADS, HEADS[:, :, :3]),
        "axis L is 3 in grad_context",
    ),
    "heads": (lambda: Z.gated_self_attention(X, MAPS, num_heads=4), "num_heads must divide the width 6"),
    "width": (lambda: Z.gated_self_attention(X[..., :5], MAPS, num_heads=2), r"w_q\.shape\[0\] = 6"),
    "sample": (lambda: Z.outlier_metrics(np.ones((3, 1))), "two numbers a sample"),
    "flat": (lambda: Z.outlier_metrics(np.ones(3)), r"acts must be \[S, \.\.\.\]"),
    "range": (lambda: Z.affine_params(1.0, -1.0), "hi must not be below lo"),
    "bits": (lambda: Z.w8a8_forward(BLOCK, X, RANGES, num_heads=2, bits=1), "bits must be at least 2"),
    "missing": (lambda: Z.w8a8_forward(BLOCK, X, RANGES, num_heads=2), "ranges must hold 'norm1'"),
    "batches": (lambda: Z.calibrate_ranges(BLOCK, [], num_heads=2), "at least one batch"),
    "block_heads": (lambda: Z.block_forward(BLOCK, X, num_heads=5), "num_heads must divide the width 6"),
    "macs": (lambda: Z.gate_macs(0, 2, 3), "tokens, heads and head_dim"),
    "macs_kind": (lambda: Z.gate_macs(1, 2, 3, kind="tanh"), "kind must be one of"),
}

test_quantizable_rejects_bad_input = rejects(BAD)
