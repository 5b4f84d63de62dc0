"""Laws of DependencyViT on ref alone: NumPy and Hypothesis."""

from dataclasses import replace
from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.attention import attention_dense
from ref.blocks.optim import tree_map
from ref.blocks.trees import node_depths, spanning_tree
from ref.counting import Tally, count
from ref.vision.dependencyvit import (
    DependencyAttentionParams,
    DependencyViTConfig,
    cut_tree,
    dependency_block,
    dependency_tree,
    dependencyvit_forward,
    dependencyvit_macs,
    dependencyvit_token_schedule,
    head_selector,
    init_dependencyvit,
    reversed_attention,
    reversed_attention_layer,
    reversed_attention_layer_backward,
    reversed_attention_vjp,
    subtree_sizes,
    tree_depth,
)
from tests.slopes import agrees

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)


def heads(seed, B=2, H=3, N=6, d=4):
    """q, k, v [B, H, N, d], P [B, N, H], M [B, N]."""
    rng = np.random.default_rng(seed)
    return *rng.standard_normal((3, B, H, N, d)), rng.dirichlet(np.ones(H), (B, N)), rng.random((B, N))


def layer(seed, C=12, H=3, bias=True):
    rng = np.random.default_rng(seed)
    w = lambda *shape: 0.5 * rng.standard_normal(shape)
    maps = w(C, C), w(C, C), w(C, C), w(C, C), w(C), w(C, H), w(C, C // 2), w(C // 2, 1)
    return DependencyAttentionParams(*maps, *((w(C // 2), w(1), w(C), w(C), w(C)) if bias else ()))


@given(seeds, st.booleans(), st.booleans())
def law_dependencyvit_attention_is_its_definition(seed, select, gate):
    """Sender by sender, receiver by receiver."""
    q, k, v, P, M = heads(seed)
    out, mask = reversed_attention(
        q, k, v, head_weights=P if select else None, message=M if gate else None, return_mask=True
    )
    want, want_mask = np.zeros_like(v), np.zeros((2, 6, 6))
    for b, h, i in np.ndindex(2, 3, 6):
        e = np.array([np.exp(q[b, h, i] @ k[b, h, j] / 2) for j in range(6)])
        for j in range(6):
            share = e[j] / e.sum() * (P[b, i, h] if select else 1) * (M[b, i] if gate else 1)
            want[b, h, j] += share * v[b, h, i]
            want_mask[b, j, i] += share
    np.testing.assert_allclose(out, want, rtol=0, atol=128 * EPS * np.abs(v).max())
    np.testing.assert_allclose(mask, want_mask, rtol=0, atol=128 * EPS)


@given(seeds)
def law_dependencyvit_what_is_sent_arrives(seed):
    """Columns of the mask sum to M, whatever the heads share; rows need not."""
    q, k, v, P, M = heads(seed)
    _, mask = reversed_attention(q, k, v, head_weights=P, message=M, return_mask=True)
    np.testing.assert_allclose(mask.sum(axis=-2), M, rtol=0, atol=1e-12)
    np.testing.assert_allclose(mask.sum(axis=(-2, -1)), M.sum(axis=-1), rtol=0, atol=1e-12)
    _, even = reversed_attention(q, k, v, head_weights=np.full((2, 6, 3), 1 / 3), return_mask=True)
    np.testing.assert_allclose(even.sum(axis=-2), 1, rtol=0, atol=1e-12)
    assert np.abs(even.sum(axis=-1) - 1).max() > 1e-3


@given(seeds)
def law_dependencyvit_one_head_is_the_transpose(seed):
    q, k, v, _, _ = heads(seed, H=1)
    A = attention_dense(q, k, np.broadcast_to(np.eye(6), (2, 1, 6, 6)))
    out = reversed_attention(q, k, v)
    np.testing.assert_allclose(out, np.swapaxes(A, -1, -2) @ v, rtol=0, atol=64 * EPS * np.abs(v).max() * 6)
    # not attention with keys asking queries: that would divide by the receiver's sum
    assert np.abs(out - attention_dense(k, q, v)).max() > 1e-3
    # of a circulant Gram matrix all rows sum alike, and both are the same
    at = 2 * np.pi * np.arange(6) / 6
    ring = np.stack([np.cos(at), np.sin(at)], axis=-1)[None, None]
    same = reversed_attention(ring, ring, v[:1])
    np.testing.assert_allclose(same, attention_dense(ring, ring, v[:1]), rtol=0, atol=1e-12)


@given(seeds)
def law_dependencyvit_silent_tokens_send_nothing(seed):
    """M = 0: its value is of no consequence; deleting it moves others by at most the mass it received."""
    q, k, v, _, M = heads(seed, B=1, H=1)
    M[0, 2] = 0
    out, mask = reversed_attention(q, k, v, message=M, return_mask=True)
    other = v.copy()
    other[0, 0, 2] = 1e9
    np.testing.assert_array_equal(reversed_attention(q, k, other, message=M), out)
    assert mask[0, 2].sum() > 0  # it still receives
    left = [0, 1, 3, 4, 5]
    less = reversed_attention(q[:, :, left], k[:, :, left], v[:, :, left], message=M[:, left])
    moved = np.abs(less - out[:, :, left]).sum(axis=(0, 1, 2))
    received = (mask[0, 2, left, None] * np.abs(v[0, 0, left])).sum(axis=0)
    assert (moved <= received * (1 + 1e-9) + 1e-12).all()
    k[0, 0, :, 0], q[0, 0, :, 0] = 0.0, 1.0
    k[0, 0, 2, 0] = -1e6  # nobody sends to it: now it may be deleted
    out = reversed_attention(q, k, v, message=M)
    less = reversed_attention(q[:, :, left], k[:, :, left], v[:, :, left], message=M[:, left])
    np.testing.assert_allclose(less, out[:, :, left], rtol=0, atol=1e-12)


@given(seeds)
def law_dependencyvit_gates(seed):
    """Heads share one message; a low temperature picks one head; a token never speaks up again."""
    rng = np.random.default_rng(seed)
    x, p, message = rng.standard_normal((2, 5, 12)), layer(seed), rng.random((2, 5))
    P = head_selector(x, p.w_select)
    np.testing.assert_allclose(P.sum(axis=-1), 1, rtol=0, atol=8 * EPS)
    cold = head_selector(x, p.w_select, temperature=1e-9)
    np.testing.assert_allclose(cold, np.eye(3)[(x @ p.w_select).argmax(axis=-1)], rtol=0, atol=1e-12)
    for _ in range(3):
        _, after, mask = reversed_attention_layer(x, message, p, num_heads=3)
        assert (after <= message).all()
        assert (after > 0).all()
        np.testing.assert_allclose(mask.sum(axis=-2), after, rtol=0, atol=1e-12)
        message = after


@given(seeds)
def law_dependencyvit_permuted_tokens(seed):
    rng = np.random.default_rng(seed)
    x, p, message = rng.standard_normal((2, 5, 12)), layer(seed), rng.random((2, 5))
    order = rng.permutation(5)
    out, after, mask = reversed_attention_layer(x, message, p, num_heads=3)
    out2, after2, mask2 = reversed_attention_layer(x[:, order], message[:, order], p, num_heads=3)
    np.testing.assert_allclose(out2, out[:, order], rtol=0, atol=1e-12)
    np.testing.assert_allclose(after2, after[:, order], rtol=0, atol=1e-12)
    np.testing.assert_allclose(mask2, mask[:, order][:, :, order], rtol=0, atol=1e-12)


@given(seeds, st.booleans())
def law_dependencyvit_attention_gradient(seed, gates):
    rng = np.random.default_rng(seed)
    q, k, v, P, M = heads(seed)
    M = 0.1 + 0.8 * M
    dout = rng.standard_normal(v.shape)
    options = {"head_weights": P, "message": M, "scale": 0.7} if gates else {}
    grads = reversed_attention_vjp(q, k, v, dout, **options)
    f = lambda q, k, v, **o: np.sum(dout * reversed_attention(q, k, v, **{**options, **o}))
    agrees(grads[0], lambda z: f(z, k, v), q, rng)
    agrees(grads[1], lambda z: f(q, z, v), k, rng)
    agrees(grads[2], lambda z: f(q, k, z), v, rng)
    agrees(grads[3], lambda z: f(q, k, v, head_weights=z), P if gates else np.ones((2, 6, 3)), rng)
    inner = M if gates else np.full((2, 6), 0.5)
    of_message = reversed_attention_vjp(q, k, v, dout, **{**options, "message": inner})[4]
    agrees(of_message, lambda z: f(q, k, v, message=z), inner, rng)


@given(seeds, st.booleans(), st.sampled_from((0.1, 1.0)))
def law_dependencyvit_layer_gradient(seed, bias, temperature):
    """x, the incoming message and every parameter, for cotangents of the output and of the message."""
    rng = np.random.default_rng(seed)
    x, p, message = (
        0.5 * rng.standard_normal((2, 5, 12)),
        layer(seed, bias=bias),
        rng.uniform(0.1, 0.9, (2, 5)),
    )
    dout, dmessage = rng.standard_normal(x.shape), rng.standard_normal((2, 5))
    options = {"num_heads": 3, "temperature": temperature}

    def f(x, message, p):
        out, after, _ = reversed_attention_layer(x, message, p, **options)
        return np.sum(dout * out) + np.sum(dmessage * after)

    dx, dm, dp = reversed_attention_layer_backward(dout, dmessage, x, message, p, **options)
    agrees(dx, lambda z: f(z, message, p), x, rng)
    agrees(dm, lambda z: f(x, z, p), message, rng)
    for name, at in p._asdict().items():
        if at is None:
            assert getattr(dp, name) is None
        else:
            agrees(getattr(dp, name), lambda z, name=name: f(x, message, p._replace(**{name: z})), at, rng)


@given(seeds, st.integers(1, 16), st.sampled_from(("message", "sent", "received")))
def law_dependencyvit_pruned_block_is_the_block_of_fewer(seed, n, score):
    """Behind attention tokens are on their own: pruning is a choice of rows, in falling order of score."""
    cfg = DependencyViTConfig(8, 2, 12, 1, 3, 4)
    rng = np.random.default_rng(seed)
    block = init_dependencyvit(rng, cfg, std=0.4).blocks[0]
    x, message = rng.standard_normal((2, 16, 12)), rng.random((2, 16))
    all_, sent, order = dependency_block(x, message, block, num_heads=3)
    np.testing.assert_array_equal(order, np.tile(np.arange(16), (2, 1)))
    few, after, kept = dependency_block(x, message, block, num_heads=3, prune_to=n, score=score)
    assert kept.dtype == np.int32
    for b in range(2):
        np.testing.assert_allclose(few[b], all_[b, kept[b]], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(after[b], sent[b, kept[b]])
        assert len(set(kept[b].tolist())) == n
        if score == "message":
            assert (np.diff(sent[b, kept[b]]) <= 0).all()
            assert sent[b, kept[b]].min() >= np.delete(sent[b], kept[b]).max(initial=0)
    off = block._replace(ls1=np.zeros(12), ls2=np.zeros(12))
    np.testing.assert_array_equal(dependency_block(x, message, off, num_heads=3)[0], x)
    ones = block._replace(ls1=np.ones(12), ls2=np.ones(12))
    np.testing.assert_array_equal(dependency_block(x, message, ones, num_heads=3)[0], all_)


def law_dependencyvit_equal_scores_rank_by_index():
    block = init_dependencyvit(np.random.default_rng(0), DependencyViTConfig(8, 2, 12, 1, 3, 4)).blocks[0]
    x = np.broadcast_to(np.arange(12.0), (1, 7, 12))
    assert dependency_block(x, np.ones((1, 7)), block, num_heads=3, prune_to=3)[2].tolist() == [[0, 1, 2]]


@given(st.integers(10, 400), st.sampled_from((0.0, 0.1, 0.16, 0.24)))
def law_dependencyvit_schedule_takes_equal_steps(n, ratio):
    """The k-th count is (1 - k ratio) n, but for one token a step of rounding down."""
    counts = dependencyvit_token_schedule(n, ratio=ratio)
    assert len(counts) == 4
    for k, got in enumerate(counts, start=1):
        assert (1 - k * ratio) * n - k <= got <= (1 - k * ratio) * n + 1e-9
    assert dependencyvit_token_schedule(196) == [164, 132, 100, 69]
    assert dependencyvit_token_schedule(n, layers=()) == []


def law_dependencyvit_costs_are_counted():
    """Multiply-accumulates of ref: patches, blocks with and without pruning, head; and the paper's sizes."""
    rng = np.random.default_rng(0)
    cfg = DependencyViTConfig(12, 2, 12, 3, 3, 5, prune_layers=(1, 3), prune_ratio=0.3)
    params = init_dependencyvit(rng, cfg)
    for layers in ((), (1, 3)):
        tally, img = Tally(), rng.standard_normal((1, 12, 12, 3))
        dependencyvit_forward(count(tally, img), params, replace(cfg, prune_layers=layers))
        left = dict(zip(layers, dependencyvit_token_schedule(36, layers=layers, ratio=0.3), strict=True))
        assert tally.macs == 36 * 12 * 12 + dependencyvit_macs(36, 12, 3, 3, schedule=left) + 12 * 5
    lite = dict(zip((2, 5, 8, 11), dependencyvit_token_schedule(196), strict=True))
    for dim, full, pruned in ((192, 1.266, 0.820), (384, 4.701, 3.085)):
        assert abs(dependencyvit_macs(196, dim, 12, 12) / 1e9 - full) < 5e-4
        assert abs(dependencyvit_macs(196, dim, 12, 12, schedule=lite) / 1e9 - pruned) < 5e-4


def law_dependencyvit_network_tells_what_it_kept():
    rng = np.random.default_rng(1)
    cfg = DependencyViTConfig(8, 2, 12, 3, 3, 5, prune_layers=(1, 3), prune_ratio=0.3)
    params, img = init_dependencyvit(rng, cfg, std=0.4), rng.standard_normal((2, 8, 8, 3))
    logits, aux = dependencyvit_forward(img, params, cfg)
    assert logits.shape == (2, 5)
    assert [m.shape[1] for m in aux.messages] == [16, 11, 11]
    assert [m.shape for m in aux.masks] == [(2, 16, 16), (2, 11, 11), (2, 11, 11)]
    assert [k.shape[1] for k in aux.kept] == [11, 11, 6]
    for before, after in zip(aux.kept, aux.kept[1:], strict=False):
        assert all(set(a) <= set(b) for a, b in zip(after.tolist(), before.tolist(), strict=True))
    tokens, _ = dependencyvit_forward(img, params, cfg, features=True)
    want = tokens.mean(axis=1) @ params.w_head + params.b_head
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-12)
    alone = dependencyvit_forward(img[1:], params, cfg)[0]
    np.testing.assert_allclose(alone[0], logits[1], rtol=0, atol=1e-12)
    before = dependencyvit_forward(img, params, replace(cfg, gate_after_norm=False))[0]
    assert np.abs(before - logits).max() > 1e-6  # a norm undoes most of a gate in front of it
    # the controller starts near 1: after three layers nearly everything is still said
    fresh = init_dependencyvit(rng, replace(cfg, prune_layers=()))
    assert dependencyvit_forward(img, fresh, replace(cfg, prune_layers=()))[1].messages[-1].min() > 0.9


def total(score, parents):
    return sum(score[i, p] for i, p in enumerate(parents) if p >= 0)


@given(seeds, st.integers(2, 5), st.booleans())
def law_dependencyvit_tree_is_the_best_there_is(seed, N, ties):
    """Against every choice of parents; greedy is a tree too, and not better."""
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 4, (N, N)).astype(float) if ties else rng.standard_normal((N, N))
    root = int(rng.integers(N))
    best = -np.inf
    for parents in product(range(N), repeat=N - 1):
        parents = [*parents[:root], -1, *parents[root:]]
        at = np.arange(N)
        for _ in range(N):
            at = np.where(at >= 0, np.array(parents)[at], -1)
        if (at < 0).all():
            best = max(best, total(score, parents))
    found = {m: spanning_tree(score, root, method=m) for m in ("edmonds", "greedy")}
    for parents in found.values():
        assert parents[root] == -1
        node_depths(parents)  # raises unless it is a tree
    np.testing.assert_allclose(total(score, found["edmonds"]), best, rtol=0, atol=1e-12)
    assert total(score, found["greedy"]) <= best + 1e-12


@given(seeds, st.integers(2, 40))
def law_dependencyvit_tree_of_a_mask(seed, N):
    """N - 1 edges, one root; sizes and depths agree; cuts leave connected parts."""
    rng = np.random.default_rng(seed)
    mask = rng.random((N, N)) ** 4
    parents = dependency_tree(mask)
    root = int(np.flatnonzero(parents == -1)[0])
    off = mask - np.diag(np.diag(mask))
    assert root == (off.sum(axis=1) - off.sum(axis=0)).argmax()
    sizes, depths = subtree_sizes(parents), node_depths(parents)
    assert sizes[root] == N
    assert sizes.sum() == depths.sum() + N  # a node counts once for itself and for each above it
    assert tree_depth(parents) == depths.max()
    n_parts = int(rng.integers(1, N + 1))
    labels = cut_tree(parents, n_parts)
    assert set(labels.tolist()) == set(range(n_parts))
    assert labels[root] == 0
    inside = [i for i in range(N) if parents[i] >= 0 and labels[i] == labels[parents[i]]]
    assert len(inside) == N - n_parts  # as many edges as a forest of n_parts trees has
    assert dependency_tree(mask, root=N - 1, method="greedy")[N - 1] == -1


def law_dependencyvit_trees_by_hand():
    chain = np.array([-1, 0, 1, 2])
    assert tree_depth(chain) == 3
    assert subtree_sizes(chain).tolist() == [4, 3, 2, 1]
    assert cut_tree(chain, 2).tolist() == [0, 0, 1, 1]
    assert cut_tree(chain, 4).tolist() == [0, 2, 1, 3]
    star = np.array([1, -1, 1])
    assert tree_depth(star) == 1
    assert cut_tree(star, 2).tolist() == [1, 0, 0]
    # 0 and 1 send to each other most; the cycle opens where it loses least
    mask = np.array([[0, 9, 1], [8, 0, 0], [1, 3, 0.0]])
    assert dependency_tree(mask, root=2).tolist() == [1, 2, -1]
    assert dependency_tree(mask, root=2, method="greedy").tolist() == [1, 2, -1]


def law_dependencyvit_parameters_may_be_any_float():
    """float32 parameters are raised to float64 on the way."""
    p, x = layer(0), np.random.default_rng(0).standard_normal((1, 4, 12)).astype(np.float32)
    out = reversed_attention_layer(
        x, np.ones((1, 4)), tree_map(lambda w: w.astype(np.float32), p), num_heads=3
    )
    assert all(y.dtype == np.float64 for y in out)
