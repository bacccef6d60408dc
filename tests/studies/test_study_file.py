import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.errors import UserError
from blora_pyro.studies.definition import ScoreSpec, Setting, check_study
from blora_pyro.studies.methods import METHOD, check_table, read_candidate
from blora_pyro.studies.results import TEST
from blora_pyro.studies.study_file import (
    STUDY,
    open_study,
    read_study_file,
    search_of,
    short_study,
    study_of,
)


def read(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return study_of(read_study_file(path), "mine.toml")


def spec(study, text, setting=0, data=None, seed=0):
    candidate = read_candidate(text, study.methods)
    name = data or next(iter(study.data))
    return ScoreSpec(study, study.settings[setting], candidate, name, seed, TEST)


def test_a_study_file_names_all_that_is_fitted(tmp_path):
    study = read(
        tmp_path,
        """
        bases = { pocket = "pocket", tiny = { base = "openai/whisper-tiny", dtype = "bfloat16" } }
        data = ["zh-en", "calls=data/calls"]
        backward = { de = "de" }
        seeds = [3, 4]
        methods = ["scaled-lora", "mine"]
        neighbours = false
        [options]
        target_modules = "q_proj,v_proj"
        cache_encoder = true
        [settings.short]
        steps = 100
        [settings.long]
        steps = 200
        rank = 4
        [method.mine]
        family = "priors"
        knob = "beta"
        values = [1e-6, 1e-5]
        options = { prior = "student-t", prior_args = { df = 4 } }
        """,
    )
    assert [(one.base, one.name) for one in study.settings] == [
        *(("pocket", "pocket short"), ("pocket", "pocket long")),
        *(("tiny", "tiny short"), ("tiny", "tiny long")),
    ]
    assert dict(study.data) == {"zh-en": "zh-en", "calls": "data/calls"}
    assert (study.seeds, study.neighbours) == ([3, 4], False)
    assert [*study.methods] == ["base", "lora", "scaled-lora", "mine"]
    config = spec(study, "mine:1e-05", setting=3, data="calls", seed=4).config
    assert (config.base, config.dtype, config.steps) == ("openai/whisper-tiny", "bfloat16", 200)
    assert (config.rank, config.prior, dict(config.prior_args)["df"]) == (4, "student-t", 4)
    assert (config.target_modules, config.cache_encoder) == ("q_proj,v_proj", True)
    assert (config.sources, config.seed, config.backward_sets) == (("data/calls",), 4, {"de": "de"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data = [", "mine.toml is no study file (", ),
        ("dat = []", "has no 'dat'; did you mean 'data'?"),
        ("seeds = 3", "seeds is 3; give whole numbers, such as [0, 1, 2]"),
        ("seeds = [true]", "seeds is [True]; give whole numbers, such as [0, 1, 2]"),
        ("data = 3", 'data is 3; give names or paths, such as ["zh-en"], or a table of them'),
        ("output = []", "output is []; give the path of a folder"),
        ("[settings]\na = 3", "settings is {'a': 3}; give tables [settings.NAME]"),
        ("[method]\na = 3", "method is {'a': 3}; give tables [method.NAME]"),
        ("[method.a]\nvalues = '123'", "values is '123'; give numbers, or texts, such as [1e-5"),
        ("data = " + 100 * "[" + 100 * "]", "is no study file (tables or lists in one another)"),
        ("data = " + 9999 * "[" + 9999 * "]", "mine.toml is no study file ("),
        ("a" + 999 * ".a" + " = 1", "is no study file (tables or lists in one another)"),
        ("methods = 'lora'", """methods is 'lora'; give names, such as ["lora", "blora"]"""),
        ("methods = ['dorra']", "method is 'dorra'; give one of base, lora"),
        ("options = 3", "options is 3; give a table [options]"),
        ("[options]\nrnk = 2", "mine.toml, options has no option 'rnk'; did you mean 'rank'?"),
        ("[settings.a]\nrnk = 2", "mine.toml, a has no option 'rnk'; did you mean 'rank'?"),
        ("[options]\nseed = 2", "options sets seed; give data and seeds at the top"),
        ("bases = 3", 'bases is 3; give a list, such as ["pocket"], or a table'),
        ("[search]\nbeta = [1, 2]\n[method.a]\n", "both a search and method"),
        ("[options]\nprior = 'mine.py'", "names code as prior, mine.py; give --code mine.py"),
        ("[options]\nguide = './mine.py/'", "names code as guide, ./mine.py/; give --code"),
        ("[options]\nprior = 'mine'", "names code as prior, mine; give --code mine"),
        (
            "methods = ['x']\n[method.x]\ntitle = 'x'\nfamily = 'lora'\nknob = 'prior'\n"
            "values = ['mine.py']",
            "names code as prior, mine.py; give --code mine.py",
        ),
        ("neighbours = 'no'", "neighbours is 'no'; give true or false"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_is_one_line(tmp_path, text, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"nothing.toml is no study file"):
        read_study_file(tmp_path / "nothing.toml")


def test_code_that_the_caller_names_may_run(tmp_path):
    content = {"data": ["de-en"], "options": {"prior": "mine.py"}}
    assert study_of(content, "mine.toml", ["mine.py"]).options["prior"] == "mine.py"


def test_the_table_lies_beside_the_file_or_in_the_output(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("")
    output = open_study(path)[1]
    assert (output.as_posix(), open_study(path)[2].as_posix()) == (
        *("runs/mine", "runs/mine/results.csv"),
    )
    path.write_text('output = "runs/other"\nresults = "mine.csv"')
    assert open_study(path)[1].as_posix() == "runs/other"
    assert open_study(path, tmp_path)[1:] == (tmp_path, tmp_path / "mine.csv")


def test_a_search_is_read_from_a_file():
    content = {
        "data": ["de-en"],
        "seeds": [3],
        "options": {"rank": 4},
        "search": {"trials": 5, "beta": [1e-6, 1e-3]},
    }
    options, ranges, about = search_of(content, "mine.toml")
    assert options == {"data": ["de-en"], "seed": 3, "rank": 4}
    assert (ranges, about) == ({"beta": (1e-6, 1e-3)}, {"trials": 5})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search": {"beta": 3}}, "search of beta is 3; give [LOW, HIGH], as numbers"),
        ({"search": {"beta": [1, 10**400]}}, "give [LOW, HIGH], as numbers"),
        ({"search": {"beta": ["a", 2]}}, "search of beta is ['a', 2]; give [LOW, HIGH]"),
        ({"search": {"trials": "x"}}, "trials is 'x'; give a whole number"),
        ({"search": {"timeout": True}}, "timeout is True; give a number of seconds"),
        ({"seeds": [0, 1]}, "a search is of one base with one seed"),
        ({"bases": ["pocket", "other"]}, "a search is of one base with one seed"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        search_of({"data": ["de-en"], "search": {}, **changes}, "mine.toml")


TOML = st.recursive(
    st.sampled_from([3, -1, 10**400, True, 0.5, math.nan, "x", "", "a:b"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=3,
)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([*STUDY]), st.sampled_from([None, *METHOD]), TOML)
def test_a_value_of_whatever_type_is_taken_or_refused_in_one_line(key, of_method, value):
    content = {"data": ["de-en"], "methods": ["m"], "method": {"m": {"title": "mine"}}}
    if of_method is None:
        content[key] = value
    else:
        content["method"] = {"m": {"knob": "lr", "values": [0.1], of_method: value}}
    try:
        check_table(content, STUDY, "mine.toml")
        check_study(study_of(content, "mine.toml"))
    except UserError as error:
        assert "\n" not in str(error)


# ---- the short form


def test_settings_are_read_and_written_alike():
    (first, second) = short_study(data=["de-en"], settings=["150x600", "allx400"]).settings
    size = {"max_utterances": 150, "steps": 600}
    assert first == Setting("pocket", "150x600", {"base": "pocket", **size})
    assert second.options == {"base": "pocket", "steps": 400}
    assert [one.title for one in (first, second)] == [
        *("150 utterances, 600 steps", "all utterances, 400 steps")
    ]


@pytest.mark.parametrize("text", ["600", "150x", "0x600", "150x-1", "fewx600"])
def test_a_setting_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="give UTTERANCESxSTEPS"):
        short_study(data=["de-en"], settings=[text])


def test_base_lora_and_parents_are_always_compared():
    study = short_study(methods=["scaled-blora"], data=["de-en"])
    assert [*study.methods] == ["base", "lora", "blora", "scaled-blora"]
    alone = short_study(methods=["blora"], data=["de-en"], row="scaled-lora:0.5:0.003")
    assert [*alone.methods] == ["base", "lora", "scaled-lora"]


def test_a_method_without_a_parent_in_the_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="method is 'nobody'"):
        read(tmp_path, "[method.a]\nof = 'nobody'\nknob = 'lr'\nvalues = [1.0]")
