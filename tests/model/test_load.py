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
