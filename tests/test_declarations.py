import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from blora_pyro.declarations import (
    alternatives,
    check_names,
    check_value,
    choices_of,
    declarations,
    default_of,
    flag_of,
    help_text,
    is_number,
    is_switch,
    key_values,
    known_keywords,
    metavar_of,
    numbers,
    option,
    parse_value,
    reference,
    separated,
    shown_default,
    suggestion,
    texts_of,
    value_types,
)
from blora_pyro.errors import UserError


@dataclass
class Dish:
    """What is baked."""

    PANEL: ClassVar[str] = "Dish"
    dish: str = option("What is baked.", "bread")
    spices: tuple[str, ...] = option("More.", (), listed="commas", flag="spice")
    fillings: tuple[str, ...] = option("Inside.", (), listed="repeated")
    sizes: dict[str, Any] = option("By name.", default_factory=dict, listed="repeated")
    tray: Path | None = option("The tray.")


@dataclass
class Oven(Dish):
    """A group of options of every kind, some of which are inherited."""

    PANEL: ClassVar[str] = "Heat"
    heat: float | Literal["low"] = option("Of the oven.", 180.0, at_least=50, below=300)
    minutes: int | None = option("Time.", above=0, unset="until it is brown")
    mode: Literal["top", "bottom", "circulating air"] = option("Where from.", "top")
    steam: bool = option("With steam.", False, panel="Extras")
    note: str = ""  # is no option


# ---- what a declaration says


def test_a_group_declares_the_fields_that_are_options():
    inherited, own = ["dish", "spices", "fillings", "sizes", "tray"], ["heat", "minutes", "mode"]
    assert [*declarations(Oven)] == [*inherited, *own, "steam"]


def test_a_panel_is_that_of_the_group_that_an_option_was_declared_in():
    panels = {name: declarations(Oven)[name].panel for name in ("dish", "heat", "steam")}
    assert panels == {"dish": "Dish", "heat": "Heat", "steam": "Extras"}


def test_types_and_choices_are_those_of_the_annotation():
    assert value_types(Oven, "heat") == (float, "low")
    assert value_types(Oven, "minutes") == (int,)
    assert choices_of(Oven, "mode") == ("top", "bottom", "circulating air")
    assert choices_of(Oven, "dish") == ()
    assert is_switch(Oven, "steam") and not is_switch(Oven, "heat")
    assert is_number(Oven, "heat") and not is_number(Oven, "dish")


def test_a_default_may_be_made_by_a_factory():
    assert default_of(Oven, "sizes") == {} and default_of(Oven, "heat") == 180
    assert Oven().sizes is not Oven().sizes


# ---- on the command line and in the docs


def test_a_flag_is_the_name_with_dashes_or_a_name_of_its_own():
    assert flag_of(Oven, "minutes") == "--minutes" and flag_of(Oven, "spices") == "--spice"


def test_a_metavar_shows_type_and_choices_that_are_short():
    shown = {name: metavar_of(Oven, name) for name in ("heat", "minutes", "tray", "dish", "steam")}
    assert shown == {
        "heat": "low|NUMBER",
        "minutes": "INTEGER",
        "tray": "PATH",
        "dish": "TEXT",
        "steam": "",
    }
    assert metavar_of(Oven, "mode") == "NAME"
    assert help_text(Oven, "mode") == "Where from. One of top, bottom or circulating air."
    assert help_text(Oven, "heat") == "Of the oven."


def test_a_default_is_shown_in_words():
    shown = [shown_default(Oven, name) for name in ("heat", "minutes", "steam", "sizes", "dish")]
    assert shown == ["180", "until it is brown", "", "", "bread"]


def test_a_value_becomes_the_texts_of_a_command():
    assert list(texts_of(Oven, "steam", True)) == [None]
    assert list(texts_of(Oven, "spices", ["salt", "dill"])) == ["salt,dill"]
    assert list(texts_of(Oven, "fillings", ["nuts", "figs"])) == ["nuts", "figs"]
    assert list(texts_of(Oven, "fillings", [])) == ["none"]
    assert list(texts_of(Oven, "sizes", {"a": "a", "b": 3})) == ["a", "b=3"]
    assert list(texts_of(Oven, "heat", 1e-5)) == ["1e-05"]


def test_the_reference_has_a_table_for_each_panel():
    text = reference([Oven])
    assert text.count("## ") == 3 and text.index("## Dish") < text.index("## Heat")
    assert "| `--heat low\\|NUMBER` | Of the oven. | 180 |" in text
    assert "| `--steam` | With steam. | |" in text


# ---- parsing


def test_a_text_becomes_the_number_that_it_spells():
    assert parse_value(Oven, "heat", "2e2") == 200 and parse_value(Oven, "heat", "low") == "low"
    assert parse_value(Oven, "minutes", "3.0") == 3 and parse_value(Oven, "dish", "3") == "3"
    for text in ("2.5", "long"):
        with pytest.raises(UserError, match=f"^minutes is '{text}'; give a whole number above 0"):
            parse_value(Oven, "minutes", text)


def test_lists_and_mappings_are_also_given_as_texts():
    assert separated("a, b") == separated(["a", "b"]) == ["a", "b"]
    assert numbers("weights", "3, 1.5") == numbers("weights", [3, 1.5]) == (3, 1.5)
    with pytest.raises(UserError, match=r"^weights is 'a'; give numbers, such as 3,1$"):
        numbers("weights", "a")
    assert key_values("size", ["a = 1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    assert key_values("size", {"a": 1}) == {"a": 1}
    for texts, words in ((["a"], "give key=value"), (["a=1", "a=2"], "gives 'a' twice")):
        with pytest.raises(UserError, match=words):
            key_values("size", texts)


# ---- refusals


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("heat", 300, "heat is 300; give a number from 50 below 300 or 'low'"),
        ("heat", True, "heat is True; give a number from 50 below 300 or 'low'"),
        ("heat", float("nan"), "heat is nan; give a number from 50 below 300 or 'low'"),
        ("heat", "lo", "heat is 'lo'; .* or 'low'; did you mean 'low'[?]"),
        ("minutes", 0, "minutes is 0; give a whole number above 0"),
        ("minutes", 1.5, "minutes is 1.5; give a whole number above 0"),
        ("mode", "bottem", "mode is 'bottem'; .*; did you mean 'bottom'[?]"),
        ("mode", None, "mode is None; give top, bottom or circulating air"),
        ("steam", "yes", "steam is 'yes'; give true or false"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(name, value, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        value = parse_value(Oven, name, value) if isinstance(value, float) else value
        check_value(Oven, name, value)


def test_values_that_are_allowed_pass():
    for name, value in (("heat", 50), ("heat", "low"), ("minutes", None), ("mode", "top")):
        check_value(Oven, name, value)


def test_a_name_that_no_option_has_is_refused_with_the_one_that_may_be_meant():
    check_names(Oven, ["heat"], "oven.toml")
    with pytest.raises(UserError, match=r"^oven.toml has no option 'heet'; did you mean 'heat'\?$"):
        check_names(Oven, ["dish", "heet"], "oven.toml")


def test_alternatives_and_suggestions_are_in_words():
    assert alternatives(["a", "b", "c"]) == "a, b or c"
    assert alternatives(["a"]) == "a" and alternatives([]) == "another"
    assert suggestion("zzz", ["a"]) == "" and suggestion(3, ["a"]) == ""


def test_a_keyword_that_a_function_lacks_is_refused_with_what_was_meant():
    @known_keywords("bake()", Oven)
    def bake(minutes: int) -> int:
        return minutes

    assert bake(minutes=3) == bake(3) == 3
    for name, words in {
        "minuets": "; did you mean 'minutes'?",
        "heat": "; give Oven(heat=...)",
    }.items():
        with pytest.raises(TypeError, match=re.escape(f"bake() has no option '{name}'{words}")):
            bake(**{name: 3})
