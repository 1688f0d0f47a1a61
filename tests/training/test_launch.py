import json
import os
import signal
import subprocess
import sys
import threading
import time

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
    """Replaces the training processes by short scripts, one a rank, which are given the folder of outcomes."""

    def use(*scripts):
        def start(job, devices):
            folder = json.loads(job.read_text())["outcomes"]
            code = f"import os, signal, sys, time, json; folder = {str(folder)!r}\n"
            return [
                subprocess.Popen([sys.executable, "-c", code + script], start_new_session=True) for script in scripts
            ]

        monkeypatch.setattr(launching, "_start", start)

    return use


def leave(kind, message, code, rank=0):
    outcome = f"{{'kind': {kind!r}, 'message': {message!r}, 'time': time.time()}}"
    return f"open(folder + '/rank-{rank}.json', 'w').write(json.dumps({outcome})); os._exit({code})\n"


def test_the_processes_outcome_becomes_the_error(place, child):
    child(leave("input", "lower it", EXIT_BAD_INPUT))
    with pytest.raises(UserError, match="lower it"):
        launch(**place)
    child(leave("interrupted", "step 3 is saved", EXIT_INTERRUPTED))
    with pytest.raises(Interrupted, match="step 3 is saved"):
        launch(**place)
    child(leave("fault", "Traceback: KeyError", 1))
    with pytest.raises(TrainingFailed, match="KeyError"):
        launch(**place)


def test_a_killed_process_is_reported_in_one_sentence(place, child):
    child("os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(
        TrainingFailed, match=r"killed .SIGKILL., which usually means that the machine ran out of memory"
    ):
        launch(**place)
    child("sys.exit(9)")
    with pytest.raises(TrainingFailed, match="exit code 9"):
        launch(**place)


@pytest.mark.parametrize("signals", [1, 3, 5])
def test_any_number_of_signals_asks_every_process_once_and_waits_for_the_save(place, child, tmp_path, signals):
    ready = [tmp_path / f"ready-{rank}" for rank in (0, 1)]
    scripts = []
    for rank in (0, 1):
        stop = "count = []\ndef stop(*_):\n    count.append(1)\nsignal.signal(signal.SIGTERM, stop)\n"
        stop += f"open({str(ready[rank])!r}, 'w')\nwhile not count: time.sleep(0.01)\n"
        stop += "time.sleep(1)\n" if rank == 0 else ""  # rank 0 saves
        stop += "message = f'saved after {len(count)} signal'\n"
        scripts.append(stop + leave("interrupted", "MESSAGE", EXIT_INTERRUPTED, rank).replace("'MESSAGE'", "message"))
    child(*scripts)

    def send():
        while not all(path.exists() for path in ready):
            time.sleep(0.01)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.15)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(Interrupted, match="saved after 1 signal"):
        launch(**place)
    sender.join()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_first_rank_to_fail_is_the_one_reported_and_the_others_are_ended(place, child):
    cause = leave("fault", "the cause", 1, rank=1)
    child("time.sleep(0.3)\n" + leave("fault", "connection closed", 1), cause)
    with pytest.raises(TrainingFailed, match="the cause"):
        launch(**place)
    child("time.sleep(0.5)\n" + leave("fault", "connection closed", 1), "os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(TrainingFailed, match="process 1 was killed"):
        launch(**place)


def test_a_process_that_hangs_after_another_failed_does_not_hide_the_cause(place, child, monkeypatch):
    monkeypatch.setattr(launching, "_AFTER_FAULT", 0.3)
    child(leave("fault", "the disk is broken", 1), "time.sleep(600)")
    with pytest.raises(TrainingFailed, match="the disk is broken"):
        launch(**place)


def test_a_fault_after_a_new_checkpoint_starts_the_training_once_more(place, child, tmp_path):
    store = tmp_path / "store"
    runs = tmp_path / "runs"
    save = f"import pathlib; runs = pathlib.Path({str(runs)!r}); runs.open('a').write('x'); n = len(runs.read_text())\n"
    save += f"folder2 = pathlib.Path({str(store)!r}) / 'checkpoints/abc' / f'step-0000000{{n}}-abcdef'\n"
    save += "folder2.mkdir(parents=True); (folder2 / 'manifest.json').write_text('{}')\n"
    child(save + leave("fault", "NCCL abort", 1))
    with pytest.raises(TrainingFailed, match="NCCL abort"):
        launch(**place, checkpoints=str(store))
    assert runs.read_text() == "xx"
    child(f"open({str(runs)!r}, 'a').write('y')\n" + leave("fault", "NCCL abort", 1))
    with pytest.raises(TrainingFailed, match="NCCL abort"):
        launch(**place, checkpoints=str(store))
    assert runs.read_text() == "xxy"  # no new checkpoint: no second start


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
