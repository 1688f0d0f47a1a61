"""The whole API from its own OpenAPI description: whatever is sent, no 5xx, no hang, and the server keeps answering."""

import os

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.serving.conftest import gauge, settles

# The same cases each time, so that a red CI is somebody's change; FEYNTUNE_FUZZ=1 draws new ones.
EXAMPLES = settings(
    max_examples=25,
    deadline=None,
    database=None,
    derandomize="FEYNTUNE_FUZZ" not in os.environ,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
def test_nothing_that_is_sent_makes_a_server_error(endpoint):
    schema = schemathesis.openapi.from_url(f"{endpoint.url}/openapi.json")
    asked = set()
    for operation in schema.get_all_operations():
        asked.add(operation.ok().label)

        @EXAMPLES
        @given(case=operation.ok().as_strategy())
        def ask(case):
            response = case.call(timeout=30)
            assert response.status_code < 500, response.text

        ask()
    assert {"POST /openai/v1/completions", "POST /v2/models/{model_name}/infer"} <= asked


@pytest.mark.slow
def test_after_all_of_it_the_server_answers_and_holds_nothing(endpoint):
    assert settles(lambda: gauge(endpoint, "feyntune_running_requests") == 0)
    assert gauge(endpoint, "feyntune_waiting_requests") == 0
    assert httpx.get(f"{endpoint.url}/v2/health/ready").status_code == 200
    body = {"model": "champion", "prompt": "The soup", "max_tokens": 3}
    assert httpx.post(f"{endpoint.url}/openai/v1/completions", json=body, timeout=60).status_code == 200
