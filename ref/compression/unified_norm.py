"""Unified Normalization: divide by a smoothed second moment per channel, so that it folds into a linear map.

Source: Yang et al. 2022 (arXiv 2208.01313) and the code released with it, which decides where both differ:
the output uses z and not r z, and the backward pass the smoothed gradient statistic. Statistics are per
channel over batch and tokens; nothing is centred. State is explicit: functions return the new one.
"""

from typing import NamedTuple

import numpy as np

from ref.dims import dims, float64
from ref.example import Example

R_FROM = 1000  # steps before the correction r is trusted, and the range it is clipped to
R_MOST = 5.0


class UNState(NamedTuple):
    """running_var, ema_gz [C]; windows buffer_x2 [M, C], buffer_gz [Mb, C]; iters, skip_count int []."""

    running_var: np.ndarray
    ema_gz: np.ndarray
    buffer_x2: np.ndarray
    buffer_gz: np.ndarray
    iters: np.ndarray
    skip_count: np.ndarray


class UNCache(NamedTuple):
    """What the backward pass needs: z [B, N, C]; std, r, weight [C]; the outlier flag and the step."""

    z: np.ndarray
    std: np.ndarray
    r: np.ndarray
    weight: np.ndarray
    skip: np.ndarray
    smooth: np.ndarray
    iters: np.ndarray
    momentum: float


def init_un(channels, *, window=4, window_backward=None):
    """The state before the first step: unit running second moment, empty windows of M and Mb (None: M) steps.

    Raises: ValueError for a window below 1.
    """
    back = window if window_backward is None else window_backward
    if window < 1 or back < 1:
        raise ValueError(f"window and window_backward must be at least 1, got {window} and {back}")
    zero, count = np.zeros(channels), np.zeros((), np.int32)
    return UNState(
        np.ones(channels), zero, np.zeros((window, channels)), np.zeros((back, channels)), count, count
    )


def amgm_gap(window):
    """(am, gm, s2), each [C]: means of window [M, C] >= 0, and the sample variance of its square roots.

    s2 <= am - gm <= (M - 1) s2 (Kober's inequality), with equality at M = 2. M = 1 gives s2 = 0.
    """
    M = dims(window=(window, "M C"))["M"]
    window = float64(window)
    if M < 1 or not (window >= 0).all():
        raise ValueError("window must hold at least one step, and no negative number or NaN")
    s2 = np.sqrt(window).var(axis=0, ddof=1) if M > 1 else np.zeros(window.shape[1])
    return window.mean(axis=0), geometric_mean(window), s2


def un_train_forward(x, weight, bias, state: UNState, *, mask=None, warmup=4000,
                     outlier_filtration=False, eps=1e-5, momentum=0.9, scale_forward_by_r=False,
                     skip_freezes_running=False):  # fmt: skip
    """(y, cache, state): y = weight x / sqrt(var + eps) + bias, with var smoothed over the window.

    Args: x [B, N, C]; weight, bias [C]; mask [B, N] bool, True = counted in the statistic (None: all). Tokens
        that are not counted are normalised all the same.
      warmup: steps with the batch's own second moment. outlier_filtration: skip the smoothing when some
        channel's arithmetic and geometric mean differ by more than M times the variance recorded before.
      scale_forward_by_r: y from r z, which the derivation suggests and the released code does not do.
      skip_freezes_running: our repair; a skipped step leaves running_var alone.
    Raises: ValueError naming the argument at fault, also where no token is counted.
    """
    _check(x, weight, bias, state, mask, momentum)
    x, weight, state, M = float64(x), float64(weight), _float64(state), len(state.buffer_x2)
    counted = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
    x2 = (counted**2).mean(axis=0)

    t = state.iters + 1
    roots = np.sqrt(state.buffer_x2)
    recorded = roots.var(ddof=1) if roots.size > 1 else np.inf  # before this step is written
    window = _put(state.buffer_x2, t, x2)
    skip = np.asarray(M == 1)
    if outlier_filtration and t >= warmup:
        outlier = (window.mean(axis=0) - geometric_mean(window) > recorded * M).any()
        window = np.where(outlier, _put(window, t, state.running_var), window)
        skip = skip | outlier
    else:
        outlier = np.asarray(False)

    plain = (t <= M) | (t < warmup) | skip
    var = np.where(plain, x2, geometric_mean(window))
    r = np.sqrt(var + eps) / np.sqrt(state.running_var + eps)
    r = np.where((t <= max(R_FROM, warmup)) | skip, 1.0, np.clip(r, 1 / R_MOST, R_MOST))
    std = np.sqrt(var + eps)
    z = x / std
    kept = skip_freezes_running & outlier
    running = np.where(kept, state.running_var, momentum * state.running_var + (1 - momentum) * var)
    new = state._replace(
        running_var=running, buffer_x2=window, iters=t, skip_count=state.skip_count + outlier
    )
    smooth = (t > len(state.buffer_gz)) & (t >= warmup) & ~skip
    y = weight * (r * z if scale_forward_by_r else z) + bias
    return y, UNCache(z, std, r, weight, skip, smooth, t, momentum), new


def un_train_backward(grad_y, cache: UNCache, state: UNState, *, exact_gradient=False):
    """(grad_x, grad_weight, grad_bias, state): g = r weight grad_y, then grad_x = (g - q z) / std.

    q stands for gz = mean(g z) over all tokens, padding included. It is an exponential mean of its window, or
    the window's own where the step was skipped: an approximation on purpose. exact_gradient takes q = gz,
    the gradient of x / sqrt(mean x^2 + eps) where r = 1 and nothing was smoothed.
    Raises: ValueError if the cache comes from another step than the state.
    """
    dims(grad_y=(grad_y, "B N C"), z=(cache.z, "B N C"), weight=(cache.weight, "C"))
    if cache.iters != state.iters:
        raise ValueError(f"cache is of step {cache.iters}, but state of step {state.iters}")
    grad_y, state = float64(grad_y), _float64(state)
    g = cache.r * cache.weight * grad_y
    gz = (g * cache.z).mean(axis=(0, 1))
    window = _put(state.buffer_gz, cache.iters, np.where(cache.skip, state.ema_gz, gz))
    m = np.where(cache.smooth, window.mean(axis=0), gz)
    ema = cache.momentum * state.ema_gz + (1 - cache.momentum) * m
    q = gz if exact_gradient else np.where(cache.skip, m, ema)
    grad_x = (g - q * cache.z) / cache.std
    grad_weight = (grad_y * cache.r * cache.z).sum(axis=(0, 1))
    return grad_x, grad_weight, grad_y.sum(axis=(0, 1)), state._replace(buffer_gz=window, ema_gz=ema)


def un_train_step(x, grad_y, weight, bias, state: UNState, *, exact_gradient=False, **options):
    """(y, grad_x, grad_weight, grad_bias, state) of one step: forward, then backward with its options."""
    y, cache, state = un_train_forward(x, weight, bias, state, **options)
    *grads, state = un_train_backward(grad_y, cache, state, exact_gradient=exact_gradient)
    return y, *grads, state


def un_train_steps(x, grad_y, weight, bias, state: UNState, **options):
    """`un_train_step` over a leading axis of steps: x, grad_y [T, B, N, C]; mask [B, N] holds for all.

    Results and states (after each step's backward pass) are stacked along the same axis.
    """
    dims(x=(x, "T B N C"), grad_y=(grad_y, "T B N C"))
    if len(x) < 1:
        raise ValueError("x must hold at least one step")
    steps = []
    for t in range(len(x)):
        steps.append(un_train_step(x[t], grad_y[t], weight, bias, state, **options))
        state = steps[-1][-1]
    *results, states = zip(*steps, strict=True)
    return *map(np.stack, results), UNState(*map(np.stack, zip(*states, strict=True)))


def un_inference(x, weight, bias, running_var, *, eps=1e-5):
    """weight x / sqrt(running_var + eps) + bias: a fixed affine map of every channel. x [..., C]."""
    dims(x=(x, "... C"), weight=(weight, "C"), bias=(bias, "C"), running_var=(running_var, "C"))
    return float64(weight) * float64(x) / np.sqrt(float64(running_var) + eps) + bias


def fuse_un_into_next_linear(weight, bias, running_var, w, b, *, eps=1e-5):
    """(w', b') with x w' + b' = un_inference(x) w + b: w [C, F], b [F].

    Legal also where a residual branch leaves before the norm.
    """
    dims(weight=(weight, "C"), bias=(bias, "C"), running_var=(running_var, "C"), w=(w, "C F"), b=(b, "F"))
    a = float64(weight) / np.sqrt(float64(running_var) + eps)
    return a[:, None] * w, b + float64(bias) @ w


def fuse_un_into_previous_linear(weight, bias, running_var, w, b, *, eps=1e-5):
    """(w', b') with x w' + b' = un_inference(x w + b): w [F, C], b [C]. Not with a residual in between."""
    dims(weight=(weight, "C"), bias=(bias, "C"), running_var=(running_var, "C"), w=(w, "F C"), b=(b, "C"))
    a = float64(weight) / np.sqrt(float64(running_var) + eps)
    return float64(w) * a, a * b + bias


def norm_cost(tokens, channels, *, kind="layer", itemsize=4):
    """(bytes, flops) of a norm at inference: "layer", "un" (a multiply-add a number) or "un_fused" (nothing).

    Read and write once each. Layer norm: two sums, difference, square, scale, weight and bias, about 8
    operations a number.
    """
    if kind not in ("layer", "un", "un_fused"):
        raise ValueError(f'kind must be "layer", "un" or "un_fused", got {kind!r}')
    flops = {"layer": 8 * tokens * channels, "un": 2 * tokens * channels, "un_fused": 0}[kind]
    return (0 if kind == "un_fused" else 2 * tokens * channels * itemsize), flops


def geometric_mean(window):
    """exp(mean log) over the first axis; a zero makes it zero."""
    with np.errstate(divide="ignore"):
        return np.exp(np.log(float64(window)).mean(axis=0))


def _float64(state):
    """The state with its statistics in float64; the counters stay."""
    return UNState(*float64(*state[:4]), *state[4:])


def _put(buffer, t, row):
    """The buffer with `row` in slot t mod M: the first step goes to slot 1."""
    slot = np.arange(len(buffer))[:, None] == t % len(buffer)
    return np.where(slot, row, buffer)


def _check(x, weight, bias, state, mask, momentum):
    n = dims(
        x=(x, "B N C"), weight=(weight, "C"), bias=(bias, "C"), running_var=(state.running_var, "C"),
        ema_gz=(state.ema_gz, "C"), buffer_x2=(state.buffer_x2, "M C"), buffer_gz=(state.buffer_gz, "Mb C"),
    )  # fmt: skip
    if not 0 < momentum < 1:
        raise ValueError(f"momentum must be in (0, 1), got {momentum}")
    if mask is not None:
        dims(x=(x, "B N C"), mask=(mask, "B N"))
        if mask.dtype != bool:
            raise ValueError(f"mask must be boolean, True = counted, got dtype {mask.dtype}")
    if n["B"] * n["N"] == 0 or (isinstance(mask, np.ndarray) and not mask.any()):
        raise ValueError("mask must leave at least one token to take the statistic from")


def example(seed=0):
    """Two sequences of six hidden states of SmolLM2, scaled to their mean square, in 12 channels."""
    from ref.data import hidden_states

    rng = np.random.default_rng(seed)
    h = hidden_states()[1:49, :12]
    x = (h / np.sqrt((h**2).mean())).reshape(4, 2, 6, 12)
    grad_y, weight, bias = rng.standard_normal(x.shape), rng.uniform(0.5, 1.5, 12), rng.standard_normal(12)
    state = init_un(12, window=3)
    states = un_train_steps(x, grad_y, weight, bias, state, warmup=0)[-1]
    mask = np.ones((2, 6), bool)
    mask[1, 4:] = False
    options = {"warmup": 0, "outlier_filtration": True}
    _, cache, after = un_train_forward(x[3], weight, bias, UNState(*(s[2] for s in states)), **options)
    var, w, b = after.running_var, rng.standard_normal((12, 8)), rng.standard_normal(8)
    # The training pair has an approximate gradient on purpose, so it is not compared with the exact one.
    return [
        Example("un_train_forward", (x[0], weight, bias, state), {"warmup": 0, "mask": mask}),
        Example("un_train_backward", (grad_y[3], cache, after)),
        Example("un_train_step", (x[0], grad_y[0], weight, bias, state), {"warmup": 0}),
        Example("un_train_steps", (x, grad_y, weight, bias, state), options),
        Example("un_inference", (x[0], weight, bias, var), {}, (0, 1, 2, 3)),
        Example("amgm_gap", (states.buffer_x2[3],), {}, (0,)),
        Example("fuse_un_into_next_linear", (weight, bias, var, w, b), {}, (0, 1, 2, 3, 4)),
        Example("fuse_un_into_previous_linear", (weight, bias, var, w.T, bias), {}, (0, 1, 2, 3, 4)),
    ]
