"""A text classifier: BERT, its pooled first token, and a linear map to classes.

Source: Devlin et al. 2019, section 4.1. Token types are zero; dropout is left out.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.mlp import linear, linear_vjp
from ref.checks import check_num_heads
from ref.dims import dims, float64
from ref.models.bert import BertParams, bert_encode, bert_encode_vjp, bert_pool, bert_pool_vjp, init_bert


class ClassifierParams(NamedTuple):
    """bert, with its pooler; w_cls [d, C], b_cls [C]."""

    bert: BertParams
    w_cls: np.ndarray
    b_cls: np.ndarray


def init_classifier(rng, *, classes, std=0.02, **sizes):
    """ClassifierParams drawn by a NumPy Generator; sizes: vocab, context, dim, depth, ... of `init_bert`."""
    bert = init_bert(rng, std=std, **sizes)
    return ClassifierParams(bert, std * rng.standard_normal((sizes["dim"], classes)), np.zeros(classes))


def bert_classifier_forward(ids, mask, params: ClassifierParams, *, num_heads, eps=1e-12):
    """Logits [B, C] of ids [B, T]: tanh(h_0 w_pool + b_pool) w_cls + b_cls, h_0 the first token's last state.

    mask: bool [B, T], True = real token. Raises: ValueError for a mask that is not boolean or hides a first
    token, ids outside the vocabulary, too long a text, or heads that do not divide d.
    """
    _check(ids, mask, params, num_heads)
    h = bert_encode(ids, params.bert, num_heads=num_heads, token_mask=mask, eps=eps)
    return linear(bert_pool(h, params.bert), params.w_cls, params.b_cls)


def bert_classifier_forward_backward(
    ids, mask, params: ClassifierParams, dlogits, *, num_heads, eps=1e-12
) -> ClassifierParams:
    """Gradients of the parameters for dlogits [B, C]."""
    _check(ids, mask, params, num_heads)
    options = {"num_heads": num_heads, "token_mask": mask, "eps": eps}
    h = bert_encode(ids, params.bert, **options)
    dpooled, dw_cls, db_cls = linear_vjp(bert_pool(h, params.bert), params.w_cls, float64(dlogits))
    dh, dw_pool, db_pool = bert_pool_vjp(h, params.bert, dpooled)
    dbert = bert_encode_vjp(ids, params.bert, dh, **options)
    return ClassifierParams(dbert._replace(w_pool=dw_pool, b_pool=db_pool), dw_cls, db_cls)


def _check(ids, mask, params, num_heads):
    dims(ids=(ids, "B T"), mask=(mask, "B T"))
    dims(word=(params.bert.word, "V d"), w_cls=(params.w_cls, "d C"), b_cls=(params.b_cls, "C"))
    if np.asarray(mask).dtype != bool:
        raise ValueError(f"mask must be boolean (True = real token), got dtype {np.asarray(mask).dtype}")
    if not np.asarray(mask)[:, :1].all() or not np.shape(ids)[1]:
        raise ValueError("mask must show the first token of every text: the class is read there")
    check_num_heads(params.bert.word.shape[1], num_heads)
