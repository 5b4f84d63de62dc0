"""Parameters and inputs in float32 are computed with in float64: the numbers of the same values in double."""

import numpy as np
import pytest

from ref.blocks.optim import tree_leaves, tree_map
from ref.memory.atlas import atlas_layer, init_atlas
from ref.models.bert import bert_embed, bert_encode, bert_encode_vjp, init_bert
from ref.models.gpt import gpt_embed, gpt_forward, init_gpt
from ref.models.graphormer import graphormer, virtual_edges
from ref.models.mamba import init_mamba, mamba_block, mamba_block_vjp
from ref.training.logah import GHNConfig, init_ghn

RNG = np.random.default_rng(0)
X, IDS = RNG.standard_normal((2, 5, 8)), RNG.integers(0, 7, (2, 5))
SIZES = {"vocab": 7, "context": 5, "dim": 8, "depth": 1, "std": 0.5}
BERT, GPT, MAMBA = init_bert(RNG, **SIZES), init_gpt(RNG, **SIZES), init_mamba(RNG, 8, state=3)
GRAPH = init_ghn(RNG, GHNConfig(rank=3, dim=8, layers=1, heads=2, num_classes=10, K=48)).encoder
EDGES, ALL = virtual_edges(np.eye(5, k=1, dtype=int))[None].repeat(2, axis=0), np.ones((2, 5), bool)
CALLS = {
    "bert": (bert_embed, (IDS, BERT), {}),
    "bert_blocks": (bert_encode, (IDS, BERT), {"num_heads": 2}),
    "bert_backward": (bert_encode_vjp, (IDS, BERT, X), {"num_heads": 2}),
    "gpt": (gpt_embed, (IDS, GPT), {}),
    "gpt_logits": (gpt_forward, (IDS, GPT), {"num_heads": 2}),
    "state_space": (mamba_block, (X, MAMBA), {}),
    "state_space_backward": (mamba_block_vjp, (X, MAMBA, X), {}),
    "graph": (graphormer, (X, EDGES, ALL, GRAPH), {"num_heads": 2}),
    "trained_while_reading": (atlas_layer, (X, init_atlas(RNG, 8, heads=2)), {"heads": 2, "window": 3}),
}


@pytest.mark.parametrize("name", CALLS)
def test_models_compute_in_float64_with_float32_parameters(name):
    fn, args, options = CALLS[name]
    single = tree_map(lambda a: a.astype(np.float32) if a.dtype.kind == "f" else a, args)
    double = tree_map(lambda a: a.astype(np.float64) if a.dtype.kind == "f" else a, single)
    for got, want in zip(*(tree_leaves(fn(*a, **options)) for a in (single, double)), strict=True):
        assert got.dtype == want.dtype
        # the same products; only the order in which BLAS adds may depend on the layout of a copy
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
