"""The package as its users meet it: what the wheel carries, that it works from any folder, what `import rawattn` costs, and its version."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import rawattn

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that neither what an earlier build left nor what this one leaves is in the way."""
    for module in ("build", "setuptools"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install -e .[dev]")
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "rawattn", folder / "rawattn", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", cwd=folder)
    (path,) = (folder / "dist").iterdir()
    return path


def test_wheel_is_small_and_complete(wheel: Path) -> None:
    assert wheel.name == f"rawattn-{rawattn.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 1_000_000
    files = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("rawattn/")}
    package = ROOT / "rawattn"
    assert files == {str(path.relative_to(ROOT)) for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def test_wheel_works_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    """Its modules and its CUDA sources come from where it was installed; the console script is there."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=elsewhere)
    code = """
import json, numpy, rawattn, rawattn.compiler, rawattn.spec
x = numpy.ones((1, 3, 2, 8), numpy.float16)
source = rawattn.compiler.source(rawattn.spec.KernelSpec("float16", 64, 64, 1, "full"))
print(json.dumps([rawattn.__file__, bool((rawattn.attention(x, x, x) == 1).all()), "attention_forward" in source]))
"""
    assert json.loads(run(sys.executable, "-c", code, cwd=elsewhere, PYTHONPATH=str(site))) == [
        str(site / "rawattn" / "__init__.py"),
        True,
        True,
    ]
    script = run(sys.executable, str(site / "bin" / "rawattn"), "--help", cwd=elsewhere, PYTHONPATH=str(site))
    assert "check" in script and "info" in script


def test_import_brings_in_no_framework(tmp_path: Path) -> None:
    """`import rawattn`, and a call on NumPy arrays, import none of CuPy, torch and JAX."""
    code = """
import json, sys, numpy, rawattn
x = numpy.ones((1, 3, 2, 8), numpy.float16)
rawattn.attention(x, x, x)
print(json.dumps([name for name in ("cupy", "torch", "jax", "matplotlib", "click") if name in sys.modules]))
"""
    assert json.loads(run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))) == []


def test_import_leaves_no_trace(tmp_path: Path) -> None:
    """Importing writes nothing and prints nothing."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(home), "RAWATTN_CACHE_DIR": str(home / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    assert run(sys.executable, "-c", "import rawattn", cwd=home, **environment) == ""
    assert list(home.iterdir()) == []


def test_public_names() -> None:
    for name in rawattn.__all__:
        assert getattr(rawattn, name).__doc__, name


@pytest.mark.parametrize("file", ["attention.py", "kvcache.py", "merge.py", "torch.py", "jax.py"])
def test_every_public_docstring_has_an_example(file: str) -> None:
    """The doctests run them; errors are shown by what raises them."""
    module = ast.parse((ROOT / "rawattn" / file).read_text(encoding="utf-8"))
    public = [x for x in module.body if getattr(x, "name", "_")[0] != "_" and not getattr(x, "name", "").endswith("Call")]
    public += [x for y in public if isinstance(y, ast.ClassDef) for x in y.body if getattr(x, "name", "_")[0] != "_"]
    documented = [x for x in public if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
    assert documented and not [x.name for x in documented if ">>>" not in (ast.get_docstring(x) or "")]


def test_changelog_knows_the_version() -> None:
    assert f"## {rawattn.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
