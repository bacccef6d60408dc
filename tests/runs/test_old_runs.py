"""Run folders of version 0.1.0 load, serve every command, and go on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from blora_pyro import FitConfig, Posterior, at_strength, fit, load_base, merge_run, read_run
from blora_pyro.runs import diagnosis
from blora_pyro.runs.diagnosis import diagnose
from blora_pyro.runs.edited import combine_runs, prune_run
from blora_pyro.runs.utterances import read_utterances


@pytest.mark.parametrize("name", ["normal", "horseshoe", "pooled", "pruned", "combined", "second"])
def test_an_old_run_loads_with_its_record_and_draws(name, old_runs):
    posterior, record = read_run(old_runs / name, pooled=True)
    stored = json.loads((old_runs / name / "run.json").read_text(encoding="utf-8"))
    assert record.state == "finished"
    assert holds(json.loads(json.dumps(record.to_json())), stored)
    assert all(torch.isfinite(mean).all() for mean in posterior.mean.values())
    if name not in ("pruned", "combined"):
        (draw,) = posterior.draws(1)
        assert draw.keys() >= posterior.mean.keys()
        assert record.history and len(record.history) == 4


def holds(written, stored):
    """Whether all that was stored is written again; what is new may stand beside it."""
    if isinstance(stored, dict):
        return all(key in written and holds(written[key], one) for key, one in stored.items())
    return written == stored


def test_an_old_run_can_be_edited_merged_and_diagnosed(tmp_path, monkeypatch, old_runs):
    monkeypatch.setattr(diagnosis, "all_plots", lambda *args: {})
    size = prune_run(old_runs / "normal", tmp_path / "pruned", sparsity=0.5, evaluate=False)["size"]
    stored = json.loads((old_runs / "pruned" / "run.json").read_text(encoding="utf-8"))["pruned"]
    assert size["pruned"]["nonzero_weights"] == stored["pruned"]["nonzero_weights"]
    found = combine_runs([old_runs / "normal", old_runs / "second"], tmp_path / "combined")
    old = Posterior.load(old_runs / "combined")
    new = Posterior.load(tmp_path / "combined")
    assert found["rank"] == 2
    base = load_base("pocket").net
    for (name, one), (_, other) in zip(updates(old), updates(new), strict=True):
        assert torch.allclose(one, other, atol=1e-7), name
    merge_run(old_runs / "second", tmp_path / "merged")
    assert load_base(str(tmp_path / "merged")).net.config.d_model == base.config.d_model
    assert diagnose(old_runs / "horseshoe", tmp_path / "plots").num_weights > 0
    assert at_strength(new, 0.5).num_weights == new.num_weights


def updates(posterior):
    """Layer -> B A of every layer, in order."""
    for group in posterior.groups:
        product = posterior.mean[group.B.name] @ posterior.mean[group.A.name]
        yield from zip(group.modules, product, strict=True)


def test_an_old_table_of_utterances_is_read(old_runs):
    rows = read_utterances(old_runs / "normal")
    assert len(rows) == 3 and all(row["edits"] >= 0 for row in rows)


def test_an_old_posterior_is_the_prior_of_a_new_fit(old_runs):
    config = FitConfig(prior_from=str(old_runs / "normal"), data="es-en", max_utterances=6)
    config = config.with_options(batch_size=3, steps=4, backward=("en",))
    run = fit(config, evaluate=False)
    expected = Posterior.load(old_runs / "second")
    for name, mean in run.posterior.mean.items():
        assert torch.allclose(mean, expected.mean[name], atol=1e-5), name


def test_an_old_fit_that_was_killed_goes_on_to_the_same_posterior(tmp_path, old_runs):
    folder = tmp_path / "run"
    shutil.copytree(old_runs / "unfinished", folder)
    run = fit(output=folder, resume=True, evaluate=False)
    assert [step.step for step in run.history] == [1, 2, 3, 4, 5, 6]
    expected = load_file(old_runs / "unfinished" / "expected.safetensors")
    compared = 0
    for name, mean in run.posterior.mean.items():
        assert torch.allclose(mean, expected[f"{name}.mean"], atol=1e-5), name
        compared += 1
    assert compared
