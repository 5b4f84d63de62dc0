"""SCOUT: a linear mixer enriches every token, and attention looks back at every s-th token only.

Source: SCOUT 2025 (arXiv 2509.00935) and the code released with it (ArefJafari/SCOUT). Where the released
code lets the window hold one key more in training, or passes it no mask at all, ours is causal with W keys.
Weights are [in, out]; norms and maps are without biases.
"""

import numpy as np

from ref.blocks.attention import attention_dense, join_heads, prepare, sum_groups
from ref.blocks.mlp import linear_vjp, swiglu, swiglu_vjp
from ref.blocks.norms import rms_norm, rms_norm_vjp
from ref.blocks.rotary_attention import (
    WindowCache,
    rotary_attention_vjp,
    rotary_qkv,
    sliding_window,
    sliding_window_mixer,
    sliding_window_mixer_vjp,
)
from ref.blocks.scan import selective_scan
from ref.blocks.softmax import SoftmaxState, finalize, merge, softmax_state
from ref.blocks.transformer import AttentionParams
from ref.checks import at_least_one, check_ids
from ref.dims import dims, float64
from ref.example import Example
from ref.models.mamba import MambaParams, mamba_block_vjp, mamba_macs, mamba_mixer
from ref.models.scout import (
    MIXERS,
    ScoutBlock,
    ScoutCache,
    ScoutConfig,
    ScoutParams,
    SwiGLUParams,
    check_scout,
    init_scout,
    num_parameters,
)

__all__ = [
    "AttentionParams", "MambaParams", "ScoutBlock", "ScoutCache", "ScoutConfig", "ScoutParams",
    "SwiGLUParams", "WindowCache", "cache_bytes", "checkpoint_attention", "checkpoint_attention_bwd",
    "example", "init_scout", "mamba_mixer", "num_parameters", "scout_block", "scout_block_vjp",
    "scout_flops", "scout_logits", "scout_logits_vjp", "scout_prefill", "scout_step", "selective_scan",
    "sliding_window_mixer", "visible_pairs",
]  # fmt: skip


def checkpoint_attention(q, k, v, *, segment, scale=None):
    """Softmax attention of token t to the checkpoints j = s-1, 2s-1, ... before t, and to t itself.

    The state of the checkpoints is merged with that of the token's own key: [L, L/s] scores, none of [L, L].
    Args: q [..., H, L, D], k, v [..., Hkv, L, D], rotated already; segment: s >= 1. scale: None is D^-1/2.
    Returns: o [..., H, L, D] float64. A token before the first checkpoint gives back its value.
    Raises: ValueError naming the argument at fault.
    """
    q, k, v, scale = _prepare(q, k, v, segment, scale)
    logits, own = _scores(q, k, segment, scale)
    checkpoints = softmax_state(logits, v[..., segment - 1 :: segment, :])
    return finalize(merge(checkpoints, SoftmaxState(own, np.ones_like(own), v)))[0]


def checkpoint_attention_bwd(do, q, k, v, *, segment, scale=None):
    """(dq, dk, dv) of `checkpoint_attention` for do [..., H, L, D].

    A checkpoint's gradient gathers that of all later tokens, and what it had from looking at itself.
    """
    kv_heads = k.shape[-3] if k.ndim > 2 else 1
    q, k, v, scale = _prepare(q, k, v, segment, scale)
    dims(do=(do, "... L Dv"), v=(v, "... L Dv"))
    do, at = float64(do), np.s_[..., segment - 1 :: segment, :]
    logits, own = _scores(q, k, segment, scale)
    o, lse = finalize(merge(softmax_state(logits, v[at]), SoftmaxState(own, np.ones_like(own), v)))
    p, p_own = np.exp(logits - lse[..., None]), np.exp(own - lse)[..., None]
    total = np.sum(do * o, axis=-1, keepdims=True)  # sum over the keys of P dP
    ds = scale * p * (do @ np.swapaxes(v[at], -1, -2) - total)
    ds_own = scale * p_own * (np.sum(do * v, axis=-1, keepdims=True) - total)
    dq, dk, dv = ds @ k[at] + ds_own * k, ds_own * q, p_own * do
    dk[at] += np.swapaxes(ds, -1, -2) @ q
    dv[at] += np.swapaxes(p, -1, -2) @ do
    return dq, sum_groups(dk, kv_heads), sum_groups(dv, kv_heads)


def scout_block(x, params: ScoutBlock, *, config, mixer="swa"):
    """x [..., L, C] -> [..., L, C]: x + mixer, + MLP, + attention to checkpoints, + MLP, each of a normed x.

    Raises: ValueError naming the argument or the field of config at fault.
    """
    check_scout(config, mixer)
    dims(x=(x, f"... L {config.dim}"))
    return _layer(float64(x), params, config, mixer)[0]


def scout_block_vjp(x, params: ScoutBlock, dy, *, config, mixer="swa"):
    """(dx, dparams: ScoutBlock) of `scout_block` for dy [..., L, C]."""
    check_scout(config, mixer)
    dims(x=(x, f"... L {config.dim}"), dy=(dy, "... L C"))
    p, c = params, config
    x0 = float64(x)
    h1 = rms_norm(x0, p.norm1, eps=c.eps)
    x1 = x0 + _mix(h1, p.mixer, c, mixer)[0]
    x2 = x1 + swiglu(rms_norm(x1, p.norm2, eps=c.eps), *p.mlp1)
    h3 = rms_norm(x2, p.norm3, eps=c.eps)
    x3 = x2 + _checkpoints(h3, p.attn, c)[0]
    d3, norm4, mlp2 = _feed_vjp(x3, p.norm4, p.mlp2, float64(dy), c.eps)
    forth = lambda q, k, v: checkpoint_attention(q, k, v, segment=c.segment)
    back = lambda q, k, v, do: checkpoint_attention_bwd(do, q, k, v, segment=c.segment)
    dh, attn = rotary_attention_vjp(h3, p.attn, d3, forth, back, **c.attention)
    d, norm3 = rms_norm_vjp(x2, p.norm3, dh, eps=c.eps)
    d1, norm2, mlp1 = _feed_vjp(x1, p.norm2, p.mlp1, d3 + d, c.eps)
    if mixer == "mamba":
        dh, dmixer = mamba_block_vjp(h1, p.mixer, d1)
    else:
        dh, dmixer = sliding_window_mixer_vjp(h1, p.mixer, d1, window=c.window, **c.attention)
    d, norm1 = rms_norm_vjp(x0, p.norm1, dh, eps=c.eps)
    return d1 + d, ScoutBlock(norm1, dmixer, norm2, mlp1, norm3, attn, norm4, mlp2)


def scout_logits(params: ScoutParams, ids, *, config, mixer="swa"):
    """Logits [..., L, V] of the next token, for ids [..., L]: ints below V."""
    return scout_prefill(params, ids, config=config, mixer=mixer)[0]


def scout_logits_vjp(params: ScoutParams, ids, dlogits, *, config, mixer="swa"):
    """dparams of `scout_logits` for dlogits [..., L, V]; every block is run again."""
    hidden = [_embed(params, ids, config, mixer)]
    for block in params.blocks:
        hidden.append(scout_block(hidden[-1], block, config=config, mixer=mixer))
    last = rms_norm(hidden[-1], params.norm, eps=config.eps)
    head = params.embedding.T if params.head is None else params.head
    d, dhead, _ = linear_vjp(last, head, float64(dlogits), bias=False)
    dx, dnorm = rms_norm_vjp(hidden[-1], params.norm, d, eps=config.eps)
    blocks = []
    for x, block in zip(hidden[-2::-1], params.blocks[::-1], strict=True):
        dx, grads = scout_block_vjp(x, block, dx, config=config, mixer=mixer)
        blocks.append(grads)
    dembedding = np.zeros(params.embedding.shape) if params.head is not None else dhead.T.copy()
    np.add.at(dembedding, np.asarray(ids), dx)
    return ScoutParams(dembedding, tuple(blocks[::-1]), dnorm, None if params.head is None else dhead)


def scout_prefill(params: ScoutParams, ids, *, config, mixer="swa"):
    """(logits [..., L, V], ScoutCache) of a prompt ids [..., L]; it keeps every s-th key and value."""
    x, layers = _embed(params, ids, config, mixer), []
    for block in params.blocks:
        x, *state = _layer(x, block, config, mixer)
        layers.append(state)
    mixers, keys, values = zip(*layers, strict=True)
    return _logits(params, x, config), ScoutCache(mixers, keys, values, x.shape[-2])


def scout_step(params: ScoutParams, token, cache: ScoutCache, *, config, mixer="swa"):
    """(logits [..., V], cache) for one more token [...], which stays in the cache if it ends a segment."""
    x, layers = _embed(params, np.asarray(token)[..., None], config, mixer), []
    for block, *state in zip(params.blocks, cache.mixers, cache.keys, cache.values, strict=True):
        x, *state = _layer(x, block, config, mixer, state, cache.steps)
        layers.append(state)
    mixers, keys, values = zip(*layers, strict=True)
    return _logits(params, x, config)[..., 0, :], ScoutCache(mixers, keys, values, cache.steps + 1)


def visible_pairs(n, *, segment=None, window=None):
    """Pairs of query and key that n tokens see: by checkpoints, in a window, or, with neither, of all before.

    Checkpoints: sum over t < n of floor(t / s) + 1.
    """
    if segment is not None:
        full, rest = divmod(n, segment)
        return n + segment * full * (full - 1) // 2 + rest * full
    short = n if window is None else min(n, window)
    return short * (short + 1) // 2 + (n - short) * short


def cache_bytes(config, n, *, kind="scout", mixer="swa", bytes_per_element=2):
    """What decoding keeps of n tokens. kind: "scout", or "full", "swa", "mamba" with that mixer alone."""
    check_scout(config, mixer, kind)
    c = config
    pairs = {"full": n, "swa": min(n, c.window or n)}
    numbers = {name: 2 * c.kv_dim * count for name, count in pairs.items()}
    numbers["mamba"] = c.expand * c.dim * (c.conv_size - 1 + c.state_size)
    numbers["scout"] = 2 * c.kv_dim * (n // c.segment) + numbers[mixer]
    return c.num_layers * numbers[kind] * bytes_per_element


def scout_flops(config, n, *, kind="scout", mixer="swa"):
    """FLOPs of the products for n tokens at once, 2 a multiply-accumulate; pairs that are not seen are free.

    Every kind has both MLPs and the head; "full", "swa" and "mamba" have one mixer a layer, where SCOUT has a
    mixer and attention to checkpoints.
    """
    check_scout(config, mixer, kind)
    c = config
    maps = 2 * n * c.dim * (c.dim + c.kv_dim)
    macs = {
        "full": maps + 2 * c.dim * visible_pairs(n),
        "swa": maps + 2 * c.dim * visible_pairs(n, window=c.window),
        "mamba": n * mamba_macs(c.dim, **c.mamba_sizes),
    }
    macs["scout"] = macs[mixer] + maps + 2 * c.dim * visible_pairs(n, segment=c.segment)
    layer = macs[kind] + 6 * n * c.dim * c.inner_dim
    return 2 * (c.num_layers * layer + n * c.dim * c.vocab_size)


def _prepare(q, k, v, segment, scale):
    at_least_one(segment=segment)
    q, k, v, opt = prepare(q, k, v, scale=scale)
    dims(q=(q, "... L D"), k=(k, "... L D"))
    return q, k, v, opt.scale


def _scores(q, k, segment, scale):
    """(logits of the checkpoints [..., L, M], -inf from the token itself on; of the own key [..., L])."""
    kept = k[..., segment - 1 :: segment, :]
    before = (np.arange(kept.shape[-2]) + 1) * segment - 1 < np.arange(q.shape[-2])[:, None]
    logits = np.where(before, scale * q @ np.swapaxes(kept, -1, -2), -np.inf)
    return logits, scale * np.sum(q * k, axis=-1)


def _layer(x, p, c, mixer, state=(None, None, None), start=0):
    """(x, mixer's state, keys, values of the checkpoints): a prompt from nothing, or one more token."""
    mix, keys, values = state
    h, mix = _mix(rms_norm(x, p.norm1, eps=c.eps), p.mixer, c, mixer, mix, start)
    x = x + h
    x = x + swiglu(rms_norm(x, p.norm2, eps=c.eps), *p.mlp1)
    h, keys, values = _checkpoints(rms_norm(x, p.norm3, eps=c.eps), p.attn, c, keys, values, start)
    x = x + h
    return x + swiglu(rms_norm(x, p.norm4, eps=c.eps), *p.mlp2), mix, keys, values


def _mix(h, p, c, mixer, state=None, start=0):
    if mixer == "mamba":
        return mamba_mixer(h, p, state=state)
    return sliding_window(h, p, state, window=c.window, start=start, **c.attention)


def _checkpoints(x, p, c, keys=None, values=None, start=0):
    q, k, v = rotary_qkv(x, p, start=start, **c.attention)
    if keys is None:
        o = checkpoint_attention(q, k, v, segment=c.segment)
        keys, values = (a[..., c.segment - 1 :: c.segment, :] for a in (k, v))
    else:
        k, v = np.concatenate([keys, k], axis=-2), np.concatenate([values, v], axis=-2)
        o = attention_dense(q, k, v)
        if (start + 1) % c.segment == 0:
            keys, values = k, v
    return join_heads(o) @ p.w_o, keys, values


def _feed_vjp(x, norm, mlp, dy, eps):
    """(dx, dnorm, SwiGLUParams) of x + swiglu(rms_norm(x))."""
    dh, *grads = swiglu_vjp(rms_norm(x, norm, eps=eps), *mlp, dy)
    dx, dnorm = rms_norm_vjp(x, norm, dh, eps=eps)
    return dy + dx, dnorm, SwiGLUParams(*grads)


def _embed(params, ids, config, mixer):
    check_scout(config, mixer)
    return float64(params.embedding)[check_ids("ids", ids, len(params.embedding))]


def _logits(params, x, config):
    head = params.embedding.T if params.head is None else params.head
    return rms_norm(x, params.norm, eps=config.eps) @ head


def example(seed=0):
    """Four query heads on two key heads of SmolLM2, twelve tokens, every third kept; a small model."""
    from ref.data import attention_inputs, hidden_states, token_ids

    config = ScoutConfig(
        8, 2, 1, 12, segment=3, window=4, state_size=4, dt_rank=1, vocab_size=50, num_layers=2
    )  # fmt: skip
    rng, at = np.random.default_rng(seed), slice(8 * seed, 8 * seed + 12)
    q, k, v = (a[:n, at, :16] for a, n in zip(attention_inputs(), (4, 2, 2), strict=True))
    x, ids = hidden_states()[1:13, :8], token_ids()[:12] % 50
    swa, mamba = (init_scout(rng, config, mixer=m) for m in MIXERS)
    cache = scout_prefill(swa, ids, config=config)[1]
    window, options = {"num_heads": 2, "num_kv_heads": 1, "window": 4}, {"config": config}
    return [
        Example("checkpoint_attention", (q, k, v), {"segment": 3}, (0, 1, 2)),
        Example("checkpoint_attention_bwd", (rng.standard_normal(q.shape), q, k, v), {"segment": 3}),
        Example("sliding_window_mixer", (x, swa.blocks[0].mixer), window, (0, 1)),
        Example("mamba_mixer", (x, mamba.blocks[0].mixer), {}, (0, 1)),
        Example("scout_block", (x, swa.blocks[0]), options, (0, 1)),
        Example("scout_block", (x, mamba.blocks[0]), {**options, "mixer": "mamba"}, (0, 1)),
        Example("scout_logits", (swa, ids), options, (0,)),
        Example("scout_prefill", (swa, ids), options),
        Example("scout_step", (swa, ids[0], cache), options),
    ]
