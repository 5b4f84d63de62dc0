"""The golden runner builds parameter trees of the annotated classes."""

from types import SimpleNamespace
from typing import NamedTuple, Optional

import numpy as np
import pytest

from tests.golden_runner import Case, call_args, run_backward


class Branch(NamedTuple):
    """A leaf with a default."""

    w: np.ndarray
    b: np.ndarray | None = None


class Tree(NamedTuple):
    """Tuples of trees: always there, optional in both spellings, of fixed length, nested."""

    blocks: tuple[Branch, ...]
    branches: tuple[Branch, ...] | None = None
    again: Optional[tuple[Branch, ...]] = None  # noqa: UP045
    pair: tuple[np.ndarray, Branch] | None = None
    stages: tuple[tuple[Branch, ...], ...] = ()


def built(spec):
    def fn(params: Tree | None):
        return params

    meta = {"args": {"params": spec}, "kwargs": {}, "dtype": "float64"}
    return call_args(Case("case0", meta, {"w": np.ones(2), "b": np.zeros(2)}), fn)["params"]


@pytest.mark.parametrize("field", ["blocks", "branches", "again"])
def test_golden_runner_looks_into_optional_tuples(field):
    tree = built({"blocks": [], field: [{"w": "w"}, {"w": "w", "b": "b"}]})
    assert all(type(b) is Branch for b in getattr(tree, field))
    assert getattr(tree, field)[0].b is None
    np.testing.assert_array_equal(getattr(tree, field)[1].b, np.zeros(2))


def test_golden_runner_builds_pairs_stages_and_none():
    tree = built({"blocks": [], "branches": None, "pair": ["w", {"w": "w"}], "stages": [[{"w": "w"}], []]})
    assert tree.branches is None
    assert tree.again is None
    assert type(tree.pair[1]) is Branch
    assert type(tree.stages[0][0]) is Branch
    assert tree.stages[1] == ()
    assert built(None) is None


def test_golden_runner_refuses_a_tree_without_a_class():
    with pytest.raises(TypeError, match="no class to build"):
        built({"blocks": [], "branches": {"w": "w"}})


def scaled(x, scale):
    return scale * x, scale


def scaled_bwd(do, x, scale):
    return do * scale, np.sum(do * x)


def scaled_vjp(x, scale, do, dscale):
    return do * scale, np.sum(do * x) + dscale


def gradient_case(grad, cotangents):
    meta = {"fn": "scaled", "args": {"x": "x", "scale": "scale"}, "kwargs": {}, "dtype": "float64"}
    meta |= {"outs": ["x", "scale"], "cotangents": cotangents, "grads": {"scale": "g"}, "tol": {"g": "exact"}}
    arrays = {"x": np.ones(2), "scale": np.array(3.0), "do": np.array([2.0, 4.0]), "g": np.array(grad)}
    return Case("case0", meta, arrays)


@pytest.mark.parametrize("backward", [{"scaled_vjp": scaled_vjp}, {"scaled_bwd": scaled_bwd}])
def test_golden_runner_finds_cotangents_by_name(backward):
    module = SimpleNamespace(scaled=scaled, **backward)
    run_backward(gradient_case(6.0, ["do", None]), module)
    with pytest.raises(AssertionError, match="scaled: g"):
        run_backward(gradient_case(7.0, ["do", None]), module)


def test_golden_runner_refuses_a_cotangent_without_a_way_back():
    with pytest.raises(AssertionError, match="no way back"):
        run_backward(
            gradient_case(6.0, ["do", "scale"]), SimpleNamespace(scaled=scaled, scaled_bwd=scaled_bwd)
        )
    with pytest.raises(AssertionError, match="no backward pass"):
        run_backward(gradient_case(6.0, ["do", None]), SimpleNamespace(scaled=scaled))
