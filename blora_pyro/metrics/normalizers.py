"""Normalisation of texts before they are compared.

`unicode` is the default: English by Whisper's own English normaliser, every other language by
Unicode's categories. That lowers case by the rules of the language, drops text in brackets, and
keeps letters, digits (of any script as 0 to 9) and combining marks; all else becomes a space,
apostrophes too, as Whisper has it ("l'eau" is two words). Letters with two encodings are one
(Romanian ş and ș, Persian ك and ک, the chillus of Malayalam, sara am). English has straight
apostrophes before its own normaliser, which knows no others, and nothing that can't be seen.

Whisper's own two normalisers, which papers use, are transformers' code, which is OpenAI's. The
basic one replaces *combining marks* by spaces, too, which splits the words of scripts that spell
with marks and drops their vowels (Hindi, Thai, Arabic with vowel signs), and it lowers Turkish as
if it were English. The English one also expands contractions and titles, writes numbers as digits,
drops "uh" and "um", and uses American spellings if the checkpoint lists them (its
`normalizer.json`).
"""

import unicodedata
from collections.abc import Mapping

import regex
from transformers.models.whisper.english_normalizer import (
    BasicTextNormalizer,
    EnglishTextNormalizer,
)

from blora_pyro.errors import UserError

NORMALIZERS = ("unicode", "whisper", "basic", "none")  # the first is the default

DOTLESS = {"tr", "az"}  # where I is the capital of ı, and İ that of i
# As Whisper's normalisers have them, and their full-width forms.
_BRACKETS = regex.compile(r"[<\[＜［][^>\]＞］]*[>\]＞］]|[(（][^)）]+?[)）]")
# What only shapes what is around it: joiners, marks of direction, variants, the Arabic stretch, and
# the letters of a flag. A zero-width space (U+200B) is a space.
_INVISIBLE = regex.compile(
    "[\u00ad\u034f\u061c\u0640\u180b-\u180f\u200c-\u200f\u202a-\u202e\u2060-\u206f"
    "\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]|[\U000e0030-\U000e007a]+\U000e007f"
)
_APOSTROPHE = regex.compile("(?<=\\p{L})[\u2018\u2019\u02bc\uff07](?=\\p{L})")  # of don't
# One letter that has two encodings, by language; those of all languages under "".
_VARIANTS = {
    "ro": {"ş": "ș", "ţ": "ț", "Ş": "Ș", "Ţ": "Ț"},  # with cedilla: there were no others once
    "fa": {"ي": "ی", "ى": "ی", "ك": "ک"},  # of Arabic keyboards
    "ur": {"ي": "ی", "ى": "ی", "ك": "ک", "ه": "ہ"},
    "": {
        f"{letter}\u0d4d\u200d": chillu for letter, chillu in zip("ണനരലളക", "ൺൻർൽൾൿ", strict=True)
    },
}
_AM = regex.compile("([\u0e4d\u0ecd])([\u0e48-\u0e4b\u0ec8-\u0ecb])")
_DIGIT = regex.compile(r"(?![0-9])\p{Nd}")
_DOTS = regex.compile("(?<=i)\u0307")  # an i has its dot already
# What may be between a letter and its mark, such as the markers of languages in `evaluation`.
_BETWEEN = r"[\p{M}\p{Cf}\p{Co}]*"
_APOSTROPHES = "\u02bb\u02bc"  # two that Unicode counts as letters
_DROPPED = regex.compile(
    rf"[\p{{P}}\p{{S}}\p{{Z}}\p{{Cc}}\u200b{_APOSTROPHES}]"
    # an enclosing mark, and what is left of a symbol with an accent
    rf"|\p{{Me}}|(?<!(?![{_APOSTROPHES}])[\p{{L}}\p{{N}}]{_BETWEEN})\p{{M}}+"
)


class Normalizer:
    """Normalises a text by its language, and collapses white space.

    Code-switched text ("de-en") does not count as English: the English normaliser would rewrite
    contractions and numbers of any language, and merge words of different languages.
    """

    def __init__(
        self, name: str = NORMALIZERS[0], spellings: Mapping[str, str] | None = None
    ) -> None:
        """Create a normaliser.

        The name is `unicode` or `whisper` (English by Whisper's English normaliser, all other
        languages by Unicode's categories, or by Whisper's basic one), `basic` (all by the basic
        one) or `none` (white space alone). `spellings` maps British to American ones, for English;
        None leaves them alone.

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
        if self.name == "unicode" and language == "en":
            text = _INVISIBLE.sub("", text.replace("\u200b", " "))
            text = self._english(_APOSTROPHE.sub("'", text))
        elif self.name == "whisper" and language == "en":
            text = self._english(text)
        elif self.name == "unicode":
            text = _by_categories(text, language)
        elif self.name != "none":
            text = self._basic(text)
        return " ".join(text.split())


def _by_categories(text: str, language: str) -> str:
    """Lower case and keep what `unicode` keeps; mixed languages have the case of the first."""
    text = unicodedata.normalize("NFKC", _BRACKETS.sub("", text))
    for code in ("", *language.split("-")):
        for one, other in _VARIANTS.get(code, {}).items():
            text = text.replace(one, other)
    text = _AM.sub(r"\2\1", text)  # of Thai and Lao: the tone comes first
    text = _DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0], digit[0])), text)
    if language.split("-")[0] in DOTLESS:
        text = text.replace("I", "ı").replace("İ", "i")
    text = _DOTS.sub("", _INVISIBLE.sub("", text.lower()))
    return unicodedata.normalize("NFKC", _DROPPED.sub(" ", text))
