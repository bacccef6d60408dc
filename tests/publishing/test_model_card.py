"""The card, read back as the Hub reads it."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from blora_pyro import Posterior
from blora_pyro.publishing.model_card import model_card
from blora_pyro.runs.report import fit_tables


@pytest.fixture
def run(finished_run):
    """(posterior, run.json, metrics.json) of a run whose sets are on the Hub, but for one."""
    about = json.loads((finished_run.output / "run.json").read_text())
    about["config"] |= {"base": "someone/fluent", "data": ["someone/talks:de"]}
    about["config"]["target_modules"] = r".*(q|v)_proj"
    about["config"]["backward"] = {"German": "someone/de", "en.csv": "en.csv"}
    metrics = json.loads((finished_run.output / "metrics.json").read_text())
    metrics["new_domain"]["name"] = "someone/talks:de"
    metrics["backward"] = dict(zip(("German", "en.csv"), metrics["backward"].values(), strict=True))
    return replace(Posterior.load(finished_run.output), base="someone/fluent"), about, metrics


def read_card(*given, **options) -> ModelCard:
    return ModelCard(str(model_card("me/adapter", *given, **options)))


def test_the_metadata_say_what_it_is(run):
    data = read_card(*run, license="apache-2.0").data
    assert data.base_model == "someone/fluent"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert (data.library_name, data.pipeline_tag) == ("peft", "automatic-speech-recognition")
    assert data.language == ["de", "en"]
    assert data.datasets == ["someone/talks"]
    assert data.license == "apache-2.0"
    assert data.metrics == ["wer", "cer"]
    assert {"blora-pyro", "lora", "bayesian"} <= set(data.tags)


def test_results_are_in_the_metadata_as_the_hub_reads_them(run):
    metrics = run[2]
    metrics["backward"]["en"] = metrics["backward"]["en.csv"]
    results = read_card(*run).data.eval_results
    found = {(one.dataset_name, one.metric_type): one for one in results}
    wer = metrics["new_domain"]["adapted"]["wer"]
    one = found["someone/talks", "wer"]
    assert (one.task_type, one.dataset_type) == ("automatic-speech-recognition", "someone/talks")
    assert (one.dataset_config, one.dataset_split) == ("de", "test")
    assert one.metric_value == pytest.approx(100 * wer["rate"], abs=0.01)
    assert f"{100 * wer['interval'][1]:.1f}" in one.metric_name
    assert "2 utterances" in one.metric_name
    sets = {(one.dataset_type, one.dataset_config) for one in results}
    assert sets == {
        ("someone/talks", "de"),
        ("someone/de", None),
        ("local", "en.csv"),
        ("blora-pyro-pocket", "en"),
    }
    assert len(found) == len(results) == 8  # WER and CER of each
    metrics["backward"]["en.csv"]["drift"] = True  # what the base says is no reference of a set
    results = read_card(*run).data.eval_results
    assert all(one.dataset_config != "en.csv" for one in results)


def test_the_table_says_how_large_the_sets_are(run):
    posterior, about, metrics = run
    text = read_card(*run).text
    length = metrics["new_domain"]["base"]["length"]
    assert f"| new domain someone/talks:de (2 utterances, {length} words) | WER |" in text
    metrics["backward"]["en.csv"]["base"] |= {"utterances": 1234, "length": 5678, "metric": "cer"}
    text = read_card(posterior, about, metrics).text
    assert "| backward en.csv (1,234 utterances, 5,678 characters) | CER |" in text
    for both in (metrics["new_domain"], *metrics["backward"].values()):
        del both["base"]["utterances"], both["base"]["length"]  # of old versions
    assert "| new domain someone/talks:de | WER |" in read_card(posterior, about, metrics).text


def test_the_text_has_the_table_the_prior_and_the_way_to_use_it(run):
    _, about, metrics = run
    text = read_card(*run).text
    row = next(line for line in text.splitlines() if line.startswith("| new domain someone/talks"))
    both = metrics["new_domain"]
    for state in ("base", "adapted"):
        rate = both[state]["wer"]
        low, high = (f"{100 * end:.1f}" for end in rate["interval"])
        assert f"| {100 * rate['rate']:.1f} [{low}, {high}] |".replace("| ", "") in row
    lines = [line for line in fit_tables(metrics) if isinstance(line, str)]
    assert any("forgetting:" in line for line in lines)
    assert "forgetting: " in text
    assert "\\[" not in text  # no escapes of the terminal's
    scale = about["config"]["prior_args"]["scale"]
    for line in (
        f"| effective temperature T = beta · N | {about['temperature']:.4g} |",
        "| training utterances | 2 |",
        "| --prior | normal |",
        f"| --prior-arg | scale={scale} |",
        "| --guide | normal |",
        "| --beta | 1e-05 |",
        "| --rank | 4 |",
        r"| --target-modules | .*(q\|v)_proj |",
        "| --seed | 0 |",
        'whisper = WhisperForConditionalGeneration.from_pretrained("someone/fluent")',
        'whisper = PeftModel.from_pretrained(whisper, "me/adapter")',
        "blora-pyro transcribe talk.wav --adapter me/adapter",
        "--prior-from me/adapter",
        "`<|de|><|en|>`",
        "measured on German, en.csv, and nowhere else",
        "T is not 1",
    ):
        assert line in text, line
    for name in ("--device", "--ewc", "--spec-augment"):  # of the machine, or not used
        assert f"| {name} |" not in text
    code = text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")


def test_the_card_says_what_was_not_measured(run):
    posterior, about, metrics = run
    card = read_card(posterior, about, {})
    assert "Nothing: there was no evaluation" in card.text
    assert "forgotten of what the base knew was not measured" in card.text
    assert card.data.eval_results is None
    assert card.data.metrics is None
    del metrics["backward"], metrics["backward_error"]
    text = read_card(posterior, about, {**metrics, "backward": {}}).text
    assert "those of the sets in the table" in text
    assert "was not measured" in text


def test_the_pocket_base_is_no_hub_id(run):
    posterior, about, metrics = run
    card = read_card(replace(posterior, base="pocket"), about, metrics)
    assert card.data.base_model is None
    assert "WhisperForConditionalGeneration.from_pretrained(MODEL_DIR)" in card.text
    assert "synthetic speech" in card.text


def test_a_posterior_that_has_no_spread_says_so(run):
    posterior, *rest = run
    points = {name: 0 * value for name, value in posterior.stddev.items()}
    text = read_card(replace(posterior, stddev=points), *rest).text
    assert "a point estimate" in text
    assert "--prior-from" not in text
    assert "tempered" not in text


def test_a_run_without_a_language_has_a_card(run):
    posterior, about, metrics = run
    del about["language"]
    card = read_card(posterior, about, metrics)
    assert card.data.language is None
    assert "prompted with" not in card.text


def test_the_card_says_by_which_token_a_language_without_one_was_prompted(run):
    posterior, about, metrics = run
    assert "`de-en` was prompted with `<|de|><|en|>`." in read_card(*run).text
    posterior = replace(posterior, language_map={"qu": "mi"})
    text = read_card(posterior, {**about, "language": "qu-es"}, metrics).text
    assert "`qu-es` was prompted with `<|mi|><|es|>`: the base has no token" in text
    assert 'give `language="mi"`' in text
    assert "prompted with" not in read_card(posterior, {**about, "language": "es"}, metrics).text
