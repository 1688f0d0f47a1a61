import pytest

from feyntune.errors import UserError
from feyntune.names import slug
from feyntune.training.config import TARGETS
from feyntune.training.estimate import paper_variants
from feyntune.variants import METHODS, Catalog, load_mixtures, load_variants, select_variants


def test_ten_mixtures_and_two_methods() -> None:
    names = load_variants().names()
    assert len(names) == len({slug(n) for n in names}) >= 20


def test_every_user_of_the_catalog_sees_the_same_variants() -> None:
    assert list(TARGETS) == list(METHODS) == list(load_variants().methods)
    assert load_mixtures() == load_variants().mixtures
    assert set(paper_variants()) == {f"{m.name}/{k}" for m in load_mixtures() if m.paper for k in METHODS}


def test_a_mixture_or_a_method_is_one_entry() -> None:
    raw = load_variants().model_dump()
    raw["mixtures"].append({"name": "quant-ph", "parts": {"quant-ph": "all"}})
    raw["methods"]["lora-mlp"] = {"description": "the MLP", "target_modules": ["up_proj", "down_proj"]}
    assert {"quant-ph/lora-mlp", "quant-ph/lora-qkv", "hep-th/lora-mlp"} <= set(Catalog.model_validate(raw).names())


def test_selection_understands_the_papers_names_and_keeps_the_order_of_the_file() -> None:
    assert select_variants(["s3/lora-all", "hep-th/lora-qkv"]) == ["hep-th/lora-qkv", "hep-th+hep-ph+gr-qc/lora-all"]


def test_a_misspelt_variant_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match="did you mean hep-th/lora-all"):
        select_variants(["hepth/lora-all"])
    with pytest.raises(UserError, match="No variant is selected"):
        select_variants([])


def test_a_mixture_without_a_method_is_completed() -> None:
    with pytest.raises(UserError, match="did you mean hep-th/lora-qkv or hep-th/lora-all"):
        select_variants(["hep-th"])
