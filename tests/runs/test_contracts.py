import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from blora_pyro.diagnostics.explanations import Shrinkage
from blora_pyro.diagnostics.summaries import summarise
from blora_pyro.errors import UserError
from blora_pyro.evaluation import Evaluation
from blora_pyro.metrics.error_rates import Counts
from blora_pyro.models import load_base
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.strength import at_strength
from blora_pyro.publishing.uploads import write_public_run
from blora_pyro.runs.chains import Previous
from blora_pyro.runs.contracts import (
    check_dev_sets,
    holds,
    keep_contract,
    largest,
    losses,
    strength_within,
)
from blora_pyro.runs.edited import prune_run
from blora_pyro.runs.finished import evaluate_run, merge_run
from blora_pyro.runs.fits import fit
from blora_pyro.runs.folders import read_run
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.record import RunRecord

from .conftest import Notes

# ---- the search, on errors that are made up


def scored(percent, length=1000) -> Evaluation:
    """An evaluation of utterances of equal length with these errors in percent."""
    edits = np.rint(10 * np.atleast_1d(np.asarray(percent))).astype(int)
    counts = {"wer": Counts(edits, np.full(len(edits), length))}
    return Evaluation("wer", counts, [], [], [])


class Scores:
    """Scores by strength in place of a net's: of the new domain, and of sets `de` and `fr`."""

    def __init__(self, new, de, fr=lambda strength: 0):
        self.errors = {"new_domain": new, "de": de, "fr": fr}
        self.asked = []

    def score(self, posterior, what=None, keep=None):
        strength = 0.0 if posterior is None else posterior.strength
        self.asked.append(strength)
        return {name: scored(error(strength)) for name, error in self.errors.items()}


def chosen(posterior, scores, keep, **options):
    config = FitConfig(keep=keep, backward={"de": "de", "fr": "fr"})
    return keep_contract(scores, posterior, config, **options)


@pytest.mark.parametrize("last", range(21))
def test_the_last_place_is_found_in_six_looks_or_less(last):
    looked = []
    assert largest(lambda place: looked.append(place) or place <= last, 21) == last
    assert looked[0] == 20 and 0 not in looked
    assert len(looked) == len({*looked}) <= 6


@pytest.mark.parametrize(("points", "strength"), [(0, 0.0), (1.5, 0.3), (4.3, 0.85), (30, 1.0)])
def test_the_strength_is_the_largest_that_keeps_the_contract(random_posterior, points, strength):
    """The new domain gets better all the way, the average loses 5 points at full strength."""
    scores = Scores(lambda s: 90 - 50 * s, lambda s: 10 + 10 * s)
    kept = chosen(random_posterior(0), scores, points)
    assert kept["strength"] == strength
    assert kept["losses"]["average"] == pytest.approx(0.05 * strength)
    assert kept["losses"]["de"] == pytest.approx(0.1 * strength)
    assert len(scores.asked) == len({*scores.asked}) <= 8


def test_a_lower_strength_is_taken_where_the_new_domain_is_better_there(random_posterior):
    kept = chosen(random_posterior(0), Scores(lambda s: 50 + 100 * (s - 0.6) ** 2, lambda s: s), 10)
    assert kept["strength"] == 0.6
    points = kept["curve"]["points"]
    assert [one["strength"] for one in points] == [0, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    assert kept["curve"]["chosen"] == 0.6
    assert points[2]["new_domain"]["rate"] == 0.5


def test_each_set_and_a_set_of_its_own_have_limits(random_posterior):
    scores = Scores(lambda s: 90 - 50 * s, lambda s: 10 + 10 * s, lambda s: 20 - 10 * s)
    found = {
        name: chosen(random_posterior(0), scores, {name: 4})["strength"]
        for name in ("average", "each", "de", "fr")
    }
    assert found == {"average": 1.0, "each": 0.4, "de": 0.4, "fr": 1.0}


def test_what_makes_the_new_domain_worse_is_turned_off(random_posterior):
    assert chosen(random_posterior(0), Scores(lambda s: 50 + s, lambda s: 10), 5)["strength"] == 0


def test_more_confidence_asks_for_less_strength(random_posterior):
    """A loss that differs from one utterance to the next is less sure than its mean."""

    def uneven(strength):
        return np.where(np.arange(40) < 10, round(40 * strength), 0)

    scores = Scores(lambda s: 90 - 50 * s, uneven, uneven)
    found = [
        chosen(random_posterior(0), scores, 5.0, confidence=one)["strength"] for one in (0.5, 0.95)
    ]
    assert found == [0.5, 0.35]
    before, after = scores.score(None), {name: scored(uneven(1)) for name in scores.errors}
    assert losses(before, after)["de"] == pytest.approx(0.1)
    assert losses(before, after, 0.95)["de"] > 0.12


def test_a_loss_of_exactly_the_limit_is_within_it():
    assert holds({"average": 0.3}, {"average": 0.1 + 0.2, "de": 0.1 + 0.2})
    assert not holds({"each": 0.3}, {"average": 0.2, "de": 0.4, "fr": 0.0})


def test_sets_without_words_are_refused(random_posterior):
    scores = Scores(lambda s: 1, lambda s: 0)
    for name in ("new_domain", "de"):
        own = scores.score(None)
        empty = Scores(lambda s: 1, lambda s: 0)
        empty.score = lambda *a, own=own, name=name: {**own, name: scored(0, length=0)}
        with pytest.raises(UserError, match="no words to score"):
            chosen(random_posterior(0), empty, 1)


# ---- a fit that keeps one


@pytest.fixture
def folder(kept_run) -> Path:
    return kept_run[0].output


def test_the_run_says_the_contract_the_strength_and_the_curve(kept_run, folder):
    run, notes = kept_run
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert about["config"]["keep"] == {"average": 80.0}
    kept = about["kept"]
    points = {one["strength"]: one for one in kept["curve"]["points"]}
    chosen, full = points[kept["strength"]], points[1]
    assert kept["limits"] == {"average": 0.8}
    assert 0 < kept["strength"] < 1
    assert 0 < kept["losses"]["average"] <= 0.8 < full["forgetting"]["difference"]
    assert kept["losses"]["average"] == pytest.approx(chosen["forgetting"]["difference"])
    assert chosen["new_domain"]["rate"] < points[0]["new_domain"]["rate"]
    assert (folder / "strength.png").read_bytes().startswith(b"\x89PNG")
    assert not [*folder.glob("transcripts-*")]
    assert notes[-1] == (
        f"strength {kept['strength']:g} keeps the contract (average at most +80 points) on dev: "
        f"average {100 * kept['losses']['average']:+.1f} points, new domain "
        f"{chosen['new_domain']['rate']:.1%}"
    )
    assert run.posterior.strength == kept["strength"]


def test_the_table_says_whether_the_contract_holds_on_test(kept_run):
    run, _ = kept_run
    losses = {
        name: both["change"]["wer"]["difference"] for name, both in run.metrics["backward"].items()
    }
    worst = max(losses, key=losses.get)
    losses["average"] = run.metrics["backward_error"]["change"]["difference"]
    strength = run.posterior.strength
    assert run.metrics["contract"] == {
        "limits": {"average": 0.8},
        "strength": strength,
        "losses": losses,
        "holds": True,  # test is dev here
    }
    lines = run.table.splitlines()
    assert f"contract: average at most +80 points; strength {strength:g} was chosen on dev" in lines
    assert (
        f"contract on test: kept; average {100 * losses['average']:+.1f} points, the most on "
        f"{worst}, {100 * losses[worst]:+.1f}"
    ) in lines


def test_adapter_merge_and_scores_have_the_strength_and_1_gives_the_full_fit(
    kept_run, folder, keep_options, tmp_path
):
    run, _ = kept_run
    loaded, record = read_run(folder)
    full, strength = at_strength(loaded, 1), record.kept["strength"]
    assert (loaded.strength, full.strength, full.alpha) == (strength, 1.0, 8.0)
    assert loaded.fingerprint == run.posterior.fingerprint == run.metrics["adapter"]
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    assert alpha == pytest.approx(8 * strength)
    tensors = load_file(folder / "posterior.safetensors")
    assert all(torch.equal(tensors[f"{name}.mean"], mean) for name, mean in full.mean.items())

    assert evaluate_run(folder) == run.metrics
    whole = evaluate_run(folder, strength=1)
    assert whole["adapter"] == full.fingerprint != loaded.fingerprint
    rate = record.kept["curve"]["points"][-1]["new_domain"]["rate"]  # of dev, which test is, too
    assert whole["new_domain"]["adapted"]["wer"]["rate"] == rate
    assert "contract" not in whole

    merge_run(folder, tmp_path / "merged")
    merged = load_base(str(tmp_path / "merged")).net.state_dict()
    base = load_base(keep_options["base"]).net.state_dict()
    for name, delta in loaded.delta_weights():
        change = merged[f"{name}.weight"] - base[f"{name}.weight"]
        torch.testing.assert_close(change, delta, rtol=1e-3, atol=1e-5)
    as_base = load_base(str(folder)).net.state_dict()  # by PEFT
    torch.testing.assert_close(as_base, merged, rtol=1e-4, atol=1e-5)


def test_a_run_made_of_it_has_the_strength_once(kept_run, folder, tmp_path):
    prune_run(folder, tmp_path / "pruned", sparsity=0.0, evaluate=False)
    posterior, record = read_run(tmp_path / "pruned")
    assert (posterior.strength, record.kept) == (1.0, None)
    assert posterior.alpha == pytest.approx(8 * kept_run[0].posterior.strength)
    assert Previous.read(folder).posterior.alpha == 8.0  # what was learned, at full strength


def test_the_published_run_has_the_strength_and_its_card_the_contract(folder, tmp_path):
    write_public_run(folder, tmp_path, "me/kept", base="someone/base")
    there, strength = Posterior.load(tmp_path), read_run(folder)[0].strength
    assert (there.strength, at_strength(there, 1).alpha) == (strength, 8.0)
    alpha = json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"]
    assert alpha == pytest.approx(8 * strength)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "contract on test: kept; average +" in card
    assert f"| strength that keeps the contract | {strength:g} |" in card
    assert str(folder.parent) not in (tmp_path / "run.json").read_text(encoding="utf-8")


def test_a_fit_that_was_ended_before_its_strength_was_chosen_goes_on(kept_run, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "run")
    about = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    del about["kept"]
    (copy / "run.json").write_text(json.dumps({**about, "state": "evaluating"}), encoding="utf-8")
    with pytest.raises(UserError, match="is not finished; go on with: blora-pyro fit --resume"):
        read_run(copy)
    run = fit(output=copy, resume=True)
    first = kept_run[0].posterior
    assert (run.posterior.strength, run.posterior.alpha) == (first.strength, first.alpha)
    assert read_run(copy)[1].kept == read_run(folder)[1].kept
    assert run.metrics == kept_run[0].metrics


@pytest.mark.parametrize(
    ("limits", "strength"),
    [
        ({"average": 0.01}, 0.25),
        ({"average": 0.05}, 1),
        ({"each": 0.02}, 0.25),
        ({"average": 0.03, "each": 0.04, "de": 0.004}, 0.5),
        ({"de": 0.0}, 0),
    ],
)
def test_the_strength_up_to_which_losses_are_within_a_contract(limits, strength):
    lost = {"average": 0.04, "de": 0.008, "es": 0.08, "en": -0.01}
    assert strength_within(limits, lost) == pytest.approx(strength)


def test_the_backward_dev_sets_are_watched_on_the_way(keep_options, tmp_path):
    run = fit(FitConfig(**{**keep_options, "eval_every": 20}), tmp_path / "run", evaluate=False)
    first, last = run.dev["errors"]
    assert first["step"] == 20
    assert first.keys() == last.keys() == {"step", "error", "forgetting", "within_contract"}
    record = RunRecord.read(tmp_path / "run")
    assert record.dev == run.dev
    base = record.kept["curve"]["points"][0]["new_domain"]["rate"]
    for one in run.dev["errors"]:
        share = min(1, 0.8 / one["forgetting"])
        expected = base + share * (one["error"] - base)
        assert one["within_contract"] == pytest.approx(expected)
    best = min(run.dev["errors"], key=lambda one: one["within_contract"])
    assert best["step"] == run.dev["best_step"]
    end = record.kept["curve"]["points"][-1]
    assert (end["strength"], end["new_domain"]["rate"]) == (1, best["error"])
    assert end["forgetting"]["difference"] == pytest.approx(best["forgetting"])
    assert best["forgetting"] > 0.5


def test_a_contract_may_be_kept_by_base(keep_options, always_chosen, tmp_path):
    options = {**keep_options, "keep": 100, "guide": "point", "strength_by": "base"}
    progress = Notes()
    run = fit(FitConfig(**options), tmp_path / "run", progress=progress)
    kept = run.metrics["contract"]
    assert kept["strength"] == always_chosen
    assert f"strength {always_chosen} by base keeps the contract" in progress.notes[-1]
    loaded, record = read_run(run.output)
    assert record.kept["curve"]["strength_by"] == "base"
    assert loaded.strength == run.posterior.strength == kept["strength"]
    assert loaded.fingerprint == run.posterior.fingerprint == run.metrics["adapter"]
    assert evaluate_run(run.output) == run.metrics
    again = evaluate_run(run.output, strength=kept["strength"], strength_by="base")
    assert again["adapter"] == run.metrics["adapter"]
    assert Shrinkage.of(loaded, summarise(loaded)).half_kl_layers is None  # a point's has no end
    whole = at_strength(loaded, 1)  # the fit is there
    assert whole.fingerprint == at_strength(run.posterior, 1).fingerprint != loaded.fingerprint
    assert whole.state.keys() and not loaded.state

    about = json.loads((run.output / "run.json").read_text(encoding="utf-8"))
    del about["kept"]  # as if it was ended before its strength was chosen
    text = json.dumps({**about, "state": "evaluating"})
    (run.output / "run.json").write_text(text, encoding="utf-8")
    assert fit(output=run.output, resume=True).metrics == run.metrics


def test_where_nothing_keeps_the_contract_the_base_comes_out(
    kept_run, folder, keep_options, tmp_path
):
    copy, progress = shutil.copytree(folder, tmp_path / "run"), Notes()
    about = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    del about["kept"], about["options"]["keep"]
    about["config"]["keep"] = about["options"]["keep"] = {"each": 0.0}
    (copy / "run.json").write_text(json.dumps({**about, "state": "evaluating"}), encoding="utf-8")
    run = fit(output=copy, resume=True, progress=progress)
    assert run.posterior.strength == run.posterior.alpha == 0
    assert run.metrics["contract"]["holds"]
    assert run.metrics["new_domain"]["change"]["wer"]["difference"] == 0
    assert progress.notes[-1].endswith("the base comes out")
    assert "strength 0 was chosen on dev: the base, for none other keeps it" in run.table
    assert (
        at_strength(read_run(copy)[0], 1).fingerprint == at_strength(run.posterior, 1).fingerprint
    )
    base = load_base(keep_options["base"]).net.state_dict()
    as_base = load_base(str(copy)).net.state_dict()  # by PEFT
    torch.testing.assert_close(as_base, base, rtol=0, atol=0)


# ---- before it is fitted


def test_sets_without_dev_and_test_are_refused_before_anything_is_fitted(
    keep_options, tones_folder, tmp_path
):
    def complaint(**other):
        with pytest.raises(UserError) as caught:
            fit(FitConfig(**{**keep_options, **other}), tmp_path / "run", progress=Stop())
        return str(caught.value)

    class Stop(Listener):
        def ready(self, *_):
            raise AssertionError("it is fitted")

    single = complaint(backward={"en": str(tones_folder / "en.jsonl")})
    assert "keep needs the dev and the test split of a backward set, and en is one set" in single
    assert "en has only de, en, test, train; give" in complaint(backward={"en": str(tones_folder)})
    missing = complaint(data=str(tones_folder))
    assert f"keep needs a dev set of the new domain, and {tones_folder} has no dev split" in missing
    check_dev_sets(FitConfig(**{**keep_options, "data": str(tones_folder), "dev": "de"}))
    with pytest.raises(UserError, match="keep is given, but no backward set to keep it on"):
        FitConfig(**{**keep_options, "backward": ()})
    with pytest.raises(UserError, match=r"limit for 'eng', .* did you mean 'en'\?"):
        FitConfig(**{**keep_options, "keep": "eng=1"})
    with pytest.raises(UserError, match=r"keep is .*, which pooling none can't take"):
        FitConfig(**{**keep_options, "data": ["de", "en"], "pooling": "none"})


def test_a_posterior_keeps_its_strength_on_disk_whatever_else_is_made_of_it(
    random_posterior, tmp_path
):
    half = at_strength(random_posterior(0, alpha=6.0), 0.5)
    half.save(tmp_path)
    assert Posterior.load(tmp_path).strength == 0.5
    assert at_strength(half, 0.5).alpha == half.alpha
    assert at_strength(half, None) is half
    assert replace(half, base="other").strength == 0.5
