"""Values and subjects of stated facts: numbers, prices, dates, times, names, places, words, codes, identifiers.

Names and places are partly listed and partly made of syllables, so that a model meets ones it never saw all the time;
none of the listed ones is used in evaluation. Called by ``fact_forms.py``; tested in ``tests/data/test_fact_rows.py``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MONTHS = _words("January February March April May June July August September October November December")
_FIRST = _words("""
    Alice Bruno Clara David Elena Felix Greta Hassan Irene Jonas Karim Laura Marco Nadia Oscar Paula Quentin Rosa
    Stefan Tara Ulrich Vera Walter Xenia Yusuf Zoe Amir Bettina Carlos Daria Emil Farah Gustav Hanna Ivan Judith
    Kenji Lucia Mehmet Nora Olga Pedro Rahel Sami Tomas Ulla Viktor Wanda Yara Anton Birgit Cyril Dora Erik Flora
    Georg Helga Igor
""")
_FAMILY = _words("""
    Adler Baum Castro Duarte Eriksen Ferrari Gomez Hoffman Iversen Jansen Kowalski Lopez Moreau Novak Olsen Petrov
    Quist Rossi Schmidt Tanaka Urban Virtanen Weber Xu Yilmaz Zeller Becker Colombo Dubois Farkas Garcia Hansen Ito
    Kaya Laine
""")
_PLACES = _words("""
    Paris Lima Oslo Cairo Delhi Quito Rome Turin Bergen Hanoi Kyoto Lagos Malmo Nairobi Porto Riga Seoul Tunis
    Vienna Warsaw Zagreb Dublin Geneva Boston Toronto Sydney Havana Ankara Madrid Lyon Naples Prague Athens Munich
    Hamburg Denver Dallas Osaka Jakarta Accra Rabat Bogota Leeds Bristol Ghent Basel Krakow Split Varna Tallinn
    Perth Tbilisi
""")
_STARTS = _words("""
    ba be bo bra ca ce cor da del do dra el fa fen ga gri ha hel il ja jo ka kel la lo ma mel mo na ne ol or pa per
    po ra rin ro sa sel so ta tel to tri u va vel vi wa wil ya zan
""")
_MIDDLES = _words("ba bi da di do ga ka li lo ma mi mo na ni no ra ri ro sa si ta ti to va vi")
_NAME_ENDS = _words("n ra la s nd k no lia mir rik tta vin zo")
_FAMILY_ENDS = _words("son berg ov ini escu sen mann dal ric ley well stein ado ini ak")
_PLACE_ENDS = _words("ville ton burg field ford stad haven mouth by grad minster wick dorf port bridge")
# a syllable of a coined name, so that its pieces are any of a tokenizer's; "" is none
_ONSETS = (
    "",
    *_words("""
    b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kn l m n p ph pl pr qu r s sch sh sk sl sm sn sp st str t th tr v w
    wh y z
"""),
)
_VOWELS = _words("a a a e e e i i i o o o u u ae ai au ea ee ei eu ia ie io oa oe oo ou ue y")
_CODAS = (
    "",
    "",
    "",
    *_words("""
    b ck d f g k l ld ll lm ln lt m mp n n n nd ng nk nt p r r rd rg rk rl rm rn rt s s sk ss st t th tt x z
"""),
)
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_HEX = "0123456789abcdef"
_PATTERNS = ("LLDDDD", "LDLDLD", "LLLDDD", "DLLDDL", "LL-DDD", "L-DDDD-L", "DDDD-LL", "LLDD-DDLL", "DDLLLDD")
_UNITS = _words("""
    kilograms grams tonnes pounds metres feet miles kilometres litres gallons hours minutes days weeks degrees volts
    watts pages steps barrels acres inches bytes knots
""")
_CURRENCIES = _words("dollars euros pounds francs yen rupees pesos")
_TITLES = ("Dr. ", "Captain ", "Professor ", "Judge ", "Sister ", "Uncle ", "Mrs. ", "Mr. ")
_GROUPS = _words("company hotel school museum theatre clinic library club farm factory institute band team college")
_UNIT_NOUNS = _words("unit box lot file item room case order sector channel platform locker crate device account")


class Draw:
    """Cheap choices; a function of the generator's state alone."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.random: Callable[[], float] = random.Random(int(rng.integers(1 << 62))).random

    def below(self, count: int) -> int:
        """A whole number of 0..count-1."""
        return int(self.random() * count)

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.random() * len(options))]

    def chance(self, probability: float) -> bool:
        return self.random() < probability


def digits(draw: Draw, count: int) -> str:
    """A number of so many digits, the first of which is not 0."""
    return str(1 + draw.below(9)) + "".join(str(draw.below(10)) for _ in range(count - 1))


def capitals(draw: Draw, count: int) -> str:
    """So many capital letters, such as QXTVB."""
    return "".join(draw.pick(_LETTERS) for _ in range(count))


def _number(draw: Draw, words: Sequence[str]) -> str:
    shape = draw.random()
    if shape < 0.55:
        return digits(draw, 5 + draw.below(5))
    if shape < 0.85:
        return digits(draw, 2 + draw.below(4))
    if shape < 0.93:
        return f"{digits(draw, 1 + draw.below(3))},{draw.below(1000):03d}"
    return f"{draw.below(1000)}.{1 + draw.below(99)}"


def _long(draw: Draw, words: Sequence[str]) -> str:
    return digits(draw, 9 + draw.below(10))


def _price(draw: Draw, words: Sequence[str]) -> str:
    amount = digits(draw, 1 + draw.below(5))
    shape = draw.below(3)
    if shape == 0:
        return f"{amount} {draw.pick(_CURRENCIES)}"
    return f"${amount}" if shape == 1 else f"{amount}.{draw.below(100):02d} {draw.pick(_CURRENCIES)}"


def _amount(draw: Draw, words: Sequence[str]) -> str:
    number = digits(draw, 1 + draw.below(4))
    return f"{number} {draw.pick(_UNITS)}" if draw.chance(0.8) else f"{number}.{1 + draw.below(9)} {draw.pick(_UNITS)}"


def _percent(draw: Draw, words: Sequence[str]) -> str:
    number = f"{1 + draw.below(99)}" if draw.chance(0.6) else f"{draw.below(100)}.{1 + draw.below(9)}"
    return f"{number} percent" if draw.chance(0.5) else f"{number}%"


def _date(draw: Draw, words: Sequence[str]) -> str:
    day, month, year = 1 + draw.below(28), draw.below(12), 1600 + draw.below(500)
    shape = draw.random()
    if shape < 0.4:
        return f"{day} {MONTHS[month]} {year}"
    if shape < 0.6:
        return f"{MONTHS[month]} {day}, {year}"
    if shape < 0.75:
        return f"{year}-{month + 1:02d}-{day:02d}"
    return f"{day} {MONTHS[month]}" if shape < 0.9 else f"{day:02d}/{month + 1:02d}/{year}"


def _time(draw: Draw, words: Sequence[str]) -> str:
    hour, minute, shape = draw.below(24), draw.below(60), draw.random()
    if shape < 0.6:
        return f"{hour:02d}:{minute:02d}"
    if shape < 0.8:
        return f"{1 + hour % 12}:{minute:02d} {'am' if hour < 12 else 'pm'}"
    return f"{hour}.{minute:02d}" if shape < 0.9 else f"{hour:02d}:{minute:02d}:{draw.below(60):02d}"


def _year(draw: Draw, words: Sequence[str]) -> str:
    return str(1000 + draw.below(1100))


def _made(draw: Draw, ends: Sequence[str]) -> str:
    middle = draw.pick(_MIDDLES) if draw.chance(0.6) else ""
    return (draw.pick(_STARTS) + middle + draw.pick(ends)).capitalize()


def coined_name(draw: Draw, words: Sequence[str]) -> str:
    """A name of an open vocabulary: two or three syllables, or two of the words as one, or apart."""
    kind = draw.random()
    if kind < 0.6:
        count = 2 + draw.below(2)
        made = (draw.pick(_ONSETS) + draw.pick(_VOWELS) + draw.pick(_CODAS) for _ in range(count))
        return "".join(made).capitalize()
    first, second = draw.pick(words), draw.pick(words)
    return f"{first}{second}".capitalize() if kind < 0.8 else f"{first.capitalize()} {second.capitalize()}"


def first_name(draw: Draw) -> str:
    return draw.pick(_FIRST) if draw.chance(0.4) else _made(draw, _NAME_ENDS)


def family_name(draw: Draw, words: Sequence[str]) -> str:
    kind = draw.random()
    if kind < 0.3:
        return draw.pick(_FAMILY)
    return draw.pick(words).capitalize() if kind < 0.6 else _made(draw, _FAMILY_ENDS)


def _name(draw: Draw, words: Sequence[str]) -> str:
    return f"{first_name(draw)} {family_name(draw, words)}"


def _place(draw: Draw, words: Sequence[str]) -> str:
    return draw.pick(_PLACES) if draw.chance(0.35) else _made(draw, _PLACE_ENDS)


def _word(draw: Draw, words: Sequence[str]) -> str:
    return draw.pick(words)


def _pair(draw: Draw, words: Sequence[str]) -> str:
    return f"{draw.pick(words)} {draw.pick(words)}" + (f" {draw.pick(words)}" if draw.chance(0.15) else "")


def _code(draw: Draw, words: Sequence[str]) -> str:
    if draw.chance(0.15):
        return f"{draw.pick(words)}{draw.below(1000)}"
    pattern = draw.pick(_PATTERNS)
    symbols = {"L": lambda: draw.pick(_LETTERS), "D": lambda: str(draw.below(10))}
    return "".join(symbols[one]() if one in symbols else one for one in pattern)


def _identifier(draw: Draw, words: Sequence[str]) -> str:
    lengths = (8, 4, 4, 4, 12) if draw.chance(0.5) else (8,) if draw.chance(0.5) else (4, 4)
    return "-".join("".join(draw.pick(_HEX) for _ in range(length)) for length in lengths)


def _phone(draw: Draw, words: Sequence[str]) -> str:
    separator = draw.pick((" ", "-"))
    return separator.join((digits(draw, 3), digits(draw, 3), digits(draw, 4)))


def _address(draw: Draw, words: Sequence[str]) -> str:
    return f"{draw.pick(words)}@{draw.pick(words)}.{draw.pick(('com', 'org', 'net'))}"


_VALUES = {
    "number": _number, "long": _long, "price": _price, "amount": _amount, "percent": _percent, "date": _date,
    "time": _time, "year": _year, "name": _name, "place": _place, "word": _word, "pair": _pair, "code": _code,
    "identifier": _identifier, "phone": _phone, "address": _address,
}  # fmt: skip
VALUE_KINDS = tuple(_VALUES)


def value_of(kind: str, draw: Draw, words: Sequence[str]) -> str:
    """A value of one of VALUE_KINDS; words and names come from `words`."""
    return _VALUES[kind](draw, words)


def subject_of(kind: str, draw: Draw, words: Sequence[str]) -> str:
    """Who or what a fact is about: a "person", a "thing", "any" of them, or "both", then divided by a tab."""
    choice = draw.random()
    if kind == "both":
        return f"{subject_of('thing', draw, words)}\t{_name(draw, words)}"
    if kind == "person" or (kind == "any" and choice < 0.2):
        return _name(draw, words) if draw.chance(0.85) else draw.pick(_TITLES) + family_name(draw, words)
    if choice < 0.75:
        return f"the {draw.pick(words)} {draw.pick(words)}"
    if choice < 0.85:
        return f"the {family_name(draw, words)} {draw.pick(_GROUPS)}"
    if choice < 0.93:
        return f"{draw.pick(_UNIT_NOUNS)} {digits(draw, 2 + draw.below(3)) if draw.chance(0.5) else _code(draw, words)}"
    if choice < 0.97:
        return capitals(draw, 3 + draw.below(4)) if draw.chance(0.7) else f"{draw.pick(words)}-{draw.pick(words)}"
    return f"the {draw.pick(words)}"
