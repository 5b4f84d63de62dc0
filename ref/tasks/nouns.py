"""Lists of nouns to remember: pools, a text to put between, and a small language with repeated lists.

Made for the measurements of Armeni, Honey and Linzen 2022 (arXiv 2210.13569), whose own stimuli are not used
here.
"""

import re

import numpy as np

# 23 categories of 10: a pool of one category is semantically coherent.
CATEGORIES = tuple(
    tuple(line.split())
    for line in """
    apple pear plum cherry lemon grape peach melon orange banana
    horse cow sheep goat pig dog cat rabbit donkey mouse
    hammer saw drill chisel wrench file nail screw ladder shovel
    chair table bed sofa desk shelf lamp mirror carpet curtain
    shirt coat hat glove scarf belt shoe sock skirt jacket
    violin piano flute drum trumpet guitar harp organ horn bell
    doctor baker farmer lawyer pilot sailor teacher painter soldier judge
    arm leg hand foot knee elbow shoulder finger neck ear
    river lake mountain valley island desert forest beach cave hill
    train boat car bus truck plane bicycle ship wagon taxi
    bread cheese butter soup rice cake honey salt sugar meat
    rain snow wind storm cloud fog thunder frost sun ice
    king queen prince duke knight bishop emperor lord princess pope
    house church castle tower bridge barn school hotel prison factory
    oak pine rose lily grass moss fern bush tulip vine
    gold silver iron copper steel lead tin glass stone clay
    book letter newspaper map poem diary novel magazine ticket stamp
    eagle owl crow duck swan hawk goose pigeon sparrow robin
    cup plate bowl spoon fork knife bottle jar kettle pan
    mother father sister brother uncle aunt cousin daughter son nephew
    football tennis chess hockey rugby golf boxing rowing skating racing
    morning evening summer winter spring autumn night noon dawn midnight
    cotton silk wool leather linen velvet fur rope paper thread
    """.strip().splitlines()
)
PREFIX = "Before she left, the keeper read a list of words aloud:"
PROMPT = "When she came back, she opened the same book and read the list again:"
DELAYS = (26, 47, 99, 194, 435)  # words and marks between the two readings, as in the paper


def noun_pools(kind="arbitrary"):
    """23 pools of 10 nouns, every noun once: "arbitrary" has ten categories in a pool, "coherent" one.

    Raises: ValueError for another kind.
    """
    if kind == "coherent":
        return [list(pool) for pool in CATEGORIES]
    if kind != "arbitrary":
        raise ValueError(f'kind must be "arbitrary" or "coherent", got {kind!r}')
    n = len(CATEGORIES)
    return [[CATEGORIES[(i + 2 * k) % n][k] for k in range(10)] for i in range(n)]


def delay_text(tokens, *, start=4000):
    """Whole sentences of Hamlet with at least `tokens` words and marks, from near character `start` on.

    Raises: ValueError for more than the play has.
    """
    from ref.data import text

    play = " ".join(text()[start:].split())
    out, count = [], 0
    for sentence in re.findall(r"[^.!?]+[.!?]", play)[1:]:
        if count >= tokens:
            return " ".join(out)
        out.append(sentence.strip())
        count += len(re.findall(r"[\w']+|[^\w\s]", sentence))
    raise ValueError(
        f"tokens must be at most {count}, what the play has after character {start}, got {tokens}"
    )


def scrambled(text, *, seed=0):
    """The text with its words in an order that says nothing."""
    return " ".join(np.random.default_rng(seed).permutation(text.split()))


def noun_names(count):
    """`count` made-up nouns, "baba", "babe", ...: a consonant and a vowel, twice."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    if not 1 <= count <= len(syllables) ** 2:
        raise ValueError(f"count must be in 1..{len(syllables) ** 2}, got {count}")
    return [syllables[n // len(syllables)] + syllables[n % len(syllables)] for n in range(count)]


def held_out_nouns(nouns=200):
    """The nouns that `synthetic_language` never repeats in a list: the last tenth of each category."""
    names, size = noun_names(nouns), nouns // 10
    keep = size - max(1, size // 10)
    return {names[c * size + i] for c in range(10) for i in range(keep, size)}


def synthetic_language(key, n_docs, *, nouns=200, repeat_probability=0.5):
    """n_docs documents, lists of words: a list of nouns, sentences, and a list that may be the same again.

    Nouns come in ten categories with Zipf frequencies within each. Every document names a category, lists 3
    to 10 different nouns, says something else, and ends with a list: with repeat_probability the same one,
    else another. Held-out nouns occur in sentences and in lists that are not repeated.
    Raises: ValueError for fewer than 200 nouns or a probability outside [0, 1].
    """
    if nouns < 200 or nouns % 10 or not 0 <= repeat_probability <= 1:
        raise ValueError(
            "nouns must be a multiple of 10 from 200 on, repeat_probability in [0, 1], got "
            f"{nouns} and {repeat_probability}"
        )
    rng, size, hidden = np.random.default_rng(key), nouns // 10, held_out_nouns(nouns)
    names = np.array(noun_names(nouns)).reshape(10, size)
    zipf = 1 / np.arange(1, size + 1)
    p = zipf / zipf.sum()
    known = np.array([[0.0 if n in hidden else 1.0 for n in row] for row in names]) * p
    documents = []
    for _ in range(n_docs):
        c = rng.integers(10)
        again, length = rng.random() < repeat_probability, int(rng.integers(3, 11))
        weights = known[c] / known[c].sum() if again else p
        first = rng.choice(names[c], length, replace=False, p=weights).tolist()
        second = first if again else rng.choice(names[c], length, replace=False, p=p).tolist()
        words = ["read", f"kind{c}", ":", *_listed(first)]
        for _ in range(int(rng.integers(1, 6))):
            a, b = rng.choice(names[rng.integers(10)], 2, replace=False)
            words += ["the", str(a), ("sees", "has", "likes")[rng.integers(3)], "the", str(b), "."]
        documents.append([*words, "again", ":", *_listed(second)])
    return documents


def _listed(nouns):
    """a , b , c ."""
    return [*" , ".join(nouns).split(), "."]
