import gzip
import json
import zipfile

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from feyntune.errors import UserError
from feyntune.ingestion import kaggle
from feyntune.ingestion.fields import BadRecord, CategoryFilter
from feyntune.ingestion.kaggle import read_kaggle, read_lines
from feyntune.ingestion.synthetic import synthetic_records
from feyntune.ingestion.tally import Tally

RECORDS = list(synthetic_records(300, seed=5))
LINES = [json.dumps(r).encode() + b"\n" for r in RECORDS]


def read(path, names=None):
    tally = Tally()
    return [r.paper for r in read_kaggle(path, CategoryFilter(names), tally)], tally


def papers_of(path, names=None):
    return read(path, names)[0]


def test_all_packings_give_the_same_papers(tmp_path):
    data = b"".join(LINES)
    plain, packed = tmp_path / "a.json", {}
    plain.write_bytes(data)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(data))
    (tmp_path / "a.json.zst").write_bytes(zstandard.compress(data[:5000]) + zstandard.compress(data[5000:]))
    with zipfile.ZipFile(tmp_path / "archive.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("arxiv-metadata-oai-snapshot.json", data)
    expected = papers_of(plain)
    assert len(expected) == 300
    for name in ("a.json.gz", "a.json.zst", "archive.zip"):
        packed[name] = papers_of(tmp_path / name)
        assert packed[name] == expected, name


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "HTML page"),
        (b"<?xml version='1.0'?><feed/>", "XML"),
        (b'[{"id": "0704.0001"}]', "JSON array"),
        ("{}".encode("utf-16"), "UTF-16"),
        (b"PK\x03\x04rest of it is missing", "damaged"),
        (b"\x1f\x8bnot gzip", "damaged"),
    ],
)
def test_a_file_that_is_something_else_is_named_for_what_it_is(tmp_path, content, says):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        papers_of(path)


def test_a_wrong_path_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        papers_of(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="is a folder"):
        papers_of(tmp_path)


@pytest.mark.parametrize("pack", [lambda d: d, gzip.compress, zstandard.compress])
def test_a_file_cut_short_is_refused_after_its_whole_lines(tmp_path, pack):
    data = pack(b"".join(json.dumps(r).encode() + b"\n" for r in synthetic_records(3000)))
    path = tmp_path / "x.json"
    path.write_bytes(data[: len(data) // 2])
    rows = read_kaggle(path, CategoryFilter(None), Tally())
    assert next(rows).paper.abstract
    with pytest.raises(UserError, match="cut short"):
        list(rows)


def test_bad_lines_are_counted_with_line_and_reason(tmp_path):
    no_abstract = {k: v for k, v in RECORDS[0].items() if k != "abstract"}
    lines = [
        LINES[0],
        b'{"id": "broken\n',
        LINES[1],
        json.dumps(no_abstract).encode() + b"\n",
        b"\n",
        b"[1]\n",
        LINES[2],
    ]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(lines))
    papers, tally = read(path)
    assert [p.id for p in papers] == [r["id"] for r in RECORDS[:3]]
    assert tally.read == 6
    assert tally.examples == {
        "not JSON": ["x.jsonl:2"],
        "no abstract": ["x.jsonl:4"],
        "not a JSON object": ["x.jsonl:6"],
    }


def test_line_numbers_go_on_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(kaggle, "_BLOCK", 1000)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join([*LINES[:200], b"{broken}\n", *LINES[200:]]))
    papers, tally = read(path, ["hep-th"])
    assert tally.examples == {"not JSON": ["x.jsonl:201"]}
    assert tally.read == 301
    assert len(papers) == sum(r["categories"].split()[0] == "hep-th" for r in RECORDS)


def test_a_line_without_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(kaggle, "_BLOCK", 1000)
    monkeypatch.setattr(kaggle, "_LONGEST_LINE", 5000)
    path = tmp_path / "x.jsonl"
    path.write_bytes(LINES[0] + b'{"id": "' + b"x" * 50_000 + b'"}\n' + LINES[1])
    papers, tally = read(path)
    assert [p.id for p in papers] == [RECORDS[0]["id"], RECORDS[1]["id"]]
    assert tally.refused["not JSON"] > 1


def test_a_source_that_is_mostly_bad_is_given_up_early(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"some": "other data"}\n' * 1_000_000)
    tally = Tally()
    with pytest.raises(UserError, match="first 1000"):
        list(read_kaggle(path, CategoryFilter(None), tally))
    assert tally.read == 1000


CATEGORIES = [
    "hep-th",
    "hep-ph hep-th",
    "cs.LG",
    "physics.optics",
    "chao-dyn",
    "hep-thx",
    "hep-th\u00a0x",
    "",
    " hep-th",
]
TEXTS = [
    "plain",
    '"categories":"hep-th"',
    '\\"categories":"cs.LG"',
    'the key "categories" : "hep-th", twice "categories"',
    "a\\",
    "categories",
]


@st.composite
def awkward_line(draw):
    record = dict(RECORDS[0])
    record["categories"] = draw(st.sampled_from([*CATEGORIES, None, 3]))
    record["abstract"] = draw(st.sampled_from(TEXTS))
    record["title"] = draw(st.sampled_from(TEXTS))
    if draw(st.booleans()):
        record = {"meta": {"categories": draw(st.sampled_from(CATEGORIES))}, **record}
    if draw(st.booleans()):
        record[draw(st.sampled_from(['x"categories', "xcategories", "categories ", "\\categories"]))] = "cs.LG"
    if draw(st.booleans()):
        record = dict(draw(st.permutations(list(record.items()))))
    if draw(st.booleans()):
        del record["categories"]
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" , ", " : ")]))
    line = json.dumps(record, separators=separators, ensure_ascii=draw(st.booleans()))
    if draw(st.booleans()):
        line = line[:-1] + ', "categories": "hep-th"}'  # twice: the last one counts
    if draw(st.integers(0, 9)) == 0:
        line = line[: len(line) // 2]
    return line.encode() + draw(st.sampled_from([b"\n", b"\r\n"]))


@settings(max_examples=300, deadline=None)
@given(lines=st.lists(awkward_line(), max_size=4), names=st.sampled_from([["hep-th"], ["cs"], ["nlin", "cs.LG"]]))
def test_passing_over_lines_undecoded_keeps_the_papers_that_decoding_all_keeps(lines, names):
    categories, expected = CategoryFilter(names), []
    for line in lines:
        try:
            row = kaggle._row(line, "kaggle")
        except BadRecord:
            continue
        if categories.accepts(row.paper.primary):
            expected.append(row)
    tally = Tally()
    assert list(read_lines([b"".join(lines)], "x", categories, tally)) == expected
    assert tally.read == len(lines)
    assert tally.read == len(expected) + tally.left_out.total() + tally.refused.total()


def test_lines_of_other_categories_are_not_decoded(monkeypatch):
    decoded = []
    row = kaggle._row
    monkeypatch.setattr(kaggle, "_row", lambda line, source: decoded.append(line) or row(line, source))
    rows = list(read_lines([b"".join(LINES)], "x", CategoryFilter(["gr-qc"]), Tally()))
    assert 0 < len(rows) == len(decoded) < 100
