"""Recipes: files, inline JSON and single values, merged over the default of a run."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feyntune.errors import UserError
from feyntune.evaluation.config import EvaluateConfig
from feyntune.recipe import FOLDER, _file, _flat, changed_settings, default_recipe, merge, read_recipe
from feyntune.training.config import TrainConfig


def test_paper_yaml_holds_the_defaults() -> None:
    recipe = _file(FOLDER / "paper.yaml")
    assert read_recipe() == {}
    assert set(TrainConfig().identity()) - set(recipe["train"]) == {"max_steps", "max_length"}


@pytest.mark.parametrize("name", ["paper", "tiny"])
def test_every_setting_of_a_recipe_has_its_reason(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    bare = [line for line in lines if line.startswith("  ") and ":" in line and "#" not in line]
    assert [b.strip() for b in bare] == ["completions:"]


def test_a_partial_recipe_keeps_the_rest_of_the_default() -> None:
    recipe = read_recipe('{"train": {"epochs": 2}}', default="tiny")
    assert recipe["train"] == {"precision": "fp32", "learning_rate": 0.005, "epochs": 2}
    assert recipe["evaluate"] == read_recipe(default="tiny")["evaluate"]
    assert changed_settings(recipe, "tiny") == ["train.epochs 2 (tiny.yaml: 1)"]


def test_a_file_is_merged_and_single_values_win(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {epochs: 3, lora_rank: 4}\nevaluate: {completions: {papers: 5}}\n")
    recipe = read_recipe(str(path), ["train.learning_rate=1e-4", "train.epochs=2", "evaluate.categories=[cs, q-bio]"])
    assert recipe["train"] == {"learning_rate": 1e-4, "epochs": 2, "lora_rank": 4}
    assert recipe["evaluate"] == {"categories": ["cs", "q-bio"], "completions": {"papers": 5}}


def test_completions_can_be_switched_off() -> None:
    recipe = read_recipe(None, ["evaluate.completions=false"], default="tiny")
    assert recipe["evaluate"]["completions"] is False
    assert EvaluateConfig.model_validate(recipe["evaluate"]).completions is None


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("nowhere.yaml", [], "no such file; named recipes are paper, tiny"),
        ('{"epochs": 2}', [], "no section epochs: write it under train"),
        ('{"train": {"epoch": 2}}', [], "train.epoch: .*epochs"),
        ('{"train": {"rank": 2}}', [], "train.rank: .*lora_rank"),
        ('{"train": {"epochs": 0}}', [], "train.epochs: .*greater than"),
        ('{"evaluate": {"precison": "fp32"}}', [], "evaluate.precison: .*perhaps evaluate.precision"),
        ('{"evaluate": {"completions": {"paper": 1}}}', [], "evaluate.completions.paper: .*papers"),
        ("{train: [", [], "not YAML"),
        ('{"train": 3}', [], "train must hold settings"),
        (None, ["epochs=2"], "write SECTION.SETTING=VALUE"),
        (None, ["train.epochs"], "write SECTION.SETTING=VALUE"),
        (None, ["train.epochs=[1"], "not a YAML value"),
        (None, ["trian.epochs=1"], "no section trian"),
    ],
)
def test_invalid_input_is_named(source: str | None, changes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_recipe(source, changes)


def test_an_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {epoch: 3}\n")
    with pytest.raises(UserError, match=r"mine\.yaml: train\.epoch"):
        read_recipe(str(path))


def test_the_default_follows_the_base(tmp_path: Path) -> None:
    assert default_recipe(None) == "tiny"
    assert default_recipe("ORG/NAME") == "paper"
    (tmp_path / "manifest.json").write_text(json.dumps({"stats": {"parameters": 1_800_000}}))
    assert default_recipe(str(tmp_path)) == "tiny"
    assert default_recipe(f"{tmp_path}@{'0' * 64}") == "tiny"


@settings(deadline=None, max_examples=20)
@given(st.text())
def test_any_text_is_read_or_refused_in_a_sentence(text: str) -> None:
    for source, changes in ((None, [text]), ("{" + text, [])):
        with contextlib.suppress(UserError):
            read_recipe(source, changes)


_TREES = st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3))


@settings(deadline=None, max_examples=20)
@given(st.dictionaries(st.sampled_from("abc"), _TREES), st.dictionaries(st.sampled_from("abc"), _TREES))
def test_merging_keeps_what_was_given(default: dict, given_values: dict) -> None:
    merged = dict(_flat(merge(default, given_values)))
    assert dict(_flat(given_values)).items() <= merged.items()
