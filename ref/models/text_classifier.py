"""Text classifiers from scratch: a BERT with a class head, or a bag of word vectors, and their training.

The encoder is ref/models/classifier.py, words become ids by ref/blocks/words.py. Dropout is left out.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.losses import cross_entropy, macro_f1
from ref.blocks.optim import adam_init, adamw_step, matrix_mask, warmup_linear
from ref.blocks.words import (
    CLS,
    PAD,
    SEP,
    Encoder,
    is_word,
    split_tokens,
    truncate,
    word_counts,
    word_encoder,
)
from ref.models.classifier import (
    ClassifierParams,
    bert_classifier_forward,
    bert_classifier_forward_backward,
    init_classifier,
)


def as_it_is(text, counts):
    """The text, unchanged."""
    return text


class BagParams(NamedTuple):
    """word [V, d]; w_cls [d, C], b_cls [C]."""

    word: np.ndarray
    w_cls: np.ndarray
    b_cls: np.ndarray


def bag_classifier(ids, mask, params: BagParams):
    """Logits [B, C] from the mean word vector, the baseline without an order: ids, mask bool [B, T]."""
    return _bag(ids, mask, params) @ params.w_cls + params.b_cls


def bag_classifier_backward(ids, mask, params: BagParams, dlogits) -> BagParams:
    """Gradients of the parameters for dlogits [B, C]."""
    share = mask / mask.sum(axis=1, keepdims=True)
    dword = np.zeros(params.word.shape)
    np.add.at(dword, ids, share[..., None] * (dlogits @ params.w_cls.T)[:, None])
    return BagParams(dword, _bag(ids, mask, params).T @ dlogits, dlogits.sum(axis=0))


@dataclass(frozen=True)
class TextConfig:
    """Options of `train_texts`.

    depth 0 is the bag of word vectors. vocab: words and marks that get an id. patience: epochs without a
    better validation macro-F1 before it stops. validation: share of the texts that is held out for that.
    """

    length: int = 128
    mode: str = "head"
    vocab: int = 4000
    dim: int = 128
    depth: int = 2
    num_heads: int = 4
    epochs: int = 20
    batch: int = 32
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    patience: int = 2
    validation: float = 0.1
    seed: int = 0


class TextModel(NamedTuple):
    """What `classify_texts` needs: weights, encoder, counts of the training words, config, prepare."""

    weights: BagParams | ClassifierParams
    encoder: Encoder
    counts: Counter
    config: TextConfig
    prepare: Callable


class History(NamedTuple):
    """loss of every step; val_f1 of every epoch; best: the epoch whose weights were kept."""

    loss: list
    val_f1: list
    best: int


def train_texts(texts, labels, config: TextConfig, *, prepare=as_it_is):
    """(TextModel, History) of texts with labels int [n] in 0..C-1, from scratch.

    Cross-entropy, AdamW, warm-up and linear decay, clipping, early stopping on a share that is held out.
    prepare(text, counts) -> text is done to every text first; counts: of the words of the training texts.
    Raises: ValueError for too few texts, or a validation share that leaves none.
    """
    labels, rng = np.asarray(labels), np.random.default_rng(config.seed)
    held = max(1, round(config.validation * len(texts)))
    if len(texts) != len(labels) or len(texts) - held < 1:
        raise ValueError(
            f"need a label a text and texts beside the {held} held out, got {len(texts)}, {len(labels)}"
        )
    order, classes = rng.permutation(len(texts)), int(labels.max()) + 1
    val, rest = order[:held], order[held:]
    counts = word_counts(texts[i] for i in rest)  # the held-out texts must not be counted
    marks = Counter(t for i in rest for t in split_tokens(texts[i]) if not is_word(t))
    encoder = word_encoder(counts + marks, size=config.vocab)
    weights = _init(rng, encoder.vocab, classes, config)
    model, history = TextModel(weights, encoder, counts, config, prepare), History([], [], -1)
    state, mask, kept = adam_init(weights), matrix_mask(weights), weights
    per_epoch = -(-len(rest) // config.batch)
    for epoch in range(config.epochs):
        rest = rng.permutation(rest)
        for n in range(per_epoch):
            rows = rest[n * config.batch : (n + 1) * config.batch]
            ids, shown = text_batch([texts[i] for i in rows], model)
            loss, dlogits = cross_entropy(_logits(ids, shown, weights, config), labels[rows])
            grads = _gradients(ids, shown, weights, dlogits, config)
            rate = warmup_linear(len(history.loss), steps=per_epoch * config.epochs, warmup=config.warmup)
            weights, state, _ = adamw_step(
                weights, grads, state, lr=config.lr * rate, weight_decay=config.weight_decay, decay_mask=mask,
                clip=config.clip,
            )  # fmt: skip
            history.loss.append(float(loss))
        guess = classify_texts(model._replace(weights=weights), [texts[i] for i in val])
        history.val_f1.append(macro_f1(labels[val], guess, num_classes=classes))
        if epoch == 0 or history.val_f1[-1] > history.val_f1[history.best]:
            history, kept = history._replace(best=epoch), weights
        elif epoch - history.best >= config.patience:
            break
    return model._replace(weights=kept), history


def classify_texts(model: TextModel, texts):
    """Classes int [n] of texts, prepared and cut as in training."""
    c, out = model.config, []
    for n in range(0, len(texts), c.batch):
        ids, mask = text_batch(texts[n : n + c.batch], model)
        out.append(np.argmax(_logits(ids, mask, model.weights, c), axis=1))
    return np.concatenate(out) if out else np.zeros(0, int)


def _bag(ids, mask, params):
    share = mask / mask.sum(axis=1, keepdims=True)
    return (share[..., None] * params.word[ids]).sum(axis=1)


def _init(rng, vocab, classes, c):
    if c.depth:
        sizes = {"vocab": vocab, "context": c.length, "dim": c.dim, "depth": c.depth}
        return init_classifier(rng, classes=classes, **sizes)
    normal = lambda *shape: 0.02 * rng.standard_normal(shape)
    return BagParams(normal(vocab, c.dim), normal(c.dim, classes), np.zeros(classes))


def _logits(ids, mask, weights, c):
    if c.depth:
        return bert_classifier_forward(ids, mask, weights, num_heads=c.num_heads)
    return bag_classifier(ids, mask, weights)


def _gradients(ids, mask, weights, dlogits, c):
    if c.depth:
        return bert_classifier_forward_backward(ids, mask, weights, dlogits, num_heads=c.num_heads)
    return bag_classifier_backward(ids, mask, weights, dlogits)


def text_batch(texts, model):
    """(ids [B, T], mask [B, T]) of texts prepared, encoded and cut, padded to the longest."""
    c, rows = model.config, []
    for text in texts:
        short = model.prepare(text, model.counts)
        rows.append(
            truncate(model.encoder.encode(short), length=c.length, mode=c.mode, cls_id=CLS, sep_id=SEP)
        )
    ids = np.full((len(rows), max(map(len, rows))), PAD, np.int64)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = row
    return ids, np.arange(ids.shape[1]) < np.array([[len(r)] for r in rows])
