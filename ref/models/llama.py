"""The llama family of decoders: RMS norm, rotary positions, grouped keys, gated feed-forward, tied head.

Sources: Touvron et al. 2023 (LLaMA) for the block, Su et al. 2021 for the rotation (adjacent pairs), Ainslie
et al. 2023 for grouped keys, Shazeer 2020 for SwiGLU. No biases. The head is the embedding transposed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.attention import attention_dense, join_heads, split_heads
from ref.blocks.formats import BLOCKS, dequantize, row_bytes
from ref.blocks.mlp import silu
from ref.blocks.norms import rms_norm
from ref.blocks.rope import rope, rope_angles
from ref.blocks.softmax import logsumexp, softmax
from ref.dims import dims, float64

LARGEST = 1 << 20  # no size of a network is larger; the table of rotary angles has a row a position
VOCAB_CHUNK = 4096  # rows of the head taken at a time where the logits of all are not to be held


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a network. dim = heads * head_dim need not hold, but heads is a multiple of kv_heads."""

    vocab: int
    dim: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    context: int
    rope_base: float = 10000.0
    eps: float = 1e-5

    @classmethod
    def from_gguf(cls, file):
        """The sizes in a GGUF file's metadata. Raises: ValueError if it is not of this family."""
        if (name := file.value("general.architecture")) != "llama":
            raise ValueError(f"the file holds a network of architecture {name!r}, not 'llama'")
        get = lambda key: file.value(f"llama.{key}")
        heads, dim = get("attention.head_count"), get("embedding_length")
        known = isinstance(heads, int) and isinstance(dim, int) and heads
        return cls(
            vocab=file.tensor("token_embd.weight").shape[0],
            dim=dim,
            depth=get("block_count"),
            heads=heads,
            kv_heads=get("attention.head_count_kv"),
            head_dim=file.metadata.get("llama.rope.dimension_count", dim // heads if known else 0),
            hidden=get("feed_forward_length"),
            context=get("context_length"),
            rope_base=file.metadata.get("llama.rope.freq_base", 10000.0),
            eps=get("attention.layer_norm_rms_epsilon"),
        ).checked()

    def checked(self):
        """Itself. Raises: ValueError naming a size that cannot be, such as a corrupt file may hold."""
        for name in ("vocab", "dim", "depth", "heads", "kv_heads", "head_dim", "hidden", "context"):
            n = getattr(self, name)
            if type(n) is not int or not 1 <= n <= LARGEST:
                raise ValueError(f"{name} must be an integer in 1..{LARGEST}, got {n!r}")
        for name in ("rope_base", "eps"):
            x = getattr(self, name)
            if type(x) is not float or not 0 < x < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {x!r}")
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(
                f"heads must be a multiple of kv_heads and head_dim even, got {self.heads}, {self.kv_heads}, "
                f"{self.head_dim}"
            )
        return self


class Rows(NamedTuple):
    """A matrix [in, out] kept as the bytes of a number format: raw uint8 [..., out, bytes], rows = outputs.

    Its kind is its class, so that the tree of weights holds nothing but arrays.
    """

    raw: np.ndarray
    kind = None

    @property
    def shape(self):
        """As the matrix it stands for: [..., in, out]."""
        weights, size = BLOCKS[self.kind]
        *lead, out, nbytes = self.raw.shape
        return (*lead, nbytes // size * weights, out)


ROWS = {kind: type(f"Rows{kind}", (Rows,), {"kind": kind, "__slots__": ()}) for kind in BLOCKS}


class LlamaBlock(NamedTuple):
    """One block, or all of them stacked on a first axis [n]: norms [d], matrices [in, out] or `Rows`."""

    attn_norm: np.ndarray
    w_q: np.ndarray
    w_k: np.ndarray
    w_v: np.ndarray
    w_o: np.ndarray
    ffn_norm: np.ndarray
    w_gate: np.ndarray
    w_up: np.ndarray
    w_down: np.ndarray


class LlamaWeights(NamedTuple):
    """embed [V, d] or its `Rows`, blocks stacked [n, ...], norm [d], angles [context, head_dim/2], eps [].

    The table of rotary angles says what the shapes of the matrices do not: head size, base and context.
    """

    embed: np.ndarray
    blocks: LlamaBlock
    norm: np.ndarray
    angles: np.ndarray
    eps: np.ndarray


# The matrices of a block and their names in a GGUF file of this family.
_MATRICES = {
    "w_q": "attn_q", "w_k": "attn_k", "w_v": "attn_v", "w_o": "attn_output",
    "w_gate": "ffn_gate", "w_up": "ffn_up", "w_down": "ffn_down",
}  # fmt: skip


def llama_from_gguf(file, config, *, dtype="float32", keep_quantized=False) -> LlamaWeights:
    """The weights of a GGUF file: matrices dequantised, transposed to [in, out] and stacked by block.

    keep_quantized: leave them as `Rows`, the file's own bytes; the norms are float32 either way.
    Raises: ValueError if a tensor is missing or its shape is not the configuration's, dtype is neither
      "float32" nor "float64", or the file has a head of its own.
    """
    if dtype not in ("float32", "float64"):
        raise ValueError(f'dtype must be "float32" or "float64", got {dtype!r}')
    if "output.weight" in file.tensors:
        raise ValueError("the file has a head of its own (output.weight); here the head is the embedding")
    c, q, kv = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = {  # rows first, as the file has them
        "attn_q": (q, c.dim), "attn_k": (kv, c.dim), "attn_v": (kv, c.dim), "attn_output": (c.dim, q),
        "ffn_gate": (c.hidden, c.dim), "ffn_up": (c.hidden, c.dim), "ffn_down": (c.dim, c.hidden),
    }  # fmt: skip

    def tensor(name, shape):
        t = file.tensor(name)
        if t.shape != shape:
            raise ValueError(f"{name} has shape {list(t.shape)}, but the configuration says {list(shape)}")
        return t

    def values(name, shape):
        t = tensor(name, shape)
        return dequantize(t.raw, kind=t.kind).astype(dtype)

    def matrix(name):
        parts = [tensor(f"blk.{i}.{name}.weight", shapes[name]) for i in range(c.depth)]
        if keep_quantized and len(kinds := {t.kind for t in parts}) == 1:
            return ROWS[kinds.pop()](np.stack([t.raw for t in parts]))
        return np.stack([dequantize(t.raw, kind=t.kind).astype(dtype).T for t in parts])

    def vectors(name):
        return np.stack([values(f"blk.{i}.{name}.weight", (c.dim,)) for i in range(c.depth)])

    embed = tensor("token_embd.weight", (c.vocab, c.dim))
    return LlamaWeights(
        embed=ROWS[embed.kind](np.array(embed.raw)) if keep_quantized else values(
            "token_embd.weight", (c.vocab, c.dim)
        ),
        blocks=LlamaBlock(
            attn_norm=vectors("attn_norm"),
            ffn_norm=vectors("ffn_norm"),
            **{ours: matrix(theirs) for ours, theirs in _MATRICES.items()},
        ),
        norm=values("output_norm.weight", (c.dim,)),
        angles=rope_angles(np.arange(c.context), c.head_dim, base=c.rope_base),
        eps=np.array(c.eps),
    )  # fmt: skip


def init_llama(rng, config: LlamaConfig) -> LlamaWeights:
    """Weights drawn by a NumPy Generator: normal, standard deviation 1/sqrt(in), the embedding 1; unit norms.

    Raises: ValueError for sizes that cannot be, see `LlamaConfig.checked`.
    """
    c = config.checked()
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    w = lambda m, n: rng.standard_normal((c.depth, m, n)) / np.sqrt(m)
    return LlamaWeights(
        embed=rng.standard_normal((c.vocab, c.dim)),
        blocks=LlamaBlock(
            attn_norm=np.ones((c.depth, c.dim)),
            w_q=w(c.dim, q),
            w_k=w(c.dim, kv),
            w_v=w(c.dim, kv),
            w_o=w(q, c.dim),
            ffn_norm=np.ones((c.depth, c.dim)),
            w_gate=w(c.dim, c.hidden),
            w_up=w(c.dim, c.hidden),
            w_down=w(c.hidden, c.dim),
        ),
        norm=np.ones(c.dim),
        angles=rope_angles(np.arange(c.context), c.head_dim, base=c.rope_base),
        eps=np.array(c.eps),
    )


def init_cache(weights, length):
    """An empty cache for `length` tokens: zeros [n, 2, Hkv, length, D]; keys (rotated) first, then values."""
    depth, kv_heads, D = _cache_shape(weights)
    return np.zeros((depth, 2, kv_heads, length, D))


def forward(weights: LlamaWeights, ids, *, cache=None, position=0, return_hidden=False):
    """(logits [T, V], cache) of tokens at positions position, position + 1, ...; what they see is causal.

    Args: ids [T] int, T >= 1. cache [n, 2, Hkv, S, D]: keys and values of positions before `position`, which
      may lie in a longer array; None for a text that starts here.
    Returns: logits, the cache with the new tokens in it (S grows if it must), float64; and with
      return_hidden: hidden [n + 2, T, d], the embedding, the residual after each block, the final norm.
    Raises: ValueError for ids outside the vocabulary, position + T beyond the context, a cache of another
      network or one that ends before `position`.
    """
    x, cache, hidden = _run(weights, ids, cache, position)
    out = _head(weights, x), cache
    return (*out, hidden) if return_hidden else out


def forward_with(weights: LlamaWeights, ids, attend, *, cache=None, position=0):
    """`forward` with an attention of one's own: attend(l, q, k, v) -> [H, T, D] in block l.

    q [H, T, D] and k, v [Hkv, S, D] after the rotation, S = position + T: what a method may look at, mask or
    keep. Returns: (logits [T, V], cache).
    """
    x, cache, _ = _run(weights, ids, cache, position, attend)
    return _head(weights, x), cache


def prefill(weights: LlamaWeights, ids, *, return_hidden=False):
    """(logits [V], cache) of a whole text: the last position only, so that the head is applied once.

    With return_hidden also hidden [n + 2, d], of the last position. Arguments and errors as `forward`.
    """
    x, cache, hidden = _run(weights, ids, None, 0)
    out = _head(weights, x[-1]), cache
    return (*out, hidden[:, -1]) if return_hidden else out


def decode_step(weights: LlamaWeights, id, cache, position):
    """(logits [V], cache) of one token [] at `position`, after the tokens in the cache."""
    logits, cache = forward(weights, np.reshape(id, 1), cache=cache, position=position)
    return logits[0], cache


def candidate_logits(weights: LlamaWeights, ids, candidates):
    """(logits [T, k] of the candidates, logsumexp [T] of all): what log-probabilities need, never [T, V].

    Args: ids [T], candidates [T, k]: token ids to score at each position; log p = logits - logsumexp.
    """
    ids, candidates = np.asarray(ids), np.asarray(candidates)
    dims(ids=(ids, "T"), candidates=(candidates, "T k"))
    check_ids("candidates", candidates, weights)
    x, _, _ = _run(weights, ids, None, 0)
    logits = (_rows(weights.embed, candidates) @ x[..., None])[..., 0]
    V = _vocab(weights)
    parts = [
        logsumexp(x @ _rows(weights.embed, np.arange(i, min(i + VOCAB_CHUNK, V))).T)
        for i in range(0, V, VOCAB_CHUNK)
    ]
    return logits, logsumexp(np.stack(parts, axis=-1))


def sample(logits, u, *, temperature=1.0, top_k=0, top_p=1.0):
    """The token that the uniform number u in [0, 1) picks from softmax(logits / temperature), cut short.

    temperature 0 picks the largest logit. top_k keeps the k largest (0: all); top_p then keeps the fewest
    that hold probability top_p among those. Of equal logits the lower id comes first.
    Raises: ValueError unless temperature >= 0, top_k >= 0, 0 < top_p <= 1.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"need temperature >= 0, top_k >= 0, 0 < top_p <= 1, got {temperature}, {top_k}, {top_p}"
        )
    logits = float64(logits)
    if temperature == 0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    p = softmax(logits[order] / temperature)
    before = np.cumsum(p) - p
    kept = p * (before < top_p)
    return int(order[min(np.searchsorted(np.cumsum(kept), u * kept.sum(), side="right"), len(kept) - 1)])


def generate(
    weights: LlamaWeights,
    ids,
    *,
    max_new_tokens,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    stop=(2,),
    on_token=None,
):
    """The tokens that follow `ids`, int64: prefill once, then one decode step a token.

    temperature 0 is greedy; else `sample` with numbers of a NumPy Generator of the seed. A token of `stop`
    ends the text and is its last token. on_token: called with each token as it comes.
    Raises: ValueError as `forward`, or if ids and max_new_tokens do not fit the context.
    """
    logits, cache = prefill(weights, ids)
    step = lambda token, cache, position: decode_step(weights, token, cache, position)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return continue_text(
        logits, cache, step, len(ids), len(weights.angles), max_new_tokens, options, seed, stop, on_token
    )


def continue_text(logits, cache, step, start, context, max_new_tokens, options, seed, stop, on_token):
    """The loop of `generate` for any step(token, cache, position) -> (logits, cache)."""
    if max_new_tokens < 0 or start + max_new_tokens > context:
        raise ValueError(
            f"max_new_tokens must be in 0..{context - start} after {start} of the context's {context}, "
            f"got {max_new_tokens}"
        )
    rng = np.random.default_rng(seed)
    out = []
    while len(out) < max_new_tokens:
        out.append(sample(np.asarray(logits), rng.random(), **options))
        if on_token is not None:
            on_token(out[-1])
        if out[-1] in stop or len(out) == max_new_tokens:
            break
        logits, cache = step(out[-1], cache, start + len(out) - 1)
    return np.array(out, np.int64)


def half_split(weights: LlamaWeights) -> LlamaWeights:
    """The same network for rotation of halves (i, i + D/2): columns of w_q and w_k reordered.

    In files of this family pairs are adjacent; most other code rotates halves. Logits are equal if the
    rotation goes with the order, and nonsense if not. Matrices only, not `Rows`.
    """
    D = 2 * weights.angles.shape[-1]

    def columns(w):
        pairs = w.reshape(*w.shape[:-1], w.shape[-1] // D, D // 2, 2)
        return pairs.swapaxes(-1, -2).reshape(w.shape)

    b = weights.blocks
    return weights._replace(blocks=b._replace(w_q=columns(b.w_q), w_k=columns(b.w_k)))


def llama_costs(config: LlamaConfig, *, context, n_in, kind="Q4_1", head_kind=None) -> dict:
    """Parameters, bytes, FLOPs and cache of a call on n_in new tokens after `context` others, in closed form.

    Args: kind: number format of the blocks' matrices; head_kind: of the embedding (None: the same). Norms
      are float32, the cache float32, the head is applied once (prefill, or a decode step with n_in = 1).
    Returns: parameters; weight_bytes (each read once); embedding_bytes of the n_in rows looked up;
      cache_bytes_per_token; cache_read_bytes, cache_write_bytes; bytes (weights, rows, cache); macs
      and flops (2 a MAC), of which attention_macs on visible pairs; block_bytes of one block's matrices.
    """
    c = config
    if context < 0 or n_in < 1 or context + n_in > c.context:
        raise ValueError(
            f"need context >= 0, n_in >= 1 and at most {c.context} in all, got {context=}, {n_in=}"
        )
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    matrices = [(c.dim, q), (c.dim, kv), (c.dim, kv), (q, c.dim), *[(c.dim, c.hidden)] * 2, (c.hidden, c.dim)]
    block_macs = sum(m * n for m, n in matrices)
    block_bytes = sum(n * row_bytes(m, kind) for m, n in matrices)
    head_row = row_bytes(c.dim, head_kind or kind)
    norms = 4 * c.dim * (2 * c.depth + 1)
    per_token = 4 * 2 * kv * c.depth
    pairs = n_in * context + n_in * (n_in + 1) // 2
    attention = 2 * q * pairs * c.depth
    macs = n_in * c.depth * block_macs + c.vocab * c.dim + attention
    weight_bytes = c.depth * block_bytes + c.vocab * head_row + norms
    return {
        "parameters": c.depth * (block_macs + 2 * c.dim) + c.vocab * c.dim + c.dim,
        "weight_bytes": weight_bytes,
        "block_bytes": block_bytes,
        "head_bytes": c.vocab * head_row,
        "embedding_bytes": n_in * head_row,
        "cache_bytes_per_token": per_token,
        "cache_read_bytes": context * per_token,
        "cache_write_bytes": n_in * per_token,
        "bytes": weight_bytes + n_in * head_row + (context + n_in) * per_token,
        "macs": macs,
        "attention_macs": attention,
        "flops": 2 * macs,
    }


def _causal(l, q, k, v):
    return attention_dense(q, k, v, causal=True)


def _run(weights, ids, cache, position, attend=_causal):
    """Final norm [T, d] of the tokens, the new cache, and the hidden states [n + 2, T, d]."""
    ids = np.asarray(ids)
    T = check_length(weights, ids, position)
    check_call(weights, ids, cache, position)
    cache = init_cache(weights, 0) if cache is None else cache
    angles = weights.angles[position : position + T]
    x = _rows(weights.embed, ids)
    depth, kv_heads, D = _cache_shape(weights)
    new = np.zeros((depth, 2, kv_heads, max(cache.shape[-2], position + T), D))
    new[..., : cache.shape[-2], :] = cache
    hidden = [x]
    for l in range(depth):
        b = LlamaBlock(*(_layer(w, l) for w in weights.blocks))
        h = rms_norm(x, b.attn_norm, eps=weights.eps)
        heads = lambda w, h=h: split_heads(project(h, w), w.shape[-1] // D)
        new[l, 0, :, position : position + T] = rope(heads(b.w_k), angles)
        new[l, 1, :, position : position + T] = heads(b.w_v)
        q, (k, v) = rope(heads(b.w_q), angles), new[l, :, :, : position + T]
        x = x + project(join_heads(attend(l, q, k, v)), b.w_o)
        h = rms_norm(x, b.ffn_norm, eps=weights.eps)
        x = x + project(silu(project(h, b.w_gate)) * project(h, b.w_up), b.w_down)
        hidden.append(x)
    x = rms_norm(x, weights.norm, eps=weights.eps)
    return x, new, np.stack([*hidden, x])


def project(x, w):
    """x w for a matrix [in, out], or for `Rows` of it."""
    if isinstance(w, Rows):
        return x @ dequantize(w.raw, kind=w.kind).T
    return x @ w


def check_call(weights, ids, cache, position):
    """Raise ValueError for a bad call of `forward`. ids, position None: not known yet, shapes only."""
    length = 0 if cache is None else cache.shape[-2]
    if cache is not None:
        check_cache(weights, cache)
    if ids is not None:
        check_ids("ids", ids, weights)
    if position is None:
        return
    if cache is None and position:
        raise ValueError(f"position = {position} needs the cache of the tokens before")
    if not 0 <= position <= length:
        raise ValueError(f"position must be in 0..{length}, the cache's length, got {position}")


def check_length(weights, ids, position):
    """Raise ValueError unless there is a token and all fit the context; the number of tokens."""
    T, context = dims(ids=(ids, "T"))["T"], len(weights.angles)
    if T < 1:
        raise ValueError("ids must hold at least one token")
    if position + T > context:
        raise ValueError(f"position + T = {position + T} exceeds the context of {context}")
    return T


def check_cache(weights, cache):
    """Raise ValueError unless the cache has the shape that this network writes."""
    depth, kv_heads, D = _cache_shape(weights)
    if len(cache.shape) != 5 or (*cache.shape[:3], cache.shape[4]) != (depth, 2, kv_heads, D):
        raise ValueError(
            f"cache must have shape [{depth}, 2, {kv_heads}, S, {D}] for this network, got "
            f"{list(cache.shape)}"
        )


def check_ids(name, ids, weights):
    """Raise ValueError unless ids are integers in the vocabulary."""
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got dtype {ids.dtype}")
    V = _vocab(weights)
    if ids.size and (ids.min() < 0 or ids.max() >= V):
        raise ValueError(f"{name} must be in 0..{V - 1}, got {ids.min()}..{ids.max()}")


def _head(weights, x):
    """Logits of final states [..., d] -> [..., V]: the embedding transposed."""
    if isinstance(weights.embed, Rows):
        V = _vocab(weights)
        parts = [
            x @ _rows(weights.embed, np.arange(i, min(i + VOCAB_CHUNK, V))).T
            for i in range(0, V, VOCAB_CHUNK)
        ]
        return np.concatenate(parts, axis=-1)
    return x @ weights.embed.T


def _rows(embed, ids):
    """Rows [..., d] of the embedding, float64."""
    if isinstance(embed, Rows):
        return float64(dequantize(embed.raw[ids], kind=embed.kind))
    return float64(embed[ids])


def _vocab(weights):
    e = weights.embed
    return len(e.raw) if isinstance(e, Rows) else len(e)


def _cache_shape(weights):
    """(blocks, key heads, head size)."""
    D = 2 * weights.angles.shape[-1]
    depth, _, kv = weights.blocks.w_k.shape
    return depth, kv // D, D


def _layer(w, l):
    return type(w)(w.raw[l]) if isinstance(w, Rows) else w[l]
