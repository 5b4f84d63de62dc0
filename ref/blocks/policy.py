"""Losses that train a policy from its own experience, each with its gradient: V-MPO, actor-critic, PPO.

Source: Song et al. 2019 (arXiv 1909.12238, V-MPO, equations 3 to 9); Mnih et al. 2016 (A2C); Schulman et al.
2017 (PPO, equation 7). Actions are discrete, a policy is given by its logits. Every loss returns (loss,
metrics, PolicyGrads); targets, old policies and advantages are constants.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.softmax import log_softmax, logsumexp
from ref.checks import check_ids
from ref.dims import dims, float64


class PolicyGrads(NamedTuple):
    """Gradients of a loss: logits [B, T, A], values [B, T]; eta and alpha of V-MPO, else None."""

    logits: np.ndarray
    values: np.ndarray
    eta: float | None = None
    alpha: float | None = None


class VMPOMetrics(NamedTuple):
    """The four terms of the loss, the mean KL(target || policy), and psi [B, T], 0 where not chosen."""

    policy: float
    value: float
    temperature: float
    trust: float
    kl: float
    psi: np.ndarray


def vmpo_loss(logits, target_logits, values, actions, returns, eta, alpha, *, top=0.5, eps_eta=0.1,
              eps_alpha=0.005):  # fmt: skip
    """(loss, VMPOMetrics): policy + value + temperature + trust region, with advantages A = G - V.

    The ceil(top N) largest of all N = B T advantages, the first of equals, have weights psi = softmax(A /
    eta): -sum psi log pi(a) + mean (V - G)^2 / 2 + eta eps_eta + eta log mean exp(A / eta)
    + mean (alpha (eps_alpha - KL) + alpha KL), where the first KL and the second alpha are constants.
    Args: logits, target_logits [B, T, A], of the policy and the target policy that acted; values, returns
      [B, T]; actions int [B, T]; eta, alpha > 0. Raises: ValueError naming the argument at fault.
    """
    p = _vmpo_parts(logits, target_logits, values, actions, returns, eta, alpha, top)
    own = np.take_along_axis(p.log_pi, np.asarray(actions)[..., None], axis=-1)[..., 0]
    policy = -np.sum(p.psi * own)
    value = 0.5 * np.mean(p.advantage**2)
    temperature = eta * eps_eta + eta * p.log_mean
    trust = alpha * (eps_alpha - p.kl.mean()) + alpha * p.kl.mean()
    return policy + value + temperature + trust, VMPOMetrics(
        policy, value, temperature, trust, p.kl.mean(), p.psi
    )


def vmpo_loss_vjp(logits, target_logits, values, actions, returns, eta, alpha, *, top=0.5, eps_eta=0.1,
                  eps_alpha=0.005):  # fmt: skip
    """PolicyGrads of `vmpo_loss`."""
    p = _vmpo_parts(logits, target_logits, values, actions, returns, eta, alpha, top)
    pi, old = np.exp(p.log_pi), np.exp(p.log_old)
    dlogits = p.psi[..., None] * (pi - _one_hot(actions, pi.shape[-1])) + alpha * (pi - old) / p.kl.size
    mean_advantage = np.sum(p.psi * p.advantage)
    return PolicyGrads(
        dlogits,
        -p.advantage / p.kl.size,
        eps_eta + p.log_mean - mean_advantage / eta,
        eps_alpha - p.kl.mean(),
    )


def a2c_loss(logits, values, actions, returns, *, entropy=0.0):
    """(loss, PolicyGrads): mean of -A log pi(a) + (V - G)^2 / 2 - entropy H(pi), A = G - V constant."""
    _check_policy(logits, values, actions, returns)
    log_pi, advantage = log_softmax(logits), float64(returns) - float64(values)
    pi, n, chosen = np.exp(log_pi), advantage.size, _one_hot(actions, logits.shape[-1])
    H = -np.sum(pi * log_pi, axis=-1, keepdims=True)
    loss = (
        -np.mean(advantage * np.sum(chosen * log_pi, axis=-1))
        + 0.5 * np.mean(advantage**2)
        - entropy * H.mean()
    )
    dlogits = (advantage[..., None] * (pi - chosen) + entropy * pi * (log_pi + H)) / n
    return loss, PolicyGrads(dlogits, -advantage / n)


def ppo_loss(logits, old_logits, values, actions, returns, *, clip=0.2, entropy=0.0):
    """(loss, PolicyGrads): mean of -min(w A, clip(w, 1 - clip, 1 + clip) A) + (V - G)^2 / 2 - entropy H(pi).

    w = pi(a) / pi_old(a), old_logits [B, T, A] those that acted; A = G - V constant.
    """
    _check_policy(logits, values, actions, returns)
    dims(logits=(logits, "B T A"), old_logits=(old_logits, "B T A"))
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    log_pi, advantage = log_softmax(logits), float64(returns) - float64(values)
    pi, n, chosen = np.exp(log_pi), advantage.size, _one_hot(actions, logits.shape[-1])
    ratio = np.exp(np.sum(chosen * (log_pi - log_softmax(old_logits)), axis=-1))
    open_, shut = ratio * advantage, np.clip(ratio, 1 - clip, 1 + clip) * advantage
    H = -np.sum(pi * log_pi, axis=-1, keepdims=True)
    loss = -np.mean(np.minimum(open_, shut)) + 0.5 * np.mean(advantage**2) - entropy * H.mean()
    passes = np.where(open_ <= shut, open_, 0.0)[..., None]
    return loss, PolicyGrads((passes * (pi - chosen) + entropy * pi * (log_pi + H)) / n, -advantage / n)


def discounted_returns(rewards, done, bootstrap, *, discount=0.99):
    """G_t = r_t + discount G_{t+1}, cut after done: rewards, done [B, T], bootstrap [B] -> [B, T]."""
    dims(rewards=(rewards, "B T"), done=(done, "B T"), bootstrap=(bootstrap, "B"))
    G, out = float64(bootstrap), np.zeros(rewards.shape)
    for t in reversed(range(rewards.shape[1])):
        G = rewards[:, t] + discount * np.where(done[:, t], 0.0, G)
        out[:, t] = G
    return out


class _Parts(NamedTuple):
    log_pi: np.ndarray
    log_old: np.ndarray
    advantage: np.ndarray
    kl: np.ndarray
    psi: np.ndarray
    log_mean: float


def _vmpo_parts(logits, target_logits, values, actions, returns, eta, alpha, top):
    n = _check_policy(logits, values, actions, returns)
    dims(logits=(logits, "B T A"), target_logits=(target_logits, "B T A"))
    if not (eta > 0 and alpha > 0):
        raise ValueError(f"eta and alpha must be positive, got {eta=}, {alpha=}")
    if not 0 < top <= 1:
        raise ValueError(f"top must be in (0, 1], got {top}")
    log_pi, log_old = log_softmax(logits), log_softmax(target_logits)
    advantage = float64(returns) - float64(values)
    kl = np.sum(np.exp(log_old) * (log_old - log_pi), axis=-1)
    flat = advantage.ravel()
    count = int(np.ceil(top * flat.size * (1 - 4 * np.finfo(float).eps)))  # 0.7 of ten are 7, not 7.000..1
    chosen = np.argsort(-flat, kind="stable")[:count]
    lse = logsumexp(flat[chosen] / eta)
    psi = np.zeros(flat.size)
    psi[chosen] = np.exp(flat[chosen] / eta - lse)
    return _Parts(log_pi, log_old, advantage, kl, psi.reshape(n), lse - np.log(len(chosen)))


def _one_hot(actions, size):
    return (np.asarray(actions)[..., None] == np.arange(size)).astype(np.float64)


def _check_policy(logits, values, actions, returns):
    """Check shapes and actions, return [B, T]."""
    actions = np.asarray(actions)
    n = dims(
        logits=(logits, "B T A"), values=(values, "B T"), actions=(actions, "B T"), returns=(returns, "B T")
    )
    if actions.size < 1:
        raise ValueError("actions must hold at least one step")
    check_ids("actions", actions, n["A"])
    return n["B"], n["T"]
