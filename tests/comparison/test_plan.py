import pytest

from blora_pyro.comparison.candidates import Candidate, read_candidate
from blora_pyro.comparison.methods import Method, Setting
from blora_pyro.comparison.plan import Plan, RowPlan
from blora_pyro.comparison.rows import DEV, TEST

SETTING = Setting(None, 10)
METHODS = {
    "base": Method("base", "base", "base"),
    "lora": Method("lora", "LoRA", "lora", "lr", (0.001, 0.003, 0.005)),
    "scaled": Method("scaled", "scaled", "lora", "factor", (0.5, 1.0), of="lora"),
    "blora": Method("blora", "BLoRA", "bayes", "beta", (1.0, 2.0, 3.0, 4.0), {"lr": 0.005}),
}
BEST = {"lora": 0.003, "scaled": 0.5, "blora": 1.0, "base": None}


@pytest.fixture
def runner(make_row):
    """Rows by title, made when asked to; the value in `BEST` has the lowest errors."""

    class Runner(dict):
        def make(self, spec):
            best = spec.candidate.value == BEST[spec.candidate.method.name]
            self[spec.title] = make_row(0.1 if best else 0.3, 0.1)

    return Runner()


@pytest.fixture
def plan(runner):
    def make(methods=METHODS, domains=("de-en", "es-en"), seeds=(0, 1), **options):
        return Plan(methods, [SETTING], domains, seeds, lambda s: runner.get(s.title), **options)

    return make


def work(plan, runner, limit=1000):
    """Make the rows of a plan in its order; return their titles."""
    made = []
    while todo := [spec for spec in plan.rows() if spec.title not in runner]:
        if len(made) == limit:
            break
        runner.make(todo[0])
        made.append(todo[0])
    return made


def texts(candidates):
    return [one.text for one in candidates]


def test_first_all_values_are_tried_on_dev_with_the_first_domain_and_seed(plan, runner):
    first = plan().rows()
    assert {(spec.domain, spec.seed, spec.split) for spec in first} == {("de-en", 0, DEV)}
    assert len(first) == 1 + 3 + 4  # the derived one waits


def test_a_derived_method_waits_for_its_parent_and_takes_its_choice(plan, runner):
    waiting = plan()
    assert waiting.waiting() == ["scaled"]
    work(plan(only_choose=True), runner)
    assert waiting.waiting() == []
    assert texts(waiting.candidates("scaled", SETTING)) == ["scaled:0.5:0.003", "scaled:1:0.003"]


def test_the_lowest_balanced_error_is_chosen(plan, runner, make_row):
    made = plan()
    rows = [made.dev_row(one, SETTING) for one in made.candidates("lora", SETTING)]
    for spec, errors in zip(rows, [(0.5, 0.1), (0.3, 0.2), (0.1, 0.5)], strict=True):
        runner[spec.title] = make_row(*errors)
    assert made.chosen("lora", SETTING).value == 0.003  # 0.25, against 0.3 and 0.3


def test_of_equals_the_first_is_chosen(plan, runner, make_row):
    made = plan()
    for one in made.candidates("lora", SETTING):
        runner[made.dev_row(one, SETTING).title] = make_row(0.2, 0.2)
    assert made.chosen("lora", SETTING).value == 0.001


def test_nothing_is_chosen_before_all_values_were_tried(plan, runner):
    made, partial = plan(), plan(partial=True)
    for one in made.candidates("lora", SETTING)[:2]:
        runner.make(made.dev_row(one, SETTING))
    assert made.chosen("lora", SETTING) is None
    assert partial.chosen("lora", SETTING).value == 0.003


def test_a_fit_that_failed_is_never_chosen(plan, runner, make_row):
    made = plan()
    for one in made.candidates("lora", SETTING):
        runner[made.dev_row(one, SETTING).title] = make_row(0.2, 0.2)
    failing = made.dev_row(made.candidates("lora", SETTING)[0], SETTING).title
    runner[failing] = make_row(0.0, 0.0, failed="nan")
    assert made.chosen("lora", SETTING).value == 0.003
    for one in made.candidates("lora", SETTING):
        runner[made.dev_row(one, SETTING).title] = make_row(0.0, 0.0, failed="nan")
    assert made.chosen("lora", SETTING) is None
    assert made.scored("lora", SETTING) == []


def test_the_chosen_value_and_its_neighbours_are_scored_on_test(plan, runner):
    made = work(plan(), runner)
    scored = plan().scored("lora", SETTING)
    assert texts(scored) == ["lora:0.003", "lora:0.001", "lora:0.005"]
    assert texts(plan().scored("blora", SETTING)) == ["blora:1", "blora:2"]  # it is the first
    tests = [spec for spec in made if spec.split == TEST]
    lora = [spec for spec in tests if spec.candidate.text == "lora:0.003"]
    assert {(spec.domain, spec.seed) for spec in lora} == {
        (domain, seed) for domain in ("de-en", "es-en") for seed in (0, 1)
    }
    assert len(tests) == len({spec.title for spec in tests}) == 2 + 4 * (3 + 2 + 2)
    assert plan().most_test_rows() == 2 + 4 * (3 + 2 + 3)


def test_the_base_has_one_row_a_domain(plan, runner):
    made = [spec for spec in work(plan(), runner) if spec.candidate.method.name == "base"]
    assert [(spec.domain, spec.split) for spec in made] == [
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


def test_a_row_plan_chooses_nothing():
    candidate = read_candidate("scaled-lora:0.5:0.003")
    plan = RowPlan(candidate, [SETTING], ["de-en"], [3], lambda spec: None)
    assert [spec.title for spec in plan.rows()] == [
        "base, allx10, de-en, seed 3, test",
        "scaled-lora:0.5:0.003, allx10, de-en, seed 3, test",
    ]
    assert plan.waiting() == []
    assert plan.chosen("scaled-lora", SETTING) == candidate
    assert isinstance(plan.chosen("base", SETTING), Candidate)
