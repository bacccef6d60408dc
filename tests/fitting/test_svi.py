import itertools
import math
import os
import signal
from dataclasses import astuple, fields
from typing import get_args

import pyro
import pytest
import torch
from datasets import concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from blora_pyro.data import Examples, read_manifest
from blora_pyro.errors import Interrupted, UserError
from blora_pyro.families import FAMILIES
from blora_pyro.fitting.checkpoints import FILE, Checkpoints, RandomState, read_checkpoint
from blora_pyro.fitting.history import DevError
from blora_pyro.fitting.interrupts import Interrupts
from blora_pyro.fitting.objective import Objective
from blora_pyro.fitting.stopping import EarlyStopping
from blora_pyro.fitting.svi import MAX_SKIPPED, fit_guide, learning_rate
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.models import ESTIMATORS, BLoRA
from blora_pyro.options import FittingOptions, Schedule, default_warmup_steps

quick = settings(deadline=None, max_examples=60)

# ---- learning rate

SCHEDULES = get_args(Schedule)
fits = st.tuples(st.integers(1, 2000), st.floats(1e-6, 1e2))


@quick
@given(fits, st.sampled_from(SCHEDULES), st.one_of(st.none(), st.integers(0, 3000)))
def test_the_rate_warms_up_linearly_to_its_peak_and_never_rises_again(fit, schedule, warmup):
    steps, peak = fit
    warm_up = default_warmup_steps(steps) if warmup is None else warmup
    rates = [learning_rate(step, steps, peak, schedule, warmup) for step in range(steps)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    for step, rate in enumerate(rates[:warm_up]):
        assert math.isclose(rate, peak * (step + 1) / warm_up)
    if warm_up < steps:
        assert math.isclose(rates[warm_up], peak)  # where the schedule begins
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(rates[warm_up:]))


@quick
@given(fits)
def test_the_cosine_ends_near_zero(fit):
    steps, peak = fit
    falling = steps - default_warmup_steps(steps)
    if falling > 1:
        last = learning_rate(steps - 1, steps, peak)
        assert last <= peak * (math.pi / (2 * falling)) ** 2
        assert learning_rate(steps, steps, peak) <= 1e-12 * peak


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("cosine", [0.5, 1, 1, 0.75, 0.25]),
        ("linear", [0.5, 1, 1, 2 / 3, 1 / 3]),
        ("constant", [0.5, 1, 1, 1, 1]),
    ],
)
def test_what_comes_after_the_warm_up(schedule, rates):
    found = [learning_rate(step, 5, 3.0, schedule, 2) for step in range(5)]
    assert found == pytest.approx([3 * rate for rate in rates])


def test_without_a_warm_up_the_first_rate_is_the_peak():
    assert all(learning_rate(0, 10, 0.3, schedule, 0) == 0.3 for schedule in SCHEDULES)


def test_a_tenth_of_the_steps_warms_up_unless_told():
    assert [default_warmup_steps(steps) for steps in (1, 4, 15, 400)] == [1, 1, 2, 40]


# ---- fit_guide


@pytest.fixture
def examples(tones_folder, tiny_base) -> Examples:
    dataset = read_manifest(tones_folder / "train.jsonl")
    return Examples(dataset, tiny_base.feature_extractor, tiny_base.tokenizer)


FEW = (
    r".*encoder\.layers\.1\.fc1|.*decoder.*attn\.(q|v)_proj"  # layers of two shapes, in both halves
)


def start(net, guide="normal", rank=2, seed=0, **how):
    """A model with the prior of the guide's family, or else the normal one; and the guide."""
    pyro.set_rng_seed(seed)
    prior = build_prior(guide if guide in FAMILIES else "normal")
    how = {"target_modules": FEW, **how}
    model = BLoRA(net, prior, rank=rank, alpha=2.0 * rank, **how)
    return model, build_guide(guide, model)


def fit_with(model, guide, examples, **given):
    """`fit_guide`; those of the keywords that are fitting options are gathered into them."""
    names = given.keys() & {field.name for field in fields(FittingOptions)}
    options = FittingOptions(**{name: given.pop(name) for name in names})
    return fit_guide(model, guide, examples, options, **given)


# Those whose parameters and sites differ; every family's own are the concern of `check_family`.
GUIDES = ("normal", "a-only", "point", "horseshoe", "learned-scale", "auto-normal", "auto-lowrank")
THREE_GUIDES = pytest.mark.parametrize("guide", ["normal", "horseshoe", "auto-lowrank"])
SHORT = {"beta": 1e-4, "lr": 1e-2, "steps": 5, "batch_size": 2}


@torch.no_grad()
def logits(net, examples) -> torch.Tensor:
    batch = examples.batch(range(len(examples)))
    return net(
        input_features=batch.input_features, decoder_input_ids=batch.decoder_input_ids
    ).logits


@THREE_GUIDES
def test_the_history_has_a_step_a_step(net, examples, guide):
    seen = []
    history = fit_with(*start(net, guide), examples, **SHORT, on_step=seen.append)
    assert seen == history
    assert [step.step for step in history] == [1, 2, 3, 4, 5]
    for step in history:
        assert step.lr == learning_rate(step.step - 1, 5, 1e-2)
        assert step.tokens == examples.num_tokens  # both utterances are in every batch
        assert step.kl is not None
        assert math.isclose(step.loss, step.nll + 1e-4 * step.kl, rel_tol=1e-6)


def test_the_first_kl_is_that_of_the_guides_start(net, examples):
    model, guide = start(net)
    expected = sum(
        kl_divergence(Normal(mean, guide.stddev()[name]), Normal(0.0, 0.05)).sum()
        for name, mean in guide.mean().items()
    )
    history = fit_with(model, guide, examples, **{**SHORT, "steps": 1})
    assert math.isclose(history[0].kl, float(expected), rel_tol=1e-3)


def test_the_likelihood_is_the_mean_over_target_tokens(net, examples):
    model, guide = start(net, "point")  # B = 0 at the start: the base itself
    batch = examples.batch([0, 1])
    expected = torch.nn.functional.cross_entropy(
        logits(net, examples).flatten(0, 1), batch.labels.flatten()
    )
    history = fit_with(model, guide, examples, **{**SHORT, "steps": 1})
    assert math.isclose(history[0].nll, float(expected), rel_tol=1e-4)


@THREE_GUIDES
def test_without_beta_there_is_no_kl(net, examples, guide):
    history = fit_with(*start(net, guide), examples, **{**SHORT, "beta": 0.0})
    assert all(step.kl is None and step.loss == step.nll for step in history)


def test_the_loss_falls_on_a_set_that_can_be_learned_by_heart(fluent_base, examples):
    options = {"beta": 1e-6, "lr": 0.05, "steps": 20, "batch_size": 2}
    history = fit_with(*start(fluent_base.net, rank=4), examples, **options)
    assert history[-1].loss < 0.5 * history[0].loss
    assert history[-1].nll < 0.5 * history[0].nll


def test_a_large_beta_pulls_the_posterior_to_the_prior(net, examples):
    options = {"beta": 1.0, "lr": 0.1, "steps": 30, "batch_size": 2}
    model, guide = start(net)
    history = fit_with(model, guide, examples, **options)
    assert history[-1].kl < 0.1 * history[0].kl


@THREE_GUIDES
def test_the_base_is_left_as_it_was(net, examples, guide):
    model, guide = start(net, guide)
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    before = logits(net, examples)
    fit_with(model, guide, examples, **SHORT)
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    assert torch.equal(logits(net, examples), before)  # no factors in place
    assert all(parameter.grad is None for parameter in net.parameters())


@THREE_GUIDES
def test_pyros_global_state_is_left_as_it_was(net, examples, guide):
    mine = pyro.param("mine", torch.tensor(2.0))
    local = pyro.settings.get("module_local_params")
    fit_with(*start(net, guide), examples, **SHORT)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert pyro.param("mine") is mine
    assert pyro.settings.get("module_local_params") is local


def test_the_same_seed_gives_the_same_history(net, examples):
    options = {**SHORT, "batch_size": 1}
    first, again, other = (
        [astuple(s) for s in fit_with(*start(net, seed=seed), examples, **options)]
        for seed in (4, 4, 5)
    )
    assert first == again
    assert first != other


def test_losses_that_are_not_finite_stop_the_fit_and_clear_the_net(net, examples):
    model, guide = start(net)
    before = logits(net, examples)
    features = examples.features
    examples.features = torch.full_like(features[:], math.nan)
    store = set(pyro.get_param_store().keys())
    with pytest.raises(FloatingPointError, match=r"is nan at step 5, .*10 times in a row"):
        fit_with(model, guide, examples, **SHORT)
    examples.features = features
    assert torch.equal(logits(net, examples), before)
    assert set(pyro.get_param_store().keys()) == store


def test_an_interrupted_fit_clears_the_net(net, examples):
    def interrupt(step):
        raise KeyboardInterrupt

    before = logits(net, examples)
    with pytest.raises(KeyboardInterrupt):
        fit_with(*start(net), examples, **SHORT, on_step=interrupt)
    assert torch.equal(logits(net, examples), before)


# ---- interrupted, and gone on from a checkpoint


class Crash(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def four(tones_folder, tiny_base) -> Examples:
    """Four utterances."""
    parts = [read_manifest(tones_folder / f"{split}.jsonl") for split in ("de", "train")]
    dataset = concatenate_datasets(parts)
    return Examples(dataset, tiny_base.feature_extractor, tiny_base.tokenizer)


OPTIONS = {"beta": 1e-3, "lr": 1e-2, "steps": 11, "batch_size": 3, "seed": 7}  # epochs of 2 steps
FEWER_STEPS = {**OPTIONS, "steps": 6}


def crash_at(step):
    def on_step(done):
        if done.step == step:
            raise Crash

    return on_step


def in_pieces(net, guide, four, folder, crashes, every, how=(), stopping=None, **options):
    """A fit that crashes after these steps; the guide and the history.

    `how` is for the model; `stopping` makes the early stopping of each piece.
    """
    for number, step in enumerate((*crashes, None)):
        seed = number if (folder / FILE).exists() else 0  # from there on that of no start counts
        model, fitted = start(net, guide, seed=seed, **dict(how))
        kept = Checkpoints(folder, {"fit": 1}, every)
        if stopping:
            options["early_stopping"] = stopping()
        try:
            history = fit_with(
                model, fitted, four, checkpoints=kept, on_step=crash_at(step), **options
            )
        except Crash:
            assert step is not None
    return fitted, history


def assert_same(guide, other):
    mine, theirs = guide.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("guide", GUIDES)
def test_every_guide_goes_on_bit_by_bit(net, four, guide, tmp_path):
    model, straight = start(net, guide)
    history = fit_with(model, straight, four, **FEWER_STEPS)
    again, rest = in_pieces(net, guide, four, tmp_path, (4,), 3, **FEWER_STEPS)
    assert rest == history
    assert_same(again, straight)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_goes_on_bit_by_bit(net, four, estimator, tmp_path):
    options = {**FEWER_STEPS, "estimator": estimator}
    model, straight = start(net)
    history = fit_with(model, straight, four, **options)
    again, rest = in_pieces(net, "normal", four, tmp_path, (5,), 2, **options)
    assert rest == history
    assert_same(again, straight)


def test_a_crash_after_every_step(net, four, tmp_path):
    model, straight = start(net)
    history = fit_with(model, straight, four, **FEWER_STEPS)
    crashes = [step for step in range(1, 7) for _ in range(2)]  # the second time gets no further
    again, rest = in_pieces(net, "normal", four, tmp_path, crashes, 1, **FEWER_STEPS)
    assert rest == history
    assert_same(again, straight)


def test_deviations_by_natural_gradient_leave_adam_the_rest(net, four, tmp_path):
    """The first step of the means is Adam's, and a checkpoint has no moments of the deviations."""
    options = {**OPTIONS, "steps": 1}
    (model, adam), (_, natural) = start(net), start(net)
    fit_with(model, adam, four, **options)
    kept = Checkpoints(tmp_path, {}, 1)
    options["optimizer"] = "natural-gradient"
    with pytest.raises(Crash):
        steps = {**options, "steps": 2}
        fit_with(model, natural, four, **steps, checkpoints=kept, on_step=crash_at(2))
    tensors = read_checkpoint(tmp_path / FILE).tensors
    slots = {name.split(".", 2)[2] for name in tensors if name.startswith("adam.")}
    assert slots == {f"means.{name}" for name in adam.means}
    again, natural = start(net)
    fit_with(again, natural, four, **options)
    for name, mean in natural.means.items():
        assert torch.equal(mean, adam.means[name])
        assert not torch.equal(natural.rhos[name], adam.rhos[name])


@pytest.mark.parametrize("guide", ["point", "auto-normal"])
def test_a_guide_without_such_deviations_is_refused(net, four, guide):
    with pytest.raises(UserError, match="needs a mean-field Normal guide"):
        fit_with(*start(net, guide), four, **OPTIONS, optimizer="natural-gradient")


def test_writing_checkpoints_changes_nothing(net, four, tmp_path):
    model, straight = start(net)
    history = fit_with(model, straight, four, **FEWER_STEPS)
    model, kept = start(net)
    found = fit_with(model, kept, four, **FEWER_STEPS, checkpoints=Checkpoints(tmp_path, {}, 1))
    assert found == history
    assert_same(kept, straight)


def test_a_checkpoint_of_another_guide_is_refused_in_one_line(net, four, tmp_path):
    with pytest.raises(Crash):
        fit_with(
            *start(net, "normal"),
            four,
            **OPTIONS,
            checkpoints=Checkpoints(tmp_path, {}, 1),
            on_step=crash_at(3),
        )
    with pytest.raises(UserError, match="does not fit the guide") as caught:
        fit_with(*start(net, "point"), four, **OPTIONS, checkpoints=Checkpoints(tmp_path, {}, 1))
    assert "\n" not in str(caught.value)


def test_a_signal_ends_the_fit_after_its_step_with_a_checkpoint(net, four, tmp_path):
    model, straight = start(net)
    history = fit_with(model, straight, four, **OPTIONS)
    seen = []

    def on_step(step):
        seen.append(step)
        if step.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted), Interrupts() as interrupts, interrupts.deferred():
        kept = Checkpoints(tmp_path, {"fit": 1}, 1000, interrupts)
        fit_with(*start(net), four, **OPTIONS, checkpoints=kept, on_step=on_step)
    assert seen == history[:5]
    assert read_checkpoint(tmp_path / FILE).step == 5
    again, rest = in_pieces(net, "normal", four, tmp_path, (), 1000, **OPTIONS)
    assert rest == history
    assert_same(again, straight)


# ---- what can be turned

KNOBS = [
    {"schedule": "linear", "warmup_steps": 3, "max_grad_norm": 0.1},
    {"gradient_accumulation": 2, "estimator": "flipout", "spec_augment": True},
    {"optimizer": "natural-gradient", "gradient_accumulation": 2, "max_grad_norm": 0.5},
]


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_whatever_is_turned_goes_on_bit_by_bit(net, four, knobs, tmp_path):
    options = {**FEWER_STEPS, **knobs}
    model, straight = start(net)
    history = fit_with(model, straight, four, **options)
    assert history != fit_with(*start(net), four, **FEWER_STEPS)
    again, rest = in_pieces(net, "normal", four, tmp_path, (5,), 3, **options)
    assert rest == history
    assert_same(again, straight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_goes_on_bit_by_bit(net, four, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(Objective, "GROWTH_STEPS", 3)
    scales, gradients = [], Objective.gradients

    def seen(objective, *args):
        scales.append(objective.scale)
        return gradients(objective, *args)

    monkeypatch.setattr(Objective, "gradients", seen)
    options, half = {**OPTIONS, "steps": 6, "batch_size": 2}, net.to(dtype)
    model, straight = start(half)
    history = fit_with(model, straight, four, **options)
    assert all(parameter.dtype is torch.float32 for parameter in straight.parameters())
    assert scales == [2.0**16] * 3 + [2.0**17] * 3 if dtype is torch.float16 else [1.0] * 6
    again, rest = in_pieces(half, "normal", four, tmp_path, (5,), 2, **options)
    assert scales[-2:] == scales[4:6]  # the last piece began with step 5
    assert rest == history
    assert_same(again, straight)


def test_schedule_and_warm_up_are_those_of_the_steps(net, examples):
    options = {**SHORT, "schedule": "linear", "warmup_steps": 3}
    history = fit_with(*start(net), examples, **options)
    assert [step.lr for step in history] == [
        learning_rate(step, 5, 1e-2, "linear", 3) for step in range(5)
    ]


def test_gradient_checkpointing_fits_the_same(net, four):
    options = {**OPTIONS, "steps": 3, "gradient_accumulation": 2, "estimator": "flipout"}
    plain, checkpointed = (
        fit_with(*start(net, gradient_checkpointing=flag), four, **options)
        for flag in (False, True)
    )
    assert checkpointed == plain


def test_gradient_accumulation_fits_nearly_the_same(net, four):
    options = {**OPTIONS, "steps": 4, "batch_size": 4}
    whole = fit_with(*start(net), four, **options)
    parts = fit_with(*start(net), four, **options, gradient_accumulation=4)
    for one, other in zip(parts, whole, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-3)
        assert other.tokens == one.tokens


def test_the_features_of_every_step_are_masked_anew_and_the_examples_are_not(net, examples):
    steps, features = [], examples.features[:]
    hook = net.model.encoder.conv1.register_forward_pre_hook(
        lambda _, inputs: steps.append((inputs[0] == 0).all(1).nonzero().tolist())
    )
    fit_with(*start(net), examples, **SHORT, spec_augment=True)
    hook.remove()
    assert len(steps) == 5
    assert all(0 < len(masked) < 100 for masked in steps)
    assert all(one != other for one, other in itertools.pairwise(steps))
    assert torch.equal(examples.features[:], features)


# ---- early stopping


def loss_of(net, four):
    """A dev error that depends on all that is in place in the net, and draws random numbers."""

    def measure():
        torch.rand(3)
        batch = four.batch([0, 1])
        with torch.no_grad():
            found = net(
                input_features=batch.input_features, decoder_input_ids=batch.decoder_input_ids
            ).logits
        return torch.nn.functional.cross_entropy(found.flatten(0, 1), batch.labels.flatten()).item()

    return measure


def listed(errors):
    rest = iter(errors)
    return lambda: next(rest)


def snapshots(guide, kept):
    """Keeps the guide after every step."""

    def on_step(step):
        kept[step.step] = {name: value.clone() for name, value in guide.state_dict().items()}

    return on_step


def test_the_best_guide_is_restored_and_the_fit_stops(net, four):
    model, guide = start(net)
    kept, straight = {}, fit_with(*start(net), four, **OPTIONS)
    model, guide = start(net)
    stopping = EarlyStopping(listed([0.5, 0.3, 0.4, 0.3]), every=2, patience=2)
    history = fit_with(
        model, guide, four, **OPTIONS, early_stopping=stopping, on_step=snapshots(guide, kept)
    )
    assert history == straight[:8]  # it changes nothing before
    assert stopping.errors == [
        DevError(2, 0.5),
        DevError(4, 0.3),
        DevError(6, 0.4),
        DevError(8, 0.3),
    ]
    assert all(torch.equal(value, kept[4][name]) for name, value in guide.state_dict().items())
    assert not torch.equal(guide.means["A_16x16"], kept[8]["means.A_16x16"])


def test_without_patience_it_goes_to_the_end_and_measures_there(net, four):
    model, guide = start(net)
    kept, stopping = {}, EarlyStopping(listed([0.5, 0.6, 0.1]), every=4)
    on_step = snapshots(guide, kept)
    fit_with(model, guide, four, **OPTIONS, early_stopping=stopping, on_step=on_step)
    assert [one.step for one in stopping.errors] == [4, 8, 11]
    assert all(torch.equal(value, kept[11][name]) for name, value in guide.state_dict().items())


def test_the_posterior_mean_is_measured_and_no_random_number_is_lost(net, four):
    straight, found = fit_with(*start(net), four, **OPTIONS), {}
    stopping = EarlyStopping(loss_of(net, four), every=3)
    assert fit_with(*start(net), four, **OPTIONS, early_stopping=stopping) == straight
    model, guide = start(net)

    def on_step(step):
        with RandomState.kept(net.device), model.adapters.using(guide.mean()):
            found[step.step] = loss_of(net, four)()

    fit_with(model, guide, four, **OPTIONS, on_step=on_step)
    assert stopping.errors == [DevError(step, found[step]) for step in (3, 6, 9, 11)]
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize(
    ("guide", "crashes"),
    [
        ("normal", range(1, 9)),
        ("horseshoe", (4, 7)),
    ],
)
def test_early_stopping_goes_on_bit_by_bit(net, four, guide, crashes, tmp_path):
    made = []

    def stopping():
        made.append(EarlyStopping(loss_of(net, four), every=3, patience=2))
        return made[-1]

    model, straight = start(net, guide)
    history = fit_with(model, straight, four, **OPTIONS, early_stopping=stopping())
    again, rest = in_pieces(net, guide, four, tmp_path, crashes, 2, stopping=stopping, **OPTIONS)
    assert rest == history
    assert made[-1].to_json() == made[0].to_json()
    assert_same(again, straight)


def test_a_skipped_step_is_not_measured(net, four):
    measured = []
    stopping = EarlyStopping(lambda: measured.append(0) or 0.5, every=2)
    fit_with(*start(net), Poisoned(four, {4, 11, 12}), **OPTIONS, early_stopping=stopping)
    assert [one.step for one in stopping.errors] == [2, 6, 8, 10, 11]
    assert len(measured) == 5


# ---- losses that are not finite


class Poisoned:
    """Examples that have no finite loss at some steps."""

    def __init__(self, examples, steps):
        self.examples, self.steps, self.step = examples, steps, -1
        self.sources = examples.sources

    def __len__(self):
        return len(self.examples)

    def batch(self, indices):
        batch = self.examples.batch(indices)
        self.step += 1  # the first batch is only for the guide's parameters
        if self.step in self.steps:
            batch.input_features.fill_(math.nan)
        return batch


def test_a_step_without_a_finite_loss_is_skipped(net, four, tmp_path):
    bad = {3, 4, 9}
    model, guide = start(net)
    history = fit_with(model, guide, Poisoned(four, bad), **OPTIONS)
    assert [step.step for step in history] == [1, 2, 5, 6, 7, 8, 10, 11]
    assert all(math.isfinite(step.loss) for step in history)
    model, kept = start(net)
    checkpoints = Checkpoints(tmp_path, {"fit": 1}, 1)
    with pytest.raises(Crash):
        fit_with(
            model,
            kept,
            Poisoned(four, bad),
            **OPTIONS,
            checkpoints=checkpoints,
            on_step=crash_at(6),
        )
    assert read_checkpoint(tmp_path / FILE).step == 5
    later = Poisoned(four, {step - 5 for step in bad})
    again, rest = in_pieces(net, "normal", later, tmp_path, (), 1, **OPTIONS)
    assert rest == history
    assert_same(again, guide)


def test_a_fit_does_not_end_on_a_loss_that_is_not_finite(net, four):
    model, guide = start(net)
    history = fit_with(model, guide, Poisoned(four, {10, 11, 12}), **OPTIONS)
    assert [step.step for step in history] == list(range(1, 10))
    with pytest.raises(FloatingPointError, match=f"{MAX_SKIPPED} times in a row"):
        fit_with(*start(net), Poisoned(four, range(10, 30)), **OPTIONS)


def test_nine_in_a_row_are_skipped_and_ten_are_too_many(net, four):
    options = {**OPTIONS, "steps": 14}
    history = fit_with(*start(net), Poisoned(four, range(2, 11)), **options)
    assert [step.step for step in history] == [1, 11, 12, 13, 14]
    with pytest.raises(FloatingPointError, match=r"nan at step 11, .*10 times in a row"):
        fit_with(*start(net), Poisoned(four, range(2, 12)), **options)


@pytest.mark.parametrize(
    ("guide", "lr"),
    [("normal", 1e30), ("horseshoe", 1e30), ("normal", 1e3)],
)
def test_a_fit_that_diverges_stops_and_its_checkpoint_is_from_before(
    net, four, guide, lr, tmp_path
):
    model, fitted = start(net, guide)
    kept = Checkpoints(tmp_path, {}, 1)
    with pytest.raises(FloatingPointError, match="not finite 10 times in a row"):
        fit_with(model, fitted, four, **{**OPTIONS, "lr": lr, "steps": 40}, checkpoints=kept)
    if (tmp_path / FILE).exists():
        tensors = read_checkpoint(tmp_path / FILE).tensors
        assert all(torch.isfinite(value.float()).all() for value in tensors.values())


def test_gradients_that_are_not_finite_change_no_weight(net, four):
    model, guide = start(net)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    next(iter(guide.means.values())).register_hook(lambda grad: grad * math.inf)
    with pytest.raises(FloatingPointError, match="gradient"):
        fit_with(model, guide, four, **OPTIONS)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())


def test_an_error_in_a_program_is_no_loss_that_is_not_finite(net, four):
    model, guide = start(net)
    model.prior = lambda site: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit_with(model, guide, four, **OPTIONS)
