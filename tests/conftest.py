"""What tests of several packages share: a mini base model and a mini split, made once a session.

Loopback only: nothing here or in a test reaches a hub, and one thread computes, so that bytes can be compared.
"""

import json
import os
import random
import uuid
from datetime import date, timedelta
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"  # no test asks the network for keys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feyntune.artifacts.artifact import write_artifact
from feyntune.artifacts.records import SCHEMA, TEXT_FORM

_SUBJECTS = {
    "hep-th": [
        "the brane",
        "this string vacuum",
        "a gauge theory",
        "the dual black hole",
        "our matrix model",
    ],
    "hep-ph": [
        "the Higgs boson",
        "a heavy quark",
        "the neutrino mass",
        "this collider signal",
        "a parton shower",
    ],
    "gr-qc": [
        "the horizon",
        "a gravitational wave",
        "our cosmology",
        "the metric perturbation",
        "a wormhole",
    ],
    "kitchen": [
        "the soup",
        "a loaf",
        "our oven",
        "the garden",
        "this old table",
        "a neighbour",
        "the market",
    ],
}
_VERBS = ["shows", "has", "gives", "leads to", "agrees with", "depends on", "breaks", "hides", "needs"]
_OBJECTS = {
    "hep-th": ["a hidden supersymmetry", "its large $N$ limit", "the $AdS_5$ boundary", "a moduli space"],
    "hep-ph": [
        "a cross section of 12 pb",
        "the next order in $\\alpha_s$",
        "the standard model",
        "flavour mixing",
    ],
    "gr-qc": ["a curvature singularity", "the ringdown phase", "dark energy", "the Einstein equations"],
    "kitchen": [
        "a good smell",
        "more salt",
        "the long winter",
        "bread and butter",
        "an open window",
        "7 apples",
    ],
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: on several processes none of them is left for the end."""
    for item in items:
        if _is_unit(item.path) and not item.get_closest_marker("slow"):
            item.add_marker("unit")
    slow = {i.path for i in items if i.get_closest_marker("slow")}
    items.sort(key=lambda i: i.path not in slow)


def texts(topic: str, count: int, seed: int = 0) -> list[str]:
    """Short texts of 1 to 8 sentences about one of the topics above."""
    r = random.Random(f"{topic}:{seed}")

    def sentence() -> str:
        sentence = f"{r.choice(_SUBJECTS[topic])} {r.choice(_VERBS)} {r.choice(_OBJECTS[topic])}"
        return sentence[0].upper() + sentence[1:] + "."

    return [" ".join(sentence() for _ in range(r.randint(1, 8))) for _ in range(count)]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> str:
    """A folder with a mini Llama (2 layers, hidden 64, at most 512 tokens) trained on kitchen talk."""
    from feyntune.training.tiny_base import make_tiny_base

    folder = tmp_path_factory.mktemp("base") / "tiny"
    sizes = {"vocab": 512, "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "context": 256}
    make_tiny_base(folder, texts("kitchen", 300), steps=60, tokens_per_step=512, **sizes)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_split(tmp_path_factory) -> str:
    """A sealed `split` with the mixtures hep-th (48/12/12 papers) and hep-ph+gr-qc (40/10/10)."""
    folder = tmp_path_factory.mktemp("split") / "split"
    rows, drawn = [], []
    for topic, mixture, count in (
        ("hep-th", "hep-th", 72),
        ("hep-ph", "hep-ph+gr-qc", 30),
        ("gr-qc", "hep-ph+gr-qc", 30),
    ):
        for i, text in enumerate(texts(topic, count, seed=1)):
            part = "train" if i < count * 4 // 6 else "validation" if i < count * 5 // 6 else "test"
            identifier = f"{topic}/{9901001 + i}"
            rows.append(
                {
                    "id": identifier,
                    "primary": topic,
                    "categories": [topic],
                    "title": text.split(".")[0],
                    "abstract": text,
                    "date": date(1999, 1, 1) + timedelta(days=i),
                    "license": None,
                    "withdrawn": False,
                    "source": "synthetic",
                    "split": part,
                    "cluster": identifier,
                }
            )
            drawn.append({"mixture": mixture, "split": part, "id": identifier})
    rows.sort(key=lambda row: row["id"])
    extra = [pa.field("split", pa.string(), nullable=False), pa.field("cluster", pa.string(), nullable=False)]
    schema = pa.schema([*SCHEMA, *extra], metadata=SCHEMA.metadata)
    with write_artifact(folder, "split", inputs={"corpus": "0" * 64}, config={"text_form": TEXT_FORM}) as tmp:
        path = Path(tmp.path)
        pq.write_table(pa.Table.from_pylist(rows, schema), path / "papers.parquet")
        pq.write_table(pa.Table.from_pylist(drawn), path / "mixtures.parquet")
        (path / "audit.json").write_text(json.dumps({"clean": True}))
    return str(folder)


@pytest.fixture(scope="session")
def s3_server():
    """Endpoint and keys of an S3 server: moto's, or with FEYNTUNE_TEST_S3=1 the one the environment names."""
    if os.environ.get("FEYNTUNE_TEST_S3") == "1":
        yield {n: os.environ[n] for n in ("S3_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        return
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {"S3_ENDPOINT": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtest"}
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch) -> str:
    """Address of a fresh bucket; the environment holds what is needed to open it."""
    from feyntune.artifacts.s3 import S3Store
    from feyntune.settings import S3Settings

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    uri = f"s3://feyntune-test-{uuid.uuid4().hex[:12]}"
    S3Store(uri, S3Settings.from_env()).client.make_bucket(uri.removeprefix("s3://"))
    return uri


@pytest.fixture(params=["folder", "s3"])
def store_uri(request, tmp_path) -> str:
    """Address of an empty store: a folder, and a prefix of a bucket."""
    if request.param == "folder":
        return str(tmp_path / "store")
    return request.getfixturevalue("s3") + "/some/prefix"


@pytest.fixture
def store(store_uri):
    from feyntune.artifacts.store import open_store

    return open_store(store_uri)


# Test files without processes, servers and training: `make check`. A new file may be added here, or carry the mark.
UNIT = {
    "artifacts/test_artifact.py",
    "artifacts/test_records.py",
    "engine/test_fair_queue.py",
    "evaluation/test_equal_tokens.py",
    "evaluation/test_overlap.py",
    "evaluation/test_prompts.py",
    "evaluation/test_repetition.py",
    "evaluation/test_statistics.py",
    "ingestion/test_atom.py",
    "ingestion/test_fields.py",
    "ingestion/test_kaggle.py",
    "ingestion/test_synthetic.py",
    "registry/test_gate.py",
    "registry/test_replay.py",
    "splitting/test_assign.py",
    "splitting/test_duplicates.py",
    "splitting/test_mixtures.py",
    "study/test_agreement.py",
    "study/test_study.py",
    "test_extras.py",
    "test_names.py",
    "test_packaging.py",
    "test_telemetry.py",
    "test_variants.py",
    "test_words.py",
}


def pytest_ignore_collect(collection_path, config):
    """`-m unit` does not even import the other files: they import torch."""
    unit = config.getoption("markexpr") == "unit" and collection_path.name.startswith("test_")
    return True if unit and not _is_unit(collection_path) else None


def _is_unit(path: Path) -> bool:
    return path.relative_to(Path(__file__).parent).as_posix() in UNIT


@pytest.fixture(autouse=True)
def _log_of_its_own():
    """`setup()` binds the log to the standard error of the test that calls it: the next test gets the log as it was."""
    import logging

    log = logging.getLogger("feyntune")
    before = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


@pytest.fixture(autouse=True)
def _unit_tests_stay_alone(request, monkeypatch):
    """A test marked `unit` starts no process and listens on no port, so that `make check` stays under a minute."""
    if request.node.get_closest_marker("unit") is None:
        return
    import socket
    import subprocess

    def refuse(*args, **kwargs):
        pytest.fail("a test marked `unit` starts a process or a server: take the mark away")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(socket.socket, "listen", refuse)
