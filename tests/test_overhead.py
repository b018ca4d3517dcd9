"""What a loss costs beside its arithmetic: to trace it, and to call it eagerly.

How long that takes, `benchmarks.trace_time` and `benchmarks.eager` measure; here is
what it depends on, and what no other program on the machine can disturb.
"""

import logging

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import wloss_jax as wl
from tests.benchmarks import eager
from tests.oracle import grid

# Those of optax and of a user, those that put elements that count in the place of those
# that do not, and a few that choose by numbers and arrays mixed.
OTHERS = (
    *("ctc_loss", "sparsemax", "masked", "quantile", "full_of_rates", "gaussian"),
    *("pos_weight", "smoothed_and_weighted", "with_distance", "embedding", "nll"),
    "multilabel_margin",
)
DEAR = {"_where", "clip", "take_along_axis"}
OWN = [case for case in grid.CASES if not any(name in case.name for name in OTHERS)]


def jits_in(jaxpr):
    """The functions with a jit of their own that a program calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("jit", "pjit"):
            yield equation.params["name"]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from jits_in(inner)


@pytest.mark.parametrize("keywords", ["where", "lengths"])
@pytest.mark.parametrize("case", OWN, ids=repr)
def test_a_loss_is_traced_without_functions_that_have_jits_of_their_own(case, keywords):
    """Each, `jnp.where` above all, takes as long as all that it does."""
    arrays, counted = grid.pad(grid.ragged(case, 0, [3] * 4), 3)

    def mean(*arrays):
        return case.loss(*arrays, **{keywords: counted[keywords]}).compute()

    # Later versions of JAX keep jits that are to be inlined, ours say, until lowering.
    assert not DEAR & set(jits_in(jax.make_jaxpr(mean)(*arrays).jaxpr))


def test_what_is_dear_is_found():
    def dear(x):
        return jnp.clip(jnp.where(x > 0, x, 0), 0, 1)

    assert set(jits_in(jax.make_jaxpr(dear)(1.0).jaxpr)) >= {"_where", "clip"}


FRESH = {
    "per_sample of a loss": lambda x: wl.per_sample(wl.absolute_error)(x, 2 * x),
    "per_sample with an option": lambda x: wl.per_sample(wl.huber_loss)(
        x, 2 * x, delta=0.5
    ),
    "per_sample twice": lambda x: wl.per_sample(wl.per_sample(wl.absolute_error))(
        x, 2 * x
    ),
    "a scheme": lambda x: wl.WeightedMean(x, x).reweight(wl.size_power(0.5)),
    "a scheme of losses": lambda x: wl.WeightedMean(x, x).reweight(wl.loss_power(2)),
}


@pytest.mark.parametrize("name", [*eager._pairs(), *FRESH])
def test_a_second_eager_call_compiles_nothing(name, caplog):
    x = jnp.ones((4, 3))
    fresh = FRESH.get(name)
    call = (lambda: fresh(x)) if fresh else eager._pairs()[name][0]
    call()
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, "jax"):
        call()
    assert not [line for line in caplog.messages if "Compiling" in line]


def test_what_compiles_is_seen(caplog):
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, "jax"):
        jax.jit(lambda x: x + 17)(1.0)
    assert [line for line in caplog.messages if "Compiling" in line]


def test_a_scheme_whose_power_is_traced_is_not_compiled_in():
    m = wl.WeightedMean(jnp.array([9.0, 4.0]), jnp.array([9.0, 1.0]))
    powers = jnp.array([1.0, 0.5, 0.0])
    means = jax.vmap(lambda p: m.reweight(wl.size_power(p)).merge().compute())(powers)
    np.testing.assert_allclose(means, [1.3, 1.75, 2.5], rtol=1e-6)
    assert wl.size_power(0.5) == wl.size_power(0.5) != wl.size_power(1.0)
    assert wl.size_power(0.5) != wl.loss_power(0.5)
