"""Text of others on its way to a terminal: what would steer it is shown, and does nothing."""

import re

# Control characters but tab and newline, and what turns the order of letters or shows nothing; the
# joiners of Indic and Persian letters are text.
_UNSAFE = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def escaped(text: str, json: bool = False) -> str:
    r"""Return a text that a terminal shows and does not obey: `\x1b` for the escape character.

    Args:
        text: Of one or more lines.
        json: Escape as JSON does, `\u001b`; a JSON text keeps its meaning.
    """
    return _UNSAFE.sub(_escape_json if json else _escape, text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _escape_json(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
