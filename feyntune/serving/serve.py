"""The endpoint: one base model in memory, every registered adapter over it, and three protocols in front."""

import asyncio
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from feyntune.engine.api import EngineSettings
from feyntune.errors import UserError
from feyntune.model.base import pin_base, split_pin
from feyntune.telemetry import log

if TYPE_CHECKING:
    from feyntune.model.load import Precision
    from feyntune.serving.completions import Server

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def serve(
    registry: str,
    base: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    grpc_port: int = 8081,
    precision: "Precision" = "fp32",
    max_adapters: int = 40,
    max_rank: int = 16,
    batch_tokens: int = 512,
    batch_requests: int = 64,
    cache_tokens: int = 32768,
    queue: int = 256,
    request_seconds: float = 300.0,
    body_bytes: int = 1 << 20,
    poll_seconds: float = 3.0,
    canary_share: float = 0.0,
    drain_seconds: float = 60.0,
    linger_seconds: float = 0.0,
    keys_file: str | Path | None = None,
    workbench: bool = True,
) -> None:
    """Serve `base` and all adapters of `registry` until SIGTERM; then let running requests end, and return.

    Args:
        registry: address of the registry (a folder, file:// or s3://).
        base: the base model, with or without `@digest`; an adapter trained on another base is refused.
        precision: of the base in memory.
        max_adapters, max_rank, batch_tokens, batch_requests, cache_tokens, queue: see `engine.EngineSettings`.
        request_seconds: most seconds one request may take.
        poll_seconds: how often the registry is looked at.
        canary_share: share (0 to 1) of the champion's requests that goes to the newest version in staging.
        drain_seconds, linger_seconds: after SIGTERM; see `kserve_api.Endpoint`.
        keys_file: bearer keys, one a line; without it anybody may ask.
        workbench: show browsers the page of `workbench.py` at `/`.

    Raises:
        UserError: no such base, a port that is taken, an unreadable keys file, or a setting out of range.
    """
    settings = EngineSettings(max_adapters, max_rank, batch_tokens, batch_requests, cache_tokens, queue)
    _check(settings, request_seconds, poll_seconds, canary_share)
    from feyntune.serving.completions import Limits, Server
    from feyntune.serving.guard import Keys

    keys = Keys(keys_file) if keys_file is not None else None
    listening = _listen(host, port)
    base = pin_base(base)
    location, digest = split_pin(base)
    assert digest is not None
    from feyntune.serving.kserve_api import Endpoint  # KServe and FastAPI: seconds to import

    for name in ("uvicorn.access", "kserve", "kserve.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)
    limits = Limits(body_bytes=body_bytes, seconds=request_seconds)
    server = Server(limits, base_name=Path(location).name)
    endpoint = Endpoint(server, (listening, grpc_port), host, keys, drain_seconds, linger_seconds, workbench)
    endpoint.sync_models(set())
    log.info("listening on http://%s:%d (gRPC %d)", host, listening.getsockname()[1], grpc_port)

    async def work() -> None:
        await _bring_up(server, registry, base, digest, precision, settings, canary_share)
        while True:
            assert server.catalog is not None
            await server.catalog.refresh()
            endpoint.sync_models(set(server.catalog.names))
            await asyncio.sleep(poll_seconds)

    try:
        asyncio.run(endpoint.run(work))
    finally:
        if server.engine is not None:
            server.engine.stop()
        listening.close()


async def _bring_up(
    server: "Server",
    registry: str,
    base: str,
    digest: str,
    precision: "Precision",
    settings: EngineSettings,
    canary_share: float,
) -> None:
    """Load the base, let it answer once, and open the registry."""
    from feyntune.engine.api import Sampling
    from feyntune.serving import metrics
    from feyntune.serving.canary import Canary
    from feyntune.serving.catalog import Catalog
    from feyntune.serving.source import RegistrySource

    engine, tokenizer, eos = await asyncio.to_thread(_load, base, precision, settings)
    engine.start()
    server.engine = engine  # stopped at the end, whatever happens from here
    async for _ in engine.submit(None, [tokenizer.bos_token_id], Sampling(max_tokens=1)):
        pass
    log.info("the base answers: %s, %s, at most %d tokens", server.base_name, precision, engine.max_length)
    metrics.RUNNING.set_function(lambda: engine.load().running)
    metrics.WAITING.set_function(lambda: engine.load().waiting)
    source = await asyncio.to_thread(RegistrySource, registry)
    server.tokenizer, server.eos = tokenizer, frozenset(eos)
    server.catalog = Catalog(source, engine, digest, Canary(canary_share))


def _load(base: str, precision: "Precision", settings: EngineSettings):
    """The engine, the tokenizer and the ids that end a text; minutes for a large base."""
    from feyntune.engine.batching import BatchingEngine
    from feyntune.model.load import check_vocab_size, get_device, load_base, load_tokenizer
    from feyntune.serving import metrics

    tokenizer = load_tokenizer(base)
    model = load_base(base, precision, get_device(), attention="sdpa")
    check_vocab_size(model, tokenizer, base)
    given = model.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id, *([given] if isinstance(given, int) else given or [])}
    return BatchingEngine(model, sorted(eos), settings, metrics.BATCH.observe), tokenizer, eos


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as e:
        raise UserError(f"Port {port} of {host} cannot be used ({e.strerror}): choose another with --port.") from e
    listening.setblocking(False)
    return listening


def _check(settings: EngineSettings, request_seconds: float, poll_seconds: float, canary_share: float) -> None:
    for name in ("max_adapters", "max_rank", "batch_tokens", "batch_requests", "queue"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name} is {getattr(settings, name)}: it must be at least 1.")
    if settings.cache_tokens < 64:
        raise UserError(f"cache_tokens is {settings.cache_tokens}: at least 64, and as many as the longest request.")
    if settings.batch_requests > settings.batch_tokens:
        raise UserError("batch_requests is larger than batch_tokens: every request needs a token in each step.")
    if request_seconds <= 0 or poll_seconds <= 0:
        raise UserError("request_seconds and poll_seconds must be above 0.")
    if not 0 <= canary_share <= 1:
        raise UserError(f"canary_share is {canary_share}: it is a share, from 0 to 1.")
