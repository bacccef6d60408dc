import json

import pytest

from blora_pyro.comparison import comparing
from blora_pyro.comparison.comparing import compare_methods
from blora_pyro.comparison.files import report
from blora_pyro.comparison.methods import POINT, Method
from blora_pyro.comparison.study import Study
from blora_pyro.errors import Interrupted, UserError
from blora_pyro.files import write_json
from blora_pyro.runs.listeners import Listener

from .conftest import row_content

LORA = Method("lora", "LoRA", "lora", "lr", (0.01, 0.03), POINT)
BLORA = Method("blora", "BLoRA", "bayes", "beta", (1e-5,), {"lr": 0.03})


class Stages(Listener):
    def __init__(self):
        self.seen = []

    def stage(self, name):
        self.seen.append(name)


@pytest.fixture
def compare(small, tmp_path):
    def run(**changes):
        return compare_methods(tmp_path / "out", **{**small, "methods": [LORA, BLORA], **changes})

    return run


def test_a_comparison_from_end_to_end(compare, small, tmp_path):
    stages = Stages()
    comparison = compare(progress=stages)
    assert comparison.unmade() == []
    assert len(stages.seen) == comparison.made() == 2 * (1 + 2 + 1)
    fits = {path.name for path in (tmp_path / "out" / "fits").iterdir()}
    assert len(fits) == 3  # a fit serves dev and test
    content = report(comparison)[1]
    chosen = content["settings"]["allx2"]["chosen"]
    assert chosen.keys() == {"base", "lora", "blora"}
    assert set(content["settings"]["allx2"]["against_lora"]) == {"blora"}
    assert content["base"]["name"] == small["base"]

    # a damaged row is made again, from the same fit
    damaged = sorted((tmp_path / "out" / "rows").iterdir())[0]
    before = json.loads(damaged.read_text())
    damaged.write_text("{")
    compare()
    assert json.loads(damaged.read_text())["sets"] == before["sets"]
    assert {path.name for path in (tmp_path / "out" / "fits").iterdir()} == fits


def test_started_again_a_comparison_makes_what_is_not_there(compare, fake_rows):
    compare()
    first = [*fake_rows]
    assert len(first) == len({*first}) == 2 * (1 + 2 + 1)
    compare()
    assert fake_rows == first
    compare(seeds=[0, 1])
    more = fake_rows[len(first) :]
    assert more and all("seed 1, test" in title for title in more)


def test_one_row_without_any_choice(compare, fake_rows):
    compare(row="lora:0.003")
    assert fake_rows == ["base, allx2, mix, seed 0, test", "lora:0.003, allx2, mix, seed 0, test"]


def test_without_work_nothing_is_made(compare, tmp_path):
    comparison = compare(work=False)
    assert len(comparison.unmade()) == 1 + 2 + 1
    assert not (tmp_path / "out").exists()


def test_rows_of_another_process_are_left_to_it_and_waited_for(compare, fake_rows, monkeypatch):
    comparison = compare(work=False, only_choose=True)
    study = comparison.study
    theirs = comparison.unmade()[1]
    stages = Stages()
    study.progress = stages
    lock = study.store.locked(study.lock_of(theirs))
    waits = []

    def wait(seconds):  # the other process makes its row meanwhile
        waits.append(len(stages.seen))
        study.make(theirs)
        lock.__exit__(None, None, None)

    monkeypatch.setattr(comparing.time, "sleep", wait)
    assert lock.__enter__()
    comparison.run()
    assert waits == [3]  # all others were made before
    assert not any(title.startswith(theirs.title) for title in stages.seen)
    assert comparison.unmade() == []


def test_rows_whose_fit_is_at_hand_come_first_and_those_of_fits_elsewhere_last(compare, tmp_path):
    comparison = compare(work=False, only_choose=True)
    study, (base, elsewhere, made, at_hand) = comparison.study, comparison.unmade()
    content = row_content(0.2, {"de": 0.1}, fit=study.lock_of(elsewhere))
    study.store.put(study.key_of(made), content)
    folder = tmp_path / "out" / "fits" / study.lock_of(at_hand)
    folder.mkdir(parents=True)
    write_json(folder / "run.json", {"state": "finished"})
    todo = comparison.unmade()
    assert todo == [base, elsewhere, at_hand]
    assert comparison._nearest_first(todo) == [at_hand, base, elsewhere]


def test_an_interrupted_comparison_says_what_is_safe(compare, fake_rows, monkeypatch, tmp_path):
    make = Study.make  # the fake

    def stop(study, spec):
        if spec.candidate.method.name == "lora":
            raise Interrupted(2)
        make(study, spec)

    monkeypatch.setattr(Study, "make", stop)
    with pytest.raises(Interrupted) as caught:
        compare()
    assert str(caught.value) == (
        f"interrupted; 1 rows are safe in {tmp_path / 'out'}; start the same command again to go on"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["dora"]}, "method is 'dora'"),
        ({"settings": ["10"]}, "setting is '10'"),
        ({"seeds": []}, "no domain, seed or setting is given"),
        ({"row": "lora"}, "row is 'lora'; give lora:LR"),
        ({"rank": 0}, "rank is 0"),
        ({"backward": ()}, "has no backward sets"),
    ],
)
def test_bad_options_are_refused(compare, changes, message):
    with pytest.raises(UserError, match=message):
        compare(**changes)
