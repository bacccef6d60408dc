import re

import pytest

from blora_pyro.errors import UserError
from blora_pyro.studies.definition import ScoreSpec, check_study, deciding_words
from blora_pyro.studies.methods import Candidate, read_candidate
from blora_pyro.studies.results import TEST
from blora_pyro.studies.study_file import short_study


def spec(study, text, setting=0, data=None, seed=0):
    candidate = read_candidate(text, study.methods)
    name = data or next(iter(study.data))
    return ScoreSpec(study, study.settings[setting], candidate, name, seed, TEST)


@pytest.fixture
def short():
    options = {"rank": 2, "backward": {"de": "de", "en": "en"}}
    return short_study(data=["de-en"], settings=["allx2", "allx3"], options=options)


def test_the_fit_of_a_score_has_all_its_options(short):
    one = spec(short, "scaled-lora:0.5:0.003", seed=3)
    config = one.config
    assert one.after == {"strength": 0.5}
    assert (config.lr, config.beta, config.guide) == (0.003, 0.0, "point")
    assert (config.steps, config.seed, config.rank) == (2, 3, 2)
    assert config.sources == ("de-en",)


def test_a_study_prints_as_a_few_lines_and_as_sections_of_a_notebook(short):
    head, *lines = repr(short).splitlines()
    assert head == "<blora_pyro.Study>"
    facts = dict(line.split(maxsplit=1) for line in lines)
    assert facts["settings"] == "pocket allx2, pocket allx3"
    assert (facts["data"], facts["seeds"]) == ("de-en", "0, 1, 2")
    assert facts["methods"].startswith("base, lora, ")
    shown = short._repr_html_()
    for heading in ("Methods", "Settings", "Data", "Options"):
        assert f"<summary>{heading}</summary>" in shown
    assert "--rank" in shown and "3 steps" in shown


def test_replay_draws_a_share_from_the_backward_sets(short):
    config = spec(short, "replay-lora:0.2:0.003").config
    assert config.sources == ("de-en", "de", "en")
    assert config.data_weights == pytest.approx((0.8, 0.1, 0.1))


def test_run_folders_are_named_by_what_decides_the_fit(short):
    assert spec(short, "lora:0.003").run == "lora-0.003_allx2_de-en_seed0"
    assert spec(short, "scaled-lora:0.5:0.003").run == spec(short, "lora:0.003").run
    texts = ("lora:0.003", "lora:0.001", "ewc-lora:10:0.003", "base")
    names = {spec(short, text, setting, seed=seed).run
             for text in texts for setting in (0, 1) for seed in (0, 1)}  # fmt: skip
    assert len(names) == 3 * 4 + 1


def test_a_name_that_is_a_path_is_made_a_name_of_a_file_of_its_own():
    study = short_study(
        data=["/some/where", "some-where"], settings=["allx2"], options={"base": "pocket"}
    )
    first, second = (spec(study, "lora:0.003", data=name).run for name in study.data)
    assert "/" not in first and first != second


def test_where_a_fit_is_computed_does_not_decide_it():
    one = deciding_words("blora-pyro fit --base pocket --device cuda --lr 0.1 --local-files-only")
    assert one == ["blora-pyro", "fit", "--lr", "0.1"]


# ---- checks


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": []}, "no data, seed or setting is given"),
        ({"data": []}, "no data, seed or setting is given"),
        ({"options": {"rank": 0}}, "rank is 0"),
        ({"options": {"backward": []}}, "has no backward sets; give sets of what it already knows"),
        ({"options": {"base": "owner/whisper"}}, "base owner/whisper has no backward sets"),
        ({"row": "scaled-lora:3:0.1"}, "strength is 3.0; give a number from 0 to 2"),
        ({"seeds": [0, -1]}, "seed is -1"),
        ({"row": "pruned-lora:1:0.1"}, "sparsity is 1.0; give a number from 0 to below 1"),
        ({"row": "replay-lora:1:0.1"}, "share is 1.0; give a number between 0 and 1"),
        ({"row": "lora:-1"}, "method lora:-1: lr is -1"),
        ({"data": ["nowhere"], "options": {"base": "pocket"}}, "'nowhere'"),
    ],
)
def test_a_study_that_cannot_be_is_refused(changes, words):
    given = {"data": ["de-en"], "settings": ["allx2"], **changes}
    with pytest.raises(UserError, match=re.escape(words)):
        check_study(short_study(**given))


def test_every_built_in_method_can_be_fitted():
    check_study(short_study(data=["de-en", "zh-en"], settings=["150x200"]))


def test_the_command_of_a_fit_is_in_its_row(short):
    scored = spec(short, "lora:0.003").scored
    assert scored.command.startswith("blora-pyro fit --backward de --backward en --guide point")
    base = ScoreSpec(short, short.settings[0], Candidate(short.methods["base"]), "de-en", 0, TEST)
    assert base.scored.command == ""
