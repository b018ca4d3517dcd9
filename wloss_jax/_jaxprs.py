"""What a traced program says of itself: what its results depend on, and hold.

With `wloss_jax.linear._primitives`, all that stands on JAX's less public modules:

- `jax.interpreters.partial_eval`: ``dce_jaxpr``, which drops what no result needs;
- `jax.extend.core`: ``Literal``, a number that is written out in a program;
- the equations of a jaxpr, and how a jit in a jit stands among them.

When JAX moves one of these, the first tests to fail are those of
``tests/test_jaxprs.py``.
"""

from __future__ import annotations

from typing import Any

from jax.extend.core import Literal
from jax.interpreters import partial_eval


def used_inputs(jaxpr: Any, *outputs: int) -> list[bool]:
    """Which inputs of a traced function these ``outputs`` depend on."""
    wanted = [i in outputs for i in range(len(jaxpr.outvars))]
    _, used = partial_eval.dce_jaxpr(jaxpr, wanted)
    return list(used)


def written_out(jaxpr: Any, index: int) -> float | None:
    """The number that an output is, if it is written out in the program.

    jax 0.12 traces a jit in a jit as an operation, which it takes apart later.
    """
    output = jaxpr.outvars[index]
    if isinstance(output, Literal):
        return float(output.val)
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("jit", "pjit") and output in equation.outvars:
            inner = equation.params["jaxpr"].jaxpr
            return written_out(inner, equation.outvars.index(output))
    return None
