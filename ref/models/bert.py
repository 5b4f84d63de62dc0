"""BERT: token, position and segment embeddings, post-norm blocks that see both ways, an optional pooler.

Source: Devlin et al. 2019, section 3; blocks as in ref/blocks/transformer.py with norm="post" and the exact
  GELU.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.mlp import linear, linear_vjp
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.transformer import BlockParams, init_block, transformer_block, transformer_block_vjp
from ref.checks import check_ids
from ref.dims import dims, float64


class BertParams(NamedTuple):
    """word [V, d], position [n, d], token_type [types, d], ln_scale and ln_bias [d], the blocks, a pooler.

    w_pool [d, d] and b_pool [d], or None for an encoder without one.
    """

    word: np.ndarray
    position: np.ndarray
    token_type: np.ndarray
    ln_scale: np.ndarray
    ln_bias: np.ndarray
    blocks: tuple[BlockParams, ...]
    w_pool: np.ndarray | None = None
    b_pool: np.ndarray | None = None


def init_bert(rng, *, vocab, context, dim, depth, hidden=None, types=2, pooler=True, std=0.02):
    """BertParams drawn by a NumPy Generator: normal weights (std), zero biases, unit norms.

    hidden: of the MLPs, 4 dim if None. types: segments. pooler: False leaves it out.
    """
    w = lambda *shape: std * rng.standard_normal(shape)
    return BertParams(
        word=w(vocab, dim),
        position=w(context, dim),
        token_type=w(types, dim),
        ln_scale=np.ones(dim),
        ln_bias=np.zeros(dim),
        blocks=tuple(init_block(rng, dim, hidden or 4 * dim, std=std) for _ in range(depth)),
        w_pool=w(dim, dim) if pooler else None,
        b_pool=np.zeros(dim) if pooler else None,
    )


def bert_embed(ids, params, *, types=None, positions=None, eps=1e-12):
    """ln(word[ids] + position[positions] + token_type[types]): [..., T, d].

    ids, types, positions [..., T] int. types None: all 0; positions None: 0..T-1.
    Raises: ValueError for an entry outside its table, or a text longer than the table of positions.
    """
    total = _embedding_sum(ids, params, types, positions)
    return layer_norm(total, params.ln_scale, params.ln_bias, eps=eps)


def bert_encode(ids, params, *, num_heads, token_mask=None, types=None, eps=1e-12):
    """Hidden states [..., T, d] after the last block. token_mask: bool [..., T], True = real token."""
    return bert_hidden(ids, params, num_heads=num_heads, token_mask=token_mask, types=types, eps=eps)[-1]


def bert_hidden(ids, params, *, num_heads, token_mask=None, types=None, eps=1e-12):
    """The embedding output and the output of every block: a list of L + 1 arrays [..., T, d]."""
    hidden = [bert_embed(ids, params, types=types, eps=eps)]
    for p in params.blocks:
        hidden.append(
            transformer_block(
                hidden[-1], p, num_heads=num_heads, norm="post", mask=key_mask(token_mask), eps=eps
            )
        )
    return hidden


def bert_pool(x, params):
    """tanh(x_0 w_pool + b_pool) of the first token: x [..., T, d] -> [..., d]."""
    return np.tanh(linear(x[..., 0, :], params.w_pool, params.b_pool))


def bert_encode_vjp(ids, params, dy, *, num_heads, token_mask=None, types=None, eps=1e-12):
    """BertParams of gradients of `bert_encode` for dy [..., T, d].

    The pooler's are None: see `bert_pool_vjp`.
    """
    hidden = bert_hidden(ids, params, num_heads=num_heads, token_mask=token_mask, types=types, eps=eps)
    grads = []
    for x, p in zip(hidden[-2::-1], params.blocks[::-1], strict=True):
        dy, g = transformer_block_vjp(
            x, p, dy, num_heads=num_heads, norm="post", mask=key_mask(token_mask), eps=eps
        )
        grads.append(g)
    total = _embedding_sum(ids, params, types)
    dx, dscale, dbias = layer_norm_vjp(total, params.ln_scale, dy, eps=eps)
    tables = params.word, params.position, params.token_type
    dword, dposition, dtype = (np.zeros(np.shape(t)) for t in tables)
    np.add.at(dword, np.asarray(ids), dx)
    np.add.at(dtype, np.zeros_like(ids) if types is None else np.asarray(types), dx)
    dposition[: dx.shape[-2]] = dx.reshape(-1, *dx.shape[-2:]).sum(axis=0)
    return BertParams(dword, dposition, dtype, dscale, dbias, tuple(grads[::-1]))


def bert_pool_vjp(x, params, dpooled):
    """(dx, dw_pool, db_pool) of `bert_pool` for dpooled [..., d]."""
    pooled = bert_pool(x, params)
    d0, dw, db = linear_vjp(
        x[..., 0, :], params.w_pool, dpooled * (1 - pooled**2), bias=params.b_pool is not None
    )
    dx = np.zeros_like(x)
    dx[..., 0, :] = d0
    return dx, dw, db


def key_mask(token_mask):
    """[..., T] -> [..., 1, 1, T]: every query of every head sees the real tokens; None stays None."""
    return None if token_mask is None else np.asarray(token_mask, bool)[..., None, None, :]


def _embedding_sum(ids, params, types, positions=None):
    T = dims(ids=(ids, "... T"))["T"]
    if positions is None and T > len(params.position):
        raise ValueError(f"ids has T={T} tokens, more than the {len(params.position)} positions of the table")
    check_ids("ids", ids, len(params.word))
    types = np.zeros_like(ids) if types is None else types
    check_ids("types", types, len(params.token_type))
    positions = np.arange(T) if positions is None else positions
    check_ids("positions", positions, len(params.position))
    word, position, kind = (np.asarray(i) for i in (ids, positions, types))
    return float64(params.word[word]) + params.position[position] + params.token_type[kind]
