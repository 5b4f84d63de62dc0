"""Actor-critic and PPO: their sums written out, gradients, returns, bad inputs. V-MPO has laws elsewhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.policy import a2c_loss, discounted_returns, ppo_loss
from tests.slopes import slope_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)


def case(seed):
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal
    return rng, draw((2, 3, 4)), draw((2, 3, 4)), draw((2, 3)), rng.integers(0, 4, (2, 3)), draw((2, 3))


def softmax(z):
    return np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)


@given(seeds, st.sampled_from(("a2c", "ppo")), st.sampled_from((0.0, 0.1)))
def test_policy_losses_and_gradients(seed, kind, entropy):
    rng, logits, old, values, actions, returns = case(seed)
    A = returns - values

    def held(logits, values):
        pi = softmax(logits)
        own = np.take_along_axis(pi, actions[..., None], axis=-1)[..., 0]
        if kind == "a2c":
            gain = A * np.log(own)
        else:
            ratio = own / np.take_along_axis(softmax(old), actions[..., None], axis=-1)[..., 0]
            gain = np.minimum(ratio * A, np.clip(ratio, 0.8, 1.2) * A)
        H = -np.sum(pi * np.log(pi), axis=-1)
        return np.mean(-gain + 0.5 * (values - returns) ** 2 - entropy * H)

    if kind == "a2c":
        loss, grads = a2c_loss(logits, values, actions, returns, entropy=entropy)
    else:
        loss, grads = ppo_loss(logits, old, values, actions, returns, entropy=entropy)
    np.testing.assert_allclose(loss, held(logits, values), rtol=0, atol=1e3 * EPS * (1 + abs(loss)))
    way = rng.standard_normal(logits.shape), rng.standard_normal(values.shape)
    at = lambda h: held(logits + h * way[0], values + h * way[1])
    h = 1e-6
    slope, change = slope_of(at, h)
    got = np.sum(grads.logits * way[0]) + np.sum(grads.values * way[1])
    np.testing.assert_allclose(got, slope, rtol=0, atol=2 * change + 256 * EPS * (1 + abs(loss)) / h)


@given(seeds)
def test_policy_returns_are_cut_where_an_episode_ends(seed):
    rng = np.random.default_rng(seed)
    rewards, done, last = rng.standard_normal((2, 6)), rng.random((2, 6)) < 0.3, rng.standard_normal(2)
    got = discounted_returns(rewards, done, last, discount=0.9)
    for b in range(2):
        for t in range(6):
            want, weight = 0.0, 1.0
            for i in range(t, 6):
                want += weight * rewards[b, i]
                weight *= 0.9
                if done[b, i]:
                    weight = 0.0
            np.testing.assert_allclose(got[b, t], want + weight * last[b], rtol=0, atol=64 * EPS * 8)


def test_policy_rejects_bad_input():
    _, logits, old, values, actions, returns = case(0)
    with pytest.raises(ValueError, match="clip must be positive"):
        ppo_loss(logits, old, values, actions, returns, clip=0.0)
    with pytest.raises(ValueError, match=r"old_logits\.shape\[2\] = 3"):
        ppo_loss(logits, old[..., :3], values, actions, returns)
    with pytest.raises(ValueError, match=r"actions must be in 0\.\.3"):
        a2c_loss(logits, values, actions + 4, returns)
    with pytest.raises(ValueError, match=r"bootstrap\.shape\[0\] = 3"):
        discounted_returns(values, values > 0, np.zeros(3))
