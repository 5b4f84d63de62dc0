"""Laws of user-aware prefix-tuning on ref alone: NumPy and Hypothesis."""

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.optim import tree_leaves
from ref.blocks.softmax import logsumexp
from ref.data import digits
from ref.models.gpt import gpt_forward, init_gpt
from ref.models.vit import patchify
from ref.training.user_prefix import (
    CaptionModel,
    CaptionSize,
    beam_search,
    bleu,
    cider,
    fusion,
    fusion_backward,
    generate_caption,
    init_fusion,
    init_mapping,
    mapping_network,
    mapping_network_backward,
    meteor,
    personalized_caption,
    prefix_lm_logits,
    prefix_lm_loss,
    prefix_lm_loss_backward,
    rouge_l,
    train_captioner,
    trainable_count,
    user_context,
    user_tfidf,
    user_words,
)
from tests.slopes import check_kinked_slope

seeds = st.integers(0, 2**32 - 1)
D, V = 8, 6


def world(seed, *, context=14):
    """Generator, mapping, fusion and language model of width 8, weights of std 0.4."""
    rng = np.random.default_rng(seed)
    mapping = init_mapping(rng, queries=3, dim=D, visual_dim=5, depth=2, out=D, hidden=12, std=0.4)
    lm = init_gpt(rng, vocab=V, context=context, dim=D, depth=2, std=0.4)
    return rng, mapping, init_fusion(rng, prefix=2, dim=D, depth=2, std=0.4), lm


@given(seeds)
def law_user_prefix_mapping_reads_a_set_and_its_gradient(seed):
    rng, p, _, _ = world(seed)
    x, cot = rng.standard_normal((2, 4, 5)), rng.standard_normal((2, 3, D))
    y = mapping_network(x, p, num_heads=2)
    turned, order = rng.permutation(4), rng.permutation(3)
    np.testing.assert_allclose(mapping_network(x[:, turned], p, num_heads=2), y, rtol=0, atol=1e-11)
    moved = p._replace(queries=p.queries[order])
    np.testing.assert_allclose(mapping_network(x, moved, num_heads=2), y[:, order], rtol=0, atol=1e-11)
    run = lambda t: (cot * mapping_network(*t, num_heads=2)).sum()
    check_kinked_slope(run, (x, p), mapping_network_backward(x, p, cot, num_heads=2), rng)


@given(seeds, st.integers(0, 3))
def law_user_prefix_fusion_ignores_padding_and_the_order_of_words(seed, n_u):
    rng, _, p, _ = world(seed)
    v, u, cot = (rng.standard_normal((2, rows, D)) for rows in (3, n_u, 2))
    y = fusion(v, u, p, num_heads=2)
    turned = rng.permutation(n_u)
    np.testing.assert_allclose(fusion(v, u[:, turned], p, num_heads=2), y, rtol=0, atol=1e-11)
    padded = np.concatenate([u, np.full((2, 2, D), np.nan)], axis=1)
    mask = np.ones((2, n_u + 2), bool)
    mask[:, n_u:] = False
    got = fusion(v, padded, p, num_heads=2, user_mask=mask)
    np.testing.assert_allclose(got, y, rtol=0, atol=1e-11)  # the same sums with zeros between them
    other = np.where(np.isnan(padded), 7.0, padded)
    np.testing.assert_array_equal(fusion(v, other, p, num_heads=2, user_mask=mask), got)
    run = lambda t: (cot * fusion(t[0], t[1], t[2], num_heads=2, user_mask=mask)).sum()
    dv, du, dp = fusion_backward(v, other, p, cot, num_heads=2, user_mask=mask)
    assert not du[:, n_u:].any()
    check_kinked_slope(run, (v, other, p), (dv, du, dp), rng)
    if n_u:  # another user, another prefix
        assert np.abs(fusion(v, rng.standard_normal(u.shape), p, num_heads=2) - y).max() > 1e-6


@given(seeds)
def law_user_prefix_of_embeddings_is_an_ordinary_prompt(seed):
    """A prefix wte[x] gives the language model's own logits for x and then the caption."""
    rng, _, _, lm = world(seed)
    x, c = rng.integers(0, V, (2, 3)), rng.integers(0, V, (2, 4))
    want = gpt_forward(np.concatenate([x, c], axis=1), lm, num_heads=2)[:, 2:-1]
    got = prefix_lm_logits(lm.wte[x], c, np.ones((2, 4), bool), lm, num_heads=2)
    # the same sums, of at most 32 terms of order 1, perhaps in another order
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@given(seeds, st.integers(0, 3))
def law_user_prefix_loss_is_the_definition_and_causal(seed, j):
    rng, _, _, lm = world(seed)
    prefix, c = rng.standard_normal((2, 3, D)), rng.integers(0, V, (2, 4))
    mask = np.array([[True] * 4, [True, True, False, False]])
    logits = prefix_lm_logits(prefix, c, mask, lm, num_heads=2)
    terms = [
        logsumexp(logits[b, t]) - logits[b, t, c[b, t]] for b in range(2) for t in range(4) if mask[b, t]
    ]
    loss = prefix_lm_loss(prefix, c, mask, lm, num_heads=2)
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-12)
    changed = c.copy()
    changed[:, j] = (c[:, j] + 1) % V
    after = prefix_lm_logits(prefix, changed, mask, lm, num_heads=2)
    np.testing.assert_array_equal(after[:, : j + 1], logits[:, : j + 1])
    hidden = c.copy()
    hidden[1, 2:] = 0  # what stands in the padding is neither seen nor scored
    assert prefix_lm_loss(prefix, hidden, mask, lm, num_heads=2) == loss
    dprefix, none = prefix_lm_loss_backward(prefix, c, mask, lm, 1.0, num_heads=2)
    assert none is None
    check_kinked_slope(lambda p: prefix_lm_loss(p, c, mask, lm, num_heads=2), prefix, dprefix, rng)


@given(seeds)
def law_user_prefix_beam_one_is_greedy_and_a_full_beam_is_exact(seed):
    rng, _, _, lm = world(seed)
    prefix = rng.standard_normal((2, D))
    greedy = []
    for _ in range(4):
        c = np.array([[*greedy, 0]])
        greedy.append(
            int(prefix_lm_logits(prefix[None], c, np.ones(c.shape, bool), lm, num_heads=2)[0, -1].argmax())
        )
    assert generate_caption(prefix, lm, num_heads=2, beam=1, max_len=4) == [greedy]
    best = generate_caption(prefix, lm, num_heads=2, beam=V**2, max_len=3)
    every = np.array(list(product(range(V), repeat=3)))
    many, mask = np.broadcast_to(prefix, (len(every), 2, D)), np.ones(every.shape, bool)
    logits = prefix_lm_logits(many, every, mask, lm, num_heads=2)
    own = np.take_along_axis(logits, every[..., None], axis=-1)[..., 0]
    losses = (logsumexp(logits) - own).mean(axis=1)
    np.testing.assert_allclose(losses[(every == best[0]).all(axis=1)], losses.min(), rtol=1e-12)
    assert len(best) == V**2


def law_user_prefix_beams_that_end_stay_in_the_race():
    """A table of next-token chances, searched by hand: [2] ends at once, and wins by its mean."""
    table = {(): (0.45, 0.05, 0.5), (0,): (0.34, 0.33, 0.33), (1,): (0.9, 0.05, 0.05)}

    def step(_, tokens):
        with np.errstate(divide="ignore"):
            return np.log([table.get(tuple(t), (0.3, 0.3, 0.4)) for t in tokens.tolist()])

    got = beam_search(step, None, beam=2, max_len=3, stop_id=2)
    # [2] is finished at log 0.5; of the others [0, 0] and then [0, 0, 2] have the best mean
    assert np.log(0.5) > np.log(0.45 * 0.34 * 0.4) / 3 > np.log(0.45 * 0.33 * 0.4) / 3
    assert got == [[2], [0, 0, 2]]


@given(seeds)
def law_user_prefix_tfidf_weighs_what_sets_users_apart(seed):
    rng = np.random.default_rng(seed)
    words = [f"w{chr(97 + i)}" for i in range(8)]
    docs = [" ".join(["all", *rng.choice(words, 6)]) for _ in range(4)]
    weights, vocab = user_tfidf(docs)
    assert vocab == sorted(vocab)
    np.testing.assert_allclose(np.linalg.norm(weights, axis=1), 1, rtol=1e-12)
    raw, _ = user_tfidf(docs, norm=None)
    idf = raw.max(axis=0) / np.array([max(d.split().count(w) for d in docs) for w in vocab])
    assert idf[vocab.index("all")] == idf.min() == 1.0
    np.testing.assert_allclose(user_tfidf([d + " " + d for d in docs])[0], weights, rtol=1e-12, atol=1e-15)
    top = user_words(weights, vocab, 3)
    for u, mine in enumerate(top):
        rest = [weights[u, vocab.index(w)] for w in vocab if w not in mine]
        assert min(weights[u, vocab.index(w)] for w in mine) >= max(rest)
        assert all(w in docs[u].split() for w in mine)
    assert user_words(np.ones((1, 3)), ["b", "a", "c"], 2) == [["a", "b"]]
    same, _ = user_tfidf([docs[0]] * 3)
    assert user_words(same, vocab[: same.shape[1]], 2)[0] == user_words(same, vocab[: same.shape[1]], 2)[2]


def law_user_prefix_scores_of_a_perfect_caption():
    refs = [["a red kite over the hill"], ["two boats leave the old harbour"], ["the cat sleeps on my desk"]]
    hyps = [r[0] for r in refs]
    np.testing.assert_allclose(bleu(refs, hyps), 1, rtol=0, atol=1e-6)
    assert rouge_l(refs, hyps) == 1
    mean, each = cider(refs, hyps)
    np.testing.assert_allclose(each, 10, rtol=1e-12)
    np.testing.assert_allclose(mean, 10, rtol=1e-12)
    m = np.array([6, 6, 6])
    np.testing.assert_allclose(meteor(refs, hyps), 1 - 0.5 / m**3, rtol=1e-12)
    shuffled = [" ".join(reversed(h.split())) for h in hyps]
    for score in (bleu(refs, shuffled)[3], rouge_l(refs, shuffled), cider(refs, shuffled)[0]):
        assert score < 0.7 * 10
    assert (meteor(refs, shuffled) < meteor(refs, hyps)).all()
    assert not meteor(refs, ["none"] * 3).any()
    assert bleu(refs, ["none"] * 3).max() < 1e-3


def law_user_prefix_counts():
    """The paper's scale, as counted: 37.8 M and 19.5 M train beside 276 M; and small trees."""
    n = trainable_count(CaptionSize())
    assert n["language model"] == 124_439_808
    assert abs(n["share"] - 0.17) < 0.005
    small = CaptionSize(5, 8, 3, 2, 2, 4, 12, 1, 9, 7, 0)
    rng = np.random.default_rng(0)
    made = {
        "mapping": init_mapping(rng, queries=3, dim=8, visual_dim=5, depth=2, out=12),
        "fusion": init_fusion(rng, prefix=4, dim=12, depth=2),
        "language model": init_gpt(rng, vocab=9, context=7, dim=12, depth=1),
    }
    count = trainable_count(small)
    for part, tree in made.items():
        assert count[part] == sum(x.size for x in tree_leaves(tree)), part


def law_user_prefix_training_leaves_the_language_model_alone():
    """Digits as patches, two users with a word each: the loss falls, and only mapping and fusion change."""
    rng, _, fuse, lm = world(1)
    images, labels = digits()
    visual = patchify(images[:40, ..., None] / 8 - 1, 4)
    mapping = init_mapping(rng, queries=3, dim=D, visual_dim=16, depth=1, out=D, std=0.3)
    encode = lambda word: [int(word)]
    users = {u: user_context([str(u)], encode, lm.wte, 2) for u in range(2)}
    model = CaptionModel(mapping, fuse, lm, users, (2, 2, 2), stop_id=5)
    who = rng.integers(0, 2, 40)
    tokens = np.stack([2 + who, labels[:40] % 2, np.full(40, 5)], axis=1)
    data = visual, who, tokens, np.ones(tokens.shape, bool)
    before = [x.copy() for x in tree_leaves(lm)]
    new, history = train_captioner(model, data, steps=60, seed=0, batch=10, lr=3e-2, warmup=3)
    assert history[-5:].mean() < 0.8 * history[:5].mean()
    assert new.lm is lm
    assert new.users is users
    for a, b in zip(tree_leaves(lm), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(new.fusion.constants, fuse.constants)
    captions = [personalized_caption(visual[0], u, new, beam=2, max_len=4)[0] for u in range(2)]
    assert [c[0] for c in captions] == [2, 3]
    stranger = personalized_caption(visual[0], "new", new, beam=2, max_len=4, unknown="mean")
    assert len(stranger) == 2
