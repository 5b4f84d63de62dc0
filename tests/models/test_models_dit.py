"""The diffusion transformer: a block written out, sampling with a known answer, counts, bad inputs."""

import numpy as np
import pytest

from ref.blocks.optim import tree_leaves
from ref.models.dit import (
    DiTConfig,
    alpha_bar,
    block_with,
    ddim_sample,
    dit_block,
    dit_forward,
    dit_macs,
    init_dit,
    quantizable,
    sample_times,
    time_embedding,
)
from tests.laws import rejects

RNG = np.random.default_rng(0)
IMAGE = DiTConfig(side=4, dim=8, depth=2, classes=3)
CLIP = DiTConfig(side=4, dim=8, depth=1, classes=3, text_dim=5, frames=3)
C = RNG.standard_normal((2, 8))


def net(cfg):
    return init_dit(np.random.default_rng(1), cfg, std=0.3, zero=False)


def soft(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(x, keys, p, heads):
    """One example, head by head."""
    q, k, v = x @ p.w_q + p.b_q, keys @ p.w_k + p.b_k, keys @ p.w_v + p.b_v
    d = q.shape[1] // heads
    parts = [
        soft(q[:, s] @ k[:, s].T / np.sqrt(d)) @ v[:, s]
        for s in (slice(h * d, h * d + d) for h in range(heads))
    ]
    return np.concatenate(parts, axis=1) @ p.w_o + p.b_o


def written_out(x, c, p, text=None, frames=1):
    """One example of the block, tokens [N, C]."""
    norm = lambda t: (t - t.mean(-1, keepdims=True)) / np.sqrt(t.var(-1, keepdims=True) + 1e-6)
    m = (c / (1 + np.exp(-c))) @ p.w_mod + p.b_mod
    sh1, sc1, g1, sh2, sc2, g2 = m.reshape(6, -1)
    h, n = norm(x) * (1 + sc1) + sh1, len(x) // frames
    x = x + g1 * np.concatenate(
        [attend(h[f * n : f * n + n], h[f * n : f * n + n], p.attn, 2) for f in range(frames)]
    )
    if frames > 1:
        y = np.zeros_like(x)
        for place in range(n):
            y[place::n] = attend(x[place::n], x[place::n], p.temporal, 2)
        x = x + g1 * y
    if text is not None:
        x = x + attend(x, text, p.cross, 2)
    h = (norm(x) * (1 + sc2) + sh2) @ p.w_fc1 + p.b_fc1
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return x + g2 * (h @ p.w_fc2 + p.b_fc2)


@pytest.mark.parametrize("cfg", [IMAGE, CLIP], ids=["dit_image", "dit_clip"])
def test_models_dit_block_is_the_definition(cfg):
    p, x = net(cfg).blocks[0], RNG.standard_normal((2, 4 * cfg.frames, 8))
    text = None if cfg.text_dim is None else RNG.standard_normal((2, 6, 5))
    got = dit_block(x, C, p, cfg, text=text, frames=cfg.frames)
    for b in range(2):
        want = written_out(x[b], C[b], p, None if text is None else text[b], cfg.frames)
        # some ten layers of sums of at most 32 terms, on entries of order 10
        np.testing.assert_allclose(got[b], want, rtol=0, atol=1e-11)


def test_models_dit_starts_as_the_identity():
    fresh = init_dit(np.random.default_rng(0), IMAGE)
    x = RNG.standard_normal((2, 4, 8))
    np.testing.assert_array_equal(dit_block(x, C, fresh.blocks[0], IMAGE), x)
    images = RNG.standard_normal((2, 4, 4, 1))
    assert not dit_forward(images, 7, [0, 3], fresh, IMAGE).any()


def test_models_dit_forward_puts_patches_back_in_place():
    p, images = net(IMAGE), RNG.standard_normal((2, 4, 4, 1))
    seen = []
    got = dit_forward(
        images, [5, 900], [0, 3], p, IMAGE, project=lambda n, x, w, b: seen.append(n) or x @ w + b
    )
    np.testing.assert_allclose(got, dit_forward(images, [5, 900], [0, 3], p, IMAGE), rtol=0, atol=1e-12)
    assert sorted(set(seen)) == sorted(quantizable(p))
    one = dit_forward(images[1:], 900, [3], p, IMAGE)
    np.testing.assert_allclose(one, got[1:], rtol=0, atol=1e-12)
    # without blocks every patch is told by its own pixels: changing one leaves the others
    bare = p._replace(blocks=())
    other = images.copy()
    other[:, :2, 2:] += 1
    moved = dit_forward(other, 5, [0, 0], bare, IMAGE) != dit_forward(images, 5, [0, 0], bare, IMAGE)
    assert moved[:, :2, 2:].all()
    assert not moved[:, 2:].any()
    assert not moved[:, :2, :2].any()
    clip = dit_forward(
        RNG.standard_normal((2, 3, 4, 4, 1)), 5, [0, 1], net(CLIP), CLIP, text=RNG.standard_normal((2, 6, 5))
    )
    assert clip.shape == (2, 3, 4, 4, 1)


def test_models_dit_time_embedding_tells_steps_apart():
    rows = time_embedding(np.arange(0, 1000, 111), net(IMAGE))
    gaps = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    assert gaps[~np.eye(len(rows), dtype=bool)].min() > 1e-3


@pytest.mark.parametrize("steps", [1, 7])
def test_models_dit_sampler_finds_what_the_noise_hides(steps):
    """A model that knows x0, with noise (x - sqrt(a) x0) / sqrt(1 - a), leads back to x0 in any steps."""
    x0, noise = RNG.standard_normal((2, 4, 4, 1)), RNG.standard_normal((2, 4, 4, 1))
    asked = []

    def model(x, t, conditional):
        asked.append((t, conditional))
        target = x0 if conditional else 0 * x0
        return (x - np.sqrt(alpha_bar(t)) * target) / np.sqrt(1 - alpha_bar(t))

    # the first step divides by sqrt(alpha_bar(999)) = 0.006: rounding grows to about 1e-13
    np.testing.assert_allclose(ddim_sample(model, noise, steps=steps), x0, rtol=0, atol=1e-11)
    assert all(c for _, c in asked)
    guided = ddim_sample(model, noise, steps=1, guidance=2.0)
    np.testing.assert_allclose(guided, 2 * x0, rtol=0, atol=1e-11)  # from 0 towards x0, and as far again
    assert list(sample_times(steps)[:1]) == [999]
    assert len(set(sample_times(20))) == 20
    assert not alpha_bar(0) > 1
    assert alpha_bar(999) < 1e-4


@pytest.mark.parametrize("cfg", [IMAGE, CLIP], ids=["dit_2d", "dit_3d"])
def test_models_dit_counts_are_those_of_the_maps(cfg):
    """Products of every linear map but a text's keys and values, and of attention."""
    p, N = net(cfg), 4 * cfg.frames
    total = [0]

    def project(name, x, w, b):
        if not name.endswith(("cross.k", "cross.v")):
            total[0] += x[..., 0].size * w.size
        return x @ w + b

    text = None if cfg.text_dim is None else np.zeros((1, 6, 5))
    for block in p.blocks:
        block_with(np.zeros((1, N, 8)), C[:1], block, cfg, project, text=text)
    attention = cfg.depth * (
        2 * N * (N // cfg.frames) * 8 + (2 * N * cfg.frames * 8 if cfg.frames > 1 else 0)
    )
    rest = N * (p.w_patch.size + p.w_last.size) + p.w_time1.size + p.w_time2.size + p.w_last_mod.size
    rest += sum(b.w_mod.size for b in p.blocks)
    assert dit_macs(cfg, N) == total[0] + attention + rest


def test_models_dit_maps_to_round_are_all_but_the_modulation():
    p = net(CLIP)
    inside = sum(w.size for w in quantizable(p).values())
    weights = sum(x.size for x in tree_leaves(p.blocks) if x.ndim == 2)
    assert inside == weights - sum(b.w_mod.size for b in p.blocks)


BAD = {
    "heads": (
        lambda: dit_block(np.ones((2, 4, 8)), C, net(IMAGE).blocks[0], DiTConfig(heads=3)),
        "heads must",
    ),
    "frames": (lambda: dit_block(np.ones((2, 4, 8)), C, net(CLIP).blocks[0], CLIP, frames=3), "frames N=4"),
    "text": (
        lambda: dit_block(np.ones((2, 3, 8)), C, net(CLIP).blocks[0], CLIP),
        "text goes with params.cross",
    ),
    "temporal": (
        lambda: dit_block(np.ones((2, 4, 8)), C, net(IMAGE).blocks[0], IMAGE, frames=2),
        "params.temporal",
    ),
    "condition": (
        lambda: dit_block(np.ones((2, 4, 8)), C[:1], net(IMAGE).blocks[0], IMAGE),
        r"c\.shape\[0\] = 1",
    ),
    "side": (lambda: dit_forward(np.ones((1, 6, 4, 1)), 0, [0], net(IMAGE), IMAGE), "but must be 4"),
    "steps": (lambda: ddim_sample(None, np.ones(1), steps=0), r"steps must be in 1\.\.1000"),
}

test_models_dit_rejects_bad_input = rejects(BAD)
