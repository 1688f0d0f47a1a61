"""Where a model runs."""

import pytest
import torch

from feyntune.errors import UserError
from feyntune.model.load import get_device


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be seen")
def test_a_step_that_was_given_gpus_and_sees_none_does_not_train_on_its_cpus(monkeypatch):
    assert get_device() == torch.device("cpu")
    monkeypatch.setenv("FEYNTUNE_EXPECT_GPU", "1")
    with pytest.raises(UserError, match="torch sees none"):
        get_device()


def test_a_model_that_takes_long_to_load_shows_its_progress(tiny_base, monkeypatch, caplog):
    from itertools import count

    from feyntune import telemetry
    from feyntune.model.load import load_base

    seconds = count(0, 7)
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: float(next(seconds)))
    monkeypatch.setattr(telemetry.log, "propagate", True)
    caplog.set_level("INFO", logger="feyntune")
    load_base(tiny_base, "fp32", "cpu")
    lines = [m for m in caplog.messages if m.startswith("loading the base model in fp32: ")]
    assert len(lines) > 2
    assert "tensors" in lines[0]
    assert "s left" in lines[0]
