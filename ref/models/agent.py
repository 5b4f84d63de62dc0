"""An agent learns a policy from what it does: act, look back over the last steps, take a step of Adam, go on.

Any network with a memory can be the agent. Source of the schedule: Song et al. 2019 (arXiv 1909.12238): a
target policy acts, and is replaced by the learner's every few steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ref.blocks.mlp import linear, linear_vjp, sigmoid, softplus
from ref.blocks.optim import adam, adam_init
from ref.blocks.policy import a2c_loss, discounted_returns, ppo_loss, vmpo_loss_vjp
from ref.blocks.softmax import softmax
from ref.checks import one_of
from ref.tasks.environments import env_reset, env_step

LOSSES = ("vmpo", "a2c", "ppo")


class Agent(NamedTuple):
    """A network with memory, as functions; features have the given width.

    init(rng, observations) -> params; start(batch) -> memory; forget(memory, done [B]) -> memory without the
    finished episodes; forward(x [B, T, observations], memory, params, done [B, T]) -> (features [B, T,
    width], memory); backward(x, memory, params, dfeatures, done) -> gradients of params.
    """

    width: int
    init: Callable
    start: Callable
    forget: Callable
    forward: Callable
    backward: Callable


class Learner(NamedTuple):
    """What is learnt: the network, the heads of policy and value, V-MPO's temperature and trust.

    w_pi [D, A], b_pi [A]; w_v [D, 1], b_v [1]; of the raw temperature and trust the softplus is used.
    """

    net: Any
    w_pi: np.ndarray
    b_pi: np.ndarray
    w_v: np.ndarray
    b_v: np.ndarray
    eta: np.ndarray
    alpha: np.ndarray


def init_agent(key, env, agent: Agent):
    """A Learner for a spec of ref/tasks/environments.py, its heads near 0, eta = 1 and alpha = 5."""
    rng, D = np.random.default_rng(key), agent.width
    head = lambda n: 0.01 * rng.standard_normal((D, n))
    raw = lambda x: np.array(np.log(np.expm1(x)))
    net = agent.init(rng, env.observations)
    return Learner(net, head(env.actions), np.zeros(env.actions), head(1), np.zeros(1), raw(1.0), raw(5.0))


def train_agent(key, env, agent: Agent, *, steps, loss="vmpo", batch=16, unroll=24, lr=1e-3, discount=0.99,
                refresh=5, options=None):  # fmt: skip
    """[steps]: mean return of the episodes that ended in each learner's step (the last known if none did).

    Args: key: NumPy Generator or seed. env: a spec. loss: "vmpo", "a2c" or "ppo". batch worlds are acted in
      for unroll steps, then one step of Adam; every `refresh` of these the acting policy is brought up to
      date ("a2c":
      always). options: of the loss. Raises: ValueError naming the argument at fault.
    """
    one_of("loss", loss, LOSSES)
    if min(steps, batch, unroll, refresh) < 1:
        raise ValueError(
            f"steps, batch, unroll and refresh must be at least 1, got {steps}, {batch}, {unroll}, {refresh}"
        )
    rng, options = np.random.default_rng(key), options or {}
    learner = acting = init_agent(rng, env, agent)
    state, memory, curve, known = adam_init(learner), agent.start(batch), np.zeros(steps), 0.0
    worlds = [env_reset(rng, env) for _ in range(batch)]
    earned = np.zeros(batch)
    for step in range(steps):
        if loss == "a2c" or step % refresh == 0:
            acting = learner
        before, finished, x, actions, rewards, done = memory, [], [], [], [], []
        for _ in range(unroll):
            seen = np.stack([obs for _, obs in worlds])
            features, memory = agent.forward(seen[:, None], memory, acting.net, None)
            p = softmax(linear(features[:, 0], acting.w_pi, acting.b_pi))
            a = np.minimum((p.cumsum(axis=1) < rng.random((batch, 1))).sum(axis=1), env.actions - 1)
            moved = [env_step(s, act) for (s, _), act in zip(worlds, a, strict=True)]
            reward, over = np.array([m[2] for m in moved]), np.array([m[3] for m in moved])
            earned = earned + reward
            finished += list(earned[over])
            earned = np.where(over, 0.0, earned)
            worlds = [env_reset(rng, env) if m[3] else m[:2] for m in moved]
            memory = agent.forget(memory, over)
            for kept, new in zip((x, actions, rewards, done), (seen, a, reward, over), strict=True):
                kept.append(new)
        x, actions, rewards, done = (np.stack(z, axis=1) for z in (x, actions, rewards, done))
        last, _ = agent.forward(np.stack([obs for _, obs in worlds])[:, None], memory, learner.net, None)
        G = discounted_returns(
            rewards, done, linear(last[:, 0], learner.w_v, learner.b_v)[:, 0], discount=discount
        )
        old, _ = agent.forward(x, before, acting.net, done)
        grads = _gradients(
            learner, agent, x, before, done, linear(old, acting.w_pi, acting.b_pi), actions, G, loss, options
        )
        learner, state = adam(learner, grads, state, lr=lr)
        known = float(np.mean(finished)) if finished else known
        curve[step] = known
    return curve


def _gradients(learner, agent, x, memory, done, old_logits, actions, G, loss, options):
    """Learner of gradients of the loss over one unroll."""
    p = learner
    features, _ = agent.forward(x, memory, p.net, done)
    logits, values = linear(features, p.w_pi, p.b_pi), linear(features, p.w_v, p.b_v)[..., 0]
    deta = dalpha = np.zeros(())
    if loss == "vmpo":
        eta, alpha = (max(float(softplus(z)), 1e-8) for z in (p.eta, p.alpha))
        g = vmpo_loss_vjp(logits, old_logits, values, actions, G, eta, alpha, **options)
        deta, dalpha = g.eta * sigmoid(p.eta), g.alpha * sigmoid(p.alpha)
    elif loss == "a2c":
        _, g = a2c_loss(logits, values, actions, G, **options)
    else:
        _, g = ppo_loss(logits, old_logits, values, actions, G, **options)
    d1, dw_pi, db_pi = linear_vjp(features, p.w_pi, g.logits)
    d2, dw_v, db_v = linear_vjp(features, p.w_v, g.values[..., None])
    net = agent.backward(x, memory, p.net, d1 + d2, done)
    return Learner(net, dw_pi, db_pi, dw_v, db_v, np.asarray(deta), np.asarray(dalpha))
