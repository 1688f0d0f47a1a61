"""What a fine-tune forgot: texts far from the mixtures, each variant against the base, and the gate's clause."""

import json
import random
import shutil
import string

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feyntune.artifacts.artifact import read_manifest, write_manifest
from feyntune.demo.make import retention_texts
from feyntune.errors import UserError
from feyntune.evaluation.compare import compare
from feyntune.evaluation.config import EvaluateConfig
from feyntune.evaluation.evaluate import evaluate
from feyntune.evaluation.retention import absolute_sources, retention_papers
from feyntune.keys import variant_keys
from feyntune.registry.register import register
from feyntune.training.config import TrainConfig
from feyntune.training.train import train
from tests.conftest import texts
from tests.evaluation.conftest import QUICK

SOUND, DAMAGED = "hep-th/lora-qkv", "hep-th/lora-all"
SETTINGS = {"precision": "fp32", "epochs": 4, "learning_rate": 3e-3, "global_batch_size": 8, "validation_papers": 0}


def noise_split(split, out):
    """A copy of a split whose training abstracts are random letters."""
    shutil.copytree(split, out)
    manifest = read_manifest(split)
    (out / "manifest.json").unlink()
    table = pq.read_table(out / "papers.parquet")
    rng = random.Random(1)
    word = lambda: "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(2, 9)))
    rows = [
        r | ({"abstract": " ".join(word() for _ in range(40))} if r["split"] == "train" else {})
        for r in table.to_pylist()
    ]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), out / "papers.parquet")
    write_manifest(out, "split", manifest.inputs, manifest.config)
    return str(out)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, tiny_base, tiny_split):
    """One adapter trained on physics, one on noise; scored on physics and on the kitchen talk of the base."""
    root = tmp_path_factory.mktemp("retention")
    kitchen = root / "kitchen.jsonl"
    kitchen.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts("kitchen", 60, seed=9)))
    adapters = {SOUND: root / "sound", DAMAGED: root / "damaged"}
    config = TrainConfig(**SETTINGS)
    train(tiny_split, "hep-th", "lora-qkv", tiny_base, adapters[SOUND], config)
    noise = noise_split(tiny_split, root / "noise")
    train(noise, "hep-th", "lora-all", tiny_base, adapters[DAMAGED], config.model_copy(update={"learning_rate": 2e-2}))
    settings = EvaluateConfig(precision="fp32", completions=None, retention={"kitchen": str(kitchen)})
    evaluate(tiny_split, tiny_base, adapters, root / "evaluation", settings)
    compare([root / "evaluation"], adapters, tiny_split, root / "out", config=QUICK)
    return root, adapters


def test_the_retention_clause_catches_an_adapter_trained_on_noise(compared, tmp_path):
    root, adapters = compared
    policy = tmp_path / "gate.yaml"
    policy.write_text("minimum_abstracts: 5\nmaximum_increase: {kitchen: 30}\n")
    done = register(root / "out", adapters, str(tmp_path / "registry"), policy=policy)
    assert done.variants[SOUND].promoted
    assert done.champion == SOUND
    refused = [r for r in done.variants[DAMAGED].reasons if "perplexity on kitchen changes by" in r]
    assert len(refused) == 1
    assert "the policy allows at most 30 %" in refused[0]


def test_retention_is_in_the_transfer_matrix_and_not_in_the_test_set(compared):
    root, _ = compared
    summary = json.loads((root / "out" / "summary.json").read_text())
    assert summary["test"]["abstracts"] == 12
    assert summary["retention"]["kitchen"]["abstracts"] > 40
    assert "holdout" not in summary
    systems = summary["retention"]["kitchen"]["systems"]
    base = systems["base"]["perplexity"]["abstract_mean"]
    assert systems[DAMAGED]["delta"]["mean"] == pytest.approx(systems[DAMAGED]["perplexity"]["abstract_mean"] - base)
    assert "kitchen" in (root / "out" / "report.html").read_text()


def test_the_shipped_sets_are_what_the_generator_makes():
    for name, expected in retention_texts().items():
        source = f"package:feyntune/evaluation/retention_texts/{name}.jsonl"
        assert set(retention_papers({name: source}, 1000)["abstract"].to_pylist()) == set(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "one"}\n', "fewer than two texts"),
        ("not json\n", "line 1: write one JSON object a line"),
        ('{"title": "x"}\n', "line 1: write one JSON object a line"),
        (None, "cannot be read"),
    ],
)
def test_a_set_that_cannot_be_used_is_named(tmp_path, text, message):
    path = tmp_path / "set.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        retention_papers({"mine": str(path)}, 10)


def test_of_a_large_set_the_same_few_are_taken_and_paths_are_made_whole(tmp_path, monkeypatch):
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps({"abstract": f"text {i}"}) + "\n" for i in range(50)))
    few = retention_papers({"mine": str(path)}, 10)
    assert few.num_rows == 10
    assert set(few["id"].to_pylist()) <= set(retention_papers({"mine": str(path)}, 20)["id"].to_pylist())
    monkeypatch.chdir(tmp_path)
    recipe = {"evaluate": {"retention": {"mine": "set.jsonl", "other": "s3://b/x.jsonl"}}}
    assert absolute_sources(recipe)["evaluate"]["retention"] == {"mine": str(path), "other": "s3://b/x.jsonl"}


def test_a_file_that_changes_under_its_name_is_scored_again(tmp_path, tiny_base, tiny_split):
    path = tmp_path / "set.jsonl"
    write = lambda path, *lines: path.write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    write(path, "The soup needs salt.", "A loaf hides more salt.")
    key = lambda p: variant_keys("split", f"/base@{'a' * 64}", {"evaluate": {"retention": {"mine": str(p)}}}, "base")[1]
    before = key(path)
    shutil.copyfile(path, tmp_path / "copy.jsonl")
    assert key(tmp_path / "copy.jsonl") == before  # the content counts, not the place

    settings = EvaluateConfig(precision="fp32", completions=None, retention={"mine": str(path)})
    first = evaluate(tiny_split, tiny_base, {}, tmp_path / "out", settings)
    assert evaluate(tiny_split, tiny_base, {}, tmp_path / "out", settings).digest == first.digest
    write(path, "The soup needs salt.", "Another text.")
    assert key(path) != before
    with pytest.raises(UserError, match="holds an evaluation of something else"):
        evaluate(tiny_split, tiny_base, {}, tmp_path / "out", settings)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        key(path)


def test_systems_scored_on_different_retention_texts_are_not_compared(tmp_path, tiny_base, tiny_split, compared):
    _, adapters = compared
    path = tmp_path / "set.jsonl"
    path.write_text('{"text": "The soup needs salt."}\n{"text": "A loaf hides more salt."}\n')
    settings = EvaluateConfig(precision="fp32", completions=None, retention={"mine": str(path)}, extraction=None)
    evaluate(tiny_split, tiny_base, {}, tmp_path / "base", settings)
    path.write_text('{"text": "The soup needs salt."}\n{"text": "Another text."}\n')
    alone = settings.model_copy(update={"include_base": False})
    evaluate(tiny_split, tiny_base, {SOUND: adapters[SOUND]}, tmp_path / "variant", alone)
    with pytest.raises(UserError, match=r"was measured on retention texts .*, the base on .*: measure both"):
        compare([tmp_path / "base", tmp_path / "variant"], adapters, tiny_split, tmp_path / "out", config=QUICK)
