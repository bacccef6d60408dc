import math
from dataclasses import replace

import pyro
import pytest
import torch

from blora_pyro.data import Examples, prompt_ids, read_manifest
from blora_pyro.errors import UserError
from blora_pyro.fitting import distillation
from blora_pyro.fitting.distillation import Distillation
from blora_pyro.fitting.objective import Objective
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.models import BLoRA, build_estimator
from blora_pyro.options import FitConfig
from blora_pyro.runs.fits import fit
from blora_pyro.transcription import transcribe_features


@pytest.fixture
def examples(fluent_base, tones_folder):
    """Two code-switched tones."""
    rows = read_manifest(tones_folder / "train.jsonl")
    return Examples(rows, fluent_base.feature_extractor, fluent_base.tokenizer)


@pytest.fixture
def model(fluent_base):
    return BLoRA(fluent_base.net, build_prior("normal"), rank=4, alpha=8.0)


def away(model):
    """A point guide some way from the base."""
    guide = build_guide("point", model)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return guide


def objective(model, guide, accumulation=1):
    estimator = build_estimator("shared")
    return Objective(model, guide, beta=0.0, estimator=estimator, accumulation=accumulation)


def test_the_targets_are_the_bases_own_transcripts_in_the_other_language(
    fluent_base, model, examples
):
    teach = Distillation(fluent_base, model.adapters, ["en"], 1.0)
    model.adapters.put(away(model)())  # the base is to be asked nevertheless
    soft = teach(examples.batch([0, 1]), [0, 1], 0).soft
    prompt = prompt_ids(fluent_base.tokenizer, "en")
    said = transcribe_features(fluent_base, examples.features, [prompt] * 2)
    for row, text in enumerate(said):
        inputs = soft.decoder_input_ids[row].tolist()
        count = int(soft.is_target[row].sum())
        assert inputs[: len(prompt)] == prompt
        length = len(prompt) + count - 1
        assert fluent_base.tokenizer.decode(inputs[len(prompt) : length]).strip() == text
        # greedily, and the end token last: each target is what the teacher finds most probable
        best = soft.log_probs[row, soft.is_target[row]].argmax(-1).tolist()
        assert best == [*inputs[len(prompt) : length], fluent_base.net.config.eos_token_id]
    assert torch.allclose(soft.log_probs[soft.is_target].exp().sum(-1), torch.ones(()), atol=1e-2)


def test_the_base_itself_pays_nothing_and_what_is_away_pays_the_divergence(
    fluent_base, model, examples
):
    batch = Distillation(fluent_base, model.adapters, ["en", "de"], 0.5)(
        examples.batch([0, 1]), [0, 1], 3
    )
    start = objective(model, build_guide("point", model))  # B = 0: the base
    loss, nll = start.gradients(batch)
    assert start.regularizer == pytest.approx(0.0, abs=1e-4)
    assert loss == pytest.approx(nll, abs=1e-4)
    guide = away(model)
    moved = objective(model, guide)
    loss, nll = moved.gradients(batch)
    soft = batch.soft
    with torch.no_grad(), model.adapters.using(guide.mean()):
        student = model.net(
            input_features=batch.input_features, decoder_input_ids=soft.decoder_input_ids
        ).logits.log_softmax(-1)
    where = soft.is_target
    divergence = (soft.log_probs.exp() * (soft.log_probs - student))[where].sum() / where.sum()
    assert moved.regularizer == pytest.approx(0.5 * divergence.item(), rel=1e-4)
    assert loss == pytest.approx(nll + moved.regularizer, rel=1e-5)


def test_its_gradient_is_the_same_in_micro_batches(fluent_base, model, examples):
    teach = Distillation(fluent_base, model.adapters, ["en", "de"], 2.0)
    batch = teach(examples.batch([0, 1, 1]), [0, 1, 1], 0)
    # one soft target fewer in one of the parts
    is_target = batch.soft.is_target.clone()
    is_target[0, is_target[0].nonzero()[-1]] = False
    batch = replace(batch, soft=replace(batch.soft, is_target=is_target))
    guide, found = away(model), []
    for parts in (1, 2, 3):
        one = objective(model, guide, parts)
        values = *one.gradients(batch), one.regularizer
        gradient = torch.cat([p.grad.flatten() for p in guide.parameters()])
        found.append((values, gradient.clone()))
    for values, gradient in found[1:]:
        assert values == pytest.approx(found[0][0], rel=1e-4)
        assert torch.allclose(gradient, found[0][1], rtol=1e-3, atol=1e-5)


def test_the_languages_drawn_depend_on_seed_and_number_alone(fluent_base, model, examples):
    def prompts(seed, number):
        pyro.set_rng_seed(number + 10 * seed)
        teach = Distillation(fluent_base, model.adapters, ["en", "de"], 1.0, seed)
        batch = teach(examples.batch([0, 1] * 8), [0, 1] * 8, number)
        return batch.soft.decoder_input_ids[:, 1].tolist()

    first = prompts(0, 0)
    assert first == prompts(0, 0)
    assert len(set(first)) == 2
    assert first != prompts(0, 1)
    assert first != prompts(1, 0)


def test_what_is_not_kept_is_computed_again(fluent_base, model, examples, monkeypatch):
    batch = examples.batch([0, 1])
    kept = Distillation(fluent_base, model.adapters, ["en"], 1.0)
    kept(batch, [0, 1], 0)
    monkeypatch.setattr(distillation, "encode", None)  # not asked again
    again = kept(batch, [0, 1], 1)
    monkeypatch.undo()
    monkeypatch.setattr(distillation, "MAX_BYTES", 0)
    forgetful = Distillation(fluent_base, model.adapters, ["en"], 1.0)
    forgetful(batch, [0, 1], 0)
    assert not forgetful._log_probs
    fresh = forgetful(batch, [0, 1], 1)
    assert torch.equal(fresh.soft.log_probs, again.soft.log_probs)


def test_no_language_or_an_unknown_one_is_refused(fluent_base, model):
    with pytest.raises(UserError, match="distillation_languages"):
        Distillation(fluent_base, model.adapters, [], 1.0)
    with pytest.raises(UserError, match="'fr'"):
        Distillation(fluent_base, model.adapters, ["fr"], 1.0)


def test_a_fit_stays_nearer_the_base_in_the_other_languages(fit_options):
    options = {**fit_options, "distillation_languages": ("en", "de"), "guide": "point", "beta": 0.0}
    options["steps"] = 15
    last = {}
    for weight in (1e-9, 3.0):
        run = fit(FitConfig(**options, distillation=weight), evaluate=False)
        last[weight] = sum(step.regularizer / weight for step in run.history[-5:])
        assert all(math.isfinite(step.loss) for step in run.history)
        assert run.history[-1].nll < run.history[0].nll
    assert last[3.0] < 0.5 * last[1e-9]
