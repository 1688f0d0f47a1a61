"""What a person sees of a command: exit codes, sentences, tables of 80 columns."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from feyntune.cli import main as cli
from feyntune.cli.options import print_table
from feyntune.cli.run import result_text
from feyntune.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, Interrupted, UserError, write_failure


def _error(*arguments: str) -> str:
    """The sentence of a command that is refused."""
    result = CliRunner().invoke(cli.app, list(arguments))
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    return str(result.exception)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A folder that passes for a split, so far as commands look before they import anything slow."""
    folder = tmp_path / "split"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"kind": "split"}))
    (folder / "audit.json").write_text(json.dumps({"mixtures": {"hep-th": {}, "hep-ph+gr-qc": {}}}))
    return folder


def test_a_folder_of_another_kind_is_named(split: Path, tmp_path: Path) -> None:
    train = ["--mix", "hep-th", "--method", "lora-all", "--base", "b", "--out", "o"]
    assert "There is no folder nowhere: make one with `feyntune split`" in _error("train", "--data", "nowhere", *train)
    assert "is no corpus but of kind split: give a corpus that `feyntune ingest` wrote" in _error(
        "split", str(split), "--out", "o"
    )
    assert f"did you mean {split}?" in _error("train", "--data", str(tmp_path), *train)


def test_mixture_and_method_are_checked_first(split: Path) -> None:
    train = ["train", "--data", str(split), "--base", "b", "--out", "o"]
    assert "did you mean hep-th?" in _error(*train, "--mix", "hep-tt", "--method", "lora-all")
    assert "choose lora-qkv or lora-all" in _error(*train, "--mix", "hep-th", "--method", "qkv")


def test_a_recipe_is_checked_first(split: Path) -> None:
    evaluate = ["evaluate", "--data", str(split), "--base", "b", "--out", "o"]
    assert "evaluate.precison" in _error(*evaluate, "--set", "evaluate.precison=fp32")
    assert "no such file" in _error("run", "--recipe", "nowhere.yaml")


def test_an_adapter_that_is_not_there_is_named(split: Path) -> None:
    assert "there is no folder nowhere" in _error(
        "evaluate", "--data", str(split), "--base", "b", "--out", "o", "--adapter", "x=nowhere"
    )
    assert "write --adapter NAME=DIR" in _error(
        "evaluate", "--data", str(split), "--base", "b", "--out", "o", "--adapter", "x"
    )


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error, code in ((UserError("No."), EXIT_BAD_INPUT), (Interrupted("saved."), EXIT_INTERRUPTED)):
        monkeypatch.setattr(cli, "app", _raising(error))
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code == code
    assert "interrupted: saved. Run the same command to resume." in capsys.readouterr().err


def _raising(error: Exception):  # type: ignore[no-untyped-def]
    def app(arguments: list[str]) -> None:
        raise error

    return app


def _saved(folder: Path, config: str, tensors: tuple[str, ...] = ("model.layers.0.self_attn.q_proj.weight",)) -> str:
    """A folder that passes for a saved model."""
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in tensors}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return str(folder)


@pytest.mark.parametrize(
    ("config", "tensors", "sentence"),
    [
        ("{}", (), "names no model_type"),
        ("{,", (), "config.json cannot be read"),
        ('{"model_type": "gpt2", "n_embd": 8}', ("h.0.attn.c_attn.weight",), "is a gpt2 model: give one of Llama's"),
        ('{"model_type": "llama", "hidden_size": 8}', (), "has no weights"),
        ('{"model_type": "llama", "hidden_size": 8}', ("lm_head.weight",), "with the modules that adapters change"),
    ],
)
def test_a_base_that_adapters_cannot_change_is_refused_by_every_command(
    split: Path, tmp_path: Path, config: str, tensors: tuple[str, ...], sentence: str
) -> None:
    base, out = _saved(tmp_path / "base", config, tensors), str(tmp_path / "out")
    assert sentence in _error(
        "train", "--data", str(split), "--base", base, "--mix", "hep-th", "--method", "lora-all", "--out", out
    )
    assert sentence in _error("evaluate", "--data", str(split), "--base", base, "--out", out)
    assert sentence in _error("run", "--base", base, "--workdir", out)
    assert sentence in _error("serve", "--base", base, "--port", "0", "--grpc-port", "0")
    assert sentence in _error("tasks", "sciq", "--base", base, "--out", out)
    assert not Path(out).exists()


def test_a_weights_file_that_is_none_is_named(split: Path, tmp_path: Path) -> None:
    base = _saved(tmp_path / "base", '{"model_type": "llama", "hidden_size": 8}')
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n"):
        (tmp_path / "base/model.safetensors").write_bytes(content)
        sentence = _error("evaluate", "--data", str(split), "--base", base, "--out", "o")
        assert "model.safetensors: it is no safetensors file" in sentence


def test_a_file_in_the_place_of_a_folder_is_refused(split: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    train = ["--data", str(split), "--mix", "hep-th", "--method", "lora-all", "--base", "b"]
    for command in (["train", *train], ["evaluate", "--data", str(split), "--base", "b"], ["ingest", "synthetic:5"]):
        assert "is a file, where a folder is to be written" in _error(*command, "--out", str(file))
    assert "is a file" in _error("run", "--workdir", str(file))
    assert "is a file" in _error("make-base", str(file))
    assert file.read_text() == "kept"


def test_a_folder_with_something_in_it_is_refused_before_the_training(tmp_path: Path) -> None:
    from feyntune.artifacts.artifact import ArtifactError, require_new

    (tmp_path / "note").write_text("kept")
    with pytest.raises(ArtifactError, match="is not empty"):
        require_new(tmp_path)
    require_new(tmp_path / "new")


def test_what_is_compared_is_looked_at_first(split: Path, tmp_path: Path) -> None:
    compare = ["compare", "--data", str(split), "--out", str(tmp_path / "o")]
    given = [*compare, "--evaluation", str(split), "--adapter", f"x={split}"]
    assert "is no evaluation but of kind split" in _error(*given)
    assert "is no comparison but of kind split" in _error("register", str(split), "--adapter", f"x={split}")


def test_what_needs_a_run_says_so_before_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "endpoints.yaml").write_text(
        "endpoints:\n  - {name: gpt, base_url: 'http://127.0.0.1:9/v1', model: m, key_env: KEY}\n"
    )
    asked = ["--endpoints", "endpoints.yaml", "--out", "o"]
    given = ["--completions", "runs/latest/evaluations"]
    for command in (["promote", "champion"], ["rollback"], ["registry", "show", "champion"], ["registry", "fsck"]):
        assert "There is no registry at runs/registry: `feyntune run` makes one" in _error(*command)
    assert "There is no registry at runs/registry" in _error("registry", "backup", "copy")
    assert "`feyntune run` and `feyntune evaluate` make completions" in _error(
        "judge", *given, "--judge", "gpt", *asked
    )
    assert "`feyntune run` and `feyntune evaluate` make completions" in _error(
        "study", "make", *given, "--rater", "a", "--out", "o", "--key", "k"
    )
    assert "There is no folder nowhere: make one with `feyntune evaluate`" in _error("ask", "nowhere", *asked)
    assert "There is no folder nowhere: make one with `feyntune study make`" in _error(
        "study", "serve", "nowhere", "--scores", "s"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["endpoints.yaml"]


@pytest.mark.parametrize(
    ("content", "sentence"), [("a: [1,\n b", "is not YAML"), ("- 1", "describes no endpoint"), ("", "no endpoint")]
)
def test_a_serving_description_that_is_none_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "serving.yaml").write_text(content)
    assert sentence in _error("deploy", str(tmp_path / "serving.yaml"))


@pytest.mark.parametrize("option", ["--devices", "--tokens-per-second", "--price"])
def test_plan_refuses_an_impossible_number(option: str) -> None:
    result = CliRunner().invoke(cli.app, ["plan", option, "-1"])
    assert result.exit_code == EXIT_BAD_INPUT
    assert f"Invalid value for '{option}'" in result.output


def test_bad_input_ends_before_torch_is_imported(split: Path) -> None:
    code = (
        "import sys; from feyntune.cli import main as m\n"
        f"sys.argv = ['feyntune', 'train', '--data', {str(split)!r}, '--mix', 'hep-tt', '--method', 'lora-all',"
        " '--base', 'b', '--out', 'o']\n"
        "try: m.main()\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules, 'pyarrow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False", "False"], done.stderr


def test_an_empty_registry_is_a_warning(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["registry", "ls", "--registry", str(tmp_path / "nowhere")])
    assert result.exit_code == 0
    assert "No version is registered." in result.stdout
    assert "there is no registry at" in result.stderr


@pytest.mark.parametrize("given", [[], ["--checkpoints", "kept"]])
def test_a_finished_training_leaves_no_checkpoints_but_where_they_were_asked_for(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    from feyntune.artifacts.artifact import write_artifact
    from feyntune.demo import SHIPPED
    from feyntune.training import launch

    def trained(**job: Any) -> Any:
        Path(job["checkpoints"]).mkdir()
        with write_artifact(job["out"], "adapter") as folder:
            folder.stats |= {"train_tokens": 1, "seconds": 1.0}
        return launch.read_manifest(job["out"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "launch", trained)
    train = ["train", "--data", str(split), "--mix", "hep-th", "--method", "lora-all", "--base", str(SHIPPED)]
    result = CliRunner().invoke(cli.app, [*train, "--out", "adapter", *given])
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"split", "adapter", *given[1:]}


def test_plan_names_a_mixture_without_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from feyntune.training import estimate

    monkeypatch.setattr(estimate, "paper_variants", lambda: {"hep-th/lora-qkv": 10})
    assert "gives no paper_training_papers" in _error("plan", "--variants", "hep-th/lora-all")


def test_a_table_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([["hep-th70+hep-ph15+gr-qc15/lora-all", "9.19"]], ["system", "perplexity"], right=(1,))
    assert capsys.readouterr().out.splitlines()[1] == "hep-th70+hep-ph15+gr-qc15/lora-all        9.19"


def test_the_result_of_a_run_fits_80_columns(tmp_path: Path) -> None:
    perplexity = {"perplexity": {"abstract_mean": 10.79}}
    delta = {"mean": -1.59, "low": -1.76, "high": -1.43}
    name = "hep-th70+hep-ph15+gr-qc15/lora-all"
    summary = {
        "base": perplexity,
        "variants": {
            name: {**perplexity, "delta": delta, "promoted": True, "gate": [], "champion": True},
            "hep-ph+gr-qc/lora-all": {
                **perplexity,
                "delta": {"mean": 1.06, "low": 0.95, "high": 1.17},
                "promoted": False,
                "gate": ["1.17 above the base, at most 0 is allowed"],
            },
        },
        "failures": [{"variant": "hep-th/lora-qkv", "step": "train"}],
        "champion": name,
        "arguments": {"base": f"{tmp_path}/base@{'0' * 64}"},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = result_text(tmp_path, tmp_path)
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines if "/tmp" not in line and str(tmp_path) not in line)
    assert any(line.startswith(name) and line.endswith("  champion") for line in lines)
    assert "hep-ph+gr-qc/lora-all: refused: 1.17 above the base, at most 0 is allowed" in lines
    assert "hep-th/lora-qkv: failed in train" in lines
    assert f"champion: {name}" in lines
    assert "0" * 64 not in text
    summary["variants"][name]["champion"] = False  # this run's version of it is not better than the one before
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert f"champion: {name} (of an earlier run)" in result_text(tmp_path, tmp_path).splitlines()


def test_a_tilde_after_an_equals_sign_is_the_home_folder(tmp_path, monkeypatch, capsys):
    """Shells leave it there, and a folder named ~ would be made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["feyntune", "ingest", "synthetic:20", "--out=~/corpus"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None), capsys.readouterr().err
    assert (tmp_path / "corpus/manifest.json").exists()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full, free some space"),
        (OSError(errno.EROFS, "Read-only file system", "/x/y"), "/x/y cannot be opened or written"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "change its rights"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    ],
)
def test_a_disk_that_takes_nothing_is_one_sentence(
    error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "app", _raising(error))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == EXIT_BAD_INPUT
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "no file")])
def test_another_failure_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", _raising(error))
    with pytest.raises(OSError, match=r"error|no file"):
        cli.main()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_real_full_disk_is_recognized() -> None:
    with pytest.raises(OSError, match="No space") as failed, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert "the disk is full" in (write_failure(failed.value) or "")
