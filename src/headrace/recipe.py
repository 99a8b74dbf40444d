"""A recipe: one YAML text, checked in full before anything runs; every problem names its line and a remedy."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from headrace import clean, transform
from headrace.errors import BadRecipe, HeadraceError
from headrace.model import Ref, check_name, check_tag, to_dict
from headrace.steps import SequentialStep, Step

TEXT_BYTES_MAX = 1 << 20
DEPTH_MAX = 50
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

SECRET = re.compile(r"\$\{(\w+)(?::([^}]*))?\}")
_INT = re.compile(r"[-+]?[0-9][0-9_]{0,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}
_BAD = object()


@dataclass(frozen=True)
class Files:
    """Read the files that a path or glob names. ``source`` names them in ``_source``; default: the path as written."""

    path: str
    format: Literal["auto", "json", "ndjson", "csv", "parquet", "arrow", "text"] = "auto"
    source: str | None = None


@dataclass(frozen=True)
class Collect:
    """Where records come from: ``files`` (path, format, source) or a ``dataset`` (ref). Secrets stay references."""

    kind: Literal["files", "dataset"]
    path: str = ""
    format: str = "auto"
    source: str | None = None
    ref: Ref | None = None
    base: str = ""

    @property
    def location(self) -> str:
        """The path or glob with its secrets filled in, counted from the recipe's folder; URLs as they are."""
        path = os.path.expanduser(resolve(self.path, Path(self.base)))
        return path if "://" in path else os.path.join(self.base, path)


@dataclass(frozen=True)
class Expect:
    """What the result must hold, or nothing is published; ``max_dropped`` is a fraction of the rows read."""

    min_rows: int | None = None
    max_rows: int | None = None
    max_dropped: float | None = None

    def __post_init__(self) -> None:
        if any(number is not None and number < 0 for number in (self.min_rows, self.max_rows, self.max_dropped)):
            raise BadRecipe("expectations cannot be negative", hint="give a number of rows, or a fraction")
        if self.max_dropped is not None and not self.max_dropped <= 1:
            raise BadRecipe(f"max_dropped {self.max_dropped} is not a fraction", hint="0.6 allows 60% to be dropped")


@dataclass(frozen=True)
class Publish:
    """How the result becomes a version: an optional tag, named splits with their fractions, expectations."""

    tag: str | None = None
    split: Mapping[str, float] = field(default_factory=dict)
    expect: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _PublishOptions:
    """How the result becomes a version."""

    tag: str | None = None
    split: Mapping[str, float] | None = None
    expect: Expect | None = None

    def __post_init__(self) -> None:
        if self.tag is not None:
            check_tag(self.tag)
        if self.split is not None:
            for name, fraction in self.split.items():
                check_name(name, "split")
                if not 0 < fraction <= 1:
                    raise BadRecipe(f"split {name!r}: {fraction} is not within 0 and 1", hint="fractions sum to 1")
            if abs(sum(self.split.values()) - 1) > 1e-9:
                raise BadRecipe(
                    f"the split sums to {sum(self.split.values()):.10g}, not 1", hint="{train: 0.9, val: 0.1}"
                )


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. ``clean`` and ``transform`` are the steps that run, expanded; ``fingerprint`` is a sha256 in hex.

    The fingerprint covers the meaning with all defaults, not spelling, comments or the folder the recipe lies in.
    """

    dataset: str
    collect: tuple[Collect, ...]
    clean: tuple[Step, ...]
    transform: tuple[Step, ...]
    publish: Publish
    schedule: str | None
    text: str
    fingerprint: str


_TOP = ("dataset", "collect", "clean", "transform", "publish", "schedule")
_SECTIONS: Mapping[str, Mapping[str, type[Step]]] = {"clean": clean.STEPS, "transform": transform.STEPS}


def resolve(text: str, base: Path | None = None) -> str:
    """``text`` with each ``${env:NAME}`` and ``${file:PATH}`` filled in; raises BadRecipe for one that cannot be."""
    return SECRET.sub(lambda match: _secret(match, base), text)


def _secret(match: re.Match[str], base: Path | None) -> str:
    kind, name = match[1], match[2] or ""
    if kind == "env" and name:
        value = os.environ.get(name)
        if value is None:
            raise BadRecipe(f"the environment has no variable {name!r}", hint=f"set {name} where Headrace runs")
        return value
    if kind == "file" and name:
        try:
            return ((base or Path()) / Path(name).expanduser()).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, ValueError, RuntimeError):
            raise BadRecipe(f"the file {name!r} of a secret cannot be read", hint="check its path and rights") from None
    raise BadRecipe(f"{match[0][:80]!r} is not a reference to a secret", hint="write ${env:NAME} or ${file:PATH}")


def _near(name: str, names: Iterable[str]) -> str:
    known = list(names)
    found = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {found[0]!r}?" if found else f"one of: {', '.join(known)}"


def _plain(node: yaml.ScalarNode) -> Any:
    """A scalar as YAML 1.2's core schema reads it, so that ``no`` stays text and ``1e7`` is a number."""
    text = node.value
    if node.style:
        return text
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        return float(text)
    return _SPECIAL.get(text.lower(), text)


def _name_of(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return " or ".join(repr(arg) for arg in typing.get_args(kind))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name_of(arg) for arg in typing.get_args(kind) if arg is not type(None))
    if origin is tuple:
        return "a list"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(kind, "a mapping")


def _fits(kind: Any, node: yaml.Node) -> bool:
    """Whether ``node`` has the shape of ``kind``, to choose among the members of a union."""
    origin = typing.get_origin(kind)
    if isinstance(node, yaml.MappingNode):
        return dataclasses.is_dataclass(kind) or (origin is not None and issubclass(origin, Mapping))
    if isinstance(node, yaml.SequenceNode):
        return origin is tuple
    value = _plain(typing.cast(yaml.ScalarNode, node))
    if origin is Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(kind, type) and type(value) is kind


def _options(cls: Any) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """The options of a dataclass by the key a recipe uses: field and type."""
    hints = typing.get_type_hints(cls)
    return {str(one.metadata.get("key", one.name)): (one, hints[one.name]) for one in dataclasses.fields(cls)}


def _required(one: dataclasses.Field[Any]) -> bool:
    return one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING


class _Reader:
    """Turns YAML nodes into typed values and gathers every problem on the way."""

    def __init__(self, base: Path | None) -> None:
        self.base = base
        self.problems: list[dict[str, Any]] = []

    def problem(self, line: int, path: str, message: str, hint: str = "") -> Any:
        self.problems.append({"line": line, "path": path, "message": message, "hint": hint})
        return _BAD

    def bad(self, node: yaml.Node, path: str, message: str, hint: str = "") -> Any:
        return self.problem(node.start_mark.line + 1, path, message, hint)

    def items(self, node: yaml.MappingNode, path: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """Key, its node and its value; keys that are no texts, or come twice, are problems."""
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.bad(key, path, "a key must be a word")
            elif key.value in seen:
                self.bad(key, path, f"{key.value!r} is given twice", "remove one")
            else:
                seen.add(key.value)
                yield key.value, key, value

    def value(self, kind: Any, node: yaml.Node, path: str) -> Any:
        """The value of ``node`` as ``kind``, or ``_BAD`` after noting why not."""
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            return self._union(args, node, path)
        if origin is tuple:
            nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
            if isinstance(node, yaml.MappingNode):
                return self.bad(node, path, "must be a list")
            values = [self.value(args[0], one, f"{path}[{at}]") for at, one in enumerate(nodes)]
            return _BAD if _BAD in values else tuple(values)
        if origin is not None and origin is not Literal and issubclass(origin, Mapping):
            if not isinstance(node, yaml.MappingNode):
                return self.bad(node, path, "must be a mapping, as in {key: value}")
            found = {key: self.value(args[1], one, f"{path}.{key}") for key, _, one in self.items(node, path)}
            return _BAD if any(one is _BAD for one in found.values()) else types.MappingProxyType(found)
        if dataclasses.is_dataclass(kind):
            return self.built(kind, node, path)
        return self._scalar(kind, node, path)

    def _union(self, args: tuple[Any, ...], node: yaml.Node, path: str) -> Any:
        if isinstance(node, yaml.ScalarNode) and _plain(node) is None and type(None) in args:
            return None
        members = [arg for arg in args if arg is not type(None)]
        chosen = [member for member in members if _fits(member, node)] or (members if len(members) == 1 else [])
        if not chosen:
            return self.bad(node, path, f"must be {' or '.join(_name_of(member) for member in members)}")
        return self.value(chosen[0], node, path)

    def _scalar(self, kind: Any, node: yaml.Node, path: str) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return self.bad(node, path, "must be a single value" if kind is Any else f"must be {_name_of(kind)}")
        value = _plain(node)
        if kind is Any:
            return value
        if typing.get_origin(kind) is Literal:
            options = typing.get_args(kind)
            if value in options and type(value) in {type(one) for one in options}:
                return value
            return self.bad(node, path, f"{str(value)[:80]!r} is not allowed", _near(str(value), map(str, options)))
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if type(value) is kind:
            return value
        hint = "put it in quotes" if kind is str and value is not None else ""
        return self.bad(node, path, f"must be {_name_of(kind)}, not {str(node.value)[:80]!r}", hint)

    def built(self, cls: Any, node: yaml.Node, path: str) -> Any:
        """A dataclass from a mapping of its options."""
        if isinstance(node, yaml.ScalarNode) and _plain(node) is None:
            node = yaml.MappingNode(node.tag, [], node.start_mark, node.end_mark)
        if not isinstance(node, yaml.MappingNode):
            return self.bad(node, path, "must be a mapping of options, as in {key: value}")
        options = _options(cls)
        values: dict[str, Any] = {}
        before = len(self.problems)
        for key, key_node, one in self.items(node, path):
            if key in options:
                values[options[key][0].name] = self.value(options[key][1], one, f"{path}.{key}")
            else:
                self.bad(key_node, f"{path}.{key}", f"unknown key {key[:80]!r}", _near(key, options))
        for key, (option, _) in options.items():
            if _required(option) and option.name not in values:
                self.bad(node, path, f"{key!r} is missing", f"add {key}:")
        return self.made(cls, values, node, path) if len(self.problems) == before else _BAD

    def made(self, cls: Any, values: Mapping[str, Any], node: yaml.Node, path: str) -> Any:
        """``cls(**values)``; what it refuses is a problem of ``node``."""
        try:
            return cls(**values)
        except HeadraceError as error:
            return self.bad(node, path, error.message, error.hint)

    def step(self, section: str, node: yaml.Node, path: str) -> Any:
        """One entry under ``clean`` or ``transform``: ``name``, ``name: options`` or ``name: [bare]``."""
        found = self._single(node, path, "a step is one name and its options, as in - unicode: {}")
        if found is None:
            return _BAD
        name, body = found
        steps, path = _SECTIONS[section], f"{path}.{name}"
        if name not in steps:
            others = [other for other, known in _SECTIONS.items() if name in known]
            hint = f"it belongs under {others[0]}:" if others else _near(name, steps)
            return self.bad(node, path, f"there is no step {name[:80]!r} under {section}", hint)
        cls = steps[name]
        if cls.whole is not None:
            one, kind = _options(cls)[cls.whole]
            bare = isinstance(body, yaml.MappingNode) == (typing.get_origin(kind) is not tuple)
            if bare and not (isinstance(body, yaml.ScalarNode) and _plain(body) is None):
                value = self.value(kind, body, path)
                return _BAD if value is _BAD else self.made(cls, {one.name: value}, body, path)
        return self.built(cls, body, path)

    def _single(self, node: yaml.Node, path: str, shape: str) -> tuple[str, yaml.Node] | None:
        if isinstance(node, yaml.ScalarNode) and isinstance(_plain(node), str):
            return node.value, yaml.MappingNode("tag:yaml.org,2002:map", [], node.start_mark, node.end_mark)
        if not isinstance(node, yaml.MappingNode):
            self.bad(node, path, shape)
            return None
        found = [(key, one) for key, _, one in self.items(node, path)]
        if len(found) != 1:
            self.bad(node, path, shape)
            return None
        return found[0]

    def collect(self, node: yaml.Node, path: str) -> Any:
        """One entry under ``collect``."""
        found = self._single(node, path, "a source is one kind and its settings, as in - files: ./raw/*.jsonl")
        if found is None:
            return _BAD
        kind, body = found
        path = f"{path}.{kind}"
        if kind == "dataset":
            text = self.value(str, body, path)
            ref = _BAD if text is _BAD else self.made(_ref, {"text": text}, body, path)
            return _BAD if ref is _BAD else Collect("dataset", ref=ref)
        if kind != "files":
            return self.bad(node, path, f"there is no source {kind[:80]!r}", _near(kind, ("files", "dataset")))
        if isinstance(body, yaml.ScalarNode):
            text = self.value(str, body, path)
            files = _BAD if text is _BAD else Files(text)
        else:
            files = self.built(Files, body, path)
        if files is _BAD or not files.path.strip() or "\0" in files.path:
            return (
                _BAD if files is _BAD else self.bad(body, path, "the path is empty or has a NUL", "name files to read")
            )
        return Collect("files", files.path, files.format, files.source, base=str(self.base or ""))

    def entries(self, root: Mapping[str, yaml.Node], section: str, read: Any) -> list[Any]:
        """The list under ``section``, each entry through ``read(node, path)``."""
        node = root.get(section)
        if node is None or (isinstance(node, yaml.ScalarNode) and _plain(node) is None):
            return []
        if not isinstance(node, yaml.SequenceNode):
            self.bad(node, section, "must be a list", f"begin each line under {section}: with '- '")
            return []
        found = [read(one, f"{section}[{at}]") for at, one in enumerate(node.value)]
        return [one for one in found if one is not _BAD]


def _ref(text: str) -> Ref:
    return Ref.parse(text)


def _tree(text: str, reader: _Reader) -> yaml.Node | None:
    """The YAML tree of ``text``, or None after noting why there is none; too deep or aliased texts are not built."""
    try:
        if len(text.encode()) > TEXT_BYTES_MAX:
            return typing.cast(
                None, reader.problem(1, "", "the recipe is longer than 1 MiB", "name files instead") and None
            )
        depth = 0
        for event in yaml.parse(text, Loader=LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEPTH_MAX:
                what = "aliases (*name) are not read" if depth <= DEPTH_MAX else f"nested deeper than {DEPTH_MAX}"
                reader.problem(event.start_mark.line + 1, "", what, "write it out flat")
                return None
        return typing.cast("yaml.Node | None", yaml.compose(text, Loader=LOADER))
    except UnicodeEncodeError:
        reader.problem(1, "", "the recipe is not valid Unicode", "save it as UTF-8")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reader.problem(
            mark.line + 1 if mark else 1,
            "",
            f"not valid YAML: {error.problem or error.context}",
            "check the indentation",
        )
    except yaml.YAMLError as error:
        reader.problem(1, "", f"not valid YAML: {str(error).splitlines()[0][:200]}", "save it as plain UTF-8 text")
    return None


def _walk(node: yaml.Node, path: str, reader: _Reader) -> None:
    """Note every secret that cannot be resolved, and every tag that is not YAML's own."""
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        reader.bad(node, path, f"the tag {node.tag[:80]!r} is not read", "remove it")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _walk(key, path, reader)
            _walk(value, f"{path}.{key.value}".lstrip(".") if isinstance(key, yaml.ScalarNode) else path, reader)
    elif isinstance(node, yaml.SequenceNode):
        for at, value in enumerate(node.value):
            _walk(value, f"{path}[{at}]", reader)
    elif "${" in node.value:
        try:
            resolve(node.value, reader.base)
        except BadRecipe as error:
            reader.bad(node, path, error.message, error.hint)


def _schedule(text: str) -> str:
    """``text`` if it is a cron line of five fields; raises BadRecipe."""
    limits = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
    fields = text.split()
    good = len(fields) == 5
    for one, (low, high) in zip(fields, limits, strict=False):
        for part in one.split(","):
            span = re.fullmatch(
                r"(?:\*|([0-9]{1,2})(?:-([0-9]{1,2}))?|[A-Za-z]{3}(?:-[A-Za-z]{3})?)(?:/[1-9][0-9]?)?", part
            )
            good = good and span is not None and all(low <= int(n) <= high for n in span.groups() if n is not None)
    if not good:
        raise BadRecipe(f"{text[:80]!r} is not a schedule of five fields", hint='"0 2 * * *" is every night at two')
    return text


def _plain_step(step: Step) -> dict[str, Any]:
    options = {key: to_dict(getattr(step, one.name)) for key, (one, _) in _options(type(step)).items()}
    return {step.name: options}


def _fingerprint(
    dataset: str, collect: list[Collect], steps: Mapping[str, list[Step]], publish: Publish, schedule: str | None
) -> str:
    sources = [{**to_dict(one), "base": ""} for one in collect]
    lists = {section: [_plain_step(step) for step in found] for section, found in steps.items()}
    normal = {"dataset": dataset, "collect": sources, **lists, "publish": to_dict(publish), "schedule": schedule}
    return hashlib.sha256(json.dumps(normal, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _expanded(reader: _Reader, steps: list[Step]) -> tuple[Step, ...]:
    return tuple(one for step in steps for one in step.expand(reader.base))


def _read(text: str, base: Path | None) -> tuple[Recipe | None, list[dict[str, Any]]]:
    reader = _Reader(base)
    tree = _tree(text, reader)
    if tree is None or not isinstance(tree, yaml.MappingNode):
        if not reader.problems:
            reader.problem(1, "", "a recipe is a mapping that begins with dataset:", "see the starter recipe")
        return None, reader.problems
    _walk(tree, "", reader)
    root: dict[str, yaml.Node] = {}
    for key, key_node, node in reader.items(tree, ""):
        if key in _TOP:
            root[key] = node
        else:
            reader.bad(key_node, key, f"unknown key {key[:80]!r}", _near(key, _TOP))
    dataset = reader.value(str, root["dataset"], "dataset") if "dataset" in root else _BAD
    if "dataset" not in root:
        reader.bad(tree, "dataset", "'dataset' is missing", "add dataset: with the name to publish under")
    elif dataset is not _BAD:
        reader.made(check_name, {"name": dataset}, root["dataset"], "dataset")
    collect = reader.entries(root, "collect", reader.collect)
    if not root.get("collect") or (not collect and not reader.problems):
        reader.bad(
            root.get("collect", tree), "collect", "nothing to collect", "add collect: with - files: or - dataset:"
        )
    steps = {
        section: reader.entries(root, section, lambda node, path, s=section: reader.step(s, node, path))
        for section in _SECTIONS
    }
    publish = _publish(reader, root)
    schedule = reader.value(str | None, root["schedule"], "schedule") if "schedule" in root else None
    if isinstance(schedule, str):
        reader.made(_schedule, {"text": schedule}, root["schedule"], "schedule")
    transformed = _expanded(reader, steps["transform"])
    if any(isinstance(step, SequentialStep) for step in transformed[:-1]):
        reader.bad(root["transform"], "transform", "packing must be the last step", "move tokenize to the end")
    if reader.problems or publish is None:
        return None, sorted(reader.problems, key=lambda one: one["line"])
    mark = _fingerprint(dataset, collect, steps, publish, schedule)
    cleaned = _expanded(reader, steps["clean"])
    return Recipe(dataset, tuple(collect), cleaned, transformed, publish, schedule, text, mark), []


def _publish(reader: _Reader, root: Mapping[str, yaml.Node]) -> Publish | None:
    options = reader.built(_PublishOptions, root["publish"], "publish") if "publish" in root else _PublishOptions()
    if options is _BAD:
        return None
    expect = {key: number for key, number in to_dict(options.expect or Expect()).items() if number is not None}
    return Publish(options.tag, dict(options.split or {}), expect)


def problems(text: str, base: Path | None = None) -> list[dict[str, Any]]:
    """Everything wrong with a recipe, by line: dicts of ``line``, ``path``, ``message``, ``hint``; empty if it can run."""
    return _read(text, base)[1]


def parse(text: str, base: Path | None = None, file: str = "recipe") -> Recipe:
    """The recipe in ``text``; relative paths count from the folder ``base``. Raises BadRecipe with all problems.

    ``details["problems"]`` are those of ``problems``; ``file`` is how the message names the text.
    """
    recipe, found = _read(text, base)
    if recipe is None:
        first = found[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        place = f"{first['path']}: " if first["path"] else ""
        message = f"{file}, line {first['line']}: {place}{first['message']}{more}"
        raise BadRecipe(message, hint=first["hint"], details={"problems": found, "file": file})
    return recipe


def _schema(kind: Any) -> dict[str, Any]:
    """The JSON Schema of a type of options."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(arg) for arg in args]}
    if origin is tuple:
        return {"anyOf": [{"type": "array", "items": _schema(args[0])}, _schema(args[0])]}
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema(args[1])}
    if dataclasses.is_dataclass(kind):
        return _object_schema(kind)
    words = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    return {"type": words[kind]} if kind in words else {}


def _object_schema(cls: Any) -> dict[str, Any]:
    options = _options(cls)
    properties = {}
    for key, (one, kind) in options.items():
        properties[key] = _schema(kind)
        if not isinstance(one.default, type(dataclasses.MISSING)):
            properties[key]["default"] = to_dict(one.default)
    required = [key for key, (one, _) in options.items() if _required(one)]
    words = " ".join((cls.__doc__ or "").split())
    return {
        "type": "object",
        "description": words.replace("``", "'"),
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _steps_schema(steps: Mapping[str, type[Step]]) -> dict[str, Any]:
    bodies = {}
    for name, cls in steps.items():
        whole = _object_schema(cls)
        kind = _options(cls)[cls.whole][1] if cls.whole else None
        if kind is not None:
            bare = {**_schema(kind), "description": whole["description"]}
            whole = bare if typing.get_origin(kind) is not tuple else {"anyOf": [*bare["anyOf"], whole]}
        bodies[name] = whole
    entry = {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "properties": bodies,
        "additionalProperties": False,
    }
    return {"type": "array", "items": {"anyOf": [entry, {"enum": list(steps)}]}}


def schema_json() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe, for editors, made from the steps themselves."""
    files = {"anyOf": [{"type": "string"}, _object_schema(Files)]}
    sources = {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "properties": {"files": files, "dataset": {"type": "string"}},
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Headrace recipe",
        "type": "object",
        "properties": {
            "dataset": {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,127}$"},
            "collect": {"type": "array", "minItems": 1, "items": sources},
            **{section: _steps_schema(steps) for section, steps in _SECTIONS.items()},
            "publish": _object_schema(_PublishOptions),
            "schedule": {"type": "string"},
        },
        "required": ["dataset", "collect"],
        "additionalProperties": False,
    }


STARTER = """\
# What this recipe publishes: each run that changes the data makes a new version of this dataset.
dataset: prose

# Where records come from: files (json, ndjson, csv, parquet, arrow, text), or another dataset.
collect:
  - files: ./raw/*.jsonl
  # - dataset: inbox_notes@latest

# Every row that a step drops is kept in the quarantine, with its rule and the value that decided.
clean:
  - unicode: {}                      # one Unicode form, repaired mojibake, no control characters
  - drop_nulls: [text]
  # - check: {age: {not_null: true, min: 0, max: 150}, email: {unique: true}, amount: {outliers: mad}}
  - dedup: {exact: true}             # equal rows are merged into the one with the smallest _id

# What the model takes: tokens packed into rows of one length, or columns as one vector and a label.
transform:
  - tokenize: {tokenizer: bytes, pack: 1024}
  # - features: {columns: [age, height], label: outcome, standardize: true}

# The result becomes a version only if it meets what is expected of it.
publish:
  tag: first
  split: {train: 0.95, val: 0.05}
  expect: {min_rows: 1, max_dropped: 0.9}

# schedule: "0 2 * * *"              # every night at two
"""


def starter() -> str:
    """A commented recipe to begin with."""
    return STARTER
