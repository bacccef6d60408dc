"""Diagnosis of a run (figures, k-hat and LOO, plots, how its prior shrinks), and of a prior."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from blora_pyro.data import IGNORED, Examples, OnBadRow, load_mixture, stop
from blora_pyro.diagnostics.explanations import Shrinkage, how_it_shrinks
from blora_pyro.diagnostics.khat import Khat, fit_khat
from blora_pyro.diagnostics.layers import summarise_kinds
from blora_pyro.diagnostics.plots import all_plots, save_plots
from blora_pyro.diagnostics.report import Diagnosis
from blora_pyro.diagnostics.summaries import Summary, summarise
from blora_pyro.errors import UserError, check_positive
from blora_pyro.evaluation import main_measure, normalizer_for, score
from blora_pyro.guides import latent_sites, with_prior_arguments
from blora_pyro.models import Base, FactorPrior, base_of, check_device, on_this_machine
from blora_pyro.models.decoding import alike_in_length, decode, encode, text_of
from blora_pyro.options import AUTO, FitConfig, column_names
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.draws import BATCH_SIZE, token_logits, traces
from blora_pyro.posterior.inference_data import MIN_RATIOS
from blora_pyro.runs.folders import claim, default_output, read_run
from blora_pyro.runs.listeners import Listener, heard_by
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.parts import build
from blora_pyro.runs.record import RUN
from blora_pyro.tables import Part, Table, figure_columns, number, percent, text_columns
from blora_pyro.transcription.safeguards import hearings

KHAT_DRAWS = 30
KHAT_UTTERANCES = 64
PRIOR_DRAWS = 8
PRIOR_UTTERANCES = 16


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


# ---- a prior, before there are data


@dataclass(frozen=True)
class Move:
    """How far a draw of the prior moves the base.

    Attributes:
        kl: KL(base || draw) of the next token after the true ones, mean over the tokens, nats.
        rate: Error rate of the draw's transcripts; None if there are no words.
    """

    kl: float
    rate: float | None


@dataclass(frozen=True)
class PriorPrediction:
    """The base, and draws of the prior as its adapter, on the same utterances."""

    prior: str
    prior_args: dict[str, Any]
    rank: int
    alpha: float
    utterances: int
    tokens: int
    metric: str
    base_rate: float | None
    draws: tuple[Move, ...]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        return asdict(self)


def predict_prior(
    config: FitConfig, draws: int = PRIOR_DRAWS, progress: Listener | None = None
) -> PriorPrediction:
    """Adapt the base by draws of the prior, and tell how far its answers move; nothing is fitted.

    Args:
        config: Options of the fit that the prior is for; of its training data `max_utterances` are
            heard, 16 if it names none.
        draws: Number of draws.
        progress: Listener to the stages; None is bars in a notebook.

    Raises:
        UserError: On bad options or data, as the fit.
    """
    check_positive(draws=draws)
    progress = heard_by(progress)
    config = on_this_machine(config)
    config.check_base()
    check_device(config.device)
    config = with_prior_arguments(config)
    config = replace(config, max_utterances=config.max_utterances or PRIOR_UTTERANCES)
    progress.stage("loading")
    base = base_of(config)
    loader = Loader(base, config, progress.features, progress.note)
    examples = loader.load(config.sources, "train", limit=config.max_utterances)
    model, _ = build(base, config, train=examples)
    progress.stage("the base")
    before, known = error_rate(base, examples, config.normalizer), log_probs(base, examples)
    prior = FactorPrior(model.groups, model.prior, model.device)
    pyro.set_rng_seed(config.seed)  # of a GPU, which `traces` leaves alone
    found = []
    for index, trace in enumerate(traces(prior, draws, config.seed), 1):
        progress.stage(f"draw {index} of {draws}")
        latent = latent_sites(trace)
        with model.adapters.using({site.name: latent[site.name]["value"] for site in prior.sites}):
            nats = kl_div(log_probs(base, examples), known, log_target=True, reduction="sum")
            rate = error_rate(base, examples, config.normalizer)
        found.append(Move(float(nats) / len(known), rate))
    return PriorPrediction(
        config.prior,
        dict(config.prior_args),
        config.rank,
        model.alpha,
        len(examples),
        examples.num_tokens,
        main_measure(examples.texts, examples.written),
        before,
        tuple(found),
    )


def log_probs(base: Base, examples: Examples) -> Tensor:
    """Return log-probabilities of the next token at all targets, (targets, vocabulary)."""
    found = token_logits(base.net, examples)
    return torch.cat([logits[labels != IGNORED].log_softmax(-1) for logits, labels in found])


def error_rate(base: Base, examples: Examples, normalizer: str) -> float | None:
    """Return the error rate of Whisper's first attempts, in the set's main measure.

    Without its fallbacks, which would take many times as long where a draw has ruined it. None if
    there are no words.
    """
    texts = [""] * len(examples)
    for chosen in alike_in_length(examples.prompts, BATCH_SIZE):
        features = examples.features[chosen]
        limits = [one.limit for one in hearings(base, features)]
        prompts = [examples.prompts[index] for index in chosen]
        tokens = decode(base, encode(base, features), prompts, limits)
        for index, said in zip(chosen, tokens, strict=True):
            texts[index] = text_of(base, said)
    rate = score(examples, texts, normalizer_for(base, normalizer)).main.rate
    return None if math.isnan(rate) else rate


def prediction_tables(found: PriorPrediction) -> Sequence[Part]:
    """Return the table of a prediction, and how it is read."""
    arguments = ", ".join(f"{name} {value}" for name, value in found.prior_args.items())
    metric = found.metric.upper()
    columns = [*text_columns("", wrap=False), *figure_columns("KL, nats\na token", f"{metric}\n%")]
    table = Table(
        columns,
        f"{len(found.draws)} draws of prior {found.prior} ({arguments}), rank {found.rank}, alpha "
        f"{found.alpha:g}, on {found.utterances} utterances ({found.tokens:,} tokens)",
    )
    table.add_row("the base", number(0.0, ".3g"), percent(found.base_rate))
    kls = [one.kl for one in found.draws]
    rates = [one.rate for one in found.draws if one.rate is not None]
    for name, pick in (("least", min), ("median", median), ("most", max)):
        table.add_row(
            f"a draw, {name}", number(pick(kls), ".3g"), percent(pick(rates) if rates else None)
        )
    return [
        table,
        "KL(base || draw) of the next token. A fit starts at the base, whatever its prior: where "
        "draws leave the base as it is, the prior holds the fit to it; where they ruin it, the "
        "prior hardly says anything.",
    ]
