"""Write what follows from the catalogue: README's table and the book's navigation.

`python docs/generate.py` writes, with --check it only looks; a test runs the check, so neither goes stale.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import api  # noqa: E402

from ref.catalog import CATALOG, PARTS  # noqa: E402

# The whole plan, in the book's order; a slug that the catalogue lacks is shown as planned.
PLAN = {
    "attention": "flash block_sparse_flash lean axial longformer bigbird landmark attention_pruning "
    "subsampled scout wide_attention",
    "memory": "rum pavlovian atlas memmamba bmojo gtrxl pmi concept_centric",
    "vision": "softmax_free hilo efficientvit shvit dependencyvit pitome",
    "compression": "quantization llm_int8 quantizable vidit_q pruning distillation nas memoryformer vvma "
    "unified_norm spec_kv spec_pc lightweight",
    "training": "mesa wta_crs local_learning adaptformer user_prefix logah",
    "language": "smollm2 verbatim_memory grokking mtm long_text_hack masked_multidomain",
    "devices": "pim_gpt edge_moe mcuformer melt",
}
START = (
    *("notation", "attention", "numerics", "kernels", "bench", "costs", "price", "agreement"),
    *("which", "paths", "recipes", "devices"),
)
HARDWARE = ("ir", "gpu", "pim", "fpga", "mcu", "report", "accelerators")
REFERENCE = ("glossary", "claims", "sources", "licences")


def chapter(t):
    """The file of a technique's chapter."""
    return ROOT / "docs" / t.part / f"{t.slug}.md"


def table():
    """README's table: a row a technique that exists, and the planned ones named under it."""
    lines = ["| part | technique | idea | layers |", "|---|---|---|---|"]
    for t in CATALOG:
        layers = "ref, accel, hw" if (ROOT / "accel" / t.part / f"{t.slug}.py").exists() else "ref"
        lines.append(f"| {t.part} | [`{t.slug}`](docs/{t.part}/{t.slug}.md) | {t.idea} | {layers} |")
    there = {t.slug for t in CATALOG}
    planned = [s for part in PARTS for s in PLAN[part].split() if s not in there]
    if planned:
        lines += ["", "Planned: " + ", ".join(f"`{s}`" for s in planned) + "."]
    return "\n".join(lines)


def nav():
    """The navigation: first pages, the parts in the order of the catalogue, hardware, what to look up."""
    there = lambda folder, names: [
        f"      - {folder}/{n}.md" for n in names if (ROOT / "docs" / folder / f"{n}.md").exists()
    ]
    lines = ["nav:", "  - Start:", "      - index.md", *there("start", START)]
    for part in PARTS:
        if here := [t.slug for t in CATALOG if t.part == part and chapter(t).exists()]:
            lines += [f"  - {part.capitalize()}:", *(f"      - {part}/{slug}.md" for slug in here)]
    for title, folder, names in (("Hardware", "hw", HARDWARE), ("Reference", "start", REFERENCE)):
        if pages := there(folder, names):
            lines += [f"  - {title}:", *pages]
    lines += api.nav()  # under Reference, which is the last
    return "\n".join(lines)


def between(text, start, end, new):
    """The text with what stands between two marks replaced."""
    head, rest = text.split(start, 1)
    return f"{head}{start}\n{new}\n{end}{rest.split(end, 1)[1]}"


FILES = {
    "README.md": lambda text: between(text, "<!-- techniques -->", "<!-- /techniques -->", table()),
    "mkdocs.yml": lambda text: between(text, "# nav, by docs/generate.py", "# /nav", nav()),
}


def main():
    """Write both files, or with --check say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is stale")
    check = parser.parse_args().check
    stale = []
    for name, make in FILES.items():
        path = ROOT / name
        old = path.read_text()
        if (new := make(old)) != old:
            stale.append(name)
            if not check:
                path.write_text(new)
    print(f"stale: {', '.join(stale)}; run python docs/generate.py" if check and stale else "up to date")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
