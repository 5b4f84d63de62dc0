"""Optimisers: the first steps by hand, and that a quadratic is descended."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import accel.blocks.optim
from ref.blocks import optim
from ref.blocks.transformer import init_block

P = {"a": np.array([1.0, -2.0]), "b": (np.array([[3.0]]), None)}
G = {"a": np.array([0.5, 0.0]), "b": (np.array([[-4.0]]), None)}


def test_optim_first_steps_by_hand():
    state = optim.sgd_init(P)
    p, state = optim.sgd(P, G, state, lr=0.1, momentum=0.5)
    p, state = optim.sgd(p, G, state, lr=0.1, momentum=0.5)
    np.testing.assert_allclose(p["a"], [1 - 0.1 * 0.5 - 0.1 * 0.75, -2])
    p, v = optim.rmsprop(P, G, optim.rmsprop_init(P), lr=0.1, decay=0.75)
    np.testing.assert_allclose(v["b"][0], [[4.0]])
    np.testing.assert_allclose(p["b"][0], [[3 + 0.1 * 4 / 2]])
    assert p["b"][1] is None
    # Adam's first step is lr times the sign, whatever the gradient's size; the second with the same gradient
    # too
    state = optim.adam_init(P)
    for n in (1, 2):
        p, state = optim.adam(P if n == 1 else p, G, state, lr=0.1)
        np.testing.assert_allclose(p["b"][0], [[3 + 0.1 * n]], rtol=1e-8)
        np.testing.assert_allclose(p["a"], [1 - 0.1 * n, -2], rtol=1e-6)
    assert state.step == 2
    p, _ = optim.adam(P, G, optim.adam_init(P), lr=0.1, weight_decay=0.5)
    np.testing.assert_allclose(p["a"][1], -2 + 0.1 * 0.5 * 2)


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adam"])
def test_optim_descends_a_quadratic_on_any_tree(name):
    goal = init_block(np.random.default_rng(0), 2, 3, std=1.0)
    p = optim.tree_map(np.zeros_like, goal)
    state = getattr(optim, f"{name}_init")(p)
    far = lambda p: optim.global_norm(optim.tree_map(np.subtract, p, goal))
    before = far(p)
    for _ in range(300):
        p, state = getattr(optim, name)(p, optim.tree_map(np.subtract, p, goal), state, lr=0.01)
    assert type(p) is type(goal)
    assert far(p) < 0.1 * before


def test_optim_clips_by_the_norm_of_all():
    clipped = optim.clip_by_norm(G, 1.0)
    assert optim.global_norm(clipped) == pytest.approx(1.0)
    np.testing.assert_allclose(clipped["a"] / G["a"][0], [1 / np.sqrt(16.25), 0])
    np.testing.assert_array_equal(optim.clip_by_norm(G, 9.0)["a"], G["a"])
    with pytest.raises(ValueError, match="limit must be positive"):
        optim.clip_by_norm(G, 0.0)


def test_optim_warm_up_rises_and_falls_in_straight_lines():
    rates = [optim.warmup_linear(s, steps=10, warmup=0.2) for s in range(10)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert optim.warmup_linear(0, steps=1) == 1
    for bad in ({"step": 3}, {"step": -1}, {"step": 0, "warmup": 1.0}):
        with pytest.raises(ValueError, match="need 0 <= step < steps and 0 <= warmup < 1"):
            optim.warmup_linear(**bad, steps=3)


def test_optim_cosine_falls_by_half_a_wave():
    rates = [optim.cosine_decay(s, steps=4) for s in range(4)]
    np.testing.assert_allclose(rates, [1, (1 + np.sqrt(0.5)) / 2, 0.5, (1 - np.sqrt(0.5)) / 2], rtol=1e-15)
    with pytest.raises(ValueError, match="need 0 <= step < steps"):
        optim.cosine_decay(4, steps=4)


@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adam"])
def test_optim_accel_takes_the_steps_of_ref(name):
    """Three compiled steps on the same gradients: a dozen operations each, float32."""
    options = {"sgd": {"momentum": 0.5}, "rmsprop": {"decay": 0.75}, "adam": {"weight_decay": 0.1}}[name]
    ours, want = accel.blocks.optim, optim.tree_map(np.copy, P)
    step = jax.jit(lambda p, g, s, lr: getattr(ours, name)(p, g, s, lr=lr, **options))
    single = lambda t: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t)
    got = single(P)
    s_ref, s_got = getattr(optim, f"{name}_init")(P), getattr(ours, f"{name}_init")(got)
    for lr in (0.1, 0.05, 0.01):
        want, s_ref = getattr(optim, name)(want, G, s_ref, lr=lr, **options)
        got, s_got = step(got, single(G), s_got, lr)
    eps = float(np.finfo(np.float32).eps)
    for g, w in zip(jax.tree.leaves((got, s_got)), jax.tree.leaves((want, s_ref)), strict=True):
        # 1 - b2^n holds 1e-3 with the ulp of 1: a thousand ulps, halved by the root, of a step of 0.1
        np.testing.assert_allclose(g, w, rtol=64 * eps, atol=1000 * eps * 0.1)


def test_optim_accel_clips_as_ref():
    got = accel.blocks.optim.clip_by_norm(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), G), 1.0)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(optim.clip_by_norm(G, 1.0)), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-6)
    with pytest.raises(ValueError, match="limit must be positive"):
        accel.blocks.optim.clip_by_norm(G, 0.0)
