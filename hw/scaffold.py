"""The five files of a new technique, from templates that pass the suite before the method is written."""

import keyword
from pathlib import Path

from ref.catalog import BY_SLUG, PARTS

_REF = '''"""{title}: what it computes, in a line.

Source: authors year (arXiv id), the equations and algorithms followed here. Left out: what, and why.
"""

import numpy as np

from ref.dims import dims, float64
from ref.example import Example


def {slug}(x):
    """y = x, until the method stands here.

    Args: x [..., L, D], real.
    Returns: [..., L, D] float64.
    Raises: ValueError naming the argument at fault.
    """
    dims(x=(x, "... L D"))
    return +float64(x)


def example(seed=0):
    """Realistic small input."""
    return [Example("{slug}", (np.random.default_rng(seed).standard_normal((5, 4)),), {{}}, (0,))]
'''
_ACCEL = '''"""{title} in JAX: the functions of `ref.{part}.{slug}`, which defines them."""

import jax

from ref.dims import dims


@jax.jit
def {slug}(x):
    """y = x; see ref."""
    dims(x=(x, "... L D"))
    return x
'''
_LAWS = '''"""Laws of {title} on ref alone: NumPy and Hypothesis, which run in the browser too."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ref.{part}.{slug} import {slug}


@given(st.integers(0, 2**32 - 1))
def law_{slug}_equals_the_definition(seed):
    """Against the definition written out here, sharing no line with ref."""
    x = np.random.default_rng(seed).standard_normal((5, 4))
    np.testing.assert_array_equal({slug}(x), x)
'''
_TEST = '''"""{title}: laws on ref, golden vectors, bad inputs."""

import numpy as np
import pytest

import ref
from tests.laws import law_tests
from tests.{part} import laws_{slug}

globals().update(law_tests(laws_{slug}))


def test_{slug}_ref_rejects_bad_input():
    with pytest.raises(ValueError, match="x must have shape"):
        ref.{slug}.{slug}(np.zeros(3))
'''
_DOCS = """# {title}

*Authors: title, year.*

## The question

## The idea

## The equations

## By hand

## The three panels

=== "ref: the definition"

    ```python
    --8<-- "ref/{part}/{slug}.py"
    ```

=== "accel: made fast"

    ```python
    --8<-- "accel/{part}/{slug}.py"
    ```

=== "hw: what it costs"

    `triptych run {slug}` prices the example on every target.

## Claims

| claim | the paper reports | here | status |
|---|---|---|---|

## What we left out, and where the paper is silent

## Exercises

## Sources
"""
_FILES = {
    "ref/{part}/{slug}.py": _REF,
    "accel/{part}/{slug}.py": _ACCEL,
    "tests/{part}/laws_{slug}.py": _LAWS,
    "tests/{part}/test_{slug}.py": _TEST,
    "docs/{part}/{slug}.md": _DOCS,
}
_RECORD = """    Technique(
        slug="{slug}",
        part="{part}",
        title="{title}",
        paper="",
        year=0,
        arxiv=None,
        idea="",
        core=("{slug}",),
    ),
"""


def scaffold(slug: str, part: str, title: str, root: Path) -> tuple[list[Path], str]:
    """Write the files of a technique under `root`, a checkout; returns them and the catalogue's new record.

    Raises: ValueError for a slug that is taken or no name, an unknown part, a title that cannot be quoted, or
    a root that is no checkout; FileExistsError before anything is written.
    """
    if not slug.isidentifier() or keyword.iskeyword(slug) or slug != slug.lower():
        raise ValueError(f"a slug is a lower-case Python name, got {slug!r}")
    if slug in BY_SLUG:
        raise ValueError(f"{slug!r} is in the catalogue already, in {BY_SLUG[slug].part}")
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    if any(c in title for c in '"\\\n{}'):
        raise ValueError(f"title must hold no quotes, backslashes, braces or line ends, got {title!r}")
    if not (root / "ref" / "catalog.py").exists() or not (root / "tests").is_dir():
        raise ValueError(f"{root} is no checkout of triptych: clone the repository to add a technique")
    fill = lambda text: text.format(slug=slug, part=part, title=title)
    made = {root / fill(name): fill(text) for name, text in _FILES.items()}
    for path in made:
        if path.exists():
            raise FileExistsError(f"{path} exists already")
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(made), fill(_RECORD)
