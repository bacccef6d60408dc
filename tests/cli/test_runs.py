import json
import shutil
from pathlib import Path

import pytest

from blora_pyro.errors import UserError
from blora_pyro.families import FAMILIES
from blora_pyro.runs import diagnosis, finished

from .conftest import complaint, parsed, run, well


def test_priors_are_listed():
    out = well("priors")
    for words in ("horseshoe", "global_scale", "0.01", "--prior-arg"):
        assert words in out


def test_a_family_is_checked_and_a_wrong_one_fails_with_code_1(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import pyro.distributions as dist\n"
        "from blora_pyro.guides.normal import Guide\n"
        "class Prior:\n"
        "    def __call__(self, site):\n"
        "        return dist.Normal(0.0, 0.05).expand(site.shape)\n",
        encoding="utf-8",
    )
    result = run("priors", "--check", str(path), "--json")
    assert result.exit_code == 1
    (found,) = json.loads(result.stdout)["checks"]
    assert not found["passed"] and ".to_event(2)" in found["message"]


def test_priors_predict_how_far_draws_move_the_base(fit_options):
    options = ["--base", fit_options["base"], "--data", fit_options["data"], "--rank", 2]
    command = ["priors", "--predict", *options, "--prior-arg", "scale=0.2", "--draws", 2]
    assert "2 draws of prior normal (scale 0.2), rank 2" in well(*command)
    assert len(parsed(well(*command, "--json"))["draws"]) == 2
    assert "--rank is given without --predict" in complaint(run("priors", "--rank", 2))
    assert "check and predict are both" in complaint(run(*command, "--check", "normal"))
    assert "prior is 'norml'; give" in complaint(run("priors", "--predict", "--prior", "norml"))


def test_priors_with_json():
    families = parsed(well("priors", "--json"))
    assert [family["name"] for family in families] == list(FAMILIES)
    (student,) = [family for family in families if family["name"] == "student-t"]
    assert [one["name"] for one in student["arguments"]] == ["scale", "df"]
    assert all(one["description"] for family in families for one in family["arguments"])
    assert all(family["summary"] for family in families)


def test_report_writes_a_page_and_says_where(finished_run, tmp_path):
    file = tmp_path / "page.html"
    out = well("report", finished_run.output, "--output", file, "--top", 2, "--samples", 2)
    assert out == f"report: {file}\n"
    page = file.read_text(encoding="utf-8")
    assert "The 2 of 6 utterances" in page and "of 2 draws" in page
    line = complaint(run("report", finished_run.output, "--output", file))
    assert "is there already; give another, or --overwrite" in line
    assert "top is 0" in complaint(run("report", finished_run.output, "--top", 0))
    both = [finished_run.output, finished_run.output]
    assert well("report", *both, "--output", file, "--overwrite") == f"report: {file}\n"
    assert "2 runs beside each other" in file.read_text(encoding="utf-8")


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(diagnosis, "all_plots", lambda *args: {})


@pytest.mark.usefixtures("no_plots")
def test_diagnose_prints_tables_and_words(finished_run, tmp_path):
    out = well("diagnose", finished_run.output, "--output", tmp_path, "--khat", "--draws", 30)
    for words in ("KL(q || p)", "cross out", "How this prior shrinks.", "30 draws, 2 of 2", "elpd"):
        assert words in out


@pytest.mark.usefixtures("no_plots")
def test_diagnose_with_json_prints_json_alone(finished_run, tmp_path):
    result = run("diagnose", finished_run.output, "--output", tmp_path, "--json")
    content = parsed(result.stdout)
    assert content["summary"]["prior"] == "normal"
    assert len(content["kinds"]) == 16
    assert content["khat"] == {**content["khat"], "value": None, "utterances": 0}
    assert "--khat computes it" in content["khat"]["meaning"]
    assert "figures ..." in result.stderr


def test_diagnose_hands_every_option_on(monkeypatch, tmp_path):
    seen = {}

    def diagnose(*args, **options):
        seen.update(options, args=args)
        raise UserError("enough")

    monkeypatch.setattr(diagnosis, "diagnose", diagnose)
    options = ["--output", tmp_path, "--prior", "p.py", "--khat", "--draws", 50]
    assert "enough" in complaint(run("diagnose", "r", *options, "--device", "cuda:1"))
    del seen["on_stage"], seen["on_figures"]
    assert seen == {
        "args": (Path("r"), tmp_path),
        "prior": "p.py",
        "khat": True,
        "draws": 50,
        "device": "cuda:1",
    }


def test_diagnose_refuses_in_one_line(finished_run, tmp_path):
    assert "gone" in complaint(run("diagnose", tmp_path / "gone"))
    draws = run("diagnose", finished_run.output, "--draws", 3)
    assert "draws is 3" in complaint(draws)
    prior = run("diagnose", finished_run.output, "--prior", tmp_path / "p.py")
    assert "leave --prior out" in complaint(prior)


def test_runs_are_listed(finished_run, tmp_path):
    parent = finished_run.output.parent
    out = well("runs", parent)
    assert "runs in" in out and "finished" in out and "WER" in out
    (listed,) = [
        one for one in parsed(well("runs", parent, "--json")) if "finished" in one["folder"]
    ]
    assert listed["folder"] == str(finished_run.output)
    assert listed["options"]["prior"] == "normal"
    assert "no run folder" in well("runs", tmp_path)
    assert well("runs", tmp_path, "--json") == "[]\n"
    assert "is no folder" in complaint(run("runs", tmp_path / "gone"))


def test_a_run_is_shown_alone_or_beside_another(finished_run):
    out = well("show", finished_run.output)
    assert "backward average" in out and "--beta" in out
    content = parsed(well("show", finished_run.output, "--json"))
    assert content["metrics"] == finished_run.metrics
    out = well("show", finished_run.output, finished_run.output)
    assert "no option differs" in out and "B − A" in out
    content = parsed(well("show", finished_run.output, finished_run.output, "--json"))
    assert content["backward_error"]["change"]["difference"] == 0
    assert "gone" in complaint(run("show", finished_run.output, "gone"))


def test_evaluate_prints_the_table_of_the_fit(finished_run):
    out = well("evaluate", finished_run.output)
    for words in ("new domain", "WER", "backward average", "forgetting:"):
        assert words in out


def test_evaluate_with_json_prints_the_metrics_of_the_fit(finished_run):
    assert parsed(well("evaluate", finished_run.output, "--json")) == finished_run.metrics


def test_evaluate_takes_other_data(finished_run, tones_folder):
    data = tones_folder / "de.jsonl"
    metrics = parsed(well("evaluate", finished_run.output, "--data", data, "--json"))
    assert metrics["data"]["name"] == str(data)
    assert metrics["backward"] == {}


def test_evaluate_takes_another_normalizer_and_writes_utterances(
    finished_run, tones_folder, tmp_path
):
    shutil.copytree(tones_folder, tmp_path / "data")
    lines = (tones_folder / "de.jsonl").read_text(encoding="utf-8")
    manifest = tmp_path / "data" / "upper.jsonl"
    manifest.write_text(lines.replace("das rote", "Das Rote!"), encoding="utf-8")
    file = tmp_path / "u.jsonl"
    command = ("evaluate", finished_run.output, "--data", manifest, "--output", file)
    out = well(*command, "--normalizer", "none")
    assert "normalizer: none" in out
    assert f"utterances: {file}" in out
    assert parsed(file.read_text().splitlines()[0])["reference"] == "Das Rote!"
    assert "there already" in complaint(run(*command))
    found = parsed(well(*command, "--overwrite", "--json"))
    assert found["normalizer"] == "unicode"
    rates = found["data"]["base"]["wer"]
    assert (rates["rate"], rates["raw"]["rate"]) == (0, 0.5)
    assert parsed(file.read_text().splitlines()[0])["reference"] == "das rote"


def test_errors_shows_the_worst_utterances(finished_run, tmp_path):
    out = well("errors", finished_run.output, "--state", "base", "--set", "new_domain", "--top", 1)
    assert "base: errors in 2 of 2 utterances; the worst 1:" in out
    assert "REF" in out
    assert "PIER" in out
    assert well("errors", finished_run.output, "--set", "new_domain") == (
        "no errors in 2 utterances\n"
    )
    rows = parsed(well("errors", finished_run.output, "--state", "base", "--json"))
    assert [row["set"] for row in rows] == ["new_domain"] * 2
    assert rows[0]["edits"] >= rows[1]["edits"] > 0
    file = tmp_path / "u.jsonl"
    shutil.copy(finished_run.output / "utterances.jsonl", file)
    assert parsed(well("errors", file, "--state", "base", "--json")) == rows


def test_errors_shows_what_adaptation_fixed(finished_run):
    out = well("errors", finished_run.output, "--fixed", "--set", "new_domain", "--top", 1)
    assert "fixed, the 1 most changed:" in out and "adapted\nREF" in out
    rows = parsed(well("errors", finished_run.output, "--fixed", "--json"))
    assert {row["set"] for row in rows} == {"new_domain"}
    assert all(row["edits"] < row["base"]["edits"] for row in rows)
    both = complaint(run("errors", finished_run.output, "--fixed", "--broken"))
    assert "give one of --broken, --fixed and --state" in both


def test_errors_of_what_is_not_there(finished_run, tmp_path):
    assert "can't be read" in complaint(run("errors", tmp_path))
    assert "no set 'x'" in complaint(run("errors", finished_run.output, "--set", "x"))
    assert "top is 0" in complaint(run("errors", finished_run.output, "--top", 0))


def test_evaluate_hands_strength_and_split_on(monkeypatch):
    seen = {}

    def evaluate_run(*given, **options):
        seen.update(options)
        raise UserError("enough")

    monkeypatch.setattr(finished, "evaluate_run", evaluate_run)
    options = ["--strength", 0.25, "--strength-by", "signal-to-noise", "--split", "dev"]
    options += ["--column", "text=transcript"]
    assert "enough" in complaint(run("evaluate", "r", *options))
    assert (seen["strength"], seen["strength_by"]) == (0.25, "signal-to-noise")
    assert seen["split"] == "dev"
    assert seen["domain"] is None and seen["column"] == ["text=transcript"]


def test_evaluate_at_strength_0_is_the_base(finished_run):
    metrics = parsed(well("evaluate", finished_run.output, "--strength", 0, "--json"))
    assert metrics["new_domain"]["adapted"] == metrics["new_domain"]["base"]


def test_evaluate_at_several_strengths_draws_the_curve(finished_run, tmp_path):
    file = tmp_path / "curve.svg"
    command = ("evaluate", finished_run.output, "--strength", "0:1:0.5", "--plot", file)
    out = well(*command)
    for words in ("base 0", "0.5", "fit 1", "forgetting", "test sets", "by scale", str(file)):
        assert words in out
    assert file.read_bytes().startswith(b"<?xml")
    assert "is there already" in complaint(run(*command))
    curve = parsed(well(*command, "--overwrite", "--json", "--strength-by", "signal-to-noise"))
    assert [point["strength"] for point in curve["points"]] == [0, 0.5, 1]
    assert curve["strength_by"] == "signal-to-noise"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strength", "much"], "strength is 'much'; give a number"),
        (["--strength", "3"], "strength is 3; give a number from 0"),
        (["--strength", "0,3"], "strength is 3; give a number from 0"),
        (["--strength", "0,1", "--split", "train"], "split is 'train'; give test or dev"),
        (["--split", "dev"], "has no dev split; give a set that has one"),
        (["--strength", "0,1", "--output", "u.jsonl"], "--beyond are for a single strength"),
        (
            ["--strength", "0,1", "--data", "de"],
            "--data, --domain, --output and --beyond are for a single",
        ),
        (
            ["--strength", "0,1", "--domain", "a"],
            "--data, --domain, --output and --beyond are for a single",
        ),
        (["--strength", "0,1", "--plot", "x.doc"], "plot is 'x.doc'; give a file that ends in"),
        (["--plot", "x.png"], "there is one strength; give several"),
    ],
)
def test_evaluate_refuses_strengths_and_splits_in_one_line(finished_run, options, words):
    assert words in complaint(run("evaluate", finished_run.output, *options))
