"""What `wloss_jax._jaxprs` stands on: these fail first when JAX moves it."""

import jax
import jax.numpy as jnp
import numpy as np

from wloss_jax import _jaxprs as jaxprs


def program(x, y):
    return x + 1, jnp.sin(y), jnp.float32(3.0), jax.jit(lambda y: (y, 4.0))(y)[1]


def test_which_inputs_an_output_depends_on():
    jaxpr = jax.make_jaxpr(program)(1.0, 2.0).jaxpr
    uses = [[True, False], [False, True], [False, False], [False, False]]
    assert [jaxprs.used_inputs(jaxpr, i) for i in range(4)] == uses
    assert jaxprs.used_inputs(jaxpr, 0, 1) == [True, True]


def test_numbers_that_are_written_out():
    def more(x, y):
        return *program(x, y), jnp.ones(3), jnp.asarray(np.arange(3.0)), x * jnp.ones(3)

    closed = jax.make_jaxpr(more)(1.0, 2.0)
    written = [jaxprs.written_out(closed, out) for out in closed.jaxpr.outvars]
    assert written == [None, None, 3.0, 4.0, 1.0, None, None]


def test_constants_may_be_changed_afterwards():
    offset = jnp.arange(3.0)
    closed = jax.make_jaxpr(lambda x: x * offset)(offset)
    (product,) = jaxprs.evaluated(closed.jaxpr, [offset + 1], offset)
    np.testing.assert_array_equal(product, [0, 2, 6])
