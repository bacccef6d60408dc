"""Full fine-tuning and stock PEFT LoRA, fitted and scored like any other fit.

    python experiments/rivals.py full --output runs/full --options data=zh-en lr=3e-4 steps=200
    python experiments/rivals.py peft --output runs/peft --options data=zh-en lr=2e-3 steps=200

    python experiments/rivals.py --study experiments/pocket/study.toml

Both are Whisper's likelihood without latent sites, and a guide that samples nothing and holds the
weights to be trained: Pyro's ELBO is then the mean token NLL, and learning-rate schedule, batches
and Adam are those of `blora-pyro fit`. So is the folder: `run.json`, `metrics.json` and
`utterances.jsonl`, which a study's table reads; of PEFT also the files of a posterior (a point), of
full fine-tuning `net.safetensors` with all trained weights.
"""

import argparse
import copy
import shlex
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration

from blora_pyro.adapters import Group, Site, find_targets, group_by_shape
from blora_pyro.declarations import key_values, parse_value
from blora_pyro.errors import UserError
from blora_pyro.files import write_json
from blora_pyro.fitting.history import Step
from blora_pyro.fitting.svi import fit_guide
from blora_pyro.guides import with_prior_arguments
from blora_pyro.metrics import sparsity
from blora_pyro.models import Base, WhisperLikelihood, WhisperProgram, base_of
from blora_pyro.options import FitConfig
from blora_pyro.posterior import Family, Posterior
from blora_pyro.runs.folders import ADAPTER, claim, save_posterior
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.record import FINISHED, RunRecord
from blora_pyro.runs.scoring import compare, evaluation_sets, measure
from blora_pyro.runs.utterances import utterance_rows, write_utterances
from blora_pyro.studies.base_fits import commit, machine
from blora_pyro.studies.definition import ScoreSpec
from blora_pyro.studies.results import TEST, score_files, scored_run
from blora_pyro.studies.running import StudyRun, run_study
from blora_pyro.studies.study_file import open_study, study_of

FULL, PEFT = "full", "peft"
WEIGHTS = "net.safetensors"
POINT: dict[str, Any] = {"guide": "point", "beta": 0.0}
# Whisper's encoder has fixed sines for positions.
_FIXED = ("model.encoder.embed_positions.weight",)


class TrainedWeights(nn.Module):
    """A guide without a site that holds the trained weights of a net."""

    def __init__(self, net: nn.Module) -> None:
        """Hold the parameters of `net` that require a gradient, themselves and not copies."""
        super().__init__()
        self.named = {name: one for name, one in net.named_parameters() if one.requires_grad}
        self.weights = nn.ParameterList(self.named.values())

    def forward(self, *args: object) -> dict[str, Tensor]:
        """Sample nothing."""
        return {}

    def mean(self) -> dict[str, Tensor]:
        """Return no site."""
        return {}

    def stddev(self) -> dict[str, Tensor]:
        """Return no site."""
        return {}


def plain_program(
    net: WhisperForConditionalGeneration, autocast: torch.dtype | None = None
) -> WhisperProgram:
    """Return tokens ~ Categorical(Whisper(x)) without latent sites; `net` goes to eval mode."""

    def no_prior(site: Site) -> dist.Distribution:
        raise AssertionError(f"there is no {site.name}")

    return WhisperProgram(WhisperLikelihood(net, autocast=autocast), (), no_prior)


def full_net(base: Base) -> WhisperForConditionalGeneration:
    """Return a copy of the base's net of which every weight is trained."""
    net = copy.deepcopy(base.net)
    for name, one in net.named_parameters():
        one.requires_grad_(name not in _FIXED)
    return net


def peft_net(base: Base, config: FitConfig) -> WhisperForConditionalGeneration:
    """Return a copy of the base's net with PEFT's LoRA layers, which alone are trained.

    A is Kaiming-uniform and B zero, as PEFT starts by default and `guides.normal` does.
    """
    net = copy.deepcopy(base.net).requires_grad_(False)
    targets = list(find_targets(net, config.target_modules))
    # task_type stays None: PEFT's sequence-to-sequence wrapper does not take Whisper's inputs.
    lora = LoraConfig(r=config.rank, lora_alpha=int(_alpha(config)), target_modules=targets)
    with warnings.catch_warnings():  # peft 0.21 calls a name that transformers 5.23 has deprecated
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        get_peft_model(net, lora)
    return net


def _alpha(config: FitConfig) -> float:
    return float(config.alpha or 2 * config.rank)


def peft_posterior(base: Base, config: FitConfig, net: nn.Module) -> Posterior:
    """Return the factors of PEFT's layers in `net` as a posterior that is a point."""
    groups = group_by_shape(find_targets(base.net, config.target_modules), config.rank)
    mean = {
        site.name: _stacked(net, group, site.factor) for group in groups for site in group.sites
    }
    zero = {name: torch.zeros_like(value) for name, value in mean.items()}
    state = {f"means.{name}": value for name, value in mean.items()}
    family = Family("normal", {}, "point")
    alpha = _alpha(config)
    return Posterior(base.name, groups, alpha, mean, zero, family, state, config.revision)


def _stacked(net: nn.Module, group: Group, factor: str) -> Tensor:
    """Return A or B of every layer of a group, in the site's shape."""
    layers = [net.get_submodule(name) for name in group.modules]
    weights = [getattr(layer, f"lora_{factor}")["default"].weight.detach() for layer in layers]
    return torch.stack(weights).cpu()


def train_net(net: WhisperForConditionalGeneration, train: Any, config: FitConfig) -> list[Step]:
    """Fit, in place, those parameters of a net that require a gradient.

    Args:
        net: A Whisper.
        train: Training data, `Examples`.
        config: Resolved.
    """
    autocast = torch.bfloat16 if config.precision == "bf16" else None
    program, guide = plain_program(net, autocast), TrainedWeights(net)
    return fit_guide(program, guide, train, replace(config, beta=0.0, estimator="shared"))


class WholeUpdate:
    """The update of full fine-tuning, for `compare`: its sparsity, and whose results they are."""

    def __init__(self, base: Base, net: nn.Module) -> None:
        """Take the difference of all trained weights."""
        old = dict(base.net.named_parameters())
        self.deltas = [
            (new - old[name]).detach().float() for name, new in TrainedWeights(net).named.items()
        ]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all ΔW."""
        total = sha256()
        for delta in self.deltas:
            total.update(delta.cpu().contiguous().numpy().data)
        return total.hexdigest()

    def sparsity(self) -> dict[str, float | None]:
        """Return the share of elements of ΔW below 1e-3; there is no A and no B."""
        return {"A": None, "B": None, "delta_w": sparsity(self.deltas)}


def fit_rival(
    kind: str, folder: Path, config: FitConfig, splits: Sequence[str] = (TEST,)
) -> RunRecord:
    """Fit a rival, score it as `fit` does, and write its folder.

    Args:
        kind: `FULL` or `PEFT`.
        folder: For the run; an earlier one in it is removed.
        config: Its options; what concerns prior and guide does not count.
        splits: `dev` or `test`, that are scored; see `score_files` for where.

    Returns:
        What `run.json` holds.

    Raises:
        UserError: On bad options or data, or a folder that can't be written.
        FloatingPointError: See `fit_guide`.
    """
    claim(folder, overwrite=True)
    started = time.monotonic()
    pyro.set_rng_seed(config.seed)
    base = base_of(config)
    loader = Loader(base, config)
    train = loader.load(config.sources, "train", limit=config.max_utterances)
    sets = {split: evaluation_sets(base, config, loader, split) for split in splits}
    resolved = config.resolved(train.num_tokens, len(train))
    net = full_net(base) if kind == FULL else peft_net(base, resolved)
    trained = TrainedWeights(net).named
    record = RunRecord(
        options=config.to_json(),
        config=resolved,
        language=train.main_language,
        training_utterances=len(train),
        training_tokens=train.num_tokens,
        adapter_weights=sum(one.numel() for one in trained.values()),
        other={"kind": kind},
    )
    record.write(folder)
    fit_started = time.monotonic()
    record.history = train_net(net, train, resolved)
    record.seconds = {"fit": round(time.monotonic() - fit_started, 3)}
    update: Any
    if kind == FULL:
        update, adapted = WholeUpdate(base, net), replace(base, net=net)
        save_file({name: one.contiguous() for name, one in trained.items()}, folder / WEIGHTS)
    else:
        update, adapted = peft_posterior(base, resolved, net), base
        save_posterior(folder, update)
    for split, own in sets.items():
        before = measure(base, own, lambda name: None, normalizer=config.normalizer)
        with nullcontext() if kind == FULL else update.applied(base.net):
            after = measure(adapted, own, lambda name: None, normalizer=config.normalizer)
        metrics, utterances = score_files(folder, split)
        rows = utterance_rows(own, {"base": before, "adapted": after}, update)
        write_utterances(utterances, rows)
        write_json(metrics, compare(update, before, after, resolved, split))
    record.state = FINISHED
    record.seconds["total"] = round(time.monotonic() - started, 3)
    record.write(folder)
    return record


def fit_external(path: Path) -> None:
    """Make the rows of a study's external methods that are missing, and put them into its table.

    Raises:
        UserError: If the study file, its table or a fit can't be.
    """
    content, output, results = open_study(path)
    run = run_study(study_of(content, str(path)), output, results=results, work=False)
    while missing := [one for one in run.plan.wanted() if is_missing(run, one)]:
        spec, folder = missing[0], output / "fits" / missing[0].run
        print(f"{spec.title}; {len(missing)} rows to do are known", flush=True)
        kind = FULL if spec.candidate.method.name == FULL else PEFT
        splits = list(dict.fromkeys((TEST, spec.split)))
        record = fit_rival(kind, folder, spec.config, splits)
        weights = folder / (WEIGHTS if kind == FULL else ADAPTER[1])
        for one in (replace(spec, split=split) for split in splits):
            about = replace(
                one.scored,
                weights=record.adapter_weights or 0,
                bytes=weights.stat().st_size,
                run=one.run,
                command=command_of(kind, spec.config),
                commit=commit(),
                machine=machine(torch.device("cpu")),
            )
            scored = scored_run(about, folder)
            run.scores[scored.key] = scored
        run.save()


def command_of(kind: str, config: FitConfig) -> str:
    """Return the command that makes a fit, with the options that differ from the defaults."""
    defaults, options = FitConfig(**POINT).to_json(), config.to_json()
    options["data"] = config.sources[0]
    texts = [f"{name}={value}" for name, value in options.items() if value != defaults[name]]
    return shlex.join(["python", "experiments/rivals.py", kind, "--options", *texts])


def is_missing(run: StudyRun, spec: ScoreSpec) -> bool:
    """Return whether an external method makes this score, and has not yet."""
    return spec.candidate.method.external and spec.key not in run.scores


def main() -> None:
    """Fit one rival, or those of a study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", nargs="?", choices=(FULL, PEFT))
    parser.add_argument("--output", type=Path, help="folder for the run")
    parser.add_argument(
        "--options", nargs="*", default=[], metavar="NAME=VALUE", help="options of blora-pyro fit"
    )
    parser.add_argument("--study", type=Path, help="make the external rows of this study file")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.study:
            fit_external(arguments.study)
        elif arguments.kind and arguments.output:
            given = key_values("options", arguments.options)
            options = {name: parse_value(FitConfig, name, value) for name, value in given.items()}
            config = with_prior_arguments(FitConfig(**{**options, **POINT}))
            fit_rival(arguments.kind, arguments.output, config)
        else:
            parser.error("give a kind and --output, or --study")
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
