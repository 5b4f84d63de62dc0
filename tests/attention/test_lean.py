"""Lean Attention: laws on ref, golden vectors, bad inputs; accel in every implementation; costs."""

from dataclasses import replace
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import accel
import ref
from accel.attention import lean
from accel.blocks import backend
from accel.kernels import lean_hopper, lean_tpu, lean_triton
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
    "no_width": (lambda: L.lean_attention(Q[..., :0], K[..., :0], K), "heads must be at least 1 wide"),
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


RUNS, SPLIT = lean_hopper.Runs, lean_hopper.Parts


HOPPER = {  # R, D, Dv, plan
    "few rows": (4, 128, 128, RUNS(2, 4, 132)),
    "heads alone": (1, 64, 64, RUNS(8, 1, 132)),
    "the widest": (12, 256, 128, RUNS(1, 8, 132)),
    "a fixed split": (8, 64, 128, SPLIT(2, 4, 3)),
    "many requests": (4, 64, 64, RUNS(40, 2, 132)),
    "all keys": (4, 64, 64, RUNS(2, 2, 132, 4000)),
}


@pytest.mark.parametrize("name", HOPPER, ids=lambda n: f"lean_{n}")
def test_lean_hopper_lowers(name):
    R, D, Dv, plan = HOPPER[name]
    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype)
    O, lengths = plan.batch * plan.heads, shape(jnp.int32, plan.batch)
    qkv = [shape(jnp.bfloat16, O, *s) for s in ((R, D), (4000, D), (4000, Dv))]
    call = lambda *a: lean_hopper.attend(*a, plan=plan, scale=0.1, block_n=64)
    lowered(call, (lengths, *qkv), "hopper")


def taken(plan, lengths, size, monkeypatch):
    """[(block, slot, output in memory, tiles lo, hi, keys)] of the blocks of a plan, in their order."""
    found = []
    with jax.disable_jit():
        for g in range(plan.blocks):
            monkeypatch.setattr(lean_hopper.lax, "axis_index", lambda name, g=g: jnp.int32(g))
            turns = []

            def body(turn, loaded, *segment, g=g, turns=turns):
                assert loaded == sum(hi - lo for *_, lo, hi, _ in found[len(found) - len(turns) :])
                turns.append(int(turn))
                found.append((g, *map(int, segment)))
                return loaded + segment[3] - segment[2]

            plan.each(jnp.asarray(lengths, jnp.int32), size, body)
            assert turns == list(range(len(turns)))
    return found


@pytest.mark.parametrize("B", [1, 3, 34])
def test_lean_hopper_blocks_take_the_schedule(B, monkeypatch):
    """Segments and slots of equal runs against ref's, of a fixed split against its definition; what the merge
    looks for are those that were written.
    """
    heads, W, size = 2, 5, 4
    lengths = np.random.default_rng(B).integers(1, 20, B)
    tiles = -(-lengths // size)
    runs, split = RUNS(B, heads, W), SPLIT(B, heads, 3)
    place = lambda o: o % B * heads + o // B
    want = ref.lean.stream_k_schedule(lengths, heads, block_n=size, num_workers=W, grid="all").segments
    want = [(g, g + o, place(o), lo, hi, lengths[o % B]) for g, o, lo, hi in want[:, :4].tolist()]
    assert taken(runs, lengths, size, monkeypatch) == want
    full = ref.lean.stream_k_schedule(np.full(B, 18), heads, block_n=size, num_workers=W, grid="all").segments
    full = [(g, g + o, place(o), lo, hi, 18) for g, o, lo, hi in full[:, :4].tolist()]
    assert taken(RUNS(B, heads, W, 18), np.zeros(B), size, monkeypatch) == full  # lengths are not read
    parts = []
    for at, t in enumerate(np.repeat(tiles, heads).tolist()):
        some = -(-t // 3)
        bounds = [min(i * some, t) for i in range(4)]
        for i in range(3):
            parts.append((3 * at + i, 3 * at + i, at, bounds[i], bounds[i + 1], lengths[at // heads]))
    if B < 10:
        assert taken(split, lengths, size, monkeypatch) == parts
    more = jnp.zeros(64, jnp.int32).at[:B].set(tiles)
    for plan, segments in ((runs, want), (split, parts)):
        for at in range(min(B * heads, 8)):
            start, stop = plan.slots_of(jnp.int32(at), more)
            assert list(range(start, stop)) == [slot for _, slot, place, *_ in segments if place == at]


@pytest.mark.parametrize("plan", [RUNS(3, 2, 7), SPLIT(3, 2, 4)], ids=lambda p: f"lean_{type(p).__name__}")
def test_lean_hopper_merge_takes_what_was_written(plan, monkeypatch):
    """Two states a slot, NaN where no block writes; the kernel of the merge in interpret mode."""
    rng, lengths, (R, Dv) = np.random.default_rng(0), np.array([9, 1, 30], np.int32), (4, 64)
    n = 2 * plan.slots
    m, l, acc = (np.full(s, np.nan, np.float32) for s in ((n, R), (n, R), (n, R, Dv)))
    want = [[] for _ in range(plan.batch * plan.heads)]
    for _, slot, at, *_ in taken(plan, lengths, 4, monkeypatch):
        for i in (2 * slot, 2 * slot + 1):
            m[i], l[i], acc[i] = rng.normal(0, 5, R), rng.uniform(1, 2, R), rng.normal(0, 1, (R, Dv))
            want[at].append(ref.lean.SoftmaxState(m[i] * np.log(2), l[i], acc[i]))
    options = {"plan": plan, "block_n": 4, "dtype": jnp.float32, "each": 2, "parts": 4, "interpret": True}
    o, lse = lean_triton.merged_slots(jnp.asarray(lengths), *map(jnp.asarray, (m, l, acc)), **options)
    for at, states in enumerate(want):
        expected = ref.lean.finalize(reduce(ref.lean.merge, states))
        # a sum of up to 18 states, weighted by exponentials of differences up to 30
        np.testing.assert_allclose(o[at], expected[0], rtol=0, atol=64 * 2.0**-23)
        np.testing.assert_allclose(lse[at], expected[1], rtol=0, atol=64 * 2.0**-23)


LARGE = 2**19  # keys: more than XLA is as fast with as Triton
ON_HOPPER = {  # what is not bfloat16 [1, 4, 64] and [1, 2, 64, 64], and what "auto" takes on a Hopper GPU
    "bfloat16": ({}, "hopper"),
    "float16": ({"dtype": jnp.float16}, "hopper"),
    "float32": ({"dtype": jnp.float32, "S": LARGE}, "triton"),
    "float32_short": ({"dtype": jnp.float32}, "xla"),
    "heads_of_32": ({"D": 32, "S": LARGE}, "triton"),
    "wide_values": ({"Dv": 256}, "hopper"),
    "many_rows": ({"H": 256, "S": LARGE}, "triton"),
    "odd_cache": ({"S": LARGE + 4}, "triton"),
    "tiles_of_its_own": ({"block_n": 24}, "hopper"),
    "tiles_of_no_kernel": ({"block_n": 24, "dtype": jnp.float32, "S": LARGE}, "xla"),
}
WHY_NOT = {
    "float32": "takes bfloat16 or float16, not float32",
    "heads_of_32": "takes D and Dv of 64, 128 or 256, not 32 and 64",
    "many_rows": "takes up to 64 rows a key head, not 128",
    "odd_cache": f"takes a cache of a multiple of 8 keys, not {LARGE + 4}",
}


@pytest.mark.parametrize("name", ON_HOPPER, ids=lambda n: f"lean_{n}")
def test_lean_auto_takes_what_can_run_on_hopper(name, monkeypatch):
    """The choice alone, no GPU is there; and why not, of an implementation asked for by name."""
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    monkeypatch.setattr(lean, "hopper_obstacle", lambda *_: None)
    options, impl = ON_HOPPER[name]
    o = {"H": 4, "D": 64, "Dv": 64, "S": 64, "dtype": jnp.bfloat16, "block_n": 256} | options
    ones = lambda *s: np.broadcast_to(np.ones((), o["dtype"]), s)  # of no memory
    q, k, v = ones(1, o["H"], o["D"]), ones(1, 2, o["S"], o["D"]), ones(1, 2, o["S"], o["Dv"])
    choose = lambda impl: lean._implementation(q, k, v, o["block_n"], impl, False, own_tiles=True)
    assert choose("auto") == impl
    if name in WHY_NOT:
        with pytest.raises(NotImplementedError, match=WHY_NOT[name]):
            choose("hopper")
    if name == "tiles_of_its_own":
        with pytest.raises(NotImplementedError, match="block_n to be a multiple of 64"):
            accel.lean.flash_decoding_attention(q, k, v, block_n=24, impl="hopper")


GPU_CASES = {  # B, H, Hkv, S, D, Dv, lengths, dtype, options
    "grouped": (2, 32, 8, 4096, 128, 128, (4096, 77), jnp.bfloat16, {}),
    "alone": (2, 7, 7, 520, 64, 64, (520, 129), jnp.bfloat16, {}),
    "ragged": (4, 32, 8, 1000, 128, 128, (1, 64, 1000, 65), jnp.bfloat16, {}),
    "wide": (2, 24, 2, 520, 256, 128, (520, 1), jnp.float16, {}),
    "float16": (2, 8, 2, 520, 64, 128, (513, 500), jnp.float16, {}),
    "negative": (2, 8, 2, 520, 128, 128, (520, 3), jnp.bfloat16, {"scale": -0.3}),
    "flat": (1, 8, 2, 520, 128, 128, (520,), jnp.bfloat16, {"scale": 0.0}),
    "many_tokens": (1, 40, 4, 4096, 128, 256, (4001,), jnp.bfloat16, {"grid": "all"}),
}


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("name", GPU_CASES, ids=lambda n: f"lean_{n}")
def test_lean_hopper_matches_ref_on_a_gpu(name):
    """Lengths known, traced and under vmap; NaN beyond a length never counts; the same bits every time."""
    B, H, Hkv, S, D, Dv, lengths, dtype, options = GPU_CASES[name]
    rng = np.random.default_rng()
    q, k, v = (rng.standard_normal(s) for s in ((B, H, D), (B, Hkv, S, D), (B, Hkv, S, Dv)))
    for b, n in enumerate(lengths):
        k[b, :, n:], v[b, :, n:] = np.nan, np.nan
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    want = ref.lean.lean_attention(*wide, lengths=np.array(lengths), return_lse=True, **options)
    decode = lambda lengths: (
        lambda *x: accel.lean.lean_attention(*x, lengths=lengths, impl="hopper", return_lse=True, **options)
    )
    there = jnp.asarray(lengths, jnp.int32)
    run = jax.jit(lambda n, *x: decode(n)(*x))
    one = lambda n, *x: jax.tree.map(lambda y: y[0], decode(n[None])(*(y[None] for y in x)))
    found = {
        "known": jax.jit(decode(np.array(lengths)))(q, k, v),
        "traced": run(there, q, k, v),
        "again": run(there, q, k, v),
        "mapped": jax.jit(jax.vmap(one))(there, q, k, v),
    }
    for once, twice in zip(found["traced"], found["again"], strict=True):
        np.testing.assert_array_equal(once, twice)
    eps, top = float(jnp.finfo(dtype).eps), np.nanmax(np.abs(wide[2]))
    # Products of half precision numbers are exact in float32 and are added 16 at a time: a score is off by a
    # step of float32 (sums may be cut, not rounded) for each 16, and two for its scale, of |q| |k| at most,
    # and so is lse, whose slopes are weights. Exponentials are within 2^-22, their sums within 64 roundings,
    # the logarithm and its factor within two steps of the result.
    size = lambda x: np.sqrt(np.nanmax(np.square(x).sum(axis=-1)))
    score = abs(options.get("scale", D**-0.5)) * size(wide[0]) * size(wide[1])
    off = 2.0**-23 * ((-(-D // 16) + 2) * score + 34 + 2 * np.abs(want[1]).max())
    for o, lse in found.values():
        # P and o are rounded to half precision: half an eps each of values up to the largest
        assert o.dtype == dtype
        assert np.abs(np.asarray(o, np.float64) - want[0]).max() <= eps * top
        np.testing.assert_allclose(lse, want[1], rtol=0, atol=off)


@pytest.mark.gpu
@pytest.mark.hopper
def test_lean_hopper_is_what_auto_takes_on_a_gpu():
    """In both functions; a derivative is there, by the rule of the XLA form."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((1, 8, 64)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((1, 2, 4096, 64)), jnp.bfloat16) for _ in range(2))
    for call in (accel.lean.lean_attention, accel.lean.flash_decoding_attention):
        assert "mosaic_gpu" in jax.jit(call).lower(q, k, v).as_text()
        got, want = call(q, k, v), call(*(x.astype(jnp.float32) for x in (q, k, v)), impl="xla")
        # P and o are rounded to bfloat16, half an ulp each: 2^-9 of values up to the largest
        np.testing.assert_allclose(np.float32(got), want, rtol=0, atol=2.0**-8 * np.abs(v).max())
    loss = lambda q: accel.lean.lean_attention(q, k, v).astype(jnp.float32).sum()
    assert np.isfinite(np.float32(jax.grad(loss)(q))).all()


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
        ({"impl": "hopper"}, "takes bfloat16 or float16, not float32"),
        ({"impl": "hopper", "interpret": True}, "has no interpreter"),
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
