"""The split step: a corpus in; its papers assigned, the mixtures drawn from them, and the audit, out."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feyntune.artifacts.artifact import Manifest, open_artifact, read_manifest, write_artifact
from feyntune.artifacts.records import SCHEMA, TEXT_FORM
from feyntune.errors import UserError
from feyntune.splitting import assign as rule
from feyntune.splitting.assign import KEY, Assignment
from feyntune.splitting.audit import verify_no_leakage
from feyntune.splitting.duplicates import PERMUTATIONS, ROWS, SHINGLE_WORDS, THRESHOLD, Duplicates, find_duplicates
from feyntune.splitting.mixtures import draw
from feyntune.telemetry import log, peak_memory_bytes, progress
from feyntune.variants import load_mixtures

_EXAMPLES = 20
_EPOCH = date(1970, 1, 1)


def split(
    corpus: str | Path,
    out: str | Path,
    *,
    after: str | None = None,
    key: str = KEY,
    mixtures: str | Path | list[dict[str, Any]] | None = None,
    threshold: float = THRESHOLD,
    previous: str | Path | None = None,
) -> Manifest:
    """Assign every paper of `corpus` to a split, draw the mixtures and audit the result into `out`.

    Writes an artifact of kind `split`: `papers.parquet` (SCHEMA plus `split` and `cluster`),
    `mixtures.parquet` (`mixture`, `split`, `id`, in drawing order) and `audit.json`.

    Args:
        corpus: a sealed `corpus`.
        after: YYYY-MM-DD. Papers whose version 1 is newer are split `holdout`: test only.
        key: of the hash that assigns papers. Another key is another, unrelated split.
        mixtures: a file with the part `mixtures` of variants.yaml, whose own are the default; or that list.
        threshold: Jaccard similarity of 3-word shingle sets, 0.6 to 1, from which papers stay together.
        previous: an earlier sealed `split`, whose assignments are kept.

    Raises:
        UserError: the corpus or the previous split is no such folder, is empty, repeats an identifier or has
            another text form; a parameter is out of range; a mixtures file does not hold together; the corpus
            supplies no mixture at all; the audit does not hold.
    """
    started = time.monotonic()
    last_day = _day(after)
    if not 1 <= len(key.encode()) <= 64:
        raise UserError(f"key is {len(key.encode())} bytes long: give one of 1 to 64 bytes.")
    if not 0.6 <= threshold <= 1:
        raise UserError(f"threshold is {threshold}: give a similarity from 0.6 to 1.")
    rules = load_mixtures(mixtures)
    inputs = {"corpus": open_artifact(corpus, "corpus").digest}
    papers = _read(Path(corpus))
    pinned = None
    if previous is not None:
        inputs["previous"] = open_artifact(previous, "split").digest
        pinned = _pins(Path(previous), key, last_day)
    config = {
        "rule": rule.RULE,
        "key": key,
        "after": after,
        "threshold": threshold,
        "text_form": TEXT_FORM,
        "mixtures": [m.model_dump(exclude_none=True, exclude={"paper_training_papers"}) for m in rules],
    }
    with write_artifact(out, "split", inputs, config) as folder:
        with progress("duplicates", len(papers), "papers") as p:
            duplicates = find_duplicates(
                lambda: _abstracts(Path(corpus)), len(papers), threshold, lambda n: p.advance(n)
            )
        ids, days = papers["id"].to_pylist(), papers["date"].cast(pa.int32()).to_numpy()
        place, rank = rule.hashes(ids, key)
        assigned = rule.assign(ids, days, duplicates.text, duplicates.pairs, place, last_day, pinned)
        for i in np.flatnonzero(papers["withdrawn"].to_numpy()).tolist():
            assigned.split[i] = rule.EXCLUDED
            assigned.reasons[i] = (rule.WITHDRAWN, [])
        final = np.array(assigned.split)
        drawn, report = draw(rules, papers["primary"].to_numpy().astype(str), final, rank)
        if not drawn:
            name, entry = next(iter(report.items()))
            others = f" and {len(report) - 1} more" if len(report) > 1 else ""
            raise UserError(
                f"{corpus} has papers enough for none of the mixtures ({name}: {entry['reason']}{others}): ingest more "
                "papers, or give mixtures of this corpus (--mixtures)."
            )
        _write_papers(Path(corpus), assigned, folder.path)
        _write_mixtures(ids, drawn, folder.path)
        audit = {
            "rule": rule.RULE,
            "key": key,
            "after": after,
            "text_form": TEXT_FORM,
            "inputs": inputs,
            **_counts(papers, final),
            "duplicates": _duplicates(ids, duplicates, assigned, ~papers["withdrawn"].to_numpy(), threshold),
            "excluded": _excluded(ids, assigned),
            "mixtures": report,
            "leakage_check": verify_no_leakage(folder.path, threshold),
        }
        (folder.path / "audit.json").write_text(json.dumps(audit, indent=1), encoding="utf-8")
        seconds = time.monotonic() - started
        folder.stats["seconds"] = round(seconds, 3)
        folder.stats["papers_per_second"] = round(len(papers) / seconds, 1)
        folder.stats["peak_memory_bytes"] = peak_memory_bytes()
    for name, entry in report.items():
        if not entry["available"]:
            log.warning("mixture %s is left out: %s", name, entry["reason"])
    log.info("split %s papers: %s", f"{len(papers):,}", audit["papers"])
    return read_manifest(out)


def _day(after: str | None) -> int | None:
    if after is None:
        return None
    try:
        return (date.fromisoformat(after) - _EPOCH).days
    except ValueError as e:
        raise UserError(f"after is {after!r}, not a date: write it as 2024-08-22.") from e


def _read(corpus: Path) -> pa.Table:
    """The columns that decide, without the texts."""
    path = corpus / "papers.parquet"
    if not path.is_file():
        raise UserError(f"{corpus} holds no papers.parquet: ingest the corpus again.")
    schema = pq.read_schema(path)
    if not schema.equals(SCHEMA):
        different = sorted(set(map(str, schema)) ^ set(map(str, SCHEMA)))
        raise UserError(f"{path} has other columns than this version reads ({', '.join(different)}): ingest again.")
    form = (schema.metadata or {}).get(b"text_form", b"none").decode()
    if form != TEXT_FORM:
        raise UserError(f"{path} has its texts in the form {form}, not {TEXT_FORM}: ingest the corpus again.")
    papers = pq.read_table(path, columns=["id", "primary", "date", "withdrawn"])
    if not len(papers):
        raise UserError(f"{corpus} holds no papers: ingest a source that has some.")
    repeated = [i for i, n in Counter(papers["id"].to_pylist()).items() if n > 1]
    if repeated:
        raise UserError(f"{path} holds {repeated[0]} more than once: ingest the corpus again.")
    if papers["withdrawn"].to_numpy().all():
        raise UserError(f"{corpus} holds withdrawn papers only: ingest a source that has others.")
    return papers


def _abstracts(corpus: Path) -> Iterator[list[str]]:
    for batch in pq.ParquetFile(corpus / "papers.parquet").iter_batches(batch_size=4096, columns=["abstract"]):
        yield batch.column(0).to_pylist()


def _pins(previous: Path, key: str, last_day: int | None) -> dict[str, tuple[str, str]]:
    """id -> (split, cluster) of what `previous` decided; a withdrawn paper was left out, not assigned."""
    config = read_manifest(previous).config
    for name, now in (("rule", rule.RULE), ("key", key), ("text_form", TEXT_FORM)):
        if config.get(name) != now:
            raise UserError(
                f"{previous} was made with {name} {config.get(name)!r}, not {now!r}: keep to one, or leave it out."
            )
    table = pq.read_table(previous / "papers.parquet", columns=["id", "split", "cluster", "date", "withdrawn"])
    pins = {}
    for row in table.to_pylist():
        newer = last_day is not None and (row["date"] - _EPOCH).days > last_day
        if row["split"] != rule.EXCLUDED and (row["split"] == rule.HOLDOUT) != newer:
            raise UserError(
                f"{previous} has {row['id']} of {row['date']} in {row['split']}, which the hold-out date given now "
                f"contradicts: give the date of the previous split."
            )
        if not row["withdrawn"]:
            pins[row["id"]] = (row["split"], row["cluster"])
    return pins


def _write_papers(corpus: Path, assigned: Assignment, folder: Path) -> None:
    extra = [pa.field("split", pa.string(), nullable=False), pa.field("cluster", pa.string(), nullable=False)]
    schema = pa.schema([*SCHEMA, *extra], metadata=SCHEMA.metadata)
    done = 0
    with pq.ParquetWriter(folder / "papers.parquet", schema, compression="zstd") as writer:
        for batch in pq.ParquetFile(corpus / "papers.parquet").iter_batches(batch_size=16384):
            rows = slice(done, done + len(batch))
            columns = [*batch.columns, pa.array(assigned.split[rows]), pa.array(assigned.cluster[rows])]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            done += len(batch)


def _write_mixtures(ids: list[str], drawn: dict[str, dict[str, np.ndarray]], folder: Path) -> None:
    fields = [pa.field(name, pa.string(), nullable=False) for name in ("mixture", "split", "id")]
    named = pa.array(ids)
    with pq.ParquetWriter(folder / "mixtures.parquet", pa.schema(fields), compression="zstd") as writer:
        for mixture, splits in drawn.items():
            for s, rows in splits.items():
                columns = [pa.repeat(mixture, len(rows)), pa.repeat(s, len(rows)), named.take(pa.array(rows))]
                writer.write_batch(pa.record_batch(columns, schema=pa.schema(fields)))


def _counts(papers: pa.Table, final: np.ndarray) -> dict[str, Any]:
    """How many papers each split has, as a share of those assigned by hash, and by primary category."""
    counts = {s: int((final == s).sum()) for s in (*rule.SPLITS, rule.EXCLUDED)}
    assigned = sum(counts[s] for s in rule.SHARES)
    by_category: dict[str, dict[str, int]] = {}
    for (category, s), n in sorted(Counter(zip(papers["primary"].to_pylist(), final.tolist(), strict=True)).items()):
        by_category.setdefault(category, {})[s] = n
    return {
        "papers": {"all": len(papers), **counts},
        "ratios": {s: round(counts[s] / max(assigned, 1), 6) for s in rule.SHARES},
        "categories": by_category,
    }


def _duplicates(
    ids: list[str], duplicates: Duplicates, assigned: Assignment, included: np.ndarray, threshold: float
) -> dict[str, Any]:
    """What the papers that are not withdrawn repeat; withdrawal notices are all alike and would drown it."""
    clusters = [n for n in Counter(np.array(assigned.cluster)[included].tolist()).values() if n > 1]
    times = np.bincount(duplicates.text[included], minlength=len(duplicates.row))
    repeated = np.flatnonzero(times > 1)
    of_text = np.full(len(duplicates.row), -1)
    of_text[duplicates.text[included][::-1]] = np.flatnonzero(included)[::-1]  # the first paper included of each text
    both = (of_text[duplicates.pairs] >= 0).all(axis=1)
    pairs, similarity = duplicates.pairs[both], duplicates.similarity[both]
    highest = np.lexsort((pairs[:, 1], pairs[:, 0], -similarity))[:_EXAMPLES]
    return {
        "clusters": {"of_several_papers": len(clusters), "papers": sum(clusters), "largest": max(clusters, default=1)},
        "exact": {
            "texts": len(repeated),
            "papers": int(times[repeated].sum()),
            "examples": [
                [ids[i] for i in np.flatnonzero((duplicates.text == t) & included)[:5]] for t in repeated[:_EXAMPLES]
            ],
        },
        "near": {
            "method": f"MinHash of {SHINGLE_WORDS}-word shingles, {PERMUTATIONS} permutations, "
            f"{PERMUTATIONS // ROWS} bands of {ROWS}; similarity of the shingle sets themselves",
            "threshold": threshold,
            "pairs": len(pairs),
            "texts": len(np.unique(pairs)),
            "examples": [
                {"ids": [ids[of_text[t]] for t in pairs[k]], "similarity": round(float(similarity[k]), 4)}
                for k in highest
            ],
        },
    }


def _excluded(ids: list[str], assigned: Assignment) -> dict[str, Any]:
    """Every paper that is in no split, with the reason; withdrawn ones are counted only."""
    reasons = sorted(assigned.reasons.items())
    return {
        "counts": dict(sorted(Counter(reason for _, (reason, _) in reasons).items())),
        "papers": [
            {"id": ids[i], "reason": reason, "near": near} for i, (reason, near) in reasons if reason != rule.WITHDRAWN
        ],
    }
