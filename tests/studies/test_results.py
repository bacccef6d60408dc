import json

import numpy as np
import pandas
import pytest

from blora_pyro.errors import UserError
from blora_pyro.metrics import Counts
from blora_pyro.studies.results import (
    ScoredFit,
    decode_counts,
    encode_counts,
    read_results,
    score_files,
    scored_run,
    write_results,
)


def counts(edits, lengths):
    return Counts(np.array(edits), np.array(lengths))


def scored(candidate="lora:0.003", split="test", seed=0, edits=(1, 0, 40), **more):
    sets = {
        "new_domain": {"mer": counts(edits, (4, 4, 2)), "pier": counts((1, 1), (2, 3))},
        "de": {"wer": counts((0, 1), (5, 5))},
        "en": {"wer": counts((3, 1), (5, 5))},
    }
    metrics = {"new_domain": "mer", "de": "wer", "en": "wer"}
    names = ("pocket", "150x200", candidate.split(":")[0], candidate, "zh-en", seed, split)
    about = {
        "sparsity": {"A": 0.25, "B": None, "delta_w": 0.5},
        "weights": 10,
        "loops": 3,
        "bytes": 400,
        "seconds": 1.5,
        "command": "blora-pyro fit --data zh-en",
        "machine": 'x86, "two" cpus',
    }
    return ScoredFit(*names, metrics, sets, **{**about, **more})


def test_counts_are_a_character_an_utterance():
    assert encode_counts([0, 9, 10, 35, 36, 120]) == "09az(36)(120)"
    assert decode_counts("09az(36)(120)").tolist() == [0, 9, 10, 35, 36, 120]
    assert decode_counts("").tolist() == []


def test_errors_are_pooled_over_a_set_and_averaged_over_the_backward_sets():
    one = scored(edits=(1, 0, 4))
    assert one.new_domain_error == 5 / 10
    assert one.backward_error == pytest.approx((1 / 10 + 4 / 10) / 2)
    assert one.balanced_error == pytest.approx((0.5 + 0.25) / 2)
    assert scored(failed="the loss is nan").balanced_error == float("inf")


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "results.csv"
    rows = [scored(seed=seed, split=split) for seed in (0, 1) for split in ("dev", "test")]
    failed = ScoredFit(*("pocket", "150x200", "lora", "lora:0.1", "zh-en", 0, "test"), failed="nan")
    write_results(path, [*rows, failed])
    found = {one.key: one for one in read_results(path)}
    assert found.keys() == {one.key for one in [*rows, failed]}
    for one in [*rows, failed]:
        assert found[one.key].to_row() == one.to_row()
    assert found[rows[0].key].main("new_domain").edits.tolist() == [1, 0, 40]


def test_the_order_of_rows_is_that_of_their_names_and_lengths_stand_there_once(tmp_path):
    rows = [scored("lora:0.003"), scored("lora:0.0005"), scored("blora:1e-05"), scored(seed=2)]
    for name, order in (("one.csv", rows), ("two.csv", rows[::-1])):
        write_results(tmp_path / name, order)
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "two.csv").read_text()
    frame = pandas.read_csv(tmp_path / "one.csv", dtype=str, keep_default_na=False)
    assert frame["candidate"].tolist() == ["blora:1e-05", "lora:0.0005", "lora:0.003", "lora:0.003"]
    assert frame["lengths.new_domain"].tolist() == ["442", "", "", ""]
    assert frame["edits.new_domain"].tolist() == ["mer:10(40)"] * 4
    assert frame["lengths.new_domain.pier"].tolist() == ["23", "", "", ""]
    assert frame["backward"].tolist() == ["0.250000"] * 4


def test_of_one_fit_scored_twice_the_last_row_counts(tmp_path):
    write_results(tmp_path / "results.csv", [scored(), scored(edits=(0, 0, 0))])
    (one,) = read_results(tmp_path / "results.csv")
    assert one.new_domain_error == 0


def test_the_base_model_has_neither_setting_nor_seed():
    first, second = (ScoredFit("b", name, "base", "base", "de", 0, "dev") for name in "xy")
    assert first.key == second.key


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mer:10(40)", "mer:10"),
        ("mer:10(40)", "mer:1?0"),
        ("candidate", "nobody"),
        (",0,test", ",,x"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path, old, new):
    path = tmp_path / "results.csv"
    write_results(path, [scored()])
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=r"results.csv, line 2: no table of results") as error:
        read_results(path)
    assert "\n" not in str(error.value)


def test_no_table_holds_nothing(tmp_path):
    assert read_results(tmp_path / "results.csv") == []


def test_a_run_folder_is_read_by_the_files_of_its_split(tmp_path):
    assert [path.name for path in score_files(tmp_path)] == ["metrics.json", "utterances.jsonl"]
    files = score_files(tmp_path, "dev", "strength 0.5")
    names = ["metrics-dev-strength-0.5.json", "utterances-dev-strength-0.5.jsonl"]
    assert [path.name for path in files] == names
    files[0].write_text(json.dumps({"sparsity": {"A": 0.5}}))
    texts = {"origin": "rows.jsonl:1", "audio": None, "reference": "ja", "hypothesis": "ja"}
    base = {**texts, "set": "new_domain", "state": "base", "metric": "wer", "alignment": []}
    base |= {"edits": 9, "length": 9, "rate": 1.0}
    rows = [base, {**base, "state": "adapted", "edits": 1, "pier": {"edits": 1, "length": 2}}]
    rows.append({**rows[1], "set": "de", "metric": "cer", "edits": 0})
    rows[2]["raw"] = {"hypothesis": "Ja, " * 40}
    files[1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ("pocket", "all", "lora", "lora:0.5", "mix", 0, "dev")
    one = scored_run(ScoredFit(*names, after="strength 0.5"), tmp_path)
    assert (one.metrics, one.sparsity) == ({"new_domain": "wer", "de": "cer"}, {"A": 0.5})
    assert (one.new_domain_error, one.backward_error) == (1 / 9, 0)
    assert one.loops == 1
    assert one.counts["new_domain"]["pier"].lengths.tolist() == [2]
    with pytest.raises(UserError, match="utterances"):
        scored_run(ScoredFit(*names), tmp_path)
