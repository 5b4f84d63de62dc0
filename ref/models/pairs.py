"""Networks that read a pair of texts: a regression on the pair, and a match of one text with several.

Source: Sheng et al. 2021 (ACL-IJCNLP, pages 5468-5481) and the code released with it, see
ref/language/mtm.py; the encoder is ref/models/bert.py. Dropout is left out.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ref.blocks.mlp import gelu, gelu_grad, linear, linear_vjp, sigmoid
from ref.blocks.optim import tree_leaves, tree_map
from ref.checks import check_num_heads
from ref.dims import dims, float64
from ref.models.bert import BertParams, bert_encode, bert_encode_vjp, bert_pool, bert_pool_vjp, init_bert

LIMITS = ("max_len", "claim_max", "cls_id", "sep_id", "pad_id")  # the keywords of `encode_pairs`
TINY = 1e-8  # the released code's guard of every division


class RotParams(NamedTuple):
    """bert: one block and a pooler; w_head [d, 2]."""

    bert: BertParams
    w_head: np.ndarray


class Linear(NamedTuple):
    """w [in, out], b [out] or None."""

    w: np.ndarray
    b: np.ndarray | None = None


class MatchParams(NamedTuple):
    """bert without a pooler; head: Linear maps from 3 d to 2."""

    bert: BertParams
    head: tuple[Linear, ...]


class Selection(NamedTuple):
    """order, pattern int [n], score [n] of all sentences, best first; weight [min(top, n)] of the chosen."""

    order: np.ndarray
    pattern: np.ndarray
    score: np.ndarray
    weight: np.ndarray


def encode_pairs(claims, sentences, *, max_len=256, claim_max=180, cls_id=101, sep_id=102, pad_id=103):
    """(ids int, mask bool, types int), each [n, max_len], of `CLS claim SEP sentence SEP`; mask True = token.

    Claims are cut to claim_max, sentences to max_len - claim_max - 3. Types are 0 up to the first SEP, 1
    after it, padding included. Raises: ValueError for an empty claim or no room for a sentence.
    """
    room = max_len - claim_max - 3
    if claim_max < 1 or room < 0:
        raise ValueError(
            f"max_len must be at least claim_max + 3, claim_max at least 1: {max_len=}, {claim_max=}"
        )
    if len(claims) != len(sentences):
        raise ValueError(f"claims and sentences must be as many, got {len(claims)} and {len(sentences)}")
    ids = np.full((len(claims), max_len), pad_id, np.int64)
    mask, types = np.zeros(ids.shape, bool), np.ones(ids.shape, np.int64)
    for n, (claim, sentence) in enumerate(zip(claims, sentences, strict=True)):
        if not len(claim):
            raise ValueError(f"claims[{n}] is empty")
        first = [cls_id, *claim[:claim_max], sep_id]
        row = [*first, *sentence[:room], sep_id]
        ids[n, : len(row)], mask[n, : len(row)], types[n, : len(first)] = row, True, 0
    return ids, mask, types


def rot_forward(ids, mask, types, params: RotParams, *, num_heads, eps=1e-12):
    """sigmoid(pooled w_head) [B, 2]: the ROUGE-2 precision and recall expected of the pairs [B, T]."""
    return _rot(ids, mask, types, params, num_heads, eps)[-1]


def rot_forward_backward(ids, mask, types, params: RotParams, dpred, *, num_heads, eps=1e-12) -> RotParams:
    """Gradients of the parameters for dpred [B, 2]."""
    h, pooled, pred = _rot(ids, mask, types, params, num_heads, eps)
    dpooled, dw_head, _ = linear_vjp(pooled, params.w_head, float64(dpred) * pred * (1 - pred), bias=False)
    dh, dw_pool, db_pool = bert_pool_vjp(h, params.bert, dpooled)
    options = {"num_heads": num_heads, "token_mask": mask, "types": types, "eps": eps}
    dbert = bert_encode_vjp(ids, params.bert, dh, **options)
    return RotParams(dbert._replace(w_pool=dw_pool, b_pool=db_pool), dw_head)


def rot_loss(
    ids, mask, types, target, params: RotParams, *, num_heads, anchor=None, regularize=0.0, eps=1e-12
):
    """Mean squared error to target [B, 2] + regularize |bert - anchor|^2.

    anchor: BertParams of the pretrained weights; what is None in it (a fresh pooler) is free. The released
    code's anchor moves with the weights, so that its penalty is always 0: that is regularize = 0 here.
    Raises: ValueError for regularize < 0, or without an anchor.
    """
    gaps = _gaps(params, anchor, regularize)
    pred = _prediction(ids, mask, types, target, params, num_heads, eps)
    return ((pred - target) ** 2).mean() + regularize * sum((g**2).sum() for g in tree_leaves(gaps))


def rot_loss_backward(ids, mask, types, target, params: RotParams, dloss=1.0, *, num_heads,
                      anchor=None, regularize=0.0, eps=1e-12):  # fmt: skip
    """(dtarget [B, 2], RotParams of gradients) of `rot_loss`, times dloss."""
    gaps = _gaps(params, anchor, regularize)
    pred = _prediction(ids, mask, types, target, params, num_heads, eps)
    dpred = dloss * 2 * (pred - target) / pred.size
    grads = rot_forward_backward(ids, mask, types, params, dpred, num_heads=num_heads, eps=eps)
    if gaps is not None:
        pull = tree_map(lambda g, d: g + 2 * dloss * regularize * d, _common(grads.bert, gaps), gaps)
        grads = grads._replace(bert=_fill(pull, grads.bert))
    return -dpred, grads


def match_forward(
    ids, mask, types, weight, pattern, memory, params: MatchParams, *, num_heads, activation_between=False,
    eps=1e-12,
):  # fmt: skip
    """Logits [B, 2] of B articles, each S encoded pairs [B, S, T] with weight and pattern [B, S].

    v_j = [mean of the claim's states, mean of the sentence's, M_k] [3 d], CLS and SEP in neither; the article
    is sum_j weight_j v_j; then the head's linear maps and GELU twice, as the released code has it.
    activation_between: a GELU after each map but the last as well. A pair of weight 0 pads.
    """
    return _match(ids, mask, types, weight, pattern, memory, params, num_heads, activation_between, eps)[0]


def match_forward_backward(
    ids, mask, types, weight, pattern, memory, params: MatchParams, dlogits, *, num_heads,
    activation_between=False, eps=1e-12,
) -> MatchParams:  # fmt: skip
    """Gradients of the parameters for dlogits [B, 2]; selection and memory are constants, as in the paper."""
    _, stages, shares = _match(
        ids, mask, types, weight, pattern, memory, params, num_heads, activation_between, eps
    )
    z = stages[-1]
    d, head = float64(dlogits) * gelu_grad(gelu(z)) * gelu_grad(z), []
    for n in reversed(range(len(params.head))):
        layer, x = params.head[n], stages[n]
        if activation_between and n:
            x = gelu(x)
        d, dw, db = linear_vjp(x, layer.w, d, bias=layer.b is not None)
        if activation_between and n:
            d = d * gelu_grad(stages[n])
        head.append(Linear(dw, db))
    width = params.bert.word.shape[1]
    parts = d[:, :width], d[:, width : 2 * width]
    dh = sum(
        float64(weight)[:, :, None, None] * share[..., None] * part[:, None, None, :]
        for share, part in zip(shares, parts, strict=True)
    )
    options = {"num_heads": num_heads, "token_mask": mask, "types": types, "eps": eps}
    return MatchParams(bert_encode_vjp(ids, params.bert, dh, **options), tuple(head[::-1]))


def match_score(
    claim_ids, sentence_ids, selection: Selection, memory, params: MatchParams, *, num_heads, top=3,
    max_len=256, claim_max=180, cls_id=101, sep_id=102, pad_id=103, activation_between=False, eps=1e-12,
):  # fmt: skip
    """Logits [2] of one article, sentence_ids lists of ids in their own order. Rank articles by logit 1."""
    special = dict(zip(LIMITS, (max_len, claim_max, cls_id, sep_id, pad_id), strict=True))
    inputs = selected_pairs(claim_ids, sentence_ids, selection, top, special)
    options = {"num_heads": num_heads, "activation_between": activation_between, "eps": eps}
    return match_forward(*inputs, memory, params, **options)[0]


def match_score_backward(
    claim_ids, sentence_ids, selection: Selection, memory, params: MatchParams, dlogits, *, num_heads, top=3,
    max_len=256, claim_max=180, cls_id=101, sep_id=102, pad_id=103, activation_between=False, eps=1e-12,
) -> MatchParams:  # fmt: skip
    """Gradients of the parameters for dlogits [2]; selection and memory are constants."""
    special = dict(zip(LIMITS, (max_len, claim_max, cls_id, sep_id, pad_id), strict=True))
    inputs = selected_pairs(claim_ids, sentence_ids, selection, top, special)
    options = {"num_heads": num_heads, "activation_between": activation_between, "eps": eps}
    return match_forward_backward(*inputs, memory, params, float64(dlogits)[None], **options)


def selected_pairs(claim_ids, sentence_ids, selection, top, special):
    """(ids, mask, types, weight, pattern) of the selected sentences, a batch of one article."""
    n = dims(order=(selection.order, "n"), pattern=(selection.pattern, "n"))["n"]
    if not len(sentence_ids) or n != len(sentence_ids):
        raise ValueError(f"sentence_ids must be the {n} sentences of the selection, got {len(sentence_ids)}")
    if top < 1 or len(selection.weight) != min(top, n):
        raise ValueError(
            f"selection.weight must hold min(top, {n}) weights, got {len(selection.weight)} for {top=}"
        )
    chosen = [sentence_ids[i] for i in selection.order[:top]]
    pairs = encode_pairs([claim_ids] * len(chosen), chosen, **special)
    return (*(x[None] for x in pairs), selection.weight[None], selection.pattern[None, :top])


def pad_pairs(article, top):
    """The inputs of one article with `top` pairs: the first again, at weight 0, for those it lacks."""
    lacks = top - article[0].shape[1]
    ids, mask, types, weight, pattern = article
    again = (np.repeat(x[:, :1], lacks, axis=1) for x in (ids, mask, types))
    more = (*again, np.zeros((1, lacks)), np.zeros((1, lacks), int))
    return [np.concatenate(x, axis=1) for x in zip((ids, mask, types, weight, pattern), more, strict=True)]


def init_rot(rng, *, vocab, context, dim, hidden=None, std=0.02) -> RotParams:
    """One block with a fresh pooler and head, normal weights."""
    bert = init_bert(rng, vocab=vocab, context=context, dim=dim, depth=1, hidden=hidden, std=std)
    return RotParams(bert, std * rng.standard_normal((dim, 2)))


def init_match(rng, *, vocab, context, dim, depth, hidden=None, std=0.02) -> MatchParams:
    """An encoder without a pooler, and five maps that halve the width from 3 d before they end in 2."""
    bert = init_bert(
        rng, vocab=vocab, context=context, dim=dim, depth=depth, hidden=hidden, pooler=False, std=std
    )
    widths = [max(3 * dim // 2**n, 2) for n in range(5)]
    maps = [Linear(std * rng.standard_normal(io), np.zeros(io[1])) for io in pairwise(widths)]
    return MatchParams(bert, (*maps, Linear(std * rng.standard_normal((widths[-1], 2)))))


def _prediction(ids, mask, types, target, params, num_heads, eps):
    if dims(ids=(ids, "B T"), target=(target, "B 2"))["B"] < 1:
        raise ValueError("ids must hold at least one pair: a mean over none is not defined")
    return rot_forward(ids, mask, types, params, num_heads=num_heads, eps=eps)


def _gaps(params, anchor, regularize):
    """params.bert - anchor where the anchor is not None; None if nothing pulls."""
    if not regularize >= 0:
        raise ValueError(f"regularize must not be negative, got {regularize}")
    if regularize == 0:
        return None
    if anchor is None:
        raise ValueError("anchor must be the pretrained weights where regularize > 0")
    return tree_map(lambda a, p: p - a, anchor, _common(params.bert, anchor))


def _common(tree, like):
    """The tree with None wherever `like` has it."""
    return tree_map(lambda _, p: p, like, tree)


def _fill(tree, default):
    """The tree with the fields that are None taken from `default`."""
    return tree._replace(**{n: d for n, t, d in zip(tree._fields, tree, default, strict=True) if t is None})


def _rot(ids, mask, types, params, num_heads, eps):
    """(states, pooled, prediction)."""
    _check_pairs(ids, mask, types, params.bert, num_heads, "B T")
    options = {"num_heads": num_heads, "token_mask": mask, "types": types, "eps": eps}
    h = bert_encode(ids, params.bert, **options)
    pooled = bert_pool(h, params.bert)
    return h, pooled, sigmoid(linear(pooled, params.w_head))


def _match(ids, mask, types, weight, pattern, memory, params, num_heads, between, eps):
    """(logits, input of every map and output of the last, shares of claim and sentence [B, S, T])."""
    n = _check_pairs(ids, mask, types, params.bert, num_heads, "B S T")
    dims(ids=(ids, "B S T"), weight=(weight, "B S"), pattern=(pattern, "B S"))
    dims(word=(params.bert.word, "V d"), memory=(memory, "K d"))
    options = {"num_heads": num_heads, "token_mask": mask, "types": types, "eps": eps}
    h = bert_encode(ids, params.bert, **options)
    mask, place = np.asarray(mask), np.arange(n["T"])
    ends = [
        x.sum(axis=-1, keepdims=True) for x in (mask & (np.asarray(types) == 0), mask)
    ]  # one past each SEP
    spans = (place > 0) & (place < ends[0] - 1), (place >= ends[0]) & (place < ends[1] - 1)
    shares = [x / (x.sum(axis=-1, keepdims=True) + TINY) for x in spans]
    means = [(x[..., None] * h).sum(axis=-2) for x in shares]
    v = np.concatenate([*means, float64(memory)[np.asarray(pattern)]], axis=-1)
    stages = [(float64(weight)[..., None] * v).sum(axis=1)]
    for i, layer in enumerate(params.head):
        stages.append(linear(gelu(stages[-1]) if between and i else stages[-1], layer.w, layer.b))
    return gelu(gelu(stages[-1])), stages, shares


def _check_pairs(ids, mask, types, bert, num_heads, spec):
    n = dims(ids=(ids, spec), mask=(mask, spec), types=(types, spec))
    if np.asarray(mask).dtype != bool or not np.asarray(mask)[..., :1].all():
        raise ValueError("mask must be boolean (True = token), with every first token shown")
    check_num_heads(bert.word.shape[1], num_heads)
    return n
