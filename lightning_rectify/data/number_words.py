"""Numbers, dates and amounts of money in German and English words: parallel text that needs no files.

The words come from num2words, the names of months and days from babel (the Unicode CLDR); inflection and word order
are ours. A pair of sentences is a function of one value, and no value is in two parts.
"""

from collections.abc import Iterator
from datetime import date
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_rectify.arguments import check_choice, check_least

LANGUAGES = ("de", "en")
PARTS = ("train", "val", "test")

_FIRST_DAY, _LAST_DAY = date(1500, 1, 1).toordinal(), date(2099, 12, 31).toordinal()
_DIGITS = 6  # numbers are below a million
_BLOCK = 4096  # values drawn at once
_TEST_SEED = 20190808  # the test part is the same whatever the seed, so that scores can be compared


class Value(NamedTuple):
    """What a pair of sentences says.

    Attributes:
        kind: 0 a number, 1 a date, 2 an amount of money.
        value: the number, 0 to 999,999; the date's proleptic Gregorian ordinal (1500 to 2099); or hundredths of the
            currency, 1 to 99,999,999.
        form: of a date, the phrase (0 "der ...", 1 "am ...", 2 with the day of the week); of an amount, the currency.
    """

    kind: int
    value: int
    form: int


class _Currency(NamedTuple):
    """One and many of the unit, then one and many of its hundredth."""

    german: tuple[str, str, str, str]
    english: tuple[str, str, str, str]


_CURRENCIES = (
    _Currency(("Euro", "Euro", "Cent", "Cent"), ("euro", "euros", "cent", "cents")),
    _Currency(("Dollar", "Dollar", "Cent", "Cent"), ("dollar", "dollars", "cent", "cents")),
    _Currency(("Pfund", "Pfund", "Penny", "Pence"), ("pound", "pounds", "penny", "pence")),
    _Currency(("Franken", "Franken", "Rappen", "Rappen"), ("franc", "francs", "centime", "centimes")),
)


def number_pairs(part: str, size: int, seed: int = 0) -> list[dict[str, str]]:
    """Draw the sentences of a part.

    Numbers, dates and amounts take turns. Which part a value belongs to is fixed: 90 % of all values may be
    drawn for training, 5 % for validation and 5 % for the test. A shorter part is the beginning of a longer one.

    Args:
        part: "train", "val" or "test".
        size: number N of pairs, all of different values; at most 20,000 for validation and test, 400,000 for training.
        seed: of the draw, at least 0; the test part is the same for each.

    Returns:
        N pairs, each by language, "de" and "en".

    Raises:
        ValueError: for an argument outside its range.

    Example:
        >>> number_pairs("train", 2)[0].keys()
        dict_keys(['de', 'en'])
    """
    check_choice(PARTS, part=part)
    limit = 400_000 if part == "train" else 20_000
    if not 0 <= size <= limit:
        raise ValueError(f"Expected argument `size` to be in 0 to {limit} for {part} but got {size!r}.")
    check_least(0, seed=seed)
    kinds = [_distinct(kind, part, _TEST_SEED if part == "test" else seed) for kind in range(3)]
    return [words(next(kinds[i % 3])) for i in range(size)]


def words(value: Value) -> dict[str, str]:
    """The sentences of a value, by language.

    Example:
        >>> words(Value(kind=1, value=date(1980, 3, 3).toordinal(), form=1))
        {'de': 'am dritten März neunzehnhundertachtzig', 'en': 'on the third of March nineteen eighty'}
        >>> words(Value(kind=2, value=1705, form=0))
        {'de': 'siebzehn Euro und fünf Cent', 'en': 'seventeen euros and five cents'}
    """
    if value.kind == 0:
        return {"de": german(value.value), "en": english(value.value)}
    return _date_words(value) if value.kind == 1 else _amount_words(value)


def german(number: int) -> str:
    """A number from 0 to 999,999 in German words."""
    thousands, rest = divmod(number, 1000)
    if not thousands:
        return _say("de", rest)
    return f"{_before_noun(_say('de', thousands))}tausend{_say('de', rest) if rest else ''}"


def english(number: int) -> str:
    """A number from 0 to 999,999 in British English words."""
    thousands, rest = divmod(number, 1000)
    if not thousands:
        return _say("en", rest)
    joint = ", " if rest >= 100 else " and "
    return f"{_say('en', thousands)} thousand{joint + _say('en', rest) if rest else ''}"


# -- which values ------------------------------------------------------------------------------------------------------


def _distinct(kind: int, part: str, seed: int) -> Iterator[Value]:
    """Values of one kind that belong to a part, none twice, whatever its form; it never ends."""
    rng = np.random.default_rng([seed, PARTS.index(part), kind])
    seen: set[int] = set()
    while True:
        values, forms = _draw(kind, rng)
        mine = _part_of(kind, values) == PARTS.index(part)
        for value, form in zip(values[mine].tolist(), forms[mine].tolist(), strict=True):
            if value not in seen:
                seen.add(value)
                yield Value(kind, value, form)


def _draw(kind: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Values and forms of a kind, each of shape (_BLOCK,)."""
    if kind == 1:
        return rng.integers(_FIRST_DAY, _LAST_DAY + 1, size=_BLOCK), rng.integers(3, size=_BLOCK)
    # Below each power of ten as often, so that short numbers are seen at all.
    whole = rng.integers(10 ** rng.integers(1, _DIGITS + 1, size=_BLOCK))
    if kind == 0:
        return whole, np.zeros_like(whole)
    # A third without hundredths, as prices are.
    hundredths = rng.integers(100, size=_BLOCK) * (rng.integers(3, size=_BLOCK) > 0)
    return np.maximum(100 * whole + hundredths, 1), rng.integers(len(_CURRENCIES), size=_BLOCK)


def _part_of(kind: int, value: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index in ``PARTS`` of values, shape kept: a hash of them, whatever the seed and the sizes."""
    # The finaliser of splitmix64: neighbours and round numbers fall into parts as if by chance.
    mixed = (4 * value + kind).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    share = (mixed % np.uint64(20)).astype(np.int64)
    return np.where(share == 0, 2, np.where(share == 1, 1, 0))


# -- their words -------------------------------------------------------------------------------------------------------


@cache
def _say(language: str, number: int, kind: str = "cardinal") -> str:
    """A number below 1,000, a year or an ordinal; num2words is slow, and few of these make all others."""
    from num2words import num2words  # type: ignore[import-untyped]

    said: str = num2words(number, lang=language, to=kind)
    return said


@cache
def _names(language: str) -> tuple[list[str], list[str]]:
    """Months from January, days from Monday."""
    from babel import Locale

    locale = Locale(language)
    months, days = locale.months["format"]["wide"], locale.days["format"]["wide"]
    return [months[month] for month in range(1, 13)], [days[day] for day in range(7)]


def _before_noun(spoken: str) -> str:
    """German "eins" is "ein" before a masculine or neuter noun, and inside a number: "einhunderteintausend"."""
    return spoken.removesuffix("s") if spoken.endswith("eins") else spoken


def _date_words(value: Value) -> dict[str, str]:
    day = date.fromordinal(value.value)
    said = {}
    for language in LANGUAGES:
        months, days = _names(language)
        weekday, month = days[day.weekday()], months[day.month - 1]
        ordinal, year = _say(language, day.day, "ordinal"), _say(language, day.year, "year")
        if language == "de":
            # The ordinal is weak: -e in the nominative after "der", -en in the dative after "am" and "dem".
            opening = ("der", "am", f"am {weekday}, dem")[value.form]
            said["de"] = f"{opening} {ordinal}{'n' if value.form else ''} {month} {year}"
        else:
            opening = ("the", "on the", f"on {weekday}, the")[value.form]
            said["en"] = f"{opening} {ordinal} of {month} {year}"
    return said


def _amount_words(value: Value) -> dict[str, str]:
    currency, counts = _CURRENCIES[value.form], divmod(value.value, 100)
    german_terms, english_terms = [], []
    for place, count in enumerate(counts):
        if count:  # not "zero euros and five cents"
            noun = 2 * place + (count != 1)
            german_terms.append(f"{_before_noun(german(count))} {currency.german[noun]}")
            english_terms.append(f"{english(count)} {currency.english[noun]}")
    return {"de": " und ".join(german_terms), "en": " and ".join(english_terms)}
