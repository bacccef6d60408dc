"""Using a finished run: score it again, merge it, transcribe with it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blora_pyro.errors import UserError
from blora_pyro.languages import language_code
from blora_pyro.models import DTYPES, base_of, check_dtype
from blora_pyro.models.base import check_finite, check_merge, distance, probe, with_fast_encoder
from blora_pyro.options import AUTO, POCKET, FitConfig
from blora_pyro.posterior import Posterior
from blora_pyro.posterior.strength import BASE, SCALE, at_strength, check_strength
from blora_pyro.runs.beyond import measure_beyond
from blora_pyro.runs.contracts import verdict
from blora_pyro.runs.folders import claim_file, read_run, written_folder
from blora_pyro.runs.listeners import Listener, heard_by
from blora_pyro.runs.scoring import NEW_DOMAIN, OTHER_DATA, Scoring, compare, scoring_config
from blora_pyro.runs.strength_curves import used_directions
from blora_pyro.runs.utterances import utterance_rows, write_utterances
from blora_pyro.sources import Source, describe_source
from blora_pyro.transcription import Transcriber, transcribe_files
from blora_pyro.transcription.transcripts import Transcript


def evaluate_run(
    folder: str | Path,
    data: Source | None = None,
    progress: Listener | None = None,
    device: str = AUTO,
    *,
    normalizer: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    split: str = "test",
    strength: float | None = None,
    strength_by: str = SCALE,
    domain: str | None = None,
    column: Mapping[str, str] | Sequence[str] | None = None,
    beyond: bool = False,
) -> dict[str, Any]:
    """Score a run, base and adapted, on its own test sets or on the test split of `data`.

    A run of several domains with factors of their own is scored as it was after the fit (see
    `Scoring.score`); one `domain` on its own test set and the backward sets, all with its own
    factors. `data` is scored with the factors of `domain`, or else those that are shared.

    Args:
        folder: Folder of the run, or its Hub id.
        data: None is the run's own test sets.
        progress: Listener to the stages; None is bars in a notebook.
        device: A torch device.
        normalizer: None is that of the fit; see `FitConfig`.
        output: File for the results of every utterance, see `utterance_rows`; None keeps none.
        overwrite: Replace a file that is there.
        split: `test`, or `dev` to choose by.
        strength: Strength of the update, see `at_strength`; None is that of the run, which is 1
            unless it keeps a contract.
        strength_by: See `at_strength`.
        domain: One of the run's domains.
        column: What columns are called, see `FitConfig`; None is as in the fit, or in `data` as
            usual.
        beyond: Also measure what the adapter changes beside the words, see `measure_beyond`.

    Returns:
        The content of `metrics.json`; at another strength than 1 also `strength` and `strength_by`,
        but where `contract` has that of the run; and with `beyond` its content.

    Raises:
        UserError: If the run or the data can't be read, the file can't be written, or there is no
            such normaliser, split, strength or domain.
    """
    progress = heard_by(progress)
    if output is not None:
        claim_file(Path(output), overwrite)
    posterior, record = read_run(folder, device, pooled=True)
    config = record.resolved
    if domain is not None or data is not None:
        posterior, config = posterior.for_domain(domain), of_domain(config, domain)
    check_strength(posterior, 1.0 if strength is None else strength, strength_by)
    fitted = config
    own = {describe_source(one) for one in (*config.sources, config.test, config.dev)}
    config = scoring_config(config, data, normalizer, column)
    scoring = Scoring.of(config, split, progress)
    if data is not None and describe_source(data) not in own:
        scoring = replace(scoring, sets={OTHER_DATA: scoring.sets[NEW_DOMAIN]})
    directions = None
    if strength_by == BASE and strength not in (None, 0, 1):
        directions = used_directions(scoring.base, fitted, posterior, progress)
    posterior = at_strength(posterior, strength, strength_by, directions)
    before, after = scoring.score(None, "base"), scoring.score(posterior, "adapted")
    if output is not None:
        rows = utterance_rows(scoring.sets, {"base": before, "adapted": after}, posterior)
        try:
            write_utterances(Path(output), rows)
        except OSError as error:
            raise UserError(f"{output} can't be written ({error.strerror}); give another") from None
    metrics = compare(posterior, before, after, config, split)
    if beyond:
        backward = {name: scoring.sets[name] for name in metrics["backward"]}
        metrics["beyond"] = measure_beyond(scoring.base, backward, posterior, progress)
    if record.kept is not None and strength is None:
        metrics |= verdict(record.kept, metrics)
    shown = posterior.strength if strength is None else strength
    if shown != 1 and "contract" not in metrics:
        by = strength_by
        if strength is None:
            by = SCALE if posterior.weakened is None else BASE
        metrics |= {"strength": shown, "strength_by": by}
    return metrics


def of_domain(config: FitConfig, domain: str | None) -> FitConfig:
    """Return a configuration as of a fit to one of its domains; None: to all of them as one."""
    if config.pooling is None:
        return config
    data = config.data if domain is None else config.domains[domain]
    weights = config.data_weights if domain is None else None
    return replace(config, data=data, data_weights=weights, pooling=None, pooling_scale=None)


def merge_run(
    folder: str | Path,
    out: str | Path,
    overwrite: bool = False,
    dtype: str = "float32",
    *,
    strength: float | None = None,
    strength_by: str = SCALE,
    domain: str | None = None,
    on_note: Callable[[str], object] = lambda note: None,
) -> None:
    """Write the base model with the posterior mean merged in: a plain Whisper checkpoint.

    The update is added to the checkpoint's own weights in float32, whatever the dtype of the fit,
    and the sum is rounded to `dtype` once.

    Args:
        folder: Folder of the run, or its Hub id.
        out: Folder for the checkpoint.
        overwrite: Write into a folder that holds something.
        dtype: Dtype of the checkpoint. An update below the rounding step of a short one is lost.
        strength: Strength of the update, see `at_strength`; None is that of the run, which is 1
            unless it keeps a contract.
        strength_by: See `at_strength`.
        domain: For a run whose domains have factors of their own; None is what they share.
        on_note: Called with one line if rounding to `dtype` loses much of the adapter.

    Raises:
        UserError: If the run can't be read or `out` can't be written, there is no such strength
            or domain, or the merged net's logits differ from the adapted one's.
    """
    check_dtype(dtype)
    out = Path(out)
    posterior, record = read_run(folder, pooled=True)
    posterior = at_strength(posterior.for_domain(domain), strength, strength_by)
    base = base_of(replace(record.resolved, dtype="float32"))
    with written_folder(out, overwrite, folder, base.name, base.folder or folder) as target:
        plain = probe(base.net)
        with posterior.applied(base.net):
            adapted = probe(base.net)
        posterior.merge(base.net)
        check_merge(str(folder), adapted, probe(base.net))
        base.net.to(DTYPES[dtype])
        check_finite(f"the merged checkpoint in {dtype}", base.net)
        lost, gained = distance(adapted, probe(base.net)), distance(adapted, plain)
        if lost > gained / 2:  # of an adapter that changes nothing there is nothing to lose
            on_note(
                f"rounding to {dtype} moves the logits by {lost:.2%}, and the adapter by "
                f"{gained:.2%}; merge to float32, or use the adapter unmerged"
            )
        base.save_pretrained(target)


def transcribe(
    audio: str | Path | Sequence[str | Path],
    adapter: str | Path | None = None,
    base: str | None = None,
    language: str | None = None,
    device: str = AUTO,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    prior: str | None = None,
    trust_prior_file: bool = False,
    task: str | None = None,
    strength: float | None = None,
    strength_by: str = SCALE,
    domain: str | None = None,
    on_transcript: Callable[[int, Transcript], None] = lambda index, transcript: None,
    on_error: Callable[[int, UserError], None] | None = None,
    on_progress: Callable[[float], object] = lambda files: None,
    batch_size: int = 16,
    samples: int = 0,
    seed: int = 0,
    word_timestamps: bool = False,
) -> list[Transcript]:
    """Return transcripts of audio files by torch; see `engines.transcribe` for both engines.

    Args:
        audio: a file (wav, mp3, m4a, webm, ...) of any length, or several.
        adapter: Folder of a run, or its Hub id.
        base: Base model; None is the adapter's, or the pocket Whisper.
        language: A Whisper code, or "de-en" for code-switched speech; "auto" is what the model
            detects in each file. None is that of the adapter's training data, and without an
            adapter "auto".
        device: A torch device.
        dtype: Dtype of the base's weights; None is that of the fit, or `float32`, with the encoder
            of another base than the pocket in bfloat16 where the device has units for it.
        revision: Revision of a base on the Hub; None is that of the fit, unless a base is given.
        local_files_only: Look for Hub ids in the Hub's local cache alone.
        prior: File of the prior, if draws are asked for and the run has one: its code is run.
        trust_prior_file: Run the file of the prior that the run names; see `Posterior.load`.
        task: `transcribe` or `translate`; None is that of the fit, or `transcribe`.
        strength: Strength of the adapter's update, as in `evaluate_run`.
        strength_by: See `at_strength`.
        domain: For a run whose domains have factors of their own; None is what they share.
        on_transcript: Called with each file's index and transcript, in order.
        on_error: Called with the index of a file that can't be read and the error; the file is left
            out. None raises.
        on_progress: See `engines.transcribe`.
        batch_size: Windows transcribed at once; see `Transcriber`, as the two that follow.
        samples: Posterior draws for word confidences; 0 is none.
        seed: Seed of the draws.
        word_timestamps: Find when each word is said.

    Raises:
        UserError: If a file or the run can't be read, the language is unknown to the model, draws
            are asked for where there are none, or there is no such strength or domain.
    """
    posterior, config, own = adapted(
        adapter,
        base,
        revision,
        local_files_only,
        strength,
        strength_by,
        domain,
        device=device,
        prior=prior,
        trust_prior_file=trust_prior_file,
    )
    config = replace(config, dtype=dtype or config.dtype)
    code = language_code(language) if language else own or None
    model = base_of(config)
    if dtype is None and model.name != POCKET:
        model = with_fast_encoder(model)
    transcriber = Transcriber(
        model,
        posterior,
        None if code == "auto" else code,
        task or config.task,
        batch_size=batch_size,
        samples=samples,
        seed=seed,
        word_timestamps=word_timestamps,
    )
    paths = [audio] if isinstance(audio, str | Path) else audio
    return transcribe_files(transcriber, paths, on_transcript, on_error, on_progress)


def adapted(
    adapter: str | Path | None,
    base: str | None,
    revision: str | None,
    local_files_only: bool,
    strength: float | None,
    strength_by: str,
    domain: str | None,
    *,
    device: str = "cpu",
    prior: str | None = None,
    trust_prior_file: bool = False,
) -> tuple[Posterior | None, FitConfig, str | None]:
    """Return what transcribes: posterior, options of base and task, and the data's language.

    For the arguments see `transcribe`.

    Raises:
        UserError: If there is no such run, strength or domain, or nothing is given.
    """
    posterior, config, own = None, FitConfig(device=device), None
    if strength_by != SCALE and (strength is None or adapter is None):
        missing = "strength" if adapter else "adapter"
        raise UserError(
            f"strength_by is '{strength_by}', and no {missing} is given; give one, or leave "
            "strength_by out"
        )
    if adapter is not None:
        posterior, record = read_run(
            adapter,
            device,
            prior,
            pooled=True,
            local_files_only=local_files_only,
            trust_prior_file=trust_prior_file,
        )
        posterior = at_strength(posterior.for_domain(domain), strength, strength_by)
        config = record.resolved
        own = (record.domain_languages or {}).get(str(domain), record.language)
    elif domain is not None:
        raise UserError(f"domain is '{domain}', but there is no adapter; give one")
    elif strength is not None and strength != 1:
        raise UserError(f"strength is {strength:g}, but there is no adapter; give one")
    elif not base:
        raise UserError(
            "neither base nor adapter is given; give the base: a folder with a Whisper checkpoint, "
            "a Hub id such as openai/whisper-small, or pocket, the built-in toy; or give a run as "
            "adapter"
        )
    config = replace(
        config,
        base=base or config.base,
        revision=revision if base or revision else config.revision,
        local_files_only=local_files_only or config.local_files_only,
    )
    return posterior, config, own
