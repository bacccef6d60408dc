"""OpenAI's geometries: layers, heads, mel bins, positions and vocabularies, but paper-thin."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from blora_pyro import fit
from blora_pyro.adapters import find_targets, group_by_shape
from blora_pyro.data import language_codes, prompt_ids
from blora_pyro.errors import UserError
from blora_pyro.models import Base, load_base
from blora_pyro.options import FitConfig
from blora_pyro.runs.finished import transcribe
from blora_pyro.transcription import safeguards

HEAD_WIDTH = 2  # 64 in earnest


@dataclass(frozen=True)
class Size:
    """Layers of the encoder and of the decoder, attention heads, mel bins, size of vocabulary."""

    encoder: int
    decoder: int
    heads: int
    mels: int = 80
    vocabulary: int = 51865


SIZES = {
    "tiny": Size(4, 4, 6),
    "tiny.en": Size(4, 4, 6, vocabulary=51864),
    "base": Size(6, 6, 8),
    "small": Size(12, 12, 12),
    "medium.en": Size(24, 24, 16, vocabulary=51864),
    "large-v2": Size(32, 32, 20),
    "large-v3": Size(32, 32, 20, mels=128, vocabulary=51866),
    "large-v3-turbo": Size(32, 4, 20, mels=128, vocabulary=51866),
}
FITTED = ("tiny.en", "large-v3-turbo")


def make_net(size: Size) -> WhisperForConditionalGeneration:
    width = HEAD_WIDTH * size.heads
    end = 50256 if size.vocabulary == 51864 else 50257
    config = WhisperConfig(
        vocab_size=size.vocabulary,
        num_mel_bins=size.mels,
        d_model=width,
        encoder_layers=size.encoder,
        decoder_layers=size.decoder,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=end + 1,
    )
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(config).eval()


@pytest.fixture
def checkpoint(request, openai_tokenizer, tmp_path) -> Path:
    """A checkpoint of the size that `request.param` names, with two heads for the sake of time.

    Without a generation config, as fine-tuned ones often are.
    """
    size = replace(SIZES[request.param], heads=2)
    extractor = WhisperFeatureExtractor(feature_size=size.mels)
    folder = tmp_path / request.param
    Base(
        request.param, make_net(size), openai_tokenizer(size.vocabulary), extractor
    ).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("size", "language", "ids"),
    [
        (51864, "en", [50257, 50362]),  # English-only: neither language nor task
        (51865, "de", [50258, 50261, 50359, 50363]),
        (51866, "de", [50258, 50261, 50360, 50364]),
    ],
)
def test_prompts_have_openais_ids(openai_tokenizer, size, language, ids):
    assert prompt_ids(openai_tokenizer(size), language) == ids
    assert len(language_codes(openai_tokenizer(size))) == {51864: 0, 51865: 99, 51866: 100}[size]


def test_cantonese_is_a_language_of_the_third_version_alone(openai_tokenizer):
    assert prompt_ids(openai_tokenizer(51866), "yue-en") == [50258, 50358, 50259, 50360, 50364]
    with pytest.raises(UserError, match="'yue'"):
        prompt_ids(openai_tokenizer(51865), "yue")


@pytest.mark.parametrize("name", SIZES)
def test_all_linear_layers_are_targets_in_three_groups(name):
    size = SIZES[name]
    width, layers = HEAD_WIDTH * size.heads, size.encoder + size.decoder
    groups = group_by_shape(find_targets(make_net(size), "all-linear"), rank=2)
    assert {group.key: len(group.modules) for group in groups} == {
        f"{width}x{width}": 4 * size.encoder + 8 * size.decoder,
        f"{4 * width}x{width}": layers,
        f"{width}x{4 * width}": layers,
    }


@pytest.mark.parametrize("checkpoint", FITTED, indirect=True)
def test_every_size_is_fitted_and_transcribes(checkpoint, tones_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(safeguards, "TEMPERATURES", (0.0,))
    data = tones_folder / "en.jsonl"
    options = {"base": str(checkpoint), "data": str(data), "steps": 1, "batch_size": 1}
    run = fit(FitConfig(rank=1, lr=0.01, **options), tmp_path / "run")
    assert math.isfinite(run.history[0].loss)
    assert all(value.abs().max() > 0 for value in run.posterior.mean.values())  # B starts at 0
    settings = load_base(str(checkpoint)).net.generation_config
    settings.max_length = 8
    settings.save_pretrained(checkpoint)
    (transcript,) = transcribe([tones_folder / "en1.wav"], run.output)
    assert "<|" not in transcript.text
