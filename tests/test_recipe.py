"""Recipes: what parses, and what is said about what does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import recipe
from headrace.clean.dedup import Dedup
from headrace.errors import BadRecipe
from headrace.transform.pack import Pack

HEAD = "dataset: d\ncollect: [{files: x.csv}]\n"


def told(text: str) -> list[tuple[int, str, str]]:
    return [(one["line"], one["path"], one["hint"]) for one in recipe.problems(text)]


def test_the_starter_parses_into_flat_steps() -> None:
    found = recipe.parse(recipe.starter())
    assert found.dataset == "prose"
    assert found.clean[2] == Dedup()
    assert found.transform[1] == Pack(1024)
    assert found.publish.split == {"train": 0.95, "val": 0.05}


def test_all_problems_come_at_once_with_line_and_nearest_name() -> None:
    text = (
        HEAD + "clean:\n  - dedup: {exakt: true}\n  - tokenize\ntransform:\n  - cast: {a: int46}\nschedule: 0 2 * *\n"
    )
    assert told(text) == [
        (4, "clean[0].dedup.exakt", "did you mean 'exact'?"),
        (5, "clean[1].tokenize", "it belongs under transform:"),
        (7, "transform[0].cast", "did you mean 'int64'?"),
        (8, "schedule", '"0 2 * * *" is every night at two'),
    ]
    with pytest.raises(BadRecipe, match=r"line 4: .*and 3 more") as caught:
        recipe.parse(text)
    assert len(caught.value.details["problems"]) == 4


@pytest.mark.parametrize(
    "text", ["", "[]", "a: *b", "[" * 60, "a: [", "x: \ud800", HEAD + "publish: {split: {a: 0.5}}"]
)
def test_broken_texts_are_refused(text: str) -> None:
    with pytest.raises(BadRecipe):
        recipe.parse(text)


def test_secrets_are_checked_and_never_stored(tmp_path: Path) -> None:
    (tmp_path / "where").write_text("data\n")
    text = "dataset: d\ncollect: [{files: '${file:where}/x.csv'}]"
    (source,) = recipe.parse(text, tmp_path).collect
    assert source.path == "${file:where}/x.csv"
    assert source.location == str(tmp_path / "data/x.csv")
    assert "cannot be read" in recipe.problems(text, tmp_path / "elsewhere")[0]["message"]


def test_the_fingerprint_ignores_spelling_and_sees_meaning() -> None:
    marks = [
        recipe.parse(HEAD + tail).fingerprint for tail in ("clean: [dedup]", "clean:\n - dedup: {exact: true}", "")
    ]
    assert marks[0] == marks[1] != marks[2]


def test_the_schema_names_every_step() -> None:
    text = json.dumps(recipe.schema_json())
    assert all(f'"{name}"' in text for name in ("unicode", "check", "features", "tokenize", "sample_bytes"))


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text(alphabet="a:-[]{} \n&*!|>'\"#%${}0").map(lambda tail: HEAD + tail))
def test_no_text_raises_anything_but_bad_recipe(text: str) -> None:
    assert isinstance(recipe.problems(text), list)
