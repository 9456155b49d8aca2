"""Requests made up by schemathesis from what /openapi.json promises, valid ones and faulty ones.

A few of each here; `make fuzz` asks more than five hundred.
"""

import os
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

EXAMPLES = int(os.environ.get("QVGPT_FUZZ", "3"))
OPERATIONS = [
    ("/v1/completions", "POST"), ("/v1/chat/completions", "POST"), ("/v1/values", "POST"),
    ("/v1/models", "GET"), ("/v1/models/{name}", "GET"), ("/health", "GET"), ("/ready", "GET"),
]  # fmt: skip
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def schema(server):
    return schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())


def likelier(body):
    """What the schema cannot say: the one model's name, one form of text, and what has room."""
    body = {k: v for k, v in body.items() if k != "model"}
    if "completion" in body or "text" in body or "ended" in body:  # /v1/values
        forms = ("text", "prompt", "completion", "messages")
        body = {k: v for k, v in body.items() if k not in forms} | {
            "text": body.get("text") or "hi"
        }
    if "max_tokens" in body and body["max_tokens"] is not None:
        body["max_tokens"] = min(body["max_tokens"], 20)
    return body


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=[path for path, _ in OPERATIONS])
def test_made_up_requests(server, schema, path, method, mode):
    counts = Counter()
    operation = schema[path][method]
    if mode == GenerationMode.NEGATIVE and method == "GET":
        pytest.skip("nothing to be wrong about")

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(st.data())
    def ask(data):
        case = data.draw(operation.as_strategy(generation_mode=mode))
        if mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = likelier(case.body)
        response = case.call(base_url=server.url)
        counts[response.status_code] += 1
        assert response.status_code < 500, case.as_curl_command()
        if mode == GenerationMode.NEGATIVE:
            assert response.status_code >= 400, case.as_curl_command()
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        case.validate_response(response, checks=CHECKS)

    ask()
    if mode == GenerationMode.POSITIVE and EXAMPLES >= 50 and method == "POST":
        assert counts[200] > EXAMPLES / 20
    print(path, mode.value, dict(counts))
    assert not server.service.live
