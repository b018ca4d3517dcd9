"""Cross-entropies of probabilities and of their logarithms, rather than of logits."""

from __future__ import annotations

from typing import Unpack

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
from wloss_jax.masks import make_safe
from wloss_jax.means import WeightedMean


@public_loss
def binary_cross_entropy(
    probabilities: ArrayLike, labels: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the cross-entropy of yes-or-no labels, from probabilities.

    ``-y * log(p) - (1 - y) * log(1 - p)``, each logarithm at least -100

    `sigmoid_binary_cross_entropy` of logits is more exact. A probability outside of
    0 to 1 at a position that counts gives NaN; at 0 and 1 the gradient of the
    logarithm that ends there is 0.

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
    yes, no = _log(probabilities), _log(1 - probabilities)
    labels = labels.astype(probabilities.dtype)
    return -labels * yes - (1 - labels) * no


def _log(probabilities: jax.Array) -> jax.Array:
    """The logarithm of what is not negative, at least -100."""
    is_above = probabilities != 0
    logarithm = jnp.log(make_safe(probabilities, is_above, 1))
    # Of NaN, the comparison is false, and NaN stays.
    return make_safe(logarithm, is_above & ~(logarithm < -100), -100)


@public_loss
def nll_loss(
    log_probs: ArrayLike,
    labels: ArrayLike,
    *,
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
    (log_probs,) = classes_last(-1, class_mask, log_probs=log_probs)
    labels = check_labels(labels, log_probs.shape[:-1])
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
