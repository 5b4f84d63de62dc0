"""Generated tasks for models with a memory: copying, recall by key, and stories with questions.

Source: copying as in Arjovsky, Shah and Bengio 2016 (section 4.1), recall as in Ba et al. 2016 with the
sizes of Dangovski et al. 2019 (section 4); the stories are a re-creation in the manner of Weston et al. 2015
(bAbI).
Every generator takes a NumPy Generator or a seed.
"""

import numpy as np

PEOPLE = ("mary", "john", "sandra", "daniel")
PLACES = ("kitchen", "garden", "office", "hallway", "bathroom", "bedroom")
THINGS = ("ball", "milk", "apple", "book")
VERBS = ("went", "took", "dropped")
ASKED = ("where", "is", "was", "before", "in", "how", "many", "has", "?")
ANSWERS = ("yes", "no", "0", "1", "2", "3", "4")
STORY_WORDS = (*PEOPLE, *PLACES, *THINGS, *VERBS, *ASKED, *ANSWERS)  # a token is a place in this tuple
# kind -> the fewest facts that can hold an answer
STORY_KINDS = {"one_fact": 1, "two_facts": 2, "three_facts": 3, "yes_no": 1, "counting": 1}


def copying_task(key, batch, delay, *, n_symbols=10):
    """(tokens, targets, weight), each [batch, delay + 2 n_symbols]: repeat n_symbols symbols after a delay.

    Vocabulary of 10: 0 blank, 1..8 symbols, 9 marker. tokens: the symbols, delay - 1 blanks, the marker,
    n_symbols blanks. targets: blanks, then the symbols. weight is 1 everywhere: the loss is the mean over all
    steps, and one without memory reaches n_symbols ln 8 / (delay + 2 n_symbols) at best.
    """
    if min(batch, delay, n_symbols) < 1:
        raise ValueError(f"batch, delay and n_symbols must be at least 1, got {batch}, {delay}, {n_symbols}")
    rng = np.random.default_rng(key)
    symbols = rng.integers(1, 9, (batch, n_symbols), dtype=np.int32)
    tokens = np.zeros((batch, delay + 2 * n_symbols), np.int32)
    tokens[:, :n_symbols] = symbols
    tokens[:, n_symbols + delay - 1] = 9
    targets = np.zeros_like(tokens)
    targets[:, n_symbols + delay :] = symbols
    return tokens, targets, np.ones(tokens.shape)


def copying_baseline(delay, *, n_symbols=10):
    """n_symbols ln 8 / (delay + 2 n_symbols): mean cross-entropy, in nats, of one who remembers nothing."""
    return n_symbols * np.log(8) / (delay + 2 * n_symbols)


def recall_task(key, batch, length):
    """(tokens, targets, weight), each [batch, length + 3]: which digit followed this key?

    length / 2 distinct keys 1..length / 2 in random order, each followed by a digit length / 2 + 1 + (0..9);
    then 0, 0 and one of the keys. targets holds the digit 0..9 at the last step, the only one with weight 1.
    Vocabulary: length / 2 + 11.
    """
    if length < 2 or length % 2 or batch < 1:
        raise ValueError(f"length must be even and at least 2, batch at least 1, got {length=}, {batch=}")
    rng, n = np.random.default_rng(key), length // 2
    keys = rng.permuted(np.tile(np.arange(1, n + 1), (batch, 1)), axis=1)
    digits = rng.integers(0, 10, (batch, n))
    asked = rng.integers(0, n, batch)[:, None]
    tokens = np.zeros((batch, length + 3), np.int32)
    tokens[:, 0:length:2], tokens[:, 1:length:2] = keys, n + 1 + digits
    tokens[:, -1:] = np.take_along_axis(keys, asked, axis=1)
    targets, weight = np.zeros_like(tokens), np.zeros(tokens.shape)
    targets[:, -1:], weight[:, -1] = np.take_along_axis(digits, asked, axis=1), 1.0
    return tokens, targets, weight


def mqar_task(key, batch, length, n_pairs, vocab):
    """(tokens, targets, weight), each [batch, length]: recall of many pairs (Arora et al. 2023).

    n_pairs keys 1..vocab / 2 - 1, all different, each followed by its value vocab / 2..vocab - 1; then every
    key once more, at random places among blanks (0), where targets holds its value and weight is 1. The
    places are uniform here; the paper's favour short distances.
    """
    rest, half = length - 2 * n_pairs, vocab // 2
    if batch < 1 or n_pairs < 1 or rest < n_pairs or half - 1 < n_pairs:
        raise ValueError(
            f"need batch >= 1, n_pairs >= 1, length >= 3 n_pairs and vocab >= 2 n_pairs + 2, got {batch=}, "
            f"{n_pairs=}, {length=}, {vocab=}"
        )
    rng = np.random.default_rng(key)
    rows = lambda n, k: rng.permuted(np.tile(np.arange(n), (batch, 1)), axis=1)[:, :k]
    keys, values = 1 + rows(half - 1, n_pairs), rng.integers(half, vocab, (batch, n_pairs))
    tokens, targets = np.zeros((2, batch, length), np.int32)
    tokens[:, 0 : 2 * n_pairs : 2], tokens[:, 1 : 2 * n_pairs : 2] = keys, values
    asked = 2 * n_pairs + rows(rest, n_pairs)
    np.put_along_axis(tokens, asked, keys, axis=1)
    np.put_along_axis(targets, asked, values, axis=1)
    return tokens, targets, (targets > 0).astype(np.float64)


def selective_copy_task(key, batch, length, n_symbols):
    """(tokens, targets, weight), each [batch, length + n_symbols]: repeat symbols scattered among blanks.

    Vocabulary of 10, as in `copying_task`: n_symbols symbols 1..8 at random places of the first length - 1,
    the marker 9, then n_symbols blanks, where targets holds the symbols in their order and weight is 1
    (Gu and Dao 2023, section 4.1).
    """
    if batch < 1 or n_symbols < 1 or length <= n_symbols:
        raise ValueError(
            f"need batch, n_symbols >= 1 and length > n_symbols, got {batch=}, {n_symbols=}, {length=}"
        )
    rng = np.random.default_rng(key)
    symbols = rng.integers(1, 9, (batch, n_symbols), dtype=np.int32)
    places = rng.permuted(np.tile(np.arange(length - 1), (batch, 1)), axis=1)[:, :n_symbols]
    tokens, targets = np.zeros((2, batch, length + n_symbols), np.int32)
    np.put_along_axis(tokens, np.sort(places, axis=1), symbols, axis=1)
    tokens[:, length - 1], targets[:, length:] = 9, symbols
    return tokens, targets, (targets > 0).astype(np.float64)


def passkey_task(key, batch, length, *, n_digits=5, n_filler=16):
    """(tokens, targets, weight), each [batch, length + n_digits]: a number hidden in a long text.

    Vocabulary of 13 + n_filler: 0 blank, 1..10 the digits 0..9, 11 marks the number, 12 asks for it, the rest
    is filler. The first length - 1 places are filler but for the mark and the digits behind it, somewhere;
    then the question, and n_digits blanks, where targets holds the digits' tokens and weight is 1 (in the
    manner of Mohtashami and Jaggi 2023).
    """
    room = length - 2 - n_digits  # places that the mark may take, less one
    if batch < 1 or n_digits < 1 or n_filler < 1 or room < 0:
        raise ValueError(
            f"need batch, n_digits, n_filler >= 1 and length >= n_digits + 2, got {batch=}, {n_digits=}, "
            f"{n_filler=}, {length=}"
        )
    rng = np.random.default_rng(key)
    tokens, targets = np.zeros((2, batch, length + n_digits), np.int32)
    tokens[:, : length - 1] = rng.integers(13, 13 + n_filler, (batch, length - 1))
    digits = rng.integers(1, 11, (batch, n_digits), dtype=np.int32)
    at = rng.integers(0, room + 1, (batch, 1))
    hidden = np.concatenate([np.full((batch, 1), 11, np.int32), digits], axis=1)
    np.put_along_axis(tokens, at + np.arange(n_digits + 1), hidden, axis=1)
    tokens[:, length - 1], targets[:, length:] = 12, digits
    return tokens, targets, (targets > 0).astype(np.float64)


def story_task(key, batch, *, kind, n_facts):
    """(tokens [batch, 3 n_facts + Q], answer [batch]): a story of facts of three words, then a question.

    Facts: "mary went kitchen", "mary took ball", "mary dropped ball". Questions and answers by kind:
      one_fact: where is mary ? (Q = 4; a place.) two_facts: where is ball ? (4; follow who has it.)
      three_facts: where was ball before kitchen ? (6.) yes_no: is mary in kitchen ? (5; half of them yes.)
      counting: how many has mary ? (5; a number.)
    Tokens are places in STORY_WORDS. Stories that hold no answer are drawn again.
    """
    if kind not in STORY_KINDS:
        raise ValueError(f"kind must be one of {', '.join(STORY_KINDS)}, got {kind!r}")
    if n_facts < STORY_KINDS[kind] or batch < 1:
        least = STORY_KINDS[kind]
        raise ValueError(f"{kind} needs n_facts >= {least} and batch >= 1, got {n_facts=}, {batch=}")
    rng = np.random.default_rng(key)
    rows = [_story(rng, kind, n_facts) for _ in range(batch)]
    number = {w: i for i, w in enumerate(STORY_WORDS)}
    tokens = np.array([[number[w] for w in words] for words, _ in rows], np.int32)
    return tokens, np.array([number[a] for _, a in rows], np.int32)


def _story(rng, kind, n_facts):
    """(words, answer) of one story, drawn until the question has an answer."""
    while True:
        facts, place, holds, path = _facts(rng, n_facts)
        asked = _question(rng, kind, place, holds, path)
        if asked:
            return [w for fact in facts for w in fact] + asked[0], asked[1]


def _facts(rng, n_facts):
    """A walk: (facts, place of each person seen, holder's things, places each thing has been in)."""
    pick = lambda options: options[rng.integers(len(options))]
    facts, place, holds, path = [], {}, {p: [] for p in PEOPLE}, {}
    for _ in range(n_facts):
        who = pick(PEOPLE)
        free = [t for t in THINGS if not any(t in h for h in holds.values())]
        # A thing that lies somewhere can be taken only there; one not yet seen lies where it is found.
        near = [t for t in free if who in place and (t not in path or path[t][-1] == place[who])]
        deed = pick([d for d, can in zip(VERBS, (True, near, holds[who]), strict=True) if can])
        if deed == "went":
            what = pick([p for p in PLACES if p != place.get(who)])
            place[who] = what
            for t in holds[who]:
                path[t].append(what)
        elif deed == "took":
            what = pick(near)
            holds[who].append(what)
            path.setdefault(what, [place[who]])
        else:
            what = pick(holds[who])
            holds[who].remove(what)
        facts.append((who, deed, what))
    return facts, place, holds, path


def _question(rng, kind, place, holds, path):
    """(words, answer), or None if the story holds no answer."""
    pick = lambda options: options[rng.integers(len(options))]
    seen = sorted(place)
    if kind == "two_facts":
        return (["where", "is", t, "?"], path[t][-1]) if path and (t := pick(sorted(path))) else None
    if kind == "three_facts":
        moved = [t for t in sorted(path) if len(path[t]) > 1]
        if not moved:
            return None
        t = pick(moved)
        return ["where", "was", t, "before", path[t][-1], "?"], path[t][-2]
    if not seen:
        return None
    who = pick(seen)
    if kind == "one_fact":
        return ["where", "is", who, "?"], place[who]
    if kind == "yes_no":
        true = rng.random() < 0.5
        where = place[who] if true else pick([p for p in PLACES if p != place[who]])
        return ["is", who, "in", where, "?"], "yes" if true else "no"
    return ["how", "many", "has", who, "?"], str(len(holds[who]))
