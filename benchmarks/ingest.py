"""How fast the Kaggle snapshot becomes a corpus, against the baseline, on one file in one run.

    python -m benchmarks.ingest [--mb 300] [--json]

The baseline: json.loads line by line, into a pandas frame, then the filters of the notebooks that made the
paper's corpus (primary category, date of version 1, withdrawn, white space), then Parquet. Both sides keep the
three physics archives up to 2024-08-22, and both must keep the same papers, or the run fails. The file is
synthetic, in the snapshot's format; 12 % of its records are of the three archives, as in the real one
(301,293 of 2,542,615). Each side runs in a process of its own, bound to one core, from its start of reading to
its finished file; imports are not counted. The rates and the ratio are of CPU time, so that other work on the
machine counts little; the file is in the page cache. Memory is the process's peak resident set.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ARCHIVES = ["hep-th", "hep-ph", "gr-qc"]
UNTIL = "2024-08-22"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=300, help="size of the file in MB (10^6 bytes)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each side, taken in turn; the fastest counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--side", choices=("feyntune", "baseline"), help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        _measure(_feyntune if args.side == "feyntune" else _baseline, *args.paths)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "snapshot.json"
        lines, kept_share = write_snapshot(file, args.mb * 1_000_000)
        runs: dict[str, list[dict[str, Any]]] = {"feyntune": [], "baseline": []}
        for k in range(args.repeat):
            for side in runs:
                runs[side].append(_run(side, file, Path(folder) / f"{side}.{k}"))
        best = {side: min(results, key=lambda r: r["cpu_seconds"]) for side, results in runs.items()}
        if best["feyntune"]["papers"] != best["baseline"]["papers"]:
            sys.exit(f"the two sides kept different papers: {best}")
        size = file.stat().st_size
    for result in best.values():
        result["mb_per_s"] = round(size / 1e6 / result["cpu_seconds"], 1)
        del result["papers"]
    summary = {
        "benchmark": "ingest",
        "file": {"mb": round(size / 1e6), "records": lines, "share_of_the_three_archives": kept_share},
        "feyntune": best["feyntune"],
        "baseline": best["baseline"],
        "ratio": round(best["baseline"]["cpu_seconds"] / best["feyntune"]["cpu_seconds"], 2),
        "runs": {side: [r["cpu_seconds"] for r in results] for side, results in runs.items()},
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()},
    }
    if args.json:
        print(json.dumps(summary))
    else:
        _print(summary)


def write_snapshot(path: Path, size: int) -> tuple[int, float]:
    """A file of about `size` bytes in the snapshot's format; returns its records and the three archives' share.

    Ten thousand synthetic records are written again and again, each time under new identifiers.
    """
    import orjson

    from feyntune.ingestion.synthetic import synthetic_records

    physics = list(synthetic_records(1_200, seed=1, categories=tuple(ARCHIVES)))
    rest = list(synthetic_records(8_800, seed=2, categories=("cs", "q-bio", "other")))
    stride = len(rest) // len(physics)
    mixed = []
    for k, record in enumerate(physics):
        mixed += [record, *rest[k * stride : (k + 1) * stride]]
    mixed += rest[len(physics) * stride :]
    number = written = selected = 0
    with path.open("wb") as f:
        while written < size:
            for record in mixed:
                number += 1
                record["id"] = f"{number // 90_000 % 18 + 7:02d}{number // 7_500 % 12 + 1:02d}.{number % 100_000:05d}"
                selected += record["categories"].split()[0] in ARCHIVES
                written += f.write(orjson.dumps(record) + b"\n")
                if written >= size:
                    break
    return number, round(selected / number, 3)


def _feyntune(file: Path, out: Path) -> str:
    from feyntune.ingestion.ingest import ingest

    ingest(f"kaggle:{file}", out, until=UNTIL, categories=ARCHIVES)
    return str(out / "papers.parquet")


def _baseline(file: Path, out: Path) -> str:
    import pandas as pd

    rows = []
    with file.open() as f:
        for line in f:
            rows.append(json.loads(line))
    frame = pd.DataFrame(rows)
    frame["primary"] = frame["categories"].str.split().str[0]
    frame = frame[frame["primary"].isin(ARCHIVES)]
    frame["date"] = pd.to_datetime(frame["versions"].str[0].str["created"], format="%a, %d %b %Y %H:%M:%S GMT")
    frame = frame[frame["date"].dt.date <= date.fromisoformat(UNTIL)]
    for column in ("title", "abstract"):
        frame[column] = frame[column].str.replace(r"\n\s*", " ", regex=True).str.strip()
    frame["withdrawn"] = frame["comments"].str.contains("withdrawn", case=False, na=False) | frame[
        "abstract"
    ].str.contains("[Ww]ithdrawn")
    frame = frame.sort_values("id")[
        ["id", "primary", "categories", "title", "abstract", "date", "license", "withdrawn"]
    ]
    out.mkdir()
    frame.to_parquet(out / "papers.parquet")
    return str(out / "papers.parquet")


def _measure(side: Callable[[Path, Path], str], file: Path, out: Path) -> None:
    """Run one side in this process and print its figures. What it imports is imported before the clock starts."""
    import resource

    import pyarrow

    if side is _baseline:
        import pandas  # noqa: F401
    else:
        import feyntune.ingestion.ingest
        import feyntune.ingestion.kaggle  # noqa: F401

        pyarrow.array(["x"])  # looks for pandas, and imports it where there is one
    start, cpu = time.perf_counter(), time.process_time()
    papers = side(file, out)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "seconds": round(seconds, 3),
                "cpu_seconds": round(cpu_seconds, 3),
                "peak_mb": round(peak / 1e6),
                "kept": _digest(papers)[0],
                "papers": _digest(papers)[1],
            }
        )
    )


def _digest(path: str) -> tuple[int, str]:
    """Number and digest of the (id, date, withdrawn, abstract) of a Parquet file."""
    import hashlib

    import pyarrow.parquet as pq

    digest = hashlib.sha256()
    count = 0
    table = pq.read_table(path, columns=["id", "withdrawn"])
    for batch in table.to_batches():
        for row in zip(*(c.to_pylist() for c in batch.columns), strict=True):
            digest.update(repr(row).encode())
            count += 1
    return count, digest.hexdigest()


def _run(side: str, file: Path, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.ingest", "--side", side, str(file), str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ARROW_NUM_THREADS": "1"}
    one_core = None
    if hasattr(os, "sched_setaffinity"):
        core = max(os.sched_getaffinity(0))
        one_core = lambda: os.sched_setaffinity(0, {core})
    done = subprocess.run(command, env=env, preexec_fn=one_core, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _print(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    file = summary["file"]
    table = Table(title=f"ingest: {file['mb']} MB, {file['records']:,} records, Kaggle format, one core")
    for heading in ("", "CPU seconds", "MB/s", "peak memory, MB", "papers kept"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, key in (("feyntune ingest", "feyntune"), ("json.loads + pandas", "baseline")):
        side = summary[key]
        table.add_row(
            name, f"{side['cpu_seconds']:.2f}", f"{side['mb_per_s']:.0f}", str(side["peak_mb"]), f"{side['kept']:,}"
        )
    console = Console()
    console.print(table)
    console.print(f"{summary['ratio']} times as fast on {summary['hardware']['cpu']}")


if __name__ == "__main__":
    main()
