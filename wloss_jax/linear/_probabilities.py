"""`linear_softmax_cross_entropy_with_probabilities`: labels are distributions."""

from __future__ import annotations

from jax.typing import ArrayLike

from wloss_jax._checks import Option, check_array, check_shape
from wloss_jax._counting import what_counts
from wloss_jax._devices import compiled_by_option
from wloss_jax.linear._arguments import (
    Named,
    Problem,
    check_class_mask,
    check_data,
    check_static,
    in_auto,
    mean_of,
    scalars,
    split_options,
)
from wloss_jax.linear._softmax import SoftCrossEntropy
from wloss_jax.means import WeightedMean


@compiled_by_option
def linear_softmax_cross_entropy_with_probabilities(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
    label_smoothing: Option = 0.0,
    z_loss: Option = 0.0,
    softcap: Option | None = None,
    class_mask: ArrayLike | None = None,
    chunk_size: int | None = None,
    vocab_axis_name: str | None = None,
) -> WeightedMean:
    """Computes the cross-entropy of class probabilities, without the logits.

    ``-sum_v q_v * log_softmax(x)_v + z_loss * lse**2`` with
    ``q = (1 - s) * labels + s / num_classes`` and ``s = label_smoothing``

    The sibling of `linear_softmax_cross_entropy`, which says what is not said here, for
    labels that are distributions: mixed-up samples, a teacher whose probabilities are
    stored. They take as much memory as the logits would; where a teacher's features and
    kernel are at hand, `linear_masked` needs neither. A class of probability 0 that is
    out costs nothing; one of a probability above 0 costs infinity.

    Args:
      features: floating ``[..., D]``.
      kernel: floating ``[D, V]``.
      labels: floating ``[..., V]``, probabilities; they need not sum to 1, so class
        weights may be multiplied in.
      bias: floating ``[V]``; -infinity takes a class out.
      where: bool; this and the next four are as in `weighted_mean`, for losses
        ``[...]``.
      lengths: integer.
      weights: floating.
      segment_ids: integer.
      num_segments: static; the result then has the shape ``[num_segments]``.
      label_smoothing: the share of the label that is spread evenly over all classes
        that are in.
      z_loss: the factor of ``lse**2``.
      softcap: bounds the logits softly, to ``-softcap .. softcap``.
      class_mask: bool ``[V]``, or ``[..., V]`` for each token: False takes a class out.
      chunk_size: tokens taken at a time on each device; None chooses.
      vocab_axis_name: the mapped axis that the vocabulary, also that of ``labels``, is
        sharded over.

    Returns:
      A scalar `WeightedMean`, or one of ``[num_segments]`` with ``segment_ids``.

    Raises:
      AssertionError: a shape, a dtype or an option that does not fit; the message names
        the argument, what came, what was expected, and how to mend it.
      NotImplementedError: with ``vocab_axis_name``, a second derivative, or one by the
        labels or an option.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> features, kernel = jnp.ones((1, 2)), jnp.zeros((2, 4))
      >>> labels = jnp.array([[0.5, 0.5, 0.0, 0.0]])
      >>> loss = wl.linear_softmax_cross_entropy_with_probabilities(
      ...     features, kernel, labels
      ... )
      >>> print(f"{loss.compute():.4f}")
      1.3863
    """
    check_static(chunk_size, vocab_axis_name)
    fixed, traced = split_options(
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap
    )

    def computed(given: Named) -> WeightedMean:
        features, kernel, bias = check_data(
            given["features"], given["kernel"], given["bias"]
        )
        labels = check_array("labels", given["labels"], float)
        expected = (*features.shape[:-1], kernel.shape[1])
        check_shape(
            "labels",
            labels,
            expected,
            f"has shape {labels.shape}: it must be {expected}, a probability for each "
            "class. Integer labels are for `linear_softmax_cross_entropy`.",
        )
        of_mask, mask = check_class_mask(
            given["class_mask"], expected[:-1], kernel.shape[1]
        )
        counts = what_counts(
            expected[:-1],
            where=given["where"],
            lengths=given["lengths"],
            weights=given["weights"],
            segment_ids=given["segment_ids"],
            num_segments=num_segments,
        )
        traced = given["traced"]
        problem = Problem(
            SoftCrossEntropy(fixed, tuple(traced), of_mask),
            features,
            kernel,
            bias,
            [labels, *(mask if of_mask == "arrays" else [])],
            [*scalars(traced, features), *(mask if of_mask == "shared" else [])],
            chunk_size,
            vocab_axis_name,
        )
        mean, _ = mean_of(problem, counts)
        return mean

    arrays = {
        "features": features,
        "kernel": kernel,
        "labels": labels,
        "bias": bias,
        "where": where,
        "lengths": lengths,
        "weights": weights,
        "segment_ids": segment_ids,
        "class_mask": class_mask,
        "traced": traced,
    }
    return in_auto(computed, arrays)
