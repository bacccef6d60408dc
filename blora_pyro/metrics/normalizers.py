"""How texts are normalised before they are compared: by Whisper's own two normalisers, or not.

Both are transformers' code, which is OpenAI's. The basic one lowers case, drops what stands in
brackets, and makes a space of every other symbol, punctuation mark and *combining mark*. That last
thing breaks words apart in scripts that spell with marks, such as Devanagari or Tamil: read the raw
rate there. The English one besides expands contractions and titles, writes numbers as digits, drops
"uh" and "um", and spells the American way if the checkpoint says how (its `normalizer.json`).
"""

from collections.abc import Mapping

from transformers.models.whisper.english_normalizer import (
    BasicTextNormalizer,
    EnglishTextNormalizer,
)

from blora_pyro.errors import UserError

NORMALIZERS = {
    "whisper": "English by Whisper's English normaliser, everything else by its basic one",
    "basic": "everything by Whisper's basic normaliser",
    "none": "texts as they are",
}


def check_normalizer(name: str) -> None:
    """Raise UserError unless there is such a normaliser."""
    if name not in NORMALIZERS:
        raise UserError(f"normalizer is '{name}'; give one of {', '.join(NORMALIZERS)}")


class Normalizer:
    """Normalises a text by its language; white space is collapsed by every one.

    Code-switched text ("de-en") is not English: there contractions and numbers would be rewritten
    in English whatever their language, and words merged whose languages differ.
    """

    def __init__(self, name: str = "whisper", spellings: Mapping[str, str] | None = None) -> None:
        """Make one.

        Args:
            name: One of `NORMALIZERS`.
            spellings: American by British spellings, for English; None leaves spelling as it is.

        Raises:
            UserError: If there is no such normaliser, or `spellings` is no such mapping.
        """
        check_normalizer(name)
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
        """The text, normalised as one in `language`, "de" or "de-en"."""
        if self.name != "none":
            english = self.name == "whisper" and language == "en"
            text = (self._english if english else self._basic)(text)
        return " ".join(text.split())
