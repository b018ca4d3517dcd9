"""Losses of sequences that are not aligned: CTC."""

from __future__ import annotations

import math
from typing import Unpack

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from wloss_jax._checks import (
    Option,
    check_array,
    check_count,
    check_flag,
    check_number,
    check_rank,
    check_shape,
    check_value,
)
from wloss_jax._counting import what_counts
from wloss_jax._devices import (
    vary,
)
from wloss_jax.losses._classes import classes_last
from wloss_jax.losses._labels import (
    nan_unless_class,
)
from wloss_jax.losses._masked import (
    Reduction,
    at_least_float32,
    not_below_zero,
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
    zero_infinity: bool = False,
    per_label: bool = False,
    class_mask: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the connectionist temporal classification loss of sequences.

    ``-log sum_a prod_t softmax(x_t)_{a_t}`` over the alignments ``a`` of the labels

    One sequence is one element, whatever its length. The paddings mark frames and
    labels *within* a sequence, 1 where padded, as in optax: of lengths, they are
    ``1 - wl.length_mask(lengths, T)``. A label out of range that is not padded gives
    NaN. A sequence that cannot be aligned, with fewer frames than labels and blanks
    between equal ones or with classes that are out, costs infinity, and its gradient
    is 0: `per_sample` shows which those are, and ``where`` or ``zero_infinity`` leave
    them out.

    Args:
      logits: floating ``[..., T, V]``.
      logit_paddings: ``[..., T]``, 1 for a padded frame, else 0.
      labels: integer ``[..., N]``.
      label_paddings: ``[..., N]``, 1 for a padded label, else 0; at the end only.
      blank_id: the class that stands for no label.
      log_epsilon: what stands for the logarithm of 0, below 0.
      zero_infinity: whether a sequence that cannot be aligned costs 0 instead. It still
        counts, as in PyTorch; with ``where`` it does not.
      per_label: whether each loss is divided by its number of labels, 1 at least. The
        mean is PyTorch's default then; with the numbers of labels as ``weights`` it is
        the loss of all labels over their number.
      class_mask: as in `softmax_cross_entropy`.
      **reduction: the keywords of `weighted_mean`. ``lengths`` count sequences, so they
        have fewer axes than the losses; frames and labels are counted by the paddings.

    Raises:
      AssertionError: arrays that do not fit the ``logits``, or a ``blank_id`` that is
        outside of their classes.

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
    check_flag("zero_infinity", zero_infinity)
    check_flag("per_label", per_label)
    (logits,) = classes_last(-1, class_mask, logits=logits)
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
            name,
            arrays[name],
            batch + event,
            f"has shape {arrays[name].shape}, and {batch + event} is expected beside "
            f"logits of shape {arrays['logits'].shape}."
            + (
                f" Of lengths, pass `1 - wloss_jax.length_mask(lengths, {event[0]})`."
                if name != "labels" and arrays[name].shape == batch
                else ""
            ),
        )
    if reduction.get("lengths") is not None:
        lengths = check_array("lengths", reduction["lengths"], int)
        check_value(
            "lengths",
            lengths.ndim < len(batch),
            f"has shape {lengths.shape}, and would say how many sequences count. How "
            "many frames and labels each has is said by `logit_paddings=1 - "
            "wloss_jax.length_mask(lengths, T)` and `label_paddings`.",
        )
    if not all(length):  # optax wants a label, which may be padding
        arrays["labels"] = jnp.zeros((*batch, 1), jnp.int32)
        arrays["label_paddings"] = jnp.ones((*batch, 1), jnp.int32)
    counts = what_counts(batch, **reduction)
    if counts.mask is not None:
        arrays = {name: make_safe(array, counts.mask) for name, array in arrays.items()}
    frames, symbols = arrays["logit_paddings"] < 1, arrays["label_paddings"] < 1
    labels = arrays["labels"]
    visible_nan = make_safe(nan_unless_class(labels, num_classes), symbols, 1)
    logits = make_safe(at_least_float32(arrays["logits"]), frames)
    # -1 equals no label: optax looks whether a padded label repeats the last one.
    labels = make_safe(labels, symbols, -1)
    # optax starts a scan from multiples of it, which must vary over devices as data do.
    varying = (jax.typeof(x).manual_axis_type.varying for x in arrays.values())
    log_zero = vary(jnp.float32(log_epsilon), tuple(frozenset().union(*varying)))
    logits, some_out, none_in = _finite(logits, log_zero)
    values = optax.losses.ctc_loss(
        _rows(logits, 2),
        _rows(1.0 - frames, 1),
        _rows(labels, 1),
        _rows(1.0 - symbols, 1),
        blank_id=blank_id,
        log_epsilon=log_zero,
    )
    # In x64, optax makes float64 of float32.
    values = values.astype(logits.dtype).reshape(batch) * visible_nan.prod(axis=-1)
    values = not_below_zero(values)
    # A blank must stand between equal labels, which takes a frame.
    num_labels = symbols.sum(axis=-1)
    equal = (labels[..., 1:] == labels[..., :-1]) & symbols[..., 1:]
    too_short = frames.sum(axis=-1) < num_labels + equal.sum(axis=-1)
    # Beyond half of what a class that is out costs, the best alignment has one in it.
    impossible = some_out & (values > -0.5 * log_zero)
    unaligned = too_short | impossible | none_in
    values = jnp.where(unaligned, 0 if zero_infinity else math.inf, values)
    if per_label:
        values /= jnp.maximum(num_labels, 1)
    return WeightedMean(*counts.add_up(values))


def _finite(
    logits: jax.Array, log_zero: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gives classes that are out a finite logit, so far down that its share is 0.

    Returns the logits, and for each sequence whether a class is out in some frame and
    whether all are.
    """
    is_out = logits == -math.inf
    highest = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    lowest = jnp.where(jnp.isfinite(highest), highest, 0) + log_zero
    none_in = is_out.all(axis=-1).any(axis=-1)
    finite = jnp.where(is_out, lowest.astype(logits.dtype), logits)
    return finite, is_out.any(axis=(-2, -1)), none_in


def _rows(array: jax.Array, event_ndim: int) -> jax.Array:
    """Flattens the batch axes to one."""
    return array.reshape(-1, *array.shape[array.ndim - event_ndim :])
