"""What a traced program says of itself: what its results depend on, and hold.

With `wloss_jax.linear._primitives`, all that stands on JAX's less public modules:

- `jax.interpreters.partial_eval`: ``dce_jaxpr``, which drops what no result needs;
- `jax.extend.core`: ``Literal``, a number that is written out in a program;
- `jax.core.eval_jaxpr`, which runs a program on constants of one's own;
- the equations of a jaxpr, and how a jit in a jit stands among them.

When JAX moves one of these, the first tests to fail are those of
``tests/test_jaxprs.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal
from jax.interpreters import partial_eval


def with_closed_over(
    change: Callable[[Any], Any], function: Callable[..., jax.Array], *arguments: Any
) -> jax.Array:
    """Calls a function, after a ``change`` of each constant that it closes over.

    Those are known by tracing it. What cannot be traced is called as it is: a function
    that looks at numbers outside of a jit, or that changes a module of Flax.
    """
    try:
        closed = jax.make_jaxpr(function)(*arguments)
    except Exception:  # an error of the function's own comes again
        return function(*arguments)
    constants = [change(constant) for constant in closed.consts]
    result: jax.Array
    (result,) = evaluated(closed.jaxpr, constants, *jax.tree.leaves(arguments))
    return result


def evaluated(jaxpr: Any, constants: Any, *arguments: Any) -> list[Any]:
    """The results of what `jax.make_jaxpr` made, with constants of one's own."""
    return jax.core.eval_jaxpr(jaxpr, constants, *arguments)


def used_inputs(jaxpr: Any, *outputs: int) -> list[bool]:
    """Which inputs of a traced function these ``outputs`` depend on."""
    wanted = [i in outputs for i in range(len(jaxpr.outvars))]
    _, used = partial_eval.dce_jaxpr(jaxpr, wanted)
    return list(used)


def written_out(closed: Any, variable: Any) -> float | None:
    """The number that a variable is, all of it, if it is written out in the program.

    jax 0.12 traces a jit in a jit as an operation, which it takes apart later.
    """
    if isinstance(variable, Literal):
        return _number(variable.val)
    known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    if variable in known:
        return _number(known[variable])
    for equation in closed.jaxpr.eqns:
        if variable not in equation.outvars:
            continue
        name = equation.primitive.name
        if name in ("jit", "pjit"):
            inner = equation.params["jaxpr"]
            output = inner.jaxpr.outvars[equation.outvars.index(variable)]
            return written_out(inner, output)
        if name in ("broadcast_in_dim", "convert_element_type"):
            return written_out(closed, equation.invars[0])
    return None


def _number(constant: Any) -> float | None:
    """The number that all entries of a constant are; traced, it is not known."""
    if isinstance(constant, jax.core.Tracer):
        return None
    numbers = np.unique(np.asarray(constant, np.float64))
    return float(numbers[0]) if numbers.size == 1 else None
