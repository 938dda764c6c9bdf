"""Who may import whom, what importing costs, and what the package never does."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import symbiosis

PACKAGE = Path(symbiosis.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# DESIGN: errors <- protocols <- privacy <- clients <- simulations, and errors <- protocols <- server <- simulations.
MAY_IMPORT = {
    "errors": set(),
    "protocols": {"errors"},
    "privacy": {"errors", "protocols"},
    "clients": {"errors", "protocols", "privacy"},
    "server": {"errors", "protocols"},
    "simulations": {"errors", "protocols", "privacy", "clients", "server"},
    "cli": {"errors", "protocols", "privacy", "clients", "server", "simulations"},
    "__main__": {"cli"},
}
MODULE = re.compile(r"symbiosis(\.\w+)+")
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def module_name(path: Path) -> str:
    parts = ("symbiosis", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The component of DESIGN.md that a module belongs to; empty for the package itself."""
    return [*module.split("."), ""][1]


def imported(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, wherever in the file."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join(start + ([node.module] if node.module else []))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and MODULE.fullmatch(str(node.value)):
            # Lazily loaded homes are strings: `importlib.import_module("symbiosis.clients.base")`.
            yield node.lineno, str(node.value)


def breaches(source: str, path: Path) -> list[str]:
    part = part_of(module_name(path))
    found = []
    for line, name in imported(ast.parse(source), path):
        target = part_of(name) if name.startswith("symbiosis.") else None
        if target in MAY_IMPORT and target != part and target not in MAY_IMPORT.get(part, set()):
            found.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    return found


def test_every_part_is_known() -> None:
    assert {part_of(module_name(path)) for path in SOURCES} - {""} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    assert breaches(path.read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("server/host.py", "from symbiosis.privacy.ledger import Ledger"),
        ("server/host.py", "def f():\n    import symbiosis.clients.base"),
        ("clients/base.py", "from symbiosis.server import host"),
        ("clients/base.py", "from symbiosis import simulations"),
        ("clients/base.py", "from ..server.host import Host"),
        ("clients/__init__.py", "HOMES = {'x': 'symbiosis.server.host'}"),
        ("protocols/encoding.py", "from symbiosis.privacy import Plaintext"),
        ("errors.py", "from symbiosis.protocols.limits import MAX_CHUNK_BYTES"),
        ("simulations/local.py", "import symbiosis.cli"),
    ],
)
def test_a_breach_is_found(path: str, source: str) -> None:
    assert breaches(source, PACKAGE / path)


def test_nothing_dangerous_is_called() -> None:
    found = []
    for path in SOURCES:
        if "_generated" in path.parts:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        where = path.relative_to(PACKAGE)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                found.append(f"{where}:{node.lineno} asserts")  # `python -O` removes it
            if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("builtins.") in FORBIDDEN_CALLS:
                found.append(f"{where}:{node.lineno} calls {ast.unparse(node.func)}")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save", "os.system"}:
                found.append(f"{where}:{node.lineno} uses {ast.unparse(node)}")
        found += [
            f"{where}:{line} imports {name}"
            for line, name in imported(tree, path)
            if name.split(".")[0] in FORBIDDEN_MODULES or name == "torch.load"
        ]
    assert found == []


@pytest.mark.parametrize(
    "module", ["symbiosis.clients", "symbiosis.simulations", "symbiosis.server", "symbiosis.protocols"]
)
def test_importing_loads_little_and_starts_nothing(module: str) -> None:
    probe = (
        f"import json, sys, threading, {module}\n"
        "heavy = {'flwr', 'ray', 'grpc', 'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "print(json.dumps([sorted(heavy), threading.active_count()]))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], 1]
