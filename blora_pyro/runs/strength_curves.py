"""Errors of one fit at several strengths: a curve from the base to the fit, and its plot."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from blora_pyro.data import split_names
from blora_pyro.errors import UserError
from blora_pyro.evaluation import Evaluation, change_summary, rate_summary
from blora_pyro.files import replace_file
from blora_pyro.metrics import forgetting_removed
from blora_pyro.models import Base
from blora_pyro.models.second_moments import UTTERANCES, second_moments
from blora_pyro.options import AUTO, FitConfig
from blora_pyro.plotting import BLACK, BLUE, GREY, SMALL, VERMILLION, label_axes, new_figure
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.strength import BASE, SCALE, Directions, at_strength, check_strength
from blora_pyro.runs.folders import STRENGTH_PLOT, claim_file, default_output, read_run
from blora_pyro.runs.listeners import Listener, heard_by
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.scoring import (
    DEV_SPLITS,
    NEW_DOMAIN,
    Scoring,
    domain_name,
    scoring_config,
)

SUFFIXES = (".png", ".pdf", ".svg")
ENDS = {0.0: ("the base (strength 0)", BLACK, "*"), 1.0: ("the fit (strength 1)", VERMILLION, "D")}


def strength_curve(
    folder: str | Path,
    strengths: Sequence[float],
    progress: Listener | None = None,
    device: str = AUTO,
    *,
    by: str = SCALE,
    split: str = "test",
    normalizer: str | None = None,
    plot: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score a run at several strengths, and plot new-domain error against backward error.

    Args:
        folder: Folder of the run, or its Hub id.
        strengths: See `at_strength`. 0 (the base) and 1 (the fit) are scored in any case.
        progress: Listener to the stages; None is bars in a notebook.
        device: A torch device.
        by: See `at_strength`.
        split: Split of the run's sets: `test`, or `dev` to choose a strength by.
        normalizer: None is that of the fit; see `FitConfig`.
        plot: A png, pdf or svg file; None is `strength.png` in the folder, which is replaced.
        overwrite: Replace `plot`.

    Returns:
        Names of what was scored, and `points` by rising strength: the rates of the new domain,
        the backward sets and their average, with 95% intervals; `forgetting` against the base,
        paired; `loops`, by set the number of transcripts that repeat themselves; and
        `forgetting_removed`, 1 - forgetting / (forgetting at strength 1), None where
        the fit forgot nothing. Rates are fractions.

    Raises:
        UserError: If the run can't be read, lacks a new domain's or a backward set of the split, a
            strength is not possible, or the plot can't be written.
    """
    progress = heard_by(progress)
    posterior, record = read_run(folder, device)
    file = default_output(folder, STRENGTH_PLOT, "plot") if plot is None else Path(plot)
    check_plot_file(file)
    claim_file(file, overwrite or plot is None)
    strengths = sorted({0.0, 1.0, *strengths})
    for strength in strengths:
        check_strength(posterior, strength, by)
    config = scoring_config(record.resolved, None, normalizer)
    scoring = Scoring.of(config, split, progress)
    if NEW_DOMAIN not in (sets := scoring.sets) or len(sets) < 2:
        raise UserError(
            f"the run has {', '.join(sets) or 'no set'} to score; a curve needs a test set of the "
            "new domain and backward sets: give a single strength"
        )
    directions = used_directions(scoring.base, config, posterior, progress) if by == BASE else None
    results = {}
    for strength in strengths:
        progress.stage(f"strength {strength:g}" if strength else "the base, strength 0")
        results[strength] = scoring.score(at_strength(posterior, strength, by, directions))
    curve = curve_of(results, posterior, config, split, by)
    save_strength_plot(file, curve)
    return curve | {"plot": str(file)}


def used_directions(
    base: Base, config: FitConfig, posterior: Posterior, progress: Listener
) -> dict[str, Directions]:
    """Return how new domain and old languages use the inputs of every layer of a posterior.

    Both are heard by the base as it is, in 96 utterances of the new domain (training data, or where
    there are none the dev set): as they are prompted and transcribed there, and prompted in the old
    languages, as by the prior `base-informed`.

    Args:
        base: Without adapters.
        config: Names the data; the old languages are those of the backward sets, or else the
            prior's usual ones.
        posterior: Names the layers.
        progress: Listener to the stages.

    Returns:
        Of every layer by its name; see `at_strength`.

    Raises:
        UserError: If the data can't be read, or the base does not know a language.
    """
    progress.stage("what the base hears")
    loader = Loader(base, config, progress.features, progress.note)
    source = config.sources[0]
    if config.streaming:
        examples = loader.stream(source, lambda row: None).sample
    else:
        splits = split_names(source)
        split = next((one for one in ("train", *DEV_SPLITS) if one in splits), "train")
        examples = loader.load(source, split, limit=UTTERANCES)
    loader.report_skipped()
    batches = (examples.batch([i], full=True).to(base.net.device) for i in range(len(examples)))
    modules = [name for group in posterior.groups for name in group.modules]
    moments = second_moments(base.net, batches, modules, config.taught_languages)
    return {name: Directions.of(*(one.pop(name) for one in moments)) for name in modules}


def curve_of(
    results: Mapping[float, dict[str, Evaluation]],
    posterior: Posterior,
    config: FitConfig,
    split: str,
    by: str,
) -> dict[str, Any]:
    """Return the figures of a curve, see `strength_curve`, without its plot.

    Args:
        results: Of every set by strength, of which one is 0 and one is 1.
        posterior: The fit, at any strength.
        config: Names the sets.
        split: Of the sets.
        by: See `at_strength`.
    """
    return {
        "split": split,
        "strength_by": by,
        "normalizer": config.normalizer,
        "new_domain": domain_name(config, split),
        "metric": results[0.0][NEW_DOMAIN].metric,
        "adapter": at_strength(posterior, 1.0).fingerprint,
        "sets": {name: one.examples for name, one in results[0.0].items()},
        "points": _points({strength: results[strength] for strength in sorted(results)}),
    }


def _points(results: dict[float, dict[str, Evaluation]]) -> list[dict[str, Any]]:
    """Return the figures of every strength, of which the first is 0 and one is 1."""
    points: list[dict[str, Any]] = []
    base = _backward(results[0.0])
    for strength, sets in results.items():
        rates = {name: rate_summary([one]) for name, one in sets.items()}
        points.append(
            {
                "strength": strength,
                "new_domain": rates.pop(NEW_DOMAIN),
                "backward": rates,
                "backward_error": rate_summary(_backward(sets)),
                "forgetting": change_summary(base, _backward(sets)),
                "loops": {name: one.loops for name, one in sets.items()},
            }
        )
    errors = {point["strength"]: point["backward_error"]["rate"] for point in points}
    for point in points:
        point["forgetting_removed"] = _removed(errors, point["strength"])
    return points


def _backward(sets: dict[str, Evaluation]) -> list[Evaluation]:
    return [one for name, one in sets.items() if name != NEW_DOMAIN]


def _removed(errors: dict[float, float | None], strength: float) -> float | None:
    """Return the share of the fit's forgetting that is gone at a strength, of backward errors."""
    base, here, fit = errors[0.0], errors[strength], errors[1.0]
    if base is None or here is None or fit is None or fit <= base:
        return None
    return forgetting_removed(fit, here, base)


def strength_plot(curve: Mapping[str, Any]) -> Figure:
    """Plot new-domain error against backward error, in %, with a point for each strength.

    Base and fit are marked. Bars are the paired 95% intervals of forgetting, added to the backward
    error of the base.

    Args:
        curve: See `strength_curve`. Points without a rate are left out.
    """
    points = [
        (one["strength"], 100 * one["new_domain"]["rate"], 100 * one["backward_error"]["rate"])
        for one in curve["points"]
        if None not in (one["new_domain"]["rate"], one["backward_error"]["rate"])
    ]
    intervals = {one["strength"]: one["forgetting"]["interval"] for one in curve["points"]}
    title = f"One fit at every strength, by {curve['strength_by']} ({curve['split']} sets)"
    figure, axes = new_figure(title, 4.4)
    panel = axes[0][0]
    panel.plot([x for _, x, _ in points], [y for _, _, y in points], color=GREY, linewidth=1.2)
    base_error = points[0][2] if points else 0.0
    for strength, x, y in points:
        low, high = (base_error + 100 * end for end in intervals[strength])
        panel.vlines(x, low, high, color=GREY, linewidth=0.8, alpha=0.6)
        name, color, marker = ENDS.get(strength, (None, BLUE, "o"))
        if strength == curve.get("chosen") and name is None:
            name, marker = f"chosen by the contract (strength {strength:g})", "s"
        size = 5 if name is None else 9
        panel.plot(x, y, marker, color=color, markersize=size, label=name, linestyle="none")
        offset = {"xytext": (5, 5), "textcoords": "offset points", "fontsize": SMALL}
        white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        panel.annotate(f"{strength:g}", (x, y), bbox=white, **offset)
    metric = curve["metric"].upper()
    x_label = f"error on the new domain, {curve['new_domain']}: {metric} in %"
    label_axes(panel, "", x_label, "backward error in % (bars: 95% interval of forgetting)")
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.margins(0.08)
    if points:
        panel.legend(fontsize=SMALL, frameon=False)
    return figure


def check_plot_file(file: Path) -> None:
    """Refuse a file for the plot whose suffix is none of `SUFFIXES`."""
    if file.suffix not in SUFFIXES:
        raise UserError(f"plot is '{file}'; give a file that ends in {' or '.join(SUFFIXES)}")


def save_strength_plot(file: Path, curve: Mapping[str, Any]) -> None:
    """Write the plot; a file that is there is replaced.

    Raises:
        UserError: If it can't be written.
    """
    check_plot_file(file)
    content = io.BytesIO()
    kind = file.suffix[1:]
    note = {"Subject" if kind == "pdf" else "Description": f"adapter {curve.get('adapter')}"}
    strength_plot(curve).savefig(content, format=kind, dpi=200, metadata=note)
    try:
        replace_file(file, content.getvalue())
    except OSError as error:
        raise UserError(
            f"{file} can't be written ({error.strerror}); give another --plot"
        ) from None
