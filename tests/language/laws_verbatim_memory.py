"""Laws of verbatim memory on ref alone: NumPy and Hypothesis."""

import re
from collections import Counter
from itertools import groupby, pairwise
from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.language.smollm2 import tiny_smollm2
from ref.language.verbatim_memory import (
    DELAYS,
    PREFIX,
    PROMPT,
    Design,
    build_stimuli,
    cache_bytes_for_delay,
    code_tokens,
    delay_text,
    encode_stimulus,
    held_out_nouns,
    list_surprisal,
    median_ci,
    merge_subwords,
    noun_pools,
    novel_pairing,
    repeat_surprisal,
    run_suite,
    scrambled,
    shuffle_qk,
    synthetic_language,
    time_course,
    token_surprisal,
)
from ref.models.gpt import gpt_forward, init_gpt
from ref.models.llama import forward, init_cache

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
POOLS = noun_pools()[:4]


def word_tokenizer(*texts):
    """A tokenizer whose pieces are words, cut after four letters, and marks; a word's space is its own."""
    pieces = lambda text: [p for w in re.findall(r" ?[\w']+|[^\w\s]", text) for p in (w[:5], w[5:]) if p]
    names = sorted({p for t in texts for p in pieces(t)})
    place = {p: n for n, p in enumerate(names)}
    encode = lambda text: [place[p] for p in pieces(text)]
    return SimpleNamespace(encode=encode, decode=lambda ids: "".join(names[i] for i in ids), size=len(names))


def stimuli(condition, length=3, **options):
    options = {"delay": "The keeper waited, and it rained.", **options}
    return build_stimuli(POOLS, condition=condition, list_length=length, **options)


TOKENIZER = word_tokenizer(
    *(s.text for c in ("repeat", "novel") for s in stimuli(c, 10)), *(f" {n}" for p in POOLS for n in p)
)


@given(
    st.sampled_from(("repeat", "permute", "novel")),
    st.integers(2, 10),
    st.sampled_from(("official", "distinct")),
)
@settings(max_examples=12)
def law_verbatim_memory_lists_are_those_of_the_condition(condition, n, pairing):
    made = stimuli(condition, n, pairing=pairing)
    assert made == stimuli(condition, n, pairing=pairing)
    assert len(made) == 40
    for s in made:
        pool = POOLS[s.pool]
        assert list(s.list1) == [pool[(k - s.shift) % 10] for k in range(n)]  # shifted to the right
        if condition == "repeat":
            assert s.list2 == s.list1
        elif condition == "permute":
            assert sorted(s.list2) == sorted(s.list1)
            assert s.list2 != s.list1
        else:
            assert not set(s.list2) & set(pool)
            assert any(s.list2 == other.list1 for other in made)
        assert s.text == f"{PREFIX} {', '.join(s.list1)}. {s.prompt} {', '.join(s.list2)}."
        assert s.prompt == f"The keeper waited, and it rained. {PROMPT}"
    for pool in range(4):
        for place in range(n):  # every noun once in every place
            assert {s.list1[place] for s in made if s.pool == pool} == set(POOLS[pool])


@given(st.lists(st.integers(0, 4), min_size=2, max_size=25), seeds)
def law_verbatim_memory_pairing_leaves_the_group(groups, seed):
    groups = np.array(groups)
    most = np.bincount(groups).max()
    if 2 * most <= len(groups):
        pairs = novel_pairing(groups, seed=seed, method="distinct")
        assert sorted(pairs.tolist()) == list(range(len(groups)))
        assert (groups[pairs] != groups).all()
    rng, free, want = np.random.RandomState(seed), set(range(len(groups))), {}
    for g in dict.fromkeys(groups.tolist()):  # the released procedure, spelled out
        own = np.flatnonzero(groups == g)
        left = sorted(i for i in free if groups[i] != g)
        if not left:
            with np.testing.assert_raises_regex(ValueError, f"no sequence of another group for group {g}"):
                novel_pairing(groups, seed=seed)
            return
        drawn = rng.choice(left, size=len(own)).tolist()
        want |= dict(zip(own.tolist(), drawn, strict=True))
        free -= set(drawn)
    pairs = novel_pairing(groups, seed=seed)
    assert pairs.tolist() == [want[i] for i in range(len(groups))]
    assert (groups[pairs] != groups).all()


def law_verbatim_memory_codes_follow_the_pieces():
    trial, word = code_tokens(
        ["A", "b", " c", ":"], [" d", ",", " e", "."], [" f", ".", " g's", "h"], [" i", ","]
    )
    assert trial.tolist() == [0, 0, 0, 0, 1, -1, 1, -1, 2, 2, 2, 2, 3, -1]
    assert word.tolist() == [1, 1, 2, -1, 3, -1, 4, -1, 5, -1, 6, 6, 7, -1]
    # a first piece without a space; a dash is a mark
    trial, word = code_tokens([], ["a", " —", " b"], [], ["c"])
    assert trial.tolist() == [1, -1, 1, 3]
    assert word.tolist() == [1, -1, 2, 2]
    # a mark before a word has the word's space: what it opens is a word of its own
    _, word = code_tokens(['"', "He", " said", ' "', "yes", '"'], [" a"], [" (", "so", ")"], [" b"])
    assert word.tolist() == [-1, 1, 2, -1, 3, -1, 4, -1, 5, -1, 6]


@given(st.sampled_from(("repeat", "permute", "novel")), st.integers(2, 5))
@settings(max_examples=6)
def law_verbatim_memory_encoding_is_that_of_the_whole_text(condition, n):
    for s in stimuli(condition, n)[::13]:
        ids, trial, word = encode_stimulus(s, TOKENIZER)
        assert ids.tolist() == TOKENIZER.encode(s.text)
        assert TOKENIZER.decode(ids) == s.text
        for code, nouns in ((1, s.list1), (3, s.list2)):
            at = np.flatnonzero(trial == code)
            words = [
                "".join(TOKENIZER.decode([ids[i]]) for i in g) for _, g in groupby(at, key=lambda i: word[i])
            ]
            assert words == [f" {noun}" for noun in nouns]
    _, tiny = tiny_smollm2()
    s = build_stimuli(
        [["rain", "snow"]], condition="repeat", list_length=2, delay="", prefix="", prompt="a:"
    )[0]
    assert encode_stimulus(s, tiny)[0].tolist() == tiny.encode(s.text).tolist()


@given(seeds)
def law_verbatim_memory_merging_conserves_the_sum(seed):
    rng = np.random.default_rng(seed)
    ids, trial, word = encode_stimulus(stimuli("repeat")[int(rng.integers(40))], TOKENIZER)
    s = rng.exponential(size=len(ids))
    total, codes, words = merge_subwords(s, trial, word)
    np.testing.assert_allclose(total.sum(), s.sum(), rtol=64 * EPS)
    for n in range(1, word.max() + 1):
        np.testing.assert_allclose(total[words == n], [s[word == n].sum()], rtol=8 * EPS)
        assert codes[words == n] == trial[word == n][0]
    np.testing.assert_array_equal(total[words == -1], s[word == -1])
    assert (np.diff(words[words > 0]) == 1).all()
    again = merge_subwords(total, codes, words)  # nothing is left to merge
    for a, b in zip(again, (total, codes, words), strict=True):
        np.testing.assert_array_equal(a, b)
    split = merge_subwords(np.array([1.0, 2, 4]), np.array([3, -1, 3]), np.array([5, -1, 5]))
    assert split[0].tolist() == [5, 2]  # a mark inside a word stays a mark


@given(seeds, st.sampled_from((0.0, 1.0, 300.0)))
def law_verbatim_memory_surprisal_is_the_definition(seed, gain):
    rng = np.random.default_rng(seed)
    logits, tokens = gain * rng.standard_normal((2, 5, 7)), rng.integers(0, 7, (2, 5))
    got = token_surprisal(logits, tokens)
    assert got.shape == (2, 4)
    assert (got >= 0).all()
    for b, t in np.ndindex(2, 4):
        z = logits[b, t] - logits[b, t].max()
        want = np.log(np.exp(z).sum()) - z[tokens[b, t + 1]]
        np.testing.assert_allclose(got[b, t], want, rtol=0, atol=16 * EPS * max(1, gain) * 4)
    moved = logits.copy()
    moved[:, -1] = np.nan  # what follows the last token is not asked
    np.testing.assert_array_equal(token_surprisal(moved, tokens), got)
    assert token_surprisal(logits[:, :1], tokens[:, :1]).shape == (2, 0)
    assert token_surprisal(logits[:0], tokens[:0]).shape == (0, 4)


@given(seeds, st.booleans())
def law_verbatim_memory_ratio_is_free_of_the_unit(seed, drop):
    rng = np.random.default_rng(seed)
    first, second = rng.exponential(size=(5, 4)) + 0.1, rng.exponential(size=(5, 4))
    percent, delta = repeat_surprisal(first, second, drop_first=drop)
    for i in range(5):
        x1, x2 = (sum(x[i][drop:]) / (4 - drop) for x in (first, second))
        np.testing.assert_allclose(percent[i], 100 * x2 / x1, rtol=16 * EPS)
        np.testing.assert_allclose(delta[i], (x2 - x1) / (x2 + x1), rtol=0, atol=16 * EPS)
    bits = repeat_surprisal(first / np.log(2), second / np.log(2), drop_first=drop)
    np.testing.assert_allclose(bits[0], percent, rtol=16 * EPS)
    np.testing.assert_allclose(bits[1], delta, rtol=0, atol=16 * EPS)
    other = second.copy()
    other[:, 0] += 5
    changed = repeat_surprisal(first, other, drop_first=drop)[0]
    assert (changed == percent).all() == drop


@given(seeds, st.integers(1, 12))
def law_verbatim_memory_interval_holds_the_median(seed, n):
    x = np.random.default_rng(seed).standard_normal(n)
    median, low, high = median_ci(x, resamples=200, seed=seed)
    assert x.min() <= low <= high <= x.max()
    assert median == np.median(x)
    assert (median, low, high) == median_ci(x, resamples=200, seed=seed)
    _, lower, higher = median_ci(x, level=0.99, resamples=200, seed=seed)
    assert lower <= low
    assert high <= higher
    assert median_ci(3 * x + 1, resamples=200, seed=seed)[0] == np.median(3 * x + 1)


def law_verbatim_memory_interval_is_the_bootstrap_distribution():
    """Of two numbers, a sample of two is (a, a), (b, b) or mixed with chances 1/4, 1/4, 1/2."""
    x = np.array([0.0, 1.0])
    assert median_ci(x, level=0.4, seed=1) == (0.5, 0.5, 0.5)  # the middle 40 % are mixed
    assert median_ci(x, level=0.6, seed=1) == (0.5, 0.0, 1.0)


def counted(unigram):
    """A surprisal function that knows how often each token comes."""
    p = unigram / unigram.sum()
    return lambda ids: -np.log(p[ids[1:]])


def copier(ids):
    """Two tokens that came one after the other will do so again, at no surprise; all else is uniform."""
    ids, followed, out = list(ids), {}, []
    for a, b in pairwise(ids):
        out.append(0.0 if followed.get(a) == b else np.log(TOKENIZER.size))
        followed[a] = b
    return np.array(out)


def law_verbatim_memory_uniform_unigram_and_copier_bracket_the_scale():
    rng = np.random.default_rng(0)
    uniform = lambda ids: np.full(len(ids) - 1, np.log(TOKENIZER.size))
    unigram = counted(rng.exponential(size=TOKENIZER.size))
    ratios = {}
    for condition in ("repeat", "permute", "novel"):
        for s in stimuli(condition, 5)[::7]:
            for name, fn in (("uniform", uniform), ("unigram", unigram)):
                first, second = list_surprisal(fn, s, TOKENIZER)
                whole = repeat_surprisal(first[None], second[None], drop_first=False)[0][0]
                rest = repeat_surprisal(first[None], second[None])[0][0]
                ratios.setdefault((name, condition), []).append((whole, rest))
    pieces = lambda noun: len(TOKENIZER.encode(f" {noun}"))
    assert pieces("apple") == 2  # so that the uniform model's surprisal counts pieces
    for condition in ("repeat", "permute"):
        for name in ("uniform", "unigram"):
            np.testing.assert_allclose([w for w, _ in ratios[name, condition]], 100, rtol=1e-12)
    for name in ("uniform", "unigram"):
        np.testing.assert_allclose([r for _, r in ratios[name, "repeat"]], 100, rtol=1e-12)
    assert np.std([w for w, _ in ratios["unigram", "novel"]]) > 1  # other nouns: it scatters
    assert np.std([r for _, r in ratios["unigram", "permute"]]) > 1  # another first noun is dropped
    # whole words and no marks: the copier, which looks one token back, then has a noun to look at
    spoken = lambda t: [TOKENIZER.encode(f" {w}")[0] for w in re.findall(r"\w+", t)]
    words = SimpleNamespace(encode=spoken, decode=lambda ids: f" {ids[0]}")
    for condition in ("repeat", "permute", "novel"):
        for s in stimuli(condition, 5, prefix="list", delay="", prompt="again")[::7]:
            first, second = list_surprisal(uniform, s, words)
            np.testing.assert_allclose(repeat_surprisal(first[None], second[None])[0], 100, rtol=1e-12)
            if condition == "repeat":
                _, second = list_surprisal(copier, s, words)
                assert second[1:].tolist() == [0] * 4
                assert second[0] > 0


def cache_model(ids):
    """Half unigram-uniform; half what came after the last occurrences of the current word, or of any word."""
    out, seen, after = [], Counter(), {}
    for t in range(1, len(ids)):
        a, b = ids[max(t - 2, 0)], ids[t]
        uniform, gist = 1 / TOKENIZER.size, seen[b] / max(t, 1)
        order = after.get(a, Counter())
        exact = order[b] / order.total() if order else 0.0
        out.append(-np.log(0.4 * uniform + 0.3 * gist + 0.3 * exact))
        seen[b] += 1
        after.setdefault(a, Counter())[b] += 1
    return np.array(out)


def law_verbatim_memory_suite_orders_identity_and_order():
    """A model with a cache of words and of pairs: the same order surprises least, new words most."""
    delays = {"short": "The keeper waited, and it rained."}
    design = Design(TOKENIZER, POOLS, delays, list_lengths=(3, 5), shifts=3, resamples=300)
    table = {(c.condition, c.list_length): c for c in run_suite(cache_model, design)}
    assert len(table) == 6
    for n in (3, 5):
        repeat, permute, novel = (table[c, n] for c in ("repeat", "permute", "novel"))
        assert repeat.n == permute.n == novel.n == 12
        assert repeat.low <= repeat.median <= repeat.high < novel.low
        assert repeat.median < permute.median < novel.median
        assert permute.first < novel.first
    with_all = Design(TOKENIZER, POOLS, delays, ("repeat",), (3,), resamples=9)
    assert run_suite(cache_model, with_all)[0].n == 40


@given(seeds)
@settings(max_examples=4)
def law_verbatim_memory_intervening_text_changes_nothing_before_it(seed):
    rng = np.random.default_rng(seed)
    params = init_gpt(rng, vocab=TOKENIZER.size, context=90, dim=8, depth=1, std=0.3)
    fn = lambda ids: token_surprisal(gpt_forward(ids[None], params, num_heads=2), ids[None])[0]
    short, long = (
        stimuli("novel", 3, delay=d)[5] for d in ("The keeper waited.", "The keeper waited, and it rained.")
    )
    a, b = (list_surprisal(fn, s, TOKENIZER)[0] for s in (short, long))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@given(seeds)
@settings(max_examples=4)
def law_verbatim_memory_shuffling_attention_keeps_weights_and_values(seed):
    rng = np.random.default_rng(seed)
    gpt = init_gpt(rng, vocab=9, context=5, dim=8, depth=2, std=0.5)
    llama, _ = tiny_smollm2(seed % 100)
    stacked = lambda p: [{k: v[i] for k, v in p.blocks._asdict().items()} for i in range(2)]
    apart = lambda p: [b._asdict() for b in p.blocks]
    run = (
        (gpt, lambda p, ids: gpt_forward(ids, p, num_heads=2), apart),
        (llama, lambda p, ids: forward(p, ids)[0], stacked),
    )
    for params, logits, layers in run:
        mixed = shuffle_qk(params, seed)
        for old, new in zip(layers(params), layers(mixed), strict=True):
            for name, w in old.items():
                if name in ("w_q", "w_k"):
                    np.testing.assert_array_equal(np.sort(w.ravel()), np.sort(new[name].ravel()))
                    assert (w != new[name]).any()
                else:
                    np.testing.assert_array_equal(w, new[name])
        one, many = np.array([3]), np.array([3, 1, 4, 1, 5])
        # alone, a token attends to itself
        np.testing.assert_array_equal(logits(mixed, one), logits(params, one))
        assert np.abs(logits(mixed, many) - logits(params, many)).max() > 0
        again = shuffle_qk(params, seed)
        np.testing.assert_array_equal(layers(again)[1]["w_k"], layers(mixed)[1]["w_k"])


@given(seeds, st.sampled_from((0.0, 0.5, 1.0)))
@settings(max_examples=6)
def law_verbatim_memory_language_repeats_what_is_not_held_out(seed, p):
    docs, hidden = synthetic_language(seed, 60, repeat_probability=p), held_out_nouns()
    assert len(hidden) == 20
    assert docs == synthetic_language(seed, 60, repeat_probability=p)
    again = 0
    for words in docs:
        lists = [
            " ".join(words[i + 1 :]).split(" .")[0].split(" , ") for i, w in enumerate(words) if w == ":"
        ]
        first, second = ([n.strip() for n in x] for x in lists)
        assert 3 <= len(first) == len(second) <= 10
        assert len(set(first)) == len(first)
        again += first == second
        if first == second:
            assert not set(first) & hidden
    assert again == 60 if p == 1 else again <= 5 if p == 0 else 10 <= again <= 50
    seen = {w for words in docs for w in words}
    assert p == 1 or seen & hidden


def law_verbatim_memory_pools_and_delays_are_as_asked():
    for kind in ("arbitrary", "coherent"):
        pools = noun_pools(kind)
        assert [len(p) for p in pools] == [10] * 23
        assert len({n for p in pools for n in p}) == 230
    home = {n: c for c, pool in enumerate(noun_pools("coherent")) for n in pool}
    assert all(len({home[n] for n in pool}) == 10 for pool in noun_pools())
    lengths = [len(re.findall(r"[\w']+|[^\w\s]", delay_text(d))) for d in DELAYS]
    assert all(d <= n < d + 60 for d, n in zip(DELAYS, lengths, strict=True))
    assert sorted(scrambled(PROMPT).split()) == sorted(PROMPT.split())
    assert scrambled(PROMPT) != PROMPT


def law_verbatim_memory_time_course_starts_before_the_second_list():
    made = [encode_stimulus(s, TOKENIZER) for s in stimuli("repeat", 3)[:9]]
    merged = [merge_subwords(np.arange(len(ids), dtype=float), *codes) for ids, *codes in made]
    got = time_course([m[:2] for m in merged], before=2)
    rows = []
    for s, trial, _ in merged:
        start = int(np.flatnonzero(trial == 3)[0])
        rows.append(s[start - 2 :])
    assert len(got) == 2 + 3 + 3  # two entries, three nouns, two commas and a stop
    np.testing.assert_array_equal(got, np.median(rows, axis=0))


@given(st.integers(0, 500), st.integers(1, 4), st.integers(1, 4))
def law_verbatim_memory_cache_bytes_are_those_of_the_arrays(delay, layers, kv_heads):
    """An empty cache has room for `context` tokens: a token's share is its bytes over that."""
    got = cache_bytes_for_delay(delay, layers=layers, kv_heads=kv_heads, head_dim=16, dtype_bytes=8)
    assert got == np.zeros((2, layers, kv_heads, delay, 16)).nbytes
    weights, _ = tiny_smollm2()
    cache = init_cache(weights, 10)
    assert cache_bytes_for_delay(10, layers=2, kv_heads=1, head_dim=16, dtype_bytes=8) == sum(
        np.asarray(c, float).nbytes for c in cache
    )
