"""Requests that schemathesis makes up from the OpenAPI document, right and wrong ones, sent to a running server.

python fuzz_requests.py URL REQUESTS SEED, in an environment of schemathesis' own. The last line of the output is JSON:
how many answers of each status, and what was wrong with an answer (a 5xx, a status, type, header or body that the
document does not promise).
"""

import contextlib
import json
import sys
from collections import Counter
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import load_all_checks
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks as openapi

MOST_TOLD = 30
"""Failures that are told; all are counted."""


def main(url: str, wanted: int, number: int) -> None:
    load_all_checks()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    checks = [
        schemathesis.checks.not_a_server_error, openapi.status_code_conformance, openapi.content_type_conformance,
        openapi.response_headers_conformance, openapi.response_schema_conformance,
    ]  # fmt: skip
    statuses: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    session = requests.Session()
    turns = [(operation, mode) for operation in operations for mode in GenerationMode]
    sent = 0
    for turn, (operation, mode) in enumerate(turns):
        share = -(-(wanted - sent) // (len(turns) - turn))

        def ask(case: Any) -> None:
            nonlocal sent
            sent += 1
            try:
                answer = case.call(session=session, timeout=60, allow_redirects=False)
            except requests.RequestException as error:
                failures[f"{case.method} {case.operation.path}: {type(error).__name__}"] += 1
                return
            statuses[str(answer.status_code)] += 1
            try:
                case.validate_response(answer, checks=checks)
            except FailureGroup as group:
                for failure in group.exceptions:
                    told = " ".join(f"{failure.title} {failure.message}".split())[:300]
                    sent_body = repr(getattr(answer.request, "body", b""))[:200]
                    failures[f"{case.method} {case.operation.path} {answer.status_code}: {told} {sent_body}"] += 1

        quick = settings(
            max_examples=max(1, share), deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        with contextlib.suppress(Unsatisfiable):  # an operation without wrong requests, such as one without parameters
            seed(number)(quick(given(case=operation.as_strategy(generation_mode=mode))(ask)))()
    told = [f"{count} x {what}" for what, count in failures.most_common(MOST_TOLD)]
    found = {"sent": sent, "statuses": statuses, "failures": sum(failures.values()), "told": told}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
