import json
import re
import shutil
from dataclasses import asdict, replace

import pyro
import pytest
import torch
from safetensors.torch import load_file

import blora_pyro
from blora_pyro.data import load_split, read_manifest
from blora_pyro.errors import UserError
from blora_pyro.fitting.history import DevError
from blora_pyro.fitting.svi import learning_rate
from blora_pyro.models import resolve_device
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.runs.finished import evaluate_run
from blora_pyro.runs.fits import fit
from blora_pyro.runs.listeners import Listener

FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "posterior.safetensors",
    "run.json",
    "metrics.json",
    "utterances.jsonl",
    "report.html",
}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def run_json(finished_run):
    return read_json(finished_run.output / "run.json")


@pytest.fixture
def short(fit_options):
    """The same fit in three steps, without backward sets."""
    return {**fit_options, "steps": 3, "backward": ()}


# ---- what a fit leaves


def test_a_run_folder_holds_the_adapter_the_posterior_and_the_figures(finished_run):
    assert {path.name for path in finished_run.output.iterdir()} == FILES


def test_run_json_holds_the_resolved_configuration(finished_run, run_json, fit_options):
    resolved = {"alpha": 8.0, "guide": "normal", "prior_args": {"scale": 0.05}, "warmup_steps": 4}
    resolved |= {"device": resolve_device("auto"), "precision": "fp32"}
    expected = replace(FitConfig(**fit_options), **resolved)
    assert run_json["config"] == expected.to_json()
    assert finished_run.config == expected


def test_run_json_holds_the_whole_history(finished_run, run_json, fit_options):
    history = run_json["history"]
    assert history == [asdict(step) for step in finished_run.history]
    assert [step["step"] for step in history] == list(range(1, 41))
    assert [step["lr"] for step in history] == [learning_rate(i, 40, 0.03) for i in range(40)]


def test_run_json_holds_versions_temperature_and_times(finished_run, run_json):
    tokens = len(" das red") + len(" ein bicycle") + 2  # the tiny tokenizer spells, and two ends
    assert run_json["training_tokens"] == tokens
    assert run_json["temperature"] == pytest.approx(1e-5 * tokens)
    assert run_json["language"] == "de-en"
    assert run_json["adapter_weights"] == finished_run.posterior.num_weights
    assert run_json["versions"]["blora-pyro"] == blora_pyro.__version__
    assert run_json["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert {"python", "pyro-ppl", "transformers", "peft"} <= set(run_json["versions"])
    assert 0 < run_json["seconds"]["fit"] <= run_json["seconds"]["total"]


def test_metrics_json_holds_what_the_run_measured(finished_run, fit_options):
    metrics = read_json(finished_run.output / "metrics.json")
    assert metrics == finished_run.metrics
    assert metrics["new_domain"]["name"] == fit_options["data"]
    assert list(metrics["backward"]) == list(fit_options["backward"])
    assert metrics["sparsity"] == finished_run.posterior.sparsity()


def test_a_run_prints_as_a_few_lines_and_its_table_is_at_hand(finished_run):
    head, *lines = repr(finished_run).splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines if "errors in %" not in line)
    assert head == "<blora_pyro.Run>"
    assert facts["output"] == str(finished_run.output)
    assert facts["data"].endswith("tones0") and facts["prior"] == "normal, beta 1e-05"
    assert facts["steps"] == "40"
    errors = r"    errors in %  WER \d+\.\d -> 0\.0, backward 0\.0 -> \d+\.\d"
    assert re.fullmatch(errors, lines[-1])
    assert "new domain" in finished_run.table
    assert "normalizer: unicode" in finished_run.table


def test_a_notebook_shows_a_run_with_sections_to_open(finished_run):
    shown = finished_run._repr_html_()
    for heading in ("Errors", "Options", "Posterior"):
        assert f"<summary>{heading}</summary>" in shown
    assert shown.count("<details open>") == 1
    assert "backward average" in shown and "--beta" in shown and "A_16x16" in shown
    bare = replace(finished_run, metrics={}, output=None, history=[])
    assert "not measured" in repr(bare) and "nothing was measured" in bare._repr_html_()


def test_the_fit_learns_the_new_domain(finished_run):
    domain = finished_run.metrics["new_domain"]
    assert domain["base"]["wer"]["rate"] >= 0.5
    assert domain["adapted"]["wer"]["rate"] == 0
    for measure in ("wer", "cer", "pier"):
        change = domain["change"][measure]["difference"]
        rates = [domain[state][measure]["rate"] for state in ("adapted", "base")]
        assert change == pytest.approx(rates[0] - rates[1])


def test_the_backward_error_is_the_average_over_the_backward_sets(finished_run):
    metrics = finished_run.metrics
    for state in ("base", "adapted"):
        rates = [one[state]["wer"]["rate"] for one in metrics["backward"].values()]
        assert metrics["backward_error"][state]["rate"] == pytest.approx(sum(rates) / 2)
    assert metrics["backward_error"]["base"]["rate"] == 0  # it knows both by heart
    difference = metrics["backward_error"]["change"]["difference"]
    assert difference == pytest.approx(metrics["backward_error"]["adapted"]["rate"])


# ---- a dev set


class Notes(Listener):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_a_fit_that_goes_wrong_ends_early_with_its_last_good_posterior(
    fit_options, tones_folder, tmp_path
):
    known = {"data": str(tones_folder / "de.jsonl"), "backward": ()}  # what can be lost
    wild = FitConfig(**{**fit_options, **known, "lr": 3.0, "steps": 12})
    listener = Notes()
    run = fit(wild, tmp_path / "run", progress=listener)
    about = read_json(tmp_path / "run" / "run.json")
    alarm = about["alarm"]
    assert about["ended_by"] == "alarm" and about["skipped_steps"] == 0
    assert 2 < alarm["step"] == len(run.history) < 12
    assert "smaller --lr" in alarm["reason"]
    assert any(
        note.startswith(f"ALARM, the fit ended early at step {alarm['step']}")
        for note in listener.notes
    )
    assert run.table.startswith("ALARM, ") and run.metrics["alarm"] == alarm
    assert alarm["kept_step"] == 0  # B of the posterior is 0: it is the base
    assert all(not delta.any() for _, delta in run.posterior.delta_weights())
    again = fit(output=tmp_path / "run", resume=True)
    assert (again.history, again.table) == (run.history, run.table)

    unwatched = fit(wild.with_options(alarms=False), evaluate=False)
    assert len(unwatched.history) == 12
    assert unwatched.history[: alarm["step"]] == run.history


class Errors(Listener):
    def __init__(self):
        self.seen = []

    def evaluated(self, error, best):
        self.seen.append((error, best))

    def heard(self, some):
        self.texts = some


def test_the_best_posterior_is_the_runs_and_run_json_tells_how_it_was_found(
    finished_run, fit_options, tones_folder, tmp_path
):
    listener = Errors()
    dev = {"dev": str(tones_folder / "test.jsonl"), "eval_every": 6, "patience": 2}
    run = fit(FitConfig(**fit_options, **dev), tmp_path / "run", progress=listener)
    errors = [DevError(**one) for one in run.dev["errors"]]
    best = min(errors, key=lambda one: one.error)
    assert run.dev["best_step"] == best.step and run.dev["ended_by"] == "patience"
    assert errors[-1].step == len(run.history) == best.step + 12 < 40
    assert [one for one, _ in listener.seen] == errors
    assert listener.seen[-1][1] == best
    assert [one.reference for one in listener.texts] == read_manifest(dev["dev"])["text"][:]
    assert all(one.before != one.reference for one in listener.texts)
    assert run.history == finished_run.history[: len(run.history)]  # it changes no step
    # the dev set is the test set here, so that its error is that of the run
    scores = run.metrics["new_domain"]
    assert scores["adapted"]["wer"]["rate"] == best.error < scores["base"]["wer"]["rate"]
    about = read_json(tmp_path / "run" / "run.json")
    assert about["dev"] == run.dev and about["skipped_steps"] == 0
    again = fit(output=tmp_path / "run", resume=True)
    assert (again.dev, again.history) == (run.dev, run.history)
    assert finished_run.dev is None and "dev" not in read_json(finished_run.output / "run.json")


@pytest.mark.parametrize("split", ["dev", "validation"])
def test_the_dev_set_is_the_dev_split_of_the_new_domain(short, tones_folder, tmp_path, split):
    data = shutil.copytree(tones_folder, tmp_path / "data")
    (data / "de.jsonl").rename(data / f"{split}.jsonl")  # which the base knows by heart
    run = fit(FitConfig(**{**short, "data": str(data), "lr": 1e-9}, eval_every=3), evaluate=False)
    assert run.dev == {"errors": [{"step": 3, "error": 0.0}], "best_step": 3, "ended_by": "steps"}


# ---- the same again


def test_the_same_seed_gives_the_same_history_posterior_and_metrics(short, tmp_path):
    run = fit(FitConfig(**short), tmp_path / "run")
    torch.rand(5)
    again = fit(FitConfig(**short), tmp_path / "again")
    assert again.history == run.history
    assert again.metrics == run.metrics
    for name in ("posterior.safetensors", "adapter_model.safetensors"):
        first, second = load_file(run.output / name), load_file(again.output / name)
        assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_another_seed_gives_another_history(short, finished_run):
    other = fit(FitConfig(**{**short, "seed": 1}), evaluate=False)
    assert other.history[0].nll != finished_run.history[0].nll


def test_the_seed_orders_the_data_too(short):
    # The two utterances differ in their tokens, and so tell which came first.
    options = {**short, "batch_size": 1, "epochs": 2}
    orders = {
        tuple(step.tokens for step in fit(FitConfig(**options, seed=seed), evaluate=False).history)
        for seed in range(3)
    }
    assert len(orders) > 1


# ---- where a run may go


def test_an_output_with_content_is_refused_unless_overwritten(short, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"not empty.*--overwrite"):
        fit(FitConfig(**short), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]
    fit(FitConfig(**short), str(tmp_path / "run"), overwrite=True, evaluate=False)
    assert (tmp_path / "run" / "mine.txt").read_text() == "keep me"
    assert (tmp_path / "run" / "run.json").is_file()


def test_an_empty_output_folder_is_taken(short, tmp_path):
    assert fit(FitConfig(**short), tmp_path, evaluate=False).output == tmp_path


def test_an_output_that_is_a_file_is_refused(short, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="can't be written"):
            fit(FitConfig(**short), place, overwrite=True)


def test_without_output_nothing_is_written(short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fit(FitConfig(**short))
    assert run.output is None
    assert run.metrics["new_domain"]
    assert list(tmp_path.iterdir()) == []


def test_without_evaluation_nothing_is_measured(short, tmp_path):
    run = fit(FitConfig(**short), tmp_path / "run", evaluate=False)
    assert len(run.history) == 3
    assert "new_domain" not in run.metrics
    assert not run.metrics.get("backward")
    assert {"run.json", "posterior.safetensors"} <= {p.name for p in run.output.iterdir()}
    assert evaluate_run(run.output)["new_domain"]["adapted"]["utterances"] == 2


# ---- options


@pytest.mark.parametrize("guide", ["point", "auto-normal", "auto-lowrank"])
def test_other_guides_run_too(short, tmp_path, guide):
    run = fit(FitConfig(**{**short, "guide": guide}), tmp_path / "run")
    assert len(run.history) == 3
    loaded = Posterior.load(run.output)
    deviations = torch.cat([value.flatten() for value in loaded.stddev.values()])
    assert bool((deviations == 0).all()) == (guide == "point")
    assert evaluate_run(run.output) == run.metrics


def test_beta_zero_and_the_exact_elbo(short):
    silent = fit(FitConfig(**{**short, "beta": 0.0}), evaluate=False)
    assert all(step.kl is None for step in silent.history)
    exact = fit(
        FitConfig(**{**short, "beta": "elbo", "epochs": 2, "batch_size": 1}), evaluate=False
    )
    assert exact.config.beta == pytest.approx(1 / 22)
    assert exact.config.steps == len(exact.history) == 4


def test_the_target_modules_the_rank_and_the_prior_are_those_of_the_options(short):
    options = {**short, "target_modules": "q_proj,v_proj", "rank": 1}
    run = fit(FitConfig(**options), evaluate=False)
    names = [name for name, _, _ in run.posterior.layer_means()]
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "v_proj"}
    assert run.posterior.rank == 1
    wide = fit(FitConfig(**options, prior_scale=5.0), evaluate=False)
    assert wide.history[0].nll == run.history[0].nll
    assert wide.history[0].kl > run.history[0].kl


def test_bfloat16_keeps_the_factors_in_float32(short):
    run = fit(FitConfig(**{**short, "precision": "bf16"}), evaluate=False)
    assert {value.dtype for value in run.posterior.mean.values()} == {torch.float32}


def test_a_test_set_of_its_own_is_scored_instead(short, tones_folder):
    english = str(tones_folder / "en.jsonl")
    run = fit(FitConfig(**{**short, "test": english}))
    assert run.metrics["new_domain"]["name"] == english
    assert run.metrics["new_domain"]["base"]["wer"]["rate"] == 0


def test_a_manifest_as_data_is_all_for_training(short, tones_folder):
    manifest, notes = str(tones_folder / "train.jsonl"), []
    listener = Listener()
    listener.note = notes.append
    run = fit(FitConfig(**{**short, "data": manifest}), progress=listener)
    assert "new_domain" not in run.metrics
    (note,) = notes  # before the fit
    assert note.startswith(f"{manifest} has no test split and no test set is given")
    assert "nothing was measured" in run.table


def test_own_data_are_not_fitted_to_the_pocket_unasked(tones_folder):
    with pytest.raises(UserError, match="no base is given for"):
        fit(data=str(tones_folder), steps=1)


def test_a_folder_without_a_test_split_is_all_for_training(short, tones_folder, tmp_path):
    shutil.copytree(tones_folder, tmp_path / "data")
    (tmp_path / "data" / "test.jsonl").unlink()
    run = fit(FitConfig(**{**short, "data": str(tmp_path / "data")}))
    assert "new_domain" not in run.metrics


def test_backward_sets_of_one_file_name_are_all_measured(short, tones_folder, tmp_path):
    for code in ("de", "en"):
        shutil.copytree(tones_folder, tmp_path / code)
        (tmp_path / code / f"{code}.jsonl").replace(tmp_path / code / "test.jsonl")
    sets = tuple(str(tmp_path / code / "test.jsonl") for code in ("de", "en"))
    metrics = fit(FitConfig(**{**short, "backward": sets})).metrics
    assert tuple(metrics["backward"]) == sets


class Diary(Listener):
    def __init__(self):
        self.entries = []

    def stage(self, name):
        self.entries.append(name)

    def ready(self, config, num_tokens, num_weights):
        self.entries.append((config, num_tokens, num_weights))

    def step(self, step):
        self.entries.append(step)


def test_a_listener_hears_of_stages_the_start_and_every_step(fit_options):
    diary = Diary()
    run = fit(FitConfig(**{**fit_options, "steps": 2}), progress=diary)
    sets = ["the new domain", *fit_options["backward"]]
    assert diary.entries == [
        "loading",
        *(f"base on {name}" for name in sets),
        (run.config, 22, run.posterior.num_weights),
        *run.history,
        *(f"adapted on {name}" for name in sets),
    ]


def test_pyros_parameter_store_stays_empty(short):
    fit(FitConfig(**short), evaluate=False)
    assert not pyro.get_param_store().keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "nowhere"}, "nowhere"),
        ({"test": "nowhere"}, "nowhere"),
        ({"backward": ("nowhere",)}, "nowhere"),
        ({"base": "/nowhere"}, "/nowhere"),
        ({"target_modules": "nothing"}, "nothing"),
        ({"rank": 17}, "17"),
        ({"device": "toaster"}, "toaster"),
    ],
)
def test_bad_options_are_refused_before_the_fit(short, options, words):
    diary = Diary()
    with pytest.raises(UserError, match=words) as caught:
        fit(FitConfig(**{**short, **options}), progress=diary)
    assert "\n" not in str(caught.value)
    assert all(isinstance(entry, str) for entry in diary.entries)  # no step, and not ready for one


def test_word_languages_that_do_not_fit_their_text_are_refused_before_the_fit(
    short, tones_folder, tmp_path
):
    shutil.copytree(tones_folder, tmp_path / "data")
    lines = (tmp_path / "data" / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"word_languages": ["de", "en", "de"]} for line in lines]
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    diary = Diary()
    with pytest.raises(UserError, match="word_languages"):
        fit(FitConfig(**{**short, "data": str(tmp_path / "data")}), progress=diary)
    assert all(isinstance(entry, str) for entry in diary.entries)


# ---- damaged runs


# ---- merge and transcribe


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_in_a_short_dtype_is_fitted_and_evaluated(short, tmp_path, dtype):
    run = fit(FitConfig(**{**short, "dtype": dtype, "steps": 15, "lr": 0.06}), tmp_path)
    assert {value.dtype for value in run.posterior.mean.values()} == {torch.float32}
    assert run.history[-1].nll < run.history[0].nll / 2
    assert evaluate_run(tmp_path) == run.metrics


def test_a_folder_of_csv_files_is_fitted_and_scored(fit_options, tones_folder, tmp_path):
    for split in ("train", "test"):
        lines = (tones_folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        text = "file_name,sentence,language\n" + "".join(
            f"{tones_folder / row['audio']},{row['text']},{row['language']}\n" for row in rows
        )
        (tmp_path / f"{split}.csv").write_text(text, encoding="utf-8")
    by_csv = blora_pyro.fit(
        FitConfig(**{**fit_options, "data": str(tmp_path), "backward": (), "steps": 2})
    )
    by_json = blora_pyro.fit(FitConfig(**{**fit_options, "backward": (), "steps": 2}))
    new, old = (run.metrics["new_domain"] for run in (by_csv, by_json))
    assert new["adapted"]["wer"] == old["adapted"]["wer"]


def test_sources_are_mixed_by_weight_and_the_first_is_the_new_domain(short, tones_folder):
    german = str(tones_folder / "de.jsonl")
    run = fit(FitConfig(**{**short, "data": (str(tones_folder), german), "data_weights": (1, 3)}))
    assert run.metrics["new_domain"]["name"] == str(tones_folder)
    other = fit(FitConfig(**{**short, "data": (str(tones_folder), german), "data_weights": (3, 1)}))
    assert [step.loss for step in run.history] != [step.loss for step in other.history]


def test_backward_sets_are_measured_under_their_names(short, tones_folder, tmp_path):
    sets = (f"German={tones_folder / 'de.jsonl'}", f"English={tones_folder / 'en.jsonl'}")
    run = fit(FitConfig(**{**short, "backward": sets}), tmp_path / "run")
    assert list(run.metrics["backward"]) == ["German", "English"]
    assert evaluate_run(tmp_path / "run") == run.metrics


def test_a_data_set_in_memory_is_fitted_and_resumed_where_it_is_given_again(
    short, tones_folder, tmp_path
):
    rows = load_split(tones_folder, "train").remove_columns("origin")
    options = {**short, "data": rows, "backward": {"mine": rows}}
    run = fit(FitConfig(**options), tmp_path / "run", evaluate=False)
    (tmp_path / "run" / "run.json").write_text(
        (tmp_path / "run" / "run.json").read_text().replace('"finished"', '"fitting"')
    )
    with pytest.raises(UserError, match=r"were an object from Python.*give it again"):
        fit(output=tmp_path / "run", resume=True, evaluate=False)
    again = fit(FitConfig(data=rows), tmp_path / "run", resume=True, evaluate=False)
    assert again.history == run.history


def test_a_config_that_is_none_is_refused():
    with pytest.raises(UserError, match="config is 'corpus'; give a FitConfig, or options by name"):
        fit("corpus")


def test_an_unknown_option_is_refused_with_the_one_that_was_meant():
    for call, words in {
        lambda: fit(stpes=3): "has no option 'stpes'; did you mean 'steps'?",
        lambda: FitConfig(rnk=2): "FitConfig has no option 'rnk'; did you mean 'rank'?",
        lambda: fit(batch_size=3): "has no option 'batch_size'; give FitConfig(batch_size=...)",
    }.items():
        with pytest.raises(TypeError, match=re.escape(words)):
            call()


def test_the_device_that_was_found_is_kept_and_counts_as_given_only_where_it_was(short, tmp_path):
    run = fit(FitConfig(**short), tmp_path / "run", evaluate=False)
    about = read_json(tmp_path / "run" / "run.json")
    found = resolve_device("auto")
    assert run.config.device == about["options"]["device"] == about["config"]["device"] == found
    again = fit(FitConfig(device="auto"), tmp_path / "run", resume=True)
    assert again.history == run.history
    config = FitConfig(steps=3)
    assert config.on_device("cpu", "fp32").given == {"steps"}
    assert config.with_options(device="auto").on_device("cpu", "fp32").given == {"steps", "device"}
