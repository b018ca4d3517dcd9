"""`linear_log_probs`, the log-probability of each label, token by token."""

from __future__ import annotations

from typing import Literal, overload

import jax
from jax.typing import ArrayLike

from wloss_jax._checks import Option, check_flag
from wloss_jax._counting import what_counts
from wloss_jax._devices import compiled_by_option
from wloss_jax.linear._arguments import (
    Named,
    Problem,
    check_data,
    check_static,
    in_auto,
    mask_of,
    scalars,
    split_options,
    values_of,
)
from wloss_jax.linear._softmax import LogProbs
from wloss_jax.losses._labels import check_labels, counted_labels


@overload
def linear_log_probs(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    ignore_index: int | None = None,
    temperature: Option = 1.0,
    softcap: Option | None = None,
    with_entropy: Literal[False] = False,
    chunk_size: int | None = None,
    vocab_axis_name: str | None = None,
) -> jax.Array: ...


@overload
def linear_log_probs(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    ignore_index: int | None = None,
    temperature: Option = 1.0,
    softcap: Option | None = None,
    with_entropy: Literal[True],
    chunk_size: int | None = None,
    vocab_axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]: ...


@compiled_by_option
def linear_log_probs(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    ignore_index: int | None = None,
    temperature: Option = 1.0,
    softcap: Option | None = None,
    with_entropy: bool = False,
    chunk_size: int | None = None,
    vocab_axis_name: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes the log-probability of each label, without the logits.

    ``x_y - logsumexp_v(x)`` with ``x = c * tanh((features @ kernel + bias) / c) / t``,
    ``c = softcap`` (no ``tanh`` where that is None) and ``t = temperature``

    What policy gradients, preference losses and rollouts need of a language model. The
    result is one number a token, to be combined in any way: each token has a gradient
    of its own, and the whole takes one matrix product, four with the gradients of
    features and kernel. Nothing of the size of the logits is kept in between. Tokens
    that do not count cost nothing, as in `linear_softmax_cross_entropy`, which also
    says what holds for dtypes, devices and a sharded vocabulary.

    Args:
      features: floating ``[..., D]``.
      kernel: floating ``[D, V]``.
      labels: integer ``[...]``. One out of range at a token that counts gives NaN.
      bias: floating ``[V]``; -infinity takes a class out, and is the log-probability of
        such a label.
      where: bool, lined up with the leading axes of ``labels``; True counts.
      lengths: integer, of the shape of the axes before the one that it bounds.
      ignore_index: a label that marks a token as masked, -100 say; None for none.
      temperature: what the logits are divided by, above 0, after the soft cap. This and
        the next are Python numbers, or scalar arrays, which may be traced.
      softcap: bounds the logits softly, to ``-softcap .. softcap``.
      with_entropy: whether to return the entropy of each token's distribution too.
      chunk_size: tokens taken at a time on each device; None chooses.
      vocab_axis_name: the mapped axis that the vocabulary is sharded over.

    Returns:
      float32 (or float64) ``[...]``, 0 where a token does not count; with
      ``with_entropy`` a pair of those, the second the entropies.

    Raises:
      AssertionError: a shape, a dtype or an option that does not fit; the message names
        the argument, what came, what was expected, and how to mend it.
      NotImplementedError: a second derivative with ``vocab_axis_name``, or one by an
        option.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> features, kernel = jnp.ones((3, 2)), jnp.zeros((2, 4))
      >>> labels = jnp.array([0, 3, 1])
      >>> print(wl.linear_log_probs(features, kernel, labels, lengths=2))
      [-1.3862944 -1.3862944  0.       ]
    """
    check_flag("with_entropy", with_entropy)
    check_static(chunk_size, vocab_axis_name)
    fixed, traced = split_options(temperature=temperature, softcap=softcap)

    def computed(given: Named) -> list[jax.Array]:
        features, kernel, bias = check_data(
            given["features"], given["kernel"], given["bias"]
        )
        labels = check_labels(given["labels"], features.shape[:-1])
        where, traced = given["where"], given["traced"]
        if ignore_index is not None:
            where = counted_labels(labels, ignore_index, where)
        counts = what_counts(labels.shape, where=where, lengths=given["lengths"])
        problem = Problem(
            LogProbs(fixed, tuple(traced), None, bool(with_entropy)),
            features,
            kernel,
            bias,
            [labels],
            scalars(traced, features),
            chunk_size,
            vocab_axis_name,
        )
        outputs, _ = values_of(problem, mask_of(counts))
        return outputs

    arrays = {
        "features": features,
        "kernel": kernel,
        "labels": labels,
        "bias": bias,
        "where": where,
        "lengths": lengths,
        "traced": traced,
    }
    outputs = in_auto(computed, arrays, of_tokens=True)
    return (outputs[0], outputs[1]) if with_entropy else outputs[0]
