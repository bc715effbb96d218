"""A small text grammar: files of alternatives, expanded with a seeded random source.

A rule file holds ``@symbol`` headings, each followed by alternatives (one a line, or several
on a line divided by `` | ``). In an alternative ``<symbol>`` is replaced by a fresh choice,
``<symbol:x>`` is chosen once for a text and remembered as ``x``, ``{H.he}`` is a form of a
character of the cast, and ``-`` stands for nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

Rules = dict[str, list[str]]

TEXTS = Path(__file__).parent / "texts"

_SLOT = re.compile(r"<([a-z_]+)(?::([a-z0-9]+))?>|\{([A-Z])(?:\.([A-Za-z]+))?\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!one\b|use|uni|Euro)")
_SILENT_H = re.compile(r"\b([Aa]) (?=hour|honest)")
_SENTENCE = re.compile(r'((?:^|[.!?] |\." )"?)([a-z])')
_SPACES = re.compile(r" {2,}")


@dataclass(frozen=True)
class Character:
    """Someone in a story.

    Attributes:
        name: The proper name, as used in the middle of a sentence.
        noun: What the character is, without an article ("little girl").
        female: Chooses the pronouns.
    """

    name: str
    noun: str
    female: bool

    def form(self, which: str | None, rng: random.Random) -> str:
        """Give one form of the character.

        Args:
            which: ``None`` for the name, a pronoun ("he", "His", ...), "a" or "the" for the
                noun with its article, or "S" for a name or a pronoun at random.
            rng: The source of chance for "S".

        Returns:
            The words to put in the text.
        """
        if which is None:
            return self.name
        if which in ("a", "the"):
            return f"{which} {self.noun}"
        if which == "noun":
            return self.noun
        if which == "S":
            return self.name if rng.random() < 0.4 else self._pronoun("He")
        return self._pronoun(which)

    def _pronoun(self, which: str) -> str:
        """Turn a masculine pronoun into the character's own, keeping the capital."""
        if not self.female:
            return which
        feminine = {"he": "she", "him": "her", "his": "her", "himself": "herself"}
        word = feminine[which.lower()]
        return word.capitalize() if which[0].isupper() else word


@dataclass
class Expander:
    """Expands symbols of a rule set for one text.

    Attributes:
        rules: The rule set.
        rng: The source of chance.
        cast: The characters by their letter.
        bound: What was chosen for the remembered slots so far.
    """

    rules: Rules
    rng: random.Random
    cast: Mapping[str, Character] = field(default_factory=dict)
    bound: dict[str, str] = field(default_factory=dict)

    def text(self, symbol: str) -> str:
        """Expand a symbol into finished text, with articles and capitals put right."""
        return tidy(self.expand(symbol))

    def expand(self, symbol: str) -> str:
        """Expand a symbol without the finishing touches."""
        return self.fill(self.rng.choice(self.rules[symbol]))

    def fill(self, template: str) -> str:
        """Replace every slot of a template."""
        return _SLOT.sub(self._slot, template)

    def _slot(self, match: re.Match[str]) -> str:
        symbol, key, letter, form = match.groups()
        if letter is not None:
            return self.cast[letter].form(form, self.rng)
        if key is None:
            return self.expand(symbol)
        if key not in self.bound:
            self.bound[key] = self.expand(symbol)
        return self.bound[key]


def tidy(text: str) -> str:
    """Put articles, capitals and spaces right."""
    text = _SPACES.sub(" ", text).strip()
    text = _SILENT_H.sub(r"\1n ", _ARTICLE.sub(r"\1n ", text))
    return _SENTENCE.sub(lambda m: m.group(1) + m.group(2).upper(), text)


def parse(text: str) -> Rules:
    """Read the text of a rule file.

    Args:
        text: The file's text.

    Returns:
        The alternatives of each symbol.
    """
    rules: Rules = {}
    current: list[str] = []
    for line in text.splitlines():
        if line.startswith("@"):
            current = rules.setdefault(line[1:].strip(), [])
        elif line.strip():
            current.extend("" if part == "-" else part for part in line.strip().split(" | "))
    return rules


def load(*names: str, known: frozenset[str] = frozenset()) -> Rules:
    """Read rule files beside this module and check that every symbol they use exists.

    Args:
        names: File names in the ``texts`` folder.
        known: Symbols that the caller defines itself.

    Returns:
        The joined rule set.

    Raises:
        KeyError: If an alternative names a symbol that no file defines.
    """
    rules: Rules = {}
    for name in names:
        for symbol, alternatives in parse((TEXTS / name).read_text(encoding="utf-8")).items():
            rules.setdefault(symbol, []).extend(alternatives)
    used = {m.group(1) for alts in rules.values() for a in alts for m in _SLOT.finditer(a)}
    missing = sorted(s for s in used if s is not None and s not in rules.keys() | known)
    if missing:
        raise KeyError(f"no rule for {missing}")
    return rules
