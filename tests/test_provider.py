"""What a feed reads over HTTP: whole manifests, signed files that resume where a connection broke."""

from __future__ import annotations

import datetime as dt
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import errors
from headrace.client.connect import RemoteProvider, open_provider
from headrace.client.feed import Provider
from headrace.model import FileEntry, Manifest, to_dict
from peer import LOST, Answer, Call, Peer, answer, failure, peer

BODY = bytes(range(256)) * 4096


def manifest(ids: list[str], **more: Any) -> dict[str, Any]:
    files = tuple(FileEntry(id, 10, len(BODY), "0" * 64) for id in ids)
    return {**to_dict(Manifest("d", 3, "f" * 64, (), "", 10 * len(ids), 8, files)), **more}


def signer(there: Peer, seconds: float = 3600) -> Any:
    def sign(call: Call) -> Answer:
        ids = json.loads(call.body)["ids"]
        then = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)
        urls = {id: f"/v1/files/{id}?sig=5ecret{len(there.calls)}" for id in ids}
        return answer({"urls": urls, "expires_at": then.isoformat()})

    return sign


def ranged(call: Call) -> Answer:
    start = int(call.headers.get("range", "bytes=0-")[6:-1])
    return Answer(BODY[start:], 206 if start else 200)


@pytest.fixture
def there() -> Iterator[Peer]:
    with peer() as found:
        found.on["POST /v1/files:sign"] = signer(found)
        yield found


@pytest.fixture
def provider(there: Peer) -> Iterator[RemoteProvider]:
    made, ref = open_provider(f"{there.url}/d@gold:train", "s3cret-token")
    assert ref == "d@gold:train"
    yield made
    made.close()


def calls(there: Peer, method: str, path: str) -> list[Call]:
    return [call for call in there.calls if call.method == method and call.path.startswith(path)]


def test_the_provider_is_what_a_feed_expects(provider: RemoteProvider) -> None:
    assert isinstance(provider, Provider)
    assert "s3cret" not in repr(provider)


def test_the_address_may_stand_below_a_path() -> None:
    made, ref = open_provider("https://data.example/lab/corpus@7")
    assert (repr(made), ref) == ("<Provider https://data.example/lab>", "corpus@7")
    for bad in ("http://host:7070", "http://host/Bad@1"):
        with pytest.raises(errors.BadRequest):
            open_provider(bad)


def test_pages_of_a_manifest_are_joined_and_stay_on_one_version(provider: RemoteProvider, there: Peer) -> None:
    there.on["GET /v1/datasets/d/manifest"] = [
        answer(manifest(["a", "b"], next_page_token="2")),
        answer(manifest(["c"])),
    ]
    found = provider.manifest("d", ["x", "y"])
    assert [entry.id for entry in found.files] == ["a", "b", "c"]
    assert found.next_page_token is None
    assert [call.query for call in there.calls] == [
        {"columns": "x,y", "ref": "latest"},
        {"columns": "x,y", "ref": "3", "page_token": "2"},
    ]


def test_pages_of_different_content_are_refused(provider: RemoteProvider, there: Peer) -> None:
    pages = [answer(manifest(["a"], next_page_token="1")), answer(manifest(["b"], fingerprint="other"))]
    there.on["GET /v1/datasets/d/manifest"] = pages
    with pytest.raises(errors.Conflict, match="different content"):
        provider.manifest("d", None)


def test_a_newer_wire_is_refused(provider: RemoteProvider, there: Peer) -> None:
    there.on["GET /v1/datasets/d/manifest"] = answer(manifest(["a"], wire=99))
    with pytest.raises(errors.TooNew):
        provider.manifest("d", None)


def test_files_are_signed_ahead_and_fetched_without_the_token(
    provider: RemoteProvider, there: Peer, tmp_path: Path
) -> None:
    there.on["GET /v1/datasets/d/manifest"] = answer(manifest(["a", "b", "c"]))
    for entry in provider.manifest("d", None).files:
        there.on[f"GET /v1/files/{entry.id}"] = ranged
        provider.fetch(entry, tmp_path / entry.id)
        assert (tmp_path / entry.id).read_bytes() == BODY
    (signing,) = calls(there, "POST", "/v1/files:sign")
    assert json.loads(signing.body) == {"ids": ["a", "b", "c"]}
    assert all("authorization" not in call.headers for call in calls(there, "GET", "/v1/files/"))


def test_a_broken_download_goes_on_where_it_stopped(provider: RemoteProvider, there: Peer, tmp_path: Path) -> None:
    def breaking(call: Call) -> Answer:
        said = ranged(call)
        said.cut = 300_000 if len(said.body) > 300_000 else None
        return said

    there.on["GET /v1/files/a"] = breaking
    provider.fetch(FileEntry("a", 10, len(BODY), ""), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY
    starts = [call.headers.get("range") for call in calls(there, "GET", "/v1/files/a")]
    assert starts[0] is None
    assert len(starts) == 4


def test_a_server_without_ranges_starts_over(provider: RemoteProvider, there: Peer, tmp_path: Path) -> None:
    there.on["GET /v1/files/a"] = [Answer(BODY, cut=1000), LOST, Answer(BODY)]
    provider.fetch(FileEntry("a", 10, len(BODY), ""), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == BODY


def test_a_download_that_never_gets_further_ends(
    provider: RemoteProvider, there: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_RETRIES", "2")
    there.on["GET /v1/files/a"] = Answer(BODY, cut=1000)
    with pytest.raises(errors.Damaged, match="its manifest says"):
        provider.fetch(FileEntry("a", 10, len(BODY), ""), tmp_path / "a")


@pytest.mark.parametrize("size", [len(BODY) - 1, len(BODY) + 1])
def test_a_file_of_another_size_is_damaged(
    provider: RemoteProvider, there: Peer, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_RETRIES", "2")
    there.on["GET /v1/files/a"] = Answer(BODY)
    with pytest.raises(errors.Damaged):
        provider.fetch(FileEntry("a", 10, size, ""), tmp_path / "a")


def test_a_dead_signature_is_renewed_once(provider: RemoteProvider, there: Peer, tmp_path: Path) -> None:
    there.on["GET /v1/files/a"] = [failure("forbidden", 403), Answer(BODY)]
    provider.fetch(FileEntry("a", 10, len(BODY), ""), tmp_path / "a")
    assert len(calls(there, "POST", "/v1/files:sign")) == 2
    there.on["GET /v1/files/b"] = failure("forbidden", 403, "revoked")
    with pytest.raises(errors.Forbidden, match="revoked") as caught:
        provider.fetch(FileEntry("b", 10, 5, ""), tmp_path / "b")
    assert "5ecret" not in str(caught.value) + caught.value.hint


def test_signatures_are_renewed_before_they_end(provider: RemoteProvider, there: Peer, tmp_path: Path) -> None:
    there.on["GET /v1/files/a"] = Answer(BODY)
    entry = FileEntry("a", 10, len(BODY), "")
    provider.fetch(entry, tmp_path / "a")
    provider.fetch(entry, tmp_path / "a")
    assert len(calls(there, "POST", "/v1/files:sign")) == 1
    copy = pickle.loads(pickle.dumps(provider))
    copy.fetch(entry, tmp_path / "a")
    copy.close()
    assert len(calls(there, "POST", "/v1/files:sign")) == 2


def test_a_lost_connection_tells_no_signature(
    provider: RemoteProvider, there: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_RETRIES", "1")
    there.on["GET /v1/files/a"] = LOST
    with pytest.raises(errors.Unreachable) as caught:
        provider.fetch(FileEntry("a", 10, 5, ""), tmp_path / "a")
    assert "5ecret" not in f"{caught.value} {caught.value.hint}"
    assert caught.value.__cause__ is None


def test_trace_asks_the_exchange(provider: RemoteProvider, there: Peer) -> None:
    item = {"row": 4, "id": "a", "sources": []}
    there.on["GET /v1/datasets/d/trace"] = answer({"items": [item]})
    assert provider.trace("d@3", step=2, seed=1)[0].row == 4
    assert there.calls[0].query == {"ref": "3", "step": "2", "seed": "1"}
