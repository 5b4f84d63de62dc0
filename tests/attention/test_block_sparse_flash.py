"""Block-sparse FlashAttention: laws on ref, golden vectors, bad inputs; accel and its kernels; costs."""

import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import accel
import hw
import ref
from accel.kernels import block_sparse_flash_tpu, block_sparse_flash_triton
from ref.catalog import technique
from tests.attention import laws_block_sparse_flash
from tests.claims import record
from tests.golden_runner import golden, run, run_accel
from tests.hw_record import Cost, size
from tests.laws import law_tests
from tests.lower import lowered

globals().update(law_tests(laws_block_sparse_flash))

EPS32 = float(np.finfo(np.float32).eps)


@golden("block_sparse_flash")
def test_block_sparse_flash_golden_ref(case):
    run(case, ref.block_sparse_flash)


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@golden("block_sparse_flash", only=technique("block_sparse_flash").core)
def test_block_sparse_flash_golden_accel(case, x64):
    run_accel(case, accel.block_sparse_flash, x64=x64)


R = ref.block_sparse_flash
Q, K, ONES = np.ones((4, 10, 8)), np.ones((2, 12, 8)), np.ones((3, 3), bool)
SIZES = {"block_q": 4, "block_k": 4}
EXPAND = {**SIZES, "num_queries": 10, "num_keys": 12}
CALLS = {
    "tiles": ((Q, K, K, ONES[:2]), {}, r"block_mask must end in \[3, 3\] tiles"),
    "dtype": ((Q, K, K, ONES.astype(float)), {}, "block_mask must be boolean"),
    "list": ((Q, K, K, [[True]]), {}, "block_mask must be boolean"),
    "block_q": ((Q, K, K, ONES), {"block_q": 0}, "block_q and block_k must be at least 1"),
    "block_k": ((Q, K, K, ONES), {"block_k": -1}, "block_q and block_k must be at least 1"),
    "mask_heads": ((Q, K, K, np.ones((3, 3, 3), bool)), {}, r"block_mask.shape\[0\] = 3, but q has H=4"),
    "mask_batch": ((Q, K, K, np.ones((1, 4, 3, 3), bool)), {}, r"must be \[Tr, Tc\] or \[H, Tr, Tc\]"),
    "no_head": ((Q[0], K[0], K[0], np.ones((1, 3, 3), bool)), {}, r"must be \[Tr, Tc\]"),
    "heads": ((Q[:3], K, K, ONES), {}, "not a multiple of the Hkv=2"),
    "width": ((Q[..., :7], K, K, ONES), {}, "axis D is 7"),
    "values": ((Q, K, K[:, :11], ONES), {}, "axis S is 12"),
    "mask": ((Q, K, K, ONES), {"mask": np.ones((10, 12))}, "mask must be boolean"),
    "mask_shape": ((Q, K, K, ONES), {"mask": np.ones((9, 12), bool)}, "does not broadcast"),
}
BUILDERS = {
    "num_global": (lambda: R.butterfly_block_mask(4, num_global=5), r"num_global must be in 0\.\.4"),
    "max_stride": (lambda: R.butterfly_block_mask(4, max_stride=0), "max_stride must be at least 1"),
    "num_blocks": (lambda: R.butterfly_block_mask(0), "num_blocks must be at least 1"),
    "width": (lambda: R.local_block_mask(4, 0), "width must be at least 1"),
    "stride": (lambda: R.strided_block_mask(4, 0), "stride must be at least 1"),
    "causal": (lambda: R.causal_block_mask(0, 3), "num_q_blocks must be at least 1"),
    "density": (lambda: R.random_block_mask(np.ones((2, 2)), 1.1), r"density must be in \[0, 1\]"),
    "nan_density": (lambda: R.random_block_mask(np.ones((2, 2)), np.nan), r"density must be in \[0, 1\]"),
    "uniforms": (lambda: R.random_block_mask(np.ones(4), 0.5), "uniforms must have shape"),
    "keep": (lambda: R.block_mask_from_scores(np.ones((2, 3)), 4), r"keep must be in 1\.\.3"),
    "expand": (lambda: R.expand_block_mask(ONES[:2], **EXPAND), "block_mask must end in"),
    "layout": (lambda: R.to_block_layout(ONES.astype(int), **EXPAND), "block_mask must be boolean"),
    "share": (lambda: R.density(np.ones(3, bool)), "block_mask must be boolean"),
    "traffic": (lambda: R.hbm_accesses_block_sparse(ONES, 10, 12, 0, **SIZES), "must be at least 1"),
    "traffic_mask": (lambda: R.hbm_accesses_block_sparse(ONES, 10, 13, 4, **SIZES), "must end in"),
}


@pytest.mark.parametrize("name", CALLS, ids=lambda n: f"block_sparse_flash_{n}")
def test_block_sparse_flash_rejects_bad_calls(name):
    args, options, message = CALLS[name]
    options = {**SIZES, **options}
    q, k, v, block_mask = args
    do, lse = np.zeros((*q.shape[:-1], v.shape[-1])), np.zeros(q.shape[:-1])
    for layer in (R, accel.block_sparse_flash):
        with pytest.raises(ValueError, match=message):
            layer.block_sparse_attention(*args, **options)
        with pytest.raises(ValueError, match=message):
            layer.block_sparse_attention_bwd(do, q, k, v, do, lse, block_mask, **options)


@pytest.mark.parametrize("layer", [R, accel.block_sparse_flash], ids=["ref", "accel"])
def test_block_sparse_flash_backward_rejects_what_does_not_fit(layer):
    do, lse = np.zeros((4, 10, 8)), np.zeros((4, 10))
    for args, message in (
        ((do[:, :9], Q, K, K, do, lse), "do.shape|axis L is 9 in do"),
        ((do, Q, K, K, do[..., :7], lse), "o.shape"),
        ((do, Q, K, K, do, lse[:, :9]), "lse.shape"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.block_sparse_attention_bwd(*args, ONES, **SIZES)


@pytest.mark.parametrize("name", BUILDERS, ids=lambda n: f"block_sparse_flash_{n}")
def test_block_sparse_flash_rejects_bad_masks(name):
    call, message = BUILDERS[name]
    with pytest.raises(ValueError, match=message):
        call()


FORMS = {
    "xla": {"block_q": 8, "block_k": 24},
    "triton": {"block_q": 16, "block_k": 32, "interpret": True},
    "tpu": {"block_q": 16, "block_k": 128, "interpret": True},
}


def problem(block_q, block_k, *, heads, L=37, S=300, poison=False):
    """q, k, v, do, block mask: grouped heads, an empty row and an empty column of tiles, sizes off the tile.

    poison: what only invisible tiles hold is NaN or infinite.
    """
    rng = np.random.default_rng(0)
    shapes = (2, 2, L, 12), (2, 1, S, 12), (2, 1, S, 6), (2, 2, L, 6)
    q, k, v, do = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    tiles = rng.random((*heads, -(-L // block_q), -(-S // block_k))) < 0.6
    tiles[..., 1, :], tiles[..., 1] = False, False
    if poison:
        rows, cols = slice(block_q, 2 * block_q), slice(block_k, 2 * block_k)
        q[:, :, rows], k[:, :, cols], v[:, :, cols] = np.nan, np.nan, np.inf
    return q, k, v, do, tiles


def values_and_gradients(q, k, v, do, tiles, **options):
    """(o, lse), (dq, dk, dv) of accel, the loss with a cotangent for lse too."""

    def loss(q, k, v):
        o, lse = accel.block_sparse_flash.block_sparse_attention(q, k, v, tiles, return_lse=True, **options)
        return jnp.sum(o * do), (o, lse)

    (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return *out, *grads


@pytest.mark.parametrize(
    ("impl", "traced"),
    [("xla", False), ("xla", True), ("triton", True), ("tpu", False)],
    ids=["xla_known_mask", "xla_traced_mask", "triton_traced_mask", "tpu_known_mask"],
)
def test_block_sparse_flash_accel_matches_ref(impl, traced):
    """Values, lse and gradients, causal, a known mask for all heads and a traced one a head (with an element
    mask on "xla"); what no visible tile holds is NaN here, ordinary for ref. With L = 113 heads are taken in
    turn and whole tiles go without a mask.
    """
    options = {**FORMS[impl], "causal": True}
    sizes = {n: options[n] for n in ("block_q", "block_k")}
    shape = {"heads": (2,) if traced else (), "L": 113 if impl == "xla" and not traced else 37}
    *bad, do, tiles = problem(**sizes, **shape, poison=True)
    if (impl, traced) == ("xla", True):
        options["mask"] = np.random.default_rng(3).random((2, 37, 300)) < 0.6
    call = lambda q, k, v, tiles: values_and_gradients(q, k, v, do, tiles, impl=impl, **options)
    got = jax.jit(call)(*bad, tiles) if traced else jax.jit(lambda *x: call(*x, tiles))(*bad)
    q, k, v, do, tiles = problem(**sizes, **shape)
    sizes = {n: options.get(n) for n in ("block_q", "block_k", "causal", "mask")}
    want = R.block_sparse_attention(q, k, v, tiles, return_lse=True, **sizes)
    want = *want, *R.block_sparse_attention_bwd(do, q, k, v, *want, tiles, **sizes)
    # the law's bound in float32; dP has Dv terms, and gradients add up to S of those, times k, q or 1
    bound = laws_block_sparse_flash.rounding(q, k, v, EPS32)
    most = 300 * np.abs(do).max() * max(np.abs(k).max(), np.abs(q).max())
    for g, w, times in zip(got, want, (1, 2, most, most, most), strict=True):
        g = np.asarray(g)
        np.testing.assert_array_equal(np.isfinite(g), np.isfinite(w))
        np.testing.assert_allclose(g, w, rtol=0, atol=bound * times)
    assert not np.asarray(got[3])[:, :, sizes["block_k"] : 2 * sizes["block_k"]].any()


def test_block_sparse_flash_accel_second_derivatives_and_traced_lists():
    """Forward over reverse goes through the XLA path; the TPU's entries of a traced mask flag what the known
    ones list.
    """
    q, k, v, _, tiles = problem(16, 16, heads=(2,), S=40)
    sizes = {"block_q": 16, "block_k": 16}
    f = lambda q: accel.block_sparse_flash.block_sparse_attention(q, k, v, tiles, **sizes).sum()
    assert jax.eval_shape(lambda q: jax.jvp(jax.grad(f), (q,), (q,))[1], q).shape == q.shape
    lists = lambda tiles: accel.block_sparse_flash.entries(tiles, np.tri(3, dtype=bool)[None], 2, 1)
    known, traced = lists(tiles), jax.jit(lists)(tiles)
    for name in ("by_row", "by_col"):
        busy = [{tuple(e[:3]): e[3] & 3 for e in np.asarray(x[name]) if e[3] & 1} for x in (known, traced)]
        assert busy[0] == busy[1]
        assert len(busy[0]) == tiles.sum()
        idle = {tuple(e) for e in known[name][known[name][:, 3] & 1 == 0][:, :2].tolist()}
        empty = ~tiles.any(2) if name == "by_row" else ~tiles.any((0, 1))[None]
        assert idle == set(zip(*(x.tolist() for x in np.nonzero(empty)), strict=True))


def test_block_sparse_flash_work_and_memory_follow_the_mask():
    """In the traced program of both passes on 4,096 tokens: 7 d products of a visited tile (2 forward, 5
    backward), and no array of more than 1/16 of the score matrix.
    """
    N, b = 4096, 128
    tiles = ref.block_sparse_flash.butterfly_block_mask(N // b)
    x = np.zeros((1, N, 16), np.float32)
    f = lambda *x: accel.block_sparse_flash.block_sparse_attention(
        *x, tiles, block_q=b, block_k=b, causal=True
    ).sum()
    program = hw.trace(lambda *x: jax.grad(f, (0, 1, 2))(*x), x, x, x)
    reached = int((tiles & np.tri(N // b, dtype=bool)).sum())
    assert hw.count(program).macs == 7 * 16 * b * b * reached
    assert max(t.nbytes for t in program.tensors.values()) <= 4 * N**2 / 16


def test_block_sparse_flash_kernels_lower_for_their_devices():
    """Both passes, causal, off the tile, compiled down to the device's own language without the device."""
    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype)
    q, k, row = shape(jnp.bfloat16, 2, 2, 300, 64), shape(jnp.bfloat16, 2, 1, 300, 64), None
    row = shape(jnp.float32, 2, 2, 300)
    table, tiles = shape(jnp.int32, 12, 4), shape(jnp.bool_, 1, 3, 3)
    for module, lists, platform in (
        (block_sparse_flash_tpu, (table, table), "tpu"),
        (block_sparse_flash_triton, (tiles,), "cuda"),
    ):
        options = {"scale": 0.1, "hi": 0, "block_q": 128, "block_k": 128}
        forward = lambda *a, m=module, o=options: m.forward(*a, **o)
        backward = lambda *a, m=module, o=options: m.backward(*a, **o)
        for fn, args in ((forward, (q, k, k, lists[0])), (backward, (q, q, k, k, row, row, *lists))):
            lowered(fn, args, platform)


def test_block_sparse_flash_impl_asked_for_by_name_says_why_not():
    q, k = (x.astype(np.float32) for x in (Q, K))
    call = accel.block_sparse_flash.block_sparse_attention
    kernel = {"impl": "triton", "interpret": True, "block_q": 16, "block_k": 16}
    one = np.ones((1, 1), bool)
    for args, options, message in (
        ((q, k, k, ONES), {**SIZES, "impl": "hopper"}, "takes bfloat16 or float16"),
        ((q, k, k, ONES), {**SIZES, "impl": "triton"}, "needs block_q to be a multiple of 16, got 4"),
        ((q, k, k, one), {**kernel, "impl": "tpu"}, "needs block_k to be a multiple of 128, got 16"),
        ((q, k, k, one), {**kernel, "mask": np.ones((10, 12), bool)}, "has no element mask"),
        ((*(x.astype(np.int32) for x in (q, k, k)), one), kernel, "has no int32"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call(*args, **options)
    with pytest.raises(ValueError, match="impl must be"):
        call(q, k, k, ONES, impl="cuda", **SIZES)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        jax.eval_shape(jax.hessian(lambda q: call(q, k, k, one, **kernel).sum()), q)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("impl", ["triton", pytest.param("hopper", marks=pytest.mark.hopper)])
def test_block_sparse_flash_kernels_on_a_gpu(causal, block, impl):
    """The compiled kernels in bfloat16, both passes: within the rounding of P, dS and results to bfloat16."""
    rng = np.random.default_rng(0)
    N = 1000
    q, do = (jnp.asarray(rng.standard_normal((1, 4, N, 64)), jnp.bfloat16) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((1, 2, N, 64)), jnp.bfloat16) for _ in range(2))
    tiles = ref.block_sparse_flash.butterfly_block_mask(-(-N // block), num_global=1)
    sizes = {"block_q": block, "block_k": block, "causal": causal}

    def grads(q, k, v, impl):
        f = lambda *x: accel.block_sparse_flash.block_sparse_attention(*x, tiles, impl=impl, **sizes)
        o, pull = jax.vjp(f, q, k, v)
        return o, *pull(do.astype(o.dtype))

    with jax.default_matmul_precision("highest"):
        want = grads(*(x.astype(jnp.float32) for x in (q, k, v)), "xla")
    for got, w in zip(grads(q, k, v, impl), want, strict=True):
        scale = float(jnp.abs(w).max())
        np.testing.assert_allclose(got.astype(np.float32), w, rtol=0, atol=4 * 2**-8 * scale)


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("traced", [False, True], ids=["known", "traced"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_block_sparse_flash_for_hopper_with_a_mask_a_head_on_a_gpu(causal, traced):
    """Blocks that are not square, rows and columns of nothing, a mask for each head, width 128, float16."""
    rng = np.random.default_rng(0)
    L, S = 700, 900
    q, do = (jnp.asarray(rng.standard_normal((2, 4, L, 128)), jnp.float16) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((2, 2, S, 128)), jnp.float16) for _ in range(2))
    tiles = rng.random((4, 6, 15)) < 0.4
    tiles[1, 2], tiles[:, :, 7], tiles[3] = False, False, False

    def grads(q, k, v, tiles, impl):
        sizes = {"block_q": 128, "block_k": 64, "causal": causal, "impl": impl}
        f = lambda *x: accel.block_sparse_flash.block_sparse_attention(*x, tiles, **sizes)
        o, pull = jax.vjp(f, q, k, v)
        return o, *pull(do.astype(o.dtype))

    with jax.default_matmul_precision("highest"):
        want = grads(*(x.astype(jnp.float32) for x in (q, k, v)), tiles, "xla")
    call = jax.jit(lambda *x: grads(*x, "hopper")) if traced else lambda *x: grads(*x, "hopper")
    for got, w in zip(call(q, k, v, tiles), want, strict=True):
        scale = float(jnp.abs(w).max())
        np.testing.assert_allclose(got.astype(np.float32), w, rtol=0, atol=4 * 2**-11 * scale)


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("causal", [False, True])
def test_block_sparse_flash_rows_of_a_known_mask_follow_each_other_on_a_gpu(causal, monkeypatch):
    """Two blocks that take all rows of tiles, as dealt to them: the bits of blocks that take one row each."""
    from accel.kernels import block_sparse_flash_hopper as module

    rng = np.random.default_rng(0)
    q, do = (jnp.asarray(rng.standard_normal((2, 4, 640, 64)), jnp.bfloat16) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((2, 2, 640, 64)), jnp.bfloat16) for _ in range(2))
    options = {"block_q": 128, "block_k": 64, "causal": causal, "impl": "hopper"}

    def passes(mask):
        o, back = jax.vjp(
            lambda *x: accel.block_sparse_flash.block_sparse_attention(*x, mask, **options), q, k, v
        )
        return o, *back(do)

    for heads in ((), (4,)):
        mask = rng.random((*heads, 5, 10)) < 0.5
        apart = passes(mask)
        with monkeypatch.context() as patch:
            patch.setattr(module, "cores_of", lambda: 2)
            for got, want in zip(passes(mask), apart, strict=True):
                np.testing.assert_array_equal(got, want)


def test_block_sparse_flash_lowers_for_hopper():
    """Both passes with a traced mask."""
    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype)
    x, row = shape(jnp.bfloat16, 1, 2, 300, 64), shape(jnp.float32, 1, 2, 300)
    from accel.kernels import block_sparse_flash_hopper as module

    options = {"scale": 0.1, "block_q": 128, "block_k": 64}
    visited = shape(bool, 1, 3, 5)
    lowered(lambda *a: module.forward(*a, hi=0, **options), (x, x, x, shape(bool, 2, 3, 5)), "hopper")
    for hi in (0, None):
        back = lambda *a, hi=hi: module.backward(*a, hi=hi, **options)
        lowered(back, (x, x, x, x, row, row, visited), "hopper")


def test_block_sparse_flash_lists_name_every_visible_tile_once():
    """The lists of the kernels for Hopper against the tiles that hold a visible pair; cut ones in front."""
    from accel.kernels.block_sparse_flash_hopper import Cut

    rng = np.random.default_rng(0)
    L, S, blocks = 300, 500, (128, 64)
    for hi, heads in ((None, 1), (S - L, 2)):
        mask = rng.random((heads, 3, 8)) < 0.5
        seen = np.repeat(np.repeat(mask, 128, 1), 64, 2)[:, :L, :S]
        if hi is not None:
            seen = seen & (np.arange(S)[None, None] <= np.arange(L)[None, :, None] + hi)
        for rows, keys, by_key in ((128, 64, False), (64, 64, True)):
            lists = np.asarray(Cut(mask, *blocks, L, S, hi).lists(rows, keys, by_key))
            tall, wide = -(-L // rows), -(-S // keys)
            at = np.pad(seen, [(0, 0), (0, tall * rows - L), (0, wide * keys - S)])
            at = at.reshape(heads, tall, rows, wide, keys).swapaxes(2, 3)
            some, whole = at.any((3, 4)), at.all((3, 4))
            some, whole = (x.swapaxes(1, 2) if by_key else x for x in (some, whole))
            assert lists.shape == (1, *some.shape[:2], 2 + some.shape[2])
            n, cut, order = (
                lists[0, ..., :1],
                lists[0, ..., 1:2],
                lists[0, ..., 2:] // (rows if by_key else keys),
            )
            np.testing.assert_array_equal(np.sort(order, axis=-1), np.indices(order.shape)[-1])
            listed = np.arange(order.shape[-1])[None, None]
            for tiles, upto in ((some, n), (some & ~whole, cut)):
                np.testing.assert_array_equal(np.take_along_axis(tiles, order, axis=-1), listed < upto)
    traced = jax.jit(lambda mask: Cut(mask, *blocks, L, S, hi).lists(rows, keys, by_key))(mask)
    np.testing.assert_array_equal(traced, lists)


@pytest.mark.parametrize("by_key", [False, True])
def test_block_sparse_flash_deals_rows_of_tiles_evenly(by_key):
    """The order for Hopper of a known mask: every row of tiles of every head once, heads after one another,
    and no block with more than a row beyond its share.
    """
    from accel.kernels.block_sparse_flash_hopper import ALONE, Cut, cores_of

    rng = np.random.default_rng(0)
    B, heads, size, tall = 2, 3, 4096, 32
    mask = rng.random((2 * heads, tall, tall)) < 0.3  # two query heads a key head
    cut = Cut(mask, 128, 128, size, size, 0)
    own = heads if by_key else 2 * heads
    order = cut.dealt(128, 128, B, own, by_key)
    assert order.shape[1] == min(cores_of(), B * own * tall)
    assert sorted(order[order >= 0]) == list(range(B * own * tall))
    seen = np.tril(np.ones((tall, tall), bool)) & mask
    n = seen.sum(1).reshape(heads, 2, tall).sum(1)[:, ::-1] if by_key else seen.sum(2)
    cost = np.tile((n + ALONE).reshape(-1), B)
    work = np.where(order >= 0, cost[order], 0).sum(0)
    assert work.max() <= work.mean() + cost.max()
    head = np.where(order >= 0, order // tall, B * own)
    assert (np.diff(head, axis=0) >= 0).all()
    full = Cut(np.ones((1, tall, tall), bool), 128, 128, size, size, None)
    assert full.dealt(128, 128, B, own, by_key) is None  # all rows meet as many


def test_block_sparse_flash_knows_the_order_of_a_known_mask(monkeypatch):
    """A call deals the rows of a mask that is known; those of a traced one are taken in turn."""
    from accel.attention import block_sparse_flash as module

    monkeypatch.setattr(module, "choose_impl", lambda *args, **options: "hopper")
    q, k = (jax.ShapeDtypeStruct((2, h, 256, 64), jnp.bfloat16) for h in (4, 2))
    mask, options = np.tril(np.ones((2, 2), bool)), (128, 128, False, None, "hopper", False)
    prepared = lambda q, k, mask: module._prepare(q, k, k, mask, None, *options)[1]
    of_queries, of_keys = jax.eval_shape(lambda q, k: prepared(q, k, mask).orders, q, k)
    assert (of_queries.shape, of_keys.shape) == ((1, 16), (1, 8))
    assert jax.eval_shape(lambda q, k, mask: prepared(q, k, mask).orders, q, k, mask) == ()


@pytest.mark.gpu
def test_block_sparse_flash_triton_in_float32_on_a_gpu():
    q, k, v, do, tiles = problem(64, 64, heads=(2,), L=300)
    options = {"block_q": 64, "block_k": 64, "causal": True}
    got = values_and_gradients(q, k, v, do, tiles, impl="triton", **options)
    want = R.block_sparse_attention(q, k, v, tiles, return_lse=True, **options)
    want = *want, *R.block_sparse_attention_bwd(do, q, k, v, *want, tiles, **options)
    bound = laws_block_sparse_flash.rounding(q, k, v, EPS32)
    most = 300 * np.abs(do).max() * max(np.abs(k).max(), np.abs(q).max())
    for g, w, times in zip(got, want, (1, 2, most, most, most), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=bound * times)


def padded_tiles(q, k, options):
    """Elements of the visited tiles that a query may see by causal order, padding included, over heads."""
    L, S, b, c = q.shape[-2], k.shape[-2], options["block_q"], options["block_k"]
    i, j = np.indices(options["block_mask"].shape)
    reach = options["block_mask"] & (j * c <= np.minimum((i + 1) * b, L) - 1 + S - L)
    return q.shape[0] * int(reach.sum()) * b * c, reach


def cut_tiles(q, k, options):
    """The same without padding: what ref multiplies."""
    L, S, b, c = q.shape[-2], k.shape[-2], options["block_q"], options["block_k"]
    _, reach = padded_tiles(q, k, options)
    i, j = np.indices(reach.shape)
    sizes = (np.minimum((i + 1) * b, L) - i * b) * (np.minimum((j + 1) * c, S) - j * c)
    return q.shape[0] * int((reach * sizes).sum())


HW = {
    "block_sparse_attention": Cost(
        macs=lambda q, k, v, **o: padded_tiles(q, k, o)[0] * (q.shape[-1] + v.shape[-1]),
        bytes=lambda q, k, v, **o: size(q, k, v) + 4 * q.shape[0] * q.shape[1] * (v.shape[-1] + 1),
        ref=lambda q, k, v, **o: cut_tiles(q, k, o) * (q.shape[-1] + v.shape[-1]),
        # without a kernel a GPU takes the tiles in turn, and starting each one costs more than its work
        bound={"h200": "overhead", "xeon_6154": "arithmetic"},
        large=(("float32", (1, 8, 16384, 64)),) * 3,
        options={
            "block_mask": ref.block_sparse_flash.butterfly_block_mask(32),
            "block_q": 512,
            "block_k": 512,
        },
    ),
}


def test_block_sparse_flash_chapter_runs(monkeypatch, capsys):
    """Every cell of the chapter, the folded solutions and what they assert among them."""
    monkeypatch.chdir(record.ROOT)
    text = (record.ROOT / "docs/attention/block_sparse_flash.md").read_text()
    cells = re.findall(r'^( *)```python exec="on"[^\n]*\n(.*?)^\1```', text, re.M | re.S)
    for _, cell in cells:
        exec(compile(textwrap.dedent(cell), "block_sparse_flash.md", "exec"), {})
    assert len(cells) >= 9
    assert "t = a + b s" in capsys.readouterr().out


def test_block_sparse_flash_stored_results_are_fresh():
    """`python -m tests.claims.block_sparse_flash` again if not (--gpu on a GPU); time follows density."""
    for name in ("block_sparse_flash", "block_sparse_flash_gpu"):
        if (record.DATA / f"{name}.json").exists():
            assert record.is_fresh(name), name
            for row in record.load(name)["results"]["density"]:
                for each in ("forward", "both"):
                    assert row[each]["r2"] > 0.97
                    assert row[each]["b"] > 5 * abs(row[each]["a"])
    assert record.is_fresh("block_sparse_flash")
