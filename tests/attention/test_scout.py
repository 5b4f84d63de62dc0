"""SCOUT: laws on ref, golden vectors, bad inputs."""

from dataclasses import replace

import numpy as np

import ref
from tests.attention import laws_scout
from tests.golden_runner import golden, graded, run, run_backward
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_scout))

S = ref.scout


def block(raw):
    """The stored tree, weights [out, in], in the house form."""
    attention = lambda t: S.AttentionParams(*(t[f"{n}_w"].T for n in "qkvo"))
    mlp = lambda t: S.SwiGLUParams(t["gate_w"].T, t["up_w"].T, t["down_w"].T)
    m = raw["mixer"]
    mamba = "in_w conv_w conv_b x_w dt_w dt_b a_log d out_w".split()
    house = lambda n: m[n] if n == "a_log" else m[n].T
    mixer = attention(m) if "q_w" in m else S.MambaParams(*(house(n) for n in mamba))
    norms = [raw[f"norm{i}"] for i in (1, 2, 3, 4)]
    layers = mixer, mlp(raw["mlp1"]), attention(raw["attn"]), mlp(raw["mlp2"])
    return S.ScoutBlock(*(x for pair in zip(norms, layers, strict=True) for x in pair))


BUILD = {"params": block, "config": lambda raw: S.ScoutConfig(**raw)}


@golden("scout")
def test_scout_golden_ref(case):
    run(case, ref.scout, build=BUILD)


def stored(grads):
    """A ScoutBlock of gradients, in the layout of the file."""
    out = {}
    for field, value in grads._asdict().items():
        if isinstance(value, np.ndarray):
            out[field] = value
        elif isinstance(value, S.MambaParams):
            names = "in_w conv_w conv_b x_w dt_w dt_b a_log d out_w".split()
            out[field] = {n: g if n == "a_log" else g.T for n, g in zip(names, value, strict=True)}
        else:
            names = "qkvo" if isinstance(value, S.AttentionParams) else ("gate", "up", "down")
            out[field] = {f"{n}_w": g.T for n, g in zip(names, value, strict=False)}
    return out


@graded("scout", only=("scout_block", "checkpoint_attention"))
def test_scout_golden_gradients_ref(case):
    run_backward(case, S, build=BUILD, outs={"params": stored})


CONFIG = S.ScoutConfig(8, 2, 1, 6, segment=3, window=4, state_size=3, dt_rank=1, vocab_size=7)
PARAMS = S.init_scout(0, CONFIG)
Q, K = np.ones((1, 4, 6, 4)), np.ones((1, 2, 6, 4))
X, IDS = np.ones((1, 6, 8)), np.zeros((1, 6), int)
WITH = lambda **changes: {"config": replace(CONFIG, **changes)}
MIXER, MAMBA = PARAMS.blocks[0].mixer, S.init_scout(0, CONFIG, mixer="mamba").blocks[0].mixer
STATE = S.mamba_mixer(np.ones((2, 6, 8)), MAMBA)[1]
BAD = {
    "segment": (lambda: S.checkpoint_attention(Q, K, K, segment=0), "segment must be at least 1, got 0"),
    "heads": (lambda: S.checkpoint_attention(Q[:, :3], K, K, segment=2), "not a multiple of the Hkv=2"),
    "lengths": (
        lambda: S.checkpoint_attention(Q[:, :, :5], K, K, segment=2),
        r"k.shape\[2\] = 6, but axis L is 5",
    ),
    "values": (lambda: S.checkpoint_attention(Q, K, K[:, :, :5], segment=2), r"v.shape\[2\] = 5"),
    "do": (lambda: S.checkpoint_attention_bwd(Q[:, :2], Q, K, K, segment=2), r"v.shape\[:2\] = \(1, 4\)"),
    "window": (
        lambda: S.sliding_window_mixer(X, MIXER, num_heads=2, num_kv_heads=1, window=0),
        "window must be",
    ),
    "mixer_heads": (lambda: S.sliding_window_mixer(X, MIXER, num_heads=3, window=2), "num_heads must split"),
    "mixer_kv": (
        lambda: S.sliding_window_mixer(X, MIXER, num_heads=2, window=2),
        r"w_k.shape\[1\] = 4, but must be 8",
    ),
    "odd": (lambda: S.sliding_window_mixer(X, MIXER, num_heads=8, window=2), "even parts"),
    "grouped": (
        lambda: S.scout_block(X, PARAMS.blocks[0], **WITH(num_kv_heads=3)),
        "num_kv_heads must divide",
    ),
    "width": (
        lambda: S.scout_block(X[..., :6], PARAMS.blocks[0], **WITH()),
        r"x.shape\[2\] = 6, but must be 8",
    ),
    "unknown": (
        lambda: S.scout_block(X, PARAMS.blocks[0], **WITH(), mixer="rwkv"),
        "mixer must be one of swa, mamba",
    ),
    "no_window": (
        lambda: S.scout_block(X, PARAMS.blocks[0], **WITH(window=None)),
        "window must be at least 1",
    ),
    "no_segment": (lambda: S.scout_logits(PARAMS, IDS, **WITH(segment=0)), "segment must be at least 1"),
    "ids": (lambda: S.scout_logits(PARAMS, IDS + 7, **WITH()), r"ids must be in 0\.\.6"),
    "float_ids": (lambda: S.scout_logits(PARAMS, IDS + 0.5, **WITH()), "got float64"),
    "state": (lambda: S.mamba_mixer(X, MAMBA, state=STATE), "conv.shape"),
    "kind": (lambda: S.cache_bytes(CONFIG, 8, kind="rwkv"), "kind must be one of scout, full, swa, mamba"),
}

test_scout_rejects_bad_input = rejects(BAD)
