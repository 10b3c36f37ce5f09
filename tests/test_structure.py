"""Imports point one way, and the README's tree is the disk's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BLOCKED = """
import sys

sys.modules.update(dict.fromkeys({forbidden!r}))  # as if not installed, to those as well who only ask
import {module}
"""


def imports_without(module: str, forbidden: set[str]) -> subprocess.CompletedProcess:
    code = BLOCKED.format(forbidden=forbidden, module=module)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("spd_kernels", {"spd", "triton", "transformers", "peft", "datasets", "accelerate"}),
        ("spd", {"torch", "triton", "transformers", "peft", "datasets", "matplotlib"}),
        ("spd.cli", {"torch", "triton", "transformers", "peft", "datasets", "matplotlib"}),
        ("spd.calibration, spd.intervention, spd.generation, spd.evaluation", {"peft", "datasets", "matplotlib"}),
        ("spd.run", {"datasets", "matplotlib"}),
    ],
)
def test_imports_point_one_way(module, forbidden):
    found = imports_without(module, forbidden)
    assert found.returncode == 0, found.stderr


def test_the_block_blocks():
    assert imports_without("spd.calibration", {"transformers"}).returncode != 0


def test_the_tree_in_the_readme_is_the_one_on_disk():
    block = re.search(r"```text\n(spd_kernels/.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block, "README has the annotated tree"
    named, folders = set(), []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders[depth:] = [name.rstrip("/")]
        named.add("/".join(folders))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing, "in the README, not on disk"
    modules = {
        str(path.relative_to(ROOT))
        for package in ("spd_kernels", "spd")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    unnamed = sorted(
        module for module in modules if module not in named and str(Path(module).parent) not in _closed(named)
    )
    assert not unnamed, "on disk, not in the README"


def _closed(named: set[str]) -> set[str]:
    """Folders that the tree names without going into them."""
    return {name for name in named if (ROOT / name).is_dir() and not any(n.startswith(name + "/") for n in named)}
