"""`blora-pyro fit`."""

import json
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

from blora_pyro.cli.common import (
    echo,
    one_line_errors,
    print_json,
    print_result,
    quiet_libraries,
)
from blora_pyro.cli.parameters import with_options, with_verbosity
from blora_pyro.errors import UserError, is_main
from blora_pyro.families import ROLES, check_code
from blora_pyro.options import (
    MACHINE_OPTIONS,
    CommandOptions,
    FitConfig,
    OutputOptions,
    differing,
    read_options,
    to_toml,
)
from blora_pyro.sources import describe_source


@with_verbosity
@with_options(FitConfig, OutputOptions, CommandOptions)
def fit(given: dict[str, Any], where: dict[str, Any], how: dict[str, Any]) -> None:
    """Fit BLoRA to a new domain; show what was gained and what was forgotten.

    Stopped by Ctrl-C, SIGTERM or a crash, it goes on with --resume as if nothing had happened.
    """
    with one_line_errors():
        with one_line_errors(only_main=True):
            output, command = OutputOptions(**where), CommandOptions(**how)
            if command.estimate and (output.resume or command.dry_run):
                other = "resume" if output.resume else "dry_run"
                raise UserError(
                    f"estimate is given with {other}; an estimate is of a whole fit, and stops: "
                    "give one of them"
                )
            file = None if command.config is None else Path(command.config)
            chosen = configuration(given, file)
            folder = output.output or default_folder(chosen)
            if output.resume:
                chosen = with_stored(chosen, folder)
        quiet_libraries()
        if command.dry_run:
            show_resolved(chosen, folder if output.resume else None, command.json)
            return

        if command.estimate:
            if is_main():
                show_estimate(chosen, command.json)
            return

        from blora_pyro.cli.progress import TerminalProgress
        from blora_pyro.runs import fits
        from blora_pyro.runs.report import dev_line, fit_tables

        with TerminalProgress() if is_main() else nullcontext() as progress:
            run = fits.fit(
                chosen,
                folder,
                overwrite=output.overwrite,
                resume=output.resume,
                checkpoint_every=output.checkpoint_every,
                progress=progress,
            )
        if not is_main():
            return
        more = [dev_line(run.dev)] if run.dev else []
        report = folder / "report.html"
        more += [f"report: {report}"] if report.is_file() else []
        more.append(f"run folder: {folder}")
        print_result(run.metrics, command.json, lambda: [*fit_tables(run.metrics), *more])


def configuration(given: dict[str, Any], file: Path | None) -> FitConfig:
    """Return the options of the command line and of a file; those of the command line win.

    Raises:
        UserError: If an option is not possible, or the file names code that the command line does
            not name.
    """
    stored = {} if file is None else read_options(file)
    kept = {name: value for name, value in stored.items() if name not in given}
    named = [given[role] for role in ROLES if role in given]
    check_code(kept, named, f"config '{file}'", "name it with --{role} to run it")
    chosen = {*stored}
    if file is not None and file.suffix == ".json":  # of a run, which names the defaults, too
        chosen = {*differing({**FitConfig().to_json(), **stored})}
        chosen |= {"base"} & stored.keys()
    return FitConfig.with_given({**stored, **given}, {*chosen, *given})


def with_stored(config: FitConfig, folder: Path) -> FitConfig:
    """Return the options of the fit in a folder, with the given ones in their place."""
    if not (folder / "run.json").is_file():
        return config
    stored = read_options(folder / "run.json")
    return FitConfig.with_given({**stored, **config.given_options}, config.given)


def default_folder(config: FitConfig) -> Path:
    """Return `runs/DATA-PRIOR-seedSEED`, with beta and a hash of other options that are given.

    Fits that differ have folders that differ, but for options of the machine.
    """
    sources = [describe_source(source) for source in config.sources]
    domain, prior = "+".join(Path(one).stem for one in sources), Path(config.prior).stem
    belief = f"after-{Path(config.prior_from).name}" if config.prior_from else prior
    parts = [domain, belief, *([config.pooling] if config.pooling else [])]
    content = config.to_json()
    chosen, told = differing(content), {*MACHINE_OPTIONS, "pooling", "seed"}
    if "beta" in chosen:
        told.add("beta")
        beta = config.beta if isinstance(config.beta, str) else f"{config.beta:g}"
        parts.append(f"beta{beta}")
    if [Path(one).stem for one in config.domains] == sources:  # else there is more to a path
        told.add("data")
    if prior == config.prior:
        told.add("prior")
    rest = {name: content[name] for name in chosen if name not in told}
    parts.append(f"seed{config.seed}")
    if rest:
        text = json.dumps(rest, sort_keys=True)
        parts.append(sha256(text.encode()).hexdigest()[:8])
    return Path("runs") / "-".join(parts)


def show_resolved(config: FitConfig, resumed: Path | None, as_json: bool) -> None:
    """Print every option, as far as it is known without the data.

    Args:
        config: Of the fit.
        resumed: Folder of the fit that is to go on, which is checked as if it did.
        as_json: Print JSON.
    """
    from blora_pyro.guides import with_prior_arguments
    from blora_pyro.models import on_this_machine
    from blora_pyro.runs.chains import continued
    from blora_pyro.runs.fit_folders import FitFolder

    if resumed is not None and (resumed / "run.json").is_file():
        config = FitFolder.reopen(resumed, config).config
    else:
        config.check_base()
        config, _ = continued(config)
    config = on_this_machine(config)
    options = with_prior_arguments(config).resolved(None, None).to_json()
    if as_json:
        print_json(options)
    else:
        echo(to_toml(options), nl=False)


def show_estimate(config: FitConfig, as_json: bool) -> None:
    """Time a few steps and transcripts, and print what the fit takes; see `estimate_fit`."""
    from blora_pyro.cli.progress import TerminalProgress
    from blora_pyro.runs.estimation import estimate_fit, estimate_tables

    with TerminalProgress() as progress:
        estimate = estimate_fit(config, progress)
    print_result(estimate, as_json, lambda: estimate_tables(estimate))
