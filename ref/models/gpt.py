"""GPT-2: token and position embeddings, pre-norm causal blocks, a final norm, the head tied to the embedding.

Source: Radford et al. 2019, section 2.3; blocks as in ref/blocks/transformer.py, tanh GELU.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.losses import linear_cross_entropy, linear_cross_entropy_vjp
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
    dx, *head = gpt_head_vjp(hidden[-1], params, dlogits, eps=eps)
    return _whole_vjp(ids, params, hidden, dx, *head, num_heads=num_heads, mask=mask, eps=eps)


def gpt_loss(ids, params, *, num_heads, mask=None, eps=1e-5, ignore=None, chunk=None):
    """Mean of -log p(ids[t + 1] | ids[..t]), nats: ids int [..., T + 1].

    mask: as `gpt_forward`'s, of the first T tokens. ignore: an id of the vocabulary that is not scored as the
    next token (padding). chunk: of tokens, as `linear_cross_entropy`'s.
    Raises: ValueError for a text of one token, and as `linear_cross_entropy`.
    """
    seen, following = next_tokens(ids)
    x = gpt_blocks(gpt_embed(seen, params), params, num_heads=num_heads, mask=mask, eps=eps)[-1]
    y = layer_norm(x, params.lnf_scale, params.lnf_bias, eps=eps)
    return linear_cross_entropy(y, params.wte, following, ignore=ignore, chunk=chunk)


def gpt_loss_vjp(ids, params, dloss=1.0, *, num_heads, mask=None, eps=1e-5, ignore=None, chunk=None):
    """GPTParams of gradients of `gpt_loss`, times dloss."""
    seen, following = next_tokens(ids)
    hidden = gpt_blocks(gpt_embed(seen, params), params, num_heads=num_heads, mask=mask, eps=eps)
    y = layer_norm(hidden[-1], params.lnf_scale, params.lnf_bias, eps=eps)
    dy, dwte = linear_cross_entropy_vjp(y, params.wte, following, dloss, ignore=ignore, chunk=chunk)
    dx, dscale, dbias = layer_norm_vjp(hidden[-1], params.lnf_scale, dy, eps=eps)
    return _whole_vjp(seen, params, hidden, dx, dwte, dscale, dbias, num_heads=num_heads, mask=mask, eps=eps)


def next_tokens(ids):
    """(ids[..., :-1], ids[..., 1:]): what is read and what is told. Raises: ValueError for less than two."""
    if dims(ids=(ids, "... n"))["n"] < 2:
        raise ValueError(f"ids must hold at least two tokens a text, got shape {list(ids.shape)}")
    return ids[..., :-1], ids[..., 1:]


def _whole_vjp(ids, params, hidden, dx, dwte, dscale, dbias, *, num_heads, mask, eps):
    """Gradients of all parameters, from those of the head and that of the last hidden state."""
    dx, blocks = gpt_blocks_vjp(hidden, params, dx, num_heads=num_heads, mask=mask, eps=eps)
    dlookup, dwpe = gpt_embed_vjp(ids, params, dx)
    return GPTParams(dwte + dlookup, dwpe, blocks, dscale, dbias)


def _block(x, p, num_heads, mask, eps):
    return transformer_block(
        x, p, num_heads=num_heads, causal=True, mask=mask, eps=eps, activation="gelu_tanh"
    )
