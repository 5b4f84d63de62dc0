"""Every op of an execution against JAX's own primitive on the same operands, compiled in one go.

Elementwise ops of one primitive and dtype are joined into one long vector, and of others with the same
parameters and shapes the first is run, so that few ops are compiled; where it is elementwise but for scalars,
these are repeated, and it is joined as well.
Bounds: movement, comparison, selection and integers bit for bit; + - * / and kin 1 ulp; other functions 4
ulp; a contraction or reduction over n terms 2 n 2^-24 sum |terms| (each side is within half of that).
"""

import jax
import jax.numpy as jnp
import numpy as np

from hw.primitives import CUMULATIVE, INDEX_ONLY, RANDOM, TRANSCENDENTAL, WINDOW

SUMS = {"reduce_sum", "reduce_prod", "dot_general", "ragged_dot_general", "conv_general_dilated",
        "scatter-add", "scatter-mul", "select_and_scatter_add", *WINDOW, *CUMULATIVE}  # fmt: skip


def differences(recorded):
    """["primitive shapes: by how much"] of (record, equation) pairs beyond the bound."""
    groups, met = {}, set()
    for r, eqn in recorded:
        alike = _signature(r, eqn)
        if r.op.prim in INDEX_ONLY or (alike in met and not _flat(r)):
            continue
        met.add(alike)
        groups.setdefault(alike[:-1] if _flat(r, scalars=True) else alike, []).append((r, eqn))
    jobs = [_join(entries) for entries in groups.values()]
    run = jax.jit(lambda given: [_bind(job[0], args) for job, args in zip(jobs, given, strict=True)])
    found = []
    results = run([args for _, args, _, _ in jobs]) if jobs else []
    for (eqn, args, got, op), want in zip(jobs, results, strict=True):
        for g, w in zip(got, want, strict=True):
            if said := _beyond(op, args, np.asarray(g), np.asarray(w)):
                shapes = [list(np.shape(a)) for a in args]
                found.append(f"{eqn.primitive.name} {shapes} {np.asarray(w).dtype}: {said}")
    return found


def _signature(r, eqn):
    """What ops share of which the first is run; without the shapes, the last, what those share that are
    joined.
    """
    dtypes = tuple(str(np.asarray(a).dtype) for a in r.inputs)
    options = tuple(sorted((k, str(v)) for k, v in eqn.params.items() if k not in ("sharding", "accuracy")))
    return r.op.prim, dtypes, options, tuple(np.shape(a) for a in r.inputs)


def _flat(r, *, scalars=False):
    """Whether the op is elementwise on operands of the result's shape, or some of them scalars."""
    shape = np.shape(r.outputs[0])
    fits = (shape, ()) if scalars else (shape,)
    return r.op.kind == "elementwise" and all(np.shape(a) in fits for a in r.inputs)


def _join(entries):
    """(equation, operands, our results, op) of ops that are run as one: flat vectors end to end."""
    r, eqn = entries[0]
    if len(entries) == 1:
        plain = lambda xs, vs: [
            _words(np.asarray(x)) if _is_key(v.aval) else np.asarray(x) for x, v in zip(xs, vs, strict=True)
        ]
        return eqn, plain(r.inputs, eqn.invars), plain(r.outputs, eqn.outvars), r.op
    shapes = [np.shape(r.outputs[0]) for r, _ in entries]
    line = lambda parts: np.concatenate(
        [np.broadcast_to(x, shape).reshape(-1) for x, shape in zip(parts, shapes, strict=True)]
    )
    args = [line(column) for column in zip(*(r.inputs for r, _ in entries), strict=True)]
    return eqn, args, [line(r.outputs[0] for r, _ in entries)], r.op


def _bind(eqn, args):
    """JAX's results; keys go in and out as two 32-bit words."""
    wrapped = [
        jax.random.wrap_key_data(jnp.asarray(a)) if _is_key(v.aval) else a
        for v, a in zip(eqn.invars, args, strict=True)
    ]
    out = eqn.primitive.bind(*wrapped, **eqn.params)
    out = out if eqn.primitive.multiple_results else [out]
    return [jax.random.key_data(o) if _is_key(o) else o for o in out]


def _is_key(x):
    return str(x.dtype).startswith("key<")


def _words(x):
    """The words of keys, which the op program holds as one uint64."""
    return np.stack([x >> np.uint64(32), x & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32)


def _beyond(op, args, got, want):
    """What is wrong, or an empty text."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {got.shape} for {want.dtype} {want.shape}"
    if (
        not jnp.issubdtype(want.dtype, jnp.floating)
        or op.kind in ("move", "gather", "sort")
        or op.prim in EXACT
    ):
        same = (got == want) | ((got != got) & (want != want))
        return "" if same.all() else f"{int((~same).sum())} of {same.size} entries differ"
    g, w = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(w)
    if not np.array_equal(np.where(finite, 0, w), np.where(np.isfinite(g), 0, g), equal_nan=True):
        return "not finite at other places"
    eps = float(jnp.finfo(want.dtype).eps)
    tiny = float(jnp.finfo(want.dtype).tiny)
    room = _room(op, args, w, eps) + tiny  # XLA flushes subnormal numbers
    error = np.abs(np.where(finite, g, 0) - np.where(finite, w, 0))
    worst = (error / np.where(finite, room, 1)).max(initial=0)
    return f"{worst:.2g} of the bound" if worst > 1 else ""


EXACT = frozenset(RANDOM) | frozenset(
    "reduce_max reduce_min max min neg abs sign floor ceil round select_n clamp convert_element_type copy "
    "stop_gradient scatter scatter-max scatter-min cummax cummin is_finite".split()
)


def _room(op, args, want, eps):
    if op.prim in SUMS:
        terms, n = _terms(op, args, want)
        return n * eps * terms + eps * np.abs(want)  # 2 n 2^-24 = n eps in float32
    ulps = 4 if op.prim in TRANSCENDENTAL or op.prim in ("integer_pow", "rem") else 1
    if op.prim == "erfc":
        # From |x| = 1 on it is exp(-x^2) (1/x) p(1/x^2): the ulps of any exponential, x^2 2^-24 for the
        # rounded x^2, and half an ulp each for 1/x, p's last step and two products. Below: 1 - erf(x).
        x = np.asarray(args[0], np.float64)
        below = np.where(np.abs(x) < 1, np.abs(1 - want), 0)
        return eps * ((ulps + 4 / 2 + x * x) * np.abs(want) + ulps * below)
    return ulps * eps * np.abs(want)


def _product(x, y, dimension_numbers):
    """`jax.lax.dot_general` in NumPy: batch axes in front, then what is left of x and of y."""
    (x_sum, y_sum), (x_batch, y_batch) = dimension_numbers
    left = list(range(x.ndim))
    right = list(range(x.ndim, x.ndim + y.ndim))
    for i, j in [*zip(x_sum, y_sum, strict=True), *zip(x_batch, y_batch, strict=True)]:
        right[j] = left[i]
    batch = [left[i] for i in x_batch]
    alone = [n for n in left if n not in right] + [n for n in right if n not in left]
    return np.einsum(x, left, y, right, [*batch, *alone], optimize=True)


def _terms(op, args, want):
    """(sum of |terms| of each result or a bound of it, number of terms)."""
    size = [np.abs(np.asarray(a, np.float64)) for a in args]
    if op.prim == "dot_general":
        return _product(*size[:2], op.attrs["dimension_numbers"]), max(op.dims.k, 1)
    if op.prim == "reduce_sum":
        return size[0].sum(axis=tuple(op.attrs["axes"])), max(op.dims.length, 1)
    if op.prim in ("reduce_prod", "cumprod"):
        return np.abs(want), max(op.dims.length, 1)
    if op.prim in CUMULATIVE:
        axis = op.attrs["axis"]
        return np.broadcast_to(size[0].sum(axis=axis, keepdims=True) + 1, want.shape), op.dims.length
    total = size[0].sum() if op.prim.startswith("reduce_window") else sum(s.sum() for s in size[::2])
    if op.prim == "conv_general_dilated":
        total = size[0].max(initial=0) * size[1].sum()
    if op.prim == "ragged_dot_general":
        total = (size[0].max(initial=0) * size[1].max(initial=0)) * op.dims.k
    return total, max(getattr(op.dims, "length", 0), getattr(op.dims, "k", 0), size[-1].size)
