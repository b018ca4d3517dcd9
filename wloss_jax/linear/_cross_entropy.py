"""`linear_softmax_cross_entropy`, of integer labels."""

from __future__ import annotations

from typing import Literal, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax._checks import Option, check_flag, check_shape
from wloss_jax._counting import check_weights, what_counts
from wloss_jax._devices import compiled_by_option
from wloss_jax.linear._arguments import (
    Named,
    Problem,
    check_class_mask,
    check_data,
    check_static,
    in_auto,
    mean_of,
    reduced,
    scalars,
    split_options,
)
from wloss_jax.linear._classes import row_of_label
from wloss_jax.linear._logits import Place
from wloss_jax.linear._softmax import CrossEntropy
from wloss_jax.losses._labels import check_labels, counted_labels
from wloss_jax.masks import expand_leading
from wloss_jax.means import WeightedMean


@overload
def linear_softmax_cross_entropy(
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
    ignore_index: int | None = None,
    label_smoothing: Option = 0.0,
    z_loss: Option = 0.0,
    softcap: Option | None = None,
    class_weights: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    has_aux: Literal[False] = False,
    chunk_size: int | None = None,
    vocab_axis_name: str | None = None,
) -> WeightedMean: ...


@overload
def linear_softmax_cross_entropy(
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
    ignore_index: int | None = None,
    label_smoothing: Option = 0.0,
    z_loss: Option = 0.0,
    softcap: Option | None = None,
    class_weights: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    has_aux: Literal[True],
    chunk_size: int | None = None,
    vocab_axis_name: str | None = None,
) -> tuple[WeightedMean, dict[str, WeightedMean]]: ...


@compiled_by_option
def linear_softmax_cross_entropy(
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
    ignore_index: int | None = None,
    label_smoothing: Option = 0.0,
    z_loss: Option = 0.0,
    softcap: Option | None = None,
    class_weights: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
    vocab_axis_name: str | None = None,
) -> WeightedMean | tuple[WeightedMean, dict[str, WeightedMean]]:
    """Computes the cross-entropy of ``features @ kernel + bias``, without those logits.

    ``lse - (1 - s) * x_y - s * mean_v(x_v) + z_loss * lse**2`` with
    ``x = c * tanh((features @ kernel + bias) / c)``, ``lse = logsumexp_v(x)``,
    ``s = label_smoothing`` and ``c = softcap`` (no ``tanh`` where that is None). A
    class that is out has no part in ``lse``, the mean or any gradient; as a label it
    costs infinity.

    Tokens that do not count cost nothing: those that do are gathered to the front, and
    the loop ends behind the last of them, so that time follows the tokens that count
    while shapes stay static. Memory is that of the gradients (in float32 for
    ``kernel``) and of one chunk of logits. The value alone takes one matrix product; it
    and the gradients of features and kernel three; with ``segment_ids``, or under
    `jax.vmap`, four. What is not differentiated is not multiplied either.

    Products have the dtype of ``features``, and so has the gradient of the logits
    before its own two; the log-sum-exp, the loss and the sum of the kernel's gradient
    are float32 (or float64). A kernel of float32 masters under bfloat16 features gets
    its gradient in float32, unrounded.

    **Devices.** Each device keeps to its own tokens and makes as many rounds as the one
    with most of them: under `jax.shard_map` and `jax.pmap`, and under plain `jax.jit`
    where the leading axis of the tokens is the one that is spread over devices. With
    ``vocab_axis_name``, under `jax.shard_map`, ``kernel``, ``bias``, ``class_weights``
    and ``class_mask`` are a device's shard of the vocabulary and ``labels`` count
    through all of it; two small reductions
    of a chunk (maximum, sums) are all that passes between devices, and every device of
    the axis gets the whole loss. The gradient of a kernel's shard stays where it is;
    that of the features, which these devices share, is added up over them. With
    ``check_vma=False`` both hold for a gradient taken *inside* the `jax.shard_map`; one
    taken outside of it needs ``check_vma=True``, or the kernel's is a fraction of it.

    Args:
      features: floating ``[..., D]``: bfloat16, float32, ....
      kernel: floating ``[D, V]``, of any dtype; cast to that of ``features``.
      labels: integer ``[...]``.
      bias: floating ``[V]``; -infinity takes a class out.
      where: bool; this and the next four are as in `weighted_mean`, for losses
        ``[...]``.
      lengths: integer.
      weights: floating.
      segment_ids: integer.
      num_segments: static; the result then has the shape ``[num_segments]``.
      ignore_index: a label that marks a token as masked, -100 say; None for none.
      label_smoothing: the share of the label that is spread evenly over all classes
        that are in. This and the next two are Python numbers, which are checked and
        compiled in, or scalar arrays, which may be traced and differentiated.
      z_loss: the factor of ``lse**2``, which keeps logits from drifting.
      softcap: bounds the logits softly, to ``-softcap .. softcap``.
      class_weights: numbers ``[V]``: a token's weight is that of its own class, times
        ``weights``.
      class_mask: bool ``[V]``, or ``[..., V]`` for each token: False takes a class out.
      has_aux: whether to return what the sweep holds anyway, of the same tokens and
        weights, as constants for gradients.
      chunk_size: tokens taken at a time on each device. None chooses, for ``n`` tokens
        on each device: 512 on CPU, ``D / 8`` on TPU, in steps of 256, but at
        least 512, ``2 D / 3`` on GPU, in steps of 1024, but at least 1024; at most
        8192, and ``n``. A chunk's logits then take less memory than the kernel's
        gradient. Where there is plenty, 2048 is faster on GPU for a small ``D``.
      vocab_axis_name: the mapped axis that the vocabulary is sharded over.

    Returns:
      A scalar `WeightedMean`, or one of ``[num_segments]`` with ``segment_ids``; with
      ``has_aux`` that and a dictionary of more of them: ``"accuracy"`` (the label is
      the first of the largest logits), ``"log_sum_exp"``, ``"z_loss"`` (its part of the
      loss) and ``"entropy"``.

    Raises:
      AssertionError: a shape, a dtype or an option that does not fit; the message names
        the argument, what came, what was expected, and how to mend it.
      NotImplementedError: a second derivative with ``vocab_axis_name``, or one by an
        option; without, all derivatives exist, those after the first by a plain program
        of more memory.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> features, kernel = jnp.ones((3, 2)), jnp.zeros((2, 4))
      >>> labels = jnp.array([0, 3, -100])
      >>> loss = wl.linear_softmax_cross_entropy(
      ...     features, kernel, labels, ignore_index=-100
      ... )
      >>> print(f"{loss.compute():.4f} over {loss.weight} labels")
      1.3863 over 2.0 labels

    Source:
      The gradient in the forward pass: Hsu et al., Liger Kernel, 2024; skipping what
      does not count: Wijmans et al., Cut Your Losses in Large-Vocabulary Language
      Models, 2024; the sharded vocabulary: Shoeybi et al., Megatron-LM, 2019.
    """
    check_flag("has_aux", has_aux)
    check_static(chunk_size, vocab_axis_name)
    fixed, traced = split_options(
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap
    )

    def computed(given: Named) -> tuple[WeightedMean, dict[str, WeightedMean]]:
        features, kernel, bias = check_data(
            given["features"], given["kernel"], given["bias"]
        )
        labels = check_labels(given["labels"], features.shape[:-1])
        where, weights, traced = given["where"], given["weights"], given["traced"]
        if ignore_index is not None:
            where = counted_labels(labels, ignore_index, where)
        if given["class_weights"] is not None:
            weights = _own_class_weights(
                given["class_weights"], kernel, labels, weights, vocab_axis_name
            )
        of_mask, mask = check_class_mask(
            given["class_mask"], labels.shape, kernel.shape[1]
        )
        counts = what_counts(
            labels.shape,
            where=where,
            lengths=given["lengths"],
            weights=weights,
            segment_ids=given["segment_ids"],
            num_segments=num_segments,
        )
        loss = CrossEntropy(fixed, tuple(traced), of_mask, bool(has_aux))
        problem = Problem(
            loss,
            features,
            kernel,
            bias,
            [labels, *(mask if of_mask == "arrays" else [])],
            [*scalars(traced, features), *(mask if of_mask == "shared" else [])],
            chunk_size,
            vocab_axis_name,
        )
        mean, (top, log_sum, *residuals) = mean_of(problem, counts)
        if not has_aux:
            return mean, {}
        z_loss = jax.lax.stop_gradient(loss.option("z_loss", problem.shared) or 0.0)
        correct, entropy = residuals[-2:]
        lse = top + log_sum
        aux = {
            "accuracy": correct,
            "log_sum_exp": lse,
            "z_loss": z_loss * lse**2,
            "entropy": entropy,
        }
        return mean, {name: reduced(values, counts) for name, values in aux.items()}

    arrays = {
        "features": features,
        "kernel": kernel,
        "labels": labels,
        "bias": bias,
        "where": where,
        "lengths": lengths,
        "weights": weights,
        "segment_ids": segment_ids,
        "class_weights": class_weights,
        "class_mask": class_mask,
        "traced": traced,
    }
    mean, aux = in_auto(computed, arrays)
    return (mean, aux) if has_aux else mean


def _own_class_weights(
    class_weights: ArrayLike,
    kernel: jax.Array,
    labels: jax.Array,
    weights: ArrayLike | None,
    vocab_axis_name: str | None,
) -> jax.Array:
    """Folds the weight of each token's own class into ``weights``."""
    class_weights = check_weights(class_weights, "class_weights", "class_mask")
    check_shape(
        "class_weights",
        class_weights,
        kernel.shape[1:],
        f"has shape {class_weights.shape}: it must have one weight for each class, "
        f"{kernel.shape[1:]}.",
    )
    # A product of two weights is as precise as the sum that it goes into.
    dtype = jnp.result_type(class_weights, kernel, jnp.float32)
    place = Place("any", vocab_axis_name)
    own = row_of_label(class_weights.astype(dtype), labels, place)
    if weights is None:
        return own
    return own * expand_leading("weights", check_weights(weights), labels.shape)
