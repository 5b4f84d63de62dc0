"""Laws of pruning on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.attention import attention_dense, join_heads
from ref.blocks.mlp import gelu
from ref.blocks.transformer import init_block, qkv, transformer_block
from ref.compression.pruning import (
    bsr_matmul,
    cubic_sparsity,
    global_magnitude_masks,
    head_importance,
    magnitude_mask,
    movement_linear,
    movement_linear_vjp,
    movement_mask,
    nm_mask,
    nm_matmul,
    nm_pack,
    obs_prune_row,
    prune_ffn,
    prune_heads,
    sparse_bytes,
    structured_mask,
)

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
levels = st.floats(0, 1)


def weights(seed, shape=(6, 8), ties=False):
    w = np.random.default_rng(seed).standard_normal(shape)
    return np.round(w) if ties else w


@given(seeds, levels, levels, st.booleans())
def law_pruning_magnitude_counts_nest_and_order(seed, s, t, ties):
    w = weights(seed, ties=ties)
    low, high = sorted((s, t))
    a, b = magnitude_mask(w, sparsity=low), magnitude_mask(w, sparsity=high)
    assert (~a).sum() == round(low * w.size)
    assert not (b & ~a).any()  # nested: what survives more pruning survives less
    if a.any() and not a.all():
        assert np.abs(w[a]).min() >= np.abs(w[~a]).max()
    np.testing.assert_array_equal(magnitude_mask(w * a, sparsity=low), a)  # idempotent
    assert magnitude_mask(w, sparsity=0.0).all()
    assert not magnitude_mask(w, sparsity=1.0).any()
    np.testing.assert_array_equal(global_magnitude_masks((w,), sparsity=low)[0], a)


@given(seeds, levels)
def law_pruning_global_has_one_threshold(seed, s):
    ws = (weights(seed), 3 * weights(seed + 1, (4, 5)))
    masks = global_magnitude_masks(ws, sparsity=s)
    kept = np.concatenate([np.abs(w)[m] for w, m in zip(ws, masks, strict=True)])
    gone = np.concatenate([np.abs(w)[~m] for w, m in zip(ws, masks, strict=True)])
    assert len(gone) == round(s * 68)
    assert kept.min(initial=np.inf) >= gone.max(initial=0)


@given(seeds, levels, st.sampled_from((0, 1, -1)), st.sampled_from((1, 2)))
def law_pruning_structured_removes_whole_slices(seed, s, axis, order):
    w = weights(seed)
    mask = np.moveaxis(structured_mask(w, sparsity=s, axis=axis, order=order), axis, 0)
    norms = (np.abs(np.moveaxis(w, axis, 0)) ** order).sum(axis=1)
    kept = mask[:, 0]
    assert (mask == kept[:, None]).all()
    assert (~kept).sum() == round(s * len(kept))
    assert norms[kept].min(initial=np.inf) >= norms[~kept].max(initial=0)


@given(seeds, st.sampled_from(((1, 4), (2, 4), (4, 4), (3, 8))), st.booleans())
def law_pruning_n_of_m_packs_and_multiplies(seed, nm, ties):
    n, m = nm
    w = weights(seed, ties=ties)
    mask = nm_mask(w, n=n, m=m)
    groups, magnitude = mask.reshape(6, -1, m), np.abs(w).reshape(6, -1, m)
    assert (groups.sum(-1) == n).all()
    for g, a in zip(groups.reshape(-1, m), magnitude.reshape(-1, m), strict=True):
        assert a[g].min() >= a[~g].max(initial=0)
    values, indices = nm_pack(w, mask, n=n, m=m)
    assert values.shape == indices.shape == (6, 8 * n // m)
    x = weights(seed + 1, (3, 8))
    want = np.stack([[sum(r * c) for c in w * mask] for r in x])
    got = nm_matmul(x, values, indices, n=n, m=m, in_features=8)
    np.testing.assert_allclose(got, want, rtol=0, atol=32 * EPS * np.abs(want).max(initial=1))


@given(seeds, st.one_of(st.tuples(st.just("keep"), levels), st.tuples(st.just("threshold"), levels)))
def law_pruning_movement_is_straight_through(seed, form):
    options = dict([form])
    x, w, s, g = (weights(seed + i, shape) for i, shape in enumerate(((5, 8), (6, 8), (6, 8), (5, 6))))
    mask = movement_mask(s, **options)
    if "keep" in options:
        assert mask.sum() == int(options["keep"] * s.size)
        assert s[mask].min(initial=np.inf) >= s[~mask].max(initial=-np.inf)
    np.testing.assert_allclose(movement_linear(x, w, s, **options), x @ (w * mask).T, rtol=0, atol=1e-13)
    dx, dw, ds = movement_linear_vjp(x, w, s, g, **options)
    dense = np.einsum("to,ti->oi", g, x)
    bound = 64 * EPS * np.abs(dense).max()
    np.testing.assert_allclose(dx, np.einsum("to,oi->ti", g, w * mask), rtol=0, atol=bound * 8)
    np.testing.assert_allclose(ds, dense * w, rtol=0, atol=bound * np.abs(w).max())
    np.testing.assert_allclose(dw, np.where(mask, dense, 0), rtol=0, atol=bound)


def block(seed):
    return init_block(np.random.default_rng(seed), 8, 12, std=0.5)._replace(
        b_q=weights(seed, (8,)), b_fc1=weights(seed, (12,))
    )


@given(seeds, st.sampled_from(((True, False), (False, True), (True, True))))
def law_pruning_removed_heads_are_masked_heads(seed, keep):
    """The smaller block on fewer heads equals the full one whose dropped heads are silenced in w_o."""
    params, x = block(seed), weights(seed, (5, 8))
    small = prune_heads(params, keep)
    silent = params._replace(w_o=params.w_o * np.repeat(keep, 4)[:, None])
    got = transformer_block(x, small, num_heads=sum(keep))
    np.testing.assert_allclose(got, transformer_block(x, silent, num_heads=2), rtol=0, atol=1e-12)


@given(seeds)
def law_pruning_removed_neurons_are_masked_neurons(seed):
    params, x = block(seed), weights(seed, (5, 8))
    keep = np.random.default_rng(seed).random(12) < 0.5
    silent = params._replace(w_fc2=params.w_fc2 * keep[:, None])
    got = transformer_block(x, prune_ffn(params, keep), num_heads=2)
    np.testing.assert_allclose(got, transformer_block(x, silent, num_heads=2), rtol=0, atol=1e-12)


@given(seeds)
def law_pruning_head_importance_is_the_slope_of_a_mask(seed):
    """|dL/dm_h| at m = 1 by central differences, L = sum(c * o) of each example; averaged, normalised."""
    params, x = block(seed), weights(seed, (3, 5, 8))
    c = weights(seed + 1, (3, 5, 8))
    heads = attention_dense(*qkv(x, params, num_heads=2))
    loss = lambda m: (c * (join_heads(heads * m[:, None, None]) @ params.w_o)).sum(axis=(1, 2))
    slopes = []
    for h in range(2):
        e = 1e-6 * np.eye(2)[h]
        slopes.append(np.abs((loss(1 + e) - loss(1 - e)) / 2e-6).mean())
    grad = (c @ params.w_o.T).reshape(3, 5, 2, 4).swapaxes(1, 2)
    want = np.array(slopes) / np.linalg.norm(slopes)
    # linear in m: only cancellation, eps |L| / h
    np.testing.assert_allclose(head_importance(heads, grad), want, rtol=0, atol=1e-7)


@given(st.floats(0, 1), st.floats(0, 1))
def law_pruning_schedule_is_monotone_with_exact_ends(initial, final):
    steps = [cubic_sparsity(t, start=10, end=50, initial=initial, final=final) for t in range(0, 70, 5)]
    assert steps[0] == steps[2] == initial
    assert steps[10] == steps[-1] == final
    d = np.diff(steps) * np.sign(final - initial)
    assert (d >= -4 * EPS).all()


@given(seeds, st.integers(0, 6))
def law_pruning_second_order_beats_plain_zeroing(seed, count):
    """For the same pruned set, the compensated row has the least squared error on the layer's inputs."""
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((20, 6)), rng.standard_normal(6)
    h = x.T @ x
    new, kept = obs_prune_row(w, np.linalg.inv(h), count=count)
    assert (~kept).sum() == count
    assert not new[~kept].any()
    error = lambda v: np.sum((x @ (v - w)) ** 2)
    assert error(new) <= error(w * kept) * (1 + 1e-9) + 1e-12
    # the optimum for that set, by least squares
    best = np.zeros(6)
    if kept.any():
        best[kept] = np.linalg.lstsq(x[:, kept], x @ w, rcond=None)[0]
    np.testing.assert_allclose(new, best, rtol=0, atol=1e-9 * np.linalg.cond(h))


@given(seeds)
def law_pruning_blocks_multiply_as_the_dense_matrix(seed):
    rng = np.random.default_rng(seed)
    x, blocks = rng.standard_normal((2, 3, 8)), rng.standard_normal((3, 2, 4))
    rows, cols = np.array([0, 2, 2]), np.array([1, 0, 1])
    w = np.zeros((6, 8))
    for b, i, j in zip(blocks, rows, cols, strict=True):
        w[2 * i : 2 * i + 2, 4 * j : 4 * j + 4] += b
    np.testing.assert_allclose(bsr_matmul(x, blocks, rows, cols, shape=(6, 8)), x @ w.T, rtol=0, atol=1e-13)
    w *= rng.random(w.shape) < 0.3  # unstructured: blocks of one entry
    rows, cols = np.nonzero(w)
    got = bsr_matmul(x, w[rows, cols][:, None, None], rows, cols, shape=(6, 8))
    np.testing.assert_allclose(got, x @ w.T, rtol=0, atol=1e-13)


def law_pruning_bytes_are_those_of_the_arrays():
    w = weights(0, (64, 64)).astype(np.float16)
    values, indices = nm_pack(w, nm_mask(w))
    assert (
        sparse_bytes((64, 64), kind="nm", sparsity=0.5, itemsize=2) == values.nbytes + indices.size * 2 // 8
    )
    assert sparse_bytes((64, 64), kind="dense", sparsity=0.9, itemsize=2) == w.nbytes
    mask = magnitude_mask(w, sparsity=0.9)
    assert (
        sparse_bytes((64, 64), kind="bitmap", sparsity=0.9, itemsize=2)
        == w[mask].nbytes + np.packbits(mask).nbytes
    )
    assert sparse_bytes((64, 64), kind="csr", sparsity=0.9, itemsize=2) == 6 * mask.sum() + 4 * 65
    assert sparse_bytes((64, 64), kind="bsr", sparsity=0.5, itemsize=2) == 2 * (32 * 32 * 2 + 4) + 4 * 3
    assert gelu(0.0) == 0.0  # a pruned neuron with zero bias is silent
