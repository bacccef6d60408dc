"""What was measured with an adapter: `metrics.json`, its content and whose it is.

Nothing here imports torch before a posterior is read, so that runs are listed at once.
"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from blora_pyro.errors import UserError, reason
from blora_pyro.files import read_json
from blora_pyro.fitting.history import Ended
from blora_pyro.options import AVERAGE
from blora_pyro.runs.record import METRICS, RunRecord, Size, conforms, type_hints

if TYPE_CHECKING:
    from blora_pyro.posterior import Posterior

SIZES = {"layers", "directions", "adapter_weights", "nonzero_weights"}


class Rate(TypedDict):
    """An error rate; see `rate_summary`."""

    rate: float | None
    interval: list[float | None]
    raw: NotRequired["Rate"]


class Change(TypedDict):
    """A change of an error rate; see `change_summary`."""

    difference: float | None
    interval: list[float | None]
    raw: NotRequired["Change"]


class Average(TypedDict):
    """The average over sets, before and after."""

    base: Rate
    adapted: Rate
    change: Change


class Measured(TypedDict):
    """What was measured on a set, before and after: rates by measure.

    With `drift` the references are the base's own transcripts.
    """

    name: NotRequired[str]
    drift: NotRequired[bool]
    base: dict[str, Any]
    adapted: dict[str, Any]
    change: dict[str, Change]


class Sizes(TypedDict):
    """Sizes of a full adapter and of what was pruned of it."""

    full: Size
    pruned: Size


class Contract(TypedDict):
    """Whether a contract holds at the strength that was chosen; limits and losses are fractions.

    `losses` has what was lost on every backward set by its name, and on their `average`.
    """

    limits: dict[str, float]
    strength: float
    losses: dict[str, float]
    holds: bool


class Shares(TypedDict):
    """Shares of weights near zero; see `Posterior.sparsity`."""

    A: float
    B: float
    delta_w: float


class Metrics(TypedDict, total=False):
    """The content of `metrics.json`; see `compare` and `prune_run`."""

    normalizer: str
    heard: str
    split: str
    adapter: str
    sets: dict[str, str]
    new_domain: Measured
    data: Measured
    domains: dict[str, Measured]
    backward: dict[str, Measured]
    backward_error: Average
    contract: Contract
    strength: float
    strength_by: str
    alarm: Ended
    sparsity: Shares
    size: Sizes


def check_metrics(metrics: dict[str, Any]) -> None:
    """Refuse content that is not that of `metrics.json`; keys of other versions are let be.

    Raises:
        ValueError: If a key holds something else.
    """
    for name, kind in type_hints(Metrics).items():
        if name in metrics and not conforms(metrics[name], kind):
            raise ValueError(f"'{name}' is {reason(ValueError(metrics[name]), 60)}")
    for one in metrics.get("size", {}).values():
        if not one.keys() >= SIZES or min(one.values()) < 0 or not one["adapter_weights"]:
            raise ValueError("'size' lacks sizes")
    sets = [*metrics.get("domains", {}).values(), *metrics.get("backward", {}).values()]
    lost = metrics.get("contract", {}).get("losses")
    if lost is not None and (AVERAGE not in lost or len(lost) < 2):
        raise ValueError("'contract' has no losses of sets and their average")
    for key in {"new_domain", "data"} & metrics.keys():
        sets.append(metrics[key])
        if "name" not in metrics[key]:
            raise ValueError(f"'{key}' has no name")
    needed = {"backward", "sparsity"} if sets else {"backward"} if "size" not in metrics else set()
    if lacking := needed - metrics.keys():
        raise ValueError(f"no '{min(lacking)}'")
    for one in sets:
        for state in (one["base"], one["adapted"]):
            rates = [state.get(name) for name in one["change"]]
            counts = [state.get(name, 0) for name in ("utterances", "length", "loops")]
            if (
                not conforms(counts, list[int])
                or not conforms(rates, list[Rate])
                or not all(_is_possible(rate) for rate in rates)
                or state.get("metric") != one["base"].get("metric")
                or state.get("metric") not in [*one["change"]]
            ):
                raise ValueError(f"a set has {reason(ValueError(state), 60)}")


def _is_possible(rate: Rate) -> bool:
    """Return whether a rate is none below 0, and its interval two ends, both or neither known."""
    interval = rate["interval"]
    known = [end for end in interval if end is not None]
    return (
        (rate["rate"] or 0) >= 0
        and len(interval) == 2
        and len(known) in (0, 2)
        and known == sorted(known)
    )


def check_measured(
    file: Path, adapter: str | None, posterior: "Posterior", record: RunRecord
) -> None:
    """Refuse results that were measured with another adapter than the run's.

    Args:
        file: Where they are.
        adapter: The fingerprint in them; older versions kept none, and what they measured in a
            folder is taken for the run's own unless that was made of others.
        posterior: Of the run.
        record: Of the run.

    Raises:
        UserError: If it is another.
    """
    if adapter != posterior.fingerprint and (adapter is not None or record.combined is not None):
        raise UserError(
            f"{file} was not measured with the adapter beside it; remove it, and measure this one: "
            f"blora-pyro evaluate {shlex.quote(str(file.parent))}"
        )


def read_metrics(
    folder: Path, record: RunRecord, posterior: "Posterior | None" = None
) -> dict[str, Any]:
    """Return what was measured with the adapter of a run; None as the posterior reads it.

    Raises:
        UserError: If it is missing, damaged, or was measured with another adapter.
    """
    file = folder / METRICS
    try:
        metrics = read_json(file)
        check_metrics(metrics)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} is missing or damaged ({reason(error)}); measure again with: blora-pyro "
            f"evaluate {shlex.quote(str(folder))}"
        ) from None
    if posterior is None:
        from blora_pyro.posterior import Posterior

        posterior = Posterior.load(folder)
    check_measured(file, metrics.get("adapter"), posterior, record)
    return metrics
