import pytest
from hypothesis import given
from hypothesis import strategies as st

from feyntune.conditions import Conditions
from feyntune.errors import UserError
from feyntune.registry.gate import (
    Clause,
    Interval,
    Measured,
    Perplexity,
    Policy,
    check_gate,
    compare_to_champion,
    read_policy,
)

FP32 = Conditions(
    test="t",
    precision="fp32",
    lora="fp32",
    attention="sdpa",
    max_length=None,
    special_tokens="BOS",
    evaluation="feyntune-evaluation-2",
)
BF16 = FP32.model_copy(update={"precision": "bf16"})


def measured(
    mean=-2.0, low=-3.0, high=-1.0, abstracts=100, token=-2.0, test="t", base="b", memorization=None, conditions=FP32
):
    return Measured(
        conditions=conditions,
        test=test,
        base=base,
        abstracts=abstracts,
        base_perplexity=Perplexity(abstract_mean=40, token=38),
        perplexity=Perplexity(abstract_mean=40 + mean, token=38 + token),
        delta=Interval(mean=mean, low=low, high=high),
        memorization=memorization,
    )


def test_an_interval_below_zero_passes():
    assert check_gate(measured(), Policy()).passed
    assert check_gate(measured(), Policy()).reasons == []


@pytest.mark.parametrize("high", [0.0, 0.5])
def test_an_interval_that_reaches_zero_is_refused_and_says_by_how_much(high):
    gate = check_gate(measured(high=high), Policy())
    assert not gate.passed
    message = f"variant minus base is -2, 95 % interval [-3, {high:.4g}]"
    assert gate.reasons == [f"{message}: its upper end must lie below 0 and is {high:.4g} above"]


@given(
    st.floats(-100, 100),
    st.floats(0, 50),
    st.floats(0, 50),
    st.integers(1, 10_000),
    st.floats(0, 10),
    st.sampled_from(["abstract_mean", "token"]),
)
def test_whatever_the_policy_no_variant_passes_whose_interval_does_not_lie_below_the_base(
    mean, down, up, abstracts, margin, metric
):
    policy = Policy(metric=metric, margin_over_base=margin, minimum_abstracts=1)
    result = check_gate(measured(mean, mean - down, mean + up, abstracts), policy)
    assert result.passed == (mean + up < -margin)


def test_a_margin_over_the_base_is_asked_of_the_upper_end():
    assert check_gate(measured(high=-1.0), Policy(margin_over_base=0.9)).passed
    refused = check_gate(measured(high=-1.0), Policy(margin_over_base=1.5))
    assert "must lie below -1.5 and is 0.5 above" in refused.reasons[0]


def test_too_few_abstracts_are_refused_and_counted():
    assert check_gate(measured(abstracts=30), Policy()).passed
    assert check_gate(measured(abstracts=29), Policy()).reasons == [
        "measured on 29 abstracts, the policy asks for 30: 1 too few"
    ]


def test_every_failed_clause_is_named():
    gate = check_gate(measured(high=1, abstracts=3, memorization=0.5), Policy(maximum_memorization=0.1))
    assert [c.clause for c in gate.clauses if not c.passed] == [
        "below_base",
        "minimum_abstracts",
        "maximum_memorization",
    ]


@pytest.mark.parametrize(("share", "passes"), [(0.1, True), (0.11, False), (None, False)])
def test_memorization_is_held_against_its_maximum_and_must_have_been_measured(share, passes):
    assert check_gate(measured(memorization=share), Policy(maximum_memorization=0.1)).passed is passes
    assert check_gate(measured(memorization=share), Policy()).passed


def test_a_variant_may_not_forget_more_than_the_policy_allows():
    policy = Policy(maximum_increase={"everyday": 5})
    passes = lambda change: check_gate(measured().model_copy(update={"changes": change}), policy)
    assert passes({"everyday": Interval(mean=2, low=-1, high=5)}).passed
    refused = passes({"everyday": Interval(mean=4, low=2, high=6)})  # the upper end of the interval counts
    assert "perplexity on everyday changes by +4 % (95 % interval up to +6 %)" in refused.reasons[0]
    assert passes({}).reasons == ["everyday was not measured, the policy allows an increase of at most 5 %"]
    assert check_gate(measured(), Policy()).passed


def test_by_tokens_a_variant_must_gain_by_tokens_too():
    assert check_gate(measured(token=0.5), Policy()).passed
    gate = check_gate(measured(token=0.5), Policy(metric="token"))
    assert not gate.passed
    assert "its token perplexity is 0.5 above the base's" in gate.reasons[0]


def test_the_champion_is_replaced_by_a_better_one_only():
    champion = measured(mean=-2)
    assert compare_to_champion(measured(mean=-2.5), champion, Policy()).passed
    assert not compare_to_champion(measured(mean=-2), champion, Policy()).passed
    worse = compare_to_champion(measured(mean=-1.5), champion, Policy())
    assert not worse.passed
    assert "0.5 above the champion's perplexity" in worse.message
    assert not compare_to_champion(measured(mean=-2.5), champion, Policy(margin_over_champion=0.5)).passed
    assert compare_to_champion(measured(mean=-2.5), None, Policy()).passed


def test_the_metric_decides_what_better_is():
    champion, other = measured(mean=-2, token=-1), measured(mean=-1.5, token=-3)
    assert not compare_to_champion(other, champion, Policy()).passed
    assert compare_to_champion(other, champion, Policy(metric="token")).passed


@pytest.mark.parametrize("other", [{"test": "t2"}, {"base": "b2"}])
def test_a_champion_measured_otherwise_is_replaced_or_kept_as_the_policy_says(other):
    champion = measured(mean=-20)
    assert compare_to_champion(measured(**other), champion, Policy()).passed
    clause = compare_to_champion(measured(**other), champion, Policy(on_incomparable_champion="keep"))
    assert not clause.passed
    assert "another" in clause.message


@pytest.mark.parametrize("policy", [Policy(), Policy(on_incomparable_champion="replace")])
@pytest.mark.parametrize(
    ("conditions", "what"),
    [
        (BF16, "precision (bf16, not fp32)"),
        (FP32.model_copy(update={"attention": "flash-attn"}), "attention kernel (flash-attn, not sdpa)"),
        (FP32.model_copy(update={"max_length": 512}), "maximum length (512, not none)"),
        (FP32.model_copy(update={"special_tokens": "none"}), "special tokens (none, not BOS)"),
        (FP32.model_copy(update={"evaluation": "3"}), "version of the evaluation (3, not feyntune-evaluation-2)"),
        (None, "conditions of measurement (not recorded before version 0.2)"),
    ],
)
def test_a_gain_measured_otherwise_takes_no_title(policy, conditions, what):
    clause = compare_to_champion(measured(mean=-20, conditions=conditions), measured(mean=-2), policy)
    assert not clause.passed
    assert f"in {what}, so it is kept" in clause.message


def test_of_two_figures_without_a_record_nothing_is_known():
    assert not compare_to_champion(measured(mean=-9, conditions=None), measured(conditions=None), Policy()).passed


def test_a_policy_file_is_read(tmp_path):
    path = tmp_path / "gate.yaml"
    path.write_text("metric: token\nminimum_abstracts: 500\n")
    assert read_policy(path) == Policy(metric="token", minimum_abstracts=500)
    path.write_text("# nothing set\n")
    assert read_policy(path) == read_policy(None) == Policy()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("minimum_abstract: 3", "minimum_abstract: Extra inputs are not permitted"),
        ("margin_over_base: -1", "margin_over_base: .*greater than or equal to 0"),
        ("metric: accuracy", "metric: .*'abstract_mean' or 'token'"),
        ("margin_over_base: .nan", "margin_over_base: "),
        ("minimum_abstracts: 0", "minimum_abstracts"),
        ("- a list", "the file: "),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_policy_names_its_clause(tmp_path, text, message):
    path = tmp_path / "gate.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_policy(path)


def test_a_policy_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gate\.yaml cannot be read"):
        read_policy(tmp_path / "gate.yaml")


def test_the_readmes_policy_is_one(tmp_path):
    from feyntune.registry import gate

    example = gate.__doc__.split("# gate.yaml\n")[1].split("\n\n")[0]
    (tmp_path / "gate.yaml").write_text("\n".join(line.strip() for line in example.splitlines()))
    assert read_policy(tmp_path / "gate.yaml") == Policy(maximum_memorization=0.01, maximum_increase={"everyday": 5})


def test_old_names_are_read_from_events_and_explained_in_a_policy(tmp_path):
    old = measured(memorization=0.5).model_dump()
    old["memorisation"] = old.pop("memorization")
    assert Measured.model_validate(old).memorization == 0.5
    assert Clause.model_validate({"clause": "c", "passed": True, "says": "why"}).message == "why"
    (tmp_path / "gate.yaml").write_text("unlike_champion: keep\n")
    with pytest.raises(UserError, match="unlike_champion is now called on_incomparable_champion"):
        read_policy(tmp_path / "gate.yaml")
