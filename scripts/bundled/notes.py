"""The "private" domain: hospital ward notes about nobody, generated.

No note describes a real person: there are no names, and ages, beds and values are drawn at
random. What belongs together (complaint, finding, test, drug) comes from one table row.
"""

from __future__ import annotations

import random

from scripts.bundled.grammar import TEXTS, Character, Expander, Rules, load, tidy

FIELDS = ("name", "complaint", "finding", "test", "drug", "advice", "temperature", "ward")
TRAIN_NOTES = 1150
HELD_OUT_NOTES = 120
TEMPERATURES = {"normal": (360, 374), "hot": (379, 394)}


def conditions() -> list[dict[str, str]]:
    """Read the table of conditions."""
    lines = (TEXTS / "conditions.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split(";") for line in lines if not line.startswith("#")]
    return [dict(zip(FIELDS, row, strict=True)) for row in rows]


def numbers(low: int, high: int) -> list[str]:
    """All whole numbers of a range, as alternatives of a rule."""
    return [str(value) for value in range(low, high + 1)]


def tenths(low: int, high: int) -> list[str]:
    """Numbers with one decimal, from bounds given in tenths."""
    return [f"{value / 10:.1f}" for value in range(low, high + 1)]


def measured_rules(temperature: str) -> Rules:
    """Make the rules whose alternatives are measured values.

    Args:
        temperature: "normal" or "hot".

    Returns:
        The rules.
    """
    return {
        "age": numbers(24, 93),
        "bed": numbers(1, 32),
        "days": numbers(2, 9),
        "weeks": numbers(2, 8),
        "pain": numbers(0, 8),
        "hr": numbers(58, 124),
        "rr": numbers(12, 28),
        "spo": numbers(88, 99),
        "temp": tenths(*TEMPERATURES[temperature]),
        "bp": [f"{high}/{high // 2 + 12}" for high in range(96, 182, 2)],
        "hb": numbers(72, 152),
        "wcc": tenths(48, 196),
        "crp": numbers(4, 240),
        "na": numbers(124, 146),
        "k": tenths(31, 56),
        "cr": numbers(58, 290),
        "ml": [str(value) for value in range(250, 1450, 50)],
        "rate": ["42", "83", "100", "125", "167"],
        "glucose": tenths(42, 186),
        "stool": numbers(3, 7),
        "news": numbers(0, 7),
        "clock": [f"{hour:02d}:{minute:02d}" for hour in range(24) for minute in (0, 15, 30, 45)],
    }


def note(rules: Rules, condition: dict[str, str], rng: random.Random) -> str:
    """Write one note on one line."""
    female = rng.random() < 0.5
    noun = rng.choice(("woman", "female", "lady") if female else ("man", "male", "gentleman"))
    rules = rules | measured_rules(condition["temperature"])
    patient = Character("the patient", noun, female)
    return tidy(Expander(rules, rng, {"H": patient}, dict(condition)).expand("note"))


def data_set(seed: int) -> tuple[list[str], list[str]]:
    """Write the whole data set.

    Args:
        seed: Same seed, same notes.

    Returns:
        The training notes and the held-out notes, all different from one another.
    """
    rng = random.Random(seed)
    rules, table = load_rules(), conditions()
    unique: dict[str, None] = {}
    while len(unique) < TRAIN_NOTES + HELD_OUT_NOTES:
        unique.setdefault(note(rules, rng.choice(table), rng))
    chosen = list(unique)
    return chosen[HELD_OUT_NOTES:], chosen[:HELD_OUT_NOTES]


def load_rules() -> Rules:
    """Read the templates of the notes."""
    known = measured_rules("normal")
    return load("notes.txt", known=frozenset(known))
