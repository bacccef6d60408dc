import errno
import json
import resource
import shutil

import pytest
import torch

from blora_pyro.errors import UserError
from blora_pyro.runs.finished import evaluate_run, merge_run, transcribe
from blora_pyro.runs.folders import (
    CHECKPOINT,
    SKIPPED,
    TRACKING,
    claim,
    claim_file,
    default_output,
    read_run,
    remove_files,
    writing,
    written_folder,
)
from blora_pyro.runs.record import RunRecord


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_an_empty_folder_is_claimed_and_one_with_content_only_to_be_overwritten(tmp_path):
    assert claim(tmp_path / "a" / "b", overwrite=False).is_dir()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match=r"is not empty; give another, or --overwrite"):
        claim(tmp_path, overwrite=False)
    claim(tmp_path, overwrite=True)
    assert (tmp_path / "mine.txt").exists()


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="can't be written"):
            claim(path, overwrite=True)


def test_a_fit_without_a_checkpoint_makes_room_and_one_with_a_checkpoint_does_not(tmp_path):
    RunRecord().write(tmp_path)
    (tmp_path / TRACKING).mkdir()
    (tmp_path / SKIPPED).touch()
    claim(tmp_path, overwrite=False)
    assert not list(tmp_path.iterdir())
    RunRecord().write(tmp_path)
    (tmp_path / CHECKPOINT).touch()
    with pytest.raises(UserError, match="holds an unfinished fit; --resume to go on with it"):
        claim(tmp_path, overwrite=False)
    assert (tmp_path / CHECKPOINT).exists()


def test_a_fit_that_was_killed_at_its_very_first_write_is_in_nobodys_way(tmp_path):
    (tmp_path / "run.json.new").write_text('{"sta')
    claim(tmp_path, overwrite=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "run.json.new").touch()
    (tmp_path / "mine.new").touch()
    with pytest.raises(UserError, match="is not empty"):
        claim(tmp_path, overwrite=False)


# ---- folders that are written as a whole


def test_a_folder_is_written_whole_over_another_run_and_keeps_what_is_the_users(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    stale = ("metrics.json", "utterances-dev.jsonl", "strength.png", "model-00001-of-00002.x")
    for name in (*stale, "notes.txt"):
        (out / name).touch()
    with pytest.raises(UserError, match="is not empty"), written_folder(out, False):
        raise AssertionError
    with written_folder(out, True) as folder:
        (folder / "run.json").write_text("{}")
        assert (out / "metrics.json").exists()
    assert {path.name for path in out.iterdir()} == {"run.json", "notes.txt", stale[-1]}


@pytest.mark.parametrize("name", ["run", ".", "run/../run", "link"])
def test_what_a_command_reads_is_not_written_over(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()
    (tmp_path / "link").symlink_to("run")
    with pytest.raises(UserError, match="the run's own folder, or its base's, or holds them"):
        with written_folder(tmp_path / name, True, "owner/name", tmp_path / "run"):
            raise AssertionError
    assert [*(tmp_path / "run").iterdir()] == [tmp_path / "run" / "run.json"]
    with written_folder(tmp_path / "run" / "below", True, tmp_path / "run"):
        pass


def full_disk(folder):
    raise OSError(errno.ENOSPC, "No space left on device", str(folder / "file"))


def large_file(folder):
    (folder / "file").write_bytes(bytes(100_000))


@pytest.mark.parametrize("write", [full_disk, large_file])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, write):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for out in (tmp_path / "none", tmp_path / "run"):
        with pytest.raises(UserError, match=r"can't be written \(.*\); free some space, or give"):
            try:
                with written_folder(out, True) as folder:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
                    write(folder)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert not (tmp_path / "none").exists()
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "run.json").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "run.json"]


def test_errors_of_other_files_are_not_those_of_the_output(tmp_path):
    with pytest.raises(FileNotFoundError), written_folder(tmp_path / "out", False):
        (tmp_path / "data").read_text()


def test_a_folder_that_is_being_written_is_refused_by_every_command(tmp_path):
    out = tmp_path / "out"
    with writing(out):
        for other in (writing(out), written_folder(out, True)):
            with pytest.raises(UserError, match="another process"), other:
                raise AssertionError
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written"), writing(tmp_path / "file" / "out"):
        raise AssertionError


def test_a_file_is_claimed_where_there_is_none_or_to_be_overwritten(tmp_path):
    claim_file(tmp_path / "u.jsonl", overwrite=False)
    (tmp_path / "u.jsonl").touch()
    with pytest.raises(UserError, match="is there already; give another, or --overwrite"):
        claim_file(tmp_path / "u.jsonl", overwrite=False)
    claim_file(tmp_path / "u.jsonl", overwrite=True)
    for path in (tmp_path, tmp_path / "nowhere" / "u.jsonl"):
        with pytest.raises(UserError, match="can't be written; give a file in a folder"):
            claim_file(path, overwrite=True)


def test_files_are_removed_with_what_a_killed_process_left_of_them(tmp_path):
    for name in ("a", "a.new", "b", "mine"):
        (tmp_path / name).touch()
    for name in ("posterior.new", "folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_files(tmp_path, "a", "b", "folder", "not there")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_outputs_of_a_run_stand_in_its_folder_unless_it_is_on_the_hub(tmp_path):
    assert default_output(tmp_path, "strength.png", "plot") == tmp_path / "strength.png"
    with pytest.raises(UserError, match=r"is on the Hub and has no folder for x; give plot"):
        default_output("owner/name", "x", "plot")


def test_an_unfinished_fit_is_not_read(tmp_path):
    RunRecord().write(tmp_path)
    with pytest.raises(UserError, match=r"is not finished; go on with: blora-pyro fit --resume"):
        read_run(tmp_path)


def test_the_posterior_of_a_run_can_be_read_again(finished_run):
    posterior, record = read_run(finished_run.output)
    for name, mean in finished_run.posterior.mean.items():
        assert torch.equal(posterior.mean[name], mean)
        assert torch.equal(posterior.stddev[name], finished_run.posterior.stddev[name])
    assert record.resolved.backward_sets == finished_run.config.backward


@pytest.mark.parametrize("content", ["", "{}", '{"config": {"rank": 0}}', "\xff"])
def test_a_damaged_run_json_is_refused(finished_run, tmp_path, content):
    shutil.copytree(finished_run.output, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(content, encoding="latin-1")
    for use in (evaluate_run, read_run, lambda folder: transcribe([], folder)):
        with pytest.raises(UserError) as caught:
            use(tmp_path / "run")
        assert "\n" not in str(caught.value)


def test_a_run_json_without_a_language_is_refused(finished_run, tones_folder, tmp_path):
    shutil.copytree(finished_run.output, tmp_path / "run")
    about = read_json(tmp_path / "run" / "run.json")
    del about["language"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"run\.json"):
        transcribe([tones_folder / "en0.wav"], tmp_path / "run")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for use in (evaluate_run, lambda folder: merge_run(folder, tmp_path / "out")):
        with pytest.raises(UserError, match="no run folder"):
            use(tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()
