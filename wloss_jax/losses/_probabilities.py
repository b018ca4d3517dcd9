"""Cross-entropies of probabilities and of their logarithms, rather than of logits."""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax.losses._classes import classes_last, infinite_where_out
from wloss_jax.losses._labels import (
    check_labels,
    counted_labels,
    nan_unless_class,
    own_class_weights,
    score_of_label,
)
from wloss_jax.losses._masked import Reduction, guarded, public_loss
from wloss_jax.means import WeightedMean


@public_loss
def binary_cross_entropy(
    probabilities: ArrayLike, labels: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the cross-entropy of yes-or-no labels, from probabilities.

    ``-y * log(p) - (1 - y) * log(1 - p)``, each logarithm at least -100

    `sigmoid_binary_cross_entropy` of logits is more exact. A probability outside of
    0 to 1 at a position that counts gives NaN. The gradient is PyTorch's,
    ``(p - y) / max(p * (1 - p), 1e-12)``: 1e12 where p is 0 or 1 and wrong.

    Args:
      probabilities: floating ``[...]``.
      labels: numeric, of the same shape: 0 and 1, or probabilities.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> loss = wl.binary_cross_entropy(jnp.array([0.5, 1.0]), jnp.array([1, 1]))
      >>> print(f"{loss.compute():.4f}")
      0.3466

    Source:
      As ``torch.nn.BCELoss``.
    """
    return guarded(_binary_cross_entropy, marks_nan=True)(
        probabilities, labels, **reduction
    )


def _binary_cross_entropy(probabilities: jax.Array, labels: jax.Array) -> jax.Array:
    return _clamped(probabilities, labels.astype(probabilities.dtype))


@jax.custom_jvp
def _clamped(p: jax.Array, y: jax.Array) -> jax.Array:
    yes, no = _logarithms(p)
    return -y * yes - (1 - y) * no


@_clamped.defjvp
def _tangent_of_clamped(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    p, y = primals
    yes, no = _logarithms(p)
    # That of a clamped logarithm is 0, and would leave what is most wrong as it is.
    slope = (p - y) / jnp.maximum(p * (1 - p), 1e-12)
    return _clamped(p, y), slope * tangents[0] + (no - yes) * tangents[1]


def _logarithms(p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of p and of 1 - p, each at least -100; NaN for what is not from 0 to 1."""
    return jnp.maximum(jnp.log(p), -100), jnp.maximum(jnp.log1p(-p), -100)


@public_loss
def nll_loss(
    log_probs: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int | tuple[int, ...] = -1,
    ignore_index: int | None = None,
    class_weights: ArrayLike | None = None,
    class_mask: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the negative log-likelihood of integer class labels.

    ``-x_y``

    A label out of range at a position that counts gives NaN.

    Args:
      log_probs: floating ``[..., V]``, logarithms of probabilities.
      labels: integer ``[...]``.
      axis: the axis or axes of the classes in ``log_probs``.
      ignore_index: a label that marks an element as masked, -100 say; None for none.
      class_weights: numbers ``[V]``: an element's weight is that of its own class,
        times ``weights``.
      class_mask: as in `softmax_cross_entropy`: a label that is out costs infinity.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> log_probs = jnp.log(jnp.array([[0.25, 0.75]]))
      >>> print(f"{wl.nll_loss(log_probs, jnp.array([0])).compute():.4f}")
      1.3863

    Source:
      As ``torch.nn.NLLLoss``, whose ``ignore_index`` is -100.
    """
    (log_probs,) = classes_last(axis, class_mask, log_probs=log_probs)
    might_be_elsewhere = log_probs.shape if axis == -1 else ()
    labels = check_labels(labels, log_probs.shape[:-1], might_be_elsewhere)
    if ignore_index is not None:
        where = reduction.get("where")
        reduction["where"] = counted_labels(labels, ignore_index, where)
    if class_weights is not None:
        reduction["weights"] = own_class_weights(
            log_probs, labels, class_weights, reduction.get("weights")
        )
    return guarded(_nll_loss, event_ndim=1, marks_nan=True)(
        log_probs, labels, **reduction
    )


def _nll_loss(log_probs: jax.Array, labels: jax.Array) -> jax.Array:
    # Of a label out of range some score, so that there is one whose gradient is NaN.
    inside = jnp.clip(labels, 0, log_probs.shape[-1] - 1)
    score = score_of_label(log_probs, inside)
    loss = infinite_where_out(-score, score)
    return loss * nan_unless_class(labels, log_probs.shape[-1])
