"""BigBird: blocks that see a window, both ends of the text, and a few blocks drawn at random.

Source: Zaheer et al. 2020 (arXiv 2007.14062), section 2 and appendix D (blocked form); Li et al. 2022 (arXiv
2201.11838) for clinical notes. `num_global_tokens` adds the paper's ETC form, tokens in front that see and
are seen by all. Ours: random blocks are the same in training and evaluation and are drawn from every legal
block; padded keys weigh exactly nothing, and rows of padded queries are 0.
"""

from dataclasses import dataclass

import numpy as np

from ref.blocks.attention import attention_dense, attention_dense_vjp, broadcasts, join_heads
from ref.blocks.masks import bigbird_block_mask, bigbird_rand_blocks, check_rand_blocks
from ref.blocks.padding import token_rows, zero_padding
from ref.blocks.softmax import softmax, softmax_vjp
from ref.blocks.transformer import QKVParams, qkv, transformer_block
from ref.checks import check_num_heads
from ref.dims import dims
from ref.example import Example
from ref.models.bert import BertParams, bert_embed

METHODS = ("blocked", "dense")


@dataclass(frozen=True)
class BigBirdConfig:
    """num_rand: random blocks a row; hf_plan: draw them as the implementation in transformers does."""

    num_heads: int
    block_size: int = 64
    num_rand: int = 3
    hf_plan: bool = False
    eps: float = 1e-12


def bigbird_attention(q, k, v, *, block_size=64, rand_blocks=None, num_global_tokens=0,
                      token_mask=None, scale=None, method="blocked"):  # fmt: skip
    """softmax(scale q k^T over the visible blocks) v, one softmax over window, ends, random and global keys.

    Args: q, k, v [..., H, L, D]: num_global_tokens g, then a whole number nb of blocks.
      rand_blocks: int [..., H, nb - 2, r], leading axes broadcast, see `bigbird_block_mask`; None: no random.
      token_mask: bool [..., L], True = real: padded keys are not seen, padded queries give 0.
      method: "blocked" gathers g + (5 + r) block_size keys for every middle row of blocks; "dense" masks all
        scores. The same result.
    Returns: o [..., H, L, D] float64.
    Raises: ValueError naming the argument at fault.
    """
    if method not in METHODS:
        raise ValueError(f'method must be "blocked" or "dense", got {method!r}')
    plan = _Plan(q, k, v, block_size, rand_blocks, num_global_tokens, token_mask, scale)
    q, k, v = (plan.real_rows(x) for x in (q, k, v))
    if method == "dense":
        return plan.real_rows(attention_dense(q, k, v, mask=plan.dense_mask(), scale=plan.scale))
    o = np.zeros_like(q)
    o[..., plan.full, :] = attention_dense(q[..., plan.full, :], k, v, mask=plan.real_keys, scale=plan.scale)
    p, _ = plan.probabilities(q, k)
    plan.put_middle(o, p @ plan.gather(v))
    return plan.real_rows(o)


def bigbird_attention_bwd(
    do, q, k, v, *, block_size=64, rand_blocks=None, num_global_tokens=0, token_mask=None, scale=None
):
    """(dq, dk, dv) for the cotangent do [..., H, L, D]: the gather in reverse; arguments as forward."""
    plan = _Plan(q, k, v, block_size, rand_blocks, num_global_tokens, token_mask, scale)
    dims(do=(do, "... H L D"), q=(q, "... H L D"))
    do, q, k, v = (plan.real_rows(x) for x in (do, q, k, v))
    dq = np.zeros_like(q)
    dq[..., plan.full, :], dk, dv = attention_dense_vjp(
        q[..., plan.full, :], k, v, do[..., plan.full, :], mask=plan.real_keys, scale=plan.scale
    )
    p, keys = plan.probabilities(q, k)
    mid = plan.middle(do)
    ds = plan.scale * softmax_vjp(p, mid @ np.swapaxes(plan.gather(v), -1, -2))
    plan.put_middle(dq, ds @ keys)
    plan.scatter(dk, np.swapaxes(ds, -1, -2) @ plan.middle(q))
    plan.scatter(dv, np.swapaxes(p, -1, -2) @ mid)
    return dq, dk, dv


def bigbird_self_attention(
    x, params: QKVParams, *, num_heads, block_size=64, rand_blocks=None, num_global_tokens=0, token_mask=None
):
    """`bigbird_attention` of x [..., L, C], heads joined: [..., L, C], before the output map."""
    n = dims(x=(x, "... L C"), w_q=(params.w_q, "C E"))
    check_num_heads(n["E"], num_heads)
    real = token_rows("token_mask", token_mask, x.shape[:-1])
    heads = qkv(zero_padding(real, x)[0], params, num_heads=num_heads)
    options = {"rand_blocks": rand_blocks, "num_global_tokens": num_global_tokens, "token_mask": token_mask}
    return join_heads(bigbird_attention(*heads, block_size=block_size, **options))


def bigbird_encoder(params: BertParams, ids, *, config: BigBirdConfig, rand_blocks=None, token_mask=None):
    """Hidden states [..., L, C] of a BERT (tanh GELU) whose attention is `bigbird_attention`.

    Args: ids int [..., L]; rand_blocks: one array a layer, or None, see `init_rand_blocks`. A text of at most
      5 + 2 num_rand blocks gets full attention.
    """
    c, L = config, dims(ids=(ids, "... L"))["L"]
    real = token_rows("token_mask", token_mask, np.shape(ids))
    short = L <= (5 + 2 * c.num_rand) * c.block_size
    x = bert_embed(ids, params, eps=c.eps)
    for layer, p in enumerate(params.blocks):
        rand = None if rand_blocks is None else rand_blocks[layer]
        sparse = lambda q, k, v, mask, causal, rand=rand: bigbird_attention(
            q, k, v, block_size=c.block_size, rand_blocks=rand, token_mask=real
        )
        x = transformer_block(
            x, p, num_heads=c.num_heads, norm="post", eps=c.eps, activation="gelu_tanh",
            mask=real[..., None, None, :], attention=attention_dense if short else sparse,
        )  # fmt: skip
    return x


def init_rand_blocks(rng, config: BigBirdConfig, *, length, depth):
    """A tuple of `depth` arrays int32 [H, nb - 2, r], drawn once by a NumPy Generator and then kept."""
    nb = _num_blocks(length, config.block_size, 0)
    shape, plan = (config.num_heads, nb - 2, nb), "hf" if config.hf_plan else "uniform"
    return tuple(
        bigbird_rand_blocks(rng.random(shape), num_rand=config.num_rand, plan=plan) for _ in range(depth)
    )


def pad_to_blocks(x, *, block_size, axis=-1, token_mask=None):
    """(x with zeros up to a whole number of blocks along `axis`, token_mask with False there).

    Args: x [..., L] or, with axis=-2, [..., L, C]; token_mask bool [..., L], None = all real.
    """
    if block_size < 1 or axis not in (-1, -2):
        raise ValueError(f"block_size must be at least 1 and axis -1 or -2, got {block_size=}, {axis=}")
    real = token_rows("token_mask", token_mask, x.shape[: x.ndim + axis + 1])
    more = (0, -x.shape[axis] % block_size)
    lead = [(0, 0)] * (real.ndim - 1)
    return np.pad(x, [*lead, more, *[(0, 0)] * (-axis - 1)]), np.pad(real, [*lead, more])


def graph_stats(block_mask):
    """{"density", "diameter", "spectral_gap", "max_degree"} of one mask bool [nb, nb].

    density: share of blocks seen. The others are of the graph that joins i and j if either sees the other:
    the most hops between two blocks (inf if some never meet), 1 less the second eigenvalue of
    D^-1/2 A D^-1/2 (every block is joined to itself), and the most neighbours, itself included.
    """
    nb = dims(block_mask=(block_mask, "nb nb"))["nb"]
    mask = np.asarray(block_mask, bool)
    A = (mask | mask.T | np.eye(nb, dtype=bool)).astype(np.float64)
    degree = A.sum(axis=0)
    values = np.linalg.eigvalsh(A / np.sqrt(degree[:, None] * degree))
    gap = 1 - values[-2] if nb > 1 else 1.0
    return {
        "density": float(mask.mean()),
        "diameter": _diameter(A),
        "spectral_gap": float(gap),
        "max_degree": int(degree.max()),
    }


def bigbird_cost(n, dim, *, num_heads, block_size, num_rand, num_global_tokens=0):
    """{"macs", "score_elements", "blocks"} of `bigbird_self_attention` by the blocked method.

    Args: n: tokens in blocks, g = num_global_tokens come on top. blocks: visible blocks of one head,
      2 nb + (nb - 2) (5 + r) - 2 for nb >= 3. score_elements, of all heads: (g + 2 b)(g + n) of full rows and
      g + (5 + r) b for each of the others, in which rows 1 and nb - 2 mask one block. macs: three maps of
      (g + n) dim^2 and two products of head size a score.
    """
    nb = _num_blocks(n, block_size, 0)
    if dim % num_heads or num_rand < 0 or num_global_tokens < 0:
        raise ValueError(
            f"need num_heads to divide dim, num_rand and num_global_tokens >= 0, got {dim=}, {num_heads=}, "
            f"{num_rand=}, {num_global_tokens=}"
        )
    g, L, seen = num_global_tokens, num_global_tokens + n, 5 + num_rand
    full = g + min(2, nb) * block_size
    scores = num_heads * (full * L + (L - full) * (g + seen * block_size))
    return {
        "macs": 3 * L * dim**2 + 2 * scores * (dim // num_heads),
        "score_elements": scores,
        "blocks": 2 * nb + (nb - 2) * seen - 2 if nb > 2 else nb**2,
    }


class _Plan:
    """One call: the rows that see all, and for every middle row of blocks which blocks it gathers."""

    def __init__(self, q, k, v, block_size, rand_blocks, num_global_tokens, token_mask, scale):
        n = dims(q=(q, "... H L D"), k=(k, "... H L D"), v=(v, "... H L D"))
        lead, L, self.g, self.b = n["..."], n["L"], num_global_tokens, block_size
        self.nb = nb = _num_blocks(L, block_size, num_global_tokens)
        self.real = real = token_rows("token_mask", token_mask, (*lead, L))
        self.real_keys = real[..., None, None, :]
        self.scale = 1 / np.sqrt(n["D"]) if scale is None else scale
        self.full = np.unique(np.r_[: self.g + block_size, L - block_size : L])
        rows = np.arange(1, max(nb - 1, 1))
        fixed = np.stack([0 * rows, 0 * rows + nb - 1, rows - 1, rows, rows + 1], axis=-1)
        self.rand = np.zeros((n["H"], len(rows), 0), int)
        if rand_blocks is not None:
            self.rand = check_rand_blocks(rand_blocks, nb)
            if self.rand.shape[-3] != n["H"] or not broadcasts(self.rand.shape[:-3], lead):
                raise ValueError(
                    f"rand_blocks must be [..., H={n['H']}, nb - 2={nb - 2}, r], its leading axes broadcast "
                    f"to {list(lead)}, got {list(np.shape(rand_blocks))}"
                )
        rand = np.broadcast_to(self.rand, (*lead, *self.rand.shape[-3:]))
        fixed = np.broadcast_to(fixed, (*rand.shape[:-1], 5))
        self.table = np.concatenate([fixed, rand], axis=-1)  # [..., H, M, 5 + r]
        first = np.ones(self.table.shape, bool)  # False where the window meets an end, which is there already
        first[..., 2:5] = (fixed[..., 2:] > 0) & (fixed[..., 2:] < nb - 1)
        seen = np.repeat(first, block_size, axis=-1)
        seen = np.concatenate([np.ones((*seen.shape[:-1], self.g), bool), seen], axis=-1)
        columns = np.broadcast_to(real[..., None, :, None], (*lead, n["H"], L, 1))
        self.seen = (seen & self.gather(columns)[..., 0])[..., None, :]

    def real_rows(self, x):
        """x [..., H, L, D] with the rows of padded tokens set to 0."""
        return zero_padding(self.real[..., None, :], x)[0]

    def blocks(self, x):
        """The blocks after the global tokens: [..., nb, b, D], a view where x is contiguous."""
        return x[..., self.g :, :].reshape(*x.shape[:-2], self.nb, self.b, x.shape[-1])

    def middle(self, x):
        """[..., M, b, D], the rows of blocks that do not see all."""
        return self.blocks(x)[..., 1:-1, :, :]

    def put_middle(self, x, rows):
        """Write the middle rows of blocks into x."""
        inner = slice(self.g + self.b, self.g + max(self.nb - 1, 1) * self.b)
        x[..., inner, :] = rows.reshape(x[..., inner, :].shape)

    def gather(self, x):
        """[..., M, g + (5 + r) b, D]: global tokens, both ends, the window and the random blocks."""
        lead, (M, n), D = self.table.shape[:-2], self.table.shape[-2:], x.shape[-1]
        index = self.table.reshape(*lead, M * n, 1, 1)
        found = np.take_along_axis(self.blocks(x), index, axis=-3).reshape(*lead, M, n * self.b, D)
        front = np.broadcast_to(x[..., None, : self.g, :], (*lead, M, self.g, D))
        return np.concatenate([front, found], axis=-2)

    def scatter(self, x, rows):
        """Add to x [..., H, L, D] what `gather` had taken from there: its transpose, in place."""
        lead, (M, n), D = self.table.shape[:-2], self.table.shape[-2:], x.shape[-1]
        heads = int(np.prod(lead))
        x[..., : self.g, :] += rows[..., : self.g, :].sum(axis=-3)
        found = rows[..., self.g :, :].reshape(heads, M * n, self.b, D)
        out = np.zeros((heads, self.nb, self.b, D))
        np.add.at(out, (np.arange(heads)[:, None], self.table.reshape(heads, M * n)), found)
        x[..., self.g :, :] += out.reshape(*lead, self.nb * self.b, D)

    def probabilities(self, q, k):
        """(p [..., M, b, g + (5 + r) b] of the middle rows, their keys)."""
        keys = self.gather(k)
        s = self.scale * self.middle(q) @ np.swapaxes(keys, -1, -2)
        return softmax(np.where(self.seen, s, -np.inf)), keys

    def dense_mask(self):
        """bool [..., H, L, L]: the mask of blocks, element by element."""
        blocks = bigbird_block_mask(self.nb, self.rand if self.rand.size else None)
        mask = np.repeat(np.repeat(blocks, self.b, axis=-1), self.b, axis=-2)
        front = [(0, 0)] * (mask.ndim - 2) + [(self.g, 0)] * 2
        return np.pad(mask, front, constant_values=True) & self.real_keys


def _num_blocks(length, block_size, num_global_tokens):
    rest = length - num_global_tokens
    if block_size < 1 or num_global_tokens < 0 or rest < block_size or rest % block_size:
        raise ValueError(
            f"block_size must divide the {rest} tokens after num_global_tokens, got {block_size=}, "
            f"{num_global_tokens=}; `pad_to_blocks` pads and masks"
        )
    return rest // block_size


def _diameter(A):
    """Least d with A^d > 0 everywhere, by doubling and then halving; A has ones on its diagonal."""
    powers = [A > 0]
    if len(A) == 1:
        return 0
    while not powers[-1].all() and 2 ** (len(powers) - 1) < len(A):
        powers.append(powers[-1].astype(np.float64) @ powers[-1] > 0)
    if not powers[-1].all():
        return np.inf
    reach, hops = np.eye(len(A), dtype=bool), 0
    for n in range(len(powers) - 1, -1, -1):
        further = reach.astype(np.float64) @ powers[n] > 0
        if not further.all():
            reach, hops = further, hops + 2**n
    return hops + 1


def example(seed=0):
    """SmolLM2 on Hamlet: two global tokens and ten blocks of four, the last one padding."""
    from ref.data import attention_inputs, hidden_states

    rng = np.random.default_rng(seed)
    q, k, v = (x[None, :3, :42] for x in attention_inputs())
    rand = bigbird_rand_blocks(rng.random((3, 8, 10)), num_rand=2)
    options = {"block_size": 4, "num_global_tokens": 2, "token_mask": np.arange(42)[None] < 38}
    x = hidden_states()[None, :42, :24] / 8
    params = QKVParams(*(rng.standard_normal(s) / 5 for s in ((24, 24), 24) * 3))
    do = rng.standard_normal(q.shape)
    return [
        Example("bigbird_attention", (q, k, v), {"rand_blocks": rand, **options}, (0, 1, 2)),
        Example("bigbird_attention_bwd", (do, q, k, v), {"rand_blocks": rand, **options}),
        Example(
            "bigbird_self_attention", (x, params), {"num_heads": 3, "rand_blocks": rand, **options}, (0, 1)
        ),
    ]
