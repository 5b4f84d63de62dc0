"""The embedded inputs: what the readers promise, and that the script makes them again."""

from importlib.resources import files

import numpy as np
import pytest

from ref.data import attention_inputs, digits, hidden_states, text, token_ids
from tests.claims import make_inputs


def test_data_readers_give_what_they_say():
    q, k, v = attention_inputs()
    assert (q.shape, k.shape, v.shape) == ((9, 96, 64), (3, 96, 64), (3, 96, 64))
    assert q.dtype == np.float64
    assert hidden_states("early").shape == hidden_states().shape == (96, 576)
    assert token_ids().shape == (96,)
    assert token_ids().max() < 49152
    images, labels = digits()
    assert (images.shape, images.dtype, labels.shape) == ((400, 8, 8), np.uint8, (400,))
    assert images.max() == 16
    assert np.bincount(labels).min() > 30  # all ten digits
    play = text()
    assert play.startswith("To be, or not to be")
    assert 40_000 < len(play) < 60_000
    with pytest.raises(ValueError, match='"early" or "middle"'):
        hidden_states("late")


def test_data_are_real_activations():
    """A trained head attends to few tokens, mostly near ones, and heads differ; random ones are flat."""
    q, k, _ = attention_inputs()
    scores = q @ np.repeat(k, 3, axis=0).swapaxes(-1, -2) / 8
    scores = np.where(np.tri(96, dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    effective = np.exp(-np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1))  # exp of the entropy
    assert effective[:, 32:].mean() < 65 / 5
    assert effective[:, 32:].mean(-1).max() > 3 * effective[:, 32:].mean(-1).min()  # and heads differ
    near = np.tri(96, dtype=bool) & ~np.tri(96, k=-8, dtype=bool)
    assert (p * near).sum(-1)[:, 32:].mean() > 0.4  # eight of 65 tokens would have an eighth


def test_data_stay_small_and_name_their_origin():
    folder = files("ref.data")
    names = ["attention.npz", "hidden.npz", "digits.npz", "text.txt"]
    assert sum(len(folder.joinpath(n).read_bytes()) for n in names) < 700_000
    origin = folder.joinpath("ORIGIN.md").read_text(encoding="utf-8")
    assert all(f"`{n}`" in origin for n in names)


@pytest.mark.model
def test_data_come_out_of_the_script_again():
    """Digits from scikit-learn and activations from the trained file, array by array."""
    attention, hidden = make_inputs.activations(text())
    for name, made in (
        ("attention.npz", attention),
        ("hidden.npz", hidden),
        ("digits.npz", make_inputs.digits()),
    ):
        with np.load(str(files("ref.data").joinpath(name))) as stored:
            assert sorted(stored.files) == sorted(made)
            for key, array in made.items():
                np.testing.assert_array_equal(stored[key], array, err_msg=f"{name}: {key}")
