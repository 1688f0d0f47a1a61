import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from feyntune.errors import UserError
from feyntune.splitting.assign import HOLDOUT, SHARES, by_hash, hashes
from feyntune.splitting.mixtures import belongs, draw, largest_remainder
from feyntune.variants import load_mixtures

MIXTURES = {m.name: m for m in load_mixtures()}
PHYSICS = ("hep-th", "hep-ph", "gr-qc")


def corpus(**counts: int):
    """primary, split and rank of a corpus with so many papers of each category (`hep_th=100`)."""
    primary = np.array([c.replace("_", "-") for c, n in counts.items() for _ in range(n)], dtype=str)
    place, rank = hashes([f"{c}/{k}" for k, c in enumerate(primary)], "feyntune")
    return primary, by_hash(place), rank


ENOUGH = corpus(hep_th=500, hep_ph=650, gr_qc=400, q_bio=150, cs=1500, physics=300)


def test_the_ten_mixtures_of_the_paper():
    published = [m for m in MIXTURES.values() if m.paper]
    assert [m.name for m in published] == [
        *("hep-th", "hep-ph+gr-qc", "hep-th+hep-ph+gr-qc", "hep-th70+hep-ph15+gr-qc15"),
        *("hep-th85+gr-qc15", "hep-th85+hep-ph15", "hep-th+gr-qc", "hep-th+hep-ph", "hep-ph+gr-qc-small"),
        "hep-th+q-bio+cs",
    ]
    assert [m.paper for m in published] == [f"s{k}" for k in range(1, 11)]
    assert [m.numbering for m in published] == ["documented"] * 3 + ["inferred"] * 7


def test_sizes_follow_the_rules_of_the_method():
    primary, split, rank = ENOUGH
    _, report = draw(list(MIXTURES.values()), primary, split, rank)
    assert all(r["available"] and r["reason"] is None for r in report.values())
    for s in SHARES:
        has = {c: int(((primary == c) & (split == s)).sum()) for c in np.unique(primary)}
        sizes = {name: r["sizes"][s] for name, r in report.items()}
        th, three = has["hep-th"], sum(has[c] for c in PHYSICS)
        assert sizes["hep-th"]["papers"] == th
        assert sizes["hep-ph+gr-qc"]["papers"] == three - th
        assert sizes["hep-th+hep-ph+gr-qc"]["papers"] == three
        assert sizes["hep-th+gr-qc"]["parts"] == {"hep-th": th, "gr-qc": has["gr-qc"]}
        assert sizes["hep-th+hep-ph"]["parts"] == {"hep-th": th, "hep-ph": has["hep-ph"]}
        a, b, c = largest_remainder(th, [70, 15, 15])
        assert sizes["hep-th70+hep-ph15+gr-qc15"]["parts"] == {"hep-th": a, "hep-ph": b, "gr-qc": c}
        a, b = largest_remainder(th, [85, 15])
        assert sizes["hep-th85+gr-qc15"]["parts"] == {"hep-th": a, "gr-qc": b}
        assert sizes["hep-th85+hep-ph15"]["parts"] == {"hep-th": a, "hep-ph": b}
        assert sizes["hep-ph+gr-qc-small"]["papers"] == th
        fill = three - th - has["q-bio"]
        assert sizes["hep-th+q-bio+cs"]["parts"] == {"hep-th": th, "q-bio": has["q-bio"], "cs": fill}


def test_every_paper_drawn_is_of_the_mixture_and_of_the_split():
    primary, split, rank = ENOUGH
    drawn, _ = draw(list(MIXTURES.values()), primary, split, rank)
    for name, splits in drawn.items():
        for s, rows in splits.items():
            assert set(split[rows]) == {s}
            assert set(primary[rows]) == set(MIXTURES[name].parts)
            assert len(set(rows.tolist())) == len(rows)
            assert (np.diff(rank[rows].astype(float)) > 0).all()


def test_mixtures_nest_where_their_rules_do():
    primary, split, rank = ENOUGH
    drawn, _ = draw(list(MIXTURES.values()), primary, split, rank)
    of = {name: set(d["train"].tolist()) for name, d in drawn.items()}
    th = set(np.flatnonzero(primary == "hep-th").tolist())
    assert of["hep-th70+hep-ph15+gr-qc15"] & th < of["hep-th85+gr-qc15"] & th < of["hep-th"]
    assert of["hep-th85+gr-qc15"] & th == of["hep-th85+hep-ph15"] & th
    assert of["hep-ph+gr-qc-small"] < of["hep-ph+gr-qc"] < of["hep-th+hep-ph+gr-qc"]


def test_growth_changes_a_sized_mixture_little():
    primary, split, rank = corpus(cs=1500, q_bio=150, gr_qc=400, hep_ph=650, hep_th=500)
    grown = corpus(cs=1500, q_bio=150, gr_qc=400, hep_ph=650, hep_th=510)
    before, _ = draw(list(MIXTURES.values()), primary, split, rank)
    after, _ = draw(list(MIXTURES.values()), *grown)
    for name, splits in before.items():
        lost = set(splits["train"].tolist()) - set(after[name]["train"].tolist())
        assert len(lost) <= 10, name


@given(st.integers(0, 10**6), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_largest_remainder_gives_the_total_and_is_off_by_less_than_one(total, weights):
    percents = [*weights[:-1], 100 - sum(weights[:-1])]
    if percents[-1] < 1:
        return
    counts = largest_remainder(total, percents)
    assert sum(counts) == total
    assert all(abs(n - total * p / 100) < 1 for n, p in zip(counts, percents, strict=True))


def test_largest_remainder_on_the_size_of_the_paper():
    assert largest_remainder(73_768, [70, 15, 15]) == [51_638, 11_065, 11_065]
    assert largest_remainder(10, [85, 15]) == [9, 1]  # 8.5 and 1.5: the first on a tie


@pytest.mark.parametrize(
    ("primary", "part", "expected"),
    [
        *(("cs.LG", "cs", True), ("cs", "cs", True), ("physics.ao-ph", "cs", False), ("q-bio.NC", "q-bio", True)),
        *(("physics.bio-ph", "q-bio", False), ("hep-th", "hep-th", True), ("hep-th", "hep-t", False)),
        *(("math-ph", "math", False), ("math.AG", "math", True), ("cs.LGX", "cs.LG", False)),
    ],
)
def test_categories_match_exactly(primary, part, expected):
    assert belongs(np.array([primary]), part).tolist() == [expected]


def test_a_mixture_the_corpus_cannot_supply_says_what_it_lacks():
    _, report = draw(list(MIXTURES.values()), *corpus(hep_th=500, hep_ph=40, gr_qc=200))
    entry = report["hep-th85+hep-ph15"]
    needed = largest_remainder(report["hep-th"]["sizes"]["train"]["papers"], [85, 15])[1]
    has = report["hep-ph+gr-qc"]["sizes"]["train"]["parts"]["hep-ph"]
    assert not entry["available"]
    assert f"train needs {needed} hep-ph papers and has {has}" in entry["reason"]
    assert entry["sizes"] == {}
    assert report["hep-th+q-bio+cs"]["reason"] == "the corpus holds no paper of q-bio and cs"
    assert report["hep-th85+gr-qc15"]["available"]


def test_more_fixed_papers_than_the_size_are_refused():
    _, report = draw(list(MIXTURES.values()), *corpus(hep_th=300, hep_ph=60, gr_qc=60, q_bio=500, cs=300))
    assert "train has" in report["hep-th+q-bio+cs"]["reason"]


def test_what_takes_its_size_from_an_unavailable_mixture_is_unavailable():
    _, report = draw(list(MIXTURES.values()), *corpus(hep_th=300, hep_ph=300, q_bio=50, cs=300))
    assert report["hep-th+q-bio+cs"]["reason"] == "it takes the size of hep-th+hep-ph+gr-qc, which is not available"


def test_a_mixture_without_a_test_paper_is_unavailable():
    primary, split, rank = corpus(hep_th=100)
    split[split == "test"] = "train"
    _, report = draw([MIXTURES["hep-th"]], primary, split, rank)
    assert report["hep-th"]["reason"] == "test would be empty"


def test_a_short_hold_out_costs_the_hold_out_only():
    primary, split, rank = corpus(hep_th=300, gr_qc=300)
    split = np.where((primary == "hep-th") & (np.arange(600) % 3 == 0), HOLDOUT, split)
    drawn, report = draw([MIXTURES["hep-th"], MIXTURES["hep-th85+gr-qc15"]], primary, split, rank)
    assert report["hep-th"]["sizes"][HOLDOUT]["papers"] == 100
    assert report["hep-th85+gr-qc15"]["available"]
    assert HOLDOUT not in drawn["hep-th85+gr-qc15"]
    assert report["hep-th85+gr-qc15"]["holdout"].startswith("holdout needs 15 gr-qc papers and has 0")


@settings(deadline=None, max_examples=30)
@given(st.tuples(*[st.integers(0, 80)] * 5))
def test_available_mixtures_have_exactly_their_size_whatever_the_corpus(counts):
    primary, split, rank = corpus(**dict(zip(("hep_th", "hep_ph", "gr_qc", "q_bio", "cs"), counts, strict=True)))
    drawn, report = draw(list(MIXTURES.values()), primary, split, rank)
    for name, entry in report.items():
        assert entry["available"] == (name in drawn) == (entry["reason"] is None)
        size = MIXTURES[name].size
        if size and entry["available"]:
            assert {s: e["papers"] for s, e in entry["sizes"].items()} == {
                s: e["papers"] for s, e in report[size]["sizes"].items()
            }


def one(**fields) -> dict:
    return {"mixtures": [{"name": "mine", "parts": {"hep-th": "all"}} | fields]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (one(parts={"hep-thh": "all"}), "mine: 'hep-thh' is no arXiv archive"),
        (one(parts={"cs": "all", "cs.LG": "all"}), "count twice"),
        (one(parts={"hep-th": "70%", "gr-qc": "20%"}, size="mine"), "add up to 90"),
        (one(parts={"hep-th": "70%", "gr-qc": "all"}), "do not mix"),
        (one(parts={"hep-th": "fill"}), "need `size`"),
        (one(size="mine"), "has no effect"),
        (one(parts={"hep-th": "lots"}), "parts hep-th"),
        (one(parts={}), "mine parts"),
        (one(name="No Good"), "is not the name of a mixture"),
        (one(color="red"), "color"),
        ({"mixtures": one()["mixtures"] * 2}, "mine is defined twice"),
        (one(parts={"cs": "fill"}, size="gone"), "takes the size of gone"),
        ({"mixtures": []}, "mixtures"),
        ("just words", "mixtures"),
    ],
)
def test_a_file_that_does_not_hold_together_is_refused_with_the_reason(tmp_path, content, says):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as e:
        load_mixtures(file)
    assert says in str(e.value)
    assert str(file) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["a: [", "\x00"])
def test_what_is_not_yaml_is_refused(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match="not YAML"):
        load_mixtures(tmp_path / "mine.yaml")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="correct the path"):
        load_mixtures(tmp_path / "none.yaml")
