"""What every strength of one fit costs and gains: a curve from the base to the fit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blora_pyro.errors import UserError
from blora_pyro.evaluation import Evaluation, change_summary, rate_summary
from blora_pyro.metrics import forgetting_removed
from blora_pyro.posterior.strength import SCALE, at_strength, check_strength
from blora_pyro.runs.finished import scoring_config, scoring_sets
from blora_pyro.runs.folders import STRENGTH_PLOT, beside, claim_file, read_run
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.outcomes import NEW_DOMAIN, domain_name, measure
from blora_pyro.runs.strength_plot import check_plot_file, save_strength_plot


def strength_curve(
    folder: str | Path,
    strengths: Sequence[float],
    progress: Listener | None = None,
    device: str = "cpu",
    *,
    by: str = SCALE,
    split: str = "test",
    normalizer: str | None = None,
    plot: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score a run at several strengths, and draw new-domain error against backward error.

    Args:
        folder: Of the run, or its Hub id.
        strengths: See `at_strength`. 0 (the base) and 1 (the fit) are scored in any case.
        progress: Told of stages.
        device: A torch device.
        by: See `at_strength`.
        split: Of the run's sets: `test`, or `dev` to choose a strength by.
        normalizer: None is that of the fit; see `FitConfig`.
        plot: A png, pdf or svg file; None is `strength.png` in the folder, which is written over.
        overwrite: Write over `plot`.

    Returns:
        Names of what was scored, and `points` by rising strength: the rates of the new domain,
        the backward sets and their average, with 95% intervals; `forgetting` against the base,
        paired; and `forgetting_removed`, 1 - forgetting / (forgetting at strength 1), None where
        the fit forgot nothing. Rates are fractions.

    Raises:
        UserError: If the run can't be read, lacks a new domain's or a backward set of the split, a
            strength is not possible, or the plot can't be written.
    """
    progress = progress or Listener()
    posterior, about = read_run(folder, device)
    file = _claim_plot(folder, plot, overwrite)
    strengths = sorted({0.0, 1.0, *strengths})
    for strength in strengths:
        check_strength(posterior, strength, by)
    config = scoring_config(about["config"], None, normalizer)
    base, sets = scoring_sets(config, split, progress)
    if NEW_DOMAIN not in sets or len(sets) < 2:
        raise UserError(
            f"the run has {', '.join(sets) or 'no set'} to score; a curve needs a test set of the "
            "new domain and backward sets: give a single strength"
        )
    results = {}
    for strength in strengths:
        progress.stage(f"strength {strength:g}" if strength else "the base, strength 0")
        with at_strength(posterior, strength, by).applied(base.net):
            results[strength] = measure(base, sets, lambda name: None, normalizer=config.normalizer)
    curve = {
        "split": split,
        "strength_by": by,
        "normalizer": config.normalizer,
        "new_domain": domain_name(config, split),
        "metric": results[0.0][NEW_DOMAIN].metric,
        "points": _points(results),
    }
    save_strength_plot(file, curve)
    return curve | {"plot": str(file)}


def _claim_plot(folder: str | Path, plot: str | Path | None, overwrite: bool) -> Path:
    """The file of the picture, before there is one."""
    file = beside(folder, STRENGTH_PLOT, "plot") if plot is None else Path(plot)
    check_plot_file(file)
    claim_file(file, overwrite or plot is None)
    return file


def _points(results: dict[float, dict[str, Evaluation]]) -> list[dict[str, Any]]:
    """The figures of every strength, rising; the first is the base, and 1 is among them."""
    points = []
    base = _backward(results[0.0])
    for strength, sets in results.items():
        rates = {name: rate_summary([one]) for name, one in sets.items()}
        point: dict[str, Any] = {
            "strength": strength,
            "new_domain": rates.pop(NEW_DOMAIN),
            "backward": rates,
            "backward_error": rate_summary(_backward(sets)),
            "forgetting": change_summary(base, _backward(sets)),
        }
        points.append(point)
    errors = {point["strength"]: point["backward_error"]["rate"] for point in points}
    for point in points:
        point["forgetting_removed"] = _removed(errors, point["strength"])
    return points


def _backward(sets: dict[str, Evaluation]) -> list[Evaluation]:
    return [one for name, one in sets.items() if name != NEW_DOMAIN]


def _removed(errors: dict[float, float | None], strength: float) -> float | None:
    """Share of the fit's forgetting that is not there at a strength, given backward errors."""
    base, here, fit = errors[0.0], errors[strength], errors[1.0]
    if base is None or here is None or fit is None or fit <= base:
        return None
    return forgetting_removed(fit, here, base)
