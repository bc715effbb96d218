"""Texts for pre-training: children's stories and plain general English, all generated."""

from __future__ import annotations

import random
from collections.abc import Iterator

from scripts.bundled.grammar import TEXTS, Character, Expander, Rules, load, tidy

STORY_SHARE = 0.62
STORY_FILES = ("words.txt", "stories.txt", "schemata.txt")
GENERAL_FILES = ("words.txt", "general.txt", "plain.txt")
FACT_FIELDS = ("name", "home", "food", "does")

Facts = dict[str, list[dict[str, str]]]


def child(rules: Rules, rng: random.Random, female: bool) -> Character:
    """Make a boy or a girl."""
    name = rng.choice(rules["girl" if female else "boy"])
    return Character(name, f"{rng.choice(rules['trait'])} {'girl' if female else 'boy'}", female)


def critter(rules: Rules, rng: random.Random, female: bool) -> Character:
    """Make a talking animal with a name."""
    noun = f"{rng.choice(rules['trait'])} {rng.choice(rules['critter'])}"
    return Character(rng.choice(rules["critter_name"]), noun, female)


def elder(rules: Rules, rng: random.Random, animal: bool) -> Character:
    """Make the grown-up of a story."""
    female = rng.random() < 0.5
    names = rules[("wise_" if animal else "elder_") + ("f" if female else "m")]
    return Character(rng.choice(names), "old friend", female)


def make_cast(rules: Rules, rng: random.Random, animal: bool) -> dict[str, Character]:
    """Choose hero H, friend F, grown-up E and pet P, with different names.

    The friend mostly has the other gender, so that pronouns stay clear.
    """
    make = critter if animal else child
    female = rng.random() < 0.5
    hero = make(rules, rng, female)
    friend = make(rules, rng, not female if rng.random() < 0.75 else female)
    while friend.name == hero.name:
        friend = make(rules, rng, friend.female)
    pet = Character(rng.choice(rules["petname"]), rng.choice(rules["pet"]), rng.random() < 0.5)
    return {"H": hero, "F": friend, "E": elder(rules, rng, animal), "P": pet}


def story(rules: Rules, rng: random.Random) -> str:
    """Write one story as a single paragraph."""
    animal = rng.random() < 0.35
    expander = Expander(rules, rng, make_cast(rules, rng, animal))
    return expander.text("animal_story" if animal else "child_story")


def load_facts() -> Facts:
    """Read the tables of facts: for each kind, rows bound to ``FACT_FIELDS``."""
    facts: Facts = {}
    rows: list[dict[str, str]] = []
    for line in (TEXTS / "facts.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            rows = facts.setdefault(line[1:].split()[0], [])
        else:
            rows.append(dict(zip(FACT_FIELDS, line.split(";"), strict=True)))
    return facts


def general(rules: Rules, facts: Facts, rng: random.Random) -> str:
    """Write one short text of plain general English.

    A text about an animal, a job or an object must state true facts, so its slots are bound
    to one row of the tables before it is expanded.
    """
    template = rng.choice(rules["general"])
    kind = template.strip("<>").removesuffix("_text")
    bound = dict(rng.choice(facts[kind])) if kind in facts else {}
    expander = Expander(rules, rng, make_cast(rules, rng, animal=False), bound)
    return tidy(expander.fill(template))


def texts(seed: int) -> Iterator[str]:
    """Write texts of both sorts without end.

    Args:
        seed: Same seed, same texts.

    Yields:
        Texts without line breaks.
    """
    rng = random.Random(seed)
    stories, plain, facts = load(*STORY_FILES), load(*GENERAL_FILES), load_facts()
    while True:
        if rng.random() < STORY_SHARE:
            yield story(stories, rng)
        else:
            yield general(plain, facts, rng)


def texts_of_size(seed: int, characters: int, barred: frozenset[str] = frozenset()) -> list[str]:
    """Write texts until they have the wanted size together.

    Args:
        seed: Same seed, same texts.
        characters: The size to reach.
        barred: Texts to leave out, such as the held-out ones.

    Returns:
        The texts.
    """
    chosen: list[str] = []
    size = 0
    for text in texts(seed):
        if text in barred:
            continue
        chosen.append(text)
        size += len(text)
        if size >= characters:
            break
    return chosen
