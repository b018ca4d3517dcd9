"""Losses of a prediction and a target, by their difference."""

from __future__ import annotations

import math
from typing import (
    Unpack,
)

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from wloss_jax._checks import (
    Option,
    check_number,
)
from wloss_jax.losses._masked import (
    Reduction,
    guarded,
    not_below_zero,
    public_loss,
)
from wloss_jax.masks import make_safe
from wloss_jax.means import WeightedMean


@public_loss
def absolute_error(
    predictions: ArrayLike, targets: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the absolute error, L1: the mean is the MAE.

    ``|prediction - target|``

    The gradient where prediction and target are equal is 0, as in PyTorch.

    Args:
      predictions: floating ``[...]``.
      targets: numeric, of the shape of ``predictions``.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> targets = jnp.array([0.5, jnp.nan, -1.0])
      >>> wl.absolute_error(jnp.zeros(3), targets, where=wl.observed_mask(targets))
      WeightedMean(mean=0.75, weight=2.0)
    """
    return guarded(_absolute_error)(predictions, targets, **reduction)


def _absolute_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    errors = predictions - targets
    # The derivative of `jnp.abs` at 0 is 1; of this it is 0.
    return errors * jax.lax.stop_gradient(jnp.sign(errors))


@public_loss
def squared_error(
    predictions: ArrayLike, targets: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the squared error: the mean is the MSE.

    ``(prediction - target)**2``

    Args:
      predictions: floating ``[...]``.
      targets: numeric, of the shape of ``predictions``.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> predictions, targets = jnp.array([1.0, 5.0]), jnp.array([3.0, jnp.nan])
      >>> wl.squared_error(predictions, targets, lengths=1)
      WeightedMean(mean=4.0, weight=1.0)

    Source:
      `optax.losses.squared_error`.
    """
    return guarded(optax.losses.squared_error)(predictions, targets, **reduction)


@public_loss
def l2_loss(
    predictions: ArrayLike, targets: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes half the squared error.

    ``0.5 * (prediction - target)**2``

    Args:
      predictions: floating ``[...]``.
      targets: numeric, of the shape of ``predictions``.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.l2_loss(jnp.array([1.0, 5.0]), jnp.array([3.0, jnp.nan]), lengths=1)
      WeightedMean(mean=2.0, weight=1.0)

    Source:
      `optax.losses.l2_loss`.
    """
    return guarded(optax.losses.l2_loss)(predictions, targets, **reduction)


@public_loss
def huber_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    delta: Option = 1.0,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the Huber loss: squared near 0, absolute far from it.

    ``0.5 * e**2`` where ``|e| <= delta``, else ``delta * (|e| - 0.5 * delta)``

    Args:
      predictions: floating ``[...]``.
      targets: numeric, of the shape of ``predictions``.
      delta: the error at which the loss turns linear, above 0.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.huber_loss(jnp.array([1.0, 3.0]), jnp.zeros(2))
      WeightedMean(mean=1.5, weight=2.0)

    Source:
      `optax.losses.huber_loss`; Huber, Robust estimation of a location parameter, 1964.
    """
    check_number("delta", delta, 0, strictly=True)
    return guarded(optax.losses.huber_loss)(
        predictions, targets, delta=delta, **reduction
    )


@public_loss
def smooth_l1_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    beta: Option = 1.0,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the smooth L1 loss: `huber_loss` divided by its ``delta``.

    ``0.5 * e**2 / beta`` where ``|e| < beta``, else ``|e| - 0.5 * beta``

    Args:
      predictions: floating ``[...]``.
      targets: numeric, of the shape of ``predictions``.
      beta: the error at which the loss turns linear; at 0 it is `absolute_error`.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.smooth_l1_loss(jnp.array([1.0, 3.0]), jnp.zeros(2), beta=2.0)
      WeightedMean(mean=1.125, weight=2.0)

    Source:
      As ``torch.nn.SmoothL1Loss``; Girshick, Fast R-CNN, 2015.
    """
    check_number("beta", beta, 0)
    return guarded(_smooth_l1_loss)(predictions, targets, beta=beta, **reduction)


def _smooth_l1_loss(
    predictions: jax.Array, targets: jax.Array, *, beta: Option
) -> jax.Array:
    size = _absolute_error(predictions, targets)
    is_near = size < beta  # nowhere at a beta of 0, by which nothing may be divided
    beta = jnp.broadcast_to(jnp.asarray(beta, size.dtype), size.shape)
    near = 0.5 * (predictions - targets) ** 2 / make_safe(beta, is_near, 1)
    return jax.lax.select(is_near, near, size - 0.5 * beta)


@public_loss
def log_cosh(
    predictions: ArrayLike, targets: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the logarithm of the error's hyperbolic cosine, a smooth Huber loss.

    ``log(cosh(prediction - target))``

    Args:
      predictions: floating ``[...]``.
      targets: numeric, of the shape of ``predictions``.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> loss = wl.log_cosh(jnp.array([1.0, 5.0]), jnp.zeros(2), lengths=1)
      >>> print(f"{loss.compute():.4f}")
      0.4338

    Source:
      `optax.losses.log_cosh`; Chen et al., Log Hyperbolic Cosine Loss Improves
      Variational Auto-Encoder, 2019.
    """
    return guarded(_log_cosh)(predictions, targets, **reduction)


def _log_cosh(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    size = smooth_abs(predictions - targets)
    return not_below_zero(size + jnp.log1p(jnp.exp(-2 * size)) - math.log(2))


def smooth_abs(x: jax.Array) -> jax.Array:
    """The absolute value, for smooth functions of it: at 0 too its derivative is 1.

    With ``exp(-smooth_abs(x))`` for both, a function and its derivative take one
    exponential: optax's forms of these losses take two to seven times the time.
    """
    size: jax.Array = jax.lax.select(x >= 0, x, -x)
    return size


@public_loss
def quantile_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    quantile: Option = 0.5,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the pinball loss, which a conditional quantile minimises.

    ``max(quantile * (target - prediction), (1 - quantile) * (prediction - target))``

    The gradient where prediction and target are equal is 0. At ``quantile=0.5`` it is
    half the absolute error.

    Args:
      predictions: floating ``[...]``.
      targets: numeric, of the shape of ``predictions``.
      quantile: between 0 and 1.
      **reduction: the keywords of `weighted_mean`.

    Raises:
      AssertionError: ``quantile`` is not between 0 and 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.quantile_loss(jnp.array([0.0, 4.0]), jnp.array([4.0, 0.0]), quantile=0.75)
      WeightedMean(mean=2.0, weight=2.0)

    Source:
      Koenker and Bassett, Regression Quantiles, 1978.
    """
    check_number("quantile", quantile, 0, 1)
    return guarded(_quantile_loss, marks_nan=True)(
        predictions, targets, quantile=quantile, **reduction
    )


def _quantile_loss(
    predictions: jax.Array, targets: jax.Array, *, quantile: Option
) -> jax.Array:
    errors = targets - predictions
    slope = jnp.where(errors > 0, quantile, quantile - 1) * (errors != 0)
    return errors * slope
