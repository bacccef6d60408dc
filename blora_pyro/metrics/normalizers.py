"""Normalisation of texts before they are compared: Whisper's own two normalisers, or none.

Both are transformers' code, which is OpenAI's. The basic one lowers case, drops text in brackets,
and replaces every other symbol, punctuation mark and *combining mark* by a space. The last of these
splits words in scripts that spell with marks, such as Devanagari or Tamil: use the raw rate there.
The English one also expands contractions and titles, writes numbers as digits, drops "uh" and "um",
and uses American spellings if the checkpoint lists them (its `normalizer.json`).
"""

from collections.abc import Mapping

from transformers.models.whisper.english_normalizer import (
    BasicTextNormalizer,
    EnglishTextNormalizer,
)

from blora_pyro.errors import UserError

NORMALIZERS = ("whisper", "basic", "none")


class Normalizer:
    """Normalises a text by its language, and collapses white space.

    Code-switched text ("de-en") does not count as English: the English normaliser would rewrite
    contractions and numbers of any language, and merge words of different languages.
    """

    def __init__(self, name: str = "whisper", spellings: Mapping[str, str] | None = None) -> None:
        """Create a normaliser.

        The name is `whisper` (English by Whisper's English normaliser, all other languages by its
        basic one), `basic` (all by the basic one) or `none` (white space alone). `spellings` maps
        British to American ones, for English; None leaves them alone.

        Raises:
            UserError: If the name is unknown, or `spellings` does not map strings to strings.
        """
        if name not in NORMALIZERS:
            raise UserError(f"normalizer is '{name}'; give one of {', '.join(NORMALIZERS)}")
        spellings = {} if spellings is None else spellings
        if not isinstance(spellings, Mapping) or not all(
            isinstance(text, str) for pair in spellings.items() for text in pair
        ):
            raise UserError(
                "normalizer.json of the base model is no mapping of spellings; mend or remove it"
            )
        self.name = name
        self._basic = BasicTextNormalizer()
        self._english = EnglishTextNormalizer(spellings)

    def __call__(self, text: str, language: str = "") -> str:
        """The text, normalised for its language, such as "de" or "de-en"."""
        if self.name != "none":
            english = self.name == "whisper" and language == "en"
            text = (self._english if english else self._basic)(text)
        return " ".join(text.split())
