"""Every setting and limit in one table: name, default, help. ``HEADRACE_<NAME>`` in the environment overrides it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from headrace.errors import BadRequest

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. The default's type is the setting's type; numbers below ``least`` are refused."""

    name: str
    default: int | float | str
    help: str
    least: float = 0


TABLE = (
    Setting("upload_bytes_max", 8 * GiB, "Largest single upload in bytes, as sent and after decompression", 1),
    Setting("upload_memory_bytes", 1 * MiB, "Uploads beyond this many bytes are spooled to a file", 1 * KiB),
    Setting("upload_ratio_max", 1000, "Largest ratio of decompressed to compressed bytes beyond the first MiB", 1),
    Setting("record_bytes_max", 256 * MiB, "Largest single record in bytes", 1),
    Setting("json_depth_max", 200, "Deepest nesting of a JSON record", 1),
    Setting("json_array_max", 1_000_000, "Most records in one JSON array; NDJSON has no such limit", 1),
    Setting("columns_max", 2000, "Most columns that inference may give a dataset", 1),
    Setting("upload_errors_max", 100, "Most rejected records that one answer lists", 1),
    Setting(
        "inbox_bytes_max", 4 * GiB, "Bytes of acknowledged, not yet committed uploads before new ones get 503", 1 * MiB
    ),
    Setting("inbox_group_max", 4096, "Most uploads acknowledged by one fsync", 1),
    Setting("inbox_queue_max", 65536, "Most uploads waiting for the inbox writer before new ones get 503", 1),
    Setting("receipts_keep_days", 7, "Days for which receipts and idempotency keys are remembered", 1),
    Setting("flush_bytes", 16 * MiB, "Bytes of one dataset in the inbox that start a flush", 1),
    Setting("flush_age_s", 1.0, "Age in seconds of a dataset's oldest upload in the inbox that starts a flush", 0.01),
    Setting("flush_batch_bytes", 256 * MiB, "Most inbox bytes that one flush takes", 1 * MiB),
    Setting("file_bytes", 64 * MiB, "Bytes of Arrow data behind one published file", 1 * MiB),
    Setting("row_group_rows", 65536, "Rows of one Parquet row group", 1),
    Setting("batch_bytes", 16 * MiB, "Bytes of one batch on its way through the steps", 1 * KiB),
    Setting("batch_rows", 16384, "Rows of one batch on its way through the steps", 1),
    Setting("task_bytes", 128 * MiB, "Bytes of input behind one map task", 1 * KiB),
    Setting("block_bytes", 16 * MiB, "Bytes of rows that one shuffle block spans", 1 * KiB),
    Setting("runs_queued_max", 1000, "Most runs that wait for a worker before new ones get 503", 1),
    Setting("diff_rows_max", 5_000_000, "Most rows of a version that a diff compares", 1),
    Setting("views_bytes_max", 50 * GiB, "Bytes of policy views kept; beyond, those not used for longest go", 1),
    Setting("views_wait_s", 5.0, "Seconds that a call waits for policy views to be made before it gets 503", 0),
    Setting("threads", max(1, os.cpu_count() or 1), "Map tasks that run at once", 1),
    Setting("url_seconds", 3600, "Life of a signed file URL", 1),
    Setting("page_items", 1000, "Most items of one list page", 1),
    Setting("manifest_page_files", 10000, "Most files of one manifest page", 1),
    Setting("read_rows_max", 100_000_000, "Most rows that one read may return", 1),
    Setting("http_seconds", 60.0, "Seconds without a byte before a client gives an exchange up", 0.1),
    Setting("retries", 5, "Tries of a retryable call", 1),
    Setting("cache_bytes", 50 * GiB, "Byte limit of a trainer's cache", 1 * MiB),
    Setting("tokenizers", "", "Folder of tokenizer.json files that recipes may name; default: ROOT/tokenizers"),
    Setting("log_level", "info", "debug, info, warning or error"),
)

_BY_NAME: Mapping[str, Setting] = {setting.name: setting for setting in TABLE}


def _parse(setting: Setting, text: str) -> int | float | str:
    if isinstance(setting.default, str):
        return text
    try:
        number = type(setting.default)(text)
    except ValueError:
        raise BadRequest(
            f"HEADRACE_{setting.name.upper()}={text!r} is not a number",
            hint=f"{setting.help}; default {setting.default}",
        ) from None
    if number < setting.least:
        raise BadRequest(f"HEADRACE_{setting.name.upper()}={text} is below {setting.least}", hint=setting.help)
    return number


def get(name: str) -> int | float | str:
    """The value in force: the environment's, else the default. Unknown names raise KeyError."""
    setting = _BY_NAME[name]
    text = os.environ.get(f"HEADRACE_{name.upper()}")
    return setting.default if text is None else _parse(setting, text)


def integer(name: str) -> int:
    """``get`` for whole numbers."""
    return int(get(name))


def number(name: str) -> float:
    """``get`` for seconds and ratios."""
    return float(get(name))


def text(name: str) -> str:
    """``get`` for words and paths."""
    return str(get(name))
