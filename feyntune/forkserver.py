"""Start Python modules as processes by fork, from a process that has imported their libraries already.

A step of the local run takes a second or two; importing torch, transformers, peft and sentence-transformers takes ten.
A server imports them once and computes nothing: it has one thread, which forks, so that no lock can be held by a thread
that the fork leaves behind. It refuses to fork where an import has started a thread. Used on Linux without GPU drivers
(their state does not survive a fork); `start` falls back to a process of its own everywhere else, and when the server
is gone.

One connection is one process: the server sends its pid, then its exit code. When the client goes away, the process is
asked to end by SIGTERM; when the process that started the server goes away, all of them are.
"""

import contextlib
import gc
import importlib
import json
import logging
import os
import runpy
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ADDRESS = "FEYNTUNE_FORKSERVER"  # environment of a step: the server that its own processes are started by
# One thread computes, and the allocator of Arrow starts none of its own.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd")
_MESSAGE = 1 << 17  # bytes of a request
_LOST = -signal.SIGKILL  # exit code of a process whose server was killed


class Process(Protocol):
    """What the callers use of subprocess.Popen."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


class ForkedProcess:
    """A process forked by the server, with the methods of Process."""

    def __init__(self, connection: socket.socket, pid: int):
        self._connection, self.pid = connection, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._receive(timeout=0)

    def wait(self) -> int:
        code = self._receive(timeout=None)
        assert code is not None
        return code

    def _receive(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            answer = self._connection.recv(64)
            self.returncode = int(answer) if answer else _LOST
            self._connection.close()
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """A server process that imports `modules` at once; close it by leaving the context."""

    def __init__(self, modules: Sequence[str]):
        self._folder = tempfile.mkdtemp(prefix="feyntune-")  # for this user alone
        self.address = f"{self._folder}/socket"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(self.address)
        listener.listen(64)
        watched, self._alive = os.pipe()
        command = [sys.executable, "-m", __spec__.name, str(listener.fileno()), str(watched), *modules]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(listener.fileno(), watched),
        )
        listener.close()
        os.close(watched)

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._alive)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def can_fork() -> bool:
    """Whether this machine's processes may be forked after they have imported torch."""
    if sys.platform != "linux" or any(Path(driver).exists() for driver in _DRIVERS):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def start(
    module: str,
    args: Sequence[str],
    env: Mapping[str, str],
    *,
    address: str | None,
    stdout: int | None = None,
    new_session: bool = False,
) -> Process:
    """Start `python -m module args…`: by the server at `address`, or as a process of its own.

    Args:
        env: the process's whole environment.
        stdout: a descriptor for its output and its errors; this process's by default.
        new_session: a terminal's Ctrl-C does not reach it.
    """
    if address is not None:
        request = {"module": module, "args": list(args), "env": dict(env), "cwd": os.getcwd(), "session": new_session}
        with contextlib.suppress(OSError, ValueError):  # ValueError: the server ended before it said a pid
            return _ask(address, request, [1, 2] if stdout is None else [stdout, stdout])
    return subprocess.Popen(
        [sys.executable, "-m", module, *args],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=None if stdout is None else subprocess.STDOUT,
        start_new_session=new_session,
    )


def _ask(address: str, request: dict[str, Any], descriptors: list[int]) -> ForkedProcess:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(address)
        message = json.dumps(request).encode()
        if len(message) > _MESSAGE:
            raise OSError("the request is too long for one message")
        socket.send_fds(connection, [message], descriptors)
        return ForkedProcess(connection, int(connection.recv(64)))
    except BaseException:
        connection.close()
        raise


@dataclass
class _Child:
    pid: int
    connection: socket.socket | None


def _serve(listener: socket.socket, alive: int) -> dict[str, Any] | None:
    """Fork for every request. Returns the request in the new process, and None in the server at its end."""
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, "listener")
    selector.register(alive, selectors.EVENT_READ, "alive")
    children: dict[int, _Child] = {}  # by pidfd
    open_ = True
    while open_ or children:
        for key, _ in selector.select():
            if key.data == "listener":
                connection, _ = listener.accept()
                message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE, 2)
                if not message:
                    connection.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    for child in children.values():
                        if child.connection is not None:
                            child.connection.close()
                    os.dup2(descriptors[0], 1)
                    os.dup2(descriptors[1], 2)
                    for descriptor in (*children, *descriptors, alive):
                        os.close(descriptor)
                    connection.close()
                    listener.close()
                    return dict(json.loads(message))
                for descriptor in descriptors:
                    os.close(descriptor)
                child = _Child(pid, connection)
                pidfd = os.pidfd_open(pid)
                children[pidfd] = child
                with contextlib.suppress(OSError):
                    connection.send(str(pid).encode())
                selector.register(pidfd, selectors.EVENT_READ, ("ended", pidfd))
                selector.register(connection, selectors.EVENT_READ, ("left", pidfd))
            elif key.data == "alive":
                open_ = False
                selector.unregister(alive)
                selector.unregister(listener)
                for child in children.values():
                    os.kill(child.pid, signal.SIGTERM)  # not reaped yet: the pid is this child's
            elif key.data[0] == "ended" and key.data[1] in children:
                child = children.pop(key.data[1])
                selector.unregister(key.data[1])
                os.close(key.data[1])
                code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
                if child.connection is not None:
                    selector.unregister(child.connection)
                    with contextlib.suppress(OSError):
                        child.connection.send(str(code).encode())
                    child.connection.close()
            elif key.data[0] == "left" and key.data[1] in children:
                child = children[key.data[1]]
                if child.connection is not None:
                    selector.unregister(child.connection)
                    child.connection.close()
                    child.connection = None
                    os.kill(child.pid, signal.SIGTERM)
    return None


def _become(request: dict[str, Any]) -> None:
    """Run the request's module as `python -m` would; this process was just forked."""
    if request["session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    logging.root.handlers.clear()  # of the libraries, on the server's own output
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()  # as at the start of a process; `random` does so by itself
    module = request["module"]
    sys.modules.pop(module, None)
    sys.argv = [module, *request["args"]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the processes, and for who started them
    listener, alive = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    for module in sys.argv[3:]:
        importlib.import_module(module)
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("an import has started a thread")
    gc.freeze()  # what is imported stays: collecting it in a process would copy its pages
    request = _serve(listener, alive)
    if request is not None:
        _become(request)


if __name__ == "__main__":
    main()
