"""What `wloss_jax._jaxprs` stands on: these fail first when JAX moves it."""

import jax
import jax.numpy as jnp

from wloss_jax import _jaxprs as jaxprs


def program(x, y):
    return x + 1, jnp.sin(y), jnp.float32(3.0), jax.jit(lambda y: (y, 4.0))(y)[1]


def test_which_inputs_an_output_depends_on():
    jaxpr = jax.make_jaxpr(program)(1.0, 2.0).jaxpr
    uses = [[True, False], [False, True], [False, False], [False, False]]
    assert [jaxprs.used_inputs(jaxpr, i) for i in range(4)] == uses
    assert jaxprs.used_inputs(jaxpr, 0, 1) == [True, True]


def test_numbers_that_are_written_out():
    jaxpr = jax.make_jaxpr(program)(1.0, 2.0).jaxpr
    written = [jaxprs.written_out(jaxpr, i) for i in range(4)]
    assert written == [None, None, 3.0, 4.0]
