"""Any number of papers into one Parquet file sorted by id, in constant memory.

Batches are sorted and spilled to runs; the output is then put together from ranges of ids, each read from the
batches of all runs that touch it. Of records with one id the newest stays.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feyntune.artifacts.records import SCHEMA
from feyntune.ingestion.fields import Row
from feyntune.ingestion.tally import REPEATED

_ROWS = 1_000  # turned from Python objects into Arrow at a time
_RUN_BYTES = 8 << 20
_RUN_GROUP = 500  # rows of a run's batches: what a range reads too much at each end
_RANGE = 6_000  # rows sorted together at the end, about
_ORDER = [("id", "ascending"), ("updated", "descending"), ("number", "descending")]
_RUN_SCHEMA = pa.schema(
    [
        *SCHEMA,
        pa.field("updated", pa.string()),
        pa.field("left_out", pa.string()),
        pa.field("number", pa.int64()),
    ]
)


def write_sorted(
    rows: Iterable[Row], path: Path, scratch: Path, *, seen: Callable[[pa.Table, Counter[str]], None]
) -> None:
    """Write `rows` to the Parquet file `path` (schema SCHEMA), sorted by unique id.

    `scratch` is a folder for the runs. `seen` is called for every part of the output with the part and how many
    records were left out of it, by reason.

    When `rows` raises, what came before is written, then the exception is raised again.
    """
    runs = _Runs(scratch)
    try:
        for batch in _batches(rows):
            runs.add(batch)
    finally:
        runs.spill()
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            for table in runs.ranges():
                first = _first_of_each_id(table)
                papers = first.filter(pc.equal(first["left_out"], "")).select(SCHEMA.names).cast(SCHEMA)
                if papers.num_rows:
                    writer.write_table(papers)
                left_out = Counter({REPEATED: table.num_rows - first.num_rows})
                reasons = pc.value_counts(first["left_out"]).to_pylist()
                seen(papers, left_out + Counter({r["values"]: r["counts"] for r in reasons if r["values"]}))


def _batches(rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
    """Batches of `_RUN_SCHEMA`; the last one also when `rows` raises."""
    waiting: list[tuple] = []
    number = 0
    try:
        for row in rows:
            waiting.append((*row.paper, row.updated, row.left_out, number))
            number += 1
            if len(waiting) == _ROWS:
                yield _batch(waiting)
                waiting.clear()
    except Exception as e:
        if waiting:
            yield _batch(waiting)
        raise e
    if waiting:
        yield _batch(waiting)


def _batch(rows: list[tuple]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    return pa.record_batch(
        [pa.array(column, field.type) for column, field in zip(columns, _RUN_SCHEMA, strict=True)], schema=_RUN_SCHEMA
    )


class _Runs:
    """Sorted Arrow files in a scratch folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: list[tuple[pa.RecordBatchFileReader, list[tuple[str, str]]]] = []  # with their batches' ends
        self.held: list[pa.RecordBatch] = []
        self.bytes = 0
        self.sample: list[str] = []  # every _RUN_GROUP-th id of each run: where ranges are cut

    def add(self, batch: pa.RecordBatch) -> None:
        self.held.append(batch)
        self.bytes += batch.nbytes
        if self.bytes >= _RUN_BYTES:
            self.spill()

    def spill(self) -> None:
        if not self.held:
            return
        table = pa.Table.from_batches(self.held).sort_by(_ORDER)
        self.held, self.bytes = [], 0
        path = self.folder / f"{len(self.files)}.arrow"
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _RUN_SCHEMA, options=options) as writer:
            writer.write_table(table.combine_chunks(), max_chunksize=_RUN_GROUP)
        ids = table["id"]
        ends = [
            (ids[k].as_py(), ids[min(k + _RUN_GROUP, len(ids)) - 1].as_py()) for k in range(0, len(ids), _RUN_GROUP)
        ]
        self.files.append((pa.ipc.open_file(pa.OSFile(str(path))), ends))
        self.sample += [first for first, _ in ends]

    def ranges(self) -> Iterator[pa.Table]:
        """All rows, in tables that follow each other by id; rows of one id are never parted."""
        cuts = sorted(self.sample)[_RANGE // _RUN_GROUP :: _RANGE // _RUN_GROUP]
        for low, high in pairwise(["", *cuts, "\U0010ffff"]):
            if low == high:
                continue
            parts = [part for file in self.files if (part := _between(*file, low, high)) is not None]
            if parts:
                yield pa.concat_tables(parts).sort_by(_ORDER)


def _between(file: pa.RecordBatchFileReader, ends: list[tuple[str, str]], low: str, high: str) -> pa.Table | None:
    """The rows with low <= id < high of a sorted run, reading only the batches they lie in."""
    batches = [k for k, (first, last) in enumerate(ends) if first < high and last >= low]
    if not batches:
        return None
    table = pa.Table.from_batches([file.get_batch(k) for k in batches])
    inside = pc.and_(pc.greater_equal(table["id"], low), pc.less(table["id"], high))
    return table.filter(inside)


def _first_of_each_id(table: pa.Table) -> pa.Table:
    """The first row of each id of a table sorted by id."""
    ids = table["id"].combine_chunks()
    changes = pc.not_equal(ids[1:], ids[:-1])
    return table.filter(pa.concat_arrays([pa.array([True]), pa.array(changes)]))
