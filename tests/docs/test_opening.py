"""The opening chapters: their exercises' solutions are right, and what they list is what there is."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw.gpu import h200
from ref.blocks.attention import attention_dense
from ref.blocks.softmax import softmax
from ref.catalog import CATALOG, PARTS, READ_FIRST
from ref.vision.pitome import energy_score
from tests.docs import kernel_steps as steps
from tests.docs import mutants, solutions

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import opening  # noqa: E402

EPS = np.finfo(np.float64).eps


def test_opening_notation_offset():
    assert solutions.visible_keys(100, 3) == [101, 102, 103]


@pytest.mark.parametrize(
    ("shape", "no"),
    [((4,), True), ((7, 5), True), ((7, 4), False), ((0, 7, 4), False), ((2, 3, 7, 4), False)],
)
def test_opening_notation_refused(shape, no):
    assert solutions.refused(shape) == no


def test_opening_notation_layout():
    x = np.arange(120.0).reshape(2, 5, 3, 4)
    y = solutions.from_jax_layout(x)
    assert y.shape == (2, 3, 5, 4)
    assert y[1, 2, 4, 3] == x[1, 4, 2, 3]


def test_opening_attention_equal_keys():
    got, want = solutions.with_equal_keys()  # weights and mean differ by a few roundings of numbers near 1
    np.testing.assert_allclose(got, np.broadcast_to(want, got.shape), rtol=0, atol=16 * EPS)


def test_opening_attention_shifted_keys():
    one, other = solutions.with_shifted_keys()  # scores of size ten, rounded, pass on 10 eps each
    np.testing.assert_allclose(one, other, rtol=0, atol=100 * EPS)


@pytest.mark.parametrize("n", [1, 2, 10, 100])
def test_opening_attention_scores_of_writing(n):
    cached, again = solutions.scores_of_writing(n)
    assert cached == n * (n + 1) // 2
    assert 3 * again == cached * (n + 2)


def test_opening_attention_slope():
    slope, difference = solutions.slope_of_attention()  # h^2 = 1e-10 times a third derivative of size ten
    np.testing.assert_allclose(slope, difference, rtol=0, atol=1e-8)


@given(
    st.sampled_from(((1, 1, 1), (4, 9, 16), (8, 300, 64), (3, 2048, 8))),
    st.sampled_from((1e-3, 1.0, 5.0)),
    st.integers(0, 2**32 - 1),
)
def test_opening_numerics_attention_stays_within_its_bound(shape, gain, seed):
    """Bound (5) is of first order; what is left out is its square, below a hundredth of it here."""
    (L, S, D), rng = shape, np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((n, D)).astype(np.float32) for n in (L, S, S))
    q, k = np.float32(gain) * q, np.float32(gain) * k
    error = np.abs(solutions.attention_float32(q, k, v) - attention_dense(q, k, v)).max()
    assert error <= 1.01 * solutions.attention_bound(q, k, v)


def test_opening_numerics_standstill():
    assert solutions.standstill() == 2**24


@given(st.integers(0, 2**32 - 1))
def test_opening_numerics_mean_error(seed):
    error, bound = solutions.mean_error(seed=seed)
    assert error <= bound
    assert bound == pytest.approx(6e-5, rel=0.01)


def test_opening_numerics_weight_error():
    assert 1.01 < solutions.weight_error() <= np.exp(0.02)


def test_opening_numerics_orders():
    assert solutions.sums_in_all_orders() == [0.0, 1.0]
    assert np.spacing(np.float32(1e8)) == 8


@given(st.integers(1, 40), st.sampled_from((1, 2, 3, 8, 16)), st.integers(0, 2**32 - 1))
def test_opening_kernels_every_step_gives_the_same(tokens, block, seed):
    """Means of at most 40 terms of size at most 1, each with some eight roundings."""
    x = np.random.default_rng(seed).standard_normal((tokens, 8))
    want = energy_score(x, margin=steps.MARGIN, alpha=steps.ALPHA)
    got = [steps.energy_dense(x), steps.energy_ragged(x, block)]
    if tokens % block == 0:
        got += [steps.energy_by_programs(x, block), steps.energy_by_tiles(x, block)]
    for y in got:
        np.testing.assert_allclose(y, want, rtol=0, atol=64 * EPS)


def test_opening_kernels_last_step_is_the_kernel():
    """float32: a cosine of width 8 has some twelve roundings, a mean of 37 terms of size 1 some 40 more."""
    from accel.kernels.pitome_triton import energy

    x = np.random.default_rng(0).standard_normal((37, 8)).astype(np.float32)
    got = energy(x, margin=steps.MARGIN, alpha=steps.ALPHA, paper_form=False, block=16, interpret=True)
    np.testing.assert_allclose(got, steps.energy_ragged(x.astype(np.float64), 16), rtol=0, atol=64 * 2.0**-24)


def test_opening_kernels_unmasked():
    x = np.random.default_rng(0).standard_normal((13, 8))
    found, predicted = steps.error_without_mask(x, 4)
    np.testing.assert_allclose(found, predicted, rtol=0, atol=64 * EPS)
    assert predicted < 0


def test_opening_kernels_wasted():
    programs, walk, share = steps.wasted(197, 32)
    assert (programs, walk) == (7, 7)
    assert round(share, 2) == 0.23


@given(st.integers(1, 20), st.sampled_from((1, 4, 7)), st.integers(0, 2**32 - 1))
def test_opening_kernels_running(columns, block, seed):
    s = 10 * np.random.default_rng(seed).standard_normal((3, columns))
    np.testing.assert_allclose(steps.row_softmax_by_tiles(s, block), softmax(s), rtol=0, atol=256 * EPS)


def test_opening_kernels_makespan():
    assert steps.makespan(range(1, 9), 3) == 15
    assert steps.makespan(range(8, 0, -1), 3) == 13


def test_opening_kernels_are_all_listed():
    names = {name for name, *_ in opening.kernels()}
    assert names == {p.name for p in (ROOT / "accel/kernels").glob("*.py")} - {"__init__.py", "rum_step.py"}
    assert "def _forward_kernel" in opening.source("accel/kernels/flash_triton.py", "_forward_kernel")
    bare = opening.source("ref/blocks/softmax.py", "merge", doc=False)
    assert bare.startswith("```python\ndef merge(a, b):\n    m = np.maximum")


def test_opening_costs_rows_to_corner():
    corner = h200().ridge("bfloat16")
    assert round(corner) == 206
    assert solutions.rows_to_corner(4096, corner) == 230
    assert solutions.rows_to_corner(412, corner) is None


def test_opening_costs_amdahl():
    assert solutions.amdahl(0.3, 3) == pytest.approx(1.25)
    assert solutions.amdahl(0.3, 1e12) == pytest.approx(1.43, abs=0.005)


def test_opening_costs_tokens_a_second():
    assert solutions.tokens_a_second(7e9, 4.5, 50e9) == pytest.approx(12.7, abs=0.05)


def test_opening_costs_energy_corner():
    from hw.parts import ENERGY, OP_PJ

    byte, operation = ENERGY.numbers["hbm_pj_per_byte"], OP_PJ["bfloat16"]
    assert (byte, operation) == (28.7, 0.4)
    assert round(solutions.energy_corner(byte, operation)) == 72


def test_opening_agreement_right_attention_passes_every_check():
    assert not any(mutants.caught(mutants.right, check) for check in mutants.CHECKS)


def test_opening_agreement_every_wrong_one_is_caught_and_no_check_catches_all():
    table = {f: [mutants.caught(f, c) for c in mutants.CHECKS] for f in mutants.ALL}
    assert all(any(row) for row in table.values())
    assert not any(all(column) for column in zip(*table.values(), strict=True))
    assert sum(row[0] for row in table.values()) == len(mutants.ALL) / 2  # the definition misses half
    assert all(any(row[i] for row in table.values()) for i in range(len(mutants.CHECKS)))


def test_opening_agreement_sly():
    assert not any(mutants.caught(solutions.sly, check) for check in mutants.CHECKS)
    assert mutants.caught(solutions.sly, solutions.equals_the_definition_under_a_mask)
    assert not mutants.caught(mutants.right, solutions.equals_the_definition_under_a_mask)


def test_opening_agreement_shift_that_breaks():
    assert solutions.shift_that_breaks() == 710


def test_opening_agreement_sensitive():
    assert 2e-4 < solutions.sensitive() < 6e-4


def test_opening_agreement_counts():
    counts = opening.law_counts()
    assert [n for n, *_ in counts.values()] == [sum(t.part == p for t in CATALOG) for p in PARTS]
    assert all(laws > 0 and cases > 0 for _, laws, cases in counts.values())


def test_opening_agreement_of_a_traced_program():
    fn, error, bound = opening.agreement("flash", 5)
    assert fn == "online_softmax"
    assert 0 < error <= bound


def ancestors(name):
    return set().union(*({n} | ancestors(n) for n in READ_FIRST[name])) if READ_FIRST[name] else set()


def test_opening_paths_know_every_chapter():
    """The tree holds every technique, planned ones too, and every opening chapter; it has no cycle."""
    from generate import PLAN, START

    planned = {slug for slugs in PLAN.values() for slug in slugs.split()}
    assert set(READ_FIRST) == planned | set(opening.START)
    assert set(opening.START) <= set(START)
    assert all(name not in ancestors(name) for name in READ_FIRST)  # RecursionError on a cycle
    drawn = [name for name, _ in opening.reading_order()]
    assert "<a " not in str(opening.prerequisite_graph())  # instant navigation fails on links in SVG
    assert len(list(opening.prerequisite_list())) == len(drawn)
    assert sorted(drawn) == sorted({t.slug for t in CATALOG} | set(opening.START))


@pytest.mark.parametrize("path", opening.PATHS, ids=lambda p: "path")
def test_opening_paths_hold_what_their_chapters_build_on(path):
    names = opening.PATHS[path][1].split()
    for i, name in enumerate(names):
        assert ancestors(name) <= set(names[:i]), name


def test_opening_paths_agree_with_what_the_code_imports():
    """A technique's file that imports another's has it among its prerequisites."""
    imported = re.compile(rf"^from ref\.(?:{'|'.join(PARTS)})\.(\w+) import", re.MULTILINE)
    for t in CATALOG:
        used = set(imported.findall((ROOT / "ref" / t.part / f"{t.slug}.py").read_text())) - {t.slug}
        assert used <= ancestors(t.slug), t.slug


def test_opening_choices_hold_every_technique_once():
    from choices import CHOICES, rows
    from generate import PLAN

    listed = [slug for _, cases in CHOICES.values() for slug in cases]
    assert len(listed) == len(set(listed))
    assert set(listed) == {slug for slugs in PLAN.values() for slug in slugs.split()}
    assert all(len(words) == 3 for _, cases in CHOICES.values() for words in cases.values())
    shown = [line for _, cases in CHOICES.values() for line in rows(cases) if line.startswith("| [")]
    assert len(shown) == len(CATALOG)


def test_opening_ledger_reads_every_claims_table():
    """A chapter with a section of claims has rows, each with its status; those that are code are run."""
    import ledger

    seen = {}
    for page, _, text in ledger.chapters():
        rows = ledger.claims(text)
        assert bool(rows) == ("\n## Claims" in text), page
        assert all(len(row) == 4 and row[0] and row[3] for row in rows), page
        seen[page] = [ledger.kind(row[3]) for row in rows]
    assert len(seen["attention/flash.md"]) == 11
    assert seen["attention/flash.md"].count("out of reach") == 2
    assert {"reproduced", "modelled", "out of reach"} <= {k for kinds in seen.values() for k in kinds}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("reproduced (counted)", "reproduced"),
        ("**not reproduced** here: ToMe stays closer", "not reproduced"),
        ("out of reach", "out of reach"),
        ("modelled", "modelled"),
        ("measured on a CPU", "measured"),
        ("proved", "proved or counted"),
        ("short form", "open"),
    ],
)
def test_opening_ledger_kinds(status, kind):
    import ledger

    assert ledger.kind(status) == kind


def test_opening_ledger_moves_links():
    import ledger

    text = "[a](flash.md) [b](../hw/gpu.md#claims) [c](https://arxiv.org/abs/1)"
    assert ledger.moved(text, "attention/lean.md") == (
        "[a](../../attention/flash/) [b](../../hw/gpu/#claims) [c](https://arxiv.org/abs/1)"
    )


def test_opening_links_that_code_prints_are_addresses():
    """The site generator rewrites links to files in what is written, not in what code prints."""
    from choices import CHOICES, rows

    printed = [*opening.prerequisite_list(), *opening.path_rows(" ".join(READ_FIRST))]
    printed += [line for words, cases in CHOICES.values() for line in (words, *rows(cases))]
    for page in (ROOT / "docs/index.md", *(ROOT / "docs/start").glob("*.md")):
        printed += re.findall(
            r'^ *```python exec="on"[^\n]*\n(.*?)```', page.read_text(), re.MULTILINE | re.DOTALL
        )
    for text in printed:
        assert not re.search(r"\]\([^)]*\.md[)#]", text), text
        for url in re.findall(r"\]\((\.\.[^){]*/)(?:#[^)]*)?\)", text):
            path = (ROOT / "docs/start/x" / url).resolve()
            assert path.with_suffix(".md").exists(), url


def test_opening_sources_name_every_chapter():
    import ledger

    for page, title, text in ledger.chapters():
        assert title, page
        assert ledger.section(text, "Sources"), page
        assert page.startswith("hw/") or ledger.citation(text), page


def test_opening_glossary_is_in_order_and_its_links_lead_somewhere():
    text = (ROOT / "docs/start/glossary.md").read_text()
    terms = re.findall(r"^(\S[^\n]*)\n\n:   ", text, re.MULTILINE)
    assert terms == sorted(terms, key=lambda t: t.lower().replace("(", ""))
    assert len(set(terms)) == len(terms) > 50
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / "docs/start" / link).resolve().exists(), link


@pytest.mark.parametrize("letter", opening.LETTERS)
def test_opening_letters_are_in_use(letter):
    """Every letter of the notation page is bound by some file of ref."""
    assert opening.axis_letters()[letter] > 0
