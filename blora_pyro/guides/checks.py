"""The checks that every prior family must pass, on a tiny Whisper with random weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

from blora_pyro.data import IGNORED, Batch
from blora_pyro.errors import UserError
from blora_pyro.families import is_code
from blora_pyro.guides.contracts import Guide
from blora_pyro.guides.registry import (
    build_guide,
    build_prior,
    check_shapes,
    latent_sites,
    load_family,
    prepare_prior,
    users_code,
)
from blora_pyro.models import BLoRA, FactorPrior, Temper

DRAWS = 200
STANDARD_ERRORS = 6.0
STEPS, LEARNING_RATE, BETA = 10, 0.05, 1e-6  # of the small fit
SEED = 0


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: What must hold.
        passed: Whether it does.
        message: Why not, or a figure that was found; one line.
    """

    name: str
    passed: bool
    message: str = ""


@dataclass(frozen=True)
class FamilyReport:
    """The results of a family's checks, in order; those that need a failed one are left out."""

    family: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)


def check_family(path: str, guide: str | None = None, **arguments: Any) -> FamilyReport:
    """Check a prior and its guide as `fit` uses them: contract, start, moments, KL, a small fit.

    Needs no checkpoint and takes some seconds. Random numbers and Pyro's parameter store are left
    as they were. The code of a user's file is run.

    Args:
        path: Name of a family, or the path of a `.py` file.
        guide: Name or file of another guide; None is the family's own.
        **arguments: Arguments of the prior.

    Raises:
        UserError: If there is no such family.
    """
    load_family(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        trial = _Trial(path, guide or path, arguments)
        checks = []
        for name, check in _CHECKS.items():
            try:
                # A scope for each check, as the parameters of Pyro's own guides share their names.
                with pyro.get_param_store().scope(), users_code(trial.file, "this check"):
                    checks.append(Check(name, True, check(trial)))
            except UserError as error:
                checks.append(Check(name, False, " ".join(str(error).split())))
                if check in _NEEDED:
                    break
    return FamilyReport(path, tuple(checks))


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UserError(otherwise)


class _Trial:
    """A family, and the programs that it is checked in once its prior has been built.

    `model` adapts all layers of a Whisper and is fitted; `latent` is the prior of its fc1 layers
    alone, without Whisper, and is for statistics.
    """

    def __init__(self, prior: str, guide: str, arguments: dict[str, Any]) -> None:
        self.prior_name, self.guide_name, self.arguments = prior, guide, arguments
        self.file = prior if is_code(prior) else guide
        self.net = _net()
        tokens = torch.randint(2, 40, (4, 7))
        labels = tokens[:, 1:].clone()
        labels[:, 0] = IGNORED
        self.batch = Batch(torch.randn(4, 8, 20), tokens[:, :-1], labels)
        self.model: BLoRA
        self.latent: FactorPrior

    def build_prior(self) -> None:
        prior: Any = build_prior(self.prior_name, **self.arguments)
        prepare_prior(prior, self.net, iter([self.batch]))
        self.model = BLoRA(self.net, prior, rank=2, alpha=4.0)
        groups = tuple(one for one in self.model.groups if one.modules[0].endswith("fc1"))
        self.latent = FactorPrior(groups, prior, self.model.device)

    def guide(self, model: FactorPrior, seed: int = SEED) -> Any:
        """A guide at its start."""
        torch.manual_seed(seed)
        guide: Any = build_guide(self.guide_name, model)
        with torch.no_grad():  # Pyro's own guides make their parameters in the first call
            guide(*([self.batch] if isinstance(model, BLoRA) else []))
        return guide

    def moved_guide(self) -> Any:
        """A guide of `latent`, away from its start in every parameter."""
        guide = self.guide(self.latent)
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return guide


def _net() -> WhisperForConditionalGeneration:
    config = WhisperConfig(
        vocab_size=40,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=10,
        max_target_positions=12,
        init_std=0.2,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
        decoder_start_token_id=1,
    )
    return WhisperForConditionalGeneration(config).eval()


# ---- the checks, in order: each raises UserError, or returns a figure worth showing


def _check_prior(trial: _Trial) -> str:
    trial.build_prior()
    for site in trial.latent.sites:
        with poutine.block():
            prior = trial.latent.prior(site)
        check_shapes(prior, site, trial.prior_name)
        is_finite = bool(prior.log_prob(prior.sample()).isfinite().all())
        _require(is_finite, f"the density of a draw of {site.name} is not finite")
    return ""


def _check_sites(trial: _Trial) -> str:
    guide = trial.guide(trial.latent)  # refuses other sites by name
    prior, own = (
        {name: tuple(site["value"].shape) for name, site in latent_sites(trace).items()}
        for trace in (poutine.trace(one).get_trace() for one in (trial.latent, guide))
    )
    for name, shape in prior.items():
        _require(own[name] == shape, f"the guide's {name} has shape {own[name]}, not {shape}")
    return ""


def _check_moments(trial: _Trial) -> str:
    guide = trial.moved_guide()
    for kind in ("mean", "stddev"):
        moments = getattr(guide, kind)()
        for site in trial.latent.sites:
            _require(site.name in moments, f"{kind}() lacks {site.name}")
            value = moments[site.name]
            is_right = tuple(value.shape) == site.shape and bool(value.isfinite().all())
            _require(is_right, f"{kind}() of {site.name} is not finite, or not of {site.shape}")
            _require(not value.requires_grad, f"{kind}() has a gradient; detach it")
            _require(kind == "mean" or bool((value >= 0).all()), "stddev() is below 0")
    return ""


def _check_start(trial: _Trial) -> str:
    mean = trial.guide(trial.latent).mean()
    for group in trial.latent.groups:
        _require(
            bool((mean[group.B.name] == 0).all()),
            f"mean() of {group.B.name} is not 0 at the start, so the adapted model is not the base",
        )
        _require(
            bool((mean[group.A.name] != 0).any()),
            f"mean() of {group.A.name} is 0 like that of B: a saddle, which no gradient leaves",
        )
    return ""


@torch.no_grad()
def _check_draws(trial: _Trial) -> str:
    guide = trial.moved_guide()
    draws = [guide() for _ in range(DRAWS)]
    for site in trial.latent.sites:
        values = torch.stack([draw[site.name] for draw in draws]).double()
        mean, stddev = guide.mean()[site.name].double(), guide.stddev()[site.name].double()
        noisy = stddev > 0  # elsewhere the guide is a point
        exact = values[:, ~noisy] == mean[~noisy]
        _require(bool(exact.all()), f"stddev() of {site.name} is 0 where its draws vary")
        if not noisy.any():
            continue
        squares = (values - mean)[:, noisy].square()
        for kind, sample, expected in (
            ("mean()", values[:, noisy], mean[noisy]),
            ("stddev()", squares, stddev[noisy].square()),
        ):
            error = sample.std(0) / math.sqrt(DRAWS)
            far = ((sample.mean(0) - expected).abs() > STANDARD_ERRORS * error).float()
            _require(
                float(far.mean()) < 0.01, f"{kind} of {site.name} is not that of {DRAWS} draws"
            )
    return f"{DRAWS} draws"


def _check_kl(trial: _Trial) -> str:
    prior, guide = trial.latent, trial.moved_guide()
    elbo = TraceMeanField_ELBO()
    kl = torch.tensor([elbo.loss(prior, guide) for _ in range(2)]).double()
    slack = 1e-5
    if kl[0] != kl[1]:  # no closed form, so that it is known to the noise of its draws
        kl = torch.tensor([elbo.loss(prior, guide) for _ in range(DRAWS)]).double()
        slack = 0.05  # scales that are drawn, too, give tails which standard errors understate
    with torch.no_grad():
        ratios = torch.tensor([_log_ratio(prior, guide) for _ in range(DRAWS)]).double()
    _require(bool(kl.isfinite().all()), f"the KL is {float(kl.mean())}")
    errors = [float(one.std()) / math.sqrt(len(one)) for one in (kl, ratios)]
    allowed = STANDARD_ERRORS * math.hypot(*errors) + slack * abs(float(kl.mean()))
    found = f"{float(kl.mean()):.4g} and {float(ratios.mean()):.4g} nats"
    _require(
        abs(float(kl.mean() - ratios.mean())) < allowed,
        f"the ELBO's KL and the mean of log q - log p over {DRAWS} draws are {found}",
    )
    return found


def _log_ratio(prior: FactorPrior, guide: Guide) -> float:
    drawn = poutine.trace(guide).get_trace()
    scored = poutine.trace(poutine.replay(prior, trace=drawn)).get_trace()
    return float(drawn.log_prob_sum() - scored.log_prob_sum())


@torch.no_grad()
def _check_state(trial: _Trial) -> str:
    guide, other = trial.moved_guide(), trial.guide(trial.latent, seed=SEED + 1)
    try:
        other.load_state_dict(guide.state_dict())
    except RuntimeError as error:
        raise UserError(f"its state_dict does not load: {error}") from None
    draws = []
    for one in (guide, other):
        torch.manual_seed(SEED)
        draws.append(one())
    for kind, mine, theirs in (
        ("mean()", guide.mean(), other.mean()),
        ("stddev()", guide.stddev(), other.stddev()),
        ("a draw", *draws),
    ):
        same = all(torch.equal(value, theirs[name]) for name, value in mine.items())
        _require(same, f"{kind} is another after its state_dict is loaded; keep all state in it")
    return ""


def _check_fit(trial: _Trial) -> str:
    guide = trial.guide(trial.model)
    before = {name: value.clone() for name, value in guide.mean().items()}
    start, end = _fit(trial, guide, BETA, STEPS)
    after = guide.mean()
    moved = [(after[site.name] != before[site.name]).any() for site in trial.model.sites]
    _require(all(moved), "a mean() does not move in a small fit")
    _require(end < 0.9 * start, f"the loss of a small fit goes from {start:.3g} to {end:.3g} nats")
    return f"{start:.3g} to {end:.3g} nats"


def _check_without_kl(trial: _Trial) -> str:
    start, end = _fit(trial, trial.guide(trial.model), 0.0, 3)
    _require(math.isfinite(end), f"with beta = 0 the loss is {end}")
    return f"{start:.3g} to {end:.3g} nats"


def _fit(trial: _Trial, guide: Any, beta: float, steps: int) -> tuple[float, float]:
    """Return the NLL of the posterior mean before and after some steps."""
    model, temper, elbo = trial.model, Temper(beta), TraceMeanField_ELBO()
    optimizer = torch.optim.Adam(guide.parameters(), lr=LEARNING_RATE)
    start = _nll(model, guide, trial.batch)
    try:
        for _ in range(steps):
            guide.zero_grad()
            loss = elbo.differentiable_loss(temper(model), temper(guide), trial.batch)
            _require(bool(loss.isfinite()), f"the loss with beta = {beta:g} is not finite")
            loss.backward()
            for name, parameter in guide.named_parameters():
                gradient = parameter.grad
                is_finite = gradient is None or bool(gradient.isfinite().all())
                _require(is_finite, f"the gradient of {name} is not finite")
                _require(beta == 0 or gradient is not None, f"{name} has no gradient")
            optimizer.step()
        return start, _nll(model, guide, trial.batch)
    finally:
        model.adapters.clear()


@torch.no_grad()
def _nll(model: BLoRA, guide: Guide, batch: Batch) -> float:
    """Mean NLL of the target tokens at the posterior mean."""
    assert batch.labels is not None
    with model.adapters.using(guide.mean()):
        logits = model.likelihood(batch).logits
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()))


_CHECKS: dict[str, Callable[[_Trial], str]] = {
    "the prior has the sites' shapes and finite densities": _check_prior,
    "prior and guide sample the same sites": _check_sites,
    "mean() and stddev() have the sites' shapes": _check_moments,
    "the mean at the start is the base": _check_start,
    "draws have the moments of mean() and stddev()": _check_draws,
    "the KL agrees with a Monte Carlo estimate": _check_kl,
    "the state_dict holds the whole guide": _check_state,
    "a small fit learns": _check_fit,
    "beta = 0 works": _check_without_kl,
}
_NEEDED = (_check_prior, _check_sites, _check_moments)  # nothing after them works without
