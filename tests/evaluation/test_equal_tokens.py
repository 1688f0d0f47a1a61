import math

import pytest

from feyntune.evaluation.equal_tokens import equal_tokens


def curve(*validation, steps=10):
    points = [{"step": s, "epoch": 0, "perplexity": p} for s, p in validation]
    return {"loss": [1.0] * steps, "validation": points}


def test_a_longer_training_is_read_where_the_shortest_ends():
    e = math.e
    curves = {"short": curve((0, e**3), (10, e**2.5)), "long": curve((0, e**4), (10, e**3.6), (20, e**3), steps=20)}
    result = equal_tokens(curves, {"short": 1500, "long": 4000})
    assert result["tokens"] == 1500
    assert result["variants"]["short"] == {"at_equal_tokens": pytest.approx(-0.5), "at_end": -0.5, "tokens": 1500}
    long = result["variants"]["long"]  # 1500 of 4000 tokens are step 7.5, three quarters of the way to step 10
    assert long["at_equal_tokens"] == pytest.approx(-0.3)
    assert long["at_end"] == pytest.approx(-1.0)
    assert list(result["variants"]) == ["short", "long"]  # the best at equal tokens first


def test_without_two_curves_there_is_nothing_to_compare():
    assert equal_tokens({"one": curve((0, 9.0), (10, 8.0))}, {"one": 100}) is None
    curves = {"one": curve((0, 9.0), (10, 8.0)), "other": curve((0, None), (10, None))}
    assert equal_tokens(curves, {"one": 100, "other": 100}) is None
    assert equal_tokens(curves, {"one": 100, "other": None}) is None
