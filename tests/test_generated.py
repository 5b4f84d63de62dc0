"""What is written from the catalogue is up to date: README's table and the book's navigation."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_generated_files_are_up_to_date():
    """`python docs/generate.py` writes them."""
    out = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert out.returncode == 0, out.stdout + out.stderr


def test_generated_plan_holds_every_technique_of_the_catalogue():
    """A slug of the catalogue stands in the plan, in its part and in the plan's order."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from generate import PLAN
    finally:
        sys.path.pop(0)
    from ref.catalog import CATALOG

    assert sum(len(s.split()) for s in PLAN.values()) == 54
    order = [(part, slug) for part, slugs in PLAN.items() for slug in slugs.split()]
    mine = [(t.part, t.slug) for t in CATALOG]
    assert mine == [x for x in order if x in mine]
