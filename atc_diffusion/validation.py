"""Checks of what a user passes: one sentence that names the value and what to write instead."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import TypeGuard

LEVELS = (1, 2, 4, 8)  # the downsampling factors that tomesd's `max_downsample` counts up to


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a real number, of Python or NumPy."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_count(value: object) -> TypeGuard[int]:
    """Whether this is a whole number from 1 up."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def as_counts(value: object) -> tuple[int, ...] | None:
    """One count or several as a tuple; None for anything else."""
    counts = tuple(value) if isinstance(value, tuple | list) else (value,)
    return counts if counts and all(map(is_count, counts)) else None


def check_count(name: str, value: object, meaning: str) -> None:
    if not is_count(value):
        raise ValueError(f"{name} must be {meaning}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_not_negative(name: str, value: object) -> None:
    if not is_number(value) or not value >= 0:
        raise ValueError(f"{name} must be a number from 0 up, got {value!r}")


def check_fraction(name: str, value: object) -> float:
    """`value`, if that fraction of the tokens can be kept."""
    if is_number(value) and 0 < value <= 1:
        return value
    raise ValueError(f"{name} is the fraction of tokens kept, in (0, 1], got {value!r}{did_you_mean(value)}")


def check_takes_one(name: str, function: Callable[..., object], argument: str) -> None:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise ValueError(f"{name} is called with {argument}; {function!r} must take just that") from None
    except ValueError:  # a function in C may not tell what it takes
        pass


def did_you_mean(value: object, option: str = "") -> str:
    """The end of a sentence: the fraction that a number, perhaps a percentage, stands for; empty for other values."""
    if not is_number(value) or not (0 < value <= 1 or 2 <= value <= 100):  # 1.5 is rather a mistake than 0.015
        return ""
    return f"; did you mean {option}{value if value <= 1 else value / 100:g}?"


def check_options(kind: str, known: Iterable[str], given: dict[str, object]) -> None:
    """Raise ValueError for a `given` option that a `kind` of configuration does not have."""
    known = tuple(known)
    for name in given:
        if name not in known:
            raise ValueError(f"{kind} has no option {name!r}; {_instead(name, given[name], known)}")


def _instead(name: str, value: object, known: tuple[str, ...]) -> str:
    """What to write instead of an option of tomesd, of an earlier version of this package, or with a typo."""
    present_name, sentence = _translated(name, value)
    if present_name in known:
        return sentence
    if close := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {close[0]!r}?"
    return f"it has {', '.join(known)}"


def _translated(name: str, value: object) -> tuple[str, str]:
    """The option that does now what `name` did, and a sentence about it; empty for other names."""
    match name:
        case "ratio":
            removed = value if is_number(value) and 0 <= value < 1 else 0.4
            example = f"ratio={removed:g} is r={1 - removed:g}"
            return "r", f"tomesd's ratio is the fraction of tokens removed, r the fraction kept: {example}"
        case "max_downsample":
            levels = tuple(level for level in LEVELS if is_count(value) and level <= value)
            return "levels", f"{name}={value!r} is levels={levels or ('costly' if value == 'auto' else 'finest')!r}"
        case "sx" | "sy" | "use_rand":
            return "r", f"{name} is an option of tomesd; use ToMeConfig with stride and seed"
        case "merge_attn" | "merge_crossattn" | "merge_mlp" | "modules":
            return "features", "only self-attention is merged"
        case "merge":
            return "r_keys", "merge='keys_values' is r=1 with r_keys, the fraction of keys and values kept"
        case "refresh_every":
            now = "tokens are clustered again once the latents have changed by recluster_threshold"
            return "recluster_threshold", f"{now}; 0 is refresh_every=1"
        case "window":
            return "window_size", f"window={value!r} is window_size={value!r}"
        case "share_layers":
            return "r", "every layer has clusters of its own"
    return "", ""
