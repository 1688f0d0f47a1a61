"""Faults of a training on several devices, through the launcher: a killed rank, repeated signals, a store that stalls.

The processes are forked, which saves the imports; what they run is what the launcher's own processes run.
"""

import multiprocessing
import os
import signal
import socket
import socketserver
import threading
import time

import pytest

from feyntune.artifacts.artifact import open_artifact
from feyntune.artifacts.store import FolderStore, StoreError, open_store, stored_manifest
from feyntune.errors import Interrupted
from feyntune.training import launch as launching
from feyntune.training import train as recipe
from feyntune.training.launch import launch
from tests.training.processes import curve, start_forked, wait_until


@pytest.fixture
def started(monkeypatch):
    """The processes of each start, in order."""
    starts = []

    def start(job, devices):
        starts.append(start_forked(job, devices))
        return starts[-1]

    monkeypatch.setattr(launching, "_start", start)
    monkeypatch.setattr(launching, "_AFTER_FAULT", 1)
    return starts


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(action)`: every process calls `action(step)` after each step; a step takes a twentieth of a second."""

    def use(action=lambda step: None):
        real = recipe.Metrics.stepped

        def stepped(self, step, *rest):
            real(self, step, *rest)
            time.sleep(0.05)
            if self.enabled:  # rank 0
                action(step)

        monkeypatch.setattr(recipe.Metrics, "stepped", stepped)

    return use


def place(split, base, out, store, devices, **settings):
    config = {"precision": "fp32", "max_steps": 12, "validation_papers": 6, "learning_rate": 0.003, **settings}
    made = {"data": split, "mixture": "hep-th", "method": "lora-qkv", "base": base, "out": str(out)}
    return made | {"config": {**config, "devices": devices}, "checkpoints": store}


def checkpoints(store):
    names = open_store(store).names("checkpoints/")
    return sorted(n.split("/")[2] for n in names if n.endswith("manifest.json"))


@pytest.fixture(scope="module")
def losses(tiny_split, tiny_base, tmp_path_factory):
    """Of the same training without a fault."""
    from feyntune.training.train import train

    made = place(tiny_split, tiny_base, tmp_path_factory.mktemp("whole") / "adapter", None, 1)
    train(**{**made, "config": recipe.TrainConfig(**made["config"])})
    return pytest.approx(curve(made["out"])["loss"], abs=1e-5)


def test_one_of_three_ranks_is_killed_and_the_training_starts_once_more(
    tiny_split, tiny_base, tmp_path, losses, started, at_step
):
    at_step()
    store = str(tmp_path / "store")

    def kill():
        wait_until(lambda: started and checkpoints(store))
        os.kill(started[0][1].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    manifest = launch(**place(tiny_split, tiny_base, tmp_path / "adapter", store, 3, save_every_steps=1))
    killer.join()
    assert len(started) == 2
    assert started[0][1].code == -signal.SIGKILL
    assert [p.code for p in started[1]] == [0, 0, 0]
    assert manifest.stats["interruptions"] == 1
    assert curve(tmp_path / "adapter")["loss"] == losses


def test_three_sigterms_do_not_lose_the_save_of_three_ranks(
    tiny_split, tiny_base, tmp_path, losses, started, at_step, monkeypatch
):
    mark = tmp_path / "mark"
    at_step(lambda step: mark.write_text(str(step)))
    put_file = FolderStore.put_file
    monkeypatch.setattr(FolderStore, "put_file", lambda *args: (time.sleep(0.3), put_file(*args)))
    store = str(tmp_path / "store")
    made = place(tiny_split, tiny_base, tmp_path / "adapter", store, 3)

    def stop():
        wait_until(mark.exists)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.15)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Interrupted, match=r"step \d+ is saved"):
        launch(**made)
    stopper.join()
    (saved,) = checkpoints(store)
    assert saved.startswith(f"step-{int(mark.read_text()):08d}")
    assert launch(**made).stats["interruptions"] == 1
    assert curve(tmp_path / "adapter")["loss"] == losses


class Gate(socketserver.ThreadingTCPServer):
    """Forwards connections to a server; while `stalled` it accepts them, and answers nothing."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, upstream):
        super().__init__(("127.0.0.1", 0), None)
        self.upstream = upstream
        self.stalled = multiprocessing.get_context("fork").Event()  # the forked processes set it

    def finish_request(self, request, client_address):
        with socket.create_connection(self.upstream) as server:
            back = threading.Thread(target=self.pump, args=(server, request), daemon=True)
            back.start()
            self.pump(request, server)
            back.join()

    def pump(self, source, sink):
        try:
            while data := source.recv(65536):
                while self.stalled.is_set():
                    time.sleep(0.01)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def handle_error(self, request, client_address):
        pass


@pytest.fixture
def gate(s3, s3_server, monkeypatch):
    """A gate before the S3 server, and limits of a second in place of eleven minutes."""
    host, port = s3_server["S3_ENDPOINT"].removeprefix("http://").split(":")
    server = Gate((host, int(port)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("S3_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr("feyntune.artifacts.s3.READ_SECONDS", 0.4)
    for module in (launching, recipe):
        monkeypatch.setattr(module, "open_store", lambda uri, tries=1: open_store(uri, 1))
    yield server
    server.stalled.clear()
    server.shutdown()
    server.server_close()


def test_a_store_that_stalls_at_resume_fails_within_its_limits_and_the_next_try_resumes(
    tiny_split, tiny_base, tmp_path, losses, started, at_step, s3, gate, monkeypatch
):
    made = place(tiny_split, tiny_base, tmp_path / "adapter", f"{s3}/run", 2)
    at_step(lambda step: os.kill(os.getppid(), signal.SIGTERM) if step == 3 else None)
    with pytest.raises(Interrupted, match=r"step \d+ is saved"):
        launch(**made)
    real = recipe.resume

    def resume(*args):
        gate.stalled.set()
        return real(*args)

    with monkeypatch.context() as m:
        m.setattr(recipe, "resume", resume)
        with pytest.raises(StoreError, match="does not answer"):
            launch(**made)
    gate.stalled.clear()
    manifest = launch(**made)
    assert manifest.stats["interruptions"] == 1
    assert curve(tmp_path / "adapter")["loss"] == losses


def test_a_store_that_stalls_in_training_costs_checkpoints_only(
    tiny_split, tiny_base, tmp_path, losses, started, at_step, s3, gate
):
    def stall(step):
        {2: gate.stalled.set, 8: gate.stalled.clear}.get(step, lambda: None)()

    at_step(stall)
    made = place(tiny_split, tiny_base, tmp_path / "adapter", f"{s3}/run", 2, save_every_steps=1)
    manifest = launch(**made)
    assert manifest.stats["interruptions"] == 0
    assert curve(tmp_path / "adapter")["loss"] == losses
    assert stored_manifest(open_store(f"{s3}/run"), "adapter").digest == manifest.digest


def test_a_store_that_stalls_at_the_end_is_a_fault_and_the_next_try_ends_at_once(
    tiny_split, tiny_base, tmp_path, losses, started, at_step, s3, gate, monkeypatch
):
    at_step()
    made = place(tiny_split, tiny_base, tmp_path / "adapter", f"{s3}/run", 2, save_every_steps=4)
    real = recipe.push

    def push(store, folder, name):
        gate.stalled.set()
        return real(store, folder, name)

    with monkeypatch.context() as m:
        m.setattr(recipe, "push", push)
        with pytest.raises(StoreError, match="does not answer"):
            launch(**made)
    assert started[0][1].code == 0  # rank 1 did not wait for the store
    gate.stalled.clear()
    other = str(tmp_path / "another-pod")
    manifest = launch(**{**made, "out": other})  # another pod: from the last checkpoint
    assert manifest.stats["interruptions"] == 1
    assert curve(other)["loss"] == losses
    assert stored_manifest(open_store(f"{s3}/run"), "adapter").digest == manifest.digest
    assert launch(**made).digest == open_artifact(made["out"]).digest  # the first pod: it is there already
    assert len(started) == 2


def test_a_store_that_stalls_at_the_end_and_recovers_gets_the_adapter_without_a_second_training(
    tiny_split, tiny_base, tmp_path, losses, started, at_step, s3, gate, monkeypatch
):
    at_step()
    made = place(tiny_split, tiny_base, tmp_path / "adapter", f"{s3}/run", 2, save_every_steps=4)
    real, newest = recipe.push, launching._newest_checkpoint

    def push(store, folder, name):
        gate.stalled.set()
        return real(store, folder, name)

    def recovered(checkpoints):
        gate.stalled.clear()
        return newest(checkpoints)

    monkeypatch.setattr(recipe, "push", push)
    monkeypatch.setattr(launching, "_newest_checkpoint", recovered)
    manifest = launch(**made)
    assert len(started) == 1
    assert manifest.stats["interruptions"] == 0
    assert curve(made["out"])["loss"] == losses
    assert stored_manifest(open_store(f"{s3}/run"), "adapter").digest == manifest.digest
