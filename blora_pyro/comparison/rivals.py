"""Rivals that are no latent program: full fine-tuning and stock PEFT LoRA, through the same loop.

Both are Whisper's likelihood alone, without latent sites, and a "guide" that samples nothing and
holds the weights to be trained: Pyro's ELBO is then the mean token NLL, and learning-rate schedule,
batches, checkpoints and Adam are those of every other fit.
"""

import copy
import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from blora_pyro.adapters import Group, Site, find_targets, group_by_shape
from blora_pyro.comparison.methods import FULL
from blora_pyro.data import Examples
from blora_pyro.errors import UserError
from blora_pyro.files import replace_file, write_json
from blora_pyro.fitting import fit_guide
from blora_pyro.fitting.checkpoints import Checkpoints
from blora_pyro.fitting.interrupts import Interrupts
from blora_pyro.fitting.svi import Step
from blora_pyro.models import Base, WhisperLikelihood, WhisperProgram
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Family, Posterior
from blora_pyro.runs.folders import CHECKPOINT, remove_files, save_posterior
from blora_pyro.runs.listeners import Listener
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.record import FINISHED, FITTING, RUN, state_of

WEIGHTS = "net.safetensors"  # of full fine-tuning
# Whisper's encoder has sines for positions, which are not trained.
_FIXED = ("model.encoder.embed_positions.weight",)


def plain_program(
    net: WhisperForConditionalGeneration, autocast: torch.dtype | None = None
) -> WhisperProgram:
    """Tokens ~ Categorical(Whisper(x)) without latent sites.

    Args:
        net: A Whisper, whose parameters train or not as they are; set to eval mode (no dropout).
        autocast: See `WhisperLikelihood`.
    """

    def no_prior(site: Site) -> dist.Distribution:
        raise AssertionError(f"there is no {site.name}")

    return WhisperProgram(WhisperLikelihood(net, autocast=autocast), (), no_prior)


class Weights(nn.Module):
    """A guide without a site, that holds the weights of a net that are trained."""

    def __init__(self, net: nn.Module) -> None:
        """The parameters of `net` that require a gradient, themselves and not copies."""
        super().__init__()
        named = [(name, one) for name, one in net.named_parameters() if one.requires_grad]
        self.names = [name for name, _ in named]
        self.weights = nn.ParameterList(one for _, one in named)

    def forward(self, *args: object) -> dict[str, Tensor]:
        """Nothing is sampled."""
        return {}

    def mean(self) -> dict[str, Tensor]:
        """No site has a mean."""
        return {}

    def stddev(self) -> dict[str, Tensor]:
        """No site has a deviation."""
        return {}


def full_net(base: Base) -> WhisperForConditionalGeneration:
    """A copy of the base's net of which every weight is trained."""
    net = copy.deepcopy(base.net)
    for name, one in net.named_parameters():
        one.requires_grad_(name not in _FIXED)
    return net


def peft_net(base: Base, config: FitConfig) -> WhisperForConditionalGeneration:
    """A copy of the base's net with PEFT's LoRA layers, which alone are trained.

    A is Kaiming-uniform and B zero, as PEFT starts by default and `guides.starts` does.
    """
    net = copy.deepcopy(base.net).requires_grad_(False)
    targets = list(find_targets(net, config.target_modules))
    # task_type stays None: PEFT's sequence-to-sequence wrapper does not take Whisper's inputs.
    alpha = config.alpha or 2 * config.rank
    lora = LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=targets)
    with warnings.catch_warnings():  # peft 0.21 calls a name that transformers 5.23 has deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        get_peft_model(net, lora)
    return net


def peft_posterior(
    base: Base, config: FitConfig, net: WhisperForConditionalGeneration
) -> Posterior:
    """The factors of PEFT's layers as a posterior that is a point.

    Args:
        base: The base model.
        config: Of the fit.
        net: From `peft_net`.
    """
    groups = group_by_shape(find_targets(base.net, config.target_modules), config.rank)
    mean = {
        site.name: _stacked(net, group, site.factor) for group in groups for site in group.sites
    }
    zero = {name: torch.zeros_like(value) for name, value in mean.items()}
    state = {f"means.{name}": value for name, value in mean.items()}
    alpha = float(config.alpha or 2 * config.rank)
    family = Family("normal", {}, "point")
    return Posterior(base.name, groups, alpha, mean, zero, family, state, config.revision)


def _stacked(net: nn.Module, group: Group, factor: str) -> Tensor:
    """A or B of every layer of a group, of the site's shape."""
    layers = [net.get_submodule(name) for name in group.modules]
    weights = [getattr(layer, f"lora_{factor}")["default"].weight.detach() for layer in layers]
    return torch.stack(weights).cpu()


def fit_rival(
    kind: str, folder: Path, config: FitConfig, base: Base, progress: Listener
) -> list[Step]:
    """Fit a rival in a folder; a finished fit is read, an interrupted one gone on with.

    The folder gets `run.json`, and of PEFT the files of a posterior, of full fine-tuning
    `net.safetensors` with all trained weights.

    Args:
        kind: `methods.FULL` or `methods.PEFT`.
        folder: Of the fit.
        config: Of the fit; what is about the prior does not count.
        base: The base model, left as it is.
        progress: Told of steps.

    Returns:
        One `Step` a step.

    Raises:
        UserError: On bad options or data, or a folder that can't be written.
        FloatingPointError: See `fit_guide`.
        Interrupted: By a signal; a checkpoint has been written.
    """
    if state_of(folder) == FINISHED:
        about = json.loads((folder / RUN).read_text(encoding="utf-8"))
        return [Step(**step) for step in about["history"]]
    pyro.set_rng_seed(config.seed)
    loader = Loader(base, config, progress.features, progress.note)
    train = loader.load(config.sources, "train", limit=config.max_utterances)
    config = config.resolved(train.num_tokens, len(train))
    net = full_net(base) if kind == FULL else peft_net(base, config)
    about = {"kind": kind, "config": config.to_json()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN, {"state": FITTING, **about})
        with Interrupts() as interrupts, interrupts.deferred():
            started = time.monotonic()
            history = train_net(net, train, config, folder, interrupts, progress)
            about["seconds"] = {"fit": round(time.monotonic() - started, 3)}
            if kind == FULL:
                _save_weights(folder / WEIGHTS, Weights(net))
            else:
                save_posterior(folder, peft_posterior(base, config, net))
            about["history"] = [asdict(step) for step in history]
            write_json(folder / RUN, {"state": FINISHED, **about})
            remove_files(folder, CHECKPOINT)
    except OSError as error:
        raise UserError(
            f"{error.filename} can't be written ({error.strerror}); put that right and start the "
            "same command again"
        ) from None
    progress.fitted()
    return history


def train_net(
    net: WhisperForConditionalGeneration,
    train: Examples,
    config: FitConfig,
    folder: Path | None = None,
    interrupts: Interrupts | None = None,
    progress: Listener | None = None,
) -> list[Step]:
    """Fit those parameters of a net that require a gradient, by the loop of every fit.

    Args:
        net: A Whisper, trained in place.
        train: Training data.
        config: Resolved.
        folder: For checkpoints; None keeps none.
        interrupts: Asked before every step whether to stop.
        progress: Told of steps.

    Raises:
        FloatingPointError, Interrupted, OSError: See `fit_guide`.
    """
    progress = progress or Listener()
    autocast = torch.bfloat16 if config.precision == "bf16" else None
    model, guide = plain_program(net, autocast), Weights(net)
    about = {**config.to_json(), "weights": guide.names, "training_data": train.fingerprint}
    progress.ready(config, train.num_tokens, sum(one.numel() for one in guide.parameters()))
    return fit_guide(
        model,
        guide,
        train,
        config.with_options(beta=0.0, estimator="shared", average_from=None),
        on_step=progress.step,
        checkpoints=Checkpoints(folder, about, interrupts=interrupts),
    )


def _save_weights(path: Path, guide: Weights) -> None:
    tensors = {
        name: one.detach().cpu().contiguous()
        for name, one in zip(guide.names, guide.weights, strict=True)
    }
    replace_file(path, save(tensors))
