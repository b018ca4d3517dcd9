"""Negative log-likelihoods of a target under a predicted distribution."""

from __future__ import annotations

import math
from typing import (
    Unpack,
)

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from wloss_jax._checks import (
    Option,
    check_flag,
    check_number,
)
from wloss_jax.losses._masked import (
    Reduction,
    guarded,
    public_loss,
)
from wloss_jax.means import WeightedMean


@public_loss
def poisson_nll(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    log_input: bool = True,
    full: bool = False,
    eps: Option = 1e-8,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the negative log-likelihood of counts under a Poisson distribution.

    ``exp(p) - t * p``, or ``p - t * log(p + eps)`` for a ``p`` that is not a logarithm

    Args:
      predictions: floating ``[...]``, the logarithm of the rate, or the rate itself.
      targets: numeric, of the shape of ``predictions``: counts.
      log_input: whether ``predictions`` are logarithms.
      full: whether to add Stirling's approximation of ``log(t!)`` where t is above 1.
      eps: keeps the logarithm of a rate of 0 finite; unused with ``log_input``.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.poisson_nll(jnp.zeros(2), jnp.array([3, -1]), lengths=1)
      WeightedMean(mean=1.0, weight=1.0)

    Source:
      Options and their defaults as in ``torch.nn.PoissonNLLLoss``.
    """
    check_flag("log_input", log_input)
    check_flag("full", full)
    check_number("eps", eps, 0)
    return guarded(_poisson_nll)(
        predictions, targets, log_input=log_input, full=full, eps=eps, **reduction
    )


def _poisson_nll(
    predictions: jax.Array,
    targets: jax.Array,
    *,
    log_input: bool,
    full: bool,
    eps: Option,
) -> jax.Array:
    if log_input:
        loss = jnp.exp(predictions) - targets * predictions
    else:
        loss = predictions - targets * jnp.log(predictions + eps)
    if full:
        t = jnp.where(targets > 1, targets, 1).astype(loss.dtype)
        stirling = t * jnp.log(t) - t + 0.5 * jnp.log(2 * jnp.pi * t)
        loss = loss + jnp.where(targets > 1, stirling, 0)
    return loss


@public_loss
def gaussian_nll(
    predictions: ArrayLike,
    targets: ArrayLike,
    variances: ArrayLike,
    *,
    full: bool = False,
    eps: Option = 1e-6,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the negative log-likelihood under a Gaussian of predicted variance.

    ``0.5 * (log(v) + (prediction - target)**2 / v)`` with ``v = max(variance, eps)``

    The floor under the variance does not stop its gradient.

    Args:
      predictions: floating ``[...]``, the means.
      targets: numeric, of the shape of ``predictions``.
      variances: floating, of the shape of ``predictions``, in squared units of them.
      full: whether to add the constant ``0.5 * log(2 * pi)``.
      eps: the floor under the variance.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.gaussian_nll(jnp.zeros(2), jnp.array([2.0, 9.0]), jnp.ones(2), lengths=1)
      WeightedMean(mean=2.0, weight=1.0)

    Source:
      Nix and Weigend, Estimating the mean and variance of the target probability
      distribution, 1994; options and defaults as in ``torch.nn.GaussianNLLLoss``.
    """
    check_flag("full", full)
    check_number("eps", eps, 0)
    return guarded(_gaussian_nll)(
        predictions, targets, variances, full=full, eps=eps, **reduction
    )


def _gaussian_nll(
    predictions: jax.Array,
    targets: jax.Array,
    variances: jax.Array,
    *,
    full: bool,
    eps: Option,
) -> jax.Array:
    passed = variances - jax.lax.stop_gradient(variances)  # 0, with a gradient of 1
    variances = jnp.where(variances < eps, eps + passed, variances)
    loss = 0.5 * (jnp.log(variances) + (predictions - targets) ** 2 / variances)
    return loss + 0.5 * math.log(2 * math.pi) if full else loss
