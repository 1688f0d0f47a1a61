import pytest
from safetensors.torch import load_file, save_file

from feyntune.artifacts.artifact import open_artifact
from feyntune.errors import UserError
from feyntune.training import train as recipe
from tests.training.processes import accumulate_in_shards, curve, run_training


@pytest.fixture
def masters(monkeypatch):
    """Leaves the fp32 weights beside each adapter; the adapter's own are rounded to 16 bits."""
    real = recipe.write_adapter

    def write(model, base, folder):
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        save_file(weights, folder / "masters.safetensors")
        real(model, base, folder)

    monkeypatch.setattr(recipe, "write_adapter", write)
    return lambda made: load_file(made["out"] / "masters.safetensors")


def test_one_two_and_three_devices_train_the_same_adapter(job, masters):
    settings = {"learning_rate": 3e-4, "epochs": 4, "lora_dropout": 0.05}
    made = [job(out=f"on-{n}", devices=n, **settings) for n in (1, 2, 3)]  # a batch of 16 over 3, too
    for n, one in enumerate(made, 1):
        run_training(one, ranks=n)
    alone = masters(made[0])
    for other in made[1:]:
        assert curve(other["out"])["loss"] == pytest.approx(curve(made[0]["out"])["loss"], abs=1e-5)
        for name, weights in masters(other).items():
            assert (weights - alone[name]).abs().max() <= 1e-6
        assert open_artifact(other["out"]).config == open_artifact(made[0]["out"]).config


def test_only_the_order_of_the_sum_differs_between_numbers_of_devices(job, masters, monkeypatch):
    """With gradients added in a fixed order the bytes are the same: order of data, dropout, validation, optimizer."""
    monkeypatch.setattr(recipe, "accumulate_gradients", accumulate_in_shards)
    made = [job(out=f"on-{n}", devices=n) for n in (1, 2, 3)]
    for n, one in enumerate(made, 1):
        run_training(one, ranks=n)
    assert len({open_artifact(one["out"]).digest for one in made}) == 1  # masters and curve included


def test_a_last_batch_smaller_than_the_number_of_devices_is_trained(job):
    made = job(global_batch_size=47, devices=3, epochs=1)  # 48 papers: a second batch of one
    run_training(made, ranks=3)
    assert len(curve(made["out"])["loss"]) == 2


def test_more_gpus_than_there_are_is_refused(job, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match="this machine has 0 GPUs"):
        recipe.train(**job(device="cuda"))
