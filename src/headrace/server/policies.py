"""The routes of policies, column tags and classification."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import FastAPI, Query, Response

from headrace import model
from headrace.server.parts import Body, Caller, Json, Limit, Page, paged, ref_of
from headrace.server.wire import Workers

if TYPE_CHECKING:
    from headrace.exchange import Exchange


class PolicyBody(Body):
    """A new policy: whom it concerns on which datasets, and what it hides."""

    dataset: str
    subject: str
    row_filter: str | None = None
    masks: dict[str, str] | None = None


class ColumnTagBody(Body):
    """A tag for a column."""

    column: str
    tag: str


class ClassifyBody(Body):
    """What to look at; with ``apply`` the columns are tagged as proposed."""

    ref: str = "latest"
    rows: int = 10_000
    apply: bool = False


def add_policies(api: FastAPI, exchange: Exchange, workers: Workers) -> None:
    """Add these routes."""
    _add_policies(api, exchange, workers)
    _add_column_tags(api, exchange, workers)


def _add_policies(api: FastAPI, exchange: Exchange, workers: Workers) -> None:
    @api.post("/v1/policies", tags=["policies"])
    async def add_policy(p: Caller, body: PolicyBody) -> Response:
        """Hide rows and columns, at once and on every way out."""
        args = (body.dataset, body.subject, body.row_filter, body.masks)
        return Json(await workers.run(exchange.add_policy, p, *args), status_code=201)

    @api.get("/v1/policies", tags=["policies"])
    async def policies(p: Caller, dataset: str | None = None, limit: Limit = 1000, page_token: Page = None) -> Response:
        """All policies, or those that match a dataset, oldest first."""
        return Json(paged(await workers.run(exchange.policies, p, dataset), limit, page_token))

    @api.get("/v1/policies/{policy_id}", tags=["policies"])
    async def policy(p: Caller, policy_id: str) -> Response:
        """One policy."""
        return Json(await workers.run(exchange.policy, p, policy_id))

    @api.delete("/v1/policies/{policy_id}", tags=["policies"])
    async def remove_policy(p: Caller, policy_id: str) -> Response:
        """End a policy, at once."""
        return Json(await workers.run(exchange.remove_policy, p, policy_id))


def _add_column_tags(api: FastAPI, exchange: Exchange, workers: Workers) -> None:
    @api.get("/v1/datasets/{name}/column-tags", tags=["policies"])
    async def column_tags(p: Caller, name: str, limit: Limit = 1000, page_token: Page = None) -> Response:
        """The tags of a dataset's columns."""
        return Json(paged(await workers.run(exchange.column_tags, p, name), limit, page_token))

    @api.post("/v1/datasets/{name}/column-tags", tags=["policies"])
    async def tag_column(p: Caller, name: str, body: ColumnTagBody) -> Response:
        """Tag a column, so that policies can name it by the tag."""
        return Json({"items": await workers.run(exchange.tag_column, p, name, body.column, body.tag)})

    @api.delete("/v1/datasets/{name}/column-tags", tags=["policies"])
    async def untag_column(
        p: Caller, name: str, column: Annotated[str, Query(max_length=255)], tag: Annotated[str, Query(max_length=64)]
    ) -> Response:
        """Take a tag from a column."""
        return Json({"items": await workers.run(exchange.untag_column, p, name, column, tag)})

    @api.post("/v1/datasets/{name}/classify", tags=["policies"])
    async def classify(p: Caller, name: str, body: ClassifyBody) -> Response:
        """Propose column tags by what a version holds; no value is told."""
        ref = ref_of(model.check_name(name), body.ref)
        return Json({"items": await workers.run(exchange.classify, p, ref, body.rows, body.apply)})
