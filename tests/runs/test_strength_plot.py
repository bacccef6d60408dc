import pytest

from blora_pyro.errors import UserError
from blora_pyro.runs.strength_plot import save_strength_plot, strength_plot


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


def test_a_picture_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(UserError, match=r"ends in \.png or \.pdf or \.svg"):
        save_strength_plot(tmp_path / "curve.txt", CURVE)
    with pytest.raises(UserError, match="can't be written"):
        save_strength_plot(tmp_path / "none" / "curve.png", CURVE)
    save_strength_plot(tmp_path / "curve.pdf", CURVE)
    assert (tmp_path / "curve.pdf").read_bytes().startswith(b"%PDF")
