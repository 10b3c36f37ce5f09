"""`python -m spd_kernels.hub --out DIR`: this package in the layout that the `kernels` package loads.

    python -m spd_kernels.hub --out spd-kernels
    >>> kernels.get_local_kernel(Path("spd-kernels")).project(x, u)

Under `build/` one folder a backend holds the modules that the public functions reach, with relative imports and
operators in a namespace of their own, so that several versions can live in one process, and `metadata.json` with the
hash of every file. It is all Python: Triton compiles on the machine that runs it.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

NAME = "spd-kernels"
PACKAGE = "spd_kernels"
BACKENDS = ("cpu", "cuda", "rocm")
LICENSE = "apache-2.0"
SOURCE = Path(__file__).parent


def lay_out(out: Path, *, version: int = 1, source: Path = SOURCE) -> list[Path]:
    """Write the repository into `out`, which must not exist or be empty.

    Args:
        out: the repository's folder.
        version: of the kernel on the hub, where users ask for `version=1`.
        source: the package's folder.

    Returns:
        The folder of every build variant.

    Raises:
        ValueError: `out` has something in it, or the copy would still refer to the package by its name.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a new or empty folder, {out} is not")
    modules = reachable(source)
    identity = hashlib.sha256("".join(f"{name}\n{text}" for name, text in sorted(modules.items())).encode()).hexdigest()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        made = Path(temporary) / "repository"
        for backend in BACKENDS:
            namespace = f"_{PACKAGE}_{backend}_{identity[:8]}"
            variant = made / "build" / f"torch-{backend}"
            for name, text in modules.items():
                path = variant / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(relative(text, name, namespace), encoding="utf-8")
            (variant / "metadata.json").write_text(_metadata(variant, backend, namespace, version), encoding="utf-8")
        (made / "README.md").write_text(_readme(version), encoding="utf-8")
        if out.exists():
            out.rmdir()
        shutil.move(made, out)
    return [out / "build" / f"torch-{backend}" for backend in BACKENDS]


def reachable(source: Path) -> dict[str, str]:
    """Path in the package -> text of `__init__.py` and every module of the package that it imports, at any depth."""
    found: dict[str, str] = {}
    waiting = ["__init__.py"]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = (source / name).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(found[name])):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and _inside(node.module):
                base = str(node.module).removeprefix(PACKAGE).strip(".").replace(".", "/")
                names = [base, *(f"{base}/{alias.name}".strip("/") for alias in node.names)]
                waiting += [file for each in names if (file := _file(source, each))]
                waiting += [f"{parent}/__init__.py" for parent in Path(base).parents if str(parent) != "."]
    return found


def relative(text: str, name: str, namespace: str) -> str:
    """A module's text with relative imports, and its operators in `namespace`.

    Raises:
        ValueError: it would still import the package by its name or use its namespace.
    """
    dots = "." * len(Path(name).parts)

    def imported(match: re.Match[str]) -> str:
        return f"{match[1]}from {dots}{(match[2] or '').removeprefix('.')} import"

    text = re.sub(rf"(?m)^(\s*)from {PACKAGE}((?:\.\w+)*) import", imported, text)
    text = text.replace(f"{PACKAGE}::", f"{namespace}::").replace(f"torch.ops.{PACKAGE}.", f"torch.ops.{namespace}.")
    for node in ast.walk(ast.parse(text)):
        by_name = (
            (isinstance(node, ast.ImportFrom) and node.level == 0 and _inside(node.module))
            or (isinstance(node, ast.Import) and any(_inside(alias.name) for alias in node.names))
            or (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and re.match(rf"{PACKAGE}[.:]\w", node.value)
            )
        )
        if by_name:
            line = getattr(node, "lineno", 0)
            raise ValueError(f"{name}, line {line}: refers to {PACKAGE} by its name, which the copy does not have")
    return text


def _inside(module: str | None) -> bool:
    return module is not None and (module == PACKAGE or module.startswith(f"{PACKAGE}."))


def _file(source: Path, module: str) -> str | None:
    """The file of a module given by its path in the package, if there is one."""
    for name in (f"{module}.py", f"{module}/__init__.py".lstrip("/")):
        if (source / name).is_file():
            return name
    return None


def _metadata(variant: Path, backend: str, namespace: str, version: int) -> str:
    files = {
        path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(variant.rglob("*.py"))
    }
    content = {
        "name": NAME,
        "id": namespace,
        "version": version,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": files},
    }
    return json.dumps(content, indent=2) + "\n"


def _readme(version: int) -> str:
    return f"""---
library_name: kernels
license: {LICENSE}
tags:
- kernel
- triton
---

# {NAME}

Fused Triton kernels of Self-Policy Distillation (arXiv 2605.22675): projection of K and V onto a subspace, with norm
and rotary embedding, per sequence, in attention over latents, and the gradients' covariance. Plain PyTorch on the CPU.

```python
from kernels import get_kernel

spd_kernels = get_kernel("USER/{NAME}", version={version}, trust_remote_code=["USER/{NAME}"])
y = spd_kernels.project(x, u)  # (x U) Uᵀ
```
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m spd_kernels.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the repository's folder, new or empty")
    parser.add_argument("--version", type=int, default=1, help="of the kernel on the hub")
    options = parser.parse_args(arguments)
    try:
        variants = lay_out(options.out, version=options.version)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(*variants, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
