"""GPT-2: token and position embeddings, pre-norm causal blocks, a final norm, the head tied to the embedding.

Source: Radford et al. 2019, section 2.3; blocks as in ref/blocks/transformer.py, tanh GELU.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.transformer import BlockParams, init_block, transformer_block, transformer_block_vjp
from ref.checks import check_ids
from ref.dims import dims, float64


class GPTParams(NamedTuple):
    """wte [V, d] (embedding and tied head), wpe [n, d], blocks, lnf_scale and lnf_bias [d]."""

    wte: np.ndarray
    wpe: np.ndarray
    blocks: tuple[BlockParams, ...]
    lnf_scale: np.ndarray
    lnf_bias: np.ndarray


def init_gpt(rng, *, vocab, context, dim, depth, hidden=None, std=0.02):
    """GPTParams drawn by a NumPy Generator: normal weights (std), zero biases, unit norms.

    hidden: of the MLPs, 4 dim if None.
    """
    return GPTParams(
        wte=std * rng.standard_normal((vocab, dim)),
        wpe=std * rng.standard_normal((context, dim)),
        blocks=tuple(init_block(rng, dim, hidden or 4 * dim, std=std) for _ in range(depth)),
        lnf_scale=np.ones(dim),
        lnf_bias=np.zeros(dim),
    )


def gpt_embed(ids, params, *, position=0):
    """wte[ids] + wpe[position:]: ids [..., T] int -> [..., T, d].

    Raises: ValueError for an id outside the vocabulary or a text longer than the context.
    """
    T = dims(ids=(ids, "... T"))["T"]
    ids = check_ids("ids", ids, len(params.wte))
    if position + T > len(params.wpe):
        raise ValueError(f"position + T = {position + T} exceeds the context of {len(params.wpe)}")
    return float64(params.wte)[ids] + params.wpe[position : position + T]


def gpt_embed_vjp(ids, params, dx):
    """(dwte, dwpe) of `gpt_embed` at position 0 for dx [..., T, d]; tokens that occur twice add up."""
    dwte, dwpe = np.zeros(np.shape(params.wte)), np.zeros(np.shape(params.wpe))
    np.add.at(dwte, np.asarray(ids), dx)
    dwpe[: dx.shape[-2]] = dx.reshape(-1, *dx.shape[-2:]).sum(axis=0)
    return dwte, dwpe


def gpt_blocks(x, params, *, num_heads, mask=None, eps=1e-5):
    """All blocks in order, causal: x [..., T, d] -> L + 1 arrays, hidden before each block and at the end."""
    hidden = [x]
    for p in params.blocks:
        hidden.append(_block(hidden[-1], p, num_heads, mask, eps))
    return hidden


def gpt_head(x, params, *, eps=1e-5):
    """Logits [..., T, V] of hidden states: the final norm, then the embedding transposed."""
    return layer_norm(x, params.lnf_scale, params.lnf_bias, eps=eps) @ params.wte.T


def gpt_forward(ids, params, *, num_heads, mask=None, eps=1e-5):
    """Logits [..., T, V] of ids [..., T]; mask: bool, True = visible, on top of causality."""
    return gpt_head(
        gpt_blocks(gpt_embed(ids, params), params, num_heads=num_heads, mask=mask, eps=eps)[-1],
        params,
        eps=eps,
    )


def gpt_head_vjp(x, params, dlogits, *, eps=1e-5):
    """(dx, dwte, dlnf_scale, dlnf_bias) of `gpt_head`."""
    y = layer_norm(x, params.lnf_scale, params.lnf_bias, eps=eps)
    dwte = dlogits.reshape(-1, dlogits.shape[-1]).T @ y.reshape(-1, y.shape[-1])
    dx, dscale, dbias = layer_norm_vjp(x, params.lnf_scale, dlogits @ params.wte, eps=eps)
    return dx, dwte, dscale, dbias


def gpt_blocks_vjp(hidden, params, dy, *, num_heads, mask=None, eps=1e-5):
    """(dx, tuple of BlockParams) of `gpt_blocks`, from the hidden states it returned."""
    grads = []
    for x, p in zip(hidden[-2::-1], params.blocks[::-1], strict=True):
        dy, g = transformer_block_vjp(
            x, p, dy, num_heads=num_heads, causal=True, mask=mask, eps=eps, activation="gelu_tanh"
        )
        grads.append(g)
    return dy, tuple(grads[::-1])


def gpt_forward_vjp(ids, params, dlogits, *, num_heads, mask=None, eps=1e-5):
    """GPTParams of gradients of `gpt_forward` for the cotangent dlogits [..., T, V]."""
    hidden = gpt_blocks(gpt_embed(ids, params), params, num_heads=num_heads, mask=mask, eps=eps)
    dx, dwte, dscale, dbias = gpt_head_vjp(hidden[-1], params, dlogits, eps=eps)
    dx, blocks = gpt_blocks_vjp(hidden, params, dx, num_heads=num_heads, mask=mask, eps=eps)
    dlookup, dwpe = gpt_embed_vjp(ids, params, dx)
    return GPTParams(dwte + dlookup, dwpe, blocks, dscale, dbias)


def _block(x, p, num_heads, mask, eps):
    return transformer_block(
        x, p, num_heads=num_heads, causal=True, mask=mask, eps=eps, activation="gelu_tanh"
    )
