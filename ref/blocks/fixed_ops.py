"""A transformer's operators in 32 bit fixed point, integer for integer what Edge-MoE's hardware computes.

Feature maps are integers in steps of 2^-22 (<32, 10>), weights in steps of 2^-14, biases and gains of norms
in steps of 2^-11. Every product is floored to a step of a feature map, sums wrap. exp, reciprocal and square
root are the floored double precision value. Source: the HLS code of Edge-MoE (arXiv 2305.18691).
"""

from typing import NamedTuple

import numpy as np

from ref.blocks.fixed import Fixed, fixed_matmul
from ref.blocks.gate import build_expert_queues
from ref.blocks.mlp import gelu
from ref.dims import dims

FM = Fixed(32, 10)
WEIGHT = Fixed(16, 2)
ATTN_BIAS = Fixed(16, 7)
BIAS = Fixed(16, 5)
PATCH_WEIGHT = Fixed(16, 0)
PIXEL = Fixed(8, 0, signed=False)
FM_EPS = 4  # 1e-6 floored to a step
S = 1 << 22
GELU_END = 5.5  # where the table ends and GELU is ReLU to a step


class MoEParams(NamedTuple):
    """w_gate [E, D], or [tasks, E, D]; experts w1 [E, F, D], b1 [E, F], w2 [E, D, F], b2 [E, D]."""

    w_gate: np.ndarray
    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray


def gelu_table(*, step_log2=5, frac_bits=22):
    """ReLU(i / 2^step_log2) - GELU(there) in steps of 2^-frac_bits, i = 0 .. 5.5 2^step_log2: int32 [177]."""
    if step_log2 < 1 or not 1 <= frac_bits <= 30:
        raise ValueError(f"need step_log2 >= 1 and frac_bits in 1..30, got {step_log2=}, {frac_bits=}")
    x = np.arange(int(GELU_END * 2**step_log2) + 1) / 2**step_log2
    return np.rint((x - gelu(x)) * 2.0**frac_bits).astype(np.int32)


def gelu_fixed(x):
    """ReLU(x) - delta(|x|), delta interpolated between the table's entries: integers of any shape."""
    x = _integers(x, "x")
    table = gelu_table().astype(np.int64)
    size = np.abs(x)
    i = np.minimum(size >> 17, len(table) - 2)  # 32 |x|, and 22 bits after its point
    t = (size & ((1 << 17) - 1)) << 5
    delta = (table[i] * S + t * (table[i + 1] - table[i])) >> 22
    return np.maximum(x, 0) - np.where(size >> 17 >= len(table) - 1, 0, delta)


def layer_norm_fixed(x, w, b, *, eps=1e-6):
    """Layer norm in one pass, variance E[x^2] - E[x]^2 + eps: x [N, D], w and b [D] (steps of 2^-11).

    A variance that truncation left below 1 step counts as one.
    """
    n = dims(x=(x, "N D"), w=(w, "D"), b=(b, "D"))
    x, w, b = _integers(x, "x"), _integers(w, "w"), _integers(b, "b")
    t = x * (S // n["D"]) >> 22
    mean = FM.fit(t.sum(-1, keepdims=True))
    mean_sq = FM.fit((x * t >> 22).sum(-1, keepdims=True))
    var = np.maximum(mean_sq - (mean * mean >> 22) + int(np.floor(eps * S)), 1)
    sd = np.floor(np.sqrt(var / S) * S).astype(np.int64)
    y = FM.fit(x - mean) * FM.fit(S * S // sd) >> 22
    return FM.fit((FM.fit(y) * w >> 11) + (b << 11))


def linear_fixed(x, w, b):
    """b + sum floor(x w): x [N, K], w [M, K] (steps of 2^-14), b [M] (steps of 2^-11) -> [N, M]."""
    dims(x=(x, "N K"), w=(w, "M K"), b=(b, "M"))
    x, w, b = _integers(x, "x"), _integers(w, "w"), _integers(b, "b")
    return fixed_matmul(x, w, fx=FM, fw=WEIGHT, facc=FM, bias_raw=b << 11)


def reordered_attention_fixed(q, k, v, *, scale, lanes=4):
    """(out [H, N, d], max [H, N], 1 / sum [H, N]): attention with query n starting at key n mod lanes.

    Args: q, k, v [H, N, d], d a multiple of 8; scale: real, floored to a step.
    Raises: ValueError naming the argument.
    """
    n = dims(q=(q, "H N d"), k=(k, "H N d"), v=(v, "H N d"))
    check_lanes(n["N"], lanes)
    if n["d"] % 8:
        raise ValueError(f"the head size must be a multiple of 8, got {n['d']}")
    q, k, v = (_integers(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))
    factor = int(np.floor(scale * S))
    logits = np.zeros((n["H"], n["N"], n["N"]), np.int64)
    for at in range(0, n["d"], 8):  # each block of 8 is scaled by itself
        products = q[:, :, None, at : at + 8] * k[:, None, :, at : at + 8] >> 22
        logits = FM.fit(logits + FM.fit(FM.fit(products.sum(-1)) * factor >> 22))
    m, s = np.zeros((2, n["H"], n["N"]), np.int64)
    for lane in range(lanes):
        m[:, lane::lanes], s[:, lane::lanes] = single_pass_fixed(logits[:, lane::lanes], start=lane)
    recip = FM.fit(S * S // s)
    p = exp_fixed(logits - m[..., None]) * recip[..., None] >> 22
    out = np.zeros_like(q)
    for key in range(n["N"]):
        out = FM.fit(out + (p[..., key, None] * v[:, None, key] >> 22))
    return out, m, recip


def single_pass_fixed(logits, *, start=0):
    """(max, sum of exp(logit - max)) over the last axis in one pass, from `start` on and around."""
    m = np.full(logits.shape[:-1], FM.least, np.int64)
    s = np.zeros(logits.shape[:-1], np.int64)
    for j in np.roll(np.arange(logits.shape[-1]), -start):
        a = logits[..., j]
        larger = a > m
        e = exp_fixed(-np.abs(a - m))  # one bit wider than the logits
        s = FM.fit(np.where(larger, (s * e >> 22) + S, s + e))
        m = np.where(larger, a, m)
    return m, s


def exp_fixed(a):
    """floor(e^(a / S) S) for integers a <= 0."""
    return np.floor(np.exp(a / S) * S).astype(np.int64)


def moe_fixed(x, params: MoEParams, *, top_k=2):
    """(y [N, D], queue [E, N], queue_scores [E, N], lengths [E]): gate, queues, and one expert after another.

    x [N, D]; params hold integers, one gate. Of equal logits the lower expert is chosen.
    """
    p = MoEParams(*(_integers(a, name) for name, a in zip(MoEParams._fields, params, strict=True)))
    n = dims(x=(x, "N D"), w_gate=(p.w_gate, "E D"), w1=(p.w1, "E F D"), w2=(p.w2, "E D F"))
    x = _integers(x, "x")
    if not 1 <= top_k <= n["E"]:
        raise ValueError(f"top_k must be in 1..{n['E']}, the experts, got {top_k}")
    logits = fixed_matmul(x, p.w_gate, fx=FM, fw=WEIGHT, facc=FM)
    m, s = single_pass_fixed(logits)
    chosen = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    scores = exp_fixed(np.take_along_axis(logits, chosen, -1) - m[:, None]) * S // s[:, None]
    queue, held, lengths, active = build_expert_queues(chosen, scores, num_experts=n["E"])
    y = np.zeros_like(x)
    for e in active:
        rows = queue[e, : lengths[e]]
        hidden = gelu_fixed(linear_fixed(x[rows], p.w1[e], p.b1[e]))
        out = linear_fixed(hidden, p.w2[e], p.b2[e])
        y[rows] = FM.fit(y[rows] + (out * held[e, : lengths[e], None] >> 22))
    return y, queue, held, lengths


def check_lanes(n, lanes):
    """Raise ValueError unless 1 <= lanes < n: every lane starts with a key of its own."""
    if not 1 <= lanes < n:
        raise ValueError(f"lanes must be in 1..{n - 1}, fewer than the tokens, got {lanes}")


def _integers(x, name):
    x = np.asarray(x)
    if x.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {x.dtype}")
    return x.astype(np.int64)
