"""Verbatim memory: does a language model keep the exact words it has read? A list is shown twice.

Source: Armeni, Honey and Linzen 2022 (arXiv 2210.13569) and the code released with it. A text is a prefix, a
list of nouns, something else, a prompt, and a second list: the same, permuted, or of other nouns. If the
words are kept, the second list surprises less. Nouns and texts are ours, see ref/tasks/nouns.py. Surprisal is
in nats.
"""

import string
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ref.blocks.losses import negative_log_likelihood
from ref.dims import dims, float64
from ref.example import Example
from ref.tasks.noun_lists import CONDITIONS, Stimulus, build_stimuli, novel_pairing
from ref.tasks.nouns import (
    DELAYS,
    PREFIX,
    PROMPT,
    delay_text,
    held_out_nouns,
    noun_pools,
    scrambled,
    synthetic_language,
)

__all__ = [
    "DELAYS", "PREFIX", "PROMPT", "Cell", "Design", "Stimulus", "build_stimuli", "cache_bytes_for_delay",
    "code_tokens", "delay_text", "encode_stimulus", "example", "held_out_nouns", "list_surprisal",
    "median_ci", "merge_subwords", "noun_pools", "novel_pairing", "repeat_surprisal", "run_suite",
    "scrambled", "shuffle_qk", "synthetic_language", "time_course", "token_surprisal",
]  # fmt: skip


def code_tokens(prefix, list1, prompt, list2):
    """(trial_codes, word_codes) int [T] of the four segments' token pieces, lists of str.

    trial_codes: 0, 1, 2, 3 by segment, -1 for punctuation of the lists. word_codes: 1, 2, ... through the
    text, the same for all pieces of a word; a leading space, its own or that of a mark before it, starts one,
    and so does the very first piece; -1 for every punctuation piece.
    Raises: ValueError if a list has no word.
    """
    trial, word, count, fresh = [], [], 0, True
    for code, pieces in enumerate((prefix, list1, prompt, list2)):
        for piece in pieces:
            mark, fresh = _is_punctuation(piece), fresh or piece.startswith(" ")
            if not mark and fresh:
                count, fresh = count + 1, False
            trial.append(-1 if mark and code in (1, 3) else code)
            word.append(-1 if mark else count)
    for code, name in ((1, "list1"), (3, "list2")):
        if code not in trial:
            raise ValueError(f"{name} must hold at least one word")
    return np.array(trial), np.array(word)


def encode_stimulus(stimulus: Stimulus, tokenizer):
    """(ids, trial_codes, word_codes), int [T]; tokenizer has encode(text) -> ids and decode(ids) -> text.

    Segments are encoded one by one: each begins with a space, where byte-level tokenizers cut anyway.
    """
    ids = [np.asarray(tokenizer.encode(segment), int) for segment in stimulus.segments]
    pieces = [[tokenizer.decode([int(i)]) for i in part] for part in ids]
    return np.concatenate(ids), *code_tokens(*pieces)


def merge_subwords(surprisal, trial_codes, word_codes):
    """(surprisal, trial_codes, word_codes) with an entry a word, the sum of its pieces, and one a mark.

    Args: [T] each. A word stands where its first piece stood. Codes stay those of `code_tokens`.
    """
    s, trial, word = float64(surprisal), np.asarray(trial_codes), np.asarray(word_codes)
    dims(surprisal=(s, "T"), trial_codes=(trial, "T"), word_codes=(word, "T"))
    key = np.where(word < 0, -1 - np.arange(len(word)), word)  # marks are words of their own
    _, first, which = np.unique(key, return_index=True, return_inverse=True)
    total = np.zeros(len(first))
    np.add.at(total, which, s)
    order = np.argsort(first)
    return total[order], trial[first[order]], word[first[order]]


def token_surprisal(logits, tokens):
    """-log p(token | those before it) in nats, [B, T - 1]: logits [B, T, V], tokens int [B, T].

    The first token has none: entry t belongs to token t + 1.
    """
    if dims(logits=(logits, "B T V"), tokens=(tokens, "B T"))["T"] < 1:
        raise ValueError("tokens must hold at least one token a row")
    return negative_log_likelihood(float64(logits)[:, :-1], np.asarray(tokens)[:, 1:])


def repeat_surprisal(first, second, *, drop_first=True):
    """(percent, delta) [n]: x2 / x1 in percent, and (x2 - x1) / (x2 + x1), of the lists' mean surprisals.

    Args: first, second [n, nouns]. drop_first: leave the first noun out, which its prompt foretells or not.
    Raises: ValueError for lists too short, values that are not finite, or a first list of surprisal 0.
    """
    first, second = float64(first, second)
    n = dims(first=(first, "n nouns"), second=(second, "n nouns"))["nouns"]
    if n < 1 + drop_first:
        raise ValueError(f"lists must have at least {1 + drop_first} nouns with {drop_first=}, got {n}")
    x1, x2 = (x[:, int(drop_first) :].mean(axis=1) for x in (first, second))
    if not (np.isfinite(x1).all() and np.isfinite(x2).all()):
        raise ValueError("first and second must be finite")
    if (x1 == 0).any():
        raise ValueError("first must not have surprisal 0: the ratio to a list known by heart is not defined")
    return 100 * x2 / x1, (x2 - x1) / (x1 + x2)


def median_ci(x, *, level=0.95, resamples=2000, seed=0):
    """(median, low, high) of x [n]: the median and the middle `level` of medians of bootstrap samples.

    Raises: ValueError for an empty x, NaN, a level outside (0, 1) or resamples < 1.
    """
    x = float64(x)
    n = dims(x=(x, "n"))["n"]
    if n < 1 or np.isnan(x).any() or not 0 < level < 1 or resamples < 1:
        raise ValueError(
            f"need numbers in x, 0 < level < 1 and resamples >= 1, got {n} of them, {level}, {resamples}"
        )
    rng = np.random.default_rng(seed)
    medians = np.median(x[rng.integers(0, n, (resamples, n))], axis=1)
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(x)), float(low), float(high)


@dataclass(frozen=True)
class Design:
    """What `run_suite` shows to a model.

    tokenizer: see `encode_stimulus`. delays: {name: intervening text}. shifts: how many of each pool's shifts
    (None: all). context: the most tokens that the model may read, or None.
    """

    tokenizer: Any
    pools: Any
    delays: dict
    conditions: tuple[str, ...] = CONDITIONS
    list_lengths: tuple[int, ...] = (3, 5, 10)
    prefix: str = PREFIX
    prompt: str = PROMPT
    shifts: int | None = None
    pairing: str = "official"
    seed: int = 12345
    context: int | None = None
    resamples: int = 2000


class Cell(NamedTuple):
    """A cell of the table: n texts, median repeat surprisal in percent, its interval, the first noun's."""

    condition: str
    list_length: int
    delay: str
    n: int
    median: float
    low: float
    high: float
    first: float


def run_suite(surprisal_fn: Callable, design: Design):
    """A list of Cell, one for each condition, list length and delay.

    surprisal_fn: ids int [T] -> surprisal [T - 1] as `token_surprisal`, with the whole left context.
    Raises: ValueError for a text longer than the model's context.
    """
    d, table = design, []
    for condition in d.conditions:
        for length in d.list_lengths:
            for name, delay in d.delays.items():
                stimuli = build_stimuli(
                    d.pools, condition=condition, list_length=length, delay=delay, prefix=d.prefix,
                    prompt=d.prompt, seed=d.seed, pairing=d.pairing,
                )  # fmt: skip
                chosen = [s for s in stimuli if d.shifts is None or s.shift < d.shifts]
                lists = [list_surprisal(surprisal_fn, s, d.tokenizer, context=d.context) for s in chosen]
                first, second = (np.array(x) for x in zip(*lists, strict=True))
                percent, _ = repeat_surprisal(first, second)
                alone, _ = repeat_surprisal(first[:, :1], second[:, :1], drop_first=False)
                ci = median_ci(percent, resamples=d.resamples)
                table.append(Cell(condition, length, name, len(chosen), *ci, float(np.median(alone))))
    return table


def list_surprisal(surprisal_fn, stimulus: Stimulus, tokenizer, *, context=None):
    """(first, second) surprisal [nouns] of the two lists, each noun the sum of its pieces."""
    ids, trial, word = encode_stimulus(stimulus, tokenizer)
    if context is not None and len(ids) > context:
        raise ValueError(f"stimulus has {len(ids)} tokens, more than the context of {context}")
    s = np.concatenate([[np.nan], np.asarray(surprisal_fn(ids), float)])  # the first token has none
    s, trial, _ = merge_subwords(s, trial, word)
    return s[trial == 1], s[trial == 3]


def time_course(sequences, *, before=3):
    """Median [W] over sequences of the surprisal from `before` entries ahead of the second list to the end.

    sequences: (surprisal, trial_codes) pairs as `merge_subwords` gives them, marks included.
    Raises: ValueError if the second lists are not equally long, or start earlier than that.
    """
    rows = []
    for s, trial in sequences:
        start = int(np.flatnonzero(np.asarray(trial) == 3)[0]) - before
        if start < 0:
            raise ValueError(
                f"before must be at most {start + before}, the entries ahead of the list, got {before}"
            )
        rows.append(float64(s)[start:])
    if len({len(r) for r in rows}) != 1:
        raise ValueError(f"sequences must end in lists of one length, got {sorted({len(r) for r in rows})}")
    return np.median(rows, axis=0)


def shuffle_qk(params, seed):
    """The parameters with the entries of w_q, and of w_k, of each layer permuted; values and the rest stay.

    params: any model with `blocks`, a tuple of blocks or one block of stacked [layers, ...] arrays. Layer i
    takes seed + 5 i. Raises: ValueError for matrices that are kept quantised.
    """
    mix = lambda w, rng: rng.permutation(w.ravel()).reshape(w.shape)

    def block(b, i):
        rng = np.random.default_rng(seed + 5 * i)
        return b._replace(w_q=mix(b.w_q, rng), w_k=mix(b.w_k, rng))

    if not hasattr(params.blocks, "_fields"):
        return params._replace(blocks=tuple(block(b, i) for i, b in enumerate(params.blocks)))
    b = params.blocks
    if not all(isinstance(w, np.ndarray) for w in (b.w_q, b.w_k)):
        raise ValueError(
            "params must hold w_q and w_k as arrays: shuffling quantised rows would move their scales"
        )
    layers = [block(b._replace(w_q=q, w_k=k), i) for i, (q, k) in enumerate(zip(b.w_q, b.w_k, strict=True))]
    shuffled = {name: np.stack([getattr(x, name) for x in layers]) for name in ("w_q", "w_k")}
    return params._replace(blocks=b._replace(**shuffled))


def cache_bytes_for_delay(delay, *, layers, kv_heads, head_dim, dtype_bytes=2):
    """Bytes of keys and values that must survive `delay` tokens for attention to find a word again."""
    if delay < 0 or min(layers, kv_heads, head_dim, dtype_bytes) < 1:
        raise ValueError(
            f"delay must not be negative, sizes at least 1: {delay}, {layers}, {kv_heads}, {head_dim}"
        )
    return 2 * delay * layers * kv_heads * head_dim * dtype_bytes


def _is_punctuation(piece):
    text = piece.strip()
    return bool(text) and all(c in string.punctuation or unicodedata.category(c)[0] == "P" for c in text)


def example(seed=0):
    """Logits of a tiny drawn network on a list that is shown twice."""
    from ref.language.smollm2 import tiny_smollm2
    from ref.models.llama import forward

    weights, tokenizer = tiny_smollm2(seed)
    stimulus = build_stimuli(
        [["rain", "snow"]], condition="repeat", list_length=2, delay="", prefix="", prompt="again:"
    )
    ids, _, _ = encode_stimulus(stimulus[0], tokenizer)
    tokens = ids.astype(np.int32)[None, :24]
    return [Example("token_surprisal", (forward(weights, tokens[0])[0][None], tokens), {}, (0,))]
