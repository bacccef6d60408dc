"""Diagnosis of a run: figures by kind of layer, k-hat and LOO, plots, and how its prior shrinks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from blora_pyro.data import Examples, OnBadRow, load_mixture, stop
from blora_pyro.diagnostics.explanations import Shrinkage, how_it_shrinks
from blora_pyro.diagnostics.khat import Khat, fit_khat
from blora_pyro.diagnostics.layers import summarise_kinds
from blora_pyro.diagnostics.plots import all_plots, save_plots
from blora_pyro.diagnostics.report import Diagnosis
from blora_pyro.diagnostics.summaries import Summary, summarise
from blora_pyro.errors import UserError
from blora_pyro.models import base_of
from blora_pyro.options import AUTO, FitConfig, column_names
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.inference_data import MIN_RATIOS
from blora_pyro.runs.folders import claim, default_output, read_run
from blora_pyro.runs.record import RUN

KHAT_DRAWS = 30
KHAT_UTTERANCES = 64


def diagnose(
    run: str | Path,
    output: str | Path | None = None,
    *,
    prior: str | None = None,
    trust_prior_file: bool = False,
    khat: bool = False,
    draws: int = KHAT_DRAWS,
    device: str = AUTO,
    on_stage: Callable[[str], None] = lambda name: None,
    on_figures: Callable[[Diagnosis], object] = lambda found: None,
) -> Diagnosis:
    """Compute the figures of a run, draw its plots, and compute k-hat if that is asked for.

    Args:
        run: Folder of a fit, or its Hub id.
        output: Folder for the plots; None is `diagnostics` in the run's folder.
        prior: File of the prior, if the run was fitted with a user's own: its code is run.
        trust_prior_file: Run the file that the run names; see `Posterior.load`.
        khat: Compute k-hat and PSIS-LOO, on up to 64 utterances of the run's training set: as long
            as their forward pass for every draw.
        draws: Draws for k-hat, 30 or more.
        device: A torch device, for k-hat.
        on_stage: Called with the name of every stage.
        on_figures: Called with the diagnosis as soon as its figures are there, without plots and
            k-hat.

    Raises:
        UserError: If the run can't be read, or is a pruned or combined one, its prior has to be
            named, or `output` can't be written.
    """
    if draws < MIN_RATIOS:
        raise UserError(f"draws is {draws}; k-hat needs {MIN_RATIOS} or more")
    posterior, record = read_run(run, device, prior, trust_prior_file=trust_prior_file)
    if record.made_of:
        how, origin = record.made_of
        raise UserError(f"{run} is a {how} run, and has no prior; diagnose {origin}")
    if record.history is None:
        raise UserError(f"{Path(run) / RUN} is missing or damaged (no 'history'); fit again")
    config, history = record.resolved, record.history
    beta = float(config.beta)
    on_stage("figures")
    summary = summarise(posterior)
    folder = claim(Path(output or default_output(run, "diagnostics", "output")), overwrite=True)
    shrinkage = Shrinkage.of(posterior, summary)
    found = Diagnosis(
        run=Path(run),
        beta=beta,
        num_weights=posterior.num_weights,
        summary=summary,
        kinds=summarise_kinds(summary),
        shrinkage=shrinkage,
        explanation=how_it_shrinks(summary, shrinkage, beta),
        khat=Khat(None, "not asked for; --khat computes it"),
        plots=(),
    )
    on_figures(found)
    on_stage("plots")
    plots = tuple(save_plots(folder, all_plots(posterior, summary, history, beta)))
    found = replace(found, plots=plots)
    if khat:
        on_stage("k-hat")
        found = replace(found, khat=measure_khat(posterior, summary, config, draws))
    return found


def measure_khat(posterior: Posterior, summary: Summary, config: FitConfig, draws: int) -> Khat:
    """Return k-hat and LOO on evenly spaced training utterances, or why there are none."""
    beta = float(config.beta)
    if beta == 0:
        return Khat(None, "not computed: with beta = 0 there is no posterior to be close to")
    if any(row.kl is None for row in summary.factors):
        return Khat(None, "not computed: the guide has points, which have no density")
    if config.distillation or config.ewc:
        name = "distillation" if config.distillation else "ewc"
        return Khat(None, f"not computed: the fit had {name}, so its target is not the posterior")
    try:
        base = base_of(config)
        on_bad: OnBadRow = stop if config.on_bad_row == "stop" else lambda error: None
        limit, columns = config.max_utterances, column_names(config.column)
        dataset = load_mixture(config.data, "train", on_bad, limit, config.seed, columns)
        count = min(KHAT_UTTERANCES, len(dataset))
        chosen = dataset.select(np.linspace(0, len(dataset) - 1, count).round().astype(int))
        examples = Examples(
            chosen,
            base.feature_extractor,
            base.tokenizer,
            config.task,
            base.net.config.max_target_positions,
            language=config.language,
            language_map=base.language_map,
            on_bad=on_bad,
            trim=config.trim_audio,
        )
        return fit_khat(posterior, base, examples, beta, draws, len(dataset))
    except UserError as error:
        return Khat(None, f"not computed: {error}")
