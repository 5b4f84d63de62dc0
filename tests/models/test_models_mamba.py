"""Mamba's mixer: steps against the sequence, causality, gradients, counts, bad inputs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.mlp import softplus
from ref.blocks.optim import tree_leaves, tree_map
from ref.counting import Tally, count
from ref.models.mamba import (
    MambaParams,
    init_mamba,
    init_mamba_cache,
    mamba_block,
    mamba_block_vjp,
    mamba_macs,
    mamba_mixer,
    mamba_params,
    mamba_step,
)
from tests.slopes import slope_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)


def mixer(seed, C=6, T=7):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, T, C)), init_mamba(rng, C, state=3, conv=3, dt_rank=2)


@given(seeds)
def test_models_mamba_steps_are_the_sequence(seed):
    x, params = mixer(seed)
    y, cache = mamba_mixer(x, params)
    now, rows = init_mamba_cache(params, (2,)), []
    for t in range(7):
        row, now = mamba_step(x[:, t], now, params)
        rows.append(row)
    # products of one row and of seven are summed in another order: 12 terms, 4 maps behind each other
    atol = 256 * EPS * (1 + np.abs(x).max()) * (1 + np.abs(y).max())
    np.testing.assert_allclose(np.stack(rows, axis=1), y, rtol=0, atol=atol)
    for a, b in zip(now, cache, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)
    later = x.copy()
    later[:, 4:] += 1
    np.testing.assert_array_equal(mamba_block(later, params)[:, :4], y[:, :4])


@given(seeds)
def test_models_mamba_gradients_are_central_differences(seed):
    x, params = mixer(seed, C=4, T=5)
    rng = np.random.default_rng(seed)
    dy = rng.standard_normal(x.shape)
    d_x, d_p = rng.standard_normal(x.shape), tree_map(lambda p: rng.standard_normal(p.shape), params)
    dx, dparams = mamba_block_vjp(x, params, dy)
    f = lambda h: np.sum(dy * mamba_block(x + h * d_x, tree_map(lambda p, d: p + h * d, params, d_p)))
    slope, change = slope_of(f)
    parts = [np.sum(dx * d_x)] + [np.sum(g * d) for g, d in zip(dparams, d_p, strict=True)]
    # truncation seen by doubling h, and cancellation eps / h
    bound = change + 256 * EPS / 1e-5 * (1 + np.abs(dy).sum())
    np.testing.assert_allclose(sum(parts), slope, rtol=0, atol=bound)


def test_models_mamba_is_initialised_as_stated_and_counted():
    p = init_mamba(0, 32, state=4)
    assert sum(x.size for x in tree_leaves(p)) == mamba_params(32, state=4)
    assert p.w_dt.shape == (2, 64)
    np.testing.assert_allclose(np.exp(p.a_log), np.tile([1.0, 2, 3, 4], (64, 1)), rtol=4 * EPS)
    steps = softplus(p.b_dt)
    assert steps.min() >= 1e-3 * (1 - 1e-12)
    assert steps.max() <= 0.1 * (1 + 1e-12)
    tally = Tally()
    mamba_block(count(tally, np.ones((3, 32))), p)
    by_hand = 64 * (4 + 4 + 1)  # convolution, update of the state and skip are no matrix products
    assert tally.macs == 3 * (mamba_macs(32, state=4) - by_hand)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, p: mamba_block(x[..., :5], p), r"w_out.shape\[1\] = 6, but axis C is 5"),
        (lambda x, p: mamba_block(x, p._replace(w_in=p.w_in[:, :-1])), r"w_in.shape\[1\] = 23"),
        (lambda x, p: mamba_block(x, p._replace(w_x=p.w_x[:, :-1])), r"w_x.shape\[1\] = 7"),
        (lambda x, p: mamba_step(x[:, 0], init_mamba_cache(p, (3,)), p), "conv.shape"),
        (lambda x, p: mamba_block_vjp(x, p, x[:, 1:]), r"dy.shape\[1\] = 6"),
        (lambda x, p: init_mamba(0, 0), "must be at least 1"),
    ],
    ids=["width", "w_in", "w_x", "cache", "dy", "sizes"],
)
def test_models_mamba_rejects_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(*mixer(0))


def test_models_mamba_takes_no_steps_and_no_sequences():
    x, params = mixer(0)
    assert isinstance(params, MambaParams)
    assert mamba_block(x[:, :0], params).shape == (2, 0, 6)
    assert mamba_block(x[:0], params).shape == (0, 7, 6)
