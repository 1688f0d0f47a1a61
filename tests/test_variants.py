import pytest
import yaml

from feyntune.errors import UserError
from feyntune.names import slug
from feyntune.variants import load_variants, select_variants


def test_ten_mixtures_and_two_methods() -> None:
    names = load_variants().names()
    assert len(names) == len({slug(n) for n in names}) >= 20


def test_every_mixture_has_a_rule_in_the_split_room() -> None:
    from pathlib import Path

    import feyntune.splitting

    rules = yaml.safe_load((Path(feyntune.splitting.__file__).parent / "mixtures.yaml").read_text())
    listed = {m["name"] for m in (rules["mixtures"] if isinstance(rules, dict) else rules)}
    assert {m.name for m in load_variants().mixtures} <= listed


def test_chosen_understands_the_papers_names_and_keeps_the_files_order() -> None:
    assert select_variants(["s3/lora-all", "hep-th/lora-qkv"]) == ["hep-th/lora-qkv", "hep-th+hep-ph+gr-qc/lora-all"]


def test_a_misspelt_variant_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match="did you mean hep-th/lora-all"):
        select_variants(["hepth/lora-all"])
    with pytest.raises(UserError, match="No variant is chosen"):
        select_variants([])
