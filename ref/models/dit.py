"""The diffusion transformer: blocks whose norms are shifted, scaled and gated by the time step and the class.

Source: Peebles and Xie 2023 (arXiv 2212.09748), adaLN-Zero; cross-attention to a text as in PixArt (Chen et
al. 2024) and attention over frames as in Open-Sora 1, both on the tokens as they are. Sampling: DDIM (Song et
al. 2021, eta = 0) on the linear schedule of Ho et al. 2020, with classifier-free guidance.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.attention import attention_dense, join_heads, split_heads
from ref.blocks.mlp import gelu, linear, silu
from ref.blocks.norms import layer_norm
from ref.blocks.positions import sinusoidal_positions
from ref.blocks.transformer import SelfAttentionParams
from ref.checks import check_ids
from ref.dims import dims, float64
from ref.models.vit import patchify

T_MAX = 1000
TIME_CHANNELS = 256


@dataclass(frozen=True)
class DiTConfig:
    """side: pixels a side of an input of `channels`; classes get one more row, for no class.

    text_dim: width of the text's tokens, or None; frames: of a clip, 1 for pictures.
    """

    side: int = 8
    patch: int = 2
    channels: int = 1
    dim: int = 32
    depth: int = 2
    heads: int = 2
    classes: int = 10
    mlp_ratio: int = 4
    text_dim: int | None = None
    frames: int = 1


class DiTBlockParams(NamedTuple):
    """w_mod [C, 6C], b_mod: shift, scale, gate of attention, then of the MLP; the parts they modulate."""

    w_mod: np.ndarray
    b_mod: np.ndarray
    attn: SelfAttentionParams
    w_fc1: np.ndarray
    b_fc1: np.ndarray
    w_fc2: np.ndarray
    b_fc2: np.ndarray
    temporal: SelfAttentionParams | None = None
    cross: SelfAttentionParams | None = None


class DiTParams(NamedTuple):
    """Patch embedding, positions [n, C], time MLP [256, C], [C, C], classes [K + 1, C], blocks, the end."""

    w_patch: np.ndarray
    b_patch: np.ndarray
    positions: np.ndarray
    w_time1: np.ndarray
    b_time1: np.ndarray
    w_time2: np.ndarray
    b_time2: np.ndarray
    classes: np.ndarray
    blocks: tuple[DiTBlockParams, ...]
    w_last_mod: np.ndarray
    b_last_mod: np.ndarray
    w_last: np.ndarray
    b_last: np.ndarray
    frame_positions: np.ndarray | None = None


def dit_block(x, c, params: DiTBlockParams, cfg: DiTConfig, *, text=None, frames=None):
    """One block: tokens x [B, N, C], condition c [B, C] -> [B, N, C].

    x + g1 attention(m1(x)); with frames=T the N = T n tokens of a clip, frame by frame, attend within their
    frame, and then each place over the frames, x + g1 temporal(x); with text [B, L, text_dim] x + cross(x,
    text); at last x + g2 MLP(m2(x)). m(x) = LN(x) (1 + scale) + shift, without weights; tanh GELU.
    Raises: ValueError naming the argument at fault.
    """
    return block_with(x, c, params, cfg, lambda name, h, w, b: linear(h, w, b), text=text, frames=frames)


def block_with(x, c, p, cfg, project, *, text=None, frames=None):
    """`dit_block` with project(name, x, w, b) in place of every linear map but the modulation's.

    Names: attn.q .. attn.o, temporal.q .., cross.q .., mlp.fc1, mlp.fc2.
    """
    n = dims(x=(x, "B N C"), c=(c, "B C"), w_mod=(p.w_mod, f"C {6 * x.shape[-1]}"))
    frames = cfg.frames if frames is None else frames
    if n["C"] % cfg.heads or frames < 1 or n["N"] % frames:
        raise ValueError(f"heads must divide C={n['C']} and frames N={n['N']}, got {cfg.heads} and {frames}")
    if (text is None) != (p.cross is None) or (frames > 1 and p.temporal is None):
        raise ValueError("text goes with params.cross, and frames > 1 with params.temporal")
    x, split = float64(x), np.split(linear(silu(c), p.w_mod, p.b_mod)[:, None], 6, axis=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = split
    modulate = lambda x, shift, scale: layer_norm(x, 1.0, 0.0, eps=1e-6) * (1 + scale) + shift
    inside = lambda t: t.reshape(-1, n["N"] // frames, n["C"])
    x = x + gate1 * _attention(
        "attn", inside(modulate(x, shift1, scale1)), None, p.attn, cfg, project
    ).reshape(x.shape)
    if frames > 1:
        across = x.reshape(n["B"], frames, -1, n["C"]).swapaxes(1, 2).reshape(-1, frames, n["C"])
        y = _attention("temporal", across, None, p.temporal, cfg, project)
        x = x + gate1 * y.reshape(n["B"], -1, frames, n["C"]).swapaxes(1, 2).reshape(x.shape)
    if text is not None:
        x = x + _attention("cross", x, float64(text), p.cross, cfg, project)
    h = gelu(project("mlp.fc1", modulate(x, shift2, scale2), p.w_fc1, p.b_fc1), approximate=True)
    return x + gate2 * project("mlp.fc2", h, p.w_fc2, p.b_fc2)


def dit_forward(x, t, y, params: DiTParams, cfg: DiTConfig, *, text=None, project=None):
    """The predicted noise, as x [B, H, W, C], or clips [B, frames, H, W, C].

    t: step 0..1000, a number or [B]; y int [B], classes or cfg.classes for none. project(name, x, w, b): what
    stands for the linear maps of the blocks, names as in `block_with` after "blocks.<i>.".
    Raises: ValueError for images of another size, or y outside 0..classes.
    """
    y = check_ids("y", y, cfg.classes + 1)
    p, plain = params, lambda name, h, w, b: linear(h, w, b)
    lead = np.shape(x)[:1]
    if cfg.frames > 1:
        dims(x=(x, f"B {cfg.frames} {cfg.side} {cfg.side} {cfg.channels}"))
    else:
        dims(x=(x, f"B {cfg.side} {cfg.side} {cfg.channels}"))
    tokens = linear(patchify(float64(x), cfg.patch), p.w_patch, p.b_patch) + p.positions
    if cfg.frames > 1:
        tokens = (tokens + p.frame_positions[:, None]).reshape(*lead, -1, cfg.dim)
    c = time_embedding(np.broadcast_to(t, lead), p) + p.classes[y]
    for i, block in enumerate(p.blocks):
        at = lambda name, h, w, b, i=i: (project or plain)(f"blocks.{i}.{name}", h, w, b)
        tokens = block_with(tokens, c, block, cfg, at, text=text)
    shift, scale = np.split(linear(silu(c), p.w_last_mod, p.b_last_mod)[:, None], 2, axis=-1)
    out = linear(layer_norm(tokens, 1.0, 0.0, eps=1e-6) * (1 + scale) + shift, p.w_last, p.b_last)
    rows, q = cfg.side // cfg.patch, cfg.patch
    tiles = out.reshape(*np.shape(x)[:-3], rows, rows, q, q, cfg.channels)
    return tiles.swapaxes(-4, -3).reshape(np.shape(x))


def time_embedding(t, params):
    """silu(sinusoids of t w1 + b1) w2 + b2: t [B] -> [B, C]; cosines first, as in the released DiT."""
    half = TIME_CHANNELS // 2
    angles = float64(t)[:, None] * 10000.0 ** (-np.arange(half) / half)
    waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    return linear(silu(linear(waves, params.w_time1, params.b_time1)), params.w_time2, params.b_time2)


def alpha_bar(t):
    """Share of the signal's variance at steps t of 0..999: the product of 1 - beta, from 1e-4 to 0.02."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, T_MAX))[np.asarray(t)]


def ddim_sample(model_fn, noise, *, steps, guidance=1.0):
    """x0 [B, ...] from noise by `steps` deterministic steps (Song et al. 2021, equation 12 with eta = 0).

    model_fn(x, t, conditional) -> predicted noise; the two branches of guidance run one after the other,
    eps = eps_u + guidance (eps_c - eps_u); with guidance 1 the unconditional one is not asked. Steps t are
    spread evenly from 999 down. Raises: ValueError for steps outside 1..1000.
    """
    if not 1 <= steps <= T_MAX:
        raise ValueError(f"steps must be in 1..{T_MAX}, got {steps}")
    times = sample_times(steps)
    x = float64(noise)
    for t, earlier in zip(times, [*times[1:], None], strict=True):
        eps = model_fn(x, int(t), True)
        if guidance != 1.0:
            free = model_fn(x, int(t), False)
            eps = free + guidance * (eps - free)
        a, before = alpha_bar(t), 1.0 if earlier is None else alpha_bar(earlier)
        x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        x = np.sqrt(before) * x0 + np.sqrt(1 - before) * eps
    return x


def sample_times(steps):
    """The steps that are visited, from 999 down, int [steps]."""
    return np.rint(np.linspace(T_MAX - 1, 0, steps)).astype(int) if steps > 1 else np.array([T_MAX - 1])


def quantizable(params: DiTParams):
    """{name: w [in, out]} of every linear map of the blocks but the modulation's: what is quantised."""
    found = {}
    for i, p in enumerate(params.blocks):
        for part in ("attn", "temporal", "cross"):
            if (a := getattr(p, part)) is not None:
                found |= {f"blocks.{i}.{part}.{m}": getattr(a, f"w_{m}") for m in "qkvo"}
        found |= {f"blocks.{i}.mlp.fc1": p.w_fc1, f"blocks.{i}.mlp.fc2": p.w_fc2}
    return found


def init_dit(rng, cfg: DiTConfig, *, std=0.02, zero=True) -> DiTParams:
    """Normal weights (std), zero biases; zero: modulation and last layer 0, a fresh block is the identity."""
    C, out = cfg.dim, cfg.patch**2 * cfg.channels
    w = lambda i, o, on=True: std * rng.standard_normal((i, o)) if on else np.zeros((i, o))

    def attention(keys=C):
        zero = np.zeros(C)
        return SelfAttentionParams(w(C, C), zero, w(keys, C), zero, w(keys, C), zero, w(C, C), zero)

    def block():
        F = cfg.mlp_ratio * C
        return DiTBlockParams(
            w(C, 6 * C, not zero), np.zeros(6 * C), attention(), w(C, F), np.zeros(F), w(F, C), np.zeros(C),
            attention() if cfg.frames > 1 else None,
            None if cfg.text_dim is None else attention(cfg.text_dim),
        )  # fmt: skip

    return DiTParams(
        w(out, C), np.zeros(C), sinusoidal_positions((cfg.side // cfg.patch) ** 2, C), w(TIME_CHANNELS, C),
        np.zeros(C), w(C, C), np.zeros(C), w(cfg.classes + 1, C), tuple(block() for _ in range(cfg.depth)),
        w(C, 2 * C, not zero), np.zeros(2 * C), w(C, out, not zero), np.zeros(out),
        sinusoidal_positions(cfg.frames, C) if cfg.frames > 1 else None,
    )  # fmt: skip


def dit_macs(cfg: DiTConfig, n_tokens):
    """Multiply-accumulates of one forward pass of one input of n_tokens (all frames): maps and attention.

    Keys and values of a text are left out: their number is the text's.
    """
    C, N, F = cfg.dim, n_tokens, cfg.frames
    part = 4 * N * C * C + 2 * N * (N // F) * C  # within a frame
    if F > 1:
        part += 4 * N * C * C + 2 * N * F * C
    if cfg.text_dim is not None:
        part += 2 * N * C * C
    block = part + 2 * cfg.mlp_ratio * N * C * C + 6 * C * C
    out = cfg.patch**2 * cfg.channels
    return 2 * N * out * C + TIME_CHANNELS * C + C * C + cfg.depth * block + 2 * C * C


def _attention(name, x, text, p, cfg, project):
    keys = x if text is None else text
    q = split_heads(project(f"{name}.q", x, p.w_q, p.b_q), cfg.heads)
    k, v = (split_heads(project(f"{name}.{m}", keys, w, b), cfg.heads)
            for m, w, b in (("k", p.w_k, p.b_k), ("v", p.w_v, p.b_v)))  # fmt: skip
    return project(f"{name}.o", join_heads(attention_dense(q, k, v)), p.w_o, p.b_o)
