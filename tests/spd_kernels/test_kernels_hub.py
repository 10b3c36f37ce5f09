"""The layout for the `kernels` package: whole, without the package's name in it, and loadable beside the package."""

import ast
import base64
import hashlib
import json
import os
import re
import subprocess
import sys

import pytest

from spd_kernels import hub

LOAD = """
import importlib.util, json, sys
from pathlib import Path

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("spd", "spd_kernels"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())

def load(variant):  # as the kernels package does
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "spd-kernels"
    hub.lay_out(out, version=3)
    return out


def run(code, **environment):
    found = subprocess.run(
        [sys.executable, "-c", LOAD + code], capture_output=True, text=True, env=os.environ | environment, cwd="/"
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_a_folder_for_every_backend_with_metadata(laid_out):
    assert sorted(path.name for path in (laid_out / "build").iterdir()) == ["torch-cpu", "torch-cuda", "torch-rocm"]
    assert sorted(path.name for path in laid_out.iterdir()) == ["README.md", "build"]
    identities = set()
    for backend in hub.BACKENDS:
        variant = laid_out / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert (metadata["name"], metadata["version"], metadata["backend"]) == ("spd-kernels", 3, {"type": backend})
        assert metadata["id"].isidentifier(), "it becomes a module's and a namespace's name"
        identities.add(metadata["id"])
        hashes = {
            path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
            for path in variant.rglob("*")
            if path.is_file() and path.name != "metadata.json"
        }
        assert metadata["digest"] == {"algorithm": "sha256", "files": hashes}
    assert len(identities) == len(hub.BACKENDS)


def test_nothing_refers_to_the_package_by_its_name(laid_out):
    files = list(laid_out.rglob("*.py"))
    assert len(files) > 60
    for path in files:
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) spd", text, re.MULTILINE)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.match(r"spd_kernels::|torch\.ops\.spd_kernels", node.value)
    names = {path.relative_to(laid_out / "build/torch-cpu").as_posix() for path in files if "torch-cpu" in path.parts}
    assert {"project/kernel.py", "rope/kernel.py", "tiles.py", "covariance/kernel.py"} <= names
    assert not any("aot" in name or "cases" in name or name in ("hub.py", "testing.py") for name in names)


def test_it_projects_beside_another_copy(laid_out):
    out = run(f"""
import torch
build = Path({str(laid_out / "build")!r})
cpu, cuda = load(build / "torch-cpu"), load(build / "torch-cuda")  # as two versions would be
x = torch.randn(5, 16, dtype=torch.float64)
u = torch.linalg.qr(torch.randn(16, 4, dtype=torch.float64))[0]
expected = x @ u @ u.T
for module in (cpu, cuda):
    assert torch.allclose(module.project(x, u), expected, atol=1e-12)
    compiled = torch.compile(module.project, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x, u), expected, atol=1e-12)
    rows = module.GradientCovariance(16)
    rows.update(x)
    assert rows.count == 5
assert hasattr(torch.ops, cpu.__name__) and cpu.__name__ != cuda.__name__
print(*cpu.__all__)
""")
    import spd_kernels

    assert out.split() == spd_kernels.__all__


def test_its_kernels_run(laid_out, device):
    pytest.importorskip("triton", reason="the kernels are Triton's")
    run(
        f"""
import torch
torch.set_default_device({device!r})
module = load(Path({str(laid_out / "build" / "torch-cuda")!r}))
x, u = torch.randn(5, 16), torch.linalg.qr(torch.randn(16, 4))[0]
y = module.project(x, u, implementation="triton")
assert torch.allclose(y, x @ u @ u.T, atol=1e-5)
""",
        **({"TRITON_INTERPRET": "1"} if device == "cpu" else {}),
    )


def test_the_kernels_package_loads_it(laid_out):
    pytest.importorskip("kernels", reason="pip install kernels")
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            f"""
from pathlib import Path
import torch, kernels
module = kernels.get_local_kernel(Path({str(laid_out)!r}), backend="cpu")
x, u = torch.randn(5, 16), torch.linalg.qr(torch.randn(16, 4))[0]
assert torch.allclose(module.project(x, u), x @ u @ u.T, atol=1e-5)
print(module.__name__)
""",
        ],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("_spd_kernels_cpu_")


def test_the_same_sources_give_the_same_names_and_others_do_not(laid_out, tmp_path):
    hub.lay_out(tmp_path / "again")
    first, again = (
        json.loads((folder / "build/torch-cpu/metadata.json").read_text()) for folder in (laid_out, tmp_path / "again")
    )
    assert first["id"] == again["id"] and again["version"] == 1
    assert (first["digest"] == again["digest"]) is True


@pytest.mark.parametrize(
    "line",
    [
        "import spd_kernels",
        "import spd_kernels.tiles as t",
        'import_module("spd_kernels.tiles")',
        'x = "spd_kernels:f"',
    ],
)
def test_what_would_need_the_name_is_refused(line):
    with pytest.raises(ValueError, match=r"project/op\.py, line 2: refers to spd_kernels by its name"):
        hub.relative(f"import torch\n{line}\n", "project/op.py", "_other")


def test_imports_become_relative():
    text = "from spd_kernels import tiles\n\ndef f():\n    from spd_kernels.project.kernel import launch\n"
    assert hub.relative(text, "launch.py", "n").startswith("from . import tiles\n")
    assert "    from .project.kernel import launch" in hub.relative(text, "launch.py", "n")
    assert "    from ..project.kernel import launch" in hub.relative(text, "rope/api.py", "n")
    assert hub.relative('op("spd_kernels::project")', "a.py", "_n") == 'op("_n::project")'


def test_the_command(tmp_path, capsys):
    assert hub.main(["--out", str(tmp_path / "made"), "--version", "2"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "made/build" / f"torch-{each}") for each in hub.BACKENDS]
    assert hub.main(["--out", str(tmp_path / "made")]) == 2
    assert capsys.readouterr().err.startswith("out: expected a new or empty folder")
    assert [path.name for path in tmp_path.iterdir()] == ["made"], "nothing is left beside it"
