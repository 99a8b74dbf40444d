"""Hold what linters do not: lengths, docstrings, words, imports. ``python scripts/ratchets.py`` prints every miss."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES, FUNCTION_LINES = 600, 70
# Only ever raised; the goal is 1.2.
TEST_RATIO = 0.4
CODE = ("src", "tests", "bench", "examples", "scripts")

_UNFINISHED = r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b"
EVERYWHERE = {_UNFINISHED: "unfinished work belongs in the tracker"}
IN_SOURCES = {
    r"\bNotImplementedError\b": "only steps.py declares what others implement",
    r"\bimport pickle\b|\bfrom pickle\b|\bpickle\.loads?\b": "pickle runs what it reads",
    r"(?<![.\w])(?:eval|exec)\(": "text is never run as code",
}
IN_TESTS = {
    r"\bunittest\.mock\b|\bMagicMock\b|\bmonkeypatch\.setattr\b": "tests run the real thing",
    r"\btime\.sleep\(": "wait for a condition with a deadline",
}
ALLOWED = {("src/headrace/steps.py", "NotImplementedError")}

SERVER_LIBRARIES = ("daft", "numba", "deltalake", "dbos", "torch")
CLIENT_FREE_OF = (
    *SERVER_LIBRARIES,
    *("fastapi", "starlette", "granian", "sqlalchemy", "sqlglot", "tokenizers", "pandas", "polars", "yaml"),
)
IMPORTS = {
    "headrace.client.connect": CLIENT_FREE_OF,
    "headrace.client.feed": CLIENT_FREE_OF,
    "headrace.cli": CLIENT_FREE_OF,
    "headrace.server.serve": SERVER_LIBRARIES,
}

FunctionLike = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(root: Path, *folders: str) -> list[Path]:
    """The project's own Python files below ``folders``."""
    return sorted(
        path
        for folder in folders
        for path in (root / folder).rglob("*.py")
        if not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(root).parts)
    )


def lengths(path: str, text: str) -> Iterator[str]:
    """Files and functions that are too long."""
    lines = text.count("\n")
    if lines > FILE_LINES:
        yield f"{path}: {lines} lines, at most {FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FunctionLike) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {FUNCTION_LINES}"


def _public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.ClassDef | FunctionLike]]:
    for node in body:
        if isinstance(node, ast.ClassDef | FunctionLike) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{prefix}{node.name}.")


def docstrings(path: str, text: str) -> Iterator[str]:
    """The module, public classes and public functions without a docstring. Exceptions private to a module need none."""
    tree = ast.parse(text)
    if tree.body and not ast.get_docstring(tree):
        yield f"{path}: the module has no docstring"
    for name, node in _public(tree.body):
        if not ast.get_docstring(node) and not _overloaded(node):
            yield f"{path}:{node.lineno}: {name} has no docstring"


def _overloaded(node: ast.ClassDef | FunctionLike) -> bool:
    return any("overload" in ast.dump(decorator) for decorator in node.decorator_list)


def words(path: str, text: str) -> Iterator[str]:
    """Forbidden words, each with why."""
    rules = dict(EVERYWHERE)
    if path.startswith("src/"):
        rules |= IN_SOURCES
    if path.startswith("tests/"):
        rules |= IN_TESTS
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, why in rules.items():
            found = re.search(pattern, line)
            if found and (path, found.group()) not in ALLOWED:
                yield f"{path}:{number}: {found.group()!r}: {why}"


def imports(module: str, unwanted: tuple[str, ...]) -> Iterator[str]:
    """What ``import module`` loads although it must not, seen in a fresh interpreter."""
    code = f"import sys, {module}; print(*(name for name in {unwanted!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        yield f"import {module} fails: {done.stderr.strip().splitlines()[-1]}"
    elif done.stdout.strip():
        yield f"import {module} loads {done.stdout.strip()}"


def ratio(root: Path) -> float:
    """Lines of tests per line of sources."""
    sources, tests = (
        sum(path.read_text(encoding="utf-8").count("\n") for path in python_files(root, folder))
        for folder in ("src", "tests")
    )
    return tests / max(sources, 1)


def misses(root: Path) -> Iterator[str]:
    """Everything in the tree below ``root`` that breaks a ratchet."""
    for file in python_files(root, *CODE):
        path, text = file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")
        yield from words(path, text)
        yield from lengths(path, text)
        if path.startswith("src/"):
            yield from docstrings(path, text)


def main() -> int:
    """Print what breaks a ratchet; 1 if anything does."""
    found = list(misses(ROOT))
    for module, unwanted in IMPORTS.items():
        found.extend(imports(module, unwanted))
    share = ratio(ROOT)
    if share < TEST_RATIO:
        found.append(f"tests: {share:.2f} lines per line of source, at least {TEST_RATIO}")
    for line in found:
        print(line)
    print(f"ratchets: {len(found)} misses, {share:.2f} test lines per source line")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
