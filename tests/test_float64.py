"""ref computes in float64, whatever comes in: float32 arrays give what the same numbers give in float64."""

import numpy as np
import pytest

import ref
from ref.blocks.optim import tree_leaves, tree_map

# pruning packs values as they are stored, melt decodes to float32; the others' examples hold parameters,
# states and inputs
SLUGS = (
    "softmax_free", "hilo", "efficientvit", "shvit", "dependencyvit", "quantization", "quantizable",
    "distillation", "nas", "memoryformer", "vvma", "unified_norm", "spec_kv", "spec_pc", "lightweight",
    "memmamba", "bmojo", "atlas", "pavlovian", "gtrxl", "concept_centric", "grokking", "masked_multidomain",
    "mtm", "long_text_hack", "verbatim_memory", "adaptformer", "logah", "user_prefix", "wta_crs",
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
                # a copy may lie otherwise in memory, and BLAS then add in another order: a few ulps
                atol = 64 * np.finfo(np.float64).eps * np.abs(a[np.isfinite(a)]).max(initial=0)
                np.testing.assert_allclose(b, a, rtol=0, atol=atol, err_msg=f"{slug}.{e.fn}, output {n}")
