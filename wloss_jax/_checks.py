"""What an argument must be, and the errors that name it.

Each check takes the argument's name first, and its message says what came, what was
expected, and how to mend it. chex checks shapes, ranks and dtypes.
"""

from __future__ import annotations

import math
import sys
from typing import (
    Any,
    cast,
)

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

_MENDS = {
    bool: "It says which elements count: pass `{0}.astype(bool)` for a 0/1 mask, and "
    "how much an element counts as `weights`.",
    int: "Pass `{0}.astype(jnp.int32)` if its values are whole numbers.",
    float: "Pass `{0}.astype(jnp.float32)` if its values are quantities; which "
    "elements count is said by `where`.",
}


def check_array(name: str, value: object, kind: type | None = None) -> jax.Array:
    """Takes arrays and numbers of a ``kind``: bool, int, float, or None for any.

    Nothing is guessed at: a list, a string or None is an error. Nothing is cast, but
    that integers asked for come as 32 bits at least.
    """
    chex.assert_equal(
        _is_numeric(value),
        True,
        custom_message=f"`{name}` must be an array of numbers; got "
        f"{type(value).__name__}. Pass `jnp.asarray(...)` of it, or pad ragged samples "
        "with `wloss_jax.pad_ragged` first.",
    )
    array = jnp.asarray(cast(ArrayLike, value))
    if kind is not None:
        mend = f"`{name}` is {describe(array)}. {_MENDS[kind].format(name)}"
        chex.assert_type(array, kind, custom_message=mend)
    return widen(array) if kind is int else array


def check_scalar(name: str, value: object, kind: type | None = None) -> jax.Array:
    """Takes one number, which may be traced."""
    scalar = check_array(name, value, kind)
    chex.assert_shape(
        scalar,
        (),
        custom_message=f"`{name}` has shape {scalar.shape}: one number is expected.",
    )
    return scalar


def check_parameters(name: str, tree: Any) -> Any:
    """Takes a tree of floating arrays, each named by its path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: check_array(
            f"{name}{jax.tree_util.keystr(path)}", leaf, float
        ),
        tree,
    )


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer of Python's or NumPy's, and no switch."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_count(value: object, at_least: int = 0) -> bool:
    """Whether ``value`` is an integer that something can be counted by."""
    return is_integer(value) and at_least <= cast(int, value) < 2**31


def check_count(name: str, value: object, at_least: int = 0) -> None:
    """Takes a size: a Python integer, for shapes are static."""
    chex.assert_equal(
        is_count(value, at_least),
        True,
        custom_message=f"`{name}` must be a Python integer of at least {at_least}, "
        f"below 2**31; got {value!r}.",
    )


def check_function(name: str, value: object) -> None:
    """Takes what can be called."""
    chex.assert_equal(
        callable(value),
        True,
        custom_message=f"`{name}` must be a function (callable); got {value!r}.",
    )


def check_number(
    name: str,
    value: object,
    low: float = -sys.float_info.max,
    high: float = sys.float_info.max,
    *,
    nan: bool = False,
) -> None:
    """Takes an option: a Python number from ``low`` to ``high``."""
    is_number = isinstance(value, int | float | np.integer | np.floating)
    is_number &= not isinstance(value, bool)
    number = float(cast(float, value)) if is_number else math.nan
    chex.assert_equal(
        low <= number <= high or (is_number and nan and math.isnan(number)),
        True,
        custom_message=f"`{name}` must be a Python number from {low:.4g} to "
        f"{high:.4g}; got {value!r}.",
    )


def check_flag(name: str, value: object) -> None:
    """Takes a switch: True or False."""
    chex.assert_equal(
        isinstance(value, bool | np.bool_),
        True,
        custom_message=f"`{name}` must be True or False; got {value!r}.",
    )


def check_label(name: str, value: object) -> None:
    """Takes a label that stands for something: a Python integer."""
    chex.assert_equal(
        is_integer(value),
        True,
        custom_message=f"`{name}` must be a Python integer; got {value!r}.",
    )


def check_axis(name: str, value: object) -> None:
    """Takes an axis, a tuple of them, or None."""
    axes = value if isinstance(value, tuple) else (value,)
    chex.assert_equal(
        value is None or all(map(is_integer, axes)),
        True,
        custom_message=f"`{name}` must be an integer or a tuple of them; got "
        f"{value!r}.",
    )


def _is_numeric(value: object) -> bool:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        real = (jnp.bool_, jnp.integer, jnp.floating)
        return any(jnp.issubdtype(value.dtype, kind) for kind in real)
    return isinstance(value, bool | int | float)


def widen(integers: jax.Array) -> jax.Array:
    """Widens to 32 bits: compared with an int8, 300 is 44."""
    narrow = integers.dtype.itemsize < 4
    return integers.astype(jnp.int32) if narrow else integers


def describe(array: jax.Array) -> str:
    """Says what came: ``float32[4, 1]``."""
    return f"{array.dtype}{list(array.shape)}"
