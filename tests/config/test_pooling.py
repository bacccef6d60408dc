import pytest

from blora_pyro import FitConfig
from blora_pyro.errors import UserError


def test_built_in_corpora_name_themselves():
    config = FitConfig(data=("de-en", "es-en"), pooling="hierarchical")
    assert config.domains == {"de-en": "de-en", "es-en": "es-en"}
    assert config.data == ("de-en", "es-en")
    assert config.pooled.scale == 0.5


def test_complete_pooling_is_what_several_sources_were_before():
    plain = FitConfig(data=("de-en", "es-en"))
    assert FitConfig(data=("de-en", "es-en"), pooling="complete") == plain
    assert plain.pooled is None
    assert plain.to_json()["data"] == ["de-en", "es-en"]
    assert plain.to_json()["pooling"] is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pooling": "some"}, "pooling is 'some'; give one of complete, hierarchical, none"),
        ({"pooling_scale": 0.0}, "pooling_scale is 0"),
        ({"pooling": "none", "pooling_scale": 0.5}, "pooling_scale is 0.5, and pooling is none"),
        ({"data": "de-en"}, "data is one domain; give two or more, NAME=SOURCE"),
        ({"data": ("a/b.csv", "de-en")}, "a domain is called 'a/b.csv'; give its data as NAME="),
        ({"data": ("a=de-en", "a=es-en")}, "two sets are called 'a'"),
        ({"prior_from": "runs/one"}, "prior_from is runs/one, which pooling hierarchical"),
        ({"ewc": 1.0}, "ewc is 1.0, which pooling hierarchical can't take; leave it out"),
        ({"test": "de"}, "test is de, .*each domain's test set is that of its data"),
        ({"eval_every": 5}, "eval_every is 5"),
        ({"estimator": "flipout"}, "estimator is flipout, .*give shared"),
        ({"prior": "horseshoe"}, "prior is horseshoe, .*give one of normal, laplace"),
        ({"guide": "auto-normal"}, "guide is auto-normal, .*the prior's own, or point"),
    ],
)
def test_what_can_not_be_pooled_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        FitConfig(**{"data": ("de-en", "es-en"), "pooling": "hierarchical", **given})
