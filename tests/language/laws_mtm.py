"""Laws of MTM on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.blocks.optim import adam_init, tree_leaves, tree_map
from ref.data import text
from ref.language.mtm import (
    Linear,
    Reranker,
    bm25,
    bm25_fit,
    bm25_scores,
    encode_pairs,
    hit_at,
    init_match,
    init_rot,
    kmeans,
    map_at,
    match_forward,
    match_forward_backward,
    match_score,
    match_score_backward,
    mrr,
    pattern_bank,
    prediction_weight,
    rot_forward,
    rot_forward_backward,
    rot_loss,
    rot_loss_backward,
    rouge2,
    sampling_weights,
    select_key_sentences,
    selection_cost,
    sentence_vector,
    train_epoch,
    trainable,
    unique_targets,
    update_memory,
)
from ref.tasks.quotes import quote_corpus, split_sentences
from tests.slopes import check_slope

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
SIZES = {"vocab": 12, "context": 9, "dim": 4, "hidden": 6, "std": 0.5}
LIMITS = {"max_len": 9, "claim_max": 3, "cls_id": 9, "sep_id": 10, "pad_id": 11}
HEADS = {"num_heads": 2}


def texts(rng, n, longest=6):
    return [rng.integers(0, 9, rng.integers(1, longest + 1)).tolist() for _ in range(n)]


@given(seeds, st.sampled_from((0.25, 0.0)))
def law_mtm_bm25_is_the_double_loop(seed, epsilon):
    rng = np.random.default_rng(seed)
    corpus, query = texts(rng, 7), rng.integers(0, 11, 5).tolist()
    vocabulary = sorted({t for d in corpus for t in d})
    holds = {t: sum(t in d for d in corpus) for t in vocabulary}
    idf = {t: np.log(7 - n + 0.5) - np.log(n + 0.5) for t, n in holds.items()}
    mean = sum(idf.values()) / len(idf)
    idf = {t: epsilon * mean if w < 0 else w for t, w in idf.items()}
    average = sum(map(len, corpus)) / 7
    want = []
    for d in corpus:
        total = 0.0
        for t in query:
            f = d.count(t)
            if f:
                total += idf[t] * f * 2.5 / (f + 1.5 * (1 - 0.75 + 0.75 * len(d) / average))
        want.append(total)
    got = bm25(corpus, query, epsilon=epsilon)
    np.testing.assert_allclose(got, want, rtol=64 * EPS, atol=64 * EPS)
    order = rng.permutation(7)
    np.testing.assert_allclose(
        bm25([corpus[i] for i in order], query, epsilon=epsilon), got[order], rtol=1e-12, atol=1e-15
    )
    twice = bm25_scores(bm25_fit(corpus, epsilon=epsilon), query + query)
    np.testing.assert_allclose(twice, 2 * got, rtol=1e-12, atol=1e-15)
    assert not bm25(corpus, [99]).any()
    as_array = bm25(corpus, np.array(query), epsilon=epsilon)
    np.testing.assert_array_equal(as_array, got)


@given(seeds)
def law_mtm_rouge_counts_unique_pairs(seed):
    rng = np.random.default_rng(seed)
    hypotheses, reference = texts(rng, 5), texts(rng, 1)[0]
    got = rouge2(hypotheses, reference)
    assert ((got >= 0) & (got <= 1)).all()
    pairs = lambda t: {(t[i], t[i + 1]) for i in range(len(t) - 1)}
    for (p, r), h in zip(got, hypotheses, strict=True):
        same = len(pairs(h) & pairs(reference))
        assert p == (same / len(pairs(h)) if pairs(h) else 0)
        assert r == (same / len(pairs(reference)) if pairs(reference) else 0)
        np.testing.assert_array_equal(rouge2([reference], h)[0], [r, p])
        assert rouge2([h], h)[0].tolist() == ([1, 1] if len(h) > 1 else [0, 0])


@given(seeds)
def law_mtm_pairs_are_laid_out_claim_first(seed):
    rng = np.random.default_rng(seed)
    claims, sentences = texts(rng, 4), [[], *texts(rng, 3)]
    ids, mask, types = encode_pairs(claims, sentences, **LIMITS)
    for n in range(4):
        row = [9, *claims[n][:3], 10, *sentences[n][:3], 10]
        assert ids[n].tolist() == row + [11] * (9 - len(row))
        assert mask[n].tolist() == [True] * len(row) + [False] * (9 - len(row))
        first = len(claims[n][:3]) + 2
        assert types[n].tolist() == [0] * first + [1] * (9 - first)


@given(seeds)
@settings(max_examples=4)
def law_mtm_rot_gradients_are_the_slopes(seed):
    rng = np.random.default_rng(seed)
    params = init_rot(rng, **SIZES)
    pairs = encode_pairs(texts(rng, 3), texts(rng, 3), **LIMITS)
    pred = rot_forward(*pairs, params, **HEADS)
    assert ((pred > 0) & (pred < 1)).all()
    weights = rng.standard_normal(pred.shape)
    grads = rot_forward_backward(*pairs, params, weights, **HEADS)
    check_slope(lambda p: (weights * rot_forward(*pairs, p, **HEADS)).sum(), params, grads, seed)
    target = rng.random((3, 2))
    pulled = params.bert._replace(w_pool=None, b_pool=None)  # the pooler is fresh
    anchor = tree_map(lambda p: p + 0.1 * rng.standard_normal(p.shape), pulled)
    for options in ({}, {"regularize": 0.3, "anchor": anchor}):
        loss = lambda tree, options=options: rot_loss(*pairs, *tree, **HEADS, **options)
        plain = ((pred - target) ** 2).mean()
        gap = sum(((a - p) ** 2).sum() for a, p in zip(tree_leaves(anchor), tree_leaves(pulled), strict=True))
        want = plain + options.get("regularize", 0) * gap
        np.testing.assert_allclose(loss((target, params)), want, rtol=1e-13)
        grads = rot_loss_backward(*pairs, target, params, **HEADS, **options)
        check_slope(loss, (target, params), grads, seed)


@given(seeds, st.integers(1, 5))
def law_mtm_kmeans_means_are_those_of_their_members(seed, k):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((12, 3))
    before = np.inf
    for iters in (1, 2, 50):  # from one start: more rounds never cost
        centers, labels, inertia = kmeans(x, k=k, init=x[:k], iters=iters)
        d = ((x[:, None] - centers) ** 2).sum(axis=-1)
        np.testing.assert_array_equal(labels, d.argmin(axis=1))
        np.testing.assert_allclose(inertia, d.min(axis=1).sum(), rtol=1e-13)
        assert inertia <= before * (1 + 1e-12)
        before = inertia
    for c in range(k):
        np.testing.assert_allclose(centers[c], x[labels == c].mean(axis=0), rtol=0, atol=1e-14)
    drawn = kmeans(x, k=k, seed=seed)
    np.testing.assert_array_equal(drawn[0], kmeans(x, k=k, seed=seed)[0])
    assert len(set(drawn[1].tolist())) == k


def law_mtm_kmeans_fills_an_empty_cluster_and_takes_points_that_coincide():
    x = np.array([[0.0], [1.0], [2.0], [10.0]])
    centers, _, inertia = kmeans(x, k=2, init=np.array([[1.0], [-99.0]]))
    assert sorted(centers[:, 0].tolist()) == [1.0, 10.0]  # 10 was the farthest from its centre
    assert inertia == 2
    same = kmeans(np.ones((4, 2)), k=3, seed=0)
    np.testing.assert_array_equal(same[0], np.ones((3, 2)))
    assert same[2] == 0
    far = kmeans(x, k=2, init=np.array([[0.0], [9.0]]), iters=1)
    stopped = kmeans(x, k=2, init=np.array([[0.0], [9.0]]), iters=50, tol=1e9)  # any move is small enough
    np.testing.assert_array_equal(far[0], stopped[0])


def selected(seed, n=6, K=3):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(5), rng.standard_normal((n, 5)), rng.standard_normal((K, 5))


@given(seeds, st.integers(1, 7), st.integers(1, 7))
def law_mtm_selection_is_the_definition(seed, n, top):
    q, s, memory = selected(seed, n)
    got = select_key_sentences(q, s, memory, top=top)
    near = [np.linalg.norm(x - q) for x in s]
    to = [[np.linalg.norm(x - q - m) for m in memory] for x in s]
    scale = lambda d, i: 1 - (d[i] - min(d)) / (max(d) - min(d) + 1e-8)
    least = [min(row) for row in to]
    score = [0.6 * scale(near, i) + 0.4 * scale(least, i) for i in range(n)]
    order = sorted(range(n), key=lambda i: -score[i])
    assert got.order.tolist() == order
    assert got.pattern.tolist() == [int(np.argmin(to[i])) for i in order]
    np.testing.assert_allclose(got.score, [score[i] for i in order], rtol=0, atol=1e-13)
    assert ((got.score >= 0) & (got.score <= 1)).all()
    best = got.score[:top]
    assert len(got.weight) == min(top, n)
    np.testing.assert_allclose(got.weight.sum(), 1, rtol=0, atol=2e-8 / best.sum())
    assert (np.diff(got.weight) <= 0).all()
    if n == 1:
        assert got.weight.tolist() == got.score.tolist() == [1]


@given(seeds)
def law_mtm_selection_without_patterns_is_the_nearest_sentence(seed):
    q, s, memory = selected(seed)
    near = np.argsort(np.linalg.norm(s - q, axis=1))
    alone = select_key_sentences(q, s, memory, lambda_q=1.0, lambda_p=0.0)
    np.testing.assert_array_equal(alone.order, near)
    d = np.linalg.norm(s - q, axis=1)
    assert alone.score[0] == 1
    np.testing.assert_allclose(alone.score[-1], 1e-8 / (np.ptp(d) + 1e-8), rtol=1e-6)
    p = np.random.default_rng(seed).permutation(6)
    got, moved = select_key_sentences(q, s, memory), select_key_sentences(q, s[p], memory)
    np.testing.assert_array_equal(p[moved.order], got.order)
    np.testing.assert_array_equal(moved.pattern, got.pattern)
    more = np.concatenate([s, s[got.order[4:]]])  # copies of sentences that are not chosen
    again = select_key_sentences(q, more, memory)
    np.testing.assert_array_equal(again.order[:3], got.order[:3])
    np.testing.assert_array_equal(again.weight, got.weight)
    same = select_key_sentences(q, np.tile(s[:1], (4, 1)), memory)
    assert same.order.tolist() == [0, 1, 2, 3]
    assert same.score.tolist() == [1] * 4


@given(seeds, st.booleans())
@settings(max_examples=4)
def law_mtm_match_gradients_are_the_slopes(seed, between):
    rng = np.random.default_rng(seed)
    params = init_match(rng, depth=2, **SIZES)
    biased = tuple(Linear(x.w, x.b if x.b is None else rng.standard_normal(x.b.shape)) for x in params.head)
    params, memory = params._replace(head=biased), rng.standard_normal((3, 4))
    pairs = [x.reshape(2, 2, 9) for x in encode_pairs(texts(rng, 4), [[], *texts(rng, 3)], **LIMITS)]
    weight, pattern = rng.random((2, 2)), rng.integers(0, 3, (2, 2))
    options, d = {**HEADS, "activation_between": between}, rng.standard_normal((2, 2))
    value = lambda p: (d * match_forward(*pairs, weight, pattern, memory, p, **options)).sum()
    grads = match_forward_backward(*pairs, weight, pattern, memory, params, d, **options)
    check_slope(value, params, grads, seed)


@given(seeds, st.integers(1, 4), st.booleans())
@settings(max_examples=6)
def law_mtm_match_reads_pair_by_pair(seed, top, between):
    """The score of an article, its pairs encoded one at a time, without padding, and averaged by hand."""
    from ref.blocks.mlp import gelu
    from ref.models.bert import bert_encode

    rng = np.random.default_rng(seed)
    params, memory = init_match(rng, depth=2, **SIZES), rng.standard_normal((3, 4))
    claim, article = texts(rng, 1)[0], [[], *texts(rng, 2)]
    q, s = rng.standard_normal(4), rng.standard_normal((3, 4))
    chosen = select_key_sentences(q, s, memory, top=top)
    options = {**HEADS, **LIMITS, "top": top, "activation_between": between}
    got = match_score(claim, article, chosen, memory, params, **options)
    vector, cut = 0.0, claim[:3]
    for i, k, w in zip(chosen.order, chosen.pattern, chosen.weight, strict=False):
        sentence = article[i][:3]
        ids = np.array([9, *cut, 10, *sentence, 10])
        h = bert_encode(ids, params.bert, types=(np.arange(len(ids)) > len(cut) + 1) + 0, **HEADS)
        c, z = h[1 : len(cut) + 1], h[len(cut) + 2 : -1]
        mean = lambda x: x.sum(axis=0) / (len(x) + 1e-8)
        vector = vector + w * np.concatenate([mean(c), mean(z), memory[k]])
    for n, layer in enumerate(params.head):
        vector = vector @ layer.w + (0 if layer.b is None else layer.b)
        if between and n < len(params.head) - 1:
            vector = gelu(vector)
    np.testing.assert_allclose(got, gelu(gelu(vector)), rtol=0, atol=1e-12)
    d = rng.standard_normal(2)
    value = lambda p: d @ match_score(claim, article, chosen, memory, p, **options)
    check_slope(
        value, params, match_score_backward(claim, article, chosen, memory, params, d, **options), seed
    )
    padded = [np.concatenate([x, x[:1]]) for x in encode_pairs([claim] * 3, article, **LIMITS)]
    weights, patterns = np.array([[0.5, 0.2, 0.3, 0.0]]), np.array([[1, 0, 2, 0]])
    full, less = (
        match_forward(
            *(x[None, :n] for x in padded), weights[:, :n], patterns[:, :n], memory, params, **HEADS
        )
        for n in (4, 3)
    )
    np.testing.assert_allclose(full, less, rtol=0, atol=1e-14)  # a pair of weight 0 only pads


@given(seeds)
def law_mtm_memory_takes_steps_of_a_fixed_share(seed):
    rng = np.random.default_rng(seed)
    memory, u = rng.standard_normal((4, 5)), rng.standard_normal((8, 5))
    pattern, weight = rng.integers(0, 3, 8), rng.random(8)
    positive = rng.random(8) < 0.5
    new = update_memory(memory, u, pattern, weight, positive)
    for k in range(4):
        if not (pattern == k).any():
            np.testing.assert_array_equal(new[k], memory[k])
            continue
        step = new[k] - memory[k]
        np.testing.assert_allclose(np.linalg.norm(step), 0.3 * np.linalg.norm(memory[k]), rtol=1e-12)
        sides = [(pattern == k) & (positive == side) for side in (True, False)]
        plus, minus = (weight[side].sum() for side in sides)
        centre = [weight[x] @ u[x] / weight[x].sum() if x.any() else memory[k] for x in sides]
        g = (plus * (centre[0] - memory[k]) + minus * (memory[k] - centre[1])) / (plus + minus)
        np.testing.assert_allclose(step / np.linalg.norm(step), g / np.linalg.norm(g), rtol=0, atol=1e-10)
    towards = update_memory(memory, u, pattern, weight, np.ones(8, bool))
    for k in np.unique(pattern):
        at = pattern == k
        centre = weight[at] @ u[at] / weight[at].sum()
        line = (centre - memory[k]) / np.linalg.norm(centre - memory[k])
        np.testing.assert_allclose(
            towards[k] - memory[k], 0.3 * np.linalg.norm(memory[k]) * line, rtol=0, atol=1e-12
        )
    np.testing.assert_array_equal(update_memory(memory, u, pattern, 0 * weight, positive), memory)
    np.testing.assert_array_equal(update_memory(memory, u[:0], pattern[:0], weight[:0], positive[:0]), memory)
    at_home = np.tile(memory[:1], (8, 1))
    np.testing.assert_array_equal(
        update_memory(memory, at_home, 0 * pattern, weight, np.ones(8, bool)), memory
    )


def law_mtm_predictions_weigh_by_their_distance_from_a_draw():
    weight, positive = prediction_weight(np.array([0.9, 0.5, 0.5, 0.1]), np.array([1, 0, 1, 0]))
    np.testing.assert_allclose(weight, [0.4, 0, 0, 0.4])
    assert positive.tolist() == [True, True, False, False]


@given(seeds)
def law_mtm_ranking_metrics_are_counted(seed):
    rng = np.random.default_rng(seed)
    ranked = [rng.permutation(8)[: rng.integers(1, 7)].tolist() for _ in range(4)]
    relevant = [rng.permutation(8)[: rng.integers(1, 4)].tolist() for _ in range(4)]
    want_mrr, want_map, want_hit = [], [], []
    for ids, good in zip(ranked, relevant, strict=True):
        ranks = [r for r, i in enumerate(ids, 1) if i in good]
        want_mrr.append(1 / ranks[0] if ranks else 0)
        inside = [r for r in ranks if r <= 3]
        want_map.append(sum(i / r for i, r in enumerate(inside, 1)) / len(good))
        want_hit.append(bool(inside))
    np.testing.assert_allclose(mrr(ranked, relevant), np.mean(want_mrr), rtol=4 * EPS)
    np.testing.assert_allclose(map_at(ranked, relevant, k=3), np.mean(want_map), rtol=4 * EPS)
    assert hit_at(ranked, relevant, k=3) == np.mean(want_hit)
    assert mrr(ranked, relevant) <= hit_at(ranked, relevant, k=8)
    assert map_at(ranked, relevant, k=1) <= hit_at(ranked, relevant, k=1)
    first = [ids[:1] for ids in ranked]
    assert mrr(ranked, first) == map_at(ranked, first, k=5) == hit_at(ranked, first, k=1) == 1
    assert map_at([[1]], [[]], k=1) == 0


@given(seeds)
def law_mtm_bank_is_built_between_two_quantiles(seed):
    rng = np.random.default_rng(seed)
    claims, sentences = rng.standard_normal((21, 3)), rng.standard_normal((21, 3))
    u = sentences - claims
    length = np.linalg.norm(u, axis=1)
    rank = np.argsort(np.argsort(length))
    middle = (rank > 5) & (rank < 10)  # of 21, the quartile is the sixth and the median the eleventh
    np.testing.assert_allclose(
        pattern_bank(claims, sentences, k=1), u[middle].mean(axis=0)[None], rtol=0, atol=1e-14
    )
    np.testing.assert_allclose(
        sentence_vector([2, 2, 0], claims), (2 * claims[2] + claims[0]) / 3, rtol=1e-15
    )
    word, ids = rng.standard_normal((9, 3)), rng.integers(0, 9, 6)
    np.testing.assert_allclose(
        sentence_vector(ids[::-1], word), sentence_vector(ids, word), rtol=0, atol=1e-15
    )


def law_mtm_frozen_parts_are_embeddings_and_the_first_block():
    params = init_match(np.random.default_rng(0), depth=3, **SIZES)
    flags = trainable(params)
    free = tree_leaves(flags)
    assert len(free) == len(tree_leaves(params))
    assert sum(free) == 2 * 16 + 9  # two blocks, five maps with four biases
    assert not any(tree_leaves(flags.bert.blocks[0]))
    assert not any(tree_leaves(flags.bert._replace(blocks=None)))


def law_mtm_key_sentences_hold_the_quote_and_ties_are_drawn():
    """Sixty damaged sentences of Hamlet: random static vectors already find the sentence that quotes them."""
    rng = np.random.default_rng(0)
    corpus = quote_corpus(rng, split_sentences(text()), claims=60)
    names = sorted({w for a in corpus.articles for s in a for w in s})
    code = {w: n for n, w in enumerate(names)}
    ids = lambda words: [code[w] for w in words]
    word = rng.standard_normal((len(names), 32))
    vector = lambda words: sentence_vector(ids(words), word)
    quoted = [a[p] for a, p in zip(corpus.articles, corpus.quote, strict=True)]
    for claim, sentence in zip(corpus.claims, quoted, strict=True):
        rest = iter(sentence)
        assert all(w in rest for w in claim)  # in order, some words gone
    memory = pattern_bank(*(np.stack([vector(t) for t in x[:40]]) for x in (corpus.claims, quoted)), k=4)
    params = init_match(rng, vocab=len(names) + 3, context=40, dim=32, depth=1, hidden=4)
    still = params._replace(head=tuple(Linear(0 * x.w, None) for x in params.head))  # every score is 0
    reranker = Reranker(still, memory, word, 2, max_len=40, claim_max=20, candidates=5)
    found = [corpus.quote[n] in reranker.select(ids(c), [ids(s) for s in corpus.articles[n]]).order[:3]
             for n, c in enumerate(corpus.claims)]  # fmt: skip
    assert np.mean(found) > 0.9  # 3 of 6 sentences at random: 0.5
    articles = [[[t % 200 for t in ids(s)] for s in a] for a in corpus.articles[:10]]
    claim = [t % 200 for t in ids(corpus.claims[0])]
    orders = {tuple(reranker.rank(claim, articles, seed=seed).tolist()) for seed in range(3)}
    assert len(orders) > 1
    best = np.argsort(-bm25([[t for s in a for t in s] for a in articles], claim), kind="stable")[:5]
    assert all(sorted(o) == sorted(best.tolist()) for o in orders)


def law_mtm_epoch_trains_what_is_free_and_moves_the_memory():
    rng = np.random.default_rng(1)
    params = init_match(rng, depth=2, **SIZES)
    claims, articles = texts(rng, 8), [texts(rng, n) for n in (1, 2, 4, 4, 3, 5, 4, 4)]
    labels = np.array([0, 1, 0, 1, 0, 0, 0, 0])
    memory, limits = rng.standard_normal((3, 4)), LIMITS
    reranker, state = Reranker(params, memory, rng.standard_normal((12, 4)), 2, **limits), adam_init(params)
    trained = []
    for _ in range(15):
        reranker, state, loss = train_epoch(
            reranker, claims, articles, labels, state, rng=rng, lr=0.02, batch=4
        )
        trained.append(loss)
    assert np.mean(trained[-5:]) < np.mean(trained[:5])
    for free, new, old in zip(*map(tree_leaves, (trainable(params), reranker.params, params)), strict=True):
        assert (new == old).all() != free
    assert (reranker.memory != memory).any()
    # one step from a fresh start is AdamW on the mean loss of the drawn pairs, scored one by one
    fresh, draw = Reranker(params, memory, reranker.word, 2, **limits), np.random.default_rng(7)
    odds = np.where(labels == 1, 8 / 2, 8 / 6)
    np.testing.assert_allclose(sampling_weights(labels), odds, rtol=1e-15)
    order = np.random.default_rng(7).choice(8, 8, p=odds / odds.sum())
    _, _, loss = train_epoch(fresh, claims, articles, labels, adam_init(params), rng=draw, batch=8)
    want = []
    for j in order:
        chosen = fresh.select(claims[j], articles[j])
        z = match_score(claims[j], articles[j], chosen, memory, params, **HEADS, **limits)
        want.append(np.log(np.exp(z).sum()) - z[labels[j]])
    np.testing.assert_allclose(loss, np.mean(want), rtol=1e-12)


def law_mtm_targets_that_occur_twice_are_kept_once():
    targets = np.array([[0.5, 1.0], [0.0, 0.0], [0.5, 1.0], [0.0, 0.0], [1.0, 0.5]])
    assert unique_targets(targets).tolist() == [0, 1, 4]


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 50))
def law_mtm_cost_counts_passes_and_distances(n, top, articles):
    cost = selection_cost(n, dim=8, patterns=20, top=top, articles=articles)
    s = np.zeros((n, 8))
    assert cost["passes"] == articles * len(select_key_sentences(s[0], s, np.zeros((20, 8)), top=top).weight)
    assert cost["passes_all"] == articles * n == cost["passes"] + cost["saved"]
    assert cost["macs"] == articles * (s.size + n * 20 * 8)
