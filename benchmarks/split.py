"""The split step against the baseline: a random split in pandas, and datasketch document by document.

Ours is the whole step: reading, duplicates, assignment, ten mixtures, writing, and the leak check by an exact join. The
baseline reads the same file, makes a random 70/15/15 split, and asks MinHashLSH for every document's duplicates,
as datasketch's documentation shows it; it writes and checks nothing.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

from feyntune.artifacts.artifact import write_artifact
from feyntune.artifacts.records import SCHEMA, normal_form


def main(papers: int = 5000, as_json: bool = typer.Option(False, "--json"), side: str = "", corpus: str = "") -> None:
    """Measure both sides on PAPERS synthetic papers, each in a process of its own."""
    if side:
        print(json.dumps(_measured(side, Path(corpus))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "corpus"
        _write_corpus(folder, papers)
        sides = {s: _in_a_process(s, folder) for s in ("feyntune", "baseline")}
    result: dict[str, Any] = {
        "benchmark": "split",
        "papers": papers,
        "feyntune": sides["feyntune"],
        "baseline": sides["baseline"],
        "ratio": round(sides["feyntune"]["papers_per_second"] / sides["baseline"]["papers_per_second"], 2),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
    }
    if as_json:
        print(json.dumps(result))
        return
    table = Table("", "papers/s", "CPU seconds", "peak memory, MB", title=f"split of {papers:,} synthetic papers")
    for s, figures in sides.items():
        shown = (f"{figures[k]:,.1f}" for k in ("papers_per_second", "cpu_seconds", "peak_memory_mb"))
        table.add_row(s, *shown)
    table.caption = f"feyntune over the baseline: {result['ratio']} times the papers per second of CPU time"
    Console().print(table)


def _write_corpus(folder: Path, papers: int) -> None:
    from feyntune.ingestion.synthetic import synthetic_records

    rows = [
        {
            "id": r["id"],
            "primary": r["categories"].split()[0],
            "categories": r["categories"].split(),
            "title": normal_form(r["title"]),
            "abstract": normal_form(r["abstract"]),
            "date": parsedate_to_datetime(r["versions"][0]["created"]).date(),
            "license": r["license"],
            "withdrawn": "withdrawn" in f"{r['comments']} {r['abstract']}".lower(),
            "source": "synthetic",
        }
        for r in synthetic_records(papers)
    ]
    with write_artifact(folder, "corpus") as tmp:
        rows.sort(key=lambda r: r["id"])
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp.path / "papers.parquet")


def _in_a_process(side: str, corpus: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--corpus", str(corpus)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return json.loads(done.stdout)


def _measured(side: str, corpus: Path) -> dict[str, float]:
    work = {"feyntune": _feyntune, "baseline": _baseline}[side]
    _import_what(side)
    started, cpu = time.perf_counter(), time.process_time()
    papers = work(corpus)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {
        "papers_per_second": round(papers / cpu, 1),  # of CPU time: other work on the machine does not count
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def _import_what(side: str) -> None:
    import datasketch  # noqa: F401
    import pandas  # noqa: F401

    if side == "feyntune":
        import feyntune.splitting.split  # noqa: F401


def _feyntune(corpus: Path) -> int:
    from feyntune.splitting.split import split

    split(corpus, corpus.parent / "split")
    return pq.read_metadata(corpus / "papers.parquet").num_rows


def _baseline(corpus: Path) -> int:
    import pandas
    from datasketch import MinHash, MinHashLSH

    frame = pandas.read_parquet(corpus / "papers.parquet")
    train = frame.sample(frac=0.7, random_state=42)
    rest = frame.drop(train.index)
    test = rest.sample(frac=0.5, random_state=42)
    rest.drop(test.index)
    lsh = MinHashLSH(threshold=0.6, num_perm=128)
    duplicates = []
    for row in frame.itertuples():
        words = row.abstract.lower().split()
        minhash = MinHash(num_perm=128)
        for shingle in {" ".join(words[i : i + 3]) for i in range(len(words) - 2)}:
            minhash.update(shingle.encode())
        duplicates += [(row.id, other) for other in lsh.query(minhash)]
        lsh.insert(row.id, minhash)
    return len(frame)


if __name__ == "__main__":
    typer.run(main)
