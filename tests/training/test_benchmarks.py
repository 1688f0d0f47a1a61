"""The benchmark that a card is settled with runs whole on a CPU, with a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_gpu_benchmark_runs_whole_on_a_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(out)]
    subprocess.run(command, check=True, timeout=800, cwd=ROOT)
    result = json.loads(out.read_text())
    assert result["hardware"]
    for precision in ("nf4", "bf16"):
        rows = result[f"speed_{precision}"]
        assert [(r["tokens"], r["recomputing_layers"]) for r in rows] == [
            (n, k) for n in (300, 600, 900) for k in (0, 2)
        ]
        assert all(r["useful_tokens_per_second"] > 0 and r["planned_bytes"] > 0 for r in rows)
    losses = result["losses"]
    assert len(losses["engine"]) == len(losses["trainer"]) == losses["steps"]
    assert losses["largest_difference"] < 1e-4
    killed, stalled = result["faults"]["killed_rank"], result["faults"]["stalled_store"]
    assert (killed["starts"], killed["interruptions"], killed["steps"]) == (2, 1, 12)
    assert stalled["seconds_rank_1_ended_before_rank_0"] > 1
    assert stalled["error"] == ""


def test_without_a_card_it_says_what_to_do():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a card")
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "give --tiny" in done.stderr
