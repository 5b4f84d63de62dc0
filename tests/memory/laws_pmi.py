"""Laws of PMI on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.losses import cross_entropy
from ref.blocks.optim import adam, adam_init, tree_leaves, tree_map
from ref.memory.pmi import (
    competitive_write,
    competitive_write_backward,
    consolidate,
    consolidate_backward,
    init_memory,
    init_pmi,
    init_pmi_cnn,
    init_pmi_transformer,
    ltm_bytes,
    outer_product_attention,
    outer_product_attention_backward,
    pmi_cnn,
    pmi_cnn_backward,
    pmi_layer,
    pmi_layer_backward,
    pmi_params,
    pmi_transformer,
    pmi_transformer_backward,
    read_memory,
    read_memory_backward,
    read_working_memory,
    read_working_memory_backward,
    write_weights,
)
from ref.tasks.sequences import STORY_WORDS, story_task
from tests.slopes import along, drawn_like, moved, slope_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
B, T, DIN, N, D, S = 2, 5, 3, 3, 4, 2


def case(seed, gate="unit"):
    """Generator, tokens, memories and parameters with every leaf moved off its start."""
    rng = np.random.default_rng(seed)
    p = init_pmi(rng, DIN, D, heads=2, slots=N, segments=S, gate=gate)
    p = tree_map(lambda x: x + 0.2 * rng.standard_normal(np.shape(x)), p)
    wm, ltm = init_memory(B, N, D, segments=S, init_std=0.5, key=rng)
    return rng, rng.standard_normal((B, T, DIN)), wm, ltm + 0.3 * rng.standard_normal(ltm.shape), p


def check(fn, tree, grads, rng):
    """Central differences of step 1e-6 along one direction: truncation near 1e-12, rounding near 1e-9."""
    d = drawn_like(tree, rng)
    measured = slope_of(lambda h: fn(moved(tree, d, h)), 1e-6)[0]
    np.testing.assert_allclose(along(grads, d), measured, rtol=1e-5, atol=1e-6)


def written_out(x, wm, p, heads, k, gate):
    """One example, slot by slot."""
    norm = lambda t, s, b: (t - t.mean()) / np.sqrt(t.var() + 1e-5) * s + b
    sig = lambda t: 1 / (1 + np.exp(-t))
    xp = x @ p.w_in + p.b_in
    d, out, G = D // heads, [], D if gate == "unit" else 1
    for n in range(len(wm)):
        q = wm[n] @ p.w_q + p.b_q
        read = np.zeros(D)
        for h in range(heads):
            at = slice(h * d, (h + 1) * d)
            logits = np.array([q[at] @ (t @ p.w_k + p.b_k)[at] for t in xp])
            a = np.exp(logits) / np.exp(logits).sum()
            for t in sorted(range(len(xp)), key=lambda t: -a[t])[:k]:
                read[at] += a[t] * (xp[t] @ p.w_v + p.b_v)[at]
        first = norm(wm[n] + read, p.ln1_scale, p.ln1_bias)
        m = first
        for _ in range(2):
            m = np.maximum(m @ p.w_mlp + p.b_mlp, 0)
        h = norm(first + m, p.ln2_scale, p.ln2_bias)
        g = (
            np.maximum(p.v_gate * xp, 0).mean(0) @ p.w_gate
            + p.b_gate
            + np.tanh(wm[n]) @ p.w_slot[n]
            + p.b_slot[n]
        )
        out.append(sig(g[:G] + p.input_bias) * np.tanh(h) + sig(g[G:] + p.forget_bias) * wm[n])
    return np.array(out)


@given(seeds, st.integers(1, T), st.sampled_from(("unit", "memory")), st.sampled_from((1, 2)))
def law_pmi_write_is_the_definition_and_its_gradient(seed, k, gate, heads):
    rng, x, wm, _, p = case(seed, gate)
    p, options = p.write, {"heads": heads, "topk": k, "gate": gate}
    got = competitive_write(x, wm, p, **options)
    for b in range(B):
        np.testing.assert_allclose(got[b], written_out(x[b], wm[b], p, heads, k, gate), rtol=1e-9, atol=1e-11)
    cot = rng.standard_normal(got.shape)
    run = lambda t: (cot * competitive_write(*t, **options)).sum()
    check(run, (x, wm, p), competitive_write_backward(x, wm, p, cot, **options), rng)


@given(seeds)
def law_pmi_untied_layers_and_scaled_logits(seed):
    """Two equal matrices give the tied network; scaling the logits is scaling the queries' map."""
    rng, x, wm, _, p = case(seed)
    p = p.write
    twice = p._replace(w_mlp=np.stack([p.w_mlp] * 2), b_mlp=np.stack([p.b_mlp] * 2))
    options = {"heads": 2, "topk": 2}
    tied = competitive_write(x, wm, p, **options)
    np.testing.assert_array_equal(competitive_write(x, wm, twice, tie_mlp=False, **options), tied)
    half = p._replace(w_q=p.w_q / np.sqrt(2), b_q=p.b_q / np.sqrt(2))
    scaled = competitive_write(x, wm, p, scale=True, **options)
    np.testing.assert_allclose(scaled, competitive_write(x, wm, half, **options), rtol=1e-9, atol=1e-12)
    cot, other = rng.standard_normal(tied.shape), tree_map(lambda t: t + 0.1, twice)
    options |= {"scale": True, "tie_mlp": False}
    run = lambda t: (cot * competitive_write(*t, **options)).sum()
    check(run, (x, wm, other), competitive_write_backward(x, wm, other, cot, **options), rng)


@given(seeds, st.integers(1, T))
def law_pmi_competition_keeps_the_largest(seed, k):
    rng, x, wm, _, p = case(seed)
    p = p.write
    dense, kept = (write_weights(x, wm, p, heads=2, topk=n) for n in (None, k))
    np.testing.assert_allclose(dense.sum(axis=-1), 1, rtol=0, atol=16 * EPS)
    assert ((kept != 0).sum(axis=-1) == k).all()
    assert (kept.sum(axis=-1) <= 1 + 16 * EPS).all()
    np.testing.assert_array_equal(kept[kept != 0], dense[kept != 0])
    floor = np.where(kept != 0, kept, np.inf).min(axis=-1, keepdims=True)
    assert (np.where(kept == 0, dense, 0) <= floor).all()
    np.testing.assert_array_equal(write_weights(x, wm, p, heads=2, topk=T), dense)
    best = write_weights(x, wm, p, heads=2, topk=1)
    np.testing.assert_array_equal(best.argmax(axis=-1), dense.argmax(axis=-1))
    options = {"heads": 2, "topk": k}
    y = competitive_write(x, wm, p, **options)
    tokens, slots = rng.permutation(T), rng.permutation(N)
    np.testing.assert_allclose(competitive_write(x[:, tokens], wm, p, **options), y, rtol=1e-9, atol=1e-11)
    moved = p._replace(w_slot=p.w_slot[slots], b_slot=p.b_slot[slots])
    np.testing.assert_allclose(
        competitive_write(x, wm[:, slots], moved, **options), y[:, slots], rtol=1e-9, atol=1e-11
    )


@given(seeds)
def law_pmi_gates_keep_or_replace_and_bound_the_slots(seed):
    _, x, wm, _, p = case(seed)
    options, p = {"heads": 2, "topk": 2}, p.write
    shut = p._replace(forget_bias=np.array(40.0), input_bias=np.array(-40.0))
    # the card's bound
    np.testing.assert_allclose(competitive_write(x, wm, shut, **options), wm, rtol=0, atol=1e-6)
    opened = p._replace(forget_bias=np.array(-40.0), input_bias=np.array(40.0))
    assert (np.abs(competitive_write(x, wm, opened, **options)) <= 1 + 1e-6).all()
    state, start = wm, np.abs(wm).max()
    for n in range(1, 6):
        new = competitive_write(x, state, p, **options)
        assert (np.abs(new) <= 1 + np.abs(state) + 4 * EPS).all()
        assert np.abs(new).max() <= start + n
        state = new


@given(seeds)
def law_pmi_slots_stay_bounded_where_the_forget_gates_stay_below_one(seed):
    """With f the largest forget gate seen, |W_n| <= max(|W_0|, 1 / (1 - f)).

    A shut input gate leaves F W, which gives F.
    """
    _, x, wm, _, p = case(seed)
    options, p = {"heads": 2, "topk": 2}, p.write._replace(forget_bias=np.array(-1.0))
    state, f = wm, 0.0
    for _ in range(8):
        kept = competitive_write(x, state, p._replace(input_bias=np.array(-1e4)), **options)
        f = max(f, (kept / state).max())
        state = competitive_write(x, state, p, **options)
        assert np.abs(state).max() <= max(np.abs(wm).max(), 1 / (1 - f)) * (1 + 32 * EPS)


@given(seeds)
def law_pmi_outer_products_are_the_loop_of_limited_rank(seed):
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((B, S, D)), rng.standard_normal((B, N, D)), rng.standard_normal((B, N, D))
    got = outer_product_attention(q, k, v)
    for b in range(B):
        for s in range(S):
            want = sum(np.outer(np.tanh(q[b, s] * k[b, m]), v[b, m]) for m in range(N))
            np.testing.assert_allclose(got[b, s], want, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(
        outer_product_attention(q, k, 3 * v), 3 * got, rtol=0, atol=64 * EPS * np.abs(got).max()
    )
    one = np.linalg.svd(outer_product_attention(q, k[:, :1], v[:, :1]), compute_uv=False)
    assert (one[..., 1:] <= 16 * EPS * one[..., :1]).all()
    all_of_them = np.linalg.svd(got, compute_uv=False)
    assert (all_of_them[..., N:] <= 64 * EPS * all_of_them[..., :1]).all()
    assert not outer_product_attention(0 * q, k, v).any()
    cot = rng.standard_normal(got.shape)
    run = lambda t: (cot * outer_product_attention(*t)).sum()
    check(run, (q, k, v), outer_product_attention_backward(q, k, v, cot), rng)


@given(seeds, st.sampled_from((1.0, 0.5)))
def law_pmi_long_term_rows_are_normed(seed, rho):
    rng, _, wm, ltm, p = case(seed)
    p = p.consolidate
    plain = p._replace(ln_scale=np.ones(D), ln_bias=np.zeros(D))
    out = consolidate(wm, ltm, plain, rho=rho)
    np.testing.assert_allclose(out.mean(axis=-1), 0, rtol=0, atol=1e-12)
    assert (out.var(axis=-1) <= 1).all()
    still = plain._replace(a1=np.array(0.0))
    once = consolidate(wm, ltm, still, rho=rho)
    # (L - mean) / deviation does not know rho; its eps = 1e-5 does: half of eps over the variance of rho L
    slack = 1e-5 / (min(rho, 1) ** 2 * ltm.var(axis=-1, keepdims=True))
    assert (np.abs(once - consolidate(wm, ltm, still)) <= np.abs(once) * slack + 1e-12).all()
    again = consolidate(wm, once, still)
    # the second time the variance v = once.var() is nearly 1: 1 / sqrt(v + eps) is off 1 by (1 - v + eps) / 2
    v = once.var(axis=-1, keepdims=True)
    assert (np.abs(again - once) <= np.abs(once) * (1 - v + 1e-5) / np.sqrt(v) + 1e-12).all()
    cot = rng.standard_normal(ltm.shape)
    run = lambda t: (cot * consolidate(*t, rho=rho)).sum()
    check(run, (wm, ltm, p), consolidate_backward(wm, ltm, p, cot, rho=rho), rng)


@given(seeds, st.booleans(), st.sampled_from(((True, True), (True, False), (False, True))), st.booleans())
def law_pmi_reading_and_its_gradient(seed, correct, use, scale):
    rng, x, wm, ltm, p = case(seed)
    p = p.read._replace(write=p.write)
    options = {"heads": 2, "correct": correct, "use_wm": use[0], "use_ltm": use[1], "scale": scale}
    u = read_memory(x, wm, ltm, p, **options)
    cot = rng.standard_normal(u.shape)
    run = lambda t: (cot * read_memory(*t, **options)).sum()
    check(run, (x, wm, ltm, p), read_memory_backward(x, wm, ltm, p, cot, **options), rng)
    maps = {"heads": 2, "scale": scale}
    check(
        lambda t: (cot * read_working_memory(*t, **maps)).sum(),
        (x, wm, p.write), read_working_memory_backward(x, wm, p.write, cot, **maps), rng,
    )  # fmt: skip
    slots_only = read_memory(
        x, wm, ltm, p._replace(a2=np.array(0.0)), **{**options, "use_wm": True, "use_ltm": True}
    )
    np.testing.assert_array_equal(slots_only, read_working_memory(x, wm, p.write, **maps))
    long_only = p._replace(a2=np.array(1.0))
    plain = {**maps, "correct": False}
    there = read_memory(x, wm, ltm, long_only, **plain)
    np.testing.assert_array_equal(there, read_memory(x, 0 * wm, ltm, long_only, **plain))
    np.testing.assert_array_equal(there, read_memory(x, wm, ltm, p, use_wm=False, **maps))


@given(seeds, st.booleans(), st.booleans())
def law_pmi_layer_gradients_agree_with_differences(seed, share_memory, own_maps):
    rng, x, wm, ltm, p = case(seed)
    if own_maps:
        p = p._replace(read=p.read._replace(write=tree_map(lambda t: t + 0.1, p.write)))
    options = {"heads": 2, "topk": 2, "share_memory": share_memory}
    cots = [rng.standard_normal(t.shape) for t in (x, wm, ltm)]
    out = pmi_layer(x, wm, ltm, p, **options)
    if not share_memory:
        np.testing.assert_array_equal(out[1], wm)
        np.testing.assert_array_equal(out[2], ltm)
    run = lambda t: sum((c * o).sum() for c, o in zip(cots, pmi_layer(*t, **options), strict=True))
    check(run, (x, wm, ltm, p), pmi_layer_backward(x, wm, ltm, p, *cots, **options), rng)


@given(st.integers(0, 5), st.booleans(), st.booleans())
def law_pmi_networks_gradients_agree_with_differences(seed, share_memory, ids):
    """Few seeds: of some hundred ReLUs one lies within the step of the quotient now and then."""
    rng = np.random.default_rng(seed)
    # biases of 0 are kinks
    moved = lambda p: tree_map(lambda t: t + 0.2 * rng.standard_normal(np.shape(t)), p)
    net = moved(
        init_pmi_transformer(0, vocab=7, positions=6, width=D, classes=3, heads=2, slots=N, segments=S)
    )
    tokens = rng.integers(0, 7, (B, T)) if ids else rng.standard_normal((B, T, 7))
    options, cot = (
        {"heads": 2, "topk": 2, "layers": 2, "share_memory": share_memory},
        rng.standard_normal((B, 3)),
    )
    dtokens, grads = pmi_transformer_backward(tokens, net, cot, **options)
    if ids:
        assert dtokens is None
        check(lambda p: (cot * pmi_transformer(tokens, p, **options)).sum(), net, grads, rng)
    else:
        run = lambda t: (cot * pmi_transformer(*t, **options)).sum()
        check(run, (tokens, net), (dtokens, grads), rng)
    cnn = init_pmi_cnn(seed, channels=1, stages=(3, 4, 4), width=D, classes=3, heads=2, slots=N, segments=S)
    cnn = moved(cnn)
    images = rng.standard_normal((B, 10, 9, 1))
    run = lambda t: (cot * pmi_cnn(*t, heads=2, topk=2)).sum()
    check(run, (images, cnn), pmi_cnn_backward(images, cnn, cot, heads=2, topk=2), rng)


def law_pmi_memory_starts_as_the_identity():
    wm, ltm = init_memory(2, 5, 3, segments=4)
    np.testing.assert_array_equal(wm, np.broadcast_to(np.eye(5, 3), (2, 5, 3)))
    np.testing.assert_array_equal(ltm, np.broadcast_to(np.eye(3), (2, 4, 3, 3)))
    assert init_memory(2, 5, 3, init_std=0.1)[0].std() > 0


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.sampled_from(("unit", "memory")))
def law_pmi_counts_are_those_of_the_arrays(inputs, slots, segments, gate):
    p = init_pmi(0, inputs, 4, heads=2, slots=slots, segments=segments, gate=gate)
    assert pmi_params(inputs, 4, slots=slots, segments=segments, gate=gate) == sum(
        np.size(x) for x in tree_leaves(p)
    )
    _, ltm = init_memory(1, slots, 4, segments=segments)
    assert ltm_bytes(4, segments) == ltm.astype(np.float32).nbytes
    assert ltm_bytes(256, 5) == 1_310_720


def law_pmi_a_norm_bounds_what_would_grow():
    """A hundred consolidations of the same slots: with the norm every row keeps length sqrt(D) at most."""
    _, _, wm, ltm, p = case(0)
    p = p.consolidate._replace(ln_scale=np.ones(D), ln_bias=np.zeros(D))
    free = ltm
    relations = outer_product_attention(p.mix @ wm @ p.a_q, wm @ p.a_k, wm @ p.a_v)
    for _ in range(100):
        ltm, free = consolidate(wm, ltm, p), free + p.a1 * relations
    assert np.linalg.norm(ltm, axis=-1).max() <= np.sqrt(D) * (1 + EPS)
    assert np.linalg.norm(free, axis=-1).max() > 5 * np.sqrt(D)


def law_pmi_learns_a_little_of_stories():
    """Stories of two facts: the loss of a two-layer network falls."""
    tokens, answer = story_task(0, 32, kind="one_fact", n_facts=2)
    net = init_pmi_transformer(
        0, vocab=len(STORY_WORDS), positions=10, width=12, classes=33, heads=2, slots=3, segments=2
    )
    state, options, losses = adam_init(net), {"heads": 2, "topk": 3, "layers": 2}, []
    for _ in range(15):
        loss, d = cross_entropy(pmi_transformer(tokens, net, **options), answer)
        losses.append(loss)
        net, state = adam(net, pmi_transformer_backward(tokens, net, d, **options)[1], state, lr=1e-2)
    assert losses[-1] < 0.7 * losses[0]
