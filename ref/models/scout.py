"""The decoder around SCOUT's attention: sizes, parameters, how they start, their number.

Source: SCOUT 2025 (arXiv 2509.00935) and the code released with it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ref.blocks.rotary_attention import check_heads, check_window
from ref.blocks.transformer import AttentionParams
from ref.checks import at_least_one, one_of
from ref.models.mamba import MambaParams, init_mamba, mamba_params

MIXERS = ("swa", "mamba")
KINDS = ("scout", "full", "swa", "mamba")


@dataclass(frozen=True)
class ScoutConfig:
    """Sizes; segment: tokens a checkpoint stands for; window: keys of the sliding window, None with Mamba."""

    dim: int
    num_heads: int
    num_kv_heads: int
    inner_dim: int
    segment: int = 10
    window: int | None = 1024
    state_size: int = 16
    conv_size: int = 4
    dt_rank: int = 128
    expand: int = 2
    rope_base: float = 1e6
    eps: float = 1e-6
    num_layers: int = 1
    vocab_size: int = 32000
    tied: bool = True

    @property
    def kv_dim(self):
        """Width of keys, and of values."""
        return self.num_kv_heads * self.dim // self.num_heads

    @property
    def attention(self):
        """Options of an attention sub-layer."""
        return {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "rope_base": self.rope_base}

    @property
    def mamba_sizes(self):
        """Options of the shared mixer."""
        return {
            "state": self.state_size, "conv": self.conv_size, "dt_rank": self.dt_rank, "expand": self.expand
        }  # fmt: skip


class SwiGLUParams(NamedTuple):
    """w_gate, w_up [C, F], w_down [F, C]."""

    w_gate: np.ndarray
    w_up: np.ndarray
    w_down: np.ndarray


class ScoutBlock(NamedTuple):
    """Four sub-layers, each behind an RMS norm [C]: mixer, MLP, attention to checkpoints, MLP."""

    norm1: np.ndarray
    mixer: AttentionParams | MambaParams
    norm2: np.ndarray
    mlp1: SwiGLUParams
    norm3: np.ndarray
    attn: AttentionParams
    norm4: np.ndarray
    mlp2: SwiGLUParams


class ScoutParams(NamedTuple):
    """embedding [V, C], blocks, norm [C], head [C, V] or None where the embedding serves."""

    embedding: np.ndarray
    blocks: tuple[ScoutBlock, ...]
    norm: np.ndarray
    head: np.ndarray | None


class ScoutCache(NamedTuple):
    """A layer's mixer state, keys and values of its checkpoints [..., Hkv, steps // s, D]; the steps."""

    mixers: tuple
    keys: tuple
    values: tuple
    steps: int


def init_scout(key, config, *, mixer="swa"):
    """ScoutParams: normal weights of deviation 0.02, unit norms, Mamba's step sizes as in `init_mamba`.

    key: NumPy Generator or seed.
    """
    check_scout(config, mixer)
    rng, c = np.random.default_rng(key), config
    w = lambda m, n: 0.02 * rng.standard_normal((m, n))
    one = np.ones(c.dim)
    shapes = ((c.dim, c.dim), (c.dim, c.kv_dim), (c.dim, c.kv_dim), (c.dim, c.dim))
    attention = lambda: AttentionParams(*(w(*shape) for shape in shapes))
    mlp = lambda: SwiGLUParams(w(c.dim, c.inner_dim), w(c.dim, c.inner_dim), w(c.inner_dim, c.dim))
    mix = attention if mixer == "swa" else lambda: init_mamba(rng, c.dim, std=0.02, **c.mamba_sizes)
    blocks = tuple(
        ScoutBlock(one, mix(), one, mlp(), one, attention(), one, mlp()) for _ in range(c.num_layers)
    )
    embedding = w(c.vocab_size, c.dim)
    return ScoutParams(embedding, blocks, one, None if c.tied else w(c.dim, c.vocab_size))


def num_parameters(config, *, mixer="swa"):
    """Numbers in `ScoutParams`."""
    check_scout(config, mixer)
    c = config
    attention = 2 * c.dim * (c.dim + c.kv_dim)
    mix = attention if mixer == "swa" else mamba_params(c.dim, **c.mamba_sizes)
    layer = mix + attention + 2 * 3 * c.dim * c.inner_dim + 4 * c.dim
    return c.num_layers * layer + c.dim + c.vocab_size * c.dim * (1 if c.tied else 2)


def check_scout(config, mixer, kind="scout"):
    """Raise ValueError for a configuration that cannot be, or an unknown mixer or kind."""
    c = config
    one_of("mixer", mixer, MIXERS)
    one_of("kind", kind, KINDS)
    at_least_one(segment=c.segment)
    if "swa" in (mixer, kind):
        check_window(c.window)
    check_heads(c.dim, c.num_heads, c.num_kv_heads)
