import json
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from feyntune.artifacts.artifact import ArtifactError, is_artifact, open_artifact, write_artifact
from feyntune.artifacts.records import SCHEMA
from feyntune.errors import UserError
from feyntune.splitting.audit import verify_no_leakage
from feyntune.splitting.duplicates import THRESHOLD, jaccard, shingles
from feyntune.splitting.split import split
from tests.splitting.conftest import paper, synthetic_papers, write_corpus


@pytest.fixture(scope="module")
def papers():
    return synthetic_papers(1000, seed=5)


@pytest.fixture(scope="module")
def made(tmp_path_factory, papers):
    """A corpus of a thousand synthetic papers and its split."""
    folder = tmp_path_factory.mktemp("made")
    corpus = write_corpus(folder / "corpus", papers)
    split(corpus, folder / "split")
    return folder


def table(folder, name="papers"):
    return pq.read_table(folder / f"{name}.parquet")


def splits_of(folder):
    t = table(folder)
    return dict(zip(t["id"].to_pylist(), t["split"].to_pylist(), strict=True))


def audit_of(folder):
    return json.loads((folder / "audit.json").read_text())


def test_the_folder_is_what_the_contract_says(made, papers):
    manifest = open_artifact(made / "split", "split")
    assert sorted(manifest.files) == ["audit.json", "mixtures.parquet", "papers.parquet"]
    assert manifest.inputs == {"corpus": open_artifact(made / "corpus").digest}
    t = table(made / "split")
    assert t.schema.names == [*SCHEMA.names, "split", "cluster"]
    assert t.select(SCHEMA.names).equals(table(made / "corpus"))
    assert table(made / "split", "mixtures").schema.names == ["mixture", "split", "id"]


def test_a_thousand_papers_supply_all_ten_mixtures(made):
    assert all(m["available"] for m in audit_of(made / "split")["mixtures"].values())


def test_withdrawn_papers_are_dropped_and_counted(made, papers):
    withdrawn = {p.id for p in papers if p.withdrawn}
    assert withdrawn
    assert {splits_of(made / "split")[i] for i in withdrawn} == {"excluded"}
    assert not withdrawn & set(table(made / "split", "mixtures")["id"].to_pylist())
    assert audit_of(made / "split")["excluded"]["counts"]["withdrawn"] == len(withdrawn)


def test_every_pair_of_near_duplicates_is_in_one_split_by_brute_force(made, papers):
    assigned = splits_of(made / "split")
    shingled = [(assigned[p.id], shingles(p.abstract)) for p in papers if assigned[p.id] != "excluded"]
    near = [(x, y) for k, (x, a) in enumerate(shingled) for y, b in shingled[:k] if jaccard(a, b) >= THRESHOLD]
    assert len(near) > 8
    assert all(x == y for x, y in near)


def test_the_audit_counts_what_is_written(made, papers):
    audit, t = audit_of(made / "split"), table(made / "split")
    for s in ("train", "validation", "test", "holdout", "excluded"):
        assert audit["papers"][s] == t["split"].to_pylist().count(s)
        assert sum(c.get(s, 0) for c in audit["categories"].values()) == audit["papers"][s]
    assert sum(audit["ratios"].values()) == pytest.approx(1, abs=1e-5)
    assert audit["duplicates"]["exact"]["texts"] >= 4
    assert audit["duplicates"]["near"]["pairs"] >= 8
    assert audit["leakage_check"]["holds"]
    mixtures = table(made / "split", "mixtures")
    for name, entry in audit["mixtures"].items():
        of_it = mixtures.filter(pc.equal(mixtures["mixture"], name))["split"].to_pylist()
        assert {s: of_it.count(s) for s in set(of_it)} == {s: e["papers"] for s, e in entry["sizes"].items()}


def test_the_same_corpus_gives_the_same_digest(made, tmp_path):
    again = split(made / "corpus", tmp_path / "again")
    assert again.digest == open_artifact(made / "split").digest


def test_another_key_is_another_split(made, tmp_path):
    other = split(made / "corpus", tmp_path / "other", key="another")
    assert other.digest != open_artifact(made / "split").digest
    assert splits_of(tmp_path / "other") != splits_of(made / "split")


def test_adding_later_papers_moves_nothing(made, papers, corpus, tmp_path):
    day = sorted(p.date for p in papers)[600]
    split(corpus(p for p in papers if p.date <= day), tmp_path / "old")
    before, after = splits_of(tmp_path / "old"), splits_of(made / "split")
    assert {i: after[i] for i in before} == before


def test_with_the_previous_split_adding_any_papers_moves_nothing(made, papers, corpus, tmp_path):
    split(corpus(papers[::2]), tmp_path / "old")
    split(made / "corpus", tmp_path / "new", previous=tmp_path / "old")
    before, after = splits_of(tmp_path / "old"), splits_of(tmp_path / "new")
    assert {i: after[i] for i in before} == before
    assert open_artifact(tmp_path / "new").inputs["previous"] == open_artifact(tmp_path / "old").digest


def test_a_paper_withdrawn_later_leaves_and_its_near_duplicates_stay(made, papers, corpus, tmp_path):
    clusters = table(made / "split").to_pylist()
    rows = [r for r in clusters if r["cluster"] != r["id"] and r["split"] != "excluded"]
    oldest = {r["cluster"] for r in rows}
    split(corpus(p._replace(withdrawn=p.withdrawn or p.id in oldest) for p in papers), tmp_path / "later")
    after = splits_of(tmp_path / "later")
    assert rows
    assert {r["id"]: after[r["id"]] for r in rows if r["id"] not in oldest} == {
        r["id"]: r["split"] for r in rows if r["id"] not in oldest
    }


def test_after_holds_newer_papers_out(papers, corpus, tmp_path):
    split(corpus(papers), tmp_path / "out", after="2018-12-31")
    for row in table(tmp_path / "out").to_pylist():
        if row["split"] != "excluded":
            assert (row["split"] == "holdout") == (row["date"].isoformat() > "2018-12-31")
    mixtures = table(tmp_path / "out", "mixtures")
    of_hep_th = mixtures.filter((pc.field("mixture") == "hep-th") & (pc.field("split") == "holdout"))
    assert of_hep_th.num_rows == audit_of(tmp_path / "out")["mixtures"]["hep-th"]["sizes"]["holdout"]["papers"] > 0


def broken(made, tmp_path, name, change):
    """A copy of the split whose file `name` was changed by `change`, as a fault in the step would write it."""
    folder = tmp_path / "broken"
    shutil.copytree(made / "split", folder)
    t = table(folder, name)
    rows = change(t.to_pylist())
    pq.write_table(pa.Table.from_pylist(rows, schema=t.schema), folder / f"{name}.parquet")
    return folder


def test_the_proof_holds_for_what_was_written(made):
    assert verify_no_leakage(made / "split")["near_duplicates_across_splits"] == 0


def test_the_proof_finds_near_duplicates_torn_apart(made, tmp_path):
    near = audit_of(made / "split")["duplicates"]["near"]["examples"][0]["ids"]

    def tear(rows):
        for row in rows:
            if row["id"] in near:
                row["split"] = ("train", "test")[near.index(row["id"])]
        return rows

    folder = broken(made, tmp_path, "papers", tear)
    drawn = table(folder, "mixtures")
    pq.write_table(drawn.filter(~pc.field("id").isin(near)), folder / "mixtures.parquet")
    with pytest.raises(UserError) as e:
        verify_no_leakage(folder)
    assert all(i in str(e.value) for i in near)
    assert "near-duplicates in different splits" in str(e.value)


def test_the_proof_finds_a_test_paper_in_a_training_set(made, tmp_path):
    drawn = table(made / "split", "mixtures").to_pylist()
    test = next(r["id"] for r in drawn if r["split"] == "test")
    folder = broken(
        made, tmp_path, "mixtures", lambda rows: [*rows, {"mixture": "hep-th+gr-qc", "split": "train", "id": test}]
    )
    with pytest.raises(UserError, match="another split than their own") as e:
        verify_no_leakage(folder)
    assert test in str(e.value)


def test_the_proof_finds_withdrawn_unknown_and_repeated_papers(made, papers, tmp_path):
    first = table(made / "split", "mixtures").to_pylist()[0]
    withdrawn = next(p.id for p in papers if p.withdrawn)
    for row, says in (
        ({**first, "id": withdrawn}, "are withdrawn"),
        ({**first, "id": "9999.99999"}, "not in papers.parquet"),
        (first, "drawn twice"),
    ):
        folder = broken(made, tmp_path, "mixtures", lambda rows, row=row: [*rows, row])
        with pytest.raises(UserError, match=says):
            verify_no_leakage(folder)
        shutil.rmtree(folder)


def test_the_proof_finds_what_a_blind_minhash_misses_and_the_step_leaves_nothing(made, tmp_path, monkeypatch):
    import feyntune.splitting.duplicates as duplicates

    blind = lambda signatures, threshold: duplicates.np.empty((0, 2), dtype=int)
    monkeypatch.setattr(duplicates, "_candidates", blind)
    with pytest.raises(UserError, match="near-duplicates in different splits"):
        split(made / "corpus", tmp_path / "out")
    assert not is_artifact(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_user_mixtures_are_drawn(made, tmp_path):
    own_mixtures = tmp_path / "mine.yaml"
    own_mixtures.write_text(
        "mixtures: [{name: half, parts: {hep-th: 50%, cs: 50%}, size: th}, {name: th, parts: {hep-th: all}}]"
    )
    split(made / "corpus", tmp_path / "out", mixtures=own_mixtures)
    assert set(table(tmp_path / "out", "mixtures")["mixture"].to_pylist()) == {"half", "th"}
    assert open_artifact(tmp_path / "out").config["mixtures"][0]["name"] == "half"


def texts(n, primary="hep-th", start=0):
    return [paper(f"{primary.split('.')[0]}/{9900000 + start + k}", f"word{k} " * 9, primary) for k in range(n)]


def test_a_corpus_without_hep_th_supplies_what_it_can_and_says_why_not_the_rest(corpus, tmp_path):
    split(corpus([*texts(60, "hep-ph"), *texts(60, "gr-qc")]), tmp_path / "out")
    mixtures = audit_of(tmp_path / "out")["mixtures"]
    assert [name for name, m in mixtures.items() if m["available"]] == ["hep-ph+gr-qc"]
    assert mixtures["hep-th"]["reason"] == "the corpus holds no paper of hep-th"


def test_a_corpus_that_supplies_no_mixture_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match=r"none of the mixtures .hep-th: the corpus holds no paper of hep-th and 9 "):
        split(corpus(texts(40, "cs.LG")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_corpus_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="holds no papers"):
        split(corpus([]), tmp_path / "out")


def test_a_corpus_of_withdrawn_papers_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="withdrawn papers only"):
        split(corpus([paper("hep-th/9901001", "a text", withdrawn=True)]), tmp_path / "out")


def test_a_repeated_identifier_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match=r"holds hep-th/9900003 more than once"):
        split(corpus([*texts(30), texts(4)[3]]), tmp_path / "out")


def test_another_kind_of_folder_is_refused(made, tmp_path):
    with pytest.raises(ArtifactError, match="holds a split, not a corpus"):
        split(made / "split", tmp_path / "out")
    with pytest.raises(ArtifactError, match="holds a corpus, not a split"):
        split(made / "corpus", tmp_path / "out", previous=made / "corpus")


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (SCHEMA.with_metadata({"text_form": "other-9"}), "in the form other-9"),
        (SCHEMA.remove(0), "other columns"),
    ],
)
def test_another_text_form_or_schema_is_refused(tmp_path, schema, says):
    with write_artifact(tmp_path / "corpus", "corpus") as folder:
        rows = [{name: p._asdict()[name] for name in schema.names} for p in texts(3)]
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder.path / "papers.parquet")
    with pytest.raises(UserError, match=says):
        split(tmp_path / "corpus", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"after": "yesterday"}, "not a date"),
        ({"key": ""}, "0 bytes"),
        ({"key": "k" * 65}, "65 bytes"),
        ({"threshold": 0.2}, "from 0.6 to 1"),
    ],
)
def test_parameters_out_of_range_are_refused(made, tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        split(made / "corpus", tmp_path / "out", **options)


def test_a_previous_split_that_contradicts_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="was made with key 'feyntune', not 'k'"):
        split(made / "corpus", tmp_path / "out", key="k", previous=made / "split")
    with pytest.raises(UserError, match="contradicts"):
        split(made / "corpus", tmp_path / "out", after="2000-01-01", previous=made / "split")


def test_an_existing_split_is_not_overwritten(made):
    with pytest.raises(ArtifactError, match="never overwritten"):
        split(made / "corpus", made / "split")


def test_the_step_does_not_import_torch_or_kfp():
    code = "import sys, feyntune.splitting.split; print({'torch', 'kfp'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
