"""MCUFormer: laws on ref, golden vectors in ref and accel, bad inputs, the search and its stored results."""

from functools import partial

import jax
import numpy as np
import pytest

import accel
import hw
import ref
from tests.claims import mcuformer as claims
from tests.claims import mcuformer_mcu, record
from tests.devices import laws_mcuformer
from tests.golden_runner import golden, run, run_accel
from tests.hw_record import Cost, size
from tests.laws import law_tests

globals().update(law_tests(laws_mcuformer))

M = ref.mcuformer
A = accel.mcuformer
CORE = ("low_rank_linear", "slice_qkv_rows", "relative_position_embedding", "mcuformer_forward")


def network_macs(img, params, *, subnet, patch, rank_ratio, head_dim=64, **_):
    """Patches, then of each layer the factors of four maps, two products, two more of relative positions."""
    E, N, R = subnet.embed_dim, params.pos_embed.shape[0], int(len(params.w_patch) * rank_ratio)
    total = (N - 1) * params.w_patch[0].size * E + params.w_head.shape[0] * E
    for h, ratio in zip(subnet.heads, subnet.mlp_ratios, strict=True):
        D, F = h * head_dim, int(E * ratio)
        low = int(min(E, F) * rank_ratio)
        total += N * (E * R + R * R + 3 * D * R) + N * (D * R + R * R + R * E)
        total += N * 2 * (E * low + low * low + F * low) + 4 * N * N * D
    return img.shape[0] * total


def network_bytes(img, params, **_):
    """The image, the supernet that the program is given, the logits."""
    return size(img, *jax.tree.leaves(params)) + 4 * img.shape[0] * len(params.w_head)


f32 = lambda *shape: ("float32", shape)
HW = {
    "low_rank_linear": Cost(
        macs=lambda x, w1, w2, w3, b: len(x) * (w1.size + w2.size + w3.size),
        bytes=lambda x, w1, w2, w3, b: size(x, w1, w2, w3, b) + 4 * len(x) * len(w3),
        bound={"h200": "overhead", "raspberry_pi5": "arithmetic"},  # one image's tokens through one MLP layer
        large=(f32(226, 192), f32(172, 192), f32(172, 172), f32(768, 172), f32(768)),
    ),
    "slice_qkv_rows": Cost(
        macs=lambda w, **_: 0, bytes=lambda w, *, out_dim, in_dim: size(w) + 4 * out_dim * in_dim
    ),
    "relative_position_embedding": Cost(
        macs=lambda v, h, **_: 0,
        bytes=lambda v, h, *, n_tokens, **_: size(v, h) + 4 * n_tokens**2 * v.shape[1],
    ),
    "mcuformer_forward": Cost(macs=network_macs, bytes=network_bytes),
}


def build(case):
    """The subnet stands in the options as an object."""
    made = lambda v: M.SubnetConfig(v["embed_dim"], tuple(v["heads"]), tuple(v["mlp_ratios"]))
    return {"subnet": made} if "subnet" in case.meta["kwargs"] else None


@golden("mcuformer")
def test_mcuformer_golden_ref(case):
    run(case, M, build=build(case))


@golden("mcuformer", only=CORE)
def test_mcuformer_golden_accel(case):
    run_accel(case, A, build=build(case))


@golden("mcuformer", only=CORE)
def test_mcuformer_golden_accel_x64(case):
    run_accel(case, A, build=build(case), x64=True)


def test_mcuformer_accel_without_relative_positions():
    """And by its class token: the options that example() leaves alone."""
    options = {**OPT, "subnet": NET, "pooling": "class_token", "relative_position": False}
    img = U8 / 255
    want = M.mcuformer_forward(img, P, **options)
    got = A.mcuformer_forward(jax.numpy.asarray(img, "float32"), P, **options)
    # two layers of sums of at most 48 terms, each norm's 1 / std near 3
    np.testing.assert_allclose(got, want, rtol=0, atol=512 * 2.0**-23 * np.abs(want).max())


def test_mcuformer_search_end_to_end_on_few_digits(monkeypatch):
    """One cheap seed of the claims: masks are slices, the search keeps to its limit, int8 its accuracy."""
    monkeypatch.setattr(claims, "SPACE", M.SubnetSpace((1,), (16, 24, 32), (1, 2), (1.0, 2.0)))
    monkeypatch.setitem(claims.SUPER, "depth", 1)
    splits, patch, rho, limit = claims.data(full=False), 8, 0.6, 1600
    p = claims.train_supernet(splits[0], patch, rho, steps=100, seed=0)
    worth = claims.judge(p, splits[1], patch, rho)
    best, curves = claims.subnet_search(worth, patch, rho, limit, seed=0, population=6, generations=2)
    assert claims.need(best, patch, rho) <= limit
    assert len(curves["evolved"]) == len(curves["random"])
    assert curves["evolved"][-1] == worth(best) > 20  # a guess gets 10 per cent
    x = splits[1][0][:4] / 255
    run = jax.jit(partial(claims.masked_forward, patch=patch, rho=rho))
    masked = run(*jax.tree.map(np.float32, (x, p)), claims.genes_of(best, rho))
    want = M.mcuformer_forward(x, p, subnet=best, patch=patch, rank_ratio=rho, **claims.OPTIONS)
    # sums of at most 64 terms of numbers near 1
    np.testing.assert_allclose(masked, want, rtol=0, atol=512 * 2.0**-23 * np.abs(want).max())
    loss = claims.int8_loss(p, best, splits, patch, rho, most=2)
    assert loss["s8"]["cosine"] > 0.99


def test_mcuformer_stored_results_are_fresh():
    """And say what the chapter says: arenas as planned, searches alike, networks within limits, int8 too."""
    assert record.is_fresh("mcuformer")
    r = record.load("mcuformer")["results"]
    for row in r["published"]["rows"]:
        assert row["arena"] == row["alive"] == row["touched"] == row["closed_form"]
    for found in r["runs"] + r["narrow"]["runs"]:
        assert found["bytes"] <= r["limit"]
        assert abs(found["evolved"][-1] - found["random"][-1]) < 2 * 100 / r["sizes"][1]  # an image or two
    assert r["int8"]["float"] - r["int8"]["s8"]["accuracy"] < 1.0


def test_mcuformer_stored_prices_are_fresh():
    """And hold: with the reductions all of it fits 320 KB, relative positions too; its arena run is equal."""
    assert record.is_fresh("mcuformer_mcu")
    r = record.load("mcuformer_mcu")["results"]
    assert all("seconds" in row for row in r["priced"] if row["reductions"])
    assert all(row["bytes"] < 303_104 for row in r["priced"] if row["reductions"])
    e = r["executed"]
    assert e["same"]
    assert e["arena"] - 16 < e["touched"] <= e["arena"] < e["room"]
    assert any("made as they are read" in hint for hint in r["refused"]["remedies"])


def test_mcuformer_on_the_microcontroller_target():
    """The naive peak with the reductions off; with them the net fits a 320 KB part; and int8 runs."""
    program = mcuformer_mcu.traced(1, relative_position=False)
    off = dict.fromkeys(("integrate", "decompose_patch", "overwrite"), False)
    with pytest.raises(hw.DoesNotFit) as why:
        hw.estimate(program, hw.stm32f746(flash_kb=16384, **off))
    over = why.value.needed - laws_mcuformer.CHECKED["naive"][0]
    assert 0 <= over < 16 * 4  # four buffers, each rounded up to 16 bytes
    assert hw.estimate(program, hw.stm32f746(flash_kb=16384)).peak_memory < why.value.needed
    img = U8[0].astype(np.float32) / 255
    small = jax.tree.map(lambda a: a.astype(np.float32), P)
    program = hw.trace(lambda img, params: A.mcuformer_forward(img, params, subnet=NET, **OPT), img, small,
                       weights=("params",))  # fmt: skip
    got, report = hw.execute(program, (img, small), hw.stm32f746())
    want = M.mcuformer_forward(img, P, subnet=NET, **OPT)
    assert got @ want / np.linalg.norm(got) / np.linalg.norm(want) > 0.99
    assert 0 < report.peak_memory < 303_104


S = M.SubnetConfig
P, IMG, OPT = laws_mcuformer.supernet(), np.zeros((1, 10, 10, 3)), laws_mcuformer.SMALL
NET, U8 = laws_mcuformer.SUBNET, laws_mcuformer.images()
WIDE = S(192, (3,) * 12, (4.0,) * 12)
W = np.ones((6, 4))
T = np.ones((4, 3))
POINTS = [[0.4, 16, 50, 0.1], [0.9, 32, 60, 0.2], [0.6, 24, 70, 0.3]]
forward = lambda **o: M.mcuformer_forward(IMG, P, **{"subnet": NET, **OPT, **o})
memory = lambda **o: M.peak_memory(WIDE, **{"img": 240, "patch": 16, "rank_ratio": 0.9, **o})
seek = lambda **o: M.search_subnet(lambda s: 0.0, lambda s: True, laws_mcuformer.SPACE, **{"seed": 0, **o})
quantize = lambda calib=U8, **o: M.quantize_model(P, calib, **{"subnet": NET, **OPT, **o})
FOLDED = P._replace(blocks=tuple(b._replace(fc1=M.fold_factors(b.fc1)) for b in P.blocks))
BAD = {
    "factors": (lambda: M.low_rank_linear(np.ones((2, 4)), W, np.ones((5, 6)), np.ones((3, 6)), None), "w2"),
    "bias": (lambda: M.low_rank_linear(np.ones((2, 4)), W, None, np.ones((3, 6)), np.ones(2)), "b"),
    "rows": (lambda: M.slice_qkv_rows(W, 7, 4), r"out_dim must be in 1\.\.6"),
    "columns": (lambda: M.slice_qkv_rows(W, 6, 0), r"in_dim must be in 1\.\.4"),
    "table": (lambda: M.relative_position_embedding(T, np.ones((5, 3)), 5, max_distance=1), "table_h"),
    "distance": (lambda: M.relative_position_embedding(T, T, 5, max_distance=0), "max_distance must"),
    "tokens": (lambda: M.relative_position_embedding(T, T, 0, max_distance=1), "n_tokens must be at least 1"),
    "rank": (lambda: M.svd_init(W, 0), "rank must be at least 1"),
    "rho": (lambda: forward(rank_ratio=0.0), r"rank_ratio must be in \(0, 1\]"),
    "rho_above": (lambda: forward(rank_ratio=1.5), "rank_ratio must be"),
    "rho_rows": (lambda: forward(rank_ratio=0.9), "rank of attention must be in"),
    "heads": (lambda: forward(subnet=S(10, (3, 2), (2.0, 1.5))), r"heads \* head_dim must be in 1\.\.8"),
    "head_dim": (lambda: forward(head_dim=5), "table_v"),
    "wide": (lambda: forward(subnet=S(13, (1,), (2.0,))), r"embed_dim must be in 1\.\.12"),
    "deep": (lambda: forward(subnet=S(10, (1,) * 3, (1.0,) * 3)), "3 layers, but params only 2"),
    "hidden": (lambda: forward(subnet=S(12, (1,), (2.5,))), r"embed_dim \* mlp_ratio must be in"),
    "patch": (lambda: forward(patch=5), "w_patch"),
    "small": (lambda: M.mcuformer_forward(IMG[:, :3, :3], P, subnet=NET, **OPT), r"patch must be in 1\.\.3"),
    "pooling": (lambda: forward(pooling="max"), "pooling must be one of"),
    "oblong": (lambda: M.mcuformer_forward(IMG[:, :8], P, subnet=NET, **OPT), "img"),
    "positions": (lambda: M.mcuformer_forward(np.zeros((1, 20, 20, 3)), P, subnet=NET, **OPT), "pos_embed"),
    "layers": (lambda: S(8, (1, 2), (1.0,)), "one entry a layer"),
    "empty_net": (lambda: S(8, (), ()), "at least one"),
    "space": (lambda: M.SubnetSpace(heads=()), "heads must hold"),
    "memory_rho": (lambda: memory(rank_ratio=2.0), "rank_ratio must be"),
    "memory_patch": (lambda: memory(patch=15), "unless allow_any"),
    "memory_small": (lambda: memory(img=8, patch=16), r"patch must be in 1\.\.8"),
    "schedule": (lambda: memory(schedule="best"), "schedule must be one of"),
    "weights": (lambda: memory(weights="dram"), "weights must be"),
    "limit": (lambda: M.released_predicate(*np.ones((5, 2)), limit_bytes=0), "limit_bytes must be positive"),
    "lengths": (lambda: M.released_predicate(*np.ones((4, 2)), np.ones(3)), "mlp_ratio"),
    "plane": (lambda: M.evolution_step(POINTS[:2], rho=0.5, patch=16), "at least three"),
    "not_finite": (lambda: M.evolution_step(np.full((3, 4), np.nan), rho=0.5, patch=16), "finite"),
    "direction": (lambda: M.evolution_step(POINTS, rho=0.5, patch=16, direction="up"), "direction must"),
    "nearest": (lambda: M.nearest_points(POINTS, 0.5, 16), r"k must be in 1\.\.3"),
    "steps": (lambda: M.evolve_space(lambda r, p: (0, 0), steps=-1, seed=0), "steps must not"),
    "evaluate": (lambda: M.evolve_space(lambda r, p: (0, 7), seed=0), "per cent and a ratio"),
    "legal": (lambda: M.search_subnet(lambda s: 0, lambda s: False, laws_mcuformer.SPACE, seed=0), "legal"),
    "population": (lambda: seek(population=0), "at least 1"),
    "groups": (lambda: seek(population=20), "must hold 25 mutants"),
    "calib": (lambda: quantize(IMG), "calib must be uint8"),
    "folded": (lambda: M.quantize_model(FOLDED, U8, subnet=NET, **OPT), "three factors a layer"),
    "no_calib": (lambda: quantize(U8[:0]), "B >= 1"),
    "forms": (lambda: quantize(forms="float"), "forms must be one of"),
    "image": (lambda: M.mcuformer_int8(U8[0, :8], quantize()), "img_u8"),
    "image_type": (lambda: M.mcuformer_int8(U8[0] / 255, quantize()), "img_u8 must be uint8"),
    "rule": (lambda: M.mcuformer_int8(U8[0], quantize(), schedule="paper"), "schedule must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_mcuformer_rejects_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


ACCEL_BAD = {
    "rows": (lambda: A.slice_qkv_rows(W, 7, 4), r"out_dim must be in 1\.\.6"),
    "factors": (lambda: A.low_rank_linear(np.ones((2, 4)), W, np.ones((5, 6)), W.T, None), "w2"),
    "table": (lambda: A.relative_position_embedding(T, T, 5, max_distance=3), "table_v"),
    "pooling": (
        lambda: A.mcuformer_forward(IMG, P, subnet=NET, **OPT, pooling="max"),
        "pooling must be one of",
    ),
    "rho": (
        lambda: A.mcuformer_forward(IMG, P, subnet=NET, **{**OPT, "rank_ratio": 2.0}),
        "rank_ratio must be",
    ),
}


@pytest.mark.parametrize("name", ACCEL_BAD)
def test_mcuformer_accel_rejects_bad_input(name):
    call, message = ACCEL_BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
