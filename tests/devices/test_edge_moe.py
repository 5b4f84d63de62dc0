"""Edge-MoE: laws on ref, golden vectors, the FPGA's schedule, bad inputs."""

import numpy as np
import pytest

import ref
from hw.stream import simulate_attention
from tests.devices import laws_edge_moe
from tests.golden_runner import call_args, golden, run
from tests.laws import law_tests

globals().update(law_tests(laws_edge_moe))

M = ref.edge_moe


@golden("edge_moe")
def test_edge_moe_golden_ref(case):
    run(case, M)


@golden("edge_moe")
def test_edge_moe_golden_backward(case):
    """Gradients of the gate, by its own backward pass; the other cases hold none."""
    if not case.meta.get("grads"):
        assert case.meta["fn"] != "moe_gate"
        return
    args = call_args(case, M.moe_gate)
    x, w_gate = args.pop("x"), args.pop("w_gate")
    given = dict(zip(("indices", "scores", "aux_loss"), case.meta["cotangents"], strict=False))
    daux = case[given["aux_loss"]] if given.get("aux_loss") else 0.0
    dscores = case[given["scores"]] if given.get("scores") else np.zeros((*x.shape[:-1], args["top_k"]))
    found = dict(zip(("x", "w_gate"), M.moe_gate_backward(dscores, daux, x, w_gate, **args), strict=True))
    for name, key in case.meta["grads"].items():
        rtol, atol = case.meta["tol"][key]
        np.testing.assert_allclose(found[name], case[key], rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize(("n", "lanes"), [(9, 4), (8, 4), (13, 1), (5, 3)])
def test_edge_moe_load_trace_is_the_controllers(n, lanes):
    """Step by step what the state machine of the FPGA target loads."""
    trace, machine = M.load_trace(n, lanes), simulate_attention(n, parallel=lanes)
    assert len(trace.keys) == machine.steps
    np.testing.assert_array_equal(trace.queries, np.array(machine.queries) >= 0)
    for step in machine.pairs:
        for lane, query, _ in step:
            assert query % lanes == lane


X, W, I, P = np.ones((3, 4)), np.ones((5, 4)), np.zeros((3, 1), int), np.ones((3, 1))
EXPERTS = (np.ones((5, 2, 4)), np.ones((5, 2)), np.ones((5, 4, 2)), np.ones((5, 4)))
Q, N = np.ones((1, 5, 8)), np.ones((5, 8), int)
SHAPES = ((2, 8), (2, 4, 8), (2, 4), (2, 8, 4), (2, 8))
INTEGERS = M.MoEParams(*(np.ones(s, int) for s in SHAPES))
CFG = M.M3ViTConfig(height=8, width=8, patch=4, dim=4, depth=2, num_heads=1, hidden=4, num_experts=5, tasks=1)
BAD = {
    "top_k": (lambda: M.moe_gate(X, W, top_k=6), r"top_k must be in 1\.\.5"),
    "no_top_k": (lambda: M.moe_gate(X, W, top_k=0), "top_k must be in"),
    "noise": (lambda: M.moe_gate(X, W, noise=np.ones((3, 5))), "noise is for training"),
    "noise_shape": (lambda: M.moe_gate(X, W, noise=np.ones((3, 4)), train=True), "noise"),
    "noise_std": (lambda: M.moe_gate(X, W, noise_std=-1.0), "noise_std must not be negative"),
    "nan": (lambda: M.moe_gate(X * np.nan, W), "finite"),
    "width": (lambda: M.moe_gate(X, W[:, :3]), r"w_gate\.shape\[1\] = 3"),
    "dscores": (lambda: M.moe_gate_backward(np.ones((3, 3)), 0.0, X, W), "dscores"),
    "index": (lambda: M.build_expert_queues(I + 5, P, num_experts=5), r"indices must be in 0\.\.4"),
    "twice": (lambda: M.moe_ffn(X, np.zeros((3, 2), int), np.ones((3, 2)), *EXPERTS), "must differ"),
    "float": (lambda: M.build_expert_queues(P, P, num_experts=5), "indices must be integers"),
    "order": (lambda: M.moe_ffn(X, I, P, *EXPERTS, order="patch"), "order must be one of"),
    "traffic": (lambda: M.moe_traffic(I, CFG, order="patch"), "order must be one of"),
    "resident": (lambda: M.reordered_attention(Q, Q, Q, scale=1.0, lanes=5), r"lanes must be in 1\.\.4"),
    "trace": (lambda: M.load_trace(4, 4), r"lanes must be in 1\.\.3"),
    "trace_order": (lambda: M.load_trace(4, 2, order="best"), "order must be"),
    "step": (lambda: M.gelu_delta(X, step=0.0), "step must be in"),
    "table": (lambda: M.gelu_table(frac_bits=31), "frac_bits in"),
    "queue": (lambda: M.unified_linear(X, W, np.ones(5), queue=np.array([3])), "queue must be in -1"),
    "factor": (lambda: M.unified_linear(X, W, np.ones(5), scores=np.ones(2)), "scores"),
    "into": (lambda: M.unified_linear(X, W, np.ones(5), accumulate_into=np.ones((3, 4))), "accumulate_into"),
    "task": (lambda: M.m3vit_forward(np.ones((8, 8, 3)), None, task=1, cfg=CFG), r"task must be in 0\.\.0"),
    "image": (lambda: M.m3vit_forward(np.ones((8, 4, 3)), None, task=0, cfg=CFG), "img"),
    "lengths": (lambda: M.edge_moe_cycles(CFG, [1] * 5), "lengths must be 5 numbers"),
    "real": (lambda: M.gelu_fixed(X), "x must be integers"),
    "head": (lambda: M.reordered_attention_fixed(*[np.ones((1, 5, 4), int)] * 3, scale=1.0), "multiple of 8"),
    "norm": (lambda: M.layer_norm_fixed(N, N[0], N[0, :4]), "b"),
    "gate": (lambda: M.moe_fixed(N, INTEGERS, top_k=3), r"top_k must be in 1\.\.2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_edge_moe_rejects_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_edge_moe_overflow_wraps_and_a_check_raises():
    """A sum that leaves <32, 10> wraps; the same format in its checking mode says so."""
    from ref.blocks.fixed import Fixed, fixed_matmul

    big = np.array([[M.FM.most, M.FM.most]])
    one = np.array([[1 << 14, 1 << 14]])
    assert M.linear_fixed(big, one, np.array([0])).item() == -2
    with pytest.raises(OverflowError, match="do not fit"):
        fixed_matmul(big, one, fx=M.FM, fw=M.WEIGHT, facc=Fixed(32, 10, overflow="CHECK"))
