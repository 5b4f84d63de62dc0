"""Lightweight blocks: laws on ref, golden vectors, bad inputs."""

import numpy as np
import pytest

import ref
from ref.blocks.conv import BN, ConvBN
from ref.blocks.transformer import BlockParams
from tests.compression import laws_lightweight
from tests.golden_runner import backward, compare_gradients, golden, graded, look_up, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_lightweight))
W = ref.lightweight


def house(tree):
    """Stored trees have weights [out, in] and norms by other names."""
    if "groups" in tree:
        return W.AlbertParams(tree["w_in"].T, tree["b_in"], tuple(map(block, tree["groups"])))
    if "local" in tree:
        convs = {name: conv(tree[name]) for name in ("local", "proj", "fuse")}
        blocks = tuple(map(block, tree["blocks"]))
        rest = {name: tree[name] for name in ("ln_scale", "ln_bias")}
        return W.MobileViTParams(w_in=tree["w_in"].T, blocks=blocks, **convs, **rest)
    return W.FNetParams(**turned(tree))


def block(tree):
    return BlockParams(**turned(tree))


def turned(tree):
    return {name: x.T if name.startswith("w_") else x for name, x in tree.items()}


def conv(tree):
    w, bn = tree["w"], tree["bn"]
    w = w[:, :, None, None] if w.ndim == 2 else w
    return ConvBN(w, BN(bn["scale"], bn["bias"], bn["mean"], bn["var"]))


@golden("lightweight")
def test_lightweight_golden_ref(case):
    run(case, W, build={"params": house})


@graded("lightweight")
def test_lightweight_golden_backward(case):
    """The stored gradients of the forward cases against the backward passes written by hand."""
    grads = backward(case, W, build={"params": house})
    compare_gradients(case, grads, at=lambda grads, names: field(case, grads, names))


def field(case, grads, names):
    """One gradient in the layout of the file, which stores a 1x1 kernel as a matrix."""
    renamed = {"scale": "gamma", "bias": "beta"}
    got = look_up(grads, [names[0], *(renamed.get(n, n) for n in names[1:])])
    got = got.T if names[-1].startswith("w_") else got
    stored = case[case.meta["grads"][".".join(names)]]
    return got[:, :, 0, 0] if got.ndim == stored.ndim + 2 else got


RNG = np.random.default_rng(0)
X, MAP = np.ones((2, 4, 6)), np.ones((1, 4, 4, 6))
FNET, ALBERT, LSRA = (
    W.init_fnet(RNG, 6, 8),
    W.init_albert(RNG, 6, 6, 8, groups=2),
    W.init_lsra(RNG, 6, heads=1),
)
MOBILE, SEPARABLE = W.init_mobilevit(RNG, 6, 4), W.init_separable_mlp(RNG, 6)
SE = W.init_separable_mlp(RNG, 6, kernel=2)
BAD = {
    "no_tokens": (lambda: W.fourier_mix(np.ones((2, 0, 6))), "at least one token"),
    "vector": (lambda: W.fourier_mix(np.ones(6)), "x must have shape"),
    "layers": (lambda: W.albert_encoder(X, ALBERT, num_heads=2, num_layers=1), "at least the 2 groups"),
    "heads": (
        lambda: W.albert_encoder(X, ALBERT, num_heads=4, num_layers=2),
        "num_heads must divide the width 6",
    ),
    "embed": (
        lambda: W.albert_encoder(X[..., :5], ALBERT, num_heads=2, num_layers=2),
        r"w_in\.shape\[0\] = 6",
    ),
    "even_kernel": (lambda: W.light_conv(X, np.ones((2, 4))), "kernel must be odd unless causal"),
    "conv_heads": (lambda: W.light_conv(X, np.ones((4, 3))), "must divide the channels, got 4 for 6"),
    "token_kernel": (lambda: W.light_conv(X, np.ones((2, 3, 2, 3))), r"kernel\.shape\[1\] = 3"),
    "odd_width": (lambda: W.lsra_block(X[..., :5], LSRA, num_heads=1), "got D=5"),
    "odd_init": (lambda: W.init_lsra(RNG, 5, heads=1), "got D=5"),
    "half_heads": (lambda: W.lsra_block(X, LSRA, num_heads=2), "num_heads must divide the width 3"),
    "half_width": (lambda: W.lsra_block(np.ones((2, 4, 8)), LSRA, num_heads=2), r"w_g\.shape\[0\] = 3"),
    "layer": (lambda: W.lsra_kernel(4, 4), r"layer must be in 0\.\.3"),
    "patch": (
        lambda: W.mobilevit_block(MAP, MOBILE, patch=3, num_heads=2),
        "cannot be cut into patches of 3",
    ),
    "patch_zero": (lambda: W.mobilevit_block(MAP, MOBILE, patch=0, num_heads=2), "patches of 0"),
    "grid": (lambda: W.mobilevit_block(X, MOBILE, num_heads=2), "x must have shape"),
    "mobile_heads": (
        lambda: W.mobilevit_block(MAP, MOBILE, num_heads=3),
        "num_heads must divide the width 4",
    ),
    "mobile_no_heads": (lambda: W.mobilevit_block(MAP, MOBILE, num_heads=0), "num_heads must divide"),
    "squeeze": (lambda: W.separable_mlp(MAP, SEPARABLE, squeeze=True), r"squeeze needs params\.se_w1"),
    "depthwise": (lambda: W.separable_mlp(MAP, SE), "depthwise must be .* odd k"),
    "kind": (lambda: W.block_cost("bert", shape=(4, 6)), "kind must be one of standard, mobilevit"),
    "transform": (lambda: W.block_cost("fnet", shape=(4, 6), hidden=8, transform="dct"), "transform must be"),
}

test_lightweight_rejects_bad_input = rejects(BAD)


def test_lightweight_cost_takes_its_own_sizes_only():
    with pytest.raises(TypeError, match="heads"):
        W.block_cost("standard", shape=(4, 6), hidden=8, heads=2)
