import pytest

from blora_pyro.errors import UserError
from blora_pyro.options import FitConfig
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.scoring import evaluation_sets


def test_no_training_data_are_scored_as_a_dev_set(fluent_base, tones_folder):
    train, test = str(tones_folder / "train.jsonl"), str(tones_folder / "test.jsonl")
    german = {"de": str(tones_folder / "de.jsonl")}
    notes = []
    for options in ({}, {"test": test}):
        config = FitConfig(data=train, backward=german, **options)
        with pytest.raises(UserError, match="has no dev split; give a set that has one"):
            evaluation_sets(fluent_base, config, split="dev")
    config = FitConfig(data=train, dev=test, eval_every=1, backward=german)
    loader = Loader(fluent_base, config, on_note=notes.append)
    sets = evaluation_sets(fluent_base, config, loader, split="dev")
    assert sets["new_domain"].texts == ["das red", "ein bicycle"]
    assert notes == [
        f"{source} is one set without splits: the same for dev as for test"
        for source in (test, german["de"])
    ]
    with pytest.raises(UserError, match="split is 'train'; give test or dev"):
        evaluation_sets(fluent_base, config, split="train")
