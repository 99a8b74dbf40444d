"""A recipe: one YAML text, checked in full before anything runs; every problem names its line and a remedy."""

from __future__ import annotations

import hashlib
import json
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from headrace.errors import BadRecipe
from headrace.model import Ref, check_name, to_dict
from headrace.recipe.parts import SECTIONS, Collect, Expect, Files, Publish, PublishOptions, Recipe
from headrace.recipe.reader import BAD, Reader, check_tree, nearest, options_of, plain, read_tree
from headrace.steps import SequentialStep, Step

TOP = ("dataset", "collect", "clean", "transform", "publish", "schedule")


class RecipeReader(Reader):
    """Reads the sections of a recipe."""

    def step(self, section: str, node: yaml.Node, path: str) -> Any:
        """One entry under ``clean`` or ``transform``: ``name``, ``name: options`` or ``name: [bare]``."""
        found = self._single(node, path, "a step is one name and its options, as in - unicode: {}")
        if found is None:
            return BAD
        name, body = found
        steps, path = SECTIONS[section], f"{path}.{name}"
        if name not in steps:
            others = [other for other, known in SECTIONS.items() if name in known]
            hint = f"it belongs under {others[0]}:" if others else nearest(name, steps)
            return self.bad(node, path, f"there is no step {name[:80]!r} under {section}", hint)
        cls = steps[name]
        if cls.whole is not None:
            one, kind = options_of(cls)[cls.whole]
            bare = isinstance(body, yaml.MappingNode) == (typing.get_origin(kind) is not tuple)
            if bare and not (isinstance(body, yaml.ScalarNode) and plain(body) is None):
                value = self.value(kind, body, path)
                return BAD if value is BAD else self.made(cls, {one.name: value}, body, path)
        return self.built(cls, body, path)

    def _single(self, node: yaml.Node, path: str, shape: str) -> tuple[str, yaml.Node] | None:
        if isinstance(node, yaml.ScalarNode) and isinstance(plain(node), str):
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
            return BAD
        kind, body = found
        path = f"{path}.{kind}"
        if kind == "dataset":
            text = self.value(str, body, path)
            ref = BAD if text is BAD else self.made(_ref, {"text": text}, body, path)
            return BAD if ref is BAD else Collect("dataset", ref=ref)
        if kind != "files":
            return self.bad(node, path, f"there is no source {kind[:80]!r}", nearest(kind, ("files", "dataset")))
        if isinstance(body, yaml.ScalarNode):
            text = self.value(str, body, path)
            files = BAD if text is BAD else Files(text)
        else:
            files = self.built(Files, body, path)
        if files is BAD or not files.path.strip() or "\0" in files.path:
            return BAD if files is BAD else self.bad(body, path, "the path is empty or has a NUL", "name files to read")
        return Collect("files", files.path, files.format, files.source, base=str(self.base or ""))

    def entries(self, root: Mapping[str, yaml.Node], section: str, read: Any) -> list[Any]:
        """The list under ``section``, each entry through ``read(node, path)``."""
        node = root.get(section)
        if node is None or (isinstance(node, yaml.ScalarNode) and plain(node) is None):
            return []
        if not isinstance(node, yaml.SequenceNode):
            self.bad(node, section, "must be a list", f"begin each line under {section}: with '- '")
            return []
        found = [read(one, f"{section}[{at}]") for at, one in enumerate(node.value)]
        return [one for one in found if one is not BAD]


def _ref(text: str) -> Ref:
    return Ref.parse(text)


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
    options = {key: to_dict(getattr(step, one.name)) for key, (one, _) in options_of(type(step)).items()}
    return {step.name: options}


def _fingerprint(
    dataset: str, collect: list[Collect], steps: Mapping[str, list[Step]], publish: Publish, schedule: str | None
) -> str:
    sources = [{**to_dict(one), "base": ""} for one in collect]
    lists = {section: [_plain_step(step) for step in found] for section, found in steps.items()}
    normal = {"dataset": dataset, "collect": sources, **lists, "publish": to_dict(publish), "schedule": schedule}
    return hashlib.sha256(json.dumps(normal, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _expanded(reader: Reader, steps: list[Step]) -> tuple[Step, ...]:
    return tuple(one for step in steps for one in step.expand(reader.base))


def _read(text: str, base: Path | None, trusted: bool) -> tuple[Recipe | None, list[dict[str, Any]]]:
    reader = RecipeReader(base, trusted)
    tree = read_tree(text, reader)
    if tree is None or not isinstance(tree, yaml.MappingNode):
        if not reader.problems:
            reader.problem(1, "", "a recipe is a mapping that begins with dataset:", "see the starter recipe")
        return None, reader.problems
    check_tree(tree, "", reader)
    root: dict[str, yaml.Node] = {}
    for key, key_node, node in reader.items(tree, ""):
        if key in TOP:
            root[key] = node
        else:
            reader.bad(key_node, key, f"unknown key {key[:80]!r}", nearest(key, TOP))
    dataset = reader.value(str, root["dataset"], "dataset") if "dataset" in root else BAD
    if "dataset" not in root:
        reader.bad(tree, "dataset", "'dataset' is missing", "add dataset: with the name to publish under")
    elif dataset is not BAD:
        reader.made(check_name, {"name": dataset}, root["dataset"], "dataset")
    collect = reader.entries(root, "collect", reader.collect)
    if not root.get("collect") or (not collect and not reader.problems):
        reader.bad(
            root.get("collect", tree), "collect", "nothing to collect", "add collect: with - files: or - dataset:"
        )
    steps = {
        section: reader.entries(root, section, lambda node, path, s=section: reader.step(s, node, path))
        for section in SECTIONS
    }
    publish = _publish(reader, root)
    schedule = reader.value(str | None, root["schedule"], "schedule") if "schedule" in root else None
    if isinstance(schedule, str):
        reader.made(_schedule, {"text": schedule}, root["schedule"], "schedule")
    transformed = _expanded(reader, steps["transform"])
    if any(isinstance(step, SequentialStep) for step in transformed[:-1]):
        reader.bad(root["transform"], "transform", "packing must be the last step", "move tokenize to the end")
    if reader.problems or publish is None or not isinstance(dataset, str):
        return None, sorted(reader.problems, key=lambda one: one["line"])
    mark = _fingerprint(dataset, collect, steps, publish, schedule)
    cleaned = _expanded(reader, steps["clean"])
    return Recipe(dataset, tuple(collect), cleaned, transformed, publish, schedule, text, mark), []


def _publish(reader: Reader, root: Mapping[str, yaml.Node]) -> Publish | None:
    options = reader.built(PublishOptions, root["publish"], "publish") if "publish" in root else PublishOptions()
    if options is BAD:
        return None
    expect = {key: number for key, number in to_dict(options.expect or Expect()).items() if number is not None}
    return Publish(options.tag, dict(options.split or {}), expect)


def problems(text: str, base: Path | None = None, *, trusted: bool = True) -> list[dict[str, Any]]:
    """Everything wrong with a recipe, by line: ``line``, ``path``, ``message``, ``hint``; empty if it can run.

    Without ``trusted``, a reference to a secret is such a problem, and not looked up.
    """
    return _read(text, base, trusted)[1]


def parse(text: str, base: Path | None = None, file: str = "recipe", *, trusted: bool = True) -> Recipe:
    """The recipe in ``text``; relative paths count from the folder ``base``. Raises BadRecipe with all problems.

    ``details["problems"]`` are those of ``problems``, ``trusted`` is as there; ``file`` names the text in the message.
    """
    recipe, found = _read(text, base, trusted)
    if recipe is None:
        first = found[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        place = f"{first['path']}: " if first["path"] else ""
        message = f"{file}, line {first['line']}: {place}{first['message']}{more}"
        raise BadRecipe(message, hint=first["hint"], details={"problems": found, "file": file})
    return recipe
