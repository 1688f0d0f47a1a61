import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from feyntune.artifacts.artifact import open_artifact
from feyntune.artifacts.store import FolderStore, StoreError
from feyntune.errors import EXIT_INTERRUPTED, Interrupted
from feyntune.training import checkpoints as saving
from feyntune.training import train as recipe
from tests.training.processes import accumulate_in_shards, fork_training, is_running, run_training, wait_for, wait_until


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")


def digest(made):
    return open_artifact(made["out"], "adapter").digest


def saved(store):
    return sorted(p.parent.name for p in Path(store).glob("checkpoints/*/*/manifest.json"))


def stop_at(monkeypatch, *steps, number=signal.SIGTERM):
    """Send this process a signal when it has done one of `steps`, each once; it ends after the step that follows."""
    left, real = set(steps), recipe.Metrics.stepped

    def stepped(self, step, *rest):
        real(self, step, *rest)
        if step in left:
            left.remove(step)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(recipe.Metrics, "stepped", stepped)


def test_sigterm_saves_and_the_same_call_goes_on_to_the_same_bytes(job, store, monkeypatch):
    recipe.train(**job(out="whole"))
    stop_at(monkeypatch, 1, 4)
    made = job(out="parts", checkpoints=store)
    for step in (2, 5):
        with pytest.raises(Interrupted, match=f"step {step} is saved"):
            recipe.train(**made)
        assert saved(store)[-1].startswith(f"step-{step:08d}")
    assert recipe.train(**made).stats["interruptions"] == 2
    assert digest(made) == digest(job(out="whole"))
    assert saved(store) == []  # dropped once the adapter is in the store
    assert open_artifact(Path(store) / "adapter").digest == digest(made)


def test_a_signal_during_validation_is_obeyed_too(job, store, monkeypatch):
    real, calls = recipe.validate, []

    def validate(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(recipe, "validate", validate)
    made = job(out="parts", checkpoints=store)
    with pytest.raises(Interrupted, match="step 3 is saved"):
        recipe.train(**made)
    recipe.train(**made)
    recipe.train(**job(out="whole"))
    assert digest(made) == digest(job(out="whole"))


def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(job, store, monkeypatch, caplog):
    recipe.train(**job(out="whole"))
    stop_at(monkeypatch, 1, 4)
    made = job(out="parts", checkpoints=store)
    for _ in range(2):
        with pytest.raises(Interrupted):
            recipe.train(**made)
    newest = max(Path(store).glob("checkpoints/*/*/state.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-100])
    monkeypatch.setattr(saving.log, "propagate", True)
    recipe.train(**made)
    assert "step-00000005" in caplog.text
    assert "is skipped" in caplog.text
    assert digest(made) == digest(job(out="whole"))


class Trouble(FolderStore):
    """A store that is slow, answers nothing for a while, and returns what it reads first in half."""

    away = 0
    halves = 0

    def _suffer(self):
        time.sleep(0.01)
        if Trouble.away > 0:
            Trouble.away -= 1
            raise StoreError("the store does not answer")

    def put_file(self, name, path):
        self._suffer()
        super().put_file(name, path)

    def get_file(self, name, path):
        time.sleep(0.01)
        super().get_file(name, path)
        if Trouble.halves > 0:
            Trouble.halves -= 1
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_save_at_a_time(monkeypatch):
    """A step waits for the save before it, however slow the machine."""
    save = saving.Checkpointer.save
    monkeypatch.setattr(saving.Checkpointer, "save", lambda self, s: (save(self, s), self.wait(60))[0])


def test_a_store_in_trouble_delays_the_run_and_loses_nothing(job, store, monkeypatch):
    recipe.train(**job(out="whole"))
    monkeypatch.setattr(recipe, "open_store", lambda uri, tries: Trouble(uri))
    monkeypatch.setattr(Trouble, "away", 3)
    one_save_at_a_time(monkeypatch)  # so that three fail and the fourth does not
    stop_at(monkeypatch, 4)
    made = job(out="parts", checkpoints=store, save_every_steps=1)
    with pytest.raises(Interrupted):
        recipe.train(**made)
    monkeypatch.setattr(Trouble, "halves", 1)
    stop_at(monkeypatch, 5)
    with pytest.raises(Interrupted):
        recipe.train(**made)
    assert Trouble.away == Trouble.halves == 0
    recipe.train(**made)
    assert digest(made) == digest(job(out="whole"))


def test_checkpoints_are_kept_by_policy_and_never_overwritten(job, store, monkeypatch):
    monkeypatch.setattr(saving.Checkpointer, "clear", lambda self: None)
    real, names = saving.push, []

    def push(store, folder, name):
        names.append(name)
        return real(store, folder, name)

    monkeypatch.setattr(saving, "push", push)
    one_save_at_a_time(monkeypatch)
    recipe.train(**job(checkpoints=store, save_every_steps=1, keep_checkpoints=3))
    assert len(names) == len(set(names)) == 6
    assert [n[:13] for n in saved(store)] == ["step-00000004", "step-00000005", "step-00000006"]


@pytest.mark.parametrize("point", ["save_file", "put_file", "manifest"])
def test_a_kill_inside_a_save_or_an_upload_loses_nothing(job, store, monkeypatch, point):
    run_training(job(out="whole"))
    made = job(out="parts", checkpoints=store, save_every_steps=1)

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as m:
        if point == "save_file":
            m.setattr(saving, "save_file", die)
        elif point == "put_file":
            m.setattr(FolderStore, "put_file", die)
        else:
            real = FolderStore.put_file
            m.setattr(
                FolderStore,
                "put_file",
                lambda self, name, path: die() if name.endswith("manifest.json") else real(self, name, path),
            )
        assert wait_for(fork_training(made)) == [-signal.SIGKILL]
        assert saved(store) == []
    run_training(made)
    assert digest(made) == digest(job(out="whole"))


def test_training_goes_on_with_another_number_of_devices(job, store, monkeypatch):
    monkeypatch.setattr(recipe, "accumulate_gradients", accumulate_in_shards)
    run_training(job(out="whole"))
    alone = job(out="parts", checkpoints=store, save_every_steps=1)
    pids = fork_training(alone)
    wait_until(lambda: saved(store))
    os.kill(pids[0], signal.SIGKILL)
    wait_for(pids)
    run_training(job(out="parts", checkpoints=store, devices=3), ranks=3)
    assert digest(alone) == digest(job(out="whole"))


def kills(job, store, count, seed):
    """Kill trainings at random moments, `count` times; every one that reaches its end must have the same bytes."""
    r = random.Random(seed)
    started = time.monotonic()
    run_training(job(out="whole"))
    longest = time.monotonic() - started
    made = job(out="parts", checkpoints=store, save_every_steps=1)
    done, finished = 0, 0
    while done < count or finished == 0:
        (pid,) = fork_training(made)
        ends = time.monotonic() + r.uniform(0, longest if done < count else 1e6)
        while is_running(pid) and time.monotonic() < ends:
            time.sleep(0.002)
        number = r.choice((signal.SIGKILL, signal.SIGTERM))
        if is_running(pid):
            os.kill(pid, number)
            done += 1
        (code,) = wait_for([pid])
        assert code in (0, -signal.SIGKILL, -signal.SIGTERM, EXIT_INTERRUPTED)
        if code == 0:
            finished += 1
            assert digest(made) == digest(job(out="whole"))
            shutil.rmtree(made["out"])
            shutil.rmtree(store)
        elif made["out"].exists():  # killed between the sealing and the end: the launcher finds it there
            assert digest(made) == digest(job(out="whole"))
            shutil.rmtree(made["out"])
    return finished


def test_a_few_kills_at_random_moments(job, store):
    assert kills(job, store, 4, seed=1) > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fifty_kills_at_random_moments(job, store):
    assert kills(job, store, 50, seed=2) > 0
