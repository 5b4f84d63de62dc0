"""The recipes run: they learn, they equal what they stand for, and they can be priced."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import hw
from tests.docs import recipes

CHANCE = float(np.log(recipes.VOCABULARY))  # nats of a guess among ten
KEY = jax.random.key(0)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@pytest.fixture(autouse=True)
def _usual_promotion():
    """Other libraries rely on JAX's defaults, which this suite makes stricter."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def trained():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return recipes.train(KEY)


def test_recipes_optax_learns_to_fetch(trained):
    _, losses = trained
    assert losses[0] > 0.8 * CHANCE
    assert np.mean(losses[-10:]) < 0.2 * CHANCE


def test_recipes_optax_gradients_are_those_of_dense_attention(trained):
    """Eight keys, float32, gradients below 1: some hundred roundings."""
    params, _ = trained
    data = recipes.batch(jax.random.key(1))
    grads = jax.jit(jax.grad(recipes.loss))(params, *data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes.accel, "dot_product_attention", jax.nn.dot_product_attention)
        want = jax.jit(jax.grad(lambda *x: recipes.loss(*x)))(params, *data)  # traced anew
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=100 * 2.0**-23 * (1 + np.abs(w).max()))


def test_recipes_optax_freezes(trained):
    params, _ = trained
    optimiser = recipes.freeze(params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimiser.update(grads, optimiser.init(params), params)
    moved = {name for name, u in updates.items() if np.any(u)}
    assert moved == {"out"}
    assert recipes.moving(params) == (160, 1216)


def losses_of(step, model, state, steps=40):
    values = []
    for key in jax.random.split(KEY, steps):
        model, state, value = step(model, state, *recipes.batch(key))
        values.append(float(value))
    return values


def test_recipes_flax_linen_trains():
    model, optimiser = recipes.Linen(), optax.adam(1e-2)
    params = model.init(KEY, recipes.batch(KEY)[0])

    @jax.jit
    def step(params, state, tokens, answer):
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(
            model.apply(p, tokens), answer
        ).mean()
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    values = losses_of(step, params, optimiser.init(params))
    assert np.mean(values[-10:]) < 0.8 * CHANCE < values[0]


def test_recipes_flax_layer_takes_our_attention():
    """Its own layer with our function, against the same layer with its own."""
    x = jax.random.normal(KEY, (2, recipes.LENGTH, recipes.WIDTH))
    mask = nn.make_causal_mask(x[..., 0])
    layer = lambda **f: nn.MultiHeadDotProductAttention(num_heads=recipes.HEADS, **f)
    params = layer().init(KEY, x, x, mask=mask)
    got = layer(attention_fn=recipes.attention_fn).apply(params, x, x, mask=mask)
    want = layer().apply(params, x, x, mask=mask)
    np.testing.assert_allclose(got, want, rtol=0, atol=100 * 2.0**-23 * (1 + np.abs(want).max()))


def test_recipes_flax_nnx_trains():
    model = recipes.Nnx(nnx.Rngs(0))
    optimiser = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimiser, tokens, answer):
        loss = lambda m: cross_entropy(m(tokens), answer).mean()
        value, grads = nnx.value_and_grad(loss)(model)
        optimiser.update(model, grads)
        return value

    values = [float(step(model, optimiser, *recipes.batch(k))) for k in jax.random.split(KEY, 40)]
    assert np.mean(values[-10:]) < 0.8 * CHANCE < values[0]


def test_recipes_equinox_trains():
    model, optimiser = recipes.Equinox(KEY), optax.adam(1e-2)
    state = optimiser.init(eqx.filter(model, eqx.is_array))
    step = lambda model, state, *data: recipes.equinox_step(model, state, optimiser, *data)
    values = losses_of(step, model, state)
    assert np.mean(values[-10:]) < 0.8 * CHANCE < values[0]


def test_recipes_models_can_be_priced():
    model, tokens = recipes.Linen(), recipes.batch(KEY)[0]
    params = model.init(KEY, tokens)
    program = hw.trace(model.apply, params, tokens, weights=("variables",))
    B, T, W = len(tokens), recipes.LENGTH, recipes.WIDTH
    projections, attention, readout = B * T * W * 3 * W, B * T * T * 2 * W, B * W * recipes.VOCABULARY
    assert hw.count(program).macs >= projections + attention + readout
    assert hw.estimate(program, hw.h200()).seconds > 0
