"""Every error Headrace raises: one small tree that knows code, HTTP status, exit code and whether a retry helps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class HeadraceError(Exception):
    """Base of all errors. ``str(error)`` says what and why; ``hint`` says what to do."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "", details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = dict(details or {})

    def to_dict(self, request_id: str = "") -> dict[str, Any]:
        """The one error shape of the REST interface."""
        body: dict[str, Any] = {"code": self.code, "message": self.message, "hint": self.hint, "request_id": request_id}
        if self.details:
            body["details"] = self.details
        return {"error": body}


class BadRequest(HeadraceError):
    """The request itself is wrong; repeating it cannot help."""

    code, status, exit_code = "bad_request", 400, 2


class BadData(BadRequest):
    """A body or file that cannot be parsed as what it claims to be."""

    code = "bad_data"


class BadRef(BadRequest):
    """A dataset name, ref, tag or split that is not well formed."""

    code = "bad_ref"


class BadRecipe(BadRequest):
    """A recipe that cannot run as written; ``details["problems"]`` lists line, what and the nearest valid name."""

    code, status = "bad_recipe", 422


class Unauthenticated(HeadraceError):
    """No token, or one that is unknown, expired or revoked."""

    code, status, exit_code = "unauthenticated", 401, 3


class Forbidden(HeadraceError):
    """Known, but not allowed."""

    code, status, exit_code = "forbidden", 403, 3


class NotFound(HeadraceError):
    """No such dataset, version, tag, run, file or receipt."""

    code, status, exit_code = "not_found", 404, 4


class Conflict(HeadraceError):
    """The state of the exchange contradicts the request."""

    code, status, exit_code = "conflict", 409, 5


class TooLarge(BadRequest):
    """A body beyond a limit of ``settings.py``, before or after decompression."""

    code, status = "too_large", 413


class UnsupportedType(BadRequest):
    """A content type or content encoding that is not read here."""

    code, status = "unsupported_type", 415


class Busy(HeadraceError):
    """A limit of a queue or of the disk is reached for now; retry after ``details["retry_after"]`` seconds."""

    code, status, retryable = "busy", 503, True


class ExpectationFailed(HeadraceError):
    """A recipe ran, and its result misses what ``publish.expect`` demands: nothing was published."""

    code, status = "expectation_failed", 422


class RunFailed(HeadraceError):
    """A run ended without a version; the message names the step and the cause."""

    code, status = "run_failed", 500


class Damaged(HeadraceError):
    """Stored bytes differ from their recorded hash or size."""

    code, status = "damaged", 500


class Unreachable(HeadraceError):
    """An exchange or object store does not answer."""

    code, status, retryable = "unreachable", 503, True


class TooNew(HeadraceError):
    """The other side speaks a newer wire version."""

    code, status = "too_new", 400


def _tree(cls: type[HeadraceError]) -> list[type[HeadraceError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _tree(child))]


def from_dict(body: Mapping[str, Any], status: int) -> HeadraceError:
    """Rebuild the error that an exchange answered; unknown codes keep their message and class by status."""
    error = body.get("error")
    fields = error if isinstance(error, Mapping) else {}
    classes = _tree(HeadraceError)
    by_code = {cls.code: cls for cls in classes}
    by_status = {cls.status: cls for cls in reversed(classes)}
    cls = by_code.get(str(fields.get("code"))) or by_status.get(status, HeadraceError)
    message = str(fields.get("message") or f"the exchange answered status {status}")
    details = fields.get("details")
    return cls(message, hint=str(fields.get("hint") or ""), details=details if isinstance(details, Mapping) else None)
