import json
import os
import shutil
from datetime import datetime
from pathlib import Path

import pytest

from blora_pyro import files
from blora_pyro.errors import UserError
from blora_pyro.files import locked
from blora_pyro.runs import listing
from blora_pyro.runs.listing import list_runs, run_tables
from blora_pyro.tables import report_text


@pytest.fixture
def runs(tmp_path, old_runs) -> Path:
    """Copies of runs: `study/a` is finished and the newest, `b` was killed in its fit."""
    for place, (name, where) in enumerate([("unfinished", "b"), ("normal", "study/a")]):
        folder = tmp_path / where
        folder.mkdir(parents=True)
        for file in ("run.json", "metrics.json"):
            if (old_runs / name / file).exists():
                shutil.copy(old_runs / name / file, folder)
        os.utime(folder / "run.json", (1e9 + place, 1e9 + place))
    return tmp_path


def changed(folder: Path, file: str, **changes) -> None:
    """Write keys anew in a JSON file, without those that are None."""
    content = json.loads((folder / file).read_text(encoding="utf-8")) | changes
    kept = {name: one for name, one in content.items() if one is not None}
    (folder / file).write_text(json.dumps(kept), encoding="utf-8")


def test_the_newest_run_comes_first_with_what_it_was_and_found(runs, old_runs):
    first, second = list_runs(runs)
    metrics = json.loads((old_runs / "normal" / "metrics.json").read_text(encoding="utf-8"))
    both = metrics["new_domain"]
    assert (first.folder, first.state) == (str(runs / "study" / "a"), "finished")
    assert first.options == {"base": "pocket", "data": ["de-en"], "prior": "normal", "beta": 1e-4}
    rates = {"before": both["base"]["wer"]["rate"], "after": both["adapted"]["wer"]["rate"]}
    assert first.new_domain == {"de-en": {"measure": "wer", **rates}}
    change = metrics["backward_error"]["change"]
    assert first.forgetting == {name: change[name] for name in ("difference", "interval")}
    assert (second.state, second.new_domain, second.forgetting) == ("interrupted", {}, None)
    assert first.when > second.when and first.when.tzinfo is not None
    json.dumps([one.to_json() for one in (first, second)], allow_nan=False)


def test_a_table_has_a_row_for_each_and_paths_to_give_to_other_commands(runs):
    text = report_text(run_tables(runs, list_runs(runs)))
    rows = [line.split() for line in text.splitlines() if "de-en" in line]
    assert [row[0] for row in rows] == ["study/a", "b"]
    assert "WER 44.7 → 44.4" in text and "interrupted" in text and "normal, 0.0001" in text
    assert report_text(run_tables(runs, [])).startswith("no run folder (one with a run.json) is in")


def test_a_fit_that_another_process_writes_is_running(runs, monkeypatch):
    with locked(runs / "b"):
        assert {one.state for one in list_runs(runs)} == {"finished", "running"}
    monkeypatch.setattr(files, "fcntl", None)
    assert list_runs(runs)[1].state == "unfinished"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "Expecting property name"),
        ("[1]", "no JSON object"),
        ("{}", "no options of a fit"),
        ('{"config": 3}', "'config' is no object"),
        ('{"state": 3, "config": %s}', "'state' is 3"),
        ('{"options": {"base": "pocket", "data": "de", "prior": "normal", "beta": 1}}', "data de"),
        ('{"config": {"base": "p", "data": [], "prior": "normal", "beta": NaN}}', "the beta nan"),
    ],
)
def test_a_broken_run_is_listed_with_the_reason(runs, content, words):
    options = '{"base": "pocket", "data": ["de-en"], "prior": "normal", "beta": 1}'
    file = runs / "b" / "run.json"
    file.write_text(content.replace("%s", options), encoding="utf-8")
    broken = next(one for one in list_runs(runs) if one.folder.endswith("b"))
    assert broken.state == "broken" and words in broken.problem
    lines = report_text(run_tables(runs, list_runs(runs))).splitlines()
    assert any(line.startswith(f"{runs / 'b'}: run.json: ") for line in lines)


def test_metrics_that_are_missing_broken_or_without_the_sets_are_said(runs):
    folder = runs / "study" / "a"
    changed(folder, "metrics.json", new_domain=None, backward={}, backward_error=None)
    assert "not measured" in report_text(run_tables(runs, list_runs(runs)))
    changed(folder, "metrics.json", backward=3)
    run = list_runs(runs)[0]
    assert run.state == "finished" and run.problem.startswith("metrics.json: 'backward' is 3")
    assert "metrics broken" in report_text(run_tables(runs, [run]))
    (folder / "metrics.json").unlink()
    run = list_runs(runs)[0]
    assert (run.problem, run.new_domain) == ("", {})


def test_a_pruned_run_has_no_forgetting_against_the_base(runs, old_runs):
    folder = runs / "study" / "a"
    size = json.loads((old_runs / "pruned" / "metrics.json").read_text(encoding="utf-8"))["size"]
    changed(folder, "metrics.json", size=size)
    changed(folder, "run.json", pruned={"from": "x"})
    run = list_runs(runs)[0]
    assert (run.made, run.before, run.forgetting) == ("pruned", "full adapter", None)
    text = report_text(run_tables(runs, [run]))
    assert "WER full 44.7 → pruned" in text and "normal, 0.0001, pruned" in text


def test_every_domain_with_an_adapter_of_its_own_is_told(runs):
    folder = runs / "study" / "a"
    both = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["new_domain"]
    changed(folder, "metrics.json", new_domain=None, domains={"spoken": both, "read": both})
    run = list_runs(runs)[0]
    assert [*run.new_domain] == ["spoken", "read"]
    text = " ".join(report_text(run_tables(runs, [run])).split())
    assert "spoken:" in text and "read:" in text


def test_links_are_followed_once_and_hidden_folders_are_not_searched(runs):
    (runs / "link").symlink_to(runs / "study", target_is_directory=True)
    (runs / "circle").symlink_to(runs, target_is_directory=True)
    shutil.copytree(runs / "b", runs / ".b.new")
    assert len(list_runs(runs)) == 2
    (runs / "gone").mkdir()
    (runs / "gone" / "run.json").symlink_to(runs / "nowhere")
    assert len(list_runs(runs)) == 2


def test_a_run_can_be_listed_by_its_own_folder_and_what_is_none_is_refused(runs):
    (run,) = list_runs(runs / "b")
    assert [
        line.split()[0] for line in report_text(run_tables(runs / "b", [run])).splitlines()[4:5]
    ]
    with pytest.raises(UserError, match=r"gone' is no folder; give one with run folders in it"):
        list_runs(runs / "gone")


def test_a_folder_that_cannot_be_read_is_refused_in_one_line(runs, monkeypatch):
    scan = os.scandir

    def scandir(path):
        if Path(path) == unreadable:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    unreadable = runs / "study"
    assert [one.state for one in list_runs(runs)] == ["interrupted"]
    unreadable = runs
    with pytest.raises(UserError, match=r"can't be read \(Permission denied\)"):
        list_runs(runs)


def test_a_time_that_no_calendar_has_does_not_end_the_list(runs, monkeypatch):
    class Late(datetime):
        @classmethod
        def fromtimestamp(cls, *_):
            raise ValueError("year 11476 is out of range")

    monkeypatch.setattr(listing, "datetime", Late)
    found = list_runs(runs)
    assert len(found) == 2
    assert {(one.state, one.problem) for one in found} == {
        ("broken", "run.json: year 11476 is out of range")
    }
