"""Audio to text with a Whisper, by transformers' own `generate`."""

from collections.abc import Sequence
from pathlib import Path

import torch

from blora_pyro.data import Features, featurise, language_code, prompt_ids, read_audio
from blora_pyro.models import Base

BATCH_SIZE = 64


@torch.inference_mode()
def decode(base: Base, features: torch.Tensor, prompt: Sequence[int]) -> list[str]:
    """Greedy transcripts of log-mels (batch, mels, frames) after one decoder prompt."""
    net = base.net
    start = torch.tensor([list(prompt)]).expand(len(features), -1)
    # The prompt is given whole, as a code-switched one has two language tokens; naming a language
    # as well keeps `generate` from detecting one first.
    settings = net.generation_config
    known = settings.lang_to_id if getattr(settings, "is_multilingual", False) else None
    tokens = net.generate(
        features.to(net.device, net.dtype),
        decoder_input_ids=start.to(net.device),
        language=next(iter(known)) if known else None,
        return_timestamps=False,
        do_sample=False,
        num_beams=1,
    )
    texts = base.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]


@torch.inference_mode()
def detect_languages(base: Base, features: torch.Tensor) -> list[str]:
    """Most probable language code of each of the log-mels (batch, mels, frames)."""
    net = base.net
    tokens = net.detect_language(input_features=features.to(net.device, net.dtype))
    return [name.strip("<|>") for name in base.tokenizer.convert_ids_to_tokens(tokens.tolist())]


def transcribe_files(
    base: Base,
    paths: Sequence[str | Path],
    language: str | None = None,
    task: str = "transcribe",
) -> list[str]:
    """Transcripts of audio files; see `blora_pyro.runs.transcribe`."""
    window = base.feature_extractor.chunk_length
    rows = [(str(path), read_audio({"path": str(path)}, max_seconds=window)) for path in paths]
    features = featurise(rows, base.feature_extractor)
    codes = [language] * len(rows) if language else ["en"] * len(rows)
    if not language and getattr(base.net.generation_config, "is_multilingual", False):
        codes = detect_languages(base, features)
    prompts = [prompt_ids(base.tokenizer, language_code(code), task) for code in codes]
    return transcribe_features(base, features, prompts)


def transcribe_features(
    base: Base, features: torch.Tensor | Features, prompts: Sequence[Sequence[int]]
) -> list[str]:
    """Transcripts of log-mels (n, mels, frames) in their order, each after its own prompt."""
    texts = [""] * len(prompts)
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_prompt.setdefault(tuple(prompt), []).append(index)
    for prompt, indices in by_prompt.items():
        for start in range(0, len(indices), BATCH_SIZE):
            chosen = indices[start : start + BATCH_SIZE]
            decoded = decode(base, features[chosen], prompt)
            for index, text in zip(chosen, decoded, strict=True):
                texts[index] = text
    return texts
