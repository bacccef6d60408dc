"""A run looked into: figures by kind of layer, k-hat, plots, and what they say of its prior."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from blora_pyro.config import FitConfig, base_of
from blora_pyro.data import Examples, OnBadRow, load_mixture, stop
from blora_pyro.diagnostics.explanations import Shrinkage, how_it_shrinks, khat_meaning
from blora_pyro.diagnostics.khat import fit_khat
from blora_pyro.diagnostics.layers import Place, kinds
from blora_pyro.diagnostics.plots import all_plots, save_plots
from blora_pyro.diagnostics.summaries import FactorSummary, Summary, UpdateSummary, summarise
from blora_pyro.errors import UserError
from blora_pyro.fitting.svi import Step
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.inference_data import MIN_RATIOS
from blora_pyro.runs.folders import beside, claim, read_run

KHAT_DRAWS = 30
KHAT_UTTERANCES = 64


@dataclass(frozen=True)
class KindSummary:
    """Layers of one kind, such as `decoder q_proj`, together.

    Attributes:
        kind: Part of Whisper and projection.
        layers: Number of layers.
        contraction: By factor, mean over the layers; None for a point.
        signal_to_noise: By factor, median over the layers; None for a point.
        near_zero: Share of the elements of A and B with |mean| < 1e-3.
        kl: By factor, nats; None for a point.
        kl_share: Share in the posterior's whole KL; None without KL.
        kl_per_weight: KL of A and B over their number of weights, nats; None without KL.
        effective_rank: Mean over the layers.
        directions: Directions of ΔW above their standard deviation, mean over the layers; None
            where nothing has one.
        relative_norm: Norm of ΔW over that of the frozen weight, mean over the layers, or None.
        active_ranks: By factor, mean over the layers; None unless the prior is the horseshoe.
    """

    kind: str
    layers: int
    contraction: dict[str, float | None]
    signal_to_noise: dict[str, float | None]
    near_zero: float
    kl: dict[str, float | None]
    kl_share: float | None
    kl_per_weight: float | None
    effective_rank: float
    directions: float | None
    relative_norm: float | None
    active_ranks: dict[str, float | None]


@dataclass(frozen=True)
class Khat:
    """PSIS k-hat of a fit.

    Attributes:
        value: None if it was not computed; may be infinite.
        meaning: What it says, or why it was not computed.
        draws: Number of draws.
        utterances: Training utterances that it was computed on.
        of_utterances: All training utterances.
    """

    value: float | None
    meaning: str
    draws: int = 0
    utterances: int = 0
    of_utterances: int = 0


@dataclass(frozen=True)
class Diagnosis:
    """What `blora-pyro diagnose` shows.

    Attributes:
        run: The run's folder.
        beta: Weight of the KL in the fit.
        num_weights: Number of adapter weights.
        summary: Every layer's figures.
        kinds: The same by kind of layer.
        shrinkage: Figures that compare between priors.
        explanation: How the prior shrinks, in words.
        khat: PSIS k-hat of the fit.
        plots: Files written.
    """

    run: Path
    beta: float
    num_weights: int
    summary: Summary
    kinds: tuple[KindSummary, ...]
    shrinkage: Shrinkage
    explanation: str
    khat: Khat
    plots: tuple[Path, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON has it: what is infinite or no number is None."""
        content = asdict(self)
        content["summary"]["kl"] = self.summary.kl
        return _finite(content)


def diagnose(
    run: str | Path,
    output: str | Path | None = None,
    *,
    prior: str | None = None,
    khat: bool = True,
    draws: int = KHAT_DRAWS,
    device: str = "cpu",
    on_stage: Callable[[str], None] = lambda name: None,
) -> Diagnosis:
    """Look into a run: figures, k-hat, plots.

    Args:
        run: Folder of a fit, or its Hub id.
        output: Folder for the plots; None is `diagnostics` in the run's.
        prior: File of the prior, for a run that was fitted with a user's own: its code is run.
        khat: Compute k-hat, on up to 64 utterances of the run's training set.
        draws: Draws for k-hat, 30 or more.
        device: A torch device, for k-hat.
        on_stage: Told what begins.

    Raises:
        UserError: If the run can't be read, or is a pruned or combined one, its prior has to be
            named, or `output` can't be written.
    """
    if draws < MIN_RATIOS:
        raise UserError(f"draws is {draws}; k-hat needs {MIN_RATIOS} or more")
    posterior, about = read_run(run, device, prior)
    if "combined" in about:
        runs = " or ".join(about["combined"]["from"])
        raise UserError(f"{run} is combined of several runs and has no prior; diagnose {runs}")
    if "pruned" in about:
        whole = about["pruned"]["from"]
        raise UserError(f"{run} is a pruned run, turned away from its prior; diagnose {whole}")
    config: FitConfig = about["config"]
    beta = float(config.beta)
    history = _history(run, about)
    on_stage("figures")
    summary = summarise(posterior)
    folder = claim(Path(output or beside(run, "diagnostics", "output")), overwrite=True)
    shrinkage = Shrinkage.of(posterior, summary)
    found = Khat(None, "not asked for")
    if khat:
        on_stage("k-hat")
        found = measure_khat(posterior, summary, config, draws)
    on_stage("plots")
    return Diagnosis(
        run=Path(run),
        beta=beta,
        num_weights=posterior.num_weights,
        summary=summary,
        kinds=summarise_kinds(summary),
        shrinkage=shrinkage,
        explanation=how_it_shrinks(summary, shrinkage, beta),
        khat=found,
        plots=tuple(save_plots(folder, all_plots(posterior, summary, history, beta))),
    )


def _history(run: str | Path, about: dict[str, Any]) -> list[Step]:
    try:
        return [Step(**step) for step in about["history"]]
    except (KeyError, TypeError) as error:
        path = Path(run) / "run.json"
        raise UserError(f"{path} is missing or damaged ({error}); fit again") from None


def measure_khat(posterior: Posterior, summary: Summary, config: FitConfig, draws: int) -> Khat:
    """K-hat on evenly spaced utterances of the run's training set, or why there is none."""
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
        dataset = load_mixture(config.data, "train", on_bad, config.max_utterances, config.seed)
        count = min(KHAT_UTTERANCES, len(dataset))
        chosen = dataset.select(np.linspace(0, len(dataset) - 1, count).round().astype(int))
        examples = Examples(
            chosen,
            base.feature_extractor,
            base.tokenizer,
            config.task,
            base.net.config.max_target_positions,
            language=config.language,
            on_bad=on_bad,
            trim=base.trim_audio,
        )
        value = fit_khat(posterior, base, examples, beta, draws)
    except UserError as error:
        return Khat(None, f"not computed: {error}")
    meaning = khat_meaning(value, posterior.num_weights)
    return Khat(value, meaning, draws, len(examples), len(dataset))


def summarise_kinds(summary: Summary) -> tuple[KindSummary, ...]:
    """Layers of one kind together, encoder first."""
    whole = summary.kl if any(row.kl is not None for row in summary.factors) else None
    return tuple(
        _summarise_kind(
            kind,
            [row for row in summary.factors if Place.of(row.module).kind == kind],
            [row for row in summary.updates if Place.of(row.module).kind == kind],
            whole,
        )
        for kind in kinds(row.module for row in summary.updates)
    )


def _summarise_kind(
    kind: str, factors: list[FactorSummary], updates: list[UpdateSummary], whole: float | None
) -> KindSummary:
    by_factor = {name: [row for row in factors if row.factor == name] for name in ("A", "B")}
    random = {n: [row for row in rows if row.kl is not None] for n, rows in by_factor.items()}
    weights = sum(row.weights for row in factors)
    kl = {name: _over(sum, [row.kl for row in rows]) for name, rows in random.items()}
    total = sum(value or 0.0 for value in kl.values())
    random_weights = sum(row.weights for rows in random.values() for row in rows)
    return KindSummary(
        kind=kind,
        layers=len(updates),
        contraction={
            n: _over(fmean, [row.contraction for row in rows]) for n, rows in random.items()
        },
        signal_to_noise={
            n: _over(median, [row.signal_to_noise for row in rows]) for n, rows in random.items()
        },
        near_zero=sum(row.near_zero * row.weights for row in factors) / weights,
        kl=kl,
        kl_share=total / whole if whole else None,
        kl_per_weight=total / random_weights if random_weights else None,
        effective_rank=fmean(row.effective_rank for row in updates),
        directions=_over(fmean, [row.directions for row in updates if any(row.singular_stddevs)]),
        relative_norm=_over(fmean, [row.relative_norm for row in updates]),
        active_ranks={
            n: _over(fmean, [row.active_ranks for row in rows]) for n, rows in by_factor.items()
        },
    )


def _over(function: Callable[[list[float]], float], values: Sequence[float | None]) -> float | None:
    """A function of the values that are known, or None if there are none."""
    known = [value for value in values if value is not None]
    return function(known) if known else None


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return str(content) if isinstance(content, Path) else content
