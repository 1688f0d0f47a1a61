"""The study is tested on the evaluations that the comparison is tested on."""

from tests.evaluation.conftest import adapters, compared, evaluations, failure  # noqa: F401
