"""A generated corpus, Portuguese to English, in which each text has one exact translation.

    >>> portuguese(1202), portuguese(1200), portuguese(2002, feminine=True)
    ('mil duzentos e dois', 'mil e duzentos', 'duas mil e duas')
    >>> english(300_021)
    'three hundred thousand and twenty-one'

Five categories: cardinals in words (0 to 999,999), dates, clock times, prices, and short
sentences with gender and number agreement. Every text is written from a *value* (a number, a
date, an amount, a sentence's meaning), and a hash of that value says whether it is trained on or
held out, so no value is ever on both sides, whatever the words. The Portuguese is Brazilian.
"""

from __future__ import annotations

import datetime
import hashlib
import random
from collections.abc import Callable
from typing import NamedTuple

from sentences import sentence

# Held out: one value in ten. Clock times have only 1440 values, so less would test too few.
HELD_OUT_ONE_IN = 10
# Pairs to train on, about one pass in the default run. Sentences have the most words to learn, and
# cardinals teach the place values that prices and dates reuse; there are few distinct times.
TRAIN_PAIRS = {
    "number": 20_000,
    "price": 18_000,
    "date": 11_000,
    "time": 10_000,
    "sentence": 35_000,
}
TEST_PAIRS = 300  # a category; 95% is then known to about 1.3% (one standard error)


class Pair(NamedTuple):
    """One example: a source text, its translation, and the category it is scored under."""

    source: str
    target: str
    category: str


class Example(NamedTuple):
    """One drawn example; `value` is the meaning that train and test must not share."""

    value: str
    source: str
    target: str


def words(text: str) -> list[str]:
    return text.split()


UNITS = words(
    "zero um dois três quatro cinco seis sete oito nove dez onze doze treze catorze quinze "
    "dezesseis dezessete dezoito dezenove"
)
TENS = words("- - vinte trinta quarenta cinquenta sessenta setenta oitenta noventa")
HUNDREDS = words(
    "- cento duzentos trezentos quatrocentos quinhentos seiscentos setecentos oitocentos novecentos"
)
EN_UNITS = words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
EN_TENS = words("- - twenty thirty forty fifty sixty seventy eighty ninety")


def _below_thousand(n: int, feminine: bool) -> str:
    """Portuguese words for 1 to 999; hundreds, tens and units are joined by "e"."""
    if n == 100:
        return "cem"
    parts = []
    if n >= 100:
        hundred = HUNDREDS[n // 100]
        parts.append(hundred[:-2] + "as" if feminine and n >= 200 else hundred)
        n %= 100
    if n >= 20:
        parts.append(TENS[n // 10])
        n %= 10
    if n:
        parts.append({1: "uma", 2: "duas"}.get(n, UNITS[n]) if feminine else UNITS[n])
    return " e ".join(parts)


def portuguese(n: int, feminine: bool = False) -> str:
    """The cardinal `n` (0 to 999,999) in Portuguese words, agreeing with a feminine noun if told.

    After "mil" an "e" stands only before a rest below 100 or of whole hundreds: "mil e dois",
    "mil e duzentos", but "mil duzentos e dois".
    """
    if not 0 <= n <= 999_999:
        raise ValueError(f"n must be 0 to 999,999, got {n}")
    if n == 0:
        return "zero"
    thousands, rest = divmod(n, 1000)
    if not thousands:
        return _below_thousand(rest, feminine)
    head = "mil" if thousands == 1 else f"{_below_thousand(thousands, feminine)} mil"
    if not rest:
        return head
    link = " e " if rest < 100 or rest % 100 == 0 else " "
    return head + link + _below_thousand(rest, feminine)


def english(n: int) -> str:
    """The cardinal `n` (0 to 999,999) in English words, with "and" before tens and units."""
    if not 0 <= n <= 999_999:
        raise ValueError(f"n must be 0 to 999,999, got {n}")
    if n < 20:
        return EN_UNITS[n]
    if n < 100:
        return EN_TENS[n // 10] + (f"-{EN_UNITS[n % 10]}" if n % 10 else "")
    if n < 1000:
        tail = f" and {english(n % 100)}" if n % 100 else ""
        return f"{EN_UNITS[n // 100]} hundred{tail}"
    head, rest = f"{english(n // 1000)} thousand", n % 1000
    if not rest:
        return head
    return f"{head} {'and ' if rest < 100 else ''}{english(rest)}"


def ordinal(n: int) -> str:
    """The English ordinal of 1 to 31: "first", "twenty-first", "thirtieth"."""
    head, dash, last = english(n).rpartition("-")
    irregular = {"one": "first", "two": "second", "three": "third", "five": "fifth"}
    irregular |= {"eight": "eighth", "nine": "ninth", "twelve": "twelfth"}
    if last not in irregular:
        last = last[:-1] + "ie" if last.endswith("y") else last
        return f"{head}{dash}{last}th"
    return f"{head}{dash}{irregular[last]}"


def english_year(year: int) -> str:
    """1998 is "nineteen ninety-eight", 1905 "nineteen oh five", 2026 "two thousand and ..."."""
    if year >= 2000:
        return english(year)
    century, rest = divmod(year, 100)
    if rest == 0:
        return f"{english(century)} hundred"
    return f"{english(century)} {'oh ' if rest < 10 else ''}{english(rest)}"


# ------------------------------------------------------------------------------ the categories


def number(rng: random.Random) -> Example:
    """A cardinal; the number of digits is drawn first, so that short ones are tested too."""
    digits = rng.choices(range(1, 7), weights=(1, 2, 10, 22, 25, 40))[0]
    n = rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
    if rng.random() < 0.15:  # round numbers, where the rules for "e" and "and" change
        n -= n % rng.choice((10, 100, 1000))
    return Example(str(n), portuguese(n), english(n))


MONTHS = words(
    "janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro"
)
EN_MONTHS = words(
    "January February March April May June July August September October November December"
)
WEEKDAYS = words("segunda-feira terça-feira quarta-feira quinta-feira sexta-feira sábado domingo")
EN_WEEKDAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


def date(rng: random.Random) -> Example:
    """A day of the years 1800 to 2099, with or without its true weekday."""
    first, last = datetime.date(1800, 1, 1).toordinal(), datetime.date(2099, 12, 31).toordinal()
    day = datetime.date.fromordinal(rng.randint(first, last))
    pt_day = "primeiro" if day.day == 1 else portuguese(day.day)
    pt = f"{pt_day} de {MONTHS[day.month - 1]} de {portuguese(day.year)}"
    en = f"the {ordinal(day.day)} of {EN_MONTHS[day.month - 1]} {english_year(day.year)}"
    if rng.random() < 0.3:
        pt = f"{WEEKDAYS[day.weekday()]}, {pt}"
        en = f"{EN_WEEKDAYS[day.weekday()]}, {en}"
    return Example(day.isoformat(), pt, en)


def _hour(hour: int, article: bool) -> tuple[str, str, str, str]:
    """An hour's Portuguese name and part of the day, then the English ones.

    `article`: with the definite article, as "para" wants it ("para as três").
    """
    if hour == 12:
        return ("o " if article else "") + "meio-dia", "", "noon", ""
    if hour == 0:
        return ("a " if article else "") + "meia-noite", "", "midnight", ""
    pt = portuguese(hour % 12, feminine=True)
    if article:
        pt = ("a " if hour % 12 == 1 else "as ") + pt
    en = english(hour % 12)
    if hour < 6:
        return pt, " da madrugada", en, " in the early morning"
    if hour < 12:
        return pt, " da manhã", en, " in the morning"
    if hour < 19:
        return pt, " da tarde", en, " in the afternoon"
    return pt, " da noite", en, " at night"


def clock(hour: int, minute: int, to_next: bool = False) -> tuple[str, str]:
    """A time of day in both languages; `to_next` counts down to the next hour ("vinte para as")."""
    if to_next:
        pt_hour, pt_part, en_hour, en_part = _hour((hour + 1) % 24, article=True)
        left = 60 - minute
        en_left = "a quarter" if left == 15 else english(left)
        return f"{portuguese(left)} para {pt_hour}{pt_part}", f"{en_left} to {en_hour}{en_part}"
    pt_hour, pt_part, en_hour, en_part = _hour(hour, article=False)
    if minute == 0:
        oclock = "" if hour in (0, 12) else " o'clock"
        return f"{pt_hour}{pt_part}", f"{en_hour}{oclock}{en_part}"
    pt = f"{pt_hour} e {'meia' if minute == 30 else portuguese(minute)}{pt_part}"
    if minute <= 30:
        past = {15: "a quarter", 30: "half"}.get(minute, english(minute))
        return pt, f"{past} past {en_hour}{en_part}"
    if hour in (0, 12):
        en_hour, en_part = "twelve", " at night" if hour == 0 else " in the afternoon"
    return pt, f"{en_hour} {english(minute)}{en_part}"


# What happens at a time: "a loja abre às ...".
EVENTS = (
    ("a reunião começa", "the meeting starts"),
    ("o trem parte", "the train leaves"),
    ("o avião chega", "the plane arrives"),
    ("a loja abre", "the store opens"),
    ("a loja fecha", "the store closes"),
    ("o filme termina", "the movie ends"),
)


def time(rng: random.Random) -> Example:
    """A clock time: on its own, as "it is ...", or as when something happens."""
    hour, minute = rng.randrange(24), rng.randrange(60)
    to_next = minute > 30 and rng.random() < 0.5
    pt, en = clock(hour, minute, to_next)
    form = rng.randrange(3)
    singular = hour in (0, 1, 12, 13)
    if form == 1:
        one = 60 - minute == 1 if to_next else singular
        pt, en = f"{'é' if one else 'são'} {pt}", f"it is {en}"
    elif form == 2 and not to_next:
        at = "ao" if hour == 12 else "à" if singular else "às"
        pt_event, en_event = rng.choice(EVENTS)
        pt, en = f"{pt_event} {at} {pt}", f"{en_event} at {en}"
    return Example(f"{hour}:{minute}", pt, en)


class Unit(NamedTuple):
    """A unit of money in both languages, one and many."""

    one: str
    many: str
    en_one: str
    en_many: str

    def amount(self, n: int) -> tuple[str, str]:
        """`n` units in both languages; the pound alone is feminine ("duas libras")."""
        pt = f"{portuguese(n, feminine=self.one == 'libra')} {self.one if n == 1 else self.many}"
        return pt, f"{english(n)} {self.en_one if n == 1 else self.en_many}"


# Each currency with its hundredth part; pounds are counted whole.
CURRENCIES = (
    (Unit("real", "reais", "real", "reais"), Unit("centavo", "centavos", "centavo", "centavos")),
    (Unit("dólar", "dólares", "dollar", "dollars"), Unit("centavo", "centavos", "cent", "cents")),
    (Unit("euro", "euros", "euro", "euros"), Unit("cêntimo", "cêntimos", "cent", "cents")),
    (Unit("libra", "libras", "pound", "pounds"), None),
)
GOODS = (
    ("o livro", "the book", False),
    ("a camisa", "the shirt", False),
    ("o relógio", "the watch", False),
    ("a cadeira", "the chair", False),
    ("os sapatos", "the shoes", True),
    ("as flores", "the flowers", True),
)


def price(rng: random.Random) -> Example:
    """An amount below 10,000 in one of four currencies, alone or as what something costs."""
    unit, cent = rng.choice(CURRENCIES)
    whole = rng.randrange(10 ** rng.choices((1, 2, 3, 4), weights=(1, 3, 5, 5))[0])
    part = rng.choice((0, rng.randrange(100), rng.randrange(100))) if cent else 0
    if whole == part == 0:
        whole = 1
    counts = [unit.amount(whole)] if whole else []
    if cent and part:
        counts.append(cent.amount(part))
    pt_text, en_text = " e ".join(pt for pt, _ in counts), " and ".join(en for _, en in counts)
    if rng.random() < 0.3:
        good, en_good, plural = rng.choice(GOODS)
        pt_text = f"{good} {'custam' if plural else 'custa'} {pt_text}"
        en_text = f"{en_good} {'cost' if plural else 'costs'} {en_text}"
    return Example(f"{unit.one} {whole}.{part:02d}", pt_text, en_text)


def phrase(rng: random.Random) -> Example:
    """A short sentence; its English is its meaning, so that no meaning is on both sides."""
    pt, en = sentence(rng)
    return Example(en, pt, en)


CATEGORIES: dict[str, Callable[[random.Random], Example]] = {
    "number": number,
    "date": date,
    "time": time,
    "price": price,
    "sentence": phrase,
}

# -------------------------------------------------------------------------------------- the split


def held_out(category: str, value: str) -> bool:
    """Whether a value belongs to the test side: a hash of it, the same on every run and machine."""
    if (category, value) == ("number", "0"):
        return False  # no other number has the word "zero": held out, it could not be known
    digest = hashlib.blake2b(f"{category}:{value}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def generate(
    seed: int = 0, train_pairs: dict[str, int] | None = None, test_pairs: int = TEST_PAIRS
) -> tuple[list[Pair], list[Pair]]:
    """Train and test pairs, without repeated sources; no value is on both sides.

    Args:
      seed: of the draw; the split itself does not depend on it.
      train_pairs: how many of each category to train on, `TRAIN_PAIRS` by default.
      test_pairs: how many of each category to hold out.
    """
    train: list[Pair] = []
    test: list[Pair] = []
    for name, wanted in (train_pairs or TRAIN_PAIRS).items():
        rng = random.Random(f"{seed}:{name}")
        sides: tuple[dict[str, Pair], dict[str, Pair]] = ({}, {})
        limits = (wanted, test_pairs)
        # A category may have fewer texts than asked: stop after drawing many times too often.
        for _ in range(20 * (wanted + HELD_OUT_ONE_IN * test_pairs)):
            value, source, target = CATEGORIES[name](rng)
            side = held_out(name, value)
            if len(sides[side]) < limits[side]:
                sides[side].setdefault(source, Pair(source, target, name))
            elif len(sides[not side]) >= limits[not side]:
                break
        train += sides[0].values()
        test += sides[1].values()
    return train, test
