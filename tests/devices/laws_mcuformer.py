"""Laws of MCUFormer on ref alone: NumPy and Hypothesis."""

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.blocks import live_arena
from ref.blocks.arena import Plan, best_plan, overlaps
from ref.blocks.int8_ops import lut_s8, norm_params_s8
from ref.blocks.live_arena import ArenaError, LiveArena, Phase, lifetimes, run_phases
from ref.blocks.mlp import gelu
from ref.blocks.vit_int8 import Near8, Norm8, Softmax8, exponential_gelu
from ref.devices.mcuformer import (
    PATCHES,
    LowRank,
    SubnetConfig,
    SubnetSpace,
    evolution_step,
    evolve_space,
    extract_subnet,
    fold_factors,
    framed,
    init_mcuformer,
    low_rank_linear,
    mcuformer_forward,
    mcuformer_int8,
    nearest_points,
    peak_memory,
    quantize_model,
    relative_position_embedding,
    released_predicate,
    search_subnet,
    slice_qkv_rows,
    svd_init,
    token_count,
)

EPS = np.finfo(np.float64).eps
FEW = settings(max_examples=12)
seeds = st.integers(0, 2**32 - 1)
SMALL = {"patch": 4, "rank_ratio": 0.75, "max_distance": 2, "head_dim": 4}
SUBNET = SubnetConfig(10, (1, 2), (2.0, 1.5))


def supernet(seed=0, *, image_size=10, depth=2, patch=4, std=0.3):
    rng = np.random.default_rng(seed)
    return init_mcuformer(
        rng,
        image_size=image_size,
        patch=patch,
        embed_dim=12,
        depth=depth,
        heads=2,
        mlp_ratio=2.0,
        rank_ratio=0.75,
        num_classes=3,
        max_distance=2,
        head_dim=4,
        std=std,
    )


def images(seed=0, *, n=3, size=10):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3)).astype(np.uint8)


def raises(kind, call, words):
    """The message of the error that call must raise."""
    message = None
    try:
        call()
    except kind as why:
        message = str(why)
    assert message is not None, f"no {kind.__name__}"
    assert words in message, message


# The network


@FEW
@given(seeds, st.integers(1, 7), st.integers(1, 7))
def law_mcuformer_factors_of_full_rank_are_the_dense_layer(seed, out, width):
    """And of a lower rank the best there are: their error is the tail of the singular values."""
    rng = np.random.default_rng(seed)
    w, x, b = rng.standard_normal((out, width)), rng.standard_normal((3, width)), rng.standard_normal(out)
    size = np.abs(x).sum() * np.abs(w).sum() + np.abs(b).max()
    got = low_rank_linear(x, *svd_init(w, max(out, width)), b)
    np.testing.assert_allclose(got, x @ w.T + b, rtol=0, atol=64 * EPS * size)
    singular = np.linalg.svd(w, compute_uv=False)
    for rank in range(1, min(out, width) + 1):
        w1, w2, w3 = svd_init(w, rank)
        tail = math.sqrt((singular[rank:] ** 2).sum())
        np.testing.assert_allclose(np.linalg.norm(w - w3 @ w2 @ w1), tail, rtol=0, atol=1e-13 * singular[0])


@FEW
@given(seeds, st.integers(1, 5))
def law_mcuformer_factors_in_a_row_and_folded(seed, rank):
    rng = np.random.default_rng(seed)
    f = LowRank(*(rng.standard_normal(s) for s in ((rank, 6), (rank, rank), (4, rank), (4,))))
    x = rng.standard_normal((2, 6))
    want = np.zeros((2, 4))
    for n, o, r, s, i in itertools.product(range(2), range(4), range(rank), range(rank), range(6)):
        want[n, o] += f.w3[o, r] * f.w2[r, s] * f.w1[s, i] * x[n, i]
    bound = (
        8
        * (6 + 2 * rank)
        * EPS
        * np.abs(f.w3).sum()
        * np.abs(f.w2).sum()
        * np.abs(f.w1).sum()
        * np.abs(x).max()
    )
    for g in (f, fold_factors(f)):
        np.testing.assert_allclose(low_rank_linear(x, *g), want + f.b, rtol=0, atol=bound + 4 * EPS)
    assert fold_factors(fold_factors(f)).w2 is None


@given(st.integers(1, 12), st.integers(1, 5))
def law_mcuformer_rows_of_q_k_v_are_interleaved(out, width):
    w = np.arange(14 * 6).reshape(14, 6)
    rows = [r for start in range(3) for r in range(start, out, 3)]
    np.testing.assert_array_equal(slice_qkv_rows(w, out, width), [w[r, :width] for r in rows])


@given(st.integers(1, 20), st.integers(1, 3), seeds)
def law_mcuformer_distances_are_clipped_and_the_class_token_has_its_own(n, most, seed):
    v, h = np.random.default_rng(seed).standard_normal((2, 2 * most + 2, 3))
    r = relative_position_embedding(v, h, n, max_distance=most)
    side = max(math.isqrt(n - 1), 1)
    clip = lambda a: max(-most, min(most, a))
    for i, j in itertools.product(range(n), repeat=2):
        (y, x), (b, a) = divmod(i - 1, side), divmod(j - 1, side)
        want = v[clip(b - y) + most + 1] + h[clip(a - x) + most + 1] if i and j else v[0] + h[0]
        np.testing.assert_array_equal(r[i, j], want)
    codes = np.random.default_rng(seed).integers(-63, 64, (2, 2 * most + 2, 3)).astype(np.int8)
    table = Near8(*codes, most)
    np.testing.assert_array_equal(
        [table.rows(i, n) for i in range(n)], relative_position_embedding(*codes, n, max_distance=most)
    )


def direct(img, p, subnet, *, relative, pooling):
    """One image through the subnet, token by token and head by head, from the supernet's own arrays."""
    E, d, S, patch = subnet.embed_dim, 4, img.shape[0], 4
    n = -(-S // patch)
    before = (n * patch - S) // 2
    padded = np.zeros((n * patch, n * patch, 3))
    padded[before : before + S, before : before + S] = img
    norm = lambda t, w, b: (t - t.mean()) / math.sqrt(t.var() + 1e-5) * w[:E] + b[:E]
    xs = [p.cls_token[:E] + p.pos_embed[0, :E]]
    for r, c in itertools.product(range(n), repeat=2):
        tile = padded[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].transpose(2, 0, 1)
        xs.append((p.w_patch[:E] * tile).sum(axis=(1, 2, 3)) + p.b_patch[:E] + p.pos_embed[len(xs), :E])
    R = int(12 * 0.75)
    for b, heads, ratio in zip(p.blocks, subnet.heads, subnet.mlp_ratios, strict=True):
        A, F = heads * d, int(E * ratio)
        M = int(min(E, F) * 0.75)
        order = lambda k: [r for s in range(3) for r in range(s, k, 3)]
        ys = [norm(x, b.ln1_w, b.ln1_b) for x in xs]
        low = [b.qkv.w2[:R, :R][order(R)] @ (b.qkv.w1[:R, :E][order(R)] @ y) for y in ys]
        qkv = [b.qkv.w3[: 3 * A, :R][order(3 * A)] @ t + b.qkv.b[: 3 * A] for t in low]
        r_k = relative_position_embedding(*b.rel_k, len(xs), max_distance=2)
        r_v = relative_position_embedding(*b.rel_v, len(xs), max_distance=2)
        outs = []
        for i in range(len(xs)):
            out = []
            for h in range(heads):
                at = lambda j, part, h=h, A=A, qkv=qkv: qkv[j][part * A + h * d : part * A + (h + 1) * d]
                a = [at(i, 0) @ (at(j, 1) + relative * r_k[i, j]) / 2 for j in range(len(xs))]
                w = [math.exp(t - max(a)) for t in a]
                out.append(sum(t * (at(j, 2) + relative * r_v[i, j]) for j, t in enumerate(w)) / sum(w))
            outs.append(np.concatenate(out))
        low = lambda t, f, k, m: f.w3[:k, :m] @ (f.w2[:m, :m] @ (f.w1[:m, : len(t)] @ t)) + f.b[:k]
        xs = [x + low(o, b.proj, E, R) for x, o in zip(xs, outs, strict=True)]
        hidden = [low(norm(x, b.ln2_w, b.ln2_b), b.fc1, F, M) for x in xs]
        xs = [x + low(np.array([t * (1 + math.erf(t / math.sqrt(2))) / 2 for t in y]), b.fc2, E, M)
              for x, y in zip(xs, hidden, strict=True)]  # fmt: skip
    ys = [norm(x, p.norm_w, p.norm_b) for x in xs]
    pooled = ys[0] if pooling == "class_token" else sum(ys[1:]) / len(ys[1:])
    return p.w_head[:, :E] @ pooled + p.b_head


@settings(max_examples=6)
@given(seeds, st.booleans(), st.sampled_from(("patch_mean", "class_token")))
def law_mcuformer_network_is_its_definition(seed, relative, pooling):
    p, img = supernet(seed), images(seed, n=1) / 255
    got = mcuformer_forward(img, p, subnet=SUBNET, pooling=pooling, relative_position=relative, **SMALL)
    # two layers of sums of at most 48 terms on numbers near 1, norms that magnify an error by 1 / std
    want = direct(img[0], p, SUBNET, relative=relative, pooling=pooling)
    np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-11)


def law_mcuformer_subnet_sees_its_slice_only():
    """NaN in everything beyond it changes nothing; the extracted network is a supernet of its own size."""
    p, img = supernet(3), images(3) / 255
    want = mcuformer_forward(img, p, subnet=SUBNET, **SMALL)
    E, b = SUBNET.embed_dim, p.blocks[0]
    wide = p._replace(
        w_patch=p.w_patch.copy(),
        blocks=(
            b._replace(
                ln1_w=b.ln1_w.copy(),
                fc1=b.fc1._replace(w3=b.fc1.w3.copy(), w1=b.fc1.w1.copy()),
                qkv=b.qkv._replace(w3=b.qkv.w3.copy()),
            ),
            *p.blocks[1:],
        ),
    )
    for a in (wide.w_patch, wide.blocks[0].ln1_w):
        a[E:] = np.nan
    wide.blocks[0].fc1.w1[:, E:] = np.nan
    wide.blocks[0].fc1.w3[int(E * 2.0) :] = np.nan
    wide.blocks[0].qkv.w3[3 * 1 * 4 :] = np.nan
    np.testing.assert_array_equal(mcuformer_forward(img, wide, subnet=SUBNET, **SMALL), want)
    small = extract_subnet(p, SUBNET, rank_ratio=0.75, head_dim=4)
    assert small.w_patch.shape[0] == E
    assert [b.qkv.w3.shape for b in small.blocks] == [(12, 9), (24, 9)]


def law_mcuformer_of_an_empty_batch_and_of_one_patch():
    p = supernet()
    assert mcuformer_forward(np.zeros((0, 10, 10, 3)), p, subnet=SUBNET, **SMALL).shape == (0, 3)
    one = supernet(image_size=4)
    got = mcuformer_forward(images(size=4)[0] / 255, one, subnet=SUBNET, **SMALL)
    np.testing.assert_allclose(
        got, direct(images(size=4)[0] / 255, one, SUBNET, relative=True, pooling="patch_mean"), atol=1e-11
    )
    deep = SubnetConfig(10, (1,), (2.0,))
    assert not np.allclose(got, mcuformer_forward(images(size=4)[0] / 255, one, subnet=deep, **SMALL))


@given(st.integers(1, 250), st.integers(1, 33))
def law_mcuformer_frames_are_whole(size, patch):
    """240 pixels by the paper's patches; other sizes; and the two patches that are framed as released."""
    img = np.arange(size * size, dtype=float).reshape(1, size, size, 1) + 1
    got = framed(img, patch, np.pad)
    n = math.isqrt(token_count(size, patch) - 1)
    assert got.shape == (1, n * patch, n * patch, 1)
    if patch in (28, 32):
        before = {28: 6, 32: 8}[patch]
        want = np.pad(img[0, :, :, 0], before)[: n * patch, : n * patch]
        assert n == (size + 2 * before) // patch
        np.testing.assert_array_equal(got[0, :, :, 0], want)
    else:
        assert (got != 0).sum() == size * size
        assert n * patch - size < patch
    assert [token_count(240, p) for p in PATCHES] == [226, 145, 101, 82, 65]


# Int8 and its memory


def quantized(seed=0, **options):
    p, u8 = supernet(seed), images(seed, n=4)
    return p, u8, quantize_model(p, u8, subnet=SUBNET, **SMALL, **options)


def expected(schedule):
    return peak_memory(SUBNET, img=10, patch=4, rank_ratio=0.75, schedule=schedule, super_dim=12, head_dim=4,
                       allow_any=True)  # fmt: skip


@settings(max_examples=3)
@given(seeds, st.sampled_from(("s8", "exponential")), st.booleans())
def law_mcuformer_schedules_give_the_same_bits_in_exactly_their_bytes(seed, forms, plain):
    pooling = "class_token" if plain else "patch_mean"
    _, u8, q = quantized(seed, forms=forms, pooling=pooling, relative_position=not plain)
    want, naive = mcuformer_int8(u8[0], q, schedule="naive")
    assert want.dtype == np.int32
    assert naive.peak == expected("naive").bytes <= naive.plan.total
    for schedule in ("integrated", "head_by_head"):
        got, trace = mcuformer_int8(u8[0], q, schedule=schedule)
        np.testing.assert_array_equal(got, want)
        need = expected(schedule)
        assert trace.table == need.table
        assert need.bytes == trace.peak == trace.plan.total == trace.high == trace.plan.lower_bound
        assert not overlaps(trace.plan)


def law_mcuformer_frame_cuts_alike_in_float_and_int8():
    """Patches of 28 on 50 pixels: 6 zeros before, 62 places to 56, so the frame's last 6 are cut."""
    p = supernet(image_size=50, patch=28, depth=1, std=0.05)
    u8, options = images(n=2, size=50), {**SMALL, "patch": 28, "subnet": SubnetConfig(10, (2,), (1.5,))}
    assert len(p.pos_embed) == 5
    q = quantize_model(p, u8, **options)
    runs = [mcuformer_int8(u8[0], q, schedule=s)[0] for s in ("integrated", "head_by_head", "naive")]
    np.testing.assert_array_equal(np.ptp(runs, axis=0), 0)
    want = mcuformer_forward(u8[:1] / 255, p, **options)[0]
    got = runs[0] * q.logit_scale
    assert got @ want / np.linalg.norm(got) / np.linalg.norm(want) > 0.99


def law_mcuformer_one_byte_less_than_the_plan_raises():
    _, u8, q = quantized()
    for schedule in ("integrated", "naive", "head_by_head"):
        need = mcuformer_int8(u8[0], q, schedule=schedule)[1].plan.total
        mcuformer_int8(u8[0], q, schedule=schedule, arena_bytes=need)
        short = lambda s=schedule, need=need: mcuformer_int8(u8[0], q, schedule=s, arena_bytes=need - 1)
        raises(MemoryError, short, "lacks 1 for")


def law_mcuformer_poison_of_any_value_changes_nothing():
    _, u8, q = quantized(5)
    before = live_arena.POISON
    try:
        logits = []
        for live_arena.POISON in (0x55, -1, 0):
            logits.append(
                [mcuformer_int8(u8[1], q, schedule=s)[0] for s in ("integrated", "head_by_head", "naive")]
            )
    finally:
        live_arena.POISON = before
    np.testing.assert_array_equal(np.ptp(np.reshape(logits, (9, 3)), axis=0), 0)


def law_mcuformer_arena_catches_what_a_plan_or_program_gets_wrong():
    one, none = np.ones((1, 4), np.int8), lambda a: None
    write = lambda name: lambda a: a.put(name, slice(None), one)
    read = lambda name: lambda a: a.get(name)
    ok = [Phase("a", {"x": (1, 4)}, write("x")), Phase("b", {"x": (1, 4), "y": (1, 4)}, write("y"))]
    assert run_phases(ok).high == 8
    raises(ArenaError, lambda: run_phases([ok[0], Phase("b", {"y": (1, 4)}, read("x"))]), "not alive")
    raises(
        ArenaError, lambda: run_phases([Phase("a", {"x": (1, 4)}, read("x"))]), "nothing living was written"
    )
    lost = [ok[0], Phase("b", {"y": (1, 4)}, none), Phase("c", {"x": (1, 4)}, read("x"))]
    raises(ValueError, lambda: run_phases(lost), "first phase to its last")
    dropped = Phase("a", {"x": (1, 4)}, lambda a: (write("x")(a), a.drop("x"), a.get("x")))
    raises(ArenaError, lambda: run_phases([dropped]), "nothing living was written")
    arena = LiveArena(Plan({"x": 0, "y": 2}, 6, 6))
    arena.take("x", (1, 4))
    raises(ArenaError, lambda: arena.take("y", (1, 4)), "overlap")
    raises(ArenaError, lambda: arena.put("x", slice(None), np.ones((1, 4))), "int8")
    assert lifetimes(ok) == [("x", 4, 0, 1), ("y", 4, 1, 1)]
    assert best_plan(lifetimes(ok), align=1).total == 8


def law_mcuformer_overwriting_a_key_too_early_is_caught():
    """The same attention with k freed before its last query reads dead bytes: the executor says so."""
    from ref.blocks import vit_schedules

    _, u8, q = quantized()
    phases = list(vit_schedules.SCHEDULES["integrated"](q, u8[0].astype(np.int16) - 128, []))
    at = next(i for i, p in enumerate(phases) if p.op == "attention")
    early = phases[at]._replace(buffers={n: s for n, s in phases[at].buffers.items() if not n.endswith(".k")})
    raises(ArenaError, lambda: run_phases([*phases[:at], early, *phases[at + 1 :]]), "not alive")


@settings(max_examples=4)
@given(seeds)
def law_mcuformer_int8_follows_the_float_network(seed):
    p, u8, q = quantized(seed)
    want = mcuformer_forward(u8 / 255, p, subnet=SUBNET, **SMALL)
    got = np.array([mcuformer_int8(u, q)[0] for u in u8]) * q.logit_scale
    assert (got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want) > 0.99


@FEW
@given(seeds, st.floats(0.005, 0.3))
def law_mcuformer_weights_of_attention_are_within_a_code(seed, scale):
    """CMSIS-NN's softmax within 1 of the rounded float one, I-BERT's within 2."""
    x = np.random.default_rng(seed).integers(-128, 128, (4, 9)).astype(np.int8)
    e = np.exp(scale * (x - x.max(axis=1, keepdims=True).astype(float)))
    want = np.clip(np.rint(256 * e / e.sum(axis=1, keepdims=True)) - 128, -128, 127)
    assert np.abs(Softmax8(scale, "s8")(x) - want).max() <= 1
    # i_exp is off by 4.4e-3 of its value, z halvings by z steps of 0.0025 at weights of 2^-z: together less
    # than a code of 1/256, and each side is rounded
    assert np.abs(Softmax8(scale, "exponential")(x) - want).max() <= 2


@FEW
@given(seeds)
def law_mcuformer_norm_is_within_two_codes(seed):
    """Of the float norm of what the codes mean."""
    rng = np.random.default_rng(seed)
    gamma, beta, x = rng.uniform(0.5, 1.5, 24), rng.standard_normal(24) / 2, rng.integers(-128, 128, (5, 24))
    q, offset, multiplier, shift = norm_params_s8(gamma, beta, 0.05)
    got = Norm8(q, offset, 7, multiplier, shift, 3)(x.astype(np.int8))
    y = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True) * gamma + beta
    assert np.abs(got - np.clip(np.rint(y / 0.05) + 3, -128, 127)).max() <= 2


@given(st.floats(0.001, 0.2))
def law_mcuformer_gelu_of_the_exponential_is_x_sigma(scale):
    x = np.arange(-128, 128)
    want = scale * x / (1 + np.exp(-1.702 * scale * x))
    # sigma moves by at most a quarter of exp's relative error: 4.4e-3, and 0.0025 for each of z halvings,
    # where e <= 2^-z; 15 fraction bits round it down
    assert (
        np.abs(exponential_gelu(x, scale) - want) <= np.abs(scale * x) * (0.0025 + 2.0**-15) + 1e-12
    ).all()
    assert np.abs(want - gelu(scale * x)).max() < 0.021


def law_mcuformer_gelu_table_is_the_function_of_its_codes():
    p, _, q = quantized(2)
    table = q.layers[0].gelu
    np.testing.assert_array_equal(lut_s8(np.arange(-128, 128).astype(np.int8), table), table)
    assert q.nonvolatile_bytes() < 4 * sum(np.size(a) for a in (*p[:4], *p[5:])) + 40_000


# Memory in closed form

NETS = ((16, 192, 3, 0.9), (20, 216, 4, 0.9), (16, 216, 4, 0.7))
CHECKED = {"naive": (393_240, 281_880, 515_280), "integrated": (174_698, 143_405, 223_514),
           "head_by_head": (117_558, 88_465, 137_368)}  # fmt: skip


def net(E, h, ratio=4.0, depth=12):
    return SubnetConfig(E, (h,) * depth, (ratio,) * depth)


def law_mcuformer_peaks_by_hand():
    for schedule, wanted in CHECKED.items():
        for (p, E, h, rho), want in zip(NETS, wanted, strict=True):
            assert peak_memory(net(E, h), img=240, patch=p, rank_ratio=rho, schedule=schedule).bytes == want
    first = peak_memory(net(192, 3), img=240, patch=16, rank_ratio=0.9, schedule="naive")
    assert first.op == "softmax"
    assert peak_memory(net(192, 3), img=240, patch=20, rank_ratio=0.9, schedule="naive").op == "gelu"
    assert first.table["patch"] == 3 * 240 * 240 + 226 * 192
    for (p, E, h, rho), want in ((NETS[0], 132_480 + 173_568), (NETS[2], 137_472 + 195_264)):
        assert peak_memory(net(E, h), img=240, patch=p, rank_ratio=rho, schedule="paper").bytes == want


@given(
    st.sampled_from(PATCHES),
    st.sampled_from((168, 192, 216)),
    st.sampled_from((3, 4)),
    st.sampled_from((3.5, 4.0)),
    st.sampled_from((0.4, 0.7, 0.95)),
    st.sampled_from(("xip", "sram")),
)
def law_mcuformer_peaks_rise_with_everything_and_fall_with_every_idea(p, E, h, ratio, rho, weights):
    peak = lambda s, p=p, E=E, h=h, ratio=ratio, rho=rho: peak_memory(
        net(E, h, ratio), img=240, patch=p, rank_ratio=rho, schedule=s, weights=weights).bytes  # fmt: skip
    assert peak("integrated") <= peak("naive")
    assert peak("head_by_head") <= peak("integrated")
    for s in ("integrated", "naive", "head_by_head", "paper", "released"):
        more = [
            peak(s, E=E + 8),
            peak(s, h=h + 1),
            peak(s, ratio=ratio + 0.5),
            peak(s, rho=min(rho + 0.05, 1)),
        ]
        if p > 16 and weights == "xip":  # staged weights of a larger patch can outweigh its fewer tokens
            more.append(peak(s, p=PATCHES[PATCHES.index(p) - 1]))
        assert min(more) >= peak(s)


def law_mcuformer_every_published_network_fits_in_320_kilobytes():
    """Where weights are executed in place; and of the naive orders some do not."""
    space = itertools.product(PATCHES, np.arange(0.4, 0.96, 0.05), (168, 192, 216))
    peaks = [[peak_memory(net(E, 4), img=240, patch=p, rank_ratio=rho, schedule=s).bytes
              for s in ("integrated", "naive")] for p, rho, E in space]  # fmt: skip
    ours, naive = np.array(peaks).T
    assert ours.max() == 223_514 <= 327_680
    assert 0.5 < (naive <= 327_680).mean() < 1


def law_mcuformer_factors_outgrow_the_dense_layer():
    """R (in + R + out) = in out at 0.41, 0.65 and 0.70 of the width for 1, 3 and 4 E outputs of E inputs."""
    for out, share in ((1, 0.41), (3, 0.65), (4, 0.70)):
        assert abs(share * (1 + share + out) - out) < 0.05
    w = np.ones((100, 100))
    sizes = lambda rank: sum(f.size for f in svd_init(w, rank))
    assert sizes(41) < w.size < sizes(42)
    f = fold_factors(LowRank(*svd_init(w, 49), np.zeros(100)))
    assert f.w1.size + f.w3.size < w.size


@given(seeds, st.integers(1, 6))
def law_mcuformer_released_rule_is_one_formula(seed, n):
    rng = np.random.default_rng(seed)
    p, rho = rng.choice(PATCHES, n).astype(float), rng.uniform(0.4, 0.95, n)
    E, ratio = rng.choice((168.0, 192.0, 216.0), n), rng.choice((3.5, 4.0), n)
    legal = released_predicate(np.full(n, 240.0), p, rho, E, ratio)
    for i in range(n):
        need = peak_memory(
            net(int(E[i]), 3, ratio[i]), img=240, patch=int(p[i]), rank_ratio=rho[i], schedule="released"
        )
        assert legal[i] == (need.bytes <= 327_680)


# Search


@FEW
@given(seeds, st.integers(3, 8), st.sampled_from((0.5, 0.9)), st.sampled_from((16, 24)))
def law_mcuformer_step_follows_the_planes(seed, n, rho, patch):
    rng = np.random.default_rng(seed)
    points = np.column_stack(
        [rng.uniform(0.4, 0.95, n), rng.uniform(16, 32, n), rng.uniform(50, 90, n), rng.random(n)]
    )
    down = evolution_step(points, rho=rho, patch=patch)
    up = evolution_step(points, rho=rho, patch=patch, direction="as_released")
    design = np.column_stack([np.ones(n), points[:, :2]])
    for w, y in ((down.w_error, 100 - points[:, 2]), (down.w_sram, 1 - points[:, 3])):
        left = y - design[:, 1:] @ w
        # normal equations: what a plane leaves is orthogonal to its columns
        np.testing.assert_allclose(design.T @ (left - left.mean()), 0, atol=1e-6 * np.abs(y).max() * n)
    for a, b in zip(down[:4], up[:4], strict=True):
        np.testing.assert_array_equal(a, b)
    total = down.step_error + down.step_sram
    for step, sign in ((down.step, -1), (up.step, 1)):
        want = np.clip(np.array([rho, patch]) + sign * total, (0.4, 16), (0.95, 32)) - (rho, patch)
        np.testing.assert_allclose(step, want, rtol=0, atol=1e-14)


def law_mcuformer_nearest_points_are_scaled_first():
    """In raw coordinates the patch would decide alone; and ties go to the earlier point."""
    points = np.array([[0.4, 20, 1, 0], [0.9, 16, 2, 0], [0.9, 24, 3, 0], [0.95, 20, 4, 0], [0.9, 20, 5, 0]])
    np.testing.assert_array_equal(nearest_points(points, 0.9, 20)[:, 2], [5, 4, 2, 3, 1])
    np.testing.assert_array_equal(nearest_points(points, 0.9, 20, k=2)[:, 2], [5, 4])


def law_mcuformer_space_walks_down_a_slope_and_asks_once():
    """Error falls with rho, illegality rises with small patches: rho ends high; a point is asked once."""
    asked = []

    def evaluate(rho, patch):
        asked.append((rho, patch))
        return 40 + 40 * rho, min(1.0, (patch - 12) / 20)

    history = evolve_space(evaluate, steps=12, seed=3)
    assert len(set(asked)) == len(asked) == len(history)
    assert history[-1, 0] == 0.95
    np.testing.assert_array_equal(
        history, evolve_space(lambda r, p: (40 + 40 * r, min(1.0, (p - 12) / 20)), steps=12, seed=3)
    )
    released = evolve_space(evaluate, steps=12, seed=3, direction="as_released")
    assert released[-1, 0] < history[-1, 0]


SPACE = SubnetSpace(depths=(1, 2), embed_dims=(8, 12, 16), heads=(1, 2), mlp_ratios=(1.0, 2.0))


@FEW
@given(seeds)
def law_mcuformer_search_finds_the_best_legal_subnet(seed):
    """60 networks and an oracle: the optimum, every network legal and asked once, the same again by seed."""
    size = lambda s: s.embed_dim * (sum(s.heads) + sum(s.mlp_ratios))
    worth = lambda s: s.embed_dim + 5 * sum(s.heads) + sum(s.mlp_ratios) / 10
    legal = lambda s: size(s) <= 64
    layers = list(itertools.product(SPACE.heads, SPACE.mlp_ratios))
    every = [
        SubnetConfig(E, *map(tuple, zip(*genes, strict=True)))
        for E in SPACE.embed_dims
        for n in SPACE.depths
        for genes in itertools.product(layers, repeat=n)
    ]
    options = {"population": 12, "parents": 4, "mutants": 6, "crossovers": 6, "generations": 12, "seed": seed}
    best, history = search_subnet(worth, legal, SPACE, **options)
    assert worth(best) == max(worth(s) for s in every if legal(s))
    seen = [s for group in history for s, _ in group]
    assert len(set(seen)) == len(seen)
    assert all(legal(s) and s in every for s in seen)
    assert search_subnet(worth, legal, SPACE, **options) == (best, history)
