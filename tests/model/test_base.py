from concurrent.futures import ThreadPoolExecutor

import pytest

from feyntune.artifacts.artifact import ArtifactError, write_artifact
from feyntune.artifacts.store import open_store, push
from feyntune.demo import SHIPPED
from feyntune.errors import UserError
from feyntune.model.base import (
    _cache,
    check_base,
    fetch_base,
    fetch_tokenizer,
    folder_digest,
    pin_base,
    push_base,
    split_pin,
)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_folder_is_pinned_by_its_content(model):
    location, digest = split_pin(pin_base(str(model)))
    assert location == str(model)
    assert digest == folder_digest(model)
    assert pin_base(f"{model}@{digest}") == f"{model}@{digest}"
    (model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match="the run was pinned to"):
        pin_base(f"{model}@{digest}")


@pytest.mark.parametrize("name", ["model@v2", "an @ inside/model", "a~#%41 b/ü@", "@"])
def test_a_folder_whose_name_holds_an_at_sign_is_found_pinned_or_not(model, tmp_path, name):
    folder = tmp_path / "x" / name
    folder.parent.mkdir(parents=True)
    model.rename(folder)
    assert split_pin(str(folder)) == (str(folder), None)
    pinned = pin_base(str(folder))
    assert split_pin(pinned) == (str(folder), folder_digest(folder))
    assert pin_base(pinned) == pinned
    assert fetch_base(pinned) == str(folder)


def test_a_tilde_is_the_home_folder(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pin_base("~/model") == pin_base(str(model))


def test_a_folder_without_a_tokenizer_is_named(model):
    (model / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(UserError, match="has no tokenizer"):
        check_base(pin_base(str(model)))
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is no safetensors file"):
        check_base(pin_base(str(model)))
    check_base("org/name@abc")


def test_the_shipped_base_is_one_that_adapters_can_change():
    check_base(str(SHIPPED))


def test_files_that_are_no_part_of_a_model_do_not_count(model):
    before = folder_digest(model)
    (model / "notes.png").write_bytes(b"x")
    assert folder_digest(model) == before


def test_a_sealed_folder_has_its_manifests_digest_wherever_it_lies(tmp_path, s3, monkeypatch):
    monkeypatch.setenv("FEYNTUNE_CACHE", str(tmp_path / "cache"))
    with write_artifact(tmp_path / "base", "base") as tmp:
        (tmp.path / "config.json").write_text("{}")
    manifest = push(open_store(f"{s3}/models"), tmp_path / "base", "tiny")
    in_folder, in_store = pin_base(str(tmp_path / "base")), pin_base(f"{s3}/models/tiny")
    assert split_pin(in_folder)[1] == split_pin(in_store)[1] == manifest.digest
    fetched = fetch_base(in_store)
    assert folder_digest(fetched) == manifest.digest
    assert fetch_base(in_store) == fetched


def test_a_model_in_the_place_of_the_pinned_one_is_refused(model, tmp_path, s3, monkeypatch):
    monkeypatch.setenv("FEYNTUNE_CACHE", str(tmp_path / "cache"))
    other = push_base(model, f"{s3}/models/other")
    pinned = f"{split_pin(other)[0]}@{'a' * 64}"
    for fetch in (fetch_base, fetch_tokenizer, fetch_tokenizer):
        with pytest.raises(UserError, match="not the model pinned as aaaa"):
            fetch(pinned)


def test_a_cache_that_another_user_made_is_not_used(tmp_path, monkeypatch):
    monkeypatch.delenv("FEYNTUNE_CACHE", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert _cache().stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("os.getuid", lambda: 12345)  # then this test is the other user
    with pytest.raises(UserError, match="belongs to another user"):
        _cache()


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "just-a-name"])
def test_a_model_that_is_not_there_is_named(name):
    with pytest.raises(UserError, match="no such folder"):
        pin_base(name)


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        pin_base(str(tmp_path))


def test_an_s3_base_that_is_not_sealed_says_how_to_put_it_there(s3):
    with pytest.raises(UserError, match="is not an artifact"):
        pin_base(f"{s3}/models/none")


def test_processes_that_want_a_stored_base_at_once_all_get_it(model, tmp_path, s3, monkeypatch):
    monkeypatch.setenv("FEYNTUNE_CACHE", str(tmp_path / "cache"))
    pinned = push_base(model, f"{s3}/models/at-once")
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(fetch_base, [pinned] * 3))
    assert len(set(folders)) == 1
    assert folder_digest(folders[0]) == split_pin(pinned)[1]


def test_a_pushed_base_is_the_model_alone_and_is_not_replaced(model, s3):
    (model / "notes.png").write_bytes(b"x")
    pinned = push_base(model, f"{s3}/models/mine/")
    assert pinned == pin_base(f"{s3}/models/mine") == push_base(model, f"{s3}/models/mine")
    assert (open_store(f"{s3}/models").get("mine/model.safetensors")) == b"weights"
    assert not open_store(f"{s3}/models").exists("mine/notes.png")
    (model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ArtifactError, match="already holds another base"):
        push_base(model, f"{s3}/models/mine")


@pytest.mark.parametrize("address", ["models/tiny", "s3://models", "s3://"])
def test_a_base_is_pushed_to_a_folder_in_a_bucket(model, address):
    with pytest.raises(UserError, match="names no folder in a bucket"):
        push_base(model, address)


def test_a_hub_that_is_away_gives_one_sentence_and_a_pinned_commit_does_without_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be found on the hub \(ConnectError\)"):
        pin_base("some/model")
    commit = "0123456789" * 4
    assert pin_base(f"some/model@{commit}") == f"some/model@{commit}"
    with pytest.raises(UserError, match="cannot be downloaded"):
        fetch_base(f"some/model@{commit}")
