"""`triptych bench llm_int8`, `rum`, `pitome`, `mesa`: their problems, and who else solves them."""

from functools import partial

import numpy as np

from hw.commands.bench_attention import IMPLS
from hw.commands.bench_problem import (
    Call,
    Problem,
    apart,
    drawn,
    entry,
    from_torch,
    needs_gpu,
    package,
    to_torch,
    tolerance,
    torch_device,
)

ROWS = 16  # of a product that are checked: int8 products in NumPy are slow


def llm_int8(shape, *, dtype, seed, backward=False, outliers=0.001, threshold=6.0):
    """Shape M x K x N: x [M, K] times w [N, K] transposed. outliers: share of x's columns that are large."""
    import jax
    import jax.numpy as jnp

    import accel
    from ref.compression import llm_int8 as ref

    M, K, N = _sizes("llm_int8", shape, "MxKxN")
    if backward:
        raise ValueError("llm_int8 is raced without --backward: it freezes its weights")
    if not 0 <= outliers <= 1:
        raise ValueError(f"outliers must be in [0, 1], got {outliers}")
    rng = np.random.default_rng(seed)
    # Every row of a large column is an outlier, no other number is: rows alone then have the same columns.
    x = np.clip(rng.standard_normal((M, K), np.float32), -5.5, 5.5)
    large = rng.choice(K, round(outliers * K), replace=False)
    x[:, large] = rng.choice((-1, 1), (M, len(large))) * rng.uniform(20, 60, (M, len(large)))
    x = x.astype(jnp.dtype(getattr(jnp, dtype)))
    w = np.asarray(drawn(seed, "float32", (N, K))[0]) / np.float32(K**0.5)
    layer = ref.convert_linear(w)
    rows = np.unique([0, M - 1, *rng.permutation(M)[: min(ROWS, M)]])
    part = np.asarray(x[rows], np.float64)
    exact = part @ np.asarray(w, np.float64).T
    rounded = ref.llm_int8_linear(part, layer, threshold=threshold)
    plain = lambda: ref.quantization_ladder(part, w, scheme="vector")
    bound = tolerance(dtype)
    against = lambda want, convert=np.asarray: lambda out: apart([convert(out)[rows]], [want])
    there, on = jax.tree.map(jnp.asarray, layer), jnp.asarray(x)
    contract = (((1,), (1,)), ((), ()))

    def ours(impl):
        call = partial(
            accel.llm_int8.llm_int8_linear,
            threshold=threshold, max_outliers=max(16, -(-len(large) // 16) * 16), impl=impl,
        )  # fmt: skip
        return entry(
            lambda x, l: call(x, l), on, there, error=against(exact), off=against(rounded), bound=bound
        )

    def half():
        call = lambda x, w: jax.lax.dot_general(x, w, contract)
        return entry(call, on, jnp.asarray(w, on.dtype), error=against(exact), bound=bound)

    def int8_rows():
        def call(x, l):
            absmax = jnp.abs(x).max(-1, keepdims=True).astype(jnp.float32)
            q = jnp.rint(x.astype(jnp.float32) * (127 / absmax)).astype(jnp.int8)
            acc = jax.lax.dot_general(q, l.w_q, contract, preferred_element_type=jnp.int32)
            return (acc.astype(jnp.float32) * (absmax * l.w_absmax[None] / 127**2)).astype(x.dtype)

        # an x on the edge between two integers may go either way: a step more in a thousand of them
        return entry(call, on, there, error=against(exact), off=against(plain()), bound=bound + 1e-3)

    def int8_alone():
        q, _, _ = ref.quantize_rowwise(x)
        want = q[rows].astype(np.float64) @ layer.w_q.astype(np.float64).T
        call = lambda q, w: jax.lax.dot_general(q, w, contract, preferred_element_type=jnp.int32)
        return entry(call, jnp.asarray(q), there.w_q, error=against(want), bound=0.0)

    def torch_half():
        torch, _ = torch_device()
        a, b = to_torch(x), to_torch(w.astype(x.dtype))

        def run():
            with torch.no_grad():
                return a @ b.t()

        return Call(run, against(exact, from_torch), bound)

    def torch_int8():
        torch, _ = torch_device()
        needs_gpu()
        q, _, _ = ref.quantize_rowwise(x)
        want = q[rows].astype(np.float64) @ layer.w_q.astype(np.float64).T
        a, b = to_torch(q), to_torch(layer.w_q).t()
        # its sums are int32; float32 on the way to the host rounds them
        return Call(lambda: torch._int_mm(a, b), against(want, from_torch), 2.0**-23)

    def bitsandbytes():
        bnb = package("bitsandbytes", "bitsandbytes")
        torch, device = torch_device()
        needs_gpu()
        layer_ = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, threshold=threshold)
        layer_.weight = bnb.nn.Int8Params(torch.from_numpy(w).half(), requires_grad=False)
        layer_ = layer_.to(device)
        a = to_torch(x).half()

        def run():
            with torch.no_grad():
                return layer_(a)

        return Call(
            run, against(exact, from_torch), tolerance("float16") + bound, off=against(rounded, from_torch)
        )

    entries = {f"accel ({impl})": partial(ours, impl) for impl in IMPLS}
    entries |= {
        f"XLA {dtype}": half,
        "XLA int8, no outliers": int8_rows,
        "XLA int8, product alone": int8_alone,
        f"torch {dtype}": torch_half,
        "torch int8, product alone": torch_int8,
        "bitsandbytes, float16": bitsandbytes,
    }
    words = f"[{M}, {K}] x [{K}, {N}] {dtype}, {len(large)} outlier columns"
    nbytes = M * K * x.dtype.itemsize + N * K + 4 * N + M * N * x.dtype.itemsize
    return Problem(words, 2.0 * M * K * N, nbytes, "int8", entries)


def rum(shape, *, dtype, seed, backward=False, inputs=0, eta=0.0):
    """Shape B x T x N: T steps of lambda = 1 with N hidden units. inputs: width of x, N if 0."""
    import jax
    import jax.numpy as jnp

    import accel
    from ref.memory import rum as ref

    B, T, N = _sizes("rum", shape, "BxTxN")
    width, options = int(inputs) or N, {"lambda_": 1, "eta": float(eta) or None}
    x, weight = map(np.asarray, drawn(seed, dtype, (B, T, width), (B, T, N)))
    params = jax.tree.map(lambda p: np.asarray(p).astype(x.dtype), ref.init_rum(seed, width, N))
    some = slice(0, min(B, 2))

    def definition(x, params):
        wide = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
        x, g = np.asarray(x[some], np.float64), np.asarray(weight[some], np.float64)
        return (ref.rum_vjp(x, wide, g, **options)[0],) if backward else (ref.rum(x, wide, **options)[0],)

    want = definition(x, params)
    bound = _conditioned(definition, want, (x, params), dtype)
    error = lambda out: apart([np.asarray(out)[some]], want)
    args = jnp.asarray(x), jax.tree.map(jnp.asarray, params)

    def passes(run):
        if not backward:
            return run
        return lambda x, p: jax.vjp(run, x, p)[1](jnp.asarray(weight))[0]

    ours = lambda impl: entry(
        passes(lambda x, p: accel.rum.rum(x, p, impl=impl, **options)[0]), *args, error=error, bound=bound
    )

    def cells():
        def run(x, p):
            start = jnp.zeros((B, N), x.dtype), jnp.broadcast_to(jnp.eye(N, dtype=x.dtype), (B, N, N))

            def step(carry, x):
                h, assoc = accel.rum.rum_cell(x, *carry, p, **options)
                return (h, assoc), h

            return jnp.moveaxis(jax.lax.scan(step, start, jnp.moveaxis(x, 1, 0))[1], 0, 1)

        return entry(passes(run), *args, error=error, bound=bound)

    entries = {f"accel ({impl})": partial(ours, impl) for impl in IMPLS}
    entries["lax.scan of cells, JAX's gradient"] = cells
    passed = 3 if backward else 1
    nbytes = passed * B * T * (width + N) * x.dtype.itemsize
    flops = passed * B * T * ref.rum_flops(width, N, lambda_=1)
    return Problem(f"[{B}, {T}, {N}] {dtype}, lambda = 1, {_pass(backward)}", flops, nbytes, dtype, entries)


def pitome(shape, *, dtype, seed, backward=False, margin=0.5, alpha=1.0):
    """Shape B x T x D: energies of T tokens."""
    import jax.numpy as jnp

    import accel
    from ref.vision import pitome as ref

    B, T, D = _sizes("pitome", shape, "BxTxD")
    if backward:
        raise ValueError("pitome's energies are raced without --backward")
    x = np.asarray(drawn(seed, dtype, (B, T, D))[0])
    some, options = slice(0, min(B, 2)), {"margin": margin, "alpha": alpha}
    definition = lambda x: (ref.energy_score(np.asarray(x[some], np.float64), **options),)
    want = definition(x)
    bound = _conditioned(definition, want, (x,), dtype)
    error = lambda out, convert=np.asarray: apart([convert(out)[some]], want)
    on = jnp.asarray(x)
    ours = lambda impl: entry(
        lambda x: accel.pitome.energy_score(x, impl=impl, **options), on, error=error, bound=bound
    )

    def torch_eager(compiled):
        torch, _ = torch_device()
        if compiled:
            needs_gpu()
        a = to_torch(x).float()

        def energy(a):
            unit = torch.nn.functional.normalize(a, dim=-1)
            return torch.nn.functional.elu(unit @ unit.transpose(-1, -2) - margin, alpha=alpha).mean(-1)

        call = torch.compile(energy, dynamic=False) if compiled else energy

        def run():
            with torch.no_grad():
                return call(a)

        return Call(run, partial(error, convert=from_torch), max(bound, tolerance("float32")))

    entries = {f"accel ({impl})": partial(ours, impl) for impl in IMPLS}
    entries |= {"torch": partial(torch_eager, False), "torch, compiled": partial(torch_eager, True)}
    nbytes = x.nbytes + B * T * x.dtype.itemsize
    return Problem(f"[{B}, {T}, {D}] {dtype}, energies", 2.0 * B * T * T * D, nbytes, "float32", entries)


def mesa(shape, *, dtype, seed, backward=False, groups=8, levels=256):
    """Shape T x C: GELU of T tokens that keeps its input in 8 bits."""
    import jax
    import jax.numpy as jnp

    import accel
    from ref.blocks.mlp import gelu, gelu_grad
    from ref.blocks.stored import store
    from ref.training import mesa as ref

    T, C = _sizes("mesa", shape, "TxC")
    x, g = map(np.asarray, drawn(seed, dtype, (T, C), (T, C)))
    rows, options = slice(0, min(T, 256)), {"groups": int(groups), "levels": int(levels)}
    wide = np.asarray(x, np.float64)
    saved, _ = store(wide, ref.init_range((int(groups),)), int(groups), levels=int(levels))
    part = saved._replace(q=saved.q[rows])
    cotangent = np.asarray(g[rows], np.float64)
    slope = cotangent * gelu_grad(wide[rows])  # without rounding
    exact = slope if backward else gelu(wide[rows])
    kept = ref.mesa_gelu_backward(cotangent, part, levels=int(levels)) if backward else exact
    # An input on the edge between two integers may go either way: 1 / levels of the range, in few of them.
    bound = tolerance(dtype) + (1 / levels if backward else 0)
    against = lambda want, convert=np.asarray: lambda out: apart([convert(out)[rows]], [want])
    on, there, state = jnp.asarray(x), jnp.asarray(g), accel.mesa.init_range((int(groups),))

    def passes(run):
        return (lambda x, g: jax.vjp(run, x)[1](g)[0]) if backward else (lambda x, g: run(x))

    def ours(impl):
        def run(x):
            y, saved, moved = accel.mesa.mesa_gelu(x, state, impl=impl, **options)
            return y if backward else (y, saved, moved)

        first = lambda out: out if backward else out[0]
        check = lambda want: lambda out: against(want)(first(out))
        return entry(passes(run), on, there, error=check(exact), off=check(kept), bound=bound)

    def plain():
        run = partial(jax.nn.gelu, approximate=False)
        return entry(passes(run), on, there, error=against(exact), bound=tolerance(dtype))

    def torch_gelu():
        torch, _ = torch_device()
        a, b = to_torch(x, grad=backward), to_torch(g)

        def run():
            if backward:
                return torch.autograd.grad(torch.nn.functional.gelu(a), a, b)[0]
            with torch.no_grad():
                return torch.nn.functional.gelu(a)

        return Call(run, against(exact, from_torch), tolerance(dtype))

    entries = {f"accel ({impl})": partial(ours, impl) for impl in IMPLS}
    entries |= {"jax.nn.gelu, nothing rounded": plain, "torch gelu, nothing rounded": torch_gelu}
    size = x.dtype.itemsize
    nbytes = T * C * ((4 * size + 2) if backward else (2 * size + 1))
    return Problem(f"[{T}, {C}] {dtype}, GELU, {_pass(backward)}", 0.0, nbytes, dtype, entries)


def _conditioned(definition, want, args, dtype):
    """How far rounding the inputs moves the exact result, and as much for the arithmetic: what is allowed."""
    import jax

    eps, rng = tolerance(dtype), np.random.default_rng(0)
    nudge = lambda a: np.asarray(a, np.float64) * (1 + eps / 2 * rng.choice((-1.0, 1.0), np.shape(a)))
    moved = apart(definition(*jax.tree.map(nudge, args)), want)
    return eps + 8 * moved


def _pass(backward):
    return "forward + backward" if backward else "forward"


def _sizes(slug, shape, axes):
    if len(shape) != len(axes.split("x")) or min(shape) < 1:
        raise ValueError(f"--shape of {slug} must be {axes}, got {'x'.join(map(str, shape))}")
    return tuple(shape)
