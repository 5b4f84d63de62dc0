"""Recipes of docs/start/recipes.md: accel inside other people's libraries. A test trains each of them."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import accel

# --8<-- [start:task]
VOCABULARY, LENGTH, WIDTH, HEADS = 10, 8, 16, 2


def batch(key, size=32):
    """Tokens [size, LENGTH] and what to say at the end: the first token. Attention has to fetch it."""
    tokens = jax.random.randint(key, (size, LENGTH), 0, VOCABULARY)
    return tokens, tokens[:, 0]


def heads(x):
    """[B, T, WIDTH] -> [B, T, N, H], the layout of jax.nn and of `accel.dot_product_attention`."""
    return x.reshape(*x.shape[:-1], HEADS, WIDTH // HEADS)
    # --8<-- [end:task]


# --8<-- [start:optax]
def init(key):
    shapes = {"embed": (VOCABULARY, WIDTH), "position": (LENGTH, WIDTH), "qkv": (WIDTH, 3 * WIDTH)}
    shapes["out"] = (WIDTH, VOCABULARY)
    keys = jax.random.split(key, len(shapes))
    return {n: jax.random.normal(k, s) * s[0] ** -0.5 for (n, s), k in zip(shapes.items(), keys, strict=True)}


def logits(params, tokens):
    x = params["embed"][tokens] + params["position"][None]
    q, k, v = (heads(y) for y in jnp.split(x @ params["qkv"], 3, axis=-1))
    y = accel.dot_product_attention(q, k, v, is_causal=True)  # what jax.nn's takes, and its gradients
    return y[:, -1].reshape(len(tokens), WIDTH) @ params["out"]


def loss(params, tokens, answer):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, tokens), answer).mean()


def train(key, steps=150):
    """(parameters, losses) after Adam on fresh batches."""
    params = init(key)
    optimiser = optax.adam(1e-2)
    state = optimiser.init(params)

    @jax.jit
    def step(params, state, key):
        value, grads = jax.value_and_grad(loss)(params, *batch(key))
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for k in jax.random.split(key, steps):
        params, state, value = step(params, state, k)
        losses.append(float(value))
    return params, losses
    # --8<-- [end:optax]


# --8<-- [start:freeze]
def freeze(params, trained=("out",)):
    """An optimiser that moves the named parameters alone: Adam there, nothing elsewhere."""
    labels = {name: "train" if name in trained else "freeze" for name in params}
    return optax.multi_transform({"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, labels)
    # --8<-- [end:freeze]


# --8<-- [start:linen]
class Linen(nn.Module):
    """The same model in Flax (linen)."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        x = x + self.param("position", nn.initializers.normal(0.3), (LENGTH, WIDTH))[None]
        q, k, v = (heads(nn.Dense(WIDTH, use_bias=False, name=n)(x)) for n in "qkv")
        y = accel.dot_product_attention(q, k, v, is_causal=True)
        return nn.Dense(VOCABULARY)(y[:, -1].reshape(len(tokens), WIDTH))
        # --8<-- [end:linen]


# --8<-- [start:attention_fn]
def attention_fn(query, key, value, bias=None, mask=None, **_):
    """For `attention_fn=` of Flax's own attention layers (no dropout); their masks may be numbers."""
    mask = None if mask is None else mask.astype(bool)
    return accel.dot_product_attention(query, key, value, bias=bias, mask=mask)
    # --8<-- [end:attention_fn]


# --8<-- [start:nnx]
class Nnx(nnx.Module):
    """The same model in Flax (nnx)."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.position = nnx.Param(0.3 * jax.random.normal(rngs.params(), (LENGTH, WIDTH)))
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position[...][None]
        q, k, v = (heads(y) for y in jnp.split(self.qkv(x), 3, axis=-1))
        y = accel.dot_product_attention(q, k, v, is_causal=True)
        return self.out(y[:, -1].reshape(len(tokens), WIDTH))
        # --8<-- [end:nnx]


# --8<-- [start:equinox]
class Equinox(eqx.Module):
    """The same model in Equinox, written for one sequence; `jax.vmap` makes a batch of it."""

    embed: eqx.nn.Embedding
    position: jax.Array
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, key):
        a, b, c, d = jax.random.split(key, 4)
        self.embed = eqx.nn.Embedding(VOCABULARY, WIDTH, key=a)
        self.position = 0.3 * jax.random.normal(b, (LENGTH, WIDTH))
        self.qkv = eqx.nn.Linear(WIDTH, 3 * WIDTH, use_bias=False, key=c)
        self.out = eqx.nn.Linear(WIDTH, VOCABULARY, key=d)

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens) + self.position
        q, k, v = jnp.split(jax.vmap(self.qkv)(x), 3, axis=-1)
        front = lambda y: jnp.swapaxes(heads(y), 0, 1)  # [T, H * D] -> [H, T, D], this book's layout
        y = accel.flash.flash_attention(front(q), front(k), front(v), causal=True)
        return self.out(y[:, -1].reshape(WIDTH))


@eqx.filter_jit
def equinox_step(model, state, optimiser, tokens, answer):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(tokens), answer).mean()

    value, grads = eqx.filter_value_and_grad(loss)(model)
    updates, state = optimiser.update(grads, state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), state, value
    # --8<-- [end:equinox]


# --8<-- [start:moving]
def moving(params, trained=("out",)):
    """(numbers that `freeze` lets move, all numbers)."""
    size = {name: x.size for name, x in params.items()}
    return sum(size[name] for name in trained), sum(size.values())
    # --8<-- [end:moving]
