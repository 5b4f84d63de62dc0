"""AdaptFormer: laws on ref, golden vectors, bad inputs."""

import numpy as np

import ref
from ref.blocks.optim import tree_map
from ref.blocks.transformer import BlockParams
from tests.golden_runner import golden, graded, run, run_backward
from tests.laws import law_tests, rejects
from tests.training import laws_adaptformer

globals().update(law_tests(laws_adaptformer))
A = ref.adaptformer


def block(raw):
    """A stored block, which may lack biases."""
    return BlockParams(*(raw.get(name) for name in BlockParams._fields))


def network(raw):
    """The parameter tree of a stored network, whose blocks may lack biases and which may lack adapters."""
    adapters = raw.get("adapters")
    trees = {
        "cls_token": raw.get("cls_token"),
        "blocks": tuple(block(b) for b in raw["blocks"]),
        "adapters": None if adapters is None else tuple(A.AdapterParams(**a) for a in adapters),
    }
    return A.AdaptedViTParams(**{**raw, **trees})


def build(case):
    return {"params": network} if case.meta["fn"] == "vit_forward" else {"block_params": block}


@golden("adaptformer")
def test_adaptformer_golden_ref(case):
    run(case, A, build=build(case))


@graded("adaptformer")
def test_adaptformer_golden_gradients_ref(case):
    run_backward(case, A, build=build(case))


RNG = np.random.default_rng(0)
NET = A.init_vit(
    RNG, image_size=8, patch=4, dim=8, depth=1, num_classes=3, channels=1, num_prompts=1, bottleneck=2
)
BRANCH, X, IMAGES = NET.adapters[0], np.ones((4, 8)), np.ones((2, 8, 8, 1))
LEARNABLE = BRANCH._replace(scale=np.ones(()))
DATA = IMAGES, np.zeros(2, int)
fit = lambda **o: A.fine_tune(
    NET, DATA, **{"tuning": "linear", "lr": 0.1, "epochs": 1, "seed": 0, "num_heads": 2, **o}
)
BAD = {
    "no_scale": (lambda: A.adapter(X, BRANCH, scale=None), "exactly one of the two"),
    "two_scales": (lambda: A.adapter(X, LEARNABLE), "exactly one of the two"),
    "width": (lambda: A.adapter(X[:, :6], BRANCH), r"w_down\.shape\[0\] = 8, but axis d is 6"),
    "up": (lambda: A.adapter(X, BRANCH._replace(w_up=np.ones((3, 8)))), r"w_up\.shape\[0\] = 3"),
    "layernorm": (lambda: A.adapter(X, BRANCH, layernorm="both"), "layernorm must be one of"),
    "no_norm": (lambda: A.adapter(X, BRANCH, layernorm="in"), "needs ln_scale and ln_bias"),
    "option": (lambda: A.adapted_block(X, NET.blocks[0], BRANCH, num_heads=2, option="after"), "option must"),
    "heads": (lambda: A.adapted_block(X, NET.blocks[0], BRANCH, num_heads=3), "num_heads must divide"),
    "bottleneck": (lambda: A.adapter_init(RNG, 8, 0), "bottleneck must be at least 1"),
    "frames": (
        lambda: A.init_vit(RNG, image_size=8, patch=4, dim=8, depth=1, num_classes=3, frames=3, tubelet=2),
        "frames must be a multiple of tubelet",
    ),
    "tubelet": (
        lambda: A.vit_forward(
            np.ones((1, 3, 8, 8, 1)), NET._replace(w_patch=np.ones((2, 4, 4, 1, 8))), num_heads=2
        ),
        "3 frames, not a multiple of the tubelet's 2",
    ),
    "patch": (lambda: A.vit_forward(np.ones((1, 6, 8, 1)), NET, num_heads=2), "cannot be cut into patches"),
    "positions": (lambda: A.vit_forward(np.ones((1, 8, 12, 1)), NET, num_heads=2), "pos_embed"),
    "where": (lambda: A.plug_in(NET, RNG, 2, where="attention"), 'where must be "mlp"'),
    "no_blocks": (lambda: A.plug_in(BRANCH, RNG, 2), "field blocks"),
    "tuning": (lambda: A.trainable_mask(NET, "lora"), "tuning must be one of"),
    "no_prompts": (lambda: A.trainable_mask(NET._replace(prompts=None), "vpt"), "needs prompts"),
    "empty_prompts": (
        lambda: A.trainable_mask(NET._replace(prompts=(np.zeros((0, 8)),)), "vpt"),
        "needs prompts",
    ),
    "no_branches": (lambda: fit(tuning="adapter", dropout=-0.1), r"dropout in \[0, 1\)"),
    "count_prompts": (lambda: A.count_trainable(A.ViTSize(), "vpt", num_classes=3), "num_prompts"),
    "count_tuning": (lambda: A.count_trainable(A.ViTSize(), "lora", num_classes=3), "tuning must be one of"),
    "epochs": (lambda: fit(epochs=0), "epochs >= 1"),
    "warmup": (lambda: fit(warmup=2), r"warmup in 0\.\.epochs"),
    "labels": (
        lambda: A.fine_tune(NET, (IMAGES, np.zeros(1, int)), tuning="linear", lr=0.1, epochs=1, seed=0,
                            num_heads=2),
        "at least one image and label",
    ),
}  # fmt: skip

test_adaptformer_rejects_bad_input = rejects(BAD)


def test_adaptformer_edges():
    """An empty batch gives no logits; one token is a sequence; NaN stays in its image; there is no merge."""
    assert A.vit_forward(IMAGES[:0], NET, num_heads=2).shape == (0, 3)
    assert A.adapted_block(X[:1], NET.blocks[0], BRANCH, num_heads=2).shape == (1, 8)
    bad = IMAGES.copy()
    bad[0, 0, 0] = np.nan
    logits = A.vit_forward(bad, NET, num_heads=2)
    assert np.isnan(logits[0]).all()
    np.testing.assert_array_equal(logits[1], A.vit_forward(IMAGES, NET, num_heads=2)[1])
    assert not hasattr(A, "merge_adapter")
    same = tree_map(lambda x: x, NET)
    np.testing.assert_array_equal(
        A.vit_forward(IMAGES, same, num_heads=2), A.vit_forward(IMAGES, NET, num_heads=2)
    )
