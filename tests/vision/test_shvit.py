"""SHViT: laws on ref, golden vectors, bad inputs."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

import ref
from ref.vision.shvit import SHViTConfig
from tests.golden_runner import golden, run, run_backward
from tests.laws import law_tests, rejects
from tests.vision import laws_shvit
from tests.vision.pyramid import config_of, released

globals().update(law_tests(laws_shvit))
V = ref.shvit


@golden("shvit")
def test_shvit_golden_ref(case):
    as_released = {**vars(V), "shvit_forward": released(V.shvit_forward)}
    run(case, SimpleNamespace(**as_released), build={"cfg": config_of(SHViTConfig)})


@golden("shvit", only=("single_head_attention",))
def test_shvit_golden_gradients_ref(case):
    run_backward(case, V)


X, MIXER = laws_shvit.attention(np.random.default_rng(0), (3, 3))
SMALL, OPTIONS = laws_shvit.SMALL, laws_shvit.OPTIONS
NET = V.init_shvit(np.random.default_rng(0), SMALL)
WIDE = np.ones((1, 3, 3, 24))
BLOCKS = [stage.blocks[0] for stage in NET.stages]
attend = lambda x=X, **o: V.single_head_attention(x, MIXER, **{**OPTIONS, **o})
BAD = {
    "pdim_all": (lambda: attend(pdim=12), r"pdim must be in 1\.\.11 for 12 channels"),
    "pdim_none": (lambda: attend(pdim=0), r"pdim must be in 1\.\.11"),
    "pdim_more": (lambda: attend(pdim=13, full=True), r"pdim must be in 1\.\.12"),
    "pdim_missing": (lambda: V.shvit_block(WIDE, BLOCKS[1], kind="s"), "pdim must be in .* got None"),
    "pdim_other": (lambda: attend(pdim=6), r"qkv\.shape\[0\] = 11, but must be 12"),
    "qk_dim": (lambda: attend(qk_dim=0), "qk_dim must be at least 1"),
    "channels": (lambda: attend(X[..., :11]), r"proj\.shape\[0\] = 12, but must be 11"),
    "map": (lambda: attend(X[0]), "x must have shape"),
    "gradient": (
        lambda: V.single_head_attention_backward(X[:1], X, MIXER, **OPTIONS),
        r"x\.shape\[0\] = 2, but axis B is 1",
    ),
    "gamma": (lambda: V.group_norm_1(X, np.ones(5), np.zeros(12)), r"gamma\.shape\[0\] = 5"),
    "kind": (lambda: V.shvit_block(X, BLOCKS[0], kind="x"), 'kind must be "i" or "s"'),
    "mixer": (lambda: V.shvit_block(X, BLOCKS[1], kind="i", **OPTIONS), "mixer must be None"),
    "no_mixer": (lambda: V.shvit_block(X, BLOCKS[0], kind="s", **OPTIONS), "mixer must be None"),
    "image_small": (lambda: V.shvit_forward(np.ones((1, 15, 16, 3)), NET, SMALL), "at least 16 pixels"),
    "image_grey": (lambda: V.shvit_forward(np.ones((1, 32, 32, 1)), NET, SMALL), "must be 3"),
    "name": (lambda: V.shvit_config("s5"), "name must be one of s1, s2, s3, s4"),
    "config_pdim": (lambda: replace(SMALL, pdims=(4, 24, 7)), r"pdim must be in 1\.\.23"),
    "config_kinds": (lambda: replace(SMALL, kinds=("i", "m", "s")), "kinds must hold three"),
    "config_stages": (lambda: replace(SMALL, dims=(16, 24)), "dims must hold three positive numbers"),
    "depthwise": (lambda: V.fold_residual_depthwise(NET.stem[1]), "w must be depthwise"),
    "one_head": (lambda: V.head_redundancy([np.ones((1, 1, 2, 2))]), "at least two heads"),
    "not_square": (lambda: V.head_redundancy([np.ones((1, 2, 2, 3))]), r"attn\.shape\[3\] = 3"),
    "patch": (lambda: V.stem_cost(0, 3), "patch and stages must be at least 1"),
}

test_shvit_rejects_bad_input = rejects(BAD)
