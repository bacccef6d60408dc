"""The report of a run as one HTML file, `report.html`, or of several beside each other.

`report.html.jinja` is the page: it needs no network and no script but one for sorting, which its
own policy allows by its hash. Whatever others wrote is escaped there.
"""

import base64
import hashlib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from blora_pyro.declarations import declarations, flag_of
from blora_pyro.errors import UserError, reason
from blora_pyro.families import BASE_INFORMED
from blora_pyro.files import replace_file
from blora_pyro.models import base_of
from blora_pyro.options import AUTO, MACHINE_OPTIONS, FitConfig, fit_command
from blora_pyro.posterior import Posterior
from blora_pyro.runs.folders import (
    REPORT,
    claim_file,
    default_output,
    read_run,
)
from blora_pyro.runs.listeners import Listener, heard_by
from blora_pyro.runs.record import RUN, Combined, Kept, RunRecord
from blora_pyro.runs.report import (
    alarm_line,
    combine_line,
    contract_lines,
    dev_line,
    fit_tables,
    kept_line,
    prune_tables,
)
from blora_pyro.runs.report_figures import (
    Fragment,
    Plot,
    forests,
    headline,
    layers,
    loss_plots,
    strength_figure,
    with_minus,
)
from blora_pyro.runs.report_transcripts import (
    SHOWN,
    Utterance,
    add_confidences,
    embed_audio,
    find_audio,
    most_changed,
)
from blora_pyro.runs.scoring import NEW_DOMAIN
from blora_pyro.runs.shown import ShownRun, about_tables, in_words, origin, side_by_side
from blora_pyro.tables import NONE, Part, Table, percent, text_columns
from blora_pyro.terminal import escaped

_CODE = re.compile("`([^`]+)`")
_INTERVAL = re.compile(r"^(.*?)( \[.*\])$")


def write_report(
    runs: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    top: int = SHOWN,
    samples: int = 0,
    prior: str | None = None,
    trust_prior_file: bool = False,
    overwrite: bool = False,
    device: str = AUTO,
    progress: Listener | None = None,
) -> Path:
    """Write the report of a run, or of several beside each other, and return its path.

    Args:
        runs: Folders of runs, or Hub ids.
        output: The file; None is `report.html` in the folder of the run, which is replaced, and of
            several runs in the working folder.
        top: Utterances shown.
        samples: Posterior draws for how sure the model is of each word that is shown; 0 is none.
        prior: File of the prior, if a run has one of a user's own: its code is run.
        trust_prior_file: Run the files that the runs name; see `Posterior.load`.
        overwrite: Replace `output`.
        device: A torch device, for draws.
        progress: Listener to the stages; None is bars in a notebook.

    Raises:
        UserError: If a run can't be read, draws are asked for where there are none, or the file
            can't be written.
    """
    progress = heard_by(progress)
    if output is None and len(runs) == 1:
        file = default_output(runs[0], REPORT, "output")
        claim_file(file, overwrite=True)
    else:
        claim_file(file := Path(output or REPORT), overwrite)
    reported = [_read(run, device, prior, trust_prior_file) for run in runs]
    html = report_html(reported, top=top, samples=samples, from_hub=True, progress=progress)
    try:
        replace_file(file, html.encode())
    except OSError as error:
        why = error.strerror
        raise UserError(f"{file} can't be written ({why}); give another --output") from None
    return file


def write_own_report(folder: Path, run: ShownRun) -> None:
    """Write the report of a run into its folder.

    Raises:
        OSError: If it can't be written.
    """
    replace_file(folder / REPORT, report_html([run]).encode())


def _read(run: str | Path, device: str, prior: str | None, trust_prior_file: bool) -> ShownRun:
    posterior, record = read_run(run, device, prior, pooled=True, trust_prior_file=trust_prior_file)
    return replace(ShownRun.read(run), posterior=posterior, record=record)


def report_html(
    runs: Sequence[ShownRun],
    *,
    top: int = SHOWN,
    samples: int = 0,
    from_hub: bool = False,
    with_audio: bool = True,
    progress: Listener | None = None,
) -> str:
    """Return the report of runs, one or several.

    Args:
        runs: What they are.
        top: Utterances shown.
        samples: See `write_report`.
        from_hub: Read audio from sets of the Hub, too, which may take a while.
        with_audio: Embed audio, or link it.
        progress: Listener to the stages; None is bars in a notebook.

    Raises:
        UserError: See `add_confidences`.
    """
    labels = _labels(len(runs))
    named = dict(zip(labels, runs, strict=True))
    utterances, count = most_changed({k: one.rows for k, one in named.items()}, top)
    links = 0
    if with_audio:
        for one in runs:
            if one.rows:
                find_audio(
                    utterances, one.record.resolved, one.metrics.get("split", "test"), from_hub
                )
        links = embed_audio(utterances)
    if samples:
        _add_confidences(named, utterances, samples, heard_by(progress))
    template = _environment().get_template("report.html.jinja")
    page = template.render(
        runs=[_run(label, one) for label, one in named.items()],
        several=len(runs) > 1,
        forests=forests({label: one.metrics for label, one in named.items()}),
        differences=_differences(runs) if len(runs) > 1 else [],
        utterances=utterances,
        count=count,
        links=links,
        heard=any(one.source for one in utterances),
        samples=samples,
    )
    return escaped(page)


def _labels(count: int) -> list[str]:
    """Return what runs are called on the page; "" if there is one."""
    letters = [chr(ord("A") + index) if index < 26 else str(index + 1) for index in range(count)]
    return letters if count > 1 else [""]


def _add_confidences(
    runs: Mapping[str, ShownRun], utterances: Sequence[Utterance], samples: int, progress: Listener
) -> None:
    for label, one in runs.items():
        if one.posterior is None or one.posterior.pooling is not None:
            raise UserError(
                f"samples is {samples}, and {one.name} has factors of its own for every domain; "
                "leave samples out"
            )
        progress.stage(f"{samples} draws")

        def on_done(done: int, total: int) -> None:
            progress.transcripts("how sure", done, total)

        base = base_of(one.record.resolved)
        add_confidences(utterances, base, one.posterior, samples, label, on_done)


# ---- what the template shows


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": _figure,
        "percent": percent,
        "prose": _prose,
        "set_name": _set_name,
        "sha256": lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(),
        "shade": _shade,
    }
    return environment


def _shade(share: float) -> int:
    """Return a share in whole percent; 0 where it is none."""
    return round(100 * min(max(share, 0.0), 1.0)) if math.isfinite(share) else 0


def _figure(cell: Any) -> Markup:
    """Return a cell: minus signs, and its interval in quieter letters."""
    text = with_minus(NONE if cell is None else str(cell))
    if match := _INTERVAL.match(text):
        return Markup('{}<span class="interval">{}</span>').format(*match.groups())
    return escape(text)


def _prose(text: str) -> Markup:
    """Return a text with minus signs, and code where it has backticks."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(with_minus(text)))))


def _set_name(name: str) -> str:
    return "new domain" if name == NEW_DOMAIN else name


def _run(label: str, run: ShownRun) -> dict[str, Any]:
    """Return what the page shows of one run."""
    record, metrics, posterior = run.record, run.metrics, run.posterior
    assert posterior is not None  # of a fit that is done
    notes, strengths = _notes(run), None
    if record.kept:
        line, strengths = _kept(run.name, record.kept)
        notes.insert(0, Fragment(line))
    told = {note.text for note in notes}
    is_as_fitted = record.made_of is None and posterior.weakened is None
    return {
        "label": label,
        "name": run.name,
        "headline": headline(metrics),
        "about": _lede(run),
        "notes": notes,
        "parts": [one for one in _measured(metrics) if isinstance(one, Table) or one not in told],
        "loss": list(loss_plots(record)),
        "strengths": strengths,
        "layers": layers(posterior, float(record.resolved.beta), is_as_fitted),
        "use": use_lines(run.name, posterior, record),
        "tables": about_tables(record.to_json(), posterior),
    }


def _notes(run: ShownRun) -> list[Fragment]:
    """Return what is to be known of a run at the first look; what went wrong is `harm`."""
    record, metrics, notes = run.record, run.metrics, list[Fragment]()
    if "alarm" in metrics:
        notes.append(Fragment(alarm_line(metrics["alarm"]), "harm"))
    if contract := metrics.get("contract"):
        *_, verdict = contract_lines(contract, metrics.get("split", "test"))
        notes.append(Fragment(str(verdict), "" if contract["holds"] else "harm"))
    if record.dev:
        notes.append(Fragment(dev_line(record.dev)))
    if record.combined and record.combined.keys() == Combined.__annotations__.keys():
        notes.append(Fragment(combine_line(record.combined)))
    return notes


def _kept(name: str, kept: Kept) -> tuple[str, Plot]:
    """Return the line on the strength that was chosen, and the plot of all.

    Raises:
        UserError: If the curve is damaged.
    """
    try:
        return kept_line(kept), strength_figure(kept)
    except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise UserError(
            f"{name}: {RUN} is damaged ('kept' has a curve that is none: {reason(error)}); fit "
            "again"
        ) from None


def _measured(metrics: Mapping[str, Any]) -> list[Any]:
    """Return tables and lines of what was measured."""
    if "size" in metrics:
        return list(prune_tables(metrics))
    return list(fit_tables(metrics)) if metrics else []


def _lede(run: ShownRun) -> str:
    """Return in a line how the run was made."""
    record, posterior = run.record, run.posterior
    assert posterior is not None
    if text := origin(record.to_json()):
        return f"{posterior.base}, rank {posterior.rank}. {text}"
    config, family = record.resolved, posterior.family
    steps = record.history[-1].step if record.history else 0
    seconds = (record.seconds or {}).get("fit")
    took = (
        ""
        if seconds is None
        else f" in {seconds:,.0f} s"
        if seconds < 300
        else (f" in {seconds / 60:,.0f} min")
    )
    return (
        f"{posterior.base}, fitted to {', '.join(map(str, config.domains))}: prior {family.prior}, "
        f"beta {float(config.beta):.3g}, rank {posterior.rank}, {steps:,} steps{took}, "
        f"seed {config.seed}"
    )


# ---- configuration, and how to use it


def use_lines(name: str, posterior: Posterior, record: RunRecord) -> list[str]:
    """Return commands that use a run, and the one that fits it again."""
    run, domain = shlex.quote(name), ""
    if posterior.pooling is not None:
        domain = f" --domain {shlex.quote(posterior.pooling.domains[0])}"
    lines = [
        f"blora-pyro transcribe talk.wav --adapter {run}{domain}",
        f"blora-pyro evaluate {run} --data more{domain}",
        f"blora-pyro merge {run} merged{domain}",
    ]
    if not domain and not record.made_of and may_be_a_prior(posterior):
        lines.append(f"blora-pyro fit --data more --prior-from {run}")
    if not record.made_of:
        lines += ["# fitted by", fit_command(_given(record))]
    return lines


def may_be_a_prior(posterior: Posterior) -> bool:
    """Tell whether `--prior-from` takes a fit: of a spread, by weights that are independent."""
    has_spread = any(bool(one.any()) for one in posterior.stddev.values())
    return has_spread and posterior.family.prior != BASE_INFORMED


def _given(record: RunRecord) -> FitConfig:
    """Return the options of a fit as they were given; where that is not known, as resolved."""
    config = record.resolved
    with suppress(UserError, TypeError):
        config = FitConfig(**(record.options or config.to_json()))
    return replace(config, device=AUTO)


def _differences(runs: Sequence[ShownRun]) -> list[Part]:
    """Return what differs between two runs, see `side_by_side`; of more runs their options."""
    if len(runs) == 2:
        return side_by_side(*runs)[1][2:]
    table = Table(text_columns("option", *_labels(len(runs))))
    for name in declarations(FitConfig):
        values = [in_words(run.options.get(name), 12) for run in runs]
        if len({*values}) > 1 and name not in MACHINE_OPTIONS:
            table.add_row(flag_of(FitConfig, name), *(value or NONE for value in values))
    return [table] if table.rows else []
