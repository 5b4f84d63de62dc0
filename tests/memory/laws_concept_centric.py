"""Laws of the concept-centric transformer on ref alone: NumPy and Hypothesis."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.optim import adam, adam_init, tree_leaves, tree_map
from ref.blocks.slots import init_slots
from ref.counting import Tally, count
from ref.memory.concept_centric import (
    CrossParams,
    cct_classify,
    cct_classify_vjp,
    cct_loss,
    cct_loss_vjp,
    cct_params,
    concept_bo_qsa,
    concept_bo_qsa_vjp,
    concept_consistency,
    concept_contributions,
    concept_cross_attention,
    concept_cross_attention_vjp,
    concept_isa,
    concept_isa_vjp,
    concept_slot_attention,
    concept_slot_attention_vjp,
    explanation_loss,
    explanation_loss_vjp,
    init_cct,
    shapes_concepts,
    slot_macs,
    sparsity_loss,
    sparsity_loss_vjp,
)
from ref.models.vit import patchify
from ref.tasks.concepts import CONCEPTS, patch_targets, shape_mask
from tests.slopes import agrees

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)


def slot_inputs(seed, B=2, T=5, C=3, F=6, d=4, learned_start=True):
    """x [B, T, F], noise or first slots [B, C, d], parameters that are not at their start."""
    rng = np.random.default_rng(seed)
    p = init_slots(rng, F, d, learned_start=learned_start)
    p = tree_map(lambda w: w + 0.3 * rng.standard_normal(w.shape), p)
    return rng.standard_normal((B, T, F)), rng.standard_normal((B, C, d)), p


def cross_inputs(seed, B=2, N=4, C=3, d=6, classes=5):
    rng = np.random.default_rng(seed)
    w = lambda *shape: rng.standard_normal(shape) / math.sqrt(shape[0])
    params = CrossParams(w(d, d), w(d, 2 * d), w(d, classes), rng.standard_normal(classes))
    return rng.standard_normal((B, N, d)), rng.standard_normal((B, C, d)), params


def by_definition(x, slots, p, steps, eps, kind):
    """One image, slot by slot and token by token -> (slots, attn [T, C])."""
    norm = lambda z, scale, bias: (z - z.mean()) / np.sqrt(z.var() + 1e-5) * scale + bias
    sig = lambda z: 1 / (1 + np.exp(-z))
    y = [norm(t, p.ln_in_scale, p.ln_in_bias) for t in x]
    d = slots.shape[-1]
    for _ in range(steps):
        queries = [(s if kind == "isa" else norm(s, p.ln_slot_scale, p.ln_slot_bias)) @ p.w_q for s in slots]
        e = np.exp([[(t @ p.w_k) @ q / math.sqrt(d) for q in queries] for t in y])
        attn = e / e.sum(axis=1, keepdims=True)
        new = []
        for c, h in enumerate(slots):
            a = attn[:, c] + (eps if kind == "sa" else 0)
            u = sum(w * (t @ p.w_v) for w, t in zip(a, y, strict=True)) / (
                a.sum() + (0 if kind == "sa" else eps)
            )
            i, j = u @ p.w_ih + p.b_ih, h @ p.w_hh + p.b_hh
            r, z = sig(i[:d] + j[:d]), sig(i[d : 2 * d] + j[d : 2 * d])
            n = np.tanh(i[2 * d :] + r * j[2 * d :])
            new.append((1 - z) * n + z * h)
        slots = np.array(new)
    return slots, attn


@given(seeds, st.sampled_from(("sa", "isa", "qsa")), st.integers(1, 3), st.sampled_from((1e-8, 0.1)))
def law_concept_centric_slots_are_their_definition(seed, kind, steps, eps):
    x, start, p = slot_inputs(seed)
    if kind == "sa":
        slots, attn = concept_slot_attention(x, start, p, iterations=steps, eps=eps)
        start = p.mu + np.exp(p.log_sigma) * start
    else:
        module, n = (concept_isa, steps - 1) if kind == "isa" else (concept_bo_qsa, steps)
        slots, attn = module(x, start, p, iterations=n, eps=eps)
    for b in range(2):
        want, want_attn = by_definition(x[b], start[b], p, steps, eps, kind)
        np.testing.assert_allclose(slots[b], want, rtol=0, atol=1e-12 * (1 + np.abs(want).max()))
        np.testing.assert_allclose(attn[b], want_attn, rtol=0, atol=1e-12)


@given(seeds)
def law_concept_centric_slots_compete_for_tokens(seed):
    """Every token is shared out among slots; order of tokens is nothing, order of slots is theirs."""
    x, noise, p = slot_inputs(seed)
    rng = np.random.default_rng(seed)
    slots, attn = concept_slot_attention(x, noise, p, iterations=2)
    np.testing.assert_allclose(attn.sum(axis=-1), 1, rtol=0, atol=8 * EPS)
    shuffled, _ = concept_slot_attention(x[:, rng.permutation(5)], noise, p, iterations=2)
    np.testing.assert_allclose(shuffled, slots, rtol=0, atol=1e-12)
    order = rng.permutation(3)
    other, other_attn = concept_slot_attention(x, noise[:, order], p, iterations=2)
    np.testing.assert_allclose(other, slots[:, order], rtol=0, atol=1e-12)
    np.testing.assert_allclose(other_attn, attn[..., order], rtol=0, atol=1e-12)
    same, _ = concept_slot_attention(x, 0 * noise, p)  # from the mean all slots are one
    np.testing.assert_allclose(same, np.broadcast_to(same[:, :1], same.shape), rtol=0, atol=1e-12)


@given(seeds)
def law_concept_centric_one_slot_or_one_token_takes_the_mean(seed):
    """With one slot there is nothing to compete for; with one token every slot reads it whole."""
    x, noise, p = slot_inputs(seed, C=1)
    deaf = p._replace(w_q=0 * p.w_q)
    want = concept_slot_attention(x, noise, deaf, iterations=2)[0]
    np.testing.assert_allclose(concept_slot_attention(x, noise, p, iterations=2)[0], want, rtol=0, atol=1e-12)
    x, noise, p = slot_inputs(seed, T=1)
    deaf = p._replace(w_q=0 * p.w_q)
    want = concept_slot_attention(x, noise, deaf)[0]
    np.testing.assert_allclose(concept_slot_attention(x, noise, p)[0], want, rtol=0, atol=1e-12)


@given(seeds, st.integers(1, 3), st.sampled_from((1e-8, 0.1)))
def law_concept_centric_slot_attention_gradient(seed, iterations, eps):
    """Through all steps, both norms, both divisions and the GRU."""
    rng = np.random.default_rng(seed)
    x, noise, p = slot_inputs(seed)
    d, options = rng.standard_normal(noise.shape), {"iterations": iterations, "eps": eps}
    f = lambda x, noise, p: np.sum(d * concept_slot_attention(x, noise, p, **options)[0])
    dx, dnoise, dp = concept_slot_attention_vjp(x, noise, p, d, **options)
    agrees(dx, lambda z: f(z, noise, p), x, rng)
    agrees(dnoise, lambda z: f(x, z, p), noise, rng)
    for name, at in p._asdict().items():
        agrees(getattr(dp, name), lambda z, name=name: f(x, noise, p._replace(**{name: z})), at, rng)


@given(seeds, st.sampled_from(("isa", "qsa")), st.integers(0, 2))
def law_concept_centric_stopped_gradients_are_of_the_last_step(seed, kind, before):
    """The value is that of all steps, the gradient that of the last one from constant slots."""
    rng = np.random.default_rng(seed)
    x, start, p = slot_inputs(seed, learned_start=False)
    d = rng.standard_normal(start.shape)
    module, vjp, one = {
        "isa": (concept_isa, concept_isa_vjp, 0),
        "qsa": (concept_bo_qsa, concept_bo_qsa_vjp, 1),
    }[kind]
    n = before + one
    middle = start if before == 0 else module(x, start, p, iterations=n - 1)[0]
    last = lambda x, slots, p: module(x, slots, p, iterations=one)[0]
    np.testing.assert_allclose(module(x, start, p, iterations=n)[0], last(x, middle, p), rtol=0, atol=1e-14)
    dx, dstart, dp = vjp(x, start, p, d, iterations=n)
    f = lambda x, slots, p: np.sum(d * last(x, slots, p))
    agrees(dx, lambda z: f(z, middle, p), x, rng)
    if kind == "isa":
        assert not dstart.any()
        assert not dp.ln_slot_scale.any()  # never read
    else:
        agrees(dstart, lambda z: f(x, z, p), middle, rng)
    assert dp.mu is None
    for name in (
        "ln_in_scale",
        "ln_in_bias",
        "ln_slot_scale",
        "w_q",
        "w_k",
        "w_v",
        "w_ih",
        "w_hh",
        "b_ih",
        "b_hh",
    ):
        agrees(
            getattr(dp, name),
            lambda z, name=name: f(x, middle, p._replace(**{name: z})),
            getattr(p, name),
            rng,
        )


@given(seeds, st.sampled_from((1, 2, 3)))
def law_concept_centric_explanations_are_faithful(seed, heads):
    """Contributions and bias add up to the logits, and are linear in the attention of their concept."""
    tokens, concepts, p = cross_inputs(seed)
    logits, attn = concept_cross_attention(tokens, concepts, p, heads=heads)
    parts = concept_contributions(tokens, concepts, p, heads=heads)
    atol = 256 * EPS * (1 + np.abs(parts).max())
    np.testing.assert_allclose(parts.sum(axis=2) + p.b_proj, logits, rtol=0, atol=atol)
    np.testing.assert_allclose(attn.sum(axis=-1), 1, rtol=0, atol=8 * EPS)
    size = 6 // heads
    for b, n in np.ndindex(2, 4):  # the definition, with concept 1 struck out of the attention
        out = np.zeros(6)
        for h in range(heads):
            at = slice(h * size, (h + 1) * size)
            q, k, v = (
                tokens[b, n] @ p.w_q[:, at],
                concepts[b] @ p.w_kv[:, at],
                concepts[b] @ p.w_kv[:, 6:][:, at],
            )
            e = np.exp(k @ q / math.sqrt(size))
            a = e / e.sum()
            np.testing.assert_allclose(attn[b, h, n], a, rtol=0, atol=1e-13)
            a[1] = 0
            out[at] = a @ v
        want = logits[b, n] - parts[b, n, 1]
        np.testing.assert_allclose(out @ p.w_proj + p.b_proj, want, rtol=0, atol=1e-12)


@given(seeds, st.sampled_from((1, 3)))
def law_concept_centric_cross_attention_gradient(seed, heads):
    rng = np.random.default_rng(seed)
    tokens, concepts, p = cross_inputs(seed)
    dlogits, dattn = rng.standard_normal((2, 4, 5)), rng.standard_normal((2, heads, 4, 3))

    def f(tokens, concepts, p):
        logits, attn = concept_cross_attention(tokens, concepts, p, heads=heads)
        return np.sum(dlogits * logits) + np.sum(dattn * attn)

    dtokens, dconcepts, dp = concept_cross_attention_vjp(tokens, concepts, p, dlogits, dattn, heads=heads)
    agrees(dtokens, lambda z: f(z, concepts, p), tokens, rng)
    agrees(dconcepts, lambda z: f(tokens, z, p), concepts, rng)
    for name, at in p._asdict().items():
        agrees(getattr(dp, name), lambda z, name=name: f(tokens, concepts, p._replace(**{name: z})), at, rng)


@given(seeds)
def law_concept_centric_explanation_loss(seed):
    """Nothing but the shape of a target counts, unknown rows do not, and the gradient is right."""
    rng = np.random.default_rng(seed)
    attn, target = rng.dirichlet(np.ones(3), (2, 4)), rng.random((2, 4, 3))
    assert explanation_loss(target / target.sum(axis=-1, keepdims=True), target) < 16 * EPS
    loss = explanation_loss(attn, target)
    np.testing.assert_allclose(explanation_loss(attn, 7 * target), loss, rtol=1e-12)
    want = 3 * np.mean((attn - target / target.sum(axis=-1, keepdims=True)) ** 2)
    np.testing.assert_allclose(loss, want, rtol=1e-12)
    holes = target.copy()
    holes[0, 1, 2] = holes[1, 3] = np.nan
    known = np.ones((2, 4), bool)
    known[0, 1] = known[1, 3] = False
    rest = explanation_loss(attn[known][None], target[known][None])
    np.testing.assert_allclose(explanation_loss(attn, holes), rest, rtol=1e-12)
    gradient = explanation_loss_vjp(attn, holes, 1.5)
    assert not gradient[~known].any()
    agrees(gradient, lambda a: 1.5 * explanation_loss(a, holes), attn, rng)
    assert explanation_loss(attn, holes * np.nan) == 0
    assert not explanation_loss_vjp(attn, holes * np.nan).any()


@given(seeds, st.integers(2, 9))
def law_concept_centric_sparsity(seed, C):
    """Between 0, for one concept alone, and log(C) / C, for all alike."""
    rng = np.random.default_rng(seed)
    attn = rng.dirichlet(np.ones(C), (2, 3))
    assert -1e-7 <= sparsity_loss(attn) <= math.log(C) / C + 1e-7  # eps moves log(a) by at most eps / a
    assert abs(sparsity_loss(np.eye(C)[None])) <= 2e-8
    np.testing.assert_allclose(sparsity_loss(np.full((1, 1, C), 1 / C)), math.log(C) / C, rtol=0, atol=2e-8)
    attn = 0.1 + attn  # away from 0, where the logarithm bends too sharply for differences
    agrees(sparsity_loss_vjp(attn, 2.0), lambda a: 2 * sparsity_loss(a), attn, rng)


@given(seeds, st.booleans())
def law_concept_centric_loss_is_the_sum_of_its_parts(seed, spatial):
    rng = np.random.default_rng(seed)
    logits, labels = rng.standard_normal((4, 5)), rng.integers(0, 5, 4)
    attn, target = 0.1 + rng.dirichlet(np.ones(3), (4, 1)), rng.random((4, 1, 3))
    more = {"spatial_attn": 0.1 + rng.dirichlet(np.ones(2), (4, 6)), "spatial_target": rng.random((4, 6, 2))}
    options = {"lambda_e": 2.0, "lambda_s": 0.3, **(more if spatial else {})}
    loss, parts = cct_loss(logits, labels, attn, target, **options)
    nll = [math.log(sum(math.exp(z) for z in row)) - row[y] for row, y in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(parts["classification"], np.mean(nll), rtol=1e-12)
    explained, sparse = explanation_loss(attn, target), sparsity_loss(attn)
    if spatial:
        explained += explanation_loss(more["spatial_attn"], more["spatial_target"])
        sparse += sparsity_loss(more["spatial_attn"])
    np.testing.assert_allclose(loss, np.mean(nll) + 2 * explained + 0.3 * sparse, rtol=1e-12)
    dlogits, dattn, dspatial = cct_loss_vjp(logits, labels, attn, target, **options)
    f = lambda logits, attn, **o: cct_loss(logits, labels, attn, target, **{**options, **o})[0]
    agrees(dlogits, lambda z: f(z, attn), logits, rng)
    agrees(dattn, lambda z: f(logits, z), attn, rng)
    assert (dspatial is None) == (not spatial)
    if spatial:
        agrees(dspatial, lambda z: f(logits, attn, spatial_attn=z), more["spatial_attn"], rng)
    plain, parts = cct_loss(logits, labels, attn, None)
    assert parts["explanation"] == 0
    np.testing.assert_allclose(plain, parts["classification"] + 0.5 * sparsity_loss(attn), rtol=1e-12)


def head(seed, variant, slot_spatial=False, **counts):
    counts = {"concepts": 3, "spatial_concepts": 2, "unsupervised": 2, **counts}
    params = init_cct(seed, 6, classes=4, variant=variant, slot_spatial=slot_spatial, **counts)
    rng = np.random.default_rng(seed)
    params = tree_map(lambda w: w + 0.2 * rng.standard_normal(w.shape), params)
    return rng.standard_normal((2, 1, 6)), rng.standard_normal((2, 5, 6)), params


@given(seeds, st.sampled_from(("sa", "isa", "qsa", "ct")), st.sampled_from(("patches", "cls")))
def law_concept_centric_streams_add_up(seed, variant, inputs):
    cls, patches, params = head(seed, variant)
    run = lambda params: cct_classify(cls, patches, params, heads=3, variant=variant, slot_inputs=inputs)
    out = run(params)
    assert out["concept_attn"].shape == (2, 1, 3)
    assert out["spatial_attn"].shape == (2, 5, 2)
    none = params._replace(concepts=None, spatial=None, unsupervised=None)
    alone = [run(none._replace(**{name: getattr(params, name)})) for name in params._fields]
    np.testing.assert_allclose(sum(a["logits"] for a in alone), out["logits"], rtol=0, atol=1e-13)
    assert alone[0]["spatial_attn"] is None
    assert alone[1]["concept_attn"] is None
    assert alone[2]["concept_attn"] is None
    np.testing.assert_array_equal(alone[0]["concept_attn"], out["concept_attn"])


@given(seeds, st.sampled_from(("sa", "sa+", "isa", "qsa", "ct")), st.sampled_from(("patches", "cls")))
def law_concept_centric_classifier_gradient(seed, variant, inputs):
    """Features and every parameter of all streams, for cotangents of logits and both attentions."""
    rng = np.random.default_rng(seed)
    slot_spatial, variant = variant == "sa+", variant.removesuffix("+")
    cls, patches, params = head(seed, variant, slot_spatial)
    options = {"heads": 3, "variant": variant, "slot_inputs": inputs, "slot_spatial": slot_spatial}
    # the implicit variants by their last step alone, where the stopped gradient is the gradient
    options["iterations"] = {"sa": 2, "isa": 0, "qsa": 1, "ct": None}[variant]
    if variant == "sa":
        options["noise"] = {"concepts": rng.standard_normal((2, 3, 6))}
    weights = rng.standard_normal((2, 4)), rng.standard_normal((2, 1, 3)), rng.standard_normal((2, 5, 2))

    def f(cls, patches, params):
        out = cct_classify(cls, patches, params, **options)
        return sum(np.sum(w * y) for w, y in zip(weights, out.values(), strict=True))

    dcls, dpatches, dparams = cct_classify_vjp(cls, patches, params, *weights, **options)
    agrees(dcls, lambda z: f(z, patches, params), cls, rng)
    agrees(dpatches, lambda z: f(cls, z, params), patches, rng)
    if variant == "isa":  # its starts are not trained
        gone = lambda s: s._replace(start=None)
        assert not any(s.start.any() for s in dparams)
        dparams = type(dparams)(*map(gone, dparams))
    shifts = tree_map(lambda g: rng.standard_normal(g.shape), dparams)
    moved = lambda s: type(params)(*(_shifted(p, d, s) for p, d in zip(params, shifts, strict=True)))
    slope = sum(np.sum(g * d) for g, d in zip(tree_leaves(dparams), tree_leaves(shifts), strict=True))
    agrees(
        np.array(slope), lambda s: f(cls, patches, moved(float(s))), np.array(0.0), direction=np.array(1.0)
    )


def _shifted(tree, shift, s):
    """tree + s shift, where shift may leave parts out."""
    if shift is None:
        return tree
    if isinstance(tree, tuple):
        return type(tree)(*(_shifted(t, d, s) for t, d in zip(tree, shift, strict=True)))
    return tree + s * shift


def law_concept_centric_costs_are_counted():
    for T, C, d, n in ((5, 3, 4, 1), (1, 4, 6, 3)):
        tally, (x, noise, p) = Tally(), slot_inputs(0, B=1, T=T, C=C, F=d, d=d)
        concept_slot_attention(count(tally, x), count(tally, noise), p, iterations=n)
        assert tally.macs == slot_macs(T, C, d, iterations=n)
    for variant in ("sa", "isa", "qsa", "ct"):
        stream = init_cct(0, 6, concepts=5, spatial_concepts=0, classes=3, variant=variant).concepts
        numbers = sum(x.size for x in tree_leaves(stream))
        assert numbers == cct_params(6, concepts=5, classes=3, variant=variant)
    gru = 6 * 100 * 192**2  # of 100 slots: most of the work beside one token, half of it beside 196
    assert 0.85 < gru / slot_macs(1, 100, 192) < 0.9
    assert 0.45 < gru / slot_macs(196, 100, 192) < 0.5


@given(seeds)
def law_concept_centric_consistency(seed):
    rng = np.random.default_rng(seed)
    attn = rng.dirichlet(np.ones(4), 6)
    labels = np.array([0, 0, 1, 1, 1, 2])
    got = concept_consistency(attn, labels, attn[:, ::-1])
    cos = lambda i, j: attn[i] @ attn[j] / np.sqrt((attn[i] @ attn[i]) * (attn[j] @ attn[j]))
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    mean = lambda same: np.mean([cos(i, j) for i, j in pairs if (labels[i] == labels[j]) == same])
    np.testing.assert_allclose([got["within"], got["between"]], [mean(True), mean(False)], rtol=1e-12)
    np.testing.assert_allclose(got["consistency"], mean(True) - mean(False), rtol=0, atol=1e-12)
    assert got["flip_rate"] == 1  # the largest of four, read backwards, is another
    assert concept_consistency(attn, labels, 2 * attn)["flip_rate"] == 0


@given(seeds)
def law_concept_centric_pictures_are_what_they_say(seed):
    data = shapes_concepts(seed, 12)
    assert data["image"].shape == (12, 16, 16, 3)
    assert ((data["image"] >= 0) & (data["image"] <= 1)).all()
    assert (data["concepts"].sum(axis=1) == 4).all()  # two shapes, two colours
    np.testing.assert_array_equal(data["concepts"], data["masks"].any(axis=(1, 2)))
    for concepts, label in zip(data["concepts"], data["label"], strict=True):
        shapes, colours = np.flatnonzero(concepts[:3]), np.flatnonzero(concepts[3:])
        pairs = [[0, 1], [0, 2], [1, 2]]
        assert label == 3 * pairs.index(shapes.tolist()) + pairs.index(colours.tolist())
    for i, colour in enumerate(CONCEPTS[3:]):
        seen = data["masks"][..., 3 + i]
        assert (data["image"][seen].argmax(axis=-1) == i).all(), colour
    target = patch_targets(data["masks"], 4)
    empty = ~data["masks"].reshape(12, 4, 4, 4, 4, 6).any(axis=(2, 4, 5)).reshape(12, 16)
    np.testing.assert_array_equal(np.isnan(target).all(axis=-1), empty)
    assert shape_mask("disc", (8, 8), 2.9).sum() == 25


def law_concept_centric_a_few_steps_learn():
    """Ten steps of Adam on 32 pictures: the loss falls, and the attention moves towards the concepts."""
    data, rng = shapes_concepts(0, 32), np.random.default_rng(0)
    x = patchify(data["image"], 4) @ rng.standard_normal((48, 12)) / 4
    cls, target, spatial = (
        x.mean(axis=1, keepdims=True),
        data["concepts"][:, None],
        patch_targets(data["masks"], 4),
    )
    params = init_cct(0, 12, concepts=6, spatial_concepts=6, classes=9, variant="qsa")
    state, losses = adam_init(params), []
    for _ in range(10):
        out = cct_classify(cls, x, params, heads=3, variant="qsa")
        given_ = (out["logits"], data["label"], out["concept_attn"], target)
        more = {"spatial_attn": out["spatial_attn"], "spatial_target": spatial}
        losses.append(cct_loss(*given_, **more))
        grads = cct_classify_vjp(cls, x, params, *cct_loss_vjp(*given_, **more), heads=3, variant="qsa")[2]
        params, state = adam(params, grads, state, lr=0.02)
    assert losses[-1][0] < losses[0][0]
    assert losses[-1][1]["explanation"] < losses[0][1]["explanation"]
