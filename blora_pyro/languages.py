"""Languages as people write them, and as Whisper's tokens do."""

import functools
import re

from blora_pyro.errors import UserError

_JOINT = re.compile(r"[-_]")
_REGION = re.compile(r"[A-Z]{2}|\d{3}|[A-Z][a-z]{3}")  # BCP 47: a region, or a script


def is_language(text: str) -> bool:
    """Tell whether a text names one of Whisper's languages, or several joined."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    try:
        return all(code in LANGUAGES for code in language_code(text).split("-"))
    except UserError:
        return False


@functools.cache
def language_code(text: str) -> str:
    """Return a language, or two joined, by Whisper's codes: "de" for "German", "DE" or "de-AT".

    Code-switched speech is joined with a hyphen, matrix language first: "de-en" for
    "German-English". Names are those of transformers' table for Whisper. What is not in it stays as
    it is, since a tokenizer may know more.

    Raises:
        UserError: if what follows the hyphen may be a region or a language, as in "pt-BR".
    """
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    def code(name: str) -> str | None:
        name = name.strip().lower()
        return name if name in LANGUAGES else TO_LANGUAGE_CODE.get(name)

    first, *rest = _JOINT.split(text)
    if (main := code(first)) is None:
        return text
    codes = [main]
    for part in rest:
        region = bool(_REGION.fullmatch(part)) and not first.isupper()
        if (other := code(part)) is None and not region:
            return text
        if other is None or (region and other == main):
            continue
        if region and len(part) == 2:
            raise UserError(
                f"the language {text!r} may be {main} of a region, or code-switched {main} and "
                f"{other}; give {main!r} or '{main}-{other}'"
            )
        codes.append(other)
    return "-".join(codes)
