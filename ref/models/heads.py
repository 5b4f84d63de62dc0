"""What stands on an encoder: logits for tokens, spans and classes, and the masked-language-model head.

Source: Devlin et al. 2019 (arXiv 1810.04805), sections 3.1 and 4; the class head is RoBERTa's (Liu et al.
2019).
Weights are [in, out], x is [..., T, d].
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.losses import cross_entropy
from ref.blocks.mlp import gelu, linear
from ref.blocks.norms import layer_norm
from ref.dims import dims, float64

IGNORED = -100  # the label of a position that is not to be predicted


class LinearHead(NamedTuple):
    """w [d, n], b [n]."""

    w: np.ndarray
    b: np.ndarray


class ClassHead(NamedTuple):
    """w_dense [d, d], b_dense [d], then w [d, n], b [n]."""

    w_dense: np.ndarray
    b_dense: np.ndarray
    w: np.ndarray
    b: np.ndarray


class MLMHead(NamedTuple):
    """w_dense [d, d], b_dense, ln_scale, ln_bias [d], b [V]; the decoder is the word table itself."""

    w_dense: np.ndarray
    b_dense: np.ndarray
    ln_scale: np.ndarray
    ln_bias: np.ndarray
    b: np.ndarray


def token_logits(params: LinearHead, x):
    """x w + b, one distribution a token (tagging): [..., T, n]."""
    return linear(x, params.w, params.b)


def span_logits(params: LinearHead, x):
    """(start [..., T], end [..., T]): logits of where an answer begins and ends; params.w is [d, 2].

    Raises: ValueError unless params.w has two columns.
    """
    dims(w=(params.w, "d 2"))
    both = linear(x, params.w, params.b)
    return both[..., 0], both[..., 1]


def class_logits(params: ClassHead, x):
    """tanh(x_0 w_dense + b_dense) w + b of the first token: [..., n]."""
    return linear(np.tanh(linear(x[..., 0, :], params.w_dense, params.b_dense)), params.w, params.b)


def mlm_logits(params: MLMHead, x, word, *, eps=1e-5):
    """ln(gelu(x w_dense + b_dense)) word^T + b: [..., T, V]; word [V, d] is the embedding table."""
    h = layer_norm(gelu(linear(x, params.w_dense, params.b_dense)), params.ln_scale, params.ln_bias, eps=eps)
    return h @ float64(word).T + params.b


def mlm_loss(logits, labels):
    """`cross_entropy` of the positions that have a label; 0 if there is none.

    Args: logits [..., V]; labels int [...], IGNORED (-100) where nothing is to be predicted.
    Raises: ValueError for another label outside 0..V-1.
    """
    dims(logits=(logits, "... V"), labels=(labels, "..."))
    if (np.asarray(labels) == IGNORED).all():
        return np.float64(0)
    return cross_entropy(logits, labels, ignore=IGNORED)[0]
