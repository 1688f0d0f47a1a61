"""What is refused before anything starts."""

import pytest

from feyntune.errors import UserError
from feyntune.kubeflow.preflight import preflight


@pytest.mark.parametrize(
    ("given", "tested", "message"),
    [
        ({"days": {"until": "", "after": "2024-8-22"}}, {}, "after is '2024-8-22', not a day"),
        ({"categories": ["hep-th", "cs"]}, {"categories": ["hep-ht"]}, r"hep-ht is not among .*categories: cs, hep-th"),
        ({"categories": ["cs"]}, {}, "hep-th is not among"),  # what is tested where nothing is said
        ({"categories": ["hep th"]}, {}, "'hep th' is not an archive"),
        (
            {"mixtures": [{"name": "a", "parts": {"astro-ph": "all"}}]},
            {},
            "'hep-th/lora-all': your mixtures give a/lor",
        ),
        ({"mixtures": [{"name": "a", "parts": {"astr-ph": "all"}}]}, {}, "mixtures: a: .*did you mean astro-ph"),
        (
            {"mixtures": [{"name": "hep-th", "parts": {"q-fin": "all"}}], "categories": ["hep-th"]},
            {},
            "hep-th: q-fin is",
        ),
        ({"max_bad": 3}, {}, "max_bad is 3, not a share"),
    ],
)
def test_what_would_fail_after_hours_is_refused_in_seconds(tiny_base, tmp_path, given, tested, message):
    place = str(tmp_path / "store")
    with pytest.raises(UserError, match=message):
        preflight("synthetic:60", ["hep-th/lora-all"], tiny_base, {"evaluate": tested}, 1, place, place, **given)


def test_an_archive_may_be_tested_whose_categories_are_ingested(tiny_base, tmp_path):
    place = str(tmp_path / "store")
    tested = {"evaluate": {"categories": ["cs", "hep-th"]}}
    args = ("synthetic:60", ["hep-th/lora-all"], tiny_base, tested, 1, place, place)
    assert preflight(*args, categories=["cs.LG", "hep-th"]).variants == ["hep-th/lora-all"]


def test_several_seeds_are_trainings_of_their_own_and_the_first_keeps_the_variants_name(tiny_base, tmp_path):
    place = str(tmp_path / "store")
    recipe = {"train": {"seeds": 3, "seed": 5}}
    pinned = preflight("synthetic:60", ["hep-th/lora-qkv"], tiny_base, recipe, 1, place, place)
    assert pinned.variants == ["hep-th/lora-qkv", "hep-th/lora-qkv/seed6", "hep-th/lora-qkv/seed7"]
