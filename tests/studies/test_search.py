import math

import pytest

from blora_pyro.errors import UserError
from blora_pyro.studies.search import (
    SEARCH,
    agreed_options,
    dev_config,
    ranges_of,
    rounded,
    with_values,
)


def test_beta_scale_and_further_arguments_find_their_places():
    options = {"prior": "student-t", "prior_args": {"df": 4}, "rank": 8}
    assert with_values(options, {"beta": 1e-5, "prior_scale": 0.1}) == {
        **options,
        "beta": 1e-5,
        "prior_scale": 0.1,
    }
    found = with_values(options, {"df": 3.5, "lr": 0.01})
    assert found == {**options, "lr": 0.01, "prior_args": {"df": 3.5}}
    assert options["prior_args"] == {"df": 4}


def test_a_dev_set_is_handed_to_a_fit_that_asks_for_one_alone():
    assert with_values({"dev": "de"}, {}) == {}
    assert with_values({"dev": "de", "eval_every": 5}, {}) == {"dev": "de", "eval_every": 5}
    assert dev_config({"dev": "de"}, SEARCH).dev == "de"
    assert dev_config({}, SEARCH).dev is None


def test_every_option_that_is_a_number_can_be_searched():
    assert ranges_of({"distillation": (0.01, 1)}, {}) == {"distillation": (0.01, 1.0)}
    assert with_values({}, {"ewc": 10.0}) == {"ewc": 10.0}


def test_scale_is_prior_scale():
    assert ranges_of({"scale": (1, 2)}, {}) == {"prior_scale": (1.0, 2.0)}


@pytest.mark.parametrize(
    ("search", "options", "words"),
    [
        ({}, {}, "nothing is to be searched"),
        ({"df": (1, 9)}, {}, r"prior normal has no 'df' to be searched; .*the prior \(scale\)$"),
        ({"rank": (1, 9)}, {}, "has no 'rank'"),  # a whole number
        ({"beta": (0, 1)}, {}, "search of beta is from 0.0 to 1.0; give 0 < low < high"),
        ({"beta": (1, 1)}, {}, "search of beta is from 1.0"),
        ({"beta": (1, math.inf)}, {}, "search of beta is from 1.0 to inf"),
        ({"beta": (math.nan, 1)}, {}, "search of beta is from nan"),
        ({"beta": (1e-6, 1)}, {"beta": 1e-4}, "beta is searched and given, too"),
        (SEARCH, {"prior_args": {"scale": 1}}, "prior_scale is searched and given, too"),
        ({"scale": (1, 2)}, {"prior_scale": 1}, "prior_scale is searched and given, too"),
        (SEARCH, {"prior": "uniform"}, "'uniform' is none of"),
    ],
)
def test_what_cannot_be_searched_is_told_in_one_line(search, options, words):
    with pytest.raises(UserError, match=words):
        ranges_of(search, options)


def test_a_prior_without_a_scale_says_what_it_has(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("class Prior:\n    def __init__(self, width: float = 0.1):\n        pass\n")
    with pytest.raises(UserError, match=r"has no 'scale' to be searched; .* \(width\)$"):
        ranges_of(SEARCH, {"prior": str(path)})
    assert ranges_of({"width": (0.1, 1)}, {"prior": str(path)}) == {"width": (0.1, 1)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prior": "student-t", "search": {"df": (1, 9)}}, "df is 1.0; give a number above 2"),
        ({"backward": ()}, "no backward sets to forget; give some"),
        ({"base": "owner/whisper"}, "no backward sets to forget"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_is_loaded(options, words):
    options = dict(options)
    search = ranges_of(options.pop("search", SEARCH), options)
    with pytest.raises(UserError, match=words):
        dev_config(options, search)


def test_what_is_searched_and_where_it_is_computed_need_not_agree():
    search = ranges_of({"beta": (1e-6, 1e-3), "df": (3, 9)}, {"prior": "student-t"})
    options = {"prior": "student-t", "prior_args": {"scale": "0.2"}, "local_files_only": True}
    about = agreed_options(dev_config(options, search), search)
    assert about["prior_args"] == {"scale": 0.2}
    assert about["search"] == {"beta": [1e-6, 1e-3], "df": [3.0, 9.0]}
    assert not {"beta", "device", "local_files_only"} & about.keys()
    assert "prior_scale" in about
    search = ranges_of(SEARCH, {})
    assert "scale" not in agreed_options(dev_config({}, search), search)["prior_args"]


def test_sampled_values_are_rounded_to_what_can_be_copied():
    assert rounded({"beta": 4.0438780095151014e-05, "lr": 0.2}) == {"beta": 4.04e-05, "lr": 0.2}
