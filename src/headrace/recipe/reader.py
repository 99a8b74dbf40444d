"""YAML into typed values: options of dataclasses, by their types; every problem is gathered with its line."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from headrace.errors import BadRecipe, HeadraceError
from headrace.recipe.secrets import resolve

TEXT_BYTES_MAX = 1 << 20
DEPTH_MAX = 50
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_INT = re.compile(r"[-+]?[0-9][0-9_]{0,40}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan")}
BAD = object()


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint that names the nearest of ``names``, or all of them."""
    known = list(names)
    found = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {found[0]!r}?" if found else f"one of: {', '.join(known)}"


def plain(node: yaml.ScalarNode) -> Any:
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


def _line(place: yaml.Node | yaml.Event) -> int:
    return place.start_mark.line + 1 if place.start_mark is not None else 1


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
    value = plain(typing.cast(yaml.ScalarNode, node))
    if origin is Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(kind, type) and type(value) is kind


def options_of(cls: Any) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """The options of a dataclass by the key a recipe uses: field and type."""
    hints = typing.get_type_hints(cls)
    return {str(one.metadata.get("key", one.name)): (one, hints[one.name]) for one in dataclasses.fields(cls)}


def is_required(one: dataclasses.Field[Any]) -> bool:
    """Whether a recipe must give this option."""
    return one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING


class Reader:
    """Turns YAML nodes into typed values and gathers every problem on the way."""

    def __init__(self, base: Path | None, trusted: bool = True) -> None:
        """``trusted``: whether the writer may use the secrets of this machine; their very existence tells something."""
        self.base = base
        self.trusted = trusted
        self.problems: list[dict[str, Any]] = []

    def problem(self, line: int, path: str, message: str, hint: str = "") -> Any:
        """Note a problem; returns ``BAD``."""
        self.problems.append({"line": line, "path": path, "message": message, "hint": hint})
        return BAD

    def bad(self, node: yaml.Node, path: str, message: str, hint: str = "") -> Any:
        """Note a problem of ``node``; returns ``BAD``."""
        return self.problem(_line(node), path, message, hint)

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
        """The value of ``node`` as ``kind``, or ``BAD`` after noting why not."""
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            return self._union(args, node, path)
        if origin is tuple:
            nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
            if isinstance(node, yaml.MappingNode):
                return self.bad(node, path, "must be a list")
            values = [self.value(args[0], one, f"{path}[{at}]") for at, one in enumerate(nodes)]
            return BAD if BAD in values else tuple(values)
        if origin is not None and origin is not Literal and issubclass(origin, Mapping):
            if not isinstance(node, yaml.MappingNode):
                return self.bad(node, path, "must be a mapping, as in {key: value}")
            found = {key: self.value(args[1], one, f"{path}.{key}") for key, _, one in self.items(node, path)}
            return BAD if any(one is BAD for one in found.values()) else found
        if dataclasses.is_dataclass(kind):
            return self.built(kind, node, path)
        return self._scalar(kind, node, path)

    def _union(self, args: tuple[Any, ...], node: yaml.Node, path: str) -> Any:
        if isinstance(node, yaml.ScalarNode) and plain(node) is None and type(None) in args:
            return None
        members = [arg for arg in args if arg is not type(None)]
        chosen = [member for member in members if _fits(member, node)] or (members if len(members) == 1 else [])
        if not chosen:
            return self.bad(node, path, f"must be {' or '.join(_name_of(member) for member in members)}")
        return self.value(chosen[0], node, path)

    def _scalar(self, kind: Any, node: yaml.Node, path: str) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return self.bad(node, path, "must be a single value" if kind is Any else f"must be {_name_of(kind)}")
        value = plain(node)
        if kind is Any:
            return value
        if typing.get_origin(kind) is Literal:
            options = typing.get_args(kind)
            if value in options and type(value) in {type(one) for one in options}:
                return value
            return self.bad(node, path, f"{str(value)[:80]!r} is not allowed", nearest(str(value), map(str, options)))
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
        if isinstance(node, yaml.ScalarNode) and plain(node) is None:
            node = yaml.MappingNode(node.tag, [], node.start_mark, node.end_mark)
        if not isinstance(node, yaml.MappingNode):
            return self.bad(node, path, "must be a mapping of options, as in {key: value}")
        options = options_of(cls)
        values: dict[str, Any] = {}
        before = len(self.problems)
        for key, key_node, one in self.items(node, path):
            if key in options:
                values[options[key][0].name] = self.value(options[key][1], one, f"{path}.{key}")
            else:
                self.bad(key_node, f"{path}.{key}", f"unknown key {key[:80]!r}", nearest(key, options))
        for key, (option, _) in options.items():
            if is_required(option) and option.name not in values:
                self.bad(node, path, f"{key!r} is missing", f"add {key}:")
        return self.made(cls, values, node, path) if len(self.problems) == before else BAD

    def made(self, cls: Any, values: Mapping[str, Any], node: yaml.Node, path: str) -> Any:
        """``cls(**values)``; what it refuses is a problem of ``node``."""
        try:
            return cls(**values)
        except HeadraceError as error:
            return self.bad(node, path, error.message, error.hint)


def read_tree(text: str, reader: Reader) -> yaml.Node | None:
    """The YAML tree of ``text``, or None after noting why there is none; too deep or aliased texts are not built."""
    try:
        if len(text.encode()) > TEXT_BYTES_MAX:
            reader.problem(1, "", "the recipe is longer than 1 MiB", "name files instead")
            return None
        depth = 0
        for event in yaml.parse(text, Loader=LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEPTH_MAX:
                what = "aliases (*name) are not read" if depth <= DEPTH_MAX else f"nested deeper than {DEPTH_MAX}"
                reader.problem(_line(event), "", what, "write it out flat")
                return None
        return yaml.compose(text, Loader=LOADER)
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


def check_tree(node: yaml.Node, path: str, reader: Reader) -> None:
    """Note every secret that cannot be resolved, and every tag that is not YAML's own."""
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        reader.bad(node, path, f"the tag {node.tag[:80]!r} is not read", "remove it")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            check_tree(key, path, reader)
            check_tree(value, f"{path}.{key.value}".lstrip(".") if isinstance(key, yaml.ScalarNode) else path, reader)
    elif isinstance(node, yaml.SequenceNode):
        for at, value in enumerate(node.value):
            check_tree(value, f"{path}[{at}]", reader)
    elif "${" in node.value and not reader.trusted:
        reader.bad(
            node, path, "only those who manage the exchange may use its secrets", "ask an admin to run this recipe"
        )
    elif "${" in node.value:
        try:
            resolve(node.value, reader.base)
        except BadRecipe as error:
            reader.bad(node, path, error.message, error.hint)
