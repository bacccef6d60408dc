import copy
import json
from dataclasses import fields
from typing import Any, Literal

import pytest

from blora_pyro.errors import UserError
from blora_pyro.fitting.history import Step
from blora_pyro.options import FitConfig
from blora_pyro.runs.record import FINISHED, RUN, Link, RunRecord, conforms, state_of, versions

STEP = {"step": 1, "loss": 2.0, "nll": 1.5, "kl": 3.0, "lr": 0.1, "tokens": 7}


def stored(folder, content):
    (folder / RUN).write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_a_record_is_written_and_read_back(tmp_path):
    config = FitConfig(data="es-en", backward={"German": "de"}).resolved(100, 10)
    record = RunRecord(
        "finished",
        options=FitConfig(data="es-en").to_json(),
        config=config,
        language="es-en",
        history=[Step(**STEP)],
        training_tokens=100,
    )
    record.write(tmp_path)
    again = RunRecord.read(tmp_path)
    assert again == record and again.resolved == config
    assert again.history == [Step(**STEP)]


def test_content_of_this_or_another_version_stays_as_it_is(tmp_path):
    config = FitConfig().resolved(1, 1).to_json()
    content = {"state": "finished", "config": config, "language": None, "a later key": [1]}
    record = RunRecord.read(stored(tmp_path, content))
    assert record.other == {"a later key": [1]}
    record.write(tmp_path)
    assert json.loads((tmp_path / RUN).read_text(encoding="utf-8")) == content


def test_a_record_without_a_state_is_of_a_finished_run(tmp_path):
    stored(tmp_path, {"config": FitConfig().resolved(1, 1).to_json(), "language": "de"})
    assert RunRecord.read(tmp_path).state == state_of(tmp_path) == "finished"


def test_a_null_is_kept_where_it_means_something():
    record = RunRecord(config=FitConfig().resolved(1, 1), history=[])
    assert {"language", "training_tokens", "temperature"} <= record.to_json().keys()
    assert not {"chain", "dev", "other"} & record.to_json().keys()


def test_a_fit_that_has_just_begun_has_no_resolved_options():
    with pytest.raises(UserError, match="the run has no configuration yet"):
        _ = RunRecord().resolved


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"config": 3}', '{"config": {"rank": 0}, "language": "de"}', '{"history": 1}'],
)
def test_a_damaged_record_is_refused(tmp_path, content):
    (tmp_path / RUN).write_text(content)
    with pytest.raises(UserError, match=r"run\.json is missing or damaged \(.*\); fit again$"):
        RunRecord.read(tmp_path)


def test_a_folder_without_a_record_has_no_state(tmp_path):
    assert state_of(tmp_path) is None
    for content in ("{", "[]"):
        (tmp_path / RUN).write_text(content)
        assert state_of(tmp_path) is None
    with pytest.raises(UserError, match="is missing or damaged"):
        RunRecord.read(tmp_path)


def test_an_edited_run_says_what_it_was_made_of():
    assert RunRecord().made_of is None
    assert RunRecord(pruned={"from": "runs/a"}).made_of == ("pruned", "runs/a")
    combined = RunRecord(combined={"from": ["runs/a", "runs/b"]})
    assert combined.made_of == ("combined", "runs/a or runs/b")


def test_versions_are_those_of_python_and_the_packages():
    assert {"python", "blora-pyro", "torch", "transformers"} <= versions().keys()


# ---- whatever a file may hold

NONSENSE = (None, True, -1, 2**70, 1e308, "", "\ud800", "x" * 400, [], [[]], [None], {}, {"a": {}})


def paths_of(content, below=()):
    """Every key and index in JSON content."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield (*below, key)
        if isinstance(value, dict | list):
            yield from paths_of(value, (*below, key))


def whole_content():
    """A record with every key."""
    config = FitConfig(data={"a": "de-en"}, backward={"b": "de"}, language="de").resolved(100, 10)
    size = {"layers": 1, "directions": 2, "adapter_weights": 3, "nonzero_weights": 3}
    how = {"from": "runs/a", "rank": 1, "snr": None, "sparsity": None, "full": size, "pruned": size}
    record = RunRecord(
        FINISHED,
        *(FitConfig(data="es-en").to_json(), config),
        chain=[{"run": "runs/a", "fingerprint": "0", "inflation": 1.0}],
        language="de",
        domain_languages={"a": "de"},
        **{"training_utterances": 1, "training_tokens": 9, "temperature": 0.1},
        **{"adapter_weights": 12, "versions": versions(), "seconds": {"fit": 1.5}},
        **{"code_sha256": {"prior": "0"}, "skipped_steps": 0, "history": [Step(**STEP)]},
        dev={"errors": [{"step": 1, "error": 0.5}], "best_step": 1, "ended_by": "steps"},
        ended_by="alarm",
        alarm={"step": 4, "kept_step": 0, "reason": "too fast"},
        kept={
            **{"limits": {"average": 0.01, "b": 0.02}, "confidence": 0.5, "strength": 0.7},
            **{"losses": {"average": 0.005, "b": 0.005}, "curve": {"points": []}},
        },
        pruned=how,
        combined={"from": ["runs/a"], "method": "mean", "weights": [1.0], "rank": 1},
    )
    return json.loads(json.dumps(record.to_json()))


def test_every_key_is_read_or_refused_in_one_line_whatever_is_there(tmp_path):
    whole = whole_content()
    assert {one.name for one in fields(RunRecord)} - whole.keys() == {"other"}
    refused = set()
    for number, path in enumerate(paths_of(whole)):
        options = path[0] in ("options", "config")  # FitConfig has tests of its own
        for value in (NONSENSE[number % len(NONSENSE)],) if options else (*NONSENSE, "missing"):
            content = copy.deepcopy(whole)
            place = content
            for key in path[:-1]:
                place = place[key]
            if value != "missing":
                place[path[-1]] = value
            else:
                del place[path[-1]]
            try:
                record = RunRecord.read(stored(tmp_path, content))
                json.dumps(record.to_json())
                _ = record.made_of, record.resolved.backward_sets, record.resolved.domains
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 700
                refused.add(path[0])
    assert refused == whole.keys()


@pytest.mark.parametrize(
    "content",
    [
        b'{"history":' + b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"state": "finished", "language": "\xff"}',
        b'{"training_tokens": ' + b"9" * 5000 + b"}",
        b'{"temperature": 1e999}',
        b'{"temperature": NaN}',
        b'{"state": "finished", "conf',
        b"\x00" * 100,
    ],
)
def test_a_file_that_is_no_sane_json_is_refused(tmp_path, content):
    (tmp_path / RUN).write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json is missing or damaged \([^\n]*\); fit again$"):
        RunRecord.read(tmp_path)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        (float("inf"), float, False),
        (None, int | None, True),
        ("fitting", Literal["fitting"], True),
        ([], Literal["fitting"], False),
        ({"a": [1]}, dict[str, list[int]], True),
        ({"a": ["b"]}, dict[str, list[int]], False),
        (STEP, Step, True),
        ({**STEP, "more": 1}, Step, False),
        ({"run": "a", "fingerprint": "b"}, Link, False),
        (object(), Any, True),
    ],
)
def test_values_conform_to_types(value, kind, expected):
    assert conforms(value, kind) == expected
