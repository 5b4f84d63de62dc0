"""Byte-level BPE: the GPT-2 pattern, merging against its definition, and texts that come back."""

import re
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.bpe import Tokenizer, byte_characters, merge_pairs, split_gpt2, to_characters, train_bpe

TEXT = "the cat sat on the mat, the rat sat on the cat; that's that, and they're 12 of 345 rats. "
AWKWARD = "abXé中ß'sltredvm0123½²Ⅷ٣ \t\n\r\x0b\x1c\x85\xa0\u2003\u200b\u3000_-!?.\u0301\U0001f642\u200d$€"

# The characters of each class, written out for Python's own `re`, over those that AWKWARD holds.
L = "".join(c for c in AWKWARD if unicodedata.category(c)[0] == "L")
N = "".join(c for c in AWKWARD if unicodedata.category(c)[0] == "N")
S = " \t\n\r\x0b\x85\xa0\u2003\u3000"
PATTERN = re.compile(f"'s|'t|'re|'ve|'m|'ll|'d| ?[{L}]+| ?[{N}]+| ?[^{S}{L}{N}]+|[{S}]+(?![^{S}])|[{S}]+")


@given(st.text(AWKWARD, max_size=30))
def test_bpe_splits_by_the_pattern(text):
    """The pattern itself, with its classes spelt out over a small alphabet."""
    assert split_gpt2(text) == PATTERN.findall(text)
    alone = [w for part in re.findall(f"[{N}]|[^{N}]+", text) for w in PATTERN.findall(part)]
    assert split_gpt2(text, digits_alone=True) == alone


def test_bpe_splits_known_texts():
    assert split_gpt2("I'll go, won't we?  Yes") == [
        "I",
        "'ll",
        " go",
        ",",
        " won",
        "'t",
        " we",
        "?",
        " ",
        " Yes",
    ]
    assert split_gpt2("x =   5", digits_alone=True) == ["x", " =", "   ", "5"]
    assert split_gpt2("x =   5") == ["x", " =", "  ", " 5"]
    assert split_gpt2("2024", digits_alone=True) == list("2024")
    assert split_gpt2("") == []
    # U+001C separates for Python, but is no white space for Unicode.
    assert split_gpt2("a\x1cb") == ["a", "\x1c", "b"]


def naive_merge(symbols, ranks):
    """One merge at a time: lowest rank, then leftmost."""
    symbols = list(symbols)
    while found := [(ranks[p], i) for i, p in enumerate(pairwise(symbols)) if p in ranks]:
        _, i = min(found)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return symbols


@given(
    st.text("abc", max_size=24),
    st.lists(st.tuples(*[st.text("abc", min_size=1, max_size=3)] * 2), max_size=12),
)
def test_bpe_merges_as_defined(text, merges):
    """For any list of merges, trained or not."""
    ranks = {pair: i for i, pair in enumerate(merges)}
    assert merge_pairs(text, ranks) == naive_merge(text, ranks)


def test_bpe_merging_is_fast_on_long_words():
    """A heap, not a scan a merge: 100,000 equal letters are a second's work at most, not an hour's."""
    assert len(merge_pairs("a" * 100_000, {("a", "a"): 0, ("aa", "aa"): 1})) == 25_000


def test_bpe_byte_characters_are_printable_and_distinct():
    shown = byte_characters()
    assert len(set(shown)) == 256
    assert (shown[32], shown[10], shown[65]) == ("Ġ", "Ċ", "A")
    assert not any(c.isspace() for c in shown)
    assert to_characters("é ") == "Ã©Ġ"


TOKENS, MERGES = train_bpe(TEXT, 280)
TOKENIZER = Tokenizer([*TOKENS, "<end>", "<end>>"], MERGES, special=["<end>", "<end>>"])


def test_bpe_training_joins_common_pairs_first():
    assert MERGES[0] in {("a", "t"), ("t", "h")}  # the two commonest pairs
    assert "Ġthe" in TOKENS
    assert train_bpe(TEXT, 280) == (TOKENS, MERGES)
    with pytest.raises(ValueError, match="at least 256"):
        train_bpe(TEXT, 255)
    with pytest.raises(ValueError, match="pairs for 257 tokens only"):
        train_bpe("ab", 300)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.booleans())
def test_bpe_decode_inverts_encode(text, special):
    assert TOKENIZER.decode(TOKENIZER.encode(text + "<end>", special=special)) == text + "<end>"


def test_bpe_special_tokens_are_whole_and_longest_first():
    end, longer = len(TOKENS), len(TOKENS) + 1
    assert TOKENIZER.encode("<end>>a<end>").tolist() == [longer, TOKENS.index("a"), end]
    assert end not in TOKENIZER.encode("<end>", special=False)
    assert TOKENIZER.encode("").shape == (0,)
    assert TOKENIZER.encode("").dtype == np.int64


def test_bpe_rejects_what_is_no_text():
    with pytest.raises(ValueError, match=r"lone surrogate U\+D800"):
        TOKENIZER.encode("a\ud800")
    with pytest.raises(ValueError, match=r"ids must be in 0\.\.281, got 282"):
        TOKENIZER.decode([282])
    with pytest.raises(ValueError, match="a token comes twice"):
        Tokenizer(["a", "a"], [])
    lacking = Tokenizer(["a"], [])
    with pytest.raises(ValueError, match="no token for a byte of 'ab'"):
        lacking.encode("ab")
    assert Tokenizer(["a", "?"], [], unknown=1).encode("ab").tolist() == [0, 1]


def test_bpe_decodes_broken_utf8_to_replacements():
    byte = lambda b: TOKENS.index(byte_characters()[b])
    assert TOKENIZER.decode([byte(0xC3)]) == "\ufffd"
    assert TOKENIZER.decode([byte(0xC3), byte(0xA9)]) == "é"


@pytest.mark.model
def test_bpe_agrees_with_the_tokenizers_library():
    """The trained vocabulary on awkward texts and on every assigned character, as the tokenizers package."""
    import tokenizers
    from tokenizers import pre_tokenizers

    from ref.language.smollm2 import find_smollm2
    from ref.models.gguf import load_gguf

    file = load_gguf(find_smollm2())
    ours = Tokenizer.from_gguf(file)
    merges = [tuple(m.split(" ")) for m in file.metadata["tokenizer.ggml.merges"]]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(ours.ids, merges))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alone = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    theirs.pre_tokenizer = alone
    cut = lambda p, s: [s[a:b] for _, (a, b) in p.pre_tokenize_str(s)]
    old = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    for c in old[:: max(1, len(old) // 20_000)]:
        s = f"a{c}1{c}!{c} \t{c}"
        assert split_gpt2(s) == cut(plain, s), hex(ord(c))
        assert split_gpt2(s, digits_alone=True) == cut(alone, s), hex(ord(c))
    rng = np.random.default_rng(0)
    for _ in range(2000):
        s = "".join(rng.choice(list(AWKWARD), rng.integers(0, 20)))
        known = [i for i in ours.encode(s, special=False).tolist() if i != ours.unknown]
        assert known == theirs.encode(s).ids, s
