import csv
import io
import json
import random
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from feyntune.artifacts.artifact import ArtifactError, open_artifact
from feyntune.errors import UserError
from feyntune.study.agreement import alpha, icc
from feyntune.study.figures import category
from feyntune.study.study import SCALE, StudyConfig, make, read_sheet, score, sheet
from tests.study.factories import ALL, QKV, make_evaluation

CONFIG = StudyConfig(raters=["ann", "bob", "cy"], papers=7, common=3)
GIFT = {"base": 3, QKV: 5, ALL: 6, "claude": 8}  # what a system's texts are worth
HABIT = {"ann": 0, "bob": 1, "cy": -1}


@pytest.fixture
def folders(tmp_path):
    systems = {name: lambda n, name=name: f"text of {sorted(GIFT).index(name)} on {n}" for name in GIFT}
    return [make_evaluation(tmp_path / "evaluation", systems)]


@pytest.fixture
def study(folders, tmp_path):
    make(folders, tmp_path / "study", tmp_path / "key", CONFIG, seed=5)
    return tmp_path / "study"


def rows_of(study, rater):
    return [row for _, row in read_sheet(study / "sheets" / f"{rater}.csv")]


def key_of(tmp_path):
    return {r["item"]: r for r in pq.read_table(tmp_path / "key" / "key.parquet").to_pylist()}


def fill(study, tmp_path, give, raters=CONFIG.raters):
    """Returned sheets, with `give(row, key row)` as score."""
    key = key_of(tmp_path)
    folder = tmp_path / "returned"
    folder.mkdir(exist_ok=True)
    for rater in raters:
        rows = [{**row, "score": give(row, key[row["item"]])} for row in rows_of(study, rater)]
        (folder / f"{rater}.csv").write_text(sheet(rows), encoding="utf-8-sig", newline="")
    return folder


def honest(row, hidden):
    luck = random.Random(hidden["id"] + hidden["system"] + hidden["rater"]).choice([-1, 0, 0, 1])
    return GIFT[hidden["system"]] + HABIT[hidden["rater"]] + luck


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


# Making.


def test_every_rater_gets_the_common_papers_and_a_share_of_the_others(study, tmp_path):
    key = key_of(tmp_path).values()
    papers = {rater: {r["id"] for r in key if r["rater"] == rater} for rater in CONFIG.raters}
    common = set.intersection(*papers.values())
    assert len(common) == 3
    assert len(set.union(*papers.values())) == 7
    assert sorted(len(p) for p in papers.values()) == [4, 4, 5]
    for rater in CONFIG.raters:
        asked = Counter((r["id"], r["system"]) for r in key if r["rater"] == rater)
        assert set(asked.values()) == {1}
        assert {s for _, s in asked} == set(GIFT)


def test_a_paper_is_scored_in_one_go_and_orders_differ(study, tmp_path):
    key = key_of(tmp_path)
    orders = set()
    for rater in CONFIG.raters:
        hidden = [key[row["item"]] for row in rows_of(study, rater)]
        ids = [h["id"] for h in hidden]
        assert [i for n, i in enumerate(ids) if n == 0 or ids[n - 1] != i] == list(dict.fromkeys(ids))
        orders |= {tuple(h["system"] for h in hidden if h["id"] == i) for i in set(ids)}
    assert len(orders) > 5
    first = [tuple(dict.fromkeys(key[r["item"]]["id"] for r in rows_of(study, rater))) for rater in CONFIG.raters]
    common = set.intersection(*map(set, first))
    assert len({tuple(i for i in ids if i in common) for ids in first}) > 1
    assert any(not common.issuperset(ids[:3]) for ids in first)


def test_what_raters_get_says_nothing_about_whose_texts_they_are(study, tmp_path):
    files = [p for p in study.rglob("*") if p.is_file()]
    assert {p.name for p in files} == {"manifest.json", "study.json", "ann.csv", "bob.csv", "cy.csv"}
    hidden = open_artifact(tmp_path / "key", "study-key")
    for path in files:
        text = path.read_text(encoding="utf-8-sig")
        for word in (*GIFT, "lora", "9901", "seed", "reference continuation", *hidden.inputs.values()):
            assert word not in text, (path, word)
    assert hidden.config["seed"] == 5


def test_the_same_seed_draws_the_same_and_without_one_every_study_is_another(folders, study, tmp_path):
    again = make(folders, tmp_path / "again", tmp_path / "again-key", CONFIG, seed=5)
    assert again.digest == open_artifact(study).digest
    fresh = [make(folders, tmp_path / f"s{i}", tmp_path / f"k{i}", CONFIG).digest for i in range(2)]
    assert fresh[0] != fresh[1]


def test_a_text_cannot_be_a_formula_of_a_spreadsheet(tmp_path):
    folder = make_evaluation(tmp_path / "e", {"base": lambda n: '=HYPERLINK("x")', QKV: lambda n: "-1+1"})
    make([folder], tmp_path / "study", tmp_path / "key", StudyConfig(raters=["a"], papers=3, common=0))
    for row in rows_of(tmp_path / "study", "a"):
        for cell in row.values():
            assert not cell.startswith(("=", "+", "-", "@"))


def test_settings_that_cannot_be_are_refused(folders, study, tmp_path):
    with pytest.raises(UserError, match="All systems completed 10 papers, not 11"):
        make(folders, tmp_path / "s", tmp_path / "k", CONFIG.model_copy(update={"papers": 11}))
    with pytest.raises(UserError, match="keep the key in a folder apart"):
        make(folders, tmp_path / "s", tmp_path / "s" / "key", CONFIG)
    with pytest.raises(UserError, match="never overwritten"):
        make(folders, study, tmp_path / "k", CONFIG)
    with pytest.raises(UserError, match="no completions of gpt"):
        make(folders, tmp_path / "s", tmp_path / "k", CONFIG, systems=["gpt"])
    for raters in (["../x"], ["a", "A"], []):
        with pytest.raises(ValueError, match="raters"):
            StudyConfig(raters=raters)


# Checking what comes back.


def test_sheets_as_spreadsheets_return_them_are_read(study, tmp_path):
    folder = fill(study, tmp_path, honest)
    score(study, tmp_path / "key", [folder], tmp_path / "out")
    rows = [{**row, "score": f"{honest(row, key_of(tmp_path)[row['item']])},0"} for row in rows_of(study, "ann")]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=";", lineterminator="\n")
    writer.writeheader()
    writer.writerows(reversed(rows))
    (folder / "ann.csv").write_text(text.getvalue())
    score(study, tmp_path / "key", [folder], tmp_path / "again")
    assert summary_of(tmp_path / "again") == summary_of(tmp_path / "out")


def test_every_bad_row_is_named_and_nothing_is_scored(study, tmp_path):
    folder = fill(study, tmp_path, honest)
    _, *lines = list(csv.reader(io.StringIO((folder / "bob.csv").read_text(encoding="utf-8-sig"), newline="")))
    head = list(rows_of(study, "bob")[0])
    at = {name: head.index(name) for name in head}
    lines[0][at["score"]] = "11"
    lines[1][at["score"]] = "good"
    lines[2][at["item"]] = "zzzzzzzz"
    lines[3][at["rater"]] = "ann"
    lines[4][at["study"]] = "another"
    lines[5][at["score"]] = "7.5"
    lines[6][at["comment"]] = "two\nlines"
    lines.append(lines[7])
    with (folder / "bob.csv").open("w", newline="") as f:
        csv.writer(f).writerows([head, *lines])
    with pytest.raises(UserError) as given:
        score(study, tmp_path / "key", [folder], tmp_path / "out")
    sentences = str(given.value).splitlines()
    assert sentences[0].startswith("7 row(s)")
    for line, (number, field) in zip(
        sentences[1:],
        [(2, "score"), (3, "score"), (4, "item"), (5, "rater"), (6, "study"), (7, "score"), (len(lines) + 2, "item")],
        strict=True,
    ):
        assert line.startswith(f"  {folder}/bob.csv, line {number}, {field}: ")
    assert "'11' is not a whole number from 1 to 10" in sentences[1]
    assert f"is there already ({folder}/bob.csv, line 10)" in sentences[7]
    assert not (tmp_path / "out").exists()


def test_rows_without_a_score_are_counted_and_not_taken_for_zero(study, tmp_path):
    folder = fill(study, tmp_path, lambda row, hidden: honest(row, hidden) if int(row["number"]) > 4 else " ")
    score(study, tmp_path / "key", [folder], tmp_path / "out")
    summary = summary_of(tmp_path / "out")
    assert (summary["scored"], summary["of"]) == (13 * 4 - 12, 13 * 4)
    assert {r: (f["scored"], f["items"]) for r, f in summary["raters"].items()}["ann"][0] in (12, 16)
    assert summary["systems"]["base"]["n"] == 10


def test_a_missing_column_another_key_and_a_changed_study_are_refused(study, folders, tmp_path):
    folder = fill(study, tmp_path, honest)
    make(folders, tmp_path / "study2", tmp_path / "key2", CONFIG)
    with pytest.raises(UserError, match="not the key of"):
        score(study, tmp_path / "key2", [folder], tmp_path / "out")
    (folder / "cy.csv").write_text("item,points\nx,1\n")
    with pytest.raises(UserError, match=r"cy.csv, line 1: the column study is missing"):
        score(study, tmp_path / "key", [folder], tmp_path / "out")
    with (study / "study.json").open("a") as f:
        f.write(" ")
    with pytest.raises(ArtifactError, match="damaged"):
        score(study, tmp_path / "key", [folder], tmp_path / "out")


# Figures.


def test_systems_are_told_apart_and_habits_of_raters_do_not_count(study, tmp_path):
    folder = fill(study, tmp_path, honest)
    score(study, tmp_path / "key", [folder], tmp_path / "out")
    summary = summary_of(tmp_path / "out")
    for name, gift in GIFT.items():
        if name != "base":
            difference = summary["systems"][name]["difference"]
            assert difference["low"] < gift - GIFT["base"] < difference["high"]
            assert difference["p_holm"] >= difference["p"]
    offsets = {r: f["offset"] for r, f in summary["raters"].items()}
    assert offsets["bob"] > 0.3 > -0.3 > offsets["cy"]
    assert sum(offsets.values()) == pytest.approx(0)
    assert list(summary["categories"]) == ["base", "lora-qkv", "lora-all", "other models"]
    assert summary["published"]["categories"] == {"base": 3.75, "lora-qkv": 4.92, "lora-all": 5.43, "other models": 7.5}


def test_figures_are_those_of_the_scores_worked_out_apart(study, tmp_path):
    """Against plain loops over the returned sheets and the key."""
    folder = fill(study, tmp_path, honest)
    score(study, tmp_path / "key", [folder], tmp_path / "out")
    summary, key = summary_of(tmp_path / "out"), key_of(tmp_path)
    given = {}
    for rater in CONFIG.raters:
        for row in csv.DictReader((folder / f"{rater}.csv").open(encoding="utf-8-sig", newline="")):
            hidden = key[row["item"]]
            given[rater, hidden["id"], hidden["system"]] = int(row["score"])
    qkv = [v for (_, _, s), v in given.items() if s == QKV]
    assert summary["systems"][QKV]["mean"] == pytest.approx(np.mean(qkv))
    assert summary["systems"][QKV]["sd"] == pytest.approx(np.std(qkv, ddof=1))
    less = [v - given[r, i, "base"] for (r, i, s), v in given.items() if s == QKV]
    assert summary["systems"][QKV]["difference"]["mean"] == pytest.approx(np.mean(less))
    all_of = {r: [v for (q, _, _), v in given.items() if q == r] for r in CONFIG.raters}
    z = [(v - np.mean(all_of[r])) / np.std(all_of[r], ddof=1) for (r, _, s), v in given.items() if s == QKV]
    assert summary["systems"][QKV]["z_mean"] == pytest.approx(np.mean(z))
    shared = sorted({i for r, i, _ in given if all((q, i, "base") in given for q in CONFIG.raters)})
    assert len(shared) == 3
    table = np.array([[given[r, i, s] for r in CONFIG.raters] for i in shared for s in GIFT], float)
    assert summary["agreement"]["icc"]["value"] == pytest.approx(icc(table))
    assert summary["agreement"]["alpha"]["value"] == pytest.approx(alpha(table))  # the others have one rater
    assert (summary["agreement"]["items"], summary["agreement"]["papers"]) == (12, 3)
    scores = np.array([[given[r, i, s] for r in CONFIG.raters] for i in shared for s in GIFT if s != "claude"], float)
    assert summary["agreement"]["icc_without_others"]["value"] == pytest.approx(icc(scores))
    assert summary["agreement"]["icc"]["value"] > summary["agreement"]["icc_without_others"]["value"]


def test_scores_that_mean_nothing_make_nobody_sure(study, tmp_path):
    dice = random.Random(2)
    folder = fill(study, tmp_path, lambda row, hidden: dice.randint(*SCALE))
    score(study, tmp_path / "key", [folder], tmp_path / "out")
    summary = summary_of(tmp_path / "out")
    assert all(f["difference"]["p_holm"] > 0.05 for n, f in summary["systems"].items() if n != "base")
    assert summary["agreement"]["icc"]["value"] < 0.35


def test_one_rater_alone_has_no_agreement(folders, tmp_path):
    config = CONFIG.model_copy(update={"raters": ["ann"], "common": 0})
    make(folders, tmp_path / "study", tmp_path / "key", config, seed=5)
    folder = fill(tmp_path / "study", tmp_path, honest, ["ann"])
    score(tmp_path / "study", tmp_path / "key", [folder], tmp_path / "out")
    summary = summary_of(tmp_path / "out")
    assert summary["agreement"]["icc"]["value"] is None
    assert summary["raters"]["ann"]["offset"] is None
    assert summary["systems"][ALL]["difference"]["low"] > 0


def test_categories():
    assert [category(n) for n in ("base", QKV, ALL, "claude-3.5")] == ["base", "lora-qkv", "lora-all", "other models"]


def excel(text, separator, encoding, prefix=""):
    """A sheet as Excel saves it: numbers lose leading zeros and long ones become 8.85588E+11."""
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator, lineterminator="\r\n")
    writer.writeheader()
    for row in rows:
        row["rater"] = str(int(row["rater"])) if row["rater"].isdigit() else row["rater"]
        writer.writerow({**row, "score": "7", "comment": "schön"})
    return (prefix + out.getvalue()).encode(encoding)


@pytest.mark.parametrize(
    ("separator", "encoding", "prefix"),
    [
        (";", "utf-8-sig", ""),
        (",", "utf-8", ""),
        ("\t", "utf-16", ""),
        ("\t", "utf-16-le", ""),
        (";", "cp1252", ""),
        (";", "utf-8", "sep=;\r\n"),
    ],
)
def test_sheets_back_from_any_spreadsheet_are_read(folders, tmp_path, separator, encoding, prefix):
    make(folders, tmp_path / "study", tmp_path / "key", StudyConfig(raters=["01", "02"], papers=4, common=1), seed=11)
    back = tmp_path / "back"
    back.mkdir()
    for path in (tmp_path / "study" / "sheets").glob("*.csv"):
        text = path.read_bytes().decode("utf-8-sig").replace("…", "...")  # cp1252 has no U+2026 of ours to lose
        (back / path.name).write_bytes(excel(text, separator, encoding, prefix))
    score(tmp_path / "study", tmp_path / "key", [back], tmp_path / "result", resamples=99)
    ratings = pq.read_table(tmp_path / "result" / "ratings.parquet").to_pylist()
    assert {(r["score"], r["comment"]) for r in ratings} == {(7, "schön")}
    assert {r["rater"] for r in ratings} == {"01", "02"}


def test_names_hold_nothing_a_spreadsheet_takes_for_a_number(folders, tmp_path):
    for seed in range(257, 262):
        made = make(folders, tmp_path / f"s{seed}", tmp_path / f"k{seed}", CONFIG, seed=seed)
        assert made.config["study"].isalpha()


def test_a_study_of_an_earlier_version_with_a_number_for_a_name_is_scored():
    from feyntune.study.study import _same

    assert _same("8.85588E+11", "885588040149")
    assert _same("8,85588E+11", "885588040149")
    assert not _same("8.85588E+11", "885588999999999")
    assert not _same("2", "01")


def test_by_default_a_study_takes_what_all_systems_completed(folders, tmp_path):
    make(folders, tmp_path / "study", tmp_path / "key", StudyConfig(raters=["ann"]), seed=1)
    assert open_artifact(tmp_path / "key").config["papers"] == 10  # the test papers there are
    assert open_artifact(tmp_path / "key").config["common"] == 5
