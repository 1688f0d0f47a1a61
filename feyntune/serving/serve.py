"""The endpoint: one base model in memory, every registered adapter over it, and three protocols in front."""

import asyncio
import gc
import logging
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
    engine: Literal["builtin", "vllm"] = "builtin",
    vllm_command: Sequence[str] = ("vllm",),
    vllm_args: Sequence[str] = (),
    max_adapters: int = 40,
    max_rank: int = 8,
    batch_tokens: int = 512,
    batch_requests: int = 64,
    cache_tokens: int = 32768,
    queue: int = 256,
    queue_seconds: float = 120.0,
    request_seconds: float = 300.0,
    body_bytes: int = 1 << 20,
    chat_template: str | None = None,
    cors_origins: Sequence[str] = (),
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
        engine: `builtin` (`engine.batching`) or `vllm` (`serving.vllm_engine`, a vLLM server as a child process).
        vllm_command, vllm_args: what runs vLLM's command line, and further options of `vllm serve`.
        max_adapters, max_rank, batch_tokens, batch_requests, cache_tokens, queue, queue_seconds: see
            `engine.api.EngineSettings`; the owner of a request is its key.
        request_seconds: most seconds one request may take.
        body_bytes: largest HTTP body and gRPC message.
        chat_template: a file with a Jinja template, or the template itself, in place of the tokenizer's own.
        cors_origins: origins whose pages may call the endpoint from a browser; `*` is every one.
        poll_seconds: how often the registry is looked at.
        canary_share: share (0 to 1) of the champion's requests that goes to the newest version in staging.
        drain_seconds, linger_seconds: after SIGTERM; see `kserve_api.Endpoint`.
        keys_file: bearer keys, one a line; without it anybody may ask.
        workbench: show browsers the page of `workbench.py` at `/`.

    Raises:
        UserError: no such base, a port that is taken, an unreadable keys file, or a setting out of range.
    """
    settings = EngineSettings(max_adapters, max_rank, batch_tokens, batch_requests, cache_tokens, queue, queue_seconds)
    _check(settings, request_seconds, poll_seconds, canary_share)
    template = None if chat_template is None else _read_template(chat_template)
    from feyntune.serving.completions import Limits, Server
    from feyntune.serving.guard import Keys

    keys = Keys(keys_file) if keys_file is not None else None
    listening = _listen(host, port)
    base = pin_base(base)
    location, digest = split_pin(base)
    assert digest is not None
    from feyntune.serving.kserve_api import Endpoint  # KServe and FastAPI: seconds to import

    limits = Limits(body_bytes=body_bytes, seconds=request_seconds)
    server = Server(limits, base_name=Path(location).name, cors_origins=tuple(cors_origins))
    endpoint = Endpoint(server, (listening, grpc_port), host, keys, drain_seconds, linger_seconds, workbench)
    quiet_libraries()
    endpoint.sync_models(set())
    log.info("listening on http://%s:%d (gRPC %d)", host, listening.getsockname()[1], grpc_port)
    if workbench:
        log.info("the workbench is at that address: open it in a browser")

    async def work() -> None:
        load = partial(_load_vllm, vllm_command, vllm_args) if engine == "vllm" else _load
        await _bring_up(server, registry, digest, partial(load, base, precision, settings, template), canary_share)
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


def quiet_libraries() -> None:
    """Only warnings from KServe and uvicorn, whose lines have other formats. KServe's constructor sets the levels."""
    for name in ("uvicorn", "uvicorn.access", "uvicorn.error", "kserve", "kserve.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")  # what KServe answers with


async def _bring_up(
    server: "Server", registry: str, digest: str, load: Callable[[], tuple[Any, Any, list[int]]], canary_share: float
) -> None:
    """Load the base, let it answer once, and open the registry."""
    from feyntune.engine.api import EngineDeadError, Sampling
    from feyntune.serving import metrics
    from feyntune.serving.canary import Canary
    from feyntune.serving.catalog import Catalog
    from feyntune.serving.source import RegistrySource

    engine, tokenizer, eos = await asyncio.to_thread(load)
    engine.start()
    server.engine = engine  # stopped at the end, whatever happens from here
    try:
        async for _ in engine.submit(None, [tokenizer.bos_token_id], Sampling(max_tokens=1)):
            pass
    except EngineDeadError as e:
        raise UserError(f"The base model does not answer: {e}") from e
    log.info("the base answers: %s, at most %d tokens", server.base_name, engine.max_length)
    metrics.RUNNING.set_function(lambda: engine.load().running)
    metrics.WAITING.set_function(lambda: engine.load().waiting)
    source = await asyncio.to_thread(RegistrySource, registry)
    server.tokenizer, server.eos = tokenizer, frozenset(eos)
    server.catalog = Catalog(source, engine, digest, Canary(canary_share))
    # What is loaded by now stays. To go through it all again for garbage would hold up every request for a third of
    # a second, and for seconds on a busy machine.
    gc.freeze()


def _load(base: str, precision: "Precision", settings: EngineSettings, chat_template: str | None):
    """The builtin engine, the tokenizer and the ids that end a text; minutes for a large base."""
    from feyntune.engine.batching import BatchingEngine
    from feyntune.model.load import check_vocab_size, get_device, load_base, load_tokenizer
    from feyntune.serving import metrics

    tokenizer = load_tokenizer(base)
    if chat_template is not None:
        _set_template(tokenizer, chat_template)
    model = load_base(base, precision, get_device(), attention="sdpa")
    check_vocab_size(model, tokenizer, base)
    eos = _end_tokens(tokenizer, model.generation_config)
    return BatchingEngine(model, eos, settings, metrics.BATCH.observe), tokenizer, eos


def _load_vllm(
    command: Sequence[str],
    arguments: Sequence[str],
    base: str,
    precision: "Precision",
    settings: EngineSettings,
    chat_template: str | None,
):
    """As `_load`, for the vllm engine: the base's own weights are left to vLLM."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from feyntune.engine.lora import projections
    from feyntune.model.base import fetch_base
    from feyntune.model.load import load_tokenizer
    from feyntune.serving.vllm_engine import VllmEngine
    from feyntune.serving.vllm_process import VllmProcess

    folder = fetch_base(base)
    tokenizer = load_tokenizer(base)
    if chat_template is not None:
        _set_template(tokenizer, chat_template)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        eos = _end_tokens(tokenizer, GenerationConfig.from_pretrained(folder))
    except OSError:  # it has none
        eos = [tokenizer.eos_token_id]
    length = min(config.max_position_embeddings, settings.cache_tokens)
    process = VllmProcess(command, folder, precision, settings, length, arguments)
    engine = VllmEngine(
        process,
        settings,
        vocabulary=config.vocab_size,
        max_length=length - 1,
        eos=eos,
        projections=projections(model),
    )
    return engine, tokenizer, eos


def _end_tokens(tokenizer, generation_config) -> list[int]:
    given = generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *([given] if isinstance(given, int) else given or [])})


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as e:
        raise UserError(f"Port {port} of {host} cannot be used ({e.strerror}): choose another with --port.") from e
    listening.setblocking(False)
    return listening


def _read_template(given: str) -> str:
    """A chat template by its file, or as it stands."""
    if "{" in given:
        return given
    try:
        return Path(given).read_text("utf-8")
    except (OSError, ValueError) as e:
        raise UserError(f"Chat template {given} cannot be read ({type(e).__name__}): give a text file.") from e


def _set_template(tokenizer, template: str) -> None:
    from jinja2 import TemplateError, TemplateSyntaxError

    tokenizer.chat_template = template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except TemplateSyntaxError as e:
        raise UserError(f"Chat template, line {e.lineno}: {e.message}. Correct the template.") from e
    except TemplateError:
        pass  # it does not allow this conversation


def _check(settings: EngineSettings, request_seconds: float, poll_seconds: float, canary_share: float) -> None:
    for name in ("max_adapters", "max_rank", "batch_tokens", "batch_requests", "queue"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name} is {getattr(settings, name)}: it must be at least 1.")
    if settings.queue_seconds <= 0:
        raise UserError("queue_seconds must be above 0.")
    if settings.cache_tokens < 64:
        raise UserError(f"cache_tokens is {settings.cache_tokens}: at least 64, and as many as the longest request.")
    if settings.batch_requests > settings.batch_tokens:
        raise UserError("batch_requests is larger than batch_tokens: every request needs a token in each step.")
    if request_seconds <= 0 or poll_seconds <= 0:
        raise UserError("request_seconds and poll_seconds must be above 0.")
    if not 0 <= canary_share <= 1:
        raise UserError(f"canary_share is {canary_share}: it is a share, from 0 to 1.")
