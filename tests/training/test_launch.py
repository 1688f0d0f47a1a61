import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from feyntune.artifacts.artifact import open_artifact
from feyntune.artifacts.store import open_store, push
from feyntune.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, Interrupted, UserError
from feyntune.training import launch as launching
from feyntune.training.config import adapter_metadata, parse_config
from feyntune.training.launch import TrainingFailed, launch


@pytest.fixture
def place(tiny_split, tiny_base, tmp_path):
    """Arguments of `launch`."""
    place = {"data": tiny_split, "mixture": "hep-th", "method": "lora-qkv", "base": tiny_base}
    return place | {"out": str(tmp_path / "adapter"), "config": {"precision": "fp32", "max_steps": 2}}


@pytest.fixture
def child(monkeypatch):
    """Replaces the training process by a short script, which is given the folder of outcomes."""

    def use(script):
        def start(job, devices):
            folder = json.loads(job.read_text())["outcomes"]
            code = f"import os, signal, sys, time, json; folder = {str(folder)!r}\n" + script
            return subprocess.Popen([sys.executable, "-c", code])

        monkeypatch.setattr(launching, "_child", start)

    return use


LEAVE = "open(folder + '/rank-0.json', 'w').write(json.dumps({'kind': %r, 'message': %r})); sys.exit(%d)"


def test_the_processes_outcome_becomes_the_error(place, child):
    child(LEAVE % ("input", "lower it", EXIT_BAD_INPUT))
    with pytest.raises(UserError, match="lower it"):
        launch(**place)
    child(LEAVE % ("interrupted", "step 3 is saved", EXIT_INTERRUPTED))
    with pytest.raises(Interrupted, match="step 3 is saved"):
        launch(**place)
    child(LEAVE % ("fault", "Traceback: KeyError", 1))
    with pytest.raises(TrainingFailed, match="KeyError"):
        launch(**place)


def test_a_killed_process_is_reported_in_one_sentence(place, child):
    child("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(TrainingFailed, match=r"killed .SIGKILL., as a machine does that runs out of memory"):
        launch(**place)
    child("sys.exit(9)")
    with pytest.raises(TrainingFailed, match="exit code 9"):
        launch(**place)


def test_sigterm_is_passed_on_and_waited_for(place, child, tmp_path):
    ready = tmp_path / "ready"
    stop = "def stop(*_):\n    " + LEAVE % ("interrupted", "saved", EXIT_INTERRUPTED) + "\n"
    child(stop + f"signal.signal(signal.SIGTERM, stop); open({str(ready)!r}, 'w'); time.sleep(60)")

    def send():
        while not ready.exists():
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    with pytest.raises(Interrupted, match="saved"):
        launch(**place)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_first_rank_to_fail_is_the_one_reported(tmp_path):
    for rank, message in ((0, "connection closed"), (1, "the cause")):
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps({"kind": "fault", "message": message}))
    (tmp_path / "agent.json").write_text(json.dumps({"rank": 1, "code": 1}))
    assert "the cause" in str(launching._ending(tmp_path, 1, False, "v"))
    (tmp_path / "rank-1.json").unlink()
    (tmp_path / "agent.json").write_text(json.dumps({"rank": 1, "code": -9}))
    assert "process 1 was killed" in str(launching._ending(tmp_path, 1, False, "v"))


def test_an_adapter_that_is_there_is_found_in_place_or_in_the_store(place, child, job, tmp_path):
    from feyntune.training.train import train

    child("raise SystemExit('not to be started')")
    made = job(out="made", method="lora-qkv", epochs=4, max_steps=2, learning_rate=3e-4, validation_papers=1000)
    manifest = train(**made)
    config = {**adapter_metadata(parse_config(place["config"]), "hep-th", "lora-qkv")}
    assert manifest.config == json.loads(json.dumps(config))
    store = str(tmp_path / "store")
    push(open_store(store), made["out"], "adapter")
    assert launch(**place, checkpoints=store).digest == manifest.digest  # pulled
    assert open_artifact(place["out"]).digest == manifest.digest
    other = str(tmp_path / "other")
    launch(**place, checkpoints=other)  # in place; put into the store
    assert open_artifact(f"{tmp_path}/other/adapter").digest == manifest.digest
    with pytest.raises(UserError, match="differs in learning_rate"):
        launch(**{**place, "config": {**place["config"], "learning_rate": 0.1}})
    launch(**{**place, "config": {**place["config"], "keep_checkpoints": 7}})  # decides nothing about the adapter


def test_an_unknown_setting_or_value_is_refused_by_name(place):
    with pytest.raises(UserError, match=r"train\.learning_rat: there is no such setting, perhaps learning_rate"):
        launch(**{**place, "config": {"learning_rat": 1}})
    with pytest.raises(UserError, match=r"train\.batch: this setting is now called global_batch_size"):
        launch(**{**place, "config": {"batch": 8}})
    with pytest.raises(UserError, match="lora_dropout: Input should be less than 1"):
        launch(**{**place, "config": {"lora_dropout": 1}})


def test_the_parent_loads_no_torch():
    code = "import sys, feyntune.training.launch; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("devices", [1, 2])
def test_real_processes_train_and_report_bad_input(place, devices, tmp_path):
    config = {**place["config"], "devices": devices}
    assert launch(**{**place, "config": config}).stats["devices"] == devices
    with pytest.raises(UserError, match="no training papers"):
        launch(**{**place, "config": config, "mixture": "cs", "out": str(tmp_path / "other")})
