"""Keys: what makes a variant train again, what makes it be scored again, and what does neither.

After a change of a versioned file that does not change results: `python -m tests.artifacts.test_cache` freezes it.
"""

import ast
import hashlib
import json
from pathlib import Path

import pytest

import feyntune
from feyntune.artifacts import cache
from feyntune.artifacts.artifact import read_manifest
from feyntune.artifacts.store import FolderStore, StoreError
from feyntune.errors import Interrupted, UserError
from feyntune.keys import last_attempt, variant_keys

PACKAGE = Path(feyntune.__file__).parent
FROZEN = Path(__file__).with_name("versions.json")
BASE = "/models/llama@" + "a" * 64


def code_digest(patterns):
    """Digest of the files' code without docstrings, comments and layout."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in PACKAGE.glob(pattern)):
        text = path.read_text()
        if path.suffix == ".py":
            tree = ast.parse(text)
            for node in ast.walk(tree):
                body = getattr(node, "body", None)
                if isinstance(body, list):
                    node.body = [e for e in body if not (isinstance(e, ast.Expr) and isinstance(e.value, ast.Constant))]
            text = ast.unparse(tree).translate({ord(c): None for c in "'\"\\"})  # Pythons quote f-strings differently
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\0{text}\0".encode())
    return digest.hexdigest()[:16]


def current():
    return {version: code_digest(files) for version, files in cache.VERSIONED_FILES.items()}


@pytest.mark.parametrize("version", cache.VERSIONED_FILES)
def test_code_that_decides_results_changes_with_its_version(version):
    assert all(list(PACKAGE.glob(p)) for p in cache.VERSIONED_FILES[version])
    assert json.loads(FROZEN.read_text()).get(version) == code_digest(cache.VERSIONED_FILES[version]), (
        f"a file of {version} changed. If it computes other results, raise the constant in artifacts/cache.py; "
        "then run `python -m tests.artifacts.test_cache`"
    )


def test_comments_and_docstrings_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    digests = []
    for text in ('"""A."""\nx = 1\n', '"""B."""\n# why\nx = 1\n', "x = 2\n"):
        (tmp_path / "a.py").write_text(text)
        digests.append(code_digest(["*.py"]))
    assert digests[0] == digests[1] != digests[2]


def keys(split="s", base=BASE, name="hep-th/lora-all", **recipe):
    return variant_keys(split, base, recipe, name)


def test_other_evaluation_settings_do_not_train_again():
    training, evaluation = keys()
    again = keys(evaluate={"completions": {"papers": 200}})
    assert again[0] == training
    assert again[1] != evaluation


@pytest.mark.parametrize("recipe", [{"learning_rate": 1e-4}, {"lora_rank": 16}, {"seed": 1}, {"precision": "bf16"}])
def test_what_decides_the_adapter_trains_and_scores_again(recipe):
    training, evaluation = keys()
    again = keys(train=recipe)
    assert again[0] != training
    assert again[1] != evaluation


def test_how_and_where_it_is_computed_changes_nothing():
    execution = {"devices": 3, "micro_batch_tokens": 100, "save_every_steps": 5}
    assert keys(train=execution) == keys(train={}) == keys()
    assert keys(base="s3://elsewhere/llama@" + "a" * 64) == keys()


def test_a_seed_in_the_name_is_that_seed_and_how_many_there_are_changes_nothing():
    assert keys(name="hep-th/lora-all/seed4")[0] == keys(train={"seed": 4})[0]
    assert keys(name="hep-th/lora-all/seed4")[0] != keys()[0]
    assert keys(train={"seeds": 3}) == keys()


def test_another_split_or_base_starts_afresh():
    assert len({keys(), keys(split="t"), keys(base="/models/llama@" + "b" * 64), keys(name="hep-th/lora-qkv")}) == 4


def test_each_version_counts_for_its_own_step_and_those_after_it():
    metadata = {"variant": "hep-th/lora-all"}
    assert cache.training_key("s", BASE, metadata) != cache.training_key("s", BASE, metadata, "next")
    arguments = ("s", BASE, "training/x/hep-th.lora-all", {}, "hep-th/lora-all")
    assert cache.evaluation_key(*arguments) != cache.evaluation_key(*arguments, "next")


def test_the_base_has_scores_and_no_adapter():
    assert keys(name="base")[0] is None
    assert keys(name="base", train={"learning_rate": 1.0}) == keys(name="base")


def capture(tmp_path, error, last):
    store = FolderStore(str(tmp_path / "store"))
    with cache.capture_failure(store, "evaluations/k/v", "train", "v", tmp_path / "out", last):
        raise error
    return store


def test_invalid_input_is_a_failure_at_once_and_a_fault_only_at_the_last_attempt(tmp_path):
    capture(tmp_path, UserError("no such mixture"), last=False)
    assert read_manifest(tmp_path / "out").config["error"] == "no such mixture"
    with pytest.raises(RuntimeError, match="NCCL"):
        capture(tmp_path / "b", RuntimeError("NCCL abort"), last=False)
    assert not (tmp_path / "b" / "out").exists()
    with pytest.raises(StoreError):
        capture(tmp_path / "s", StoreError("the store does not answer"), last=False)
    store = capture(tmp_path / "c", RuntimeError("NCCL abort"), last=True)
    failure = cache.newest_failure(store, "evaluations/k/v", tmp_path / "newest")
    assert "RuntimeError" in json.loads((failure / "outcome.json").read_text())["traceback"]
    with pytest.raises(Interrupted):
        capture(tmp_path / "d", Interrupted(), last=True)


def test_the_last_attempt_is_known_from_kubeflows_environment(monkeypatch):
    assert last_attempt(5)  # outside Kubeflow nothing retries
    monkeypatch.setenv("KFP_RETRY_INDEX", "0")
    assert not last_attempt(5)
    monkeypatch.setenv("KFP_RETRY_INDEX", "5")
    assert last_attempt(5)


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(current(), indent=1) + "\n")
