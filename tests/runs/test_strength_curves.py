import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blora_pyro.errors import UserError
from blora_pyro.models import base_of
from blora_pyro.models.decoding import decode, encode
from blora_pyro.posterior.strength import Directions
from blora_pyro.runs.finished import evaluate_run, merge_run, transcribe
from blora_pyro.runs.folders import read_run, save_posterior
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.loading import load_examples
from blora_pyro.runs.record import RUN
from blora_pyro.runs.strength_curves import (
    save_strength_plot,
    strength_curve,
    strength_plot,
    used_directions,
)


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the finished run, to write into."""
    return shutil.copytree(finished_run.output, tmp_path / "run")


@pytest.fixture
def set_option(run):
    """Change an option in the run's configuration."""

    def change(**options):
        about = json.loads((run / RUN).read_text(encoding="utf-8"))
        about["config"].update(options)
        (run / RUN).write_text(json.dumps(about), encoding="utf-8")

    return change


@pytest.fixture(scope="module")
def curve(finished_run, tmp_path_factory):
    """The curve of a copy of the finished run, which has a picture already."""
    run = shutil.copytree(finished_run.output, tmp_path_factory.mktemp("curves") / "run")
    (run / "strength.png").write_bytes(b"of before")
    return strength_curve(run, (0.5,))


def test_every_point_has_the_figures_of_an_evaluation_at_its_strength(curve, finished_run):
    assert [point["strength"] for point in curve["points"]] == [0, 0.5, 1]
    assert (curve["split"], curve["metric"], curve["strength_by"]) == ("test", "wer", "scale")
    assert curve["new_domain"] == finished_run.metrics["new_domain"]["name"]
    point, metrics = curve["points"][1], evaluate_run(finished_run.output, strength=0.5)
    assert point["new_domain"] == metrics["new_domain"]["adapted"]["wer"]
    assert point["backward_error"] == metrics["backward_error"]["adapted"]
    assert point["forgetting"] == metrics["backward_error"]["change"]
    for name, both in metrics["backward"].items():
        assert point["backward"][name] == both["adapted"]["wer"]
    assert curve["points"][0]["new_domain"] == finished_run.metrics["new_domain"]["base"]["wer"]
    assert curve["points"][2]["new_domain"] == finished_run.metrics["new_domain"]["adapted"]["wer"]
    rates = [point["new_domain"]["rate"] for point in curve["points"]]
    assert rates[0] > rates[-1]  # else this tests little


def test_by_base_the_layers_are_heard_once_and_a_point_is_that_of_an_evaluation(run, curve):
    found = strength_curve(run, (0.3, 0.5), by="base")
    assert found["strength_by"] == "base"
    assert [point["strength"] for point in found["points"]] == [0, 0.3, 0.5, 1]
    assert found["points"][0] == curve["points"][0] and found["points"][-1] == curve["points"][-1]
    metrics = evaluate_run(run, strength=0.5, strength_by="base")
    assert (metrics["strength"], metrics["strength_by"]) == (0.5, "base")
    point = found["points"][2]
    assert point["new_domain"] == metrics["new_domain"]["adapted"]["wer"]
    assert point["backward_error"] == metrics["backward_error"]["adapted"]
    assert metrics["adapter"] not in (
        evaluate_run(run, strength=one)["adapter"] for one in (0.5, 1)
    )
    for refused in (
        lambda: merge_run(run, run.parent / "merged", strength=0.5, strength_by="base"),
        lambda: transcribe([], run, strength=0.5, strength_by="base"),
    ):
        with pytest.raises(UserError, match="only evaluate, keep and fit with a contract do"):
            refused()


def test_the_directions_are_those_of_what_the_base_hears(run, set_option, tones_folder):
    set_option(backward={name: str(tones_folder / f"{name}.jsonl") for name in ("de", "en")})
    posterior, record = read_run(run)
    base = base_of(record.resolved)
    found = used_directions(base, record.resolved, posterior, Listener())
    assert found.keys() == {name for group in posterior.groups for name in group.modules}
    train = load_examples(base, record.resolved.data, "train")
    batches = [train.batch([i]) for i in range(len(train))]
    ids = base.tokenizer.convert_tokens_to_ids
    moments = {name: [] for name in found}
    hooks = [
        base.net.get_submodule(name).register_forward_pre_hook(
            lambda layer, given, rows=rows: rows.append(given[0].flatten(0, -2).double())
        )
        for name, rows in moments.items()
    ]

    @torch.no_grad()
    def heard(tokens_of):
        for rows in moments.values():
            rows.clear()
        for i, batch in enumerate(batches):
            tokens = torch.tensor([tokens_of(i)])
            base.net(input_features=batch.input_features, decoder_input_ids=tokens)
        inputs = {name: torch.cat(rows) for name, rows in moments.items()}
        return {name: x.mT @ x / len(x) for name, x in inputs.items()}

    said = []
    for i, language in enumerate(("de", "en")):  # by which the backward sets are called
        prompt = [train.prompts[i][0], ids(f"<|{language}|>"), *train.prompts[i][3:]]
        states = encode(base, batches[i].input_features)
        said.append([*prompt, *decode(base, states, [prompt])[0]])
    new = heard(lambda i: [*train.prompts[i], *train.targets[i][:-1]])
    old = heard(lambda i: said[i])
    for hook in hooks:
        hook.remove()
    for name, one in found.items():
        expected = Directions.of(new[name], old[name]).ratios
        torch.testing.assert_close(one.ratios, expected, rtol=1e-2, atol=1e-3)


def test_without_training_data_the_dev_set_is_heard(run, set_option, tones_folder, tmp_path):
    for name in ("dev", "test"):
        (tmp_path / "new").mkdir(exist_ok=True)
        shutil.copy(tones_folder / "test.jsonl", tmp_path / "new" / f"{name}.jsonl")
    for wav in tones_folder.glob("test*.wav"):
        shutil.copy(wav, tmp_path / "new")
    set_option(data=[str(tmp_path / "new")])
    assert len(strength_curve(run, (0.5,), by="base")["points"]) == 3


def test_removed_forgetting_is_relative_to_the_fit(curve):
    points = curve["points"]
    errors = [point["backward_error"]["rate"] for point in points]
    assert errors[-1] > errors[0]  # the fit has forgotten something
    assert points[0]["forgetting_removed"] == 1
    assert points[-1]["forgetting_removed"] == 0
    expected = 1 - (errors[1] - errors[0]) / (errors[-1] - errors[0])
    assert points[1]["forgetting_removed"] == pytest.approx(expected)


def test_where_nothing_is_forgotten_there_is_nothing_to_remove(run, finished_run):
    posterior = finished_run.posterior
    nothing = {name: torch.zeros_like(value) for name, value in posterior.mean.items()}
    save_posterior(run, replace(posterior, mean=nothing))
    points = strength_curve(run, (0.5,))["points"]
    assert [point["forgetting_removed"] for point in points] == [None] * 3


def test_the_picture_is_written_into_the_run_and_over_that_of_before(curve):
    file = Path(curve["plot"])
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.name == "strength.png"
    assert (file.parent / RUN).is_file()
    assert not list(file.parent.glob("*.new"))


def test_a_curve_on_dev_sees_no_test_set(run, set_option, tones_folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name, source in {"dev": "test", "de/dev": "de", "en/validation": "en"}.items():
        (data / name).parent.mkdir(exist_ok=True)
        shutil.copy(tones_folder / f"{source}.jsonl", data / f"{name}.jsonl")
        for wav in tones_folder.glob(f"{source}*.wav"):
            shutil.copy(wav, (data / name).parent)
    backward = {name: str(data / name) for name in ("de", "en")}
    set_option(data=[str(data)], backward=backward)
    curve = strength_curve(run, (0,), split="dev")
    assert curve["split"] == "dev"
    assert list(curve["points"][0]["backward"]) == ["de", "en"]
    with pytest.raises(UserError, match="test"):
        strength_curve(run, (0,), split="test")


def test_there_is_no_curve_without_both_errors(run, set_option, tones_folder):
    set_option(backward={})
    with pytest.raises(UserError, match=r"has new_domain to score; a curve needs .* backward sets"):
        strength_curve(run, (0.5,))


def test_bad_strengths_are_refused_before_anything_is_read(run, set_option):
    set_option(base="no/base")
    with pytest.raises(UserError, match="strength is 7"):
        strength_curve(run, (0.5, 7))


# ---- the plot


def point(strength, new, backward, low=0.0, high=0.0):
    return {
        "strength": strength,
        "new_domain": {"rate": new, "interval": [new, new]},
        "backward_error": {"rate": backward, "interval": [backward, backward]},
        "forgetting": {"difference": (low + high) / 2, "interval": [low, high]},
    }


CURVE = {
    "split": "dev",
    "strength_by": "scale",
    "new_domain": "de-en",
    "metric": "wer",
    "points": [point(0.0, 0.5, 0.05), point(0.25, 0.3, 0.055), point(1.0, 0.1, 0.075, 0.01, 0.04)],
}


def markers(figure):
    lines = figure.axes[0].lines
    return [
        (line.get_xdata()[0], line.get_ydata()[0], line.get_marker())
        for line in lines
        if len(line.get_xdata()) == 1
    ]


def test_every_strength_is_a_point_with_its_label_and_base_and_fit_are_marked():
    figure = strength_plot(CURVE)
    found = markers(figure)
    assert [x for x, _, _ in found] == pytest.approx([50, 30, 10])
    assert [y for _, y, _ in found] == pytest.approx([5, 5.5, 7.5])
    assert len({marker for _, _, marker in found}) == 3
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "0.25", "1"]
    bars = [bar.get_segments()[0][:, 1].tolist() for bar in figure.axes[0].collections]
    assert bars == [pytest.approx([5, 5]), pytest.approx([5, 5]), pytest.approx([6, 9])]
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["the base (strength 0)", "the fit (strength 1)"]
    assert "dev" in figure.get_suptitle()
    assert "de-en: WER" in figure.axes[0].get_xlabel()


def test_points_without_a_rate_are_left_out():
    curve = {**CURVE, "points": [*CURVE["points"][:2], point(1.0, None, 0.1)]}
    assert len(markers(strength_plot(curve))) == 2
    curve = {**CURVE, "points": [point(0.0, None, 0.1)]}
    assert markers(strength_plot(curve)) == []


def test_a_plot_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"ends in \.png or \.pdf or \.svg"):
        save_strength_plot(tmp_path / "curve.txt", CURVE)
    with pytest.raises(UserError, match="can't be written"):
        save_strength_plot(tmp_path / "none" / "curve.png", CURVE)
    save_strength_plot(tmp_path / "curve.pdf", CURVE)
    assert (tmp_path / "curve.pdf").read_bytes().startswith(b"%PDF")
