"""`feyntune serve`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from feyntune.cli.options import DEFAULT_REGISTRY, Base, RegistryUri, is_missing, pinned_base, setup_logging, warn
from feyntune.errors import UserError

app = typer.Typer()


@app.command(epilog="Example: feyntune serve --base runs/base --registry runs/registry --port 8080")
def serve(
    base: Base,
    registry: RegistryUri = DEFAULT_REGISTRY,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="HTTP port.")] = 8080,
    grpc_port: Annotated[int, typer.Option(help="gRPC port.")] = 8081,
    precision: Annotated[str, typer.Option(help="Precision of the base in memory: bf16, fp32 or nf4.")] = "fp32",
    engine: Annotated[str, typer.Option(help="What computes: builtin, or vllm (a vLLM server as a child process).")] = (
        "builtin"
    ),
    vllm_command: Annotated[str, typer.Option(help="What runs vLLM's command line.")] = "vllm",
    vllm_args: Annotated[
        str, typer.Option(help='Additional options of `vllm serve`, such as "--gpu-memory-utilization=0.8".')
    ] = "",
    max_adapters: Annotated[int, typer.Option(help="Maximum number of adapters in memory.")] = 40,
    max_rank: Annotated[int, typer.Option(help="Maximum LoRA rank.")] = 8,
    batch_requests: Annotated[int, typer.Option(help="Maximum number of requests computed at once.")] = 64,
    batch_tokens: Annotated[int, typer.Option(help="Maximum number of tokens in one step.")] = 512,
    cache_tokens: Annotated[
        int,
        typer.Option(help="Tokens of the key-value cache, for all requests together."),
    ] = 32768,
    queue: Annotated[
        int, typer.Option(help="Maximum number of waiting requests per key; keys are served in turn.")
    ] = 256,
    queue_seconds: Annotated[float, typer.Option(help="Maximum wait in the queue.")] = 120.0,
    request_seconds: Annotated[float, typer.Option(help="Maximum time for one request, waiting included.")] = 300.0,
    body_bytes: Annotated[int, typer.Option(help="Largest request body.")] = 1 << 20,
    chat_template: Annotated[
        str | None, typer.Option(help="File with a Jinja chat template, or the template itself.")
    ] = None,
    cors_origins: Annotated[
        str,
        typer.Option(help="Origins whose pages may call from a browser, separated by commas; * is all."),
    ] = "",
    canary_share: Annotated[
        float, typer.Option(help="Share (0 to 1) of the champion's requests for the newest version in staging.")
    ] = 0.0,
    drain_seconds: Annotated[float, typer.Option(help="Time for running requests after SIGTERM.")] = 60.0,
    linger_seconds: Annotated[float, typer.Option(help="Time to take new requests after SIGTERM.")] = 0.0,
    keys_file: Annotated[Path | None, typer.Option(help="File of bearer keys, one per line; default: no keys.")] = (
        None
    ),
    workbench: Annotated[bool, typer.Option(help="Serve the workbench page at /.")] = True,
) -> None:
    """Serve the base and every registered adapter from one endpoint."""
    import socket

    setup_logging()
    if precision not in ("bf16", "fp32", "nf4"):
        raise UserError(f"--precision {precision}: choose bf16, fp32 or nf4.")
    if engine not in ("builtin", "vllm"):
        raise UserError(f"--engine {engine}: choose builtin or vllm.")
    for option, number in (("--port", port), ("--grpc-port", grpc_port)):  # before the imports, which take seconds
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, number))
            except OSError as e:
                raise UserError(f"{option} {number}: cannot listen there ({e.strerror}); choose another.") from e
    pinned_base(base)
    if is_missing(registry):
        warn(f"there is no registry at {registry}: serving the base model alone.")
    from feyntune.serving.serve import serve

    serve(
        registry,
        base,
        host=host,
        port=port,
        grpc_port=grpc_port,
        precision=precision,  # type: ignore[arg-type]
        engine=engine,  # type: ignore[arg-type]
        vllm_command=shlex.split(vllm_command),
        vllm_args=shlex.split(vllm_args),
        max_adapters=max_adapters,
        max_rank=max_rank,
        batch_requests=batch_requests,
        batch_tokens=batch_tokens,
        cache_tokens=cache_tokens,
        queue=queue,
        queue_seconds=queue_seconds,
        request_seconds=request_seconds,
        body_bytes=body_bytes,
        chat_template=chat_template,
        cors_origins=[origin.strip() for origin in cors_origins.split(",") if origin.strip()],
        canary_share=canary_share,
        drain_seconds=drain_seconds,
        linger_seconds=linger_seconds,
        keys_file=keys_file,
        workbench=workbench,
    )
