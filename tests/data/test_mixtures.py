from collections import Counter
from itertools import chain, islice

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from blora_pyro.data import load_split
from blora_pyro.data.mixtures import batch_indices, load_mixture
from blora_pyro.data.rows import BadRow
from blora_pyro.data.sources import split_names
from blora_pyro.errors import UserError
from blora_pyro.sources import as_domains, as_sources, describe_source, named_sources

quick = settings(deadline=None, max_examples=50)
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def of_sizes(counts):
    """The source of every row, for sources of these sizes."""
    return [source for source, count in enumerate(counts) for _ in range(count)]


# ---- the order of the rows


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


# ---- rows and names


def test_rows_know_their_source(manifest, speak):
    row = {"audio": str(speak("a.wav")), "text": "x"}
    one = manifest(row, {**row, "text": "y"}, name="one.jsonl")
    two = manifest({**row, "text": "z", "word_languages": ["de"]}, name="two.jsonl")
    mixed = load_mixture((one, str(two)), "train")
    assert mixed["text"][:] == ["x", "y", "z"]
    assert mixed["source"][:] == [0, 0, 1]
    assert mixed["word_languages"][:] == [[], [], ["de"]]


def test_manifests_and_tables_mix(manifest, speak):
    path = str(speak("a.wav"))
    lines = manifest({"audio": path, "text": "x"})
    table = Dataset.from_dict({"file_name": [path], "sentence": ["y"]})
    stream = IterableDataset.from_generator(lambda: iter([{"audio": path, "text": "z"}]))
    mixed = load_mixture((lines, table, stream), "train")
    assert mixed["text"][:] == ["x", "y", "z"]
    assert [row["audio"]["path"] for row in mixed] == [path] * 3


def test_one_source_or_several():
    rows = Dataset.from_dict({"audio": ["a"], "text": ["x"]})
    assert as_sources("a") == ("a",)
    assert as_sources(rows) == (rows,)
    assert as_sources(DatasetDict(train=rows)) == (DatasetDict(train=rows),)
    assert as_sources(["a", rows]) == ("a", rows)


def test_names_of_sets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert named_sources(["de", "mine=x=1.csv", "a=b"]) == {
        "de": "de",
        "mine": "x=1.csv",
        "a=b": "a=b",
    }
    with pytest.raises(UserError, match="two sets are called 'x'; name them apart"):
        named_sources(["x=a", "x=b"])


def test_objects_are_described_and_their_description_is_no_source():
    rows = Dataset.from_dict({"audio": ["a"], "text": ["x"]})
    text = describe_source(DatasetDict(train=rows))
    assert text == f"<DatasetDict train: <Dataset of 1 rows, fingerprint {rows._fingerprint}>>"
    assert describe_source(IterableDataset.from_generator(lambda: iter([]))) == "<IterableDataset>"
    for use in (split_names, lambda source: load_split(source, "train")):
        with pytest.raises(UserError, match=r"were an object from Python, <DatasetDict .*again"):
            use(text)


def test_bad_rows_know_their_source_and_all_bad_is_refused(manifest, speak):
    good = {"audio": str(speak("a.wav")), "text": "x"}
    one = manifest(good, "?", name="one.jsonl")
    two = manifest({"text": "y"}, good, good, name="two.jsonl")
    bad: list[BadRow] = []
    mixed = load_mixture((one, two), "train", bad.append)
    assert mixed["source"][:] == [0, 1, 1]
    assert [(error.source, error.origin[-6:]) for error in bad] == [(0, "line 2"), (1, "line 1")]
    worst = manifest("?", "!", name="worst.jsonl")
    with pytest.raises(UserError, match=r"worst.jsonl, train: all rows are bad \(2\).*line 1: not"):
        load_mixture((one, worst), "train", bad.append)


def test_a_limit_draws_rows_of_the_first_source_by_the_seed():
    one, two = (
        Dataset.from_dict(
            {
                "audio": [{"array": [0.0], "sampling_rate": 8000}] * 20,
                "text": [f"{name}{number:02}" for number in range(20)],
                "language": ["de"] * 20,
            }
        )
        for name in "ab"
    )
    draws = [load_mixture((one, two), "train", limit=5, seed=seed)["text"][:] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for texts in draws:
        assert [text[0] for text in texts] == ["a"] * 5 + ["b"] * 20
        assert texts[:5] == sorted(set(texts[:5]))
    assert len(load_mixture(one, "train", limit=30)) == 20


def test_sources_have_names_where_one_is_given_some(tmp_path):
    assert as_domains("de-en") == ("de-en",)
    assert as_domains(("de-en", "es-en")) == ("de-en", "es-en")
    assert as_domains(("a=de-en", "es-en")) == {"a": "de-en", "es-en": "es-en"}
    assert as_domains({"a": "de-en"}) == {"a": "de-en"}
    assert as_sources({"a": "de-en", "b": "es-en"}) == ("de-en", "es-en")
    path = tmp_path / "a=b.csv"
    path.touch()
    assert as_domains(str(path)) == (str(path),)


def test_a_data_set_of_several_splits_is_one_source():
    splits = DatasetDict(train=Dataset.from_dict({"text": ["a"]}))
    assert as_sources(splits) == (splits,)
    assert as_domains(splits) == (splits,)
