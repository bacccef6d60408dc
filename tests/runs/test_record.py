import json

import pytest

from blora_pyro.errors import UserError
from blora_pyro.fitting.svi import Step
from blora_pyro.options import FitConfig
from blora_pyro.runs.record import RUN, RunRecord, state_of, versions

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
