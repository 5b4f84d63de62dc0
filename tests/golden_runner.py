"""One runner for every golden file: a case says which function to call, with what, and what must come out.

`@golden("flash")` parametrises a test with the cases of flash.npz; `run(case, ref.flash)` calls the case's
function in that module and compares every output. `@graded` takes the cases that store gradients, and
`run_backward` compares these with the backward pass that ref writes out. The folder is $TRIPTYCH_GOLDEN,
tests/golden unless set.
"""

import dataclasses
import inspect
import json
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

EPS32 = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Case:
    """One stored case: its name, its meta and its arrays."""

    name: str
    meta: dict
    arrays: dict

    def __getitem__(self, key):
        """The array under `key`: JSON text parsed where the meta says so, floats cast to the case's dtype."""
        x = self.arrays[key]
        if key in self.meta.get("json", ()):
            return json.loads(x.item() if x.dtype.kind == "U" else bytes(x).decode())
        if x.dtype.kind in "US":
            return x.item() if x.ndim == 0 else x.tolist()
        if x.dtype.kind == "f" and self.meta["dtype"].startswith("float"):
            return x.astype(self.meta["dtype"])
        return x


def folder():
    """Where the golden files are."""
    return Path(os.environ.get("TRIPTYCH_GOLDEN", Path(__file__).parent / "golden"))


def cases(slug, *, needs=None):
    """Every case of <slug>.npz whose `needs` (a model it must have) is the given one."""
    with np.load(folder() / f"{slug}.npz", allow_pickle=False) as z:
        names = sorted(
            (k[: -len("/meta")] for k in z.files if k.endswith("/meta")), key=lambda s: (len(s), s)
        )
        found = []
        for name in names:
            meta = json.loads(z[f"{name}/meta"].item())
            if meta.get("needs") == needs:
                arrays = {k[len(name) + 1 :]: z[k] for k in z.files if k.startswith(f"{name}/")}
                found.append(Case(name, meta, arrays))
    if not found:
        raise ValueError(f"{folder() / slug}.npz holds no case with needs={needs}")
    return found


def golden(slug, *, needs=None, only=None):
    """Parametrise a test with the cases of a slug; `only` keeps the functions a layer has (accel: the core
    ones).
    """
    return _parametrize(slug, [c for c in cases(slug, needs=needs) if only is None or c.meta["fn"] in only])


def graded(slug, *, only=None, always=()):
    """Parametrise a test with the cases that store gradients, of the functions in `only` if given.

    Every case of a function in `always` counts, so that the test fails if one stores none.
    """
    kept = lambda meta: meta["fn"] in always or (meta.get("grads") and (only is None or meta["fn"] in only))
    return _parametrize(slug, [c for c in cases(slug) if kept(c.meta)])


def _parametrize(slug, chosen):
    return pytest.mark.parametrize("case", chosen, ids=[f"{slug}-{c.name}-{c.meta['fn']}" for c in chosen])


def call_args(case, fn, build=None, convert=lambda x: x):
    """Arguments of the case by name: arrays, None, tuples, and parameter trees made of the annotated classes.

    build: {argument: function from the raw tree (nested dicts of arrays) to the object} where annotations do
    not do. convert: applied to every array.
    """
    hints = _hints(fn)
    out = {}
    for name, spec in case.meta["args"].items():
        raw = _load(case, spec, convert)
        made = build and name in build
        out[name] = build[name](raw) if made else _typed(raw, hints.get(name))
    for name, value in case.meta["kwargs"].items():
        made = build and name in build
        out[name] = build[name](value) if made else _tuples(value)
    return out


def resolve(module, name):
    """The function a case names, dotted for methods. A missing one is an AttributeError, hence a failed
    test.
    """
    for part in name.split("."):
        module = getattr(module, part)
    return module


def run(case, module, *, build=None, outs=None):
    """Call the case's function in a ref module and compare all its outputs.

    outs: a function from (case, result) to the result in the golden's layout, where the house layout differs.
    """
    fn = resolve(module, case.meta["fn"])
    result = fn(**call_args(case, fn, build))
    compare(case, outs(case, result) if outs else result)


def backward(case, module, *, build=None, **options):
    """{argument: gradient} of a case, by the hand-written backward pass of its function in a ref module.

    That is `<fn>_backward`, `<fn>_vjp` or `<fn>_bwd`. Its parameters that the forward pass does not know are
    the cotangents, in the order of the outputs: what is not given weighs 0, and an output without a parameter
    must have no weight. It returns the gradients of the float arguments in their order, or by name. options:
    more for the backward pass alone.
    """
    name = case.meta["fn"]
    ends = [end for end in ("_backward", "_vjp", "_bwd") if hasattr(module, name + end)]
    assert ends, f"{name} has no backward pass"
    back = getattr(module, name + ends[0])
    forward, known = (inspect.signature(f).parameters for f in (getattr(module, name), back))
    args = call_args(case, getattr(module, name), build)
    given = {n: args.get(n) for n, p in known.items() if n in args or (n in forward and p.default is p.empty)}
    outs = case.meta["outs"]
    outs = [outs] if isinstance(outs, str) else list(outs.values() if isinstance(outs, dict) else outs)
    weights = case.meta["cotangents"]
    taken = [n for n in known if n not in forward and n not in options][: len(weights)]
    assert not any(weights[len(taken) :]), f"{name}: an output with a cotangent has no way back"
    arrays = [
        case[key] if key is not None else np.zeros(case[out].shape) if isinstance(out, str) else None
        for key, out in zip(weights, outs, strict=True)
    ]
    cotangents = dict(zip(taken, arrays, strict=False))
    grads = back(**given, **cotangents, **options)
    if isinstance(grads, dict):
        return grads
    floats = [n for n in known if n in given and _floats_in(given[n])]
    if not isinstance(grads, tuple) or (len(floats) == 1 and hasattr(grads, "_fields")):
        grads = (grads,)
    return grads._asdict() if hasattr(grads, "_fields") else dict(zip(floats, grads, strict=False))


def compare_gradients(case, grads, *, but=(), at=None):
    """Compare {argument: gradient} with the gradients that the case stores, but those at the paths `but`.

    at: a function from (grads, names of the path) to the array in the golden's layout, where looking the
    names up does not do.
    """
    for path, key in case.meta["grads"].items():
        if path not in but:
            _check(case, key, (at or look_up)(grads, path.split(".")))


def run_backward(case, module, *, build=None, outs=None, **options):
    """Compare the gradients that the case stores with those of `backward`.

    outs: {argument: function from its gradient to the golden's layout}, where the house layout differs.
    """
    grads = backward(case, module, build=build, **options)
    shown = {name: show(grads[name]) for name, show in (outs or {}).items() if name in grads}
    compare_gradients(case, {**grads, **shown})


def run_accel(case, module, *, build=None, outs=None, x64=False, options=None, slack=1.0):
    """The same in accel, with gradients: float32, or float64 under x64.

    In float32 an output may be off by 512 eps of the largest entry (reductions in these cases have at most
    512 terms, and a sum of n terms is within n eps); slack multiplies that for a function worse conditioned,
    with a reason there.
    """
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(x64):
        floats = jnp.float64 if x64 else jnp.float32
        # NumPy converts and `device_put` moves: neither compiles a program for each shape
        convert = lambda x: (
            jax.device_put(np.asarray(x, floats if _is_float(x) else None)) if _is_array(x) else x
        )
        fn = resolve(module, case.meta["fn"])
        args = call_args(case, fn, build, convert)
        given = {**args, **(options or {})}
        tol = None if x64 else 512 * EPS32 * slack
        shown = lambda result: outs(case, result) if outs else result
        if not case.meta.get("grads"):
            compare(case, shown(fn(**given)), least=tol)
        else:
            # A number or a flag is an option, not something to differentiate; everything else with floats is.
            leaves = {n: a for n, a in args.items() if n in case.meta["args"] and _has_floats(a)}
            rest = {n: a for n, a in given.items() if n not in leaves}

            @jax.jit  # one program for the values and the gradients
            def both(leaves):
                def scalar(leaves):
                    result = shown(fn(**leaves, **rest))
                    return _weighted(case, result, floats), result

                return jax.value_and_grad(scalar, has_aux=True, allow_int=True)(leaves)

            (_, result), grads = both(leaves)
            compare(case, result, least=tol)
            for path, key in case.meta["grads"].items():
                _check(case, key, look_up(grads, path.split(".")), least=tol)


def compare(case, result, *, least=None):
    """Compare a result with the tree of outputs in the meta; `least` is a floor for the tolerance
    (float32).
    """
    _walk(case, case.meta["outs"], result, lambda key, got: _check(case, key, got, least))


def _check(case, key, got, least=None):
    want, tol = case[key], case.meta["tol"][key]
    label = f"{case.name} {case.meta['fn']}: {key}"
    if not isinstance(want, np.ndarray):  # text and nested lists
        assert _plain(got) == _plain(want), label
        return
    got = np.asarray(got)
    assert got.shape == want.shape, f"{label}: shape {got.shape}, expected {want.shape}"
    floats = want.dtype.kind == "f" and got.dtype.kind == "f"
    if tol == "exact" and not (floats and least):
        np.testing.assert_array_equal(got, want, err_msg=label)
        return
    rtol, atol = (0.0, 0.0) if tol == "exact" else tol
    if least:
        finite = np.abs(want[np.isfinite(want)])
        rtol, atol = max(rtol, least), max(atol, least * (finite.max() if finite.size else 0.0))
    np.testing.assert_allclose(
        got.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=atol, err_msg=label
    )


def _walk(case, tree, got, visit):
    """Pair the leaves of the outs tree with the result: a list is a tuple, an object a record, None is not
    compared.
    """
    if tree is None:
        return
    if isinstance(tree, str):
        visit(tree, got)
    elif isinstance(tree, dict):
        for field, sub in tree.items():
            _walk(case, sub, got[field] if isinstance(got, dict) else getattr(got, field), visit)
    else:
        if len(tree) == 1 and not (isinstance(got, tuple | list) and not hasattr(got, "_fields")):
            got = (got,)
        assert len(tree) <= len(got), f"{case.name}: {len(tree)} outputs expected, {len(got)} returned"
        for sub, x in zip(tree, got, strict=False):
            _walk(case, sub, x, visit)


def _weighted(case, result, dtype):
    """The scalar whose gradients the case stores: sum over outputs of sum(cotangent * output)."""
    import jax.numpy as jnp

    total = jnp.zeros((), dtype)
    for weight, out in zip(case.meta["cotangents"], _aligned(case.meta["outs"], result), strict=True):
        if weight is not None:
            total = total + jnp.sum(jnp.asarray(case[weight], dtype) * out)
    return total


def _aligned(outs, result):
    if isinstance(outs, dict):
        return [result[f] if isinstance(result, dict) else getattr(result, f) for f in outs]
    if len(outs) == 1 and (not isinstance(result, tuple) or hasattr(result, "_fields")):
        return [result]
    return result[: len(outs)]


def _load(case, spec, convert):
    if spec is None or isinstance(spec, bool | int | float):
        return spec
    if isinstance(spec, str):
        return convert(case[spec])
    if isinstance(spec, dict):
        return {k: _load(case, v, convert) for k, v in spec.items()}
    return tuple(_load(case, v, convert) for v in spec)


def _hints(obj):
    try:
        return typing.get_type_hints(inspect.unwrap(obj))
    except (NameError, TypeError):
        return {}


def _typed(raw, hint):
    """A raw tree of dicts and tuples as the annotated dataclasses or NamedTuples; absent fields keep their
    defaults.
    """
    united = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if united else (hint,)
    if isinstance(raw, dict):
        cls = next((h for h in options if dataclasses.is_dataclass(h) or hasattr(h, "_fields")), None)
        if cls is None:
            raise TypeError(f"no class to build {sorted(raw)} from: annotate the argument, or pass build=")
        inner = _hints(cls)
        return cls(**{k: _typed(v, inner.get(k)) for k, v in raw.items()})
    if isinstance(raw, tuple):
        hint = next((h for h in options if typing.get_origin(h) is tuple), None)
        inner = [h for h in typing.get_args(hint) if h is not Ellipsis] or [None]
        return tuple(_typed(v, inner[0] if len(inner) == 1 else inner[i]) for i, v in enumerate(raw))
    return raw


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def look_up(tree, path):
    """What stands in a tree at a path of field names, keys and numbers."""
    for part in path:
        if isinstance(tree, dict):
            tree = tree[part]
        else:
            tree = tree[int(part)] if part.isdecimal() else getattr(tree, part)
    return tree


def _plain(x):
    if hasattr(x, "tolist"):
        return x.tolist()
    return [_plain(v) for v in x] if isinstance(x, tuple | list) else x


def _floats_in(tree):
    """Whether a tree holds an array of floats; numbers are options, not something to differentiate."""
    if isinstance(tree, dict | tuple):
        return any(map(_floats_in, tree.values() if isinstance(tree, dict) else tree))
    if dataclasses.is_dataclass(tree):
        return any(_floats_in(getattr(tree, f.name)) for f in dataclasses.fields(tree))
    return _is_float(tree)


def _is_array(x):
    return isinstance(x, np.ndarray | np.generic)


def _is_float(x):
    return _is_array(x) and x.dtype.kind == "f"


def _has_floats(tree):
    import jax
    import jax.numpy as jnp

    return any(
        jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in jax.tree.leaves(tree) if hasattr(x, "dtype")
    )
