"""The OpenAPI document, completed: bodies that routes read themselves, and every error in the words of its route."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.dialects import Shape, cohere, openai, plain, shape_of, tei
from server.schemas import CohereError, ErrorBody, PlainError, TeiError

REFUSALS: Mapping[int, str] = {
    400: "The request is wrong; `param` names the field or item.",
    401: "A key is needed.",
    403: "The key may not do this.",
    404: "What the request names is not there.",
    408: "The body did not arrive in time.",
    413: "The body is too long.",
    429: "Too much is waiting; `Retry-After` says when to come back.",
    500: "An error of the server; its log has it under the request's id.",
    503: "The model does not answer.",
}
"""What any route may answer instead of what was asked for."""
VALIDATION = {422: "The request is wrong."}
"""What TEI's routes say for most of 400."""
BODIES: Mapping[Shape, type[BaseModel]] = {openai: ErrorBody, plain: PlainError, cohere: CohereError, tei: TeiError}
OWN = frozenset({"/healthz", "/readyz"})
"""Routes that are always answered, and describe their answers themselves."""
REF = "#/components/schemas/{model}"


def completed(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> Callable[[], dict[str, Any]]:
    """What to put in place of `app.openapi`; `bodies`: models of requests that routes read themselves."""
    plainly = app.openapi

    def openapi() -> dict[str, Any]:
        document = plainly()
        _, definitions = models_json_schema(
            [(body, "validation") for body in (*bodies, *BODIES.values())], ref_template=REF
        )
        document["components"]["schemas"].update(definitions["$defs"])
        for path, operations in document["paths"].items():
            if path not in OWN:
                for operation in operations.values():
                    _add_refusals(operation["responses"], shape_of(path))
        return document

    return openapi


def _add_refusals(responses: dict[str, Any], shape: Shape) -> None:
    responses.pop("422", None)  # FastAPI's own idea of it, which no route of ours answers with
    content = {"application/json": {"schema": {"$ref": REF.format(model=BODIES[shape].__name__)}}}
    for status, told in {**REFUSALS, **(VALIDATION if shape is tei else {})}.items():
        responses.setdefault(str(status), {"description": told})["content"] = content
