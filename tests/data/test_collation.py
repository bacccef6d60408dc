from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.data.audio import read_audio
from blora_pyro.data.collation import Batch, Examples, batch_indices
from blora_pyro.data.features import trim
from blora_pyro.data.manifest import read_manifest
from blora_pyro.data.prompts import text_ids
from blora_pyro.data.rows import BadRow
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


def test_examples_have_the_values_of_their_rows(examples, tokenizer):
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


def test_features_are_those_of_the_extractor(examples, extractor, dataset):
    batch = examples.batch(range(3))
    assert batch.input_features.dtype == torch.float32
    assert batch.input_features.shape == (3, 80, 300)
    rows = dataset(ROWS)
    for row, features in zip(rows, batch.input_features, strict=True):
        wave = read_audio(row["audio"])
        expected = extractor(wave, sampling_rate=16_000, return_tensors="np")["input_features"][0]
        np.testing.assert_allclose(features.numpy(), expected, atol=2e-3)


def test_trimmed_batches_are_cut_after_their_longest_utterance(dataset, extractor, tokenizer):
    whole, cut = (Examples(dataset(ROWS), extractor, tokenizer, trim=one) for one in (False, True))
    for indices in ([0], [2], [0, 1, 2]):
        expected, found = (one.batch(indices).input_features for one in (whole, cut))
        assert torch.equal(found, trim(expected))
    assert cut.batch([0]).input_features.shape[-1] < cut.batch([0, 2]).input_features.shape[-1]
    assert torch.equal(cut.features[:], whole.features[:])


def test_a_batch_goes_to_a_device(examples):
    batch = examples.batch([0]).to("meta")
    tensors = (batch.input_features, batch.decoder_input_ids, batch.labels)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_every_position_of_a_batch_without_labels_counts(examples):
    whole = examples.batch([0, 1])
    batch = Batch(whole.input_features, whole.decoder_input_ids, None).to("meta")
    assert batch.labels is None
    assert batch.num_tokens == whole.decoder_input_ids.numel()


def test_an_english_only_model_has_neither_language_nor_task(dataset, extractor, english_only):
    examples = Examples(dataset([{"text": "the house"}]), extractor, english_only)
    assert [len(prompt) for prompt in examples.prompts] == [2]
    assert examples.languages == [one.code for one in examples.written] == ["en"]


def test_a_transcript_is_in_the_language_spoken_but_a_translation_in_english(
    dataset, extractor, tokenizer
):
    rows = dataset([{"text": "das haus", "language": "de_DE"}, ROWS[1]])
    heard, translated = (
        Examples(rows, extractor, tokenizer, task) for task in ("transcribe", "translate")
    )
    assert heard.languages == translated.languages == ["de", "de-en"]
    assert [one.tag for one in heard.written] == ["de-DE", "de-en"]
    assert [one.tag for one in translated.written] == ["en", "en"]


def test_text_longer_than_the_decoder_is_refused(dataset, extractor, tokenizer):
    length = 4 + len(text_ids(tokenizer, ROWS[0]["text"]))
    rows = [ROWS[2], ROWS[0]]
    batch = Examples(dataset(rows), extractor, tokenizer, max_tokens=length).batch([0, 1])
    assert batch.decoder_input_ids.shape == (2, length)
    with pytest.raises(
        UserError, match=rf"line 2: .*'das haus .* {length - 4} tokens.* for {length - 5}"
    ):
        Examples(dataset(rows), extractor, tokenizer, max_tokens=length - 1)


def test_a_language_unknown_to_the_tokenizer_is_refused(dataset, extractor, tokenizer):
    rows = [ROWS[0], *({"text": "x", "language": "tr"},) * 2]
    with pytest.raises(UserError, match=r"line 2: .*'tr'; it knows de, en, es"):
        Examples(dataset(rows), extractor, tokenizer)


def test_huge_text_is_refused_untokenised(dataset, extractor, tokenizer):
    with pytest.raises(UserError, match=r"line 2: the text .* has 5,000,000 characters, but"):
        Examples(dataset([ROWS[0], {**ROWS[0], "text": "x" * 5_000_000}]), extractor, tokenizer)


def test_a_segment_has_the_features_of_its_part(speak, manifest, extractor, tokenizer):
    rows = [{"audio": speak("long.wav", 10.0).name, "text": "x", "language": "de"}] * 3
    segments = [{"start": 1.0, "end": 3.5}, {"start": 9.0}, {"end": 2.0}]
    dataset = read_manifest(manifest(*({**r, **s} for r, s in zip(rows, segments, strict=True))))
    examples = Examples(dataset, extractor, tokenizer)
    assert examples.segments == [(1.0, 3.5), (9.0, None), (None, 2.0)]
    features = examples.features[:]
    speech = (features > features.amin(dim=(1, 2), keepdim=True)).any(1).sum(1)
    assert speech.tolist() == pytest.approx([250, 100, 200], abs=5)


@pytest.mark.parametrize(
    ("row", "gist"),
    [
        ({}, "lasts 10.00 s, but the model hears 3 s at a time; split it, or give start and end"),
        ({"audio": "noise.wav"}, "noise.wav as wav, flac, ogg, mp3, m4a"),
    ],
)
def test_bad_audio_is_named_by_file_and_row(
    speak, manifest, extractor, tokenizer, tmp_path, row, gist
):
    good = {"audio": speak("a.wav").name, "text": "x", "language": "de"}
    speak("long.wav", 10.0)
    (tmp_path / "noise.wav").write_bytes(bytes(range(256)))
    path = manifest(good, {**good, "audio": "long.wav", **row})
    with pytest.raises(UserError) as caught:
        Examples(read_manifest(path), extractor, tokenizer)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2: ") and gist in message


# ---- languages and tasks


def test_languages_are_normalised_and_those_that_are_missing_filled_in(
    dataset, extractor, tokenizer
):
    rows = [{"text": "x"}, {"text": "x", "language": "GERMAN"}, {"text": "x", "language": "en-DE"}]
    rows[2] = {**rows[2], "language": "English-German", "word_languages": ["English"]}
    examples = Examples(dataset(rows), extractor, tokenizer, "translate", language="Spanish")
    assert examples.languages == ["es", "de", "en-de"]
    assert examples.word_languages == [[], [], ["en"]]
    names = [tokenizer.convert_ids_to_tokens(prompt)[1:-2] for prompt in examples.prompts]
    assert names == [["<|es|>"], ["<|de|>"], ["<|en|>", "<|de|>"]]
    assert all("<|translate|>" in tokenizer.decode(prompt) for prompt in examples.prompts)
    with pytest.raises(UserError, match=r"line 1: no language given"):
        Examples(dataset(rows), extractor, tokenizer)


# ---- bad rows left out


@pytest.fixture
def mixed(dataset, tmp_path):
    """Good, of an unknown language, with bad audio, too long, good."""
    texts = [("a", "de"), ("b", "klingon"), ("c", "de"), ("d" * 90_000, "de"), ("e", "en")]
    rows = dataset([{"text": text, "language": language} for text, language in texts])
    (tmp_path / "2.wav").write_bytes(b"noise")
    return rows.add_column("source", [0, 0, 1, 1, 1])


def test_bad_rows_are_left_out_of_everything(mixed, extractor, tokenizer):
    bad: list[BadRow] = []
    examples = Examples(mixed, extractor, tokenizer, on_bad=bad.append)
    good = Examples(mixed.select([0, 4]), extractor, tokenizer)
    assert [error.origin[-6:] for error in bad] == ["line 2", "line 4", "line 3"]
    assert [error.source for error in bad] == [0, 1, 1]
    names = ("texts", "languages", "word_languages", "sources", "prompts", "targets", "origins")
    for name in (*names, "audio_paths", "num_tokens", "fingerprint"):
        assert getattr(examples, name) == getattr(good, name)
    assert examples.texts == ["a", "e"] and examples.sources == [0, 1]
    assert examples.batch([1, 0, 1]).sources.tolist() == [1, 0, 1]
    assert len(examples.source_languages) == 2
    assert [origin[-6:] for origin in examples.origins] == ["line 1", "line 5"]
    assert [path[-5:] for path in examples.audio_paths] == ["0.wav", "4.wav"]
    assert torch.equal(examples.features[:], good.features[:])
    with pytest.raises(BadRow, match="line 2: the tokenizer does not know"):
        Examples(mixed, extractor, tokenizer)


def test_a_source_with_nothing_but_bad_rows_is_refused(mixed, extractor, tokenizer):
    with pytest.raises(UserError, match=r"all rows are bad \(2\); the first: .*line 4: the text"):
        Examples(mixed.select([0, 2, 3]), extractor, tokenizer, on_bad=[].append)


def test_the_fingerprint_changes_with_the_data_alone(dataset, extractor, tokenizer, speak):
    def fingerprint(rows=ROWS, **options):
        return Examples(dataset(rows), extractor, tokenizer, **options).fingerprint

    known = fingerprint()
    assert fingerprint() == known
    assert fingerprint(ROWS[::-1]) != known
    assert fingerprint([{**ROWS[0], "text": "das haus"}, *ROWS[1:]]) != known
    assert fingerprint([{**ROWS[0], "language": "en"}, *ROWS[1:]]) != known
    assert fingerprint([{**ROWS[0], "end": 0.4}, *ROWS[1:]]) != known
    assert fingerprint(language_map={"qu": "en"}) == known
    assert fingerprint(language_map={"de": "en"}) != known
    rows = dataset(ROWS)
    speak("1.wav", 0.7)
    assert Examples(rows, extractor, tokenizer).fingerprint != known


# ---- the order of the rows


quick = settings(deadline=None, max_examples=50)
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def of_sizes(counts):
    """The source of every row, for sources of these sizes."""
    return [source for source, count in enumerate(counts) for _ in range(count)]


@quick
@given(sizes, st.integers(1, 12), st.integers(0, 99))
def test_without_weights_every_epoch_is_a_permutation(counts, batch_size, seed):
    rows = of_sizes(counts)
    stream = batch_indices(rows, batch_size, seed)
    for _ in range(2):
        epoch = list(islice(stream, -(-len(rows) // batch_size)))
        assert sorted(chain(*epoch)) == list(range(len(rows)))
        assert {len(batch) for batch in epoch[:-1]} <= {batch_size}


def test_without_weights_the_order_is_that_of_randperm():
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    assert next(batch_indices([0] * 10, 10, 3)) == order.tolist()


@quick
@given(sizes, st.integers(1, 12), st.integers(0, 99))
def test_with_weights_every_source_is_gone_through_in_permutations(counts, batch_size, seed):
    rows = of_sizes(counts)
    stream = batch_indices(rows, batch_size, seed, [1.0] * len(counts))
    drawn = list(chain(*islice(stream, 30)))
    for source, count in enumerate(counts):
        mine = [row for row in drawn if rows[row] == source]
        whole = [row for row, one in enumerate(rows) if one == source]
        for start in range(0, len(mine) - count + 1, count):
            assert sorted(mine[start : start + count]) == whole


def test_with_weights_sources_are_drawn_in_their_proportion():
    rows = of_sizes([2, 50])
    drawn = chain(*islice(batch_indices(rows, 10, 0, [3, 1]), 400))
    share = Counter(rows[row] for row in drawn)[0] / 4000
    assert share == pytest.approx(0.75, abs=0.03)  # four standard deviations


@pytest.mark.parametrize("weights", [None, [1, 2]])
def test_the_order_depends_on_the_seed_alone(weights):
    def order(seed):
        torch.rand(seed + 1)  # torch's own generator is not asked
        return list(islice(batch_indices(of_sizes([4, 5]), 2, seed, weights), 20))

    assert order(1) == order(1) != order(2)


def test_a_weighted_source_without_rows_is_refused():
    with pytest.raises(UserError, match="source 2 of data has no rows"):
        next(batch_indices([0, 0], 2, 0, [1, 1]))
