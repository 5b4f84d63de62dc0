"""Axial attention: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from ref.attention.axial import AxialConfig, AxialParams, ExteriorParams
from ref.blocks.transformer import AttentionParams, BlockParams
from tests.attention import laws_axial
from tests.attention.house import to_house
from tests.golden_runner import call_args, compare_gradients, golden, graded, look_up, run
from tests.laws import law_tests, rejects

globals().update(law_tests(laws_axial))

# the stored name of a field -> the house's; weights [out, in] are turned
BLOCK = {
    "ln_attn_g": "ln1_scale",
    "ln_attn_b": "ln1_bias",
    "ln_mlp_g": "ln2_scale",
    "ln_mlp_b": "ln2_bias",
    "in_w": "w_fc1",
    "in_b": "b_fc1",
    "out_w": "w_fc2",
    "out_b": "b_fc2",
    **{f"{m}_{kind}": f"{kind}_{m}" for m in "qkvo" for kind in "wb"},
}
MODEL = {
    **{name: name for name in ("embs", "pos_h", "pos_w", "outer", "inner", "exterior", "blocks")},
    "final_g": "ln_scale",
    "final_b": "ln_bias",
    "head_w": "w_head",
    "head_b": "b_head",
    "conv_w": "w_conv",
    "conv_b": "b_conv",
}


def turned(name, x, conv=(3, 2, 0, 1)):
    """An array between the two layouts."""
    if name == "conv_w":
        return x if x is None else x.transpose(conv)
    return x.T if name.endswith("_w") and name != "pos_w" else x


def params(tree):
    """A stored tree as AxialParams, or a tuple of trees as AttentionParams, one an axis."""
    if isinstance(tree, tuple):
        return tuple(AttentionParams(**to_house(t)) for t in tree)
    block = lambda t: BlockParams(**{BLOCK[n]: turned(n, x) for n, x in t.items()})
    made = {}
    for name, x in tree.items():
        if name in ("outer", "inner", "blocks"):
            made[name] = tuple(map(block, x))
        elif name == "exterior":
            made[name] = None if x is None else params(x)
        else:
            made[MODEL[name]] = turned(name, x)
    return (AxialParams if "embs" in made else ExteriorParams)(**made)


def stored(tree, wanted):
    """The fields of a result that the case asks for, by their stored names."""
    if isinstance(tree, BlockParams):
        return {n: turned(n, getattr(tree, BLOCK[n])) for n in wanted}
    if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
        return {n: stored(tree[int(n)], wanted[n]) for n in wanted}
    inner, back = lambda n: getattr(tree, MODEL[n]), lambda n, x: turned(n, x, (2, 3, 1, 0))
    return {n: stored(inner(n), w) if isinstance(w, dict) else back(n, inner(n)) for n, w in wanted.items()}


def outputs(case, result):
    return stored(result, case.meta["outs"]) if isinstance(result, AxialParams) else result


BUILD = {"params": params, "config": lambda c: AxialConfig(**c)}


@golden("axial")
def test_axial_golden_ref(case):
    run(case, ref.axial, build=BUILD, outs=outputs)


@graded("axial", only=("axial_nll",))
def test_axial_golden_gradients_of_the_mean_ref(case):
    """The stored gradients of the mean bits against the hand-written ones, of all channels or of one."""
    weight = case[case.meta["cotangents"][0]]  # of every bit: 1 / their number
    np.testing.assert_allclose(weight, 1 / weight.size, rtol=1e-12)
    grads = ref.axial.axial_grad(**call_args(case, ref.axial.axial_nll, BUILD))
    compare_gradients(case, grads, at=lambda grads, names: field(grads, names[1:]))


def field(grads, names):
    """One stored field, by its names from the outside in, of a tree of gradients."""
    wanted = None
    for name in reversed(names):
        wanted = {name: wanted}
    return look_up(stored(grads, wanted), names)


A = ref.axial
C1, C3 = AxialConfig(3, 4, 1, 5, 4, 2), AxialConfig(3, 4, 2, 5, 4, 2, num_exterior=2)
P1, P3 = (A.init_axial(np.random.default_rng(0), c) for c in (C1, C3))
X1, X3, Q = np.zeros((2, 3, 4), int), np.zeros((2, 3, 4, 2), int), np.ones((2, 3, 4, 2, 3))
MAPS = (AttentionParams(np.ones((6, 4)), np.ones((6, 4)), np.ones((6, 4)), np.ones((4, 6))),)
V = np.ones((2, 3, 4, 6))
BAD = {
    "heads": (lambda: AxialConfig(3, 4, 1, 5, 4, 3), "num_heads must divide the width 4"),
    "outer": (lambda: AxialConfig(3, 4, 1, 5, 4, 2, num_outer=3), "must be even"),
    "exterior": (lambda: AxialConfig(3, 4, 2, 5, 4, 2, num_exterior=1), "must be even"),
    "axis": (lambda: A.axis_attention(Q, Q, Q, axis=3), r"axis must be in 1\.\.2, got 3"),
    "batch": (lambda: A.axis_attention(Q, Q, Q, axis=0), r"axis must be in 1\.\.2, got 0"),
    "block": (lambda: A.transformer_block(V, P1.outer[0], axis=3, num_heads=2), r"axis must be in 1\.\.2"),
    "shift": (lambda: A.shift(V, axis=4), r"axis must be in 1\.\.3, got 4"),
    "axes": (
        lambda: A.axial_attention(V, MAPS, axes=(1, 2), num_heads=2),
        "one entry for each of 2 axes, got 1",
    ),
    "mode": (lambda: A.axial_attention(V, MAPS, axes=(1,), num_heads=2, mode="mean"), 'mode must be "sum"'),
    "maps": (lambda: A.axial_attention(V, MAPS, axes=(1,), num_heads=3), "num_heads must divide the width 4"),
    "value": (
        lambda: A.axial_logits(P1, X1 + 5, config=C1),
        r"x must be in 0\.\.4, got 5\.\.5",
    ),
    "negative": (lambda: A.axial_nll(P3, X3 - 1, config=C3), r"x must be in 0\.\.4"),
    "float": (lambda: A.axial_grad(P1, X1 * 1.0, config=C1), "x must be integers"),
    "size": (lambda: A.axial_logits(P1, X1[:, :2], config=C1), r"x\.shape\[1\] = 2, but must be 3"),
    "channels": (lambda: A.axial_logits(P3, X1, config=C3), r"x must have shape \[B, 3, 4, 2\]"),
    "table": (lambda: A.axial_logits(P1._replace(pos_w=P1.pos_h), X1, config=C1), r"pos_w\.shape\[0\] = 3"),
    "slice": (lambda: A.axial_nll(P3, X3, config=C3, slice_index=2), r"slice_index must be in 0\.\.1, got 2"),
    "one_slice": (lambda: A.axial_grad(P1, X1, config=C1, slice_index=1), r"slice_index must be in 0\.\.0"),
    "gumbel": (
        lambda: A.sample_semi_parallel(P1, np.ones((1, 3, 4, 4)), config=C1),
        r"gumbel\.shape\[3\] = 4",
    ),
    "gumbel_naive": (lambda: A.sample_naive(P3, np.ones((1, 3, 4, 5)), config=C3), "gumbel must have shape"),
    "video": (
        lambda: A.axial_video_logits(P1, X1[None], config=C1),
        "video needs channels=1 and num_exterior",
    ),
    "frames": (lambda: A.axial_video_logits(P1, X1, config=C1), "x must have shape"),
    "cost": (
        lambda: A.axial_cost((8, 8), emb_dim=4, num_heads=3, num_outer=2, num_inner=1),
        "num_heads dividing",
    ),
}

test_axial_rejects_bad_input = rejects(BAD)
