"""The ratchets themselves: each catches what it is for, and lets the rest through."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


ratchets = _script("ratchets")


def test_a_file_of_600_lines_passes_and_one_more_does_not() -> None:
    assert list(ratchets.lengths("src/a.py", "x = 1\n" * 600)) == []
    assert list(ratchets.lengths("src/a.py", "x = 1\n" * 601)) == ["src/a.py: 601 lines, at most 600"]


def test_a_function_of_70_lines_passes_and_one_more_does_not() -> None:
    def function(lines: int) -> str:
        return "async def f():\n" + "    x = 1\n" * (lines - 1)

    assert list(ratchets.lengths("src/a.py", function(70))) == []
    assert list(ratchets.lengths("src/a.py", function(71))) == ["src/a.py:1: f has 71 lines, at most 70"]


def test_a_method_counts_as_a_function() -> None:
    text = "class A:\n    def f(self):\n" + "        x = 1\n" * 70
    assert list(ratchets.lengths("src/a.py", text)) == ["src/a.py:2: f has 71 lines, at most 70"]


def test_public_names_need_a_docstring_and_private_ones_do_not() -> None:
    text = '"""A module."""\nclass A:\n    """A class."""\n    def f(self): ...\n    def _g(self): ...\ndef _h(): ...\n'
    assert list(ratchets.docstrings("src/a.py", text)) == ["src/a.py:4: A.f has no docstring"]


def test_a_module_without_a_docstring_is_found_and_an_empty_one_is_not() -> None:
    assert list(ratchets.docstrings("src/a.py", "x = 1\n")) == ["src/a.py: the module has no docstring"]
    assert list(ratchets.docstrings("src/a.py", "")) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("src/a.py", "# TO" + "DO: later"),
        ("tests/a.py", "# FIX" + "ME"),
        ("src/a.py", "raise NotImplemented" + "Error"),
        ("src/a.py", "import pick" + "le"),
        ("src/a.py", "value = ev" + "al(text)"),
        ("tests/a.py", "from unittest." + "mock import Mock"),
        ("tests/a.py", "monkeypatch." + "setattr(a, 'b', 1)"),
        ("tests/a.py", "time." + "sleep(1)"),
    ],
)
def test_a_forbidden_word_is_found_with_its_line(path: str, line: str) -> None:
    (found,) = ratchets.words(path, f"x = 1\n{line}\n")
    assert found.startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("src/headrace/steps.py", "raise NotImplemented" + "Error"),
        ("src/a.py", "time." + "sleep(pause)"),
        ("src/a.py", "model.ev" + "al()"),
        ("tests/a.py", "monkeypatch.setenv('A', 'b')"),
    ],
)
def test_what_only_looks_forbidden_passes(path: str, line: str) -> None:
    assert list(ratchets.words(path, line)) == []


def test_a_module_that_loads_an_unwanted_library_is_found() -> None:
    assert list(ratchets.imports("json", ("decimal",))) == []
    assert list(ratchets.imports("fractions", ("decimal", "json"))) == ["import fractions loads decimal"]
    (broken,) = ratchets.imports("no_such_module", ())
    assert broken.startswith("import no_such_module fails: ModuleNotFoundError")


@pytest.mark.parametrize("module", list(ratchets.IMPORTS))
def test_the_client_and_the_server_process_stay_light(module: str) -> None:
    assert list(ratchets.imports(module, ratchets.IMPORTS[module])) == []


def test_the_sources_keep_lengths_docstrings_and_words() -> None:
    assert list(ratchets.misses(ROOT)) == []


def test_hidden_folders_and_caches_are_not_ours(tmp_path: Path) -> None:
    for name in ("src/a.py", "src/__pycache__/b.py", "src/.venv/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    assert [path.name for path in ratchets.python_files(tmp_path, "src")] == ["a.py"]


def test_continuous_integration_does_nothing_of_its_own() -> None:
    assert (ROOT / ".ci/run").read_text() == "#!/usr/bin/env bash\nexec make check test\n"
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_every_dependency_of_the_project_has_an_exact_version() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line and "+" not in line and " " not in line for line in lines)
    names = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    wanted = (
        "daft dbos deltalake fastapi granian httpx numpy orjson pandas polars pyarrow pytest ruff mypy torch tokenizers"
    )
    assert set(wanted.split()) <= names


def test_the_data_fetcher_lists_its_sets_with_their_licences_and_refuses_others(tmp_path: Path) -> None:
    fetcher = _script("fetch_data")
    command = [sys.executable, str(ROOT / "scripts/fetch_data.py")]
    environment = {**os.environ, "HEADRACE_TEST_DATA": str(tmp_path)}
    listed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    for name, source in fetcher.SOURCES.items():
        assert name in listed
        assert source.licence in listed
        assert len(source.sha256) == 64
    refused = subprocess.run([*command, "nothing"], capture_output=True, text=True, check=False, env=environment)
    assert refused.returncode == 2
    assert "no such data set: nothing" in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["demo", "test", "check", "noninterference", "serve", "bench", "services", "clean"])
def test_make_has_the_target_and_can_plan_it(target: str) -> None:
    planned = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert planned.returncode == 0, planned.stderr
