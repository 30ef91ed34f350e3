"""Units of measurement: their names, what they measure, and how large they are."""

import re
from fractions import Fraction

from .numbers import PI, Number, integer

Dimensions = dict[str, int]
"""What a unit measures, as powers of base quantities: `{"length": 2}` is an area."""

_LENGTH, _MASS, _TIME = {"length": 1}, {"mass": 1}, {"time": 1}
_AREA, _VOLUME, _ANGLE = {"length": 2}, {"length": 3}, {"angle": 1}
_FORCE = {"mass": 1, "length": 1, "time": -2}
_ENERGY = {"mass": 1, "length": 2, "time": -2}
_POWER = {"mass": 1, "length": 2, "time": -3}
_PRESSURE = {"mass": 1, "length": -1, "time": -2}
PERCENT: Dimensions = {"percent": 1}

_TABLE: list[tuple[str, Dimensions, str | Number]] = [
    ("m meter meters metre metres 米", _LENGTH, "1"),
    ("km kilometer kilometers kilometre kilometres 千米 公里", _LENGTH, "1000"),
    ("dm decimeter decimeters decimetre decimetres 分米", _LENGTH, "1/10"),
    ("cm centimeter centimeters centimetre centimetres 厘米", _LENGTH, "1/100"),
    ("mm millimeter millimeters millimetre millimetres 毫米", _LENGTH, "1/1000"),
    ("μm micrometer micrometers micron microns 微米", _LENGTH, "1/1000000"),
    ("nm nanometer nanometers 纳米", _LENGTH, "1/1000000000"),
    ("in inch inches 英寸", _LENGTH, "254/10000"),
    ("ft foot feet 英尺", _LENGTH, "3048/10000"),
    ("yd yard yards", _LENGTH, "9144/10000"),
    ("mi mile miles 英里", _LENGTH, "1609344/1000"),
    ("nmi 海里", _LENGTH, "1852"),
    ("ha hectare hectares 公顷", _AREA, "10000"),
    ("acre acres", _AREA, "40468564224/10000000"),
    ("L l liter liters litre litres 升", _VOLUME, "1/1000"),
    ("mL ml milliliter milliliters millilitre millilitres cc 毫升", _VOLUME, "1/1000000"),
    ("g gram grams 克", _MASS, "1/1000"),
    ("kg kilogram kilograms 千克 公斤", _MASS, "1"),
    ("mg milligram milligrams 毫克", _MASS, "1/1000000"),
    ("tonne tonnes ton tons 吨", _MASS, "1000"),
    ("lb lbs pound pounds 磅", _MASS, "45359237/100000000"),
    ("oz ounce ounces", _MASS, "28349523125/1000000000000"),
    ("s sec secs second seconds 秒 秒钟", _TIME, "1"),
    ("ms millisecond milliseconds 毫秒", _TIME, "1/1000"),
    ("min mins minute minutes 分钟", _TIME, "60"),
    ("h hr hrs hour hours 小时", _TIME, "3600"),
    ("day days 天", _TIME, "86400"),
    ("week weeks 周 星期", _TIME, "604800"),
    ("month months 个月", {"month": 1}, "1"),
    ("year years 年", {"month": 1}, "12"),
    ("° deg degree degrees 度", _ANGLE, "1"),
    ("arcmin arcminute arcminutes 分", _ANGLE, "1/60"),
    ("rad radian radians 弧度", _ANGLE, integer(180) / PI),
    ("°C celsius 摄氏度", {"celsius": 1}, "1"),
    ("°F fahrenheit 华氏度", {"fahrenheit": 1}, "1"),
    ("K kelvin", {"kelvin": 1}, "1"),
    ("% percent pct 百分比", PERCENT, "1/100"),
    ("N newton newtons 牛 牛顿", _FORCE, "1"),
    ("kN", _FORCE, "1000"),
    ("J joule joules 焦 焦耳", _ENERGY, "1"),
    ("kJ", _ENERGY, "1000"),
    ("kWh", _ENERGY, "3600000"),
    ("W watt watts 瓦 瓦特", _POWER, "1"),
    ("kW kilowatt kilowatts 千瓦", _POWER, "1000"),
    ("Pa pascal pascals 帕", _PRESSURE, "1"),
    ("kPa", _PRESSURE, "1000"),
    ("V volt volts 伏 伏特", {"volt": 1}, "1"),
    ("kV", {"volt": 1}, "1000"),
    ("mV", {"volt": 1}, "1/1000"),
    ("A amp amps ampere amperes 安 安培", {"ampere": 1}, "1"),
    ("mA", {"ampere": 1}, "1/1000"),
    ("Ω ohm ohms 欧 欧姆", {"ohm": 1}, "1"),
    ("kΩ", {"ohm": 1}, "1000"),
    ("Hz hertz 赫兹", {"time": -1}, "1"),
    ("kHz", {"time": -1}, "1000"),
    ("MHz", {"time": -1}, "1000000"),
    ("mol moles mole 摩尔", {"mole": 1}, "1"),
    ("kph kmh", {"length": 1, "time": -1}, "1000/3600"),
    ("mph", {"length": 1, "time": -1}, "1609344/3600000"),
    ("unit units 单位", {"unit": 1}, "1"),
    ("₹ rupee rupees INR", {"rupee": 1}, "1"),
    ("dollar dollars USD 美元", {"dollar": 1}, "1"),
    ("cent cents", {"dollar": 1}, "1/100"),
    ("euro euros EUR €", {"euro": 1}, "1"),
    ("£ GBP", {"pound": 1}, "1"),
    ("¥ yuan RMB CNY 元 块", {"yuan": 1}, "1"),
]


def _all_units() -> dict[str, tuple[Dimensions, Number]]:
    units = {}
    for names, dimensions, size in _TABLE:
        number = size if isinstance(size, Number) else Number(Fraction(size))
        for name in names.split():
            units[name] = dimensions, number
            if not name.isascii() and dimensions == _LENGTH:
                units["平方" + name] = {"length": 2}, number * number
                units["立方" + name] = {"length": 3}, number * number * number
    return units


UNITS = _all_units()
"""What each unit measures, and its size in the base unit, by its name."""
_SHOUTED = {name: name.lower() for name in ("CM", "MM", "KM", "KG", "Cm", "Km", "Kg", "ML", "Ml")}
_POWER_BEFORE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWER_AFTER = {"squared": 2, "cubed": 3}


def unit_name(word: str) -> str | None:
    """Return the name by which UNITS knows the word, or None if it is no unit.

    Symbols keep their case, since mW is not MW; words may have capitals.
    """
    if word in UNITS:
        return word
    folded = _SHOUTED.get(word) or word.casefold()
    return folded if folded in UNITS and (len(word) > 3 or word in _SHOUTED) else None


def read_units(tokens: list[str]) -> tuple[Dimensions, Number] | None:
    """Read tokens such as `km / h` or `square meters` as one unit.

    Returns what it measures and its size, or None unless all of the tokens were understood.
    """
    dimensions: Dimensions = {}
    names: set[str] = set()
    size, place, sign = integer(1), 0, 1
    while place < len(tokens):
        power = _POWER_BEFORE.get(tokens[place].casefold(), 1)
        place += power > 1
        if power > 1 and tokens[place : place + 1] == ["."]:
            place += 1
        name = unit_name(tokens[place]) if place < len(tokens) else None
        if name is None or name in names:
            return None
        names.add(name)
        place += 1
        after, place = _power(tokens, place)
        if after is None:
            return None
        power *= after * sign
        for base, exponent in UNITS[name][0].items():
            dimensions[base] = dimensions.get(base, 0) + exponent * power
        size = size * UNITS[name][1] ** integer(power)
        if place == len(tokens):
            return {base: power for base, power in dimensions.items() if power}, size
        joint = tokens[place]
        sign = -1 if joint in ("/", "per", "每") else 1
        place += joint in ("/", "per", "每", "*")
    return None


_EXPONENT = re.compile(r"-?[1-9]|\{-?[1-9]\}|\(-?[1-9]\)")


def _power(tokens: list[str], place: int) -> tuple[int | None, int]:
    """Read the exponent that follows a unit: `^2`, `^{-1}`, `squared`, or none, which is 1.

    Returns the exponent, None if it is not a small whole number, and the place behind it.
    """
    if place < len(tokens) and tokens[place].casefold() in _POWER_AFTER:
        return _POWER_AFTER[tokens[place].casefold()], place + 1
    if tokens[place : place + 1] != ["^"]:
        return 1, place
    for end in range(place + 2, place + 6):
        text = "".join(tokens[place + 1 : end])
        if _EXPONENT.fullmatch(text):
            return int(text.strip("{}()")), end
    return None, place
