"""The whole story of Headrace on real data, in about a minute: ``make demo``.

Starts an exchange in a folder of its own, brings two data sets in, cleans, transforms and versions them, trains a model
from each, and follows one training step back to its sources. Ends by itself; exit code 1 if a promise does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from train import Trained, train_linear, train_transformer

import headrace
from headrace.client.session import Session
from headrace.errors import HeadraceError
from headrace.model import Run
from headrace.torch import StreamingDataLoader, StreamingDataset

HERE = Path(__file__).resolve().parent
COMMAND = str(Path(sys.executable).with_name("headrace"))
VOCABULARY = 4096
START_SECONDS, ARRIVE_SECONDS = 60.0, 30.0
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def say(text: str) -> None:
    """One line of the story."""
    console.print(f"  {text}")


def chapter(title: str) -> None:
    """A heading."""
    console.print()
    console.rule(f"[bold]{title}", align="left")


def promise(kept: bool, text: str) -> None:
    """Say that something held; end the demo with exit code 1 if it did not."""
    if not kept:
        console.print(f"  [bold red]✗ {text}: this does not hold")
        raise SystemExit(1)
    console.print(f"  [green]✓[/green] {text}")


def table(*names: str) -> Table:
    """An empty table with these headings."""
    made = Table(box=None, padding=(0, 2), header_style="dim")
    for name in names:
        made.add_column(name, overflow="fold")
    return made


@contextlib.contextmanager
def exchange(root: Path) -> Iterator[tuple[str, str]]:
    """``headrace serve`` on a free port until the block ends: its URL and the admin token it printed."""
    log = root.parent / "serve.log"
    with log.open("wb") as errors:
        command = [COMMAND, "serve", "--root", str(root), "--port", "0", "--open"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert server.stdout
    try:
        url = token = ""
        for line in server.stdout:
            words = line.split()
            url = words[2] if line.startswith("Headrace serves") else url
            token = words[-1] if line.startswith("Admin token") else token
            if line.startswith("Open:"):
                break
        if not url or not token:
            raise SystemExit(f"the exchange did not start:\n{log.read_text()}")
        _until(lambda: _healthy(url), START_SECONDS, "the exchange answers")
        yield url, token
    except BaseException:
        for line in log.read_text().splitlines()[-20:]:
            console.print(line[-2000:], style="dim", markup=False)
        raise
    finally:
        server.terminate()
        server.wait(30)


def _healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/readyz", timeout=5).ok
    except requests.ConnectionError:
        return False


def _until(condition: Any, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {seconds:.0f} s in vain until {what}")
        time.sleep(0.05)


def damaged(patients: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of real records, each broken in a way that happens."""
    made = [dict(patient) for patient in patients[:40]]
    for number, record in enumerate(made):
        features = list(record["features"])
        if number < 12:
            continue  # sent twice, as after a lost answer
        if number < 20:
            features[number % 10] = None
        elif number < 28:
            features[2] = -1.0 if number % 2 else 9999.0
        elif number < 33:
            record["label"] = None
        elif number < 37:
            features = features[:7]
        else:
            features[0] = "fifty"
        record["features"] = features
    return made


def upload(ex: Session, url: str) -> int:
    """Post patients one by one, as any program with an HTTP client would; the number sent."""
    lines = (HERE / "data/patients.jsonl").read_text().splitlines()
    patients = [json.loads(line) for line in lines]
    records = list(patients)
    for place, record in enumerate(damaged(patients)):
        records.insert(11 * (place + 1), record)
    say(f"Posting {len(records)} records one by one to {url}/upload: 442 patients and 40 damaged copies.")
    began = time.perf_counter()
    for record in records:
        answer = requests.post(f"{url}/upload", json=record, timeout=30)
        assert answer.ok, answer.text
    seconds = time.perf_counter() - began
    rate = f"{len(records) / seconds:,.0f} records/s from one client with a new connection for each"
    say(f"{rate}, answered only once on disk (fsync).")
    broken = requests.post(f"{url}/upload", data='{"features": [1, 2', timeout=30)
    say(f"What is no JSON at all is refused at once: {broken.status_code} {broken.json()['error']['message']!r}")
    back = requests.get(f"{url}/get_data", timeout=30).json()
    fitting = [record for record in records if not isinstance(record["features"][0], str)]
    promise(back == fitting, f"GET /get_data gives the {len(back)} that fit the schema back as sent, in order")
    receipt = answer.json()["receipt"]
    _until(lambda: ex.receipt(receipt).state != "pending", ARRIVE_SECONDS, "the last upload is committed")
    return len(records)


def show_run(run: Run, seconds: float) -> None:
    """What each step of a run did."""
    steps = table("step", "rows in", "rows out", "quarantined", "merged", "why")
    for step in run.steps:
        why = ", ".join(f"{rule} {count}" for rule, count in step.rules.items())
        tokens = f"{step.tokens_out:,} tokens" if step.tokens_out else ""
        counts = [str(n) for n in (step.rows_in, step.rows_out, step.quarantined or "", step.merged or "")]
        steps.add_row(step.step, *counts, why or tokens)
    console.print(steps)
    say(f"Run {run.status} in {seconds:.1f} s: version [bold]{run.dataset}@{run.version}[/bold], tag 'gold'.")
    # A packing step turns documents into rows of tokens, so the last count may be of another kind.
    record_steps = [step for step in run.steps if step.step != "pack" and not step.tokens_dropped]
    adds_up = all(step.rows_in == step.rows_out + step.quarantined + step.merged for step in record_steps)
    promise(adds_up, "rows in = rows out + quarantined + merged, at every step")


def run_recipe(ex: Session, name: str) -> Run:
    """Run one of the example recipes and show what it did."""
    path = HERE / "recipes" / f"{name}.yaml"
    say(f"Running {path.relative_to(HERE.parent)}:")
    text = path.read_text()
    shown = Text(text[text.index("clean:") : text.index("publish:")].rstrip())
    console.print(Panel(shown, border_style="dim"))
    began = time.perf_counter()
    try:
        with console.status(f"running {path.name}"):
            run = ex.run(path)
    except HeadraceError as error:
        show_run(ex.run_status(error.details["run"]), time.perf_counter() - began)
        raise SystemExit(f"the run failed: {error}") from None
    show_run(run, time.perf_counter() - began)
    return run


def show_quarantine(ex: Session, dataset: str) -> int:
    """Why records did not go on, by rule, with an example of each; the number of records."""
    found = ex.quarantine(dataset, limit=1000)
    by_rule = Counter(one.rule for one in found)
    rules = table("rule", "records", "for example")
    for rule, count in by_rule.most_common():
        example = next(one for one in found if one.rule == rule)
        rules.add_row(rule, str(count), example.reason)
    console.print(rules)
    return len({one.id for one in found})


def losses(trained: Trained, unit: str) -> None:
    """Say how a training ended, and hold it to a falling loss."""
    promise(
        trained.last < trained.first,
        f"the loss fell from {trained.first:,.2f} to {trained.last:,.2f} ({trained.unseen:,.2f} on rows never seen); "
        f"{trained.parameters:,} parameters, {trained.samples:,} {unit} in {trained.seconds:.1f} s",
    )


def tables(ex: Session, url: str, token: str, cache: str) -> None:
    """Chapter one: records over HTTP, to a linear model."""
    chapter("1. Tables: from 482 uploads to a linear model")
    sent = upload(ex, url)
    refused = show_quarantine(ex, "default")
    say(f"{refused} records contradict the schema inferred from the first ones: kept in quarantine, not lost.")
    run = run_recipe(ex, "patients")
    show_quarantine(ex, "patients")
    promise(
        sent == refused + run.rows_in and run.rows_in == run.rows_out + run.quarantined + run.merged,
        f"all {sent} accounted for: {run.rows_out} published, {run.quarantined + refused} in quarantine, "
        f"{run.merged} merged as duplicates",
    )
    say("Training torch.nn.Linear from the feed (mean squared error per epoch):")

    def report(epoch: int, loss: float, rate: float) -> None:
        if epoch % 2 == 0:
            say(f"  epoch {epoch + 1:2}   loss {loss:10,.1f}   {'█' * round(loss / 800)}   {rate:,.0f} samples/s")

    losses(train_linear(f"{url}/patients@gold", token, cache, 12, report), "samples")


def prose(ex: Session, url: str, token: str, cache: str) -> None:
    """Chapter two: prose from files, to a Transformer."""
    chapter("2. Text: from 90 speeches to a Transformer")
    say("78 State of the Union addresses, 1946 to 2021, and a second delivery that repeats ten of them.")
    run_recipe(ex, "speeches")
    show_quarantine(ex, "speeches")
    say("Training a small causal Transformer from the feed for about 25 seconds (cross entropy per token):")

    def report(step: int, loss: float, rate: float) -> None:
        bar = "█" * round(loss * 4)
        say(f"  step {step:3}   loss {loss:5.2f}   {bar:34}   {rate:,.0f} samples/s, {rate * 128:,.0f} tokens/s")

    losses(train_transformer(f"{url}/speeches@gold", token, cache, VOCABULARY, report), "rows of 128 tokens")
    feed_alone(url, token, cache)


def show_datasets(ex: Session) -> None:
    """Every dataset with its versions and fingerprints."""
    known = table("version", "rows", "files", "made by", "tags", "fingerprint of the content")
    for dataset in ex.datasets():
        for version in ex.versions(dataset.name)[:2]:
            made_by = f"run {version.run[:8]}" if version.run else version.kind
            shape = (f"{version.rows:,}", str(version.files), made_by, ", ".join(version.tags))
            known.add_row(version.ref, *shape, version.fingerprint[:24] + "…")
    console.print(known)


def feed_alone(url: str, token: str, cache: str) -> None:
    """How fast the feed is when no model holds it up."""
    loader = StreamingDataLoader(StreamingDataset(f"{url}/speeches@gold:train", token, batch_size=32, cache_dir=cache))
    began, rows = time.perf_counter(), 0
    for _ in range(3):
        rows += sum(len(batch["tokens"]) for batch in loader)
    say(f"The model is what takes its time: the feed alone gives {rows / (time.perf_counter() - began):,.0f} rows/s.")


def show_trace(url: str, token: str) -> None:
    """One training step, followed back by arithmetic, in Python and on the command line."""
    step = 7
    data = StreamingDataset(f"{url}/speeches@gold:train", token, batch_size=16, seed=0)
    say(f"data.sources({step}) of the Transformer: which rows step {step} saw, and which speeches they are cut from.")
    rows = data.sources(step)
    traced = table("row", "cut from")
    for row in rows[:4]:
        traced.add_row(str(row.row), "; ".join(_source(one) for one in row.sources))
    console.print(traced)
    command = ["trace", "speeches@gold:train", "--step", str(step), "--batch", "16", "--seed", "0"]
    environment = {**os.environ, "HEADRACE_URL": url, "HEADRACE_TOKEN": token}
    done = subprocess.run([COMMAND, *command, "--json"], env=environment, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout) if done.returncode == 0 else []
    promise([one["row"] for one in told] == [row.row for row in rows], f"`headrace {' '.join(command)}` says the same")


def _source(source: Any) -> str:
    locator = Path(str(source.get("locator", source.get("id", "")))).name
    tokens = f", tokens {source['start']} to {source['start'] + source['length']}" if "start" in source else ""
    return f"{locator}{tokens}"


def where_things_are(ex: Session, url: str, token: str, root: Path, kept: bool) -> None:
    """Chapter three."""
    chapter("3. Where everything is")
    show_datasets(ex)
    show_trace(url, token)
    say(f"The exchange stood at {url}, its data in {root}{'' if kept else ' (a temporary folder, now removed)'}.")
    console.print()
    say("Go on:  [bold]make serve[/bold]                             an exchange that stays, at http://127.0.0.1:7070")
    say("        [bold].venv/bin/headrace init[/bold]                a recipe of your own to start from")
    say("        [bold].venv/bin/headrace upload NAME FILE[/bold]    your data in")
    say("        README.md, examples/train.py, docs/    the rest")


def main() -> int:
    """Tell the story."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="keep the exchange's data in this folder")
    root = parser.parse_args().root
    began = time.perf_counter()
    scratch = Path(tempfile.mkdtemp(prefix="headrace-demo-"))
    try:
        place = root.resolve() if root else scratch / "exchange"
        console.print(Panel("[bold]Headrace[/bold]: collect, clean, transform, version and feed data to training."))
        say("Starting an exchange: one server process, one worker, nothing to configure.")
        with exchange(place) as (url, token), headrace.connect(url, token) as ex:
            say(f"It listens at {url} (health: {requests.get(f'{url}/healthz', timeout=5).status_code}).")
            tables(ex, url, token, str(scratch / "cache"))
            prose(ex, url, token, str(scratch / "cache"))
            where_things_are(ex, url, token, place, kept=root is not None)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    say(f"Done in {time.perf_counter() - began:.0f} seconds.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
