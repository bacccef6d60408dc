"""A Whisper small enough for unit tests: real class, real tokenizer, random weights.

Nothing heavy is imported before a fixture needs it: the process that hands the tests out to workers
loads this file, too, and they wait for it.
"""

from __future__ import annotations

import json
import os
import runpy
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperTokenizer

    from blora_pyro.data import Batch
    from blora_pyro.models import Base
    from blora_pyro.posterior import Posterior
    from blora_pyro.runs.fits import Run

# Fixtures of a session and pages of the docs keep out of the user's home, and share
# what they have computed, in all workers.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="blora-pyro-tests-")
    os.environ["BLORA_PYRO_CACHE"] = _cache.name

SPECIAL = ("startoftranscript", "en", "de", "translate", "transcribe", "notimestamps")


@pytest.fixture(autouse=True)
def clean_slate():
    """One thread, a fixed seed and an empty parameter store for every test."""
    import pyro
    import torch

    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.fixture(scope="session", autouse=True)
def without_bfloat16_units():
    """Fits of bases other than the pocket are in float32, whatever machine runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blora_pyro.models.base.has_bfloat16_units", lambda device: False)
        yield


@pytest.fixture(autouse=True)
def cache_dir(monkeypatch, tmp_path_factory) -> Path:
    """A cache of its own for every test, made when it is written to."""
    folder = tmp_path_factory.getbasetemp() / "caches" / secrets.token_hex(4)
    monkeypatch.setenv("BLORA_PYRO_CACHE", str(folder))
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Any]:
    """A stand-in for the Hub, of class `Hub` there, in whose place huggingface_hub has it."""
    stand_in = runpy.run_path(str(Path(__file__).parent / "hub_stand_in.py"))
    with stand_in["serving"](tmp_path / "hub-cache", monkeypatch) as hub:
        yield hub


def make_tokenizer(special: tuple[str, ...]) -> WhisperTokenizer:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import WhisperTokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([" the red bicycle", " das rote fahrrad"] * 5, vocab_size=280)
    vocab = bpe.get_vocab()
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[])
    names = [f"<|{name}|>" for name in special]
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>", "additional_special_tokens": names})
    return tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer() -> WhisperTokenizer:
    return make_tokenizer(SPECIAL)


def make_openai_tokenizer(size: int) -> WhisperTokenizer:
    """OpenAI's ids for special tokens and timestamps; in place of words, letters and fillers."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import WhisperTokenizer
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    words = 50256 if size == 51864 else 50257
    letters = ByteLevel.alphabet()
    vocab = {letter: i for i, letter in enumerate(sorted(letters))}
    vocab |= {f"filler{i}": i for i in range(len(vocab), 50256)}
    vocab |= {"": 50256} if words == 50257 else {}  # by which CTranslate2 tells multilingual ones
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[])
    languages = [code for code in LANGUAGES if code != "yue"] + ["yue"] * (size == 51866)
    tasks = ["translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
    names = ["endoftext", "startoftranscript", *languages, *tasks]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    tokenizer.add_tokens([f"<|{0.02 * i:.2f}|>" for i in range(1501)])
    assert len(tokenizer) == size
    return tokenizer


@pytest.fixture(scope="session")
def openai_tokenizer() -> Callable[[int], WhisperTokenizer]:
    """Of a vocabulary of 51864 (English-only), 51865 (multilingual) or 51866 (with Cantonese)."""
    return cache(make_openai_tokenizer)


def make_net(tokenizer: WhisperTokenizer) -> WhisperForConditionalGeneration:
    """Two layers each of width 16, a window of half a second."""
    import torch
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

    end, start = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|startoftranscript|>"])
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=50,
        max_target_positions=24,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        init_std=0.2,
    )
    torch.manual_seed(1)
    net = WhisperForConditionalGeneration(config).eval()
    ids = tokenizer.convert_tokens_to_ids
    net.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        max_length=24,
        is_multilingual=True,
        lang_to_id={"<|en|>": ids("<|en|>"), "<|de|>": ids("<|de|>")},
        task_to_id={"transcribe": ids("<|transcribe|>")},
        no_timestamps_token_id=ids("<|notimestamps|>"),
        return_timestamps=False,
    )
    return net


def make_base(name: str, net: WhisperForConditionalGeneration, tokenizer: WhisperTokenizer) -> Base:
    from transformers import WhisperFeatureExtractor

    from blora_pyro.models import Base

    return Base(name, net, tokenizer, WhisperFeatureExtractor(feature_size=8, chunk_length=1))


@pytest.fixture
def net(tiny_tokenizer) -> WhisperForConditionalGeneration:
    return make_net(tiny_tokenizer)


def inform(prior: Any, groups: Iterable[Any], seed: int = 0) -> Any:
    """Return a prior of layers, with statistics of random inputs if it needs some."""
    import torch

    from blora_pyro.guides.contracts import PreparedPrior
    from blora_pyro.models.second_moments import leading_eigenvectors

    if isinstance(prior, PreparedPrior):
        draws, tensors = torch.Generator().manual_seed(seed), {}
        for group in groups:
            for name in group.modules:
                n = group.in_features
                x = torch.randn(3 * n, n, generator=draws) @ torch.randn(n, n, generator=draws)
                found = leading_eigenvectors(x.mT @ x, max(1, n // 2))
                tensors |= {f"{name}.{what}": one for what, one in found.items()}
        prior.tensors = tensors
    return prior


@pytest.fixture
def random_posterior(net) -> Callable[..., Posterior]:
    """Makes posteriors of `net` that nothing was fitted to, under a Normal prior."""
    import torch

    from blora_pyro.adapters import find_targets, group_by_shape
    from blora_pyro.posterior import Family, Posterior

    def make(seed, rank=4, alpha=6.0, targets="all-linear", spread=0.1) -> Posterior:
        groups = group_by_shape(find_targets(net, targets), rank)
        generator = torch.Generator().manual_seed(seed)
        mean, stddev = {}, {}
        for site in (site for group in groups for site in group.sites):
            mean[site.name] = 0.3 * torch.randn(site.shape, generator=generator)
            stddev[site.name] = spread * (0.2 + torch.rand(site.shape, generator=generator))
        return Posterior("tiny", groups, alpha, mean, stddev, Family("normal", {"scale": 0.5}))

    return make


@pytest.fixture
def tiny_base(net, tiny_tokenizer) -> Base:
    return make_base("tiny", net, tiny_tokenizer)


@pytest.fixture(scope="session")
def timed_tokenizer() -> WhisperTokenizer:
    """With a token for no speech, and timestamps for a window of one second."""
    tokenizer = make_tokenizer((*SPECIAL[:-1], "nospeech", "notimestamps"))
    tokenizer.add_tokens([f"<|{place / 50:.2f}|>" for place in range(51)])
    return tokenizer


@pytest.fixture
def timed_base(timed_tokenizer) -> Base:
    """As `tiny_base`, with timestamps, and so wild that it speaks in pieces of all kinds."""
    import torch

    net = make_net(timed_tokenizer)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return make_base("timed", net, timed_tokenizer)


@pytest.fixture
def batch(net) -> Batch:
    """Three utterances of six positions, of which the first two are prompt."""
    import torch

    from blora_pyro.data import IGNORED, Batch

    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.standard_normal((3, 8, 100)).astype(np.float32))
    tokens = torch.from_numpy(rng.integers(0, net.config.vocab_size, (3, 7)))
    labels = tokens[:, 1:].clone()
    labels[:, :2] = IGNORED
    labels[2, 4:] = IGNORED
    return Batch(features, tokens[:, :-1], labels)


# A pocket-sized world for whole runs: tones are the speech, and a net that has learned four of them
# by heart is the base.
TONES = (
    ("the red", "en"),
    ("a bicycle", "en"),
    ("das rote", "de"),
    ("ein rad", "de"),
    ("das red", "de-en"),
    ("ein bicycle", "de-en"),
)


def tone(pitch: int, noise: int = 0) -> np.ndarray:
    """Half a second of the tone of one text of `TONES`; `noise` seeds what is laid over it."""
    wave = 0.3 * np.sin(2 * np.pi * 300 * (pitch + 1) * np.arange(8000) / 16_000)
    return (wave + 0.02 * np.random.default_rng(noise).standard_normal(8000)).astype(np.float32)


def write_manifest(path: Path, pitches: tuple[int, ...], noise: int) -> Path:
    """A manifest of these tones, and their wav files beside it."""
    import soundfile

    lines = []
    for pitch in pitches:
        text, language = TONES[pitch]
        wav = f"{path.stem}{pitch}.wav"
        soundfile.write(path.parent / wav, tone(pitch, noise), 16_000)
        codes = language.split("-")
        row = {"audio": wav, "text": text, "language": language}
        lines.append(json.dumps({**row, "word_languages": [codes[0], codes[-1]]}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tones_folder(tmp_path_factory) -> Path:
    """`train.jsonl` and `test.jsonl` are code-switched, `de.jsonl` and `en.jsonl` are not."""
    folder = tmp_path_factory.mktemp("tones")
    write_manifest(folder / "train.jsonl", (4, 5), noise=1)
    write_manifest(folder / "test.jsonl", (4, 5), noise=2)
    write_manifest(folder / "de.jsonl", (2, 3), noise=3)
    write_manifest(folder / "en.jsonl", (0, 1), noise=4)
    return folder


@pytest.fixture(scope="session")
def fluent_folder(tmp_path_factory, tiny_tokenizer) -> Path:
    """A checkpoint that transcribes the four monolingual tones, and knows their languages."""
    folder = tmp_path_factory.mktemp("fluent")
    write_manifest(folder / "tones.jsonl", (0, 1, 2, 3), noise=0)
    return taught(folder, tiny_tokenizer)


@pytest.fixture(scope="session")
def polyglot_folder(tmp_path_factory) -> Path:
    """Likewise, and the mixed tones are Spanish to it; its slot for French was never trained."""
    folder = tmp_path_factory.mktemp("polyglot")
    file = write_manifest(folder / "tones.jsonl", (0, 1, 2, 3, 4, 5), noise=0)
    text = file.read_text(encoding="utf-8").replace('"de-en"', '"es"')
    file.write_text(text, encoding="utf-8")
    return taught(folder, make_tokenizer((*SPECIAL, "es", "fr")))


def taught(folder: Path, tokenizer: WhisperTokenizer) -> Path:
    """Return the folder of a checkpoint that has learned the rows of `tones.jsonl`."""
    import torch

    from blora_pyro.data import Examples, read_manifest

    torch.set_num_threads(1)
    net = make_net(tokenizer)
    base = make_base("fluent", net, tokenizer)
    examples = Examples(read_manifest(folder / "tones.jsonl"), base.feature_extractor, tokenizer)
    batch = examples.batch(range(len(examples)))
    labels = batch.labels.clone()
    labels[:, 0] = batch.decoder_input_ids[:, 1]  # the language, for its detection
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(100):
        logits = net(
            input_features=batch.input_features,
            decoder_input_ids=batch.decoder_input_ids,
            use_cache=False,
        ).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    base.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture
def fluent_base(fluent_folder) -> Base:
    from blora_pyro.models import load_base

    return load_base(str(fluent_folder))


@pytest.fixture(scope="session")
def fit_options(fluent_folder, tones_folder) -> dict[str, Any]:
    """Options of a fit of a second or less that changes what the base transcribes."""
    return {
        "base": str(fluent_folder),
        "data": str(tones_folder),
        "backward": (str(tones_folder / "de.jsonl"), str(tones_folder / "en.jsonl")),
        "beta": 1e-5,
        "rank": 4,
        "target_modules": "all-linear",
        "steps": 40,
        "lr": 0.03,
        "batch_size": 2,
    }


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, fit_options) -> Run:
    """A run of `fit_options` with its folder. Read it, and leave it as it is."""
    import torch

    from blora_pyro.options import FitConfig
    from blora_pyro.runs.fits import fit

    torch.set_num_threads(1)
    return fit(FitConfig(**fit_options), tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture
def two_temperatures(monkeypatch):
    """Greedy, and else the wildest of the samples, without those between."""
    from blora_pyro.transcription import safeguards

    monkeypatch.setattr(safeguards, "TEMPERATURES", (0.0, 1.0))
