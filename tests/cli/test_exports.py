import json
import shutil

import pytest

from .conftest import complaint, parsed, run, well


def test_merge_writes_a_base_that_says_what_the_run_says(finished_run, tones_folder, tmp_path):
    assert str(tmp_path / "out") in well("merge", finished_run.output, tmp_path / "out")
    audio = tones_folder / "test4.wav"
    out = well("transcribe", audio, "--base", tmp_path / "out", "--language", "de-en")
    assert out == "das red\n"
    assert "not empty" in complaint(run("merge", finished_run.output, tmp_path / "out"))
    well("merge", finished_run.output, tmp_path / "out", "--overwrite", "--dtype", "float16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"


def test_keep_shows_the_curve_and_writes_the_adapter_at_its_strength(
    finished_run, tones_folder, tmp_path
):
    for name, source in {"new": "test", "de": "de"}.items():
        (tmp_path / name).mkdir()
        for split in ("dev", "test"):
            shutil.copy(tones_folder / f"{source}.jsonl", tmp_path / name / f"{split}.jsonl")
        for wav in tones_folder.glob(f"{source}*.wav"):
            shutil.copy(wav, tmp_path / name)
    sets = ["--data", tmp_path / "new", "--backward", f"de={tmp_path / 'de'}"]
    command = ["keep", finished_run.output, *sets, "--keep", "average=60", "--keep", "de=100"]
    out = well(*command, "--output", tmp_path / "out")
    for words in (
        "error in % [95% interval] on the dev sets, by scale",
        "contract: average at most +60, de at most +100 points; strength",
        "contract on test: kept",
        f"adapter: {tmp_path / 'out'}",
    ):
        assert words in out
    assert "contract on test: kept" in well("evaluate", tmp_path / "out")
    assert "contract" not in well("evaluate", tmp_path / "out", "--strength", 1)
    message = complaint(run("keep", finished_run.output, *sets))
    assert "keep is not given; give the points that may be lost, as --keep 1" in message
    message = complaint(run("keep", finished_run.output, "--keep", 1))
    assert "keep needs the dev and the test split of a backward set" in message


def test_prune_prints_what_is_left_and_what_it_costs(finished_run, tmp_path):
    out = well("prune", finished_run.output, tmp_path / "small", "--rank", 1)
    for words in ("full", "pruned", "new domain", "backward average", "75.0% pruned", "run folder"):
        assert words in out
    found = parsed(well("prune", finished_run.output, tmp_path / "json", "--snr", 20, "--json"))
    assert found["size"]["pruned"]["directions"] < found["size"]["full"]["directions"]


def test_prune_without_evaluation_tells_the_size_alone(finished_run, tmp_path):
    out = well("prune", finished_run.output, tmp_path / "small", "--rank", 2, "--no-evaluate")
    assert "50.0% pruned" in out and "error" not in out
    sparse = ("prune", finished_run.output, tmp_path / "sparse", "--sparsity", 0.75)
    assert "75.0% pruned" in well(*sparse, "--no-evaluate")


def test_prune_asks_for_one_bar(finished_run, tmp_path):
    assert "one of rank, snr and sparsity" in complaint(
        run("prune", finished_run.output, tmp_path / "small")
    )


def test_a_pruned_run_is_evaluated_but_not_diagnosed(finished_run, tmp_path):
    well("prune", finished_run.output, tmp_path / "small", "--rank", 1, "--no-evaluate")
    assert "new domain" in well("evaluate", tmp_path / "small")
    message = complaint(run("diagnose", tmp_path / "small"))
    assert f"diagnose {finished_run.output}" in message


def test_combine_says_what_is_kept_and_writes_a_run(finished_run, tones_folder, tmp_path):
    two = [finished_run.output, finished_run.output]
    out = well("combine", *two, "--output", tmp_path / "both", "--rank", 4)
    assert "mean of 2 runs at rank 4" in out and "100.00% of the Frobenius norm" in out
    assert out.splitlines()[-1] == f"run folder: {tmp_path / 'both'}"
    weighted = ["--method", "weighted", "--weights", "0.5,0.5", "--output", tmp_path / "json"]
    found = parsed(well("combine", *two, *weighted, "--json"))
    assert (found["method"], found["weights"], found["rank"]) == ("weighted", [0.5, 0.5], 8)
    audio = tones_folder / "train4.wav"
    said = well("transcribe", audio, "--adapter", finished_run.output)
    assert well("transcribe", audio, "--adapter", tmp_path / "both") == said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--weights", "a,b", "--method", "weighted"), "weights is 'a,b'; give numbers"),
        (("--method", "sum"), "method is 'sum'; give one of product, mean, weighted"),
        (("--rank", 99), "rank is 99; give a number from 1 to 16"),
    ],
)
def test_combine_refuses_in_one_line(finished_run, tmp_path, options, words):
    two = [finished_run.output, finished_run.output]
    assert words in complaint(run("combine", *two, "--output", tmp_path / "out", *options))
    one = run("combine", finished_run.output, "--output", tmp_path / "out")
    assert "1 run is given; give two or more" in complaint(one)
    assert not (tmp_path / "out").exists()
