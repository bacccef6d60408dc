import copy
import functools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

from blora_pyro.errors import UserError
from blora_pyro.models import load_base
from blora_pyro.models.encoder import embed
from blora_pyro.options import FitConfig
from blora_pyro.runs.finished import evaluate_run, merge_run, transcribe
from blora_pyro.runs.fits import fit
from blora_pyro.runs.loading import load_examples
from blora_pyro.runs.report import fit_tables
from blora_pyro.tables import report_text


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def short(fit_options):
    """The same fit in three steps, without backward sets."""
    return {**fit_options, "steps": 3, "backward": ()}


@torch.no_grad()
def logits(net, features, prompt) -> torch.Tensor:
    prompts = torch.tensor([prompt]).expand(len(features), -1)
    return net(input_features=features.float(), decoder_input_ids=prompts).logits


def test_evaluating_a_run_again_gives_its_metrics_to_the_last_digit(finished_run):
    assert evaluate_run(finished_run.output) == read_json(finished_run.output / "metrics.json")


def test_evaluating_a_run_again_writes_its_utterances_to_the_last_byte(finished_run, tmp_path):
    evaluate_run(finished_run.output, output=tmp_path / "u.jsonl")
    assert (tmp_path / "u.jsonl").read_bytes() == (
        finished_run.output / "utterances.jsonl"
    ).read_bytes()
    with pytest.raises(UserError, match="there already"):
        evaluate_run(finished_run.output, output=tmp_path / "u.jsonl")


def test_a_run_keeps_its_normalizer_and_may_be_scored_by_another(short, tmp_path):
    run = fit(FitConfig(**short, normalizer="none"), tmp_path / "run")
    assert run.metrics["normalizer"] == "none"
    assert evaluate_run(run.output) == run.metrics
    assert evaluate_run(run.output, normalizer="basic")["normalizer"] == "basic"
    rates = run.metrics["new_domain"]["base"]["wer"]
    assert rates["raw"] == {"rate": rates["rate"], "interval": rates["interval"]}


def test_a_run_that_was_fitted_to_trimmed_audio_is_scored_and_used_in_full_windows(
    short, fluent_folder, tones_folder, tmp_path, monkeypatch
):
    lengths = []

    def seen(net, features):
        lengths.append(features.shape[-1])
        return embed(net, features)

    monkeypatch.setattr("blora_pyro.data.features.MARGIN", 10)  # of windows of a second
    for where in ("encoder", "likelihood"):
        monkeypatch.setattr(f"blora_pyro.models.{where}.embed", seen)
    distilled = {"distillation": 0.1, "distillation_languages": ("en",)}
    trimmed = FitConfig(**short, **distilled, trim_audio=True)
    run = fit(trimmed, tmp_path / "run", evaluate=False)
    assert set(lengths) == {62}  # a frame looks a little way back
    lengths.clear()
    assert evaluate_run(run.output)["heard"] == "in full windows, with Whisper's safeguards"
    transcribe([tones_folder / "en0.wav"], run.output)
    assert set(lengths) == {100}
    padded = fit(FitConfig(**short, **distilled), evaluate=False)
    assert padded.history[0].loss != run.history[0].loss


@pytest.mark.parametrize("split", ["dev", "validation"])
def test_the_dev_split_is_scored_where_it_is_asked_for(finished_run, tones_folder, tmp_path, split):
    data = shutil.copytree(tones_folder, tmp_path / "data")
    (data / "de.jsonl").rename(data / f"{split}.jsonl")
    metrics = evaluate_run(finished_run.output, str(data), split="dev")
    assert metrics["split"] == "dev"
    german = finished_run.metrics["backward"][str(tones_folder / "de.jsonl")]
    assert metrics["data"] == {"name": str(data), **german}


def test_a_run_can_be_evaluated_on_other_data(finished_run, tones_folder):
    german = str(tones_folder / "de.jsonl")
    metrics = evaluate_run(str(finished_run.output), german)
    assert metrics["data"] == {"name": german, **finished_run.metrics["backward"][german]}
    assert "new_domain" not in metrics and metrics["backward"] == {}
    assert "new domain" not in report_text(fit_tables(metrics))
    own = evaluate_run(finished_run.output, str(tones_folder))
    assert own["new_domain"] == finished_run.metrics["new_domain"]
    assert "backward_error" not in metrics


def test_a_merged_run_is_a_plain_checkpoint_with_the_adapted_logits(
    finished_run, fluent_base, tones_folder, tmp_path
):
    merge_run(finished_run.output, str(tmp_path / "merged"))
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    plain = WhisperForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    WhisperTokenizer.from_pretrained(tmp_path / "merged")
    WhisperFeatureExtractor.from_pretrained(tmp_path / "merged")
    examples = load_examples(fluent_base, str(tones_folder), "test")
    prompt, features = examples.prompts[0], examples.features[:]
    with finished_run.posterior.applied(fluent_base.net):
        adapted = logits(fluent_base.net, features, prompt)
    torch.testing.assert_close(logits(plain, features, prompt), adapted, atol=1e-4, rtol=0)
    assert not torch.allclose(logits(fluent_base.net, features, prompt), adapted, atol=0.1)


def test_a_merged_run_is_a_base_that_says_what_the_run_says(finished_run, tones_folder, tmp_path):
    merge_run(finished_run.output, tmp_path / "merged")
    audio = [tones_folder / "test4.wav", tones_folder / "test5.wav"]
    merged = transcribe(audio, base=str(tmp_path / "merged"), language="de-en")
    assert merged == transcribe(audio, finished_run.output)
    assert [one.text for one in merged] == ["das red", "ein bicycle"]
    assert load_base(str(tmp_path / "merged")).net.generation_config.lang_to_id


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_merged_run_is_rounded_once_to_the_dtype_asked_for(short, fluent_folder, tmp_path, dtype):
    run = fit(FitConfig(**{**short, "dtype": "bfloat16"}), tmp_path / "run", evaluate=False)
    merge_run(run.output, tmp_path / "merged", dtype=dtype)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    deltas = {f"{name}.weight": delta for name, delta in run.posterior.delta_weights()}
    for name, weight in load_file(fluent_folder / "model.safetensors").items():
        exact = weight + deltas.get(name, 0)  # of the weights as stored, not as fitted with
        assert torch.equal(merged[name], exact.to(getattr(torch, dtype))), name
    config = read_json(tmp_path / "merged" / "config.json")
    assert config["dtype"] == dtype


def test_a_merge_tells_of_an_adapter_that_rounding_loses(finished_run, tmp_path):
    told = []
    merge = functools.partial(merge_run, finished_run.output, on_note=told.append, overwrite=True)
    merge(tmp_path / "whole")
    merge(tmp_path / "half", dtype="bfloat16")
    assert told == []
    merge(tmp_path / "half", dtype="bfloat16", strength=0.001)
    assert "rounding to bfloat16 moves the logits by" in told[0]


def test_the_base_of_a_merge_is_left_alone(finished_run, fluent_folder):
    before = (fluent_folder / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="own folder"):
        merge_run(finished_run.output, fluent_folder, overwrite=True)
    assert (fluent_folder / "model.safetensors").read_bytes() == before


def test_a_base_is_loaded_as_the_run_has_it_unless_told(monkeypatch, finished_run, tmp_path):
    shutil.copytree(finished_run.output, tmp_path / "run")
    about = read_json(tmp_path / "run" / "run.json")
    theirs = {"base": "someone/whisper", "revision": "v1", "dtype": "float16"}
    about["config"] |= theirs | {"local_files_only": True}
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    seen = []

    def load(name, *rest):
        seen.append((name, *rest))
        raise UserError("seen")

    monkeypatch.setattr("blora_pyro.models.base.load_base", load)
    run = tmp_path / "run"
    for use in (
        lambda: evaluate_run(run),
        lambda: merge_run(run, tmp_path / "out"),
        lambda: transcribe([], run),
        lambda: transcribe([], run, base="b", dtype="float32"),
        lambda: transcribe([], run, revision="v2"),
        lambda: transcribe([], base="b", revision="v3", local_files_only=True),
    ):
        with pytest.raises(UserError, match="seen"):
            use()
    assert seen == [
        ("someone/whisper", "auto", "float16", "v1", True),
        ("someone/whisper", "cpu", "float32", "v1", True),  # a merge adds up in float32
        ("someone/whisper", "auto", "float16", "v1", True),
        ("b", "auto", "float32", None, True),
        ("someone/whisper", "auto", "float16", "v2", True),
        ("b", "auto", "float32", "v3", True),
    ]


def test_merging_into_a_folder_with_content_needs_overwrite(finished_run, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="not empty"):
        merge_run(finished_run.output, tmp_path)
    merge_run(finished_run.output, tmp_path, overwrite=True)
    assert (tmp_path / "config.json").is_file()


def test_transcribing_with_and_without_an_adapter(finished_run, fluent_folder, tones_folder):
    audio = [str(tones_folder / "test5.wav"), str(tones_folder / "test4.wav")]
    adapted = transcribe(audio, str(finished_run.output))
    assert [one.text for one in adapted] == ["ein bicycle", "das red"]
    assert [one.language for one in adapted] == ["de-en", "de-en"]
    base = transcribe(audio, base=str(fluent_folder), language="de-en")
    assert [one.text for one in base] != ["ein bicycle", "das red"]
    (detected,) = transcribe([tones_folder / "de3.wav"], base=str(fluent_folder))
    assert (detected.text, detected.language) == ("ein rad", "de")


def test_one_file_is_transcribed_by_its_path_alone(fluent_folder, tones_folder):
    path = tones_folder / "de2.wav"
    for given in (path, str(path)):
        (found,) = transcribe(given, base=str(fluent_folder), language="de")
        assert found.text == "das rote"


def test_an_adapters_language_is_that_of_its_data_unless_given(finished_run, tones_folder):
    audio = [tones_folder / "test4.wav"]
    default = transcribe(audio, finished_run.output)
    assert transcribe(audio, finished_run.output, language="de-en") == default
    (detected,) = transcribe(audio, finished_run.output, language="auto")
    assert detected.language in ("de", "en")
    with pytest.raises(UserError, match="'xx'"):
        transcribe(audio, finished_run.output, language="xx")


def test_transcribing_with_draws(finished_run, tones_folder):
    audio = [tones_folder / "test4.wav"]
    (plain,) = transcribe(audio, finished_run.output)
    (found,) = transcribe(audio, finished_run.output, samples=3, seed=1)
    assert found.text == plain.text == "das red"
    words = found.segments[0].words
    assert [word.text for word in words] == ["das", "red"]
    assert all(word.agreement in (0, 1 / 3, 2 / 3, 1) and word.log_prob < 0 for word in words)
    assert transcribe(audio, finished_run.output, samples=3, seed=1) == [found]
    with pytest.raises(UserError, match="no adapter"):
        transcribe(audio, base=finished_run.config.base, samples=3)


def test_an_adapter_does_not_go_on_a_base_of_another_geometry(
    finished_run, fluent_folder, tones_folder, tmp_path
):
    shutil.copytree(fluent_folder, tmp_path / "other")
    net = load_base(str(fluent_folder)).net
    config = copy.deepcopy(net.config)
    config.decoder_layers = 1
    other = WhisperForConditionalGeneration(config)
    other.generation_config = net.generation_config
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="base model"):
        transcribe([tones_folder / "en0.wav"], finished_run.output, base=str(tmp_path / "other"))


def test_a_device_that_cannot_be_used_is_refused(finished_run, fluent_folder, tones_folder):
    audio = [tones_folder / "en0.wav"]
    with pytest.raises(UserError, match="toaster"):
        transcribe(audio, base=str(fluent_folder), device="toaster")
    with pytest.raises(UserError, match="toaster"):
        transcribe(audio, finished_run.output, device="toaster")
    with pytest.raises(UserError, match="toaster"):
        evaluate_run(finished_run.output, device="toaster")


def test_audio_is_transcribed_by_a_base_or_an_adapter_that_is_named(tones_folder):
    with pytest.raises(UserError, match="neither base nor adapter is given; give the base"):
        transcribe([tones_folder / "en0.wav"])


def test_a_merge_that_overflows_its_dtype_is_refused_and_writes_nothing(finished_run, tmp_path):
    folder, fitted = tmp_path / "run", finished_run.posterior
    shutil.copytree(finished_run.output, folder)
    replace(fitted, mean={name: 1e3 * mean for name, mean in fitted.mean.items()}).save(folder)
    with pytest.raises(UserError, match="the merged checkpoint in float16 has values that are not"):
        merge_run(folder, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "half"),
    [({}, True), ({"dtype": "float32"}, False), ({"base": "pocket"}, False)],
)
def test_the_encoder_of_a_real_base_is_halved_unless_a_dtype_is_given(
    fluent_folder, monkeypatch, options, half
):
    monkeypatch.setattr("blora_pyro.models.base.has_bfloat16_units", lambda device: True)
    seen = []
    monkeypatch.setattr(
        "blora_pyro.runs.finished.transcribe_files", lambda one, *_: seen.append(one.base)
    )
    transcribe([], **{"base": str(fluent_folder), "device": "cpu", **options})
    assert [base.half_encoder for base in seen] == [half]
