"""The trained sentence encoder: other people's numbers for it, in float32 and in int8 (-m model)."""

import numpy as np
import pytest

from ref.blocks.resize import resize_bilinear
from ref.fetch import fetch
from ref.models.minilm import load_minilm, load_minilm_int8, load_tokenizer, sentence_vector
from ref.tasks.emoji import load_emoji
from ref.tasks.similarity import load_lee, load_wordsim


def test_minilm_images_resize_by_straight_lines():
    """A ramp stays a ramp inside, the ends repeat, and the same size changes nothing."""
    ramp = np.broadcast_to(np.arange(8.0)[:, None, None], (8, 8, 1))
    np.testing.assert_array_equal(resize_bilinear(ramp, 8), ramp)
    got = resize_bilinear(ramp, 16)[:, 0, 0]
    np.testing.assert_allclose(got[1:-1], np.arange(14) / 2 + 0.25, rtol=1e-14)
    assert (got[0], got[-1]) == (0, 7)
    assert resize_bilinear(ramp[None], 3).shape == (1, 3, 3, 1)


def test_minilm_data_of_another_kind_is_refused(tmp_path):
    (tmp_path / "w.tsv").write_text("# words\na\tb\n")
    with pytest.raises(ValueError, match="no table of word, word and rating"):
        load_wordsim(tmp_path / "w.tsv")
    (tmp_path / "lee.cor").write_text("one\ntwo\n")
    (tmp_path / "similarities0-1.txt").write_text("1 0\n0 1\n")
    with pytest.raises(ValueError, match=r"holds 2 documents and ratings \[2, 2\]"):
        load_lee(tmp_path)


@pytest.mark.model
def test_minilm_agrees_with_human_judgement():
    """Pearson 0.656 on 50 documents for float32, 0.657 for int8; the two vectors of a text nearly agree."""
    tokenizer = load_tokenizer(fetch("minilm") / "tokenizer.json")
    whole = load_minilm(fetch("minilm") / "model.safetensors")
    coarse = load_minilm_int8(fetch("minilm_int8"))
    documents, human = load_lee(fetch("lee"))
    at = np.triu_indices(50, 1)
    for params, want in ((whole, 0.656), (coarse, 0.657)):
        v = np.stack([sentence_vector(tokenizer(d), params) for d in documents])
        assert abs(np.corrcoef((v @ v.T)[at], human[at])[0, 1] - want) < 5e-4
    ids = tokenizer("The quick brown fox jumps over the lazy dog.")
    assert abs(sentence_vector(ids, whole) @ sentence_vector(ids, coarse) - 0.9996) < 5e-5
    pairs, scores = load_wordsim(fetch("wordsim"))
    assert len(pairs) == len(scores) == 353


@pytest.mark.model
def test_minilm_emoji_are_what_the_index_says():
    e = load_emoji(fetch("emoji"))
    assert e.images.shape == (1906, 64, 64, 3)
    assert dict(zip(e.groups, np.bincount(e.group), strict=True))["Flags"] == 270
    assert (len(e.groups), len(e.subgroups)) == (9, 98)
    assert (e.images[:, 0, 0] == 255).all(axis=-1).mean() > 0.8  # pictures stand on white
