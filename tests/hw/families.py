"""One small call for every primitive family the op program knows, so that none is priced or run untested."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_rng = np.random.default_rng(0)
F = _rng.standard_normal((3, 4)).astype(np.float32)
G = _rng.standard_normal((3, 4)).astype(np.float32)
P = np.abs(F) + np.float32(0.1)
UNIT = (F / (np.abs(F).max() + 0.1)).astype(np.float32)
I = _rng.integers(-9, 9, (3, 4)).astype(np.int32)
J = _rng.integers(1, 9, (3, 4)).astype(np.int32)
U = _rng.integers(0, 2**31, (3, 4)).astype(np.uint32)
B = F > 0
SPECIAL = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-30, 3e38, -2.5, 0.5, 1.5], np.float32)
CUBE = _rng.standard_normal((2, 5, 6)).astype(np.float32)
IMAGE = _rng.standard_normal((2, 4, 7, 6)).astype(np.float32)
KERNEL = _rng.standard_normal((6, 2, 3, 3)).astype(np.float32)
HALF = F.astype(jnp.bfloat16)
AT = np.array([[2], [0], [7], [-1]], np.int32)


def _conv(x, w, **options):
    return lax.conv_general_dilated(x, w, dimension_numbers=("NCHW", "OIHW", "NCHW"), **options)


def _scatter(op, mode="drop"):
    def fn(x, i, u):
        return getattr(x.at[i], op)(u, mode=mode)

    return fn


ROWS = np.array([2, 0, 2, 9, -1], np.int32)
UPDATES = _rng.standard_normal((5, 4)).astype(np.float32)

# primitive: [(function, arguments), ...]; the same call may exercise several.
CALLS = {
    "add": [(lax.add, (F, G)), (lax.add, (I, J)), (lax.add, (HALF, HALF))],
    "sub": [(lax.sub, (F, G)), (lax.sub, (U, U[::-1].copy()))],
    "mul": [(lax.mul, (F, G)), (lax.mul, (I, J)), (lax.mul, (HALF, HALF))],
    "max": [(lax.max, (SPECIAL, SPECIAL[::-1].copy())), (lax.max, (I, J))],
    "min": [(lax.min, (SPECIAL, SPECIAL[::-1].copy()))],
    "neg": [(lax.neg, (SPECIAL,)), (lax.neg, (I,))],
    "abs": [(lax.abs, (SPECIAL,)), (lax.abs, (I,))],
    "sign": [(lax.sign, (SPECIAL,)), (lax.sign, (I,))],
    "floor": [(lax.floor, (SPECIAL,))],
    "ceil": [(lax.ceil, (SPECIAL,))],
    "round": [
        (lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN), (SPECIAL,)),
        (lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO), (SPECIAL,)),
    ],
    "clamp": [(lambda x: lax.clamp(jnp.float32(-1), x, jnp.float32(1)), (F,)), (lax.clamp, (-J, I, J))],
    "select_n": [(lax.select, (B, F, G)), (lambda i, *c: lax.select_n(i, *c), (J % 3, F, G, P))],
    "and": [(lax.bitwise_and, (I, J)), (lax.bitwise_and, (B, ~B))],
    "or": [(lax.bitwise_or, (I, J)), (lax.bitwise_or, (B, ~B))],
    "not": [(lax.bitwise_not, (I,)), (lax.bitwise_not, (B,))],
    "xor": [(lax.bitwise_xor, (I, J)), (lax.bitwise_xor, (B, ~B))],
    "eq": [(lax.eq, (SPECIAL, SPECIAL))],
    "ne": [(lax.ne, (SPECIAL, SPECIAL))],
    "lt": [(lax.lt, (F, G)), (lax.lt, (I, J))],
    "le": [(lax.le, (F, G))],
    "gt": [(lax.gt, (F, G))],
    "ge": [(lax.ge, (F, G))],
    "shift_left": [(lax.shift_left, (I, J)), (lax.shift_left, (I, 10 * J))],
    "shift_right_logical": [(lax.shift_right_logical, (I, J)), (lax.shift_right_logical, (U, U >> 25))],
    "shift_right_arithmetic": [(lax.shift_right_arithmetic, (I, 10 * J))],
    "population_count": [(lax.population_count, (U,))],
    "convert_element_type": [
        (lambda x: x.astype(jnp.int32), (SPECIAL,)),
        (lambda x: x.astype(jnp.uint8), (np.array([-3.0, 300.0, 7.9], np.float32),)),
        (lambda x: x.astype(jnp.bfloat16), (F,)),
        (lambda x: x.astype(jnp.float32), (I,)),
        (lambda x: x.astype(jnp.int8), (100 * I,)),
        (lambda x: x.astype(bool), (I,)),
        (lambda x: x.astype(jnp.float32), (HALF,)),
    ],
    "is_finite": [(lax.is_finite, (SPECIAL,))],
    "copy": [(lambda x: lax.copy_p.bind(x), (F,))],
    "square": [(lax.square, (F,))],
    "nextafter": [(lax.nextafter, (F, G))],
    "reduce_precision": [(lambda x: lax.reduce_precision(x, 5, 10), (F,))],
    "div": [(lax.div, (F, G)), (lax.div, (I, J)), (lax.div, (I, I * 0))],
    "rem": [(lax.rem, (F, G)), (lax.rem, (I, J)), (lax.rem, (I, I * 0))],
    **{
        name: [(getattr(lax, name), (F,))]
        for name in ("exp", "exp2", "expm1", "tanh", "logistic", "erf", "erfc", "sin", "cos", "tan", "cbrt")
    },
    **{name: [(getattr(lax, name), (P,))] for name in ("log", "log1p", "sqrt", "rsqrt")},
    **({"log2": [(jnp.log2, (P,))]} if hasattr(lax, "log2") else {}),  # before JAX 0.11: log and a division
    "erf_inv": [(lax.erf_inv, (UNIT,))],
    "pow": [(lax.pow, (P, G))],
    "integer_pow": [(lambda x, y=y: lax.integer_pow(x, y), (F,)) for y in (2, 3, 7, -2)],
    "reduce_sum": [(lambda x: x.sum((0, 2)), (CUBE,)), (lambda x: x.sum(dtype=jnp.int32), (I,))],
    "reduce_max": [(lambda x: x.max(1), (F,)), (lambda x: x.max(), (I,))],
    "reduce_min": [(lambda x: x.min(1), (F,))],
    "reduce_prod": [(lambda x: x.prod(1), (F,))],
    "reduce_and": [(lambda x: x.all(1), (B,))],
    "reduce_or": [(lambda x: x.any(1), (B,))],
    "reduce_xor": [(lambda x: lax.reduce_xor_p.bind(x, axes=(1,)), (I,))],
    "argmax": [(lambda x: x.argmax(1), (F,)), (lambda x: x.argmax(0), (I,))],
    "argmin": [(lambda x: x.argmin(1), (F,))],
    "cumsum": [(lambda x: lax.cumsum(x, 1), (F,)), (lambda x: lax.cumsum(x, 0, reverse=True), (I,))],
    "cumprod": [(lambda x: lax.cumprod(x, 1), (F,))],
    "cummax": [(lambda x: lax.cummax(x, 1), (F,))],
    "cummin": [(lambda x: lax.cummin(x, 1), (F,))],
    "cumlogsumexp": [(lambda x: lax.cumlogsumexp(x, 1), (F,))],
    "sort": [
        (lambda x: lax.sort(x, dimension=1), (F,)),
        (lambda x, y: lax.sort((x, y), dimension=1, num_keys=1), (I, F)),
        (lambda x: lax.sort(x), (SPECIAL,)),
    ],
    "top_k": [(lambda x: lax.top_k(x, 3), (F,)), (lambda x: lax.top_k(x, 2), (I,))],
    "dot_general": [
        (lambda a, b: jnp.einsum("bik,bjk->bij", a, b), (CUBE, CUBE)),
        (lambda a, b: lax.dot(a.T, b), (F, G)),
        (
            lambda a, b: lax.dot(a.T, b, preferred_element_type=jnp.int32),
            (I.astype(np.int8), J.astype(np.int8)),
        ),
        (lambda a, b: lax.dot(a.T, b, preferred_element_type=jnp.float32), (HALF, HALF)),
        (lambda a: a @ jnp.zeros((4, 0), jnp.float32), (F,)),
    ],
    "ragged_dot_general": [
        (lambda a, b, g: lax.ragged_dot(a, b, g), (F, CUBE[:, :4, :].copy(), np.array([1, 2], np.int32)))
    ],
    "conv_general_dilated": [
        (
            lambda x, w: _conv(x, w, window_strides=(1, 1), padding="SAME", feature_group_count=2),
            (IMAGE, KERNEL),
        ),
        (
            lambda x, w: _conv(
                x,
                w,
                window_strides=(2, 1),
                padding=((2, 0), (0, 3)),
                rhs_dilation=(2, 1),
                feature_group_count=2,
            ),
            (IMAGE, KERNEL),
        ),
        (
            lambda x, w: _conv(
                x,
                w,
                window_strides=(1, 1),
                padding=((1, -1), (0, 1)),
                lhs_dilation=(2, 3),
                feature_group_count=2,
            ),
            (IMAGE, KERNEL),
        ),
        (
            lambda x, w: lax.conv_general_dilated(
                x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
            ),
            (CUBE, _rng.standard_normal((3, 6, 2)).astype(np.float32)),
        ),
    ],
    "reduce_window_sum": [
        (lambda x: lax.reduce_window(x, np.float32(0), lax.add, (1, 2, 3), (1, 1, 2), "VALID"), (CUBE,))
    ],
    "reduce_window_max": [
        (lambda x: lax.reduce_window(x, -np.float32(np.inf), lax.max, (1, 2, 2), (1, 2, 2), "SAME"), (CUBE,))
    ],
    "reduce_window_min": [
        (lambda x: lax.reduce_window(x, np.float32(np.inf), lax.min, (1, 2, 2), (1, 1, 1), "SAME"), (CUBE,))
    ],
    "select_and_scatter_add": [
        (
            jax.grad(
                lambda x: (
                    lax.reduce_window(x, -np.float32(np.inf), lax.max, (1, 2, 2), (1, 2, 2), "VALID") ** 2
                ).sum()
            ),
            (CUBE,),
        )
    ],
    "reshape": [(lambda x: x.reshape(2, 6), (F,))],
    "squeeze": [(lambda x: lax.squeeze(x, (0,)), (F[None],))],
    "broadcast_in_dim": [(lambda x: lax.broadcast_in_dim(x, (2, 3, 4), (1, 2)), (F,))],
    "tile": [(lambda x: jnp.tile(x, (2, 3)), (F,))],
    "stack": [(lambda a, b: jnp.stack([a, b], 1), (F, G))],
    "bitcast_convert_type": [
        (lambda x: lax.bitcast_convert_type(x, jnp.int32), (F,)),
        (lambda x: lax.bitcast_convert_type(x, jnp.uint8), (F,)),
    ],
    "transpose": [(lambda x: x.transpose(2, 0, 1), (CUBE,))],
    "rev": [(lambda x: lax.rev(x, (1,)), (F,))],
    "concatenate": [(lambda a, b: jnp.concatenate([a, b], 1), (F, G))],
    "pad": [(lambda x: lax.pad(x, jnp.float32(7), ((1, 2, 0), (-1, 0, 2))), (F,))],
    "slice": [(lambda x: x[1:, ::2], (F,))],
    "dynamic_slice": [(lambda x, i: lax.dynamic_slice(x, (i, i), (2, 2)), (F, np.int32(2)))],
    "dynamic_update_slice": [
        (lambda x, u, i: lax.dynamic_update_slice(x, u, (i, i)), (F, G[:2, :2].copy(), np.int32(2)))
    ],
    "gather": [
        (lambda x, i: x[i], (F, ROWS)),
        (lambda x, i: x.at[i].get(mode="fill", fill_value=5), (F, ROWS)),
        (lambda x, i: x.at[i].get(mode="clip"), (I, ROWS)),
        (lambda x, i: jnp.take_along_axis(x, i, 1), (F, J % 4)),
        (jax.vmap(lambda x, i: lax.dynamic_slice(x, (i,), (2,))), (F, np.array([0, 2, 3], np.int32))),
    ],
    "scatter": [(_scatter("set"), (F, np.array([2, 0, 1, 9, -9], np.int32), UPDATES))],
    "scatter-add": [
        (_scatter("add"), (F, ROWS, UPDATES)),
        (_scatter("add", "clip"), (F, ROWS, UPDATES)),
        (lambda x, i: jax.ops.segment_sum(x, i, 4), (F, np.array([3, 1, 3], np.int32))),
    ],
    "scatter-mul": [(_scatter("multiply"), (F, ROWS, UPDATES))],
    "scatter-min": [(_scatter("min"), (F, ROWS, UPDATES))],
    "scatter-max": [(_scatter("max"), (F, ROWS, UPDATES))],
    "iota": [(lambda x: x + lax.broadcasted_iota(jnp.float32, (3, 4), 1), (F,))],
    "split": [(lambda x: jnp.split(x, 2, 1), (F,))],
    "optimization_barrier": [(lambda x: lax.optimization_barrier(x), (F,))],
    "stop_gradient": [(lambda x: lax.stop_gradient(x) * 2, (F,))],
    "device_put": [(lambda x: jax.device_put(x), (F,))],
    "add_any": [(jax.grad(lambda x: (x * x + jnp.sin(x) * x).sum()), (F,))],
    "random_bits": [
        (lambda k: jax.random.bits(jax.random.wrap_key_data(k), (5,)), (np.array([3, 4], np.uint32),)),
        (
            lambda k: jax.random.bits(jax.random.wrap_key_data(k), (3, 2), jnp.uint16),
            (np.array([3, 4], np.uint32),),
        ),
    ],
    "random_seed": [(lambda s: jax.random.uniform(jax.random.key(s), (4,)), (np.int32(7),))],
    "random_wrap": [
        (lambda k: jax.random.normal(jax.random.wrap_key_data(k), (3,)), (np.array([1, 2], np.uint32),))
    ],
    "random_unwrap": [(lambda s: jax.random.key_data(jax.random.key(s)), (np.int32(-7),))],
    "random_split": [(lambda s: jax.random.key_data(jax.random.split(jax.random.key(s), 3)), (np.int32(7),))],
    "random_fold_in": [
        (lambda s: jax.random.key_data(jax.random.fold_in(jax.random.key(s), 9)), (np.int32(7),))
    ],
    "threefry2x32": [
        (
            lambda k: jax.extend.random.threefry_2x32(k, jnp.arange(6, dtype=jnp.uint32)),
            (np.array([1, 2], np.uint32),),
        )
    ],
}
