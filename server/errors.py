"""Errors as clients see them; `dialects` writes them in the words of whoever asks.

No body ever holds a traceback, a path or a key; what is unexpected goes to the log under the request's id.
"""

import math

from data_pipelines.errors import BadSample

EXPLAINED = {
    "not_an_image": "these bytes are no JPEG, PNG, WebP or GIF picture",
    "truncated_image": "the picture is cut short",
    "corrupt_image": "the picture is damaged and cannot be decoded",
    "empty_image": "the picture has no pixels",
    "too_many_pixels": "the picture has more pixels than this server accepts",
}
"""Reason of a BadSample -> what a client is told; decoders' own words stay inside."""

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than success: status, message, machine-readable code and the parameter at fault."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def content(self) -> dict[str, object]:
        """The `error` object."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        if self.status in (408, 413):
            headers["Connection"] = "close"  # part of the body was never read
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400 about one parameter."""
    return ApiError(400, message, code, param)


def bad_item(error: BadSample, param: str) -> ApiError:
    """400 about one picture; the message names the reason, not what a decoder said."""
    return ApiError(400, f"{param}: {EXPLAINED.get(error.reason, 'this item cannot be used')}", error.reason, param)
