"""The catalogue is the truth: every line has its files, its mirrored functions, its tests and its chapter."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import accel
import ref
from ref.catalog import BY_SLUG, CATALOG, PARTS, technique
from ref.example import Example

ROOT = Path(__file__).parent.parent
ACCEL_ONLY = {"impl", "interpret"}
TILES = re.compile(r"(block|tile)_\w+")


def accel_file(t):
    return ROOT / "accel" / t.part / f"{t.slug}.py"


ids = lambda t: t.slug
every = pytest.mark.parametrize("t", CATALOG, ids=ids)
in_accel = pytest.mark.parametrize("t", [t for t in CATALOG if accel_file(t).exists()], ids=ids)


@every
def test_catalog_has_every_file_of(t):
    """ref, laws, test and chapter from the first day; with accel the fifth."""
    assert t.part in PARTS
    for path in (
        f"ref/{t.part}/{t.slug}.py",
        f"tests/{t.part}/laws_{t.slug}.py",
        f"tests/{t.part}/test_{t.slug}.py",
        f"docs/{t.part}/{t.slug}.md",
    ):
        assert (ROOT / path).exists(), path


@every
def test_catalog_names_functions_that_exist_in(t):
    module = getattr(ref, t.slug)
    for name in t.core:
        fn = getattr(module, name)
        assert inspect.getdoc(fn), f"{t.slug}.{name} has no docstring"
    examples = module.example()
    assert examples
    assert all(isinstance(e, Example) for e in examples)
    assert {e.fn for e in examples} <= set(t.core)


@in_accel
def test_catalog_accel_mirrors(t):
    """Same names, same arguments in the same order; accel adds only keyword-only impl, interpret and
    tiles.
    """
    r, a = getattr(ref, t.slug), getattr(accel, t.slug)
    for name in t.core:
        ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (r, a))
        extra = {n for n in theirs if n not in ours}
        assert all(n in ACCEL_ONLY or TILES.fullmatch(n) for n in extra), (name, extra)
        assert all(theirs[n].kind is inspect.Parameter.KEYWORD_ONLY for n in extra), name
        shared = [n for n in theirs if n not in extra]
        assert shared == list(ours), name
        for n in shared:
            same = theirs[n].default is ours[n].default or theirs[n].default == ours[n].default
            assert theirs[n].kind == ours[n].kind, (name, n)
            assert same, (name, n, theirs[n].default, ours[n].default)
    public = [
        n for n in getattr(r, "__all__", [n for n in vars(r) if not n.startswith("_")]) if n != "example"
    ]
    own = [n for n in public if getattr(getattr(r, n), "__module__", r.__name__).startswith("ref.")]
    missing = [n for n in own if not hasattr(a, n) and n not in ("Example", "dims", "float64")]
    assert not missing, f"accel.{t.slug} lacks {missing}"


@in_accel
def test_catalog_resolves_by_slug(t):
    assert getattr(ref, t.slug) is importlib.import_module(f"ref.{t.part}.{t.slug}")
    assert getattr(accel, t.slug) is importlib.import_module(f"accel.{t.part}.{t.slug}")
    assert t.slug in dir(accel)
    assert t.slug in dir(ref)


def test_catalog_is_in_the_order_of_the_parts():
    order = [PARTS.index(t.part) for t in CATALOG]
    assert order == sorted(order)
    assert len(BY_SLUG) == len(CATALOG)


def test_catalog_suggests_the_nearest_slug():
    with pytest.raises(LookupError, match="did you mean"):
        technique("flsh")
    with pytest.raises(LookupError, match="lists them all"):
        technique("zzzz")


def test_catalog_dash_k_selects_a_technique_and_its_kin(request):
    """`pytest -k <slug>` must not run strangers: whoever's name holds a slug belongs to it or to its kin.

    Names of core functions are fixed by their papers and stand in ids of generic tests; they are left out.
    """
    strangers, functions = [], {name for t in CATALOG for name in t.core}
    for item in request.session.items:
        words = [w for w in re.split(r"[\[\]\-/.:]+", item.nodeid) if w not in functions]
        for slug in BY_SLUG:
            kin = [s for s in BY_SLUG if slug in s]
            own = [w for w in words if any(w == s or w.startswith((f"test_{s}", f"laws_{s}")) for s in kin)]
            if any(slug in w for w in words) and not own:
                strangers.append((slug, item.nodeid))
    assert not strangers
