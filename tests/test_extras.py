import pytest

from feyntune.extras import missing_extra


@pytest.mark.parametrize(
    ("module", "verb", "extra"),
    [
        ("torch", "train", "run"),
        ("torch.nn", "serve", "serve"),
        ("kserve", "serve", "serve"),
        ("kfp_kubernetes", "run", "run"),
    ],
)
def test_a_missing_dependency_names_its_extra(module, verb, extra):
    message = missing_extra(ModuleNotFoundError("no", name=module), verb)
    assert message
    assert f"pip install 'feyntune[{extra}]'" in message
    assert module.partition(".")[0] in message


def test_a_module_that_is_no_dependency_is_an_unexpected_error():
    assert missing_extra(ModuleNotFoundError("no", name="feyntune.missing"), "run") is None
