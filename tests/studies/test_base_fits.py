from types import SimpleNamespace

import pytest
import torch

from blora_pyro.options import FitConfig
from blora_pyro.runs.listeners import Listener
from blora_pyro.studies import base_fits
from blora_pyro.studies.base_fits import BaseFits, commit, edited, machine


@pytest.fixture(scope="module")
def fits_of_base(fluent_folder, sets_folder):
    """Read them, and leave them as they are."""
    backward = {name: str(sets_folder / name) for name in ("de", "en")}
    config = FitConfig(base=str(fluent_folder), data=str(sets_folder / "mix"), backward=backward)
    return BaseFits(config, Listener())


@pytest.fixture
def fitted(monkeypatch):
    """The configuration of the fit that is made, in place of the fit."""
    seen = []

    def fit(config, folder, **more):
        seen.append(config)
        return SimpleNamespace(posterior=None)

    monkeypatch.setattr(base_fits.fits, "fit", fit)
    return seen


def test_every_set_is_loaded_once(fits_of_base, sets_folder):
    first, again = fits_of_base.sets("dev"), fits_of_base.sets("dev")
    assert [*first] == ["new_domain", "de", "en"]
    assert all(first[name] is again[name] for name in first)
    assert fits_of_base.sets("test")["de"] is not first["de"]
    other = fits_of_base.sets("dev", data=(str(sets_folder / "de"),))
    assert other["new_domain"] is not first["new_domain"] and other["en"] is first["en"]


def test_a_fit_that_was_begun_goes_on_without_what_differs_between_machines(
    fits_of_base, fitted, tmp_path
):
    config = FitConfig(rank=2, device="cuda")
    fits_of_base.fit(config, tmp_path / "new")
    (tmp_path / "run.json").write_text('{"state": "fitting"}')
    fits_of_base.fit(config, tmp_path)
    assert [one.given_options for one in fitted] == [{"rank": 2, "device": "cuda"}, {"rank": 2}]


def test_a_folder_of_a_fit_that_had_not_begun_is_made_anew(fits_of_base, fitted, tmp_path):
    folder = tmp_path / "fit"
    folder.mkdir()
    (folder / "run.json.new").touch()
    fits_of_base.fit(FitConfig(), folder)
    assert len(fitted) == 1 and not folder.exists()


def test_the_hash_is_of_all_weights(fits_of_base):
    before = fits_of_base.fingerprint
    weight = next(fits_of_base.base.net.parameters())
    other = BaseFits(fits_of_base.config, Listener())
    assert other.fingerprint == before
    del other.fingerprint
    with torch.no_grad():
        next(other.base.net.parameters()).view(-1)[-1] += 1
    assert other.fingerprint != before and weight is not None


def test_a_posterior_is_pruned_then_weakened(finished_run):
    posterior = finished_run.posterior
    changed = edited(posterior, {"sparsity": 0.5, "strength": 0.0})
    assert changed.sparsity()["delta_w"] == 1
    assert changed.sparsity()["A"] >= 0.5 > posterior.sparsity()["A"]
    assert edited(posterior, {}).sparsity() == posterior.sparsity()


def test_where_a_score_was_made_is_said():
    assert commit() and " " not in commit()
    assert f"{torch.get_num_threads()} threads, python 3." in machine(torch.device("cpu"))
