import pytest
import torch

from feyntune.training.dropout import DropoutMasks


def masks(lengths, seeds, layer=0, p=0.05, features=64):
    state = DropoutMasks(p)
    state.set(lengths, seeds)
    return state.keep(torch.ones(1, sum(lengths), features), layer).float()


def test_a_documents_mask_does_not_depend_on_the_others():
    together = masks([5, 7, 3], [11, 22, 33])
    assert torch.equal(together[:, 5:12], masks([7], [22]))
    assert torch.equal(together, masks([5, 7, 3], [11, 22, 33]))


def test_documents_and_layers_have_different_masks():
    assert not torch.equal(masks([50], [1]), masks([50], [2]))
    assert not torch.equal(masks([50], [1], layer=0), masks([50], [1], layer=1))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_rate_is_p(p):
    dropped = masks([2000], [3], p=p)
    n = dropped.numel()
    assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / n) ** 0.5)


def test_values_along_both_axes_are_dropped_independently():
    mask = (masks([4000], [5], p=0.5, features=16) > 0).float()[0]
    correlation = torch.corrcoef(mask.T) - torch.eye(16)
    assert correlation.abs().max() < 0.1


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="set the lengths"):
        DropoutMasks(0.5).keep(torch.ones(1, 3, 4), 0)
