import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Bytes are compared, and processes are forked: both want a single thread."""
    torch.set_num_threads(1)


@pytest.fixture
def job(tiny_split, tiny_base, tmp_path):
    """Makes the arguments of `train`: `job(out="a", seed=1)` trains with seed 1 into the folder a."""
    from feyntune.training.config import TrainConfig

    def make(out="adapter", mixture="hep-th", method="lora-all", checkpoints=None, **settings):
        settings = {"precision": "fp32", "epochs": 2, "learning_rate": 0.003, "validation_papers": 6, **settings}
        place = {"data": tiny_split, "mixture": mixture, "method": method, "base": tiny_base}
        return place | {"out": tmp_path / out, "config": TrainConfig(**settings), "checkpoints": checkpoints}

    return make
