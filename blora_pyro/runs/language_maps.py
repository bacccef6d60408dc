"""Which token stands for a language that the base has none for: `--language-map auto`.

Among the tokens that nothing else needs, it is the one under which the frozen base finds the texts
of the training audio likeliest. Few utterances rule out most tokens, so that all of them cost about
as much as a few on every utterance.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from blora_pyro.data import Examples, language_codes, load_split, prompt_ids, unmapped_codes
from blora_pyro.data.features import sounding_frames
from blora_pyro.data.prompts import END, START
from blora_pyro.errors import UserError
from blora_pyro.languages import LANGUAGES, is_language, prompt_codes, read_language
from blora_pyro.models import Base
from blora_pyro.models.decoding import alike_in_length, encode, score_tokens
from blora_pyro.options import FitConfig, column_names

# On how many utterances the tokens are compared, and how many of the best are compared on more.
ROUNDS = ((2, 32), (4, 12), (8, 6), (16, 3))
TOKENS = 32  # of a text that count, at most
# Share of the words that a language's token must outdo where the base says which language it hears:
# a slot that was never trained is said there as rarely as any word.
OUTDONE = 0.99
_MARGIN = 25  # encoder positions after what sounds, half a second
_BATCH = 16


@dataclass(frozen=True)
class Choice:
    """A token for a language.

    Attributes:
        language: Code of the language that has none.
        scores: Code of the tokens compared last, best first -> mean negative log-likelihood of a
            text's token, nats.
        utterances: Number of utterances that it was chosen by.
    """

    language: str
    scores: Mapping[str, float]
    utterances: int

    @property
    def token(self) -> str:
        """Code of the best."""
        return next(iter(self.scores))

    def __str__(self) -> str:
        """All of it in one line."""
        (best, nll), *rest = self.scores.items()
        others = ", ".join(f"{_named(code)} {score:.3f}" for code, score in rest)
        return (
            f"the base has no token for the language {self.language}: it is prompted as "
            f"{_named(best)}, under which {self.utterances} training texts are likeliest, with "
            f"{nll:.3f} nats a token{f' ({others})' if others else ''}; --language-map "
            f"{self.language}=TOKEN takes another"
        )


def _named(code: str) -> str:
    return f"{code} ({LANGUAGES[code].title()})" if code in LANGUAGES else code


def languages_read(text: str) -> tuple[str, ...]:
    """Return the codes of a language, or of several joined; none if it can't be read."""
    with suppress(UserError):  # which the row's own error says
        return read_language(text).codes
    return ()


def languages_of(dataset: Dataset, default: str | None) -> Counter[str]:
    """Return the codes of the languages of rows, code-switched ones joined, by number of rows."""
    counts: Counter[str] = Counter()
    for text, number in Counter(dataset["language"][:]).items():
        counts["-".join(languages_read(text or default or ""))] += number
    return counts


def missing_languages(base: Base, languages: Iterable[str]) -> list[str]:
    """Return the codes of ISO 639 among languages that the base can't be prompted with."""
    codes = (unmapped_codes(base.tokenizer, one, base.language_map) for one in languages)
    return [*dict.fromkeys(code for some in codes for code in some)]


def used_tokens(base: Base, config: FitConfig, rows: Dataset, default: str | None) -> set[str]:
    """Return the languages whose tokens are needed: those of the data, and of backward sets."""
    languages = set(languages_of(rows, default)) | {read_language(config.language or "").code}
    languages |= {*config.taught_languages}
    for name in config.backward_sets:
        languages |= {read_language(name).code} if is_language(name) else set()
    for source in (config.test, config.dev, *config.backward_sets.values()):
        with suppress(UserError):  # which the set's own reading says
            if source is not None:
                columns = column_names(config.column)
                split = load_split(source, "test", lambda error: None, columns)
                languages |= {*languages_of(split, None)}
    return {code for one in languages if one for code in prompt_codes(one, base.language_map)}


def choose_token(
    base: Base,
    language: str,
    rows: Dataset,
    used: Iterable[str],
    task: str = "transcribe",
    default: str | None = None,
) -> Choice:
    """Choose a token for a language that has none.

    Args:
        base: The frozen base.
        language: A code.
        rows: Training data, with the columns of `read_manifest`; those in that language count.
        used: Codes of the languages whose tokens are not to be had.
        task: In the prompts.
        default: Language of rows that name none.

    Raises:
        UserError: If there is no such row that is good, or no token is left.
    """
    known, drawn = language_codes(base.tokenizer), _drawn(rows, language, default)
    others = dict.fromkeys(missing_languages(base, languages_of(drawn, default)), known[0])
    examples = Examples(
        drawn,
        base.feature_extractor,
        base.tokenizer,
        task,
        base.net.config.max_target_positions,
        language=default,
        language_map={**others, **base.language_map},
        on_bad=lambda error: None,
    )
    states = [encode(base, examples.features[[index]].float()) for index in range(len(examples))]
    left = [code for code in heard_languages(base, states) if code not in {*used}]
    if not left:
        raise UserError(
            f"the base has no token for the language {language}, and none that nothing else of "
            f"the data uses is left for it; give one by language_map {language}=TOKEN"
        )
    totals, tokens, done = dict.fromkeys(left, 0.0), 0, 0
    for count, keep in ROUNDS:
        for index in range(done, min(count, len(examples))):
            maps = [{**others, **base.language_map, language: code} for code in left]
            prompts = [
                prompt_ids(base.tokenizer, examples.languages[index], task, one) for one in maps
            ]
            text = examples.targets[index][:-1][:TOKENS]
            sounding = states[index][:, : _positions(examples, index)]
            for code, one in zip(left, _surprise(base, sounding, prompts, text), strict=True):
                totals[code] += one
            tokens, done = tokens + len(text), index + 1
        left = sorted(left, key=lambda code: (totals[code], code))[:keep]
    return Choice(language, {code: totals[code] / max(tokens, 1) for code in left}, done)


def heard_languages(base: Base, states: Sequence[Tensor]) -> list[str]:
    """Return the languages whose tokens the base can say where it says what language it hears.

    Args:
        base: The frozen base.
        states: The encoder's of some utterances, (1, positions, width) each.
    """
    vocabulary = base.tokenizer.get_vocab()
    codes = language_codes(base.tokenizer)
    start = torch.tensor([[vocabulary[START]]], device=base.net.device)
    with torch.inference_mode():
        logits = torch.stack(
            [
                base.net(
                    encoder_outputs=BaseModelOutput(last_hidden_state=one),
                    decoder_input_ids=start,
                    use_cache=False,
                ).logits[0, 0]
                for one in states
            ]
        )
    mean = logits.float().mean(0).cpu()
    words = mean[: vocabulary[END]] if vocabulary[END] else mean
    least = torch.quantile(words, OUTDONE)
    return [code for code in codes if mean[vocabulary[f"<|{code}|>"]] > least]


def _drawn(rows: Dataset, language: str, default: str | None) -> Dataset:
    """Return some rows in a language, drawn by a seed that is always the same."""
    spoken = [text or default or "" for text in rows["language"][:]]
    own = {text: language in languages_read(text) for text in {*spoken}}
    places = torch.tensor([place for place, text in enumerate(spoken) if own[text]])
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))
    return rows.select(places[order[: ROUNDS[-1][0]]].tolist())


def _positions(examples: Examples, index: int) -> int:
    """Return how many of the encoder's positions the decoder is given: less costs less.

    The encoder has heard the full window, so that they are what they would be.
    """
    return int(sounding_frames(examples.features[[index]].float())[0]) // 2 + _MARGIN


def _surprise(
    base: Base, states: Tensor, prompts: Sequence[Sequence[int]], text: Sequence[int]
) -> list[float]:
    """Return the negative log-likelihood of a text after each prompt, nats, without its end."""
    sums = dict[int, float]()
    for some in alike_in_length(prompts, _BATCH):
        encoded = states.expand(len(some), -1, -1)
        scores = score_tokens(base, encoded, [prompts[one] for one in some], [text] * len(some))
        sums |= {
            one: -float(score.log_probs.sum()) for one, score in zip(some, scores, strict=True)
        }
    return [sums[place] for place in range(len(prompts))]
