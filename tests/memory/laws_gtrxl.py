"""Laws of GTrXL on ref alone: NumPy and Hypothesis."""

from dataclasses import replace

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from ref.blocks.attention import attention_dense, join_heads, split_heads
from ref.blocks.losses import cross_entropy
from ref.blocks.optim import adam, adam_init, tree_leaves, tree_map
from ref.memory.gtrxl import (
    GateParams,
    GTrXLMemory,
    gate,
    gate_params,
    gate_vjp,
    gtrxl,
    gtrxl_agent,
    gtrxl_block,
    gtrxl_block_vjp,
    gtrxl_params,
    gtrxl_vjp,
    init_gate,
    init_gtrxl,
    init_memory,
    receptive_field,
    relative_attention,
    relative_attention_vjp,
    relative_shift,
    train_agent,
    vmpo_loss,
    vmpo_loss_vjp,
)
from ref.tasks.environments import MemoryLength, env_reset
from tests.slopes import along, drawn_like, kinked_slope, moved

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(("gru", "output", "highway", "sigtanh", "input", None))
norms = st.sampled_from(("identity", "post"))
sigmoid = lambda x: 1 / (1 + np.exp(-x))


def network(seed, kind="gru", layers=2, M=3, B=2, bias=None):
    """(params away from their start, a memory, a generator): width 6, two heads of 4, inputs of 3."""
    rng = np.random.default_rng(seed)
    params = init_gtrxl(
        rng, inputs=3, width=6, layers=layers, heads=2, head_dim=4, gate=kind, hidden=5, bias=bias
    )
    params = tree_map(lambda w: w + 0.2 * rng.standard_normal(w.shape), params)
    return params, GTrXLMemory(rng.standard_normal((B, layers, M, 6)), rng.random((B, M)) < 0.7), rng


@given(seeds, kinds)
def law_gtrxl_gates_are_their_formulas(seed, kind):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, 3, 4, 5))
    p = tree_map(lambda w: w + 0.1 * rng.standard_normal(w.shape), init_gate(rng, 5, kind=kind))
    got, want = gate(x, y, p, kind=kind), np.zeros_like(x)
    for i in np.ndindex(3, 4):
        a, b = x[i], y[i]
        if kind == "gru":
            r, z = sigmoid(p.w_r.T @ b + p.u_r.T @ a), sigmoid(p.w_z.T @ b + p.u_z.T @ a - p.b)
            h = np.tanh(p.w_g.T @ b + p.u_g.T @ (r * a))
            want[i] = (1 - z) * a + z * h
            low, high = np.minimum(a, h), np.maximum(a, h)
            assert ((got[i] >= low - 8 * EPS) & (got[i] <= high + 8 * EPS)).all()
        elif kind == "output":
            want[i] = a + sigmoid(p.w.T @ a - p.b) * b
        elif kind == "sigtanh":
            want[i] = a + sigmoid(p.w.T @ b - p.b) * np.tanh(p.u.T @ b)
        elif kind == "highway":
            s = sigmoid(p.w.T @ a + p.b)
            want[i] = s * a + (1 - s) * b
        else:
            want[i] = (sigmoid(p.w.T @ a) if kind else 1) * a + b
    np.testing.assert_allclose(got, want, rtol=0, atol=64 * EPS * (1 + np.abs(want).max()))
    w = rng.standard_normal(x.shape)
    grads = gate_vjp(x, y, p, w, kind=kind)
    inputs = (x, y, p)
    way = drawn_like(inputs, rng)
    slope, atol = kinked_slope(lambda h: np.sum(w * gate(*moved(inputs, way, h), kind=kind)))
    np.testing.assert_allclose(along(grads, way), slope, rtol=0, atol=atol)


@given(seeds)
def law_gtrxl_gates_with_a_large_bias_are_shut(seed):
    x, y = np.random.default_rng(seed).standard_normal((2, 3, 6))
    for kind in ("gru", "output", "highway", "sigtanh"):
        np.testing.assert_allclose(
            gate(x, y, init_gate(seed, 6, kind=kind, bias=30), kind=kind), x, atol=1e-6
        )
    zero = tree_map(np.zeros_like, init_gate(0, 6))._replace(b=np.full(6, 2.0))
    candidate = gate(0 * x, y, zero)  # with zero weights the candidate is 0 and z = sigmoid(-2)
    np.testing.assert_array_equal(candidate, 0 * x)
    np.testing.assert_allclose(gate(x, y, zero), (1 - sigmoid(-2.0)) * x, rtol=4 * EPS)
    assert abs(sigmoid(-2.0) - 0.12) < 0.001


@given(seeds, st.integers(1, 4), st.integers(0, 4), st.booleans(), st.booleans())
def law_gtrxl_relative_attention_is_the_loop_over_distances(seed, T, M, biased, other_query):
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal
    p = network(seed)[0].blocks[0].attn
    if biased:
        p = p._replace(b_q=draw(8), b_k=draw(8), b_v=draw(8), b_r=draw(8), b_o=draw(6))
    x, memory, u, v_bias = draw((2, T, 6)), draw((2, M, 6)), draw((2, 4)), draw((2, 4))
    query = draw((2, T, 6)) if other_query else None
    mask = rng.random((2, T, M + T)) < 0.6
    got = relative_attention(x, memory, p, heads=2, u=u, v_bias=v_bias, query=query, mask=mask)
    b = lambda z: 0.0 if z is None else z
    for n in range(2):
        rows, asked = np.concatenate([memory[n], x[n]]), (x if query is None else query)[n]
        for i in range(T):
            q, heads = (asked[i] @ p.w_q + b(p.b_q)).reshape(2, 4), []
            for h in range(2):
                scores, values = [], []
                for j in range(M + i + 1):
                    if not mask[n, i, j]:
                        continue
                    d = M + i - j
                    f = 10000.0 ** (-np.arange(3) * 2 / 6)
                    position = np.concatenate([np.sin(d * f), np.cos(d * f)])
                    k, v, r = (
                        (z @ w + b(c)).reshape(2, 4)[h]
                        for z, w, c in (
                            (rows[j], p.w_k, p.b_k),
                            (rows[j], p.w_v, p.b_v),
                            (position, p.w_r, p.b_r),
                        )
                    )
                    scores.append(((q[h] + u[h]) @ k + (q[h] + v_bias[h]) @ r) / 2)
                    values.append(v)
                weight = np.exp(np.array(scores) - max(scores, default=0))
                heads.append(weight @ np.array(values) / weight.sum() if scores else np.zeros(4))
            want = np.concatenate(heads) @ p.w_o + b(p.b_o)
            np.testing.assert_allclose(got[n, i], want, rtol=0, atol=1e4 * EPS * (1 + np.abs(want).max()))


@given(seeds, st.booleans(), st.booleans(), st.booleans())
def law_gtrxl_relative_attention_gradients(seed, biased, other_query, masked):
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal
    p = network(seed)[0].blocks[0].attn
    if biased:
        p = p._replace(b_q=draw(8), b_k=draw(8), b_v=draw(8), b_r=draw(8), b_o=draw(6))
    x, memory, u, v_bias, w = draw((2, 4, 6)), draw((2, 3, 6)), draw((2, 4)), draw((2, 4)), draw((2, 4, 6))
    query = draw((2, 4, 6)) if other_query else None
    mask = rng.random((1, 4, 7)) < 0.6 if masked else None
    inputs = (x, memory, p, u, v_bias, query)
    grads = relative_attention_vjp(x, memory, p, w, heads=2, u=u, v_bias=v_bias, query=query, mask=mask)
    way = drawn_like(inputs, rng)

    def f(h):
        x, memory, p, u, v_bias, query = moved(inputs, way, h)
        return np.sum(
            w * relative_attention(x, memory, p, heads=2, u=u, v_bias=v_bias, query=query, mask=mask)
        )

    slope, atol = kinked_slope(f)
    np.testing.assert_allclose(along(tuple(grads), way), slope, rtol=0, atol=atol)


@given(seeds, st.integers(1, 5), st.integers(0, 5))
def law_gtrxl_shift_puts_positions_under_their_keys(seed, T, M):
    scores = np.random.default_rng(seed).standard_normal((2, T, M + T))
    shifted = relative_shift(scores)
    for i in range(T):
        for j in range(M + i + 1):  # column c holds position M + T - 1 - c
            np.testing.assert_array_equal(shifted[:, i, j], scores[:, i, T - 1 - i + j])


@given(seeds)
def law_gtrxl_without_positions_it_is_plain_attention(seed):
    rng = np.random.default_rng(seed)
    p = network(seed)[0].blocks[0].attn._replace(w_r=np.zeros((6, 8)))
    x, none = rng.standard_normal((2, 5, 6)), np.zeros((2, 0, 6))
    zero = np.zeros((2, 4))
    q, k, v = (split_heads(x @ w, 2) for w in (p.w_q, p.w_k, p.w_v))
    want = join_heads(attention_dense(q, k, v, causal=True)) @ p.w_o
    got = relative_attention(x, none, p, heads=2, u=zero, v_bias=zero)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e3 * EPS * (1 + np.abs(want).max()))


@given(seeds, kinds, norms, st.booleans())
@example(seed=0, kind="gru", norm="identity", normalize_query=True)
@example(seed=1, kind="output", norm="identity", normalize_query=False)
@example(seed=2, kind="highway", norm="post", normalize_query=True)
@example(seed=3, kind="sigtanh", norm="identity", normalize_query=True)
@example(seed=4, kind="input", norm="post", normalize_query=False)
@example(seed=5, kind=None, norm="identity", normalize_query=True)
def law_gtrxl_gradients_are_those_of_central_differences(seed, kind, norm, normalize_query):
    params, memory, rng = network(seed, kind)
    x, w, done = rng.standard_normal((2, 4, 3)), rng.standard_normal((2, 4, 6)), rng.random((2, 4)) < 0.3
    options = {"heads": 2, "gate": kind, "norm": norm, "normalize_query": normalize_query, "done": done}
    grads = gtrxl_vjp(x, memory, params, w, **options)
    way = drawn_like((x, params), rng)

    def f(h):
        x_h, params_h = moved((x, params), way, h)
        return np.sum(w * gtrxl(x_h, memory, params_h, **options)[0])

    slope, atol = kinked_slope(f, h=1e-6)
    np.testing.assert_allclose(along(grads, way), slope, rtol=0, atol=atol)
    no_embedding = params._replace(w_embed=None, b_embed=None)
    dx, grads = gtrxl_vjp(w, memory, no_embedding, w, **options)
    assert grads.w_embed is None
    block = {"heads": 2, "u": params.u, "v_bias": params.v_bias, "gate": kind, "norm": norm}
    one = gtrxl_block_vjp(w, memory.slots[:, 0], params.blocks[0], w, **block)
    assert one[0].shape == dx.shape


@given(seeds, st.sampled_from(("gru", "output", "sigtanh", "highway")))
def law_gtrxl_shut_gates_make_the_network_its_embedding(seed, kind):
    rng = np.random.default_rng(seed)
    params = init_gtrxl(rng, inputs=3, width=6, layers=3, heads=2, head_dim=4, gate=kind, bias=30)
    x, memory = rng.standard_normal((2, 4, 3)), init_memory(2, layers=3, length=2, width=6)
    embedded = np.maximum(x @ params.w_embed, 0)
    y, _ = gtrxl(x, memory, params, heads=2, gate=kind)
    np.testing.assert_allclose(y, embedded, rtol=0, atol=1e-5)
    # a norm, or a gate without bias, stands in the way
    for other, norm in (
        (kind, "post"),
        ("input", "identity"),
    ):
        params = init_gtrxl(rng, inputs=3, width=6, layers=3, heads=2, head_dim=4, gate=other, bias=30)
        y, _ = gtrxl(x, memory, params, heads=2, gate=other, norm=norm)
        assert np.abs(y - np.maximum(x @ params.w_embed, 0)).max() > 1e-2


@given(seeds, kinds, norms, st.integers(1, 7))
def law_gtrxl_segments_with_memory_equal_one_pass(seed, kind, norm, cut):
    """An empty memory as long as the text: read in two pieces or one, every layer sees the same."""
    params, _, rng = network(seed, kind)
    x, options = rng.standard_normal((2, 8, 3)), {"heads": 2, "gate": kind, "norm": norm}
    whole, last = gtrxl(x, init_memory(2, layers=2, length=8, width=6), params, **options)
    memory, parts = init_memory(2, layers=2, length=8, width=6), []
    for part in (x[:, :cut], x[:, cut:]):
        y, memory = gtrxl(part, memory, params, **options)
        parts.append(y)
    atol = 1e4 * EPS * (1 + np.abs(whole).max()) ** 2
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=atol)
    np.testing.assert_allclose(memory.slots, last.slots, rtol=0, atol=atol)
    np.testing.assert_array_equal(memory.valid, last.valid)
    x2 = x.copy()
    x2[:, cut:] += 1.0
    again, _ = gtrxl(x2, init_memory(2, layers=2, length=8, width=6), params, **options)
    np.testing.assert_allclose(again[:, :cut], whole[:, :cut], rtol=0, atol=atol)


@given(seeds, st.integers(0, 5), st.integers(1, 5))
def law_gtrxl_memory_is_the_tail_of_memory_and_inputs(seed, M, T):
    params, memory, rng = network(seed, M=M)
    x = rng.standard_normal((2, T, 3))
    y, new = gtrxl(x, memory, params, heads=2)
    inputs = [np.maximum(x @ params.w_embed + params.b_embed, 0)]
    shared = {"heads": 2, "u": params.u, "v_bias": params.v_bias}
    mask = np.concatenate([memory.valid, np.ones((2, T), bool)], axis=1)[:, None].repeat(T, axis=1)
    for l in range(2):
        joined = np.concatenate([memory.slots[:, l], inputs[-1]], axis=1)
        np.testing.assert_array_equal(new.slots[:, l], joined[:, T:])
        inputs.append(gtrxl_block(inputs[-1], memory.slots[:, l], params.blocks[l], mask=mask, **shared))
    np.testing.assert_array_equal(y, inputs[-1])
    np.testing.assert_array_equal(
        new.valid, np.concatenate([memory.valid, np.ones((2, T), bool)], axis=1)[:, T:]
    )


@given(seeds, st.integers(0, 4))
def law_gtrxl_a_new_episode_knows_nothing_of_the_old(seed, end):
    params, memory, rng = network(seed)
    x, done = rng.standard_normal((2, 6, 3)), np.zeros((2, 6), bool)
    done[0, end] = True
    y, new = gtrxl(x, memory, params, heads=2, done=done)
    x2, slots2 = x.copy(), memory.slots.copy()
    x2[0, : end + 1] += 1.0
    slots2[0] += 1.0
    y2, new2 = gtrxl(x2, GTrXLMemory(slots2, memory.valid), params, heads=2, done=done)
    np.testing.assert_array_equal(y[0, end + 1 :], y2[0, end + 1 :])  # bit for bit
    np.testing.assert_array_equal(y[1], y2[1])
    alone, _ = gtrxl(x[:, end + 1 :], init_memory(2, layers=2, length=3, width=6), params, heads=2)
    np.testing.assert_allclose(y[0, end + 1 :], alone[0], rtol=0, atol=1e4 * EPS * (1 + np.abs(alone).max()))
    np.testing.assert_array_equal(new.valid[0], np.arange(3, 6) > end)
    assert new.valid[1].all()
    np.testing.assert_array_equal(new2.valid, new.valid)


@given(seeds, kinds)
def law_gtrxl_counts_are_those_of_the_arrays(seed, kind):
    size = lambda tree: sum(w.size for w in tree_leaves(tree))
    assert gate_params(6, kind) == size(init_gate(seed, 6, kind=kind))
    params = init_gtrxl(seed, inputs=None, width=6, layers=3, heads=2, head_dim=5, gate=kind, hidden=7)
    assert gtrxl_params(6, layers=3, heads=2, head_dim=5, hidden=7, gate=kind) == size(params)
    assert 2 * gate_params(6, "gru") == 12 * 36 + 12
    assert receptive_field(12, 512) == 6144


def policy_case(seed, B=3, T=4, A=3):
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal
    return rng, (draw((B, T, A)), draw((B, T, A)), draw((B, T)), rng.integers(0, A, (B, T)), draw((B, T)))


@given(seeds, st.sampled_from((0.3, 0.5, 1.0)))
def law_gtrxl_vmpo_is_its_four_sums(seed, top):
    rng, (logits, old, values, actions, returns) = policy_case(seed)
    eta, alpha = rng.uniform(0.3, 2), rng.uniform(0.1, 5)
    loss, m = vmpo_loss(logits, old, values, actions, returns, eta, alpha, top=top)
    pi, po = (np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True) for z in (logits, old))
    A = (returns - values).ravel()
    k = int(np.ceil(top * 12))
    chosen = np.argsort(A)[::-1][:k]
    weight = np.exp(A[chosen] / eta)
    own = np.log(np.take_along_axis(pi, actions[..., None], axis=-1)).ravel()
    kl = np.sum(po * np.log(po / pi), axis=-1)
    terms = [
        -np.sum(weight / weight.sum() * own[chosen]), 0.5 * np.mean(A**2),
        eta * 0.1 + eta * np.log(weight.mean()), np.mean(alpha * (0.005 - kl)) + np.mean(alpha * kl),
    ]  # fmt: skip
    atol = 1e3 * EPS * (1 + np.abs(terms).max())
    np.testing.assert_allclose((m.policy, m.value, m.temperature, m.trust), terms, rtol=0, atol=atol)
    np.testing.assert_allclose(loss, sum(terms), rtol=0, atol=4 * atol)
    assert (m.psi > 0).sum() == k
    np.testing.assert_allclose(m.psi.sum(), 1, rtol=0, atol=16 * EPS)
    shifted = vmpo_loss(logits, old, values, actions, returns + 3.0, eta, alpha, top=top)[1]
    np.testing.assert_allclose(shifted.psi, m.psi, rtol=0, atol=1e3 * EPS)
    flat = vmpo_loss(logits, old, values, actions, returns, 1e9, alpha, top=top)[1].psi
    np.testing.assert_allclose(flat[flat > 0], 1 / k, rtol=1e-8)


def law_gtrxl_vmpo_takes_the_share_that_was_asked():
    """0.7 of ten steps are seven, though 0.7 * 10 is a little more than 7 in floating point."""
    rng = np.random.default_rng(0)
    for n, top, k in ((10, 0.7, 7), (100, 0.55, 55), (10, 0.61, 7), (3, 0.01, 1)):
        z, r = rng.standard_normal((1, n, 2)), rng.standard_normal((1, n))
        m = vmpo_loss(z, z, 0 * r, np.zeros((1, n), int), r, 1.0, 1.0, top=top)[1]
        assert (m.psi > 0).sum() == k


@given(seeds)
def law_gtrxl_vmpo_gradients(seed):
    """Against central differences of the loss with psi, advantages and the first KL held where they are."""
    rng, (logits, old, values, actions, returns) = policy_case(seed)
    eta, alpha = rng.uniform(0.3, 2), rng.uniform(0.1, 5)
    grads = vmpo_loss_vjp(logits, old, values, actions, returns, eta, alpha)
    psi, kl = vmpo_loss(logits, old, values, actions, returns, eta, alpha)[1][-1:-3:-1]
    A, po = (returns - values).ravel(), np.exp(old) / np.exp(old).sum(axis=-1, keepdims=True)
    chosen = psi.ravel() > 0

    def held(logits, values, eta, alpha):
        log_pi = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        own = np.take_along_axis(log_pi, actions[..., None], axis=-1)[..., 0]
        new_kl = np.sum(po * (np.log(po) - log_pi), axis=-1)
        heat = eta * 0.1 + eta * np.log(np.mean(np.exp(A[chosen] / eta)))
        trust = alpha * (0.005 - kl) + alpha0 * new_kl.mean()
        return -np.sum(psi * own) + 0.5 * np.mean((values - returns) ** 2) + heat + trust

    alpha0 = alpha
    at = (logits, values, np.asarray(eta), np.asarray(alpha))
    way = drawn_like(at, rng)
    slope, atol = kinked_slope(lambda h: held(*moved(at, way, h)))
    np.testing.assert_allclose(along(tuple(map(np.asarray, grads)), way), slope, rtol=0, atol=atol)
    np.testing.assert_allclose(grads.alpha, 0.005 - kl, rtol=0, atol=16 * EPS)
    # the slope in eta is eps_eta - KL(psi || uniform): 0 where the weights are as far from uniform as allowed
    w = psi[psi > 0]
    np.testing.assert_allclose(
        grads.eta, 0.1 - np.sum(w * np.log(w * len(w))), rtol=0, atol=1e3 * EPS * (1 + 1 / eta)
    )


def law_gtrxl_learns_to_recall_a_cue():
    """Supervised: after 60 steps of Adam the first of six inputs is named, where a blind guess loses ln 2."""
    rng, spec = np.random.default_rng(0), MemoryLength(n=5)
    params = init_gtrxl(rng, inputs=3, width=8, layers=2, heads=2, head_dim=4)
    learner = (params, 0.1 * rng.standard_normal((8, 2)))
    state, losses = adam_init(learner), []
    worlds = [env_reset(rng, spec)[0] for _ in range(16)]
    x = np.stack([[spec.observe(replace(s, t=t)) for t in range(6)] for s in worlds])
    labels = np.array([int(s.secret > 0) for s in worlds])
    memory = init_memory(16, layers=2, length=6, width=8)
    for _ in range(60):
        params, head = learner
        y, _ = gtrxl(x, memory, params, heads=2)
        loss, dlogits = cross_entropy(y[:, -1] @ head, labels)
        losses.append(loss)
        dy = np.zeros_like(y)
        dy[:, -1] = dlogits @ head.T
        grads = (gtrxl_vjp(x, memory, params, dy, heads=2)[1], y[:, -1].T @ dlogits)
        learner, state = adam(learner, grads, state, lr=0.02)
    assert losses[0] > 0.5
    assert losses[-1] < 0.1, losses[::10]


def law_gtrxl_agent_learns_from_rewards():
    """A world of two steps, a few updates: V-MPO comes to name the cue, and a run repeats from its seed."""
    agent = gtrxl_agent(width=8, layers=1, heads=2, head_dim=4, length=4)
    options = {"batch": 16, "unroll": 8, "lr": 0.02}
    curve = train_agent(0, MemoryLength(n=1), agent, steps=40, **options)
    assert curve[:5].mean() < 0.5
    assert curve[-5:].mean() > 0.7, curve  # actions are sampled: the best policy so far still tries others
    for loss in ("a2c", "ppo"):
        short = train_agent(0, MemoryLength(n=1), agent, steps=3, loss=loss, **options)
        again = train_agent(0, MemoryLength(n=1), agent, steps=3, loss=loss, **options)
        np.testing.assert_array_equal(short, again)
        assert np.isfinite(short).all()


def law_gtrxl_gate_params_name_what_is_missing():
    kinds = {"gru": 7, "sigtanh": 3, "output": 2, "highway": 2, "input": 1}
    for kind, fields in kinds.items():
        assert sum(f is not None for f in init_gate(0, 4, kind=kind)) == fields
    assert all(f is None for f in GateParams())
