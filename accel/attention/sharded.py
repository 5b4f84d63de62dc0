"""Attention over several devices, for use inside `jax.shard_map`: sequences in parts, no part gathered.

`ring_attention` holds a part of the queries, keys and values on each device and sends keys and values once
round the ring (Liu, Zaharia, Abbeel 2023, arXiv 2310.01889); each step is `flash_attention` on what is
there, and the running softmax states are merged. With a causal mask the parts laid end to end are unequal
work, the first device being done after one step; `zigzag` gives each device one chunk from either end, and
every step is half a square for all. `decode_attention` leaves a cache in parts and merges the states of
single queries: what travels is d + 2 numbers a head, whatever the length. On one device both are plain.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from accel.attention.flash import flash_attention, flash_attention_bwd
from accel.attention.lean import lean_attention
from accel.blocks.softmax import SoftmaxState, finalize, merge, shift, wide
from ref.blocks.attention import check_attention

LAYOUTS = ("contiguous", "zigzag")


@dataclass(frozen=True)
class Ring:
    """What is static in a call."""

    axis_name: str
    causal: bool
    zigzag: bool
    scale: float | None
    impl: str
    interpret: bool

    def attend(self, q, k, v, causal=False):
        """The softmax state of q's rows over these keys, sums in at least float32."""
        o, lse = flash_attention(q, k, v, causal=causal, return_lse=True, **self.options)
        return SoftmaxState(lse, jnp.where(jnp.isneginf(lse), 0, 1).astype(lse.dtype), o.astype(lse.dtype))

    def differentiate(self, do, q, k, v, o, lse, causal=False):
        """(dq, dk, dv) of q's rows over these keys; o and lse are those over all keys of the ring."""
        grads = flash_attention_bwd(do, q, k, v, o, lse, causal=causal, **self.options)
        return tuple(g.astype(wide(g.dtype)) for g in grads)

    @property
    def options(self):
        """Options of flash_attention."""
        return {"scale": self.scale, "impl": self.impl, "interpret": self.interpret}

    def rotate(self, tree):
        """Each device's arrays sent to the next one."""
        size = lax.axis_size(self.axis_name)
        return lax.ppermute(tree, self.axis_name, [(i, (i + 1) % size) for i in range(size)])

    @property
    def steps(self):
        """How often the keys at hand were sent on, after the step with a device's own: 1, 2, .."""
        return jnp.arange(1, lax.axis_size(self.axis_name), dtype=jnp.int32)

    def past(self, step):
        """Whether the keys that arrive after `step` rotations come from a device before this one."""
        return step <= lax.axis_index(self.axis_name)


def ring_attention(
    q, k, v, *, axis_name, causal=False, layout="contiguous", scale=None, impl="auto", interpret=False
):
    """This device's rows of softmax(scale q k^T) v, the keys being those of all devices along `axis_name`.

    Args: q [..., H, L, D], k, v [..., Hkv, S, D]: the parts of this device, of equal sizes on all.
      axis_name: a mesh axis of the surrounding `jax.shard_map` over which the sequence is cut.
      causal: position i sees j <= i, of the whole sequence; needs L = S.
      layout: "contiguous": part n follows part n - 1. "zigzag": the whole sequence went through `zigzag`
        first; for causal attention, balanced, and L even.
      impl, interpret: of `flash_attention`, which does each step.
    Returns: [..., H, L, D] in q's dtype. Each of the steps rounds its result to q's dtype once.
    Differentiable once, in reverse mode: keys, values and their gradients go round once more; the memory of a
    device does not grow with their number. interpret needs `jax.shard_map(..., check_vma=False)`.
    Raises: ValueError naming the argument; NameError outside a `shard_map` that has the axis.
    """
    check_attention(q, k, v, None, None, None, 0.0)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if layout == "zigzag" and not causal:
        raise ValueError('layout="zigzag" balances a causal mask; without one use "contiguous"')
    L, S = q.shape[-2], k.shape[-2]
    if causal and L != S:
        raise ValueError(f"causal needs as many keys as queries, got q with L={L} and k with S={S}")
    if layout == "zigzag" and L % 2:
        raise ValueError(f'layout="zigzag" needs an even part of the sequence on each device, got L={L}')
    ring = Ring(axis_name, bool(causal), layout == "zigzag", scale, impl, bool(interpret))
    return _ring(ring, q, k, v)


def zigzag(x, parts, *, axis=-2):
    """x with the sequence along `axis` in zigzag order for `parts` devices: chunks 0, 2P - 1, 1, 2P - 2, ...

    Raises: ValueError if 2 x parts does not divide the sequence.
    """
    return _permuted(x, _order(parts), axis)


def unzigzag(x, parts, *, axis=-2):
    """The inverse of `zigzag`."""
    order = _order(parts)
    return _permuted(x, sorted(range(2 * parts), key=order.__getitem__), axis)


def decode_attention(q, k, v, *, axis_name, lengths=None, scale=None, impl="auto", interpret=False):
    """softmax(scale q k^T) v of one query a head over a cache whose keys lie in parts along `axis_name`.

    Args: q [B, H, D], the same on all devices; k, v [B, Hkv, S, D]: this device's part, contiguous.
      lengths: int [B]: keys of the whole cache that may be seen, from 1 to all (as inside any compiled
        function, not checked); None: all.
      impl, interpret: of `lean_attention`, which does each part.
    Returns: [B, H, D] in q's dtype, the same on all devices.
    Raises: as `lean_attention`.
    """
    mine = None
    if lengths is not None:
        mine = jnp.asarray(lengths) - lax.axis_index(axis_name) * k.shape[-2]
        lengths = jnp.clip(mine, 1, k.shape[-2])  # `lean_attention` takes no length of 0
    o, lse = lean_attention(
        q, k, v, lengths=lengths, scale=scale, return_lse=True, impl=impl, interpret=interpret
    )
    if mine is not None:
        some = (mine > 0)[:, None]
        o, lse = jnp.where(some[..., None], o, 0), jnp.where(some, lse, -jnp.inf)
    weight = jnp.exp(lse - shift(lax.pmax(lax.stop_gradient(lse), axis_name)))
    total = lax.psum(weight, axis_name)
    mean = lax.psum(weight[..., None] * o.astype(weight.dtype), axis_name)
    return (mean / jnp.where(total == 0, 1, total)[..., None]).astype(q.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring: Ring, q, k, v):
    return _forward(ring, q, k, v)[0]


def _forward(ring, q, k, v):
    kv = ring.rotate((k, v))  # keys are on their way while the products with those before them run
    state = ring.attend(q, k, v, causal=ring.causal)  # zigzag keeps the order of positions on a device

    def step(carry, t):
        state, kv = carry
        coming = ring.rotate(kv)
        return (_join(ring, t, state, q, *kv), coming), None

    (state, kv), _ = lax.scan(step, (state, kv), ring.steps[:-1])
    for t in ring.steps[-1:]:
        state = _join(ring, t, state, q, *kv)
    o, lse = finalize(state)
    o = o.astype(q.dtype)
    return o, (q, k, v, o, lse)


def _join(ring, t, state, q, k, v):
    """The state with the keys taken in that t rotations brought."""
    if not ring.causal:
        return merge(state, ring.attend(q, k, v))
    late = _late if ring.zigzag else lambda ring, state, q, k, v: state
    early = _early if ring.zigzag else lambda ring, state, q, k, v: merge(state, ring.attend(q, k, v))
    return lax.cond(ring.past(t), partial(early, ring), partial(late, ring), state, q, k, v)


def _early(ring, state, q, k, v):
    """Zigzag, keys of an earlier device: all rows see its first chunk, none its second."""
    return merge(state, ring.attend(q, _half(k, 0), _half(v, 0)))


def _late(ring, state, q, k, v):
    """Zigzag, keys of a later device: the rows of the second chunk see all of them."""
    new = merge(SoftmaxState(*_halves(state, 1)), ring.attend(_half(q, 1), k, v))
    join = lambda old, new, axis: jnp.concatenate([_half(old, 0, axis), new], axis)
    return SoftmaxState(join(state.m, new.m, -1), join(state.l, new.l, -1), join(state.acc, new.acc, -2))


def _backward(ring, saved, do):
    q, k, v, o, lse = saved
    rows = do, q, o, lse
    add = partial(jax.tree.map, jnp.add)

    def step(carry, t, last=False):
        dq, sums, kv = carry
        coming = None if last else ring.rotate(kv)
        sums = ring.rotate(sums)  # those of these keys, from the device that had them before
        new, mine = _pull(ring, t, rows, *kv)
        return (dq + new, add(sums, mine), coming), None

    kv = ring.rotate((k, v))
    dq, *sums = ring.differentiate(do, q, k, v, o, lse, causal=ring.causal)
    carry, _ = lax.scan(step, (dq, tuple(sums), kv), ring.steps[:-1])
    for t in ring.steps[-1:]:
        carry, _ = step(carry, t, last=True)
    dq, sums, _ = carry
    dk, dv = ring.rotate(sums)  # home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_ring.defvjp(_forward, _backward)


def _pull(ring, t, rows, k, v):
    """(dq, (dk, dv)) of the keys that t rotations brought, in float32 (float64)."""
    if not ring.causal:
        return _pull_all(ring, rows, k, v)
    early, late = (_pull_early, _pull_late) if ring.zigzag else (_pull_all, _pull_none)
    return lax.cond(ring.past(t), partial(early, ring), partial(late, ring), rows, k, v)


def _pull_all(ring, rows, k, v):
    """Every row saw every key."""
    do, q, o, lse = rows
    dq, dk, dv = ring.differentiate(do, q, k, v, o, lse)
    return dq, (dk, dv)


def _pull_none(ring, rows, k, v):
    """No row saw a key."""
    zeros = tuple(jnp.zeros_like(x, wide(x.dtype)) for x in (rows[1], k, v))
    return zeros[0], zeros[1:]


def _pull_early(ring, rows, k, v):
    do, q, o, lse = rows
    dq, dk, dv = ring.differentiate(do, q, _half(k, 0), _half(v, 0), o, lse)
    return dq, (_beside_zeros(dk, 0), _beside_zeros(dv, 0))


def _pull_late(ring, rows, k, v):
    do, q, o, lse = rows
    do, q, o = (_half(x, 1) for x in (do, q, o))
    dq, dk, dv = ring.differentiate(do, q, k, v, o, _half(lse, 1, -1))
    return _beside_zeros(dq, 1), (dk, dv)


def _half(x, which, axis=-2):
    return jnp.split(x, 2, axis)[which]


def _halves(state, which):
    return _half(state.m, which, -1), _half(state.l, which, -1), _half(state.acc, which)


def _beside_zeros(x, which):
    """x as one half of the rows, the other half zeros."""
    halves = [jnp.zeros_like(x)] * 2
    halves[which] = x
    return jnp.concatenate(halves, axis=-2)


def _order(parts):
    if parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}")
    return [c for n in range(parts) for c in (n, 2 * parts - 1 - n)]


def _permuted(x, order, axis):
    size = x.shape[axis]
    if size % len(order):
        raise ValueError(f"zigzag for {len(order) // 2} parts needs a multiple of {len(order)}, got {size}")
    chunks = jnp.split(x, len(order), axis)
    return jnp.concatenate([chunks[c] for c in order], axis)
