"""Losses of sequences that are not aligned: CTC."""

from __future__ import annotations

from typing import (
    Unpack,
)

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from wloss_jax._checks import (
    Option,
    check_array,
    check_count,
    check_number,
    check_rank,
    check_shape,
    check_value,
)
from wloss_jax._counting import what_counts
from wloss_jax._devices import (
    vary,
)
from wloss_jax.losses._labels import (
    nan_unless_class,
)
from wloss_jax.losses._masked import (
    Reduction,
    at_least_float32,
    public_loss,
)
from wloss_jax.masks import (
    make_safe,
)
from wloss_jax.means import WeightedMean


@public_loss
def ctc_loss(
    logits: ArrayLike,
    logit_paddings: ArrayLike,
    labels: ArrayLike,
    label_paddings: ArrayLike,
    *,
    blank_id: int = 0,
    log_epsilon: Option = -1e5,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the connectionist temporal classification loss of sequences.

    ``-log sum_a prod_t softmax(x_t)_{a_t}`` over the alignments ``a`` of the labels

    One sequence is one element, whatever its length: to count labels, give their number
    as ``weights`` and divide each loss by it beforehand with `masked`. The paddings
    mark frames and labels *within* a sequence, 1 where padded, as in optax. A label out
    of range that is not padded gives NaN.

    Args:
      logits: floating ``[..., T, V]``.
      logit_paddings: ``[..., T]``, 1 for a padded frame, else 0.
      labels: integer ``[..., N]``.
      label_paddings: ``[..., N]``, 1 for a padded label, else 0; at the end only.
      blank_id: the class that stands for no label.
      log_epsilon: what stands for the logarithm of 0.
      **reduction: the keywords of `weighted_mean`.

    Raises:
      AssertionError: arrays that do not fit the ``logits``, or a ``blank_id`` that is
        none of their classes.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> logits, labels = jnp.zeros((1, 2, 3)), jnp.array([[1, -1]])
      >>> paddings = jnp.array([[0.0, 1.0]])
      >>> loss = wl.ctc_loss(logits, paddings, labels, paddings)
      >>> print(f"{loss.compute():.4f}")
      1.0986

    Source:
      `optax.losses.ctc_loss`; Graves et al., Connectionist Temporal Classification,
      2006.
    """
    arrays = {
        "logits": check_array("logits", logits, float),
        "logit_paddings": check_array("logit_paddings", logit_paddings),
        "labels": check_array("labels", labels, int),
        "label_paddings": check_array("label_paddings", label_paddings),
    }
    check_rank(
        "logits",
        arrays["logits"],
        set(range(2, 33)),
        "needs an axis for the frames and one for the classes.",
    )
    *batch_axes, frame_count, num_classes = arrays["logits"].shape
    check_value(
        "logits",
        frame_count > 0,
        f"of shape {arrays['logits'].shape} has no frames: pad to at least one.",
    )
    check_number("log_epsilon", log_epsilon, high=0, strictly=True)
    blank_id = check_count("blank_id", blank_id)
    check_value(
        "blank_id", blank_id < num_classes, f"is {blank_id}, of {num_classes} classes."
    )
    batch, time, length = tuple(batch_axes), (frame_count,), arrays["labels"].shape[-1:]
    for name, event in (
        ("logit_paddings", time),
        ("labels", length),
        ("label_paddings", length),
    ):
        check_shape(
            f"{name}",
            arrays[name],
            batch + event,
            f"does not fit logits of shape {arrays['logits'].shape}.",
        )
    if not all(length):  # optax wants a label, which may be padding
        arrays["labels"] = jnp.zeros((*batch, 1), jnp.int32)
        arrays["label_paddings"] = jnp.ones((*batch, 1), jnp.int32)
    counts = what_counts(batch, **reduction)
    if counts.mask is not None:
        arrays = {name: make_safe(array, counts.mask) for name, array in arrays.items()}
    frames, symbols = arrays["logit_paddings"] < 1, arrays["label_paddings"] < 1
    labels = arrays["labels"]
    visible_nan = jnp.where(symbols, nan_unless_class(labels, num_classes), 1)
    logits = make_safe(at_least_float32(arrays["logits"]), frames)
    # optax starts a scan from multiples of it, which must vary over devices as data do.
    varying = (jax.typeof(x).manual_axis_type.varying for x in arrays.values())
    log_zero = vary(jnp.float32(log_epsilon), tuple(frozenset().union(*varying)))
    values = optax.losses.ctc_loss(
        _rows(logits, 2),
        _rows(1.0 - frames, 1),
        # -1 equals no label: optax looks whether a padded label repeats the last one.
        _rows(jnp.where(symbols, labels, -1), 1),
        _rows(1.0 - symbols, 1),
        blank_id=blank_id,
        log_epsilon=log_zero,
    )
    # In x64, optax makes float64 of float32.
    values = values.astype(logits.dtype).reshape(batch) * visible_nan.prod(axis=-1)
    return WeightedMean(*counts.add_up(values))


def _rows(array: jax.Array, event_ndim: int) -> jax.Array:
    """Flattens the batch axes to one."""
    return array.reshape(-1, *array.shape[array.ndim - event_ndim :])
