"""Longformer: every token sees a window, a few tokens see and are seen by all.

Source: Beltagy, Peters and Cohan 2020 (arXiv 2004.05150), section 3 and appendix A; Li et al. 2022 (arXiv
2201.11838) for clinical notes; the "chunks" form is the index trick of the released code. Ours: dilation is
defined here (the released PyTorch code has none), padded tokens are neither seen nor see, rows 0 and 1 of an
extended position table are copied.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ref.blocks.attention import attention_dense, join_heads, split_heads
from ref.blocks.band import chunk_scores, chunk_values
from ref.blocks.masks import check_window, dilated_window_mask, longformer_mask
from ref.blocks.mlp import linear, mlp
from ref.blocks.norms import layer_norm
from ref.blocks.padding import token_rows, zero_padding
from ref.blocks.softmax import softmax, softmax_vjp
from ref.blocks.transformer import QKVParams, qkv, qkv_vjp
from ref.checks import check_num_heads, one_of
from ref.dims import dims, float64
from ref.example import Example
from ref.models.bert import BertParams, bert_embed
from ref.models.heads import class_logits, mlm_loss, span_logits, token_logits
from ref.tasks.spans import entity_f1, span_metrics

__all__ = [
    "LongformerConfig", "LongformerModel", "LongformerParams", "class_logits", "entity_f1", "example",
    "extend_positions", "extend_to_longformer", "longformer_attention", "longformer_attention_bwd",
    "longformer_cost", "longformer_encoder", "longformer_mask", "mlm_loss", "receptive_field",
    "sliding_window_attention", "sliding_window_attention_bwd", "span_logits", "span_metrics",
    "token_logits",
]  # fmt: skip

METHODS = ("band", "chunks", "dense")


class LongformerParams(NamedTuple):
    """local: the maps of every token; wide: those of global rows, which attend to all. [in, out] weights."""

    local: QKVParams
    wide: QKVParams


class LongformerModel(NamedTuple):
    """A BERT and, block by block, the second set of maps for global rows."""

    bert: BertParams
    wide: tuple[QKVParams, ...]


@dataclass(frozen=True)
class LongformerConfig:
    """window: keys a token sees beside itself, one number or one a block; num_reserved: rows of the position
    table before position 0 (RoBERTa: 2, padding takes the last of them).
    """

    num_heads: int
    window: int | tuple[int, ...] = 512
    num_reserved: int = 2
    eps: float = 1e-5


def sliding_window_attention(
    q, k, v, *, window, dilation=1, global_mask=None, token_mask=None, causal=False, scale=None, method="band"
):
    """Attention over window / 2 keys on each side and all global tokens, one softmax over both.

    Args: q, k, v [..., H, L, D]. window: even, at least 2. dilation: step between the keys of the window;
        heads that differ in it are separate calls.
      global_mask bool [..., L]: seen by all, and their rows see all (with the same q, k, v); not with causal.
      token_mask bool [..., L], True = real: a padded token is not seen, not global, and its row is 0.
      causal: only keys j <= i. scale: None is 1 / sqrt(D).
      method: "band" gathers window + 1 keys a query; "chunks" multiplies overlapping chunks of `window`
        tokens and keeps the band (dilation 1, not causal); "dense" masks all L^2 scores. The same result.
    Returns: o [..., H, L, D] float64.
    Raises: ValueError naming the argument at fault.
    """
    one_of("method", method, METHODS)
    if method == "chunks" and (dilation > 1 or causal):
        raise ValueError('method="chunks" needs dilation=1 and causal=False')
    plan = _Plan(q, k, v, window, dilation, global_mask, token_mask, causal, scale)
    local = tuple(plan.real_rows(x) for x in (q, k, v))
    return plan.forward(local, local, method)


def sliding_window_attention_bwd(
    do, q, k, v, *, window, dilation=1, global_mask=None, token_mask=None, causal=False, scale=None
):
    """(dq, dk, dv) for the cotangent do [..., H, L, D]; arguments as `sliding_window_attention`."""
    plan = _Plan(q, k, v, window, dilation, global_mask, token_mask, causal, scale)
    dims(do=(do, "... H L D"), q=(q, "... H L D"))
    local = tuple(plan.real_rows(x) for x in (q, k, v))
    near, far = plan.backward(plan.real_rows(do), local, local)
    return tuple(a + b for a, b in zip(near, far, strict=True))


def longformer_attention(
    x, params: LongformerParams, *, num_heads, window, global_mask=None, token_mask=None
):
    """Heads of self-attention, joined: window and global columns by `local`, global rows by `wide`.

    Args: x [..., L, C]; params: weights [C, C]; masks bool [..., L] as in `sliding_window_attention`.
    Returns: [..., L, C] float64, before the output map; rows of padded tokens are 0.
    Raises: ValueError naming the argument at fault.
    """
    plan, _, local, wide = _project(x, params, num_heads, window, global_mask, token_mask)
    return join_heads(plan.forward(local, wide, "band"))


def longformer_attention_bwd(
    do, x, params: LongformerParams, *, num_heads, window, global_mask=None, token_mask=None
):
    """(dx, dparams: LongformerParams) for the cotangent do [..., L, C]; global rows alone reach `wide`."""
    plan, x, local, wide = _project(x, params, num_heads, window, global_mask, token_mask)
    dims(do=(do, "... L C"), x=(x, "... L C"))
    near, far = plan.backward(plan.real_rows(split_heads(float64(do), num_heads)), local, wide)
    (dx_near, d_local), (dx_far, d_wide) = qkv_vjp(x, params.local, near), qkv_vjp(x, params.wide, far)
    return dx_near + dx_far, LongformerParams(d_local, d_wide)


def longformer_encoder(
    params: LongformerModel, ids, *, config: LongformerConfig, global_mask=None, token_mask=None
):
    """Hidden states [..., L, C] of a RoBERTa whose attention is `longformer_attention`; post-norm blocks.

    Args: ids int [..., L]; masks bool [..., L]. Real tokens are numbered from 0, padding takes row
      num_reserved - 1 of the position table.
    Raises: ValueError for an id outside the vocabulary, more real tokens than positions, or as above.
    """
    c = config
    real = token_rows("token_mask", token_mask, np.shape(ids))
    positions = np.where(real, np.cumsum(real, axis=-1) - 1 + c.num_reserved, max(c.num_reserved - 1, 0))
    x = bert_embed(ids, params.bert, positions=positions, eps=c.eps)
    blocks = params.bert.blocks
    windows = (c.window,) * len(blocks) if isinstance(c.window, int) else c.window
    if len(windows) != len(blocks):
        raise ValueError(f"window must be one number, or one for each of {len(blocks)} blocks, got {windows}")
    for p, wide, window in zip(blocks, params.wide, windows, strict=True):
        o = longformer_attention(
            x, LongformerParams(p, wide), num_heads=c.num_heads, window=window,
            global_mask=global_mask, token_mask=token_mask,
        )  # fmt: skip
        x = layer_norm(x + linear(o, p.w_o, p.b_o), p.ln1_scale, p.ln1_bias, eps=c.eps)
        feed = mlp(x, p.w_fc1, p.b_fc1, p.w_fc2, p.b_fc2)
        x = layer_norm(x + feed, p.ln2_scale, p.ln2_bias, eps=c.eps)
    return x


def extend_positions(table, *, new_len, num_reserved=2):
    """[num_reserved + new_len, D]: reserved rows, then the learned positions over and over.

    Raises: ValueError if new_len is less than the positions of the table [num_reserved + old_len, D].
    """
    rows = dims(table=(table, "n D"))["n"]
    if not 0 <= num_reserved < rows or new_len < rows - num_reserved:
        raise ValueError(
            f"need num_reserved < {rows} and new_len >= {rows - num_reserved}, got {num_reserved=} and "
            f"{new_len=}"
        )
    cycle = num_reserved + np.arange(new_len) % (rows - num_reserved)
    return np.asarray(table)[np.concatenate([np.arange(num_reserved), cycle])]


def extend_to_longformer(params: BertParams, config: LongformerConfig, *, new_len=4096, window=512):
    """(LongformerModel, config): the encoder with positions repeated and q, k, v copied for global rows.

    Its `window` is the given one. On texts inside the old table, seen whole, nothing changes.
    """
    table = extend_positions(params.position, new_len=new_len, num_reserved=config.num_reserved)
    wide = tuple(QKVParams(*(getattr(p, name) for name in QKVParams._fields)) for p in params.blocks)
    return LongformerModel(params._replace(position=table), wide), replace(config, window=window)


def receptive_field(windows, dilations):
    """Tokens that a token of the last of several layers can depend on: 1 + sum of window dilation."""
    pairs = list(zip(windows, dilations, strict=True))
    for window, dilation in pairs:
        check_window(window, dilation)
    return 1 + sum(w * d for w, d in pairs)


def longformer_cost(n, window, num_global, dim, *, num_heads, itemsize=4):
    """{"macs", "score_elements", "bytes"} of `longformer_attention` by the band method.

    score_elements: heads (n (window + 1 + g) + g n), bytes: those of the scores. Full attention has
    heads n^2 and no g. macs: maps of n dim^2 each (three, with globals six), and two products of
    head size a score.
    """
    if min(n, dim, num_heads) < 1 or dim % num_heads or not 0 <= num_global <= n:
        raise ValueError(
            f"need n >= 1, dim a multiple of num_heads and 0 <= num_global <= n, got {n=}, {dim=}, "
            f"{num_heads=}, {num_global=}"
        )
    check_window(window, 1)
    scores = num_heads * (n * (window + 1 + num_global) + num_global * n)
    maps = 3 * n + (3 * n if num_global else 0)
    return {
        "macs": maps * dim**2 + 2 * scores * (dim // num_heads),
        "score_elements": scores,
        "bytes": itemsize * scores,
    }


class _Plan:
    """One call: which keys are gathered, which of them count, and which tokens are global in any text."""

    def __init__(self, q, k, v, window, dilation, global_mask, token_mask, causal, scale):
        n = dims(q=(q, "... H L D"), k=(k, "... H L D"), v=(v, "... H L D"))
        check_window(window, dilation, causal, global_mask)
        lead, L = n["..."], n["L"]
        self.real = token_rows("token_mask", token_mask, (*lead, L))
        self.is_global = token_rows("global_mask", global_mask, (*lead, L), default=False) & self.real
        self.window = {"window": window, "dilation": dilation, "causal": causal}
        self.scale = 1 / np.sqrt(n["D"]) if scale is None else scale
        half = window // 2
        self.offsets = dilation * np.arange(-half, 1 if causal else half + 1)
        keys = np.arange(L)[:, None] + self.offsets  # [L, W]
        self.keys = np.clip(keys, 0, max(L - 1, 0))
        inside = (keys >= 0) & (keys < L)
        # [..., 1, L, W]: a global key counts in its own column, so not in the window as well
        self.near = (inside & (self.real & ~self.is_global)[..., self.keys])[..., None, :, :]
        self.cols = np.flatnonzero(self.is_global.reshape(-1, L).any(axis=0))
        self.far = self.is_global[..., None, self.cols]  # [..., 1, g]

    def real_rows(self, x):
        """x [..., H, L, D] with the rows of padded tokens set to 0."""
        return zero_padding(self.real[..., None, :], x)[0]

    def forward(self, local, wide, method):
        """o [..., H, L, D] from (q, k, v) of local rows and of global rows."""
        q, k, v = local
        if method == "dense":
            return self._dense(local, wide)
        p = self._probabilities(self._band_scores(q, k, method), q, k)
        near, far = p[..., : len(self.offsets)], p[..., len(self.offsets) :]
        o = self._band_values(near, v, method) + far @ v[..., self.cols, :]
        if len(self.cols):
            p, _ = self._global_rows(*wide)
            rows = o[..., self.cols, :]
            o[..., self.cols, :] = np.where(self.far[..., None], p @ wide[2], rows)
        return self.real_rows(o)

    def _probabilities(self, s_near, q, k):
        """softmax over window and global columns together: [..., H, L, W + g]."""
        s_far = self.scale * q @ np.swapaxes(k[..., self.cols, :], -1, -2)
        near = np.where(self.near, s_near, -np.inf)
        far = np.where(self.far[..., None, :], s_far, -np.inf)
        return softmax(np.concatenate([near, far], axis=-1))

    def _global_rows(self, q, k, v):
        """(p [..., H, g, L], their q): global rows look at every real token."""
        q = q[..., self.cols, :]
        s = self.scale * q @ np.swapaxes(k, -1, -2)
        return softmax(np.where(self.real[..., None, None, :], s, -np.inf)), q

    def _dense(self, local, wide):
        """Both kinds of rows with all L^2 scores, and a choice between them."""
        near = dilated_window_mask(len(self.keys), **self.window)
        seen = (near | self.is_global[..., None, :]) & self.real[..., None, :]
        own = attention_dense(*local, mask=seen[..., None, :, :], scale=self.scale)
        all_ = attention_dense(*wide, mask=self.real[..., None, None, :], scale=self.scale)
        return self.real_rows(np.where(self.is_global[..., None, :, None], all_, own))

    def _band_scores(self, q, k, method):
        """scale q_i k_j for j = i + offset: [..., H, L, W]; what lies outside the text is masked later."""
        if method == "chunks":
            return self.scale * chunk_scores(q, k, self.window["window"] // 2)
        return self.scale * (q[..., None, :] @ np.swapaxes(k[..., self.keys, :], -1, -2))[..., 0, :]

    def _band_values(self, p, v, method):
        """sum over offsets of p v_j: [..., H, L, D]."""
        if method == "chunks":
            return chunk_values(p, v, self.window["window"] // 2)
        return (p[..., None, :] @ v[..., self.keys, :])[..., 0, :]

    def backward(self, do, local, wide):
        """((dq, dk, dv) of local rows, (dq, dk, dv) of global rows), probabilities recomputed."""
        q, k, v = local
        W, cols = len(self.offsets), self.cols
        do_local = np.where(self.is_global[..., None, :, None], 0.0, do)
        p = self._probabilities(self._band_scores(q, k, "band"), q, k)
        dp_near = (do_local[..., None, :] @ np.swapaxes(v[..., self.keys, :], -1, -2))[..., 0, :]
        dp = np.concatenate([dp_near, do_local @ np.swapaxes(v[..., cols, :], -1, -2)], axis=-1)
        ds = self.scale * softmax_vjp(p, dp)
        dq = (ds[..., :W][..., None, :] @ k[..., self.keys, :])[..., 0, :] + ds[..., W:] @ k[..., cols, :]
        dk, dv = self._along_diagonals(ds, q), self._along_diagonals(p, do_local)
        return (dq, dk, dv), self._backward_global(do, wide)

    def _along_diagonals(self, weights, x):
        """sum_i weights[i, j] x_i for every key j: the transpose of the gather, a diagonal an offset."""
        L, W = weights.shape[-2], len(self.offsets)
        out = np.zeros_like(x)
        for t, offset in enumerate(self.offsets):
            rows = np.arange(max(0, -offset), min(L, L - offset))
            out[..., rows + offset, :] += weights[..., rows, t, None] * x[..., rows, :]
        out[..., self.cols, :] += np.swapaxes(weights[..., W:], -1, -2) @ x
        return out

    def _backward_global(self, do, wide):
        """(dq, dk, dv) through the global rows alone."""
        _, k, v = wide
        dq = np.zeros_like(k)
        if not len(self.cols):
            return dq, np.zeros_like(k), np.zeros_like(v)
        p, q = self._global_rows(*wide)
        do = np.where(self.far[..., None], do[..., self.cols, :], 0.0)
        ds = self.scale * softmax_vjp(p, do @ np.swapaxes(v, -1, -2))
        dq[..., self.cols, :] = ds @ k
        return dq, np.swapaxes(ds, -1, -2) @ q, np.swapaxes(p, -1, -2) @ do


def _project(x, params, num_heads, window, global_mask, token_mask):
    """(plan, x with padding set to 0, local q, k, v, wide q, k, v)."""
    n = dims(x=(x, "... L C"), w_q=(params.local.w_q, "C E"), wide_w_q=(params.wide.w_q, "C E"))
    check_num_heads(n["E"], num_heads)
    x = zero_padding(token_rows("token_mask", token_mask, x.shape[:-1]), x)[0]
    local = qkv(x, params.local, num_heads=num_heads)
    plan = _Plan(*local, window, 1, global_mask, token_mask, False, None)
    wide = qkv(x, params.wide, num_heads=num_heads) if len(plan.cols) else local
    return plan, x, tuple(map(plan.real_rows, local)), tuple(map(plan.real_rows, wide))


def example(seed=0):
    """SmolLM2's heads and hidden states on Hamlet; the first token is global, the last three are padding."""
    from ref.data import attention_inputs, hidden_states
    from ref.models.bert import init_bert
    from ref.models.heads import ClassHead, LinearHead

    rng = np.random.default_rng(seed)
    q, k, v = (x[None, :3, :40] for x in attention_inputs())
    first, real = np.arange(40)[None] == 0, np.arange(40)[None] < 37
    masks = {"global_mask": first, "token_mask": real}
    x = hidden_states()[None, :40, :24] / 8
    maps = lambda: QKVParams(*(rng.standard_normal(s) / 5 for s in ((24, 24), 24) * 3))
    params = LongformerParams(maps(), maps())
    do, dx = rng.standard_normal(q.shape), rng.standard_normal(x.shape)
    bert = init_bert(rng, vocab=50, context=22, dim=24, depth=1, types=1, pooler=False, std=0.2)
    model, config = extend_to_longformer(bert, LongformerConfig(2), new_len=40, window=8)
    ids = rng.integers(0, 50, (1, 40))
    head = LinearHead(rng.standard_normal((24, 2)), np.zeros(2))
    classes = ClassHead(rng.standard_normal((24, 24)) / 5, np.zeros(24), *head)
    return [
        Example("longformer_mask", (40,), {"window": 8, "global_mask": first[0]}),
        Example("sliding_window_attention", (q, k, v), {"window": 8, **masks}, (0, 1, 2)),
        Example("sliding_window_attention_bwd", (do, q, k, v), {"window": 8, **masks}),
        Example("longformer_attention", (x, params), {"num_heads": 2, "window": 8, **masks}, (0, 1)),
        Example("longformer_attention_bwd", (dx, x, params), {"num_heads": 2, "window": 8, **masks}),
        Example("longformer_encoder", (model, ids), {"config": config, **masks}, (0,)),
        Example("mlm_loss", (x, ids % 24), {}, (0,)),
        Example("token_logits", (head, x), {}, (0, 1)),
        Example("span_logits", (head, x), {}, (0, 1)),
        Example("class_logits", (classes, x), {}, (0, 1)),
    ]
