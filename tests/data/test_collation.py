import numpy as np
import pytest
import torch

from blora_pyro.data import collation
from blora_pyro.data.audio import read_audio
from blora_pyro.data.collation import Batch, Examples
from blora_pyro.data.manifest import read_manifest
from blora_pyro.data.prompts import text_ids
from blora_pyro.errors import UserError

ROWS = [
    {"text": "das haus ist alt", "language": "de"},
    {"text": "das house", "language": "de-en", "word_languages": ["de", "en"]},
    {"text": "", "language": "en"},
]


@pytest.fixture
def dataset(speak, manifest):
    def build(rows, seconds=0.5):
        names = [speak(f"{i}.wav", seconds + i / 10).name for i in range(len(rows))]
        return read_manifest(
            manifest(*({"audio": a, **r} for a, r in zip(names, rows, strict=True)))
        )

    return build


@pytest.fixture
def examples(dataset, extractor, tokenizer):
    return Examples(dataset(ROWS), extractor, tokenizer)


def test_attributes(examples, tokenizer):
    assert len(examples) == 3
    assert examples.texts == ["das haus ist alt", "das house", ""]
    assert examples.languages == ["de", "de-en", "en"]
    assert examples.word_languages == [[], ["de", "en"], []]
    assert [len(prompt) for prompt in examples.prompts] == [4, 5, 4]
    lengths = [len(text_ids(tokenizer, text)) for text in examples.texts]
    assert examples.num_tokens == sum(lengths) + 3


def test_inputs_and_labels_are_shifted_and_masked(examples, tokenizer):
    names = ["startoftranscript", "de", "en", "transcribe", "notimestamps", "endoftext"]
    vocabulary = tokenizer.get_vocab()
    sot, de, en, task, plain, end = (vocabulary[f"<|{name}|>"] for name in names)
    long, short = text_ids(tokenizer, ROWS[0]["text"]), text_ids(tokenizer, ROWS[1]["text"])
    batch = examples.batch([2, 0, 1])
    width = max(4 + len(long), 5 + len(short))
    inputs = [
        [sot, en, task, plain],
        [sot, de, task, plain, *long],
        [sot, de, en, task, plain, *short],
    ]
    labels = [[-100] * 3 + [end], [-100] * 3 + [*long, end], [-100] * 4 + [*short, end]]
    assert batch.decoder_input_ids.tolist() == [r + [end] * (width - len(r)) for r in inputs]
    assert batch.labels.tolist() == [r + [-100] * (width - len(r)) for r in labels]
    assert batch.decoder_input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.num_tokens == examples.num_tokens == len(long) + len(short) + 3


def test_features_are_the_extractor_s(examples, extractor, dataset, monkeypatch, tokenizer):
    batch = examples.batch(range(3))
    assert batch.input_features.dtype == torch.float32
    assert batch.input_features.shape == (3, 80, 300)
    rows = dataset(ROWS)
    for row, features in zip(rows, batch.input_features, strict=True):
        wave = read_audio(row["audio"])
        expected = extractor(wave, sampling_rate=16_000, return_tensors="np")["input_features"][0]
        np.testing.assert_allclose(features.numpy(), expected, atol=2e-3)
    monkeypatch.setattr(collation, "CHUNK", 2)
    assert torch.equal(Examples(rows, extractor, tokenizer).features, examples.features)


def test_batch_to_device(examples):
    batch = examples.batch([0]).to("meta")
    tensors = (batch.input_features, batch.decoder_input_ids, batch.labels)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_batch_without_labels(examples):
    whole = examples.batch([0, 1])
    batch = Batch(whole.input_features, whole.decoder_input_ids, None).to("meta")
    assert batch.labels is None
    assert batch.num_tokens == whole.decoder_input_ids.numel()


def test_english_only(dataset, extractor, english_only):
    examples = Examples(dataset([{"text": "the house"}]), extractor, english_only)
    assert [len(prompt) for prompt in examples.prompts] == [2]


def test_audio_as_long_as_the_window_and_longer(dataset, extractor, tokenizer):
    assert len(Examples(dataset(ROWS[:1], seconds=3.0), extractor, tokenizer)) == 1
    with pytest.raises(UserError, match=r"1\.wav lasts 3\.10 s, but the model hears 3 s at a time"):
        Examples(dataset(ROWS, seconds=3.0), extractor, tokenizer)


def test_text_as_long_as_the_decoder_and_longer(dataset, extractor, tokenizer):
    length = 4 + len(text_ids(tokenizer, ROWS[0]["text"]))
    rows = [ROWS[2], ROWS[0]]
    batch = Examples(dataset(rows), extractor, tokenizer, max_tokens=length).batch([0, 1])
    assert batch.decoder_input_ids.shape == (2, length)
    with pytest.raises(UserError, match=rf"row 1 \('das haus .* {length} .* has {length - 1};"):
        Examples(dataset(rows), extractor, tokenizer, max_tokens=length - 1)


def test_unknown_language(dataset, extractor, tokenizer):
    with pytest.raises(UserError, match="'tr'; it knows de, en, es"):
        Examples(dataset([{"text": "x", "language": "tr"}]), extractor, tokenizer)
