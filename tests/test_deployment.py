"""What `merge` writes goes on to other programs and says the same there; see docs/deployment.md."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from ctranslate2.converters import TransformersConverter
from ctranslate2.converters.transformers import main as convert
from faster_whisper import WhisperModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from blora_pyro import fit
from blora_pyro.data import IGNORED, featurise, load_split, prompt_ids, text_ids
from blora_pyro.models import Base, load_base
from blora_pyro.options import FitConfig
from blora_pyro.runs.engines import transcribe
from blora_pyro.runs.finished import merge_run
from blora_pyro.runs.loading import load_examples
from blora_pyro.transcription import transcribe_features

WINDOW = 30 * 16_000  # samples


def noise(low: float, high: float) -> np.ndarray:
    """The noise between two frequencies, in Hz, as long as the window.

    Shorter recordings would not do: faster-whisper fills up their log-mel with zeros, transformers
    their samples, and this net, unlike a real Whisper, hears the difference.
    """
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(WINDOW))
    frequencies = np.fft.rfftfreq(WINDOW, 1 / 16_000)
    wave = np.fft.irfft(np.where((low <= frequencies) & (frequencies < high), spectrum, 0))
    return (0.3 * wave / np.abs(wave).max()).astype(np.float32)


SOUNDS = {"the red": noise(0, 400), "a bicycle": noise(400, 1300)}


def learn_by_heart(base: Base) -> None:
    """Train the decoder until it says each sound's text, with and without timestamps."""
    net, tokenizer = base.net, base.tokenizer
    start, end, after = tokenizer.convert_tokens_to_ids(["<|0.00|>", "<|30.00|>", "<|endoftext|>"])
    prompt = prompt_ids(tokenizer, "en")
    rows = []
    for text in SOUNDS:
        letters = text_ids(tokenizer, text)
        rows.append([*prompt, *letters, after])
        rows.append([*prompt[:-1], start, *letters, end, after])
    length = max(map(len, rows))
    padded = torch.tensor([[*row, *[IGNORED] * (length - len(row))] for row in rows])
    inputs, labels = padded[:, :-1].clamp(min=0), padded[:, 1:].clone()
    labels[:, :2] = IGNORED
    labels[::2, 2] = IGNORED  # whether timestamps are wanted is told, not heard
    with torch.no_grad():
        features = featurise(SOUNDS.items(), base.feature_extractor).float()
        encoded = net.model.encoder(features).last_hidden_state.repeat_interleave(2, 0)
    optimizer = torch.optim.Adam(net.model.decoder.parameters(), lr=0.02)
    for _ in range(80):
        logits = net(encoder_outputs=(encoded,), decoder_input_ids=inputs, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def base(openai_tokenizer, tmp_path_factory) -> Path:
    """A narrow Whisper with OpenAI's window and vocabulary, without a generation config."""
    torch.set_num_threads(1)
    config = WhisperConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        pad_token_id=50257,
        bos_token_id=50257,
        eos_token_id=50257,
        decoder_start_token_id=50258,
        begin_suppress_tokens=[],
        init_std=0.2,
    )
    torch.manual_seed(0)
    net = WhisperForConditionalGeneration(config).eval()
    made = Base("narrow", net, openai_tokenizer(51865), WhisperFeatureExtractor())
    learn_by_heart(made)
    folder = tmp_path_factory.mktemp("deployment") / "base"
    made.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    return folder


@pytest.fixture(scope="module")
def merged(base) -> Path:
    """The base after two steps on what it knows already: its texts stay, its weights do not."""
    folder, rows = base.parent, []
    for text, wave in SOUNDS.items():
        soundfile.write(folder / f"{text}.wav", wave, 16_000)
        rows.append({"audio": f"{text}.wav", "text": text, "language": "en"})
    (folder / "sounds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"base": str(base), "data": str(folder / "sounds.jsonl")}
    fit(
        FitConfig(steps=2, rank=2, batch_size=2, target_modules="all-linear", **options),
        folder / "run",
        evaluate=False,
    )
    merge_run(folder / "run", folder / "merged")
    return folder / "merged"


@pytest.fixture(scope="module")
def converted(merged) -> WhisperModel:
    """By CTranslate2's own converter."""
    out = merged.parent / "ct2"
    files = ["tokenizer.json", "preprocessor_config.json"]
    TransformersConverter(str(merged), copy_files=files).convert(str(out))
    return WhisperModel(str(out), device="cpu", compute_type="float32", cpu_threads=1)


def by_transformers(folder: Path, wave: np.ndarray, **options) -> str:
    """What transformers makes of a folder, by its own classes alone."""
    net = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    processor = WhisperProcessor.from_pretrained(folder)
    whole = {"truncation": False, "padding": "longest", "return_attention_mask": True}
    inputs = processor(wave, sampling_rate=16_000, return_tensors="pt", **whole)
    tokens = net.generate(**inputs, language="en", task="transcribe", **options)
    return processor.batch_decode(tokens, skip_special_tokens=True)[0]


def by_faster_whisper(model: WhisperModel, wave: np.ndarray, **options) -> str:
    """What faster-whisper makes of it; the tokens that it would suppress are not words here."""
    options |= {"beam_size": 1, "suppress_tokens": []}
    segments, _ = model.transcribe(wave, language="en", **options)
    return "".join(segment.text for segment in segments)


def test_a_merged_model_says_the_same_in_faster_whisper(merged, converted):
    for text, wave in SOUNDS.items():
        assert by_transformers(merged, wave) == " " + text
        assert by_faster_whisper(converted, wave, without_timestamps=True) == " " + text


def test_timestamps_take_both_through_more_than_a_window(merged, converted):
    long = np.concatenate([*SOUNDS.values(), SOUNDS["the red"]])
    text = " the red a bicycle the red"
    assert by_transformers(merged, long, return_timestamps=True) == text
    assert by_faster_whisper(converted, long, condition_on_previous_text=False) == text


def test_transcribe_says_in_its_time_what_faster_whisper_does(merged, converted):
    long = np.concatenate([*SOUNDS.values(), SOUNDS["the red"]])
    soundfile.write(merged.parent / "long.wav", long, 16_000, subtype="FLOAT")
    paths = [*(merged.parent / f"{text}.wav" for text in SOUNDS), merged.parent / "long.wav"]
    options = {"engine": "ctranslate2", "word_timestamps": True, "batch_size": 4}
    *short, found = transcribe(paths, merged.parent / "run", **options)
    assert [one.text for one in short] == [*SOUNDS]
    theirs, _ = converted.transcribe(
        *(long, "en"),
        **{"beam_size": 1, "suppress_tokens": [], "condition_on_previous_text": False},
        word_timestamps=True,
    )
    words = [(one.word.strip(), one.start, one.end) for part in theirs for one in part.words]
    ours = [(one.text, one.start, one.end) for part in found.segments for one in part.times]
    assert len(ours) == 6 and ours == words
    assert transcribe(paths[-1], base=str(merged), language="auto")[0].language in LANGUAGES


def test_the_merged_weights_are_not_those_of_the_base(base, merged):
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert len(changed) == 6 + 2 * 10  # every linear layer
    assert all("proj" in name or "fc" in name for name in changed)


def test_what_is_converted_knows_the_languages(converted):
    assert converted.model.is_multilingual
    assert converted.model.num_languages == 99


# ---- the page


def test_the_code_of_the_page_runs(base, merged, converted, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    for name, folder in (("runs/mine", "run"), ("merged", "merged"), ("merged-ct2", "ct2")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(merged.parent / folder)
    soundfile.write("talk.wav", SOUNDS["a bicycle"], 16_000)
    load_base("pocket").save_pretrained(tmp_path / "pocket")
    line = next(line for line in text.splitlines() if "ct2-transformers-converter" in line)
    monkeypatch.setattr(sys, "argv", line.replace("merged", "pocket").split())
    convert()
    scope: dict = {}
    greedy = 'language="en", beam_size=1, suppress_tokens=[]'  # see `by_faster_whisper`
    for block in blocks:
        block = block.replace("openai/whisper-small", str(base))
        exec(block.replace('language="en"', greedy), scope)
    printed = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in printed[:2]] == ["a bicycle", "a bicycle"]
    pocket = scope["pocket"]
    examples = load_examples(pocket, load_split("de-en", "test").select(range(4)), "test")
    expected = transcribe_features(pocket, examples.features, examples.prompts)
    assert [line.strip() for line in printed[2:]] == expected
