import re

import pytest

from blora_pyro.comparison.candidates import Candidate, read_candidate
from blora_pyro.comparison.methods import BASE, LORA, METHODS, Method
from blora_pyro.errors import UserError


def test_a_candidate_turns_one_knob_and_keeps_its_parents_options():
    lora = Candidate(METHODS[LORA], 3e-3)
    assert lora.options == {"guide": "point", "beta": 0.0, "lr": 3e-3}
    penalised = Candidate(METHODS["map"], 1e-4, lora)
    assert penalised.options["beta"] == 1e-4  # its own before the parent's
    assert (penalised.options["lr"], penalised.options["guide"]) == (3e-3, "point")
    assert Candidate(METHODS[BASE]).options == {}


def test_a_derived_method_is_fitted_as_its_parent_is():
    full = Candidate(METHODS["full"], 1e-4)
    child = Method("scaled-full", "full, scaled", "full", "factor", (0.5,), of="full")
    assert Candidate(child, 0.5, full).kind == "full"


@pytest.mark.parametrize("text", ["base", "lora:0.003", "scaled-lora:0.5:0.003", "blora:1e-05"])
def test_a_candidate_is_read_from_its_own_text(text):
    assert read_candidate(text).text == text


def test_a_label_names_knobs_and_values():
    assert read_candidate("scaled-lora:0.5:0.003").label == "factor 0.5 (lr 0.003)"
    assert read_candidate("base").label == ""


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("lora", "lora:LR"),
        ("lora:fast", "lora:LR"),
        ("scaled-lora:0.5", "scaled-lora:FACTOR:LR"),
        ("base:1", "give base,"),
    ],
)
def test_a_row_that_is_none_is_refused_with_its_form(text, form):
    with pytest.raises(UserError, match=re.escape(f"row is '{text}'")) as caught:
        read_candidate(text)
    assert form in str(caught.value)
