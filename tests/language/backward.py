"""The gradients that golden cases store, against the hand-written `<fn>_backward` of ref."""

import inspect

import numpy as np

from ref.blocks.optim import tree_leaves
from tests.golden_runner import _at, _check, call_args, resolve


def check_backward(case, module, *, build=None):
    """`<fn>_backward(arguments, cotangents, options)` gives the gradients of the float arguments in order."""
    fn, back = (resolve(module, case.meta["fn"] + end) for end in ("", "_backward"))
    given, known = call_args(case, fn, build), inspect.signature(back).parameters
    options = {n: given[n] for n, p in known.items() if n in given and p.kind is p.KEYWORD_ONLY}
    names = [n for n in known if n in given and n not in options]
    outs = case.meta["outs"]
    weights = [
        np.zeros(case[out].shape) if key is None else case[key]
        for key, out in zip(
            case.meta["cotangents"], outs.values() if isinstance(outs, dict) else outs, strict=True
        )
    ]
    grads = back(*(given[n] for n in names), *weights, **options)
    floats = [n for n in names if any(x.dtype.kind == "f" for x in tree_leaves(given[n]))]
    by_name = dict(zip(floats, grads if len(floats) > 1 else (grads,), strict=True))
    for path, key in case.meta["grads"].items():
        name, *rest = path.split(".")
        _check(case, key, _at(by_name[name], rest))
