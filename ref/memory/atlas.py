"""ATLAS: a memory that is trained while it reads, on the last tokens at once, with Muon's steps.

Source: Behrouz et al. 2025 (arXiv 2505.23735), no released code; Titans (arXiv 2501.00663) is the baseline.
The equations are those of the chapter. Our choices, where the paper is silent: degree 2, window 16, the start
of the gates, keys of length 1. Left out: a further decay of the older tokens in the window.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.attention import join_heads, split_heads
from ref.blocks.deep_memory import DeepMemory, check_gate, check_read, deep_memory_scan, deep_memory_update
from ref.blocks.linalg import newton_schulz, newton_schulz_macs, newton_schulz_vjp
from ref.blocks.merging import unit_rows
from ref.blocks.mlp import linear_vjp, sigmoid, silu, silu_grad
from ref.blocks.monomials import feature_count, poly_features, poly_features_vjp
from ref.blocks.norms import rms_norm, rms_norm_vjp
from ref.blocks.scan import causal_conv, causal_conv_vjp
from ref.checks import at_least_one, check_num_heads
from ref.dims import dims, float64
from ref.example import Example
from ref.models.atlas import AtlasParams, AtlasState, atlas_state_bytes, init_atlas, init_state

__all__ = [
    "AtlasParams", "AtlasState", "DeepMemory", "OmegaGrads", "atlas_layer", "atlas_layer_vjp",
    "atlas_state_bytes", "deep_memory_scan", "deep_memory_update", "dla", "dot_memory", "example",
    "feature_count", "init_atlas", "newton_schulz", "newton_schulz_macs", "newton_schulz_vjp",
    "omega_scan", "omega_scan_vjp", "poly_features", "poly_features_vjp", "titans_memory",
]  # fmt: skip


class OmegaGrads(NamedTuple):
    """Gradients of `omega_scan` by argument; None where the argument was None and has no default array."""

    phi_q: np.ndarray
    phi_k: np.ndarray
    v: np.ndarray
    eta: np.ndarray
    alpha: np.ndarray
    theta: np.ndarray | None
    gamma: np.ndarray | None
    memory0: np.ndarray
    momentum0: np.ndarray


def omega_scan(phi_q, phi_k, v, *, eta, alpha, theta=None, gamma=None, window=16, chunk=1, muon=False,
               momentum_lr="outer", read="after", memory0=None, momentum0=None, tail0=None,
               return_state=False):  # fmt: skip
    """y_t = M_t phi(q_t), each step of M descending the loss of the last tokens: the Omega rule (eq. 3-6).

    Args: phi_q, phi_k [..., T, D]; v [..., T, dv]; eta, alpha, theta, gamma [..., T] in [0, 1]: step,
        retention, momentum (None: none), weight of a token in the loss (None: 1).
      window: tokens in the loss of a step. chunk: steps whose gradients are all taken at the chunk's first
        memory; 1 is the exact recurrence, the last may be shorter.
      muon: the step is `newton_schulz` of the momentum, nearly orthogonal, instead of the momentum itself.
      momentum_lr: "outer", S = theta S + g and M = alpha M - eta S; "inner" (Titans), S = theta S - eta g and
        M = alpha M + S. read: M "after" or "before" the step.
      memory0, momentum0 [..., dv, D]: zeros if None.
      tail0: (phi_k, v, gamma) of the window - 1 tokens before, in order, or None.
    Returns: y [..., T, dv] float64, and with return_state (y, memory, momentum); without theta the momentum
      is the last windowed gradient (times -eta if "inner").
    Raises: ValueError naming the argument at fault.
    """
    check_omega(phi_q, phi_k, v, eta, alpha, theta, gamma, window, chunk, momentum_lr, read, memory0,
                momentum0, tail0)  # fmt: skip
    run = _Omega(phi_q, phi_k, v, eta, alpha, theta, gamma, tail0, window, muon, momentum_lr == "inner")
    memory, momentum = run.start(memory0), run.start(momentum0)
    y = np.zeros_like(run.v[..., run.past :, :])
    for start in range(0, y.shape[-2], chunk):
        steps = slice(start, min(start + chunk, y.shape[-2]))
        memories, momenta, _ = run.chunk(memory, momentum, steps)
        seen = memories[1:] if read == "after" else memories[:-1]
        y[..., steps, :] = np.einsum("t...vd,...td->...tv", np.stack(seen), run.q[..., steps, :])
        memory, momentum = memories[-1], momenta[-1]
    return (y, memory, momentum) if return_state else y


def omega_scan_vjp(phi_q, phi_k, v, dy, *, eta, alpha, theta=None, gamma=None, window=16, chunk=1, muon=False,
                   momentum_lr="outer", read="after", memory0=None, momentum0=None, tail0=None,
                   dmemory=None, dmomentum=None):  # fmt: skip
    """OmegaGrads of `omega_scan` for the cotangents dy [..., T, dv], dmemory and dmomentum (None: 0).

    The gradient through a gradient: what the memory descended depends on keys, values and the memory before.
    Kept from the forward pass: the memory and momentum at the start of every chunk. tail0 gets no gradient.
    """
    check_omega(phi_q, phi_k, v, eta, alpha, theta, gamma, window, chunk, momentum_lr, read, memory0,
                momentum0, tail0)  # fmt: skip
    dims(v=(v, "... T dv"), dy=(dy, "... T dv"))
    inner, after, dy = momentum_lr == "inner", read == "after", float64(dy)
    run = _Omega(phi_q, phi_k, v, eta, alpha, theta, gamma, tail0, window, muon, inner)
    T = dy.shape[-2]
    kept = [(run.start(memory0), run.start(momentum0))]
    for start in range(0, T, chunk):
        memories, momenta, _ = run.chunk(*kept[-1], slice(start, min(start + chunk, T)))
        kept.append((memories[-1], momenta[-1]))
    d = {n: np.zeros_like(getattr(run, n)) for n in ("q", "k", "v", "eta", "alpha", "theta", "gamma")}
    dM, dS = run.start(dmemory), run.start(dmomentum)
    for start in reversed(range(0, T, chunk)):
        steps = slice(start, min(start + chunk, T))
        M0, S0 = kept[start // chunk]
        memories, momenta, sums = run.chunk(M0, S0, steps)
        dsums = []
        for t in reversed(range(steps.start, steps.stop)):
            i, eta_t, theta_t = t - start, run.eta[..., t, None, None], run.theta[..., t, None, None]
            through = memories[i + after]
            d["q"][..., t, :] = (dy[..., t, None, :] @ through)[..., 0, :]
            pull = dy[..., t, :, None] * run.q[..., t, None, :]
            dM = dM + pull if after else dM
            d["alpha"][..., t] = np.sum(dM * memories[i], axis=(-2, -1))
            S = momenta[i + 1]
            N = newton_schulz(S) if muon else S
            dN = dM if inner else -eta_t * dM
            deta = 0.0 if inner else -np.sum(dM * N, axis=(-2, -1))
            dM = run.alpha[..., t, None, None] * dM
            dM = dM if after else dM + pull
            dS = dS + (newton_schulz_vjp(S, dN) if muon else dN)
            if inner:
                deta = -np.sum(dS * sums[..., i, :, :], axis=(-2, -1))
            d["eta"][..., t] = deta
            d["theta"][..., t] = np.sum(dS * momenta[i], axis=(-2, -1))
            dsums.append(-eta_t * dS if inner else dS)
            dS = theta_t * dS
        rows, band = run.rows(steps)
        du = np.einsum("ti,...tvd->...ivd", band, np.stack(dsums[::-1], axis=-3))  # of gamma_i e_i phi_i^T
        k, weight = run.k[..., rows, :], run.gamma[..., rows, None]
        e = k @ np.swapaxes(M0, -1, -2) - run.v[..., rows, :]
        du_k = np.einsum("...ivd,...id->...iv", du, k)
        de = weight * du_k
        d["gamma"][..., rows] += np.sum(du_k * e, axis=-1)
        d["k"][..., rows, :] += weight * np.einsum("...ivd,...iv->...id", du, e) + de @ M0
        d["v"][..., rows, :] -= de
        dM = dM + np.swapaxes(de, -1, -2) @ k
    own = lambda x: x[..., run.past :, :]
    return OmegaGrads(
        d["q"], own(d["k"]), own(d["v"]), d["eta"], d["alpha"], None if theta is None else d["theta"],
        None if gamma is None else d["gamma"][..., run.past :], dM, dS,
    )  # fmt: skip


def titans_memory(q, k, v, *, eta, alpha, theta, memory0=None):
    """The baseline, y [..., T, dv]: one token in the loss, the step size inside the momentum (Titans)."""
    return omega_scan(
        q, k, v, eta=eta, alpha=alpha, theta=theta, window=1, momentum_lr="inner", memory0=memory0
    )


def dla(q, k, v):
    """y_t = sum_{i <= t} (q_t.k_i) v_i: deep linear attention with a linear memory, M += v k^T."""
    T = dims(q=(q, "... T D"), k=(k, "... T D"), v=(v, "... T dv"))["T"]
    q, k, v = float64(q, k, v)
    return np.tril(np.ones((T, T))) * (q @ np.swapaxes(k, -1, -2)) @ v


def dot_memory(q, k, v, *, window, eta=None, loss="l2"):
    """A linear memory of all monomials at once, phi(x).phi(y) = exp(x.y), by the kernel: y [..., T, dv].

    M_t = sum_i c_i phi(k_i)^T; a step moves the c_i [dv] of the window's tokens.
    loss: "l2", c_i -= eta (M k_i - v_i), the Omega rule; "dot", c_i += eta v_i, Hebb's: with window 1
        and eta 1 the read is softmax attention before it is divided by its denominator.
      eta: [..., T], or None: 1 / sum exp(|k_i|^2) over the window ("l2"; the loss of the window then never
        rises, and with window = 1 the pair is stored exactly) or 1 ("dot").
    Raises: ValueError naming the argument at fault.
    """
    n = dims(q=(q, "... T D"), k=(k, "... T D"), v=(v, "... T dv"))
    at_least_one(window=window)
    if loss not in ("l2", "dot"):
        raise ValueError(f'loss must be "l2" or "dot", got {loss!r}')
    q, k, v = float64(q, k, v)
    kernel = lambda x: np.exp(x @ np.swapaxes(k, -1, -2))  # [..., t, i]
    among, read = kernel(k), kernel(q)
    c, y = np.zeros_like(v), np.zeros_like(v)
    for t in range(n["T"]):
        rows = slice(max(0, t - window + 1), t + 1)
        if loss == "l2":
            step = v[..., rows, :] - among[..., rows, : t + 1] @ c[..., : t + 1, :]
            size = 1 / np.exp(np.sum(k[..., rows, :] ** 2, axis=-1)).sum(axis=-1)
        else:
            step, size = v[..., rows, :], np.ones(n["..."])
        c[..., rows, :] += (size if eta is None else eta[..., t])[..., None, None] * step
        y[..., t, :] = (read[..., t, None, : t + 1] @ c[..., : t + 1, :])[..., 0, :]
    return y


def atlas_layer(x, params: AtlasParams, *, heads, window=16, chunk=64, degree=2, muon=True, state=None):
    """(y [B, T, d], AtlasState): the layer over x [B, T, d], going on from a state.

    q, k, v are projected, convolved over four tokens and passed through SiLU; q and k are scaled to length 1
    by head and go through `poly_features`; the read is normalised by head, gated by silu(x w_out_gate) and
    projected. Cutting the sequence at multiples of chunk changes nothing.
    Raises: ValueError naming the argument at fault.
    """
    p, state, x = params, _layer_state(x, params, heads, window, degree, state), float64(x)
    flat, (_, k, v), _, call = _layer_inputs(x, p, heads, degree, state)
    y, memory, momentum = omega_scan(
        *call.pop("args"), **call, window=window, chunk=chunk, muon=muon, return_state=True
    )
    conv = tuple(_last(old, z) for old, z in zip(state.conv, flat, strict=True))
    seen = _last(state.k, unit_rows(k)), _last(state.v, v), _last(state.gamma, call["gamma"], axis=-1)
    y = join_heads(rms_norm(y, p.norm)) * silu(x @ p.w_out_gate)
    return y @ p.w_o, AtlasState(memory, momentum, *seen, conv)


def atlas_layer_vjp(
    x, params: AtlasParams, dy, *, heads, window=16, chunk=64, degree=2, muon=True, state=None
):
    """(dx, AtlasParams of gradients) of y in `atlas_layer` for dy [B, T, d]; the state is a constant."""
    p, state = params, _layer_state(x, params, heads, window, degree, state)
    dims(x=(x, "B T d"), dy=(dy, "B T d"))
    x = float64(x)
    flat, (q, k, _), gates, call = _layer_inputs(x, p, heads, degree, state)
    args, options = call.pop("args"), {"window": window, "chunk": chunk, "muon": muon}
    y = omega_scan(*args, **call, **options)
    read, opened = join_heads(rms_norm(y, p.norm)), x @ p.w_out_gate
    d, dw_o, _ = linear_vjp(read * silu(opened), p.w_o, float64(dy), bias=False)
    dx, dw_out_gate, _ = linear_vjp(x, p.w_out_gate, d * read * silu_grad(opened), bias=False)
    dread, dnorm = rms_norm_vjp(y, p.norm, split_heads(d * silu(opened), heads))
    g = omega_scan_vjp(*args, dread, **call, **options)
    back = lambda z, dz: _unit_vjp(z, poly_features_vjp(unit_rows(z), dz, degree=degree))
    parts = [join_heads(z) for z in (back(q, g.phi_q), back(k, g.phi_k), g.v)]
    maps, grads = ((p.w_q, p.conv_q), (p.w_k, p.conv_k), (p.w_v, p.conv_v)), []
    for z, (w, conv), d, tail in zip(flat, maps, parts, state.conv, strict=True):
        d = d * silu_grad(causal_conv(z, conv, tail=tail))
        d, dconv = causal_conv_vjp(z, conv, d, tail=tail)[:2]
        d, dw, _ = linear_vjp(x, w, d, bias=False)
        dx, grads = dx + d, [*grads, (dw, dconv)]
    dgates = np.moveaxis(np.stack([g.alpha, g.eta, g.theta, g.gamma]), (0, 2), (2, 3)).reshape(gates.shape)
    d, dw_gates, db_gates = linear_vjp(x, p.w_gates, dgates * gates * (1 - gates))
    return dx + d, AtlasParams(
        *(dw for dw, _ in grads), *(dconv for _, dconv in grads), dw_gates, db_gates, dw_out_gate, dnorm, dw_o
    )


class _Omega:
    """A checked call of the scan in float64: the tail in front of the tokens, gates in full."""

    def __init__(self, phi_q, phi_k, v, eta, alpha, theta, gamma, tail0, window, muon, inner):
        self.q, self.k, self.v, self.eta, self.alpha = float64(phi_q, phi_k, v, eta, alpha)
        self.theta = np.zeros_like(self.eta) if theta is None else float64(theta)
        self.gamma = np.ones_like(self.eta) if gamma is None else float64(gamma)
        self.window, self.muon, self.inner, self.past = window, muon, inner, 0
        if tail0 is not None:
            k, v, gamma = float64(*tail0)
            self.past = k.shape[-2]
            self.k, self.v = np.concatenate([k, self.k], axis=-2), np.concatenate([v, self.v], axis=-2)
            self.gamma = np.concatenate([gamma, self.gamma], axis=-1)

    def start(self, state):
        """A memory or momentum [..., dv, D], zeros if None."""
        shape = (*self.v.shape[:-2], self.v.shape[-1], self.k.shape[-1])
        return np.zeros_like(self.v, shape=shape) if state is None else float64(state)

    def rows(self, steps):
        """(slice of the tokens that the windows of these steps hold, band [steps, tokens] of 0 and 1)."""
        t = np.arange(steps.start, steps.stop) + self.past
        i = np.arange(max(0, steps.start + self.past - self.window + 1), steps.stop + self.past)
        lag = t[:, None] - i
        return slice(i[0], i[-1] + 1), ((lag >= 0) & (lag < self.window)).astype(np.float64)

    def chunk(self, M0, S0, steps):
        """(memories, momenta: before the first step to after the last; windowed gradients at M0)."""
        rows, band = self.rows(steps)
        eta, alpha, theta = (g[..., steps] for g in (self.eta, self.alpha, self.theta))
        k = self.k[..., rows, :]
        e = self.gamma[..., rows, None] * (k @ np.swapaxes(M0, -1, -2) - self.v[..., rows, :])
        sums = np.einsum("ti,...iv,...id->...tvd", band, e, k, optimize=True)
        g = -eta[..., None, None] * sums if self.inner else sums
        momenta, memories = [S0], [M0]
        for t in range(len(band)):
            momenta.append(theta[..., t, None, None] * momenta[-1] + g[..., t, :, :])
        moves = np.stack(momenta[1:], axis=-3)
        moves = newton_schulz(moves) if self.muon else moves
        moves = moves if self.inner else -eta[..., None, None] * moves
        for t in range(len(band)):
            memories.append(alpha[..., t, None, None] * memories[-1] + moves[..., t, :, :])
        return memories, momenta, sums


def _layer_state(x, params, heads, window, degree, state):
    """Check a call of the layer; its state, zeros if None."""
    n = dims(x=(x, "B T d"), w_q=(params.w_q, "d d"), b_gates=(params.b_gates, f"{4 * heads}"))
    check_num_heads(n["d"], heads, name="heads")
    return init_state(params, n["B"], heads=heads, window=window, degree=degree) if state is None else state


def _layer_inputs(x, p, heads, degree, state):
    """(three projections, q, k, v before they are scaled, gates [B, T, 4H], the call of the scan)."""
    B, T, _ = x.shape
    flat = [x @ w for w in (p.w_q, p.w_k, p.w_v)]
    convs = zip(flat, (p.conv_q, p.conv_k, p.conv_v), state.conv, strict=True)
    q, k, v = (split_heads(silu(causal_conv(z, w, tail=tail)), heads) for z, w, tail in convs)
    gates = sigmoid(x @ p.w_gates + p.b_gates)
    alpha, eta, theta, gamma = np.moveaxis(gates.reshape(B, T, 4, heads), (2, 3), (0, 2))
    phi = lambda z: poly_features(z, degree=degree)
    named = {"eta": eta, "alpha": alpha, "theta": theta, "gamma": gamma}
    before = {
        "memory0": state.memory,
        "momentum0": state.momentum,
        "tail0": (phi(state.k), state.v, state.gamma),
    }
    call = {"args": (phi(unit_rows(q)), phi(unit_rows(k)), v), **named, **before}
    return flat, (q, k, v), gates, call


def _unit_vjp(z, dunit):
    """The gradient through `unit_rows`; 0 for a row of zeros, which has no direction."""
    unit, length = unit_rows(z), np.linalg.norm(z, axis=-1, keepdims=True)
    d = dunit - unit * np.sum(unit * dunit, axis=-1, keepdims=True)
    return np.where(length > 0, d / np.where(length > 0, length, 1.0), 0.0)


def _last(old, new, axis=-2):
    """The last rows of both, as many as there were in the old."""
    return np.split(np.concatenate([old, new], axis=axis), [new.shape[axis]], axis=axis)[1]


def check_omega(phi_q, phi_k, v, eta, alpha, theta, gamma, window, chunk, momentum_lr, read, memory0,
                momentum0, tail0):  # fmt: skip
    """Raise ValueError for a bad call of the scan."""
    gates = {"eta": eta, "alpha": alpha, "theta": theta, "gamma": gamma}
    given = {name: g for name, g in gates.items() if g is not None}
    n = dims(phi_q=(phi_q, "... T D"), phi_k=(phi_k, "... T D"), v=(v, "... T dv"),
             **{name: (g, "... T") for name, g in given.items()})  # fmt: skip
    for name, g in given.items():
        check_gate(name, g)
    if window < 1 or chunk < 1:
        raise ValueError(f"window and chunk must be at least 1, got {window=}, {chunk=}")
    if momentum_lr not in ("inner", "outer"):
        raise ValueError(f'momentum_lr must be "inner" or "outer", got {momentum_lr!r}')
    check_read(read)
    for name, state in (("memory0", memory0), ("momentum0", momentum0)):
        if state is not None:
            dims(v=(v, "... T dv"), **{name: (state, f"... {n['dv']} {n['D']}")})
    if tail0 is not None:
        k, w, g = tail0
        dims(v=(v, "... T dv"), **{"tail0[0]": (k, f"... {window - 1} {n['D']}")},
             **{"tail0[1]": (w, f"... {window - 1} dv"), "tail0[2]": (g, f"... {window - 1}")})  # fmt: skip
        check_gate("tail0[2]", g)


def example(seed=0):
    """Keys and values of SmolLM2 on 12 tokens of Hamlet, cut to four channels; two deep memories."""
    from ref.data import attention_inputs

    rng = np.random.default_rng(seed)
    q, k, v = (x[:2, 1:13, :4] for x in attention_inputs())
    q, k = unit_rows(q), unit_rows(k)
    phi_q, phi_k = poly_features(q), poly_features(k)
    gate = lambda low, *shape: rng.uniform(low, 1, shape)
    gates = 0.2 * gate(0.1, 2, 12), gate(0.9, 2, 12), gate(0.5, 2, 12), gate(0.2, 2, 12)
    named = dict(zip(("eta", "alpha", "theta", "gamma"), gates, strict=True))
    deep = DeepMemory(rng.standard_normal((2, 4, 8)) / 2, rng.standard_normal((2, 8, 4)) / 3)
    rates = {"lr": 0.1 * gate(0.5, 2, 12), "decay": 1 - gate(0.5, 2, 3), "momentum": gate(0.5, 2, 3)}
    params, x = init_atlas(rng, 8, heads=2), rng.standard_normal((1, 12, 8))
    return [
        Example("newton_schulz", (rng.standard_normal((2, 4, 6)),), {}, (0,)),
        Example("poly_features", (q,), {}, (0,)),
        Example("omega_scan", (phi_q, phi_k, v), {**named, "window": 4, "chunk": 4}, (0, 1, 2)),
        Example("deep_memory_update", (k, v, deep), {**rates, "chunk": 4}, (0, 1, 2)),
        Example("deep_memory_scan", (q, k, v, deep), {**rates, "chunk": 4, "window": 3, "muon": True}),
        Example("titans_memory", (q, k, v), {n: named[n] for n in ("eta", "alpha", "theta")}, (0, 1, 2)),
        Example("dla", (q, k, v), {}, (0, 1, 2)),
        Example("dot_memory", (q, k, v), {"window": 4}, (0, 1, 2)),
        Example("atlas_layer", (x, params), {"heads": 2, "window": 3, "chunk": 4}, (0, 1)),
    ]
