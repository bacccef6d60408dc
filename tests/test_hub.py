"""Runs on the Hub, read by their id."""

import json
import shutil
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from huggingface_hub import constants

from blora_pyro import Posterior
from blora_pyro.data.hf_datasets import hub_splits, load_hub
from blora_pyro.errors import UserError
from blora_pyro.hub import find_run
from blora_pyro.models.folders import find_folder
from blora_pyro.options import FitConfig
from blora_pyro.publishing.uploads import write_public_run
from blora_pyro.runs.chains import Previous
from blora_pyro.runs.diagnosis import diagnose
from blora_pyro.runs.edited import combine_runs, prune_run
from blora_pyro.runs.folders import read_run
from blora_pyro.runs.strength_curves import strength_curve

from .hub_stand_in import answering


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


def test_a_mistyped_path_is_not_asked_of_the_hub(hub, uploaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "adapters").mkdir(parents=True)
    hub.requests.clear()
    with pytest.raises(UserError, match=r"did you mean 'me/adapters'.*me/adapter@main"):
        find_run(uploaded)
    with pytest.raises(UserError, match=r"base model 'me/x' .*give 'pocket'.*--revision main"):
        find_folder("me/x")
    assert hub.requests == []
    assert find_run(f"{uploaded}@main").is_dir()


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
        diagnose(uploaded)
    with pytest.raises(UserError, match=r"no folder for strength\.png; give plot"):
        strength_curve(uploaded, (0.0, 1.0))
    assert not Path("me").exists()


# ---- a Hub that is none


class FalseHub(BaseHTTPRequestHandler):
    """Answers by the owner of the repository that is asked for, on a port of this machine."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        way = next((one for one in WAYS if f"/{one}/" in self.path), "portal")
        content = WAYS[way]
        if way == "drop":
            return self.connection.close()
        if way == "circle":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if way in ("dots", "cut"):
            what = "info" if "/revision/" in self.path else "tree" if "/tree/" in self.path else ""
            content = {"info": INFO, "tree": TREES[way]}.get(what, b"short")
        self.send_response(200)
        for name, value in (("Content-Type", "text/html"), ("ETag", '"a"'), ("X-Repo-Commit", SHA)):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) + 100 * (content == b"short")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET


SHA = "a" * 40
INFO = json.dumps({"id": "x/y", "sha": SHA, "siblings": []}).encode()
WAYS = {
    "drop": b"",
    "circle": b"",
    "portal": b"<html><title>Please log in</title></html>",
    "list": b"[]",
    "number": b'{"sha": 3}',
    "deep": b"[" * 100_000,
    "dots": b"",
    "cut": b"",
}
TREES = {
    way: json.dumps([{"type": "file", "path": path, "size": 105, "oid": "b" * 40}]).encode()
    for way, path in (
        ("dots", "model-/../../../../../out-of-1.safetensors"),
        ("cut", "adapter_config.json"),
    )
}


@pytest.fixture
def false_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of a download
    with answering(FalseHub, tmp_path / "deep/er/cache", monkeypatch):
        yield


def one_split(name: str) -> object:
    return load_hub(name, "train")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("find", [find_run, find_folder, hub_splits, one_split])
def test_a_hub_that_drops_circles_or_answers_as_no_hub_does_is_one_line(
    false_hub, tmp_path, way, find
):
    with pytest.raises(UserError, match=f"{way}/x") as caught:
        find(f"{way}/x")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    safe = "what the Hub's cache holds is as it was", "can't be reached", "holds no", "no data at"
    assert any(words in message for words in safe)
    assert not list(tmp_path.rglob("out-of-1*"))


@pytest.mark.parametrize(
    "revision",
    ["../../../x", "a/../../x", "/etc/x", "a//b", ".git", "a/.b", "", "a\\b", "a\nb", "a/"],
)
def test_a_revision_that_is_a_path_elsewhere_is_refused_unasked(hub, uploaded, revision, tmp_path):
    hub.requests.clear()
    for local_files_only in (False, True):
        with pytest.raises(UserError, match="that is none; give a branch, tag or commit"):
            find_folder(uploaded, revision, local_files_only)
    if ".." in revision:
        with pytest.raises(UserError, match="that is none"):
            Posterior.load(f"{uploaded}@{revision}")
    assert hub.requests == []
