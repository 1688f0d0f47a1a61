import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feyntune.names import slug
from feyntune.variants import METHODS, variant_name

MIXTURES = st.lists(st.sampled_from(["hep-th", "hep-ph", "gr-qc", "q-bio", "cs"]), min_size=1, max_size=3).map("+".join)


@pytest.mark.parametrize("method", METHODS)
def test_a_variant_is_its_mixture_and_its_method(method):
    assert variant_name("hep-ph+gr-qc", method) == f"hep-ph+gr-qc/{method}"


@pytest.mark.parametrize(
    ("mixture", "method"), [("", "lora-qkv"), ("Hep", "lora-qkv"), ("a/b", "lora-qkv"), ("a", "x")]
)
def test_anything_else_is_no_variant(mixture, method):
    with pytest.raises(ValueError, match="is not a variant"):
        variant_name(mixture, method)


@given(MIXTURES, st.sampled_from(METHODS))
def test_a_slug_can_stand_in_a_url_and_names_one_variant(mixture, method):
    name = variant_name(mixture, method)
    assert re.fullmatch(r"[a-z0-9._-]+", slug(name))
    assert slug(name).replace("_", "+").replace(".", "/") == name
