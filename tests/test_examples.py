"""The scripts of examples/ run from any folder, on a GPU where there is one, and say on what they ran."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted({path.name for path in (ROOT / "examples").glob("*.py")} - {"generate.py"})  # that one is in test_llama.py


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, tmp_path: Path) -> None:
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    for framework in ("torch", "jax"):
        if re.search(rf"^import {framework}$", text, re.MULTILINE) and importlib.util.find_spec(framework) is None:
            pytest.skip(f"{framework} is not installed")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run([sys.executable, ROOT / "examples" / name], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_dockerfile_commands_are_the_readmes() -> None:
    """One recipe: what the Dockerfile runs is what README shows."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    steps = re.findall(r"^(?:FROM|COPY|RUN) .*$", (ROOT / "examples" / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(steps) == 7
    assert all(step in readme for step in steps)
