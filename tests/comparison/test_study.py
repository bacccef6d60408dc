from dataclasses import replace

import pytest
import torch
from datasets import DatasetDict

from blora_pyro.comparison import study as studies
from blora_pyro.comparison.candidates import Candidate, read_candidate
from blora_pyro.comparison.fits import Edit
from blora_pyro.comparison.methods import POINT, Method, choose_methods, read_setting
from blora_pyro.comparison.plan import Plan
from blora_pyro.comparison.rows import TEST, RowSpec
from blora_pyro.comparison.study import Study
from blora_pyro.data import load_split
from blora_pyro.errors import UserError
from blora_pyro.runs.listeners import Listener


@pytest.fixture
def study(small, tmp_path):
    options = {name: small[name] for name in ("base", "backward", "rank", "batch_size")}
    return Study(tmp_path, small["domains"], options, Listener())


@pytest.fixture
def spec(small):
    def make(text, domain="mix", seed=0, split=TEST, setting="allx2"):
        return RowSpec(read_candidate(text), read_setting(setting), domain, seed, split)

    return make


def test_the_fit_of_a_row_has_all_its_options(study, spec, small):
    fit, edit = study.fit_of(spec("scaled-lora:0.5:0.003", seed=3))
    assert edit == Edit(factor=0.5)
    assert (fit.config.lr, fit.config.beta, fit.config.guide) == (0.003, 0.0, "point")
    assert (fit.config.steps, fit.config.seed, fit.config.rank) == (2, 3, 2)
    assert fit.config.sources == (small["domains"]["mix"],)
    assert study.fit_of(spec("base"))[0] is None


def test_a_pruned_fit_is_the_fit_and_its_row_another(study, spec):
    whole, part = spec("blora:0.0001"), spec("pruned-blora:0.5:0.0001")
    (fit, _), (same, edit) = study.fit_of(whole), study.fit_of(part)
    assert same.key == fit.key
    assert edit == Edit(sparsity=0.5)
    study.make(part)
    about = study.row_of(part).about
    assert (about["factor"], about["pruned"]) == (1.0, 0.5)
    assert about["sparsity"]["A"] + about["sparsity"]["B"] >= 1
    assert study.row_of(whole) is None


def test_full_fine_tuning_is_not_pruned(study, spec):
    method = Method("pruned-full", "full, pruned", "full", "sparsity", (0.5,), of="full")
    pruned = Candidate(method, 0.5, read_candidate("full:0.0001"))
    with pytest.raises(UserError, match="let it be of a LoRA or BLoRA"):
        study.fit_of(replace(spec("base"), candidate=pruned))


def test_replay_draws_a_share_from_the_backward_sets(study, spec, small):
    fit, _ = study.fit_of(spec("replay-lora:0.2:0.003"))
    assert fit.config.sources == (small["domains"]["mix"], *small["backward"].values())
    assert fit.config.data_weights == pytest.approx((0.8, 0.1, 0.1))


def test_a_key_changes_with_all_that_decides_a_row(study, spec):
    keys = {
        study.key_of(one)
        for one in (
            spec("lora:0.003"),
            spec("lora:0.001"),
            spec("peft-lora:0.003"),
            spec("blora:0.0001"),
            spec("lora:0.003", seed=1),
            spec("lora:0.003", split="dev"),
            spec("lora:0.003", setting="allx3"),
            spec("scaled-lora:0.5:0.003"),
            spec("base"),
        )
    }
    assert len(keys) == 9


def test_rows_that_are_the_same_have_one_key(study, spec):
    assert study.key_of(spec("scaled-lora:1:0.003")) == study.key_of(spec("lora:0.003"))
    assert study.key_of(spec("base", seed=1, setting="allx9")) == study.key_of(spec("base"))
    assert study.lock_of(spec("scaled-lora:0.5:0.003")) == study.lock_of(spec("lora:0.003"))


def test_a_key_follows_the_weights_of_the_base(study, spec):
    before = study.key_of(spec("lora:0.003"))
    again = Study(study.output, study.domains, study.options, Listener())
    assert again.key_of(spec("lora:0.003")) == before
    changed = Study(study.output, study.domains, study.options, Listener())
    with torch.no_grad():
        changed.base.net.model.decoder.layers[0].fc1.weight[0, 0] += 1
    assert changed.key_of(spec("lora:0.003")) != before


def test_a_row_of_nothing_is_the_base(study, spec):
    child = Method("scaled-lora", "scaled", "lora", "factor", (0.0, 1.0), of="lora")
    lora = Method("lora", "LoRA", "lora", "lr", (0.03,), POINT)
    methods = choose_methods([lora, child])
    plan = Plan(methods, [read_setting("allx2")], ["mix"], [0], study.row_of)
    for one in plan.candidates("lora", plan.settings[0]):
        study.make(plan.dev_row(one, plan.settings[0]))
    nothing, whole = plan.candidates("scaled-lora", plan.settings[0])
    base = RowSpec(plan.candidates("base", plan.settings[0])[0], plan.settings[0], "mix", 0, "dev")
    for one in (base, plan.dev_row(nothing, plan.settings[0])):
        study.make(one)
    rows = [study.row_of(one) for one in (base, plan.dev_row(nothing, plan.settings[0]))]
    for name in rows[0].counts:
        assert rows[0].main(name).edits.tolist() == rows[1].main(name).edits.tolist()
    assert study.row_of(plan.dev_row(whole, plan.settings[0])) is not None  # that of LoRA
    assert len(list((study.output / "fits").iterdir())) == 1  # LoRA's
    assert rows[1].about["sparsity"]["delta_w"] == 1


@pytest.mark.parametrize("text", ["full:0.001", "peft-lora:0.01", "replay-lora:0.5:0.01"])
def test_a_row_says_what_it_is_and_leaves_the_base_alone(study, spec, text):
    before = {name: value.clone() for name, value in study.base.net.state_dict().items()}
    study.make(spec(text))
    row = study.row_of(spec(text))
    assert [*row.counts] == ["new_domain", "de", "en"]
    assert "pier" in row.counts["new_domain"]
    assert (row.about["candidate"], row.about["seed"], row.about["split"]) == (text, 0, TEST)
    assert row.about["machine"]["threads"] == 1
    assert row.about["adapter"]["weights"] > 0 and row.about["adapter"]["bytes"] > 0
    assert row.about["seconds"]["fit"] > 0
    assert 0 <= row.about["sparsity"]["delta_w"] <= 1
    after = study.base.net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_row_of_the_base_has_the_base_rates(study, spec, finished_run):
    study.make(spec("base"))
    row, expected = study.row_of(spec("base")), finished_run.metrics
    assert row.new_domain_error == expected["new_domain"]["base"]["wer"]["rate"]
    assert row.backward_error == expected["backward_error"]["base"]["rate"]


def test_a_fit_that_is_not_finite_is_a_failed_row(study, spec, monkeypatch):
    def fail(*given):
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(studies, "make_fit", fail)
    study.make(spec("lora:0.005"))
    assert study.row_of(spec("lora:0.005")).failed == "the loss is nan"


def test_objects_of_datasets_are_sources(study, spec, small):
    def splits(path):
        sets = {name: load_split(path, name) for name in ("train", "dev", "test")}
        return DatasetDict({name: one.remove_columns("origin") for name, one in sets.items()})

    domain = splits(small["domains"]["mix"])
    backward = {name: splits(path) for name, path in small["backward"].items()}
    own = Study(study.output, {"mix": domain}, {**study.options, "backward": backward}, Listener())
    own.make(spec("lora:0.003"))
    assert own.row_of(spec("lora:0.003")) is not None
    assert own.key_of(spec("lora:0.003")) != study.key_of(spec("lora:0.003"))


def test_a_source_without_the_split_is_refused_before_the_fit(study, spec, small, tones_folder):
    for source, split in ((str(tones_folder), "dev"), (str(tones_folder / "test.jsonl"), "test")):
        own = Study(study.output, {"mix": source}, study.options, Listener())
        with pytest.raises(UserError, match=f"has no {split} split; a comparison chooses on dev"):
            own.make(spec("lora:0.003", split=split))
    assert not (study.output / "fits").exists()


def test_a_base_without_backward_sets_is_refused(study):
    with pytest.raises(UserError, match="give sets of what it already knows as backward"):
        Study(study.output, {}, {"base": study.options["base"]}, Listener())
