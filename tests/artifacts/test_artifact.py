import contextlib
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feyntune.artifacts.artifact import (
    MANIFEST,
    ArtifactError,
    is_artifact,
    open_artifact,
    read_manifest,
    sha256_json,
    write_artifact,
)


def make(folder, files=(("a.txt", b"a"), ("d/b.txt", b"b")), config=None, stats=None, kind="thing"):
    with write_artifact(folder, kind, inputs={"x": "1"}, config=config or {"n": 1, "t": (1, 2)}) as tmp:
        for name, data in files:
            (tmp.path / name).parent.mkdir(exist_ok=True)
            (tmp.path / name).write_bytes(data)
        tmp.stats.update(stats or {})
    return folder


def test_a_sealed_folder_opens_and_says_what_it_holds(tmp_path):
    manifest = open_artifact(make(tmp_path / "f", stats={"seconds": 3}), kind="thing")
    assert sorted(manifest.files) == ["a.txt", "d/b.txt"]
    assert manifest.config == {"n": 1, "t": [1, 2]}
    assert manifest.inputs == {"x": "1"}
    assert manifest.stats == {"seconds": 3}
    assert "pyarrow" in manifest.packages


def test_the_digest_covers_bytes_inputs_and_config_and_not_facts(tmp_path):
    one = read_manifest(make(tmp_path / "1", stats={"seconds": 1})).digest
    assert read_manifest(make(tmp_path / "2", stats={"seconds": 2})).digest == one
    assert read_manifest(make(tmp_path / "3", config={"n": 2})).digest != one
    assert read_manifest(make(tmp_path / "4", files=[("a.txt", b"a"), ("d/b.txt", b"c")])).digest != one
    assert read_manifest(make(tmp_path / "5", files=[("a.txt", b"a"), ("d/c.txt", b"b")])).digest != one
    assert read_manifest(make(tmp_path / "6", kind="other")).digest != one


def test_an_error_leaves_nothing_behind(tmp_path):
    with contextlib.suppress(RuntimeError), write_artifact(tmp_path / "f", "thing") as tmp:
        (tmp.path / "a").write_text("a")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_sealed_folder_is_not_overwritten(tmp_path):
    make(tmp_path / "f")
    with pytest.raises(ArtifactError, match="never overwritten"):
        make(tmp_path / "f", files=[("z", b"z")])
    assert open_artifact(tmp_path / "f").files.keys() == {"a.txt", "d/b.txt"}


def test_an_empty_folder_may_be_sealed_into(tmp_path):
    (tmp_path / "f").mkdir()
    assert open_artifact(make(tmp_path / "f"))


def test_a_folder_without_a_manifest_does_not_exist(tmp_path):
    (tmp_path / "f").mkdir()
    assert not is_artifact(tmp_path / "f")
    with pytest.raises(ArtifactError, match=f"no {MANIFEST}"):
        open_artifact(tmp_path / "f")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: (f / "a.txt").write_text("b"), "a.txt does not match its manifest"),
        (lambda f: (f / "a.txt").write_text("longer"), "a.txt does not match its manifest"),
        (lambda f: (f / "d/b.txt").unlink(), "d/b.txt is missing"),
        (lambda f: (f / "new").write_text(""), "new is not in the manifest"),
        (lambda f: (f / MANIFEST).write_text("{"), "is not a manifest this version reads"),
    ],
)
def test_a_changed_folder_is_refused_with_the_files_name(tmp_path, change, says):
    change(make(tmp_path / "f"))
    with pytest.raises(ArtifactError, match=says):
        open_artifact(tmp_path / "f")


@pytest.mark.parametrize("field", ["kind", "inputs", "config", "digest"])
def test_a_manifest_edited_by_hand_is_refused(tmp_path, field):
    path = make(tmp_path / "f") / MANIFEST
    manifest = json.loads(path.read_text())
    manifest[field] = {"kind": "x", "inputs": {}, "config": {"n": 9}, "digest": "0" * 64}[field]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="changed after it was written"):
        open_artifact(tmp_path / "f")


def test_the_wrong_kind_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="holds a thing, not a split"):
        open_artifact(make(tmp_path / "f"), kind="split")


def test_a_kind_that_was_renamed_opens_by_its_new_name(tmp_path):
    assert open_artifact(make(tmp_path / "f", kind="judgement"), kind="judgment").kind == "judgement"


def test_other_users_can_read_what_was_written_privately(tmp_path):
    with write_artifact(tmp_path / "f", "thing") as tmp:
        (tmp.path / "a").write_text("a")
        (tmp.path / "a").chmod(0o600)
    assert os.stat(tmp_path / "f" / "a").st_mode & 0o777 == 0o644
    assert os.stat(tmp_path / "f").st_mode & 0o777 == 0o755


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), _JSON, max_size=5), st.randoms())
def test_a_digest_does_not_depend_on_the_order_of_keys(value, random):
    items = list(value.items())
    random.shuffle(items)
    assert sha256_json(dict(items)) == sha256_json(json.loads(json.dumps(value)))
