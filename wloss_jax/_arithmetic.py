"""What a mean that is not divided yet says to operators, to NumPy and to JAX.

A sum and its weight, still apart, are no number: half of them is not half of the mean.
Nor are they an array. What is tried on them by habit says what to do instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np

from wloss_jax._checks import ArgumentTypeError, ArgumentValueError

_Class = TypeVar("_Class", bound=type)

_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow")
_OTHERS = (
    *("neg", "pos", "abs", "round", "trunc", "int", "bool"),
    *("lt", "le", "gt", "ge"),
)
_METHODS = ("item", "tolist", "mean", "sum", "block_until_ready", "backward")
_OPERATORS = (
    *(f"__{name}__" for name in _BINARY),
    *(f"__r{name}__" for name in _BINARY),
    *(f"__{name}__" for name in _OTHERS),
    "__array_ufunc__",  # NumPy's operators, and functions like `np.sqrt`
)


def without_arithmetic(instead: str) -> Callable[[_Class], _Class]:
    """Makes a class say what to do ``instead`` of arithmetic, where it has none.

    Its own operators stay; one that does not know the other operand calls `refuse`.

    Args:
      instead: what the errors end with, sentences.
    """

    def decorate(cls: _Class) -> _Class:
        def refuse_operator(self: Any, *_: Any, **__: Any) -> NoReturn:
            refuse(self)

        def refuse_array(self: Any) -> NoReturn:
            # In the place of a TypeError, `jax.grad` would put a message of its own; it
            # is what asks for a type and wants no array.
            asks_for_type = sys._getframe(1).f_code.co_name == "typeof"
            error = ArgumentValueError if asks_for_type else ArgumentTypeError
            raise error(
                f"`{cls.__name__}` is no array: `.compute()` gives its mean, an array. "
                f"{instead} For the gradient of a loss that returns one, use "
                "`wloss_jax.value_and_grad`."
            )

        def equals(self: Any, other: Any) -> Any:
            if isinstance(other, int | float | np.ndarray | np.generic | jax.Array):
                refuse(self)
            return NotImplemented  # with one of its kind: the same object, or another

        def refuse_method(self: Any, name: str) -> NoReturn:
            # Whatever is missing must be an AttributeError, as `hasattr` expects.
            message = f"{cls.__name__!r} object has no attribute {name!r}"
            if name in _METHODS:
                message += ": it is no array. `.compute()` gives its mean, which is one"
            raise AttributeError(f"{message}.")

        _INSTEAD[cls] = instead
        for name, method in (("__eq__", equals), ("__getattr__", refuse_method)):
            setattr(cls, name, method)
        for name in _OPERATORS:
            if name not in vars(cls):
                setattr(cls, name, refuse_operator)
        # No methods: JAX looks whether there is one, and complains in its own words.
        for name in ("__jax_array__", "__array__"):
            setattr(cls, name, property(refuse_array))
        return cls

    return decorate


class NotForJson:
    """A base class that says what to write instead of it where `json` is at a loss."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # `json` looks at the class of what it cannot write, to say so in its error.
        if sys._getframe(1).f_globals.get("__name__") == "json.encoder":
            raise ArgumentTypeError(
                f"`{type(self).__name__}` is no number that JSON can hold: `float(m)` "
                "is its mean, a Python number."
            )
        return type(self)


_INSTEAD: dict[type, str] = {}


def refuse(value: object) -> NoReturn:
    """Says what to do instead of the arithmetic that ``value`` lacks."""
    cls = type(value)
    raise ArgumentTypeError(
        f"`{cls.__name__}` is a total and a weight, not divided yet: `.compute()` "
        f"gives its mean, an array. {_INSTEAD[cls]}"
    )
