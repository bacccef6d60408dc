import gzip
import io
import json
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyro
import pytest
import soundfile
import torch
from domain_results import Figures, read_rows, results_table, write_rows
from domains import FOLDER
from real.manifests import main
from rivals import (
    FULL,
    PEFT,
    TrainedWeights,
    fit_rival,
    full_net,
    peft_net,
    peft_posterior,
    plain_program,
    train_net,
)
from word_confidence import (
    Words,
    auroc,
    brier_score,
    calibration_error,
    reliability,
    resampled,
    right_words,
)

from blora_pyro.data import MODEL_DIR, read_manifest
from blora_pyro.fitting.objective import Objective
from blora_pyro.fitting.svi import fit_guide
from blora_pyro.guides import build_guide, build_prior, with_prior_arguments
from blora_pyro.models import BLoRA, build_estimator
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.runs.loading import load_examples


@pytest.fixture
def config(fit_options):
    return FitConfig(**{**fit_options, "steps": 6, "beta": 0.0, "guide": "point", "lr": 0.01})


@pytest.fixture
def train(fluent_base, fit_options):
    return load_examples(fluent_base, fit_options["data"], "train")


def resolved(config, train):
    return with_prior_arguments(config).resolved(train.num_tokens, len(train))


def test_without_latent_sites_the_loss_is_that_of_whisper_itself(fluent_base, train):
    batch = train.batch([0, 1])
    net = full_net(fluent_base)
    objective = Objective(
        plain_program(net), TrainedWeights(net), beta=0.0, estimator=build_estimator("shared")
    )
    with pyro.get_param_store().scope():
        loss, nll = objective.gradients(batch)
    logits = fluent_base.net(
        input_features=batch.input_features, decoder_input_ids=batch.decoder_input_ids
    ).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert loss == nll == pytest.approx(expected.item(), rel=1e-5)


def test_stock_peft_is_the_program_with_a_point_guide(fluent_base, train, config):
    config = resolved(config, train)
    net = peft_net(fluent_base, config)
    start = peft_posterior(fluent_base, config, net)
    history = train_net(net, train, config)
    fitted = peft_posterior(fluent_base, config, net)

    model = BLoRA(fluent_base.net, build_prior("normal"), config.rank, float(config.alpha))
    guide = build_guide("point", model)
    for name, value in start.mean.items():
        guide.means[name].data.copy_(value)
    ours = fit_guide(model, guide, train, config)

    losses = [step.loss for step in history]
    assert losses == pytest.approx([step.loss for step in ours], rel=1e-4)
    assert losses[-1] < losses[0]
    for name, value in guide.mean().items():
        assert not torch.equal(value, start.mean[name])
        assert torch.allclose(fitted.mean[name], value, atol=1e-4), name


def test_pefts_net_computes_what_its_posterior_does(fluent_base, train, config):
    config = resolved(config, train)
    net = peft_net(fluent_base, config)
    train_net(net, train, config)
    batch = train.batch([0, 1])
    inputs = {"input_features": batch.input_features, "decoder_input_ids": batch.decoder_input_ids}
    with torch.no_grad(), peft_posterior(fluent_base, config, net).applied(fluent_base.net):
        adapted, theirs = fluent_base.net(**inputs).logits, net(**inputs).logits
    assert torch.allclose(adapted, theirs, atol=1e-4)


def test_pefts_start_is_kaiming_uniform_and_zero(fluent_base, config):
    start = peft_posterior(fluent_base, config, peft_net(fluent_base, config))
    for name, value in start.mean.items():
        if name.startswith("B"):
            assert not value.any()
        else:
            bound = value.shape[-1] ** -0.5
            assert 0.9 * bound < value.abs().max() <= bound


def test_full_fine_tuning_trains_every_weight_but_the_sines(fluent_base):
    net = full_net(fluent_base)
    fixed = {name for name, one in net.named_parameters() if not one.requires_grad}
    assert fixed == {"model.encoder.embed_positions.weight"}


@pytest.mark.parametrize("kind", [FULL, PEFT])
def test_a_rival_learns_and_leaves_the_folder_of_a_fit(kind, tmp_path, config):
    fit_rival(kind, tmp_path, with_prior_arguments(config))
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["state"] == "finished"
    assert len(about["history"]) == 6
    assert about["history"][-1]["loss"] < about["history"][0]["loss"]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {"new_domain", "backward", "sparsity"} <= metrics.keys()
    rows = [json.loads(line) for line in (tmp_path / "utterances.jsonl").read_text().splitlines()]
    assert {row["state"] for row in rows} == {"base", "adapted"}


def test_pefts_folder_holds_a_posterior_that_is_a_point(config, tmp_path):
    fit_rival(PEFT, tmp_path, with_prior_arguments(config))
    posterior = Posterior.load(tmp_path)
    assert posterior.family.guide == "point"
    assert not any(value.any() for value in posterior.stddev.values())


# ---- domains


STUDY = tomllib.loads((FOLDER / "study.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rows():
    return read_rows(FOLDER / "results.csv", STUDY["domains"])


def test_the_table_of_the_docs_is_that_of_the_results(rows):
    docs = (Path(__file__).parents[2] / "docs" / "domains.md").read_text(encoding="utf-8")
    assert results_table(rows, STUDY["methods"]).to_markdown().strip() in docs


def test_the_table_of_results_is_written_as_it_was_read(rows, tmp_path):
    write_rows(tmp_path / "results.csv", rows[::-1])
    assert (tmp_path / "results.csv").read_bytes() == (FOLDER / "results.csv").read_bytes()


def test_a_method_is_not_worse_than_itself(rows):
    found = Figures(rows, STUDY["methods"]).difference("chain", "chain", "backward")
    assert (found.share, found.interval) == (0, (0, 0))


# ---- manifests


def audio(seconds, file=None):
    wave = 0.1 * np.sin(np.arange(int(8000 * seconds)))
    content = io.BytesIO()
    soundfile.write(content, wave, 8000, format="WAV")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.getvalue())
    return content.getvalue()


def test_manifests_are_made_from_the_files_of_the_public_sources(tmp_path):
    chapters = [f"Chapter{number}_1_1.wav" for number in (1, 12, 13, 16)]
    rows = [{"bytes": audio(2), "path": name} for name in (*chapters, "Chapter1_2_2.wav")]
    rows[-1]["bytes"] = audio(1)  # too short
    table = pa.table({"audio": rows, "sentence": [f"shuk {one['path']}" for one in rows]})
    (tmp_path / "killkan").mkdir()
    pq.write_table(table, tmp_path / "killkan" / "train.parquet")
    for code, voice in (
        ("en", "en_US_f_Allison"),
        ("es", "es_MX_f_Allison"),
        ("fr", "fr_CA_f_June"),
    ):
        folder = tmp_path / "share" / "doc" / f"asterisk-core-sounds-{code}"
        folder.mkdir(parents=True)
        lines = ["; a comment", "one: three words here", "two: [a tone of it]", "short: hello"]
        with gzip.open(folder / f"core-sounds-{code}.txt.gz", "wt") as file:
            file.write("\n".join(lines))
        for name in ("one", "two", "short"):
            audio(2, tmp_path / "share" / "asterisk" / "sounds" / voice / f"{name}.wav")
    names = [f"de-{number}" for number in range(70)]
    (tmp_path / "kerstin").mkdir()
    text = "\n".join(f"{name}|drei Worte hier" for name in names)
    (tmp_path / "kerstin" / "metadata.csv").write_text(text)
    for name in names:
        audio(2, tmp_path / "kerstin" / "wav" / f"{name}.wav")
    given = [f"--{name}={tmp_path / name}" for name in ("killkan", "kerstin", "output")]
    main([*given, f"--asterisk={tmp_path / 'share'}"])

    def content(name):
        lines = (tmp_path / "output" / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    assert {row["source"] for row in content("train")} == {f"killkan/{one}" for one in chapters[:2]}
    assert [row["source"] for row in content("test")] == [f"killkan/{chapters[3]}"]
    assert [row["text"] for row in content("back-fr")] == ["three words here"]
    splits = [row["split"] for row in content("back-de")]
    assert (splits.count("test"), splits.count("dev"), splits.count("train")) == (60, 10, 0)
    assert len(read_manifest(tmp_path / "output" / "train.jsonl")) == 2


# ---- word confidence


def test_the_script_for_a_card_measures_steps_and_estimates_a_fit(tmp_path):
    speech = tmp_path / "speech"
    speech.mkdir()
    for name in ("train", "dev", "test", *(f"back-{code}" for code in ("en", "es", "fr", "de"))):
        audio(1.0, speech / f"{name}.wav")
        row = {"audio": f"{name}.wav", "text": "ein rad", "language": name.rpartition("-")[2]}
        rows = [row | {"split": split} for split in ("train", "dev", "test")]
        if "-" not in name:
            rows = [row | {"language": "qu-es"}]
        lines = [json.dumps(one) for one in rows]
        (speech / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    trial = {"DEVICE": "cpu", "SECONDS_OF_ROWS": "1", "ROUNDS": "1", "TOKEN": "tr"}
    script = Path(main.__code__.co_filename).with_name("gpu.sh")
    done = subprocess.run(
        ["bash", script, MODEL_DIR, speech, tmp_path / "out"],
        env={**os.environ, **trial, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "out" / "steps.json").read_text(encoding="utf-8"))
    assert {"PEFT LoRA", "ours"} == {name for case in steps["cases"].values() for name in case}
    assert "dev sets, 7 strengths" in (tmp_path / "out" / "estimate.txt").read_text(
        encoding="utf-8"
    )
    assert "no row is in results.csv yet" in done.stdout


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("Das rote Rad!", ["das", "rad"], [True, True]),
        ("das rote rad", ["das", "tote", "rad", "ab"], [True, False, True, False]),
        ("我喜欢 red", ["我", "喜", "花", "Red."], [True, True, False, True]),
        ("Don't e-mail him", ["don't", "E-Mail,", "him."], [True, True, True]),
        ("", ["das"], [False]),
        ("das", [], []),
    ],
)
def test_a_word_is_right_where_the_reference_has_it(reference, hypothesis, expected):
    assert right_words(reference, hypothesis) == expected


def test_measures_are_those_worked_out_by_hand():
    confidence = np.array([0.1, 0.15, 0.9, 0.95, 1.0])
    right = np.array([False, True, True, False, True])
    bins = reliability(confidence, right)
    assert bins.counts.tolist() == [2, 3]
    assert bins.confidence.tolist() == pytest.approx([0.125, 0.95])
    assert bins.accuracy.tolist() == pytest.approx([0.5, 2 / 3])
    expected = (2 * (0.5 - 0.125) + 3 * (0.95 - 2 / 3)) / 5
    assert calibration_error(confidence, right) == pytest.approx(expected)
    squares = [0.01, 0.7225, 0.01, 0.9025, 0.0]
    assert brier_score(confidence, right) == pytest.approx(sum(squares) / 5)
    assert auroc(confidence, right) == 4 / 6


def test_auroc_is_a_share_of_pairs():
    rng = np.random.default_rng(0)
    confidence = rng.integers(0, 5, 60) / 4  # with ties
    right = rng.random(60) < 0.3 + 0.5 * confidence
    good, bad = confidence[right][:, None], confidence[~right][None]
    expected = ((good > bad) + 0.5 * (good == bad)).mean()
    assert auroc(confidence, right) == pytest.approx(expected)
    assert auroc(np.full(4, 0.5), np.array([True, False, True, False])) == 0.5
    assert math.isnan(auroc(np.ones(2), np.array([True, True])))


def test_confidences_that_are_what_they_say_have_no_calibration_error():
    rng = np.random.default_rng(0)
    confidence = rng.random(20_000)
    right = rng.random(20_000) < confidence
    assert calibration_error(confidence, right) < 0.02
    assert calibration_error(confidence**3, right) > 0.2


def test_the_first_of_the_resampled_measures_is_that_of_all_words():
    rng = np.random.default_rng(0)
    shares, right = rng.random(50), rng.random(50) < 0.5
    words = Words({"kind": shares}, right, np.arange(50) // 5)
    found = resampled({"fit": words}, "kind", {"fit": ("de-en", 10)})
    assert found["auroc"][0] == auroc(shares, right)
    assert found["auroc"].shape == (1001,)
    assert found["ece"].std() > 0
