"""The documentation tells the truth: its code runs against a real exchange, and it leaves out nothing."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import httpx
import pytest
import yaml

from conftest import Served, free_port
from headrace import recipe, settings
from headrace.recipe.parts import SECTIONS
from headrace.recipe.reader import options_of

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
WRITTEN = [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *DOCS]
RUNNABLE = [ROOT / "README.md", *(path for path in DOCS if path.stem != "settings")]
EXCHANGES = re.compile(r"http://(?:localhost:5000|127\.0\.0\.1:7070)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line it begins at."""

    language: str
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in BLOCK.finditer(text)]


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Reader:
    """Does what a reader does: types the blocks in order, in a folder with the examples, against an exchange."""

    def __init__(self, folder: Path, served: Served) -> None:
        self.folder, self.served = folder, served
        (folder / "examples").symlink_to(ROOT / "examples")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "DO_NOT_TRACK": "1",
            "HEADRACE_URL": served.url,
            "HEADRACE_TOKEN": served.token,
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def read(self, block: Block) -> None:
        text = EXCHANGES.sub(self.served.url, block.text)
        if block.language == "yaml":
            name = text.splitlines()[0].removeprefix("# ")
            assert name.endswith(".yaml"), "a yaml block begins with the name of its file"
            (self.folder / name).write_text(text, encoding="utf-8")
            assert recipe.problems(text, self.folder) == []
        elif block.language == "python":
            self.run([sys.executable, "-c", text], block)
        elif block.language == "bash" and not text.startswith("headrace serve"):
            if "HEADRACE_ROOT=" in text:
                text = f"unset HEADRACE_URL HEADRACE_TOKEN\n{text}"
            self.run(["bash", "-euo", "pipefail", "-c", text], block)

    def run(self, command: list[str], block: Block) -> None:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=240
        )
        log = self.served.log.read_text()[-2000:]
        said = f"line {block.line}:\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}\n{log}"
        assert done.returncode == 0, said


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.name)
def test_every_code_block_runs_as_written(path: Path, serve: Served, tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    reader = Reader(folder, serve)
    found = blocks(path)
    assert found
    for block in found:
        reader.read(block)


def test_the_readme_serves_as_the_widespread_client_expects(tmp_path: Path) -> None:
    (said,) = [block.text for block in blocks(ROOT / "README.md") if block.text.startswith("headrace serve")]
    assert said.strip() == "headrace serve --open --port 5000"
    served = Served(tmp_path / "root", free_port(), open=True).start()
    try:
        record = {"features": [0.5] * 10, "label": [1.0]}
        assert httpx.post(f"{served.url}/upload", json=record).status_code == 200
        assert httpx.get(f"{served.url}/get_data").json() == [record]
    finally:
        assert served.stop() == 0


def test_both_readmes_have_the_same_code() -> None:
    def bare(path: Path) -> list[tuple[str, list[str]]]:
        return [
            (block.language, [re.sub(r"\s*#.*", "", line) for line in block.text.splitlines()])
            for block in blocks(path)
        ]

    assert bare(ROOT / "README.md") == bare(ROOT / "README.zh-CN.md")


def test_both_readmes_have_the_same_shape() -> None:
    def shape(path: Path) -> list[str]:
        return re.findall(r"^(#+ |\| |- )", re.sub(BLOCK, "", path.read_text(encoding="utf-8")), re.MULTILINE)

    assert shape(ROOT / "README.md") == shape(ROOT / "README.zh-CN.md")


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_no_code_block_has_a_language_that_nothing_checks(path: Path) -> None:
    assert {block.language for block in blocks(path)} <= {"python", "bash", "yaml", "sh", "text"}


@pytest.mark.parametrize("name", ["settings", "recipes", "cli"])
def test_the_reference_is_what_the_code_says(name: str) -> None:
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert _script("reference").written(text) == text, "run: python scripts/reference.py"


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert [one.name for one in settings.TABLE if f"| `{one.name}` |" not in text] == []


@pytest.mark.parametrize("section", list(SECTIONS))
def test_every_step_and_option_is_documented(section: str) -> None:
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    for name, cls in SECTIONS[section].items():
        part = text.partition(f"### `{name}`")[2].partition("### ")[0]
        assert part, f"{name} has no section"
        assert [key for key in options_of(cls) if f"| `{key}` |" not in part] == []


def test_two_languages_of_a_page_have_the_same_code_and_shape() -> None:
    pairs = [(path, path.with_name(f"{path.stem}.zh-CN.md")) for path in DOCS]
    for english, chinese in [pair for pair in pairs if pair[1].exists()]:
        code = [
            [
                (block.language, [re.sub(r"\s*#.*", "", line) for line in block.text.splitlines()])
                for block in blocks(path)
            ]
            for path in (english, chinese)
        ]
        assert code[0] == code[1], english.name
        shape = [re.findall(r"^(#+ |\| |- )", path.read_text(encoding="utf-8"), re.M) for path in (english, chinese)]
        assert shape[0] == shape[1], english.name


def _routes(text: str) -> set[tuple[str, str]]:
    found = re.findall(r"^\| `(GET|POST|DELETE|PUT) (\S+)` \|", text, re.MULTILINE)
    return {(method, re.sub(r"\{\w+\}", "{}", path)) for method, path in found}


def test_every_route_is_documented_and_every_documented_route_exists(serve: Served) -> None:
    described = httpx.get(f"{serve.url}/openapi.json").json()["paths"]
    there = {
        (method.upper(), re.sub(r"\{\w+\}", "{}", path))
        for path, methods in described.items()
        for method in methods
        if method in ("get", "post", "put", "delete")
    }
    assert _routes((ROOT / "docs/rest.md").read_text(encoding="utf-8")) == there


def test_every_method_of_a_session_is_documented() -> None:
    from headrace.client.session import DatasetView, Session

    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    for cls in (Session, DatasetView):
        public = [name for name in dir(cls) if not name.startswith("_") and name not in ("info", "ref", "register")]
        assert [name for name in public if not re.search(rf"`\.?{name}\b", text)] == []


def test_the_architecture_names_every_module_and_folder() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    modules = [path for path in (ROOT / "src/headrace").iterdir() if not path.name.startswith("_")]
    names = [f"{path.name}/" if path.is_dir() else path.name for path in modules if path.name != "py.typed"]
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples/recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_an_example_recipe_has_no_problems_and_reads_what_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert recipe.problems(text, path.parent) == []
    for entry in yaml.safe_load(text)["collect"]:
        if "files" in entry:
            assert list(path.parent.glob(entry["files"]["path"].removeprefix("./"))) or ".." in entry["files"]["path"]


def test_the_example_data_are_what_their_readme_says() -> None:
    import csv
    import gzip
    import json

    patients = [json.loads(line) for line in (ROOT / "examples/data/patients.jsonl").read_text().splitlines()]
    with (ROOT / "examples/data/patients.csv").open() as file:
        rows = [[float(value) for value in row] for row in list(csv.reader(file))[1:]]
    assert rows == [[*one["features"], *one["label"]] for one in patients]
    assert len(rows) == 442
    speeches = {
        path.name: [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        for path in (ROOT / "examples/data/speeches").iterdir()
    }
    again = speeches.pop("second-delivery.jsonl.gz")
    texts = {" ".join(one["text"].split()) for part in speeches.values() for one in part}
    assert len(texts) == 78
    assert sum(" ".join((one["text"] or "").split()) in texts for one in again) == 10


def test_the_demo_refuses_an_unknown_option(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/demo.py"), "--no-such-option"]
    assert subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=120).returncode == 2
