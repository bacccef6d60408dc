"""Sentences drawn from the slot grammars in `grammars.toml`, monolingual and code-switched."""

import random
import tomllib
from dataclasses import dataclass
from pathlib import Path

SWITCHABLE = ("person", "object", "place", "time")
HAN = "zh"

Word = tuple[str, str]  # (word, language)


def is_embeddable(phrase: str, symbol: str) -> bool:
    """Whether a phrase shows its language: a bare personal name does not."""
    return symbol != "person" or len(phrase.split()) > 1


@dataclass(frozen=True)
class Grammar:
    """One language's rules: every symbol maps to phrases whose `{symbols}` expand in turn."""

    language: str
    rules: dict[str, list[str]]

    @classmethod
    def load(cls, language: str) -> "Grammar":
        """Read that of a language from `grammars.toml`."""
        path = Path(__file__).with_name("grammars.toml")
        rules = tomllib.loads(path.read_text(encoding="utf-8"))[language]
        return cls(rules.pop("language"), rules)

    def expand(self, phrase: str, rng: random.Random, switched: dict[str, "Grammar"]) -> list[Word]:
        """Words of `phrase`; a symbol named in `switched` is filled by that other grammar."""
        out: list[Word] = []
        for token in phrase.split():
            if not token.startswith("{"):
                out.append((token, self.language))
                continue
            symbol = token[1:-1]
            other = switched.get("noun" if symbol.startswith("noun") else symbol)
            if other is None:
                out += self.expand(rng.choice(self.rules[symbol]), rng, switched)
            elif symbol.startswith("noun"):
                out.append((other.noun(rng), other.language))
            else:
                phrases = [
                    phrase for phrase in other.rules[symbol] if is_embeddable(phrase, symbol)
                ]
                out += other.expand(rng.choice(phrases), rng, {})
        return out

    def noun(self, rng: random.Random) -> str:
        """A bare noun, from whichever gender class."""
        classes = [phrases for name, phrases in self.rules.items() if name.startswith("noun")]
        return rng.choice([noun for phrases in classes for noun in phrases])

    def sentence(self, rng: random.Random) -> list[Word]:
        """A monolingual sentence."""
        return self.expand(rng.choice(self.rules["sentences"]), rng, {})

    def code_switched(self, other: "Grammar", rng: random.Random) -> list[Word]:
        """A sentence of this (matrix) language with words or phrases of `other` embedded.

        Half of the draws switch one constituent, a quarter two, a quarter bare nouns.
        """
        while True:
            template = rng.choice(self.rules["sentences"])
            slots = [name for name in SWITCHABLE if "{" + name + "}" in template]
            kind = rng.choice(("one", "one", "two", "noun"))
            if kind == "noun":
                chosen = ["noun"]
            else:
                chosen = rng.sample(slots, min(len(slots), 2 if kind == "two" else 1))
            words = self.expand(template, rng, dict.fromkeys(chosen, other))
            if {language for _, language in words} == {self.language, other.language}:
                return words


def render(words: list[Word]) -> str:
    """Transcript: words joined by spaces, none between two Han words."""
    text = ""
    for index, (word, language) in enumerate(words):
        joined = index == 0 or (language == HAN and words[index - 1][1] == HAN)
        text += word if joined else " " + word
    return text


def word_languages(words: list[Word]) -> list[str]:
    """The language of each token that `blora_pyro.metrics.words` makes of the transcript."""
    return [language for word, language in words for _ in (word if language == HAN else [word])]


def runs(words: list[Word]) -> list[Word]:
    """Consecutive words of one language joined into phrases to be spoken."""
    out: list[list[Word]] = []
    for word in words:
        if out and out[-1][-1][1] == word[1]:
            out[-1].append(word)
        else:
            out.append([word])
    return [(render(run), run[0][1]) for run in out]
