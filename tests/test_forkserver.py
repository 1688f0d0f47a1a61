"""Processes by fork: they do what a process of their own does, and end when nobody is left to wait for them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from feyntune import forkserver
from feyntune.forkserver import ForkedProcess, ForkServer, Process, can_fork, start

pytestmark = pytest.mark.skipif(not can_fork(), reason="needs Linux without GPU drivers")


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path of what the server starts."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
    (folder / "slow_library.py").write_text("import os\nimported_in = os.getpid()\n")
    (folder / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    (folder / "report.py").write_text(
        "import json, os, random, sys, slow_library\n"
        "if __name__ == '__main__':\n"
        "    print(json.dumps({'argv': sys.argv[1:], 'env': os.environ.get('GIVEN'), 'cwd': os.getcwd(),\n"
        "        'pid': os.getpid(), 'parent': os.getppid(), 'library': slow_library.imported_in,\n"
        "        'random': random.random()}))\n"
        "    print('an error', file=sys.stderr)\n"
        "    sys.exit(int(sys.argv[1]))\n"
    )
    (folder / "wait.py").write_text(
        "import signal, sys, time\n"
        "def end(number, frame):\n    open(sys.argv[1] + '.ended', 'w').write(str(number))\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "open(sys.argv[1], 'w').close()\n"
        "time.sleep(60)\n"
    )
    return folder


@pytest.fixture
def server(modules: Path) -> Iterator[ForkServer]:
    with ForkServer(["slow_library"]) as server:
        yield server


def _report(address: str | None, code: int) -> tuple[Process, dict, str]:
    reading, writing = os.pipe()
    process = start("report", [str(code), "two words"], {**os.environ, "GIVEN": "x"}, address=address, stdout=writing)
    os.close(writing)
    with open(reading) as f:
        first, rest = f.readline(), f.read()
    return process, json.loads(first), rest


def _appears(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def test_a_forked_process_is_like_one_of_its_own(server: ForkServer) -> None:
    for address in (server.address, None):
        process, report, rest = _report(address, 3)
        assert process.wait() == 3
        assert process.poll() == 3
        assert isinstance(process, ForkedProcess) == (address is not None)
        assert report["argv"] == ["3", "two words"]
        assert report["env"] == "x"
        assert report["cwd"] == os.getcwd()
        assert report["pid"] == process.pid
        assert rest == "an error\n"


def test_it_imports_once_and_draws_its_own_random_numbers(server: ForkServer) -> None:
    (_, first, _), (_, second, _) = _report(server.address, 0), _report(server.address, 0)
    assert first["library"] == second["library"] == first["parent"]
    assert first["random"] != second["random"]


def test_after_an_import_that_starts_a_thread_nothing_is_forked(modules: Path) -> None:
    with ForkServer(["slow_library", "threaded"]) as server:
        process, report, _ = _report(server.address, 0)
        assert process.wait() == 0
        assert not isinstance(process, ForkedProcess)
        assert report["parent"] == os.getpid()


def test_a_module_that_is_not_there_is_no_reason_to_stop(modules: Path) -> None:
    with ForkServer(["nowhere_to_be_found"]) as server:
        assert _report(server.address, 0)[0].wait() == 0


def test_a_process_is_asked_to_end_when_its_client_goes(server: ForkServer, tmp_path: Path) -> None:
    process = start("wait", [str(tmp_path / "w")], os.environ, address=server.address)
    assert isinstance(process, ForkedProcess)
    _appears(tmp_path / "w")
    process._connection.close()
    _appears(tmp_path / "w.ended")
    assert (tmp_path / "w.ended").read_text() == str(int(signal.SIGTERM))


def test_signals_reach_it(server: ForkServer, tmp_path: Path) -> None:
    process = start("wait", [str(tmp_path / "w")], os.environ, address=server.address)
    assert process.poll() is None
    _appears(tmp_path / "w")
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    process = start("wait", [str(tmp_path / "v")], os.environ, address=server.address)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_a_killed_server_is_a_killed_process(server: ForkServer, tmp_path: Path) -> None:
    process = start("wait", [str(tmp_path / "w")], os.environ, address=server.address)
    _appears(tmp_path / "w")
    server._process.kill()
    assert process.wait() == -signal.SIGKILL
    os.kill(process.pid, signal.SIGTERM)
    _appears(tmp_path / "w.ended")
    assert _report(server.address, 0)[0].wait() == 0  # by a process of its own


def test_everything_ends_with_the_process_that_started_the_server(modules: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\n"
        "from feyntune.forkserver import ForkServer, start\n"
        "server = ForkServer([])\n"
        "process = start('wait', [sys.argv[1]], os.environ, address=server.address)\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "print(server._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "w")]
    pid = int(subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout)
    _appears(tmp_path / "w.ended")
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]:
        time.sleep(0.01)


def test_a_request_too_long_for_a_message_gets_a_process_of_its_own(server: ForkServer) -> None:
    # One string of an environment may have 128 KiB, so two.
    long = {f"LONG_{i}": "x" * (forkserver._MESSAGE // 2) for i in range(2)}
    assert start("report", ["0"], {**os.environ, **long}, address=server.address, stdout=2).wait() == 0
