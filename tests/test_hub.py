"""Runs on the Hub, read by their id."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from blora_pyro import Posterior
from blora_pyro.errors import UserError
from blora_pyro.hub import find_run
from blora_pyro.options import FitConfig
from blora_pyro.publishing.uploads import write_public_run
from blora_pyro.runs.chains import Previous
from blora_pyro.runs.diagnosis import diagnose
from blora_pyro.runs.edited import combine_runs, prune_run
from blora_pyro.runs.folders import read_run
from blora_pyro.runs.strength_curves import strength_curve


@pytest.fixture
def uploaded(hub, finished_run, fluent_folder, tmp_path) -> str:
    """A run on the Hub, and its base."""
    folder = tmp_path / "uploaded"
    folder.mkdir()
    write_public_run(finished_run.output, folder, "me/adapter", base="someone/fluent")
    hub.add("someone/fluent", fluent_folder)
    hub.add("me/adapter", folder)
    return "me/adapter"


def test_a_path_that_exists_comes_first(hub, uploaded, finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_run(uploaded) != Path(uploaded)
    hub.requests.clear()
    shutil.copytree(finished_run.output, uploaded)
    assert find_run(uploaded) == Path(uploaded)
    for name in ("nowhere", "/no/where", "../no/where", "no/such/folder"):
        assert find_run(name) == Path(name)
    assert hub.requests == []


def test_revisions_and_a_cache_that_will_do(hub, uploaded, monkeypatch):
    commit = hub.repos[uploaded].refs["main"]
    for name in (uploaded, Path(uploaded), f"{uploaded}@v1", f"{uploaded}@{commit}"):
        assert find_run(name).name == commit
    with pytest.raises(UserError, match="no revision 'v2'"):
        find_run(f"{uploaded}@v2")
    hub.requests.clear()
    assert find_run(uploaded, local_files_only=True).name == commit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_run(uploaded).name == commit
    assert hub.requests == []
    with pytest.raises(UserError, match=r"'me/other' is no run folder .* HF_HUB_OFFLINE is set"):
        find_run("me/other")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("someone/nothing", "is no run folder, and the Hub has no such repository"),
        ("someone/gated", "gated; ask for access"),
        ("someone/down", "can't be reached"),
        ("someone/stock", "is a stock PEFT adapter, without a posterior.*as --base"),
        ("someone/whisper", "holds no adapter, without a posterior"),
    ],
)
def test_what_is_no_run_is_told_in_a_line(hub, tmp_path, name, words):
    for repo, file in (("stock", "adapter_config.json"), ("whisper", "config.json")):
        (tmp_path / repo).mkdir()
        (tmp_path / repo / file).write_text("{}")
        hub.add(f"someone/{repo}", tmp_path / repo)
    with pytest.raises(UserError, match=words) as caught:
        Posterior.load(name)
    assert "\n" not in str(caught.value)


def test_commands_take_it(uploaded, tmp_path):
    posterior, about = read_run(uploaded)
    assert about.language == "de-en"
    assert Previous.read(uploaded).complete(FitConfig()).base == "someone/fluent"
    combine_runs([uploaded, uploaded], tmp_path / "both", rank=4)
    prune_run(uploaded, tmp_path / "pruned", rank=1, evaluate=False)
    assert json.loads((tmp_path / "pruned/run.json").read_text())["pruned"]["from"] == uploaded
    assert Posterior.load(tmp_path / "pruned").rank == 1
    assert posterior.rank == 4


def test_plots_of_a_run_on_the_hub_need_a_place(uploaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="on the Hub and has no folder for diagnostics; give out"):
        diagnose(uploaded, khat=False)
    with pytest.raises(UserError, match=r"no folder for strength\.png; give plot"):
        strength_curve(uploaded, (0.0, 1.0))
    assert not Path("me").exists()
