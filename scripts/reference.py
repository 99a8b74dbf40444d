"""Write the documentation that the code knows best: ``python scripts/reference.py`` (``--check``: only compare).

They stand in docs/*.md between ``<!-- generated: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import typer.main

from headrace import settings
from headrace.cli import app
from headrace.recipe.parts import SECTIONS, Expect, Files, PublishOptions
from headrace.recipe.reader import options_of

DOCS = Path(__file__).resolve().parent.parent / "docs"
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "nothing"}


def kind_name(kind: Any) -> str:
    """A type in a reader's words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind_name(arg) for arg in args if arg is not type(None))
    if origin is tuple:
        return "list" if args[0] is Any else f"list of {kind_name(args[0])}s"
    if origin is not None and issubclass(origin, Mapping):
        return f"mapping of name to {kind_name(args[1])}"
    if dataclasses.is_dataclass(kind):
        return "mapping of " + ", ".join(f"`{key}`" for key in options_of(kind))
    return WORDS.get(kind, "any value")


def default_text(option: dataclasses.Field[Any]) -> str:
    """What holds if a recipe does not set an option."""
    if option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING:
        return "must be given"
    if option.default is None or option.default == () or option.default is dataclasses.MISSING:
        return ""
    return f"`{str(option.default).lower() if isinstance(option.default, bool) else option.default}`"


def cell(text: str) -> str:
    """Text that does not end its table cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def prose(cls: type) -> str:
    """A docstring as Markdown."""
    return "\n".join(line.strip() for line in (cls.__doc__ or "").strip().splitlines()).replace("``", "`")


def options_table(cls: type) -> str:
    """The options of one step or section."""
    rows = [
        f"| `{key}` | {cell(kind_name(kind))} | {default_text(option)} |"
        for key, (option, kind) in options_of(cls).items()
    ]
    return "\n".join(["| option | value | default |", "|---|---|---|", *rows])


def section(title: str, cls: type, after: str = "") -> str:
    """Heading, words and options of one step."""
    return "\n\n".join(part for part in (f"### {title}", prose(cls), after, options_table(cls)) if part)


def limits_of(cls: type) -> str:
    """The options of dataclasses that stand inside a step's mapping, as ``check``'s limits do."""
    found = []
    for _, kind in options_of(cls).values():
        for inner in typing.get_args(kind):
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                found.append(f"**{inner.__name__}**: {prose(inner)}\n\n{options_table(inner)}")
    return "\n\n".join(found)


def step_reference(name: str) -> str:
    """All steps of one section of a recipe."""
    parts = []
    for step, cls in SECTIONS[name].items():
        bare = f"`{cls.whole}` may be given bare: `{step}: …`." if cls.whole else ""
        parts.append(section(f"`{step}`", cls, bare))
        if inner := limits_of(cls):
            parts.append(inner)
    return "\n\n".join(parts)


def settings_table() -> str:
    """Every setting with its default and least value."""
    rows = []
    for one in settings.TABLE:
        default = "number of cores" if one.name == "threads" else f"`{one.default}`" if one.default != "" else "none"
        rows.append(f"| `{one.name}` | {default} | {one.least:g} | {cell(one.help)} |")
    return "\n".join(["| setting | default | least | what it is |", "|---|---|---|---|", *rows])


COMMON = ("root", "url", "token", "json", "help")


def spelled(part: Any) -> str:
    """An argument or option as it is typed."""
    if part.param_type_name == "argument":
        name = part.metavar or part.name.upper()
        return name if part.required else f"[{name.strip('[]')}]"
    if part.is_flag:
        return str(part.opts[0])
    return f"{part.opts[0]} {part.metavar or part.name.upper()}"


def commands(command: Any, name: str) -> list[str]:
    """A line for each verb: what is typed, and what it does."""
    if hasattr(command, "commands"):
        return [line for verb, part in command.commands.items() for line in commands(part, f"{name} {verb}")]
    parts = [part for part in command.params if part.name not in COMMON]
    arguments = " ".join(spelled(part) for part in parts if part.param_type_name == "argument")
    options = ", ".join(f"`{spelled(part)}`" for part in parts if part.param_type_name == "option")
    typed = f"{name} {arguments}".strip()
    return [f"| `{cell(typed)}` | {cell(command.get_short_help_str(200))} | {cell(options)} |"]


def commands_table() -> str:
    """Every verb of the command with its options."""
    return "\n".join(
        ["| command | what it does | options |", "|---|---|---|", *commands(typer.main.get_command(app), "headrace")]
    )


GENERATED: Mapping[str, Callable[[], str]] = {
    "settings": settings_table,
    "cli": commands_table,
    "collect": lambda: section("`files`", Files),
    "clean": lambda: step_reference("clean"),
    "transform": lambda: step_reference("transform"),
    "publish": lambda: "\n\n".join([section("`publish`", PublishOptions), section("`expect`", Expect)]),
}


def written(text: str) -> str:
    """A document with its generated parts as the code has them now."""
    return PART.sub(lambda match: f"{match[1]}\n{GENERATED[match[2]]()}\n\n{match[3]}", text)


def main(arguments: list[str]) -> int:
    """Write the documents, or with ``--check`` name those that are behind the code; 1 if any is."""
    behind = 0
    for path in sorted(DOCS.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = written(before)
        if after == before:
            continue
        behind += 1
        if "--check" in arguments:
            print(f"{path.name} is behind the code: python scripts/reference.py")
        else:
            path.write_text(after, encoding="utf-8")
    return behind if "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
