"""FlashAttention: laws on ref, golden vectors in ref and accel, kernels, bad inputs, what hardware pays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import accel
import ref
from accel.attention import flash
from accel.blocks import backend
from ref.catalog import technique
from tests.attention import laws_flash
from tests.claims import flash as claims
from tests.claims import record
from tests.golden_runner import golden, run, run_accel
from tests.hw_record import Cost, size
from tests.laws import law_tests
from tests.lower import lowered

globals().update(law_tests(laws_flash))

EPS32 = float(np.finfo(np.float32).eps)
KERNELS = {"triton": {"block_q": 16, "block_k": 16}, "tpu": {"block_q": 16, "block_k": 128}}
kernels = pytest.mark.parametrize("impl", KERNELS, ids=lambda i: f"flash_{i}")


def pairs(q, k):
    """Query-key pairs of all heads: accel computes whole tiles, and one tile holds the example."""
    return q[..., 0].size * k.shape[-2]


def rows(q, v):
    """Elements of o and lse."""
    return q[..., 0].size * (v.shape[-1] + 1)


HW = {
    "flash_attention": Cost(
        macs=lambda q, k, v, **_: pairs(q, k) * (q.shape[-1] + v.shape[-1]),
        bytes=lambda q, k, v, **_: size(q, k, v) + 4 * rows(q, v),
        bound={"h200": "overhead", "xeon_6154": "arithmetic"},  # the XLA path: a launch a tile on a GPU
        large=(("float32", (1, 16, 4096, 64)),) * 3,
    ),
    "flash_attention_bwd": Cost(  # the scores again, then dv, dp, dq and dk
        macs=lambda do, q, k, v, *_, **__: pairs(q, k) * (3 * q.shape[-1] + 2 * v.shape[-1]),
        ref=lambda do, q, k, v, *_, **__: pairs(q, k) * (4 * q.shape[-1] + 3 * v.shape[-1]),  # two passes
        bytes=lambda do, q, k, v, o, lse, **_: size(do, q, k, v, o, lse) + size(q, k, v),
    ),
    "attention_dense": Cost(
        macs=lambda q, k, v, **_: pairs(q, k) * (q.shape[-1] + v.shape[-1]),
        bytes=lambda q, k, v, **_: size(q, k, v) + 4 * q[..., 0].size * v.shape[-1],
    ),
    "merge": Cost(macs=lambda *_, **__: 0, bytes=lambda a, b: size(*a, *b) + size(*a)),
    "finalize": Cost(macs=lambda *_, **__: 0, bytes=lambda s: size(*s) + size(s.acc, s.m)),
    "online_softmax": Cost(macs=lambda *_, **__: 0, bytes=lambda x, **_: 2 * size(x) + 2 * size(x[..., 0])),
}


@golden("flash")
def test_flash_golden_ref(case):
    run(case, ref.flash)


@pytest.mark.parametrize("x64", [False, True], ids=["flash_float32", "flash_float64"])
@golden("flash", only=technique("flash").core)
def test_flash_golden_accel(case, x64):
    """float64 with the case's tiles, float32 with the tiles that accel chooses."""
    run_accel(case, accel.flash, x64=x64, options={} if x64 else {"block_q": 128, "block_k": 128})


def problem(B=2, H=4, Hkv=2, L=21, S=37, D=12, Dv=6, dtype=np.float32):
    """q, k, v, do and the cotangent of lse, sizes off every tile."""
    rng = np.random.default_rng(0)
    shapes = (B, H, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv), (B, H, L, Dv), (B, H, L)
    return [rng.standard_normal(s).astype(dtype) for s in shapes]


def bound(q, k, v, times=1.0):
    """laws_flash.rounding in float32, for gradients times the size of what they are multiplied by."""
    return times * laws_flash.rounding(q, k, v, q.shape[-1] ** -0.5, EPS32)


def check_kernel(impl, options, *, interpret):
    """Values, lse and all gradients of a kernel against ref; lengths 37 (all), 9 (rows that see nothing)."""
    q, k, v, do, _ = problem()
    lengths = np.array([[37], [9]])
    bad_k, bad_v = k.copy(), v.copy()
    bad_k[1, :, 9:], bad_v[1, :, 9:] = np.nan, np.inf  # padding must not leak

    def loss(q, k, v):
        o, lse = accel.flash.flash_attention(
            q,
            k,
            v,
            causal=True,
            key_lengths=lengths,
            return_lse=True,
            impl=impl,
            interpret=interpret,
            **options,
        )
        return jnp.sum(o * do), (o, lse)

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, (o, lse)), grads = step(*map(jnp.asarray, (q, bad_k, bad_v)))
    call = {"causal": True, "key_lengths": lengths}
    want_o, want_lse = ref.flash.flash_attention(q, k, v, return_lse=True, **call)
    assert np.isneginf(want_lse[1, :, :12]).all()  # 21 queries on 9 keys: the first 12 see none
    np.testing.assert_allclose(o, want_o, rtol=0, atol=bound(q, k, v))
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=bound(q, k, v) + 8 * EPS32)
    want = ref.flash.flash_attention_bwd(do, q, k, v, want_o, want_lse, **call)
    # dP = do v^T has Dv terms; dq, dk and dv add up to 37 of those, times k, q and 1
    most = 37 * np.abs(do).max() * max(np.abs(k).max(), np.abs(q).max())
    for g, w in zip(grads, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=bound(q, k, v, most))


@kernels
def test_flash_kernel_matches_ref(impl):
    check_kernel(impl, KERNELS[impl], interpret=True)


@pytest.mark.gpu
def test_flash_kernel_matches_ref_on_a_gpu():
    check_kernel("triton", {}, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True], ids=["flash_full", "flash_causal"])
@pytest.mark.parametrize("D", [64, 128], ids=["flash_D64", "flash_D128"])
@pytest.mark.parametrize(
    "impl", ["triton", pytest.param("hopper", marks=pytest.mark.hopper)], ids=lambda i: f"flash_{i}"
)
def test_flash_kernel_in_bfloat16_on_a_gpu(causal, D, impl):
    """Half-precision tiles of full size: within the rounding of P, dS and the results to bfloat16."""
    rng = np.random.default_rng(0)
    q, k, v, do = (jnp.asarray(rng.standard_normal((1, 2, 1000, D)), jnp.bfloat16) for _ in range(4))

    def grads(q, k, v, impl):
        f = lambda *x: accel.flash.flash_attention(*x, causal=causal, impl=impl)
        o, pull = jax.vjp(f, q, k, v)
        return o, *pull(do.astype(o.dtype))

    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    with jax.default_matmul_precision("highest"):
        want = grads(*wide, "xla")
    for got, w in zip(grads(q, k, v, impl), want, strict=True):
        scale = float(jnp.abs(w).max())
        np.testing.assert_allclose(got.astype(np.float32), w, rtol=0, atol=4 * 2**-8 * scale)


HOPPER = {  # [B, H, L, D], key heads, keys, value width, causal, dtype
    "tiles": ((1, 2, 512, 128), 2, 512, 128, False, "bfloat16"),
    "causal": ((2, 4, 1000, 128), 2, 1000, 128, True, "bfloat16"),
    "more_keys": ((2, 4, 333, 64), 1, 777, 64, True, "bfloat16"),
    "more_queries": ((1, 2, 777, 64), 2, 333, 64, True, "float16"),
    "many_heads": ((4, 40, 700, 64), 8, 700, 64, True, "bfloat16"),
    "narrow": ((1, 2, 300, 32), 1, 300, 32, True, "float16"),
    "odd_head": ((1, 2, 301, 80), 2, 299, 72, False, "bfloat16"),
    "wide": ((1, 2, 400, 192), 2, 400, 128, True, "bfloat16"),
    "widest": ((1, 2, 400, 256), 1, 500, 256, True, "bfloat16"),
    "clusters": ((2, 12, 1000, 128), 4, 900, 128, False, "bfloat16"),
    "clusters_odd_head": ((1, 6, 256, 88), 2, 333, 72, False, "float16"),
    "one_query": ((2, 4, 1, 128), 2, 1000, 128, True, "bfloat16"),
    "one_key": ((1, 1, 70, 64), 1, 1, 64, False, "float16"),
}
SCALES = {
    "causal": -0.1,
    "more_queries": 0.0,
    "odd_head": -0.3,
}  # of these cases; the others have 1 / sqrt(D)


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("name", [*HOPPER, *(f"{n}_scaled" for n in SCALES)], ids=lambda n: f"flash_{n}")
def test_flash_hopper_matches_ref_on_a_gpu(name):
    """o and gradients within the rounding of P, o, dS and results to half precision; lse within float32's."""
    (B, H, L, D), Hkv, S, Dv, causal, dtype = HOPPER[name.removesuffix("_scaled")]
    scale = SCALES[name.removesuffix("_scaled")] if name.endswith("_scaled") else D**-0.5
    rng = np.random.default_rng()
    shapes = (B, H, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv), (B, H, L, Dv)
    q, k, v, do = (jnp.asarray(2 * rng.standard_normal(s), dtype) for s in shapes)
    options = {"causal": causal, "scale": scale}
    call = jax.jit(lambda *x: accel.flash.flash_attention(*x, return_lse=True, impl="hopper", **options))
    (o, lse), again = call(q, k, v), call(q, k, v)
    assert o.dtype == q.dtype
    for one, other in zip((o, lse), again, strict=True):
        np.testing.assert_array_equal(one, other)
    wide = [np.asarray(x, np.float64) for x in (q, k, v, do)]
    want_o, want_lse = ref.flash.flash_attention(*wide[:3], return_lse=True, **options)
    eps = float(jnp.finfo(dtype).eps)
    assert np.abs(np.asarray(o, np.float64) - want_o).max() <= 2 * eps * np.abs(wide[2]).max()
    assert (np.isneginf(lse) == np.isneginf(want_lse)).all()
    some = np.isfinite(want_lse)
    np.testing.assert_allclose(
        np.asarray(lse)[some], want_lse[some], rtol=0, atol=bound(*wide[:3]) + 2.0**-20
    )
    back = jax.jit(lambda *x: accel.flash.flash_attention_bwd(*x, impl="hopper", **options))
    got, again = (back(do, q, k, v, o, lse) for _ in range(2))
    want = ref.flash.flash_attention_bwd(wide[3], *wide[:3], want_o, want_lse, **options)
    seen = np.arange(S) - np.arange(L)[:, None] <= (S - L if causal else S)
    most = gradient_sizes(*wide, want_o, want_lse, seen, scale)
    for g, other, w, whole in zip(got, again, want, most, strict=True):
        np.testing.assert_array_equal(g, other)
        assert g.dtype == q.dtype
        assert np.abs(np.asarray(g, np.float64) - w).max() <= 2 * eps * whole


def gradient_sizes(q, k, v, do, o, lse, seen, scale):
    """What dq, dk and dv are at most if every term counts by its size: an error of one part is so much."""
    H, (Hkv, S) = q.shape[1], k.shape[1:3]
    each = lambda x: np.repeat(x, H // Hkv, axis=1)
    summed = lambda x: x.sum(-2).reshape(len(x), Hkv, -1, S).sum(2).max()
    p = np.exp(scale * q @ each(k).swapaxes(-1, -2) - np.where(np.isinf(lse), np.inf, lse)[..., None]) * seen
    slopes = p * (np.abs(do @ each(v).swapaxes(-1, -2)) + np.abs(do * o).sum(-1)[..., None])
    dq, dk = slopes.sum(-1).max() * np.abs(k).max(), summed(slopes) * np.abs(q).max()
    return abs(scale) * dq, abs(scale) * dk, summed(p) * np.abs(do).max()


HIDDEN = {  # [B, H, L, D], key heads, keys, causal, key_lengths, axes of the mask
    "lengths": ((3, 4, 300, 128), 2, 420, False, [420, 133, 0], None),
    "lengths_causal": ((2, 4, 420, 64), 2, 420, True, [400, 97], None),
    "lengths_of_heads": ((2, 3, 100, 32), 3, 200, True, [[200, 64, 31], [128, 0, 199]], None),
    "mask_of_heads": ((2, 4, 300, 128), 2, 420, False, None, (1, 4, 300, 420)),
    "mask_of_batches": ((2, 3, 270, 64), 1, 333, True, [300, 301], (2, 1, 270, 333)),
    "mask_of_keys": ((2, 4, 420, 128), 2, 420, True, None, (2, 1, 1, 420)),
    "mask_wide": ((1, 2, 200, 192), 1, 300, True, None, (1, 1, 200, 300)),
    "mask_of_one_query": ((2, 8, 1, 64), 2, 500, False, [500, 77], (2, 1, 1, 500)),
    "segments": ((2, 4, 300, 128), 2, 420, False, None, None),
    "segments_causal": ((2, 2, 333, 64), 1, 333, True, [333, 200], None),
    "segments_wide": ((2, 2, 200, 192), 2, 300, False, None, (2, 1, 1, 300)),
    "texts": ((2, 4, 420, 128), 2, 420, False, None, None),
    "texts_causal": ((2, 2, 333, 64), 1, 333, True, None, None),
    "texts_wide": ((2, 2, 200, 192), 1, 200, True, None, None),
}


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("name", HIDDEN, ids=lambda n: f"flash_{n}")
def test_flash_hopper_with_hidden_keys_matches_ref_on_a_gpu(name):
    """Values and gradients, bounds as above; rows that see nothing, and NaN in what nothing sees, count 0."""
    (B, H, L, D), Hkv, S, causal, lengths, mask = HIDDEN[name]
    rng = np.random.default_rng()
    shapes = (B, H, L, D), (B, Hkv, S, D), (B, Hkv, S, D), (B, H, L, D)
    q, k, v, do = (jnp.asarray(2 * rng.standard_normal(s), jnp.bfloat16) for s in shapes)
    options = {"causal": causal}
    if lengths is not None:
        options["key_lengths"] = np.array(lengths).reshape(B, -1)
    if mask is not None:
        options["mask"] = rng.random(mask) < 0.5
        options["mask"][..., 20:40], options["mask"][..., 60:200, 64:200] = False, True
    if name.startswith("segments"):
        cuts = np.sort(rng.integers(0, 5, (B, L + S)))
        options["q_segment_ids"], options["kv_segment_ids"] = cuts[:, ::2][:, :L], cuts[:, -S:]
    if name.startswith("texts"):  # one array for both
        options["q_segment_ids"] = options["kv_segment_ids"] = np.sort(rng.integers(0, 5, (B, L)))
    seen = visible(L, S, (B, H), **options)
    used = seen.reshape(B, Hkv, -1, L, S).any((2, 3))[..., None]
    rows = seen.any(-1)[..., None]
    bad = [jnp.where(keep, x, jnp.nan) for keep, x in ((rows, q), (used, k), (used, v), (rows, do))]

    def call(q, k, v, do):
        f = lambda *x: accel.flash.flash_attention(*x, return_lse=True, impl="hopper", **options)
        (o, lse), pull = jax.vjp(f, q, k, v)
        return o, lse, *pull((do, jnp.zeros_like(lse)))

    (o, lse, *got), again = jax.jit(call)(*bad), jax.jit(call)(*bad)
    for one, other in zip((o, lse, *got), again, strict=True):
        np.testing.assert_array_equal(one, other)
    wide = [np.asarray(x, np.float64) for x in (q, k, v, do)]
    want_o, want_lse = ref.flash.flash_attention(*wide[:3], return_lse=True, **options)
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    assert np.abs(np.asarray(o, np.float64) - want_o).max() <= 2 * eps * np.abs(wide[2]).max()
    np.testing.assert_array_equal(np.isneginf(lse), ~rows[..., 0])
    some = np.isfinite(want_lse)
    np.testing.assert_allclose(
        np.asarray(lse)[some], want_lse[some], rtol=0, atol=bound(*wide[:3]) + 2.0**-20
    )
    want = ref.flash.flash_attention_bwd(wide[3], *wide[:3], want_o, want_lse, **options)
    most = gradient_sizes(*wide, want_o, want_lse, seen, D**-0.5)
    for g, w, whole in zip(got, want, most, strict=True):
        assert np.abs(np.asarray(g, np.float64) - w).max() <= 2 * eps * whole


def visible(L, S, lead, *, causal, key_lengths=None, mask=True, q_segment_ids=None, kv_segment_ids=None):
    """bool [*lead, L, S]: the definition, written out."""
    n = np.full((*lead, 1, 1), S)
    if key_lengths is not None:
        n = np.broadcast_to(key_lengths, lead)[..., None, None]
    i, j = np.indices((L, S))
    seen = j < n
    if q_segment_ids is not None:
        seen = seen & (q_segment_ids[:, None, :, None] == kv_segment_ids[:, None, None])
    return np.broadcast_to((seen & (j <= i + n - L) if causal else seen) & mask, (*lead, L, S))


@pytest.mark.gpu
@pytest.mark.hopper
def test_flash_hopper_is_what_auto_takes_and_maps_on_a_gpu():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((3, 2, 200, 64)), jnp.bfloat16) for _ in range(3))
    call, seen = accel.flash.flash_attention, rng.random((200, 200)) < 0.5
    assert "mosaic_gpu" in jax.jit(call).lower(q, k, v).as_text()
    assert "mosaic_gpu" not in jax.jit(call).lower(*(x.astype(jnp.float32) for x in (q, k, v))).as_text()
    np.testing.assert_array_equal(jax.vmap(call)(q, k, v), call(q, k, v))
    masked = lambda *x: call(*x, mask=seen, key_lengths=np.array(150), impl="hopper")
    np.testing.assert_array_equal(jax.vmap(masked)(q, k, v), masked(q, k, v))
    with pytest.raises(NotImplementedError, match="differentiable once"):
        jax.eval_shape(jax.hessian(lambda q: call(q, k, v, impl="hopper").astype(jnp.float32).sum()), q)


TASKS = {  # B, H, L, S, hi, groups
    "full": (2, 3, 1000, 900, None, 2),
    "few": (1, 8, 2048, 999, -300, 2),
    "pairs": (4, 16, 4096, 4096, 0, 2),
    "turned": (4, 16, 4096, 4096, 0, 3),
}


@pytest.mark.parametrize("name", TASKS, ids=lambda n: f"flash_{n}")
def test_flash_hopper_takes_every_tile_once_and_evenly(name):
    """The list of each block; causal calls with many tiles cost every block the same, or nearly."""
    module = accel.flash.kernel_module("hopper")
    B, H, L, S, hi, groups = TASKS[name]
    tasks = module.Tasks.make(B * H, -(-L // (64 * groups)), hi is not None, 132)
    plan = module._Plan(H, 1, S, None, hi, 64 * groups, 128, False, tasks)

    def turn(block, i):
        some, head, tile = tasks.at(block, i)
        b, h, first = plan.place(head, tile)
        return some, b, h, first, plan.band.of_block(first, plan.rows)[1]

    each = jax.jit(jax.vmap(jax.vmap(turn, (None, 0)), (0, None)))
    at = each(jnp.arange(tasks.blocks, dtype=jnp.int32), jnp.arange(tasks.turns, dtype=jnp.int32))
    some, b, h, first, n = (np.broadcast_to(x, at[0].shape) for x in at)
    taken = sorted(zip(b[some], h[some], first[some], strict=True))
    assert taken == [(x, y, z) for x in range(B) for y in range(H) for z in range(0, L, plan.rows)]
    last = S - 1 if hi is None else np.minimum(np.minimum(first + plan.rows, L) - 1 + hi, S - 1)
    assert (n * 128 > last)[some].all()
    assert tasks.pairs == (name == "pairs")
    work = n * some
    if tasks.pairs:
        work = work.reshape(tasks.blocks, -1, 2).sum(-1)
        assert np.ptp(work[work > 0]) <= 1
    elif name == "turned":
        assert np.ptp(work.sum(-1)) <= 0.05 * work.sum(-1).mean()


ROWS_IN_BLOCKS = {  # (B, H, L, D), what hides keys, given the queries' numbers [1, 1, L]
    "causal": ((1, 3, 640, 128), lambda i: {"hi": 0}),
    "causal_slim": ((1, 3, 960, 64), lambda i: {"hi": 0}),
    "window": ((2, 2, 900, 128), lambda i: {"lo": -200, "hi": 100}),
    "window_slim": ((1, 2, 900, 64), lambda i: {"lo": -100, "hi": 130}),
    "together": ((1, 2, 512, 128), lambda i: {}),
    "wide": ((1, 2, 500, 192), lambda i: {}),
    "lengths": ((2, 2, 640, 64), lambda i: {"end": jnp.array([[[640]], [[77]]], jnp.int32)}),
    "texts": ((1, 2, 700, 128), lambda i: {"start": i // 300 * 300, "end": i // 300 * 300 + 300, "hi": 0}),
    "mask": ((1, 2, 500, 128), lambda i: {"mask": i[..., None] * i[..., None, :] % 3 > 0}),
}


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("name", ROWS_IN_BLOCKS, ids=lambda n: f"flash_{n}")
def test_flash_hopper_rows_of_tiles_follow_each_other_on_a_gpu(name):
    """One or two blocks that take all rows of tiles, one after the other: the bits of blocks that take one
    row each, whose values the tests below check.
    """
    from accel.kernels import flash_hopper, flash_hopper_backward

    shape, hides = ROWS_IN_BLOCKS[name]
    rng = np.random.default_rng(0)
    q, k, v, do = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(4))
    told = {"scale": 0.1, **hides(jnp.arange(shape[2], dtype=jnp.int32)[None, None])}

    def passes(cores):
        o, lse = flash_hopper.attend(q, k, v, cores=cores, **told)
        if shape[3] > flash_hopper_backward.WIDEST:
            return o, lse
        x = do, q, k, v, jnp.where(lse > -jnp.inf, lse, jnp.inf), (o * do).sum(-1, dtype=jnp.float32)
        return o, lse, *flash_hopper_backward.attend_backward(*x, cores=cores, **told)

    apart = passes(132)
    for cores in (1, 2):
        for got, want in zip(passes(cores), apart, strict=True):
            np.testing.assert_array_equal(got, want)


def test_flash_hopper_clusters_hold_tiles_side_by_side():
    """Both blocks of a cluster: the same turns, one head, tiles 2j and 2j + 1, where they load together."""
    module = accel.flash.kernel_module("hopper")
    found = {}
    for heads, tall, causal, cores in np.ndindex(4, 9, 2, 9):
        tasks = module.Tasks.make(heads + 1, tall + 1, bool(causal), 2 * cores + 4)
        found.setdefault((tasks.causal, tasks.pairs, tasks.side_by_side), tasks)
    kinds = [(False, False), (True, True), (True, False)]
    assert set(found) == {(*k, False) for k in kinds} | {(False, False, True)}
    for key, tasks in found.items():
        if key[2]:
            each = jax.jit(jax.vmap(jax.vmap(tasks.at, (None, 0)), (0, None)))
            count = lambda n: jnp.arange(n, dtype=jnp.int32)
            some, head, tile = map(np.asarray, each(count(tasks.blocks), count(tasks.turns)))
            np.testing.assert_array_equal(some[::2], some[1::2])
            both = some[::2]
            np.testing.assert_array_equal(head[::2][both], head[1::2][both])
            np.testing.assert_array_equal(tile[::2][both] ^ 1, tile[1::2][both])


def test_flash_hopper_takes_long_tiles_first_where_batches_differ():
    """The order by cost: every tile of every head once, the longest first, no block with much more to do."""
    from accel.kernels.flash_hopper_lists import by_cost

    B, H, tall = 3, 4, 10
    rng = np.random.default_rng(0)
    cost = rng.integers(0, 9, (B, 1, tall))
    lists = jnp.asarray(np.concatenate([cost[..., None], 0 * cost[..., None]], axis=3), jnp.int32)
    sort = jax.jit(by_cost, static_argnums=1)
    order = sort(lists, tall)
    assert sort(lists[:1, :, :1], tall) is None  # every tile costs the same
    shared = sort(lists[:, :, :1], tall)  # the rows of a batch cost the same
    assert sorted(np.asarray(shared)) == list(range(B * tall))
    assert (np.diff(cost[np.asarray(shared) // tall, 0, 0]) <= 0).all()
    met = cost.reshape(-1)[np.asarray(order)]
    assert (np.diff(met) <= 0).all()
    tasks = accel.flash.kernel_module("hopper").Tasks.make(B * H, tall, False, 7)
    rounds = tasks.dealt(order)
    each = jax.jit(jax.vmap(jax.vmap(lambda b, i: tasks.at(b, i, rounds), (None, 0)), (0, None)))
    count = lambda n: jnp.arange(n, dtype=jnp.int32)
    some, head, tile = map(np.asarray, each(count(tasks.blocks), count(tasks.turns)))
    assert sorted(zip(head[some], tile[some], strict=True)) == list(np.ndindex(B * H, tall))
    work = (cost[head // H, 0, tile] * some).sum(1)
    assert work.max() <= work.mean() + cost.max() / 2


BANDS = {  # L, S, lo, hi, keys a tile
    "flash_window": (300, 300, -40, 40, 64),
    "flash_causal": (300, 400, None, 100, 128),
    "flash_before": (200, 200, -500, -30, 64),
    "flash_ahead": (190, 333, 70, 90, 128),
    "flash_all": (70, 129, None, None, 64),
    "flash_window_apart": (700, 700, -256, 256, 64),
    "flash_causal_apart": (500, 500, -300, 0, 128),
    "flash_window_past_the_end": (700, 400, -256, 256, 64),
}


@pytest.mark.parametrize("name", BANDS)
def test_flash_hopper_bands_hold_what_is_seen_and_know_what_is_cut(name):
    """Every group's tiles: all that hold a visible pair are taken; those taken for whole are whole; where
    both ends are apart, lo cuts none of the tiles in front, and nothing else those after the whole ones.
    """
    L, S, lo, hi, keys = BANDS[name]
    module = accel.flash.kernel_module("hopper")
    band = module.Band(S, lo, hi, keys)
    far = np.arange(S)[None] - np.arange(-(-L // 64) * 64)[:, None]
    seen = (far >= (-S if lo is None else lo)) & (
        far <= (S if hi is None else hi) + (0 if hi is not None else L)
    )
    seen = np.pad(seen, [(0, 0), (0, -S % keys)])
    apart = band.apart(len(seen))
    assert apart == (name in ("flash_before", "flash_window_apart", "flash_causal_apart"))
    for block in range(0, L, 192):
        begin, end = map(int, band.of_block(block, 192))
        for first in range(block, min(block + 192, L), 64):
            own_begin, own_end = map(int, band.ends(first, 64))
            assert begin <= own_begin < own_end <= end
            tiles = seen[first : first + 64].reshape(64, -1, keys)
            some, whole = tiles.any((0, 2)), tiles.all((0, 2))
            assert not some[:own_begin].any()
            assert not some[own_end:].any()
            see = band.sight(first, jnp.int32(own_begin), jnp.int32(own_end))
            taken = [int(see.key(x)) // keys for x in range(int(see.n))]
            assert sorted(taken) == list(range(own_begin, own_end))
            assert whole[taken[int(see.hidden) : int(see.clear)]].all()
            if apart:
                row, key = np.arange(64)[:, None] + first, np.arange(seen.shape[1])[None]
                tiles = lambda cut: cut.reshape(64, -1, keys).any((0, 2))
                below, beyond = tiles(key < row + lo), tiles((key > row + hi) | (key >= S))
                assert not below[taken[: int(see.hidden)]].any()
                assert not beyond[taken[int(see.clear) :]].any()
            if not (band.edge or lo is not None):
                assert whole.all()


BOUNDED = {  # what hides keys of two batches of two heads, 140 queries and 300 keys
    "flash_lengths": ("lengths",),
    "flash_ends": ("ends", "causal"),
    "flash_window": ("lengths", "window"),
    "flash_padding": ("padding", "causal"),
    "flash_mask": ("mask",),
    "flash_segments": ("segments", "causal"),
}


@pytest.mark.parametrize(
    ("name", "by_key"),
    [(n, i % 2 == 1) for i, n in enumerate(BOUNDED)] + [("flash_mask", True), ("flash_lengths", True)],
)
def test_flash_hopper_lists_meet_every_visible_pair_once(name, by_key):
    """What the kernels make of lists, bounds and mask, pair by pair; no tile is visited that nobody sees."""
    from accel.kernels.flash_hopper_lists import Seen, unpacked

    (B, H, L, S), (size, keys) = (2, 2, 140, 300), (64, 128) if by_key else (128, 64)
    rng = np.random.default_rng(0)
    options = {}
    for part in BOUNDED[name]:
        options |= {
            "lengths": {"end": np.array([[[0]], [[167]]], np.int32)},
            "ends": {"end": rng.integers(-1, S - 50, (B, H, L)).astype(np.int32)},
            "causal": {"hi": S - L},
            "window": {"lo": -20, "hi": 30},
            "segments": {n: np.sort(rng.integers(0, S, (B, 1, L)), -1) for n in ("start", "end")},
            "padding": {"mask": rng.random((B, 1, 1, S)) < np.linspace(1.5, 0, S)},
            "mask": {"mask": rng.random((1, H, L, S)) < np.where(np.arange(S) < 150, 1, 1e-4)},
        }[part]
    i, j = np.indices((L, S))
    seen = options.get("mask", True) & (j < options.get("end", np.full((1, 1, 1), S))[..., None])
    seen = seen & (j >= options.get("start", np.zeros((1, 1, 1)))[..., None])
    seen = seen & (j - i >= options.get("lo", -L)) & (j - i <= options.get("hi", S))
    seen = np.broadcast_to(seen, (B, H, L, S))
    static = {n: options.pop(n) for n in ("lo", "hi") if n in options}

    @jax.jit
    def told(arrays):
        made = Seen.make(L, S, 1, **static, **arrays)
        lists, bounds, mask, *_ = (made.by_key if by_key else made.by_query)(size, keys)
        return lists, bounds, None if mask is None else unpacked(mask)

    full = lambda x: None if x is None else np.broadcast_to(x, (B, H, *x.shape[2:]))
    lists, bounds, mask = map(full, told(options))
    if by_key and mask is not None:
        mask = mask.swapaxes(2, 3)
    met = np.zeros((B, H, L + size, S + keys), int)
    for b, h, tile in np.ndindex(B, H, -(-S // keys) if by_key else -(-L // size)):
        n, cut, *places = lists[b, h, min(tile, lists.shape[2] - 1)]
        for x, at in enumerate(places[:n]):
            top, left = (at, tile * keys) if by_key else (tile * size, at)
            i, j = top + np.arange(size)[:, None], left + np.arange(keys)
            shown = (i < L) & (j < S)
            if x < cut and bounds is not None:
                start, end = bounds[b, h][:, np.minimum(i, bounds.shape[3] - 1)]
                shown &= (j >= start) & (j < end)
            if x < cut and mask is not None:
                at = (np.minimum(x, n - 1) for x, n in zip((i, j), mask.shape[2:], strict=True))
                shown &= mask[b, h, *at]
            met[b, h, top : top + size, left : left + keys] += shown
            assert shown.any() or (bounds is not None and mask is not None)  # each alone is exact
    np.testing.assert_array_equal(met[:, :, :L, :S], seen)
    assert not met[:, :, L:].any()


def _texts(rng, L, S):
    """{start, end}, [2, 1, L], of texts by ids with gaps on both sides, cut by lengths."""
    draw = lambda n: np.sort(rng.choice(rng.integers(-1, 20, 6), (2, n)), -1)
    ids, others, length = draw(L), draw(S), rng.integers(S // 2, S + 1, (2, 1, 1))
    each = lambda side: np.stack([np.searchsorted(x, y, side) for x, y in zip(others, ids, strict=True)])
    return {"start": each("left")[:, None], "end": np.minimum(each("right")[:, None], length)}


def _ends(rng, L, S):
    """{end}, [2, 1, L]: lengths of keys, and of queries, beyond which rows see nothing."""
    length, rows = rng.integers(0, S + 1, (2, 1, 1)), rng.integers(0, L + 1, (2, 1, 1))
    return {"end": np.where(np.arange(L) < rows, length, 0)}


RUNS = {  # what is drawn by lot for two batches, and lo, hi
    "flash_lengths": (lambda rng, L, S: {"end": rng.integers(0, S + 1, (2, 1, 1))}, None, None),
    "flash_window": (_ends, -99, 30),
    "flash_segments": (_texts, None, None),
    "flash_segments_causal": (_texts, None, 20),
}


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_flash_hopper_runs_are_what_comparisons_list(name, by_key):
    """Lists found from the ends of runs are those of the pairs themselves, seen and whole, in their order; so
    are the keys that anybody sees.
    """
    from accel.kernels.flash_hopper_lists import Seen, listing

    L, S, size, keys = (140, 300, 64, 128) if by_key else (333, 270, 128, 64)
    draw, lo, hi = RUNS[name]

    @jax.jit
    def told(arrays):
        made = Seen.make(L, S, 1, lo, hi, **arrays)
        return (made.by_key if by_key else made.by_query)(size, keys).lists, made.keys()

    i, j = np.indices((L, S))
    band = (j - i >= (-L if lo is None else lo)) & (j - i <= (S if hi is None else hi))
    for seed in range(20):
        arrays = draw(np.random.default_rng(seed), L, S)
        lists, some = map(np.asarray, told({n: x.astype(np.int32) for n, x in arrays.items()}))
        seen = (
            band & (j < arrays["end"][..., None]) & (j >= arrays.get("start", np.zeros((1, 1, 1)))[..., None])
        )
        np.testing.assert_array_equal(some, seen.any(2))
        full = [(0, 0), (0, 0), (0, -L % size), (0, -S % keys)]
        cut = lambda x, fill, full=full: np.pad(x, full, constant_values=fill).reshape(
            2, 1, -1, size, -(-S // keys), keys
        )
        seen, whole = cut(seen, False).any((3, 5)), cut(seen, True).all((3, 5))
        whole[..., -1] = False  # the end of the keys cuts the last
        if by_key:
            seen, whole = seen.swapaxes(2, 3), whole.swapaxes(2, 3)
        at = (size if by_key else keys) * np.arange(seen.shape[3], dtype=np.int32)[None, None, None]
        want = np.asarray(listing(seen, whole, at))
        told_of = np.arange(want.shape[3]) < 2 + np.maximum(want[..., :1], 1)
        np.testing.assert_array_equal(np.where(told_of, lists, 0), np.where(told_of, want, 0))


def test_flash_hopper_lists_of_tokens_that_see_themselves_need_no_search():
    """Texts end to end, causal: the same lists where it is known that nothing is unseen, from less work."""
    from accel.kernels.flash_hopper_lists import Seen, spans

    N = 333

    def told(ids, itself):
        start, end = (x[:, None] for x in spans(ids, ids))
        made = Seen.make(N, N, 1, hi=0, start=start, end=end, itself=itself)
        assert made.uneven != itself
        return made.by_query(128, 64).lists, made.by_key(64, 128).lists, made.keys()

    each = {x: jax.jit(partial(told, itself=x)) for x in (False, True)}
    for seed in range(5):
        ids = np.sort(np.random.default_rng(seed).integers(0, 6, (2, N)))
        (*want, some), (*got, every) = (map(np.asarray, each[x](ids)) for x in (False, True))
        assert some.all()
        assert every.all()
        for lists, others in zip(got, want, strict=True):
            told_of = np.arange(others.shape[3]) < 2 + others[..., :1]
            np.testing.assert_array_equal(np.where(told_of, lists, 0), np.where(told_of, others, 0))
    reads = {x: str(jax.make_jaxpr(partial(told, itself=x))(ids)).count("gather[") for x in each}
    assert reads[True] < reads[False] / 2, reads


def test_flash_hopper_lists_of_rows_out_of_order_meet_all():
    """Ends that go up and down: tiles may be met in vain, and none is missed or taken for whole."""
    from accel.kernels.flash_hopper_lists import Seen

    L, S, rng = 200, 500, np.random.default_rng(0)
    end = np.where(rng.random((1, 1, L)) < 0.1, rng.integers(0, S, (1, 1, L)), 64).astype(np.int32)
    seen = np.pad(np.arange(S) < end[0, 0, :, None], [(0, 56), (0, 12)]).reshape(4, 64, 4, 128)
    whole = np.pad(np.arange(S) < end[0, 0, :, None], [(0, 56), (0, 12)], constant_values=True)
    whole = whole.reshape(4, 64, 4, 128).all((1, 3))
    lists = np.asarray(jax.jit(lambda e: Seen.make(L, S, 1, end=e).by_key(64, 128).lists)(end))[0, 0]
    for tile, (n, cut, *at) in enumerate(lists):
        met = np.array(at[:n], int) // 64
        assert set(met) >= set(np.flatnonzero(seen[:, :, tile].any((1, 2))))
        assert len(set(met)) == n
        assert whole[met[cut:], tile].all()


@pytest.mark.parametrize("both", ["by_query", "by_key"])
def test_flash_hopper_tables_grow_with_pairs_of_tiles(both):
    """Texts end to end: the largest array on the way to the lists, and keys, is one of pairs of tiles."""
    from accel.kernels.flash_hopper_lists import Seen, spans

    def largest(N):
        def tables(ids):
            start, end = (x[:, None] for x in spans(ids, ids))
            seen = Seen.make(N, N, 1, hi=0, start=start, end=end)
            return getattr(seen, both)(128, 128), seen.keys()

        def sizes(jaxpr):
            for e in jaxpr.eqns:
                yield from (x.aval.size for x in e.outvars)
                for inner in jaxprs_in_params(e.params):
                    yield from sizes(inner)

        return max(sizes(jax.make_jaxpr(tables)(jax.ShapeDtypeStruct((1, N), jnp.int32)).jaxpr))

    for N in (2**15, 2**20):
        assert largest(N) <= max(4 * N, 2 * (N // 128) ** 2 + 4 * N // 128), N


def test_flash_hopper_lists_of_masks_are_cut_ones_then_whole_ones():
    """On a device as in NumPy, and as one by one."""
    from accel.kernels.flash_hopper_lists import listing

    rng = np.random.default_rng(0)
    seen, whole = rng.random((2, 1, 2, 3, 70)) < 0.5
    at = 64 * np.arange(70, dtype=np.int32)[None, None, None]
    lists = np.asarray(listing(seen, whole, at))
    np.testing.assert_array_equal(jax.jit(listing)(seen, whole, at), lists)
    for b, h, t in np.ndindex(1, 2, 3):
        n, cut, *found = lists[b, h, t]
        some, all_seen = seen[b, h, t], whole[b, h, t]
        assert cut == (some & ~all_seen).sum()
        np.testing.assert_array_equal(
            np.array(found[:n]) // 64, [*np.flatnonzero(some & ~all_seen), *np.flatnonzero(some & all_seen)]
        )


def test_flash_share_of_pairs_computed_is_counted_from_the_lists():
    """What the GPU's claims store: tiles with a visible pair, and visible pairs, counted one by one."""
    from tests.claims import flash_gpu

    N, rng = 300, np.random.default_rng(0)
    told, share = flash_gpu.hidden("packed", 2, N, 1, rng)
    ids = np.asarray(told["segment_ids"])
    seen = ids[:, :, None] == ids[:, None]
    assert share == pytest.approx(seen.mean())
    seen = np.pad(seen & np.tri(N, dtype=bool), [(0, 0), (0, 84), (0, 84)])
    found = flash_gpu.met(told, 2, N, 128, True)
    for name, rows, keys in (("forward", 128, 128), ("keys", 64, 128), ("queries", 128, 64)):
        tiles = seen.reshape(2, -1, rows, 384 // keys, keys).any((2, 4))
        assert found[name] == pytest.approx(tiles.sum() / 2 * rows * keys / N**2), name
    told, share = flash_gpu.hidden("lengths", 2, N, 1, rng, causal=True)
    lengths = np.asarray(told["key_value_seq_lengths"])[:, None, None]
    assert share == pytest.approx((np.tri(N, dtype=bool) & (np.arange(N) < lengths)).mean())


@pytest.mark.parametrize(("B", "b", "S", "L"), [(1, 1, 5, 7), (3, 1, 64, 10), (1, 3, 65, 33), (2, 2, 200, 1)])
def test_flash_segments_are_counted_as_by_searching(B, b, S, L):
    """Where the run of keys of every query begins and ends; the smallest number of a dtype has none below."""
    from accel.kernels.flash_hopper_lists import spans

    rng, n, found = np.random.default_rng(S), max(B, b), jax.jit(spans)
    for dtype, low in ((np.int32, -3), (np.int32, np.iinfo(np.int32).min), (np.uint8, 0)):
        others = np.sort((low + rng.integers(0, 12, (B, S))).astype(dtype))
        ids = (low + rng.integers(0, 13, (b, L))).astype(dtype)
        full = np.broadcast_to(others, (n, S)), np.broadcast_to(ids, (n, L))
        for got, side in zip(found(ids, others), ("left", "right"), strict=True):
            want = [np.searchsorted(x, y, side=side) for x, y in zip(*full, strict=True)]
            np.testing.assert_array_equal(np.broadcast_to(got, (n, L)), want)


def test_flash_kernels_lower_for_their_devices():
    """Both passes, causal and with lengths, compiled down to the device's own language without the device."""
    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype)
    q, k = shape(jnp.bfloat16, 2, 2, 300, 64), shape(jnp.bfloat16, 2, 300, 64)
    row, end = shape(jnp.float32, 2, 2, 300), shape(jnp.int32, 2, 2, 300)
    for impl, platform in (("tpu", "tpu"), ("triton", "cuda")):
        module = accel.flash.kernel_module(impl)
        forward = lambda q, k, v, end, m=module: m.forward(q, k, v, end, scale=0.1, hi=0)
        backward = lambda do, q, k, v, lse, delta, end, m=module: m.backward(
            do, q, k, v, lse, delta, end, scale=0.1, hi=0
        )
        for fn, args in ((forward, (q, k, k, end)), (backward, (q, q, k, k, row, row, end))):
            lowered(fn, args, platform)
    module = accel.flash.kernel_module("hopper")
    k = shape(jnp.bfloat16, 2, 1, 300, 64)
    lowered(lambda q, k, v: module.attend(q, k, v, scale=0.1, hi=0), (q, k, k), "hopper")
    backward = lambda *x: module.attend_backward(*x, scale=0.1, lo=-20, hi=0)
    lowered(backward, (q, q, k, k, row, row), "hopper")
    row_start, end, mask = shape(jnp.int32, 2, 1, 300), shape(jnp.int32, 2, 1, 1), shape(bool, 1, 2, 300, 300)
    hidden = lambda q, k, v, told: module.attend(q, k, v, scale=0.1, hi=0, **told)
    lowered(hidden, (q, k, k, {"end": end, "mask": mask}), "hopper")
    backward = lambda *x: module.attend_backward(*x[:-1], scale=0.1, **x[-1])
    lowered(backward, (q, q, k, k, row, row, {"start": row_start, "end": end, "mask": mask}), "hopper")
    q, k = shape(jnp.float16, 1, 65, 4, 256), shape(jnp.float16, 1, 33, 2, 256)
    window = {"scale": -0.1, "lo": -20, "hi": 30, "rows_first": True}
    lowered(lambda q, k, v: module.attend(q, k, v, **window), (q, k, k), "hopper")


def test_flash_extra_memory_is_no_square():
    """Forward and backward of 8,192 tokens, as compiled: below a sixteenth of their float32 score matrix."""
    N = 8192
    x = jax.ShapeDtypeStruct((1, N, 16), jnp.float32)
    f = lambda q, k, v: accel.flash.flash_attention(q, k, v).sum()
    compiled = jax.jit(jax.grad(f, (0, 1, 2))).lower(x, x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * N**2 / 16


def _qkv(L=4, S=5, D=3, Dv=2, H=None, Hkv=None):
    rng = np.random.default_rng(0)
    head = lambda n: () if n is None else (n,)
    return [rng.standard_normal(s) for s in ((*head(H), L, D), (*head(Hkv), S, D), (*head(Hkv), S, Dv))]


def _ids(q, kv):
    return {"q_segment_ids": q, "kv_segment_ids": kv}


BAD = {
    "head size": ([*_qkv()[:1], np.zeros((5, 4)), np.zeros((5, 2))], {}, "axis D is 3 in q"),
    "keys": ([*_qkv()[:2], np.zeros((6, 2))], {}, "axis S is 5 in k"),
    "heads": (_qkv(H=3, Hkv=2), {}, "multiple of the Hkv=2"),
    "block": (_qkv(), {"block_q": 0}, "block_q and block_k must be at least 1"),
    "mask dtype": (_qkv(), {"mask": np.ones((4, 5))}, "mask must be boolean"),
    "mask shape": (_qkv(), {"mask": np.ones((3, 5), bool)}, "does not broadcast to"),
    "dropout_p": (_qkv(), {"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\)"),
    "dropout_mask": (_qkv(), {"dropout_p": 0.1}, "needs dropout_mask"),
    "length": (_qkv(), {"key_lengths": np.array(6)}, r"key_lengths must be in 0\.\.5"),
    "length dtype": (_qkv(), {"key_lengths": np.array(2.0)}, "key_lengths must be integers"),
    "one segment id": (_qkv(), {"q_segment_ids": np.zeros(4, int)}, "must be given together"),
    "segment dtype": (_qkv(), _ids(np.zeros(4), np.zeros(5, int)), "q_segment_ids must be integers"),
    "segment shape": (_qkv(), _ids(np.zeros(4, int), np.zeros(1, int)), "kv_segment_ids of shape .* to"),
    "segment order": (_qkv(), _ids(np.zeros(4, int), np.arange(5)[::-1]), "kv_segment_ids must not decrease"),
}


@pytest.mark.parametrize("layer", [ref, accel], ids=["flash_ref", "flash_accel"])
@pytest.mark.parametrize("name", BAD, ids=lambda n: n.replace(" ", "_"))
def test_flash_rejects_bad_input(name, layer):
    args, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        layer.flash.flash_attention(*args, **options)
    q, k, v = args
    do, lse = np.zeros((*q.shape[:-1], v.shape[-1])), np.zeros(q.shape[:-1])
    with pytest.raises(ValueError, match=message):
        layer.flash.flash_attention_bwd(do, q, k, v, do, lse, **options)


@pytest.mark.parametrize(
    ("layer", "lead"),
    [(ref, ()), (ref, (2,)), (ref, (2, 3)), (accel, (2, 3))],
    ids=["flash_ref_no_heads", "flash_ref_heads", "flash_ref_batch", "flash_accel_batch"],
)
def test_flash_segments_are_a_mask_of_blocks(layer, lead):
    """Values and gradients, causal within each segment, some of which have no keys."""
    rng, (L, S) = np.random.default_rng(0), (9, 11)
    q, k, v, do = (rng.standard_normal((*lead, n, 4)).astype(np.float32) for n in (L, S, S, L))
    ids, others = (np.sort(rng.integers(0, 4, (*lead[:-1], n))) for n in (L, S))
    same = ids[..., :, None] == others[..., None, :]
    mask = same[..., None, :, :] if lead else same
    mine, as_mask = {"causal": True, **_ids(ids, others)}, {"causal": True, "mask": mask}
    o, lse = layer.flash.flash_attention(q, k, v, return_lse=True, **mine)
    want, want_lse = layer.flash.flash_attention(q, k, v, return_lse=True, **as_mask)
    np.testing.assert_array_equal(o, want)
    np.testing.assert_array_equal(lse, want_lse)
    got = layer.flash.flash_attention_bwd(do, q, k, v, o, lse, **mine)
    want = layer.flash.flash_attention_bwd(do, q, k, v, o, lse, **as_mask)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)
    both = layer.flash.flash_attention(q, k, v, mask=mask[..., :1], **mine)
    other = layer.flash.flash_attention(q, k, v, causal=True, mask=mask & mask[..., :1])
    np.testing.assert_array_equal(both, other)


@pytest.mark.parametrize("layer", [ref, accel], ids=["flash_ref", "flash_accel"])
def test_flash_backward_rejects_what_does_not_fit(layer):
    q, k, v = _qkv()
    do, lse = np.zeros((4, 2)), np.zeros(4)
    for args, message in (
        ((do[:3], q, k, v, do, lse), "axis L is 3 in do|do.shape"),
        ((do, q, k, v, do[:, :1], lse), "o.shape"),
        ((do, q, k, v, do, lse[:3]), "lse.shape"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.flash.flash_attention_bwd(*args)


ON_HOPPER = {  # options, dtypes of q, k and v, and what "auto" takes on a Hopper GPU
    "half precision": ({}, "bbb", "hopper"),
    "float16": ({}, "hhh", "hopper"),
    "float32": ({}, "fff", "triton"),
    "a scale of zero": ({"scale": 0.0}, "bbb", "hopper"),
    "a negative scale": ({"scale": -1}, "bbb", "hopper"),
    "a mask": ({"mask": np.ones((1, 4096), bool)}, "bbb", "hopper"),
    "a small mask": ({"mask": np.ones((256, 256), bool)}, "bbb", "triton"),
    "a mask in float32": ({"mask": np.ones((256, 256), bool)}, "fff", "triton"),
    "lengths": ({"key_lengths": np.array(200)}, "bbb", "hopper"),
    "segments": ({n: np.zeros(4096, int) for n in ("q_segment_ids", "kv_segment_ids")}, "bbb", "hopper"),
    "values of another dtype": ({}, "bbf", "triton"),
    "keys of another dtype": ({}, "fbb", "xla"),
    "tiles of its own": ({"block_q": 100}, "bbb", "hopper"),
    "tiles of no kernel": ({"block_q": 100}, "fff", "xla"),
    "dropout": ({"dropout_p": 0.5, "dropout_mask": np.ones((256, 256), bool)}, "bbb", "xla"),
}


@pytest.mark.parametrize("name", ON_HOPPER)
def test_flash_auto_takes_what_can_run_on_hopper(name, monkeypatch):
    """The choice alone: no GPU is there."""
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    monkeypatch.setattr(flash, "hopper_obstacle", lambda *_: None)
    taken = []
    monkeypatch.setattr(flash, "_flash", lambda q, *_, impl, **__: taken.append(impl) or (q, q))
    options, dtypes, impl = ON_HOPPER[name]
    kinds = {"b": jnp.bfloat16, "h": jnp.float16, "f": jnp.float32}
    tokens = 4096 if name in ("a mask", "lengths", "segments") else 256
    flash.flash_attention(*(jnp.ones((tokens, 8), kinds[d]) for d in dtypes), **options)
    assert taken == [impl]


def test_flash_tokens_see_themselves_where_both_segment_ids_are_one_array(monkeypatch):
    """What the kernels for Hopper are told; not where something else may hide a token from itself."""
    taken = []
    monkeypatch.setattr(flash, "_flash", lambda q, *_, itself, **__: taken.append(itself) or (q, q))
    ids, call = np.zeros(4, int), partial(flash.flash_attention, *(jnp.ones((4, 8)) for _ in "qkv"))
    call(**_ids(ids, ids), causal=True)
    call(**_ids(ids, ids.copy()))
    call(**_ids(ids, ids), mask=np.ones((1, 4), bool))
    call(**_ids(ids, ids), key_lengths=np.array(3))
    call()
    jax.jit(lambda x: call(**_ids(x, x)))(ids)
    assert taken == [True, False, False, False, False, True]


def test_flash_impl_asked_by_name_runs_or_says_why_not():
    q, k, v = (x.astype(np.float32) for x in _qkv())
    call = accel.flash.flash_attention
    for impl, error, message in (
        ("cuda", ValueError, "impl must be"),
        ("hopper", NotImplementedError, "takes bfloat16 or float16"),
        ("tpu", NotImplementedError, "needs a TPU"),
        ("triton", NotImplementedError, "needs a GPU"),
    ):
        if impl == "triton" and jax.default_backend() == "gpu":
            continue
        with pytest.raises(error, match=message):
            call(q, k, v, impl=impl)
    kernel = {"impl": "triton", "interpret": True}
    with pytest.raises(NotImplementedError, match="has no dropout"):
        call(q, k, v, dropout_p=0.5, dropout_mask=np.ones((4, 5), bool), **kernel)
    with pytest.raises(NotImplementedError, match="has no int32"):
        call(*(x.astype(np.int32) for x in (q, k, v)), **kernel)
    with pytest.raises(ValueError, match="block_q must be a power of two"):
        call(q, k, v, block_q=24, **kernel)
    with pytest.raises(ValueError, match="block_k must be a multiple of 128"):
        call(q, k, v, block_k=64, impl="tpu", interpret=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        jax.eval_shape(jax.hessian(lambda q: call(q, k, v, **kernel).sum()), q)
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(lambda q: call(q, k, v, **kernel), (q,), (q,))


def test_flash_rejects_unknown_order_and_small_sram():
    with pytest.raises(ValueError, match="order must be"):
        ref.flash.flash_attention(*_qkv(), order="sideways")
    with pytest.raises(ValueError, match='order must be "q_outer" in accel'):
        accel.flash.flash_attention(*_qkv(), order="k_outer")
    with pytest.raises(ValueError, match="at least 4 d"):
        ref.flash.block_sizes(15, 4)
    with pytest.raises(ValueError, match="algorithm must be"):
        ref.flash.hbm_accesses(4, 4, 4, algorithm="fast")


def test_flash_claims_training_by_tiles_is_training():
    """20 steps on 256 bytes from one seed: losses agree step by step, but for rounding carried along."""
    found = claims.losses()
    assert len(found["dense"]) == 20
    np.testing.assert_allclose(found["tiles"], found["dense"], rtol=1024 * EPS32)


def test_flash_claims_traffic_is_counted_as_predicted():
    t = claims.traffic(N=128, d=8, sizes=(256, 1024))
    formula = dict(map(tuple, t["formula"]))
    assert all(formula[m] == moved for m, moved in t["counted"])
    assert abs(t["slope"] + 1) < 0.1


def test_flash_claims_stored_results_are_fresh_and_as_wanted():
    """`python -m tests.claims.flash` again if not. Memory grows no faster than N; the dense form, as N^2."""
    for path in record.DATA.glob("flash*.json"):
        assert record.is_fresh(path.stem), path.stem
    r = record.load("flash")["results"]
    first, last = r["memory"][0], r["memory"][-1]
    more = last["tokens"] / first["tokens"]
    assert last["tokens"] == 65536
    for name in ("forward", "backward"):
        assert last[name] / first[name] < 1.1 * more
        assert last["jax_" + name] / first["jax_" + name] > 0.9 * more**2
    steps = r["losses"]
    np.testing.assert_allclose(steps["tiles"], steps["dense"], rtol=1024 * EPS32)
