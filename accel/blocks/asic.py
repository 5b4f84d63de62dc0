"""Functions of a unit that can only add and multiply, in JAX; see ref/blocks/asic.py for the definitions.

Registers are float32, or rounded to bfloat16 after every operation (acc="bf16"); a compiler may fuse a
multiply and an add, which moves a float32 register by half an ulp.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from accel.blocks.lanes import round_bf16
from accel.blocks.shapes import lift
from ref.blocks.asic import (
    GELU_CUBE,
    GELU_SCALE,
    LEAST,
    LN_2,
    LOG2_E,
    SEED,
    TAYLOR,
    asic_cycles,
    asic_work,
    check_acc,
    check_eps,
    check_last,
    check_order,
    check_real,
    check_steps,
)
from ref.dims import dims

__all__ = [
    "asic_cycles", "asic_work", "exp_taylor", "gelu_asic", "layernorm_asic", "reciprocal_newton",
    "rsqrt_newton", "softmax_asic",
]  # fmt: skip


class Unit:
    """Adders and multipliers, as ref's."""

    def __init__(self, acc="f32"):
        check_acc(acc)
        self.kept = round_bf16 if acc == "bf16" else lambda x: x

    def add(self, a, b):
        """a + b."""
        return self.kept(a + b)

    def mul(self, a, b):
        """a b."""
        return self.kept(a * b)

    def total(self, x):
        """Sum of the last axis, kept as an axis: a tree, neighbours first."""
        while (n := x.shape[-1]) > 1:
            pairs = self.add(x[..., 0 : n - n % 2 : 2], x[..., 1::2])
            x = jnp.concatenate([pairs, x[..., n - n % 2 :]], axis=-1) if n % 2 else pairs
        return x

    def exp(self, x, order=6):
        """x = n ln 2 + r, a polynomial in r, n added to the exponent."""
        x = jnp.clip(x, np.float32(-150), np.float32(150))
        n = jnp.floor(self.add(self.mul(x, LOG2_E), np.float32(0.5)))
        n = jnp.where(jnp.isnan(n), jnp.zeros_like(n), n)
        r = self.add(x, -self.mul(n, LN_2))
        y = jnp.full_like(r, TAYLOR[order])
        for c in TAYLOR[order - 1 :: -1]:
            y = self.add(self.mul(y, r), np.float32(c))
        half = jnp.floor(n * np.float32(0.5))
        y = self.kept(y * _power(half) * _power(n - half))
        return jnp.where(jnp.abs(y) < np.float32(LEAST), jnp.zeros_like(y), y)

    def reciprocal(self, x, steps=3):
        """Newton's y <- y (2 - m y) on the mantissa, then the exponent."""
        bits = lax.bitcast_convert_type(x, jnp.int32)
        m = _float((bits & np.int32(0x007FFFFF)) | np.int32(0x3F000000))
        y = self.add(self.mul(m, np.float32(-32 / 17)), np.float32(48 / 17))
        for _ in range(steps):
            y = self.mul(y, self.add(np.float32(2), -self.mul(m, y)))
        e = (lax.shift_right_logical(bits, jnp.full_like(bits, 23)) & np.int32(255)) - np.int32(126)
        half = lax.shift_right_arithmetic(e, jnp.ones_like(e))
        y = y * _power(-half) * _power(half - e)
        size, least = jnp.abs(x), np.float32(LEAST)
        y = jnp.where(y < least, jnp.zeros_like(y), y)
        y = jnp.where(size < least, np.float32(np.inf), jnp.where(size == np.float32(np.inf), 0 * least, y))
        sign = bits & np.int32(-(2**31))
        y = _float(lax.bitcast_convert_type(y, jnp.int32) | sign)
        return jnp.where(jnp.isnan(x), x, y)

    def rsqrt(self, x, steps=3):
        """y <- y (3/2 - x y^2 / 2) from a seed of bits."""
        bits = lax.bitcast_convert_type(x, jnp.int32)
        y = self.kept(_float(np.int32(SEED) - lax.shift_right_arithmetic(bits, jnp.ones_like(bits))))
        low = self.mul(x, np.float32(0.5))
        for _ in range(steps):
            y = self.mul(y, self.add(np.float32(1.5), -self.mul(self.mul(low, y), y)))
        inf, least = np.float32(np.inf), np.float32(LEAST)
        y = jnp.where(x == inf, jnp.zeros_like(y), jnp.where(jnp.abs(x) < least, inf, y))
        return jnp.where((x <= -least) | jnp.isnan(x), np.float32(np.nan), y)


def exp_taylor(x, *, order=6):
    """exp(x) by a Taylor polynomial, float32."""
    check_real("x", x)
    check_order(order)
    return _exp(x, order=order)


@partial(jax.jit, static_argnames="order")
def _exp(x, *, order):
    return Unit().exp(x.astype(jnp.float32), order)


def reciprocal_newton(x, *, steps=3):
    """1 / x by Newton steps, float32."""
    check_real("x", x)
    check_steps(steps)
    return _reciprocal(x, steps=steps)


@partial(jax.jit, static_argnames="steps")
def _reciprocal(x, *, steps):
    return Unit().reciprocal(x.astype(jnp.float32), steps)


def rsqrt_newton(x, *, steps=3):
    """1 / sqrt(x) by Newton steps, float32."""
    check_real("x", x)
    check_steps(steps)
    return _rsqrt(x, steps=steps)


@partial(jax.jit, static_argnames="steps")
def _rsqrt(x, *, steps):
    return Unit().rsqrt(x.astype(jnp.float32), steps)


def softmax_asic(x, *, acc="f32"):
    """exp(x - max x) / sum over the last axis, each step written as bfloat16. x [..., n] -> float32."""
    check_last("x", x)
    return _softmax(x, acc=acc)


@partial(jax.jit, static_argnames="acc")
def _softmax(x, *, acc):
    u, x = Unit(acc), round_bf16(x)
    e = round_bf16(u.exp(u.add(x, -x.max(axis=-1, keepdims=True))))
    return round_bf16(u.mul(e, round_bf16(u.reciprocal(round_bf16(u.total(e))))))


def layernorm_asic(x, g, b, *, eps=1e-5, acc="f32"):
    """(x - mean) / sqrt(variance + eps) g + b over the last axis. x [..., n], g and b [n] -> float32."""
    dims(x=(x, "... n"), g=(g, "n"), b=(b, "n"))
    check_last("x", x)
    check_eps(eps)
    return _layernorm(x, g, b, eps=float(eps), acc=acc)


@partial(jax.jit, static_argnames=("eps", "acc"))
def _layernorm(x, g, b, *, eps, acc):
    u, x = Unit(acc), round_bf16(x)
    g, b = lift(round_bf16(g), x.ndim), lift(round_bf16(b), x.ndim)
    share = np.float32(1 / x.shape[-1])
    mean = round_bf16(u.mul(u.total(x), share))
    centred = u.add(x, -mean)
    variance = round_bf16(u.mul(u.total(u.mul(centred, centred)), share))
    root = round_bf16(u.rsqrt(u.add(variance, np.float32(eps))))
    return round_bf16(u.add(u.mul(u.mul(centred, root), g), b))


def gelu_asic(x, *, acc="f32"):
    """x / (1 + exp(-2 u)), GELU by its tanh form. x [...] -> float32."""
    check_real("x", x)
    return _gelu(x, acc=acc)


@partial(jax.jit, static_argnames="acc")
def _gelu(x, *, acc):
    u, x, one = Unit(acc), round_bf16(x), np.float32(1)
    cube = u.add(u.mul(u.mul(x, x), GELU_CUBE), one)
    e = u.exp(u.mul(u.mul(x, GELU_SCALE), cube))
    return round_bf16(u.mul(x, u.add(one, -u.reciprocal(u.add(e, one)))))


def _float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)


def _power(n):
    """2^n of whole numbers in -126..127: a number that is all exponent."""
    n = n.astype(jnp.int32) + np.int32(127)
    return _float(lax.shift_left(n, jnp.full_like(n, 23)))
