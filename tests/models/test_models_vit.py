"""The vision transformer: against the definition written out, accel against ref, and bad inputs."""

import jax
import numpy as np
import pytest

import accel.models.vit
from ref.blocks.mlp import erf
from ref.models.dinov2 import resize_positions
from ref.models.vit import embed_patches, init_vit, patchify, vit_forward, vit_tokens

RNG = np.random.default_rng(0)
PARAMS = init_vit(RNG, image_size=8, patch=4, dim=12, depth=2, num_classes=3, std=0.3)
IMAGES = RNG.standard_normal((2, 8, 8, 3))


def written_out(image, p, num_heads, eps=1e-6):
    """One image, token by token and head by head, in plain sums."""
    norm = lambda x, s, b: np.array([(t - t.mean()) / np.sqrt(t.var() + eps) * s + b for t in x])
    size = p.w_patch.shape[0]
    x = [p.cls_token]
    for i in range(0, image.shape[0], size):
        for j in range(0, image.shape[1], size):
            tile = image[i : i + size, j : j + size]
            x.append((tile[..., None] * p.w_patch).sum(axis=(0, 1, 2)) + p.b_patch)
    x = np.array(x) + p.pos_embed
    d = x.shape[1] // num_heads
    for b in p.blocks:
        h = norm(x, b.ln1_scale, b.ln1_bias)
        q, k, v = h @ b.w_q + b.b_q, h @ b.w_k + b.b_k, h @ b.w_v + b.b_v
        heads = []
        for c in range(num_heads):
            at = slice(c * d, (c + 1) * d)
            e = np.exp(q[:, at] @ k[:, at].T / np.sqrt(d))
            heads.append(e / e.sum(1, keepdims=True) @ v[:, at])
        x = x + np.concatenate(heads, 1) @ b.w_o + b.b_o
        h = norm(x, b.ln2_scale, b.ln2_bias) @ b.w_fc1 + b.b_fc1
        x = x + (h * (1 + erf(h / np.sqrt(2))) / 2) @ b.w_fc2 + b.b_fc2
    return norm(x, p.norm_scale, p.norm_bias)


def test_models_vit_forward_is_the_definition():
    tokens = np.array([written_out(i, PARAMS, 3) for i in IMAGES])
    got = vit_forward(IMAGES, PARAMS, num_heads=3)
    # about 10 layers of sums of at most 48 terms, each within 48 eps of entries of order 10
    np.testing.assert_allclose(got, tokens[:, 0] @ PARAMS.w_head + PARAMS.b_head, rtol=0, atol=1e-12)
    bare = PARAMS._replace(w_head=None, b_head=None)
    np.testing.assert_allclose(vit_forward(IMAGES, bare, num_heads=3), tokens[:, 0], rtol=0, atol=1e-12)


def test_models_vit_pools_the_mean_of_the_patches():
    x = vit_tokens(IMAGES, PARAMS, num_heads=3)
    mean = x[:, 1:].mean(1)
    want = (mean - mean.mean(1, keepdims=True)) / np.sqrt(mean.var(1, keepdims=True) + 1e-6)
    got = vit_forward(IMAGES, PARAMS, num_heads=3, global_pool=True)
    np.testing.assert_allclose(got, want @ PARAMS.w_head, rtol=0, atol=1e-12)
    no_class = PARAMS._replace(cls_token=None, pos_embed=PARAMS.pos_embed[1:])
    assert embed_patches(IMAGES, no_class).shape == (2, 4, 12)
    assert vit_forward(IMAGES, no_class, num_heads=3).shape == (2, 3)


def test_models_vit_patches_are_row_major():
    image = np.arange(4 * 6 * 2.0).reshape(4, 6, 2)
    got = patchify(image, 2)
    assert got.shape == (6, 8)
    np.testing.assert_array_equal(got[1], image[0:2, 2:4].reshape(-1))
    np.testing.assert_array_equal(got[3], image[2:4, 0:2].reshape(-1))


@pytest.mark.parametrize("global_pool", [False, True], ids=["vit_class", "vit_mean"])
def test_models_vit_accel_matches_ref(global_pool):
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), PARAMS)
    run = jax.jit(lambda i, p: accel.models.vit.vit_forward(i, p, num_heads=3, global_pool=global_pool))
    got = run(IMAGES.astype(np.float32), params)
    want = vit_forward(IMAGES.astype(np.float32), params, num_heads=3, global_pool=global_pool)
    # sums of at most 48 products a layer, 10 layers, logits of order 1: 512 eps of float32
    np.testing.assert_allclose(got, want, rtol=0, atol=512 * np.finfo(np.float32).eps)


def test_models_vit_positions_resize():
    table = RNG.standard_normal((49, 5))
    np.testing.assert_array_equal(resize_positions(table, 7), table)
    # a cubic kernel keeps straight lines
    linear = np.add.outer(2.0 * np.arange(7), np.arange(7)).reshape(49, 1)
    # samples at 2/3, 3, 16/3, clear of the edge but for one tap
    got = resize_positions(linear, 3).reshape(3, 3)
    np.testing.assert_allclose(got[1, 1], 9.0, rtol=1e-14)
    np.testing.assert_allclose(resize_positions(np.ones((49, 1)), 4), 1.0, rtol=1e-14)


def test_models_vit_rejects_bad_input():
    with pytest.raises(ValueError, match="image_size must be a multiple of patch"):
        init_vit(RNG, image_size=9, patch=4, dim=12, depth=1)
    with pytest.raises(ValueError, match="cannot be cut into patches of 4"):
        patchify(np.zeros((8, 6, 3)), 4)
    with pytest.raises(ValueError, match=r"pos_embed.shape\[0\] = 5, but must be 17"):
        vit_forward(np.zeros((16, 16, 3)), PARAMS, num_heads=3)
    with pytest.raises(ValueError, match=r"images.shape\[2\] = 1, but must be 3"):
        vit_forward(np.zeros((8, 8, 1)), PARAMS, num_heads=3)
    with pytest.raises(ValueError, match="square number of rows"):
        resize_positions(np.zeros((50, 4)), 4)
