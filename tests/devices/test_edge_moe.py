"""Edge-MoE: laws on ref, golden vectors in ref and accel, the FPGA's schedule, bad inputs."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import accel
import hw
import ref
from accel.blocks import backend
from hw.stream import simulate_attention
from ref.blocks.norms import layer_norm
from tests.claims import edge_moe as claims
from tests.claims import edge_moe_trained as trained
from tests.claims import record
from tests.devices import laws_edge_moe
from tests.golden_runner import call_args, golden, run, run_accel
from tests.hw_record import Cost, size
from tests.laws import law_tests, rejects
from tests.lower import lowered

globals().update(law_tests(laws_edge_moe))

M = ref.edge_moe
A = accel.edge_moe
CORE = ("moe_gate", "moe_ffn", "gelu_delta", "unified_linear", "reordered_attention", "m3vit_forward")


def gate_bytes(x, w_gate, **_):
    """Tokens and gate in; number and score of two choices, all probabilities, and the loss out."""
    N, E = len(x), len(w_gate)
    return size(x, w_gate) + 4 * (2 * 2 * N + N * E + 1)


def tile_rows(N, k, E):
    """Rows that the tiles of all experts hold, padding included."""
    block = accel.devices.edge_moe.BLOCK_T
    return block * (-(-N * k // block) + E - 1)


def block_macs(params, cfg, rows):
    """Patches, then of each layer four maps, two products, and an MLP, or a gate and experts on `rows`."""
    n, D = cfg.tokens, cfg.dim
    total = (n - 1) * 3 * cfg.patch**2 * D
    for experts in params.moe:
        total += 4 * n * D * D + 2 * n * n * D
        total += 2 * n * D * cfg.hidden if experts is None else n * D * cfg.num_experts
        total += 0 if experts is None else 2 * rows * D * cfg.expert_hidden
    return total


f32 = lambda *shape: ("float32", shape)
HW = {
    "moe_gate": Cost(macs=lambda x, w, **_: len(x) * w.size, bytes=gate_bytes),
    "moe_gate_backward": Cost(
        macs=lambda dscores, daux, x, w, **_: 3 * len(x) * w.size,
        bytes=lambda dscores, daux, x, w, **_: size(dscores, x, w) + size(x, w),
    ),
    "moe_ffn": Cost(
        macs=lambda x, i, s, w1, *_: 2 * tile_rows(*i.shape, len(w1)) * w1[0].size,
        bytes=lambda x, *rest: size(x, *rest) + size(x),
        ref=lambda x, i, s, w1, *_: 2 * i.size * w1[0].size,  # without the padding of tiles
        bound={"h200": "overhead", "raspberry_pi5": "dram"},  # experts one by one: launches, or their weights
        large=(f32(129, 192), ("int32", (129, 2)), f32(129, 2), f32(16, 384, 192), f32(16, 384),
               f32(16, 192, 384), f32(16, 192)),
    ),
    "reordered_attention": Cost(
        macs=lambda q, k, v, **_: 2 * q.size * k.shape[1], bytes=lambda q, k, v, **_: size(q, k, v, q)
    ),
    "gelu_delta": Cost(macs=lambda x: 0, bytes=lambda x: 2 * size(x)),
    "unified_linear": Cost(
        macs=lambda x, w, b, **_: len(x) * w.size,
        bytes=lambda x, w, b, **_: size(x, w, b) + 4 * len(x) * len(w),
    ),
    "m3vit_forward": Cost(
        macs=lambda img, p, *, task, cfg: block_macs(
            p, cfg, tile_rows(cfg.tokens, cfg.top_k, cfg.num_experts)
        ),
        bytes=lambda img, p, *, task, cfg: size(img, *jax.tree.leaves(p)) + 4 * cfg.tokens * cfg.dim,
        ref=lambda img, p, *, task, cfg: block_macs(p, cfg, cfg.tokens * cfg.top_k),
    ),
}  # fmt: skip


def put(tree, dtype=jnp.float32):
    """Arrays of the dtype on JAX's device. NumPy converts: JAX would compile that for each shape."""
    return jax.device_put(jax.tree.map(lambda a: np.asarray(a).astype(dtype), tree))


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


@golden("edge_moe", only=CORE)
def test_edge_moe_golden_accel(case):
    run_accel(case, A)


@golden("edge_moe", only=CORE)
def test_edge_moe_golden_accel_x64(case):
    run_accel(case, A, x64=True)


def test_edge_moe_accel_tiles_and_orders_agree():
    """Any tile, one expert for all or no token for some, and the gathered form; gradients too."""
    rng, block_t = np.random.default_rng(4), 4
    w = put(laws_edge_moe.experts(rng))
    x, scores = put((rng.standard_normal((9, 16)), rng.random((9, 2))))
    for indices in (np.tile([3, 1], (9, 1)), np.argsort(rng.random((9, 5)), axis=-1)[:, :2]):
        indices = indices.astype(np.int32)
        want = M.moe_ffn(np.asarray(x), indices, np.asarray(scores), *map(np.asarray, w))
        for order in ("expert", "token"):
            got = A.moe_ffn(x, indices, scores, *w, order=order, block_t=block_t)
            # sums of 16 and 8 products of numbers near 1
            np.testing.assert_allclose(got, want, rtol=0, atol=64 * 2.0**-23 * np.abs(want).max())
    loss = lambda w1, order: A.moe_ffn(x, indices, scores, w1, *w[1:], order=order, block_t=block_t).sum()
    by = [np.asarray(jax.jit(jax.grad(loss), static_argnums=1)(w[0], order)) for order in ("expert", "token")]
    np.testing.assert_allclose(by[0], by[1], rtol=0, atol=256 * 2.0**-23 * np.abs(by[1]).max())


# Choices of 21 tokens among 5 experts: the last has none; two have them all; the first and the last have.
QUEUES = {
    "mixed": lambda rng: np.argsort(rng.random((21, 4)), axis=-1)[:, :2],
    "two": lambda rng: np.tile([3, 1], (21, 1)),
    "ends": lambda rng: np.tile([4, 0], (21, 1)),
}


def grouped(queue, dtype=jnp.float32, D=20, F=24):
    """(indices, [x, scores, w1, b1, w2, b2] of the dtype), numbers near 1."""
    rng = np.random.default_rng(3)
    indices = QUEUES[queue](rng).astype(np.int32)
    arrays = [rng.standard_normal((21, D)), rng.random((21, 2)), *laws_edge_moe.experts(rng, 5, D, F)]
    return indices, put(arrays, dtype)


def grouped_bound(eps, terms, *sizes):
    """Each of so many terms, at most the product of the arrays' largest numbers, is off by eps of itself."""
    return eps * terms * np.prod([max(1.0, float(np.abs(s).max())) for s in sizes])


@cache
def value_and_grads(**options):
    """(indices, x, scores, w1, b1, w2, b2) -> (y, its gradients under some cotangent), compiled once."""

    def loss(arrays, indices):
        y = A.moe_ffn(arrays[0], indices, *arrays[1:], block_t=16, **options)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum(), y

    def run(indices, *arrays):
        (_, y), grads = jax.value_and_grad(loss, has_aux=True)(arrays, indices)
        return y, grads

    return jax.jit(run)


@pytest.mark.parametrize("impl", ["triton", "tpu"], ids=lambda i: f"edge_moe_{i}")
def test_edge_moe_kernel_matches_ref(impl):
    """Values against ref; gradients against those of the XLA form, which the generic tests hold to ref."""
    kernel, plain = value_and_grads(impl=impl, interpret=True), value_and_grads()
    for queue in QUEUES:
        indices, (x, scores, *w) = grouped(queue)
        want = M.moe_ffn(np.asarray(x), indices, np.asarray(scores), *map(np.asarray, w))
        (y, grads), (_, others) = (run(indices, x, scores, *w) for run in (kernel, plain))
        # 20 and 24 terms, each up to |x| |w1| |w2|, twice for the two roundings of a product and its sum
        bound = grouped_bound(2.0**-23, 2 * (20 + 24), x, w[0], w[2])
        np.testing.assert_allclose(y, want, rtol=0, atol=bound)
        for name, g, h in zip(("x", "scores", "w1", "b1", "w2", "b2"), grads, others, strict=True):
            # a weight's gradient adds over the tokens
            np.testing.assert_allclose(g, h, rtol=0, atol=len(x) * bound, err_msg=name)
        idle = np.setdiff1d(np.arange(5), indices)
        assert len(idle) > 0
        assert not any(np.asarray(g)[idle].any() for g in grads[2:])


@pytest.mark.parametrize("impl", ["triton", "tpu"], ids=lambda i: f"edge_moe_{i}")
def test_edge_moe_kernel_of_a_token_and_an_expert(impl):
    """One of each, and no token at all."""
    x, w = np.ones((1, 8), np.float32), put(laws_edge_moe.experts(np.random.default_rng(0), 1, 8, 4))
    run = lambda x: A.moe_ffn(put(x), I[: len(x)], put(x[:, :1]), *w, impl=impl, interpret=True)
    want = M.moe_ffn(np.ones((1, 8)), I[:1], np.ones((1, 1)), *map(np.asarray, w))
    np.testing.assert_allclose(run(x), want, rtol=0, atol=32 * 2.0**-23 * np.abs(want).max())
    assert run(x[:0]).shape == (0, 8)


@pytest.mark.parametrize("impl", ["triton", "tpu"], ids=lambda i: f"edge_moe_{i}")
def test_edge_moe_kernel_takes_tiles_halves_and_batches(impl):
    """Two blocks of each axis, the last in part; bfloat16 with sums in float32; vmap."""
    indices, arrays = grouped("mixed", D=200, F=136)
    blocks = {"block_n": 64, "block_k": 64} if impl == "triton" else {"block_n": 128, "block_k": 128}
    kernel = {"impl": impl, "interpret": True, "block_t": 16, **blocks}
    run = lambda x, scores, *w, **kw: A.moe_ffn(x, indices, scores, *w, **kw)
    half = put(arrays, jnp.bfloat16)
    x = np.stack([half[0], -np.asarray(half[0])])
    got = jax.vmap(lambda x: run(x, *half[1:], **kernel))(x)
    assert got.dtype == jnp.bfloat16
    exact = [np.asarray(v, np.float64) for v in half]
    # hidden numbers, result and sum are rounded; their errors, of either sign, add up over 136 hidden numbers
    bound = grouped_bound(2.0**-8, np.sqrt(136), half[0], half[2], half[4]) * np.abs(exact[1]).max()
    for g, x in zip(np.asarray(got, np.float64), (exact[0], -exact[0]), strict=True):
        np.testing.assert_allclose(g, M.moe_ffn(x, indices, *exact[1:]), rtol=0, atol=bound)


@pytest.mark.parametrize("platform", ["cuda", "tpu"], ids=lambda p: f"edge_moe_{p}")
def test_edge_moe_kernel_lowers(platform):
    """Forward and both products of the backward pass, at the network's size, and off every tile."""
    from accel.kernels import edge_moe_tpu, edge_moe_triton

    module = edge_moe_tpu if platform == "tpu" else edge_moe_triton
    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype)
    for dtype, tile, T, N, K, E in ((jnp.float32, 16, 32, 384, 192, 16), (jnp.bfloat16, 32, 5, 200, 130, 3)):
        R, whose = tile * T, [shape(jnp.int32, T)] * 2
        x, dy, b = shape(dtype, R, K), shape(dtype, R, N), shape(dtype, E, N)
        forward = partial(module.grouped_linear, block_t=tile)
        lowered(forward, (x, shape(dtype, E, N, K), b, *whose), platform)
        back = lambda dy, w, *rest, f=forward: f(dy, w, None, *rest, turned=True)
        lowered(back, (dy, shape(dtype, E, N, K), *whose), platform)
        outer = partial(module.grouped_outer, block_t=tile)
        lowered(outer, (dy, x, whose[0], *[shape(jnp.int32, E)] * 2), platform)


def test_edge_moe_kernel_serves_the_network():
    """Its experts run in the kernel that was asked for, and in none by default."""
    e = next(e for e in M.example() if e.fn == "m3vit_forward")
    single = put(e.args)
    for impl in ("triton", "tpu", "auto"):
        options = {"impl": impl, "interpret": impl != "auto", "block_t": 16}
        jaxpr = jax.make_jaxpr(partial(A.m3vit_forward, **e.kwargs, **options))(*single)
        assert ("pallas_call" in str(jaxpr)) == (impl != "auto")


def test_edge_moe_auto_takes_the_kernel_on_a_gpu_that_can(monkeypatch):
    """The choice alone: no GPU is there. Arrays that were put on a CPU stay with XLA."""
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    indices, arrays = grouped("two", D=16, F=16)

    def kernel(dtype=jnp.float32, **options):
        run = lambda x, s, *w: A.moe_ffn(x, indices, s, *w, **options)
        return "pallas_call" in str(jax.make_jaxpr(run)(*put(arrays, dtype)))

    assert kernel()
    assert kernel(jnp.bfloat16)
    assert not kernel(block_t=24)
    assert not kernel(order="token")
    monkeypatch.setattr(A, "WIDE", 16 * 16)
    assert not kernel()
    assert kernel(jnp.bfloat16)
    monkeypatch.undo()
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    x, scores, *w = jax.device_put(arrays, jax.devices("cpu")[0])
    found, want = (A.moe_ffn(x, indices, scores, *w, impl=impl) for impl in ("auto", "xla"))
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("impl", ["triton", "tpu"], ids=lambda i: f"edge_moe_{i}")
def test_edge_moe_kernel_counts_the_tiles_that_have_rows(impl):
    """The op program of hw runs the kernel, and counts what ran: tiles without a token cost no product."""
    indices, (x, scores, *w) = grouped("two", D=16, F=16)
    run = partial(A.moe_ffn, impl=impl, interpret=True, block_t=16)
    args = [np.asarray(a) for a in (x, indices, scores, *w)]
    program = hw.trace(run, *args)
    y, report = hw.execute(program, args, hw.h200())
    np.testing.assert_allclose(y, M.moe_ffn(*args), rtol=0, atol=64 * 2.0**-23 * np.abs(y).max())
    tiles = sum(-(-n // 16) for n in np.bincount(indices.ravel()))
    assert tiles == 4
    assert report.macs == 2 * tiles * 16 * 16 * 16


@pytest.mark.gpu
def test_edge_moe_kernel_runs_on_the_gpu():
    """Triton compiled: values and gradients against the XLA form, both at full float32 precision."""
    kernel, plain = value_and_grads(impl="triton"), value_and_grads(impl="xla")
    for queue in QUEUES:
        for D, F in ((20, 24), (192, 384), (130, 66)):
            indices, arrays = grouped(queue, D=D, F=F)
            with jax.default_matmul_precision("highest"):
                (y, grads), (want, others) = (run(indices, *arrays) for run in (kernel, plain))
            bound = grouped_bound(2.0**-23, 2 * (D + F), arrays[0], arrays[2], arrays[4])
            np.testing.assert_allclose(y, want, rtol=0, atol=bound)
            for g, h in zip(grads, others, strict=True):
                np.testing.assert_allclose(g, h, rtol=0, atol=len(indices) * bound)


def test_edge_moe_accel_flags_of_the_unit():
    rng = np.random.default_rng(5)
    x, w, b = rng.standard_normal((6, 4)), rng.standard_normal((3, 4)), rng.standard_normal(3)
    rows, s, into = np.array([4, -1, 0, 4]), rng.random(4), rng.standard_normal((6, 3))
    for options in ({}, {"queue": rows}, {"queue": rows, "scores": s}, {"queue": rows, "scores": s,
                    "accumulate_into": into}):  # fmt: skip
        given = {n: a if n == "queue" else put(a) for n, a in options.items()}
        got = A.unified_linear(*put((x, w, b)), **given)
        np.testing.assert_allclose(got, M.unified_linear(x, w, b, **options), rtol=0, atol=2e-6)


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
PICTURE = np.zeros((8, 8, 3), np.uint8)
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
    "floats": (lambda: M.m3vit_forward_fixed(np.ones((8, 8, 3)), None, task=0, cfg=CFG), "img must be uint8"),
    "blocks": (lambda: M.m3vit_forward_fixed(PICTURE, None, task=0, cfg=CFG), "dim must be a multiple of 16"),
    "lengths": (lambda: M.edge_moe_cycles(CFG, [1] * 5), "lengths must be 5 numbers"),
    "real": (lambda: M.gelu_fixed(X), "x must be integers"),
    "head": (lambda: M.reordered_attention_fixed(*[np.ones((1, 5, 4), int)] * 3, scale=1.0), "multiple of 8"),
    "norm": (lambda: M.layer_norm_fixed(N, N[0], N[0, :4]), "b"),
    "gate": (lambda: M.moe_fixed(N, INTEGERS, top_k=3), r"top_k must be in 1\.\.2"),
}  # fmt: skip


def kernel(impl, **options):
    """moe_ffn of small float32 arrays by a kernel, interpreted."""
    x, *arrays = put((X, P, *EXPERTS))
    return A.moe_ffn(x, I, *arrays, impl=impl, interpret=True, **options)


ACCEL_BAD = {
    "top_k": (lambda: A.moe_gate(X, W, top_k=6), r"top_k must be in 1\.\.5"),
    "noise": (lambda: A.moe_gate(X, W, noise=np.ones((3, 5))), "noise is for training"),
    "nan": (lambda: A.moe_gate(X * np.nan, W), "finite"),
    "order": (lambda: A.moe_ffn(X, I, P, *EXPERTS, order="patch"), "order must be one of"),
    "index": (lambda: A.moe_ffn(X, I + 5, P, *EXPERTS), r"indices must be in 0\.\.4"),
    "block": (lambda: A.moe_ffn(X, I, P, *EXPERTS, block_t=0), "block_t must be positive"),
    "blocks": (lambda: A.moe_ffn(X, I, P, *EXPERTS, block_n=64), "block_n and block_k are for impl"),
    "tile": (lambda: kernel("triton", block_t=24), "block_t must be a power of two"),
    "rows": (lambda: kernel("tpu", block_t=24), "block_t must be a multiple of 16"),
    "lanes": (lambda: kernel("tpu", block_n=64), "block_n must be a multiple of 128"),
    "impl": (lambda: kernel("cuda"), "impl must be"),
    "resident": (lambda: A.reordered_attention(Q, Q, Q, scale=1.0, lanes=5), r"lanes must be in 1\.\.4"),
    "step": (lambda: A.gelu_delta(X, step=9.0), "step must be in"),
    "task": (lambda: A.m3vit_forward(np.ones((8, 8, 3)), None, task=1, cfg=CFG), r"task must be in 0\.\.0"),
}

test_edge_moe_accel_rejects_bad_input = rejects(ACCEL_BAD)

test_edge_moe_rejects_bad_input = rejects(BAD)


def test_edge_moe_kernels_refuse_by_name_what_they_cannot_run():
    """And say why; auto never does."""
    x = put(X, jnp.bfloat16)
    refused = {
        'does not exist.*use "triton"': lambda: kernel("hopper"),
        'use order="expert", not \'token\'': lambda: kernel("triton", order="token"),
        "sums in float32: x is int32": lambda: A.moe_ffn(put(X, jnp.int32), I, P, *EXPERTS, impl="tpu",
                                                        interpret=True),
        "needs a TPU": lambda: A.moe_ffn(x, I, P, *EXPERTS, impl="tpu"),
    }  # fmt: skip
    for why, call in refused.items():
        with pytest.raises(NotImplementedError, match=why):
            call()
    big = [
        jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, 2**14), (1, 1), (16, 2**13, 2**14), (16, 2**13))
    ]
    big += [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((16, 2**14, 2**13), (16, 2**14))]
    huge = lambda *a: A.moe_ffn(a[0], I[:1], *a[1:], impl="triton", interpret=True)
    with pytest.raises(NotImplementedError, match="32 bits, and these are 2,147,483,648"):
        jax.eval_shape(huge, *big)


def test_edge_moe_overflow_wraps_and_a_check_raises():
    """A sum that leaves <32, 10> wraps; the same format in its checking mode says so."""
    from ref.blocks.fixed import Fixed, fixed_matmul

    big = np.array([[M.FM.most, M.FM.most]])
    one = np.array([[1 << 14, 1 << 14]])
    assert M.linear_fixed(big, one, np.array([0])).item() == -2
    with pytest.raises(OverflowError, match="do not fit"):
        fixed_matmul(big, one, fx=M.FM, fw=M.WEIGHT, facc=Fixed(32, 10, overflow="CHECK"))


def test_edge_moe_stored_results_are_fresh():
    """And the paper's ratios of energy lie in the range that the baselines' overhead spans."""
    assert record.is_fresh("edge_moe")
    r = record.load("edge_moe")["results"]
    joules = {x["target"]: x["joules"] for x in r["rows"]}
    for kind, ratio in (("V100", 2.24), ("Xeon 6154", 4.90)):
        low, high = (joules[k] / joules["ZCU102"] for k in (kind, f"{kind}, 30 µs an op"))
        assert low < ratio < high
    seconds = {x["target"]: x["seconds"] for x in r["rows"]}
    assert r["loop_cycles"] / 300e6 < seconds["ZCU102"] < seconds["ZCU102, nothing overlapped"]


def test_edge_moe_side_by_side_on_a_small_network():
    found = claims.measure(CFG)
    assert {x["target"] for x in found["rows"]} == set(claims.targets())
    assert found["macs"] > 0


def test_edge_moe_race_is_of_one_function(monkeypatch):
    """What the kernel races against computes the same, to the last few bits of float32."""
    indices, arrays = grouped("mixed")
    x, scores, *w = map(np.asarray, arrays)
    want = M.moe_ffn(x, indices, scores, *w)
    shape = {"N": 21, "D": 20, "F": 24, "E": 5, "k": 2, "dtype": "float32"}
    runs = claims.contestants(shape, (16,))
    assert list(runs)[2:] == ["weights gathered", "loop over tiles", "Triton, tiles of 16"]
    for name in list(runs)[:2]:
        got = runs[name](arrays[0], indices, *arrays[1:])
        # 20 and 24 terms, as in the kernel's own test
        np.testing.assert_allclose(got, want, rtol=0, atol=grouped_bound(2.0**-23, 88, x, w[0], w[2]))
    monkeypatch.setattr(claims, "ROOM", 0)
    assert "weights gathered" not in claims.contestants(shape)


def test_edge_moe_trained_batches_integers_and_target():
    """Cheap, on digits: the loss of one dense layer falls; with experts a step keeps the form of its state, a
    batch is `m3vit_forward` of each, integers and the target agree with it.
    """
    cfg = M.M3ViTConfig(height=8, width=8, patch=2, dim=16, depth=2, num_heads=2, hidden=32, num_experts=4,
                        expert_hidden=16)  # fmt: skip
    training, test = trained.handwritten()
    _, losses = trained.train(training, replace(cfg, depth=1), seed=0, steps=24, shift=0)
    assert np.mean(losses[-6:]) < np.mean(losses[:6])
    network = trained.begin(np.random.default_rng(0), cfg, test.groups)
    carry = network, trained.adam_init(network)
    forms = jax.eval_shape(partial(trained.advance, i=0, pictures=training, cfg=cfg, seed=0, steps=9), carry)
    assert jax.tree.map(lambda a: a.shape, forms[0]) == jax.tree.map(jnp.shape, carry)
    images = trained.tested(test)[:4]
    logits, chosen = trained.predict(images, network, cfg=cfg, task=1)
    params, heads = jax.tree.map(lambda a: np.asarray(a, np.float64), network)
    head = lambda x: layer_norm(x, heads[1].scale, heads[1].bias, eps=cfg.eps) @ heads[1].w + heads[1].b
    want = [head(M.m3vit_forward(image / 256, params, task=1, cfg=cfg)[1:]) for image in images]
    # two layers of float32, norms between them
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-4 * np.abs(want).max())
    stored = trained.integers(network)
    fixed, lengths, last = trained.in_fixed(stored, images, cfg)
    assert lengths.sum(-1).tolist() == [[[34]] * 4] * 2  # 17 tokens, two experts each
    # most differ by floors of weights and the table's 1e-4; where an expert turned, by more
    assert np.median(np.abs(logits - fixed[1])) < 0.01
    found = trained.routes([np.array(chosen)] * 2, lengths, cfg)
    assert found["same_token"] == [1.0]
    assert found["bytes"]["expert"] <= found["bytes"]["token"]
    assert 0 <= min(found["overlap"]) <= max(found["overlap"]) <= 1
    (row, _) = trained.on_fpga(stored, images[:1], last, cfg)
    # the target's norm, softmax and GELU round elsewhere: the table's 1e-4 through two layers
    assert row["largest"] < 1e-3


def test_edge_moe_trained_results_are_fresh():
    """Experts no worse than the dense network, integers than floats; tasks send a token to other experts."""
    assert record.is_fresh("edge_moe_trained")
    r = record.load("edge_moe_trained")["results"]
    runs = r["runs"]
    assert [one["seed"] for one in runs] == list(trained.SEEDS)
    for task in trained.TASKS:
        mean = {name: np.mean([one["float"][name][task] for one in runs]) for name in trained.NETWORKS}
        assert mean["experts"] > mean["dense"] - 2
        assert mean["dense"] > r["guess"][task]
    for one in runs:
        few, routes = one["few"], one["routes"]
        assert all(abs(few["fixed"][task] - few["float"][task]) < 2 for task in trained.TASKS)
        assert min(few["same_group"], few["same_pixels"]) > 98
        assert max(routes["same_token"]) < 0.25
        assert 4 * routes["bytes"]["expert"] < routes["bytes"]["token"]


def test_edge_moe_chapter_counts_loads_and_products_without_queues(capsys):
    """One choice after the other: 258 a layer, each loads 2 x 192 x 384 numbers, then computes."""
    text = (Path(__file__).parents[2] / "docs" / "devices" / "edge_moe.md").read_text()
    (block,) = (b for b in text.split('```python exec="on"\n')[1:] if "by_token" in b.split("```")[0])
    exec(block.split("```")[0], found := {})
    cfg = found["cfg"]
    numbers = 2 * cfg.dim * cfg.expert_hidden
    series = cfg.tokens * cfg.top_k * (numbers // 16 + numbers // 256)
    queued = max(cfg.num_experts * numbers // 16, cfg.tokens * cfg.top_k * numbers // 256)
    assert found["by_token"] == cfg.depth // 2 * (series - queued)
    assert f"{found['by_token']:,} cycles more" in capsys.readouterr().out
