"""What a fit takes of time, memory and disk, told from two timed steps and a few transcripts."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from time import perf_counter
from typing import Any

import torch

from blora_pyro.data import Examples, batch_indices
from blora_pyro.fitting.encoder_cache import EncoderCache
from blora_pyro.fitting.history import Step
from blora_pyro.fitting.processes import Processes
from blora_pyro.fitting.svi import fit_guide
from blora_pyro.models import Base, check_device, on_this_machine
from blora_pyro.models.decoding import decode, encode, score_tokens
from blora_pyro.options import FitConfig
from blora_pyro.runs.chains import continued
from blora_pyro.runs.contracts import MOST_SCORED, check_dev_sets
from blora_pyro.runs.fit_folders import FitFolder
from blora_pyro.runs.listeners import Listener, heard_by
from blora_pyro.runs.loading import Loader
from blora_pyro.runs.parts import Parts
from blora_pyro.runs.scoring import SetSource, is_new_domain, set_sources, stopping_set
from blora_pyro.tables import Part, Table, figure_columns, number, text_columns
from blora_pyro.transcription.safeguards import hearings
from blora_pyro.transcription.transcriber import BATCH_SIZE

STEPS = 3  # the first warms up, and is not timed
DECODED = 4  # utterances on a CPU; on a GPU as many as are decoded at once
LEFT_OUT = (
    "left out: reading the audio, Whisper's fallbacks to higher temperatures on hard audio, what "
    "--ewc and some priors prepare, other processes, what is in the cache already, and the memory "
    f"of scoring {BATCH_SIZE} utterances at once"
)


@dataclass(frozen=True)
class Work:
    """A part of a fit.

    Attributes:
        name: What is done.
        count: How often.
        unit: What is counted.
        seconds_each: Seconds each time.
    """

    name: str
    count: int
    unit: str
    seconds_each: float

    @property
    def seconds(self) -> float:
        """Seconds of all of it."""
        return self.count * self.seconds_each


@dataclass(frozen=True)
class Times:
    """Seconds that an utterance takes: the encoder's, and the first attempt of the decoder."""

    encode: float
    decode: float


def estimate_fit(config: FitConfig, progress: Listener | None = None) -> dict[str, Any]:
    """Tell what a fit takes in one process; nothing is kept but what is in the cache anyway.

    A throw-away guide is fitted for three steps to one batch, and a few test utterances of the new
    domain are transcribed by the base.

    Args:
        config: Options of the fit.
        progress: Listener to the stages; None is bars in a notebook.

    Returns:
        `device`; `work`, the parts of the fit, each with `name`, `count`, `unit`, `seconds_each`
        and `seconds`; `seconds`, their sum; `memory` and `disk`, bytes (memory None where it is
        not known); and `left_out`, a line.

    Raises:
        UserError: On bad options or data, as the fit.
        FloatingPointError: If loss or gradient are not finite.
    """
    progress = heard_by(progress)
    config = on_this_machine(config)
    config.check_base()
    config, previous = continued(config)
    check_device(config.device)
    splits = ["test"]
    if config.keep is not None:
        check_dev_sets(config)
        splits.append("dev")
    sets = {split: set_sources(config, split) for split in splits}
    short = FitFolder.create(None, _short(config), False, previous)
    parts = Parts.load(short, False, progress, Processes())
    loader, base = parts.loader, parts.scoring.base
    assert parts.fit is not None

    progress.stage("timing transcripts")
    times = time_transcripts(base, _sample(parts, sets["test"]))
    encoder, step = time_encoder(parts, progress), time_steps(parts, progress)

    utterances = None
    if isinstance(parts.train, Examples):
        utterances = loader.count(config.sources, "train", config.max_utterances)
    steps = config.resolved(None, utterances).steps
    counts = {
        its: loader.count(its.source, its.split, config.max_eval_utterances)
        for its in dict.fromkeys(chain(*(some.values() for some in sets.values())))
    }
    shares = parts.fit[0].likelihood.first_adapted == base.net.config.encoder_layers
    work = []
    if encoder is not None and utterances is not None:
        work.append(Work("encoding, once", utterances, "utterances", encoder))
    work.append(Work("steps", steps, "steps", step))
    if config.eval_every is not None:
        measured = math.ceil(steps / config.eval_every)
        work.append(_dev_errors(loader, config, measured, times, shares))
    for split, some in sets.items():
        strengths = 1 if split == "test" else MOST_SCORED - 1  # 0 is the base
        work += scoring_work(split, some, counts, times, shares, strengths)
    cached = (utterances or 0) * config.cache_encoder + sum(counts.values()) * shares
    net = base.net
    states = net.config.max_source_positions * net.config.d_model * net.dtype.itemsize
    return {
        "device": config.device,
        "work": [{**asdict(one), "seconds": one.seconds} for one in work],
        "seconds": math.fsum(one.seconds for one in work),
        "memory": peak_memory(net.device),
        "disk": cached * states,
        "left_out": LEFT_OUT,
    }


def _short(config: FitConfig) -> FitConfig:
    """Return the options of three steps on one batch, with nothing to score."""
    drawn = None
    if not config.streaming:
        drawn = min(config.batch_size, config.max_utterances or config.batch_size)
    return replace(
        config,
        steps=STEPS,
        epochs=None,
        warmup_steps=None,
        max_utterances=drawn,
        keep=None,
        eval_every=None,
        patience=None,
        dev=None,
        ewc=0.0,
        average_from=None,
        track=None,
    )


def _sample(parts: Parts, sets: Mapping[str, SetSource]) -> Examples:
    """Return a few utterances to transcribe, of one prompt's length."""
    count = _decoded(parts.scoring.base)
    for name, its in sets.items():
        if is_new_domain(name):
            return parts.loader.load(its.source, its.split, limit=count)
    return parts.train if isinstance(parts.train, Examples) else parts.train.sample


def _decoded(base: Base) -> int:
    return DECODED if base.net.device.type == "cpu" else BATCH_SIZE


def time_transcripts(base: Base, examples: Examples) -> Times:
    """Return what the first attempt at a transcript takes, on average over a few utterances."""
    length, count = len(examples.prompts[0]), _decoded(base)
    rows = [row for row, prompt in enumerate(examples.prompts) if len(prompt) == length][:count]
    prompts = [examples.prompts[row] for row in rows]
    with torch.inference_mode():
        encode(base, examples.features[rows[:1]])  # warms up
        started = perf_counter()
        features = examples.features[rows]
        limits = [one.limit for one in hearings(base, features)]
        states = encode(base, features)
        states.cpu()  # when it is computed
        encoded = perf_counter()
        score_tokens(base, states, prompts, decode(base, states, prompts, limits))
    return Times((encoded - started) / len(rows), (perf_counter() - encoded) / len(rows))


def time_encoder(parts: Parts, progress: Listener) -> float | None:
    """Return the seconds that the frozen layers take for an utterance; None if not cached.

    The states of all utterances that the steps draw are cached then.
    """
    config, train = parts.config, parts.train
    if not config.cache_encoder:
        return None
    assert parts.fit is not None and isinstance(train, Examples)
    progress.stage("timing the encoder")
    drawn = batch_indices(train.sources, config.batch_size, config.seed, config.data_weights)
    rows = [*dict.fromkeys(chain(*islice(drawn, STEPS)))]
    cache = EncoderCache(parts.fit[0], len(train), fingerprint=train.fingerprint)
    started = perf_counter()
    for row in rows:
        cache(train.batch([row]), [row], 0)
    return (perf_counter() - started) / len(rows)


def time_steps(parts: Parts, progress: Listener) -> float:
    """Return the seconds of a step of SVI, the mean of all but the first.

    Raises:
        FloatingPointError: If loss or gradient are not finite in most of them.
    """
    assert parts.fit is not None
    model, guide, teacher, _ = parts.fit
    progress.stage("timing steps")
    ends: list[float] = []

    def on_step(step: Step) -> None:
        ends.append(perf_counter())

    fit_guide(model, guide, parts.train, parts.config, on_step=on_step, teacher=teacher)
    if len(ends) < 2:
        raise FloatingPointError(f"the loss or its gradient is not finite in the first {STEPS}")
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def _dev_errors(loader: Loader, config: FitConfig, count: int, times: Times, shares: bool) -> Work:
    """Return the measurements of the dev error on the way; a shared encoder hears it once."""
    its = stopping_set(config)
    utterances = loader.count(its.source, its.split, config.max_eval_utterances)
    encoder = times.encode / count if shares else times.encode
    return Work("dev error on the way", count * utterances, "transcripts", times.decode + encoder)


def scoring_work(
    split: str,
    sets: Mapping[str, SetSource],
    counts: Mapping[SetSource, int],
    times: Times,
    shares: bool,
    strengths: int = 1,
) -> list[Work]:
    """Return the scores of a split's sets: of the base, and of the adapted model.

    Args:
        split: Its name.
        sets: By name; the base transcribes one that has several names once.
        counts: Numbers of utterances.
        times: Of an utterance.
        shares: The adapted model has the base's encoder, whose states are kept.
        strengths: How often the adapted model is scored.
    """
    once = sum(counts[its] for its in dict.fromkeys(sets.values()))
    often = strengths * sum(counts[its] for its in sets.values())
    if not once:
        return []
    again = f"{strengths} strengths" if strengths > 1 else "adapted"
    adapted = times.decode + (0 if shares else times.encode)
    return [
        Work(f"{split} sets, base", once, "transcripts", times.encode + times.decode),
        Work(f"{split} sets, {again}", often, "transcripts", adapted),
    ]


def peak_memory(device: torch.device) -> int | None:
    """Return the most memory so far, bytes: that of a CUDA device, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def clock(seconds: float) -> str:
    """Return a time as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def estimate_tables(estimate: Mapping[str, Any]) -> Sequence[Part]:
    """Return table and lines of what `estimate_fit` returns."""
    memory = None if estimate["memory"] is None else estimate["memory"] / 1e9
    columns = [*text_columns("work"), *figure_columns("count"), *text_columns("of")]
    table = Table([*columns, *figure_columns("s each", "h:mm:ss")])
    for one in estimate["work"]:
        each = number(one["seconds_each"], ".3g")
        table.add_row(one["name"], one["count"], one["unit"], each, clock(one["seconds"]))
    table.add_section()
    table.add_row("sum", "", "", "", clock(estimate["seconds"]), emphasis="bold")
    return [
        table,
        f"peak memory on {estimate['device']}: {number(memory, '.2f')} GB; disk for states of the "
        f"encoder: {estimate['disk'] / 1e9:.2f} GB",
        estimate["left_out"],
    ]
