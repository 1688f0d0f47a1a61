"""Files as people have them: zips of other programs, JSON lines of other libraries, notices in every wording."""

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import tarfile
import zipfile

import pyarrow.parquet as pq
import pytest

from feyntune.artifacts.artifact import read_manifest
from feyntune.errors import UserError
from feyntune.ingestion.fields import is_withdrawn
from feyntune.ingestion.ingest import ingest
from feyntune.ingestion.synthetic import synthetic_records

RECORDS = [{**r, "license": None, "comments": None} for r in synthetic_records(40)]
LINES = "".join(json.dumps(r) + "\n" for r in RECORDS).encode()
NAME = "arxiv-metadata-oai-snapshot.json"


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def patched(flags: int, method: int) -> bytes:
    raw = bytearray(zipped(**{NAME: LINES}))
    central = raw.index(b"PK\x01\x02")
    struct.pack_into("<HH", raw, 6, flags, method)
    struct.pack_into("<HH", raw, central + 8, flags, method)
    return bytes(raw)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (patched(0, 9), "packed by Deflate64"),
        (patched(0, 98), "packed by PPMd"),
        (patched(1, 8), "protected by a password"),
        (zipped(**{"a.json": LINES, "b.json": LINES}), "must hold one"),
        (zipped(**{"a.csv": b"x"}), "it holds: a.csv"),
    ],
    ids=["Deflate64", "PPMd", "password", "several", "none"],
)
def test_a_zip_that_cannot_be_read_is_one_sentence(tmp_path, data, message):
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=message):
        ingest(f"kaggle:{tmp_path / 'a.zip'}", tmp_path / "c")


@pytest.mark.parametrize(
    "members",
    [
        {f"archive/{NAME}": LINES},
        {NAME: LINES, "readme.json": b"{}"},
        {"My File.JSON": LINES, "__MACOSX/._My File.JSON": b"x", "._My File.JSON": b"x"},
    ],
    ids=["folder", "beside", "mac"],
)
def test_a_folder_inside_and_files_beside_do_no_harm(tmp_path, members):
    (tmp_path / "a.zip").write_bytes(zipped(**members))
    ingest(f"kaggle:{tmp_path / 'a.zip'}", tmp_path / "c")
    assert pq.read_table(tmp_path / "c/papers.parquet").num_rows == 40


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress, gzip.compress], ids=["bz2", "xz", "gz"])
def test_every_usual_compression_is_unpacked(tmp_path, pack):
    (tmp_path / "packed").write_bytes(pack(LINES[:300]) + pack(LINES[300:]))  # as parallel programs write it
    ingest(f"kaggle:{tmp_path / 'packed'}", tmp_path / "c")
    assert json.loads((tmp_path / "c/counts.json").read_text())["read"] == len(RECORDS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"7z\xbc\xaf\x27\x1c....", "is a 7-Zip archive"),
        (b"PAR1....", "is a Parquet file"),
        (b"%PDF-1.7", "is a PDF"),
        (b"id,title,abstract\n1,2,3\n", "begins with 'id,title,abstract"),
        (gzip.compress(gzip.compress(LINES)), "is compressed twice"),
        (json.dumps(RECORDS[0], indent=1).encode(), r"over several lines, .* `jq -c \.`"),
        (LINES.decode().encode("utf-16-le"), "is UTF-16"),
        (zipped(), "it holds: nothing"),
        (zipped(**{f"{NAME}.gz": gzip.compress(LINES)}), rf"it holds: {NAME}\.gz"),
        (LINES.replace(b"\n", b""), "more than one JSON object on the line"),
        (LINES.replace(b"\n", b"\r"), "more than one JSON object on the line"),
        (LINES.replace(b"\n", b",\n"), "more than one JSON object on the line"),
        (b'{"title": "\xe9"}\n', "not UTF-8"),
        (json.dumps({**RECORDS[0], "id": 704.1}).encode(), "an id that is a number, which has lost its zeros"),
        (json.dumps({**RECORDS[0], "categories": "hep-th, cs.LG"}).encode(), "not words with spaces between"),
        (json.dumps({**RECORDS[0], "categories": "['hep-th']"}).encode(), "not words with spaces between"),
    ],
)
def test_what_is_no_snapshot_is_said_to_be_what_it_is(tmp_path, data, message):
    (tmp_path / "file").write_bytes(data)
    for categories in (None, ["hep-th"]):  # with categories most lines are never decoded
        with pytest.raises(UserError, match=message):
            ingest(f"kaggle:{tmp_path / 'file'}", tmp_path / "c", categories=categories)


def test_a_tar_archive_is_said_to_be_one(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo(NAME)
        member.size = len(LINES)
        archive.addfile(member, io.BytesIO(LINES))
    with pytest.raises(UserError, match="is a tar archive"):
        ingest(f"kaggle:{tmp_path / 'a.tar.gz'}", tmp_path / "c")


@pytest.mark.parametrize("kind", ["kaggle", "jsonl", "atom"])
@pytest.mark.parametrize("where", ["https://example.org/a.json", "s3://bucket/a.json", "file:///a.json"])
def test_an_address_in_place_of_a_file_is_one_sentence_and_leaves_nothing(tmp_path, kind, where):
    with pytest.raises(UserError, match="is an address, and a file of this machine is needed"):
        ingest(f"{kind}:{where}", tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a regular file"):
        ingest(f"kaggle:{tmp_path / 'pipe'}", tmp_path / "c")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert ingest("kaggle:~/a.jsonl", tmp_path / "c").kind == "corpus"


@pytest.mark.parametrize(
    "change",
    [
        lambda r: {"doi": float("nan"), "license": float("nan"), "comments": float("inf")},
        lambda r: {"categories": r["categories"].split()},
        lambda r: {"categories": [r["categories"]]},
    ],
    ids=["NaN for null", "a list of categories", "a list of one text"],
)
def test_json_lines_of_other_libraries_give_the_same_papers(tmp_path, change):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({**r, **change(r)}) + "\n" for r in RECORDS))
    ingest(f"kaggle:{tmp_path / 'a.jsonl'}", tmp_path / "a")
    ingest(f"kaggle:{tmp_path / 'b.jsonl'}", tmp_path / "b")
    assert pq.read_table(tmp_path / "a/papers.parquet").equals(pq.read_table(tmp_path / "b/papers.parquet"))


def test_versions_without_dates_are_refused_for_what_they_are(tmp_path):
    lines = "".join(json.dumps({**r, "versions": ["v1", "v2"]}) + "\n" for r in RECORDS)
    (tmp_path / "a.jsonl").write_text(lines)
    with pytest.raises(UserError, match="versions is a list of names without dates"):
        ingest(f"kaggle:{tmp_path / 'a.jsonl'}", tmp_path / "c")


def test_any_corpus_with_id_text_date_and_category(tmp_path):
    rows = [
        {"id": 7, "text": "Hearts  beat.", "date": "2024-01-02", "category": "cardiology"},
        {"id": "pmid:8", "abstract": "Bones hold.", "date": "2024-01-03T10:00:00Z", "categories": ["Ortho.spine", "x"]},
        {"id": "9", "text": "gone", "date": "2024-01-04", "category": "cardiology", "withdrawn": True, "title": "T"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    ingest(f"jsonl:{tmp_path / 'a.jsonl'}", tmp_path / "c")
    papers = pq.read_table(tmp_path / "c/papers.parquet").to_pylist()
    assert [(p["id"], p["primary"], p["abstract"], p["withdrawn"]) for p in papers] == [
        ("7", "cardiology", "Hearts beat.", False),
        ("9", "cardiology", "gone", True),
        ("pmid:8", "Ortho.spine", "Bones hold.", False),
    ]
    ingest(f"jsonl:{tmp_path / 'a.jsonl'}", tmp_path / "d", categories=["Ortho"])
    assert json.loads((tmp_path / "d/counts.json").read_text())["kept"] == 1
    assert read_manifest(tmp_path / "d").config["source"] == "jsonl"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "t", "date": "2024-01-02", "category": "x"}, "no id"),
        ({"id": "a", "date": "2024-01-02", "category": "x"}, "no text"),
        ({"id": "a", "text": "t", "date": "2024-01-02"}, "no category"),
        ({"id": "a", "text": "t", "date": "yesterday", "category": "x"}, "not a date"),
        ({"id": "a", "text": "t", "date": 1577836800000, "category": "x"}, "a date that is a number"),
        ({"id": "a", "text": "t", "date": "2020-01-31", "category": "Machine Learning"}, "a category that is not"),
        ({"id": "a b", "text": "t", "date": "2024-01-02", "category": "x"}, "not one word"),
        ({"id": "a", "text": "t", "date": "2024-01-02", "category": "a/b"}, "a category that is not"),
    ],
)
def test_a_record_of_any_corpus_that_cannot_be_used_says_why(tmp_path, record, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=message):
        ingest(f"jsonl:{tmp_path / 'a.jsonl'}", tmp_path / "c")


NOTICES = [
    "This paper has been withdrawn by the author due to an error in Eq. (12).",
    "THIS PAPER HAS BEEN WITHDRAWN BY THE AUTHORS.",
    "This article has been removed by arXiv administrators because the submitter did not have the right to agree.",
    "This submission has been retracted by the authors because the main theorem is false.",
    "Paper withdrawn due to an error",
    "Withdrawn: superseded by a later paper",
    "The paper is withdrawn because Lemma 2 is wrong",
    "We withdraw this paper",
    "The author has withdrawn this paper",
    "This manuscript has been temporarily withdrawn",
    "[Withdrawn] see comments",
    "We are withdrawing this paper because of an error in Lemma 2",
    "This paper has been superseded by arXiv:1234.5678 and is withdrawn",
    "The author withdraws this paper",
    "This paper has been with- drawn by the author",
]
PAPERS = [
    "We model how fast a drug is cleared after it was withdrawn from the market.",
    "When the needle is withdrawn from the tissue the strain relaxes.",
    "We analyze retracted papers in biomedicine.",
    "The dataset of withdrawn arXiv papers is released.",
    "Retracted onto the boundary of the disk, the map is smooth.",
    "Withdrawn from the grid, power falls.",
    "The space is retracted by the authors' algorithm.",
    "Of 500 drugs withdrawn by regulators, 30 were cardiotoxic.",
    "We count manuscripts withdrawn by authors before a decision.",
    "The claims were retracted by the authors of Ref. [3].",
    "The background was removed by the first author with a mask.",
    "In this letter we have withdrawn a fiber from a bath.",
]
COMMENTS = {
    "Withdrawn by arXiv administrators because of disputed authorship": True,
    "12 pages, withdrawn": True,
    "This submission has been removed by arXiv administrators": True,
    "v2 replaces the withdrawn arXiv:2212.00001; 12 pages": False,
    "Replaces previously withdrawn arXiv:1; 3 figures": False,
    "v3: a claim of v2 is retracted": False,
    "This paper has been withdrawn due to an error in Theorem 2": True,
    "Withdrawn. Merged into arXiv:1234.5678": True,
    "withdrawn from arXiv": True,
    "an earlier version of this paper was withdrawn because of an error; this one is corrected": False,
    "Section 5 withdrawn; other results unaffected": False,
    "An erroneous statement in Sec. 2 was withdrawn": False,
    "This paper has been withdrawn from consideration at PRL; expanded": False,
    "withdrawn from PRL, submitted to PRD": False,
}


@pytest.mark.parametrize("text", NOTICES)
def test_a_notice_in_place_of_an_abstract_is_recognized(text):
    assert is_withdrawn(None, text)


@pytest.mark.parametrize("text", PAPERS)
def test_a_paper_about_what_is_withdrawn_is_a_paper(text):
    assert not is_withdrawn("9 pages", text)


@pytest.mark.parametrize("comments", COMMENTS)
def test_comments_speak_of_this_paper_or_of_another(comments):
    assert is_withdrawn(comments, "We study x.") is COMMENTS[comments]
