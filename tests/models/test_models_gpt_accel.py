"""GPT-2 in accel against ref: blocks in a tuple or stacked, with any attention of the house."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from accel.attention.drop_in import dot_product_attention
from accel.attention.flash import flash_attention
from accel.blocks.attention import attention_dense, rows_first
from accel.models import gpt
from ref.models.gpt import gpt_forward, gpt_loss, gpt_loss_vjp, init_gpt

EPS = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("stacked", [False, True], ids=["tuple", "stacked"])
@pytest.mark.parametrize(
    "attention",
    [attention_dense, flash_attention, rows_first(dot_product_attention)],
    ids=["dense", "tiled", "rows"],
)
def test_models_gpt_accel_matches_ref(stacked, attention):
    """Two layers: some ten products and norms of width 8, each within a few roundings of logits near 1."""
    params = init_gpt(np.random.default_rng(0), vocab=11, context=6, dim=8, depth=2, std=0.3)
    ids = np.random.default_rng(1).integers(0, 11, (2, 5))
    device = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    device = gpt.stack_blocks(device) if stacked else device
    got = jax.jit(lambda p, i: gpt.gpt_forward(i, p, num_heads=2, attention=attention))(device, ids)
    want = gpt_forward(ids, params, num_heads=2)
    np.testing.assert_allclose(got, want, rtol=0, atol=256 * EPS * np.abs(want).max())


@pytest.mark.parametrize(("stacked", "unroll"), [(False, 1), (True, 1), (True, True)])
def test_models_gpt_accel_loss_matches_ref(stacked, unroll):
    """Value and gradients, norms and activations computed twice: two layers of the same products and norms,
    each gradient a sum over ten tokens.
    """
    params = init_gpt(np.random.default_rng(0), vocab=11, context=6, dim=8, depth=2, std=0.3)
    ids = np.random.default_rng(1).integers(0, 11, (2, 6))
    device = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    device = gpt.stack_blocks(device) if stacked else device
    options = {"num_heads": 2, "ignore": 3, "chunk": 4}
    loss = lambda p: gpt.gpt_loss(ids, p, unroll=unroll, **options)
    value, grads = jax.jit(jax.value_and_grad(loss))(device)
    # a loss near 2.4 is off by what logits are, as above; gradients pass the layers twice, so four times that
    np.testing.assert_allclose(value, gpt_loss(ids, params, **options), rtol=0, atol=256 * EPS)
    wants = gpt_loss_vjp(ids, params, **options)
    wants = gpt.stack_blocks(wants) if stacked else wants
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wants), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1024 * EPS)


def test_models_gpt_accel_says_what_is_wrong():
    params = init_gpt(np.random.default_rng(0), vocab=11, context=6, dim=8, depth=1)
    with pytest.raises(ValueError, match="exceeds the context of 6"):
        gpt.gpt_embed(np.zeros(7, np.int32), params)
    device = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    assert np.isnan(gpt.gpt_embed(jnp.array([11]), device)).all()
    with pytest.raises(ValueError, match="ids must hold at least two tokens"):
        gpt.gpt_loss(jnp.zeros((2, 1), jnp.int32), device, num_heads=2)
