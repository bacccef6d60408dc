"""What goes up to the Hub comes down again as it was, and nothing else goes up."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors import safe_open
from typer.testing import CliRunner

from blora_pyro import Posterior
from blora_pyro.cli import app
from blora_pyro.errors import UserError
from blora_pyro.models import Pooling, load_base
from blora_pyro.posterior import Family
from blora_pyro.publishing.uploads import push_run, write_public_run
from blora_pyro.runs.finished import merge_run, transcribe
from blora_pyro.runs.folders import ADAPTER, read_run

# huggingface_hub 2.4 uploads LFS files by an argument that httpx2 has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

UP = {*ADAPTER, "posterior.safetensors", "run.json", "metrics.json", "README.md"}


@pytest.fixture
def run(finished_run) -> Path:
    return finished_run.output


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_run_comes_back_from_the_hub_as_it_was(hub, run, fluent_folder, tones_folder, tmp_path):
    hub.add("someone/fluent", fluent_folder)
    url = push_run(run, "me/adapter", base="someone/fluent", private=True, token="hf_secret")
    repo = hub.repos["me/adapter"]
    assert url == f"{constants.ENDPOINT}/me/adapter/commit/{repo.refs['main']}"
    assert repo.private
    assert "Bearer hf_secret" in hub.tokens
    assert set(hub.files("me/adapter")) == UP
    assert len(hub.stored) == 2  # both safetensors as LFS

    hub.requests.clear()
    here, there = Posterior.load(run), Posterior.load("me/adapter")
    assert not [path for path in hub.requests if path.endswith(("README.md", ADAPTER[1]))]
    assert there.base == "someone/fluent"
    for part in ("mean", "stddev", "state"):
        assert same_tensors(getattr(here, part), getattr(there, part))
    assert (there.groups, there.alpha, there.family) == (here.groups, here.alpha, here.family)

    audio = [tones_folder / "test4.wav"]
    texts = [transcribe(audio, adapter, language="de-en") for adapter in (run, "me/adapter")]
    assert texts[0] == texts[1]
    merge_run("me/adapter", tmp_path / "merged")  # its base comes from the Hub, too
    merged = load_base(str(tmp_path / "merged")).net.state_dict()
    for name, weight in load_base("me/adapter").net.state_dict().items():
        torch.testing.assert_close(weight, merged[name], msg=name)


def test_no_local_path_is_uploaded(run, fluent_folder, tones_folder, tmp_path):
    write_public_run(run, tmp_path, "me/adapter", base="someone/fluent")
    assert {path.name for path in tmp_path.iterdir()} == UP
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        for folder in (run, fluent_folder, tones_folder, Path.home()):
            assert str(folder).encode() not in content, path.name
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["config"]["data"] == [tones_folder.name]
    assert about["config"]["backward"] == {"de.jsonl": "de.jsonl", "en.jsonl": "en.jsonl"}
    assert "options" not in about
    posterior, again = read_run(tmp_path)
    assert again.config.base == posterior.base == "someone/fluent"
    assert again.history == read_run(run)[1].history


def copy_of(run, folder, **config):
    """The same run with another configuration."""
    posterior = Posterior.load(run)
    posterior.save(folder)
    about = json.loads((run / "run.json").read_text())
    about["config"] |= config
    (folder / "run.json").write_text(json.dumps(about))
    return posterior


def test_the_report_goes_up_only_if_asked_for_with_texts_and_without_audio(hub, run, tmp_path):
    assert "data:audio" in (run / "report.html").read_text(encoding="utf-8")
    for name in ("run", "public"):
        (tmp_path / name).mkdir()
    folder, public = tmp_path / "run", tmp_path / "public"
    shutil.copytree(run, folder, dirs_exist_ok=True)
    push_run(folder, "me/adapter", base="someone/fluent", with_report=True)
    assert set(hub.files("me/adapter")) == {*UP, "report.html"}
    push_run(folder, "me/adapter", base="someone/fluent")
    assert set(hub.files("me/adapter")) == UP  # what was there is gone

    (folder / "utterances.jsonl").write_text(
        (run / "utterances.jsonl").read_text().replace('"new_domain"', '"domain /secret/one.csv"')
    )
    copy_of(run, folder, data={"a": "/secret/one.csv"})
    command = ["push-to-hub", str(folder), "me/adapter", "--base", "someone/fluent"]
    done = CliRunner().invoke(app, [*command, "--with-report", "--output", str(public / "out")])
    assert done.exit_code == 0, done.stderr
    page = (public / "out" / "report.html").read_text(encoding="utf-8")
    assert "das red" in page and "me/adapter" in page and "domain one.csv" in page
    assert "<audio" not in page
    for private in (str(tmp_path), str(run), "secret", str(Path.home())):
        assert private not in page


def test_paths_with_the_same_last_part_get_numbers(run, tmp_path):
    posterior = copy_of(
        run,
        tmp_path / "run",
        data={"a": "/secret/one/set.csv", "b": "other/secret/set.csv", "c": "owner/set:part"},
        backward={"German": "C:\\secret\\de.csv", "/secret/en.csv": "/secret/en.csv", "fr": "fr"},
        test="set.csv",
        prior="/secret/mine.py",
        prior_args={"table": "/secret/table.json"},
    )
    family = Family("/secret/mine.py", {"table": "/secret/table.json"}, "/secret/mine.py")
    replace(posterior, base="someone/fluent", family=family).save(tmp_path / "run")
    (tmp_path / "up").mkdir()
    write_public_run(tmp_path / "run", tmp_path / "up", "me/adapter", base="someone/fluent")
    config = json.loads((tmp_path / "up/run.json").read_text())["config"]
    assert config["test"] == "set.csv"
    assert sorted(config["data"].values()) == ["2-set.csv", "3-set.csv", "owner/set:part"]
    assert config["backward"] == {"German": "de.csv", "en.csv": "en.csv", "fr": "fr"}
    assert config["prior"] == "mine.py"
    there = Posterior.load(tmp_path / "up")
    assert there.family.files == ("mine.py",)
    assert there.family.prior_args == {"table": "table.json"}
    with safe_open(tmp_path / "up/posterior.safetensors", "pt") as file:
        assert "secret" not in json.dumps(file.metadata())
    assert "secret" not in (tmp_path / "up/README.md").read_text()


def test_results_of_another_adapter_are_not_published(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    posterior = Posterior.load(run)
    mean = {name: 2 * value for name, value in posterior.mean.items()}
    replace(posterior, mean=mean).save(tmp_path / "run")
    with pytest.raises(UserError, match="was not measured with the adapter beside it"):
        write_public_run(tmp_path / "run", tmp_path / "out", "me/adapter", base="someone/fluent")
    assert not (tmp_path / "out").exists()
    (tmp_path / "run" / "metrics.json").unlink()
    write_public_run(tmp_path / "run", tmp_path / "out", "me/adapter", base="someone/fluent")
    assert "Nothing: there was no evaluation" in (tmp_path / "out" / "README.md").read_text()


def test_a_card_tells_of_results_whose_adapter_is_not_known(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    del metrics["adapter"], metrics["sets"]
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    for folder, told in ((tmp_path / "run", True), (run, False)):
        write_public_run(folder, tmp_path / f"out-{told}", "me/adapter", base="someone/fluent")
        card = (tmp_path / f"out-{told}" / "README.md").read_text(encoding="utf-8")
        assert ("an older version of blora-pyro, which did not keep" in card) == told


def test_what_a_run_no_longer_has_is_gone_from_the_repository(hub, run, tmp_path):
    posterior = copy_of(run, tmp_path, base="pocket", data={"a": "de-en", "b": "es-en"})
    pooling = Pooling("none", ("a", "b"))
    twice = {name: value.repeat(2, 1, 1) for name, value in posterior.mean.items()}
    both = replace(
        posterior,
        base="pocket",
        groups=pooling.stack(posterior.groups),
        mean=twice,
        stddev={name: value.abs() + 1e-3 for name, value in twice.items()},
        state={},
        pooling=pooling,
    )
    for name in ADAPTER:
        (tmp_path / name).unlink()
    both.save(tmp_path)
    push_run(tmp_path, "me/both")
    parts = {f"domains/{domain}/{name}" for domain in "ab" for name in ADAPTER}
    assert set(hub.files("me/both")) == (UP - {*ADAPTER, "metrics.json"}) | parts
    there = Posterior.load("me/both").for_domain("b")
    assert same_tensors(there.mean, posterior.mean)
    push_run(run, "me/both", base="someone/fluent", commit_message="one for all")
    assert set(hub.files("me/both")) == UP
    repo = hub.repos["me/both"]
    assert repo.messages[repo.refs["main"]] == "one for all"


def test_a_branch_is_made_and_read_by_name(hub, run):
    push_run(run, "me/adapter", revision="next", base="someone/fluent")
    assert hub.files("me/adapter") == {}
    assert Posterior.load("me/adapter@next").base == "someone/fluent"
    card = ModelCard(hub.files("me/adapter", "next")["README.md"].decode())
    assert 'revision="next"' in card.text
    assert "--adapter me/adapter@next" in card.text
    with pytest.raises(UserError, match="without a posterior"):
        Posterior.load("me/adapter")


def test_a_pull_request_leaves_the_main_branch_alone(hub, run):
    url = push_run(run, "me/adapter", create_pr=True, base="someone/fluent")
    assert url == f"{constants.ENDPOINT}/me/adapter/discussions/1"
    assert hub.files("me/adapter") == {}
    assert set(hub.files("me/adapter", "refs/pr/1")) == UP


@pytest.mark.parametrize(
    ("repo_id", "options", "words"),
    [
        ("adapter", {}, "'adapter'; give OWNER/NAME"),
        ("me/a--b", {"base": "someone/fluent"}, "can't be a repository of the Hub.*OWNER/NAME"),
        ("me/adapter", {}, "a local folder.*give base, its id"),
        ("me/adapter", {"base": "fluent"}, "base is 'fluent'; give its id on the Hub"),
        ("other/theirs", {"base": "someone/fluent"}, r"no one write .*\(403\); log in"),
        ("me/adapter", {"revision": "a", "create_pr": True}, "create_pr and revision 'a'"),
    ],
)
def test_what_can_not_be_uploaded_is_refused_in_a_line(hub, run, repo_id, options, words):
    with pytest.raises(UserError, match=words) as caught:
        push_run(run, repo_id, **options)
    assert "\n" not in str(caught.value)
    assert not hub.repos


def test_only_a_folder_is_uploaded(hub, tmp_path):
    with pytest.raises(UserError, match="me/adapter is no folder here; give a run folder"):
        write_public_run("me/adapter", tmp_path, "me/again")
    assert hub.requests == []


def test_a_hub_out_of_reach_is_refused_in_a_line(hub, run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push_run(run, "me/adapter", base="someone/fluent")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # no one listens
    with pytest.raises(UserError, match=r"can't be uploaded \(Connect.*--output"):
        push_run(run, "me/adapter", base="someone/fluent")


def test_the_command_pushes_or_writes_a_folder(hub, run, tmp_path):
    out = tmp_path / "out"
    command = ["push-to-hub", str(run), "me/adapter", "--base", "someone/fluent"]
    done = CliRunner().invoke(app, [*command, "--output", str(out), "--license", "apache-2.0"])
    assert (done.exit_code, done.stdout) == (0, f"not uploaded, but written to: {out}\n")
    assert {path.name for path in out.iterdir()} == UP
    assert ModelCard.load(out / "README.md").data.license == "apache-2.0"
    assert hub.requests == []
    done = CliRunner().invoke(app, [*command, "--output", str(run), "--overwrite"])
    assert (done.exit_code, "the run's own folder" in done.stderr) == (2, True)
    done = CliRunner().invoke(app, [*command, "--private"])
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith(f"pushed: {constants.ENDPOINT}/me/adapter/commit/")
    assert hub.repos["me/adapter"].private
