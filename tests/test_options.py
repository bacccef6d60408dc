import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.declarations import declarations, flag_of
from blora_pyro.errors import UserError
from blora_pyro.metrics.normalizers import NORMALIZERS
from blora_pyro.models import DTYPES, ESTIMATORS
from blora_pyro.options import (
    AUTO_TEMPERATURE,
    DECODER,
    POCKET,
    POCKET_LANGUAGES,
    FitConfig,
    OutputOptions,
    differing,
    fit_command,
)

quick = settings(deadline=None, max_examples=60)


def test_options_are_checked_without_torch_transformers_or_datasets():
    code = (
        "import sys; from blora_pyro.options import FitConfig; FitConfig(prior='laplace');"
        " print([m for m in ('torch', 'transformers', 'datasets', 'pyro') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_numbers_of_numpy_are_numbers():
    config = FitConfig(steps=np.int64(3), lr=np.float64(0.25), streaming=np.bool_(False))
    assert (config.steps, config.lr, config.streaming) == (3, 0.25, False)
    assert [type(one) for one in (config.steps, config.lr, config.streaming)] == [int, float, bool]


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


def test_a_config_knows_which_options_were_passed():
    config = FitConfig(rank=16, beta=1e-4)
    assert config == FitConfig()
    assert config.given == {"rank", "beta"}
    assert config.with_options(lr=0.1).given == {"rank", "beta", "lr"}
    assert config.resolved(10, 10).rank == 16


def test_every_choice_has_its_implementation():
    declared = declarations(FitConfig)
    assert declared["dtype"].choices == tuple(DTYPES)
    assert declared["estimator"].choices == tuple(ESTIMATORS)
    assert declared["normalizer"].choices == tuple(NORMALIZERS)


def test_every_option_has_a_help_and_a_name_of_its_own():
    flags = []
    for group in (FitConfig, OutputOptions):
        for name, one in declarations(group).items():
            assert one.help.endswith("."), name
            flags.append(flag_of(group, name))
    assert len(flags) == len(set(flags)) > 50


# ---- defaults worked out


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


@pytest.mark.parametrize("alpha", [1e15, 1e300])
def test_an_alpha_that_no_posterior_may_have_is_refused(alpha):
    with pytest.raises(UserError, match=r"alpha is 1.*; give a number above 0 below 1e\+15"):
        FitConfig(alpha=alpha)


@quick
@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 30))
def test_epochs_become_steps_that_visit_everything_that_often(utterances, batch_size, epochs):
    config = FitConfig(epochs=epochs, batch_size=batch_size, steps=7)
    steps = config.resolved(10, utterances).steps
    assert steps == epochs * math.ceil(utterances / batch_size)
    assert isinstance(steps, int)


def test_a_part_of_an_epoch_is_at_least_one_step():
    assert FitConfig(epochs=0.5, batch_size=4).resolved(10, 32).steps == 4
    assert FitConfig(epochs=1e-9).resolved(10, 10).steps == 1
    assert FitConfig(steps=7).resolved(10, 10).steps == 7


def test_a_tenth_of_the_steps_warms_up_unless_given():
    assert FitConfig(epochs=3, batch_size=5).resolved(10, 200).warmup_steps == 12
    assert FitConfig(warmup_steps=0).resolved(10, 200).warmup_steps == 0


def test_a_warm_up_is_compared_with_the_steps_of_the_epochs():
    config = FitConfig(epochs=10, batch_size=1, warmup_steps=50)
    assert config.resolved(10, 5).warmup_steps == config.resolved(10, 5).steps == 50
    with pytest.raises(UserError, match=r"^warmup_steps is 50; .*, 40$"):
        config.resolved(10, 4)


def test_resolving_twice_changes_nothing():
    once = FitConfig(beta="auto", epochs=2).resolved(100, 10)
    assert once.resolved(50, 10) == once


def test_backward_sets_are_the_pocket_languages_for_the_pocket_base_only():
    pocket = {name: name for name in POCKET_LANGUAGES}
    assert FitConfig().resolved(10, 10).backward == pocket
    assert FitConfig(base="elsewhere").resolved(10, 10).backward == {}
    assert FitConfig(backward=()).resolved(10, 10).backward == {}


def test_backward_sets_have_the_names_that_they_are_given():
    named = FitConfig(backward=("de", "mine=x.jsonl")).resolved(10, 10).backward
    assert named == {"de": "de", "mine": "x.jsonl"} == FitConfig(backward=named).backward
    assert FitConfig(backward=("de,fr", "none")).backward == {"de": "de", "fr": "fr"}


def test_the_new_domain_is_the_first_source_or_the_test_set():
    assert FitConfig(data=("a", "b")).new_domain == "a"
    assert FitConfig(data=("a", "b"), test="c").new_domain == "c"


def test_distillation_takes_the_languages_of_the_backward_sets_unless_given():
    backward = {"German": "a.csv", "talks": "b.csv", "en": "c.csv"}
    assert FitConfig(backward=backward).taught_languages == ("de", "en")
    assert FitConfig(distillation_languages=("French",)).taught_languages == ("fr",)
    assert len(FitConfig().taught_languages) == 6


def test_a_language_is_stored_as_its_code():
    assert FitConfig(language="German-English").language == "de-en"
    assert FitConfig().language is None


def test_a_language_map_is_read_from_texts_and_goes_back_to_them():
    assert FitConfig().language_map == FitConfig(language_map=["auto"]).language_map == "auto"
    assert FitConfig(language_map=["none"]).language_map == {}
    given = FitConfig(language_map=["qu=Maori,gn=pt", "qu-es=mi"])
    assert given.language_map == {"qu": "mi", "gn": "pt", "qu-es": "mi"}
    assert fit_command(given).endswith(
        "--language-map qu=mi --language-map gn=pt --language-map qu-es=mi"
    )
    assert FitConfig(language_map=given.language_map) == given
    for wrong in (["qu"], "qu", 3, {"qu": "qu"}, ["auto", "qu=mi"]):
        with pytest.raises(UserError, match="language_map"):
            FitConfig(language_map=wrong)


def test_peft_knobs_are_read_from_the_command_line_and_from_json_alike():
    options = {"layers_to_transform": "5,3", "rank_pattern": ["fc1=8", "q_proj=4"]}
    config = FitConfig(**options, use_rslora=True, exclude_modules="fc2")
    assert config.layers_to_transform == (3, 5)
    assert config.rank_pattern == {"fc1": 8, "q_proj": 4}
    assert FitConfig(**json.loads(json.dumps(config.to_json()))) == config
    command = fit_command(config)
    for words in ("--layers 3,5", "--rank-pattern fc1=8", "--use-rslora", "--exclude-modules fc2"):
        assert words in command


CONTRACTS = ("1,each=2,de=0.5", ["1", "each=2,de=0.5"], ["each=2", 1, "de=.5"])


@pytest.mark.parametrize("text", CONTRACTS)
def test_a_contract_has_points_by_name_and_the_average_needs_none(text):
    expected = {"average": 1.0, "each": 2.0, "de": 0.5}
    assert FitConfig(keep=text).keep == expected == FitConfig(keep=expected).keep
    assert FitConfig(keep=0.5).keep == {"average": 0.5}
    assert "--keep average=0.5" in fit_command(FitConfig(keep=0.5))


def test_complete_pooling_is_the_same_as_none_given():
    plain = FitConfig(data=("de-en", "es-en"))
    assert FitConfig(data=("de-en", "es-en"), pooling="complete") == plain
    assert plain.to_json()["data"] == ["de-en", "es-en"]
    assert plain.to_json()["pooling"] is None


def test_the_json_of_a_config_makes_the_same_config():
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


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -5}, "^steps is -5; give a whole number from 1$"),
        ({"batch_size": 2.5}, "^batch_size is 2.5; give a whole number from 1$"),
        ({"lr": math.nan}, "^lr is nan; give a number above 0 below 1e[+]15$"),
        ({"lr": None}, "^lr is None; give a number above 0 below 1e[+]15$"),
        ({"beta": 1e300}, "^beta is 1e[+]300; give"),
        ({"prior_scale": 1e300}, "^prior_scale is 1e[+]300; give a number above 0 below"),
        ({"max_grad_norm": math.inf}, "^max_grad_norm is inf; give a number above 0$"),
        ({"warmup_steps": -1}, "^warmup_steps is -1; give a whole number from 0$"),
        ({"beta": -1e-9}, "^beta is -1e-09; give a number from 0 below 1e[+]15, 'auto' or"),
        ({"beta": "autoo"}, "^beta is 'autoo'; .*; did you mean 'auto'[?]$"),
        ({"seed": 2**32}, "^seed is 4294967296; give a whole number from 0 below 4294967296$"),
        ({"average_from": 1.0}, "^average_from is 1.0; give a number from 0 below 1$"),
        ({"ewc": math.nan}, "^ewc is nan; give a number from 0$"),
        ({"prior_inflation": 0.5}, "^prior_inflation is 0.5; give a number from 1$"),
        ({"streaming": "yes"}, "^streaming is 'yes'; give true or false$"),
        ({"dtype": "int8"}, "^dtype is 'int8'; give float32, bfloat16 or float16$"),
        ({"optimizer": "sgd"}, "^optimizer is 'sgd'; give adam or natural-gradient$"),
        ({"precision": "FP32"}, "^precision is 'FP32'; give auto, fp32 or bf16$"),
        ({"schedule": "cosin"}, "^schedule is 'cosin'; .*; did you mean 'cosine'[?]$"),
        (
            {"normalizer": "english"},
            "^normalizer is 'english'; give unicode, whisper, basic or none$",
        ),
        ({"task": "sing"}, "^task is 'sing'; give transcribe or translate$"),
        ({"on_bad_row": "ignore"}, "^on_bad_row is 'ignore'; give stop or skip$"),
        ({"prior": "norml"}, "^prior is 'norml'; give one of normal.*; did you mean 'normal'[?]$"),
        ({"guide": "pont"}, "^guide is 'pont'; .*auto-lowrank, or .* did you mean 'point'[?]$"),
        (
            {"guide": "auto-iaf"},
            "^guide is 'auto-iaf'; .*; Pyro's others have no mean to store, or",
        ),
        (
            {"guide": "auto-lowrank", "estimator": "flipout"},
            "^estimator is flipout, which guide auto-lowrank can't take; give shared, or fit with",
        ),
        ({"language": "ca-es"}, "'ca-es' may be ca of a region"),
        ({"data": ()}, "data names no source"),
        ({"data_weights": (1, 2)}, r"data_weights is 1, 2 for 1 source\(s\)"),
        ({"data": ("a", "b"), "data_weights": "1,x"}, "data_weights is '1,x'; give numbers"),
        ({"data": ("a", "b"), "data_weights": (1, math.nan)}, "data_weights is 1, nan"),
        ({"backward": ("de", "de")}, "two sets are called 'de'"),
        ({"backward": "de"}, "backward must be a list"),
        ({"normalizer": 3}, "^normalizer is 3; give unicode, whisper, basic or none$"),
        ({"schedule": True}, "^schedule is True; give cosine"),
        ({"pooling": []}, r"^pooling is \[\]; give complete"),
        ({"language": 3}, "^language is 3; give a text$"),
        ({"guide": ["a"]}, r"^guide is \['a'\]; give a text$"),
        ({"base": math.nan}, "^base is nan; give a text$"),
        ({"track": 3}, "^track is 3; give a list, or a text with commas between$"),
        ({"data": 3}, "^data is 3; give a source, or a list of them$"),
        ({"backward": [None]}, "^backward must be a list of sources, or sources by name$"),
        ({"prior_args": 3}, "^prior-arg is 3; give key=value"),
        ({"rank_pattern": ["q_proj"]}, "^rank-pattern is 'q_proj'; give key=value"),
        ({"rank_pattern": ["q_proj=0"]}, "^rank_pattern is 'q_proj=0'; give KEY=RANK, such as"),
        ({"rank_pattern": {"q_proj": 2.5}}, "^rank_pattern is 'q_proj=2.5'; give KEY=RANK"),
        ({"layers_to_transform": "1,x"}, "^layers is '1,x'; give numbers"),
        ({"layers_to_transform": (1.5,)}, "^layers is '"),
        ({"layers_to_transform": "-1"}, "^layers is '-1'; give numbers from 0 on"),
        ({"column": {"txt": "a"}}, "^column is 'txt=a'; give NAME=COLUMN, .*did you mean 'text'"),
        ({"column": {"text": 3}}, "^column is 'text=3'; give NAME=COLUMN"),
        ({"column": ["text=a,,b"]}, "^column is 'text=a,,b'; give NAME=COLUMN"),
        ({"steps": 10**400}, "^steps is 1000"),
        ({"prior_args": ["scale"]}, "^prior-arg is 'scale'; give key=value"),
        ({"prior_args": ["a=1", "a=2"]}, "^prior-arg gives 'a' twice"),
    ],
)
def test_a_value_that_an_option_does_not_allow_is_refused(options, message):
    with pytest.raises(UserError, match=message) as caught:
        FitConfig(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 50, "warmup_steps": 51}, "^warmup_steps is 51; .* 0 to the steps .*, 50$"),
        ({"batch_size": 4, "gradient_accumulation": 5}, "^gradient_accumulation is 5, .* 4 "),
        ({"patience": 3}, "^patience is given, but no eval_every; give both$"),
        ({"strength_by": "base"}, "^strength_by is base, but no keep; give both"),
        ({"dev": "de"}, "^dev is given, but neither keep nor eval_every; give one of them"),
        ({"keep": -1}, "^the limit 'average' of keep is '-1'; give points from 0 to 100"),
        ({"keep": "each=x"}, "^the limit 'each' of keep is 'x'"),
        ({"keep": "1,average=2"}, "^the limit 'average' of keep is given twice"),
        ({"keep": "average=1,,each=2"}, "^the limit 'average' of keep is ''"),
        ({"base": ""}, "^base is empty; give a folder, a Hub id, or pocket"),
        ({"keep": {"average": True}}, "^the limit 'average' of keep is 'True'"),
        ({"keep": ()}, "^keep has no limit; give points, such as 1, or leave it out"),
        ({"distillation": 1.0, "backward": {"a": "de"}}, "name the languages in distillation_lang"),
        ({"ewc": 1.0, "backward": ()}, "^ewc is given, but no backward set"),
        ({"average_from": 0.5, "eval_every": 5}, "^average_from and eval_every both choose"),
        ({"cache_encoder": True, "trim_audio": True}, "^cache_encoder and trim_audio are given"),
        ({"prior_scale": 0.2, "prior_args": {"scale": 0.3}}, "^scale is given by both"),
        ({"prior_inflation": 2.0}, "^prior_inflation is 2.0, but no prior_from; give both$"),
        ({"prior": "previous-posterior"}, "but no prior_from; give that alone$"),
        ({"prior_from": "runs/a", "prior": "laplace"}, "^prior and prior_from are given"),
        ({"prior_from": "runs/a", "guide": "point"}, "^guide and prior_from are given"),
        ({"shuffle_buffer": 10}, "^shuffle_buffer is 10, but no streaming; give both$"),
        ({"streaming": True, "data": ("a", "b")}, "data is 2 sources, and streaming takes one"),
        ({"streaming": True, "beta": "auto"}, "^beta is auto, which streaming can't take; give a"),
        ({"streaming": True, "epochs": 2}, "^epochs is 2, which streaming can't take; give steps"),
        (
            {"optimizer": "natural-gradient", "beta": 0.0},
            "^beta is 0.0, which optimizer natural-gradient can't take; give a number above 0",
        ),
        (
            {"optimizer": "natural-gradient", "guide": "point"},
            "^guide is point, which optimizer natural-gradient can't take; .* guide normal",
        ),
        (
            {"optimizer": "natural-gradient", "prior": "horseshoe"},
            "^prior is horseshoe, which optimizer natural-gradient can't take; .* guide normal",
        ),
        ({"streaming": True, "max_utterances": 2}, "^max_utterances is 2, which streaming can't"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        FitConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "some"}, "pooling is 'some'; give complete, hierarchical or none"),
        ({"pooling_scale": 0.0}, "pooling_scale is 0"),
        ({"pooling": "none", "pooling_scale": 0.5}, "pooling_scale is 0.5, and pooling is none"),
        ({"data": "de-en"}, "data is one domain; give two or more, NAME=SOURCE"),
        ({"data": ("a/b.csv", "de-en")}, r"domain \(of data as NAME=SOURCE\) is called 'a/b.csv'"),
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
def test_what_cannot_be_pooled_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        FitConfig(**{"data": ("de-en", "es-en"), "pooling": "hierarchical", **options})


# ---- as a command


def test_a_command_leaves_defaults_out():
    assert fit_command(FitConfig(rank=16, data="de-en", seed=0)) == "blora-pyro fit"
    command = fit_command(FitConfig(steps=200, data="zh-en"))
    assert sorted(command.split(" --")) == ["blora-pyro fit", "data zh-en", "steps 200"]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "fc1", "cache_encoder": True},
        {"target_modules": "fc1"},
        {"cache_encoder": False},
        {"spec_augment": True},
        {"trim_audio": True, "epochs": 2.0},
        {"steps": 400},
        {"streaming": True, "steps": 50},
    ],
)
def test_a_command_gives_what_other_options_would_change(options):
    config = FitConfig(base="openai/whisper-base", data="mine", **options)
    named = differing(config.to_json())
    again = FitConfig(**{name: getattr(config, name) for name in named})
    assert again == config


@pytest.mark.parametrize(
    "options",
    [
        {"data": "mine"},
        {"data": ["de-en", "mine.csv"]},
        {"test": "mine.csv"},
        {"backward": {"German": "de.csv"}},
    ],
)
def test_own_data_need_a_base_that_is_named(options):
    with pytest.raises(UserError, match=r"no base is given for (mine|de\.csv).*give base:"):
        FitConfig(**options).check_base()
    FitConfig(**options, base="pocket").check_base()
    FitConfig(**options, prior_from="runs/one").check_base()


def test_built_in_corpora_are_of_the_pocket_unasked():
    FitConfig().check_base()
    FitConfig(data=["de-en", "zh"], backward=("tr", "es"), test="es-en").check_base()


# ---- defaults of a base other than the pocket


def test_the_base_decides_the_defaults_of_what_is_not_given():
    pocket, real = FitConfig(), FitConfig(base="openai/whisper-base", batch_size=16)
    assert (pocket.lr, pocket.target_modules, pocket.epochs) == (5e-3, "all-linear", None)
    assert (real.lr, real.beta, real.batch_size) == (1e-3, 1e-5, 16)
    assert real.target_modules == DECODER and real.cache_encoder and real.epochs == 5
    assert real.given == {"base", "batch_size"}
    assert real.resolved(None, 540).steps == 5 * 34


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({"steps": 7}, "epochs", None),
        ({"streaming": True}, "epochs", None),
        ({"streaming": True}, "cache_encoder", False),
        ({"spec_augment": True}, "cache_encoder", False),
        ({"trim_audio": True}, "cache_encoder", False),
        ({"target_modules": "all-linear"}, "cache_encoder", False),
        ({"prior_from": "runs/a"}, "target_modules", "all-linear"),
        ({"cache_encoder": False}, "cache_encoder", False),
        ({"lr": 5e-3}, "lr", 5e-3),
    ],
)
def test_what_is_given_rules_out_defaults_that_do_not_go_with_it(options, name, value):
    assert getattr(FitConfig(base="mine", **options), name) == value


def test_another_base_brings_its_own_defaults():
    moved = FitConfig(beta=0.5).with_options(base="mine", rank=4)
    assert (moved.lr, moved.beta, moved.rank, moved.epochs) == (1e-3, 0.5, 4, 5)
    assert moved.given == {"base", "beta", "rank"}
    back = moved.with_options(base=POCKET)
    assert (back.lr, back.target_modules, back.epochs) == (5e-3, "all-linear", None)
    stored = FitConfig.with_given({**vars_of(FitConfig(base="mine")), "lr": 0.02}, {"base"})
    assert stored.with_options(base=POCKET).lr == 0.02  # an earlier run's


def vars_of(config):
    return {name: getattr(config, name) for name in declarations(FitConfig)}
