"""Laws of conditioning on ref alone: NumPy and Hypothesis."""

from math import log

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.memory.atlas import omega_scan
from ref.memory.pavlovian import (
    capacity_curve,
    condition,
    condition_vjp,
    conditioning_protocol,
    heads_needed,
    predicted_bit_error,
    predicted_cosine,
    reliability,
    retrieval_fidelity,
)
from tests.slopes import slope_of

EPS = np.finfo(np.float64).eps
seeds = st.integers(0, 2**32 - 1)
rules = st.sampled_from(("hebb", "delta"))
decays = st.sampled_from((None, "head", "channel", "all"))
chunks = st.sampled_from((1, 2, 3, 7, 64))


def case(seed, T=7, decay=None, dk=4, dv=3):
    """(q, k, v) with keys of length 1, and named beta, log_decay and state."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal((2, T, dk)),
        rng.standard_normal((2, T, dk)),
        rng.standard_normal((2, T, dv)),
    )
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    rates = {None: None, "head": -rng.exponential(0.3, (2, T)), "channel": -rng.exponential(0.3, (2, T, dk)),
             "all": np.where(rng.random((2, T)) < 0.3, -np.inf, -0.1)}[decay]  # fmt: skip
    return (q, k, v), {
        "beta": rng.random((2, T)),
        "log_decay": rates,
        "state": rng.standard_normal((2, dk, dv)),
    }


def token_loop(q, k, v, rule, beta, log_decay, state, scale=1.0):
    """One head, pair by pair."""
    S, out = state.copy(), []
    for t in range(len(k)):
        if log_decay is not None:
            S = np.exp(log_decay[t]).reshape(-1, 1) * S
        target = v[t] - S.T @ k[t] if rule == "delta" else v[t]
        S = S + beta[t] * np.outer(k[t], target)
        out.append(S.T @ (scale * q[t]))
    return np.array(out), S


def tol(*arrays):
    """7 steps of sums of at most 7 terms, none of which grows: keys have length 1 and rates are at most 1."""
    return 64 * 7 * EPS * (1 + max(np.abs(a).max(initial=0) for a in arrays)) ** 2


@given(seeds, rules, decays, chunks, st.sampled_from((1.0, 0.5)))
def law_pavlovian_chunks_are_the_token_loop(seed, rule, decay, chunk, scale):
    (q, k, v), named = case(seed, decay=decay)
    out, state = condition(q, k, v, rule=rule, scale=scale, chunk=chunk, return_state=True, **named)
    for b in range(2):
        one = {n: None if x is None else x[b] for n, x in named.items()}
        want = token_loop(q[b], k[b], v[b], rule, **one, scale=scale)
        np.testing.assert_allclose(out[b], want[0], rtol=0, atol=tol(v, named["state"], q))
        np.testing.assert_allclose(state[b], want[1], rtol=0, atol=tol(v, named["state"]))


@given(seeds, chunks, st.integers(0, 7))
def law_pavlovian_hebb_is_masked_attention_without_softmax(seed, chunk, T):
    (q, k, v), named = case(seed, T=T)
    seen = np.arange(T)[:, None] >= np.arange(T)
    beta = named["beta"]
    want = np.einsum("btd,bjd,tj,bj,bjv->btv", q, k, seen, beta, v)
    np.testing.assert_allclose(condition(q, k, v, beta=beta, chunk=chunk), want, rtol=0, atol=tol(q, v))
    order = np.random.default_rng(seed).permutation(T)  # the order of writing does not matter at the end
    last = lambda i: condition(q, k[:, i], v[:, i], beta=beta[:, i], return_state=True)[1]
    np.testing.assert_allclose(last(order), last(np.arange(T)), rtol=0, atol=tol(v))
    for n in range(3):  # linear in each argument
        more = [q, k, v]
        more[n] = 3 * more[n]
        np.testing.assert_allclose(condition(*more), 3 * condition(q, k, v), rtol=0, atol=3 * tol(q, v))


@given(seeds, chunks, st.sampled_from((None, "head")), st.booleans())
def law_pavlovian_normalised_memory_is_a_weighted_mean(seed, chunk, decay, split):
    (q, k, v), named = case(seed, decay=decay)
    q, k = np.exp(q / 2), np.exp(k)
    beta, rate = named["beta"] + 0.1, named["log_decay"]
    out = condition(q, k, v, beta=beta, log_decay=rate, normalize=True, chunk=chunk)
    for b in range(2):
        G = np.zeros(7) if rate is None else np.cumsum(rate[b])
        w = np.tril((q[b] @ k[b].T) * np.exp(G[:, None] - G)) * beta[b]
        np.testing.assert_allclose(out[b], w @ v[b] / w.sum(axis=1)[:, None], rtol=0, atol=tol(v) + 1e-8)
    assert (out <= v.max(axis=1, keepdims=True) + 1e-9).all()
    whole = condition(q, k, v, normalize=True, return_state=True)
    if split:
        _, S, z = condition(q[:, :4], k[:, :4], v[:, :4], normalize=True, return_state=True)
        rest = condition(q[:, 4:], k[:, 4:], v[:, 4:], normalize=True, state=S, key_sum=z, return_state=True)
        np.testing.assert_allclose(rest[0], whole[0][:, 4:], rtol=0, atol=tol(v))
        np.testing.assert_allclose(rest[2], whole[2], rtol=0, atol=tol(k))
    np.testing.assert_allclose(whole[2], k.sum(axis=1), rtol=0, atol=tol(k))


@given(seeds, st.sampled_from(("hebb", "delta", "oja")), decays, st.integers(0, 7))
def law_pavlovian_carried_state_continues(seed, rule, decay, cut):
    (q, k, v), named = case(seed, decay=None if rule == "oja" else decay)
    whole = condition(q, k, v, rule=rule, return_state=True, chunk=3, **named)
    state, parts = named.pop("state"), []
    for s in (slice(0, cut), slice(cut, None)):
        some = {n: None if x is None else x[:, s] for n, x in named.items()}
        o, state = condition(
            q[:, s], k[:, s], v[:, s], rule=rule, state=state, chunk=3, return_state=True, **some
        )
        parts.append(o)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole[0], rtol=0, atol=tol(*whole))
    np.testing.assert_allclose(state, whole[1], rtol=0, atol=tol(*whole))


@given(seeds, rules, st.sampled_from((None, "head", "channel")))
def law_pavlovian_gradients_are_those_of_central_differences(seed, rule, decay):
    (q, k, v), named = case(seed, T=5, decay=decay)
    rng, given_ = (
        np.random.default_rng(seed),
        {"q": q, "k": k, "v": v, **{n: x for n, x in named.items() if x is not None}},
    )
    w = rng.standard_normal(v.shape)
    grads = condition_vjp(q, k, v, w, rule=rule, scale=0.7, **named)
    assert set(grads) == set(given_)
    for name, x in given_.items():
        way = rng.standard_normal(x.shape)
        if name == "log_decay":
            way = way * np.abs(x) / (1 + np.abs(way))  # stay below 0

        def at(h, name=name, x=x, way=way):
            return np.sum(w * condition(**{**given_, name: x + h * way}, rule=rule, scale=0.7))

        h = 1e-5
        slope, change = slope_of(at, h)
        got = np.sum(grads[name] * way)
        # the change under doubling h bounds its truncation, eps |f| / h its rounding
        atol = 2 * change + 64 * EPS * (1 + np.abs(w * condition(**given_, rule=rule)).sum()) / h
        np.testing.assert_allclose(got, slope, rtol=0, atol=atol, err_msg=name)
    bare = condition_vjp(q, k, v, w, rule=rule)
    assert set(bare) == {"q", "k", "v"}


@given(seeds)
def law_pavlovian_delta_recalls_what_it_has_just_learnt(seed):
    (q, k, v), named = case(seed)
    one = np.ones((2, 7))
    out = condition(k, k, v, rule="delta", beta=one, state=named["state"])
    np.testing.assert_allclose(out, v, rtol=0, atol=tol(v, named["state"]))
    kept = condition(q, k, v, rule="delta", beta=0 * one, state=named["state"], return_state=True)[1]
    np.testing.assert_array_equal(kept, named["state"])
    for rule in ("hebb", "delta"):
        with_zero = condition(q, k, v, rule=rule, log_decay=0 * one)
        np.testing.assert_array_equal(with_zero, condition(q, k, v, rule=rule))
    first = [x[:, :1] for x in (q, k, v)]
    np.testing.assert_allclose(condition(*first), condition(*first, rule="delta"), rtol=0, atol=tol(q, v))


@given(seeds, st.floats(0, 2.5))
def law_pavlovian_error_shrinks_by_one_minus_beta(seed, beta):
    """One cue of length 1, written over and over: the error is multiplied by |1 - beta| each time."""
    (_, k, v), _ = case(seed)
    k, v = np.repeat(k[:, :1], 7, axis=1), np.repeat(v[:, :1], 7, axis=1)
    out = condition(k, k, v, rule="delta", beta=np.full((2, 7), beta))
    want = (1 - beta) ** np.arange(1, 8)[None, :, None] * -v
    np.testing.assert_allclose(out - v, want, rtol=0, atol=tol(v) * max(1, (beta - 1) ** 7))
    if beta <= 2:
        write = np.eye(4) - beta * k[0, 0][:, None] * k[0, 0]
        assert np.linalg.norm(write, 2) <= 1 + 8 * EPS


@given(seeds)
def law_pavlovian_orthonormal_cues_do_not_interfere(seed):
    rng = np.random.default_rng(seed)
    k = np.linalg.qr(rng.standard_normal((2, 6, 6)))[0]
    v = rng.standard_normal((2, 6, 3))
    hebb, delta = (condition(k, k, v, rule=r, return_state=True)[1] for r in ("hebb", "delta"))
    np.testing.assert_allclose(hebb, delta, rtol=0, atol=tol(v))
    np.testing.assert_allclose(k @ hebb, v, rtol=0, atol=tol(v))
    np.testing.assert_allclose(retrieval_fidelity(k, np.sign(v)), (1, 0), rtol=0, atol=tol(v))


@given(seeds)
def law_pavlovian_delta_solves_independent_cues_by_repetition(seed):
    """Passes over four independent cues converge to the memory that holds all of them."""
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((4, 8))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    v, S, errors = rng.standard_normal((4, 2)), None, []
    for _ in range(40):
        S = condition(k, k, v, rule="delta", state=S, return_state=True)[1]
        errors.append(np.linalg.norm(k @ S - v))
    pass_ = np.eye(8)
    for row in k:
        pass_ = (np.eye(8) - row[:, None] * row) @ pass_
    # what is left lies in the span of the cues, where one pass shrinks it by less than 1
    shrink = np.linalg.norm(pass_ @ np.linalg.pinv(k) @ k, 2)
    assert shrink < 1
    assert errors[-1] <= shrink**39 * 10 * np.linalg.norm(np.linalg.pinv(k), 2) * np.linalg.norm(v) + tol(v)


@given(seeds)
def law_pavlovian_oja_is_its_loop_and_stays_in_the_hull(seed):
    (q, k, v), named = case(seed)
    out, state = condition(q, k, v, rule="oja", beta=named["beta"], state=named["state"], return_state=True)
    for b in range(2):
        S = named["state"][b].copy()
        for t in range(7):
            for c in range(3):
                S[:, c] += named["beta"][b, t] * v[b, t, c] * (k[b, t] - v[b, t, c] * S[:, c])
            np.testing.assert_allclose(
                out[b, t], S.T @ q[b, t], rtol=0, atol=tol(v, S, q) * (1 + np.abs(S).max())
            )
        np.testing.assert_allclose(state[b], S, rtol=0, atol=tol(v, S) * (1 + np.abs(S).max()))
    signs = np.sign(v)  # columns are convex combinations of signed keys and the empty start
    S = condition(q, k, signs, rule="oja", beta=named["beta"], return_state=True)[1]
    assert np.linalg.norm(S, axis=1).max() <= 1 + 8 * EPS
    k1, v1 = np.repeat(k[:, :1], 300, axis=1), np.full((2, 300, 1), 0.5)
    S = condition(k1, k1, v1, rule="oja", return_state=True)[
        1
    ]  # a small value: the fixed point k / v is large
    np.testing.assert_allclose(S[..., 0], k[:, 0] / 0.5, rtol=0, atol=0.75**300 * 4 + tol(k1))


@given(seeds)
def law_pavlovian_bcm_is_its_loop(seed):
    (q, k, v), named = case(seed)
    beta = 0.1 * named["beta"]
    out = condition(q, k, v, rule="bcm", beta=beta, state=named["state"])
    for b in range(2):
        S, m = named["state"][b].copy(), np.zeros(3)
        for t in range(7):
            y = S.T @ k[b, t]
            m = 0.9 * m + 0.1 * y**2
            S = S + beta[b, t] * np.outer(k[b, t], y * (y - m) * np.sign(v[b, t]))
            np.testing.assert_allclose(
                out[b, t], S.T @ q[b, t], rtol=0, atol=tol(q, S) * (1 + np.abs(S).max()) ** 2
            )
    assert not condition(q, k, v, rule="bcm").any()  # an empty memory stays empty


@given(st.floats(0.05, 1.0), st.integers(1, 8))
def law_pavlovian_textbook_experiments(beta, trials):
    run = lambda name, rule: conditioning_protocol(name, beta=beta, trials=trials, rule=rule)
    n, near = np.arange(1, trials + 1), {"rtol": 0, "atol": 64 * 16 * EPS * trials}
    learnt = 1 - (1 - beta) ** trials
    np.testing.assert_allclose(run("acquisition", "delta")["A"], 1 - (1 - beta) ** n, **near)
    np.testing.assert_allclose(run("acquisition", "hebb")["A"], beta * n, **near)
    np.testing.assert_allclose(run("extinction", "delta")["A"][trials:], learnt * (1 - beta) ** n, **near)
    np.testing.assert_allclose(run("extinction", "hebb")["A"][trials:], beta * trials, **near)
    blocked = run("blocking", "delta")
    lever = (1 - (1 - 2 * beta) ** n) / 2  # A + B has length sqrt(2): the compound learns at twice the rate
    np.testing.assert_allclose(blocked["B"][trials:], (1 - learnt) * lever, **near)
    np.testing.assert_allclose(blocked["control_B"], lever, **near)
    free = run("blocking", "hebb")
    np.testing.assert_allclose(free["B"][trials:], free["control_B"], **near)
    shadow = run("overshadowing", "delta")
    np.testing.assert_allclose(shadow["A"], 0.8 * (1 - (1 - beta) ** n), **near)  # a / (a^2 + b^2) in the end
    np.testing.assert_allclose(shadow["B"], 0.6 * (1 - (1 - beta) ** n), **near)
    for rule in ("hebb", "delta"):  # neither rule explains latent inhibition
        latent = run("latent_inhibition", rule)
        np.testing.assert_allclose(latent["preexposed"], latent["control"], **near)
    np.testing.assert_allclose(run("second_order", "delta")["B"], learnt * (1 - (1 - beta) ** n), **near)
    spread = run("generalization", "delta")
    np.testing.assert_allclose(spread["response"], spread["cosine"] * learnt, **near)


def law_pavlovian_capacity_follows_the_prediction():
    for dk in (32, 64):
        loads = (0.25, 0.5, 1.0)
        curve = capacity_curve(0, dk, loads, trials=40)
        for (cosine, bits), load in zip(curve, loads, strict=True):
            n = round(load * dk)
            assert abs(cosine - predicted_cosine(n, dk)) < 0.01
            # 40 n 64 bits, of which those of a key share their interference's size: 5 errors of 40 n trials
            p = predicted_bit_error(n, dk)
            assert abs(bits - p) < 5 * np.sqrt(p * (1 - p) / (40 * n)) + 0.01
    delta = capacity_curve(0, 32, (0.5,), rule="delta", trials=40)
    assert delta[0, 0] > capacity_curve(0, 32, (0.5,), trials=40)[0, 0]
    assert predicted_bit_error(1, 8) == 0
    assert abs(predicted_cosine(23, 128) - 0.9238) < 5e-5
    assert abs(predicted_bit_error(1 + round(1e6 / 5.41), 10**6) - 0.01) < 1e-4  # 1 % at n - 1 = dk / 5.41


@given(st.floats(0, 1), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))
def law_pavlovian_reliability_is_that_of_counted_failures(p, depth, width, heads):
    odds = [0.0] * (heads + 1)  # of so many heads being wrong, head by head
    odds[0] = 1.0
    for _ in range(heads):
        odds = [(1 - p) * odds[i] + (p * odds[i - 1] if i else 0) for i in range(heads + 1)]
    for vote, wrong in (
        ("any", odds[heads]),
        ("majority", sum(o for i, o in enumerate(odds) if 2 * i > heads)),
    ):
        got = reliability(p, depth=depth, width=width, heads=heads, vote=vote)
        np.testing.assert_allclose(got, (1 - wrong) ** (depth * width), rtol=0, atol=512 * EPS)
        deeper = reliability(p, depth=depth + 1, width=width, heads=heads, vote=vote)
        assert deeper <= got + EPS
        one = reliability(p, depth=depth, width=width, heads=1, vote=vote)
        np.testing.assert_allclose(one, (1 - p) ** (depth * width), rtol=0, atol=512 * EPS)
        more = reliability(p, depth=depth, width=width, heads=heads + 2, vote=vote)
        if vote == "any" or (p < 0.5 and heads % 2):
            assert more >= got - 64 * EPS


def law_pavlovian_a_third_head_can_hurt_a_majority():
    wrong = [1 - reliability(0.2, depth=1, width=1, heads=h, vote="majority") for h in (2, 3)]
    np.testing.assert_allclose(wrong, [0.04, 0.104], rtol=1e-12)


@given(st.floats(1e-4, 0.9), st.integers(1, 40), st.integers(1, 40), st.sampled_from((0.5, 0.9, 0.999)))
def law_pavlovian_heads_needed_is_the_least(p, depth, width, target):
    heads = heads_needed(p, depth=depth, width=width, target=target)
    assert reliability(p, depth=depth, width=width, heads=heads) >= target * (1 - 1e-12)
    if heads > 1:
        assert reliability(p, depth=depth, width=width, heads=heads - 1) < target * (1 + 1e-12)
    assert heads <= log(width * depth / (1 - target)) / log(1 / p) + 2
    assert heads_needed(0.0, depth=1, width=1, target=0.9) == 1


def law_pavlovian_chain_of_recalls_succeeds_like_a_stack():
    """Follow a pointer through 4 layers, each a memory of its own: all right with chance (1 - p)^4."""
    rng, n, dk, depth, trials = np.random.default_rng(0), 10, 16, 4, 300
    right, hops = np.ones((trials, n), bool), []
    cues = rng.standard_normal((depth + 1, trials, n, dk))
    cues /= np.linalg.norm(cues, axis=-1, keepdims=True)
    for l in range(depth):
        S = condition(cues[l], cues[l], cues[l + 1], return_state=True)[1]  # cue i of a layer points to cue i
        nearest = np.argmax(cues[l] @ S @ np.swapaxes(cues[l + 1], -1, -2), axis=-1)
        hit = nearest == np.arange(n)
        hops.append(hit.mean())
        right &= hit
    p = 1 - np.mean(hops)
    want = reliability(p, depth=depth, width=1, heads=1)
    assert 0.02 < p < 0.3
    # pairs of one memory share its keys: at worst the 300 memories alone are independent
    assert abs(right.mean() - want) < 3 * np.sqrt(want * (1 - want) / trials)


@given(seeds)
def law_pavlovian_delta_is_gradient_descent_on_the_newest_pair(seed):
    """The same recurrence as a linear memory that descends the loss of one token, transposed."""
    (q, k, v), named = case(seed)
    eta, one = named["beta"], np.ones((2, 7))
    y, M, _ = omega_scan(
        q, k, v, eta=eta, alpha=one, window=1, memory0=np.swapaxes(named["state"], 1, 2), return_state=True
    )
    out, S = condition(q, k, v, rule="delta", beta=eta, state=named["state"], return_state=True)
    np.testing.assert_allclose(out, y, rtol=0, atol=tol(y, M))
    np.testing.assert_allclose(np.swapaxes(S, 1, 2), M, rtol=0, atol=tol(y, M))
