"""Lean Attention: laws on ref, golden vectors, bad inputs; accel in every implementation; costs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import accel
import ref
from accel.attention import lean
from accel.kernels import lean_tpu, lean_triton
from ref.catalog import BY_SLUG
from tests.attention import laws_lean
from tests.claims import record
from tests.golden_runner import cases, golden, run, run_accel
from tests.hw_record import Cost, size
from tests.laws import law_tests, rejects
from tests.lower import lowered

globals().update(law_tests(laws_lean))
BUILD = {"state": lambda tree: ref.lean.SoftmaxState(**tree)}


@golden("lean")
def test_lean_golden_ref(case):
    run(case, ref.lean, build=BUILD)


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@golden("lean", only=set(BY_SLUG["lean"].core))
def test_lean_golden_accel(case, x64):
    build = {"state": lambda tree: accel.lean.SoftmaxState(**tree)}
    run_accel(case, accel.lean, build=build, x64=x64)


L = ref.lean
Q, K = np.ones((2, 4, 8)), np.ones((2, 2, 16, 8))
PLAN = {"block_n": 4, "num_workers": 3}
BAD = {
    "zero": (lambda: L.lean_attention(Q, K, K, lengths=np.array([0, 3])), r"lengths must be in 1\.\.16"),
    "long": (lambda: L.lean_attention(Q, K, K, lengths=np.array([17, 3])), r"lengths must be in 1\.\.16"),
    "float": (lambda: L.lean_attention(Q, K, K, lengths=np.array([1.0, 3.0])), "lengths must be integers"),
    "batch": (lambda: L.lean_attention(Q, K, K, lengths=np.array([1, 2, 3])), "does not broadcast"),
    "block": (lambda: L.lean_attention(Q, K, K, block_n=0), "block_n must be at least 1"),
    "workers": (lambda: L.lean_attention(Q, K, K, num_workers=0), "num_workers must be at least 1"),
    "heads": (lambda: L.lean_attention(Q[:, :3], K, K), "not a multiple of the Hkv=2"),
    "width": (lambda: L.lean_attention(Q[..., :7], K, K), r"k\.shape\[3\] = 8, but axis D is 7"),
    "values": (lambda: L.lean_attention(Q, K, K[:, :, :15]), r"v\.shape\[2\] = 15"),
    "no_key": (lambda: L.lean_attention(Q, K[:, :, :0], K[:, :, :0]), "at least one request and one key"),
    "grid": (lambda: L.stream_k_schedule(np.array([3]), 1, grid="some", **PLAN), "grid must be"),
    "plan_heads": (lambda: L.stream_k_schedule(np.array([3]), 0, **PLAN), "num_heads must be at least 1"),
    "plan_lengths": (lambda: L.stream_k_schedule(np.array([3, 0]), 1, **PLAN), "each at least 1"),
    "splits": (lambda: L.flash_decoding_attention(Q, K, K, num_splits=0), "num_splits must be at least 1"),
    "method": (lambda: L.decode_makespan([3], 1, method="split", **PLAN), "method must be one of"),
    "makespan_splits": (
        lambda: L.decode_makespan([3], 1, method="flash_decoding", num_splits=0, **PLAN),
        "num_splits must be at least 1",
    ),
    "heuristic": (lambda: L.num_splits_heuristic(1, 1, 0), "num_tiles must be at least 1"),
    "axis": (lambda: L.combine_partials(np.ones((2, 3)), np.ones(2), axis=1), r"axis must be in -1\.\.0"),
    "partials": (lambda: L.combine_partials(np.ones((2, 3)), np.ones(3)), "lse"),
}

test_lean_rejects_bad_input = rejects(BAD)


ATOL = 64 * 2.0**-23 * 10  # scores of up to 10 carry eps * D * 10, which exp passes on to weights of |v| <= 4
SIZE = (2, 4, 2, 50, 8, 4, 2)  # B, H, Hkv, S, D, Dv, L
WORKERS = {"triton": 40, "tpu": 3}  # more than tiles, and fewer


def inputs(dtype=np.float32):
    """q, k, v, lengths, with NaN and infinity where no key may be seen."""
    B, H, Hkv, S, D, Dv, rows = SIZE
    q, k, v = laws_lean.qkv(0, B, H, Hkv, S, D, Dv, L=rows)
    lengths = np.array([S, 13], np.int32)
    k[1, :, 13:], v[1, :, 13:] = np.nan, np.inf
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), lengths


@pytest.fixture
def walk(monkeypatch):
    """The XLA form walks the tiles of a small cache too."""
    monkeypatch.setattr("accel.attention.lean.IN_CACHE", 0)


@pytest.mark.parametrize("impl", WORKERS)
def test_lean_kernels_match_ref(impl):
    """In interpret mode with traced lengths; padding of NaN never counts."""
    q, k, v, lengths = inputs()
    want = ref.lean.lean_attention(*map(np.float64, (q, k, v)), lengths=lengths, return_lse=True)
    options = {
        "num_workers": WORKERS[impl],
        "block_n": 16,
        "impl": impl,
        "interpret": True,
        "return_lse": True,
    }
    f = jax.jit(lambda q, k, v, n: accel.lean.lean_attention(q, k, v, lengths=n, **options))
    for got, expected in zip(f(q, k, v, lengths), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=ATOL)


@given(laws_lean.batches, st.integers(1, 6), st.integers(1, 12), st.integers(1, 60))
def test_lean_accel_tables_are_the_schedules(lengths, heads, block, W):
    """Segments of equal runs against ref's, of a fixed split against its definition; the order of tiles."""
    plan = ref.lean.stream_k_schedule(np.array(lengths), heads, block_n=block, num_workers=W)
    tiles = -(-np.array(lengths) // block)
    table = lean._line(tiles, heads, plan.num_programs)
    some = table.hi > table.lo
    worker = np.repeat(np.arange(plan.num_programs), np.diff(table.run))
    got = np.stack([worker, table.output, table.lo, table.hi], axis=1)[some]
    np.testing.assert_array_equal(got, plan.segments[:, :4])
    split = lean._parts(tiles, heads, 3)
    for o, t in enumerate(np.tile(tiles, heads)):
        mine = slice(table.first[o], table.first[o + 1])
        assert (table.output[mine] == o).all()
        assert (table.hi - table.lo)[mine].sum() == t
        mine, part = slice(split.first[o], split.first[o + 1]), -(-t // 3)
        assert (split.output[mine] == o).all()
        assert split.lo[mine].tolist() == [min(i * part, t) for i in range(3)]
        assert split.hi[mine].tolist() == [min(i * part + part, t) for i in range(3)]
    for x in (table, split):
        segment, tile = lean._order(x, heads * int(tiles.sum()))
        np.testing.assert_array_equal(tile, np.concatenate([np.arange(t) for t in np.tile(tiles, heads)]))
        assert ((x.lo[segment] <= tile) & (tile < x.hi[segment])).all()


def test_lean_accel_walk_in_float64(walk):
    """A golden case, its lengths known; values alone, since derivatives are the dense form's."""
    case = next(c for c in cases("lean") if c.meta["fn"] == "lean_attention")
    run_accel(replace(case, meta={**case.meta, "grads": {}}), accel.lean, x64=True)


def test_lean_accel_vmap_over_requests(walk):
    """Requests with their own traced lengths, a cache that ends inside a tile, NaN beyond."""
    q, k, v, lengths = inputs()
    want = ref.lean.lean_attention(*map(np.float64, (q, k, v)), lengths=lengths)
    one = lambda q, k, v, n: accel.lean.lean_attention(q[None], k[None], v[None], lengths=n[None], block_n=16)
    got = jax.jit(jax.vmap(one))(q, k, v, lengths)[:, 0]
    np.testing.assert_allclose(got, want, rtol=0, atol=ATOL)


def test_lean_kernel_of_a_fixed_split_in_bfloat16():
    """The value; a derivative is there, by the rule that the XLA form has and the generic tests check."""
    q, k, v, lengths = inputs(jnp.bfloat16)
    options = {"lengths": lengths, "block_n": 16, "num_splits": 3, "impl": "triton", "interpret": True}
    call = lambda q: accel.lean.flash_decoding_attention(q, k, v, **options)
    got, want = call(q), ref.lean.lean_attention(*map(np.float64, (q, k, v)), lengths=lengths)
    assert got.dtype == jnp.bfloat16
    # probabilities and the result are rounded to 8 bits: two halves of 2^-8 of values up to 4
    np.testing.assert_allclose(np.float64(got), want, rtol=0, atol=4 * 2.0**-8 * 2)
    assert jax.eval_shape(jax.grad(lambda q: call(q).sum()), q).shape == q.shape


def test_lean_kernels_lower_for_their_devices():
    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype)
    n, run = [shape(jnp.int32, 140)] * 4, shape(jnp.int32, 133)
    qkv = [shape(jnp.bfloat16, 8, r, 64) for r in (4, 4000, 4000)]
    options = {"scale": 0.1, "block_n": 256}
    tpu = lambda *a: lean_tpu.partial_states(*a, most=2, **options)
    triton = lambda *a: lean_triton.partial_states(*a, **options)
    first, at = shape(jnp.int32, 9), shape(jnp.int32, 8)
    parts = [shape(jnp.float32, *s) for s in ((140, 16), (140, 16), (140, 16, 64))]
    merge = lambda *a: lean_triton.merged(*a, dtype=jnp.bfloat16)
    lowered(tpu, (*n, *qkv), "tpu")
    lowered(triton, (run, *n, *qkv), "cuda")
    lowered(merge, (first, at, *parts), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(8192, 1000), (777, 65536)], ids=["short", "long"])
def test_lean_triton_on_a_gpu(lengths):
    """The compiled kernel against the float32 form, bfloat16, grouped heads."""
    rng = np.random.default_rng(0)
    S = max(lengths)
    q, k, v = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in
               ((2, 32, 128), (2, 8, S, 128), (2, 8, S, 128)))  # fmt: skip
    options = {"lengths": np.array(lengths), "return_lse": True, "num_workers": 132}
    got = accel.lean.lean_attention(q, k, v, impl="triton", block_n=128, **options)
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        want = accel.lean.lean_attention(*wide, impl="xla", **options)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g.astype(np.float32), w, rtol=0, atol=2 * 2.0**-8 * max(1, abs(w).max()))


def test_lean_impl_asked_for_by_name_says_why_not():
    q, k, v, _ = inputs()
    for options, message in (
        ({"impl": "hopper"}, "is not there yet"),
        ({"impl": "triton"}, "needs a GPU"),
        ({"impl": "triton", "interpret": True, "block_n": 24}, "a power of two, at least 16"),
        ({"impl": "tpu", "interpret": True, "block_n": 12}, "a multiple of 8"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            accel.lean.lean_attention(q, k, v, **options)
    with pytest.raises(ValueError, match="impl must be"):
        accel.lean.lean_attention(q, k, v, impl="cuda")
    with pytest.raises(ValueError, match="lengths must be in"):
        accel.lean.lean_attention(q, k, v, lengths=np.array([0, 3]))
    with pytest.raises(ValueError, match="num_splits must be at least 1"):
        accel.lean.flash_decoding_attention(q, k, v, num_splits=0)


def test_lean_stored_results_are_fresh():
    """`python -m tests.claims.lean` again if not (--gpu on a GPU)."""
    for name in ("lean", "lean_gpu"):
        if (record.DATA / f"{name}.json").exists():
            assert record.is_fresh(name), name
            assert record.load(name)["results"]["rows"]
    assert record.is_fresh("lean")


def per_key(q, k, v):
    return q.shape[1] * (k.shape[-1] + v.shape[-1])


def whole_cache(q, k, v, **options):
    """MACs of accel on a small cache, which masks what ref does not visit."""
    return per_key(q, k, v) * q.shape[0] * k.shape[2]


def padded_cache(q, k, v, **options):
    """The same in equal parts of whole tiles."""
    tiles = -(-max(options["lengths"]) // options["block_n"])
    parts = ref.lean.num_splits_heuristic(q.shape[0] * k.shape[1], options["num_workers"], tiles)
    keys = -(-tiles // parts) * parts * options["block_n"]
    return per_key(q, k, v) * q.shape[0] * max(keys, k.shape[2])


def seen_keys(q, k, v, **options):
    """MACs of ref: the tail of a cache is not read."""
    return per_key(q, k, v) * int(np.sum(options["lengths"]))


def once(q, k, v, **options):
    return size(q, k, v) + 4 * q.size // q.shape[-1] * v.shape[-1]


HW = {
    "lean_attention": Cost(
        macs=whole_cache,
        bytes=once,
        ref=seen_keys,
        bound={
            "h200": "overhead",
            "xeon_6154": "arithmetic",
        },  # the walk: a launch a tile; few rows a product
        large=(("bfloat16", (1, 32, 128)), *((("bfloat16", (1, 8, 65536, 128)),) * 2)),
    ),
    "flash_decoding_attention": Cost(macs=padded_cache, bytes=once, ref=seen_keys),
    "combine_partials": Cost(
        macs=lambda o, lse: 0, bytes=lambda o, lse: size(o, lse) + 4 * (o[0].size + lse[0].size)
    ),
    "merge": Cost(macs=lambda a, b: 0, bytes=lambda a, b: size(*a, *b, *a)),
    "finalize": Cost(macs=lambda s: 0, bytes=lambda s: size(*s) + 4 * (s.acc.size + s.l.size)),
}
