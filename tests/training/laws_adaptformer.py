"""Laws of AdaptFormer on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.optim import tree_leaves, tree_map
from ref.data import digits
from ref.models.bert import bert_embed, bert_encode, init_bert
from ref.models.gpt import gpt_embed, gpt_forward, gpt_head, init_gpt
from ref.models.vit import vit_forward as plain_vit
from ref.training.adaptformer import (
    AdapterParams,
    Plugged,
    ViTSize,
    adapted_block,
    adapted_block_backward,
    adapted_blocks,
    adapter,
    adapter_backward,
    adapter_init,
    count_trainable,
    fine_tune,
    init_vit,
    multi_task_storage,
    plug_in,
    trainable_mask,
    vit_forward,
    vit_forward_backward,
)
from tests.slopes import check_kinked_slope

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
forms = st.sampled_from(("none", "in", "out"))
D, R = 8, 3


def branch(rng, layernorm="none", learnable=False):
    fresh = adapter_init(rng, D, R, layernorm=layernorm, learnable_scale=learnable)
    return tree_map(lambda x: x + 0.5 * rng.standard_normal(np.shape(x)), fresh)


def network(rng, **options):
    sizes = {
        "image_size": 8,
        "patch": 4,
        "dim": D,
        "depth": 2,
        "num_classes": 3,
        "channels": 1,
        "bottleneck": R,
    }
    net = init_vit(rng, **{**sizes, **options})
    return tree_map(lambda x: x + 0.3 * rng.standard_normal(np.shape(x)), net)


def frozen(net):
    return net._replace(adapters=None)


@given(seeds, forms, st.booleans(), st.booleans())
def law_adaptformer_branch_is_the_formula_and_its_gradient(seed, layernorm, learnable, dropout):
    rng = np.random.default_rng(seed)
    p, x, cot = (
        branch(rng, layernorm, learnable),
        rng.standard_normal((2, 5, D)),
        rng.standard_normal((2, 5, D)),
    )
    mask = (rng.random((2, 5, R)) < 0.7) / 0.7 if dropout else None
    options = {"scale": None if learnable else 0.3, "layernorm": layernorm, "dropout_mask": mask}
    norm = lambda t: (t - t.mean()) / np.sqrt(t.var() + 1e-5) * p.ln_scale + p.ln_bias
    got = adapter(x, p, **options)
    for b in range(2):
        for t in range(5):
            token = norm(x[b, t]) if layernorm == "in" else x[b, t]
            h = np.array([max(token @ p.w_down[:, j] + p.b_down[j], 0) for j in range(R)])
            h = h if mask is None else h * mask[b, t]
            up = (h @ p.w_up + p.b_up) * (p.scale if learnable else 0.3)
            want = norm(up) if layernorm == "out" else up
            # sums of at most d + r terms; a norm may divide them by a small deviation
            np.testing.assert_allclose(got[b, t], want, rtol=1e-9, atol=1e-12)
    dx, dp = adapter_backward(x, p, cot, **options)
    check_kinked_slope(lambda t: (cot * adapter(t[0], t[1], **options)).sum(), (x, p), (dx, dp), rng)
    order = rng.permutation(5)
    again = adapter(x[:, order], p, **{**options, "dropout_mask": None if mask is None else mask[:, order]})
    np.testing.assert_allclose(again, got[:, order], rtol=1e-9, atol=1e-12)  # every token for itself


@given(seeds, st.sampled_from(("parallel", "sequential")), forms)
def law_adaptformer_block_gradients_agree_with_differences(seed, option, layernorm):
    rng = np.random.default_rng(seed)
    net, p = network(rng), branch(rng, layernorm)
    x, cot = rng.standard_normal((4, D)), rng.standard_normal((4, D))
    options = {"num_heads": 2, "option": option, "layernorm": layernorm, "scale": 0.4}
    dx, none, dp = adapted_block_backward(x, net.blocks[0], p, cot, **options)
    assert none is None
    run = lambda t: (cot * adapted_block(t[0], net.blocks[0], t[1], **options)).sum()
    check_kinked_slope(run, (x, p), (dx, dp), rng)


@given(seeds, st.booleans(), st.booleans(), st.booleans())
def law_adaptformer_network_gradients_agree_with_differences(seed, clips, head_norm, global_pool):
    rng = np.random.default_rng(seed)
    net = network(rng, num_prompts=2, head_norm=head_norm, **({"frames": 4, "tubelet": 2} if clips else {}))
    if head_norm:
        net = net._replace(bn_var=rng.random(D) + 0.5)
    x, cot = rng.standard_normal((2, 4, 8, 8, 1) if clips else (2, 8, 8, 1)), rng.standard_normal((2, 3))
    options = {"num_heads": 2, "global_pool": global_pool}
    dx, grads = vit_forward_backward(x, net, cot, **options)
    fixed = {"bn_mean": net.bn_mean, "bn_var": net.bn_var}
    trained = net._replace(bn_mean=None, bn_var=None)
    run = lambda t: (cot * vit_forward(t[0], t[1]._replace(**fixed), **options)).sum()
    check_kinked_slope(run, (x, trained), (dx, grads), rng)


@given(seeds, st.sampled_from(("parallel", "sequential")))
def law_adaptformer_starts_as_the_frozen_network(seed, option):
    """W_up = 0 and b_up = 0: bitwise the network without branches, in both places."""
    rng = np.random.default_rng(seed)
    net, x = network(rng, bottleneck=None), rng.standard_normal((2, 8, 8, 1))
    plugged = plug_in(net, rng, R)
    want = vit_forward(x, net, num_heads=2)
    np.testing.assert_array_equal(vit_forward(x, plugged, num_heads=2, option=option), want)
    np.testing.assert_array_equal(plain_vit(x, net, num_heads=2), want)
    # its first step moves the upper half alone (W_up unless every hidden unit is off)
    _, grads = vit_forward_backward(x, plugged, rng.standard_normal((2, 3)), num_heads=2, option=option)
    assert not any(g.w_down.any() or g.b_down.any() for g in grads.adapters)
    assert all(g.b_up.any() for g in grads.adapters)


def law_adaptformer_plugs_into_other_transformers():
    """GPT-2 and BERT with fresh branches give their own hidden states; trained branches change them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 11, (2, 5))
    gpt = init_gpt(rng, vocab=11, context=6, dim=D, depth=2, std=0.3)
    bert = init_bert(rng, vocab=11, context=6, dim=D, depth=2, std=0.3)
    causal = {"num_heads": 2, "causal": True, "activation": "gelu_tanh"}
    run_gpt = lambda p: gpt_head(adapted_blocks(gpt_embed(ids, p.backbone), p, **causal), p.backbone)
    run_bert = lambda p: adapted_blocks(bert_embed(ids, p.backbone), p, num_heads=2, norm="post", eps=1e-12)
    cases = (
        (gpt, run_gpt, gpt_forward(ids, gpt, num_heads=2)),
        (bert, run_bert, bert_encode(ids, bert, num_heads=2)),
    )
    for base, run, want in cases:
        plugged = plug_in(base, rng, R)
        assert isinstance(plugged, Plugged)
        np.testing.assert_array_equal(run(plugged), want)
        other = plugged._replace(adapters=tuple(branch(rng) for _ in plugged.adapters))
        assert np.abs(run(other) - want).max() > 1e-3


@given(seeds, st.sampled_from(("none", "in")), st.sampled_from(("parallel", "sequential")))
def law_adaptformer_block_is_affine_in_the_scale(seed, layernorm, option):
    rng = np.random.default_rng(seed)
    net, p, x = network(rng), branch(rng, layernorm), rng.standard_normal((4, D))
    run = lambda s: adapted_block(
        x, net.blocks[0], p, num_heads=2, option=option, layernorm=layernorm, scale=s
    )
    y0, y1, y3 = run(0.0), run(1.0), run(3.0)
    np.testing.assert_allclose(y3, y0 + 3 * (y1 - y0), rtol=0, atol=1e-10)  # the card's bound
    zero = p._replace(w_up=0 * p.w_up, b_up=0 * p.b_up)
    np.testing.assert_array_equal(y0, adapted_block(x, net.blocks[0], zero, num_heads=2, layernorm=layernorm))


@given(seeds)
def law_adaptformer_two_relus_make_the_identity(seed):
    eye, x = np.eye(D), np.random.default_rng(seed).standard_normal((5, D))
    p = AdapterParams(np.hstack([eye, -eye]), np.zeros(2 * D), np.vstack([eye, -eye]), np.zeros(D))
    np.testing.assert_array_equal(adapter(x, p, scale=0.1), 0.1 * x)


@given(seeds)
def law_adaptformer_prompts_end_with_their_block(seed):
    """What block i makes of its prompts is dropped: the blocks run one by one by hand give the logits."""
    rng = np.random.default_rng(seed)
    net, images = network(rng, num_prompts=3), rng.standard_normal((2, 8, 8, 1))
    tiles = images.reshape(2, 2, 4, 2, 4, 1).swapaxes(2, 3).reshape(2, 4, 16)
    x = tiles @ net.w_patch.reshape(16, D) + net.b_patch
    x = np.concatenate([np.broadcast_to(net.cls_token, (2, 1, D)), x], axis=1) + net.pos_embed
    for block, a, prompt in zip(net.blocks, net.adapters, net.prompts, strict=True):
        longer = np.concatenate([np.broadcast_to(prompt, (2, 3, D)), x], axis=1)
        x = adapted_block(longer, block, a, num_heads=2)[:, 3:]
        assert x.shape == (2, 5, D)
    c = x[:, 0] - x[:, 0].mean(1, keepdims=True)
    y = c / np.sqrt((c**2).mean(1, keepdims=True) + 1e-6) * net.norm_scale + net.norm_bias
    want = y @ net.w_head + net.b_head
    np.testing.assert_allclose(vit_forward(images, net, num_heads=2), want, rtol=1e-9, atol=1e-11)


@given(seeds)
def law_adaptformer_clips(seed):
    """One frame is an image; frames may be shuffled with their positions when the mean is classified."""
    rng = np.random.default_rng(seed)
    net, x = network(rng), rng.standard_normal((2, 8, 8, 1))
    still = net._replace(w_patch=net.w_patch[None])
    np.testing.assert_array_equal(
        vit_forward(x[:, None], still, num_heads=2), vit_forward(x, net, num_heads=2)
    )
    video, clip = network(rng, frames=3), rng.standard_normal((2, 3, 8, 8, 1))
    order = rng.permutation(3)
    rows = np.concatenate([[0], *(1 + 4 * i + np.arange(4) for i in order)])
    moved = video._replace(pos_embed=video.pos_embed[rows])
    run = lambda c, p: vit_forward(c, p, num_heads=2, global_pool=True)
    np.testing.assert_allclose(run(clip[:, order], moved), run(clip, video), rtol=1e-9, atol=1e-11)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))
def law_adaptformer_counts_are_those_of_the_trees(bottleneck, prompts, classes):
    config = ViTSize(image_size=8, patch=4, dim=D, depth=2, channels=1, num_prompts=prompts)
    net = init_vit(
        np.random.default_rng(0), image_size=8, patch=4, dim=D, depth=2, num_classes=classes, channels=1
    )
    count = lambda tuning: count_trainable(config, tuning, bottleneck=bottleneck, num_classes=classes)
    size = lambda p, tuning: sum(
        x.size for x, on in zip(tree_leaves(p), tree_leaves(trainable_mask(p, tuning)), strict=True) if on
    )
    assert count("full") == size(net, "full") == sum(x.size for x in tree_leaves(net))
    assert count("linear") == size(net, "linear")
    plugged = plug_in(net, np.random.default_rng(0), bottleneck)
    assert count("adapter") == size(plugged, "adapter")
    prompted = net._replace(prompts=tuple(np.zeros((prompts, D)) for _ in range(2)))
    assert count("vpt") == size(prompted, "vpt")
    separate, shared = multi_task_storage(100, 7, classes)
    assert (separate, shared) == (100 * classes, 100 + 7 * classes)


def law_adaptformer_counts_of_the_paper():
    """ViT-B: 1,189,632 numbers in the branches, below 2 % of the network; with 100 classes 1.266 M."""
    none = count_trainable(ViTSize(), "adapter", num_classes=0)
    assert none == 1_189_632
    assert none < 0.02 * count_trainable(ViTSize(), "full", num_classes=0)
    assert count_trainable(ViTSize(), "adapter", num_classes=100) == 1_189_632 + 769 * 100


def law_adaptformer_training_writes_only_what_it_says():
    """Digits 0 to 4, a few steps each way: the loss falls, frozen arrays are the very same objects."""
    images, labels = digits()
    pick = np.flatnonzero(labels < 5)[:60]
    data = images[pick][..., None] / 16, labels[pick].astype(int)
    rng = np.random.default_rng(0)
    net = init_vit(rng, image_size=8, patch=4, dim=16, depth=2, num_classes=5, channels=1, hidden=32,
                   num_prompts=2, bottleneck=4, head_norm=True)  # fmt: skip
    options = {"lr": 0.1, "epochs": 4, "seed": 1, "num_heads": 2, "batch": 20, "warmup": 1, "dropout": 0.1}
    for tuning in ("adapter", "vpt", "linear", "full"):
        new, history = fine_tune(net, data, tuning=tuning, **options)
        assert history[-1] < history[0], tuning
        mask = trainable_mask(net, tuning)
        for name, on in zip(net._fields, mask, strict=True):
            old, now = tree_leaves(getattr(net, name)), tree_leaves(getattr(new, name))
            if name in ("bn_mean", "bn_var"):
                assert not np.array_equal(old[0], now[0])
            elif not any(tree_leaves(on)):
                assert all(a is b for a, b in zip(old, now, strict=True)), (tuning, name)
            else:
                assert all(a is not b for a, b in zip(old, now, strict=True)), (tuning, name)
    _, repeat = fine_tune(net, data, tuning="full", **options)
    np.testing.assert_array_equal(repeat, history)
    fresh, _ = fine_tune(net, data, tuning="linear", new_head=7, **options)
    assert fresh.w_head.shape == (16, 7)
