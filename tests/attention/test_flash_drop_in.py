"""`accel.dot_product_attention` against `jax.nn`'s: every option, odd sizes, derivatives."""

import inspect
from functools import partial
from itertools import combinations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import accel
from accel.attention import drop_in, flash
from accel.attention.flash import kernel
from accel.blocks import backend
from accel.blocks.tiled_attention import tiled_attention
from tests.lower import lowered

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# (B, T, S, N, K, H): odd sizes, several query heads on a key head, one key head for all, T longer and shorter
SHAPES = ((2, 7, 9, 4, 2, 5), (1, 9, 9, 2, 2, 4), (2, 9, 5, 3, 1, 8))
LEVELS = {
    "shape": SHAPES,
    "dtype": ("float32", "bfloat16", "float16"),
    "bias": (None, "full", "broadcast"),
    "mask": (None, "full", "broadcast"),
    "is_causal": (False, True),
    "lengths": (None, "key", "both"),
    "window": (None, 2, (1, 3)),
    "scale": (None, 0.3),
}


def covering():
    """Rows of options such that any two options meet in every pair of their values, chosen greedily."""
    names = list(LEVELS)
    pairs = lambda row: {(a, b, row[a], row[b]) for a, b in combinations(range(len(names)), 2)}
    every = [range(len(v)) for v in LEVELS.values()]
    missing = set().union(
        *(
            {(a, b, x, y) for x, y in product(every[a], every[b])}
            for a, b in combinations(range(len(names)), 2)
        )
    )
    rng, rows = np.random.default_rng(0), []
    while missing:
        tries = [tuple(int(rng.integers(len(v))) for v in every) for _ in range(300)]
        rows.append(max(tries, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(rows[-1])
    return [{n: LEVELS[n][i] for n, i in zip(names, row, strict=True)} for row in rows]


ROWS = covering()


def draw(options, seed=0):
    """(query, key, value, keyword arguments) in float32, as `options` say."""
    B, T, S, N, K, H = options["shape"]
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(s) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    forms = (B, 1, 1, S), (1, 1, T, 1), (1, N, 1, 1), (1, 1, T, S), (B, N, T, 1)
    form = lambda which: (B, N, T, S) if which == "full" else forms[rng.integers(len(forms))]
    kw = {
        "is_causal": options["is_causal"],
        "local_window_size": options["window"],
        "scale": options["scale"],
    }
    if options["bias"]:
        kw["bias"] = rng.standard_normal(form(options["bias"])).astype(np.float32)
    if options["mask"]:
        kw["mask"] = rng.random(form(options["mask"])) < 0.7
    if options["lengths"] == "both":
        kw["query_seq_lengths"] = rng.integers(1, T + 1, B).astype(np.int32)
    if options["lengths"]:
        kw["key_value_seq_lengths"] = rng.integers(1, S + 1, B).astype(np.int32)
    return [x.astype(np.float32) for x in (q, k, v)], kw


def visible(T, S, kw, shape):
    """[B, N, T, S] by the words of the documentation, in NumPy."""
    B, N = shape[0], shape[3]
    i, j = np.arange(T)[:, None], np.arange(S)
    seen = np.ones((B, N, T, S), bool)
    if kw["is_causal"]:
        seen &= j <= i
    if kw["local_window_size"] is not None:
        w = kw["local_window_size"]
        left, right = (w, w) if isinstance(w, int) else w
        seen &= (i - left <= j) & (j <= i + right)
    if "mask" in kw:
        seen &= kw["mask"]
    if "query_seq_lengths" in kw:
        seen &= i < kw["query_seq_lengths"][:, None, None, None]
    if "key_value_seq_lengths" in kw:
        seen &= j < kw["key_value_seq_lengths"][:, None, None, None]
    return seen


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_drop_in_equals_jax(row):
    """Values, residual and gradients, with cotangents on the rows that see something (JAX averages the rest).

    JAX runs in float32 on the same rounded numbers. Scores of at most 5 terms near 3 and sums of 9 keys: 64
    float32 roundings of the largest entry; a half-precision result adds half an ulp of its own.
    """
    options = ROWS[row]
    (q, k, v), kw = draw(options, seed=row)
    dtype, eps = options["dtype"], EPS[options["dtype"]]
    seen = visible(q.shape[1], k.shape[1], kw, options["shape"])
    some = np.moveaxis(seen.any(axis=-1), 1, 2)  # [B, T, N]
    narrow = [x.astype(dtype) for x in (q, k, v)]
    wide = [x.astype(np.float32) for x in narrow]
    weight = np.random.default_rng(1).standard_normal(q.shape) * some[..., None]
    weight = weight.astype(dtype).astype(np.float32)  # the cotangent of a narrow result is narrow
    bias = kw.pop("bias", None)
    more = () if bias is None else (bias,)
    at = tuple(range(3 + len(more)))

    def step(attend):
        def loss(q, k, v, bias=None):
            o, residual = attend(q, k, v, bias, return_residual=True, **kw)
            return jnp.sum(o.astype(jnp.float32) * weight), (o, residual)

        return jax.jit(jax.value_and_grad(loss, at, has_aux=True))

    (_, want), want_grads = step(jax.nn.dot_product_attention)(*wide, *more)
    (_, got), grads = step(accel.dot_product_attention)(*narrow, *more)
    assert got[0].dtype == got[1].dtype == narrow[0].dtype
    assert not np.asarray(got[0], np.float32)[~some].any()
    assert np.isneginf(np.asarray(got[1], np.float32)[~some]).all()
    for n, (g, w) in enumerate(zip((*got, *grads), (*want, *want_grads), strict=True)):
        g, w = np.asarray(g, np.float32), np.asarray(w)
        g, w = (g[some], w[some]) if n < 2 else (g, w)
        atol = (64 * EPS["float32"] + eps) * max(1.0, np.abs(w).max(initial=0))
        np.testing.assert_allclose(g, w, rtol=0, atol=atol)


def test_drop_in_has_the_signature_of_jax():
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (accel.dot_product_attention, jax.nn.dot_product_attention)
    )
    assert sorted(ours, key=str) == sorted(theirs, key=str)
    positional = [p for p in ours if p[1] == inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == [p for p in theirs if p[1] == inspect.Parameter.POSITIONAL_OR_KEYWORD]


def small(seed=0, B=1, T=5, N=2):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((B, T, N, 4)), jnp.float32) for _ in range(3)]


def test_drop_in_padding_and_blind_rows_do_not_leak():
    """NaN beyond the lengths changes neither values nor gradients; no key, no gradient."""
    q, k, v = small(B=2)
    lengths = {
        "query_seq_lengths": jnp.array([4, 3], jnp.int32),
        "key_value_seq_lengths": jnp.array([3, 0], jnp.int32),
    }
    loss = lambda q, k, v: jnp.sum(accel.dot_product_attention(q, k, v, **lengths) ** 2)
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    clean = step(q, k, v)
    q, k, v = q.at[0, 4:].set(jnp.nan), k.at[0, 3:].set(jnp.nan), v.at[0, 3:].set(jnp.inf)
    dirty = step(q.at[1].set(jnp.nan), k.at[1].set(jnp.inf), v.at[1].set(jnp.nan))
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(not g[1].any() for g in clean[1])


def test_drop_in_forward_mode_and_second_order():
    """A tangent of the gradient along a direction, forward over reverse, as JAX's own."""
    args, along = small(), small(1)
    bias = jnp.asarray(np.random.default_rng(2).standard_normal((1, 1, 5, 5)), jnp.float32)

    def both(attend):
        f = lambda q, k, v, b: jnp.sum(attend(q, k, v, b, is_causal=True) ** 3)
        return jax.jit(lambda x, d: jax.jvp(jax.value_and_grad(f, (0, 1, 2, 3)), x, d))(
            (*args, bias), (*along, bias)
        )

    got, want = (
        jax.tree.leaves(both(f)) for f in (accel.dot_product_attention, jax.nn.dot_product_attention)
    )
    for g, w in zip(got, want, strict=True):  # two derivatives of a cube: sums of some 50 products near 10
        np.testing.assert_allclose(g, w, rtol=0, atol=512 * EPS["float32"] * max(1.0, np.abs(w).max()))


def test_drop_in_composes_with_vmap_checkpoint_and_names():
    """vmap over examples with masks of their own; remat changes nothing; the program names the call."""
    q, k, v = (jnp.stack([a, b]) for a, b in zip(small(), small(1), strict=True))
    masks = jnp.asarray(np.random.default_rng(0).random((2, 1, 2, 5, 5)) < 0.7)
    one = lambda q, k, v, m: accel.dot_product_attention(q, k, v, mask=m, local_window_size=(3, 1))
    got = jax.jit(jax.vmap(one))(q, k, v, masks)
    want = [
        jax.nn.dot_product_attention(q[i], k[i], v[i], mask=masks[i], local_window_size=(3, 1))
        for i in (0, 1)
    ]
    some = visible(5, 5, {"is_causal": False, "local_window_size": (3, 1)}, (1, 5, 5, 2))
    some = np.moveaxis((some & np.asarray(masks)).any(-1), -1, -2)
    np.testing.assert_allclose(np.asarray(got)[some], np.stack(want)[some], rtol=0, atol=64 * EPS["float32"])
    loss = lambda q: jnp.sum(one(q, k[0], v[0], masks[0]) ** 2)
    with jax.named_scope("mine"):
        lowered = jax.jit(jax.grad(jax.checkpoint(loss))).lower(q[0])
    assert "dot_product_attention" in lowered.as_text(debug_info=True)
    np.testing.assert_array_equal(lowered.compile()(q[0]), jax.jit(jax.grad(loss))(q[0]))


def test_drop_in_takes_three_axes_arrays_as_scale_and_wide_floats():
    q, k, v = (x[0] for x in small())
    scale = jnp.float32(0.3)
    f = lambda attend, s: jnp.sum(attend(q, k, v, scale=s) ** 2)
    got, want = (
        jax.jit(jax.value_and_grad(partial(f, attend)))(scale)
        for attend in (accel.dot_product_attention, jax.nn.dot_product_attention)
    )
    np.testing.assert_allclose(got, want, rtol=64 * EPS["float32"])
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v)]
        got = accel.dot_product_attention(*wide)
        s = np.einsum("tnh,snh->nts", *wide[:2]) / 2
        p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
        np.testing.assert_allclose(got, np.einsum("nts,snh->tnh", p, wide[2]), rtol=0, atol=64 * 2.0**-52)


@pytest.mark.parametrize("impl", ["triton", "tpu"])
def test_drop_in_kernels_know_windows_and_masks(impl):
    """What the drop-in asks of a kernel beyond `flash_attention`: bounds on both sides, and a mask."""
    q, k, v = (jnp.moveaxis(x, 1, 2) for x in small(T=37))
    tiles = {"triton": (16, 16), "tpu": (16, 128)}[impl]
    mask = jnp.asarray(np.random.default_rng(0).random((1, 1, 37, 37)) < 0.7)

    def run(**how):
        def loss(q, k, v):
            o, lse = tiled_attention(q, k, v, scale=0.5, lo=-9, hi=3, mask=mask, **how)
            return jnp.sum(o**2), (o, lse)

        (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        return *out, *grads

    got = run(kernel=kernel(impl, True), block_q=tiles[0], block_k=tiles[1])
    for g, w in zip(got, run(), strict=True):  # sums of at most 13 keys and 13 queries
        np.testing.assert_allclose(g, w, rtol=0, atol=64 * EPS["float32"] * max(1.0, np.abs(w).max()))


ON_HOPPER = {  # queries, keys, width, options, and the keys that some query sees
    "full": (300, 400, 64, {}, slice(None)),
    "causal": (300, 400, 64, {"is_causal": True}, slice(300)),
    "window": (700, 700, 64, {"local_window_size": 100}, slice(None)),
    "causal window": (1000, 1000, 128, {"local_window_size": (256, 0), "is_causal": True}, slice(None)),
    "narrow window": (333, 500, 128, {"local_window_size": (3, 5)}, slice(338)),
    "window ahead": (200, 500, 64, {"local_window_size": (-70, 90)}, slice(70, 290)),
    "window behind": (500, 200, 32, {"local_window_size": (40, -10)}, slice(None)),
    "wide window, wide heads": (300, 300, 192, {"local_window_size": (150, 20)}, slice(None)),
    "lengths": (300, 400, 64, {"key_value_seq_lengths": np.array([250, 250])}, slice(250)),
    "lengths of queries": (300, 400, 128, {"query_seq_lengths": np.array([300, 120])}, slice(None)),
    "lengths in a causal window": (
        500,
        500,
        64,
        {"is_causal": True, "local_window_size": (70, 0), "key_value_seq_lengths": np.array([260, 260])},
        slice(260),
    ),
    "mask": (300, 400, 64, {"mask": np.arange(400) % 7 < np.arange(300)[:, None] % 6}, slice(None)),
}


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("name", ON_HOPPER, ids=lambda n: n.replace(" ", "_"))
def test_drop_in_for_hopper_on_a_gpu(name):
    """Values, residual and gradients in JAX's layout, keys that nobody sees left out whatever they hold."""
    T, S, H, options, some = ON_HOPPER[name]
    B, N, K = 2, 4, 2
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    q, k, v, do = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes)
    bad = [jnp.full_like(x, jnp.nan).at[:, some].set(x[:, some]) for x in (k, v)]

    def run(q, k, v, implementation):
        f = lambda *x: accel.dot_product_attention(
            *x, implementation=implementation, return_residual=True, **options
        )
        (o, lse), pull = jax.vjp(f, q, k, v)
        return o, lse, *pull((do.astype(o.dtype), jnp.zeros_like(lse)))

    got = jax.jit(lambda *x: run(*x, "hopper"))(q, *bad)
    with jax.default_matmul_precision("highest"):
        want = run(*(x.astype(jnp.float32) for x in (q, k, v)), "xla")
    for g, w in zip(got, want, strict=True):  # P, dS and the results are rounded to 8 bits
        assert g.dtype == jnp.bfloat16
        largest = np.abs(
            np.asarray(w)[np.isfinite(w)]
        ).max()  # of a query that sees nothing the residual is -inf
        np.testing.assert_allclose(g.astype(np.float32), w, rtol=0, atol=4 * 2**-8 * largest)


BIASED = {  # (B, T, S, N, K, H), the bias's shape, the share of it that is -inf, dtype, options
    "of heads": ((2, 300, 400, 4, 2, 64), (1, 4, 300, 400), 0, "bfloat16", {}),
    "causal": ((2, 333, 333, 4, 1, 128), (2, 1, 333, 333), 0.1, "bfloat16", {"is_causal": True}),
    "of keys": (
        (2, 500, 500, 4, 2, 64),
        (2, 1, 1, 500),
        0.1,
        "bfloat16",
        {"local_window_size": (70, 40), "key_value_seq_lengths": np.array([260, 500])},
    ),
    "of queries": (
        (2, 300, 400, 4, 2, 128),
        (1, 4, 300, 1),
        0,
        "bfloat16",
        {"mask": (np.arange(400) % 7 < np.arange(300)[:, None] % 6)[None, None]},
    ),
    "of everything": ((2, 200, 150, 3, 3, 96), (2, 3, 200, 150), 0.5, "float16", {}),
    "few queries": (
        (2, 3, 70, 4, 2, 32),
        (1, 1, 3, 70),
        0,
        "float16",
        {"query_seq_lengths": np.array([3, 2])},
    ),
}


def defined(q, k, v, do, bias, seen):
    """(o, residual, dq, dk, dv, dbias) in float64 by the definition, and what each would be if every term
    counted by its size.
    """
    H, K = q.shape[3], k.shape[2]
    heads = lambda x: np.repeat(np.moveaxis(x, 2, 1), q.shape[2] // x.shape[2], axis=1)
    folded = lambda x: np.moveaxis(x.reshape(len(x), K, -1, *x.shape[2:]).sum(2), 1, 2)
    down, back = lambda x: x.swapaxes(-1, -2), lambda x: np.moveaxis(x, 1, 2)
    over = tuple(a for a in range(4) if bias.shape[a] == 1)
    q, k, v, do = (heads(x) for x in (q, k, v, do))
    s = np.where(seen, H**-0.5 * q @ down(k) + bias, -np.inf)
    top = s.max(-1, keepdims=True)
    p = np.exp(s - np.where(np.isinf(top), 0, top))
    total = p.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + np.where(np.isinf(top), 0, top))[..., 0]
    p = p / np.where(total == 0, 1, total)
    o = p @ v
    found, most = [back(o), back(lse)], [back(p @ np.abs(v)), back(np.abs(lse))]
    ds = p * (do @ down(v) - (do * o).sum(-1, keepdims=True))
    size = p * (np.abs(do) @ down(np.abs(v)) + np.abs(do * o).sum(-1, keepdims=True))
    for into, slopes, sized in ((found, ds, lambda x: x), (most, size, np.abs)):
        into += [
            H**-0.5 * back(slopes @ sized(k)),
            H**-0.5 * folded(down(slopes) @ sized(q)),
            folded(down(p) @ sized(do)),
            slopes.sum(over, keepdims=True),
        ]
    return found, most


def in_hopper(options, learnt):
    """Values, residual and gradients by the kernels for Hopper."""

    def run(q, k, v, do, bias):
        how = {"implementation": "hopper", "return_residual": True, **options}
        f = lambda q, k, v, *bias: accel.dot_product_attention(q, k, v, *bias, **how)
        if learnt:
            (o, lse), pull = jax.vjp(f, q, k, v, bias)
        else:
            (o, lse), pull = jax.vjp(lambda *x: f(*x, bias), q, k, v)
        return o, lse, *pull((do.astype(o.dtype), jnp.zeros_like(lse)))

    return run


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("name", BIASED, ids=lambda n: n.replace(" ", "_"))
def test_drop_in_for_hopper_takes_a_bias_on_a_gpu(name):
    """Values and gradients, the bias's too, as defined; twice the same; keys hidden by -inf, all of a row's.

    P (or o, which dS is made of, and dS) and the result are rounded to half precision, each to one part in
    1 / eps of what it sums by size; 2^-14: float32's rounding of scores, and what float16 has no digits for.
    """
    (B, T, S, N, K, H), shape, gone, dtype, options = BIASED[name]
    rng = np.random.default_rng()
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    bias = np.where(rng.random(shape) < gone, -np.inf, 2 * rng.standard_normal(shape))
    if gone and shape[2] > 1:
        bias[:, :, 5] = -np.inf
    x = [jnp.asarray(y, dtype) for y in (*(rng.standard_normal(s) for s in shapes), bias)]
    call = jax.jit(in_hopper(options, True))
    got, again = call(*x), call(*x)
    wide = [np.asarray(y, np.float64) for y in x]
    seen = visible(T, S, {"is_causal": False, "local_window_size": None, **options}, (B, T, S, N))
    want, most = defined(*wide, seen)
    eps = EPS[dtype]
    for g, other, w, whole in zip(got, again, want, most, strict=True):
        np.testing.assert_array_equal(g, other)
        g, some = np.asarray(g, np.float64), np.isfinite(w)
        assert (g[~some] == w[~some]).all()
        assert (np.abs(g[some] - w[some]) <= 3 * eps * whole[some] + 2.0**-14).all()
    if name == "of heads":  # the bias's gradient changes none of the others
        for g, other in zip(got, jax.jit(in_hopper(options, False))(*x), strict=False):
            np.testing.assert_array_equal(g, other)


@pytest.mark.parametrize("name", ["causal", "of keys"], ids=lambda n: n.replace(" ", "_"))
def test_drop_in_lowers_a_bias_for_hopper(name):
    """Both passes down to the device's own language, without the device; with one more result if learnt."""
    (B, T, S, N, K, H), shape, _, dtype, options = BIASED[name]
    array = lambda *s: jax.ShapeDtypeStruct(s, dtype)
    lengths = options.get("key_value_seq_lengths")

    def run(q, k, v, do, bias):
        attend = lambda *x: drop_in._attention(
            *x, None, None, lengths, None, scale=0.1, impl="hopper",
            is_causal=options.get("is_causal", False), window=options.get("local_window_size"),
        )[0]  # fmt: skip
        return jax.vjp(attend, q, k, v, bias)[1](do)

    text = lowered(
        run, (array(B, T, N, H), *[array(B, S, K, H)] * 2, array(B, T, N, H), array(*shape)), "hopper"
    )
    assert f"tensor<{B}x{N}x{-(-T // 8) * 8}x{-(-S // 64) * 64}x" in text  # dS


@pytest.mark.parametrize("shape", [(1, 2, 9, 11), (2, 1, 1, 11), (1, 1, 9, 1)])
def test_drop_in_sums_the_slopes_of_a_bias(shape):
    """What kernels leave unwritten is NaN here, and does not count."""
    from accel.kernels.flash_hopper_lists import Seen

    rng = np.random.default_rng(0)
    ds, mask = rng.standard_normal((2, 2, 9, 11)).astype(np.float32), rng.random((1, 2, 9, 11)) < 0.5
    end = rng.integers(0, 12, (2, 1, 1)).astype(np.int32)
    i, j = np.indices((9, 11))
    seen = (j <= i + 1) & (j < end[..., None]) & mask
    found = Seen.make(9, 11, 1, hi=1, end=jnp.asarray(end), mask=jnp.asarray(mask)).of_bias(
        jnp.asarray(np.where(seen, ds, np.nan)), jnp.zeros(shape, jnp.bfloat16)
    )
    axes = tuple(a for a in range(4) if shape[a] == 1)
    want = np.where(seen, ds.astype(np.float64), 0).sum(axes, keepdims=True)
    assert found.dtype == jnp.bfloat16
    # half a step of bfloat16; and where up to 44 numbers near 1 nearly cancel, some steps of float32
    np.testing.assert_allclose(found.astype(np.float32), want, rtol=2.0**-8, atol=2.0**-20)


def test_drop_in_makes_the_gradient_of_a_bias_only_where_asked():
    """dS is a result of a kernel, in programs inside programs too, whatever was asked for before."""
    q, bias = (
        jax.ShapeDtypeStruct((2, 70, 2, 32), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 70, 70), jnp.bfloat16),
    )

    @jax.jit
    def loss(q, bias):
        inner = jax.jit(
            lambda q, b: flash.on_hopper_biased(plan, flash.How(rows_first=True), q, q, q, b[None], {})[0]
        )
        return inner(q, bias).astype(jnp.float32).sum()

    plan = flash.Plan(0.1, None, None, 128, 128, 0.0)
    for learnt in ((0, 1), 0, 1, 0, (0, 1)):
        text = str(jax.make_jaxpr(jax.grad(loss, learnt))(q, bias))
        assert ("bf16[2,2,72,128]" in text) == (learnt != 0)


def test_drop_in_takes_hopper_for_a_bias_of_its_dtype(monkeypatch):
    """The choice alone: no GPU is there."""
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    monkeypatch.setattr(flash, "hopper_obstacle", lambda *_: None)
    taken = []
    monkeypatch.setattr(drop_in, "_attention", lambda q, *_, impl, **__: taken.append(impl) or (q, q[..., 0]))
    call = accel.dot_product_attention
    for width, dtype, bias in ((64, "bfloat16", "bfloat16"), (64, "bfloat16", "float32"),
                               (192, "float16", "float16"), (64, "float32", "float32")):  # fmt: skip
        x = jnp.zeros((1, 256, 1, width), dtype)
        call(x, x, x, jnp.zeros((1, 1, 256, 256), bias))
    assert taken == ["hopper", "xla", "xla", "xla"]
    half = jnp.zeros((1, 256, 1, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="takes a bias of bfloat16 as query, not float32"):
        call(half, half, half, jnp.zeros((1, 1, 1, 256), jnp.float32), implementation="hopper")
    with pytest.raises(NotImplementedError, match="takes no bias with a scale of 0"):
        call(half, half, half, half[:, :1, :, :1], scale=0.0, implementation="hopper")
    wide = jnp.zeros((1, 256, 1, 192), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="no bias for heads over 128"):
        call(wide, wide, wide, jnp.zeros((1, 1, 1, 256), jnp.bfloat16), implementation="hopper")


Q = np.zeros((2, 3, 4, 8), np.float32)
BAD = {
    "implementation": ({"implementation": "fast"}, "implementation must be one of"),
    "heads": ({"key": Q[:, :, :3], "value": Q[:, :, :3]}, "not a multiple of the K=3"),
    "key": ({"key": Q[..., :7]}, "axis H is 8 in query"),
    "value": ({"value": Q[:, :2]}, "axis S is 3 in key"),
    "width": ({n: Q[..., :0] for n in ("query", "key", "value")}, "heads must be at least 1 wide"),
    "axes": ({"query": Q[None]}, "query must have at most 4 axes"),
    "dtype": ({"key": Q.astype(np.float16)}, "one floating dtype"),
    "whole numbers": ({n: Q.astype(np.int32) for n in ("query", "key", "value")}, "one floating dtype"),
    "mask dtype": ({"mask": np.ones((1, 1, 3, 3), np.float32)}, "mask must be boolean"),
    "mask shape": ({"mask": np.ones((1, 2, 3, 3), bool)}, "mask of shape"),
    "bias shape": ({"bias": np.ones((1, 1, 3, 5), np.float32)}, "bias of shape"),
    "lengths dtype": ({"query_seq_lengths": np.ones(2, np.float32)}, "query_seq_lengths must be integers"),
    "lengths shape": (
        {"key_value_seq_lengths": np.ones(3, np.int32)},
        "key_value_seq_lengths must have shape",
    ),
}


@pytest.mark.parametrize("name", BAD, ids=lambda n: n.replace(" ", "_"))
def test_drop_in_rejects(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        accel.dot_product_attention(**{"query": Q, "key": Q, "value": Q, **options})


def test_drop_in_implementation_asked_by_name_says_why_not():
    for options, message in (
        ({"implementation": "hopper"}, '^implementation="hopper" takes .*; use implementation="triton"'),
        ({"implementation": "tpu"}, "needs a TPU"),
        ({"implementation": "triton", "bias": np.zeros((1, 1, 3, 3), np.float32)}, "has no bias"),
        ({"implementation": "triton", "scale": jnp.float32(1)}, "needs a scale that is a number"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            accel.dot_product_attention(Q, Q, Q, **options)
