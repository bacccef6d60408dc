import json
import subprocess
import sys

import numpy as np
import pytest

from blora_pyro.comparison.candidates import read_candidate
from blora_pyro.comparison.methods import read_setting
from blora_pyro.comparison.rows import (
    TEST,
    RowSpec,
    RowStore,
    counts_to_json,
    hash_of,
    read_row,
)
from blora_pyro.errors import UserError
from blora_pyro.evaluation import Evaluation
from blora_pyro.metrics import Counts


def counts(edits, lengths):
    return Counts(np.array(edits), np.array(lengths))


@pytest.fixture
def content():
    """New domain 3/20, PIER 2/5; backward 1/10 by WER and 4/10 by CER."""
    main, pier = counts([1, 2], [10, 10]), counts([2], [5])
    texts = [""], [""], [[]]
    results = {
        "new_domain": Evaluation("wer", {"wer": main, "cer": main, "pier": pier}, *texts),
        "de": Evaluation("wer", {"wer": counts([1], [10]), "cer": main}, *texts),
        "zh": Evaluation("cer", {"cer": counts([4], [10])}, *texts),
    }
    return {"format": 1, "method": "lora", "sets": counts_to_json(results)}


def test_a_row_keeps_the_main_measure_and_pier(content):
    sets = json.loads(json.dumps(content))["sets"]
    assert sets["new_domain"].keys() == {"metric", "wer", "pier"}
    assert sets["new_domain"]["wer"] == {"edits": [1, 2], "lengths": [10, 10]}
    assert sets["zh"] == {"metric": "cer", "cer": {"edits": [4], "lengths": [10]}}


def test_the_errors_of_a_row(content):
    row = read_row(content)
    assert row.backward_sets == ["de", "zh"]
    assert row.new_domain_error == pytest.approx(0.15)
    assert row.backward_error == pytest.approx((0.1 + 0.4) / 2)
    assert row.balanced_error == pytest.approx((0.15 + 0.25) / 2)
    assert row.failed is None


def test_a_failed_row_has_the_worst_balanced_error():
    row = read_row({"format": 1, "failed": "the loss is nan", "sets": {}})
    assert row.balanced_error == float("inf")


def test_a_row_comes_back_as_it_was_put(tmp_path, content):
    RowStore(tmp_path).put("abc", content)
    row = RowStore(tmp_path).get("abc")
    assert row.about["method"] == "lora"
    assert row.main("new_domain").edits.tolist() == [1, 2]
    assert RowStore(tmp_path).get("other") is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 0'),
        lambda text: text.replace("[1, 2]", "[1]"),
        lambda text: text.replace("[10, 10]", "[0, 0]"),
        lambda text: text.replace('"metric": "cer"', '"metric": "mer"'),
        lambda text: json.dumps({"format": 1, "sets": {}}),
    ],
)
def test_a_damaged_row_is_none(tmp_path, content, damage):
    RowStore(tmp_path).put("abc", content)
    file = tmp_path / "rows" / "abc.json"
    before = file.read_text()
    file.write_text(damage(before))
    assert file.read_text() != before
    store = RowStore(tmp_path)
    assert store.get("abc") is None
    store.put("abc", content)
    assert store.get("abc") is not None


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    one, other = RowStore(tmp_path), RowStore(tmp_path)
    with one.locked("fit") as mine, other.locked("fit") as theirs, other.locked("more") as free:
        assert (mine, theirs, free) == (True, False, True)
    with other.locked("fit") as theirs:
        assert theirs


def test_the_lock_of_a_process_that_dies_is_free(tmp_path):
    (tmp_path / "locks").mkdir()
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); "
        "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "locks" / "fit")], stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout.readline() == b"held\n"
        with RowStore(tmp_path).locked("fit") as mine:
            assert not mine
        process.kill()
    with RowStore(tmp_path).locked("fit") as mine:
        assert mine


def test_an_output_that_cant_be_written_is_told(tmp_path, content):
    (tmp_path / "file").write_text("")
    store = RowStore(tmp_path / "file")
    with pytest.raises(UserError, match=r"output '.*file' can't be written"):
        store.put("abc", content)
    with pytest.raises(UserError, match="can't be written"), store.locked("fit"):
        pass


def test_a_hash_follows_the_content_and_not_its_order():
    assert hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1})
    assert hash_of({"a": 1}) != hash_of({"a": 2})
    assert len(hash_of({})) == 12


def test_the_title_of_a_row_says_all_of_it():
    spec = RowSpec(read_candidate("lora:0.003"), read_setting("150x600"), "de-en", 2, TEST)
    assert spec.title == "lora:0.003, 150x600, de-en, seed 2, test"
