import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from blora_pyro.errors import UserError
from blora_pyro.options import FitConfig
from blora_pyro.sources import as_domains, as_sources, describe_source, fleurs_sets, named_sources


def test_an_object_is_described_by_its_kind_and_fingerprint():
    rows = Dataset.from_dict({"audio": ["a"], "text": ["x"]})
    text = describe_source(DatasetDict(train=rows))
    assert text == f"<DatasetDict train: <Dataset of 1 rows, fingerprint {rows._fingerprint}>>"
    assert describe_source(IterableDataset.from_generator(lambda: iter([]))) == "<IterableDataset>"


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


def test_fleurs_is_named_by_languages():
    assert fleurs_sets("fleurs:de, fr,zh,es,pt_br,nb,Cantonese Chinese") == [
        "de=google/fleurs:de_de",
        "fr=google/fleurs:fr_fr",
        "zh=google/fleurs:cmn_hans_cn",
        "es=google/fleurs:es_419",
        "pt_br=google/fleurs:pt_br",
        "no=google/fleurs:nb_no",
        "yue=google/fleurs:yue_hant_hk",
    ]
    backward = FitConfig(backward=("fleurs:de,fr", "mine=x.csv")).backward
    assert backward == {"de": "google/fleurs:de_de", "fr": "google/fleurs:fr_fr", "mine": "x.csv"}
    with pytest.raises(UserError, match="'fleurs:la', and google/fleurs has no such language"):
        fleurs_sets("fleurs:la")
