import pytest

from blora_pyro.comparison.methods import (
    BASE,
    BAYESIAN,
    LORA,
    METHODS,
    Method,
    Setting,
    choose_methods,
    read_setting,
)
from blora_pyro.comparison.picture import HUES
from blora_pyro.errors import UserError


def test_every_method_is_called_by_its_name_and_has_one_knob():
    for name, method in METHODS.items():
        assert method.name == name
        assert method.family in HUES
        assert (method.knob is None) == (name == BASE) == (not method.values)
        assert list(method.values) == sorted(set(method.values))


def test_parents_come_before_their_children():
    names = [*METHODS]
    for name, method in METHODS.items():
        assert method.of is None or names.index(method.of) < names.index(name)


def test_titles_tell_methods_apart():
    assert len({method.title for method in METHODS.values()}) == len(METHODS)


def test_lora_was_tried_at_the_learning_rate_of_every_bayesian_method():
    for method in METHODS.values():
        if method.family in BAYESIAN and method.of is None:
            assert method.options["lr"] in METHODS[LORA].values


def test_settings_are_read_and_written_alike():
    assert read_setting("150x600") == Setting(150, 600)
    assert read_setting("150x600").options == {"max_utterances": 150, "steps": 600}
    assert read_setting("allx400").options == {"steps": 400}
    assert [read_setting(text).name for text in ("150x600", "allx400")] == ["150x600", "allx400"]


@pytest.mark.parametrize("text", ["600", "150x", "0x600", "150x-1", "fewx600"])
def test_a_setting_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="give UTTERANCESxSTEPS"):
        read_setting(text)


def test_base_lora_and_parents_are_always_compared():
    assert [*choose_methods(["scaled-blora"])] == [BASE, LORA, "blora", "scaled-blora"]
    assert [*choose_methods(None)] == [*METHODS]


def test_a_method_of_ones_own_takes_the_place_of_a_built_in_one():
    own = Method(LORA, "LoRA", "lora", "lr", (0.01,))
    assert choose_methods([own])[LORA] is own


def test_an_unknown_method_is_refused():
    with pytest.raises(UserError, match="method is 'dora'; give one of base, full, lora"):
        choose_methods(["dora"])
