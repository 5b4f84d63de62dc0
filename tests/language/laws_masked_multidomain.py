"""Laws of the masked classifier on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ref.blocks.optim import tree_leaves
from ref.language.masked_multidomain import (
    BertConfig,
    ProblemSpec,
    Requests,
    bert_classifier_forward,
    bert_classifier_forward_backward,
    classifier_loss,
    classifier_loss_backward,
    draw_batch,
    encoder_parameters,
    evaluate,
    full_loss,
    full_loss_backward,
    init_classifier,
    masked_logits,
    masked_loss,
    masked_loss_backward,
    masked_softmax,
    mixed_loss,
    mixed_loss_backward,
    predict,
    reject,
    report,
    risk_coverage,
    server_memory,
)
from tests.slopes import check_slope

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
splits = st.sampled_from(((5,), (1, 1, 1), (3, 4, 2), (77, 26, 20, 16, 15)))
gains = st.sampled_from((0.0, 1.0, 30.0, 1e4))  # ties, ordinary, saturated, huge


def draw(seed, sizes, gain=1.0, B=5):
    """z [B, C], problem [B], y [B]."""
    rng = np.random.default_rng(seed)
    problem = rng.integers(0, len(sizes), B)
    y = np.cumsum((0, *sizes))[problem] + rng.integers(0, np.array(sizes)[problem])
    return gain * rng.standard_normal((B, sum(sizes))), problem, y


def ranges(problem, sizes):
    start = np.cumsum((0, *sizes))
    return [slice(start[p], start[p + 1]) for p in problem]


@given(seeds, splits, gains)
def law_masked_multidomain_softmax_is_the_renormalised_one(seed, sizes, gain):
    z, problem, _ = draw(seed, sizes, gain)
    probs, logits = masked_softmax(z, problem, sizes=sizes), masked_logits(z, problem, sizes=sizes)
    local, prob, mass = predict(z, problem, sizes=sizes)
    for b, own in enumerate(ranges(problem, sizes)):
        inside = np.exp(z[b, own] - z[b, own].max())
        full = np.exp(z[b] - z[b].max())
        # exponentials of differences up to 2 max |z| carry that many ulps
        rtol = 1e-14 + 4 * EPS * np.abs(z).max()
        np.testing.assert_allclose(probs[b, own], inside / inside.sum(), rtol=rtol)
        np.testing.assert_array_equal(logits[b, own], z[b, own])
        others = np.delete(np.arange(z.shape[1]), np.arange(z.shape[1])[own])
        assert not probs[b, others].any()
        assert np.isneginf(logits[b, others]).all()
        assert local[b] == np.argmax(z[b, own])
        assert prob[b] == probs[b].max()
        np.testing.assert_allclose(mass[b], full[own].sum() / full.sum(), rtol=rtol, atol=1e-300)
        if full[own].sum() > 1e-200:
            np.testing.assert_allclose(probs[b, own], full[own] / full[own].sum(), rtol=rtol, atol=1e-100)
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=0, atol=max(sizes) * EPS)


def law_masked_multidomain_predictions_stay_inside_even_without_a_finite_logit():
    z = np.array([[0.0, -np.inf, -np.inf], [3.0, -np.inf, 1.0]])
    local, prob, mass = predict(z, np.array([1, 1]), sizes=(1, 2))
    assert local.tolist() == [0, 1]
    assert prob.tolist() == [0, 1]
    np.testing.assert_allclose(mass, [0, 1 / (1 + np.exp(2))], rtol=4 * EPS)


@given(seeds, splits, gains)
def law_masked_multidomain_mask_never_costs_a_right_answer(seed, sizes, gain):
    z, problem, y = draw(seed, sizes, gain, B=20)
    spec = ProblemSpec(tuple(f"p{n}" for n in range(len(sizes))), sizes)
    local, _, _ = predict(z, problem, sizes=sizes)
    right, free = spec.to_global(problem, local) == y, np.argmax(z, axis=1)
    assert (right | (free != y)).all()
    got = report(z, y, problem, spec)
    for p in range(len(sizes)):
        at = problem == p
        if not at.any():
            assert np.isnan([x[p] for x in got]).all()
            continue
        assert got.accuracy[p] == right[at].mean() >= got.unmasked_accuracy[p] == (free == y)[at].mean()
        strayed = [not spec.mask[p][c] for c in free[at]]
        assert got.wrong_domain_rate[p] == np.mean(strayed)
        f1 = []
        for c in range(sizes[p]):
            own, said = y[at] - spec.offsets[p] == c, local[at] == c
            both = (own & said).sum()
            f1.append(2 * both / (own.sum() + said.sum()) if both else 0.0)
        np.testing.assert_allclose(got.macro_f1[p], np.mean(f1), rtol=8 * EPS)


@given(seeds, splits, st.sampled_from((1.0, 30.0)))
@example(seed=0, sizes=(5,), gain=1.0)
def law_masked_multidomain_losses_differ_by_the_routing_mass(seed, sizes, gain):
    z, problem, y = draw(seed, sizes, gain)
    full, inside = full_loss(z, y), masked_loss(z, y, problem, sizes=sizes)
    mass = predict(z, problem, sizes=sizes)[2]
    atol = 32 * EPS * np.abs(z).max()
    np.testing.assert_allclose(full - inside, -np.log(mass).mean(), rtol=0, atol=atol)
    assert full - inside >= -atol
    if len(sizes) == 1:
        assert full == inside
    for alpha in (0.0, 0.3, 1.0):
        got = mixed_loss(z, y, problem, sizes=sizes, alpha=alpha)
        np.testing.assert_allclose(got, alpha * full + (1 - alpha) * inside, rtol=4 * EPS)
    moved = z.copy()
    for b, own in enumerate(ranges(problem, sizes)):
        moved[b, own] += 1.5  # a shift inside, anything outside
    outside = ~np.isfinite(masked_logits(z, problem, sizes=sizes))
    moved[outside] += np.random.default_rng(seed).standard_normal(outside.sum())
    np.testing.assert_allclose(masked_loss(moved, y, problem, sizes=sizes), inside, rtol=0, atol=atol)


@given(seeds, st.sampled_from(((5,), (3, 4, 2))))
def law_masked_multidomain_loss_gradients_are_the_slopes(seed, sizes):
    z, problem, y = draw(seed, sizes, 2.0)
    check_slope(lambda z: full_loss(z, y), z, full_loss_backward(z, y), seed)
    grad = masked_loss_backward(z, y, problem, sizes=sizes)
    check_slope(lambda z: masked_loss(z, y, problem, sizes=sizes), z, grad, seed)
    assert not grad[~np.isfinite(masked_logits(z, problem, sizes=sizes))].any()
    options = {"sizes": sizes, "alpha": 0.25}
    mixed = mixed_loss_backward(z, y, problem, 3.0, **options)
    check_slope(lambda z: 3 * mixed_loss(z, y, problem, **options), z, mixed, seed)
    if len(sizes) == 1:
        np.testing.assert_array_equal(grad, full_loss_backward(z, y))


def network(seed, classes=5):
    rng = np.random.default_rng(seed)
    params = init_classifier(rng, classes=classes, vocab=9, context=5, dim=6, depth=1, hidden=8, std=0.4)
    mask = np.arange(4) < np.array([[4], [1], [3]])
    return params, rng.integers(0, 9, (3, 4)), mask


@given(seeds)
@settings(max_examples=4)
def law_masked_multidomain_network_gradients_are_the_slopes(seed):
    params, ids, mask = network(seed)
    problem, y = np.array([0, 1, 1]), np.array([1, 2, 4])
    options = {"num_heads": 2, "sizes": (2, 3), "alpha": 0.5}
    loss = lambda p: classifier_loss(ids, mask, y, problem, p, **options)
    check_slope(loss, params, classifier_loss_backward(ids, mask, y, problem, params, **options), seed)
    weights = np.random.default_rng(seed).standard_normal((3, 5))
    value = lambda p: (weights * bert_classifier_forward(ids, mask, p, num_heads=2)).sum()
    grads = bert_classifier_forward_backward(ids, mask, params, weights, num_heads=2)
    check_slope(value, params, grads, seed)


@given(seeds)
@settings(max_examples=4)
def law_masked_multidomain_masked_training_is_a_head_for_each_problem(seed):
    """Loss and gradients of sliced heads, problem by problem, add up to those of the masked loss."""
    params, ids, mask = network(seed)
    problem, y, sizes = np.array([0, 1, 1]), np.array([1, 2, 4]), (2, 3)
    options = {"num_heads": 2, "sizes": sizes, "alpha": 0.0}
    got = classifier_loss_backward(ids, mask, y, problem, params, **options)
    loss, total = 0.0, None
    for p, own in enumerate((slice(0, 2), slice(2, 5))):
        at = problem == p
        head = params._replace(w_cls=params.w_cls[:, own], b_cls=params.b_cls[own])
        z = bert_classifier_forward(ids[at], mask[at], head, num_heads=2)
        e = np.exp(z - z.max(axis=1, keepdims=True))
        q = e / e.sum(axis=1, keepdims=True)
        rows, local = np.arange(at.sum()), y[at] - own.start
        loss += -np.log(q[rows, local]).sum() / 3
        q[rows, local] -= 1
        g = bert_classifier_forward_backward(ids[at], mask[at], head, q / 3, num_heads=2)
        np.testing.assert_allclose(got.w_cls[:, own], g.w_cls, rtol=0, atol=1e-12)
        np.testing.assert_allclose(got.b_cls[own], g.b_cls, rtol=0, atol=1e-12)
        leaves = tree_leaves(g.bert)
        total = leaves if total is None else [a + b for a, b in zip(total, leaves, strict=True)]
    np.testing.assert_allclose(classifier_loss(ids, mask, y, problem, params, **options), loss, rtol=1e-12)
    for a, b in zip(tree_leaves(got.bert), total, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@given(seeds, st.permutations(range(3)))
def law_masked_multidomain_order_and_number_of_problems_change_nothing_local(seed, order):
    sizes = (3, 4, 2)
    z, problem, _ = draw(seed, sizes)
    local, prob, mass = predict(z, problem, sizes=sizes)
    start = np.cumsum((0, *sizes))
    shuffled = np.concatenate([z[:, start[p] : start[p + 1]] for p in order], axis=1)
    place = np.argsort(order)
    again = predict(shuffled, place[problem], sizes=tuple(sizes[p] for p in order))
    np.testing.assert_array_equal(again[0], local)
    np.testing.assert_allclose(again[1], prob, rtol=16 * EPS)
    np.testing.assert_allclose(again[2], mass, rtol=16 * EPS)
    more = ProblemSpec(("a", "b", "c"), sizes).add("d", 5)
    wider = np.concatenate([z, 9 * np.ones((len(z), 5))], axis=1)
    np.testing.assert_array_equal(predict(wider, problem, sizes=more.sizes)[0], local)
    np.testing.assert_allclose(predict(wider, problem, sizes=more.sizes)[1], prob, rtol=16 * EPS)


@given(splits)
def law_masked_multidomain_ranges_and_classes_go_both_ways(sizes):
    spec = ProblemSpec(tuple(f"p{n}" for n in range(len(sizes))), sizes)
    every = np.arange(sum(sizes))
    problem, local = spec.to_local(every)
    np.testing.assert_array_equal(spec.to_global(problem, local), every)
    assert problem.tolist() == [p for p, n in enumerate(sizes) for _ in range(n)]
    assert local.tolist() == [c for n in sizes for c in range(n)]
    assert spec.mask.shape == (len(sizes), sum(sizes))
    assert spec.mask.sum(axis=0).tolist() == [1] * sum(sizes)
    assert spec.mask.sum(axis=1).tolist() == list(sizes)
    assert spec.add("new", 3).offsets[:-1].tolist() == spec.offsets.tolist()


@given(seeds)
def law_masked_multidomain_curve_is_counted_at_every_threshold(seed):
    rng = np.random.default_rng(seed)
    mass, correct = rng.integers(0, 5, 12) / 4, rng.random(12) < 0.6
    curve = risk_coverage(mass, correct)
    assert sorted(curve.threshold.tolist(), reverse=True) == curve.threshold.tolist()
    assert set(curve.threshold.tolist()) == set(mass.tolist())
    for t, coverage, risk in zip(*curve, strict=True):
        said = reject(np.arange(12), mass, threshold=t) >= 0
        np.testing.assert_array_equal(said, mass >= t)
        np.testing.assert_allclose(coverage, said.mean(), rtol=4 * EPS)
        np.testing.assert_allclose(risk, (~correct[said]).mean(), rtol=4 * EPS)
    assert curve.coverage[-1] == 1


def law_masked_multidomain_draws_problems_before_examples():
    problem = np.array([0] * 90 + [2] * 10)
    rng = np.random.default_rng(0)
    share = (problem[draw_batch(rng, problem, batch=2000)] == 2).mean()
    assert abs(share - 0.5) < 5 * np.sqrt(0.25 / 2000)  # five standard errors
    share = (problem[draw_batch(rng, problem, batch=2000, balance="none")] == 2).mean()
    assert abs(share - 0.1) < 5 * np.sqrt(0.09 / 2000)


def law_masked_multidomain_evaluation_runs_the_encoder_in_batches():
    params, ids, mask = network(3)
    problem, y = np.array([0, 1, 1]), np.array([1, 2, 4])
    spec = ProblemSpec(("a", "b"), (2, 3))
    got = evaluate(params, Requests(ids, mask, y, problem), spec, num_heads=2, batch=2)
    z = bert_classifier_forward(ids, mask, params, num_heads=2)
    for a, b in zip(got, report(z, y, problem, spec), strict=True):
        np.testing.assert_array_equal(a, b)
    padded = np.where(mask, ids, (ids + 1) % 9)  # what padding holds is not read
    np.testing.assert_allclose(bert_classifier_forward(padded, mask, params, num_heads=2), z, atol=1e-13)
    assert bert_classifier_forward(ids[:0], mask[:0], params, num_heads=2).shape == (0, 5)


def law_masked_multidomain_memory_is_that_of_the_arrays():
    config = BertConfig(vocab=9, positions=5, types=2, dim=6, depth=1, num_heads=2, hidden=8)
    spec = ProblemSpec(("a", "b"), (2, 3))
    arrays = sum(p.size for p in tree_leaves(network(0)[0]))
    assert encoder_parameters(config) + 7 * 5 == arrays
    single, heads, separate = (
        server_memory(config, spec, mode=m, dtype_bytes=8, length=4)
        for m in ("single", "multi_head", "separate")
    )
    assert single == heads
    assert single["weights"] == 8 * arrays == sum(p.nbytes for p in tree_leaves(network(0)[0]))
    assert separate["weights"] == 8 * (2 * encoder_parameters(config) + 7 * 5)
    assert separate["activations"] == single["activations"] == 8 * max(5 * 4 * 6 + 2 * 16, 4 * (12 + 8))
    assert all(m["total"] == m["weights"] + m["activations"] for m in (single, separate))
    base, five = BertConfig(), ProblemSpec(tuple("abcde"), (77, 26, 20, 16, 15))
    assert encoder_parameters(base) == 109_482_240
    one, many = (server_memory(base, five, mode=m)["weights"] for m in ("single", "separate"))
    assert one == 4 * (109_482_240 + 118_426)
    assert round(many / one, 3) == 4.996
