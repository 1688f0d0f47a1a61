import json
import pickle

import numpy as np
import pytest
import yaml
from safetensors.numpy import save

from feyntune.artifacts.artifact import ArtifactError, open_artifact, write_artifact
from feyntune.errors import UserError
from feyntune.registry.register import checked_adapter, register
from feyntune.registry.registry import Registry
from tests.registry.factories import BASE, CORPUS, make_adapter, make_comparison, resealed

GOOD, BETTER, BAD = (-2.0, -3.0, -1.0), (-5.0, -6.0, -4.0), (-0.5, -1.5, 0.5)
QKV, ALL, GR = "hep-th/lora-qkv", "hep-th/lora-all", "gr-qc/lora-qkv"


@pytest.fixture
def adapters(tmp_path):
    return {v: make_adapter(tmp_path / "adapters" / v, v) for v in (QKV, ALL, GR)}


def test_what_passes_is_promoted_and_the_best_is_champion(store_uri, adapters, tmp_path):
    comparison = make_comparison(tmp_path / "c", adapters, {QKV: GOOD, ALL: BETTER, GR: BAD})
    done = register(comparison, adapters, store_uri)
    assert done.champion == ALL
    assert done.champion_version == done.variants[ALL].version
    assert done.previous is None
    assert {n: (v.stage, v.promoted, v.champion) for n, v in done.variants.items()} == {
        QKV: ("production", True, False),
        ALL: ("production", True, True),
        GR: ("candidate", False, False),
    }
    assert done.variants[ALL].reasons == []
    assert "3 above the champion's perplexity" in done.variants[QKV].reasons[0]
    assert "is 0.5 above" in done.variants[GR].reasons[0]
    registry = Registry.open(store_uri)
    assert registry.aliases() == {"champion": done.champion_version, "champion:hep-th": done.champion_version}
    assert len(registry.history()) == 2  # one event adds, one promotes


def test_registering_the_same_again_adds_nothing(store_uri, adapters, tmp_path):
    comparison = make_comparison(tmp_path / "c", adapters, {QKV: GOOD, ALL: BETTER, GR: BAD})
    first = register(comparison, adapters, store_uri)
    before = sorted(Registry.open(store_uri).store.names())
    assert register(comparison, adapters, store_uri) == first
    assert sorted(Registry.open(store_uri).store.names()) == before


def test_where_none_passes_there_is_no_champion(tmp_path, adapters):
    comparison = make_comparison(tmp_path / "c", adapters, {GR: BAD})
    done = register(comparison, {GR: adapters[GR]}, str(tmp_path / "r"))
    assert (done.champion, done.champion_version, done.previous) == (None, None, None)
    assert Registry.open(str(tmp_path / "r")).aliases() == {}


def later(tmp_path, deltas, n, **options):
    """Another campaign's adapters and comparison."""
    made = {v: make_adapter(tmp_path / f"later-{n}" / v, v, seed=n) for v in deltas}
    return make_comparison(tmp_path / f"c-{n}", made, deltas, **options), made


def test_only_a_better_one_takes_the_champions_place(tmp_path):
    uri = str(tmp_path / "r")
    first = register(*later(tmp_path, {QKV: GOOD}, 1), uri)
    worse = register(*later(tmp_path, {QKV: (-1.5, -2.0, -1.0)}, 2), uri)
    assert worse.champion_version == first.champion_version
    assert not worse.variants[QKV].promoted  # nor does it take the variant's name
    assert "0.5 above the perplexity of the version in production" in worse.variants[QKV].reasons[0]
    assert Registry.open(uri).resolve(QKV).name == first.champion_version
    better = register(*later(tmp_path, {QKV: BETTER}, 3), uri)
    assert better.champion_version == better.variants[QKV].version
    assert better.previous == first.champion_version
    assert Registry.open(uri).rollback().name == first.champion_version


def test_a_champion_of_another_test_set_is_replaced_unless_the_policy_keeps_it(tmp_path):
    uri, policy = str(tmp_path / "r"), tmp_path / "gate.yaml"
    first = register(*later(tmp_path, {QKV: BETTER}, 1), uri)
    policy.write_text("on_incomparable_champion: keep\n")
    second = register(*later(tmp_path, {QKV: GOOD}, 2, test="f" * 64), uri, policy=policy)
    assert second.champion_version == first.champion_version
    assert "another test set" in second.variants[QKV].reasons[0]
    replaced = register(*later(tmp_path, {QKV: GOOD}, 3, test="f" * 64), uri)
    assert replaced.champion_version == replaced.variants[QKV].version


def test_a_title_does_not_change_hands_on_a_gain_in_another_precision(tmp_path):
    uri, bf16 = str(tmp_path / "r"), {"precision": "bf16"}
    old = later(tmp_path, {QKV: GOOD}, 1)
    first = register(*old, uri)
    new, made = later(tmp_path, {ALL: BETTER}, 2, conditions=bf16)
    second = register(new, made, uri)
    assert second.champion_version == first.champion_version
    assert "the champion was measured otherwise, in precision (bf16, not fp32)" in second.variants[ALL].reasons[0]
    # The older one is measured again, as the newer: now they compare.
    both = make_comparison(tmp_path / "both", old[1] | made, {QKV: GOOD, ALL: BETTER}, conditions=bf16)
    again = register(both, old[1] | made, uri)
    assert again.variants[ALL].reasons == ["3 below the champion's perplexity (abstract_mean)"]
    next_one = register(*later(tmp_path, {GR: (-2.5, -3.0, -2.0)}, 3, conditions=bf16), uri)
    assert next_one.champion == GR


def test_what_a_person_rolled_back_stays_so(tmp_path):
    uri = str(tmp_path / "r")
    first = register(*later(tmp_path, {QKV: GOOD}, 1), uri)
    run = later(tmp_path, {QKV: BETTER, ALL: (-4.0, -5.0, -3.0)}, 2)
    register(*run, uri)
    Registry.open(uri).rollback()
    again = register(*run, uri)
    assert again.champion_version == first.champion_version
    assert again.variants[QKV].stage == "staging"
    assert again.variants[QKV].reasons == ["it was rolled back: only `feyntune promote` brings it back"]


def test_without_promotion_what_passed_waits(tmp_path):
    uri, run = str(tmp_path / "r"), later(tmp_path, {QKV: GOOD, GR: BAD}, 1)
    done = register(*run, uri, promote=False)
    assert done.champion is None
    assert [(v.stage, v.promoted) for v in done.variants.values()] == [("candidate", False), ("staging", False)]
    assert register(*run, uri).champion == QKV


def test_a_registration_that_died_before_promoting_is_completed(tmp_path, monkeypatch):
    uri, run = str(tmp_path / "r"), later(tmp_path, {QKV: GOOD}, 1)
    with monkeypatch.context() as m:
        m.setattr(Registry, "decide_promotion", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            register(*run, uri)
    assert register(*run, uri).champion == QKV


def test_a_race_for_champion_is_decided_again_on_what_the_other_left(tmp_path, monkeypatch):
    uri = str(tmp_path / "r")
    decide, raced = Registry.decide_promotion, []

    def other_first(self, seen, versions, aliases):
        if not raced:
            raced.append(True)
            register(*later(tmp_path, {ALL: BETTER}, 2), uri)
        return decide(self, seen, versions, aliases)

    monkeypatch.setattr(Registry, "decide_promotion", other_first)
    done = register(*later(tmp_path, {QKV: GOOD}, 1), uri)
    assert done.champion == ALL
    assert done.variants[QKV].promoted
    assert any(e.rejected for e in Registry.open(uri).history())


def test_the_lineage_goes_from_the_corpus_to_the_comparison(tmp_path, adapters):
    comparison = make_comparison(tmp_path / "c", adapters, {QKV: GOOD})
    register(comparison, {QKV: adapters[QKV]}, str(tmp_path / "r"))
    lineage = Registry.open(str(tmp_path / "r")).resolve("champion").lineage
    assert lineage["corpus"] == CORPUS
    assert lineage["base"] == BASE
    assert lineage["adapter"] == open_artifact(adapters[QKV]).digest
    assert lineage["comparison"] == open_artifact(comparison).digest


def test_the_card_says_what_was_measured_in_the_hubs_format(tmp_path, adapters):
    from huggingface_hub import ModelCard

    comparison = make_comparison(tmp_path / "c", adapters, {QKV: GOOD})
    register(comparison, {QKV: adapters[QKV]}, str(tmp_path / "r"))
    registry = Registry.open(str(tmp_path / "r"))
    card = ModelCard(registry.card(QKV))
    assert card.data.library_name == "peft"
    figures = {r.metric_name: r.metric_value for r in card.data.eval_results}
    assert figures == {"perplexity, mean over abstracts": 38.0, "perplexity, over all tokens": 36.0}
    assert "95 % interval [-3, -1]" in card.text
    assert "12345" in card.text
    assert "base_model" not in yaml.safe_load(registry.card(QKV).split("---")[1])  # a folder is no hub id
    assert str(tmp_path) not in registry.card(QKV)


def test_the_card_names_a_base_from_the_hub(tmp_path):
    commit = "a" * 40
    made = {QKV: make_adapter(tmp_path / "a", QKV, base=commit)}
    comparison = make_comparison(tmp_path / "c", made, {QKV: GOOD}, base=commit)
    register(comparison, made, str(tmp_path / "r"))
    front = yaml.safe_load(Registry.open(str(tmp_path / "r")).card(QKV).split("---")[1])
    assert front["base_model"] == "org/base"


def test_an_exported_adapter_is_its_card_its_configuration_and_its_weights(tmp_path, adapters):
    comparison = make_comparison(tmp_path / "c", adapters, {QKV: GOOD})
    register(comparison, {QKV: adapters[QKV]}, str(tmp_path / "r"))
    registry = Registry.open(str(tmp_path / "r"))
    registry.export("champion", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_bytes())["peft_type"] == "LORA"
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (adapters[QKV] / weights).read_bytes()
    with pytest.raises(UserError, match="is not empty"):
        registry.export("champion", tmp_path / "out")


# --- what is refused


def config(**changes):
    whole = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": ["q_proj"], **changes}
    return json.dumps(whole).encode()


def tensors(**named):
    return save({k: np.zeros(shape, np.float32) for k, shape in named.items()})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_model.bin": pickle.dumps({})}, r"adapter_model\.bin is refused: an adapter may hold only"),
        ({"optimizer.pt": b""}, r"optimizer\.pt is refused"),
        ({"modeling.py": b""}, r"modeling\.py is refused"),
        ({"adapter_model.safetensors": None}, r"adapter_model\.safetensors is missing"),
        ({"adapter_config.json": None}, r"adapter_config\.json is missing"),
        ({"adapter_model.safetensors": pickle.dumps([1] * 100)}, "is not a safetensors file"),
        ({"adapter_model.safetensors": b""}, "is not a safetensors file"),
        (
            {"adapter_model.safetensors": tensors(**{"m.weight": (4, 4)})},
            r"holds m\.weight, which is not a LoRA weight",
        ),
        ({"adapter_model.safetensors": tensors(**{"m.lora_A.weight": (8, 8)})}, r"has rank \[8\].* says 4"),
        ({"adapter_model.safetensors": tensors()}, r"has rank \[\]"),
        ({"adapter_config.json": config(peft_type="IA3")}, "is a IA3 on"),
        ({"adapter_config.json": config(target_modules="all-linear")}, "only LORA on named modules"),
        ({"adapter_config.json": b"{"}, "is not a PEFT configuration"),
        ({"adapter_config.json": b"[]"}, "is not a PEFT configuration"),
        ({"adapter_config.json": config(r=8)}, r"has rank \[4\].* says 8"),
    ],
)
def test_anything_but_lora_weights_in_safetensors_is_refused_by_name(tmp_path, adapters, files, message):
    bad = resealed(adapters[QKV], **files)
    with pytest.raises(UserError, match=message):
        checked_adapter(bad)


def test_a_refused_adapter_is_reported_and_the_others_are_registered(tmp_path, adapters):
    comparison = make_comparison(tmp_path / "c", adapters, {QKV: GOOD, ALL: BETTER})
    bad = resealed(adapters[ALL], **{"evil.pkl": b"x"})
    done = register(comparison, {QKV: adapters[QKV], ALL: bad}, str(tmp_path / "r"))
    assert done.champion == QKV
    assert (done.variants[ALL].stage, done.variants[ALL].version) == ("refused", None)
    assert "evil.pkl is refused" in done.variants[ALL].reasons[0]
    assert [v.variant for v in Registry.open(str(tmp_path / "r")).versions()] == [QKV]
    assert not any("evil" in n for n in Registry.open(str(tmp_path / "r")).store.names())


def refusal(tmp_path, adapter, comparison):
    done = register(comparison, {QKV: adapter}, str(tmp_path / "r"))
    assert Registry.open(str(tmp_path / "r")).versions() == []
    return done.variants[QKV].reasons[0]


def test_an_adapter_that_was_not_the_one_measured_is_refused(tmp_path, adapters):
    comparison = make_comparison(tmp_path / "c", adapters, {QKV: GOOD})
    assert "give the adapter that was measured" in refusal(tmp_path, make_adapter(tmp_path / "o", QKV, 7), comparison)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    other = {QKV: make_adapter(tmp_path / "o", QKV, base="0" * 64)}
    comparison = make_comparison(tmp_path / "c", other, {QKV: GOOD})
    assert "was trained on base 0000000000000000" in refusal(tmp_path, other[QKV], comparison)


def test_a_damaged_adapter_is_refused_with_the_files_name(tmp_path, adapters):
    comparison = make_comparison(tmp_path / "c", adapters, {QKV: GOOD})
    (adapters[QKV] / "curve.json").write_text("[]")
    assert "curve.json does not match its manifest" in refusal(tmp_path, adapters[QKV], comparison)


def test_an_adapter_without_its_base_is_refused(tmp_path, adapters):
    bare = tmp_path / "bare"
    with write_artifact(bare, "adapter") as tmp:
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            (tmp.path / file).write_bytes((adapters[QKV] / file).read_bytes())
    with pytest.raises(UserError, match="does not name its base"):
        checked_adapter(bare)


def test_figures_that_are_no_numbers_refuse_the_variant(tmp_path, adapters):
    comparison = make_comparison(tmp_path / "c", adapters, {QKV: (float("nan"), -1.0, -0.5)})
    assert "Input should be a finite number" in refusal(tmp_path, adapters[QKV], comparison)


def test_a_failed_branch_is_passed_over_and_an_unknown_one_refused(tmp_path, adapters):
    comparison = make_comparison(tmp_path / "c", adapters, {QKV: GOOD}, failures=(ALL,))
    done = register(comparison, {v: adapters[v] for v in (QKV, ALL)}, str(tmp_path / "r"))
    assert list(done.variants) == [QKV]
    with pytest.raises(UserError, match=f"{GR} is not in"):
        register(comparison, adapters, str(tmp_path / "r"))
    with pytest.raises(UserError, match=f"measured {QKV}, whose adapter was not given"):
        register(comparison, {}, str(tmp_path / "r"))


def test_a_comparison_that_is_none_is_refused(tmp_path, adapters):
    with pytest.raises(ArtifactError, match="holds a adapter, not a comparison"):
        register(adapters[QKV], {}, str(tmp_path / "r"))
    changed = resealed(make_comparison(tmp_path / "c", adapters, {QKV: GOOD}), **{"summary.json": b"{}"})
    with pytest.raises(UserError, match=r"summary\.json: corpus: Field required"):
        register(changed, {QKV: adapters[QKV]}, str(tmp_path / "r"))


def test_this_room_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, feyntune.registry.register; sys.exit('torch' in sys.modules or 'kserve' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
