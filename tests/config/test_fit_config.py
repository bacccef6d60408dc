import dataclasses
import json
import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.config import FitConfig, base_of, fit_config
from blora_pyro.config.training import AUTO_TEMPERATURE
from blora_pyro.data import LANGUAGES
from blora_pyro.errors import UserError
from blora_pyro.models import POCKET, Base

quick = settings(deadline=None, max_examples=60)


def test_the_defaults_can_be_fitted():
    config = FitConfig()
    assert (config.base, config.data, config.prior, config.beta) == (
        "pocket",
        ("de-en",),
        "normal",
        1e-4,
    )


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FitConfig().rank = 3


@quick
@given(st.integers(1, 10**7))
def test_beta_by_name_is_a_temperature_over_the_training_tokens(tokens):
    assert FitConfig(beta="elbo").resolved(tokens, 1).beta == 1 / tokens
    assert FitConfig(beta="auto").resolved(tokens, 1).beta == AUTO_TEMPERATURE / tokens


@quick
@given(st.one_of(st.just(0.0), st.floats(0, 1e6)))
def test_a_beta_that_is_given_stays(beta):
    assert FitConfig(beta=beta).resolved(10, 10).beta == beta


@quick
@given(st.integers(1, 512), st.floats(1e-3, 1e3))
def test_alpha_is_twice_the_rank_unless_given(rank, alpha):
    assert FitConfig(rank=rank).resolved(10, 10).alpha == 2 * rank
    assert FitConfig(rank=rank, alpha=alpha).resolved(10, 10).alpha == alpha


@quick
@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 30))
def test_epochs_become_steps_that_visit_everything_so_often(utterances, batch_size, epochs):
    config = FitConfig(epochs=epochs, batch_size=batch_size, steps=7)
    steps = config.resolved(10, utterances).steps
    assert steps == epochs * math.ceil(utterances / batch_size)
    assert isinstance(steps, int)


def test_a_part_of_an_epoch_is_at_least_one_step():
    assert FitConfig(epochs=0.5, batch_size=4).resolved(10, 32).steps == 4
    assert FitConfig(epochs=1e-9).resolved(10, 10).steps == 1
    assert FitConfig(steps=7).resolved(10, 10).steps == 7


def test_backward_sets_are_the_pocket_languages_for_the_pocket_base_only():
    pocket = {name: name for name in LANGUAGES}
    assert FitConfig().resolved(10, 10).backward == pocket
    assert FitConfig(base="elsewhere").resolved(10, 10).backward == {}
    assert FitConfig(backward=()).resolved(10, 10).backward == {}


def test_backward_sets_have_the_names_that_they_are_given():
    named = FitConfig(backward=("de", "mine=x.jsonl")).resolved(10, 10).backward
    assert named == {"de": "de", "mine": "x.jsonl"} == FitConfig(backward=named).backward


def test_the_new_domain_is_the_first_source_or_the_test_set():
    assert FitConfig(data=("a", "b")).new_domain == "a"
    assert FitConfig(data=("a", "b"), test="c").new_domain == "c"


def test_a_base_is_loaded_as_the_configuration_says(monkeypatch):
    seen = []

    def load(*arguments):
        seen.append(arguments)
        return Base(arguments[0], None, None, None)

    monkeypatch.setattr(fit_config, "load_base", load)
    assert not base_of(FitConfig()).trim_audio
    options = {"dtype": "float16", "revision": "v1", "local_files_only": True}
    assert base_of(FitConfig(base="b", trim_audio=True, **options)).trim_audio
    default = (POCKET, "cpu", "float32", None, False)
    assert seen == [default, ("b", "cpu", "float16", "v1", True)]


def test_as_json_it_says_what_it_is():
    rows = Dataset.from_dict({"audio": ["a.wav"], "text": ["x"]})
    sources = {"data": ["a", rows], "data_weights": [3, 1], "backward": {"mine": rows}}
    config = FitConfig(**sources, dev=rows, eval_every=5)
    content = json.loads(json.dumps(config.to_json()))
    described = f"<Dataset of 1 rows, fingerprint {rows._fingerprint}>"
    assert content["data"] == ["a", described]
    assert (content["test"], content["dev"]) == (None, described)
    assert content["data_weights"] == [3, 1]
    assert content["backward"] == {"mine": described}
    assert FitConfig(**content).to_json() == config.to_json()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; give one of float32, bfloat16, float16"),
        ({"data": ()}, "data names no source"),
        ({"normalizer": "english"}, "normalizer is 'english'; give one of whisper, basic, none"),
        ({"data_weights": (1, 2)}, r"data_weights is 1, 2 for 1 source\(s\)"),
        ({"data": ("a", "b"), "data_weights": (1, 0)}, "data_weights is 1, 0 for 2"),
        ({"data": ("a", "b"), "data_weights": (1, math.nan)}, "data_weights is 1, nan"),
        ({"backward": ("de", "de")}, "two sets are called 'de'"),
        ({"backward": "de"}, "backward must be a list"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        FitConfig(**options)


def test_languages_are_normalised():
    assert FitConfig(language="German-English").language == "de-en"
    assert FitConfig().language is None


def test_a_tenth_of_the_steps_warms_up_unless_told():
    assert FitConfig(epochs=3, batch_size=5).resolved(10, 200).warmup_steps == 12
    assert FitConfig(warmup_steps=0).resolved(10, 200).warmup_steps == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "pt-BR"}, "'pt-BR' may be pt of a region"),
        ({"task": "sing"}, "task is 'sing'; give transcribe or translate"),
        ({"on_bad_row": "ignore"}, "on_bad_row is 'ignore'; give stop or skip"),
    ],
)
def test_languages_tasks_and_bad_rows_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        FitConfig(**options)


def test_a_warm_up_is_held_against_the_steps_of_the_epochs():
    config = FitConfig(epochs=10, batch_size=1, warmup_steps=50)
    assert config.resolved(10, 5).warmup_steps == config.resolved(10, 5).steps == 50
    with pytest.raises(UserError, match=r"^warmup_steps is 50; .*, 40$"):
        config.resolved(10, 4)


def test_resolving_twice_changes_nothing():
    once = FitConfig(beta="auto", epochs=2).resolved(100, 10)
    assert once.resolved(50, 10) == once


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {"scale": 0.05}),
        ({"prior_scale": 0.2}, {"scale": 0.2}),
        ({"prior_args": {"scale": 0.3}}, {"scale": 0.3}),
        ({"prior_args": {"scale": 0.3}, "prior_scale": 0.2}, {"scale": 0.2}),
        ({"prior": "laplace"}, {"scale": 0.05}),
        ({"prior": "student-t", "prior_args": {"df": 3}}, {"scale": 0.05, "df": 3}),
        ({"prior": "learned-scale", "prior_scale": 0.2}, {"scale": 0.2, "spread": 1.0}),
        ({"prior": "learned-scale", "prior_args": {"spread": "2"}}, {"scale": 0.1, "spread": 2.0}),
    ],
)
def test_every_argument_of_the_prior_is_worked_out(options, arguments):
    config = FitConfig(**options)
    given = dict(config.prior_args)
    resolved = config.with_prior_args()
    assert resolved.prior_args == arguments
    assert config.prior_args == given  # the first one is as it was
    assert resolved.with_prior_args() == resolved


def test_the_guide_is_the_familys_own_unless_given():
    assert FitConfig().guide is None
    assert FitConfig().with_prior_args().guide == "normal"
    assert FitConfig(prior="horseshoe").with_prior_args().guide == "horseshoe"
    assert FitConfig(prior="laplace", guide="point").with_prior_args().guide == "point"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "cauchy"}, "'cauchy' is none of normal, "),
        ({"prior_args": {"width": 1.0}}, "prior normal takes no 'width'; it takes scale"),
        ({"prior_args": {"scale": -1.0}}, "scale is -1.0; give a number above 0"),
        ({"prior": "student-t", "prior_args": {"df": 1.0}}, "df is 1.0"),
        ({"prior_args": {"scale": "wide"}}, "scale is 'wide'; give a number"),
    ],
)
def test_a_prior_or_an_argument_that_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=message) as caught:
        FitConfig(**options).with_prior_args()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", ["toaster", "", "cpu:x", "cuda:-3", "cuda:9999"])
def test_a_device_that_cannot_be_used_is_refused_by_name(bad):
    with pytest.raises(UserError, match=f"^device '{bad}' can't be used") as caught:
        FitConfig(device=bad)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(UserError, match=r"^device 'cuda'"):
        FitConfig(device="cuda")


def test_distillation_asks_in_the_languages_of_the_backward_sets_unless_told():
    backward = {"German": "a.csv", "talks": "b.csv", "en": "c.csv"}
    assert FitConfig(backward=backward).taught_languages == ("de", "en")
    assert FitConfig(distillation_languages=("French",)).taught_languages == ("fr",)
    assert len(FitConfig().taught_languages) == 6
