"""Laws of the lightweight blocks on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.optim import tree_leaves, tree_map
from ref.blocks.separable import hard_sigmoid
from ref.compression.lightweight import (
    KERNELS,
    albert_encoder,
    albert_encoder_vjp,
    block_cost,
    fnet_block,
    fnet_block_vjp,
    fourier_mix,
    hard_swish,
    init_albert,
    init_fnet,
    init_lsra,
    init_mobilevit,
    init_separable_mlp,
    light_conv,
    light_conv_vjp,
    lsra_block,
    lsra_block_vjp,
    lsra_branches,
    lsra_kernel,
    mobilevit_block,
    mobilevit_block_vjp,
    separable_mlp,
    separable_mlp_vjp,
)
from ref.counting import Tally, count
from ref.models.mobilevit import fold_patches, unfold_patches
from ref.models.pyramid import num_parameters, random_params
from tests.slopes import slope_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)


def norm(x, eps):
    """Without scale and shift."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def check_slopes(fn, vjp, args, rng, frozen=()):
    """<gradient, direction> of every argument of fn against its central difference.

    frozen: names of fields that are not trained, whose gradient must be zero.
    """
    out = fn(*args)
    dy = rng.standard_normal(out.shape)
    grads = vjp(*args, dy)
    for i, grad in enumerate(grads):
        d = direction(rng, args[i], frozen)

        def value(h, i=i, d=d):
            moved = tree_map(lambda p, along: p + h * along, args[i], d)
            return np.sum(dy * fn(*args[:i], moved, *args[i + 1 :]))

        slope, change = slope_of(value)
        pairs = list(zip(tree_leaves(grad), tree_leaves(args[i]), tree_leaves(d), strict=True))
        assert all(g.shape == a.shape for g, a, _ in pairs)
        got = sum(np.vdot(g, v) for g, _, v in pairs)
        # truncation, seen by doubling the step, and cancellation: each output good to some 1000 eps, over h
        error = 2 * change + 1000 * EPS / 1e-5 * np.sum(np.abs(dy) * (1 + np.abs(out)))
        np.testing.assert_allclose(got, slope, rtol=0, atol=error)


def direction(rng, tree, frozen):
    """Normal numbers in the shape of a tree, zero in the fields named."""
    if hasattr(tree, "_fields"):
        parts = (
            tree_map(np.zeros_like, x) if name in frozen else direction(rng, x, frozen)
            for name, x in zip(tree._fields, tree, strict=True)
        )
        return type(tree)(*parts)
    if isinstance(tree, tuple):
        return tuple(direction(rng, x, frozen) for x in tree)
    return None if tree is None else rng.standard_normal(tree.shape)


STATISTICS = ("mean", "var")


@given(seeds, st.integers(1, 6), st.integers(1, 7))
def law_lightweight_fourier_mix_is_two_products(seed, L, D):
    rng = np.random.default_rng(seed)
    x, g = rng.standard_normal((2, L, D)), rng.standard_normal((2, L, D))
    angle = lambda n: 2 * np.pi * np.outer(np.arange(n), np.arange(n)) / n
    cl, sl, cd, sd = np.cos(angle(L)), np.sin(angle(L)), np.cos(angle(D)), np.sin(angle(D))
    mixed = fourier_mix(x)
    np.testing.assert_allclose(mixed, cl @ x @ cd - sl @ x @ sd, rtol=0, atol=1e-10)
    np.testing.assert_allclose(mixed[:, 0, 0], x.sum(axis=(1, 2)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.sum(g * mixed), np.sum(fourier_mix(g) * x), rtol=0, atol=1e-10)
    np.testing.assert_allclose(fourier_mix(2 * x - g), 2 * mixed - fourier_mix(g), rtol=0, atol=1e-10)
    mirrored = x[:, -np.arange(L)][:, :, -np.arange(D)]
    np.testing.assert_allclose(fourier_mix(mixed), L * D * (x + mirrored) / 2, rtol=0, atol=1e-10)


@given(seeds)
def law_lightweight_fnet_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    x, p = rng.standard_normal((2, 5, 6)), random_params(rng, init_fnet(rng, 6, 9, std=0.5))
    h = norm(x + np.fft.fft(np.fft.fft(x, axis=1), axis=2).real, 1e-12) * p.ln1_scale + p.ln1_bias
    a = h @ p.w_fc1 + p.b_fc1
    a = 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    want = norm(h + a @ p.w_fc2 + p.b_fc2, 1e-12) * p.ln2_scale + p.ln2_bias
    np.testing.assert_allclose(fnet_block(x, p), want, rtol=0, atol=1e-12 * (1 + np.abs(want).max()))
    check_slopes(fnet_block, fnet_block_vjp, (x, p), rng)
    assert fnet_block(x[:0], p).shape == (0, 5, 6)
    later = x.copy()
    later[:, -1] += 1  # whether it is padding or not, every token sees it
    assert (fnet_block(later, p) != fnet_block(x, p)).any(axis=-1).all()


def plain_layer(x, p, heads):
    """Post-norm layer, one head at a time."""
    width, out = x.shape[-1] // heads, []
    for h in range(heads):
        at = np.s_[h * width : (h + 1) * width]
        q, k, v = (x @ w[:, at] + b[at] for w, b in ((p.w_q, p.b_q), (p.w_k, p.b_k), (p.w_v, p.b_v)))
        e = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(width))
        out.append(e / e.sum(axis=-1, keepdims=True) @ v)
    h = norm(x + np.concatenate(out, axis=-1) @ p.w_o + p.b_o, 1e-12) * p.ln1_scale + p.ln1_bias
    a = h @ p.w_fc1 + p.b_fc1
    a = 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    return norm(h + a @ p.w_fc2 + p.b_fc2, 1e-12) * p.ln2_scale + p.ln2_bias


@given(seeds, st.sampled_from(((1, 3), (2, 3), (2, 2), (3, 3))))
def law_lightweight_albert_repeats_its_groups(seed, sizes):
    groups, layers = sizes
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 4, 3))
    p = random_params(rng, init_albert(rng, 3, 6, 8, groups=groups, std=0.4))
    options = {"num_heads": 2, "num_layers": layers}
    h = x @ p.w_in + p.b_in
    for i in range(layers):
        h = plain_layer(h, p.groups[i * groups // layers], 2)
    got = albert_encoder(x, p, **options)
    np.testing.assert_allclose(got, h, rtol=0, atol=1e-11 * (1 + np.abs(h).max()))
    check_slopes(
        lambda x, p: albert_encoder(x, p, **options),
        lambda x, p, dy: albert_encoder_vjp(x, p, dy, **options),
        (x, p), rng,
    )  # fmt: skip
    # the gradient of a shared layer is the sum over the layers of a network that has them apart
    apart = p._replace(groups=tuple(p.groups[i * groups // layers] for i in range(layers)))
    np.testing.assert_array_equal(albert_encoder(x, apart, **options), got)
    _, shared = albert_encoder_vjp(x, p, got, **options)
    _, own = albert_encoder_vjp(x, apart, got, **options)
    for g in range(groups):
        uses = [own.groups[i] for i in range(layers) if i * groups // layers == g]
        for a, *parts in zip(tree_leaves(shared.groups[g]), *map(tree_leaves, uses), strict=True):
            np.testing.assert_allclose(a, sum(parts), rtol=0, atol=1e-11 * (1 + np.abs(a).max()))


@given(seeds)
def law_lightweight_albert_mask_hides_tokens(seed):
    rng = np.random.default_rng(seed)
    x, p = rng.standard_normal((1, 4, 3)), init_albert(rng, 3, 6, 8, std=0.4)
    mask = np.broadcast_to(np.arange(4) < 3, (4, 4))
    options = {"num_heads": 2, "num_layers": 2}
    short = albert_encoder(x[:, :3], p, **options)
    np.testing.assert_allclose(albert_encoder(x, p, mask=mask, **options)[:, :3], short, rtol=0, atol=1e-12)
    blind = albert_encoder(x, p, mask=np.zeros((4, 4), bool), **options)  # nobody sees anybody: no attention
    assert np.isfinite(blind).all()


@given(seeds, st.sampled_from((1, 2, 3)), st.booleans(), st.booleans(), st.sampled_from((1, 3, 4)))
def law_lightweight_light_conv_is_its_definition(seed, c, causal, dynamic, L):
    k = 4 if causal else 3
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((2, L, 6))
    kernel = rng.standard_normal((2, L, c, k) if dynamic else (c, k))
    want = np.zeros_like(u)
    for b, t, ch in np.ndindex(u.shape):
        w = np.exp(kernel[b, t, ch // (6 // c)] if dynamic else kernel[ch // (6 // c)])
        for j in range(k):
            at = t + j - (k - 1 if causal else k // 2)
            if 0 <= at < L:
                want[b, t, ch] += w[j] / w.sum() * u[b, at, ch]
    np.testing.assert_allclose(light_conv(u, kernel, causal=causal), want, rtol=0, atol=1e-13)
    check_slopes(
        lambda u, w: light_conv(u, w, causal=causal),
        lambda u, w, dy: light_conv_vjp(u, w, dy, causal=causal),
        (u, kernel), rng,
    )  # fmt: skip


@given(seeds, st.integers(0, 4))
def law_lightweight_light_conv_averages_and_shifts(seed, j):
    rng = np.random.default_rng(seed)
    u, kernel = rng.standard_normal((9, 4)), rng.standard_normal((2, 5))
    np.testing.assert_allclose(light_conv(np.ones((9, 4)), kernel)[2:-2], 1, rtol=0, atol=8 * EPS)
    np.testing.assert_array_equal(light_conv(u, kernel[:, :1]), u)
    shift = np.where(np.arange(5) == j, 1e4, 0.0) * np.ones((2, 1))  # the other weights underflow to 0
    for causal, offset in ((False, j - 2), (True, j - 4)):
        want = np.zeros_like(u)
        rows = [t for t in range(9) if 0 <= t + offset < 9]
        want[rows] = u[[t + offset for t in rows]]
        np.testing.assert_array_equal(light_conv(u, shift, causal=causal), want)
    later = u.copy()
    later[5:] += 1
    np.testing.assert_array_equal(
        light_conv(later, kernel, causal=True)[:5], light_conv(u, kernel, causal=True)[:5]
    )


@given(seeds, st.booleans(), st.booleans())
def law_lightweight_lsra_halves_do_not_meet_before_they_are_joined(seed, dynamic, causal):
    rng = np.random.default_rng(seed)
    p = random_params(rng, init_lsra(rng, 8, heads=2, dynamic=dynamic, std=0.4))
    x, options = rng.standard_normal((2, 5, 8)), {"num_heads": 2, "causal": causal}
    y = lsra_branches(x, p, **options)
    for half, other in ((np.s_[..., :4], np.s_[..., 4:]), (np.s_[..., 4:], np.s_[..., :4])):
        moved = x.copy()
        moved[half] += rng.standard_normal((2, 5, 4))
        new = lsra_branches(moved, p, **options)
        np.testing.assert_array_equal(new[other], y[other])
        assert (new[half] != y[half]).any()
    value, gate = np.split(x[..., 4:] @ p.w_g + p.b_g, 2, axis=-1)
    u = value / (1 + np.exp(-gate))
    kernel = np.einsum("...i,ick->...ck", u, p.kernel) if dynamic else p.kernel
    want = light_conv(u, kernel, causal=causal) @ p.w_z + p.b_z
    np.testing.assert_allclose(y[..., 4:], want, rtol=0, atol=1e-12)
    h = norm(x + y, 1e-5) * p.ln1_scale + p.ln1_bias
    out = h + np.maximum(h @ p.w_fc1 + p.b_fc1, 0) @ p.w_fc2 + p.b_fc2
    want = norm(out, 1e-5) * p.ln2_scale + p.ln2_bias
    np.testing.assert_allclose(lsra_block(x, p, **options), want, rtol=0, atol=1e-11)
    if causal:
        later = x.copy()
        later[:, 3:] += 1
        new = lsra_block(later, p, **options)
        np.testing.assert_allclose(new[:, :3], lsra_block(x, p, **options)[:, :3], rtol=0, atol=1e-13)
    check_slopes(
        lambda x, p: lsra_block(x, p, **options), lambda x, p, dy: lsra_block_vjp(x, p, dy, **options),
        (x, p), rng,
    )  # fmt: skip


@given(seeds, st.sampled_from(((2, 4, 6), (3, 3, 6), (1, 2, 3))))
def law_lightweight_unfolding_is_a_permutation(seed, sizes):
    patch, H, W = sizes
    x = np.random.default_rng(seed).standard_normal((2, H, W, 3))
    tokens = unfold_patches(x, patch)
    np.testing.assert_array_equal(fold_patches(tokens, (H, W), patch), x)
    for i, j in np.ndindex(patch, patch):  # a sequence holds the same place of every patch, row by row
        np.testing.assert_array_equal(tokens[:, i * patch + j], x[:, i::patch, j::patch].reshape(2, -1, 3))
    flipped = x.reshape(2, H, W // patch, patch, 3)[:, :, ::-1].reshape(x.shape)  # patches in a row reversed
    order = np.arange(tokens.shape[2]).reshape(H // patch, -1)[:, ::-1].ravel()
    np.testing.assert_array_equal(unfold_patches(flipped, patch), tokens[:, :, order])


@given(seeds)
def law_lightweight_mobilevit_sees_the_whole_map(seed):
    rng = np.random.default_rng(seed)
    p = random_params(rng, init_mobilevit(rng, 3, 4, depth=1, std=0.5))
    x, options = rng.standard_normal((1, 8, 8, 3)), {"num_heads": 2}
    moved = x.copy()
    at = tuple(rng.integers(0, 8, 2))
    moved[0, at[0], at[1]] += 1.0
    change = lambda p: (mobilevit_block(moved, p, **options) != mobilevit_block(x, p, **options)).any(-1)[0]
    assert change(p).all()
    near = change(p._replace(blocks=()))  # convolutions alone: two kernels of 3 reach 2 pixels
    rows, cols = np.nonzero(near)
    assert np.abs(rows - at[0]).max() <= 2
    assert np.abs(cols - at[1]).max() <= 2


@given(seeds)
def law_lightweight_mobilevit_backward_is_the_slope(seed):
    rng = np.random.default_rng(seed)
    p = random_params(rng, init_mobilevit(rng, 2, 4, depth=2, std=0.5))
    x, options = rng.standard_normal((2, 2, 4, 2)), {"num_heads": 2, "eps": 1e-3}
    check_slopes(
        lambda x, p: mobilevit_block(x, p, **options),
        lambda x, p, dy: mobilevit_block_vjp(x, p, dy, **options),
        (x, p), rng, STATISTICS,
    )  # fmt: skip


@given(seeds, st.booleans())
def law_lightweight_separable_mlp_is_its_definition(seed, squeeze):
    rng = np.random.default_rng(seed)
    p = random_params(rng, init_separable_mlp(rng, 3, ratio=4, squeeze=squeeze))
    centre = np.zeros((12, 1, 3, 3))
    centre[:, :, 1, 1] = 1
    x = 2 * rng.standard_normal((2, 3, 4, 3))
    act = lambda v: v * np.clip(v + 3, 0, 6) / 6
    bn = lambda v, b: (v - b.mean) / np.sqrt(b.var + 1e-5) * b.gamma + b.beta
    # with an identity for the depthwise kernel it is an MLP of every pixel, activated twice
    plain = p._replace(depthwise=p.depthwise._replace(w=centre))
    h = act(bn(act(bn(x @ p.expand.w[:, :, 0, 0].T, p.expand.bn)), p.depthwise.bn))
    if squeeze:
        s = np.maximum(h.mean(axis=(1, 2)) @ p.se_w1[:, :, 0, 0].T + p.se_b1, 0)
        s = s @ p.se_w2[:, :, 0, 0].T + p.se_b2
        h = h * (np.clip(s + 3, 0, 6) / 6)[:, None, None]
    want = x + bn(h @ p.project.w[:, :, 0, 0].T, p.project.bn)
    np.testing.assert_allclose(separable_mlp(x, plain, squeeze=squeeze), want, rtol=0, atol=1e-12)
    check_slopes(
        lambda x, p: separable_mlp(x, p, squeeze=squeeze),
        lambda x, p, dy: separable_mlp_vjp(x, p, dy, squeeze=squeeze),
        (x, p), rng, STATISTICS,
    )  # fmt: skip


def law_lightweight_hard_activations_have_their_corners():
    x = np.array([-np.inf, -4.0, -3.0, 0.0, 3.0, 4.0])
    np.testing.assert_array_equal(hard_swish(x[1:]), [0, 0, 0, 3, 4])
    np.testing.assert_array_equal(hard_sigmoid(x), [0, 0, 0, 0.5, 1, 1])
    assert np.isnan(hard_swish(np.nan))


def law_lightweight_counts_are_those_of_the_trees_and_of_ref():
    """Parameters: sizes of the arrays. Multiply-adds: those of every matrix product that ref does."""
    rng, tally = np.random.default_rng(0), Tally()
    tokens, grid = (count(tally, rng.standard_normal(s)) for s in ((5, 8), (1, 4, 6, 8)))
    fnet, albert = init_fnet(rng, 8, 12), init_albert(rng, 8, 6, 10, groups=2)
    mobile = init_mobilevit(rng, 8, 6, hidden=10, depth=2)
    runs = [
        ("albert", (5, 6), {"hidden": 10, "embed": 8, "layers": 4, "groups": 2}, albert,
         lambda: albert_encoder(tokens, albert, num_heads=2, num_layers=4)),
        ("mobilevit", (4, 6, 8), {"dim": 6, "hidden": 10, "depth": 2}, mobile,
         lambda: mobilevit_block(grid, mobile, num_heads=2)),
    ]  # fmt: skip
    for k in (3, 5):
        lsra = init_lsra(rng, 8, heads=2, kernel=k)
        runs.append(
            (
                "lsra",
                (5, 8),
                {"heads": 2, "kernel": k},
                lsra,
                lambda p=lsra: lsra_block(tokens, p, num_heads=2),
            )
        )
    for squeeze in (False, True):
        p = init_separable_mlp(rng, 8, ratio=3, squeeze=squeeze)
        run = lambda p=p, squeeze=squeeze: separable_mlp(grid, p, squeeze=squeeze)
        runs.append(("separable_mlp", (4, 6, 8), {"ratio": 3, "squeeze": squeeze}, p, run))
    for kind, shape, sizes, params, run in runs:
        before = tally.macs
        run()
        cost = block_cost(kind, shape=shape, **sizes)
        assert cost == (num_parameters(params), tally.macs - before), kind
    matrix, fft = (block_cost("fnet", shape=(5, 8), hidden=12, transform=t) for t in ("matrix", "fft"))
    assert matrix.params == fft.params == num_parameters(fnet)
    assert matrix.macs - 2 * 5 * 8 * 12 == 2 * 5 * 8 * 8 + 2 * 5 * 5 * 8  # C x C' and S x S'
    assert block_cost("standard", shape=(7, 6), hidden=10).params == num_parameters(albert.groups[0])


def law_lightweight_albert_stores_a_ninth_of_bert():
    """Base sizes, without positions and pooler: 12 layers in one, an embedding of 128; the same work."""
    layer = block_cost("standard", shape=(128, 768), hidden=3072)
    albert = block_cost("albert", shape=(128, 768), hidden=3072, embed=128, layers=12, vocab=30_000)
    assert layer.params == 7_087_872
    assert albert.params == 30_000 * 128 + 128 * 768 + 768 + layer.params
    rest = 512 * 128 + 2 * 128 + 2 * 128 + 768 * 769  # positions, segments, a norm, the pooler
    assert round((albert.params + rest) / 1e6, 1) == 11.7
    assert albert.macs == 12 * layer.macs + 128 * 128 * 768
    small = block_cost("standard", shape=(32, 256), hidden=512)  # the shared layer of a small released ALBERT
    assert small.params == 527_104


def law_lightweight_kernels_grow_with_depth():
    assert [lsra_kernel(i, 4) for i in range(4)] == list(KERNELS)
    assert [lsra_kernel(i, 6) for i in range(6)] == [3, 3, 7, 15, 15, 31]
    assert [lsra_kernel(i, 2) for i in range(2)] == [3, 15]
