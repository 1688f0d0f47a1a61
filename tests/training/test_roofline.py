import pytest

from feyntune.errors import UserError
from feyntune.training.estimate import paper_variants
from feyntune.training.roofline import makespan, plan_layouts


def test_the_suite_of_twenty_takes_34_hours_on_three_a100_with_one_gpu_a_variant():
    shorter, longer = plan_layouts(paper_variants(), "a100-40gb", 3)
    assert shorter.name == "one GPU a variant"
    assert shorter.hours == pytest.approx(34, rel=0.1)
    assert longer.hours == pytest.approx(43, rel=0.1)
    assert 5000 < shorter.tokens_per_second < 6000
    assert plan_layouts(paper_variants(), "h100", 3)[0].hours == pytest.approx(15, rel=0.1)


def test_one_gpu_has_one_layout():
    (only,) = plan_layouts(paper_variants(), "a100-40gb", 1)
    assert only.name == "one GPU a variant"
    assert only.hours == pytest.approx(only.gpu_hours)


def test_a_larger_pool_is_faster_until_the_longest_variant_decides():
    hours = [plan_layouts(paper_variants(), "h200", n)[0].hours for n in (1, 2, 4)]
    assert hours == sorted(hours, reverse=True)
    assert makespan([8, 1, 1], 10) == 8


def test_the_longest_job_starts_first():
    assert makespan([5, 4, 3, 3, 3], 2) == 10
    assert makespan([], 3) == 0


def test_unknown_hardware_is_refused():
    with pytest.raises(UserError, match="a100-40gb"):
        plan_layouts({}, "abacus", 3)
