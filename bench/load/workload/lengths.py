"""How long a prompt, an answer or a pause is: a number, or a distribution written in one word.

``512``, ``uniform/100/2000``, ``lognormal/MEDIAN/SIGMA``, ``exponential/MEAN``, ``choice/10/900``.
"""

from collections.abc import Callable
from random import Random

from protocol.errors import ConfigError

Sampler = Callable[[Random], float]

_FORMS = "512, uniform/LOW/HIGH, lognormal/MEDIAN/SIGMA, exponential/MEAN or choice/A/B/..."
_NUM_TERMS = {"uniform": 2, "lognormal": 2, "exponential": 1}


def sampler(spec: str) -> Sampler:
    """What draws from ``spec``.

    Raises:
        ConfigError: it is none of the forms above, or says something impossible.
    """
    name, *rest = spec.split("/") if not _is_number(spec) else ("choice", spec)
    if not rest or not all(map(_is_number, rest)):
        raise ConfigError(f"{spec!r} is not a length: {_FORMS}")
    terms = [float(term) for term in rest]
    if name not in ("choice", *_NUM_TERMS) or len(terms) != _NUM_TERMS.get(name, len(terms)):
        raise ConfigError(f"{spec!r} is not a length: {_FORMS}")
    if min(terms) < 0 or (name == "uniform" and terms[0] > terms[1]):
        raise ConfigError(f"{spec!r}: its terms must be positive and in order")
    match name:
        case "uniform":
            return lambda random: terms[0] + (terms[1] - terms[0]) * random.random()
        case "lognormal":
            return lambda random: terms[0] * random.lognormvariate(0.0, terms[1])
        case "exponential":
            return lambda random: random.expovariate(1 / terms[0]) if terms[0] else 0.0
        case _:
            return lambda random: terms[int(random.random() * len(terms))]


def count_of(spec: str) -> Callable[[Random], int]:
    """The same for whole numbers of at least one, rounded."""
    draw = sampler(spec)
    return lambda random: max(1, round(draw(random)))


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isascii() and text.replace(".", "", 1).isdigit()
