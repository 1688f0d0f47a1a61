"""What the tests on a cluster share: the commands, and an address on this machine for a Service there."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from kubernetes import config


def kubectl(*arguments: str, stdin: str | None = None) -> str:
    done = subprocess.run(["kubectl", *arguments], input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def helm(namespace: str, *arguments: str) -> str:
    done = subprocess.run(["helm", *arguments, "-n", namespace], capture_output=True, text=True)
    assert done.returncode == 0, f"helm {' '.join(arguments)}: {done.stdout}{done.stderr}{state(namespace)}"
    return done.stdout


def state(namespace: str) -> str:
    """What a failed command's message ends with: pods, the last events, the ends of the logs."""

    def kubectl_output(*arguments: str) -> str:
        done = subprocess.run(["kubectl", "-n", namespace, *arguments], capture_output=True, text=True)
        return done.stdout + done.stderr

    pods = kubectl_output("get", "pods", "-o", "wide")
    events = kubectl_output("get", "events", "--sort-by=.lastTimestamp").splitlines()[-15:]
    names = [line.split()[0] for line in pods.splitlines()[1:]]
    logs = "".join(f"--- {name}\n{kubectl_output('logs', '--tail=15', name)}" for name in names)
    return "\n".join(["", pods, *events, logs])


@contextmanager
def namespace(name: str) -> Iterator[None]:
    """An empty namespace on the cluster of KUBECONFIG, removed at the end."""
    if "KUBECONFIG" not in os.environ:
        pytest.fail("KUBECONFIG is not set: `make test-cluster` needs a cluster")
    config.load_kube_config()
    kubectl("delete", "namespace", name, "--ignore-not-found", "--timeout=5m")
    kubectl("create", "namespace", name)
    yield
    subprocess.run(["kubectl", "delete", "namespace", name, "--wait=false"], check=False)


@contextmanager
def forwarded(namespace: str, service: str, port: int) -> Iterator[str]:
    """The address of a port forwarded to a ready pod of the Service, for as long as that pod lives."""
    process = subprocess.Popen(
        ["kubectl", "-n", namespace, "port-forward", f"service/{service}", f":{port}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " -> " in line, f"no pod of {service} to forward to{state(namespace)}"
        yield "http://127.0.0.1:" + line.split(" -> ")[0].rpartition(":")[2]
    finally:
        process.terminate()
        process.wait()
