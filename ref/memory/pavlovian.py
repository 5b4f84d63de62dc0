"""Attention as conditioning: a key is a cue, a value its response, and a memory learns the pair as it reads.

Source: the paper "Understanding Transformers through the Lens of Pavlovian Conditioning", 2025 (arXiv
2508.08289), no released code; Rescorla and Wagner 1972 and Schlag et al. 2021 (the delta rule), Yang et al.
2024 (its chunked form, and extinction before the prediction), Oja 1982, Bienenstock, Cooper and Munro 1982.
The forms of "oja" and "bcm" are our choice. A token's own pair is written before it is read.
"""

from math import comb, erfc, log, sqrt

import numpy as np

from ref.checks import at_least_one, one_of
from ref.dims import dims, float64
from ref.example import Example

RULES = ("hebb", "delta", "oja", "bcm")
CHUNKED = RULES[:2]
GONE = -1e3  # exp of it is 0 in float64: a stronger extinction forgets no more
BCM_RATE = 0.1  # of the sliding threshold
PROTOCOLS = ("acquisition", "extinction", "blocking", "overshadowing", "latent_inhibition", "second_order",
             "generalization")  # fmt: skip
SALIENCE = 0.8, 0.6  # of the two cues of a compound: lengths that make a unit vector


def condition(q, k, v, *, rule="hebb", beta=None, log_decay=None, state=None, key_sum=None, scale=1.0,
              normalize=False, eps=1e-10, chunk=64, return_state=False):  # fmt: skip
    """o_t = S_t^T (scale q_t), where S_t has learnt the pairs (k_i, v_i) up to and including t, in order.

    Args: q, k [..., T, dk]; v [..., T, dv]; beta [..., T], the rates of learning (None: 1).
      log_decay: extinction, [..., T] or by channel of the key [..., T, dk], not above 0 (None: none).
      rule: with S' = exp(log_decay) S, "hebb" is S = S' + beta k v^T;
        "delta" is S = S' + beta k (v - S'^T k)^T;
        "oja", without extinction, S[:, c] += beta v_c (k - v_c S[:, c]);
        "bcm", exploratory, S += beta k (y (y - m) sign(v))^T with y = S^T k and a threshold
        m <- 0.9 m + 0.1 y^2 that starts at 0 in every call: an empty memory stays empty.
      state [..., dk, dv], key_sum [..., dk]: what was learnt before; zeros if None.
      normalize: with "hebb", divide by scale q_t . z_t + eps, where z is the memory of the value 1: the sum
        of the keys, weighted and forgotten like theirs. q and k must come from a positive feature map.
      chunk: tokens taken at once by "hebb" and "delta"; it changes the rounding, never the result.
    Returns: o [..., T, dv] float64; with return_state (o, state), and (o, state, key_sum) if normalize.
    Raises: ValueError naming the argument at fault, and where a denominator is not positive.
    """
    lead = check_condition(q, k, v, rule, beta, log_decay, state, key_sum, normalize, chunk)
    q, k, v = scale * float64(q), *float64(k, v)
    beta = np.ones((*lead, k.shape[-2])) if beta is None else float64(beta)
    S = np.zeros((*lead, k.shape[-1], v.shape[-1])) if state is None else float64(state)
    if normalize:  # the denominator is one more value, always 1
        v = np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)
        z = np.zeros(S.shape[:-1]) if key_sum is None else float64(key_sum)
        S = np.concatenate([S, z[..., None]], axis=-1)
    if rule in CHUNKED:
        o, S = _by_chunks(q, k, v, S, beta, _rates(log_decay, k), rule, chunk)
    else:
        o, S = _by_steps(q, k, v, S, beta, rule)
    if not normalize:
        return (o, S) if return_state else o
    below, o = o[..., -1:] + eps, o[..., :-1]
    if not (below > 0).all():
        raise ValueError("q and k must come from a positive feature map: a denominator is not positive")
    return (o / below, S[..., :-1], S[..., -1]) if return_state else o / below


def condition_vjp(q, k, v, cotangent, *, rule="hebb", beta=None, log_decay=None, state=None, scale=1.0):
    """{argument: gradient} of `condition` for the cotangent [..., T, dv] of o; rule "hebb" or "delta".

    Holds q, k, v and those of beta, log_decay and state that were given. All T states are kept.
    """
    lead = check_condition(q, k, v, rule, beta, log_decay, state, None, False, 1)
    if rule not in CHUNKED:
        raise ValueError(
            f"rule must be one of {', '.join(CHUNKED)} to have a backward pass here, got {rule!r}"
        )
    dims(v=(v, "... T dv"), cotangent=(cotangent, "... T dv"))
    given = {"beta": beta, "log_decay": log_decay, "state": state}
    q, k, v, do = float64(q, k, v, cotangent)
    beta = np.ones((*lead, k.shape[-2])) if beta is None else float64(beta)
    S = np.zeros((*lead, k.shape[-1], v.shape[-1])) if state is None else float64(state)
    g = np.exp(_rates(log_decay, k))  # [..., T, 1 or dk]
    steps = []
    for t in range(k.shape[-2]):
        left = g[..., t, :, None] * S
        error = v[..., t, :] - (_read(left, k[..., t, :]) if rule == "delta" else 0.0)
        steps.append((S, left, error))
        S = left + beta[..., t, None, None] * _outer(k[..., t, :], error)
        steps[-1] += (S,)
    d = {n: np.zeros_like(x) for n, x in {"q": q, "k": k, "v": v, "beta": beta, "log_decay": g}.items()}
    dS = np.zeros_like(S)
    for t, (before, left, error, after) in reversed(list(enumerate(steps))):
        k_t, beta_t = k[..., t, :], beta[..., t, None]
        d["q"][..., t, :] = scale * _write(after, do[..., t, :])
        dS = dS + _outer(scale * q[..., t, :], do[..., t, :])
        du = _read(dS, k_t)  # of beta_t error
        d["beta"][..., t] = np.sum(du * error, axis=-1)
        d["v"][..., t, :] = beta_t * du
        d["k"][..., t, :] = beta_t * _write(dS, error)
        if rule == "delta":
            d["k"][..., t, :] -= beta_t * _write(left, du)
            dS = dS - beta_t[..., None] * _outer(k_t, du)
        through = g[..., t, :, None] * np.sum(dS * before, axis=-1, keepdims=True)
        d["log_decay"][..., t, :] = through.sum(axis=-2) if g.shape[-1] == 1 else through[..., 0]
        dS = g[..., t, :, None] * dS
    d["state"] = dS
    if log_decay is not None:
        d["log_decay"] = d["log_decay"].reshape(np.shape(log_decay))
    return {n: x for n, x in d.items() if n in "qkv" or given[n] is not None}


def conditioning_protocol(name, *, beta, trials, rule):
    """{curve: responses} of a textbook experiment: cues A and B, orthogonal and of length 1, a response of 1.

    name: "acquisition", A [trials] paired with the response. "extinction", A [2 trials], then without it.
        "blocking", A and B [2 trials], A alone first, then both; control_B, without the first half.
        "overshadowing", A and B [trials], trained together at 0.8 and 0.6 of their length.
        "latent_inhibition", preexposed, A shown without response first, and control [trials].
        "second_order", B [trials]: A has the response in one layer, B comes to recall A in the layer below.
        "generalization", cosine [9] of a cue with A, and the response to it.
    Raises: ValueError for an unknown name or rule, or trials < 1.
    """
    one_of("name", name, PROTOCOLS)
    at_least_one(trials=trials)
    A, B = np.eye(2)
    both = SALIENCE[0] * A + SALIENCE[1] * B

    def run(*phases, probe):
        """Response to the probe after every trial of phases (cue, response)."""
        k = np.repeat([cue for cue, _ in phases], trials, axis=0)
        v = np.repeat([np.atleast_1d(us) for _, us in phases], trials, axis=0).astype(np.float64)
        rates = np.full(len(k), float(beta))
        return condition(np.broadcast_to(probe, k.shape), k, v, rule=rule, beta=rates)

    if name == "acquisition":
        return {"A": run((A, 1), probe=A)[:, 0]}
    if name == "extinction":
        return {"A": run((A, 1), (A, 0), probe=A)[:, 0]}
    if name == "blocking":
        curves = {c: run((A, 1), (A + B, 1), probe=p)[:, 0] for c, p in (("A", A), ("B", B))}
        return {**curves, "control_B": run((A + B, 1), probe=B)[:, 0]}
    if name == "overshadowing":
        return {c: run((both, 1), probe=p)[:, 0] for c, p in (("A", A), ("B", B))}
    if name == "latent_inhibition":
        return {"preexposed": run((A, 0), (A, 1), probe=A)[trials:, 0], "control": run((A, 1), probe=A)[:, 0]}
    if name == "second_order":
        recalled = run((B, A), probe=B)  # what the lower layer answers to B: more and more of A
        return {"B": recalled @ [run((A, 1), probe=p)[-1, 0] for p in (A, B)]}
    cosine = np.linspace(-1, 1, 9)
    cues = cosine[:, None] * A + np.sqrt(1 - cosine[:, None] ** 2) * B
    return {"cosine": cosine, "response": np.array([run((A, 1), probe=c)[-1, 0] for c in cues])}


def retrieval_fidelity(keys, values, *, rule="hebb"):
    """(cosine, bit_error): how well values [..., n, dv] come back once all n keys [..., n, dk] are learnt.

    Means over pairs of the cosine between recalled and stored value, and of how often the signs differ.
    """
    n = dims(keys=(keys, "... n dk"), values=(values, "... n dv"))["n"]
    if n < 1:
        raise ValueError("keys must hold at least one pair, got n=0")
    _, S = condition(keys, keys, values, rule=rule, return_state=True)
    keys, values = float64(keys, values)
    found = keys @ S
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(values, axis=-1)
    cosine = np.sum(found * values, axis=-1) / np.where(norms > 0, norms, 1.0)
    return float(cosine.mean()), float(np.mean(np.sign(found) != np.sign(values)))


def capacity_curve(key, dk, loads, *, dv=64, trials=20, rule="hebb"):
    """[len(loads), 2]: `retrieval_fidelity` of n = round(load dk) random keys of length 1 and values of +-1.

    key: NumPy Generator or seed. n is at least 1; `trials` memories are averaged.
    """
    rng, out = np.random.default_rng(key), []
    for load in loads:
        n = max(1, round(load * dk))
        keys = rng.standard_normal((trials, n, dk))
        keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
        out.append(retrieval_fidelity(keys, rng.choice((-1.0, 1.0), (trials, n, dv)), rule=rule))
    return np.array(out)


def predicted_cosine(n, dk):
    """1 / sqrt(1 + (n - 1) / dk): signal 1 against the interference of n - 1 random keys of length 1."""
    _check_load(n, dk)
    return 1 / sqrt(1 + (n - 1) / dk)


def predicted_bit_error(n, dk):
    """Q(sqrt(dk / (n - 1))): the chance that interference turns a value of +-1; 0 for one pair."""
    _check_load(n, dk)
    return 0.0 if n == 1 else 0.5 * erfc(sqrt(dk / (n - 1)) / sqrt(2))


def reliability(p, *, depth, width, heads, vote="any"):
    """(1 - p_R)^(width depth): all of `width` retrievals in all of `depth` layers succeed.

    p: chance that one head fails. p_R: of a retrieval by R = heads of them, which fails if all fail ("any"
    is enough) or if more than half do ("majority"). Raises: ValueError naming the argument at fault.
    """
    _check_stack(p, depth, width)
    if heads < 1 or vote not in ("any", "majority"):
        raise ValueError(f'need heads >= 1 and vote "any" or "majority", got {heads=}, {vote=}')
    if vote == "any":
        wrong = p**heads
    else:
        wrong = sum(comb(heads, i) * p**i * (1 - p) ** (heads - i) for i in range(heads // 2 + 1, heads + 1))
    return (1 - wrong) ** (width * depth)


def heads_needed(p, *, depth, width, target):
    """The fewest heads, any of which is enough, that make `reliability` at least the target in (0, 1).

    About log(width depth / (1 - target)) / log(1 / p). Raises: ValueError for p = 1 or another target.
    """
    _check_stack(p, depth, width)
    if p == 1 or not 0 < target < 1:
        raise ValueError(f"need p < 1 and 0 < target < 1, got {p=}, {target=}")
    allowed = -np.expm1(log(target) / (width * depth))  # 1 - target^(1 / (width depth))
    heads = max(1, int(log(allowed) / log(p))) if p > 0 else 1
    while p**heads > allowed:
        heads += 1
    return heads


def _by_chunks(q, k, v, S, beta, rate, rule, chunk):
    """(o, S) of "hebb" and "delta": only what is written, u, depends on the rule.

    With G the running sum of rates in the chunk, S_t = exp(G_t) S + sum_{j <= t} exp(G_t - G_j) k_j u_j^T.
    """
    o = np.zeros((*k.shape[:-1], v.shape[-1]))
    for start in range(0, k.shape[-2], chunk):
        rows = slice(start, start + chunk)
        qc, kc, u = q[..., rows, :], k[..., rows, :], beta[..., rows, None] * v[..., rows, :]
        G = np.cumsum(rate[..., rows, :], axis=-2)
        past = np.exp(G)
        lag = np.minimum(G[..., :, None, :] - G[..., None, :, :], 0.0)  # later columns are cut off below
        kept = np.exp(lag)
        meet = lambda a, b, w=kept: np.sum(a[..., :, None, :] * w * b[..., None, :, :], axis=-1)
        if rule == "delta":
            b = beta[..., rows, None]
            u = _substitute(b * np.tril(meet(kc, kc), -1), u - b * ((past * kc) @ S))
        o[..., rows, :] = (past * qc) @ S + np.tril(meet(qc, kc)) @ u
        last = G[..., -1:, :]
        S = np.swapaxes(np.exp(last), -1, -2) * S + np.swapaxes(np.exp(last - G) * kc, -1, -2) @ u
    return o, S


def _substitute(L, b):
    """x of (I + L) x = b with L strictly lower triangular, row by row."""
    x = b.copy()
    for t in range(1, b.shape[-2]):
        x[..., t, :] -= (L[..., t, None, :t] @ x[..., :t, :])[..., 0, :]
    return x


def _by_steps(q, k, v, S, beta, rule):
    """(o, S) of the rules that have no chunked form."""
    o, m = np.zeros((*k.shape[:-1], v.shape[-1])), np.zeros((*S.shape[:-2], S.shape[-1]))
    for t in range(k.shape[-2]):
        k_t, v_t, rate = k[..., t, :], v[..., t, :], beta[..., t, None, None]
        if rule == "oja":
            S = S + rate * (_outer(k_t, v_t) - S * (v_t * v_t)[..., None, :])
        else:
            y = _read(S, k_t)
            m = (1 - BCM_RATE) * m + BCM_RATE * y * y
            S = S + rate * _outer(k_t, y * (y - m) * np.sign(v_t))
        o[..., t, :] = _read(S, q[..., t, :])
    return o, S


def _rates(log_decay, k):
    """log_decay as [..., T, 1] or [..., T, dk]."""
    if log_decay is None:
        return np.zeros_like(k[..., :1])
    rate = np.maximum(float64(log_decay), GONE)
    return rate[..., None] if rate.ndim < k.ndim else rate


def _outer(a, b):
    return a[..., :, None] * b[..., None, :]


def _read(S, k):
    """S^T k [..., dv]."""
    return (k[..., None, :] @ S)[..., 0, :]


def _write(S, v):
    """S v [..., dk]."""
    return (S @ v[..., None])[..., 0]


def check_condition(q, k, v, rule, beta, log_decay, state, key_sum, normalize, chunk):
    """Raise ValueError for a bad call; return the leading axes."""
    n = dims(q=(q, "... T dk"), k=(k, "... T dk"), v=(v, "... T dv"),
             **({} if beta is None else {"beta": (beta, "... T")}),
             **({} if state is None else {"state": (state, "... dk dv")}),
             **({} if key_sum is None else {"key_sum": (key_sum, "... dk")}))  # fmt: skip
    one_of("rule", rule, RULES)
    at_least_one(chunk=chunk)
    if normalize and rule != "hebb":
        raise ValueError(f'normalize belongs to rule "hebb", got rule {rule!r}')
    if key_sum is not None and not normalize:
        raise ValueError("key_sum belongs to normalize=True")
    if log_decay is not None:
        if rule not in CHUNKED:
            raise ValueError(f"log_decay belongs to rules {', '.join(CHUNKED)}, got rule {rule!r}")
        spec = "... T" if log_decay.ndim < k.ndim else "... T dk"
        dims(k=(k, "... T dk"), log_decay=(log_decay, spec))
        # traced values cannot be looked at
        if isinstance(log_decay, np.ndarray) and not (log_decay <= 0).all():
            raise ValueError("log_decay must not be above 0: a memory does not grow by forgetting")
    return n["..."]


def _check_load(n, dk):
    if n < 1 or dk < 1:
        raise ValueError(f"need n >= 1 and dk >= 1, got {n=}, {dk=}")


def _check_stack(p, depth, width):
    if not 0 <= p <= 1 or depth < 1 or width < 1:
        raise ValueError(f"need 0 <= p <= 1, depth >= 1 and width >= 1, got {p=}, {depth=}, {width=}")


def example(seed=0):
    """Two heads of SmolLM2 on 12 tokens of Hamlet, keys of length 1; one call through positive features."""
    from ref.data import attention_inputs

    rng = np.random.default_rng(seed)
    q, k, v = (x[:2, 1:13, :8] for x in attention_inputs())
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    q = q + 0.1 * rng.standard_normal(q.shape)
    beta, log_decay = rng.random((2, 12)), -rng.random((2, 12))
    learn = {"beta": beta, "log_decay": log_decay, "chunk": 5}
    positive = np.exp(q / 4), np.exp(k), v
    return [
        Example("condition", (q, k, v), {"chunk": 5}, (0, 1, 2)),
        Example("condition", (q, k, v), {"rule": "delta", **learn}, (0, 1, 2)),
        Example("condition", positive, {"normalize": True, "chunk": 5}, (0, 1, 2)),
        Example("condition_vjp", (q, k, v, rng.standard_normal(v.shape)), {"rule": "delta", "beta": beta}),
    ]
