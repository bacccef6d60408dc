import json
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import WhisperForConditionalGeneration

from blora_pyro.diagnostics import summarise
from blora_pyro.diagnostics.densities import densities
from blora_pyro.errors import UserError
from blora_pyro.models import BLoRA
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.pruning import prune
from blora_pyro.runs import diagnosis
from blora_pyro.runs.chains import Previous
from blora_pyro.runs.edited import combine_runs, prune_run
from blora_pyro.runs.finished import evaluate_run, merge_run, transcribe
from blora_pyro.runs.fits import Run, fit
from blora_pyro.runs.listeners import Listener
from blora_pyro.studies.search import sweep


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


class Crash(Exception):
    """Stands for the end of the process."""


class Crashing(Listener):
    """Dies at a step or a stage."""

    def __init__(self, step=None, stage="nowhere"):
        self.at, self.name = step, stage

    def step(self, step):
        if step.step == self.at:
            raise Crash

    def stage(self, name):
        if name.startswith(self.name):
            raise Crash


@pytest.fixture(scope="module")
def earlier(finished_run, tmp_path_factory):
    """A copy of the finished run, which a test may change for a while."""
    folder = tmp_path_factory.mktemp("runs") / "earlier"
    shutil.copytree(finished_run.output, folder)
    return folder


@pytest.fixture(scope="module")
def options(fit_options, tones_folder, earlier):
    """Of a fit of a few steps to another domain; what is not here is the earlier run's."""
    return {
        "data": str(tones_folder / "de.jsonl"),
        "test": str(tones_folder / "de.jsonl"),
        "backward": (),
        "batch_size": 2,
        "steps": 6,
        "lr": 0.01,
        "prior_from": str(earlier),
    }


@pytest.fixture(scope="module")
def chained(options, tmp_path_factory) -> Run:
    """A run after the earlier one. Read it, and leave it as it is."""
    torch.set_num_threads(1)
    return fit(
        FitConfig(prior_inflation=2.0, **options), tmp_path_factory.mktemp("runs") / "chained"
    )


@pytest.fixture
def alone(chained, earlier, tmp_path):
    """The chained run where the earlier one is gone."""
    shutil.copytree(chained.output, tmp_path / "chained")
    away = earlier.rename(earlier.with_name("away"))
    yield tmp_path / "chained"
    away.rename(earlier)


# ---- the fit


def test_what_is_not_given_is_the_earlier_runs(chained, finished_run):
    for name in ("base", "revision", "rank", "alpha", "target_modules"):
        assert getattr(chained.config, name) == getattr(finished_run.config, name)
    assert chained.posterior.groups == finished_run.posterior.groups


def test_the_run_says_what_it_comes_after(chained, earlier, options, tmp_path):
    about = read_json(chained.output / "run.json")
    (link,) = about["chain"]
    assert link["run"] == str(earlier) and link["inflation"] == 2
    assert link["fingerprint"] == Previous.read(earlier).posterior.fingerprint
    assert about["config"]["prior"] == "previous-posterior"
    assert about["config"]["prior_from"] == str(earlier)
    third = {**options, "prior_from": chained.output, "steps": 1}
    fit(FitConfig(**third), tmp_path / "third", evaluate=False)
    links = read_json(tmp_path / "third" / "run.json")["chain"]
    assert links[0] == link
    assert (links[1]["run"], links[1]["inflation"]) == (str(chained.output), 1)


@pytest.mark.parametrize("inflation", [None, 1.0])
def test_a_prior_that_outweighs_the_data_keeps_the_posterior_where_it_was(
    options, finished_run, inflation
):
    start = {**options, "beta": 1e4, "steps": 4, "lr": 1e-3, "prior_inflation": inflation}
    run = fit(FitConfig(**start), evaluate=False)
    assert run.history[0].kl == pytest.approx(0, abs=1e-2)
    for name, mean in finished_run.posterior.mean.items():
        stddev = finished_run.posterior.stddev[name]
        assert ((run.posterior.mean[name] - mean) / stddev).abs().max() < 0.5  # steps of Adam
        assert (run.posterior.stddev[name] / stddev - 1).abs().max() < 0.02
    assert summarise(run.posterior).kl < 0.02 * run.posterior.num_weights


def test_without_a_say_of_the_prior_its_inflation_changes_nothing(options):
    runs_ = [
        fit(
            FitConfig(**{**options, "beta": 0, "steps": 2, "prior_inflation": inflation}),
            evaluate=False,
        )
        for inflation in (1.0, 1e6)
    ]
    assert [step.loss for step in runs_[0].history] == [step.loss for step in runs_[1].history]


# ---- the posterior


def test_figures_are_against_the_earlier_posterior(chained, finished_run):
    loaded = Posterior.load(chained.output)
    summary, rows = summarise(loaded), []
    assert (summary.prior, summary.prior_args) == ("previous-posterior", {"inflation": 2.0})
    for group in loaded.groups:
        for site in group.sites:
            m, s = loaded.mean[site.name].double(), loaded.stddev[site.name].double()
            m0 = finished_run.posterior.mean[site.name].double()
            s0 = 2 * finished_run.posterior.stddev[site.name].double()
            kl = (s0 / s).log() + (s**2 + (m - m0) ** 2) / (2 * s0**2) - 0.5
            contraction = 1 - (s / s0) ** 2
            rows += zip(kl.sum((1, 2)).tolist(), contraction.mean((1, 2)).tolist(), strict=True)
    for row, (kl, contraction) in zip(summary.factors, rows, strict=True):
        assert row.kl == pytest.approx(kl, rel=1e-4)
        assert row.contraction == pytest.approx(contraction, abs=1e-5)
    assert chained.history[-1].kl == pytest.approx(summary.kl, rel=0.2)  # a step before


def test_the_file_holds_the_prior_and_every_bit_of_it_comes_back(chained, finished_run, tmp_path):
    loaded = Posterior.load(chained.output)
    for name, mean in finished_run.posterior.mean.items():
        assert torch.equal(loaded.prior_tensors[f"{name}.mean"], mean)
        stddev = finished_run.posterior.stddev[name]
        assert torch.equal(loaded.prior_tensors[f"{name}.stddev"], stddev)
    loaded.save(tmp_path)
    one, two = (load_file(at / "posterior.safetensors") for at in (tmp_path, chained.output))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_draws_are_those_of_the_prior_and_the_guide(chained, finished_run):
    loaded = Posterior.load(chained.output)
    name = "B_16x16"
    with torch.no_grad():
        draws = torch.stack([loaded.prior()[name] for _ in range(300)])
    mean, stddev = finished_run.posterior.mean[name], 2 * finished_run.posterior.stddev[name]
    assert ((draws.mean(0) - mean) / stddev).abs().max() < 5 / 300**0.5
    assert (draws.std(0) / stddev).mean() == pytest.approx(1, abs=0.02)
    data = loaded.to_arviz(draws=2, sites=[name], modules="decoder.layers.0.self_attn.v_proj")
    assert data["posterior"][name].shape == (1, 2, 1, 16, 4)


def test_all_commands_work_where_the_earlier_run_is_gone(
    alone, chained, tones_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(diagnosis, "save_plots", lambda folder, plots: [])
    monkeypatch.setattr(diagnosis, "all_plots", lambda posterior, summary, *_: {})
    found = diagnosis.diagnose(alone, khat=True, draws=30)
    assert found.explanation.startswith("The prior is an earlier run's posterior")
    assert found.khat.value is not None
    assert evaluate_run(alone) == chained.metrics
    factor = densities(Posterior.load(alone), found.summary)[0]  # of the plots; the prior's part
    assert (factor.prior * np.diff(factor.edges)).sum() == pytest.approx(1, abs=0.01)
    audio = tones_folder / "train4.wav"
    (said,) = transcribe([audio], alone, samples=2)
    merge_run(alone, tmp_path / "merged")
    (merged,) = transcribe([audio], base=str(tmp_path / "merged"), language=said.language)
    assert merged.text == said.text
    assert fit(output=alone, resume=True).history == chained.history  # finished: it is returned
    net = WhisperForConditionalGeneration.from_pretrained(chained.config.base)
    PeftModel.from_pretrained(net, str(alone))


def test_pruned_it_has_no_prior_any_more_and_says_so(chained, tmp_path):
    pruned = prune(chained.posterior, rank=2)
    assert next(pruned.draws(1))
    with pytest.raises(UserError, match="turned away from its prior"):
        pruned.to_arviz(draws=2)
    pruned.save(tmp_path)
    assert not Posterior.load(tmp_path).prior_tensors


# ---- resumed


def test_a_resumed_fit_is_that_of_one_never_interrupted(chained, options, tmp_path):
    with pytest.raises(Crash):
        fit(
            FitConfig(prior_inflation=2.0, **options),
            tmp_path / "run",
            checkpoint_every=2,
            progress=Crashing(step=5),
        )
    run = fit(output=tmp_path / "run", resume=True)
    assert run.history == chained.history
    for name, mean in chained.posterior.mean.items():
        assert torch.equal(run.posterior.mean[name], mean)


def test_a_fit_whose_earlier_run_has_changed_is_not_gone_on_with(options, earlier, tmp_path):
    with pytest.raises(Crash):
        fit(FitConfig(**options), tmp_path / "run", checkpoint_every=2, progress=Crashing(step=5))
    file = earlier / "posterior.safetensors"
    before = file.read_bytes()
    try:
        posterior = Posterior.load(earlier)
        next(iter(posterior.mean.values()))[0, 0, 0] += 1e-3
        posterior.save(earlier)
        with pytest.raises(UserError, match="has changed since it was started; bring it back"):
            fit(output=tmp_path / "run", resume=True)
        file.unlink()
        with pytest.raises(UserError, match="no run folder"):
            fit(output=tmp_path / "run", resume=True)
    finally:
        file.write_bytes(before)
    assert len(fit(output=tmp_path / "run", resume=True).history) == options["steps"]


def test_a_fit_that_only_has_to_be_measured_needs_the_earlier_run_no_more(
    options, earlier, tmp_path
):
    with pytest.raises(Crash):
        fit(FitConfig(**options), tmp_path / "run", progress=Crashing(stage="adapted on"))
    away = earlier.rename(earlier.with_name("away"))
    try:
        run = fit(output=tmp_path / "run", resume=True)
    finally:
        away.rename(earlier)
    assert run.metrics["new_domain"]
    assert summarise(run.posterior).kl > 0


# ---- what is refused


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"base": "pocket"}, r"base is 'pocket', and .*earlier was fitted on .*; leave base out"),
        ({"revision": "v2"}, "revision is v2, and that of .* is None; leave revision out"),
        ({"rank": 8}, "rank is 8, and that of .* is 4; leave rank out"),
        ({"alpha": 4.0}, r"alpha is 4\.0, and that of .* is 8\.0; leave alpha out"),
        (
            {"target_modules": "q_proj"},
            r"target_modules is 'q_proj', 6 layers, and those of .* are 'all-linear', 32",
        ),
        ({"exclude_modules": "fc1"}, r"and those of .* are 'all-linear', 32; leave"),
        ({"use_rslora": True}, "use_rslora is True, and that of .* is False; leave use_rslora out"),
        ({"rank_pattern": {"fc1": 2}}, "rank_pattern is .*fc1.* is None; leave rank_pattern out"),
        ({"prior": "normal"}, "prior is 'normal' and prior_from is .*; give one"),
        ({"prior_scale": 0.1}, "prior_scale and prior_from are given, .*; leave prior_scale out"),
        ({"prior_args": {"scale": 0.1}}, "prior_args and prior_from are given"),
        ({"guide": "point"}, "guide and prior_from are given, .* leave guide out"),
        ({"prior_inflation": 0.5}, r"prior_inflation is 0\.5; give a number from 1"),
        ({"prior_inflation": 0}, "prior_inflation is 0; give a number from 1"),
        ({"prior_inflation": float("nan")}, "prior_inflation is nan; give a number from 1"),
        ({"prior_from": None, "prior_inflation": 2.0}, "but no prior_from; give both"),
        ({"prior_from": None, "prior": "previous-posterior"}, "but no prior_from"),
        ({"prior_from": "nowhere"}, "nowhere is no run folder"),
    ],
)
def test_what_does_not_match_is_refused(options, tmp_path, other, words):
    with pytest.raises(UserError, match=words):
        fit(FitConfig(**{**options, **other}), tmp_path / "run")
    assert not (tmp_path / "run" / "posterior.safetensors").exists()


def test_what_matches_may_be_given(options, fit_options, earlier):
    given = {"base": f"{fit_options['base']}/.", "rank": 4, "alpha": 8.0}
    config = FitConfig(**{**options, **given})
    assert Previous.read(earlier).complete(config).base == given["base"]


def test_the_shape_of_the_earlier_adapter_is_taken_over(options, fit_options, tmp_path):
    shape = {
        "target_modules": "q_proj,fc1",
        "exclude_modules": "encoder_attn.q_proj",
        "layers_to_transform": (1,),
        "rank": 3,
        "rank_pattern": {"q_proj": 2},
        "use_rslora": True,
    }
    first = FitConfig(**{**fit_options, **shape, "steps": 1})
    earlier = fit(first, tmp_path / "first", evaluate=False)
    later = FitConfig(**{**options, "prior_from": str(tmp_path / "first"), "steps": 1})
    run = fit(later, tmp_path / "second", evaluate=False)
    assert {name: getattr(run.config, name) for name in shape} == shape
    assert run.posterior.groups == earlier.posterior.groups
    assert {group.rank for group in run.posterior.groups} == {2, 3}
    combined = combine_runs([tmp_path / "first", tmp_path / "second"], tmp_path / "both")
    assert combined["rank"] == 6


def test_another_base_under_the_same_name_is_refused(options, earlier, net):
    previous = Previous.read(earlier)
    fresh = BLoRA(net, previous.prior(None), rank=4)  # as wide, with other weights
    with pytest.raises(UserError, match=r"the weights of base .* are not those .* differs\)"):
        previous.check(fresh.groups, "all-linear")


def test_the_output_is_not_the_earlier_run(options, earlier):
    with pytest.raises(UserError, match="output and prior_from are both"):
        fit(FitConfig(**options), earlier, overwrite=True)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"guide": "point"}, r"whose A and B are points without a spread \(prior normal, guide po"),
        ({"prior": "a-only"}, r"whose B are points without a spread \(prior a-only"),
    ],
)
def test_points_have_nothing_to_carry_on(fit_options, options, tmp_path, how, words):
    fit(FitConfig(**{**fit_options, "steps": 1, **how}), tmp_path / "point", evaluate=False)
    with pytest.raises(UserError, match=words):
        fit(FitConfig(**{**options, "prior_from": tmp_path / "point"}), tmp_path / "run")


def test_a_pruned_or_unfinished_run_is_refused(finished_run, options, tmp_path):
    prune_run(finished_run.output, tmp_path / "small", rank=1, evaluate=False)
    with pytest.raises(UserError, match=f"a pruned run; give {finished_run.output}"):
        fit(FitConfig(**{**options, "prior_from": tmp_path / "small"}))
    with pytest.raises(Crash):
        fit(FitConfig(**options), tmp_path / "run", progress=Crashing(step=2))
    with pytest.raises(UserError, match="is not finished"):
        fit(FitConfig(**{**options, "prior_from": tmp_path / "run"}))


def test_any_family_with_a_spread_is_carried_on(fit_options, options, tmp_path):
    fit(
        FitConfig(**{**fit_options, "steps": 1, "prior": "horseshoe"}),
        tmp_path / "one",
        evaluate=False,
    )
    one = Posterior.load(tmp_path / "one")
    start = {**options, "prior_from": tmp_path / "one", "steps": 1, "lr": 1e-9}
    run = fit(FitConfig(**start), evaluate=False)
    for name, mean in one.mean.items():
        torch.testing.assert_close(run.posterior.mean[name], mean)
        torch.testing.assert_close(run.posterior.stddev[name], one.stddev[name])


def test_a_sweep_after_a_run_searches_beta_alone(options, earlier, tones_folder, tmp_path):
    sets = {"dev": options["data"], "backward": (str(tones_folder / "en.jsonl"),)}
    given = {**options, **sets, "steps": 1}
    found = sweep(given, tmp_path / "sweep", trials=1)
    (trial,) = found.trials
    assert trial["values"].keys() == {"beta"}
    assert f"--prior-from {earlier}" in found.command(trial)
    link = read_json(tmp_path / "sweep" / trial["folder"] / "run.json")["chain"][0]
    assert link["run"] == str(earlier)
    with pytest.raises(UserError, match="prior_scale and prior_from are given"):
        sweep(given, tmp_path / "other", trials=1, search={"prior_scale": (0.1, 1.0)})
