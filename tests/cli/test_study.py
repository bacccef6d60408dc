import ast
import json
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import blora_pyro
from blora_pyro.cli import app
from blora_pyro.metrics import Counts
from blora_pyro.studies import search as searching
from blora_pyro.studies.definition import ScoreSpec
from blora_pyro.studies.methods import built_in_methods
from blora_pyro.studies.running import StudyRun
from blora_pyro.studies.search import Search

from .conftest import complaint


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(*arguments):
    return invoke("sweep", *arguments)


@pytest.fixture
def handed_on(monkeypatch, tmp_path):
    """What `sweep` is called with, in place of a sweep."""
    monkeypatch.chdir(tmp_path)
    seen = {}

    def sweep(options, output, *, progress, **more):
        seen.update({"options": options, "output": output, **more})
        output.mkdir(parents=True, exist_ok=True)
        return Search(output, "study", {}, {}, None, ())

    monkeypatch.setattr(searching, "sweep", sweep)
    return seen


@pytest.fixture
def short(fluent_folder, tones_folder, tmp_path):
    """Arguments of a sweep with fits of two steps."""
    data = shutil.copytree(tones_folder, tmp_path / "tones")
    (data / "test.jsonl").rename(data / "dev.jsonl")
    return [
        *("--base", fluent_folder, "--data", data, "--backward", data / "de.jsonl"),
        *("--rank", 2, "--steps", 2, "--batch-size", 2, "--output", tmp_path / "sweep"),
    ]


OWN = {"trials": 20, "search": None, "storage": None, "study_name": None, "timeout": None}


def test_options_of_the_sweep_and_of_its_fits_are_handed_on(handed_on, tmp_path):
    result = run(
        *("--trials", 5, "--search", "beta=1e-6:1e-2", "--search", "prior-scale = 0.1:1"),
        *("--storage", "sqlite:///a.db", "--study-name", "mine", "--timeout", 60),
        *("--output", tmp_path, "--data", "de-en", "--backward", "de, en", "--steps", 200),
        *("--prior", "student-t", "--prior-arg", "df=3", "--dev", "zh-en", "--spec-augment"),
    )
    assert result.exit_code == 0, result.output
    assert handed_on == {
        "output": tmp_path,
        "trials": 5,
        "search": {"beta": (1e-6, 1e-2), "prior_scale": (0.1, 1.0)},
        "storage": "sqlite:///a.db",
        "study_name": "mine",
        "timeout": 60.0,
        "options": {
            "data": ("de-en",),
            "backward": {"de": "de", "en": "en"},
            "steps": 200,
            "prior": "student-t",
            "prior_args": {"df": "3"},
            "dev": "zh-en",
            "spec_augment": True,
        },
    }


def test_what_is_not_given_is_not_handed_on(handed_on):
    assert run().exit_code == 0
    assert handed_on == {**OWN, "output": Path("runs/sweep"), "options": {}}


@pytest.mark.parametrize("option", ["--resume", "--overwrite", "--checkpoint-every", "--dance"])
def test_options_that_make_no_sense_for_a_sweep_are_refused(handed_on, option):
    result = run(option)
    assert result.exit_code == 2 and f"No such option: {option}" in result.stderr
    assert handed_on == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--search", "beta"], "search is 'beta'; give name=low:high, such as beta=1e-6:1e-3"),
        (["--search", "beta=1:2:3"], "search is 'beta=1:2:3'"),
        (["--search", "beta=1:2", "--search", "beta=3:4"], "search gives 'beta' twice"),
        (["--search", "beta=2:1"], "search of beta is from 2.0 to 1.0; give 0 < low < high"),
        (["--search", "df=2:3"], "prior normal has no 'df' to be searched"),
        (["--beta", "1e-4"], "beta is searched and given, too"),
        (["--prior-scale", "0.1"], "prior_scale is searched and given, too"),
        (["--backward", "none"], "give some: --backward NAME=SOURCE"),
        (["--steps", "0"], "steps is 0"),
        (["--trials", "0"], "trials is 0"),
        (["--storage", "nowhere"], "storage 'nowhere' can't be opened"),
        (["--dev", "nowhere"], "'nowhere'"),
    ],
)
def test_bad_input_is_told_in_one_line(short, arguments, words):
    if arguments[:2] == ["--backward", "none"]:
        short = [*short[:4], *short[6:]]
    assert words in complaint(run(*short, *arguments))


def test_a_sweep_shows_its_front_and_goes_on(short, tmp_path):
    result = run(*short, "--trials", 1)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "1 trial finished" in result.stdout
    assert lines[-1].startswith("to look at all trials: optuna-dashboard ")
    assert lines[-2].startswith("to fit it again: blora-pyro fit --base ")
    assert "trial 0: beta " in " ".join(result.stderr.split())
    result = run(*short, "--trials", 2, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content == json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [one["number"] for one in content["trials"]] == [0, 1]
    assert "has rank = 2, not 3" in complaint(run(*short, "--rank", 3))


# ---- compare and study


@pytest.fixture
def fake_scores(monkeypatch):
    """Scores are made up instead of fitted; the titles of those that were made."""
    made: list[str] = []

    def score(study_run: StudyRun, spec: ScoreSpec):
        made.append(spec.title)
        edits = np.array([2, 1, 3])
        sets = {name: {"wer": Counts(edits, edits + 7)} for name in ("new_domain", "de", "en")}
        return replace(spec.scored, metrics=dict.fromkeys(sets, "wer"), counts=sets)

    monkeypatch.setattr(StudyRun, "score", score)
    monkeypatch.setattr(StudyRun, "load_bases", lambda study_run: None)
    return made


@pytest.fixture(scope="session")
def three_sets(tones_folder, tmp_path_factory):
    """`mix`, `de` and `en`: folders with train, dev and test."""
    folder = tmp_path_factory.mktemp("three_sets")
    for name, file in (("mix", "test"), ("de", "de"), ("en", "en")):
        lines = (tones_folder / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        rows = [{**row, "audio": str(tones_folder / row["audio"])} for row in rows]
        (folder / name).mkdir()
        for split in ("train", "dev", "test"):
            text = "\n".join(map(json.dumps, rows))
            (folder / name / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def compared(fluent_folder, three_sets, tmp_path):
    """Runs `compare` with a small set and its own output."""

    def call(*more):
        given = ["--base", fluent_folder, "--domains", f"mix={three_sets / 'mix'}"]
        given += [part for name in ("de", "en")
                  for part in ("--backward", f"{name}={three_sets / name}")]  # fmt: skip
        given += ["--settings", "allx2", "--seeds", "0", "--output", tmp_path / "out"]
        return invoke("compare", *given, *more)

    return call


LORA, BLORA = (built_in_methods()[name] for name in ("lora", "blora"))
FITS = len(LORA.values) + len(BLORA.values)  # of the first stage


def test_compare_prints_tables_and_writes_files(compared, fake_scores, tmp_path):
    result = compared("--methods", "scaled-lora,blora", "--threads", 1)
    assert result.exit_code == 0, result.output
    for words in ("against LoRA at its best learning rate", "BLoRA", "ΔW scaled", "the choice"):
        assert words in result.stdout
    assert result.stdout.splitlines()[-1].endswith("compare.md, compare.json, compare.png")
    assert torch.get_num_threads() == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("compare.json", "compare.md", "compare.png", "results.csv", "study.db")
    }
    made = len(fake_scores)
    again = compared("--methods", "scaled-lora,blora", "--report", "--json")
    assert json.loads(again.stdout)["rows"] == {"made": made, "missing": 0}
    assert len(fake_scores) == made


def test_a_dry_run_makes_nothing(compared, fake_scores, tmp_path):
    result = compared("--methods", "blora", "--dry-run")
    assert result.exit_code == 0, result.output
    expected = f"rows known: 0 done, {FITS + 1} to do, with {FITS} fits to make"
    assert result.stdout.splitlines()[1] == expected
    assert not fake_scores and not (tmp_path / "out").exists()


def test_only_choose_and_chosen_only(compared, fake_scores):
    assert compared("--methods", "blora", "--only-choose").exit_code == 0
    assert len(fake_scores) == 1 + FITS
    assert compared("--methods", "blora", "--chosen-only").exit_code == 0
    rates = {LORA.values[0], BLORA.options["lr"]}  # of equals the first is chosen
    assert len(fake_scores) == 1 + FITS + 1 + len(rates) + 1


def test_a_row_of_its_own_and_the_command_that_makes_it_again(compared, fake_scores, tmp_path):
    result = compared("--row", "scaled-lora:0.6:0.002")  # at values that are not in the list
    assert result.exit_code == 0, result.output
    assert [title.split(",")[0] for title in fake_scores] == ["base", "scaled-lora:0.6:0.002"]
    assert "strength 0.6 (lr 0.002)" in result.stdout
    assert "against LoRA" not in result.stdout
    (command,) = [
        line
        for line in (tmp_path / "out" / "compare.md").read_text().splitlines()
        if line.startswith("blora-pyro compare")
    ]
    again = shlex.split(command)[1:]
    again[again.index("again")] = str(tmp_path / "again")
    before = [*fake_scores]
    assert invoke(*again).exit_code == 0
    assert fake_scores == 2 * before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "dora"), "method is 'dora'; give one of base, lora"),
        (("--seeds", "one"), "seeds is 'one'; give whole numbers, such as 0,1,2"),
        (("--settings", "short"), "setting is 'short'; give UTTERANCESxSTEPS"),
        (("--threads", 0), "threads is 0"),
        (("--row", "lora"), "row is 'lora'; give lora:LR"),
        (("--rank", 0), "rank is 0"),
        (("--domains", "nowhere", "--row", "lora:0.1"), "no data at 'nowhere'"),
        (("--base", "nowhere", "--row", "lora:0.1"), "nowhere"),
        (("--base", "nowhere", "--dry-run"), "nowhere"),
    ],
)
def test_bad_input_of_a_comparison_is_one_line(compared, arguments, message):
    assert message in complaint(compared(*arguments))


@pytest.fixture
def study_file(fluent_folder, three_sets, tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(
        f"""
        bases = {{ fluent = "{fluent_folder}" }}
        data = {{ mix = "{three_sets}/mix" }}
        backward = {{ de = "{three_sets}/de", en = "{three_sets}/en" }}
        output = "{tmp_path}/out"
        results = "small.csv"
        methods = ["lora"]
        [options]
        rank = 2
        batch_size = 2
        steps = 2
        """
    )
    return path


def test_a_study_file_is_run_and_its_report_is_made_from_its_table(
    study_file, fake_scores, tmp_path
):
    result = invoke("study", study_file, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "5 to do, with 4 fits to make" in result.stdout and not (tmp_path / "out").exists()
    result = invoke("study", study_file)
    assert result.exit_code == 0, result.output
    assert len(fake_scores) == 5 + 1 + 2
    names = ("small.csv", "small.md", "small.json", "small.png")
    assert all((tmp_path / name).exists() for name in names)
    shutil.rmtree(tmp_path / "out")
    before = (tmp_path / "small.md").read_text()
    assert invoke("study", study_file, "--report").exit_code == 0
    assert (tmp_path / "small.md").read_text() == before


def test_a_study_file_may_be_a_search(study_file, handed_on, tmp_path):
    text = study_file.read_text()
    for line in ('methods = ["lora"]\n', 'results = "small.csv"\n'):  # a search has neither
        text = text.replace(line, "")
    study_file.write_text(text + "\n[search]\ntrials = 3\nbeta = [1e-6, 1e-3]\n")
    result = invoke("study", study_file, "--dry-run", "--storage", "sqlite:///a.db")
    assert result.exit_code == 0, result.output
    assert (handed_on["trials"], handed_on["search"]) == (3, {"beta": (1e-6, 1e-3)})
    assert handed_on["dry_run"] and handed_on["storage"] == "sqlite:///a.db"
    assert handed_on["options"]["rank"] == 2 and handed_on["output"] == tmp_path / "out"


@pytest.mark.parametrize("content", ["data = 3", "[settings]\na = 3", "data = " + 9999 * "["])
def test_a_study_file_of_odd_types_is_one_line(tmp_path, content):
    (tmp_path / "odd.toml").write_text(content)
    assert "odd.toml" in complaint(invoke("study", tmp_path / "odd.toml"))


@pytest.mark.parametrize("command", ["study", "sweep", "compare"])
@pytest.mark.parametrize("module", ["optuna", "pandas"])
def test_a_missing_extra_is_one_line(study_file, command, module, monkeypatch):
    for name in [one for one in sys.modules if one.startswith("blora_pyro.studies")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    result = invoke(command, *([study_file] if command == "study" else []))
    words = f"a study needs {module}, which is not installed; pip install 'blora-pyro[studies]'"
    assert words in complaint(result)


def test_a_fit_needs_no_extra():
    extra, seen = {"optuna", "sqlalchemy", "pandas", "blora_pyro.studies"}, 0
    for path in Path(blora_pyro.__file__).parent.rglob("*.py"):
        if path.parent.name == "studies":
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # not what functions import
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            seen += len(names)
            assert not any(
                name == one or name.startswith(f"{one}.") for name in names for one in extra
            )
    assert seen > 500
