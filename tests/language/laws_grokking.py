"""Laws of grokking on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ref.blocks.optim import adam_init, tree_leaves, tree_map
from ref.language.grokking import (
    GrokConfig,
    History,
    adamw_step,
    causal_trace,
    comparison_data,
    complex_comparison_data,
    composition_data,
    corrupt_comparison,
    corrupt_composition,
    gpt2_forward,
    gpt2_forward_backward,
    gpt2_loss,
    gpt2_loss_backward,
    grokking_gap,
    init_grokking,
    lens_logits,
    logit_lens,
    matrix_mask,
    slice_accuracy,
    token_rank,
    trace_strength,
    train,
    train_steps,
)
from tests.slopes import check_slope

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
HEADS = {"num_heads": 2}


def network(seed, depth=2):
    """(params, ids [3, 4], labels [3, 4] with two scored places a row) of a drawn network."""
    rng = np.random.default_rng(seed)
    params = init_grokking(rng, vocab=9, context=5, dim=6, depth=depth)
    params = tree_map(lambda p: p + 0.3 * rng.standard_normal(p.shape), params)
    ids, labels = rng.integers(0, 9, (3, 4)), rng.integers(0, 9, (3, 4))
    labels[:, :2] = -100
    return params, ids, labels


def rows(questions):
    """Prompt and answer of every row as a tuple, without the end and the padding."""
    return [
        tuple(r[: np.flatnonzero(l >= 0)[0] + 1].tolist())
        for r, l in zip(questions.ids, questions.labels, strict=True)
    ]


@given(seeds, st.sampled_from((0.0, 0.2, 1.0)))
def law_grokking_composition_follows_from_the_facts(seed, holdout):
    ratio = 0.0 if holdout == 1 else 0.6
    data = composition_data(
        np.random.default_rng(seed), entities=14, relations=5, out_degree=3, ood_fraction=0.3, ratio=ratio,
        holdout=holdout,
    )  # fmt: skip
    fact = {(h, r): t for h, r, t in data.facts.tolist()}
    ood = {(h, r): o for (h, r, _), o in zip(data.facts.tolist(), data.ood.tolist(), strict=True)}
    assert len(fact) == 14 * 3
    assert sum(ood.values()) == round(0.3 * 42)
    outside = lambda h, r1, r2: ood[h, r1] + ood[fact[h, r1], r2]
    train = rows(data.train)
    assert len(set(train)) == len(train) == 42 + round(ratio * (~data.ood).sum())
    assert {r for r in train if len(r) == 3} == {(h, r, t) for (h, r), t in fact.items()}
    for name, level in (("train_inferred", 0), ("test_id", 0), ("test_ood", 2)):
        for h, r1, r2, t in rows(data.tests[name]):
            assert fact[fact[h, r1], r2] == t
            assert outside(h, r1, r2) == level
            assert (name == "train_inferred") == ((h, r1, r2, t) in train)
    for name, flag in (("id_atomic", False), ("ood_atomic", True)):
        assert sorted(rows(data.tests[name])) == sorted((*k, t) for k, t in fact.items() if ood[k] == flag)
    # without a held-out share and with all of the pool, every path of ID facts is somewhere
    paths = [(h, r1, r2) for h, r1 in fact for b, r2 in fact if b == fact[h, r1]]
    assert len(data.tests["test_ood"].ids) == sum(outside(*p) == 2 for p in paths)
    end, pad = data.vocab.index("</a>"), data.vocab.index("<pad>")
    for ids, labels in zip(*data.train, strict=True):
        scored = np.flatnonzero(labels >= 0)
        assert ids[scored].tolist() == labels[scored].tolist()
        assert ids[scored[-1]] == end
        assert (ids[scored[-1] + 1 :] == pad).all()
        assert len(scored) == 2


@given(seeds)
def law_grokking_comparison_labels_mirror_and_both_orders_stay_together(seed):
    data = comparison_data(
        np.random.default_rng(seed),
        entities=14,
        attributes=2,
        values=4,
        ood_fraction=0.3,
        ratio=3,
        holdout=0.3,
    )
    name = data.vocab
    value = {(e, a): v for e, a, v in data.facts.tolist()}
    ood = {(e, a): o for (e, a, _), o in zip(data.facts.tolist(), data.ood.tolist(), strict=True)}
    assert [sum(o for (_, a), o in ood.items() if name[a] == f"attr{n}") for n in range(2)] == [4, 4]
    train = rows(data.train)
    assert len(train) == len(set(train)) == 28 + 3 * 20
    assert {r for r in train if len(r) == 3} == {(*k, v) for k, v in value.items()}
    for slice_, level in (("train_inferred", 0), ("test_id", 0), ("test_ood", 2)):
        asked = rows(data.tests[slice_])
        by = {r[:-1]: r[-1] for r in asked}
        for a, q, e1, mask, e2 in by:
            label = int(np.sign(value[e1, a] - value[e2, a])) + 1
            assert name[by[a, q, e1, mask, e2]] == f"{name[a]}_{label}"
            assert name[by[a, q, e2, mask, e1]] == f"{name[a]}_{2 - label}"
            assert ood[e1, a] + ood[e2, a] == level
        assert (slice_ == "train_inferred") == bool(set(asked) <= set(train))
        assert slice_ == "train_inferred" or not set(asked) & set(train)


@given(st.integers(0, 9))  # worlds that hold enough such questions
@settings(max_examples=5)
def law_grokking_complex_answers_are_sound_and_need_the_facts(seed):
    data = complex_comparison_data(
        np.random.default_rng(seed),
        entities=80,
        attributes=1,
        values=4,
        ood_fraction=0.2,
        share=0.05,
        per_label=2,
    )
    value = {e: v for e, _, v in data.facts.tolist()}
    hidden = {e for (e, _, _), o in zip(data.facts.tolist(), data.ood, strict=True) if o}
    told = rows(data.train)
    assert {r[0] for r in told if len(r) == 3} == set(value) - hidden
    known = {(r[2], r[4]) for r in told if len(r) == 6}
    assert not any(a in hidden and b in hidden for a, b in known)
    v = np.array([value[e] for e in range(80)])
    # a >= b follows: some known x <= a is at least some known y >= b, by the values alone
    inside = [e for e in value if e not in hidden]
    low = {a: max([v[x] for x in inside if (a, x) in known and v[a] >= v[x]], default=-1) for a in hidden}
    high = {a: min([v[x] for x in inside if (a, x) in known and v[a] <= v[x]], default=10**6) for a in hidden}
    asked = rows(data.tests["test_ood"])
    assert [sum(r[-1] == l for r in asked) for l in sorted({r[-1] for r in asked})] == [2, 2, 2]
    for _, _, a, _, b, label in asked:
        assert {a, b} <= hidden
        assert data.vocab[label] == f"attr0_{int(np.sign(v[a] - v[b])) + 1}"
        assert (low[a] >= high[b]) or (low[b] >= high[a])
    for a in hidden:
        for b in hidden - {a}:
            assert data.graph[0, a, b] == (low[a] >= high[b])


@given(seeds)
def law_grokking_corrupt_prompts_change_the_answer(seed):
    rng = np.random.default_rng(seed)
    data = composition_data(rng, entities=12, relations=8, out_degree=4, ratio=1, holdout=0.1)
    fact = {(h, r): t for h, r, t in data.facts.tolist()}
    answer = lambda h, r1, r2: fact.get((fact.get((h, r1)), r2))
    ids = data.tests["train_inferred"].ids[:5]
    for position in range(3):
        for old, new in zip(ids, corrupt_composition(rng, data, ids, position=position), strict=True):
            assert (np.flatnonzero(old[:3] != new) == [position]).all()
            assert answer(*new.tolist()) != answer(*old[:3].tolist())
    data = comparison_data(rng, entities=40, attributes=2, values=3, ratio=3)
    value = {(e, a): v for e, a, v in data.facts.tolist()}
    ids = data.tests["train_inferred"].ids[:5]
    for position, other in ((2, 4), (4, 2)):
        for old, new in zip(ids, corrupt_comparison(rng, data, ids, position=position), strict=True):
            a, before, after, stays = (int(x) for x in (old[0], old[position], new[position], old[other]))
            assert (np.flatnonzero(old[:5] != new) == [position]).all()
            gap = int(value[before, a] == value[stays, a])
            assert abs(value[after, a] - value[stays, a]) == gap
    assert (corrupt_comparison(rng, data, ids, position=0)[:, 0] != ids[:, 0]).all()


@given(seeds, st.sampled_from((1, 2)))
@settings(max_examples=5)
def law_grokking_gradients_are_central_differences(seed, loops):
    params, ids, labels = network(seed)
    rng, options = np.random.default_rng(seed), {**HEADS, "loops": loops}
    loss = lambda p: gpt2_loss(ids, labels, p, **options)
    check_slope(loss, params, gpt2_loss_backward(ids, labels, params, **options), seed)
    outs = gpt2_forward(ids, params, return_hidden=True, **options)
    dlogits, dhidden = (0.1 * rng.standard_normal(o.shape) for o in outs)

    def weighted(p):
        logits, hidden = gpt2_forward(ids, p, return_hidden=True, **options)
        return (dlogits * logits).sum() + (dhidden * hidden).sum()

    check_slope(weighted, params, gpt2_forward_backward(ids, params, dlogits, dhidden, **options), seed)


@given(seeds)
@settings(max_examples=5)
def law_grokking_loops_are_a_deeper_network_with_equal_halves(seed):
    params, ids, labels = network(seed)
    deep = params._replace(blocks=params.blocks * 2)
    np.testing.assert_array_equal(
        gpt2_forward(ids, params, loops=2, **HEADS), gpt2_forward(ids, deep, **HEADS)
    )
    shared = gpt2_loss_backward(ids, labels, params, loops=2, **HEADS)
    apart = gpt2_loss_backward(ids, labels, deep, **HEADS)
    halves = tree_map(np.add, apart.blocks[:2], apart.blocks[2:])
    for got, want in zip(tree_leaves(shared), tree_leaves(apart._replace(blocks=halves)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=8 * EPS * np.abs(want).max(initial=1))


@given(seeds)
def law_grokking_loss_scores_answers_alone(seed):
    params, ids, labels = network(seed)
    logits = gpt2_forward(ids, params, **HEADS)
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    want = np.mean([-np.log(p[b, t - 1, labels[b, t]]) for b in range(3) for t in (2, 3)])
    np.testing.assert_allclose(gpt2_loss(ids, labels, params, **HEADS), want, rtol=64 * EPS)
    first = labels.copy()
    first[:, 0] = 5  # the first label has nothing before it
    assert gpt2_loss(ids, first, params, **HEADS) == gpt2_loss(ids, labels, params, **HEADS)


@given(seeds, st.sampled_from((0.0, 0.3)))
def law_grokking_adamw_decays_matrices_alone(seed, decay):
    params, _, _ = network(seed, depth=1)
    mask, zero = matrix_mask(params), tree_map(np.zeros_like, params)
    named = mask._asdict() | mask.blocks[0]._asdict()
    assert all(on == (name.startswith("w")) for name, on in named.items() if name != "blocks")
    options = {"weight_decay": decay, "decay_mask": mask}
    moved, _, norm = adamw_step(params, zero, adam_init(params), lr=0.1, **options)
    assert norm == 0
    for new, old in zip(tree_leaves(moved), tree_leaves(params), strict=True):
        want = old * (1 - 0.1 * decay) if old.ndim > 1 else old
        np.testing.assert_allclose(new, want, rtol=2 * EPS)
    still, state, norm = adamw_step(params, params, adam_init(params), lr=0.0, **options)
    for new, old in zip(tree_leaves(still), tree_leaves(params), strict=True):
        np.testing.assert_array_equal(new, old)
    np.testing.assert_allclose(norm**2, sum((p**2).sum() for p in tree_leaves(params)), rtol=1e-14)
    cut = sum((m**2).sum() for m in tree_leaves(state.m))  # 0.1 times the gradient, cut to a norm of 1
    np.testing.assert_allclose(cut, 0.01 * min(1, norm**2), rtol=1e-12)


def law_grokking_first_step_of_a_warm_up_moves_nothing():
    params, ids, labels = network(0)
    same, losses, norms = train_steps(ids, labels, params, steps=1, warmup_steps=3, **HEADS)
    for new, old in zip(tree_leaves(same), tree_leaves(params), strict=True):
        np.testing.assert_array_equal(new, old)
    assert losses[0] == gpt2_loss(ids, labels, params, **HEADS)
    grads = gpt2_loss_backward(ids, labels, params, **HEADS)
    np.testing.assert_allclose(norms[0] ** 2, sum((g**2).sum() for g in tree_leaves(grads)), rtol=1e-13)
    options = {"steps": 3, "lr": 0.01, "warmup_steps": 2, "weight_decay": 0.3}
    got, _, _ = train_steps(ids, labels, params, **options, **HEADS)
    state = adam_init(params)
    for rate in (0.0, 0.005, 0.01):
        grads = gpt2_loss_backward(ids, labels, params, **HEADS)
        params, state, _ = adamw_step(
            params, grads, state, lr=rate, weight_decay=0.3, decay_mask=matrix_mask(params)
        )
    for new, old in zip(tree_leaves(got), tree_leaves(params), strict=True):
        np.testing.assert_array_equal(new, old)


@given(seeds)
def law_grokking_lens_at_the_last_layer_is_the_network(seed):
    params, ids, labels = network(seed)
    logits, hidden = gpt2_forward(ids, params, return_hidden=True, **HEADS)
    lens = lens_logits(hidden, params)
    np.testing.assert_array_equal(lens[-1], logits)
    targets = labels[:, 3]
    ranks = logit_lens(hidden, params, targets)
    for l, b, t in np.ndindex(ranks.shape):
        order = np.argsort(-lens[l, b, t], kind="stable")
        assert order[ranks[l, b, t]] == targets[b]


def law_grokking_rank_breaks_ties_by_the_lower_id():
    z = np.array([1.0, 3.0, 3.0, -np.inf, 2.0])
    assert token_rank(np.tile(z, (5, 1)), np.arange(5)).tolist() == [3, 0, 1, 4, 2]
    assert token_rank(np.zeros((0, 5)), np.zeros(0, int)).shape == (0,)


@given(seeds, st.integers(0, 3))
def law_grokking_tracing_patches_one_state(seed, position):
    params, ids, labels = network(seed)
    logits = gpt2_forward(ids, params, **HEADS)[:, -1]
    same = causal_trace(ids, ids, params, position=position, **HEADS)
    for row in same:  # a state put in its own place: the very same numbers
        np.testing.assert_array_equal(row, logits)
    other = ids.copy()
    other[:, position] = (ids[:, position] + 1) % 9
    traced = causal_trace(ids, other, params, position=position, **HEADS)
    np.testing.assert_array_equal(traced[0], gpt2_forward(other, params, **HEADS)[:, -1])
    if position < 3:  # leaving the last block, an earlier position is not read any more
        np.testing.assert_array_equal(traced[-1], logits)
    later = other.copy()
    later[:, position + 1 :] = 0  # what follows the replaced token is not needed
    np.testing.assert_allclose(
        causal_trace(ids, later, params, position=position, **HEADS), traced, rtol=0, atol=1e-12
    )
    strength = trace_strength(traced, labels[:, 3])
    want = [np.mean([np.argmax(z) != t for z, t in zip(r, labels[:, 3], strict=True)]) for r in traced]
    np.testing.assert_array_equal(strength, want)


def law_grokking_accuracy_is_that_of_greedy_decoding():
    rng = np.random.default_rng(0)
    data = composition_data(rng, entities=8, relations=4, out_degree=3, ratio=1, holdout=0.1)
    params = init_grokking(rng, vocab=len(data.vocab), context=5, dim=16, depth=1)
    ids, labels = data.train
    # so that some answers are right
    params, losses, _ = train_steps(ids, labels, params, steps=25, lr=0.03, warmup_steps=2, **HEADS)
    assert losses[-1] < losses[0]
    for name, (ids, labels) in data.tests.items():
        right = []
        for row, label in zip(ids, labels, strict=True):
            start, text = int(np.flatnonzero(label >= 0)[0]), row.tolist()
            written = text[:start]
            for _ in range(2):
                written.append(int(np.argmax(gpt2_forward(np.array([written]), params, **HEADS)[0, -1])))
            right.append(written == text[: start + 2])
        got = slice_accuracy(params, data, name, **HEADS)
        assert np.isnan(got) if not right else got == np.mean(right)


def law_grokking_gap_is_read_off_the_history():
    acc = {"train_inferred": np.array([0.1, 0.99, 1.0]), "test_id": np.array([0.0, 0.2, 0.98])}
    history = History(np.array([10, 20, 30]), None, acc, None, None)
    assert grokking_gap(history) == (20, None)
    assert grokking_gap(history, threshold=0.9) == (20, 30)


def law_grokking_memorises_before_it_composes():
    """Thirty entities: the facts are learned by heart, and two facts outside the questions do not compose."""
    data = composition_data(
        np.random.default_rng(1),
        entities=30,
        relations=6,
        out_degree=2,
        ood_fraction=0.5,
        ratio=0.4,
        holdout=0.2,
    )
    assert len(data.tests["test_ood"].ids) >= 20
    config = GrokConfig(dim=24, depth=1, num_heads=2, batch=36, lr=0.012, warmup_steps=10)
    history = train(config, data, steps=180, seed=0, eval_every=90)
    assert history.step.tolist() == [90, 180]
    assert history.acc["id_atomic"][-1] >= 0.99
    assert history.acc["train_inferred"][-1] >= 0.99
    assert history.acc["test_ood"][-1] < 0.2
    assert history.loss[1] < history.loss[0]
    again = train(config, data, steps=1, seed=3, eval_every=5)
    assert again.step.tolist() == [1]
