import itertools
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from blora_pyro.data import Examples, Stream, load_split, stream_split, streaming
from blora_pyro.errors import UserError

quick = settings(deadline=None, max_examples=10)
START = streaming.START
TEXTS = [f"das haus ist {number}" for number in range(18)]


def row(number):
    wave = np.sin(np.arange(1600) * (number + 1) / 50).astype(np.float32)
    return {"audio": {"array": wave, "sampling_rate": 16_000}, "text": TEXTS[number]}


def shards(numbers):
    """Rows of each of the shards, which are uneven."""
    for number in numbers:
        yield from map(row, range(number * 4, min(number * 4 + 4, len(TEXTS))))


def source(count=5):
    return IterableDataset.from_generator(shards, gen_kwargs={"numbers": list(range(count))})


@pytest.fixture(autouse=True, scope="module")
def small_sample():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "SAMPLE", 2)
        yield


@pytest.fixture(scope="module")
def extractor():
    return WhisperFeatureExtractor(feature_size=8, chunk_length=1)


@pytest.fixture(scope="module")
def stream(extractor, tokenizer):
    def build(data=None, **options):
        rows = stream_split(source() if data is None else data, "train")
        return Stream(rows, extractor, tokenizer, **{"language": "de", **options})

    return build


@pytest.fixture(scope="module")
def records(stream):
    """Texts of the raw rows of a stream, endless, and the places behind them."""

    def build(place, rank=0, count=1, **options):
        built = stream(**options)
        return ((one["text"], at) for one, at in built._records(place or START, rank, count))

    return build


def an_epoch(rows, epoch=0):
    """Texts of an epoch."""
    rows = itertools.dropwhile(lambda row: row[1]["epoch"] < epoch, rows)
    return [text for text, _ in itertools.takewhile(lambda row: row[1]["epoch"] == epoch, rows)]


# ---- the order of rows


@pytest.mark.parametrize("buffer", [1, 4, 7, 100])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_has_every_row_once(records, buffer, epoch):
    texts = an_epoch(records(None, buffer=buffer), epoch)
    assert sorted(texts) == sorted(TEXTS)
    assert texts != TEXTS


@pytest.mark.parametrize("count", [2, 3, 5])  # 5 shards: rows, rows, and shards are shared out
def test_processes_have_every_row_once_together(records, count):
    parts = [an_epoch(records(None, rank, count, buffer=4), 1) for rank in range(count)]
    assert sorted(itertools.chain(*parts)) == sorted(TEXTS)
    if count == 5:  # everyone has a shard of its own
        assert sorted(map(len, parts)) == [2, 4, 4, 4, 4]


def test_seeds_and_epochs_differ_in_their_order(records):
    orders = [an_epoch(records(None, seed=seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert an_epoch(records(None, seed=1), 1) == orders[3]


@quick
@given(st.sampled_from([1, 4, 7]), st.sampled_from([(0, 1), (1, 2), (4, 5)]), st.integers(0, 45))
def test_the_order_can_be_entered_anywhere(records, buffer, who, start):
    whole = list(itertools.islice(records(None, *who, buffer=buffer), start + 10))
    place = json.loads(json.dumps(whole[start][1]))
    rest = itertools.islice(records(place, *who, buffer=buffer), 9)
    assert [text for text, _ in rest] == [text for text, _ in whole[start + 1 :]]


def test_no_more_than_the_buffer_is_read_ahead(stream):
    read = []

    def watched():
        for number in range(len(TEXTS)):
            read.append(number)
            yield row(number)

    drawn = stream(IterableDataset.from_generator(watched), buffer=4)._records(START, 0, 1)
    read.clear()
    for taken in range(1, 10):
        next(drawn)
        assert len(read) <= 4 * -(-taken // 4)


# ---- batches


def test_batches_are_those_of_examples(stream, extractor, tokenizer):
    built = stream(buffer=4)
    examples = Examples(load_split(source(), "train"), extractor, tokenizer, language="de")
    order = [
        TEXTS.index(text)
        for text in an_epoch((r["text"], p) for r, p in built._records(START, 0, 1))
    ]
    batches = built.batches(6)
    for first in (0, 6, 12):
        batch, expected = next(batches)[0], examples.batch(order[first : first + 6])
        assert torch.equal(batch.input_features, expected.input_features)
        assert torch.equal(batch.decoder_input_ids, expected.decoder_input_ids)
        assert torch.equal(batch.labels, expected.labels)
    batches.close()
    assert built.main_language == "de" and len(built.sample) == 2
    assert torch.equal(built.batch([1]).labels, examples.batch([1]).labels)


def test_batches_go_on_from_their_positions(stream):
    whole = stream(buffer=4).batches(5)
    seen = [next(whole) for _ in range(8)]  # into the third epoch
    whole.close()
    rest = stream(buffer=4).batches(5, json.loads(json.dumps(seen[3][1])))
    for batch, place in seen[3:]:
        again, at = next(rest)
        assert torch.equal(again.input_features, batch.input_features)
        assert at == place
    rest.close()


def test_every_process_draws_its_part_of_a_batch(stream):
    sizes = []
    for rank in range(3):
        drawn = stream().batches(7, None, rank, 3)
        sizes.append(len(next(drawn)[0].labels))
        drawn.close()
    assert sizes == [3, 2, 2]
    with pytest.raises(UserError, match="a batch has 2 utterances for 3 processes; give a batch_"):
        next(stream().batches(2, None, 2, 3))


# ---- bad rows


def spoilt(bad, number=18):
    """Rows of which some have no audio, and one a language that nobody speaks."""
    rows = [{**row(one), "language": "de"} for one in range(number)]
    for one in bad:
        rows[one] |= {"language": "xx"} if one % 2 else {"audio": {"path": "no.wav"}}
    return IterableDataset.from_generator(lambda: iter(rows))


def test_bad_rows_are_left_out_and_reported(stream):
    told = []
    drawn = stream(spoilt([3, 16]), buffer=1, on_bad=told.append).batches(8)
    batches = [next(drawn)[0] for _ in range(4)]
    drawn.close()
    assert [len(batch.labels) for batch in batches] == [8] * 4  # filled up
    assert {error.origin for error in told} == {
        "the data set, the row with 'das haus ist 3'",
        "the data set, the row with 'no.wav'",
    }
    assert "does not know the language 'xx'" in told[0].reason


def test_the_first_bad_row_stops(stream):
    with pytest.raises(UserError, match="the row with 'das haus ist 1': the tokenizer does not"):
        stream(spoilt([1]))
    drawn = stream(spoilt([16]), buffer=1).batches(8)
    with pytest.raises(UserError, match=r"the row with 'no\.wav'.* 'no\.wav' does not exist"):
        for _ in range(3):
            next(drawn)


def test_what_has_no_good_rows_is_refused(stream):
    with pytest.raises(UserError, match=r"all rows are bad \(4\); the first: the data set, the"):
        stream(spoilt(range(4), 4), on_bad=lambda error: None)
    with pytest.raises(UserError, match=r"^the data set has no rows"):
        stream(IterableDataset.from_generator(lambda: iter(())))
    with pytest.raises(UserError, match="process 2 of 2: its part of the data set has no rows"):
        next(stream(spoilt([], 1)).batches(2, None, 1, 2))
    bad = stream(spoilt([1], 2), on_bad=lambda error: None)
    with pytest.raises(UserError, match="process 2 of 2: its part of the data set has nothing but"):
        next(bad.batches(2, None, 1, 2))


def test_a_stream_that_breaks_says_why(stream):
    def breaking():
        yield from map(row, range(3))
        raise OSError("the network is gone")

    drawn = stream(IterableDataset.from_generator(breaking)).batches(2)
    with pytest.raises(UserError, match="the data set cannot be read on: the network is gone"):
        next(drawn)


# ---- sources


def texts_of(source, split="train"):
    rows = stream_split(source, split)
    return [rows.parse(record)["text"] for record in rows.records]


def test_a_manifest_is_a_stream(manifest, speak):
    name = str(speak("a.wav"))
    path = manifest({"audio": name, "text": "eins"}, "?", {"audio": name, "text": "zwei"})
    rows = stream_split(path, "train")
    one, bad, two = rows.records
    assert rows.parse(one)["text"] == "eins" and rows.parse(two)["origin"].endswith("line 3")
    with pytest.raises(UserError, match=r"train.jsonl, line 2: not JSON: '\?'"):
        rows.parse(bad)
    assert texts_of(manifest({"audio": name, "text": "eins"}).parent) == ["eins"]


def test_tables_are_streams_in_shards(tmp_path):
    table = Dataset.from_list([row(number) | {"more": 1} for number in range(9)])
    table.save_to_disk(tmp_path / "saved")
    for part in range(2):
        table.shard(2, part).to_parquet(tmp_path / "files" / f"train-{part:05d}-of-00002.parquet")
    for data, count in ((table, 9), (tmp_path / "saved", 9), (tmp_path / "files", 2)):
        assert sorted(texts_of(data)) == TEXTS[:9]
        records = stream_split(data, "train").records
        assert records.num_shards == count
        assert "more" not in records.column_names
    with pytest.raises(UserError, match="the columns of the data set: no audio"):
        stream_split(Dataset.from_dict({"text": ["x"]}), "train")


def test_the_hub_is_streamed(monkeypatch):
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return source()

    monkeypatch.setattr("blora_pyro.data.hf_datasets.load_dataset", load_dataset)
    assert texts_of("owner/name:config") == TEXTS
    assert asked == [(("owner/name", "config"), {"split": "train", "streaming": True})]
