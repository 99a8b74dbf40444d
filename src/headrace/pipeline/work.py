"""What a run knows, and the folder of its unfinished work: all that is needed to go on after a kill lies there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from headrace.model import StepCount, from_dict, to_dict
from headrace.recipe import Recipe
from headrace.root import Root
from headrace.steps import FitStep, SequentialStep, Step


@dataclass(frozen=True)
class Stage:
    """A pass over the rows: ``steps``, then the keys of ``fits``, the step that must see the whole before it maps."""

    steps: tuple[Step, ...]
    fits: FitStep | None = None


def needs_fit(step: Step) -> bool:
    """Whether a step, with the options it has, must see the whole first."""
    return isinstance(step, FitStep) and step.fits


def stages_of(recipe: Recipe) -> list[Stage]:
    """Cut a recipe's record steps at every step that fits: it ends one stage with its keys and begins the next."""
    stages: list[Stage] = []
    steps: list[Step] = []
    for step in (*recipe.clean, *recipe.transform):
        if isinstance(step, SequentialStep):
            continue
        if needs_fit(step):
            assert isinstance(step, FitStep)
            stages.append(Stage(tuple(steps), step))
            steps = []
        steps.append(step)
    return [*stages, Stage(tuple(steps))]


def sequential_of(recipe: Recipe) -> list[SequentialStep]:
    """The steps that run over the finished rows in order."""
    return [step for step in recipe.transform if isinstance(step, SequentialStep)]


@dataclass(frozen=True)
class Work:
    """The folder of one run's unfinished work."""

    folder: Path

    @classmethod
    def of(cls, root: Root, run_id: str) -> Work:
        """The folder of a run, made if need be."""
        folder = root.run(run_id)
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    def path(self, kind: str, stage: int, task: int, suffix: str) -> Path:
        """Where one task of one stage keeps its rows, keys, quarantine or counts."""
        folder = self.folder / f"stage-{stage}"
        folder.mkdir(exist_ok=True)
        return folder / f"{kind}-{task:06d}{suffix}"

    def save(self, name: str, value: Any) -> None:
        """Keep a JSON value under a name, whole or not at all."""
        path = self.folder / name
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(value))
        draft.replace(path)

    def load(self, name: str) -> Any:
        """A saved JSON value, or None."""
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else None

    def state(self, stage: int) -> Mapping[str, Any]:
        """The fitted state that the first step of ``stage`` applies; empty where nothing was fitted."""
        return self.load(f"fit-{stage - 1}.json") or {} if stage else {}

    def counts(self, stages: int, tasks: int) -> list[StepCount]:
        """What each step did, summed over the tasks; a step that stands in two stages does not exist."""
        found: list[StepCount] = []
        for stage in range(stages):
            per_task = [json.loads(self.path("counts", stage, task, ".json").read_text()) for task in range(tasks)]
            for rows in zip(*per_task, strict=True):
                found.append(_sum([from_dict(StepCount, row) for row in rows]))
        return found


def _sum(counts: Sequence[StepCount]) -> StepCount:
    rules: dict[str, int] = {}
    for count in counts:
        for rule, rows in count.rules.items():
            rules[rule] = rules.get(rule, 0) + rows
    return StepCount(
        step=counts[0].step,
        rows_in=sum(c.rows_in for c in counts),
        rows_out=sum(c.rows_out for c in counts),
        quarantined=sum(c.quarantined for c in counts),
        merged=sum(c.merged for c in counts),
        rules=dict(sorted(rules.items())),
        seconds=round(sum(c.seconds for c in counts), 4),
    )


class Spill:
    """Batches on their way from one pass to the next: an Arrow file that appears whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._draft = path.with_name(path.name + f".{os.getpid()}.draft")
        self._writers: list[tuple[Path, Any]] = []
        self._schema: pa.Schema | None = None
        self.rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Take a batch; one whose schema differs starts another part of the file."""
        if not self._writers or batch.schema != self._schema:
            part = self._draft.with_name(f"{self._draft.name}.{len(self._writers)}")
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            self._writers.append((part, pa.ipc.new_file(part, batch.schema, options=options)))
            self._schema = batch.schema
        self._writers[-1][1].write_batch(batch)
        self.rows += batch.num_rows

    def close(self) -> None:
        """Finish: the parts get their names, and a list of them the name of the spill."""
        names = []
        for number, (part, writer) in enumerate(self._writers):
            writer.close()
            name = self.path.with_name(f"{self.path.name}.{number}")
            part.replace(name)
            names.append(name.name)
        self._draft.write_text(json.dumps(names))
        self._draft.replace(self.path)


@contextmanager
def spill(path: Path) -> Iterator[Spill]:
    """A spill that is finished when the block ends well."""
    made = Spill(path)
    yield made
    made.close()


def spilled(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of a finished spill in order, mapped from disk."""
    for name in json.loads(path.read_text()):
        with pa.memory_map(str(path.with_name(name))) as source, pa.ipc.open_file(source) as reader:
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)


def spilled_schemas(path: Path) -> Iterator[pa.Schema]:
    """The schemas of a spill's parts."""
    for name in json.loads(path.read_text()):
        with pa.memory_map(str(path.with_name(name))) as source, pa.ipc.open_file(source) as reader:
            yield reader.schema


def counted(counts: Iterable[StepCount]) -> list[dict[str, Any]]:
    """Counts as JSON."""
    return [to_dict(count) for count in counts]
