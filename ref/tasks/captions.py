"""A small world of captions: digits, each named by a user in the user's own words and order.

Made up by rule, to test personal captions where no real ones are to be had.
"""

from typing import NamedTuple

import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOODS = ("lovely", "gloomy", "bright", "quiet", "proud", "tiny", "bold", "sleepy", "golden", "crooked")
VERBS = ("spotted", "drawn", "found", "caught", "painted", "dreamt", "kept", "met", "framed", "lost")
ORDERS = ("{mood} {digit} {verb}", "{verb} {mood} {digit}", "{digit} {verb} {mood}")


class Captions(NamedTuple):
    """users int [N]; captions, N strings; documents, one string a user of other captions."""

    users: np.ndarray
    captions: list
    documents: list


def digit_captions(key, labels, *, users=10, posts=6) -> Captions:
    """A user and a caption for each of the labels 0..9, and `posts` earlier captions of every user.

    User u has the mood and the verb at place u of the lists and order u mod 3; a caption ends with " .".
    key: seed. Raises: ValueError for more than 10 users, or a label outside 0..9.
    """
    labels = np.asarray(labels)
    if not 1 <= users <= len(MOODS):
        raise ValueError(f"users must be in 1..{len(MOODS)}, got {users}")
    if labels.size and (labels.min() < 0 or labels.max() > 9):
        raise ValueError(f"labels must be digits 0..9, got {labels.min()}..{labels.max()}")
    rng = np.random.default_rng(key)
    say = lambda u, n: ORDERS[u % 3].format(mood=MOODS[u], verb=VERBS[u], digit=DIGITS[n]) + " ."
    who = rng.integers(0, users, len(labels))
    documents = [" ".join(say(u, n) for n in rng.integers(0, 10, posts)) for u in range(users)]
    return Captions(who, [say(u, n) for u, n in zip(who, labels, strict=True)], documents)
