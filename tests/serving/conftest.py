"""A registry of four adapters over the mini base, the truth about what they say, and servers over it."""

import contextlib
import multiprocessing
import os
import socket
import tempfile
import time
from pathlib import Path

import httpx
import pytest
import torch

from feyntune.model.load import load_base, load_tokenizer
from feyntune.names import slug
from feyntune.registry.registry import Registry
from feyntune.variants import METHODS
from tests.serving.factories import register_adapter, seal_adapter


@pytest.fixture(scope="session")
def tokenizer(tiny_base):
    return load_tokenizer(tiny_base)


@pytest.fixture(scope="session")
def adapters(tiny_base, tmp_path_factory) -> dict[str, Path]:
    """Four sealed adapters by variant, of different ranks, half of them on q, k and v only."""
    root = tmp_path_factory.mktemp("adapters")
    variants = [f"{m}/{method}" for m in ("hep-th", "hep-ph+gr-qc") for method in METHODS]
    return {
        variant: seal_adapter(root / slug(variant), tiny_base, variant, rank=(2, 4, 8, 3)[i], seed=i + 1)
        for i, variant in enumerate(variants)
    }


@pytest.fixture(scope="session")
def alone(tiny_base, adapters, tokenizer):
    """Greedy completions by transformers and PEFT themselves, one request at a time: the truth to compare with.

    `alone(variant or None, prompt ids, new tokens)` gives the new token ids.
    """
    from peft import PeftModel

    model = load_base(tiny_base, "fp32", "cpu", attention="sdpa")
    names = list(adapters)
    model = PeftModel.from_pretrained(model, adapters[names[0]], adapter_name=names[0].replace(".", "_"))
    for name in names[1:]:
        model.load_adapter(adapters[name], adapter_name=name)
    model.eval()

    def complete(variant, ids, tokens, **options):
        prompt = torch.tensor([ids])
        if variant is None:
            with model.disable_adapter():
                out = model.generate(input_ids=prompt, max_new_tokens=tokens, do_sample=False, **options)
        else:
            model.set_adapter(variant)
            out = model.generate(input_ids=prompt, max_new_tokens=tokens, do_sample=False, **options)
        return out[0, len(ids) :].tolist()

    return complete


_PROCESSES = multiprocessing.get_context("forkserver")  # the heavy imports once, for all servers
_PROCESSES.set_forkserver_preload(["feyntune.serving.kserve_api", "feyntune.engine.batching"])


def _serve(log: str, registry: str, base: str, settings: dict) -> None:
    from feyntune.serving.serve import serve
    from feyntune.telemetry import setup

    out = os.open(log, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    setup()
    serve(registry, base, **settings)


class Running:
    """`serve` in a process of its own."""

    def __init__(self, registry: str, base: str, **settings):
        self.port, self.grpc_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        settings = {"port": self.port, "grpc_port": self.grpc_port, "poll_seconds": 0.2, **settings}
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self.process = _PROCESSES.Process(target=_serve, args=(self.log.name, registry, base, settings))
        self.process.start()

    def wait(self, ready=lambda detail: detail["ready"], seconds=90) -> dict:
        """The readiness detail as soon as it is as wanted."""
        until = time.monotonic() + seconds
        detail: dict = {}
        while time.monotonic() < until and self.process.is_alive():
            with contextlib.suppress(httpx.TransportError):
                detail = httpx.get(f"{self.url}/v2/health/ready").json()
                if ready(detail):
                    return detail
            time.sleep(0.05)
        raise AssertionError(f"not as wanted: {detail}\n{self.output()}")

    def output(self) -> str:
        return Path(self.log.name).read_text()

    def stop(self, seconds=60) -> int | None:
        """SIGTERM; its exit code."""
        self.process.terminate()
        self.process.join(seconds)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def gauge(running: Running, name: str) -> float:
    """The value of a sample of /metrics, labels and all; 0 where there is none."""
    lines = httpx.get(f"{running.url}/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name), 0.0)


def settles(condition, seconds=20.0) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def serving(registry, base, **settings):
    running = Running(str(registry), str(base), **settings)
    try:
        running.wait()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="session")
def registry(adapters, tmp_path_factory) -> Registry:
    """The four adapters, hep-th/lora-all the champion after hep-th/lora-qkv."""
    registry = Registry.open(str(tmp_path_factory.mktemp("registry") / "registry"))
    for variant, folder in adapters.items():
        register_adapter(registry, variant, folder)
    registry.promote("hep-th/lora-qkv")
    registry.promote("hep-th/lora-all")
    return registry


@pytest.fixture(scope="session")
def endpoint(registry, tiny_base):
    """One server over that registry for all tests that change nothing."""
    limits = {"max_rank": 8, "batch_tokens": 128, "batch_requests": 32, "cache_tokens": 4096, "queue": 200}
    with serving(registry.store.uri, tiny_base, body_bytes=100_000, **limits) as running:
        yield running
