import json
import os
import shutil
import sys

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import WhisperForConditionalGeneration
from typer.testing import CliRunner

from blora_pyro.cli import app
from blora_pyro.errors import UserError
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.publishing.uploads import write_public_run
from blora_pyro.runs.diagnosis import diagnose
from blora_pyro.runs.edited import combine_runs, prune_run
from blora_pyro.runs.finished import evaluate_run, merge_run, transcribe
from blora_pyro.runs.fits import fit
from blora_pyro.runs.folders import read_run, written_folder
from blora_pyro.runs.measurements import read_metrics


@pytest.fixture(scope="module")
def folders(finished_run, fit_options, tones_folder, tmp_path_factory):
    """Two runs, of a code-switched and of a German domain."""
    folder = tmp_path_factory.mktemp("runs") / "german"
    options = {"data": str(tones_folder / "de.jsonl"), "backward": (), "rank": 2, "steps": 5}
    fit(FitConfig(**{**fit_options, **options}), folder, evaluate=False)
    return finished_run.output, folder


@pytest.mark.parametrize("method", ["mean", "weighted", "product"])
def test_the_folder_is_an_adapter_for_peft_and_every_command(
    folders, tones_folder, tmp_path, method
):
    weights = (0.9, 0.1) if method == "weighted" else None
    out = tmp_path / "out"
    found = combine_runs(folders, out, method=method, weights=weights)
    assert found["rank"] == (4 if method == "product" else 6)
    assert (found["kept_norm"] == 1) == (method != "product")
    posterior, record = read_run(out)
    assert record.combined == json.loads(json.dumps(found))
    assert found["from"] == [str(folder) for folder in folders]

    base = str(record.resolved.base)
    net = WhisperForConditionalGeneration.from_pretrained(base)
    weight = net.get_parameter("model.decoder.layers.0.fc1.weight").clone()
    name = "model.decoder.layers.0.fc1"
    merged = PeftModel.from_pretrained(net, str(out)).merge_and_unload().get_parameter
    ours = dict(posterior.delta_weights())[name]
    torch.testing.assert_close(merged(f"{name}.weight") - weight, ours, rtol=1e-3, atol=1e-5)

    merge_run(out, tmp_path / "merged")
    audio = [tones_folder / "train4.wav"]
    samples = 0 if method == "product" else 2  # of a point all draws are alike
    (said,) = transcribe(audio, out, language="de-en", samples=samples)
    (again,) = transcribe(audio, base=str(tmp_path / "merged"), language="de-en")
    assert said.text == again.text


def test_results_of_what_was_there_go_with_it(folders, finished_run, tmp_path):
    for number, make in enumerate(
        (
            lambda out: combine_runs(folders, out, overwrite=True),
            lambda out: prune_run(folders[0], out, rank=1, evaluate=False, overwrite=True),
        )
    ):
        out = tmp_path / str(number)
        shutil.copytree(finished_run.output, out)
        (out / "notes.txt").touch()
        make(out)
        names = {path.name for path in out.iterdir()}
        assert "utterances.jsonl" not in names and "notes.txt" in names
        if (out / "metrics.json").exists():
            assert read_metrics(out, *read_run(out)[::-1]).keys() == {"size", "adapter"}
        assert (out / "metrics.json").exists() == bool(number)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_edit_that_fails_leaves_what_was_there(folders, finished_run, tmp_path, monkeypatch):
    shutil.copytree(finished_run.output, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    def full(self, folder):
        (folder / "posterior.safetensors").touch()
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(Posterior, "save", full)
    for out in ("run", "none"):
        for make in (
            lambda out: combine_runs(folders, out, overwrite=True),
            lambda out: prune_run(folders[0], out, rank=1, evaluate=False, overwrite=True),
        ):
            with pytest.raises(UserError, match=r"can't be written \(No space left on device\)"):
                make(tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("command", ["prune", "combine", "merge", "push"])
def test_a_command_that_is_killed_leaves_what_was_there_or_what_it_makes(
    folders, tmp_path, command
):
    def work(out):
        if command == "prune":
            prune_run(folders[0], out, rank=1, evaluate=False, overwrite=True)
        elif command == "combine":
            combine_runs(folders, out, overwrite=True)
        elif command == "merge":
            merge_run(folders[0], out, overwrite=True)
        else:
            with written_folder(out, True, folders[0]) as folder:
                write_public_run(folders[0], folder, "me/run", base="someone/fluent")

    def content(out):
        return {path.name for path in out.iterdir()}

    out, renames = tmp_path / "out", ("os.rename", "ctypes.call_function", "shutil.rmtree")
    shutil.copytree(folders[1], out)
    old, seen = content(out), []
    for event in range(9):
        if (child := os.fork()) == 0:
            left = [event]

            def hook(name, arguments, left=left):
                place = str(arguments[0]) if arguments else ""
                if name in renames or (name == "open" and ".out." in place):
                    left[0] -= 1
                    if left[0] < 0:
                        os._exit(9)

            sys.addaudithook(hook)
            work(out)
            os._exit(0)
        os.waitpid(child, 0)
        seen.append(content(out))
    work(out)
    assert all(one in (old, content(out)) for one in seen) and old in seen
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_is_not_pruned_into_itself(finished_run):
    before = {path.name: path.read_bytes() for path in finished_run.output.iterdir()}
    with pytest.raises(UserError, match="is the run's own folder"):
        prune_run(finished_run.output, finished_run.output, rank=1, evaluate=False, overwrite=True)
    assert {path.name: path.read_bytes() for path in finished_run.output.iterdir()} == before


def test_nothing_is_made_over_the_base_of_a_run(finished_run, tmp_path):
    shutil.copytree(read_run(finished_run.output)[1].resolved.base, tmp_path / "base")
    shutil.copytree(finished_run.output, tmp_path / "run")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    about["config"]["base"] = str(tmp_path / "base")
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    runs, out = [tmp_path / "run", finished_run.output], tmp_path / "base"
    with pytest.raises(UserError, match="or its base's"):
        prune_run(runs[0], out, rank=1, evaluate=False, overwrite=True)
    with pytest.raises(UserError, match="or its base's"):
        combine_runs(runs, out, overwrite=True)
    push = ["push-to-hub", str(runs[0]), "me/run", "--output", str(out), "--overwrite"]
    assert "or its base's" in CliRunner().invoke(app, push).stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_adapter_that_could_not_be_read_is_not_made(folders, tmp_path):
    with pytest.raises(UserError, match=r"beyond|not finite"):
        combine_runs(folders, tmp_path / "out", method="weighted", weights=(1e308, 1e308))
    assert not (tmp_path / "out").exists()


def test_the_languages_of_the_runs_stay_only_if_they_are_one(folders, tmp_path):
    combine_runs(folders, tmp_path / "two")
    assert read_run(tmp_path / "two")[1].language is None
    combine_runs([folders[0], folders[0]], tmp_path / "one")
    assert read_run(tmp_path / "one")[1].language == "de-en"


def test_the_mean_of_a_run_and_itself_is_scored_and_pruned_as_that_run(
    finished_run, folders, tmp_path
):
    combine_runs([folders[0], folders[0]], tmp_path / "same", rank=4)
    found = evaluate_run(tmp_path / "same")
    assert found["new_domain"] == finished_run.metrics["new_domain"]
    assert found["backward_error"] == finished_run.metrics["backward_error"]
    prune_run(tmp_path / "same", tmp_path / "small", rank=1, evaluate=False)
    with pytest.raises(UserError, match=r"has no prior; diagnose .*finished or .*finished"):
        diagnose(tmp_path / "same")
    with pytest.raises(UserError, match="a combined run; give"):
        fit(FitConfig(prior_from=tmp_path / "same"))
    with pytest.raises(UserError, match=r"made of several runs, .* has no prior"):
        Posterior.load(tmp_path / "same").to_arviz(draws=2)


def test_what_has_no_place_in_a_product_is_refused(folders, fit_options, tmp_path):
    prune_run(folders[0], tmp_path / "small", rank=1, evaluate=False)
    fit(
        FitConfig(**{**fit_options, "steps": 1, "guide": "point"}),
        tmp_path / "point",
        evaluate=False,
    )
    code = tmp_path / "mine.py"
    code.write_text("from blora_pyro.guides.normal import Guide, Prior\n")
    fit(
        FitConfig(**{**fit_options, "steps": 1, "prior": str(code)}),
        tmp_path / "own",
        evaluate=False,
    )
    for name, words in {
        "small": "a pruned run, without the prior that product needs; give method mean",
        "point": "a point estimate, without the spread that product needs; give method mean",
        "own": "is code, which is not run here; give method mean",
    }.items():
        with pytest.raises(UserError, match=words):
            combine_runs([folders[0], tmp_path / name], tmp_path / "out", method="product")
        combine_runs([folders[0], tmp_path / name], tmp_path / f"{name}-mean")


def test_combining_writes_over_nothing_unless_asked(folders, tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(UserError, match="not empty"):
        combine_runs(folders, tmp_path)
    combine_runs(folders, tmp_path, overwrite=True)
    with pytest.raises(UserError, match="is one of the runs"):
        combine_runs(folders, folders[1], overwrite=True)
    with pytest.raises(UserError, match="nowhere is no run folder"):
        combine_runs([folders[0], "nowhere"], tmp_path / "out")


def test_the_whole_rank_costs_nothing(finished_run, tmp_path):
    metrics = prune_run(finished_run.output, tmp_path / "pruned", rank=4)
    assert metrics["size"]["full"] == metrics["size"]["pruned"]
    for one in (metrics["new_domain"], metrics["backward_error"]):
        change = one["change"] if "difference" in one["change"] else one["change"]["wer"]
        assert change["difference"] == 0


def test_a_pruned_run_is_smaller_and_scored_against_the_full_one(finished_run, tmp_path):
    out = tmp_path / "pruned"
    metrics = prune_run(finished_run.output, out, rank=1)
    size = metrics["size"]
    assert size["pruned"]["adapter_weights"] * 4 == size["full"]["adapter_weights"]
    assert size["pruned"]["directions"] == size["pruned"]["layers"]
    assert json.loads((out / "metrics.json").read_text(encoding="utf-8")) == metrics
    full = finished_run.metrics["new_domain"]["adapted"]
    assert metrics["new_domain"]["base"] == full
    about = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert about["pruned"]["from"] == str(finished_run.output)
    assert about["pruned"]["rank"] == 1
    whisper = WhisperForConditionalGeneration.from_pretrained(about["config"]["base"])
    PeftModel.from_pretrained(whisper, str(out))


def test_a_sparse_run_tells_how_many_weights_are_not_zero(finished_run, tmp_path):
    out = tmp_path / "sparse"
    size = prune_run(finished_run.output, out, sparsity=0.75, evaluate=False)["size"]
    count = size["full"]["adapter_weights"]
    assert size["pruned"]["adapter_weights"] == count
    assert size["pruned"]["nonzero_weights"] == count - round(0.75 * count)
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["pruned"]["sparsity"] == 0.75
    means = Posterior.load(out).mean.values()
    assert sum(int(mean.count_nonzero()) for mean in means) == size["pruned"]["nonzero_weights"]


def test_pruning_writes_over_nothing_unless_asked(finished_run, tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(UserError, match="not empty"):
        prune_run(finished_run.output, tmp_path, rank=1, evaluate=False)
    prune_run(finished_run.output, tmp_path, rank=1, evaluate=False, overwrite=True)
    assert (tmp_path / "adapter_model.safetensors").is_file()
