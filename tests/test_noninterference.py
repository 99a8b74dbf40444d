"""Nothing that a caller behind a policy can fetch holds, or depends on, what the policy hides.

Hidden cells are canaries that stand nowhere else, and larger than all that is visible. Each case is built twice, with
other canaries: all answers must be the same. ``make noninterference`` tries many more cases.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, example, given, note, settings
from hypothesis import strategies as st

from headrace.errors import Forbidden, NotFound
from headrace.govern import OWNER
from headrace.model import Principal, Ref
from noninterference import (
    ARROW,
    DATASET,
    FORMS,
    SECRET,
    USER,
    Case,
    Probe,
    Row,
    Twin,
    canary,
    comparable,
    expected,
    laid_open,
    mask_of,
    needles,
)

EXAMPLES = int(os.environ.get("HEADRACE_NONINTERFERENCE_EXAMPLES", "20"))
# A case takes a second or two: looking for the least one is for whoever looks into a failure.
PHASES = [Phase.explicit, Phase.generate, *([Phase.shrink] if EXAMPLES > 20 else [])]
Test = Callable[[Row], bool | None]

# Conditions beside the same in Python: None is SQL's unknown.


def _compared(name: str, sign: str, value: Any) -> tuple[str, Test]:
    apply = {"=": lambda a: a == value, ">": lambda a: a > value, "<=": lambda a: a <= value}[sign]
    return f"{name} {sign} {value!r}", lambda row: None if getattr(row, name) is None else apply(getattr(row, name))


def _negated(one: tuple[str, Test]) -> tuple[str, Test]:
    return f"NOT ({one[0]})", lambda row: None if (found := one[1](row)) is None else not found


def _joined(word: str, one: tuple[str, Test], two: tuple[str, Test]) -> tuple[str, Test]:
    decided = word == "OR"

    def both(row: Row) -> bool | None:
        found = {one[1](row), two[1](row)}
        return decided if decided in found else None if None in found else not decided

    return f"({one[0]}) {word} ({two[0]})", both


def _beyond(row: Row) -> bool | None:
    """Beyond what numbers hold the whole condition cannot be computed: such a row is hidden, and no other with it."""
    if row.g is not None and row.g > 2:
        raise OverflowError
    return None if row.g is None else True


def _kept(test: Test) -> Test:
    def kept(row: Row) -> bool | None:
        try:
            return test(row)
        except OverflowError:
            return False

    return kept


_FAILING = ("g + 9223372036854775805 > 0", _beyond)
_DIVIDED = ("6 / g > 2", lambda row: None if not row.g else int(6 / row.g) > 2)
_TEXTS: list[tuple[str, Test]] = [
    ("t LIKE 'a%'", lambda row: None if row.t is None else row.t.startswith("a")),
    ("t IS NULL", lambda row: row.t is None),
    ("g IS NOT NULL", lambda row: row.g is not None),
    ("TRUE", lambda row: True),
    ("FALSE", lambda row: False),
]
CONDITIONS = st.recursive(
    st.one_of(
        st.builds(_compared, st.just("g"), st.sampled_from(["=", ">", "<="]), st.integers(-3, 5)),
        st.builds(_compared, st.just("t"), st.sampled_from(["=", ">", "<="]), st.sampled_from(["a", "ab", "b"])),
        st.sampled_from([_FAILING, _DIVIDED, *_TEXTS]),
    ),
    lambda some: st.one_of(
        st.builds(_negated, some), st.builds(_joined, st.sampled_from(["AND", "OR"]), some, some)
    ),
    max_leaves=4,
)  # fmt: skip
_EACH = ["null", "constant:x", "hash", "hash:shared"]
MASKS = {
    "k": ["null", "hash", "last:2"],
    "n": [*_EACH, "last:4", "bucket:100", "month"],
    "f": [*_EACH, "last:2", "bucket:0.5"],
    "s": [*_EACH, "last:4", "redact", "redact:email,phone", "month", "bucket:3"],
    "d": [*_EACH, "last:2", "month", "bucket:10"],
    "l": [*_EACH, "last:3", "redact"],
    "o": [*_EACH, "redact"],
    "o.t": ["hash"],
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    control = st.tuples(st.one_of(st.none(), st.integers(-3, 5)), st.sampled_from([None, "a", "ab", "b"]))
    drawn = draw(st.lists(st.lists(control, min_size=1, max_size=8), min_size=1, max_size=3))
    drawn.append(draw(st.lists(control, max_size=5)))
    number, parts = 0, []
    for part in drawn:
        parts.append([Row(f"key{number + at:08d}", g, t, number + at) for at, (g, t) in enumerate(part)])
        number += len(part)
    # Row 0 and its canaries stand for what runs, recipes and refused records could tell.
    text, test = draw(st.one_of(st.none(), CONDITIONS)) or (None, lambda row: True)
    names = draw(st.lists(st.sampled_from(list(MASKS)), unique=True, max_size=4, min_size=0 if text else 1))
    masks = {name: draw(st.sampled_from(MASKS[name])) for name in names if name != "o.t" or "o" not in names}
    masks = masks or ({} if text else {"n": "null"})
    extra = draw(st.lists(st.integers(0, 3), unique=True))
    return Case(parts[:-1], parts[-1], text, _kept(test), masks, draw(st.booleans()), extra)


def probes(case: Case) -> list[Probe]:
    """What a curious caller asks: every list and every row in every form, and conditions about each hidden value."""
    at, last = f"/v1/datasets/{DATASET}", len(case.files) - 1
    asked: list[Probe] = [
        ("GET", path, {})
        for path in (
            "/get_data", "/get_data?offset=1&limit=2", "/v1/datasets", at, f"{at}/versions", f"{at}/versions/0",
            f"{at}/versions/latest", f"{at}/diff?base=0&other=latest", f"{at}/diff?base={last}&other=0",
            f"{at}/quarantine", f"{at}/quarantine?rule=schema", f"{at}/tokenizer", f"{at}/column-tags",
            f"{at}/trace?step=0", f"{at}/trace?step=0&batch_size=3&world_size=2&shuffle=global&seed=3",
            f"{at}/trace?row=key00000000", f"{at}/trace?source=key00000001", f"{at}/manifest?columns=n,s",
            f"{at}/manifest?columns=nothing", "/v1/runs", f"/v1/runs/{'r' * 32}", "/v1/policies", "/v1/tokens",
            "/v1/policies/none", "/metrics", "/healthz", "/readyz", f"{at}/records?columns=_raw",
            f"{at}/records?columns=_id", f"{at}/records?limit=1",
        )
    ]  # fmt: skip
    recipe = {"recipe": f"dataset: mine\ncollect:\n  - dataset: {DATASET}@latest\n"}
    asked += [("POST", path, recipe) for path in ("/v1/runs", "/v1/runs:preview", "/v1/recipes:check")]
    asked += [("POST", f"{at}/classify", {}), ("POST", f"{at}/tags", {"name": "mine"})]
    asked += [("GET", f"{at}/records?ref={ref}", {"accept": form}) for form in FORMS for ref in ("0", "latest")]
    hidden = [row for part in [*case.files, case.tail] for row in part][:2]
    for column in SECRET:
        for row in hidden:
            asked += [("GET", f"{at}/records", {"where": text}) for text in conditions(column, row)]
    return [
        (verb, str(httpx.URL(path, params={"where": more["where"]})) if "where" in more else path,
         {name: value for name, value in more.items() if name != "where"})
        for verb, path, more in asked
    ]  # fmt: skip


def conditions(column: str, row: Row) -> list[str]:
    """Conditions that would tell whether a hidden value is what the caller thinks."""
    value = canary(column, row.number, None, False)
    if column in ("l", "o"):
        return [f"{column} IS NOT NULL"] + (["o.n > 5", f"o.t = '{value['t']}'"] if column == "o" else [])
    if column == "s":
        return [f"s = '{value}'", "s LIKE 'canary%'", "length(s) > 9", f"NOT s <> '{value}'", "starts_with(s, 'can')"]
    if column == "d":
        return [f"d = '{value}'", "d > '2999-01-01'"]
    more = ["n + 9223372036854775807 > 0", f"9 % (n - {value}) >= 0"] if column == "n" else []
    return [f"{column} = {value}", f"{column} > 5e6", f"1 / ({column} - {value}) >= 0", f"NOT {column} < 9", *more]


def rows_of(answers: dict[str, httpx.Response], what: str) -> list[dict[str, Any]]:
    with pa.ipc.open_stream(answers[what].content) as stream:
        return stream.read_all().to_pylist()


def assert_rows(case: Case, found: list[dict[str, Any]], rows: list[Row]) -> None:
    """The rows found are those that should be, and a hash stands for one value and no other."""
    wanted = [expected(case, row) for row in rows]
    behind: dict[tuple[str, str], Any] = {}
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        for name in USER.names:
            mask = mask_of(case, name) or ""
            if mask.startswith("hash") and other[name] is not None:
                assert len(one[name]) == 32
                assert behind.setdefault((name, one[name]), other[name]) == other[name]
            else:
                assert one[name] == other[name], (name, mask)


def assert_statistics(case: Case, body: bytes, rows: list[Row]) -> None:
    """The footer of a file counts and bounds what is visible."""
    with pq.ParquetFile(io.BytesIO(body)) as file:
        assert file.metadata.num_rows == len(rows)
        groups = [file.metadata.row_group(at) for at in range(file.metadata.num_row_groups)]
        parts = [group.column(at) for group in groups for at in range(group.num_columns)]
    for name in ("n", "f"):
        found = [part.statistics for part in parts if part.path_in_schema == name and part.statistics is not None]
        bounds = [(one.min, one.max) for one in found if one.has_min_max]
        shown = [value for row in rows if (value := expected(case, row)[name]) is not None]
        if bounds:
            assert (min(one for one, _ in bounds), max(one for _, one in bounds)) == (min(shown), max(shown))


def assert_counts(case: Case, answers: dict[str, httpx.Response]) -> None:
    """Every count is that of what is visible."""
    stored = [row for part in case.files for row in part]
    shown = case.visible(stored)
    at = f"GET /v1/datasets/{DATASET}"
    assert answers[f"{at} {{}}"].json()["rows"] == len(shown)
    assert answers[f"{at}/versions/latest {{}}"].json()["rows"] == len(shown)
    assert answers["manifest latest"].json()["rows"] == len(shown)
    listed = answers[f"{at}/versions {{}}"].json()["items"]
    assert [one["rows"] for one in listed[::-1]] == [
        len(case.visible([row for part in case.files[: end + 1] for row in part])) for end in range(len(case.files))
    ]
    compared = answers[f"{at}/diff?base=0&other=latest {{}}"].json()
    assert (compared["added"], compared["removed"]) == (len(shown) - len(case.visible(case.files[0])), 0)
    traced = answers[f"{at}/trace?step=0 {{}}"]
    assert len(traced.json()["items"]) == len(shown) if shown else traced.status_code == 400
    if case.row_filter is not None:
        assert answers[f"{at}/quarantine {{}}"].json()["items"] == []


def assert_nothing_else_is_given(one: Twin) -> None:
    """The files of the whole, and those that another policy makes, are nobody's to fetch."""
    exchange = one.exchange
    bob = Principal("bob", "producer")
    exchange.add_policy(OWNER, DATASET, "principal:bob", "k > 'key00000000'", {"s": "null"})
    theirs = [entry.id for entry in exchange.manifest(bob, Ref(DATASET)).files]
    whole = [entry.id for entry in exchange.catalog.files(DATASET, len(one.case.files) - 1)]
    for file_id in [*theirs, *whole, "v" * 33, "../catalog.db"]:
        with pytest.raises(NotFound):
            exchange.sign(one.ann, [file_id])
        with pytest.raises(NotFound):
            exchange.local_path(one.ann, file_id)
        with pytest.raises((Forbidden, NotFound)):
            exchange.file_path(file_id, 9999999999, "ann", "0" * 64)


def same(one: list[tuple[str, httpx.Response]], two: list[tuple[str, httpx.Response]]) -> None:
    assert [what for what, _ in one] == [what for what, _ in two]
    for (what, left), (_, right) in zip(one, two, strict=True):
        # Counters are of the process, for all that it did.
        assert "/metrics" in what or comparable(left) == comparable(right), what


def check(case: Case, folder: Path) -> None:
    twins = []
    try:
        for at in range(2):
            twins.append(Twin(folder / str(at), case, at == 1))
            twins[-1].restrict()
        asked = probes(case)
        found = [twin.answers(asked) for twin in twins]
        answers = dict(found[0])
        hidden = needles(case)
        for what, answer in found[0]:
            assert answer.status_code < 500, (what, answer.text)
            # A condition that was asked may be said again; what it matched is compared with the twin's.
            body = laid_open(answer) if "where=" not in what or answer.status_code == 200 else b""
            told = body + json.dumps(dict(answer.headers)).encode()
            betrayed = [needle for needle in [*hidden, ("", b"canary0000")] if needle[1] in told]
            assert not betrayed, (what, betrayed[:3])
        rows = case.visible([row for part in case.files for row in part])
        latest = {"accept": ARROW}
        assert_rows(case, rows_of(answers, f"GET /v1/datasets/{DATASET}/records?ref=0 {latest}"),
                    case.visible(case.files[0]))  # fmt: skip
        assert_rows(case, rows_of(answers, f"GET /v1/datasets/{DATASET}/records?ref=latest {latest}"),
                    rows + case.visible(case.tail))  # fmt: skip
        files = [part for part in map(case.visible, case.files) if part]
        for at, part in enumerate(files):
            assert_statistics(case, answers[f"file latest {at} {{}}"].content, part)
        assert_counts(case, answers)
        same(*found)
        assert_nothing_else_is_given(twins[0])
    finally:
        for twin in twins:
            twin.close()


PEOPLE = [Row(f"key{at:08d}", g, "a", at) for at, g in enumerate([1, 5, 2, 3, 2, 0])]


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Batches and row groups so small that a few rows fill several."""
    with pytest.MonkeyPatch.context() as env:
        env.setenv("HEADRACE_BATCH_ROWS", "2")
        env.setenv("HEADRACE_ROW_GROUP_ROWS", "3")
        yield


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=PHASES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(cases())
@example(Case([PEOPLE[:3]], PEOPLE[3:], None, lambda row: True, {"k": "hash", "s": "month"}))
@example(Case([PEOPLE[:3]], PEOPLE[3:], _FAILING[0], _kept(_beyond), {"o.t": "null", "l": "redact"}))
def test_nothing_hidden_is_told_or_decides_what_is_told(case: Case) -> None:
    note(f"filter {case.row_filter}, masks {case.masks}, rows {[len(part) for part in case.files]}+{len(case.tail)}")
    with tempfile.TemporaryDirectory(prefix="headrace-twins-") as folder:
        check(case, Path(folder))


def test_every_route_that_gives_something_out_is_asked() -> None:
    case = Case([[Row("key00000000", 1, "a", 0)]], [Row("key00000001", 2, "b", 1)], "g > 0", lambda row: True, {})
    with tempfile.TemporaryDirectory(prefix="headrace-twins-") as folder:
        twin = Twin(Path(folder), case, False)
        try:
            twin.restrict()
            asked = [str(answer.request.url.path) for _, answer in twin.answers(probes(case))]
            routes = [path for path, verbs in twin.app._api.openapi()["paths"].items() if "get" in verbs]
        finally:
            twin.close()
    patterns = {route: re.compile(re.sub(r"\{\w+\}", "[^/]+", route)) for route in routes}
    assert [route for route, pattern in patterns.items() if not any(map(pattern.fullmatch, asked))] == []
