import re
from typing import Literal

import pytest

from blora_pyro.errors import UserError
from blora_pyro.options import FitConfig
from blora_pyro.studies.methods import (
    BASE,
    BAYESIAN,
    LORA,
    Candidate,
    Method,
    built_in_methods,
    choose_methods,
    is_of,
    read_candidate,
    read_methods,
)
from blora_pyro.studies.picture import HUES

METHODS = built_in_methods()


def test_every_built_in_method_has_one_knob_and_rising_values():
    for name, method in METHODS.items():
        assert method.name == name
        assert method.family in HUES
        assert (method.knob is None) == (name == BASE) == (not method.values)
        assert list(method.values) == sorted(set(method.values))
    assert len({method.title for method in METHODS.values()}) == len(METHODS)


def test_parents_come_before_their_children():
    names = [*METHODS]
    for name, method in METHODS.items():
        assert method.of is None or names.index(method.of) < names.index(name)


def test_lora_is_tried_at_the_learning_rate_of_every_bayesian_method():
    for method in METHODS.values():
        if method.family in BAYESIAN and method.of is None:
            assert method.options["lr"] in METHODS[LORA].values


def test_the_base_and_parents_are_always_there_and_come_first():
    assert [*choose_methods(["scaled-blora"])] == [BASE, "blora", "scaled-blora"]
    assert [*choose_methods(None)] == [*METHODS]


def test_methods_of_a_file_replace_built_in_ones_and_are_all_without_a_list():
    own = {LORA: Method(LORA, knob="lr", values=(0.01,)), "mine": Method("mine")}
    assert choose_methods(["scaled-lora"], own)[LORA] is own[LORA]
    assert [*choose_methods(None, own)] == [BASE, LORA, "mine"]


def test_an_unknown_method_is_refused():
    with pytest.raises(UserError, match=r"method is 'lorra'; give one of .*; did you mean 'lora'"):
        choose_methods(["lorra"])
    loop = {name: Method(name, of=other) for name, other in (("a", "b"), ("b", "a"))}
    with pytest.raises(UserError, match="method a builds on itself"):
        choose_methods(["a"], loop)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"title": "x", "knobs": "lr"}, "x.toml, method m has no 'knobs'; did you mean 'knob'?"),
        ({"knob": "lr"}, "has a knob or values alone"),
        ({"values": [1.0]}, "has a knob or values alone"),
        ({"knob": "lrr", "values": [1.0]}, "method m has no option 'lrr'; did you mean 'lr'?"),
        ({"options": {"rnk": 2}}, "method m has no option 'rnk'; did you mean 'rank'?"),
        ({"options": {"seed": 2}}, "sets seed, which the study sets"),
        ({"family": "bayesian"}, "family is 'bayesian'; give one of base, full"),
        ({"knob": "lr", "values": [[1]]}, "give numbers, or texts"),
        ({"knob": "prior", "values": ["a:b"]}, "give texts without a colon"),
        ({"of": ["lora"]}, "of is ['lora']; give the name of a method"),
        ({"options": {"base": "other"}}, "sets base, which the study sets"),
    ],
)
def test_a_method_that_cannot_be_is_one_line(table, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        read_methods({"m": table}, "x.toml")
    assert "\n" not in str(error.value)


def test_the_base_model_is_no_method_that_could_be_fitted():
    with pytest.raises(UserError, match="method base is the base model as it is"):
        read_methods({"base": {"options": {"lr": 1.0}}}, "x.toml")


@pytest.mark.parametrize(
    ("value", "kind", "is_one"),
    [
        (3, float, True),
        (True, float, False),
        (True, bool, True),
        ([1, "a"], list[float | str], True),
        ([[1]], list[float | str], False),
        ({"a": {"b": 1}}, dict[str, str | dict[str, object]], True),
        ({"a": 3}, dict[str, str | dict[str, object]], False),
        ("x", Literal["x", "y"], True),
        ([], Literal["x", "y"], False),
    ],
)
def test_values_of_toml_are_told_by_their_types(value, kind, is_one):
    assert is_of(value, kind) == is_one


def test_every_option_of_a_fit_may_be_a_knob_or_an_option():
    table = {"knob": "prior", "values": ["normal", "laplace"], "options": {"rank": 4}}
    method = read_methods({"m": table}, "x.toml")["m"]
    candidate = Candidate(method, "laplace")
    assert FitConfig(**candidate.options).prior == "laplace"
    assert (candidate.text, candidate.label) == ("m:laplace", "prior laplace")
    assert read_candidate("m:laplace", {"m": method}) == candidate


def test_a_candidate_turns_one_knob_and_keeps_its_parents_options():
    lora = Candidate(METHODS[LORA], 3e-3)
    assert lora.options == {"guide": "point", "beta": 0.0, "lr": 3e-3}
    penalised = Candidate(METHODS["map"], 1e-4, lora)
    assert penalised.options["beta"] == 1e-4  # its own before the parent's
    assert (penalised.options["lr"], penalised.options["guide"]) == (3e-3, "point")
    assert Candidate(METHODS[BASE]).options == {}


def test_a_candidate_that_only_edits_shares_the_fit_of_its_parent():
    assert read_candidate("scaled-lora:0.5:0.003").fitted.text == "lora:0.003"
    pruned = read_candidate("distilled-lora-pruned:0.5:0.05:0.003")
    assert pruned.fitted.text == "distilled-lora:0.05:0.003"
    assert read_candidate("ewc-lora:10:0.003").fitted.text == "ewc-lora:10:0.003"


@pytest.mark.parametrize("text", ["base", "lora:0.003", "scaled-lora:0.5:0.003", "blora:1e-05"])
def test_a_candidate_is_read_from_its_own_text(text):
    assert read_candidate(text).text == text


def test_a_label_names_knobs_and_values():
    assert read_candidate("scaled-lora:0.5:0.003").label == "strength 0.5 (lr 0.003)"
    assert read_candidate("base").label == ""


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("lora", "lora:LR"),
        ("lora:fast", "lora:LR"),
        ("scaled-lora:0.5", "scaled-lora:STRENGTH:LR"),
        ("base:1", "give base,"),
    ],
)
def test_a_row_that_is_none_is_refused_with_its_form(text, form):
    with pytest.raises(UserError, match=re.escape(f"row is '{text}'")) as caught:
        read_candidate(text)
    assert form in str(caught.value)
