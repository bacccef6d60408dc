from dataclasses import replace

import pytest
import torch

from blora_pyro.data import Examples, read_manifest
from blora_pyro.runs.base_transcripts import kept_transcripts


@pytest.fixture
def examples(fluent_base, tones_folder):
    rows = read_manifest(tones_folder / "train.jsonl")
    return Examples(rows, fluent_base.feature_extractor, fluent_base.tokenizer)


def kept(base, examples):
    """Transcripts, and how often they were made."""
    calls = []

    def transcribe():
        calls.append(1)
        return ["a"] * len(examples)

    return kept_transcripts(base, examples, transcribe), len(calls)


def test_a_set_is_transcribed_once(fluent_base, examples):
    assert [kept(fluent_base, examples)[1] for _ in range(2)] == [1, 0]


def test_other_weights_settings_or_prompts_have_transcripts_of_their_own(fluent_base, examples):
    kept(fluent_base, examples)
    fluent_base.net.generation_config.suppress_tokens = [3]
    assert kept(fluent_base, examples)[1] == 1
    with torch.no_grad():
        fluent_base.net.proj_out.weight.mul_(2)
    assert kept(fluent_base, examples)[1] == 1
    examples.prompts[0] = examples.prompts[0][:-1]
    assert kept(fluent_base, examples)[1] == 1


@pytest.mark.parametrize("content", ["", "[]", '{"texts": ["a"]}', '{"texts": [1, 2, 3]}'])
def test_damaged_ones_are_made_again(fluent_base, examples, cache_dir, content):
    kept(fluent_base, examples)
    (file,) = (cache_dir / "transcripts").iterdir()
    file.write_text(content)
    assert kept(fluent_base, examples)[1] == 1


def test_without_a_cache_they_are_made_each_time(fluent_base, examples, monkeypatch):
    monkeypatch.setenv("BLORA_PYRO_CACHE", "")
    assert [kept(fluent_base, examples)[1] for _ in range(2)] == [1, 1]


def test_a_feature_extractor_with_chance_in_it_keeps_none(fluent_base, examples):
    fluent_base.feature_extractor.dither = 0.1
    base = replace(fluent_base)
    assert [kept(base, examples)[1] for _ in range(2)] == [1, 1]
