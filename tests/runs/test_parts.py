import pytest
import torch

from blora_pyro.diagnostics.data_check import load_processor
from blora_pyro.errors import UserError
from blora_pyro.fitting.distillation import Distillation
from blora_pyro.fitting.encoder_cache import EncoderCache
from blora_pyro.guides import point, with_prior_arguments
from blora_pyro.models import BLoRA, PooledBLoRA, load_base
from blora_pyro.options import FitConfig
from blora_pyro.runs.finished import merge_run
from blora_pyro.runs.fits import fit
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.parts import build, regularise, teacher_of, training_set, unsuppressed


@pytest.fixture
def make(fluent_base, fit_options):
    """Returns the loader of a configuration with these options."""

    def make(**options):
        config = with_prior_arguments(FitConfig(**{**fit_options, **options}))
        return Loader(fluent_base, config.resolved(100, 2))

    return make


def test_the_training_set_comes_with_its_size_unless_it_is_a_stream(make):
    examples, size = training_set(make(), print)
    assert size == {"tokens": examples.num_tokens, "utterances": 2}
    assert training_set(make(max_utterances=1), print)[1]["utterances"] == 1
    stream, size = training_set(make(streaming=True), print)
    assert size == {"tokens": None, "utterances": None} and len(stream.sample) == 2


def test_tokens_that_the_base_suppresses_are_allowed_where_the_training_texts_hold_them(
    make, fluent_base, fit_options, tmp_path
):
    train, _ = training_set(make(), print)
    (used, *_), first = train.targets[0], train.targets[1][0]
    (unused, *_) = {*range(200)}.difference(*train.targets)
    settings = fluent_base.net.generation_config
    settings.suppress_tokens, settings.begin_suppress_tokens = [used, unused], [first]
    base = tmp_path / "base"
    fluent_base.save_pretrained(base)
    notes = []
    loader = Loader(load_base(str(base)), make().config, on_note=notes.append)
    tokens = tuple(sorted({used, first}))
    assert unsuppressed(loader, training_set(loader, print)[0]) == tokens
    assert len(notes) == 1 and "2 of 2 training texts hold tokens" in notes[0]

    options = {**fit_options, "base": str(base), "steps": 1}
    run = fit(FitConfig(**options), tmp_path / "run", evaluate=False)
    assert run.posterior.unsuppressed == tokens
    merge_run(tmp_path / "run", tmp_path / "merged")
    for name in ("merged", "run"):
        settings = load_base(str(tmp_path / name)).net.generation_config
        assert settings.suppress_tokens == [unused] and not settings.begin_suppress_tokens
        assert load_processor(str(tmp_path / name))[3].anywhere == {unused}


def test_program_and_guide_are_those_of_the_configuration(make, fluent_base):
    config = make(rank=2, guide="point", target_modules="fc1", prior_scale=0.3).config
    model, guide = build(fluent_base, config)
    assert type(model) is BLoRA and isinstance(guide, point.Guide)
    assert {group.rank for group in model.groups} == {2}
    assert all(name.endswith("fc1") for group in model.groups for name in group.modules)
    assert model.prior.scale == 0.3 and model.alpha == 4.0
    assert not model.likelihood.gradient_checkpointing and model.likelihood.autocast is None


def test_several_domains_get_a_pooled_program(make, fluent_base, fit_options):
    data = {"mixed": fit_options["data"], "german": fit_options["backward"][0]}
    model, guide = build(fluent_base, make(data=data, pooling="hierarchical").config)
    assert isinstance(model, PooledBLoRA)
    for mean in guide.means.values():
        assert (mean.unflatten(0, (3, -1))[1:] == 0).all()  # no deviation at the start


def test_teachers_are_those_of_the_configuration(make, fluent_base):
    def teacher(**options):
        loader = make(**options)
        config, train = loader.config, loader.load(loader.config.sources, "train")
        return teacher_of(fluent_base, build(fluent_base, config)[0], config, train)

    assert teacher() is None
    assert isinstance(teacher(distillation=0.1, distillation_languages="de"), Distillation)
    both = {"distillation": 0.1, "distillation_languages": "de", "cache_encoder": True}
    cache = teacher(**both, target_modules=".*decoder.*fc1")
    assert isinstance(cache, EncoderCache) and isinstance(cache.then, Distillation)


def test_a_program_has_a_penalty_if_the_configuration_has_ewc(make, fluent_base, fit_options):
    model, guide = build(fluent_base, make().config)
    regularise(model, make())
    assert model.penalty is None
    with pytest.raises(UserError, match="has no train split"):
        regularise(model, make(ewc=2.0))
    stages = []
    regularise(model, make(ewc=2.0, backward={"all": fit_options["data"]}), stages.append)
    assert stages == ["Fisher information"]
    assert model.penalty(guide.mean()) == 0  # B = 0
    moved = {name: torch.ones_like(value) for name, value in guide.mean().items()}
    assert model.penalty(moved) > 0
