"""The engine is tested with the adapters, and the truth about them, that the endpoint is tested with."""

from tests.serving.conftest import adapters, alone, tokenizer  # noqa: F401
