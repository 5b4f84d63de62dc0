"""Byte-level byte-pair encoding: text to token ids and back, without loss.

Source: Sennrich et al. 2016 (merging pairs), Radford et al. 2019 section 2.2 (on bytes, words first).
Text is cut into words by the GPT-2 pattern, each word becomes UTF-8 bytes, each byte a printable character,
and adjacent pairs are merged, the pair of lowest rank first, until no pair of the list is left.
"""

import heapq
import re
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from unicodedata import category

import numpy as np

_CONTRACTION = re.compile("'(?:s|t|re|ve|m|ll|d)")
# The pattern  ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+  on the classes of the characters: L letter,
# N number, S white space but the blank, a blank itself, O other. Python's own \w and \d do not draw
# these lines, and `re` knows no \p.
_WORD = re.compile(" ?L+| ?N+| ?O+|[ S]+(?![^ S])|[ S]+")
# Unicode's White_Space. str.isspace differs: it counts the separators U+001C to U+001F.
_SPACES = frozenset(map(chr, (*range(9, 14), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029,
                              0x202F, 0x205F, 0x3000)))  # fmt: skip


def split_gpt2(text, *, digits_alone=False):
    """The words of the GPT-2 pattern, in order; joined they are the text.

    digits_alone: cut every number character (category N) off first, so that the pattern sees what lies
    between; "=   5" then keeps its three blanks together.
    Letters and numbers are Unicode's, by the tables of the running Python.
    """
    classes = text.translate(_CLASSES)
    if not digits_alone:
        return _words(text, classes, 0, len(text))
    out = []
    for part in re.finditer("N|[^N]+", classes):
        out += _words(text, classes, *part.span())
    return out


def _words(text, classes, start, end):
    out = []
    while start < end:
        # The contractions come first in the pattern, and only they look at letters one by one.
        found = _CONTRACTION.match(text, start, end) or _WORD.match(classes, start, end)
        out.append(text[start : found.end()])
        start = found.end()
    return out


class _Classes(dict):
    """Character -> class, filled on use; what `str.translate` asks."""

    def __missing__(self, code):
        char = chr(code)
        self[code] = (
            " "
            if char == " "
            else "S"
            if char in _SPACES
            else {"L": "L", "N": "N"}.get(category(char)[0], "O")
        )
        return self[code]


_CLASSES = _Classes()


def byte_characters():
    """The 256 printable characters that stand for the bytes, in order of the bytes.

    Printable bytes of Latin-1 stand for themselves; the other 68 take U+0100 on: blank is "Ġ", newline "Ċ".
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b if b in shown else next(spare)) for b in range(256)]


_TO_CHARACTER = byte_characters()
_TO_BYTE = {c: b for b, c in enumerate(_TO_CHARACTER)}


def to_characters(text):
    """UTF-8 bytes of the text as printable characters. Raises: ValueError for a lone surrogate."""
    try:
        return "".join([_TO_CHARACTER[b] for b in text.encode()])
    except UnicodeEncodeError as e:
        raise ValueError(
            f"text holds the lone surrogate U+{ord(text[e.start]):04X}, which is no character"
        ) from None


def merge_pairs(symbols, ranks):
    """Merge adjacent symbols, the pair of lowest rank first and of equals the leftmost, until none is left.

    Args: symbols: list of str. ranks: {(left, right): rank}.
    Returns: list of str; joined it is what the symbols joined were. Time n log n: a heap of pairs over a
    linked list of symbols.
    """
    symbols, n = list(symbols), len(symbols)
    after, before = list(range(1, n + 1)), list(range(-1, n - 1))
    heap = [(ranks[p], i, p) for i, p in enumerate(pairwise(symbols)) if p in ranks]
    heapq.heapify(heap)
    while heap:
        _, i, pair = heapq.heappop(heap)
        j = after[i] if symbols[i] is not None else n
        if j >= n or (symbols[i], symbols[j]) != pair:
            continue  # one of the two has been merged away since
        symbols[i], symbols[j] = symbols[i] + symbols[j], None
        after[i] = after[j]
        if after[i] < n:
            before[after[i]] = i
        for a, b in ((before[i], i), (i, after[i])):
            if a >= 0 and b < n and (symbols[a], symbols[b]) in ranks:
                heapq.heappush(heap, (ranks[symbols[a], symbols[b]], a, (symbols[a], symbols[b])))
    return [s for s in symbols if s is not None]


def train_bpe(text, size, *, split=split_gpt2):
    """(tokens, merges): the 256 bytes, then one merge after another of the commonest pair, up to `size`.

    Of equally common pairs the smallest in code-point order wins, so the result depends on the text alone.
    Raises: ValueError if size is under 256, or the text has too few pairs to reach it.
    """
    if size < 256:
        raise ValueError(f"size must be at least 256, the bytes, got {size}")
    words = [(list(to_characters(w)), n) for w, n in Counter(split(text)).items()]
    tokens, merges = list(_TO_CHARACTER), []
    while len(tokens) < size:
        pairs = Counter()
        for symbols, n in words:
            for pair in pairwise(symbols):
                pairs[pair] += n
        if not pairs:
            raise ValueError(f"the text has pairs for {len(tokens)} tokens only, not {size}")
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        tokens.append("".join(best))
        words = [(merge_pairs(s, {best: 0}), n) for s, n in words]
    return tokens, merges


class Tokenizer:
    """Byte-level BPE with special tokens: `encode` and `decode` are inverse on every text.

    Args: tokens: list of str, the id is the index. merges: list of (left, right), the rank is the index.
      special: tokens (strings) that `encode` cuts out of the text whole. digits_alone: see `split_gpt2`.
      unknown: id for a byte that the vocabulary lacks (there the text is lost); None: `encode` raises.
    Raises: ValueError if a token comes twice.
    """

    def __init__(self, tokens, merges, *, special=(), digits_alone=False, unknown=None):
        self.tokens = tuple(tokens)
        self.ids = {t: i for i, t in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            raise ValueError("a token comes twice")
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.special = {t: self.ids[t] for t in special}
        self.digits_alone, self.unknown = digits_alone, unknown
        # Longest first: one special token may begin with another.
        longest = sorted(map(re.escape, special), key=len, reverse=True)
        self._special = re.compile("|".join(longest)) if longest else None
        self._word_ids = lru_cache(maxsize=1 << 16)(self._encode_word)

    @classmethod
    def from_gguf(cls, file):
        """The tokenizer that a GGUF file carries. Raises: ValueError if it is of another family."""
        model, pre = (file.value(f"tokenizer.ggml.{k}") for k in ("model", "pre"))
        if model != "gpt2" or pre not in ("smollm", "gpt-2"):
            raise ValueError(
                f"the tokenizer is {model!r} with pre-tokenizer {pre!r}; 'gpt2' with 'smollm' or 'gpt-2' "
                "can be read"
            )
        tokens, merges, kinds = (
            file.value(f"tokenizer.ggml.{k}") for k in ("tokens", "merges", "token_type")
        )
        lists = all(isinstance(x, list) for x in (tokens, merges, kinds))
        if not lists or not all(isinstance(t, str) for t in [*tokens, *merges]):
            raise ValueError("the tokenizer's tokens and merges must be lists of text, token_type a list")
        pairs = [tuple(m.split(" ")) for m in merges]
        if len(kinds) != len(tokens) or any(len(p) != 2 for p in pairs):
            raise ValueError("the tokenizer's lists disagree: one type a token, two parts a merge")
        special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]  # 3 marks control tokens
        unknown = file.metadata.get("tokenizer.ggml.unknown_token_id")
        return cls(tokens, pairs, special=special, digits_alone=pre == "smollm", unknown=unknown)

    def encode(self, text, *, special=True):
        """Token ids of the text, int64 [T]. special: cut special tokens out; else they are plain text.

        Raises: ValueError for a lone surrogate, or a byte without a token unless there is an `unknown`.
        """
        out, start = [], 0
        for found in self._special.finditer(text) if special and self._special else ():
            self._encode_plain(text[start : found.start()], out)
            out.append(self.special[found[0]])
            start = found.end()
        self._encode_plain(text[start:], out)
        return np.array(out, np.int64)

    def decode(self, ids):
        """The text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises: ValueError for an id outside the vocabulary.
        """
        out = bytearray()
        for i in np.asarray(ids).reshape(-1).tolist():
            if not 0 <= i < len(self.tokens):
                raise ValueError(f"ids must be in 0..{len(self.tokens) - 1}, got {i}")
            token = self.tokens[i]
            out += token.encode() if token in self.special else bytes(_TO_BYTE[c] for c in token)
        return out.decode("utf-8", errors="replace")

    def _encode_plain(self, text, out):
        for word in split_gpt2(text, digits_alone=self.digits_alone):
            out.extend(self._word_ids(word))

    def _encode_word(self, word):
        ids = [self.ids.get(s, self.unknown) for s in merge_pairs(to_characters(word), self.ranks)]
        if None in ids:
            raise ValueError(f"the vocabulary has no token for a byte of {word!r}")
        return tuple(ids)
