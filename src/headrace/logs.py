"""Log lines: always to stderr, so that what a command prints stays its own."""

from __future__ import annotations

import logging
import sys

import structlog

from headrace import settings


def for_machines() -> None:
    """One JSON object per line, from the level of ``log_level`` on: for processes that serve or work."""
    level = logging.getLevelNamesMapping().get(settings.text("log_level").upper(), logging.INFO)
    _configure(level, [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()])


def for_people() -> None:
    """Plain lines, errors alone: for a command, which tells by itself how its own work ended."""
    _configure(logging.ERROR, [structlog.dev.ConsoleRenderer(colors=False)])


def _configure(level: int, last: list[structlog.typing.Processor]) -> None:
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
