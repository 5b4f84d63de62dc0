"""Wide attention: the heads of all layers side by side in one, with any of ten kinds of attention.

Source: Brown et al. 2022 (arXiv 2210.00640); the encoder and the kinds are those of Long Range Arena (Tay et
al. 2020, arXiv 2011.04006), of whose eleven the paper uses ten. Ours: the head size stays when heads are
added (only so is the attention of one wide layer as large as that of many narrow ones); Reformer is the kind
left out. The kinds themselves are ref/blocks/attention_kinds.py.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ref.attention.bigbird import bigbird_rand_blocks
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
from ref.blocks.transformer import AttentionParams, BlockParams, init_block, transformer_block
from ref.checks import check_ids
from ref.dims import dims, float64
from ref.example import Example
from ref.tasks.listops import listops

__all__ = [
    "EncoderParams",
    "Machine",
    "WideConfig",
    "activation_numbers",
    "aspect_ratios",
    "attend",
    "attention_mask",
    "count_flops",
    "count_params",
    "encoder",
    "example",
    "init_encoder",
    "latency_model",
    "linear_attention",
    "linformer_attention",
    "listops",
    "multi_head_attention",
    "multi_head_attention_bwd",
    "performer_attention",
    "sinkhorn_attention",
    "synthesizer_attention",
]

# what init_encoder draws for a kind, with its default size
INIT_ONLY = {
    "bigbird": {"num_rand": 3},
    "linformer": {"rank": 32},
    "performer": {"features": 256},
    "synthesizer": {"rank": 32},
}


def multi_head_attention(
    x,
    params: AttentionParams,
    *,
    heads,
    head_dim,
    kind="dense",
    mask=None,
    extras=None,
    options=None,
    return_weights=False,
):
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
    do,
    x,
    params: AttentionParams,
    *,
    heads,
    head_dim,
    kind="dense",
    mask=None,
    extras=None,
    options=None,
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


@dataclass(frozen=True)
class WideConfig:
    """An encoder of `layers` blocks with `heads` heads of head_dim each, whatever dim is.

    options: those of the kind (see `attend`), and for what `init_encoder` draws: bigbird num_rand (3),
    linformer and synthesizer rank (32), performer features (256). pair: two texts and one answer.
    """

    layers: int
    heads: int
    dim: int
    head_dim: int
    mlp_dim: int
    vocab: int = 256
    max_length: int = 1024
    num_classes: int = 2
    kind: str = "dense"
    options: dict | None = field(default=None, hash=False)
    pair: bool = False


class EncoderParams(NamedTuple):
    """word [V, d], cls [d], blocks, extras (a dict a block), final norm [d], head [d or 4 d, f], [f, n]."""

    word: np.ndarray
    cls: np.ndarray
    blocks: tuple[BlockParams, ...]
    extras: tuple[dict, ...]
    ln_scale: np.ndarray
    ln_bias: np.ndarray
    w_hidden: np.ndarray
    b_hidden: np.ndarray
    w_out: np.ndarray
    b_out: np.ndarray


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
    options, T = _run_options(c), _padded_length(c, n)
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


def init_encoder(rng, config: WideConfig) -> EncoderParams:
    """Drawn by a NumPy Generator: normal weights of deviation fan_in^-1/2, embeddings dim^-1/2, biases 0."""
    c = config
    normal = lambda *shape: rng.standard_normal(shape) / np.sqrt(shape[0])
    inner = c.heads * c.head_dim
    blocks = tuple(
        init_block(rng, c.dim, c.mlp_dim)._replace(
            w_q=normal(c.dim, inner), w_k=normal(c.dim, inner), w_v=normal(c.dim, inner),
            w_o=normal(inner, c.dim), b_q=None, b_k=None, b_v=None, b_o=None,
            w_fc1=normal(c.dim, c.mlp_dim), w_fc2=normal(c.mlp_dim, c.dim),
        )
        for _ in range(c.layers)
    )  # fmt: skip
    width = 4 * c.dim if c.pair else c.dim
    return EncoderParams(
        word=rng.standard_normal((c.vocab, c.dim)) / np.sqrt(c.dim),
        cls=rng.standard_normal(c.dim) / np.sqrt(c.dim),
        blocks=blocks,
        extras=tuple(_init_extras(rng, c) for _ in range(c.layers)),
        ln_scale=np.ones(c.dim),
        ln_bias=np.zeros(c.dim),
        w_hidden=normal(width, c.mlp_dim),
        b_hidden=np.zeros(c.mlp_dim),
        w_out=normal(c.mlp_dim, c.num_classes),
        b_out=np.zeros(c.num_classes),
    )


def aspect_ratios(total_heads):
    """[(layers, heads)] with layers heads = total_heads, from the widest to the deepest."""
    if total_heads < 1:
        raise ValueError(f"total_heads must be at least 1, got {total_heads}")
    return [(n, total_heads // n) for n in range(1, total_heads + 1) if total_heads % n == 0]


def count_params(config, *, weights_only=True):
    """Numbers in the maps of attention and MLP of all layers: L (4 d H D + 2 d f).

    Without weights_only every learned number: also embeddings, class token, norms, biases, head, and the
    learned extras of linformer and synthesizer.
    """
    c = config
    weights = c.layers * (4 * c.dim * c.heads * c.head_dim + 2 * c.dim * c.mlp_dim)
    if weights_only:
        return weights
    learned = {"linformer": 2, "synthesizer": 2 * c.heads}.get(c.kind, 0)
    extras = learned and learned * _padded_length(c, c.max_length) * _init_options(c)["rank"]
    width = 4 * c.dim if c.pair else c.dim
    head = (width + 1) * c.mlp_dim + (c.mlp_dim + 1) * c.num_classes
    small = 4 * c.dim + c.mlp_dim + c.dim  # two norms, two biases of the MLP
    return weights + c.layers * (small + extras) + (c.vocab + 1) * c.dim + 2 * c.dim + head


def count_flops(config, length):
    """FLOPs of one text of `length` tokens through the layers: 2 a multiply-accumulate of maps and scores.

    Kinds with a mask count the pairs that are seen (bigbird: with num_rand random blocks a row); the class
    token and padding to blocks are included, embeddings, norms, softmax and head are not.
    """
    attention, feed = _layer_macs(config, length)
    return 2 * config.layers * (attention + feed)


def activation_numbers(config, length):
    """Numbers that a dense encoder keeps for the backward pass of one text: all layers' activations.

    A layer keeps x, both norms' outputs and the sum between them (4 T d), q, k, v and the heads' output
    (4 T H D), the weights (H T^2) and the hidden layer before and after its GELU (2 T f).
    """
    c, T = config, _padded_length(config, length)
    inner = c.heads * c.head_dim
    return c.layers * (4 * T * c.dim + 4 * T * inner + c.heads * T**2 + 2 * T * c.mlp_dim)


@dataclass(frozen=True)
class Machine:
    """flops_per_s, bytes_per_s: of multiply-adds and of main memory; sync_s: between dependent parts."""

    flops_per_s: float
    bytes_per_s: float
    sync_s: float


def latency_model(config, length, machine: Machine, *, itemsize=4):
    """Seconds of one text: max(compute, weight bytes / bandwidth) + sync for attention and MLP of each layer.

    A model, not a measurement: activations are taken to stay on the chip.
    """
    c = config
    weights = (4 * c.dim * c.heads * c.head_dim, 2 * c.dim * c.mlp_dim)
    part = lambda macs, w: max(2 * macs / machine.flops_per_s, itemsize * w / machine.bytes_per_s)
    layer = sum(
        part(macs, w) + machine.sync_s for macs, w in zip(_layer_macs(c, length), weights, strict=True)
    )
    return c.layers * layer


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


def _init_options(c):
    return {**INIT_ONLY.get(c.kind, {}), **(c.options or {})}


def _run_options(c):
    return {name: x for name, x in (c.options or {}).items() if name not in INIT_ONLY.get(c.kind, {})}


def _padded_length(c, length):
    """Tokens read for a text: one more for the class, whole blocks for sinkhorn and bigbird.

    bigbird always reads max_length, since its random blocks are drawn once.
    """
    length = c.max_length if c.kind == "bigbird" else length
    block = (c.options or {}).get("block", 1) if c.kind in ("bigbird", "sinkhorn") else 1
    return -(-(length + 1) // block) * block


def _init_extras(rng, c):
    """The arrays that one layer's kind needs, for texts up to max_length."""
    o, T = _init_options(c), _padded_length(c, c.max_length)
    if c.kind == "linformer":
        return {name: rng.standard_normal((T, o["rank"])) / np.sqrt(T) for name in ("e_k", "e_v")}
    if c.kind == "performer":
        return {"proj": orthogonal_features(rng, o["features"], c.head_dim)}
    if c.kind == "synthesizer":
        shapes = {"r1": (c.heads, T, o["rank"]), "r2": (c.heads, o["rank"], T)}
        return {name: rng.standard_normal(shape) / np.sqrt(o["rank"]) for name, shape in shapes.items()}
    nb = T // o["block"] if c.kind == "bigbird" else 0
    if nb > 5:  # fewer blocks leave none to draw
        uniforms = rng.random((c.heads, nb - 2, nb))
        return {"rand_blocks": bigbird_rand_blocks(uniforms, num_rand=min(o["num_rand"], nb - 5))}
    return {}


def _cut_extras(extras, T):
    """The extras of `max_length` cut to T tokens."""
    if "e_k" in extras:
        return {name: x[:T] for name, x in extras.items()}
    if "r1" in extras:
        return {"r1": extras["r1"][:, :T], "r2": extras["r2"][..., :T]}
    return extras


def _layer_macs(c, length):
    """(attention, MLP) multiply-accumulates of one layer."""
    T, D, o = _padded_length(c, length), c.head_dim, _init_options(c)
    maps = 4 * T * c.dim * c.heads * D
    if c.kind in MASKED:
        pattern = attention_mask(c.kind, T, **{n: x for n, x in o.items() if n != "num_rand"})
        pairs = int(pattern.sum())
        if c.kind == "bigbird":
            nb = T // o["block"]
            pairs += max(nb - 2, 0) * min(o["num_rand"], max(nb - 5, 0)) * o["block"] ** 2
        head = 2 * pairs * D
    elif c.kind == "dense":
        head = 2 * T * T * D
    elif c.kind == "linformer":
        head = 4 * T * o["rank"] * D
    elif c.kind == "linear":
        head = 2 * T * D * D + T * D
    elif c.kind == "performer":
        head = 4 * T * o["features"] * D + T * o["features"]
    elif c.kind == "sinkhorn":
        nb = T // o["block"]
        head = nb * nb * D + 2 * nb * T * D + 4 * T * o["block"] * D
    else:
        head = T * T * (o["rank"] + D)
    return maps + c.heads * head, 2 * T * c.dim * c.mlp_dim


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
