"""MemoryFormer: a projection is read from tables; the address of a row is the signs of a few features.

Source: Ding et al. 2024 (arXiv 2411.12992) and the code released with it, whose score ("l1_prob") differs
from the paper's text ("prob"); the code decides the default. What is our own addition says so.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.attention import attention_dense, attention_dense_vjp, join_heads, split_heads
from ref.blocks.mlp import linear_vjp, sigmoid
from ref.blocks.norms import layer_norm, layer_norm_vjp
from ref.blocks.quantize import check_finite
from ref.blocks.rope import rope, rope_angles
from ref.checks import check_ids, check_num_heads, check_share, one_of
from ref.dims import dims, float64
from ref.example import Example

SCORES = ("l1_prob", "prob")
EXPANSIONS = ("wider_hash", "extra_table")
LARGEST_TAU = 20


class MemoryLayerParams(NamedTuple):
    """K tables of 2^tau rows of width h: tables [K, 2^tau, h], bias [h]."""

    tables: np.ndarray
    bias: np.ndarray


class MemoryBlockParams(NamedTuple):
    """Pre-norm block: q, k, v share an address; up and down, a norm between; no output projection."""

    ln1_scale: np.ndarray
    ln1_bias: np.ndarray
    q: MemoryLayerParams
    k: MemoryLayerParams
    v: MemoryLayerParams
    ln2_scale: np.ndarray
    ln2_bias: np.ndarray
    up: MemoryLayerParams
    ln_up_scale: np.ndarray
    ln_up_bias: np.ndarray
    down: MemoryLayerParams


class MemoryFormerParams(NamedTuple):
    """Embedding [V, d], blocks, final norm [d], w_head [d, V]: embedding and head stay dense, and apart."""

    embed: np.ndarray
    blocks: tuple[MemoryBlockParams, ...]
    norm_scale: np.ndarray
    norm_bias: np.ndarray
    w_head: np.ndarray


class Complexity(NamedTuple):
    """Scalar additions and multiplications, bytes stored, and bytes of weights or rows read."""

    adds: int
    muls: int
    table_bytes: int
    bytes_read: int


def hash_chunks(x, *, tau, score="l1_prob", temperature=1.0):
    """(codes [..., K] int32, score [..., K]): the address of every chunk of tau features, and its weight.

    The first feature is the most significant bit, 1 where it is >= 0. With p = prod_i sigmoid(2 |z_i| / t),
    the softmax of <z, corner> / t over all 2^tau sign corners at the chosen one, the score is p ("prob") or
    sum_i |z_i| p ("l1_prob").
    Args: x [..., d], d = K tau, finite. temperature: t > 0.
    Raises: ValueError naming the argument at fault.
    """
    z = _chunks(x, tau, score, temperature)
    bits = 2 ** np.arange(tau - 1, -1, -1, dtype=np.int32)
    codes = np.where(z >= 0, bits, 0).sum(axis=-1, dtype=np.int32)
    p, l1, _ = _confidence(z, temperature)
    return codes, l1 * p if score == "l1_prob" else p


def hash_chunks_vjp(x, grad_score, *, tau, score="l1_prob", temperature=1.0):
    """grad_x [..., d] for grad_score [..., K]; the address is a constant, and the slope at x = 0 is 0."""
    z = _chunks(x, tau, score, temperature)
    p, l1, pull = _confidence(z, temperature)
    slope = 1 + l1[..., None] * pull if score == "l1_prob" else pull
    return ((grad_score * p)[..., None] * slope * np.sign(z)).reshape(x.shape)


def look_up(codes, score, tables, bias=None):
    """sum_k score_k tables[k, codes_k] + bias: codes, score [..., K], tables [K, rows, h] -> [..., h]."""
    K = dims(codes=(codes, "... K"), score=(score, "... K"), tables=(tables, "K rows h"))["K"]
    rows = float64(tables)[np.arange(K), codes]  # [..., K, h]
    y = (float64(score)[..., None, :] @ rows)[..., 0, :]
    return y if bias is None else y + bias


def look_up_vjp(codes, score, tables, grad_out):
    """(grad_score [..., K], grad_tables, grad_bias) of `look_up`; rows that were not read get nothing."""
    K, h = tables.shape[0], tables.shape[-1]
    dims(codes=(codes, "... K"), grad_out=(grad_out, f"... {h}"))
    score, grad_out = float64(score, grad_out)
    grad_score = (float64(tables)[np.arange(K), codes] @ grad_out[..., None])[..., 0]
    grad_tables, rows = np.zeros(tables.shape), grad_out.reshape(-1, 1, h)
    np.add.at(grad_tables, (np.arange(K), codes.reshape(-1, K)), score.reshape(-1, K, 1) * rows)
    return grad_score, grad_tables, grad_out.reshape(-1, h).sum(axis=0)


def memory_layer(x, tables, bias=None, *, score="l1_prob", temperature=1.0):
    """The look-up of the hash of x: x [..., K tau], tables [K, 2^tau, h], bias [h] -> [..., h].

    Raises: ValueError if the tables' rows are no power of two (2 to 2^20) or do not fit the width of x.
    """
    tau = _tau(tables, x)
    return look_up(*hash_chunks(x, tau=tau, score=score, temperature=temperature), tables, bias)


def memory_layer_vjp(x, tables, grad_out, *, score="l1_prob", temperature=1.0):
    """(grad_x, grad_tables, grad_bias) of `memory_layer` for grad_out [..., h]."""
    options = {"tau": _tau(tables, x), "score": score, "temperature": temperature}
    dims(x=(x, "... d"), grad_out=(grad_out, "... h"), tables=(tables, "K rows h"))
    grad_score, *grads = look_up_vjp(*hash_chunks(x, **options), tables, float64(grad_out))
    return hash_chunks_vjp(x, grad_score, **options), *grads


def memoryformer_block(x, params: MemoryBlockParams, *, num_heads, causal=True, rope_fraction=0.25):
    """x + attention(LN x), then x + memory layers(LN x): x [..., L, d] -> the same.

    Queries, keys and values share one hash. rope_fraction: of each head's channels, turned by position.
    There is no activation function: the hash is the non-linearity.
    Raises: ValueError for heads that do not divide d, or tables of q, k and v that differ in shape.
    """
    p, x = params, float64(x)
    u = layer_norm(x, p.ln1_scale, p.ln1_bias)
    x = x + join_heads(attention_dense(*_qkv(u, p, num_heads, rope_fraction), causal=causal))
    h = memory_layer(layer_norm(x, p.ln2_scale, p.ln2_bias), *p.up)
    return x + memory_layer(layer_norm(h, p.ln_up_scale, p.ln_up_bias), *p.down)


def memoryformer_block_vjp(
    x, params: MemoryBlockParams, grad_out, *, num_heads, causal=True, rope_fraction=0.25
):
    """(grad_x, dparams) of `memoryformer_block` for grad_out [..., L, d]."""
    p, x, g = params, float64(x), float64(grad_out)
    u = layer_norm(x, p.ln1_scale, p.ln1_bias)
    q, k, v = _qkv(u, p, num_heads, rope_fraction)
    mid = x + join_heads(attention_dense(q, k, v, causal=causal))
    n = layer_norm(mid, p.ln2_scale, p.ln2_bias)
    h = memory_layer(n, *p.up)
    d, *down = memory_layer_vjp(layer_norm(h, p.ln_up_scale, p.ln_up_bias), p.down.tables, g)
    d, *ln_up = layer_norm_vjp(h, p.ln_up_scale, d)
    d, *up = memory_layer_vjp(n, p.up.tables, d)
    d, *ln2 = layer_norm_vjp(mid, p.ln2_scale, d)
    g = g + d
    dq, dk, dv = attention_dense_vjp(q, k, v, split_heads(g, num_heads), causal=causal)
    back = [_turn(dq, rope_fraction, -1), _turn(dk, rope_fraction, -1), dv]
    tau = _tau(p.q.tables, u)
    codes, score = hash_chunks(u, tau=tau)
    grad_score, qkv = 0.0, []
    for layer, heads in zip((p.q, p.k, p.v), back, strict=True):
        own, *grads = look_up_vjp(codes, score, layer.tables, join_heads(heads))
        grad_score, qkv = grad_score + own, [*qkv, MemoryLayerParams(*grads)]
    d, *ln1 = layer_norm_vjp(x, p.ln1_scale, hash_chunks_vjp(u, grad_score, tau=tau))
    up, down = MemoryLayerParams(*up), MemoryLayerParams(*down)
    return g + d, MemoryBlockParams(*ln1, *qkv, *ln2, up, *ln_up, down)


def memoryformer_lm(tokens, params: MemoryFormerParams, *, num_heads):
    """Logits [..., L, V] of tokens [..., L] (integers): embedding, causal blocks, norm, head.

    Raises: ValueError for a token outside the vocabulary.
    """
    return (
        layer_norm(_hidden(tokens, params, num_heads)[-1], params.norm_scale, params.norm_bias)
        @ params.w_head
    )


def memoryformer_lm_vjp(tokens, params: MemoryFormerParams, grad_logits, *, num_heads):
    """dparams of `memoryformer_lm` for grad_logits [..., L, V]."""
    hidden = _hidden(tokens, params, num_heads)
    normed = layer_norm(hidden[-1], params.norm_scale, params.norm_bias)
    d, dhead, _ = linear_vjp(normed, params.w_head, float64(grad_logits), bias=False)
    d, *norm = layer_norm_vjp(hidden[-1], params.norm_scale, d)
    blocks = []
    for x, p in zip(hidden[-2::-1], params.blocks[::-1], strict=True):
        d, grads = memoryformer_block_vjp(x, p, d, num_heads=num_heads)
        blocks.insert(0, grads)
    dembed = np.zeros(params.embed.shape)
    np.add.at(dembed, np.asarray(tokens), d)
    return MemoryFormerParams(dembed, tuple(blocks), *norm, dhead)


def init_memory_layer(rng, d_in, d_out, *, tau=8, std=0.02):
    """MemoryLayerParams drawn by a NumPy Generator: normal tables (std) and bias (0.001)."""
    if not 1 <= tau <= LARGEST_TAU or d_in % tau:
        raise ValueError(f"tau must be in 1..{LARGEST_TAU} and divide d_in, got {tau=} for {d_in}")
    tables = std * rng.standard_normal((d_in // tau, 2**tau, d_out))
    return MemoryLayerParams(tables, 0.001 * rng.standard_normal(d_out))


def init_memoryformer(rng, *, vocab, dim, depth, tau=8, expansion="wider_hash"):
    """MemoryFormerParams with tables of standard deviation sqrt(2 / (5 dim)) for q, k, v, 0.02 elsewhere.

    expansion: how the MLP widens. "wider_hash": to K (tau + 2), read by K tables of tau + 2 bits.
      "extra_table": to 2 dim, read by 2 K tables of tau bits.
    """
    one_of("expansion", expansion, EXPANSIONS)
    wide, bits = (dim // tau * (tau + 2), tau + 2) if expansion == "wider_hash" else (2 * dim, tau)
    norm = lambda n: (np.ones(n), np.zeros(n))
    blocks = []
    for _ in range(depth):
        std = np.sqrt(2 / (5 * dim))
        q, k, v = (init_memory_layer(rng, dim, dim, tau=tau, std=std) for _ in range(3))
        up, down = init_memory_layer(rng, dim, wide, tau=tau), init_memory_layer(rng, wide, dim, tau=bits)
        blocks.append(MemoryBlockParams(*norm(dim), q, k, v, *norm(dim), up, *norm(wide), down))
    w = lambda *shape: 0.02 * rng.standard_normal(shape)
    return MemoryFormerParams(w(vocab, dim), tuple(blocks), *norm(dim), w(dim, vocab))


def expected_linear_table(weight, *, tau, scale=1.0):
    """tables [K, 2^tau, h] that stand for weight [h, d]: row a of table k is scale W[:, chunk k] c_a.

    c_a in {-1, 1}^tau is the corner with address a. On inputs c s, s in {-1, 1}^d, "prob" reads scale
    sigmoid(2 c)^tau W s; scale = E|z| / E[score] fits the size of other inputs. Our addition.
    """
    n = dims(weight=(weight, "h d"))
    if not 1 <= tau <= LARGEST_TAU or n["d"] % tau:
        raise ValueError(f"tau must be in 1..{LARGEST_TAU} and divide the width {n['d']}, got {tau}")
    chunks = float64(weight).reshape(n["h"], -1, tau).swapaxes(0, 1)  # [K, h, tau]
    return scale * np.swapaxes(chunks @ corners(tau).T, 1, 2)


def corners(tau):
    """[2^tau, tau]: the sign vector of every address, most significant bit first."""
    bits = np.arange(2**tau)[:, None] >> np.arange(tau - 1, -1, -1) & 1
    return 2.0 * bits - 1


def memory_complexity(d_in, d_out, *, tau, tokens=1, itemsize=2):
    """Complexity of a memory layer: K = d_in / tau rows of d_out numbers a token, each scaled and added.

    The hash costs four operations a feature (|z| scaled, exp-log; two sums), counted as two of each kind.
    bytes_read: K rows a token, at most the tables; less where tokens meet in a row.
    """
    if tau < 1 or d_in % tau:
        raise ValueError(f"tau must divide d_in, got {tau=} for {d_in}")
    K = d_in // tau
    work, table = tokens * (K * d_out + 2 * d_in), K * 2**tau * d_out
    return Complexity(work, work, itemsize * table, itemsize * min(tokens * K * d_out, table))


def dense_complexity(d_in, d_out, *, tokens=1, itemsize=2):
    """Complexity of the linear map it replaces; its weights are read once, however many the tokens."""
    work, weights = tokens * d_in * d_out, itemsize * d_in * d_out
    return Complexity(work, work, weights, weights)


def block_macs(dim, *, seq, tau=None):
    """Multiply-adds of a block for one token of seq: dense (tau None) 12 d^2 + 2 s d, or with memory layers.

    Memory: 3 K d for q, k, v, K d' and K d for the MLP, d' = K (tau + 2), K = d / tau; the hash apart.
    """
    if tau is None:
        return 12 * dim**2 + 2 * seq * dim
    K = dim // tau
    return 4 * K * dim + K * K * (tau + 2) + 2 * seq * dim


def _confidence(z, temperature):
    """p and sum |z| [..., K], and d log p / d|z| [..., K, tau]."""
    a = 2 * np.abs(z) / temperature
    p = np.exp(-np.log1p(np.exp(-a)).sum(axis=-1))
    return p, np.abs(z).sum(axis=-1), 2 / temperature * sigmoid(-a)


def _chunks(x, tau, score, temperature):
    """x [..., K tau] as [..., K, tau], everything checked."""
    d = dims(x=(x, "... d"))["d"]
    if not 1 <= tau <= LARGEST_TAU or d % tau:
        raise ValueError(f"tau must be in 1..{LARGEST_TAU} and divide the width of x, got {tau=} for {d}")
    one_of("score", score, SCORES)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    check_finite("x", x)
    return float64(x).reshape(*x.shape[:-1], d // tau, tau)


def _tau(tables, x):
    K, rows = (dims(tables=(tables, "K rows h"))[a] for a in ("K", "rows"))
    tau = rows.bit_length() - 1
    if rows != 2**tau or not 1 <= tau <= LARGEST_TAU:
        raise ValueError(f"tables must have 2^tau rows, 1 <= tau <= {LARGEST_TAU}, got {rows}")
    if x.shape[-1] != K * tau:
        raise ValueError(f"tables [{K}, 2^{tau}, h] read {K * tau} features, but x has {x.shape[-1]}")
    return tau


def _qkv(u, p, num_heads, fraction):
    """Heads of q, k, v [..., H, L, D], q and k turned; one hash for all three."""
    shape = p.q.tables.shape
    if p.k.tables.shape != shape or p.v.tables.shape != shape:
        raise ValueError("tables of q, k and v must have one shape, they share an address")
    check_num_heads(shape[-1], num_heads)
    codes, score = hash_chunks(u, tau=_tau(p.q.tables, u))
    q, k, v = (split_heads(look_up(codes, score, *layer), num_heads) for layer in (p.q, p.k, p.v))
    return _turn(q, fraction), _turn(k, fraction), v


def _turn(x, fraction, direction=1):
    """Rotary embedding of the first `fraction` of the channels (an even number); direction -1 turns back."""
    check_share("rope_fraction", fraction)
    L, R = x.shape[-2], int(x.shape[-1] * fraction) // 2 * 2
    turned = rope(x[..., :R], direction * rope_angles(np.arange(L), R), pairs="halves") if R else x[..., :0]
    return np.concatenate([turned, x[..., R:]], axis=-1)


def _hidden(tokens, params, num_heads):
    """The stream before every block, and after the last."""
    states = [float64(params.embed)[check_ids("tokens", tokens, len(params.embed))]]
    for p in params.blocks:
        states.append(memoryformer_block(states[-1], p, num_heads=num_heads))
    return states


def example(seed=0):
    """Hidden states of SmolLM2, normalised; a small language model on letters of Hamlet."""
    from ref.data import hidden_states, text

    rng = np.random.default_rng(seed)
    x = layer_norm(hidden_states()[1:9, :24].reshape(2, 4, 24), np.ones(24), np.zeros(24))
    layer = init_memory_layer(rng, 24, 6, tau=3, std=0.5)
    codes, score = hash_chunks(x, tau=3)
    ids = np.frombuffer(text()[:12].lower().encode(), np.uint8).reshape(2, 6).astype(np.int32) % 32
    net = init_memoryformer(rng, vocab=32, dim=24, depth=2, tau=3)
    heads = {"num_heads": 2}
    return [
        Example("hash_chunks", (x,), {"tau": 3}, (0,)),
        Example("hash_chunks_vjp", (x, score), {"tau": 3, "score": "prob"}),
        Example("look_up", (codes, score, *layer), {}, (1, 2, 3)),
        Example("look_up_vjp", (codes, score, layer.tables, rng.standard_normal((2, 4, 6)))),
        Example("memory_layer", (x, *layer), {"temperature": 2.0}, (0, 1, 2)),
        Example("memory_layer_vjp", (x, layer.tables, rng.standard_normal((2, 4, 6)))),
        Example("memoryformer_block", (x, net.blocks[0]), heads, (0, 1)),
        Example("memoryformer_lm", (ids, net), heads, (1,)),
    ]
