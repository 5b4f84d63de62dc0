"""A low-rank vision transformer in int8 for microcontrollers: scales, codes and operators.

Operators: ref/blocks/int8_ops.py (CMSIS-NN's rounding). Weights are symmetric by output channel, activations
affine by tensor; k, v and the tables of relative positions play the weights' part in products, and are
symmetric by tensor. How the operators share memory: ref/blocks/vit_schedules.py.
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.int8_ops import (
    add_params_s8,
    add_s8,
    layernorm_s8,
    make_lut_s8,
    matmul_s8,
    norm_params_s8,
    softmax_params_s8,
    softmax_s8,
)
from ref.blocks.integer import quantize_multiplier, requantize
from ref.blocks.mlp import gelu
from ref.blocks.quantize import affine_params, quantize, symmetric_params

FORMS = ("s8", "exponential")
PIXEL = (1 / 255, -128)  # scale and zero point of code = pixel - 128
WEIGHT = (1 / 256, -128)  # of attention weights
FINE = 0.0025  # the coarsest scale given to the integer exponential, whose ln 2 is a whole number of steps


class Linear8(NamedTuple):
    """Arguments of `matmul_s8` but x: w int8 [out, in], b int32, multiplier and shift [out], offsets."""

    w: np.ndarray
    b: np.ndarray | None
    multiplier: np.ndarray
    shift: np.ndarray
    input_offset: int
    output_offset: int

    def __call__(self, x):
        """x [M, in] -> [M, out]."""
        return matmul_s8(x, self.w, self.b, self.multiplier, self.shift, input_offset=self.input_offset,
                         output_offset=self.output_offset)  # fmt: skip


class Product8(NamedTuple):
    """A product of two activations, the second with zero point 0."""

    multiplier: int
    shift: int
    input_offset: int
    output_offset: int

    def __call__(self, x, w):
        """x [M, K], w [N, K] -> [M, N]."""
        return matmul_s8(x, w, None, self.multiplier, self.shift, input_offset=self.input_offset,
                         output_offset=self.output_offset)  # fmt: skip

    def sums(self, x, w):
        """The int32 sums that `finish` brings to int8: what a kernel keeps of a row while it works on it."""
        return ((x.astype(np.int32) + self.input_offset) @ w.T.astype(np.int32)).astype(np.int32)

    def finish(self, acc):
        """int32 -> int8."""
        y = requantize(acc, self.multiplier, self.shift).astype(np.int64) + self.output_offset
        return np.clip(y, -128, 127).astype(np.int8)


class Add8(NamedTuple):
    """Arguments of `add_s8` but its inputs."""

    options: tuple

    def __call__(self, x1, x2):
        """x1 + x2."""
        return add_s8(x1, x2, **dict(self.options))


class Norm8(NamedTuple):
    """Arguments of `layernorm_s8` but x."""

    gamma: np.ndarray
    beta: np.ndarray
    input_offset: int
    multiplier: int
    shift: int
    output_offset: int

    def __call__(self, x):
        """x [M, E] -> [M, E]."""
        return layernorm_s8(x, self.gamma, self.beta, input_offset=self.input_offset, shift=self.shift,
                            multiplier=self.multiplier, output_offset=self.output_offset)  # fmt: skip


class Softmax8(NamedTuple):
    """Rows of int8 logits to weights of 1/256; form "s8" CMSIS-NN's, "exponential" I-BERT's integer exp."""

    scale: float
    form: str

    def __call__(self, x):
        """x [R, N] -> [R, N]."""
        if self.form == "s8":
            multiplier, shift, diff_min = softmax_params_s8(input_scale=self.scale)
            return softmax_s8(x, multiplier=multiplier, shift=shift, diff_min=diff_min)
        p, _ = _integer_exp()[1](*_finer(x, self.scale))  # 2^-15
        return np.clip(((p + 64) >> 7) - 128, -128, 127).astype(np.int8)


class Near8(NamedTuple):
    """Tables of relative positions, int8 [2 most + 2, d]; a row of one plus a row of the other is int8."""

    v: np.ndarray
    h: np.ndarray
    most: int

    def rows(self, i, n):
        """int8 [n, d]: the embeddings of token i's distances to all tokens, added as a kernel reads them."""
        side, at = max(int(np.sqrt(n - 1)), 1), np.arange(n - 1)
        out = np.zeros((n, self.v.shape[1]), np.int8)
        for table, place in ((self.v, at // side), (self.h, at % side)):
            row = np.zeros(n, int)  # the class token's
            if i:
                row[1:] = np.clip(place - place[i - 1], -self.most, self.most) + self.most + 1
            out += table[row]
        return out


class Layer8(NamedTuple):
    """One layer; near, join, offsets and merge are None without relative positions."""

    norm1: Norm8
    qkv: tuple[Linear8, ...]
    heads_of: tuple[Linear8, Linear8, Linear8]
    scores: Product8
    near: Product8 | None
    join: Add8 | None
    softmax: Softmax8
    values: Product8
    offsets: Product8 | None
    merge: Add8 | None
    r_k: Near8 | None
    r_v: Near8 | None
    proj: tuple[Linear8, ...]
    add1: Add8
    norm2: Norm8
    fc1: tuple[Linear8, ...]
    gelu: np.ndarray
    fc2: tuple[Linear8, ...]
    add2: Add8


class QModel(NamedTuple):
    """An int8 network. logit_scale: what a unit of the int32 logits is worth."""

    image: int
    channels: int
    patch: int
    heads: tuple[int, ...]
    head_dim: int
    pooling: str
    embed: Linear8
    positions: np.ndarray
    place: Add8
    first: np.ndarray
    layers: tuple[Layer8, ...]
    norm: Norm8
    pool: tuple[int, int, int, int]
    w_head: np.ndarray
    b_head: np.ndarray
    logit_scale: float

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return len(self.positions) + 1

    def nonvolatile_bytes(self) -> int:
        """Bytes of weights, biases, tables and multipliers."""
        arrays = []
        walk = lambda t: [walk(x) for x in t] if isinstance(t, tuple) else arrays.append(t)
        walk(tuple(self))
        return sum(a.nbytes for a in arrays if isinstance(a, np.ndarray))


def frame(image, patch):
    """(zeros before the first pixel, patches a side) of an image of image x image pixels.

    As released for patches of 28 and 32: always 6 and 8 zeros on each side, and what no whole patch covers is
    cut; at 240 pixels nothing is. Other patches: as many zeros as make the grid whole.
    """
    if patch in (28, 32):
        before = {28: 6, 32: 8}[patch]
        return before, (image + 2 * before) // patch
    return (-image % patch) // 2, -(-image // patch)


# From real numbers to codes


def build_int8(p, ranges, shape) -> QModel:
    """The network of a subnet's own parameters and {activation: (lo, hi)} as the float one names them."""
    affine = lambda name: tuple(np.asarray(v).item() for v in affine_params(*ranges[name], signed=True))
    even = lambda name: (symmetric_params(max(map(abs, ranges[name]))).item(), 0)
    d, forms = shape["head_dim"], shape["forms"]
    relative = bool(shape["max_distance"])
    tokens, out = affine("tokens"), affine("patches")
    pos = affine("positions")
    flat = p.w_patch.transpose(0, 2, 3, 1).reshape(len(p.w_patch), -1)
    layers, x = [], tokens
    for i, b in enumerate(p.blocks):
        at = lambda name, i=i: affine(f"{i}.{name}")
        even_at = lambda name, i=i: even(f"{i}.{name}")
        parts = np.split(b.qkv.w3, 3), np.split(b.qkv.b, 3)
        q, k, v = at("q"), even_at("k"), even_at("v")
        inner = at("norm1")
        chain, last = _linears(b.qkv, inner, [at("qkv1"), at("qkv2")])
        heads_of = tuple(_linear(w, bias, last, y) for w, bias, y in zip(*parts, (q, k, v), strict=True))
        logits, mixed = at("logits" if relative else "scores"), at("out" if relative else "values")
        tables = None, None
        near = join = offsets = merge = None
        if relative:
            most = shape["max_distance"]
            (r_k, s_k), (r_v, s_v) = _table(b.rel_k, most), _table(b.rel_v, most)
            tables = r_k, r_v
            near = _product(q, s_k / np.sqrt(d), at("near"))
            join = _add(at("scores"), at("near"), logits)
            offsets = _product(WEIGHT, s_v, at("offsets"))
            merge = _add(at("values"), at("offsets"), mixed)
        proj = _three(b.proj, mixed, [at("proj1"), at("proj2"), at("proj3")])
        x1, x2 = at("x1"), at("x2")
        hidden, active = at("hidden"), at("gelu")
        norm2 = at("norm2")
        layers.append(Layer8(
            _norm(b.ln1_w, b.ln1_b, x, inner), chain, heads_of,
            _product(q, k[0] / np.sqrt(d), at("scores")), near, join, Softmax8(logits[0], forms),
            _product(WEIGHT, v[0], at("values")), offsets, merge, *tables, proj,
            _add(x, at("proj3"), x1), _norm(b.ln2_w, b.ln2_b, x1, norm2),
            _three(b.fc1, norm2, [at("fc1.1"), at("fc1.2"), hidden]), _gelu_table(hidden, active, forms),
            _three(b.fc2, active, [at("fc2.1"), at("fc2.2"), at("fc2.3")]), _add(x1, at("fc2.3"), x2),
        ))  # fmt: skip
        x = x2
    norm, pooled = affine("norm"), affine("pooled")
    s_head = symmetric_params(np.abs(p.w_head).max()).item()
    patches = len(p.pos_embed) - 1
    share = patches if shape["pooling"] == "patch_mean" else 1
    return QModel(
        shape["image"], shape["channels"], shape["patch"], tuple(shape["heads"]), d, shape["pooling"],
        _linear(flat, p.b_patch, PIXEL, out), _codes(p.pos_embed[1:], pos), _add(out, pos, tokens),
        _codes(p.cls_token + p.pos_embed[0], tokens), tuple(layers), _norm(p.norm_w, p.norm_b, x, norm),
        (*_multiplier(norm[0] / (share * pooled[0])), norm[1] * share, pooled[1]),
        quantize(p.w_head, s_head, 0, qmin=-127, qmax=127).astype(np.int8),
        _bias(p.b_head, pooled[0] * s_head) - pooled[1] * _sum_rows(p.w_head, s_head), pooled[0] * s_head,
    )  # fmt: skip


def _multiplier(real):
    return tuple(int(v) for v in quantize_multiplier(real))


def _codes(x, y):
    return quantize(x, *y, qmin=-128, qmax=127).astype(np.int8)


def _bias(b, unit):
    return np.clip(np.rint(np.asarray(b, np.float64) / unit), -(2**30), 2**30).astype(np.int32)


def _sum_rows(w, scale):
    return quantize(w, scale, 0, qmin=-127, qmax=127).astype(np.int32).sum(axis=1)


def _linear(w, b, x, y):
    scale = symmetric_params(np.abs(w).max(axis=1))
    codes = quantize(w, scale, np.zeros(len(w), np.int32), qmin=-127, qmax=127, axis=0).astype(np.int8)
    bias = None if b is None else _bias(b, x[0] * scale)
    return Linear8(codes, bias, *quantize_multiplier(x[0] * scale / y[0]), -x[1], y[1])


def _linears(f, x, between):
    """The factors before the last one, and the scale and zero point behind them."""
    chain = []
    for w, y in zip((f.w1, f.w2), between, strict=True):
        chain.append(_linear(w, None, x, y))
        x = y
    return tuple(chain), x


def _three(f, x, outs):
    chain, last = _linears(f, x, outs[:2])
    return (*chain, _linear(f.w3, f.b, last, outs[2]))


def _product(x, w_scale, y):
    return Product8(*_multiplier(x[0] * w_scale / y[0]), -x[1], y[1])


def _add(a, b, y):
    m1, s1, m2, s2, m, s = add_params_s8(a[0], b[0], y[0])
    return Add8((
        ("input1_offset", -a[1]), ("input1_multiplier", m1), ("input1_shift", s1), ("input2_offset", -b[1]),
        ("input2_multiplier", m2), ("input2_shift", s2), ("output_offset", y[1]), ("output_multiplier", m),
        ("output_shift", s),
    ))  # fmt: skip


def _norm(gamma, beta, x, y):
    gamma, beta, multiplier, shift = norm_params_s8(gamma, beta, y[0])
    return Norm8(gamma, beta, -x[1], multiplier, shift, y[1])


def _table(t, most):
    """(Near8, scale): one scale for both tables, such that the sum of a row of each stays within int8."""
    scale = max((np.abs(t.v).max() + np.abs(t.h).max()) / 126, 2.0**-23)
    return Near8(*(np.rint(np.asarray(a) / scale).astype(np.int8) for a in t), most), scale


def _integer_exp():
    from ref.compression import quantization as q  # beside its float forms; imported late, it imports blocks

    return q.i_exp_int, q.i_softmax_int


def _finer(x, scale):
    """Codes and scale with as many bits more (of a tiny scale, fewer) as the integer exponential wants."""
    bits = (
        max(0, int(np.ceil(np.log2(scale / FINE)))) if scale > 2e-4 else int(np.floor(np.log2(scale / 2e-4)))
    )
    x = x.astype(np.int64)
    return x << bits if bits >= 0 else x >> -bits, scale / 2.0**bits


def exponential_gelu(x, scale):
    """x sigma(1.702 x) for integer codes x of `scale`, by the integer exponential alone: real values."""
    codes, unit = _finer(np.asarray(x), 1.702 * scale)
    e, step = _integer_exp()[0](-np.abs(codes), unit)
    one = int(1 / step) >> 15
    e = np.minimum(e >> 15, one)
    sigma = (np.where(codes >= 0, one, e) << 15) // (one + e)  # 15 fraction bits
    return np.asarray(x) * sigma * (scale * 2.0**-15)


def _gelu_table(x, y, form):
    if form == "s8":
        return make_lut_s8(gelu, *x, *y)
    return make_lut_s8(lambda v: exponential_gelu(np.rint(v / x[0]).astype(np.int64), x[0]), *x, *y)
