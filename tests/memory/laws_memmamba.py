"""Laws of MemMamba on ref alone: NumPy and Hypothesis."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.blocks.losses import cross_entropy
from ref.blocks.mlp import softplus
from ref.blocks.norms import rms_norm
from ref.blocks.optim import adam, adam_init, tree_leaves, tree_map
from ref.counting import Tally, count
from ref.data import text
from ref.memory.memmamba import (
    CrossParams,
    NoteParams,
    NotePool,
    cross_layer_attention,
    half_life,
    influence,
    init_memmamba,
    init_memmamba_cache,
    layer_memory_fidelity,
    mamba_block,
    memmamba_block,
    memmamba_block_vjp,
    memmamba_lm,
    memmamba_lm_vjp,
    memmamba_macs,
    memmamba_step,
    memory_capacity,
    memory_information,
    note_pool,
    note_scores,
    selective_scan,
    token_memory_fidelity,
)
from tests.slopes import slope_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
policies = st.sampled_from(("fifo", "priority"))
SMALL = {"capacity": 3, "chunk": 2, "every": 2}


def notes(rng, C=4, ds=3, m=2):
    """NoteParams whose scores spread well around 0.5."""
    draw = rng.standard_normal
    w2 = 3 * np.array([1.0, -1.0])[:m]
    return NoteParams(draw((C, m)), draw(m), w2, np.zeros(()), draw((C, ds)), draw((C, ds)), draw((ds, ds)),
                      draw((ds, C)))  # fmt: skip


def opened(params, rng):
    """The model with fusion gates that are not 0, so that notes count."""
    gate = lambda g: None if g is None else np.array(rng.standard_normal())
    blocks = [
        b._replace(gate_token=gate(b.gate_token), gate_layer=gate(b.gate_layer), notes=b.notes._replace(
            w2=4 * rng.standard_normal(b.notes.w2.shape)))
        for b in params.blocks
    ]  # fmt: skip
    return params._replace(blocks=tuple(blocks), embedding=rng.standard_normal(params.embedding.shape))


def model(seed, layers=3, vocab=5, width=4):
    rng = np.random.default_rng(seed)
    params = init_memmamba(rng, vocab=vocab, width=width, layers=layers, state=2, summary=3, every=2)
    return rng, opened(params, rng)


def pool_by_hand(scores, K, threshold, policy):
    """Indices held after all tokens, by the wording: a list of slots, one token at a time."""
    slots = [None] * K
    for t, score in enumerate(scores):
        if not score > threshold:
            continue
        if None in slots:
            slots[slots.index(None)] = t
        elif policy == "fifo":
            slots[slots.index(min(slots))] = t
        else:
            lowest = min(scores[i] for i in slots)
            if score > lowest:
                slots[[scores[i] for i in slots].index(lowest)] = t
    return slots


@given(seeds, st.integers(1, 4), policies, st.sampled_from((-1.0, 0.3, 0.5, 1.0)))
def law_memmamba_pool_follows_the_wording_and_reads_what_came_before(seed, K, policy, threshold):
    rng = np.random.default_rng(seed)
    x, p = rng.standard_normal((7, 4)), notes(rng)
    scores = note_scores(x, p)
    want = 1 / (1 + np.exp(-(np.maximum(x @ p.w1 + p.b1, 0) @ p.w2 + p.b2)))
    np.testing.assert_allclose(scores, want, rtol=64 * EPS)
    context, pool = note_pool(x, p, capacity=K, threshold=threshold, policy=policy)
    for t in range(8):
        slots = pool_by_hand(scores[:t], K, threshold, policy)
        held = [i for i in slots if i is not None]
        if t == 7:
            np.testing.assert_array_equal(pool.age, [-1 if i is None else i for i in slots])
            np.testing.assert_array_equal(pool.priority, [-np.inf if i is None else scores[i] for i in slots])
            assert len(held) == min(K, (scores > threshold).sum())
            full = np.stack([np.zeros(3) if i is None else x[i] @ p.w_summary for i in slots])
            np.testing.assert_allclose(pool.summaries, full, rtol=0, atol=64 * EPS * (1 + np.abs(full).max()))
            break
        s = x[held] @ p.w_summary
        if not held:
            assert not context[t].any()
            continue
        logits = (s @ p.w_k) @ (x[t] @ p.w_q) / np.sqrt(3)
        e = np.exp(logits - logits.max())
        want = e @ (s @ p.w_v) / e.sum()
        # products of 3 and 4 terms in another order; logits of size L move the weights by L eps
        atol = 64 * EPS * (1 + np.abs(logits).max()) * (1 + np.abs(s @ p.w_v).max())
        np.testing.assert_allclose(context[t], want, rtol=0, atol=atol)


@given(seeds)
def law_memmamba_pool_keeps_the_last_or_the_largest(seed):
    """threshold < 0: fifo holds the last K tokens, priority the K largest scores, whatever their order."""
    rng = np.random.default_rng(seed)
    x, p = rng.standard_normal((9, 4)), notes(rng)
    p = p._replace(w1=np.abs(p.w1), b1=np.full(2, 9.0), w2=np.array([0.05, 0.03]))  # no ReLU cuts: no ties
    options = {"capacity": 4, "threshold": -1.0}
    assert set(note_pool(x, p, policy="fifo", **options)[1].age) == {5, 6, 7, 8}
    largest = np.sort(note_scores(x, p))[-4:]
    for order in (np.arange(9), rng.permutation(9)):
        np.testing.assert_array_equal(np.sort(note_pool(x[order], p, **options)[1].priority), largest)
    order = rng.permutation(9)
    batch = np.stack([x, x[order]])
    for flip in (1, -1):  # sequences of a batch do not know of each other
        _, pools = note_pool(batch[::flip], p, **options)
        np.testing.assert_array_equal(pools.age[::flip][1], note_pool(x[order], p, **options)[1].age)


def law_memmamba_pool_with_ties_keeps_only_the_scores():
    """The exercise: K = 2 and scores 0.5, 0.5, 0.9 keep the SECOND 0.5, as the first of equals goes."""
    p = NoteParams(np.ones((1, 1)), np.zeros(1), np.ones(1), np.zeros(()), *[np.ones((1, 1))] * 4)
    x = np.array([[0.0], [0.0], [np.log(9)]])  # sigmoid 0.5, 0.5, 0.9
    pool = note_pool(x, p, capacity=2, threshold=0.4)[1]
    np.testing.assert_array_equal(pool.age, [2, 1])
    np.testing.assert_allclose(pool.priority, [0.9, 0.5], rtol=8 * EPS)
    nan = note_pool(np.array([[np.nan], [1.0]]), p, capacity=2)[1]
    np.testing.assert_array_equal(nan.age, [1, -1])  # a score of NaN is no reason for a note


@given(seeds, policies, st.integers(0, 7))
def law_memmamba_pool_goes_on_from_a_pool(seed, policy, cut):
    rng = np.random.default_rng(seed)
    x, p = rng.standard_normal((2, 7, 4)), notes(rng)
    options = {"capacity": 2, "policy": policy}
    context, end = note_pool(x, p, **options)
    first, pool = note_pool(x[:, :cut], p, **options)
    second, pool = note_pool(x[:, cut:], p, pool0=pool, **options)
    atol = 256 * EPS * (1 + np.abs(context).max())  # BLAS adds a row alone in another order
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), context, rtol=0, atol=atol)
    np.testing.assert_allclose(pool.summaries, end.summaries, rtol=0, atol=atol)
    np.testing.assert_array_equal(np.argsort(pool.age, axis=-1), np.argsort(end.age, axis=-1))


@given(seeds, st.integers(1, 9))
def law_memmamba_pool_is_frozen_inside_a_chunk(seed, chunk):
    """Every chunk reads the pool that an exact run has at its border; the end is the same for every chunk."""
    rng = np.random.default_rng(seed)
    x, p = rng.standard_normal((8, 4)), notes(rng)
    context, end = note_pool(x, p, capacity=2, chunk=chunk)
    np.testing.assert_array_equal(end.age, note_pool(x, p, capacity=2)[1].age)
    for start in range(0, 8, chunk):
        border = note_pool(x[:start], p, capacity=2)[1]
        want = note_pool(x[start : start + chunk], p, capacity=2, chunk=8, pool0=border)[0]
        atol = 256 * EPS * (1 + np.abs(want).max())
        np.testing.assert_allclose(context[start : start + chunk], want, rtol=0, atol=atol)


@given(seeds)
def law_memmamba_layers_are_read_as_one_pool(seed):
    rng = np.random.default_rng(seed)
    x, draw = rng.standard_normal((2, 5, 4)), rng.standard_normal
    p = CrossParams(draw((2, 3, 3)), draw((4, 3)), draw((3, 3)), draw((3, 4)))
    pools = [NotePool(draw((2, 3, 3)), draw((2, 3)), np.array([[4, -1, 0], [-1, -1, -1]])) for _ in range(2)]
    pools[1] = pools[1]._replace(age=np.array([[-1, 2, -1], [-1, -1, -1]]))
    got = cross_layer_attention(x, pools, p)
    keys = np.stack(
        [*(pools[0].summaries[0, [0, 2]] @ p.w_source[0]), pools[1].summaries[0, 1] @ p.w_source[1]]
    )
    logits = (x[0] @ p.w_q) @ (keys @ p.w_k).T / np.sqrt(3)
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    want = e @ (keys @ p.w_v) / e.sum(axis=-1, keepdims=True)
    atol = 128 * EPS * (1 + np.abs(logits).max()) * (1 + np.abs(want).max())
    np.testing.assert_allclose(got[0], want, rtol=0, atol=atol)
    assert not got[1].any()  # nothing was noted in that sequence


@given(seeds, st.sampled_from((1, 2, 8)), policies)
def law_memmamba_is_causal(seed, chunk, policy):
    """A later token changes nothing before it, to the bit: not a logit, a pool or a gate."""
    rng, params = model(seed)
    tokens = rng.integers(0, 5, (2, 7))
    later = tokens.copy()
    later[:, 4] = (later[:, 4] + 1) % 5
    options = {"every": 2, "capacity": 2, "chunk": chunk, "policy": policy, "state_threshold": 0.5}
    a, b = (memmamba_lm(t, params, **options) for t in (tokens, later))
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert (a[:, 4] != b[:, 4]).any()


@given(seeds)
def law_memmamba_without_notes_is_mamba(seed):
    """threshold = 1, which no sigmoid exceeds, or closed fusion gates: the plain model, exactly."""
    rng, params = model(seed, layers=1)
    x, block = rng.standard_normal((2, 6, 4)), params.blocks[0]
    y, history = memmamba_block(x, block, [], layer=0, threshold=1.0, **SMALL)
    assert (history.age == -1).all()
    closed = block._replace(gate_token=np.zeros(()))
    np.testing.assert_array_equal(memmamba_block(x, closed, [], layer=0, threshold=-1.0, **SMALL)[0], y)
    never = memmamba_block(x, block, [], layer=0, threshold=-1.0, state_threshold=1.0, **SMALL)[0]
    np.testing.assert_array_equal(never, y)
    plain = x + mamba_block(rms_norm(x, block.norm), block.mamba)
    np.testing.assert_allclose(y, plain, rtol=0, atol=512 * EPS * (1 + np.abs(plain).max()))


def law_memmamba_gate_looks_at_the_previous_output():
    """By hand: the context enters if sigmoid(w_z . z_{t-1} + b_z) > tau, z without the residual."""
    rng, params = model(3, layers=1)
    x, block = rng.standard_normal((6, 4)), params.blocks[0]
    options = {"capacity": 3, "chunk": 1, "threshold": -1.0}
    block = block._replace(gate_token=np.array(2.0), w_z=20 * block.w_z, b_z=np.array(-0.1))
    y, _ = memmamba_block(x, block, [], layer=0, state_threshold=0.5, **options)
    u = rms_norm(x, block.norm)
    context = note_pool(u, block.notes, **options)[0] @ block.w_token * 2
    z, mixed, gates = np.zeros((7, 4)), np.zeros((6, 4)), []
    for t in range(6):
        gates.append(1 / (1 + np.exp(-(z[t] @ block.w_z + block.b_z))) > 0.5)
        mixed[t] = u[t] + gates[-1] * context[t]
        z[t + 1] = mamba_block(mixed[: t + 1], block.mamba)[-1]
    assert not gates[0]  # z_{-1} = 0 and b_z < 0
    assert len(set(gates)) == 2
    np.testing.assert_allclose(y, x + z[1:], rtol=0, atol=1024 * EPS * (1 + np.abs(y).max()))


@given(seeds, policies)
def law_memmamba_steps_are_the_sequence(seed, policy):
    """With chunk = 1, in memory that does not grow."""
    rng, params = model(seed)
    tokens, options = rng.integers(0, 5, (2, 7)), {"every": 2, "policy": policy, "state_threshold": 0.5}
    want = memmamba_lm(tokens, params, capacity=2, chunk=1, **options)
    cache, rows = init_memmamba_cache(params, capacity=2, lead=(2,)), []
    size = sum(a.size for a in tree_leaves(cache[:3]))
    for t in range(7):
        row, cache = memmamba_step(tokens[:, t], cache, params, **options)
        rows.append(row)
    # a row alone is multiplied in another order: 8 terms, three layers
    np.testing.assert_allclose(
        np.stack(rows, axis=1), want, rtol=0, atol=4096 * EPS * (1 + np.abs(want).max())
    )
    assert sum(a.size for a in tree_leaves(cache[:3])) == size
    _, pool = memmamba_block(params.embedding[tokens], params.blocks[0], [], layer=0, capacity=2, chunk=1,
                             policy=policy, state_threshold=0.5)  # fmt: skip
    np.testing.assert_array_equal(cache.pools[0].age, pool.age[:, -1])


def law_memmamba_empty_batches_and_sequences_pass():
    _, params = model(0)
    assert memmamba_lm(np.zeros((2, 0), int), params, every=2).shape == (2, 0, 5)
    assert memmamba_lm(np.zeros((0, 3), int), params, every=2).shape == (0, 3, 5)
    assert memmamba_lm(np.zeros(1, int), params, every=2).shape == (1, 5)


@given(seeds, policies, st.sampled_from((1, 2)))
def law_memmamba_gradients_are_central_differences(seed, policy, chunk):
    """All parameters but the scorers'. With w1 = 0 every token scores alike, above the threshold, and a small
    move changes no decision: fifo then holds the last notes, priority the first.
    """
    rng, params = model(seed)
    flat = lambda n: n._replace(w1=0 * n.w1, b1=np.ones(1), w2=np.ones(1))
    blocks = tuple(b._replace(notes=flat(b.notes)) for b in params.blocks)
    params, tokens = params._replace(blocks=blocks), rng.integers(0, 5, (2, 5))
    options = {"every": 2, "capacity": 2, "chunk": chunk, "policy": policy}
    d = tree_map(lambda p: rng.standard_normal(p.shape), params)
    still = {n: np.zeros(getattr(flat(blocks[0].notes), n).shape) for n in ("w1", "b1", "w2", "b2")}
    d = d._replace(blocks=tuple(b._replace(notes=b.notes._replace(**still)) for b in d.blocks))
    logits = memmamba_lm(tokens, params, **options)
    dlogits = rng.standard_normal(logits.shape)
    moved = lambda h: tree_map(lambda p, d: p + h * d, params, d)
    slope, error = slope_of(lambda h: np.sum(dlogits * memmamba_lm(tokens, moved(h), **options)), 1e-5)
    grads = memmamba_lm_vjp(tokens, params, dlogits, **options)
    got = sum(tree_leaves(tree_map(lambda g, d: np.sum(g * d), grads, d)))
    # cancellation eps / h of the loss, beside the measured truncation
    bound = error + 1024 * EPS / 1e-5 * (np.abs(dlogits) * (1 + np.abs(logits))).sum()
    np.testing.assert_allclose(got, slope, rtol=0, atol=bound)


def law_memmamba_scorer_learns_straight_through():
    """The gradient of a score is <ds_t, s_t>: that of the loss with s_t scaled by (1 + e) after selection."""
    rng, params = model(1, layers=1)
    x, block = rng.standard_normal((5, 4)), params.blocks[0]._replace(w_z=np.zeros(4))
    options = {"layer": 0, "capacity": 2, "chunk": 1, "threshold": -1.0, "policy": "fifo"}
    dy = rng.standard_normal(x.shape)
    y, history = memmamba_block(x, block, [], **options)
    _, grads, _ = memmamba_block_vjp(x, block, [], dy, np.zeros_like(history.summaries), **options)
    # all scores up by e: with b2 alone, d score = score (1 - score); scale each token's summary by hand
    u = rms_norm(x, block.norm)
    scores, s, total = note_scores(u, block.notes), u @ block.notes.w_summary, 0.0
    for i in range(5):

        def loss(e, i=i):
            mixed = u.copy()
            for t in range(5):
                held = list(range(max(t - 2, 0), t))
                if held:
                    keys = s[held] * np.where(np.array(held) == i, 1 + e, 1.0)[:, None]
                    logits = (keys @ block.notes.w_k) @ (u[t] @ block.notes.w_q) / np.sqrt(3)
                    p = np.exp(logits - logits.max())
                    read = p @ (keys @ block.notes.w_v) / p.sum()
                    mixed[t] = mixed[t] + block.gate_token * (read @ block.w_token)
            return np.sum(dy * (x + mamba_block(mixed, block.mamba)))

        np.testing.assert_allclose(loss(0), np.sum(dy * y), rtol=0, atol=4096 * EPS * np.abs(dy).sum())
        total += slope_of(loss, 1e-5)[0] * scores[i] * (1 - scores[i])
    # truncation and cancellation of 1e-5
    np.testing.assert_allclose(grads.notes.b2, total, rtol=1e-6, atol=1e-8)


def law_memmamba_tiny_model_learns():
    """Thirty steps on lines of a play: the loss falls; nothing more is asked."""
    rng = np.random.default_rng(0)
    letters = np.array([ord(c) % 32 for c in text()[:4000]])
    params, options = (
        init_memmamba(0, vocab=32, width=8, layers=2, state=2, summary=4),
        {"capacity": 4, "chunk": 8},
    )
    state, losses = adam_init(params), []
    for _ in range(12):
        at = rng.integers(0, 3900, 4)
        rows = letters[at[:, None] + np.arange(17)]
        loss, dlogits = cross_entropy(memmamba_lm(rows[:, :-1], params, **options), rows[:, 1:])
        grads = memmamba_lm_vjp(rows[:, :-1], params, dlogits, **options)
        params, state = adam(params, grads, state, lr=0.02)
        losses.append(loss)
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


@given(seeds)
def law_memmamba_influence_of_a_token_is_exact_and_decays(seed):
    """dh_t / du_s = exp(A sum Delta) Delta_s B_s: by differences of the scan, bounded, falling in t."""
    rng = np.random.default_rng(seed)
    u, delta = rng.standard_normal((8, 3)), rng.standard_normal((8, 3))
    a, b, c = -np.exp(rng.standard_normal((3, 4))), rng.standard_normal((8, 4)), rng.standard_normal((8, 4))
    step, s = softplus(delta), 2
    last = np.inf
    for t in range(s, 8):
        part = slice(0, t + 1)
        end = lambda u, part=part: selective_scan(
            u[part], delta[part], a, b[part], c[part], return_state=True
        )[1]
        up = u.copy()
        up[s] += 1
        h, moved = end(u), end(up)
        want = influence(step, a, t - s)[t] * step[s][:, None] * b[s]
        size = np.abs(h).max() + np.abs(moved).max()  # the scan is linear in u: only rounding differs
        np.testing.assert_allclose(moved - h, want, rtol=0, atol=32 * EPS * (1 + size))
        total = step[s + 1 : t + 1].sum(axis=0)[:, None]
        bound = np.exp(-np.abs(a).min() * total) * np.abs(step[s][:, None] * b[s])
        assert (np.abs(want) <= bound * (1 + 8 * EPS)).all()
        assert t == s or (np.abs(want) < last).all()
        last = np.abs(want)
    assert not influence(step, a, 3)[:3].any()
    lives = np.exp(a * half_life(np.full((5, 3), 0.3), a) * 0.3)
    np.testing.assert_allclose(lives, 0.5, rtol=16 * EPS)


def law_memmamba_influence_need_not_fall_with_the_lag():
    """The exercise: a big step long ago outweighs a small one just now, at a fixed t."""
    step, b = np.array([[3.0], [0.01], [0.01]]), np.ones((3, 1))
    at = lambda lag: influence(step, -np.ones((1, 1)), lag)[2, 0, 0] * step[2 - lag, 0] * b[2 - lag, 0]
    assert at(2) > 100 * at(0)


@given(st.integers(1, 4), st.sampled_from((0.05, 0.3)), st.sampled_from((0.0, 0.01, 1.0)))
def law_memmamba_information_is_conserved(N, delta, noise):
    """Summed over all lags a state of N numbers holds N tokens, less the noise's share; decay says where."""
    a, b = -np.arange(1.0, N + 1), np.ones(N)
    rho2, nats = memory_information(delta, a, b, lags=np.arange(2000), noise=noise)
    assert ((rho2 >= 0) & (rho2 <= 1)).all()
    capacity = memory_capacity(delta, a, b, noise=noise)
    # the tail after 2000 lags is below e^-200; Sigma's condition number of up to 1e7 costs as many digits
    np.testing.assert_allclose(rho2.sum(), capacity, rtol=0, atol=1e-6)
    if noise == 0:
        np.testing.assert_allclose(capacity, N, rtol=0, atol=1e-6)
    else:
        assert capacity < N
        assert capacity > memory_capacity(delta, a, b, noise=2 * noise)
    known = rho2 < 1
    np.testing.assert_allclose(nats[known], -0.5 * np.log(1 - rho2[known]), rtol=1e-9, atol=1e-15)
    one = memory_information(delta, a[:1], b[:1], lags=np.arange(50))[0]
    abar = np.exp(-delta)
    np.testing.assert_allclose(one, abar ** (2 * np.arange(50)) * (1 - abar**2), rtol=1e-12)


def law_memmamba_information_is_what_a_regression_finds():
    """20,000 steps of the recurrence: the share of x_{t-k} that least squares recovers from h_t."""
    rng, delta, a, b = np.random.default_rng(0), 0.2, np.array([-1.0, -3.0]), np.array([1.0, 2.0])
    n = 20_000
    x, h = rng.standard_normal(n), np.zeros((n, 2))
    abar = np.exp(delta * a)
    for t in range(n):
        h[t] = abar * h[t - 1] + delta * b * x[t]
    for lag in (0, 2, 6):
        past, now = x[100 : n - lag], h[100 + lag :]
        fit = now @ np.linalg.lstsq(now, past, rcond=None)[0]
        share = np.sum(fit**2) / np.sum(past**2)
        # a squared correlation of n samples scatters by at most 2 / sqrt(n): five of these
        assert abs(share - memory_information(delta, a, b, lags=[lag])[0][0]) < 10 / np.sqrt(n)


def law_memmamba_fidelities_are_one_where_nothing_is_lost():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 20, 3))
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    # ridge 1e-3 beside 80 rows of unit variance shrinks by about 1e-5
    assert token_memory_fidelity(x @ turn, x, lags=[0])[0] > 1 - 1e-8
    assert abs(token_memory_fidelity(x @ turn, x, lags=[5])[0]) < 0.2  # white noise knows nothing of its past
    np.testing.assert_allclose(layer_memory_fidelity(np.stack([x[0], x[0] @ turn])), 1, atol=1e-8)
    lost = layer_memory_fidelity(np.stack([x[0], np.zeros((20, 3))]))
    assert 0 <= lost < 0.3
    d = [np.stack([x[i], x[i + 1], x[i]]) for i in (0, 1)]
    assert all(0 <= layer_memory_fidelity(s, gap=g) <= 1 for s in d for g in (1, 2))
    # a decaying state forgets: at a fixed seed, lag 16 is below lag 1
    u = rng.standard_normal((8, 40, 4))
    states = np.zeros((8, 40, 4))
    for t in range(40):
        states[:, t] = 0.8 * states[:, t - 1] * (t > 0) + u[:, t]
    near, far = token_memory_fidelity(states, u, lags=[1, 16])
    assert -1 <= far < near <= 1


def law_memmamba_cost_of_a_token_is_constant_and_counted():
    """Products counted through ref: linear in T, the closed form but for what is not a product."""
    _, params = model(0, layers=1)
    C, N, K, ds = 4, 2, 3, 3
    by_hand = 2 * C * (4 + N + 1)  # convolution, update of the state and skip
    counted = []
    for T in (4, 8):
        tally = Tally()
        x = count(tally, np.random.default_rng(0).standard_normal((T, C)))
        memmamba_block(x, params.blocks[0], [], layer=0, capacity=K, chunk=1)
        counted.append(tally.macs)
        assert tally.macs == T * (memmamba_macs(C, state=N, capacity=K, summary=ds) - by_hand)
    assert counted[1] == 2 * counted[0]
