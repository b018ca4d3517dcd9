"""What an argument must be, and the errors that name it.

Each check takes the argument's name first, as its message does: `check_value("delta",
delta > 0, "must be above 0")` raises "`delta` must be above 0". What is raised is an
AssertionError, as chex raises, and a ValueError or a TypeError too, as Python's own
functions raise. A message says what came, what was expected, and how to mend it.

chex checks shapes, ranks and dtypes. `chex.disable_asserts()`, which any library may
call, turns its public assertions off; a wrong call would become a number. So what is
called here is the function inside of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, TypeGuard, cast

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# A number, which is checked and compiled in, or a traced scalar.
Option = float | jax.Array


class _ArgumentError(AssertionError):
    """An error whose message stays the last line of its traceback."""

    def add_note(self, note: str) -> None:
        """Adds a note, but for JAX's on the frames that it leaves out.

        It would come below the message, and the last line is what people read.
        """
        if "JAX has removed its internal frames" not in note:
            super().add_note(note)


class ArgumentValueError(_ArgumentError, ValueError):
    """An argument of the right type whose value, shape or rank does not fit."""


class ArgumentTypeError(_ArgumentError, TypeError):
    """An argument of the wrong type or dtype."""


class ArgumentNameError(_ArgumentError, NameError):
    """The name of an axis that is not mapped."""


# What to say after the name. A function where it takes time to say, or may: what a user
# hands in may be a hundred thousand arrays, which takes minutes to write out.
Rest = str | Callable[[], str]


# ------------------------------------------------------------- conditions and shapes


def check_value(name: str, condition: bool, rest: Rest) -> None:
    """Raises "`name` rest" unless ``condition`` holds."""
    if not condition:
        raise ArgumentValueError(_message(name, rest))


def check_type(name: str, condition: bool, rest: Rest) -> None:
    """Raises "`name` rest", a TypeError, unless ``condition`` holds."""
    if not condition:
        raise ArgumentTypeError(_message(name, rest))


def check_shape(name: str, array: Any, shape: tuple[Any, ...], rest: Rest) -> None:
    """Raises "`name` rest" unless ``array`` has the ``shape``."""
    if not _passes(chex.assert_shape, array, shape):
        raise ArgumentValueError(_message(name, rest))


def check_rank(name: str, array: Any, ranks: Collection[int], rest: Rest) -> None:
    """Raises "`name` rest" unless the rank of ``array`` is one of ``ranks``."""
    if not _passes(chex.assert_rank, array, set(ranks)):
        raise ArgumentValueError(_message(name, rest))


def check_dtype(name: str, array: Any, kind: type, rest: Rest) -> None:
    """Raises "`name` rest" unless ``array`` is of a ``kind``: bool, int or float."""
    if not _passes(chex.assert_type, array, kind):
        raise ArgumentTypeError(_message(name, rest))


def _message(name: str, rest: Rest) -> str:
    return f"`{name}` {rest if isinstance(rest, str) else rest()}"


def _passes(chex_assertion: Callable[..., None], *args: Any) -> bool:
    assertion = getattr(chex_assertion, "__wrapped__", chex_assertion)
    try:
        assertion(*args)
    except AssertionError:
        return False
    return True


# -------------------------------------------------------------------------- arrays

_MENDS = {
    bool: "It says which elements count: pass `{0}.astype(bool)` for a 0/1 mask, and "
    "how much an element counts as `weights`.",
    int: "Pass `{0}.astype(jnp.int32)` if its values are whole numbers.",
    float: "Pass `{0}.astype(jnp.float32)` if its values are quantities; which "
    "elements count is said by `where`.",
}


def check_array(name: str, value: object, kind: type | None = None) -> jax.Array:
    """Checks that ``value`` is an array or number of a ``kind``, and makes it an array.

    The kind is bool, int, float, or None for any. Nothing is guessed at: a list, a
    string or None is an error. Nothing is cast, but that integers asked for come as 32
    bits at least.
    """
    check_numeric(name, value)
    array = jnp.asarray(cast(ArrayLike, value))
    if kind is not None:
        check_dtype(
            name, array, kind, f"is {describe(array)}. {_MENDS[kind].format(name)}"
        )
    return widen(array) if kind is int else array


def check_numeric(name: str, value: object) -> None:
    """Checks that ``value`` is an array or a number, and a real one."""
    if not _is_numeric(value):
        raise ArgumentTypeError(f"`{name}` {_not_numeric(value)}")


def check_scalar(name: str, value: object, kind: type | None = None) -> jax.Array:
    """Checks one number, which may be traced."""
    scalar = check_array(name, value, kind)
    check_shape(name, scalar, (), f"has shape {scalar.shape}: one number is expected.")
    return scalar


def check_parameters(name: str, tree: Any) -> Any:
    """Checks a tree of floating arrays, each named by its path."""

    def check(path: Any, leaf: Any) -> jax.Array:
        full_name = f"{name}{jax.tree_util.keystr(path)}"
        check_type(
            full_name,
            not jnp.iscomplexobj(leaf),
            "is complex, and parameters here are real: pass its real and imaginary "
            "parts as two arrays, and put them together in `loss_fn`.",
        )
        array = check_array(full_name, leaf)
        check_dtype(
            full_name,
            array,
            float,
            f"is {describe(array)}, and only floating arrays have a gradient: keep it "
            "out of what is differentiated, as an argument of its own.",
        )
        return array

    return jax.tree_util.tree_map_with_path(check, tree)


def _is_numeric(value: object) -> bool:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return any(jnp.issubdtype(value.dtype, kind) for kind in _REAL)
    return isinstance(value, bool | int | float)


_REAL = (jnp.bool_, jnp.integer, jnp.floating)


def _not_numeric(value: object) -> str:
    """Says what came instead of an array of real numbers, and how to mend it."""
    kind = type(value).__name__
    dtype = getattr(value, "dtype", None)
    if isinstance(value, complex) or (
        dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating)
    ):
        came = "complex" if dtype is None else str(dtype)
        return (
            f"is complex ({came}), and a loss here is of real numbers: take "
            "`jnp.abs` of it, or pass its real and imaginary parts as two arrays."
        )
    if type(value).__module__.startswith("wloss_jax"):
        return (
            f"is a `{kind}`, where an array of numbers is due: its mean is "
            "`.compute()`, its sum `.total`, and what that is divided by `.weight`."
        )
    if isinstance(value, list | tuple):
        return (
            f"must be an array of numbers; got a {kind}. Pass `jnp.asarray(...)` of "
            "it, or pad ragged samples with `wloss_jax.pad_ragged` first."
        )
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return f"must be an array of numbers; got one of dtype {dtype}."
    came = repr(value)
    if len(came) > _LONG or "\n" in came:  # what is long would be the last line alone
        return f"must be an array of numbers; got a `{kind}`."
    return f"must be an array of numbers; got {kind}: {came}."


_LONG = 80


def widen(integers: jax.Array) -> jax.Array:
    """Widens to 32 bits: compared with an int8, 300 is 44."""
    narrow = integers.dtype.itemsize < 4
    return integers.astype(jnp.int32) if narrow else integers


def describe(array: jax.Array) -> str:
    """Says what came: ``float32[4, 1]``."""
    return f"{array.dtype}{list(array.shape)}"


# ------------------------------------------------------------------------- options


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer of Python's or NumPy's, and no switch."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_count(value: object, at_least: int = 0) -> bool:
    """Whether ``value`` is an integer that something can be counted by."""
    return is_integer(value) and at_least <= cast(int, value) < 2**31


def check_count(name: str, value: object, at_least: int = 0) -> int:
    """Checks a size: an integer, for shapes are static.

    It comes back as one of Python's: to an int8 of NumPy's, 127 and 1 are -128.
    """
    check_value(
        name,
        is_count(value, at_least),
        f"must be a Python integer of at least {at_least}, below 2**31; got {value!r}.",
    )
    return int(cast(int, value))


def check_known(name: str, shape: tuple[Any, ...], rest: str) -> None:
    """Checks that no size is open, a symbol of `jax.export`, where it must be known."""
    check_value(
        name,
        not any(map(is_symbolic, shape)),
        lambda: f"has size {' x '.join(map(str, shape))}, which is open: {rest}",
    )


def check_size(name: str, value: object) -> Any:
    """Checks the size of an axis: an integer, or the symbol that `jax.export` has."""
    return value if is_symbolic(value) else check_count(name, value)


def is_symbolic(size: object) -> bool:
    """Whether a size is a symbol, of `jax.export.symbolic_shape`, and no number."""
    return not is_integer(size) and jax.export.is_symbolic_dim(cast(Any, size))


def check_function(name: str, value: object) -> None:
    """Checks what is to be called."""
    check_type(
        name, callable(value), lambda: f"must be a function (callable); got {value!r}."
    )


def check_number(
    name: str,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    strictly: bool = False,
) -> None:
    """Checks an option: a Python number from ``low`` to ``high``, or a traced scalar.

    Args:
      name: of the option.
      value: a traced scalar passes unseen; infinity and NaN are no numbers here.
      low: the smallest value.
      high: the largest.
      strictly: whether ``low`` and ``high`` themselves are out.
    """
    if is_traced(value):
        check_scalar(name, value)
        return
    number = float(cast(float, value)) if is_number(value) else math.nan
    fits = low < number < high if strictly else low <= number <= high
    check_value(
        name,
        fits and math.isfinite(number),
        lambda: f"must be a finite number{_range(low, high, strictly)}; got {value!r}.",
    )


def is_number(value: object) -> bool:
    """Whether ``value`` is a number of Python's or NumPy's, and no switch."""
    return is_integer(value) or isinstance(value, float | np.floating)


def is_traced(option: object) -> TypeGuard[jax.Array]:
    """Whether an option comes as an array: one whose value no check looks at."""
    return isinstance(option, jax.Array | np.ndarray)


def is_zero(option: object) -> bool:
    """Whether an option is known to be 0: what it scales need not be computed."""
    return not is_traced(option) and option == 0


def _range(low: float, high: float, strictly: bool) -> str:
    if math.isfinite(low) and math.isfinite(high):
        ends = f"{low:g} and {high:g}" if strictly else f"{low:g} to {high:g}"
        return f" {'between' if strictly else 'from'} {ends}"
    if math.isfinite(low):
        return f" above {low:g}" if strictly else f" of at least {low:g}"
    if math.isfinite(high):
        return f" below {high:g}" if strictly else f" of at most {high:g}"
    return ""


def check_flag(name: str, value: object) -> None:
    """Checks a switch: True or False."""
    check_type(
        name,
        isinstance(value, bool | np.bool_),
        f"must be True or False; got {value!r}.",
    )


def check_label(name: str, value: object) -> int:
    """Checks a label that stands for something: a Python integer."""
    check_type(name, is_integer(value), f"must be a Python integer; got {value!r}.")
    return int(cast(int, value))


def check_axis(name: str, value: object, ndim: int) -> None:
    """Checks an axis of an array of ``ndim`` axes, a tuple of them, or None."""
    axes = value if isinstance(value, tuple) else (value,)
    check_type(
        name,
        value is None or all(map(is_integer, axes)),
        f"must be an integer or a tuple of them; got {value!r}.",
    )
    if value is None:
        return
    places = [cast(int, axis) % max(ndim, 1) for axis in axes]
    check_value(
        name,
        all(-ndim <= cast(int, axis) < ndim for axis in axes)
        and len(set(places)) == len(places),
        f"is {value!r}, and there are {ndim} axes: each must be one of them, and none "
        "may come twice.",
    )
