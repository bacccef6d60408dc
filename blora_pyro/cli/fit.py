"""`blora-pyro fit`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from blora_pyro.cli.common import (
    NORMALIZER_HELP,
    Device,
    Dtype,
    Json,
    LocalFilesOnly,
    Overwrite,
    Revision,
    one_line_errors,
    print_json,
)
from blora_pyro.cli.fit_options import fit_options, given_options
from blora_pyro.launched import is_main


def fit(
    context: typer.Context,
    base: Annotated[
        str,
        typer.Option(
            help="'pocket', a folder with a Whisper checkpoint or with an adapter, which is merged "
            "into its base, or a Hub id of either."
        ),
    ] = "pocket",
    dtype: Dtype = "float32",
    revision: Revision = None,
    local_files_only: LocalFilesOnly = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SOURCE",
            help="New domain: de-en, es-en, zh-en, a folder, a manifest (JSONL, CSV, TSV) or a Hub "
            "data set; given repeatedly, all are mixed, and the first is scored (but see "
            "--pooling).",
            show_default="de-en",
        ),
    ] = None,
    data_weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...",
            help="How often each --data is drawn from, in proportion.",
            show_default="every utterance once an epoch",
        ),
    ] = None,
    pooling: Annotated[
        str,
        typer.Option(
            metavar="complete|hierarchical|none",
            help="One adapter for all --data; or one for each, around a shared one; or one for "
            "each and nothing shared.",
        ),
    ] = "complete",
    pooling_scale: Annotated[
        float | None,
        typer.Option(
            help="How wide the domains lie around the shared adapter, over the prior's own width.",
            show_default="0.5, if --pooling hierarchical",
        ),
    ] = None,
    max_utterances: Annotated[
        int | None,
        typer.Option(help="Use so many utterances of the first --data.", show_default="all"),
    ] = None,
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming",
            help="Read the training data as they are needed, for more than the disk holds.",
        ),
    ] = False,
    shuffle_buffer: Annotated[
        int | None,
        typer.Option(help="Rows that a stream is shuffled in at a time.", show_default="1000"),
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Its test set, if not the test split of --data.")
    ] = None,
    dev: Annotated[
        str | None,
        typer.Option(
            help="Its dev set, for --eval-every or a sweep.", show_default="--data's dev split"
        ),
    ] = None,
    backward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SOURCE",
            help="A held-out set of what the base already knows; may be given repeatedly, or with "
            "commas between ('none': no set).",
            show_default="the six pocket languages for the pocket base",
        ),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            help="Of rows that name none: de, German, or de-en for code-switched speech.",
            show_default="none",
        ),
    ] = None,
    task: Annotated[str, typer.Option(help="transcribe or translate.")] = "transcribe",
    on_bad_row: Annotated[
        str, typer.Option(help="stop at a row that can't be used, or skip and list it.")
    ] = "stop",
    prior: Annotated[
        str,
        typer.Option(help="Prior family (see 'blora-pyro priors'), or the path of a .py file."),
    ] = "normal",
    prior_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="An argument of the prior family; may be given repeatedly."
        ),
    ] = None,
    prior_from: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Carry an earlier fit on: its posterior is the prior, and where the guide starts; "
            "its base, rank, alpha and target modules are taken over.",
            show_default="a prior family",
        ),
    ] = None,
    prior_inflation: Annotated[
        float | None,
        typer.Option(
            help="Factor >= 1 on the deviations of --prior-from: forget some of it.",
            show_default="1",
        ),
    ] = None,
    guide: Annotated[
        str | None,
        typer.Option(
            help="The family's own, point (MAP; LoRA with --beta 0), auto-normal, or .py."
        ),
    ] = None,
    beta: Annotated[
        str, typer.Option(help="Weight of the KL; 'auto' 0.03 / training tokens, 'elbo' 1 / them.")
    ] = "1e-4",
    prior_scale: Annotated[
        float | None,
        typer.Option(help="The prior's argument 'scale'.", show_default="the family's"),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of every update.")] = 16,
    alpha: Annotated[
        float | None,
        typer.Option(help="Updates are scaled by alpha / rank.", show_default="2 rank"),
    ] = None,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, suffixes such as q_proj,v_proj, or a regex.")
    ] = "all-linear",
    lr: Annotated[float, typer.Option(help="Peak learning rate of Adam.")] = 5e-3,
    steps: Annotated[int, typer.Option(help="Steps of SVI.")] = 400,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the training data, instead of --steps.")
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="Of the rate after its peak: cosine, linear or constant.")
    ] = "cosine",
    warmup_steps: Annotated[
        int | None,
        typer.Option(help="Steps until the peak rate.", show_default="a tenth of --steps"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Utterances a step.")] = 16,
    gradient_accumulation: Annotated[
        int, typer.Option(help="Parts to take a batch in: less memory, the same gradient.")
    ] = 1,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute activations twice: less memory, the same gradient, a slower step.",
        ),
    ] = False,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Clip gradients to this norm.", show_default="no clipping")
    ] = None,
    spec_augment: Annotated[
        bool, typer.Option("--spec-augment", help="Mask training features, as SpecAugment does.")
    ] = False,
    cache_encoder: Annotated[
        bool,
        typer.Option(
            "--cache-encoder",
            help="Keep on disk what the encoder does before its first adapted layer; exact.",
        ),
    ] = False,
    trim_audio: Annotated[
        bool,
        typer.Option(
            "--trim-audio",
            help="Hear batches without the silence after their longest utterance; not exact.",
        ),
    ] = False,
    estimator: Annotated[
        str, typer.Option(help="Noise of a step: shared, flipout, flipout-token or local.")
    ] = "shared",
    precision: Annotated[
        str, typer.Option(help="fp32, or bf16: Whisper under autocast, factors in fp32.")
    ] = "fp32",
    distillation: Annotated[
        float,
        typer.Option(
            help="Weight of staying near the base where the audio is prompted in other languages."
        ),
    ] = 0.0,
    distillation_languages: Annotated[
        str | None,
        typer.Option(
            metavar="L,L,...", help="Those languages.", show_default="those of --backward"
        ),
    ] = None,
    ewc: Annotated[
        float,
        typer.Option(help="Strength of EWC; Fisher information of --backward's train splits."),
    ] = 0.0,
    average_from: Annotated[
        float | None,
        typer.Option(
            help="Average the posterior over the steps after this share of them.",
            show_default="no averaging",
        ),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between two measurements of the dev error; the best posterior is kept.",
            show_default="none, the last posterior is kept",
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many measurements without a new best.", show_default="never"
        ),
    ] = None,
    normalizer: Annotated[str, typer.Option(help=NORMALIZER_HELP)] = "whisper",
    seed: Annotated[int, typer.Option(help="Of start, data order and noise.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Run folder.", show_default="runs/DATA-PRIOR-seedSEED")
    ] = None,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the fit in --output; no other option need be given."
        ),
    ] = False,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints.", show_default="every two seconds or more"),
    ] = None,
    device: Device = "cpu",
    track: Annotated[
        str | None,
        typer.Option(
            metavar="TRACKER,...",
            help="Tell tensorboard, wandb, trackio or mlflow of every step.",
            show_default="none",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fit BLoRA to a new domain; show what was gained and what was forgotten.

    Stopped by Ctrl-C, SIGTERM or a crash, it goes on with --resume as if nothing had happened.
    """
    with one_line_errors():  # most options are read from the context, as `sweep` does it, too
        from blora_pyro.options import FitConfig
        from blora_pyro.reports.progress import TerminalProgress
        from blora_pyro.runs import fits
        from blora_pyro.runs.report import dev_line, fit_tables
        from blora_pyro.tables import print_report

        names = [source.partition("=")[2] or source for source in data or ["de-en"]]
        domain = "+".join(Path(name).stem for name in names)
        belief = f"after-{Path(prior_from).name}" if prior_from else Path(prior).stem
        how = belief if pooling == "complete" else f"{belief}-{pooling}"
        folder = output or Path("runs") / f"{domain}-{how}-seed{seed}"
        some = resume or prior_from is not None  # what is not given is that run's
        options = given_options(context) if some else fit_options(context.params)
        with TerminalProgress() if is_main() else nullcontext() as progress:
            run = fits.fit(
                FitConfig(**options),
                folder,
                overwrite=overwrite,
                resume=resume,
                checkpoint_every=checkpoint_every,
                progress=progress,
            )
        if not is_main():
            return
        if as_json:
            print_json(run.metrics)
        else:
            more = [dev_line(run.dev)] if run.dev else []
            print_report([*fit_tables(run.metrics), *more, f"run folder: {folder}"])
