"""Long texts on a small device: thin the text first, so that 128 tokens carry what 512 did.

Source: arXiv 2403.12563 (2024), a study of Indonesian news of which only the abstract was at hand: drop stop
words, keep punctuation and rare words, choose the tokenizer with the fewest pieces a word. The exact rules
are ours. Words are those of ref/blocks/words.py, training is ref/models/text_classifier.py, the search
ref/blocks/ladder.py, the corpora ref/tasks/corpora.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.ladder import dynamic_hpo
from ref.blocks.losses import macro_f1
from ref.blocks.words import Encoder, is_word, split_tokens, truncate, word_counts, word_encoder
from ref.example import Example
from ref.models.bert_cost import encoder_macs
from ref.models.classifier import ClassifierParams, init_classifier
from ref.models.classifier import bert_classifier_forward as encoder_classifier
from ref.models.classifier import bert_classifier_forward_backward as encoder_classifier_backward
from ref.models.text_classifier import (
    History,
    TextConfig,
    TextModel,
    bag_classifier,
    bag_classifier_backward,
    classify_texts,
    text_batch,
    train_texts,
)
from ref.tasks.corpora import Corpus, brown_corpus, docstring_corpus, held_out, review_corpus

__all__ = [
    "ClassifierParams", "Corpus", "Cost", "Encoder", "HackConfig", "History", "TextConfig", "TextModel",
    "TokenizerRow", "bag_classifier", "bag_classifier_backward", "brown_corpus", "classify_texts",
    "compare_tokenizers", "coverage", "docstring_corpus", "dynamic_hpo", "encoder_classifier",
    "encoder_classifier_backward", "encoder_cost", "english_stopwords", "example", "fertility", "held_out",
    "is_word", "macro_f1", "review_corpus", "split_tokens", "thin", "train_text_classifier", "truncate",
    "word_counts", "word_encoder",
]  # fmt: skip

LONG = 510  # pieces that fit beside CLS and SEP in 512


class TokenizerRow(NamedTuple):
    """What `compare_tokenizers` says of one tokenizer; recommended is True for one row at most."""

    name: str
    fertility: float
    over_510: float
    unknown: float
    vocab: int
    recommended: bool


class Cost(NamedTuple):
    """flops, activation_bytes of a forward pass."""

    flops: int
    activation_bytes: int


def thin(text, *, stopwords=None, min_count=0, counts=None, drop_recurring=False, drop_punctuation=False):
    """The text without stop words, rare words, words that came before, marks, by choice; joined by spaces.

    Args: stopwords: words, or None. min_count: the least count in `counts`, 0 for a word that is not there.
      drop_recurring keeps the first of each word; marks are not affected. Each hack is idempotent, and their
      order does not matter. Raises: ValueError for min_count < 0, or min_count > 0 without counts.
    """
    if min_count < 0 or (min_count > 0 and counts is None):
        raise ValueError(
            f"min_count must not be negative, and needs counts if it is positive, got {min_count}"
        )
    stop, seen, kept = {w.casefold() for w in stopwords or ()}, set(), []
    for token in split_tokens(text):
        key = token.casefold()
        if not is_word(token):
            if not drop_punctuation:
                kept.append(token)
        elif key not in stop and (min_count == 0 or counts.get(key, 0) >= min_count) and key not in seen:
            kept.append(token)
            if drop_recurring:
                seen.add(key)
    return " ".join(kept)


def english_stopwords():
    """The 318 English stop words of scikit-learn. They hold "not", which a judgement may hang on."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS)


def fertility(encode, texts):
    """(pieces a word, share of the texts with more than 510 pieces, share of unknown pieces) of a tokenizer.

    encode: a function text -> ids, or an `Encoder`, whose unknown id is counted. A tokenizer that answers
    "unknown" looks cheap: read the third number with the first. Raises: ValueError for texts without a word.
    """
    encoder = encode if isinstance(encode, Encoder) else Encoder(encode, 0)
    pieces = [np.asarray(encoder.encode(t)) for t in texts]
    words = sum(map(is_word, (t for text in texts for t in split_tokens(text))))
    if not words:
        raise ValueError("texts must hold at least one word")
    total = sum(map(len, pieces))
    unknown = 0 if encoder.unknown is None else sum((p == encoder.unknown).sum() for p in pieces)
    return total / words, np.mean([len(p) > LONG for p in pieces]), unknown / max(total, 1)


def compare_tokenizers(encoders, texts):
    """A `TokenizerRow` for each of {name: Encoder}.

    Recommended is the smallest fertility, of equals the smaller vocabulary, among those with less than 1 %
    unknown pieces.
    """
    rows = [TokenizerRow(name, *fertility(e, texts), e.vocab, False) for name, e in encoders.items()]
    fit = [n for n, r in enumerate(rows) if r.unknown < 0.01]
    best = min(fit, key=lambda n: (rows[n].fertility, rows[n].vocab), default=None)
    return [r._replace(recommended=n == best) for n, r in enumerate(rows)]


def coverage(text, thinned, encode, length, *, stopwords=()):
    """{"pieces", "coverage", "type_coverage"}: how far length - 2 pieces of `thinned` reach into the text.

    coverage: words of the text up to the last token that fits, over all of them; 1 where nothing is cut.
    type_coverage: share of its distinct words, stop words aside, that fit. `thinned` comes from `thin`; a
    token fits once all its pieces do. Raises: ValueError for a length under 3.
    """
    if length < 3:
        raise ValueError(f"length must be at least 3, CLS and SEP and a piece, got {length}")
    kept, room, original = split_tokens(thinned), length - 2, split_tokens(text)
    fits = lambda n: len(encode(" ".join(kept[:n]))) <= room
    low, high = 0, len(kept)
    while low < high:  # the most tokens whose pieces fit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    stop = {w.casefold() for w in stopwords}
    keys = lambda tokens: {t.casefold() for t in tokens if is_word(t)}
    words, reached, at = 0, 0, 0
    for token in original:  # a hack that keeps a spelling keeps its first: the first match is the right one
        words += is_word(token)
        if at < low and token == kept[at]:
            reached, at = words, at + 1
    types = keys(original) - stop
    return {
        "pieces": min(len(encode(thinned)), room),
        "coverage": reached / words if low < len(kept) and words else 1.0,
        "type_coverage": len(keys(kept[:low]) & types) / len(types) if types else 1.0,
    }


@dataclass(frozen=True)
class HackConfig(TextConfig):
    """`TextConfig` with hacks: keywords of `thin` but counts, which are those of the training texts."""

    hacks: tuple[tuple[str, object], ...] = ()


def train_text_classifier(texts, labels, config: HackConfig):
    """(TextModel, History): `train_texts` on texts thinned by the hacks of the config."""
    hacks = dict(config.hacks)
    prepare = lambda text, counts: thin(text, counts=counts, **hacks)
    return train_texts(texts, labels, config, prepare=prepare)


def encoder_cost(*, n, layers, dim, heads, batch=1) -> Cost:
    """FLOPs batch layers (24 n d^2 + 4 n^2 d), bytes batch layers (34 n d + 5 h n^2) of a forward pass.

    FLOPs: two a product of `encoder_macs`, with a hidden layer of 4 d; training takes three times as many.
    The square of n dominates from n = 6 d on. Bytes: the usual estimate of what all layers keep for training,
    in values of 2 bytes; `server_memory` of masked_multidomain counts what one layer holds at once.
    """
    if min(n, layers, dim, heads, batch) < 1:
        raise ValueError(
            f"n, layers, dim, heads and batch must be at least 1: {n}, {layers}, {dim}, {heads}, {batch}"
        )
    flops = 2 * batch * encoder_macs(n, depth=layers, dim=dim, hidden=4 * dim)
    return Cost(flops, batch * layers * (34 * n * dim + 5 * heads * n**2))


def example(seed=0):
    """A small encoder on the openings of four passages of Hamlet, thinned."""
    from ref.data import text

    rng = np.random.default_rng(seed)
    passages = [text()[1000 * n : 1000 * n + 400] for n in range(4)]
    counts = word_counts(passages)
    encoder = word_encoder(counts, size=40)
    weights = init_classifier(rng, classes=3, vocab=encoder.vocab, context=12, dim=12, depth=2, std=0.3)
    prepare = lambda text, counts: thin(text, counts=counts, min_count=2, drop_recurring=True)
    ids, mask = text_batch(passages, TextModel(weights, encoder, counts, TextConfig(length=12), prepare))
    return [Example("encoder_classifier", (ids, mask, weights), {"num_heads": 3}, (2,))]
