"""GPT-2 in JAX, in the dtype of its parameters; they are ref's `GPTParams`, a pytree; see ref/models/gpt.py.

`stack_blocks` turns the tuple of blocks into one block with a leading axis, which all functions take too: one
compiled block is then scanned over the layers.
"""

import jax
import jax.numpy as jnp

from accel.blocks.attention import attention_dense
from accel.blocks.losses import linear_cross_entropy
from accel.blocks.norms import layer_norm
from accel.blocks.shapes import lift
from accel.blocks.softmax import wide
from accel.blocks.transformer import BlockParams, transformer_block
from ref.dims import dims
from ref.models.gpt import GPTParams, init_gpt, next_tokens

__all__ = [
    "GPTParams",
    "gpt_blocks",
    "gpt_embed",
    "gpt_forward",
    "gpt_head",
    "gpt_loss",
    "init_gpt",
    "stack_blocks",
]


def stack_blocks(params: GPTParams) -> GPTParams:
    """The same parameters with `blocks` one BlockParams whose arrays have a leading axis of layers."""
    return params._replace(blocks=jax.tree.map(lambda *x: jnp.stack(x), *params.blocks))


def gpt_embed(ids, params: GPTParams, *, position=0):
    """wte[ids] + wpe[position:]: ids [..., T] int -> [..., T, d]; an id outside the vocabulary gives NaN."""
    T = dims(ids=(ids, "... T"))["T"]
    if position + T > len(params.wpe):
        raise ValueError(f"position + T = {position + T} exceeds the context of {len(params.wpe)}")
    x = params.wte.at[ids].get(mode="fill", fill_value=jnp.nan)
    return x + lift(params.wpe[position : position + T], x.ndim)


def gpt_blocks(
    x,
    params: GPTParams,
    *,
    num_heads,
    mask=None,
    causal=True,
    eps=1e-5,
    attention=attention_dense,
    unroll=1,
):
    """The last hidden state of all blocks: x [..., T, d] -> [..., T, d].

    unroll: of the loop over stacked blocks, as `jax.lax.scan` takes it. True compiles longer, and takes a
    fifth less time to train on a GPU, which then copies nothing into the stacks and out of them.
    """
    block = lambda h, p: transformer_block(
        h,
        p,
        num_heads=num_heads,
        mask=mask,
        causal=causal,
        eps=eps,
        activation="gelu_tanh",
        attention=attention,
        remat=True,
    )
    if isinstance(params.blocks, BlockParams):
        return jax.lax.scan(lambda h, p: (block(h, p), None), x, params.blocks, unroll=unroll)[0]
    for p in params.blocks:
        x = block(x, p)
    return x


def gpt_head(x, params: GPTParams, *, eps=1e-5):
    """Logits [..., T, V], at least float32: the final norm, then the embedding transposed."""
    y = layer_norm(x, params.lnf_scale, params.lnf_bias, eps=eps)
    return jnp.matmul(y, params.wte.T.astype(y.dtype), preferred_element_type=wide(y.dtype))


def gpt_forward(ids, params: GPTParams, *, num_heads, mask=None, eps=1e-5, attention=attention_dense):
    """Logits [..., T, V] of ids [..., T]; mask: bool, True = visible, on top of causality."""
    x = gpt_embed(ids, params)
    return gpt_head(
        gpt_blocks(x, params, num_heads=num_heads, mask=mask, eps=eps, attention=attention), params, eps=eps
    )


def gpt_loss(
    ids,
    params: GPTParams,
    *,
    num_heads,
    mask=None,
    eps=1e-5,
    ignore=None,
    chunk=None,
    attention=attention_dense,
    unroll=1,
):
    """Mean of -log p(ids[t + 1] | ids[..t]), nats: ids int [..., T + 1]; as ref, mask is of the first T.

    Logits are made by chunks of tokens, see `linear_cross_entropy`: differentiable in reverse mode alone. An
    id outside the vocabulary, and a batch in which all is ignored, give NaN.
    """
    seen, following = next_tokens(ids)
    x = gpt_embed(seen, params)
    x = gpt_blocks(x, params, num_heads=num_heads, mask=mask, eps=eps, attention=attention, unroll=unroll)
    y = layer_norm(x, params.lnf_scale, params.lnf_bias, eps=eps)
    return linear_cross_entropy(y, params.wte, following, ignore=ignore, chunk=chunk)
