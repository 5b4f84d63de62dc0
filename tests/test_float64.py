"""ref computes in float64, whatever comes in: float32 arrays give what the same numbers give in float64."""

import numpy as np
import pytest

import ref
from ref.blocks.optim import tree_leaves, tree_map

# pruning packs values as they are stored; the others' examples hold parameters, states and inputs
SLUGS = (
    "softmax_free", "hilo", "efficientvit", "shvit", "dependencyvit", "quantization", "quantizable",
    "distillation", "nas", "memoryformer", "vvma", "unified_norm", "spec_kv", "spec_pc", "lightweight",
)  # fmt: skip


def arrays_of(tree, dtype):
    is_float = lambda x: isinstance(x, np.ndarray) and x.dtype.kind == "f"
    return tree_map(lambda x: x.astype(np.float32).astype(dtype) if is_float(x) else x, tree)


@pytest.mark.parametrize("slug", SLUGS)
def test_float64_whatever_comes_in(slug):
    module = getattr(ref, slug)
    for e in module.example():
        fn = getattr(module, e.fn)
        wide, narrow = (
            tree_leaves(fn(*(arrays_of(a, dtype) for a in e.args), **e.kwargs))
            for dtype in (np.float64, np.float32)
        )
        for n, (a, b) in enumerate(zip(wide, narrow, strict=True)):
            if isinstance(a, np.ndarray) and a.dtype.kind == "f":
                assert b.dtype == np.float64, f"{slug}.{e.fn}, output {n}"
                np.testing.assert_array_equal(a, b, err_msg=f"{slug}.{e.fn}, output {n}")
