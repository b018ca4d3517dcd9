"""The laws that this package promises, as assertions on a loss function of your own.

``loss_fn(params, batch)`` may return a scalar, a `wloss_jax.WeightedMean`, or a tree of
either, the terms by name; or the parts that a ``combine`` makes a loss of. Hand in a
small batch that is as ragged as yours ever are, with an empty sample: a broken law
shows only where the data lets it. Each assertion says which law broke, by how much, and
the likeliest cause, found by experiment.

Modules of `flax.nnx` are handed in split::

    graphdef, params, state = nnx.split(model, nnx.Param, ...)

    def loss_fn(params, batch):
        return my_loss(nnx.merge(graphdef, params, state, copy=True), batch)
"""

from wloss_jax.testing._laws import (
    assert_padding_invariant,
    assert_permutation_invariant,
    assert_split_invariant,
)
from wloss_jax.testing._values import assert_valid_batch

__all__ = [
    "assert_padding_invariant",
    "assert_permutation_invariant",
    "assert_split_invariant",
    "assert_valid_batch",
]
