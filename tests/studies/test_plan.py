import pytest

from blora_pyro.studies.definition import Setting, Study
from blora_pyro.studies.methods import Candidate, Method, built_in_methods, read_candidate
from blora_pyro.studies.plan import Plan
from blora_pyro.studies.results import DEV, TEST

from .conftest import made_up

SETTING = Setting("pocket", "allx10", {"steps": 10})
METHODS = {
    "base": Method("base", "base", "base"),
    "lora": Method("lora", "LoRA", "lora", "lr", (0.001, 0.003, 0.005)),
    "scaled": Method("scaled", "scaled", "lora", "strength", (0.5, 1.0), of="lora"),
    "blora": Method("blora", "BLoRA", "bayes", "beta", (1.0, 2.0, 3.0, 4.0), {"lr": 0.005}),
}
BEST = {"lora": 0.003, "scaled": 0.5, "blora": 1.0, "base": None}


def make_row(new_domain, backward, **about):
    names = ("pocket", "all", "lora", "lora:0.003", "de-en", 0, "test")
    return made_up(names, new_domain, backward, **about)


@pytest.fixture
def runner():
    """Scores by title, made when asked to; the value in `BEST` has the lowest errors."""

    class Runner(dict):
        def make(self, spec):
            best = spec.candidate.value == BEST[spec.candidate.method.name]
            self[spec.title] = make_row(0.1 if best else 0.3, 0.1)

    return Runner()


@pytest.fixture
def plan(runner):
    def make(methods=METHODS, data=("de-en", "es-en"), seeds=(0, 1), partial=False, **options):
        study = Study([SETTING], {name: name for name in data}, seeds, methods, **options)
        return Plan(study, lambda spec: runner.get(spec.title), partial)

    return make


def work(plan, runner, limit=1000):
    """Make the rows of a plan in its order; return their titles."""
    made = []
    while todo := [spec for spec in plan.wanted() if spec.title not in runner]:
        if len(made) == limit:
            break
        runner.make(todo[0])
        made.append(todo[0])
    return made


def texts(candidates):
    return [one.text for one in candidates]


def test_first_all_values_are_tried_on_dev_with_the_first_data_and_seed(plan, runner):
    first = plan().wanted()
    assert {(spec.data, spec.seed, spec.split) for spec in first} == {("de-en", 0, DEV)}
    assert len(first) == 1 + 3 + 4  # the derived one waits


def test_a_derived_method_waits_for_its_parent_and_takes_its_choice(plan, runner):
    waiting = plan()
    assert waiting.waiting() == ["scaled"]
    work(plan(only_choose=True), runner)
    assert waiting.waiting() == []
    assert texts(waiting.candidates("scaled", SETTING)) == ["scaled:0.5:0.003", "scaled:1:0.003"]


def test_the_lowest_balanced_error_is_chosen(plan, runner):
    made = plan()
    rows = [made.dev_score(one, SETTING) for one in made.candidates("lora", SETTING)]
    for spec, errors in zip(rows, [(0.5, 0.1), (0.3, 0.2), (0.1, 0.5)], strict=True):
        runner[spec.title] = make_row(*errors)
    assert made.chosen("lora", SETTING).value == 0.003  # 0.25, against 0.3 and 0.3


def test_of_equals_the_first_is_chosen(plan, runner):
    made = plan()
    for one in made.candidates("lora", SETTING):
        runner[made.dev_score(one, SETTING).title] = make_row(0.2, 0.2)
    assert made.chosen("lora", SETTING).value == 0.001


def test_nothing_is_chosen_before_all_values_were_tried(plan, runner):
    made, partial = plan(), plan(partial=True)
    for one in made.candidates("lora", SETTING)[:2]:
        runner.make(made.dev_score(one, SETTING))
    assert made.chosen("lora", SETTING) is None
    assert partial.chosen("lora", SETTING).value == 0.003


def test_a_fit_that_failed_is_never_chosen(plan, runner):
    made = plan()
    for one in made.candidates("lora", SETTING):
        runner[made.dev_score(one, SETTING).title] = make_row(0.2, 0.2)
    failing = made.dev_score(made.candidates("lora", SETTING)[0], SETTING).title
    runner[failing] = make_row(0.0, 0.0, failed="nan")
    assert made.chosen("lora", SETTING).value == 0.003
    for one in made.candidates("lora", SETTING):
        runner[made.dev_score(one, SETTING).title] = make_row(0.0, 0.0, failed="nan")
    assert made.chosen("lora", SETTING) is None
    assert made.scored("lora", SETTING) == []


def test_the_chosen_value_and_its_neighbours_are_scored_on_test(plan, runner):
    made = work(plan(), runner)
    scored = plan().scored("lora", SETTING)
    assert texts(scored) == ["lora:0.003", "lora:0.001", "lora:0.005"]
    assert texts(plan().scored("blora", SETTING)) == ["blora:1", "blora:2"]  # it is the first
    tests = [spec for spec in made if spec.split == TEST]
    lora = [spec for spec in tests if spec.candidate.text == "lora:0.003"]
    assert {(spec.data, spec.seed) for spec in lora} == {
        (data, seed) for data in ("de-en", "es-en") for seed in (0, 1)
    }
    assert len(tests) == len({spec.title for spec in tests}) == 2 + 4 * (3 + 2 + 2)
    assert plan().most_test_scores() == 2 + 4 * (3 + 2 + 3)


def test_the_base_has_one_score_for_each_data_set(plan, runner):
    made = [spec for spec in work(plan(), runner) if spec.candidate.method.name == "base"]
    assert [(spec.data, spec.split) for spec in made] == [
        ("de-en", DEV),
        ("de-en", TEST),
        ("es-en", TEST),
    ]


def test_a_whole_table_comes_before_further_seeds_and_neighbours(plan, runner):
    tests = [spec for spec in work(plan(), runner) if spec.split == TEST]
    chosen = [spec.candidate.value == BEST[spec.candidate.method.name] for spec in tests]
    assert chosen == sorted(chosen, reverse=True)
    seeds = [spec.seed for spec, one in zip(tests, chosen, strict=True) if one]
    assert seeds == sorted(seeds)


def test_without_neighbours_lora_is_still_scored_at_the_bayesian_learning_rate(plan, runner):
    work(plan(neighbours=False), runner)
    scored = plan(neighbours=False).scored("lora", SETTING)
    assert texts(scored) == ["lora:0.003", "lora:0.005"]
    assert texts(plan(neighbours=False).scored("blora", SETTING)) == ["blora:1"]


def test_only_choose_ends_after_the_first_stage(plan, runner):
    made = work(plan(only_choose=True), runner)
    assert {spec.split for spec in made} == {DEV}
    assert len(made) == 1 + 3 + 2 + 4


def test_a_plan_that_was_stopped_goes_on_without_a_row_made_twice(plan, runner):
    first = work(plan(), runner, limit=11)
    second = work(plan(), runner)
    assert len(first) == 11 and second
    assert not {spec.title for spec in first} & {spec.title for spec in second}
    assert work(plan(), runner) == []


def test_a_candidate_of_its_own_is_scored_and_nothing_is_chosen(plan):
    candidate = read_candidate("scaled-lora:0.5:0.003")
    given = plan(built_in_methods(), ("de-en",), (3,), row=candidate)
    assert [spec.title for spec in given.wanted()] == [
        "base, allx10, de-en, seed 3, test",
        "scaled-lora:0.5:0.003, allx10, de-en, seed 3, test",
    ]
    assert given.waiting() == []
    assert given.chosen("scaled-lora", SETTING) == candidate
    assert isinstance(given.chosen("base", SETTING), Candidate)


def test_the_base_is_scored_once_for_all_settings(runner):
    settings = [SETTING, Setting("pocket", "allx20", {"steps": 20})]
    study = Study(settings, {"de-en": "de-en"}, (0,), {"base": METHODS["base"]})
    plan = Plan(study, lambda spec: runner.get(spec.title))
    assert [spec.split for spec in plan.missing()] == [DEV]


def test_what_another_program_fits_is_chosen_among_its_scores_and_never_made(plan, runner):
    methods = {**METHODS, "full": Method("full", "", "full", "lr", (1.0, 2.0), external=True)}
    given = plan(methods)
    assert not any(spec.candidate.method.name == "full" for spec in given.missing())
    (first, _) = given.candidates("full", SETTING)
    assert given.chosen("full", SETTING) is None
    runner[given.dev_score(first, SETTING).title] = make_row(0.2, 0.2)
    assert given.chosen("full", SETTING) == first


def test_the_plan_is_described_in_lines(plan, runner):
    lines = [*plan().describe([])]
    assert lines[0] == "4 methods, settings allx10, data de-en, es-en, seeds 0, 1"
    assert lines[1] == "rows known: 0 done, 8 to do, with 7 fits to make"
    assert lines[2].endswith(": scaled")
    assert lines[3] == "the second stage comes to 34 rows or so"
    assert lines[4] == "to do: base, allx10, de-en, seed 0, dev"
    done = plan().candidates("lora", SETTING)[0]
    run = plan().dev_score(done, SETTING).run
    assert "with 6 fits to make" in [*plan().describe([run])][1]
