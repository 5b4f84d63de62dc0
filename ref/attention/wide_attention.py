"""Wide attention: the heads of all layers side by side in one, with any of ten kinds of attention.

Source: Brown et al. 2022 (arXiv 2210.00640); the encoder and the kinds are those of Long Range Arena (Tay et
al. 2020, arXiv 2011.04006), of whose eleven the paper uses ten. Ours: the head size stays when heads are
added (only so is the attention of one wide layer as large as that of many narrow ones); Reformer is the kind
left out. The kinds themselves are ref/blocks/attention_kinds.py.
"""

import numpy as np

from ref.blocks.attention import join_heads, split_heads
from ref.blocks.attention_kinds import (
    MASKED,
    attend,
    attend_vjp,
    attention_mask,
    check_kind,
    key_mask,
    seen_by_kind,
)
from ref.blocks.linear_attention import linear_attention, orthogonal_features, performer_attention
from ref.blocks.mixed_attention import linformer_attention, sinkhorn_attention, synthesizer_attention
from ref.blocks.mlp import linear, linear_vjp, relu
from ref.blocks.norms import layer_norm
from ref.blocks.padding import token_rows, zero_padding
from ref.blocks.positions import sinusoidal_positions
from ref.blocks.softmax import softmax
from ref.blocks.transformer import AttentionParams, transformer_block
from ref.checks import at_least_one, check_ids
from ref.dims import dims, float64
from ref.example import Example
from ref.models.wide_encoder import (
    INIT_ONLY,
    EncoderParams,
    Machine,
    WideConfig,
    activation_numbers,
    count_flops,
    count_params,
    init_encoder,
    latency_model,
    padded_length,
)
from ref.tasks.listops import listops

__all__ = [
    "EncoderParams", "Machine", "WideConfig", "activation_numbers", "aspect_ratios", "attend",
    "attention_mask", "count_flops", "count_params", "encoder", "example", "init_encoder",
    "latency_model", "linear_attention", "linformer_attention", "listops", "multi_head_attention",
    "multi_head_attention_bwd", "performer_attention", "sinkhorn_attention", "synthesizer_attention",
]  # fmt: skip


def multi_head_attention(x, params: AttentionParams, *, heads, head_dim, kind="dense", mask=None,
                         extras=None, options=None, return_weights=False):  # fmt: skip
    """attend(x w_q, x w_k, x w_v) w_o + b_o: x, y [..., T, d]; the inner width is heads head_dim, not d.

    Args: params: w_q, w_k, w_v [d, heads head_dim], w_o [heads head_dim, d]. mask: bool [..., T], True =
      real; padded tokens are read as zeros, whatever they hold. The rest as `attend`.
    Returns: y, and with return_weights (y, weights [..., heads, T, T]), for dense and the kinds with a mask.
    Raises: ValueError as `attend`, for shapes, or return_weights with another kind.
    """
    q, k, v = _heads(_read(x, mask), params, heads, head_dim)
    o = attend(q, k, v, kind=kind, mask=mask, extras=extras, options=options)
    y = linear(join_heads(o), params.w_o, params.b_o)
    if not return_weights:
        return y
    if kind not in ("dense", *MASKED):
        raise ValueError(f"kind {kind!r} never forms the weights: return_weights must be False")
    options, extras = check_kind(kind, options, extras)
    keys = key_mask(mask, q.shape[:-3], q.shape[-2])
    seen = seen_by_kind(kind, q.shape[-2], keys, extras, options)
    s = q @ np.swapaxes(k, -1, -2) / np.sqrt(head_dim)
    return y, softmax(s if seen is None else np.where(seen, s, -np.inf))


def multi_head_attention_bwd(
    do, x, params: AttentionParams, *, heads, head_dim, kind="dense", mask=None, extras=None, options=None
):
    """(dx, dparams: AttentionParams) for do [..., T, d]: dense, linear, linformer and the kinds with a mask.

    Raises: ValueError as forward; NotImplementedError for the other kinds.
    """
    x = _read(x, mask)
    q, k, v = _heads(x, params, heads, head_dim)
    dims(do=(do, "... T d"), x=(x, "... T d"))
    o = join_heads(attend(q, k, v, kind=kind, mask=mask, extras=extras, options=options))
    do_heads, dw_o, db_o = linear_vjp(o, params.w_o, float64(do), bias=params.b_o is not None)
    grads = attend_vjp(
        q, k, v, split_heads(do_heads, heads), kind=kind, mask=mask, extras=extras, options=options
    )
    dx, dw = 0.0, []
    for w, d in zip((params.w_q, params.w_k, params.w_v), grads, strict=True):
        part, dw_one, _ = linear_vjp(x, w, join_heads(d), bias=False)
        dx, dw = dx + part, [*dw, dw_one]
    return _read(dx, mask), AttentionParams(*dw, dw_o, db_o)


def encoder(params: EncoderParams, tokens, *, config: WideConfig):
    """Class logits [..., classes] of a pre-norm encoder, from its first token.

    Args: tokens int [..., n], 0 = padding, at most max_length; with config.pair [..., 2, n], and the head
      reads (a, b, a b, a - b). A class token goes in front, sinusoidal positions are added, bigbird and
      sinkhorn are padded to whole blocks (bigbird to those of max_length).
    Raises: ValueError for an id outside the vocabulary or a text too long.
    """
    c, n = config, dims(tokens=(tokens, "... n"))["n"]
    tokens = check_ids("tokens", tokens, c.vocab)
    if n > c.max_length:
        raise ValueError(f"tokens has n={n}, more than max_length={c.max_length}")
    options, T = _run_options(c), padded_length(c, n)
    x = np.zeros((*tokens.shape[:-1], T, c.dim))
    real = np.zeros(x.shape[:-1], bool)
    x[..., 0, :], x[..., 1 : n + 1, :] = params.cls, float64(params.word)[tokens]
    real[..., 0], real[..., 1 : n + 1] = True, tokens != 0
    x = x + sinusoidal_positions(T, c.dim)
    for p, extras in zip(params.blocks, params.extras, strict=True):
        cut = _cut_extras(extras, T)
        see = lambda q, k, v, mask, causal, cut=cut: attend(
            q, k, v, kind=c.kind, mask=real, extras=cut, options=options
        )
        x = transformer_block(x, p, num_heads=c.heads, attention=see)
    first = layer_norm(x, params.ln_scale, params.ln_bias)[..., 0, :]
    if c.pair:
        a, b = first[..., 0, :], first[..., 1, :]
        first = np.concatenate([a, b, a * b, a - b], axis=-1)
    return linear(relu(linear(first, params.w_hidden, params.b_hidden)), params.w_out, params.b_out)


def aspect_ratios(total_heads):
    """[(layers, heads)] with layers heads = total_heads, from the widest to the deepest."""
    at_least_one(total_heads=total_heads)
    return [(n, total_heads // n) for n in range(1, total_heads + 1) if total_heads % n == 0]


def _read(x, mask):
    """x [..., T, d] with the padded tokens set to 0."""
    return zero_padding(None if mask is None else token_rows("mask", mask, x.shape[:-1]), x)[0]


def _heads(x, params, heads, head_dim):
    inner = heads * head_dim
    w = {name: getattr(params, name) for name in ("w_q", "w_k", "w_v")}
    if heads < 1 or head_dim < 1:
        raise ValueError(f"heads and head_dim must be at least 1, got {heads} and {head_dim}")
    dims(x=(x, "... T d"), **{name: (m, f"d {inner}") for name, m in w.items()})
    dims(w_o=(params.w_o, f"{inner} d"), w_q=(params.w_q, "d inner"))
    return tuple(split_heads(linear(x, m), heads) for m in w.values())


def _run_options(c):
    return {name: x for name, x in (c.options or {}).items() if name not in INIT_ONLY.get(c.kind, {})}


def _cut_extras(extras, T):
    """The extras of `max_length` cut to T tokens."""
    if "e_k" in extras:
        return {name: x[:T] for name, x in extras.items()}
    if "r1" in extras:
        return {"r1": extras["r1"][:, :T], "r2": extras["r2"][..., :T]}
    return extras


def example(seed=0):
    """SmolLM2's hidden states on Hamlet, 24 channels, three heads of four; four tokens of padding."""
    from ref.data import hidden_states

    rng = np.random.default_rng(seed)
    T, heads, D = 24, 3, 4
    x, real = hidden_states()[None, :T, :24] / 8, np.arange(T)[None] < 20
    shapes = ((24, 12), (24, 12), (24, 12), (12, 24), 24)
    params = AttentionParams(*(rng.standard_normal(s) / 5 for s in shapes))
    q, k, v, do = rng.standard_normal((4, 1, heads, T, D))
    e_k, e_v = rng.standard_normal((2, T, 6)) / 3
    proj = orthogonal_features(rng, 8, D)
    r1, r2 = rng.standard_normal((heads, T, 5)), rng.standard_normal((heads, 5, T))
    layer = {"heads": heads, "head_dim": D, "mask": real}
    config = WideConfig(1, 3, 8, 4, 16, vocab=16, max_length=20, num_classes=10)
    tokens, _ = listops(rng, 2, max_length=20, max_depth=3, max_args=5)
    local = {"kind": "local", "options": {"block": 6, "neighbors": 1}}
    return [
        Example("attention_mask", ("sparse", T), {"block": 8, "stride": 8, "keep_from": 6}),
        Example("attend", (q, k, v), {"mask": real, **local}, (0, 1, 2)),
        Example("multi_head_attention", (x, params), layer, (0, 1)),
        Example("multi_head_attention_bwd", (x + 1, x, params), layer),
        Example("linear_attention", (q, k, v), {}, (0, 1, 2)),
        Example("performer_attention", (q, k, v, proj), {}, (0, 1, 2)),
        Example("linformer_attention", (q, k, v, e_k, e_v), {}, (0, 1, 2, 3, 4)),
        Example("sinkhorn_attention", (q, k, do), {"block": 6, "iterations": 4}, (0, 1, 2)),
        Example("synthesizer_attention", (v, r1, r2), {}, (0, 1, 2)),
        Example("encoder", (init_encoder(rng, config), tokens), {"config": config}, (0,)),
    ]
