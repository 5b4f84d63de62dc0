"""Who may import what, read from the source: ref NumPy only, accel never hw, hw's core never JAX."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STDLIB = set(sys.stdlib_module_names)
# ref/fetch.py and the loaders of other people's files import their reader inside the function that needs it.
OPTIONAL = {"onnx", "safetensors", "gguf", "sklearn", "tokenizers", "rich", "ml_dtypes"}
JAX_IN_HW = ("hw/trace.py", "hw/cli.py", "hw/commands/", "hw/__main__.py")


def imports(path):
    """(module, at top level) of every import in a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.name, id(node) in top) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, id(node) in top


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", files("ref"), ids=lambda p: "file")
def test_imports_ref_needs_numpy_alone(path):
    for module, top in imports(path):
        root = module.split(".")[0]
        allowed = {"ref", "numpy", *STDLIB} | (set() if top else OPTIONAL)
        assert root in allowed, f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("path", files("accel"), ids=lambda p: "file")
def test_imports_accel_never_sees_hw(path):
    for module, top in imports(path):
        root = module.split(".")[0]
        allowed = {"accel", "ref", "numpy", "jax", "jaxlib", *STDLIB} | (set() if top else OPTIONAL)
        assert root in allowed, f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("path", files("hw"), ids=lambda p: "file")
def test_imports_hw_core_never_sees_jax_or_accel(path):
    name = path.relative_to(ROOT).as_posix()
    for module, top in imports(path):
        root = module.split(".")[0]
        if name.startswith(JAX_IN_HW):
            continue
        allowed = {"hw", "ref", "numpy", *STDLIB} | (set() if top else OPTIONAL)
        assert root in allowed, f"{name} imports {module}"


def test_imports_accel_costs_next_to_nothing_beyond_jax():
    """Well under 50 ms: accel resolves its techniques on first use. Counted in modules, which do not depend
    on load.
    """
    code = "import sys, jax; n = set(sys.modules); import accel; print(*sorted(set(sys.modules) - n))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    new = {m for m in out.stdout.split() if m.split(".")[0] in ("ref", "accel", "hw")}
    assert new == {"accel", "ref", "ref.catalog"}


def test_imports_hw_prices_without_jax():
    code = "import sys, hw; assert 'jax' not in sys.modules; import ref; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_imports_a_foreign_package_of_our_name_is_named(tmp_path):
    """Another distribution's `ref` before ours on the path gives one clear line instead of a puzzle."""
    (tmp_path / "ref").mkdir()
    (tmp_path / "ref" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; sys.path.append({str(ROOT)!r}); import accel"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode != 0
    assert "belongs to another distribution" in out.stderr


def test_imports_ref_runs_from_a_zip(tmp_path):
    """The book hands ref to the browser as an archive; nothing in it may ask for a file beside itself."""
    archive = tmp_path / "ref.zip"
    with zipfile.ZipFile(archive, "w") as z:
        for path in (ROOT / "ref").rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                z.write(path, path.relative_to(ROOT))
    code = (
        f"import sys; sys.path.insert(0, {str(archive)!r}); import ref; "
        "print([len(ref.flash.example()), ref.__file__.count('ref.zip')])"
    )
    out = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert out.stdout.strip().endswith("1]")
