"""The command line: each command is a thin call of one library function."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from blora_pyro import __version__
from blora_pyro.errors import Interrupted, UserError

app = typer.Typer(
    help="Adapt Whisper to a new domain by variational low-rank adaptation, without losing what it "
    "already knew.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a fit.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over what is there.")]
Device = Annotated[str, typer.Option(help="A torch device: cpu, cuda, cuda:1, ...")]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Whatever ends a command early is one line on stderr, never a traceback.

    Exit codes: 2 for bad input, 1 for a loss that is not finite, 130 for Ctrl-C, 143 for SIGTERM.
    """
    try:
        _quiet_transformers()
        yield
    except UserError as error:
        typer.echo(f"blora-pyro: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
    except FloatingPointError as error:
        typer.echo(f"blora-pyro: {error}; try a smaller --lr", err=True)
        raise typer.Exit(1) from None
    except Interrupted as error:
        typer.echo(f"blora-pyro: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("blora-pyro: interrupted", err=True)
        raise typer.Exit(130) from None


def _quiet_transformers() -> None:
    """Keep the loading bars and the advice of transformers out of the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blora-pyro {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Nothing to do before a command."""


@app.command()
def fit(
    context: typer.Context,
    base: Annotated[
        str, typer.Option(help="'pocket', a Whisper checkpoint folder, or a Hub id.")
    ] = "pocket",
    data: Annotated[
        str,
        typer.Option(
            help="New domain: de-en, es-en, zh-en, a folder with train.jsonl and test.jsonl, or a "
            "JSONL manifest."
        ),
    ] = "de-en",
    test: Annotated[
        str | None, typer.Option(help="Its test set, if not the test split of --data.")
    ] = None,
    backward: Annotated[
        str | None,
        typer.Option(
            help="Held-out sets of what the base already knows, commas between ('none': no set).",
            show_default="the six pocket languages for the pocket base",
        ),
    ] = None,
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
    guide: Annotated[
        str | None,
        typer.Option(
            help="The family's own, point (MAP; LoRA with --beta 0), auto-normal, or .py."
        ),
    ] = None,
    beta: Annotated[
        str, typer.Option(help="Weight of the KL, or 'auto': 1 / training tokens.")
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
    batch_size: Annotated[int, typer.Option(help="Utterances a step.")] = 16,
    estimator: Annotated[
        str, typer.Option(help="Noise of a step: shared, flipout, flipout-token or local.")
    ] = "shared",
    precision: Annotated[
        str, typer.Option(help="fp32, or bf16: Whisper under autocast, factors in fp32.")
    ] = "fp32",
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
    as_json: Json = False,
) -> None:
    """Fit BLoRA to a new domain; show what was gained and what was forgotten.

    Stopped by Ctrl-C, SIGTERM or a crash, it goes on with --resume as if nothing had happened.
    """
    with one_line_errors():
        from blora_pyro import runs
        from blora_pyro.report import TerminalProgress, fit_tables, print_tables

        folder = output or Path("runs") / f"{Path(data).stem}-{Path(prior).stem}-seed{seed}"
        options: dict[str, Any] = {
            "base": base,
            "data": data,
            "test": test,
            "backward": None if backward is None else _names(backward),
            "prior": prior,
            "guide": guide,
            "beta": _beta(beta),
            "prior_scale": prior_scale,
            "prior_args": _arguments(prior_arg or [], prior_scale),
            "rank": rank,
            "alpha": alpha,
            "target_modules": target_modules,
            "lr": lr,
            "steps": steps,
            "epochs": epochs,
            "batch_size": batch_size,
            "estimator": estimator,
            "precision": precision,
            "seed": seed,
            "device": device,
        }
        if resume:
            options = {name: value for name, value in options.items() if _is_given(context, name)}
        with TerminalProgress() as progress:
            run = runs.fit(
                folder,
                overwrite=overwrite,
                resume=resume,
                checkpoint_every=checkpoint_every,
                progress=progress,
                **options,
            )
        if as_json:
            _print_json(run.metrics)
        else:
            print_tables(fit_tables(run.metrics), f"run folder: {folder}")


@app.command()
def evaluate(
    run: RunFolder,
    data: Annotated[
        str | None, typer.Option(help="Set to score.", show_default="the fit's test sets")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Score a run again, base and adapted, on its own test sets or on another set."""
    with one_line_errors():
        from blora_pyro import runs
        from blora_pyro.report import TerminalProgress, fit_tables, print_tables

        with TerminalProgress() as progress:
            metrics = runs.evaluate_run(run, data, progress, device)
        if as_json:
            _print_json(metrics)
        else:
            print_tables(fit_tables(metrics))


@app.command()
def diagnose(
    run: RunFolder,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the plots.", show_default="RUN/diagnostics")
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(help="The .py file of the prior, if the run has one: its code is run."),
    ] = None,
    khat: Annotated[
        bool, typer.Option(help="Compute k-hat, on up to 64 training utterances.")
    ] = True,
    draws: Annotated[int, typer.Option(help="Draws for k-hat, 30 or more.")] = 30,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Show where a fit adapted Whisper and how its prior shrank it; plot it."""
    with one_line_errors():
        from blora_pyro import diagnosis
        from blora_pyro.report import TerminalProgress, diagnosis_tables, print_tables

        with TerminalProgress() as progress:
            found = diagnosis.diagnose(
                run,
                output,
                prior=prior,
                khat=khat,
                draws=draws,
                device=device,
                on_stage=progress.stage,
            )
        if as_json:
            _print_json(found.to_json())
        else:
            print_tables(diagnosis_tables(found))


@app.command()
def prune(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the smaller run.")],
    snr: Annotated[
        float | None,
        typer.Option(help="Keep directions of ΔW above this many posterior standard deviations."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Keep this many directions of ΔW in every layer.")
    ] = None,
    evaluation: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure what it costs.")
    ] = True,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Write a smaller adapter: what the posterior is sure of; show what that costs."""
    with one_line_errors():
        from blora_pyro.pruning import prune_run
        from blora_pyro.report import TerminalProgress, print_tables, prune_tables

        with TerminalProgress() as progress:
            metrics = prune_run(
                run,
                out,
                rank=rank,
                snr=snr,
                evaluate=evaluation,
                overwrite=overwrite,
                device=device,
                progress=progress,
            )
        if as_json:
            _print_json(metrics)
        else:
            print_tables(prune_tables(metrics), f"run folder: {out}")


@app.command()
def priors(as_json: Json = False) -> None:
    """List the prior families and their arguments."""
    with one_line_errors():
        from blora_pyro.guides import FAMILIES, describe_prior

        families = {name: describe_prior(name) for name in FAMILIES}
        if as_json:
            _print_json(
                [
                    {"name": name, "summary": text, "arguments": [asdict(one) for one in arguments]}
                    for name, (text, arguments) in families.items()
                ]
            )
        else:
            from blora_pyro.report import print_tables, prior_tables

            print_tables(prior_tables(families))


@app.command()
def transcribe(
    audio: Annotated[list[Path], typer.Argument(help="wav, flac, ogg/opus or mp3 files.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a fit.", show_default="the base model alone")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model.", show_default="the adapter's, or pocket")
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            help="en, or de-en for code-switched speech.",
            show_default="the adapter's data; without adapter, detected",
        ),
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Transcribe audio files, a line each."""
    with one_line_errors():
        from blora_pyro import runs

        texts = runs.transcribe(audio, adapter, base, language, device)
        if as_json:
            rows = zip(audio, texts, strict=True)
            _print_json([{"audio": str(path), "text": text} for path, text in rows])
        else:
            for path, text in zip(audio, texts, strict=True):
                typer.echo(text if len(audio) == 1 else f"{path}: {text}")


@app.command()
def merge(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the checkpoint.")],
    overwrite: Overwrite = False,
) -> None:
    """Write the base with the posterior mean merged in: a plain Whisper checkpoint."""
    with one_line_errors():
        from blora_pyro import runs

        runs.merge_run(run, out, overwrite)
        typer.echo(f"merged checkpoint: {out}")


def _is_given(context: typer.Context, option: str) -> bool:
    """Whether an option of `FitConfig` was on the command line."""
    source = context.get_parameter_source("prior_arg" if option == "prior_args" else option)
    return source is not None and source.name != "DEFAULT"


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(name.strip() for name in text.split(","))


def _beta(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise UserError(f"beta is '{text}'; give a number >= 0, or 'auto'") from None


def _arguments(texts: list[str], scale: float | None) -> dict[str, str]:
    """`key=value` texts, none given twice or against `--prior-scale`."""
    arguments: dict[str, str] = {}
    for text in texts:
        key, sign, value = (part.strip() for part in text.partition("="))
        if not (key and sign and value):
            raise UserError(f"prior-arg is '{text}'; give key=value, such as scale=0.05")
        if key in arguments:
            raise UserError(f"prior-arg gives '{key}' twice; give it once")
        arguments[key] = value
    if scale is not None and "scale" in arguments:
        raise UserError("scale is given by both --prior-scale and --prior-arg; give it by one")
    return arguments


def _print_json(content: Any) -> None:
    json.dump(content, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
