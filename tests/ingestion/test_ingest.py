import gzip
import json
import random
import subprocess
import sys
from datetime import date

import pyarrow.parquet as pq
import pytest

from feyntune.artifacts.artifact import is_artifact, open_artifact
from feyntune.artifacts.records import SCHEMA, normal_form
from feyntune.errors import UserError
from feyntune.ingestion import sorting
from feyntune.ingestion.ingest import ingest
from feyntune.ingestion.synthetic import synthetic_records

RECORDS = list(synthetic_records(400, seed=7))


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return f"kaggle:{path}"


def papers(folder):
    return pq.read_table(folder / "papers.parquet").to_pylist()


def test_a_corpus_holds_what_the_records_say(tmp_path):
    source = write(tmp_path / "s.json", RECORDS)
    manifest = ingest(source, tmp_path / "c")
    assert open_artifact(tmp_path / "c", "corpus") == manifest
    table = pq.read_table(tmp_path / "c" / "papers.parquet")
    assert table.schema == SCHEMA
    assert table.schema.metadata == SCHEMA.metadata
    got = table.to_pylist()
    assert [p["id"] for p in got] == sorted(r["id"] for r in RECORDS)
    by_id = {r["id"]: r for r in RECORDS}
    for p in got:
        record = by_id[p["id"]]
        assert p["abstract"] == normal_form(record["abstract"])
        assert p["categories"] == record["categories"].split()
        assert p["license"] == record["license"]
        created = record["versions"][0]["created"].split()
        assert (p["date"].day, p["date"].year) == (int(created[1]), int(created[3]))
        assert p["source"] == "kaggle"
    counts = json.loads((tmp_path / "c" / "counts.json").read_text())
    assert counts["read"] == counts["kept"] == sum(counts["by_primary"].values()) == 400
    assert counts["withdrawn"] == sum(p["withdrawn"] for p in got) == 4
    assert counts["dates"] == [min(p["date"] for p in got).isoformat(), max(p["date"] for p in got).isoformat()]


def test_the_digest_depends_on_the_records_and_not_on_order_packing_or_place(tmp_path):
    first = ingest(write(tmp_path / "a.json", RECORDS), tmp_path / "1")
    shuffled = random.Random(0).sample(RECORDS, len(RECORDS))
    data = "".join(json.dumps(r) + "\n" for r in shuffled).encode()
    (tmp_path / "b.gz").write_bytes(gzip.compress(data))
    assert ingest(f"kaggle:{tmp_path / 'b.gz'}", tmp_path / "2").digest == first.digest
    other = ingest(write(tmp_path / "c.json", RECORDS[1:]), tmp_path / "3")
    assert other.digest != first.digest


def test_until_is_inclusive_and_goes_by_version_1(tmp_path):
    records = [dict(r) for r in RECORDS[:3]]
    for record, day in zip(records, ("21", "22", "23"), strict=True):
        record["versions"] = [
            {"version": "v1", "created": f"Thu, {day} Aug 2024 23:59:59 GMT"},
            {"version": "v2", "created": "Fri, 3 Jan 2025 00:00:00 GMT"},
        ]
    ingest(write(tmp_path / "s.json", records), tmp_path / "c", until="2024-08-22")
    assert sorted(p["date"] for p in papers(tmp_path / "c")) == [date(2024, 8, 21), date(2024, 8, 22)]
    counts = json.loads((tmp_path / "c" / "counts.json").read_text())
    assert counts["left_out"] == {"first submitted after the cut-off": 1}


def test_of_records_with_one_id_the_newest_stays(tmp_path):
    old, new = dict(RECORDS[0]), dict(RECORDS[0])
    old["update_date"], new["update_date"], new["title"] = "2011-01-01", "2012-01-01", "The newer title"
    for order in ([old, new], [new, old]):
        out = tmp_path / f"c{order.index(new)}"
        ingest(write(tmp_path / "s.json", order), out)
        assert [p["title"] for p in papers(out)] == ["The newer title"]
        assert json.loads((out / "counts.json").read_text())["left_out"] == {"older record of a paper met again": 1}


def test_many_small_runs_and_ranges_give_the_same_corpus(tmp_path, monkeypatch):
    records = random.Random(1).sample(RECORDS * 2, 800)
    whole = ingest(write(tmp_path / "s.json", records), tmp_path / "1")
    for name, value in (("_ROWS", 7), ("_RUN_BYTES", 30_000), ("_RUN_GROUP", 5), ("_RANGE", 40)):
        monkeypatch.setattr(sorting, name, value)
    ingest(f"kaggle:{tmp_path / 's.json'}", tmp_path / "2")
    assert papers(tmp_path / "2") == papers(tmp_path / "1")
    one, two = ((tmp_path / n / "counts.json").read_text() for n in "12")
    assert one == two
    assert whole.kind == "corpus"


def test_too_many_bad_records_stop_the_step_and_what_was_read_is_kept(tmp_path):
    source = write(tmp_path / "s.json", [*RECORDS, {"id": "0704.0001"}])
    with pytest.raises(UserError, match=r"1 of 401 .* bad.*0\.10%.*no categories: s\.json:401.*--max-bad.*partial"):
        ingest(source, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    assert len(papers(tmp_path / "c.partial")) == 400
    assert not is_artifact(tmp_path / "c.partial")
    ingest(source, tmp_path / "c", max_bad=0.01)
    counts = json.loads((tmp_path / "c" / "counts.json").read_text())
    assert counts["refused"] == {"no categories": {"count": 1, "examples": ["s.json:401"]}}


def test_what_was_read_of_a_file_cut_short_is_kept(tmp_path):
    path = tmp_path / "s.json"
    write(path, RECORDS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short in line 400"):
        ingest(f"kaggle:{path}", tmp_path / "c")
    assert len(papers(tmp_path / "c.partial")) == 399


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("kaggle", {}, "write kaggle:FILE"),
        ("ftp:x", {}, "write kaggle:FILE"),
        ("synthetic:many", {}, "whole numbers"),
        ("synthetic:5", {"until": "22.08.2024"}, "not a day"),
        ("synthetic:5", {"until": "2024-02-30"}, "not a day"),
        ("synthetic:5", {"max_bad": 2}, "between 0 and 1"),
        ("synthetic:5", {"categories": ["nlin"]}, "none of the 5 records"),
        ("oai:example.org", {}, "not a web address"),
        ("oai:http://127.0.0.1:9/oai", {"prefix": "arXiv"}, "Unicode"),
        ("oai:http://127.0.0.1:9/oai", {"prefix": "oai_dc"}, "use arXivRaw"),
    ],
)
def test_wrong_arguments_get_one_clear_sentence(tmp_path, source, options, says):
    with pytest.raises(UserError, match=says):
        ingest(source, tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


def test_a_synthetic_corpus_is_marked_as_such(tmp_path):
    one = ingest("synthetic:50", tmp_path / "1")
    assert {p["source"] for p in papers(tmp_path / "1")} == {"synthetic"}
    assert ingest("synthetic:50", tmp_path / "2").digest == one.digest
    assert ingest("synthetic:50:1", tmp_path / "3").digest != one.digest


def test_ingest_needs_no_heavy_package():
    code = "import sys, feyntune.ingestion.ingest, feyntune.ingestion.kaggle, feyntune.ingestion.synthetic\n"
    code += "print([m for m in ('torch', 'transformers', 'kfp', 'lxml', 'urllib3.poolmanager_') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
