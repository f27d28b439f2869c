"""What follows a number: "cm", "square meters", "km/h", "$", "apples".

    unit("m/s^2", spaced=False) -> (("m", 1), ("s", -2))

A unit is a product of powers, written as pairs (symbol, power) in the order of the symbols. Units
are compared as they stand, none is converted into another.
"""

from __future__ import annotations

import re

# ------------------------------------------------------------------------------------------- tables

PREFIXES = {
    "": "",
    "kilo": "k",
    "centi": "c",
    "milli": "m",
    "micro": "μ",
    "nano": "n",
    "deci": "d",
    "mega": "M",
    "giga": "G",
}
# Symbol: names. These take prefixes and a plural s.
METRIC = {
    "m": "meter metre",
    "g": "gram",
    "L": "liter litre",
    "s": "second",
    "W": "watt",
    "V": "volt",
    "N": "newton",
    "J": "joule",
    "Pa": "pascal",
    "Hz": "hertz",
    "A": "ampere amp",
    "Ω": "ohm",
    "cal": "calorie",
    "mol": "mole",
}
# Symbol: other names. These are complete.
OTHERS = {
    # lengths
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    # weights and volumes
    "lb": "lbs pound pounds",
    "oz": "ounce ounces",
    "L": "l",
    "mL": "ml",
    # times
    "s": "sec secs",
    "min": "minute minutes",
    "h": "hr hrs hour hours",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years yr yrs",
    "am": "",
    "pm": "",
    # angles and temperatures
    "deg": "degree degrees",
    "degC": "",
    "degF": "",
    "rad": "radian radians",
    # money
    "USD": "dollar dollars",
    "€": "euro euros EUR",
    "£": "GBP",
    "¥": "yen yuan",
    "₹": "rupee rupees",
    "cent": "cents",
    # pure numbers
    "%": "percent pct percentage",
    "unit": "units",
}
# In Chinese; those of the last line are counting words, which stand for what is counted.
CHINESE = {
    "m": "米",
    "cm": "厘米",
    "mm": "毫米",
    "km": "千米 公里",
    "g": "克",
    "kg": "千克 公斤",
    "L": "升",
    "mL": "毫升",
    "s": "秒",
    "min": "分钟",
    "h": "小时",
    "day": "天",
    "year": "年",
    "deg": "度",
    "¥": "元 人民币",
    "unit": "个 只 人 本 张 条 件 岁 名 次 种 块 棵 辆 支 页",
}


def _all_names() -> dict[str, str]:
    """Every way to write a unit, and its symbol: "kilometers" and "km" are "km"."""
    symbols = {}
    for prefix, short in PREFIXES.items():
        for symbol, names in METRIC.items():
            for name in names.split():
                symbols[prefix + name] = short + symbol
                symbols[prefix + name + "s"] = short + symbol
    symbols |= {symbol: symbol for symbol in symbols.values()}
    for table in (OTHERS, CHINESE):
        for symbol, names in table.items():
            for name in [symbol, *names.split()]:
                symbols[name] = symbol
    return symbols


UNITS = _all_names()

# Said in other words before the units are read.
SPELLED_OUT = {
    "per cent": "percent",
    "sq.": "sq ",
    "mph": "mi per h",
    "kph": "km per h",
    " long": "",
    " wide": "",
    " tall": "",
    " high": "",
    " deep": "",
    " old": "",
    "平方": "square ",
    "立方": "cubic ",
    "每": " per ",
}
POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3}

# Words that change the number before them, so that "5 million" is not "5 of something", and words
# that begin another clause.
WORDS_OF_NUMBERS = """
    and not more less than least most plus minus over under about but between from
    negative squared cubed factorial point
    half halve quarter third fourth fifth sixth seventh eighth ninth tenth
    hundredth thousandth millionth
    zero one two three four five six seven eight nine ten dozen
    hundred thousand lakh million crore billion trillion
    then if when where while because since for with without as is are was so but that this which
    therefore thus hence wrong false incorrect maybe
"""
NO_NOUNS = set(WORDS_OF_NUMBERS.split())


# ------------------------------------------------------------------------------------------ reading

TOKEN = re.compile(
    r"""
    (?P<word> [A-Za-zμΩ%€£¥₹\u4e00-\u9fff]+ )
  | \^ \s* \{? \s* (?P<exponent> -?[0-9]{1,2} ) \s* \}?     # ^2   ^{-1}
  | (?P<slash> / )
  | [*\s()]                                                 # says nothing
  | (?P<other> . )                                          # belongs to no unit
    """,
    re.VERBOSE | re.DOTALL,
)


def unit(text: str, spaced: bool) -> tuple | None:
    """The unit that a text names, or None. `spaced`: a space stands before it, so it may be a noun.

    >>> unit("km/h", spaced=False) == unit("kilometers per hour", spaced=True)
    True
    >>> unit("square cm", spaced=True)
    (('cm', 2),)
    >>> unit("apples", spaced=True), unit("apples", spaced=False)
    ((('apple', 1),), None)
    """
    powers: dict[str, int] = {}
    sign = 1  # -1 from the first slash or "per" on
    power = 1  # of the next word
    symbol = ""  # of the last word
    text = _spelled_out(text)
    for token in TOKEN.finditer(text):
        word = token["word"]
        exponent = token["exponent"]
        if token["other"] or (exponent and not symbol):
            return None
        if token["slash"] or word == "per":
            sign = -1
        elif exponent:  # the word itself has counted once already
            powers[symbol] += sign * (int(exponent) - 1)
        elif word in POWER_WORDS:
            power = POWER_WORDS[word]
        elif word:
            symbol = _symbol(word)
            if not symbol:
                return _noun(text) if spaced else None
            powers[symbol] = powers.get(symbol, 0) + sign * power
            power = 1
    return tuple(sorted(powers.items())) or None


def _spelled_out(text: str) -> str:
    for short, long in SPELLED_OUT.items():
        boundary = r"\b" if short.isascii() else ""
        text = re.sub(rf"{boundary}{re.escape(short)}(?![A-Za-z])", long, text)
    return text


def _symbol(word: str) -> str:
    """The symbol of a word, "" if it is no unit. Capitals count where there is a choice: mW, MW.

    >>> _symbol("MW"), _symbol("KM"), _symbol("Meters"), _symbol("apples")
    ('MW', 'km', 'm', '')
    """
    if word in UNITS:
        return UNITS[word]
    return UNITS.get(word.lower(), "") if len(word) > 1 else ""


def _noun(text: str) -> tuple | None:
    """Up to three words that are counted, without their plural s: "red apples" as one symbol."""
    words = text.lower().split()
    if len(words) > 3:
        return None
    for word in words:
        if not re.fullmatch("[a-z-]{3,}", word) or {word, word.removesuffix("s")} & NO_NOUNS:
            return None
    return ((" ".join(word.removesuffix("s") for word in words), 1),)
