"""MELTing point: language models measured on the device, and predicted from bytes, products and heat.

Source: Laskaridis et al. 2024 (MELT, arXiv 2403.12844) and the code released with it (MELT-public,
jetsonlab-public). The harness is ref/blocks/harness.py, power ref/blocks/power.py, the number formats
ref/blocks/formats.py, the network ref/models/llama.py; here are the quantised product, what quantisation
does to a model, and the closed forms for time, energy and heat. One multiply-accumulate is 2 FLOPs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.formats import block_of, check_raw, dequantize, quantize, row_bytes
from ref.blocks.harness import (
    Backend,
    BenchConfig,
    BenchReport,
    LlamaBackend,
    LoadRecord,
    PromptRecord,
    Sampling,
    open_run,
    pick,
    run_benchmark,
    summarize,
    write_events,
)
from ref.blocks.power import ModelledPower, PowerSource, RaplPower, ReplayedPower, energy, find_power
from ref.dims import dims, float64
from ref.example import Example
from ref.models.llama import ROWS, LlamaConfig, LlamaWeights, Rows, candidate_logits

__all__ = [
    "Backend", "BenchConfig", "BenchReport", "Device", "LlamaBackend", "LoadRecord", "ModelledPower",
    "OpCost", "PowerSource", "PromptRecord", "RaplPower", "ReplayedPower", "Sampling", "StepCosts",
    "ThermalDevice", "Trace", "break_even_tokens", "dequantize", "energy", "example", "find_power",
    "model_bytes", "multiple_choice_accuracy", "offload", "op_costs", "open_run", "perplexity", "pick",
    "quantize", "quantize_model", "quantized_matvec", "roofline", "run_benchmark", "steadiness", "summarize",
    "sustained", "write_events",
]  # fmt: skip

MATRICES = ("w_q", "w_k", "w_v", "w_o", "w_gate", "w_up", "w_down")
BLOCK_KERNELS = 15  # launches: 2 norms, 7 products, 2 rotations, attention, gate, 2 sums
OTHER_KERNELS = 3  # embedding, last norm, head


class OpCost(NamedTuple):
    """What one kind of operation moves and multiplies: bytes of weights, activations and cache; MACs."""

    weight_bytes: int = 0
    activation_bytes: int = 0
    cache_bytes: int = 0
    macs: int = 0

    @property
    def bytes(self):
        """All of them."""
        return self.weight_bytes + self.activation_bytes + self.cache_bytes


@dataclass(frozen=True)
class Device:
    """A device in six numbers: memory bandwidth, arithmetic rate, seconds a launch, and what costs energy."""

    bytes_per_s: float
    flops_per_s: float
    launch_s: float = 0.0
    dram_j_per_byte: float = 0.0
    mac_j: float = 0.0
    static_w: float = 0.0


@dataclass(frozen=True)
class StepCosts:
    """Seconds, joules, bytes and MACs of reading a prompt, and of each decode step after it [n_out]."""

    prefill_s: float
    prefill_j: float
    prefill_bytes: int
    prefill_macs: int
    decode_s: np.ndarray
    decode_j: np.ndarray
    decode_bytes: np.ndarray
    decode_macs: np.ndarray
    n_in: int

    @property
    def prefill_tps(self):
        """Tokens a second while reading."""
        return self.n_in / self.prefill_s

    @property
    def decode_tps(self):
        """Tokens a second while replying; NaN without a step."""
        return len(self.decode_s) / self.decode_s.sum() if len(self.decode_s) else float("nan")


@dataclass(frozen=True)
class ThermalDevice:
    """One thermal mass: resistance K/W to the air, capacity J/K; slowed by gamma a kelvin above the limit."""

    r_k_per_w: float
    c_j_per_k: float
    ambient_c: float = 25.0
    limit_c: float = 45.0
    gamma_per_k: float = 0.05
    floor: float = 0.3
    step_s: float = 0.5


class Trace(NamedTuple):
    """Time in s, temperature in C, frequency relative to the nominal one, power in W: each [steps + 1]."""

    t: np.ndarray
    temperature: np.ndarray
    frequency: np.ndarray
    power: np.ndarray


def quantized_matvec(raw, x, *, kind):
    """y_r = sum_i w_ri x_i from the bytes of w, one block of a row decoded at a time: never the whole matrix.

    Args: raw uint8 [R, bytes], rows = outputs; x [..., n]; kind: a number format of `dequantize`.
    Returns: [..., R] float64, of weights that are float32. Raises: ValueError naming the argument at fault.
    """
    weights, size = block_of(kind)
    check_raw(np.asarray(raw), kind)
    blocks = dims(raw=(raw, "R bytes"))["bytes"] // size
    dims(x=(x, f"... {blocks * weights}"))
    x = float64(x)
    y = np.zeros((*x.shape[:-1], len(raw)))
    for b in range(blocks):
        w = dequantize(raw[:, b * size : (b + 1) * size], kind=kind)  # [R, weights of a block]
        y = y + x[..., b * weights : (b + 1) * weights] @ float64(w).T
    return y


def quantize_model(weights: LlamaWeights, *, kind) -> LlamaWeights:
    """The network with its matrices and embedding as the bytes of a number format; norms stay as they are."""
    rows = lambda w: w if not isinstance(w, Rows) else np.swapaxes(dequantize(w.raw, kind=w.kind), -1, -2)
    encode = lambda w: ROWS[kind](quantize(np.swapaxes(rows(w), -1, -2), kind=kind))
    embed = weights.embed
    table = dequantize(embed.raw, kind=embed.kind) if isinstance(embed, Rows) else embed
    blocks = weights.blocks._replace(**{name: encode(getattr(weights.blocks, name)) for name in MATRICES})
    return weights._replace(embed=ROWS[kind](quantize(table, kind=kind)), blocks=blocks)


def perplexity(weights: LlamaWeights, ids, *, window):
    """exp of the mean -log p of a text ids [T], read in separate windows; the first of a window is given.

    Raises: ValueError for a window below 2 or beyond the context, or a text too short to hold a question.
    """
    ids, context = np.asarray(ids), len(weights.angles)
    dims(ids=(ids, "T"))
    if not 2 <= window <= context:
        raise ValueError(f"window must be in 2..{context}, the context, got {window}")
    parts = [ids[i : i + window] for i in range(0, len(ids), window)]
    nll = [-_log_p(weights, part, 1) for part in parts if len(part) > 1]
    if not nll:
        raise ValueError(f"ids must hold at least two tokens, got {len(ids)}")
    return float(np.exp(np.concatenate(nll).mean()))


def multiple_choice_accuracy(weights: LlamaWeights, items, *, normalize=False):
    """Share of items whose likeliest option is the right one; of equal ones the first counts.

    Args: items: (prompt ids, options: lists of ids, index of the right one). normalize: log-likelihood by
      token instead of its sum, so that long options are not at a loss.
    """
    if not items:
        raise ValueError("items must hold at least one question")
    right = 0
    for prompt, options, answer in items:
        if (
            len(prompt) < 1
            or not options
            or not all(len(o) for o in options)
            or not 0 <= answer < len(options)
        ):
            raise ValueError("an item needs a prompt, options with tokens, and the index of the right one")
        scores = []
        for option in options:
            log_p = _log_p(weights, np.concatenate([prompt, option]), len(prompt))
            scores.append(log_p.mean() if normalize else log_p.sum())
        right += int(np.argmax(scores)) == answer
    return right / len(items)


def model_bytes(config: LlamaConfig, kind, *, head_kind=None, tied=True):
    """Bytes of all weights: matrices and embedding in `kind`, norms in float32, the head in head_kind.

    tied: the embedding is the head, and head_kind is that of both (None: kind); else there is a head besides.
    """
    c = config
    matrices = c.depth * sum(n * row_bytes(m, kind) for m, n in _shapes(c).values())
    norms = 4 * c.dim * (2 * c.depth + 1)
    head = c.vocab * row_bytes(c.dim, head_kind or kind)
    return matrices + norms + head + (0 if tied else c.vocab * row_bytes(c.dim, kind))


def op_costs(config: LlamaConfig, kind, *, context, n_in, head_kind=None) -> dict:
    """{kind of operation: OpCost} of n_in tokens behind `context` others; the sums are those of the call.

    Weights are read once, the cache is float32, activations are float32 and go to memory and back between
    operations. The head is applied once.
    """
    c = config
    if context < 0 or n_in < 1 or context + n_in > c.context:
        raise ValueError(
            f"need context >= 0, n_in >= 1 and at most {c.context} in all, got {context=}, {n_in=}"
        )
    q, kv, head_kind = c.heads * c.head_dim, c.kv_heads * c.head_dim, head_kind or kind
    floats = lambda *widths: 4 * n_in * sum(widths)
    head_row, pairs = row_bytes(c.dim, head_kind), n_in * context + n_in * (n_in + 1) // 2
    ops = {"embedding": OpCost(n_in * head_row, floats(c.dim))}
    for name, (m, n) in _shapes(c).items():
        ops[name] = OpCost(n * row_bytes(m, kind), floats(m, n), 0, n_in * m * n)
    ops["norm"] = OpCost(2 * 4 * c.dim, floats(4 * c.dim))
    ops["rope"] = OpCost(0, floats(2 * q, 2 * kv))
    ops["attention"] = OpCost(0, floats(2 * q), 4 * 2 * kv * (context + n_in), 2 * q * pairs)
    ops["gate"] = OpCost(0, floats(3 * c.hidden))
    ops["sum"] = OpCost(0, floats(6 * c.dim))
    ops = {n: o if n == "embedding" else OpCost(*(c.depth * x for x in o)) for n, o in ops.items()}
    last = OpCost(4 * c.dim, floats(2 * c.dim))
    ops["norm"] = OpCost(*(a + b for a, b in zip(ops["norm"], last, strict=True)))
    ops["head"] = OpCost(c.vocab * head_row, 4 * (c.dim + c.vocab), 0, c.vocab * c.dim)
    return ops


def roofline(
    model_config: LlamaConfig, device: Device, quant, *, context, n_in, n_out, head_kind=None
) -> StepCosts:
    """Predicted: t = max(bytes / bandwidth, FLOPs / rate) + launches, for a prompt and each step of a reply.

    Energy is dram_j_per_byte bytes + mac_j MACs + static_w t.
    Args: context: tokens before the prompt of n_in >= 1; n_out >= 0 decode steps.
    Raises: ValueError for a device without bandwidth or rate, or more tokens than the context holds.
    """
    d = device
    if not (d.bytes_per_s > 0 and d.flops_per_s > 0):
        raise ValueError(
            f"bytes_per_s and flops_per_s must be positive, got {d.bytes_per_s}, {d.flops_per_s}"
        )
    if n_out < 0:
        raise ValueError(f"n_out must not be negative, got {n_out}")
    launches = (BLOCK_KERNELS * model_config.depth + OTHER_KERNELS) * d.launch_s

    def call(context, n_in):
        ops = op_costs(model_config, quant, context=context, n_in=n_in, head_kind=head_kind).values()
        nbytes, macs = sum(o.bytes for o in ops), sum(o.macs for o in ops)
        t = max(nbytes / d.bytes_per_s, 2 * macs / d.flops_per_s) + launches
        return t, d.dram_j_per_byte * nbytes + d.mac_j * macs + d.static_w * t, nbytes, macs

    steps = [call(context + n_in + i, 1) for i in range(n_out)]
    columns = [np.array([step[i] for step in steps]) for i in range(4)]
    return StepCosts(*call(context, n_in), *columns, n_in)


def sustained(device: ThermalDevice, power_fn, seconds) -> Trace:
    """Temperature and frequency of a device that runs on and on: dT/dt = (P R - (T - T_ambient)) / (R C).

    power_fn(frequency) -> W, the frequency 1 - gamma max(0, T - limit), not below the floor. Fixed steps.
    """
    d = device
    if not (
        0 < d.step_s <= d.r_k_per_w * d.c_j_per_k and 0 < d.floor <= 1 and d.gamma_per_k >= 0 and seconds > 0
    ):
        raise ValueError(
            f"need seconds > 0, 0 < step_s <= R C, 0 < floor <= 1 and gamma_per_k >= 0, got {seconds}, {d}"
        )
    rows, temperature = [], d.ambient_c
    for i in range(int(seconds / d.step_s) + 1):
        frequency = max(1 - d.gamma_per_k * max(0.0, temperature - d.limit_c), d.floor)
        power = power_fn(frequency)
        rows.append((i * d.step_s, temperature, frequency, power))
        warming = power * d.r_k_per_w - (temperature - d.ambient_c)
        temperature += d.step_s * warming / (d.r_k_per_w * d.c_j_per_k)
    return Trace(*np.array(rows).T)


def steadiness(t, tps):
    """{first, last, ratio, drops_at}: mean tokens/s of the first and last minute, and when it slowed down.

    Args: t [n] in s, never falling; tps [n]. drops_at: s after the start at which tps falls under 90 % of
      the first minute's mean; None if it never does.
    """
    dims(t=(t, "n"), tps=(tps, "n"))
    t, tps = float64(t, tps)
    if not len(t) or (np.diff(t) < 0).any():
        raise ValueError("t must hold at least one time, and must not fall")
    first, last = tps[t < t[0] + 60].mean(), tps[t > t[-1] - 60].mean()
    below = np.flatnonzero(tps < 0.9 * first)
    drops = float(t[below[0]] - t[0]) if len(below) else None
    return {"first": float(first), "last": float(last), "ratio": float(last / first), "drops_at": drops}


def offload(n_out, *, net_s, edge_tps, radio_w):
    """(seconds, joules) of a phone that waits for a reply from elsewhere: net_s + n_out / edge_tps."""
    seconds = net_s + n_out / edge_tps
    return seconds, radio_w * seconds


def break_even_tokens(j_per_token, *, net_s, edge_tps, radio_w):
    """The n_out from which a reply from elsewhere costs the phone less energy; inf if it never does."""
    saved = j_per_token - radio_w / edge_tps
    return radio_w * net_s / saved if saved > 0 else float("inf")


def _log_p(weights, ids, start):
    """log p of the tokens from `start` on, each after all before it."""
    logits, total = candidate_logits(weights, ids[:-1], np.asarray(ids)[1:, None])
    return (logits[:, 0] - total)[start - 1 :]


def _shapes(c):
    """{matrix of a block: (inputs, outputs)}."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    inputs = (c.dim, c.dim, c.dim, q, c.dim, c.dim, c.hidden)
    outputs = (q, kv, kv, c.dim, c.hidden, c.hidden, c.dim)
    return dict(zip(MATRICES, zip(inputs, outputs, strict=True), strict=True))


def example(seed=0):
    """Eight rows of SmolLM2's hidden states as weights in few bits, and a product with the next row."""
    from ref.data import hidden_states

    rows = hidden_states()[1 + seed : 10 + seed, :256].astype(np.float32)
    w, x = rows[:8], rows[8]
    return [
        Example("quantize", (w,), {"kind": "Q4_1"}),
        Example("dequantize", (quantize(w, kind="Q8_0"),), {"kind": "Q8_0"}),
        Example("quantized_matvec", (quantize(w, kind="Q4_1"), x), {"kind": "Q4_1"}, (1,)),
    ]
