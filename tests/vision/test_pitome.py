"""PiToMe and ToMe: laws on ref, golden vectors in ref and accel, kernels, gradients, bad inputs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import accel
import ref
from ref.blocks.transformer import BlockParams
from tests.claims import pitome as claims
from tests.claims.record import is_fresh, load
from tests.golden_runner import golden, run, run_accel
from tests.hw_record import Cost, size
from tests.laws import law_tests
from tests.lower import lowered
from tests.vision import laws_pitome

globals().update(law_tests(laws_pitome))

EPS32 = float(np.finfo(np.float32).eps)
RNG = np.random.default_rng(0)
METRIC = RNG.standard_normal((2, 17, 12)).astype(np.float32)


def plan_bytes(metric, **_):
    """Keys in; a slot a token and their number out."""
    return size(metric) + 4 * metric.shape[0] * metric.shape[1] + 4


def similarity_macs(tokens, metric):
    """All pairs of `tokens` tokens, in every image."""
    return metric.shape[0] * tokens**2 * metric.shape[2]


def tome_macs(metric, **_):
    """Tokens at even places against tokens at odd ones."""
    B, N, D = metric.shape
    return B * (N - N // 2) * (N // 2) * D


def block_macs(x, p, *, num_heads, ratio, margin):
    """Four maps and two products on N tokens, the keys' similarities, and the MLP on what is left."""
    (B, N, C), F = x.shape, p.w_fc1.shape[1]
    left = N - ref.vision.pitome.removed_tokens(N - 1, ratio)
    keys = np.empty((B, N, C // num_heads))
    return B * (4 * N * C * C + 2 * N * N * C + 2 * left * C * F) + similarity_macs(N - 1, keys)


def block_bytes(x, p, *, num_heads, ratio, margin):
    """Tokens and weights in; the tokens left and their sizes out."""
    B, N, C = x.shape
    left = N - ref.vision.pitome.removed_tokens(N - 1, ratio)
    return size(x, *p) + 4 * B * left * (C + 1)


def vit_macs(images, params, cfg, *, ratio):
    """Patches, the blocks one after another, and the head on one token."""
    n, (_, _, _, C) = len(params.pos_embed), params.w_patch.shape
    total, x = (
        len(images) * ((n - 1) * params.w_patch.size + params.w_head.size),
        np.empty((len(images), n, C)),
    )
    for p in params.blocks:
        total += block_macs(x, p, num_heads=cfg.num_heads, ratio=ratio, margin=0)
        x = x[:, ref.vision.pitome.removed_tokens(x.shape[1] - 1, ratio) :]
    return total


def specs(B, N, C):
    """(x, params) of a block of ViT-S as (dtype, shape)."""
    f = lambda *shape: ("float32", shape)
    maps = [f(C, C), f(C)] * 4
    return f(B, N, C), BlockParams(f(C), f(C), *maps, f(C), f(C), f(C, 4 * C), f(4 * C), f(4 * C, C), f(C))


patch_pairs = lambda metric, **_: similarity_macs(metric.shape[1] - 1, metric)  # without the class token
HW = {
    "bipartite_soft_matching": Cost(macs=tome_macs, bytes=plan_bytes),
    "energy_score": Cost(
        macs=lambda metric, **_: similarity_macs(metric.shape[1], metric),
        bytes=lambda metric, **_: size(metric) + 4 * metric.shape[0] * metric.shape[1],
    ),
    "pitome_matching": Cost(macs=patch_pairs, bytes=plan_bytes),
    "pitome_text_matching": Cost(macs=patch_pairs, bytes=plan_bytes),
    "merge_tokens": Cost(
        macs=lambda x, group, *, n_out: 0,
        bytes=lambda x, group, *, n_out: size(x, group) + 4 * len(x) * n_out * (x.shape[2] + 1),
        bound={"h200": "hbm", "orin": "hbm", "raspberry_pi5": "dram"},  # nothing is multiplied
        large=(("float32", (64, 197, 384)), ("int32", (64, 197))),
        options={"n_out": 177},
    ),
    "unmerge_tokens": Cost(
        macs=lambda y, group: 0,
        bytes=lambda y, group: size(y, group) + 4 * group.size * y.shape[2],
    ),
    "proportional_attention": Cost(
        macs=lambda q, k, v, sizes: q.size * k.shape[-2] + q.size // q.shape[-1] * v.shape[-2] * v.shape[-1],
        bytes=lambda q, k, v, sizes: size(q, k, v, sizes) + 4 * q.size // q.shape[-1] * v.shape[-1],
    ),
    "merged_block": Cost(
        macs=block_macs,
        bytes=block_bytes,
        bound={
            "h200": "tensor",
            "t4": "tensor",
            "raspberry_pi5": "arithmetic",
        },  # 64 pictures share the weights
        large=specs(64, 197, 384),
        options={"num_heads": 6, "ratio": 0.9, "margin": 0.5},
    ),
    "vit_forward_merged": Cost(
        macs=vit_macs,
        bytes=lambda images, params, cfg, *, ratio: (
            size(images, *jax.tree.leaves(params)) + 4 * len(images) * len(params.b_head)
        ),
    ),
}


def house_block(tree):
    """The card's [out, in] weights with one matrix for q, k and v, as `BlockParams`."""
    dim = tree["w_proj"].shape[0]
    (w_q, b_q), (w_k, b_k), (w_v, b_v) = (
        (tree["w_qkv"][i * dim : (i + 1) * dim].T, tree["b_qkv"][i * dim : (i + 1) * dim]) for i in range(3)
    )
    return BlockParams(
        ln1_scale=tree["ln1_w"], ln1_bias=tree["ln1_b"], w_q=w_q, b_q=b_q, w_k=w_k, b_k=b_k, w_v=w_v, b_v=b_v,
        w_o=tree["w_proj"].T, b_o=tree["b_proj"], ln2_scale=tree["ln2_w"], ln2_bias=tree["ln2_b"],
        w_fc1=tree["w_fc1"].T, b_fc1=tree["b_fc1"], w_fc2=tree["w_fc2"].T, b_fc2=tree["b_fc2"],
    )  # fmt: skip


def one_array(case, result):
    """A schedule is a list of ints, stored as one array."""
    return (np.asarray(result),) if isinstance(result, list) else result


@golden("pitome")
def test_pitome_golden_ref(case):
    run(case, ref.pitome, build={"params": house_block}, outs=one_array)


@pytest.mark.parametrize("x64", [False, True], ids=["pitome_float32", "pitome_float64"])
@golden("pitome", only=ref.pitome.__all__)
def test_pitome_golden_accel(case, x64):
    run_accel(case, accel.pitome, build={"params": house_block}, outs=one_array, x64=x64)


@pytest.mark.parametrize("seed", range(5), ids=lambda s: f"pitome_seed{s}")
def test_pitome_accel_plans_are_those_of_ref(seed):
    """Equal in float32 wherever no two energies or similarities are within rounding of each other."""
    metric = np.random.default_rng(seed).standard_normal((2, 17, 12)).astype(np.float32)
    metric[0, 3] = metric[0, 9]  # and equal tokens go by index in both
    gaps = np.diff(np.sort(ref.pitome.energy_score(metric[:, 1:], margin=0.4), axis=-1), axis=-1)
    assert ((gaps > 64 * EPS32) | (gaps < 1e-15)).all()
    for options in ({"margin": 0.4, "class_token": True}, {"margin": 0.4, "class_token": True, "bsm": True}):
        got, want = (m.pitome.pitome_matching(metric, ratio=0.7, **options) for m in (accel, ref))
        np.testing.assert_array_equal(got.group, want.group)
        assert got.n_out == want.n_out
    got, want = (m.pitome.bipartite_soft_matching(metric, r=5, class_token=True) for m in (accel, ref))
    np.testing.assert_array_equal(got.group, want.group)


@pytest.mark.parametrize("mode", ["mean", "sum", "max", "prune"], ids=lambda m: f"pitome_{m}")
def test_pitome_accel_merges_in_every_mode(mode):
    group = ref.pitome.random_plan(np.random.default_rng(1), 17, 7, batch=2).group
    size = np.random.default_rng(2).integers(1, 3, (2, 17)).astype(np.float32)
    got, want = (m.pitome.merge_tokens(METRIC, group, 10, size=size, mode=mode) for m in (accel, ref))
    # at most 8 terms of size 1 to 4 are added
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=8 * EPS32 * 16)
    np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("impl", ["triton", "tpu"], ids=lambda i: f"pitome_{i}")
def test_pitome_kernel_energy_matches_ref(impl):
    """17 tokens in tiles of 16, so padding is on show; value, and gradient by the kernel's own rule."""
    options = {"margin": 0.3, "alpha": 0.8, "paper_form": impl == "tpu"}

    def loss(metric):
        energy = accel.pitome.energy_score(metric, **options, impl=impl, interpret=True, block_t=16)
        return jnp.sum(METRIC[..., 0] * energy), energy

    (_, got), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(METRIC)
    # a similarity is within (D + 4) eps, f has slope at most 1, and the mean adds T eps
    atol = (12 + 4 + 17) * EPS32
    np.testing.assert_allclose(got, ref.pitome.energy_score(METRIC, **options), rtol=0, atol=atol)
    want = ref.pitome.energy_score_vjp(METRIC, METRIC[..., 0], **options)
    np.testing.assert_allclose(grad, want, rtol=0, atol=2 * atol * np.abs(METRIC).max())


def test_pitome_edge_shapes_and_sizes():
    """No image, one token, nothing but the class token: empty or identical, in both layers; huge keys too."""
    for m in (ref.pitome, accel.pitome):
        plan = m.pitome_matching(METRIC[:0], ratio=0.7, margin=0.4, class_token=True)
        assert plan.group.shape == (0, 17)
        assert m.merge_tokens(METRIC[:0], *plan)[0].shape == (0, plan.n_out, 12)
        for n in (1, 2):
            plan = m.pitome_matching(METRIC[:, :n], ratio=0.6, margin=0.4, class_token=True)
            np.testing.assert_array_equal(plan.group, [np.arange(n)] * 2)
            assert plan.n_out == m.bipartite_soft_matching(METRIC[:, :1], r=3).n_out + n - 1
        np.testing.assert_allclose(m.energy_score(METRIC[:, :1], margin=0.4), 0.6, rtol=2 * EPS32)
    huge = METRIC * np.float32(1e30)
    options = {"margin": 0.3, "impl": "triton", "interpret": True, "block_t": 16}
    want = ref.pitome.energy_score(METRIC, margin=0.3)
    for got in (accel.pitome.energy_score(huge, margin=0.3), accel.pitome.energy_score(huge, **options)):
        np.testing.assert_allclose(got, want, rtol=0, atol=2 * (12 + 4 + 17) * EPS32)  # as the kernel's test


def test_pitome_kernel_makes_the_plan():
    options = {"margin": 0.3, "ratio": 0.8}
    plan = accel.pitome.pitome_matching(METRIC, **options, impl="triton", interpret=True)
    np.testing.assert_array_equal(plan.group, ref.pitome.pitome_matching(METRIC, **options).group)


def test_pitome_kernel_lowers_for_tpu():
    from accel.kernels.pitome_tpu import energy

    fn = jax.vmap(lambda m: energy(m, margin=0.3, alpha=1.0, paper_form=False))
    for shape in ((2, 197, 64), (1, 577, 72)):
        lowered(fn, (jax.ShapeDtypeStruct(shape, jnp.float32),), "tpu")


def test_pitome_accel_merge_gradient_is_refs():
    plan = ref.pitome.random_plan(np.random.default_rng(1), 17, 7, batch=2)
    rng = np.random.default_rng(2)
    size = rng.uniform(1, 3, (2, 17)).astype(np.float32)
    dy, ds = rng.standard_normal((2, 10, 12)).astype(np.float32), np.ones((2, 10), np.float32)

    def loss(x, size):
        y, total = accel.pitome.merge_tokens(x, plan.group, plan.n_out, size=size)
        return jnp.sum(y * dy) + jnp.sum(total * ds)

    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(METRIC, size)
    want = ref.pitome.merge_tokens_vjp(METRIC, *plan, size, dy, ds)
    for g, w in zip(got, want, strict=True):  # sums of 12 products of order 10
        np.testing.assert_allclose(g, w, rtol=0, atol=64 * EPS32 * max(1, np.abs(w).max()))


def test_pitome_accel_runs_every_method():
    """The methods that `example` leaves out: ToMe with a list in the network, drawn plans in a block."""
    params, images = laws_pitome.small_vit()
    params = params._replace(blocks=params.blocks[:1])
    cfg = ref.pitome.MergeConfig(num_heads=3, global_pool=True)
    x = np.random.default_rng(1).standard_normal((2, 17, 12))
    drawn = ref.pitome.random_plan(np.random.default_rng(0), 17, 4, batch=2).group
    calls = (
        ("vit_forward_merged", (images, params, cfg), {"method": "tome", "r": [4]}),
        (
            "merged_block",
            (x, params.blocks[0]),
            {"num_heads": 3, "method": "random", "seed_groups": drawn, "r": 4},
        ),
    )
    for fn, args, options in calls:
        got, want = (jax.tree.leaves(getattr(m.pitome, fn)(*args, **options)) for m in (accel, ref))
        for g, w in zip(got, want, strict=True):  # one block, sums of at most 48 terms, entries of order 1
            np.testing.assert_allclose(g, w, rtol=0, atol=512 * EPS32 * max(1, np.abs(w).max()))


GROUP = np.repeat(np.arange(4), 2)[None]
X8 = np.ones((1, 8, 3))
BLOCK = laws_pitome.small_vit()[0].blocks[0]
BAD = {
    "ratio above": (
        "pitome_matching",
        (METRIC,),
        {"ratio": 1.1, "margin": 0.5},
        r"ratio must be in \(0, 1\]",
    ),
    "ratio zero": ("pitome_matching", (METRIC,), {"ratio": 0.0, "margin": 0.5}, r"ratio must be in \(0, 1\]"),
    "too many": ("pitome_matching", (METRIC,), {"ratio": 0.4, "margin": 0.5}, "at most half"),
    "text margin": (
        "pitome_text_matching",
        (METRIC,),
        {"ratio": 0.9, "margin": 1.0},
        "margin must be below 1",
    ),
    "alpha": ("energy_score", (METRIC,), {"margin": 0.5, "alpha": 0.0}, "alpha must be positive"),
    "alpha nan": ("energy_score", (METRIC,), {"margin": 0.5, "alpha": np.nan}, "alpha must be positive"),
    "margin nan": ("pitome_matching", (METRIC,), {"ratio": 1.0, "margin": np.nan}, "margin must be finite"),
    "text margin nan": ("pitome_text_matching", (METRIC,), {"ratio": 0.9, "margin": np.nan}, "below 1"),
    "nan": ("energy_score", (METRIC * np.nan,), {"margin": 0.5}, "metric must be finite"),
    "infinity": ("pitome_matching", (METRIC * np.inf,), {"ratio": 1.0, "margin": 0.5}, "must be finite"),
    "tome nan": ("bipartite_soft_matching", (METRIC * np.nan,), {"r": 1}, "metric must be finite"),
    "size nan": ("merge_tokens", (X8, GROUP, 4), {"size": np.full((1, 8), np.nan)}, "size must be positive"),
    "rank": ("energy_score", (METRIC[0, 0],), {"margin": 0.5}, "metric must have shape"),
    "negative r": ("bipartite_soft_matching", (METRIC,), {"r": -1}, "r must be at least 0"),
    "mode": ("merge_tokens", (X8, GROUP, 4), {"mode": "min"}, "mode must be one of"),
    "size": ("merge_tokens", (X8, GROUP, 4), {"size": np.zeros((1, 8))}, "size must be positive"),
    "group axis": ("merge_tokens", (X8, GROUP[:, 1:], 4), {}, r"axis N is 8 in x"),
    "size shape": ("proportional_attention", (X8, X8, X8, np.ones(7)), {}, r"size must be \[8\]"),
    "method": (
        "merged_block",
        (np.ones((1, 8, 12)), BLOCK),
        {"num_heads": 3, "method": "x"},
        "method must be",
    ),
    "no ratio": ("merged_block", (np.ones((1, 8, 12)), BLOCK), {"num_heads": 3}, "needs ratio and margin"),
}


@pytest.mark.parametrize("layer", [ref, accel], ids=["pitome_ref", "pitome_accel"])
@pytest.mark.parametrize("name", BAD, ids=lambda n: n.replace(" ", "_"))
def test_pitome_rejects_bad_input(name, layer):
    fn, args, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        getattr(layer.pitome, fn)(*args, **options)


def test_pitome_host_functions_reject_bad_input():
    for call, message in (
        (lambda: ref.pitome.tome_schedule(2, r=[1, 2, 3]), "at most depth=2 entries"),
        (lambda: ref.pitome.tome_schedule(4, r=[1], inflect=0.5), "no inflect"),
        (lambda: ref.pitome.tome_schedule(4, r=-1), "r must be at least 0"),
        (lambda: ref.pitome.random_plan(RNG, 4, 3), "so that a survivor is left"),
        (lambda: ref.pitome.spectral_distance(-np.eye(3), np.arange(3)), "W must not be negative"),
        (lambda: ref.pitome.merge_tokens(X8, GROUP + 1, 4), r"group must be in 0..3"),
        (lambda: ref.pitome.merge_tokens(X8, 0 * GROUP, 2), "slots empty"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_pitome_impl_asked_by_name_runs_or_says_why_not():
    for impl, error, message in (
        ("cuda", ValueError, "impl must be"),
        ("hopper", NotImplementedError, "does not exist"),
        ("tpu", NotImplementedError, "needs a TPU"),
        ("triton", NotImplementedError, "needs a GPU"),
    ):
        if impl == "triton" and jax.default_backend() == "gpu":
            continue
        with pytest.raises(error, match=message):
            accel.pitome.energy_score(METRIC, margin=0.5, impl=impl)


# The experiment behind the chapter.


def test_pitome_claims_forward_is_that_of_the_library():
    """The experiment's network, whose methods are plans, equals `vit_forward_merged`."""
    params, images = laws_pitome.small_vit()
    params = params._replace(blocks=params.blocks[:1])
    options = {"num_heads": 3}
    cfg = ref.pitome.MergeConfig(**options)
    table = {(name, ratio): plan for name, ratio, plan, _ in claims.methods(16, 1, (0.8,))}
    removed = claims.counts(16, 1, 0.8)
    for key, kwargs in ((("pitome", 0.8), {"ratio": 0.8}), (("tome", 0.8), {"method": "tome", "r": removed})):
        network = jax.jit(partial(claims.forward, plan=table[key], **options))
        got = network(images.astype(np.float32), params)
        want = ref.pitome.vit_forward_merged(images.astype(np.float32), params, cfg, **kwargs)
        # one block, sums of at most 48 terms, entries of order 1
        np.testing.assert_allclose(got, want, rtol=0, atol=512 * EPS32 * max(1, np.abs(want).max()))
    shuffled = table[("a and b at random", 0.8)](METRIC, 0, np.random.default_rng(0))
    assert sorted(set(shuffled.group[0].tolist())) == list(range(shuffled.n_out))
    assert shuffled.n_out == 17 - removed[0]


def test_pitome_claims_probe_and_counts():
    """A probe finds what is linear; the published counts are met to the last digit; text merges to size."""
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((90, 8)), rng.integers(0, 3, 90)
    x[np.arange(90), labels] += 4
    assert claims.judged(x, x, labels, labels)["refitted"] > 0.9
    for r in claims.flops():
        digits = len(r["published"].split(".")[1])
        assert f"{r['macs'] / 1e9:.{digits}f}" == r["published"]
    from ref.models.bert import init_bert

    params = init_bert(rng, vocab=20, context=16, dim=12, depth=2)
    for method in ("pitome", "tome", "random"):
        v, left = claims.merged_bert(
            np.arange(11), params, num_heads=3, method=method, ratio=0.8, eps=1e-12, rng=rng
        )
        assert (v.shape, left) == ((12,), 8)
    rows = claims.planted(trials=3)
    assert all(r["pitome"] < r["random"] for r in rows)


def test_pitome_stored_results_are_fresh_and_ordered():
    """What the chapter quotes was measured with this code, and says what the chapter says."""
    assert is_fresh("pitome")
    results = load("pitome")["results"]
    assert results["flops"] == claims.flops()
    rows = {(r["method"], r["ratio"]): r for r in results["vision"]["rows"]}
    for ratio in {r for m, r in rows if m == "tome"}:
        three = [rows[m, ratio] for m in ("random", "pitome", "tome")]
        assert len({r["macs"] for r in three}) == 1
        assert three[0]["cosine"] < min(three[1]["cosine"], three[2]["cosine"])
    assert rows["none", 1.0]["cosine"] == pytest.approx(1)
    text = {(r["method"], r["ratio"]): r["pearson"] for r in results["text"]}
    assert abs(text["none", 1.0] - 0.656) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["xla", "triton"], ids=lambda i: f"pitome_gpu_{i}")
def test_pitome_energy_runs_on_the_gpu(impl):
    metric = np.random.default_rng(0).standard_normal((3, 257, 64)).astype(np.float32)
    got = accel.pitome.energy_score(metric, margin=0.3, impl=impl)
    want = ref.pitome.energy_score(metric, margin=0.3)
    np.testing.assert_allclose(got, want, rtol=0, atol=(64 + 4 + 257) * EPS32)
