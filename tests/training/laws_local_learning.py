"""Laws of local learning on ref alone: NumPy and Hypothesis."""

from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.auxiliary import (
    aux_classifier_vjp,
    bce_reconstruction_vjp,
    image_decoder_vjp,
    init_aux,
    init_image_decoder,
    mse_reconstruction_vjp,
    supervised_contrastive_vjp,
    upsample_bilinear_vjp,
)
from ref.blocks.losses import cross_entropy
from ref.blocks.optim import tree_leaves, tree_map
from ref.blocks.transformer import transformer_block
from ref.data import digits
from ref.models.vit import embed_patches, vit_forward, vit_forward_vjp
from ref.training.local_learning import (
    FeatureDecoderParams,
    NetShape,
    activation_memory,
    aux_classifier,
    bce_reconstruction,
    feature_decoder,
    feature_decoder_vjp,
    image_decoder,
    init_feature_decoder,
    init_local,
    lambda_schedule,
    local_gradients,
    local_loss,
    local_loss_vjp,
    local_train_step,
    mse_reconstruction,
    pipeline_times,
    split_blocks,
    supervised_contrastive,
    swin_tiny,
    upsample_bilinear,
    vit_shape,
)
from tests.slopes import check_kinked_slope

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(("mlp", "conv", "transformer"))
SIZES = {"image_size": 4, "patch": 2, "dim": 4, "depth": 3, "num_classes": 3, "hidden": 5, "std": 0.4}


def nudged(tree, rng, size=0.2):
    return tree_map(lambda w: w + size * rng.standard_normal(np.shape(w)), tree)


def training(seed, boundaries=(1, 3), **options):
    rng = np.random.default_rng(seed)
    params = init_local(rng, boundaries=boundaries, **SIZES, **options)
    return rng, nudged(params, rng, 0.1), (rng.random((4, 4, 4, 3)), rng.integers(0, 3, 4))


@given(seeds, st.integers(1, 5), st.integers(1, 7))
def law_local_learning_upsampling_puts_corners_on_corners(seed, n, size):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, n, n + 1, 3))
    y = upsample_bilinear(x, size=size)
    for i in range(size):
        for j in range(size):
            a, b = (k * (m - 1) / max(size - 1, 1) for k, m in ((i, n), (j, n + 1)))
            i0, j0 = min(int(a), n - 1), min(int(b), n)
            i1, j1, r, c = min(i0 + 1, n - 1), min(j0 + 1, n), a - i0, b - j0
            top, low = (1 - c) * x[:, i0, j0] + c * x[:, i0, j1], (1 - c) * x[:, i1, j0] + c * x[:, i1, j1]
            np.testing.assert_allclose(
                y[:, i, j], (1 - r) * top + r * low, rtol=0, atol=64 * EPS * np.abs(x).max()
            )
    w = rng.standard_normal(y.shape)
    dot = np.sum(upsample_bilinear_vjp(x, w) * x)  # linear: the transpose
    np.testing.assert_allclose(dot, np.sum(w * y), rtol=0, atol=1e3 * EPS * np.abs(w * y).sum() + EPS)


@given(seeds)
def law_local_learning_infopro_parts_have_the_right_gradients(seed):
    rng = np.random.default_rng(seed)
    h, labels = rng.standard_normal((3, 3, 3, 4)), rng.integers(0, 5, 3)
    p, a = nudged(init_image_decoder(rng, 4, hidden=5), rng), nudged(init_aux(rng, 4, 5, hidden=6), rng)
    w = rng.standard_normal((3, 5, 5, 3))
    grads = image_decoder_vjp(h, p, w, image_size=5)
    check_kinked_slope(lambda z: np.sum(w * image_decoder(*z, image_size=5)), (h, p), grads, rng, h=1e-6)
    loss, dlogits = cross_entropy(aux_classifier(h, a), labels)
    assert loss > 0
    grads = aux_classifier_vjp(h, a, dlogits)
    check_kinked_slope(lambda z: cross_entropy(aux_classifier(*z), labels)[0], (h, a), grads, rng, h=1e-6)
    guess, image = image_decoder(h, p, image_size=5), rng.random((3, 5, 5, 3))
    want = -np.mean(image * np.log(guess) + (1 - image) * np.log(1 - guess))
    np.testing.assert_allclose(bce_reconstruction(guess, image), want, rtol=64 * EPS)
    check_kinked_slope(
        lambda z: bce_reconstruction(z, image), guess, bce_reconstruction_vjp(guess, image), rng, h=1e-8
    )


def law_local_learning_certain_pixels_cost_a_hundred_nats():
    zero, one = np.zeros((1, 2)), np.ones((1, 2))
    assert bce_reconstruction(zero, zero) == bce_reconstruction(one, one) == 0
    assert bce_reconstruction(zero, one) == bce_reconstruction(one, zero) == 100
    assert np.isfinite(bce_reconstruction_vjp(zero, one)).all()


@given(seeds, kinds, st.booleans())
def law_local_learning_decoders_of_features(seed, kind, merged):
    rng = np.random.default_rng(seed)
    guess, target = rng.standard_normal((2, 3, 4))
    check_kinked_slope(
        lambda z: mse_reconstruction(z, target), guess, mse_reconstruction_vjp(guess, target), rng, h=1e-4
    )
    p = nudged(init_feature_decoder(rng, 6, 4, kind=kind, hidden=5, merged=merged), rng)
    h = rng.standard_normal((3, 4, 6))
    y = feature_decoder(h, p, kind=kind)
    assert y.shape == (3, 16 if merged else 4, 4)
    w = rng.standard_normal(y.shape)
    check_kinked_slope(
        lambda z: np.sum(w * feature_decoder(*z, kind=kind)),
        (h, p),
        feature_decoder_vjp(h, p, w, kind=kind),
        rng,
        h=1e-6,
    )
    if merged:  # the patch in row i, column j becomes rows 2i, 2i+1 and columns 2j, 2j+1
        flat = FeatureDecoderParams(np.eye(4), np.zeros(4), np.eye(4), np.zeros(4), np.ones(4), np.zeros(4))
        up = flat._replace(w_up=p.w_up, b_up=p.b_up)
        small = (h @ p.w_up + p.b_up).reshape(3, 2, 2, 2, 2, 4)
        want = np.zeros((3, 4, 4, 4))
        for i, j, a, b in np.ndindex(2, 2, 2, 2):
            want[:, 2 * i + a, 2 * j + b] = small[:, i, j, a, b]
        np.testing.assert_array_equal(feature_decoder(h, up), feature_decoder(want.reshape(3, 16, 4), flat))
    elif kind == "mlp":  # every token by itself
        order = rng.permutation(4)
        np.testing.assert_allclose(feature_decoder(h[:, order], p), y[:, order], rtol=0, atol=256 * EPS)


@given(seeds, st.integers(1, 7), st.integers(1, 3))
def law_local_learning_contrast_is_its_double_sum(seed, B, classes):
    rng = np.random.default_rng(seed)
    f, labels = rng.standard_normal((B, 4)), rng.integers(0, classes, B)
    got, z = supervised_contrastive(f, labels, temperature=0.3), f / np.linalg.norm(f, axis=1, keepdims=True)
    want = 0.0
    for i in range(B):
        others = [a for a in range(B) if a != i]
        same = [j for j in others if labels[j] == labels[i]]
        below = sum(np.exp(z[i] @ z[a] / 0.3) for a in others)
        want += sum(np.log(below) - z[i] @ z[j] / 0.3 for j in same) / max(len(same), 1) / B
    np.testing.assert_allclose(got, want, rtol=0, atol=256 * EPS * (1 + want))
    order, scale = rng.permutation(B), rng.uniform(0.1, 10, (B, 1))
    again = supervised_contrastive((scale * f)[order], labels[order], temperature=0.3)
    np.testing.assert_allclose(again, got, rtol=0, atol=256 * EPS * (1 + want))
    assert supervised_contrastive(f, np.arange(B)) == 0  # nobody has company
    grads = supervised_contrastive_vjp(f, labels, temperature=0.3)
    check_kinked_slope(lambda x: supervised_contrastive(x, labels, temperature=0.3), f, grads, rng, h=1e-5)


@given(seeds, kinds, st.sampled_from(("mse", "bce")), st.sampled_from(("cross_entropy", "contrast")))
def law_local_learning_loss_of_a_module(seed, kind, rec, cls):
    method = "feature" if rec == "mse" else "infopro"
    rng, params, (images, labels) = training(seed, method=method, kind=kind)
    h, aux = rng.standard_normal((4, 4, 4)), params.aux[0]
    target = rng.standard_normal((4, 4, 4)) if rec == "mse" else images
    weights = {"lambda_rec": 0.7, "lambda_cls": 1.3, "rec": rec, "cls": cls}
    loss, parts = local_loss(h, target, labels, aux, **weights)
    if rec == "mse":
        want = mse_reconstruction(feature_decoder(h, aux.decoder, kind=kind), target)
    else:
        want = bce_reconstruction(image_decoder(h.reshape(4, 2, 2, 4), aux.decoder, image_size=4), target)
    assert parts.rec == want
    np.testing.assert_allclose(loss, 0.7 * parts.rec + 1.3 * parts.cls, rtol=4 * EPS)
    grads = local_loss_vjp(h, target, labels, aux, **weights)
    check_kinked_slope(
        lambda z: local_loss(z[0], target, labels, z[1], **weights)[0], (h, aux), grads, rng, h=1e-6
    )
    assert local_loss(h, target, labels, aux, **{**weights, "lambda_rec": 0.0})[1].rec == 0


def law_local_learning_perfect_decoder_leaves_nothing():
    x = np.random.default_rng(0).standard_normal((2, 4, 3))
    assert mse_reconstruction(x, x) == 0
    assert mse_reconstruction(x, x + 2) > 0
    # an MLP that is the identity on standardised features: gelu(y) - gelu(-y) = y
    eye, zero = np.eye(3), np.zeros(3)
    pair = np.concatenate([eye, -eye])
    p = FeatureDecoderParams(pair, zero, pair.T, np.zeros(6), np.ones(3), zero)
    z = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
    assert mse_reconstruction(feature_decoder(x, p), z) < 1e-28


@given(seeds, st.sampled_from(("feature", "infopro", "greedy")), kinds)
def law_local_learning_modules_do_not_hear_of_each_other(seed, method, kind):
    rng, params, batch = training(seed, boundaries=(1, 2, 3), method=method, kind=kind)
    options = {"boundaries": (1, 2, 3), "method": method, "num_heads": 2}
    base, _ = local_gradients(params, batch, **options)

    def same(got, but):
        for k in range(3):
            if k == but:
                continue
            for a, b in zip(tree_leaves(got.net.blocks[k]), tree_leaves(base.net.blocks[k]), strict=True):
                np.testing.assert_array_equal(a, b)

    # another weight for the loss of one module, another head for the last: only that module changes
    for k, weights in ((0, (3.0, 1.0)), (1, (1.0, 3.0))):
        same(local_gradients(params, batch, **options, lambda_cls=weights)[0], k)
    head = params.net._replace(w_head=params.net.w_head + rng.standard_normal(params.net.w_head.shape))
    same(local_gradients(params._replace(net=head), batch, **options)[0], 2)
    # the first module's gradient is that of its own loss alone, by central differences
    weights = {"lambda_rec": 0.0 if method == "greedy" else 1.0, "lambda_cls": 1.0}

    def first(net):
        target = batch[0] if method == "infopro" else embed_patches(batch[0], params.net)
        h = transformer_block(embed_patches(batch[0], net), net.blocks[0], num_heads=2, eps=1e-6)
        rec = "bce" if method == "infopro" else "mse"
        return local_loss(h, target, batch[1], params.aux[0], rec=rec, **weights)[0]

    module = lambda net: (net.w_patch, net.b_patch, net.pos_embed, net.blocks[0])
    put = lambda z: params.net._replace(
        w_patch=z[0], b_patch=z[1], pos_embed=z[2], blocks=(z[3], *params.net.blocks[1:])
    )
    check_kinked_slope(lambda z: first(put(z)), module(params.net), module(base.net), rng, h=1e-6)


@given(seeds)
def law_local_learning_one_module_is_end_to_end_training(seed):
    _, params, (images, labels) = training(seed, boundaries=(3,))
    logits = vit_forward(images, params.net, num_heads=2)
    loss, dlogits = cross_entropy(logits, labels)
    want = vit_forward_vjp(images, params.net, dlogits, num_heads=2)[1]
    for method in ("feature", "e2e"):
        grads, parts = local_gradients(params, (images, labels), boundaries=(3,), method=method, num_heads=2)
        assert parts[-1].cls == loss
        for a, b in zip(tree_leaves(grads.net), tree_leaves(want), strict=True):
            np.testing.assert_array_equal(a, b)
    new, _ = local_train_step(params, (images, labels), boundaries=(3,), learning_rate=0.1, num_heads=2)
    np.testing.assert_array_equal(new.net.w_head, params.net.w_head - 0.1 * want.w_head)


@given(seeds, st.sampled_from(("embedding", "image")), st.booleans())
def law_local_learning_step_and_its_options(seed, first_target, normalize_target):
    rng, params, batch = training(seed, first_target=first_target)
    options = {"boundaries": (1, 3), "num_heads": 2, "first_target": first_target}
    new, metrics = local_train_step(
        params, batch, learning_rate=0.05, normalize_target=normalize_target, **options
    )
    grads, parts = local_gradients(params, batch, normalize_target=normalize_target, **options)
    assert metrics["loss"] == parts
    for p, q, g in zip(tree_leaves(params), tree_leaves(new), tree_leaves(grads), strict=True):
        np.testing.assert_allclose(q, p - 0.05 * g, rtol=0, atol=8 * EPS * (1 + np.abs(p).max()))
    silent = local_gradients(params, batch, lambda_rec=0.0, **options)[0]
    greedy = local_gradients(params, batch, method="greedy", **options)[0]
    for a, b in zip(tree_leaves(silent.net), tree_leaves(greedy.net), strict=True):
        np.testing.assert_array_equal(a, b)
    assert silent.aux[0].decoder is None
    # at inference there are no decoders: the same network whatever helped it
    other = params._replace(aux=nudged(params.aux, rng))
    np.testing.assert_array_equal(*(vit_forward(batch[0], p.net, num_heads=2) for p in (params, other)))


@given(seeds, st.integers(1, 9), st.integers(1, 9))
def law_local_learning_balanced_split_is_the_best(seed, n, k):
    k, costs = min(n, k), np.random.default_rng(seed).integers(1, 9, n)
    worst = lambda ends: max(costs[a:b].sum() for a, b in zip((0, *ends[:-1]), ends, strict=True))
    ends = split_blocks(costs, k)
    assert len(ends) == k
    assert ends[-1] == n
    assert worst(ends) == min(worst((*c, n)) for c in combinations(range(1, n), k - 1))
    assert pipeline_times(list(costs), ends) == (costs.sum(), worst(ends))
    even = np.diff((0, *split_blocks(costs, k, balanced=False)))
    assert even.max() - even.min() <= 1
    assert even.sum() == n


@given(st.integers(2, 8), st.integers(0, 20), st.integers(0, 20))
def law_local_learning_schedule_is_a_line(modules, first, last):
    first, last = first / 10, last / 10
    got = [lambda_schedule(k, modules, first=first, last=last) for k in range(modules - 1)]
    want = np.linspace(first, last, modules - 1) if modules > 2 else [first]
    np.testing.assert_allclose(got, want, rtol=0, atol=8 * EPS * (first + last))
    assert got[0] == first


def law_local_learning_modules_need_less_memory_than_the_whole():
    """Their own blocks always; with an image decoder on a small module the sum can be more."""
    rng = np.random.default_rng(0)
    for net in (swin_tiny(), vit_shape(image_size=32, patch=4, dim=64, depth=6, heads=4)):
        n = len(net.blocks)
        whole = activation_memory(net, boundaries=(n,), method="e2e", batch=8)
        assert len(whole) == 1
        for _ in range(20):
            ends = (*sorted(rng.choice(np.arange(1, n), 2, replace=False).tolist()), n)
            parts = [
                activation_memory(net, boundaries=ends, method=m, batch=8)
                for m in ("feature", "infopro", "greedy")
            ]
            for modules in parts:
                assert sum(m.blocks for m in modules) == whole[0].blocks
                assert max(m.blocks for m in modules) < whole[0].blocks
                assert modules[-1].decoder == 0
            assert all(m.decoder == 0 for m in parts[2])
    small = NetShape(32, vit_shape(image_size=32, patch=8, dim=16, depth=2, heads=2).blocks)
    local = activation_memory(small, boundaries=(1, 2), method="infopro", batch=1)
    whole = activation_memory(small, boundaries=(2,), method="e2e", batch=1)
    assert sum(local[0]) > sum(whole[0])
    # one block counted by hand: 16 tokens, 16 channels, 2 heads, hidden 64
    one = NetShape(32, small.blocks[:1])
    counted = activation_memory(one, boundaries=(1,), method="greedy", batch=3, itemsize=2)[0]
    assert counted.blocks == 2 * 3 * (8 * 256 + 2 * 16 * 16 + 2 * 16 * 64)
    swin = [(b.tokens, b.dim) for b in swin_tiny().blocks]
    assert swin == [(3136, 96)] * 2 + [(784, 192)] * 2 + [(196, 384)] * 6 + [(49, 768)] * 2


def law_local_learning_learns_digits_in_two_modules():
    """A few steps on 30 digits: every module's loss falls, with features as the target as with the image."""
    images, labels = digits()
    batch = np.repeat(images[:30, :, :, None] / 16, 3, axis=-1), labels[:30].astype(int)
    for method in ("feature", "infopro", "greedy"):
        sizes = {"image_size": 8, "patch": 2, "dim": 16, "depth": 2, "num_classes": 10, "hidden": 16}
        params = init_local(0, boundaries=(1, 2), method=method, std=0.1, **sizes)
        options = {"boundaries": (1, 2), "method": method, "num_heads": 2, "learning_rate": 0.1}
        history = []
        for _ in range(10):
            params, metrics = local_train_step(params, batch, **options)
            history.append([part for module in metrics["loss"] for part in module])
        first, last = np.array(history[0]), np.array(history[-1])
        assert (last[[1, 3]] < first[[1, 3]]).all(), (method, first, last)
        assert (last[0] < first[0]) == (method != "greedy"), (method, first, last)
