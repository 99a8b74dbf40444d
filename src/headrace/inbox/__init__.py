"""Durable, idempotent arrival of pushed records: one writer that groups uploads into fsynced commits, readers anywhere.

``inbox.db`` (SQLite, WAL, synchronous=FULL) holds small bodies; larger ones stand in files below ``inbox/``.
An upload is acknowledged after the commit that holds it; its body goes only once the flusher has committed it.
"""

from headrace.inbox.reader import InboxReader, Snapshot
from headrace.inbox.values import RECORD_SEPARATOR, Arrived, Entry, Pending, TailEntry, Upload, columns_path
from headrace.inbox.writer import Inbox, Spool, remove_body

__all__ = [
    "RECORD_SEPARATOR",
    "Arrived",
    "Entry",
    "Inbox",
    "InboxReader",
    "Pending",
    "Snapshot",
    "Spool",
    "TailEntry",
    "Upload",
    "columns_path",
    "remove_body",
]
