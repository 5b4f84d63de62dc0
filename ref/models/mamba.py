"""Mamba's mixer: a gated selective scan behind a short causal convolution, over a sequence and step by step.

Source: Gu and Dao 2023 (arXiv 2312.00752), section 3.4 and figure 3, with the released code's initialisation
(state-spaces/mamba). The mixer alone: norm and residual belong to the model around it.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.mlp import linear_vjp, silu, silu_grad
from ref.blocks.scan import causal_conv, causal_conv_vjp, selective_scan, selective_scan_vjp
from ref.dims import dims, float64


class MambaParams(NamedTuple):
    """Weights [in, out] of width C, inner width E, state N, convolution K, step rank R; A = -exp(a_log).

    w_in [C, 2E] (columns of x, then of the gate z), conv_w [K, E] with the newest tap last, conv_b [E],
    w_x [E, R+2N] (columns of dt, B, C), w_dt [R, E], b_dt [E], a_log [E, N], d [E], w_out [E, C].
    """

    w_in: np.ndarray
    conv_w: np.ndarray
    conv_b: np.ndarray
    w_x: np.ndarray
    w_dt: np.ndarray
    b_dt: np.ndarray
    a_log: np.ndarray
    d: np.ndarray
    w_out: np.ndarray


class MambaCache(NamedTuple):
    """What a step needs of the past: the last K - 1 inputs of the convolution, and the state of the scan."""

    conv: np.ndarray  # [..., K-1, E]
    state: np.ndarray  # [..., E, N]


def mamba_mixer(x, params: MambaParams, *, state=None):
    """(y, state): the mixer over x [..., T, C], going on from a MambaCache; y float64, T may be 0.

    Raises: ValueError naming the argument at fault.
    """
    check_mamba(x, params, state)
    p, (E, _) = params, params.a_log.shape
    xz = float64(x) @ p.w_in
    before, z = xz[..., :E], xz[..., E:]
    cache = init_mamba_cache(p, x.shape[:-2]) if state is None else state
    u = silu(causal_conv(before, p.conv_w, p.conv_b, tail=cache.conv))
    dt, b, c = _projections(u, p)
    y, h = selective_scan(u, dt @ p.w_dt, -np.exp(float64(p.a_log)), b, c, p.d, z, delta_bias=p.b_dt,
                          state0=cache.state, return_state=True)  # fmt: skip
    seen = np.concatenate([cache.conv, before], axis=-2)
    return y @ p.w_out, MambaCache(seen[..., x.shape[-2] :, :], h)


def mamba_block(x, params: MambaParams):
    """The mixer over a whole sequence x [..., T, C] -> [..., T, C]."""
    return mamba_mixer(x, params)[0]


def mamba_step(x_t, cache: MambaCache, params: MambaParams):
    """(y_t, cache) for one token x_t [..., C]: E N + (K - 1) E numbers of memory, whatever came before."""
    y, cache = mamba_mixer(x_t[..., None, :], params, state=cache)
    return y[..., 0, :], cache


def mamba_block_vjp(x, params: MambaParams, dy):
    """(dx, dparams: MambaParams) of `mamba_block` for dy [..., T, C]."""
    check_mamba(x, params)
    dims(x=(x, "... T C"), dy=(dy, "... T C"))
    p, (E, _) = params, params.a_log.shape
    x, dy = float64(x, dy)
    xz = x @ p.w_in
    before, z = xz[..., :E], xz[..., E:]
    mixed = causal_conv(before, p.conv_w, p.conv_b)
    u = silu(mixed)
    dt, b, c = _projections(u, p)
    a, delta = -np.exp(float64(p.a_log)), dt @ p.w_dt
    y = selective_scan(u, delta, a, b, c, p.d, z, delta_bias=p.b_dt)
    dscan, dw_out, _ = linear_vjp(y, p.w_out, dy, bias=False)
    g = selective_scan_vjp(u, delta, a, b, c, p.d, z, dscan, delta_bias=p.b_dt)
    ddt, dw_dt, _ = linear_vjp(dt, p.w_dt, g.delta, bias=False)
    du, dw_x, _ = linear_vjp(u, p.w_x, np.concatenate([ddt, g.b, g.c], axis=-1), bias=False)
    dbefore, dconv_w, dconv_b, _ = causal_conv_vjp(before, p.conv_w, (g.u + du) * silu_grad(mixed))
    dx, dw_in, _ = linear_vjp(x, p.w_in, np.concatenate([dbefore, g.z], axis=-1), bias=False)
    return dx, MambaParams(dw_in, dconv_w, dconv_b, dw_x, dw_dt, g.delta_bias, g.a * a, g.d, dw_out)


def init_mamba(key, width, *, state=16, conv=4, dt_rank=None, expand=2, std=None):
    """MambaParams: a_log = log(1..N), d = 1, step sizes log-uniform in [1e-3, 0.1] with a floor of 1e-4.

    key: NumPy Generator or seed. dt_rank: None is ceil(width / 16). std: of normal linear maps and
      convolution; None draws them uniform within +-fan_in^-1/2.
    """
    rng, E = np.random.default_rng(key), expand * width
    R = -(-width // 16) if dt_rank is None else dt_rank
    if min(width, state, conv, R, expand) < 1:
        raise ValueError(
            f"width, state, conv, dt_rank and expand must be at least 1, got {width}, {state}, {conv}, {R}, "
            f"{expand}"
        )
    uniform = lambda rows, columns: rng.uniform(-1, 1, (rows, columns)) / np.sqrt(rows)
    draw = uniform if std is None else lambda *shape: std * rng.standard_normal(shape)
    dt = np.maximum(np.exp(rng.uniform(np.log(1e-3), np.log(0.1), E)), 1e-4)
    return MambaParams(
        w_in=draw(width, 2 * E), conv_w=draw(conv, E), conv_b=np.zeros(E), w_x=draw(E, R + 2 * state),
        w_dt=uniform(R, E), b_dt=dt + np.log(-np.expm1(-dt)),  # softplus of it is dt
        a_log=np.tile(np.log(np.arange(1.0, state + 1)), (E, 1)), d=np.ones(E), w_out=draw(E, width),
    )  # fmt: skip


def init_mamba_cache(params, lead=()):
    """The cache before the first token: zeros, for sequences of leading axes `lead`."""
    (E, N), K = params.a_log.shape, len(params.conv_w)
    return MambaCache(np.zeros((*lead, K - 1, E)), np.zeros((*lead, E, N)))


def mamba_params(width, *, state=16, conv=4, dt_rank=None, expand=2):
    """Numbers in `MambaParams`."""
    E, R = expand * width, -(-width // 16) if dt_rank is None else dt_rank
    return 3 * width * E + (conv + 1) * E + E * (R + 2 * state) + R * E + E + E * state + E


def mamba_macs(width, *, state=16, conv=4, dt_rank=None, expand=2):
    """Multiply-accumulates of a token: maps, convolution, update and readout of the state, skip."""
    E, R = expand * width, -(-width // 16) if dt_rank is None else dt_rank
    return 3 * width * E + conv * E + E * (R + 2 * state) + R * E + 2 * E * state + E


def check_mamba(x, params, cache=None):
    """Raise ValueError unless x [..., T, C], the parameters and the cache fit."""
    p = params
    n = dims(x=(x, "... T C"), conv_w=(p.conv_w, "K E"), conv_b=(p.conv_b, "E"), w_dt=(p.w_dt, "R E"),
             b_dt=(p.b_dt, "E"), a_log=(p.a_log, "E N"), d=(p.d, "E"), w_out=(p.w_out, "E C"))  # fmt: skip
    dims(w_in=(p.w_in, f"{n['C']} {2 * n['E']}"), w_x=(p.w_x, f"{n['E']} {n['R'] + 2 * n['N']}"))
    if cache is not None:
        dims(x=(x, "... T C"), a_log=(p.a_log, "E N"), conv=(cache.conv, f"... {n['K'] - 1} E"),
             state=(cache.state, "... E N"))  # fmt: skip


def _projections(u, p):
    """dt [..., T, R], b and c [..., T, N]."""
    R, N = p.w_dt.shape[0], p.a_log.shape[1]
    projected = u @ p.w_x
    return projected[..., :R], projected[..., R : R + N], projected[..., R + N :]
