"""`masked`, which makes any elementwise loss safe to mask, and the named losses.

A loss here is an elementwise loss, optax's wherever it has one, between two guards:
what stands at a masked position is made harmless *before* the loss sees it, and the
loss there is dropped *after*. The second alone lets NaN into the gradient, for 0 times
NaN is NaN. bfloat16 and float16 are computed in float32.

Every loss takes the keywords of `weighted_mean` (``where``, ``lengths``, ``weights``,
``segment_ids``, ``num_segments``), raises its errors, and reduces all that it is given
to one `WeightedMean`; `jax.vmap` or `per_sample` keeps the batch axis. Losses are
compiled, their options static: pass options as Python numbers.

Every loss of `optax.losses` that has a value for each element or example stands here
under its name and with its options. ``where`` is here about elements, never about the
classes of one element. Left out are:

* losses of a set, which have no value for an element: `ntxent`,
  `ranking_softmax_loss` (see rax, which masks), and the dice losses, quotients of sums
  over a picture;
* `make_fenchel_young_loss`, which makes losses: give what it makes to `masked`;
* `cosine_similarity` and `smooth_labels`, which are not losses;
* `ctc_loss_with_forward_probs`, for its other outputs, and names that optax deprecates.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, TypeVar, Unpack

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from wloss_jax.masks import (
    check_array,
    check_axis,
    check_count,
    check_flag,
    check_function,
    check_label,
    check_number,
    describe,
    expand_leading,
    freeze,
    is_label,
    make_safe,
    valid_mask,
)
from wloss_jax.weighted_mean import WeightedMean, jit_compiled, vary, weighted_mean

_Loss = TypeVar("_Loss", bound=Callable[..., WeightedMean])
Axis = int | tuple[int, ...] | None


class Reduction(TypedDict, total=False):
    """The keywords that every loss shares; `weighted_mean` says what they mean."""

    where: ArrayLike | None
    lengths: ArrayLike | None
    weights: ArrayLike | None
    segment_ids: ArrayLike | None
    num_segments: int | None


_SHARED = tuple(Reduction.__annotations__)


def masked(
    loss_fn: Callable[..., jax.Array], *, event_ndim: int = 0
) -> Callable[..., WeightedMean]:
    """Gives an elementwise loss the keywords of `weighted_mean`.

    ``masked(f)(x, y, **keywords) = weighted_mean(f(x, y), **keywords)``, NaN-safe

    What a masked position holds changes neither the value nor any gradient, and the
    gradient there is exactly 0, even where ``f`` has none.

    Args:
      loss_fn: arrays, positional and of one shape, to the loss of each element. Keyword
        arguments go to it untouched, except those of `weighted_mean`.
      event_ndim: trailing axes of the first array that ``loss_fn`` consumes: 1 for
        class logits ``[B, L, V]``, whose loss is ``[B, L]``. Further arrays may lack
        all or the last of them, as integer labels ``[B, L]`` do.

    Returns:
      A function of the same arrays that returns a `WeightedMean`.

    Raises:
      AssertionError: when called with a first array that is not floating, arrays whose
        shapes differ (nothing is broadcast), or a ``loss_fn`` whose result is not one
        floating value for each element; and what `weighted_mean` raises.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> relative_error = wl.masked(lambda x, y: jnp.abs(x - y) / y)
      >>> x, y = jnp.array([1.0, 3.0, jnp.nan]), jnp.array([2.0, 2.0, 0.0])
      >>> relative_error(x, y, where=y > 0)
      WeightedMean(mean=0.5, weight=2.0)
    """
    check_function("loss_fn", loss_fn)
    check_count("event_ndim", event_ndim)
    return _masked(loss_fn, event_ndim, of_user=True, hides_nan=True)


def _masked(
    loss_fn: Callable[..., jax.Array],
    event_ndim: int = 0,
    *,
    of_user: bool = False,
    hides_nan: bool = False,
) -> Callable[..., WeightedMean]:
    """`masked`, and what is cheaper for the losses of this package.

    Args:
      loss_fn: as in `masked`.
      event_ndim: as in `masked`.
      of_user: whether ``loss_fn`` may close over arrays. Their gradient adds up over
        all positions, so no NaN may arise at any: inputs are made safe. Else masked
        positions are frozen, and what arises there is dropped: on CPU `make_safe` costs
        a third to a half more in the losses of classes (XLA fuses no select into sums).
      hides_nan: whether ``loss_fn`` may have a derivative where it is NaN, as
        `jnp.maximum` has, 0. Where not, looking for NaN costs up to a half for nothing.
    """
    names = _array_names(loss_fn)

    @functools.wraps(loss_fn)
    def masked_loss(*arrays: ArrayLike, **keywords: Any) -> WeightedMean:
        reduction = {k: v for k, v in keywords.items() if k in _SHARED}
        options = {k: v for k, v in keywords.items() if k not in _SHARED}
        data = _check_data(_name_all(names, arrays), arrays, event_ndim)
        shape = data[0].shape[: data[0].ndim - event_ndim]
        mask = valid_mask(shape, **_without_weights(reduction))
        if mask is not None:
            data = [
                make_safe(array, mask, i) if of_user else freeze(array, mask)
                for i, array in enumerate(data)
            ]
        values = loss_fn(*map(_at_least_float32, data), **options)
        values = check_array("loss_fn(...)", values, float)
        chex.assert_shape(
            values,
            shape,
            custom_message=f"`loss_fn` must return one value for each element. With "
            f"event_ndim={event_ndim} the elements are {shape}.",
        )
        if hides_nan:
            values *= nan_unless(~jnp.isnan(values)).astype(values.dtype)
        return weighted_mean(values, **reduction)

    return masked_loss


def per_sample(loss: Callable[..., WeightedMean]) -> Callable[..., WeightedMean]:
    """Vmaps a loss: axis 0 of the data is the batch, and stays.

    ``per_sample(f)(x, y, lengths=n)[b] = f(x[b], y[b], lengths=n[b])``

    Mapped are the arrays and ``where``, ``lengths``, ``weights``, ``segment_ids``;
    shared by all samples are the options, ``class_weights``, ``kernel`` and ``bias``.

    Args:
      loss: a loss of this package, or any function with such arguments.

    Returns:
      A function of the same arguments that returns a `WeightedMean` of ``[B]``.

    Raises:
      AssertionError: the mapped arguments have no axis 0, or not all the same.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> x = jnp.array([[1.0, 2.0, 3.0], [5.0, 0.0, 0.0]])
      >>> lengths = jnp.array([3, 1])
      >>> wl.per_sample(wl.absolute_error)(x, jnp.zeros((2, 3)), lengths=lengths)
      WeightedMean(mean=[2. 5.], weight=[3. 1.])
    """
    check_function("loss", loss)
    names = _array_names(loss)

    @functools.wraps(loss)
    def per_sample_loss(*arrays: ArrayLike, **keywords: Any) -> WeightedMean:
        positional = dict(zip(_name_all(names, arrays), arrays, strict=True))
        mapped = {
            name: check_array(name, value)
            for name, value in (positional | keywords).items()
            if name in positional or name in names or name in _MAPPED
            if name not in _UNMAPPED and value is not None
        }
        sizes = {name: array.shape[:1] for name, array in mapped.items()}
        chex.assert_equal(
            len(set(sizes.values())) == 1 and () not in sizes.values(),
            True,
            custom_message="axis 0 of each array is the batch, and must be there and "
            f"the same; got { ({k: v.shape for k, v in mapped.items()}) }.",
        )
        shared = {k: v for k, v in keywords.items() if k not in mapped}

        def sample_loss(sample: dict[str, jax.Array]) -> WeightedMean:
            data = [sample.get(name, array) for name, array in positional.items()]
            keyed = {k: v for k, v in sample.items() if k not in positional}
            return loss(*data, **keyed, **shared)

        return jax.vmap(sample_loss)(mapped)

    return per_sample_loss


_MAPPED = ("where", "lengths", "weights", "segment_ids")
_UNMAPPED = ("kernel", "bias", "class_weights")


def _array_names(loss: Callable[..., Any]) -> list[str]:
    """The names of the positional parameters: the arrays.

    One with a default is an option of the user's, unless the default is None, as that
    of the targets is in optax.
    """
    return [
        name
        for name, parameter in inspect.signature(loss).parameters.items()
        if parameter.kind
        in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if parameter.default is parameter.empty or parameter.default is None
    ]


def _name_all(names: list[str], arrays: tuple[ArrayLike, ...]) -> list[str]:
    """Names each of ``arrays``, those that a ``*args`` took by their number."""
    unnamed = [f"array {i}" for i in range(len(names), len(arrays))]
    return (names + unnamed)[: len(arrays)]


def _check_data(
    names: list[str], arrays: tuple[ArrayLike, ...], event_ndim: int
) -> list[jax.Array]:
    chex.assert_equal(
        bool(arrays), True, custom_message="a loss takes its arrays by position."
    )
    data = [
        check_array(name, array, None if i else float)
        for i, (name, array) in enumerate(zip(names, arrays, strict=True))
    ]
    first = data[0]
    chex.assert_rank(
        first,
        set(range(event_ndim, 33)),
        custom_message=f"`{names[0]}` has shape {first.shape}, but the loss consumes "
        f"{event_ndim} trailing axes of it.",
    )
    for name, array in zip(names[1:], data[1:], strict=True):
        fits = array.shape == first.shape[: array.ndim]
        chex.assert_equal(
            fits and first.ndim - event_ndim <= array.ndim,
            True,
            custom_message=f"`{name}` has shape {array.shape} and `{names[0]}` "
            f"{first.shape}: they must be the same"
            + (f", or lack the last {event_ndim}" if event_ndim else "")
            + ". Nothing is broadcast: index or reshape the one that is off.",
        )
    return data


def _without_weights(reduction: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that say which elements count; `weights` says how much."""
    return {name: value for name, value in reduction.items() if name != "weights"}


def _at_least_float32(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.promote_types(array.dtype, jnp.float32))
    return array


def _public(loss: _Loss) -> _Loss:
    """Compiles a loss, its options static, and spells out the shared keywords."""
    signature = inspect.signature(loss)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in _SHARED
    ]
    loss.__signature__ = signature.replace(parameters=own + shared)  # type: ignore[attr-defined]
    options = [p.name for p in own if p.kind is p.KEYWORD_ONLY]
    static = [name for name in options if name != "class_weights"]
    return jit_compiled("num_segments", *static)(loss)


# --------------------------------------------------------------------- regression


@_public
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
    return _masked(_absolute_error)(predictions, targets, **reduction)


def _absolute_error(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    errors = predictions - targets
    # The derivative of `jnp.abs` at 0 is 1; of this it is 0.
    return errors * jax.lax.stop_gradient(jnp.sign(errors))


@_public
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
    return _masked(optax.losses.squared_error)(predictions, targets, **reduction)


@_public
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
    return _masked(optax.losses.l2_loss)(predictions, targets, **reduction)


@_public
def huber_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    delta: float = 1.0,
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
    check_number("delta", delta, 0)
    return _masked(optax.losses.huber_loss)(
        predictions, targets, delta=delta, **reduction
    )


@_public
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
    return _masked(_log_cosh)(predictions, targets, **reduction)


def _log_cosh(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    size = _smooth_abs(predictions - targets)
    return size + jnp.log1p(jnp.exp(-2 * size)) - math.log(2)


def _smooth_abs(x: jax.Array) -> jax.Array:
    """The absolute value, for smooth functions of it: at 0 too its derivative is 1.

    With ``exp(-_smooth_abs(x))`` for both, a function and its derivative take one
    exponential: optax's forms of these losses take two to seven times the time.
    """
    return jnp.where(x >= 0, x, -x)


@_public
def quantile_loss(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    quantile: float = 0.5,
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
    return _masked(_quantile_loss, hides_nan=True)(
        predictions, targets, quantile=quantile, **reduction
    )


def _quantile_loss(
    predictions: jax.Array, targets: jax.Array, *, quantile: float
) -> jax.Array:
    errors = targets - predictions
    slope = jnp.where(errors > 0, quantile, quantile - 1) * (errors != 0)
    return errors * jax.lax.stop_gradient(slope)


@_public
def cosine_distance(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    epsilon: float = 0.0,
    axis: Axis = -1,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes one minus the cosine of the angle between two vectors.

    ``1 - sum_i p_i t_i / (|p| |t|)``

    Args:
      predictions: floating ``[..., D]``; one vector is one element.
      targets: floating, of the shape of ``predictions``.
      epsilon: floor under the squared norms, for vectors of zeros, which are NaN at 0.
      axis: the axis or axes of a vector; None for all.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> predictions = jnp.array([[1.0, 0.0], [jnp.nan, 0.0]])
      >>> targets = jnp.array([[0.0, 2.0], [1.0, 1.0]])
      >>> wl.cosine_distance(predictions, targets, where=jnp.array([True, False]))
      WeightedMean(mean=1.0, weight=1.0)

    Source:
      `optax.losses.cosine_distance`.
    """
    check_number("epsilon", epsilon, 0)
    return _masked(_cosine_distance, event_ndim=1)(
        *_event_last(axis, predictions=predictions, targets=targets),
        epsilon=epsilon,
        **reduction,
    )


def _cosine_distance(
    predictions: jax.Array, targets: jax.Array, *, epsilon: float
) -> jax.Array:
    def norm(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.maximum((x**2).sum(axis=-1), epsilon))

    # Two numbers are divided, not two vectors: a third of the time of optax's form.
    product = (predictions * targets).sum(axis=-1)
    return 1 - product / (norm(predictions) * norm(targets))


@_public
def poisson_nll(
    predictions: ArrayLike,
    targets: ArrayLike,
    *,
    log_input: bool = True,
    full: bool = False,
    eps: float = 1e-8,
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
    return _masked(_poisson_nll)(
        predictions, targets, log_input=log_input, full=full, eps=eps, **reduction
    )


def _poisson_nll(
    predictions: jax.Array,
    targets: jax.Array,
    *,
    log_input: bool,
    full: bool,
    eps: float,
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


@_public
def gaussian_nll(
    predictions: ArrayLike,
    targets: ArrayLike,
    variances: ArrayLike,
    *,
    full: bool = False,
    eps: float = 1e-6,
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
    return _masked(_gaussian_nll)(
        predictions, targets, variances, full=full, eps=eps, **reduction
    )


def _gaussian_nll(
    predictions: jax.Array,
    targets: jax.Array,
    variances: jax.Array,
    *,
    full: bool,
    eps: float,
) -> jax.Array:
    passed = variances - jax.lax.stop_gradient(variances)  # 0, with a gradient of 1
    variances = jnp.where(variances < eps, eps + passed, variances)
    loss = 0.5 * (jnp.log(variances) + (predictions - targets) ** 2 / variances)
    return loss + 0.5 * math.log(2 * math.pi) if full else loss


# ------------------------------------------------------------- binary classification


@_public
def sigmoid_binary_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the cross-entropy of yes-or-no labels.

    ``-y * log(sigmoid(x)) - (1 - y) * log(1 - sigmoid(x))``

    Args:
      logits: floating ``[...]``; several independent labels make several elements.
      labels: numeric, of the shape of ``logits``: 0 and 1, or probabilities.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> logits, labels = jnp.array([0.0, 3.0]), jnp.array([1, -1])
      >>> loss = wl.sigmoid_binary_cross_entropy(logits, labels, where=labels >= 0)
      >>> print(f"{loss.compute():.4f}")
      0.6931

    Source:
      `optax.losses.sigmoid_binary_cross_entropy`.
    """
    return _masked(_sigmoid_binary_cross_entropy)(logits, labels, **reduction)


def _sigmoid_binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    positive_part = jnp.where(logits >= 0, logits, 0)
    log_normalizer = jnp.log1p(jnp.exp(-_smooth_abs(logits)))
    return positive_part - logits * labels + log_normalizer


@_public
def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: float | None = None,
    gamma: float = 2.0,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the focal loss: cross-entropy that looks away from easy examples.

    ``(1 - p_t)**gamma * cross_entropy``, times ``alpha`` for label 1 and ``1 - alpha``
    for label 0 where ``alpha`` is given

    ``alpha`` scales the loss and is in no denominator; to average by class weight, use
    ``weights``.

    Args:
      logits: floating ``[...]``.
      labels: numeric, of the shape of ``logits``: 0 and 1, or probabilities.
      alpha: the factor of label 1, between 0 and 1, or None.
      gamma: how far to look away.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> loss = wl.sigmoid_focal_loss(jnp.zeros(2), jnp.array([1, 0]))
      >>> print(f"{loss.compute():.4f}")
      0.1733

    Source:
      `optax.losses.sigmoid_focal_loss`; Lin et al., Focal Loss for Dense Object
      Detection, 2017.
    """
    if alpha is not None:
        check_number("alpha", alpha, 0, 1)
    check_number("gamma", gamma, 0)
    return _masked(_sigmoid_focal_loss)(
        logits, labels, alpha=alpha, gamma=gamma, **reduction
    )


def _sigmoid_focal_loss(
    logits: jax.Array, labels: jax.Array, *, alpha: float | None, gamma: float
) -> jax.Array:
    labels = labels.astype(logits.dtype)
    odds = jnp.exp(-_smooth_abs(logits))
    likely = 1 / (1 + odds)
    unlikely = odds * likely
    positive = jnp.where(logits >= 0, likely, unlikely)
    negative = jnp.where(logits >= 0, unlikely, likely)
    missed = (1 - labels) * positive + labels * negative
    # A power below 1 has no derivative at 0, and one below 2 no second derivative.
    smallest = jnp.finfo(missed.dtype).tiny
    missed = jnp.where(missed > smallest, missed, smallest)
    loss = _sigmoid_binary_cross_entropy(logits, labels) * missed**gamma
    if alpha is not None:
        loss *= alpha * labels + (1 - alpha) * (1 - labels)
    return loss


@_public
def hinge_loss(
    predictor_outputs: ArrayLike, targets: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the hinge loss of binary classification.

    ``max(0, 1 - x * y)``

    Args:
      predictor_outputs: floating ``[...]``, scores.
      targets: numeric, of the same shape: -1 and 1.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.hinge_loss(jnp.array([0.5, 2.0]), jnp.array([-1, 1]))
      WeightedMean(mean=0.75, weight=2.0)

    Source:
      `optax.losses.hinge_loss`.
    """
    return _masked(optax.losses.hinge_loss, hides_nan=True)(
        predictor_outputs, targets, **reduction
    )


@_public
def perceptron_loss(
    predictor_outputs: ArrayLike, targets: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the perceptron loss of binary classification.

    ``max(0, -x * y)``

    Args:
      predictor_outputs: floating ``[...]``, scores.
      targets: numeric, of the same shape: -1 and 1.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.perceptron_loss(jnp.array([0.5, 2.0]), jnp.array([-1, 1]))
      WeightedMean(mean=0.25, weight=2.0)

    Source:
      `optax.losses.perceptron_loss`.
    """
    return _masked(optax.losses.perceptron_loss, hides_nan=True)(
        predictor_outputs, targets, **reduction
    )


@_public
def sparsemax_loss(
    logits: ArrayLike, labels: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the binary sparsemax loss, which is 0 from a margin on.

    ``sparse_plus(-x)`` for label 1, ``sparse_plus(x)`` for label 0

    Args:
      logits: floating ``[...]``.
      labels: integer or bool, of the shape of ``logits``: 0 and 1. Another at a
        position that counts gives NaN.
      **reduction: the keywords of `weighted_mean`.

    Raises:
      AssertionError: floating ``labels``.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.sparsemax_loss(jnp.array([0.0, 2.0]), jnp.array([1, 1]))
      WeightedMean(mean=0.125, weight=2.0)

    Source:
      `optax.losses.sparsemax_loss`; Blondel et al., Learning with Fenchel-Young
      Losses, 2020.
    """
    labels = check_array("labels", labels)
    chex.assert_equal(
        jnp.issubdtype(labels.dtype, jnp.floating),
        False,
        custom_message=f"`labels` must be integer or bool; got {describe(labels)}.",
    )
    return _masked(_sparsemax_loss)(logits, labels, **reduction)


def _sparsemax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    values: jax.Array = optax.losses.sparsemax_loss(logits, labels)
    return values * nan_unless_class(labels, 2)


# ---------------------------------------------------------- multiclass classification


@_public
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: Axis = -1,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the cross-entropy of labels that are distributions over the classes.

    ``-sum_v y_v * log_softmax(x)_v``

    Args:
      logits: floating ``[..., V]``; one distribution is one element.
      labels: numeric, of the shape of ``logits``: one-hot, or probabilities.
      axis: the axis or axes of the classes; None for all.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> labels = jnp.array([[0.5, 0.5], [jnp.nan, jnp.nan]])
      >>> loss = wl.softmax_cross_entropy(jnp.zeros((2, 2)), labels, lengths=1)
      >>> print(f"{loss.compute():.4f}")
      0.6931

    Source:
      `optax.losses.softmax_cross_entropy`.
    """
    logits, labels = _event_last(axis, logits=logits, labels=labels)
    return _masked(optax.losses.softmax_cross_entropy, event_ndim=1, hides_nan=True)(
        logits, labels, **reduction
    )


@_public
def safe_softmax_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes `softmax_cross_entropy` where classes may have a logit of -infinity.

    ``-sum_v y_v * log_softmax(x)_v`` with ``0 * log(0) = 0``

    Args:
      logits: floating ``[..., V]``; one distribution is one element.
      labels: numeric, of the shape of ``logits``: one-hot, or probabilities.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> logits = jnp.array([[0.0, 0.0, -jnp.inf]])
      >>> labels = jnp.array([[0.5, 0.5, 0.0]])
      >>> print(f"{wl.safe_softmax_cross_entropy(logits, labels).compute():.4f}")
      0.6931

    Source:
      `optax.losses.safe_softmax_cross_entropy`.
    """
    logits, labels = _event_last(-1, logits=logits, labels=labels)
    return _masked(
        optax.losses.safe_softmax_cross_entropy, event_ndim=1, hides_nan=True
    )(logits, labels, **reduction)


@_public
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    axis: int | tuple[int, ...] = -1,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weights: ArrayLike | None = None,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the cross-entropy of integer class labels.

    ``lse - (1 - s) * x_y - s * mean_v(x_v) + z_loss * lse**2`` with
    ``lse = logsumexp_v(x)`` and ``s = label_smoothing``

    All options share one denominator: the sum of the weights of the elements that
    count. A label out of range at a position that counts gives NaN; it never wraps.

    Args:
      logits: floating ``[..., V]``; one distribution is one element.
      labels: integer ``[...]``.
      axis: the axis or axes of the classes in ``logits``.
      ignore_index: a label that marks an element as masked, -100 say; None for none.
      label_smoothing: the share of the label that is spread evenly over all classes.
      z_loss: the factor of ``lse**2``, which keeps logits from drifting.
      class_weights: floating ``[V]``: an element's weight is that of its own class,
        times ``weights``. The whole element is weighted, its smoothing and z-loss too
        (PyTorch weighs smoothing by each class that it is spread over).
      **reduction: the keywords of `weighted_mean`.

    Raises:
      AssertionError: labels that are not integers of the shape of the elements (one-hot
        labels are for `softmax_cross_entropy`), ``class_weights`` that are not ``[V]``,
        a ``label_smoothing`` that is not between 0 and 1, or an ``ignore_index`` that
        is not an integer.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> logits, labels = jnp.zeros((3, 4)), jnp.array([0, 3, -100])
      >>> loss = wl.softmax_cross_entropy_with_integer_labels(
      ...     logits, labels, ignore_index=-100
      ... )
      >>> print(f"{loss.compute():.4f} over {loss.weight} labels")
      1.3863 over 2.0 labels

    Source:
      `optax.losses.softmax_cross_entropy_with_integer_labels`; smoothing: Szegedy et
      al., Rethinking the Inception Architecture, 2016; z-loss: Chowdhery et al., PaLM,
      2022.
    """
    (logits,) = _event_last(axis, logits=logits)
    labels = check_labels(labels, logits.shape[:-1])
    check_number("label_smoothing", label_smoothing, 0, 1)
    check_number("z_loss", z_loss)
    if ignore_index is not None:
        reduction["where"] = counted_labels(
            labels, ignore_index, reduction.get("where")
        )
    if class_weights is not None:
        reduction["weights"] = own_class_weights(
            logits, labels, class_weights, reduction.get("weights")
        )
    return _masked(_integer_cross_entropy, event_ndim=1)(
        logits,
        labels,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        **reduction,
    )


def _integer_cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float, z_loss: float
) -> jax.Array:
    lse = jax.nn.logsumexp(logits, axis=-1)
    target = _score_of_label(logits, labels)
    if label_smoothing:
        target += label_smoothing * (logits.mean(axis=-1) - target)
    # All of the loss, for the score of a label out of range may have no gradient.
    loss = (lse - target) * nan_unless_class(labels, logits.shape[-1])
    return loss + z_loss * lse**2 if z_loss else loss


def _score_of_label(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Picks ``scores[..., label]``.

    The gradient of a gather is a scatter into an array of its own: two copies of
    bfloat16 logits in temporaries on H100 and TPU (compiled for 8192 x 32768), where
    comparing with an iota fuses and needs none. On a CPU the gather is the faster.
    """
    score: jax.Array = jax.lax.platform_dependent(
        scores, labels, cpu=_gather_label, default=_compare_label
    )
    return score


def _gather_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    # Of a label out of range any score will do: it is masked, or the loss is made NaN.
    return jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]


def _compare_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    classes = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    return jnp.where(classes == labels[..., None], logits, 0).sum(axis=-1)


@_public
def poly_loss_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    epsilon: float = 2.0,
    axis: Axis = -1,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the Poly-1 loss: cross-entropy and a share of the missed probability.

    ``cross_entropy + epsilon * (1 - sum_v y_v * softmax(x)_v)``

    Args:
      logits: floating ``[..., V]``; one distribution is one element.
      labels: floating, of the shape of ``logits``: one-hot, or probabilities.
      epsilon: the coefficient of the first polynomial term.
      axis: the axis or axes of the classes; None for all.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> loss = wl.poly_loss_cross_entropy(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]))
      >>> print(f"{loss.compute():.4f}")
      1.6931

    Source:
      `optax.losses.poly_loss_cross_entropy`; Leng et al., PolyLoss, 2022.
    """
    check_number("epsilon", epsilon)
    logits, labels = _event_last(axis, logits=logits, labels=labels)
    return _masked(optax.losses.poly_loss_cross_entropy, event_ndim=1)(
        logits, check_array("labels", labels, float), epsilon=epsilon, **reduction
    )


@_public
def multiclass_hinge_loss(
    scores: ArrayLike, labels: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the multiclass hinge loss.

    ``max_v(x_v + 1 - [v = y]) - x_y``

    A label out of range at a position that counts gives NaN.

    Args:
      scores: floating ``[..., V]``.
      labels: integer ``[...]``.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.multiclass_hinge_loss(jnp.array([[0.0, 2.0]]), jnp.array([0]))
      WeightedMean(mean=3.0, weight=1.0)

    Source:
      `optax.losses.multiclass_hinge_loss`.
    """
    return _with_labels(_multiclass_hinge_loss, scores, labels, reduction)


def _multiclass_hinge_loss(scores: jax.Array, labels: jax.Array) -> jax.Array:
    classes = jax.lax.broadcasted_iota(labels.dtype, scores.shape, scores.ndim - 1)
    margins = scores + (classes != labels[..., None])
    return margins.max(axis=-1) - _score_of_label(scores, labels)


@_public
def multiclass_perceptron_loss(
    scores: ArrayLike, labels: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the multiclass perceptron loss.

    ``max_v(x_v) - x_y``

    A label out of range at a position that counts gives NaN.

    Args:
      scores: floating ``[..., V]``.
      labels: integer ``[...]``.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.multiclass_perceptron_loss(jnp.array([[0.0, 2.0]]), jnp.array([0]))
      WeightedMean(mean=2.0, weight=1.0)

    Source:
      `optax.losses.multiclass_perceptron_loss`; Collins, Discriminative training
      methods for Hidden Markov Models, 2002.
    """
    return _with_labels(_multiclass_perceptron_loss, scores, labels, reduction)


def _multiclass_perceptron_loss(scores: jax.Array, labels: jax.Array) -> jax.Array:
    return scores.max(axis=-1) - _score_of_label(scores, labels)


@_public
def multiclass_sparsemax_loss(
    scores: ArrayLike, labels: ArrayLike, **reduction: Unpack[Reduction]
) -> WeightedMean:
    """Computes the multiclass sparsemax loss.

    ``max_p(<p, x> + (1 - |p|**2) / 2) - x_y`` over distributions ``p``

    A label out of range at a position that counts gives NaN.

    Args:
      scores: floating ``[..., V]``.
      labels: integer ``[...]``.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.multiclass_sparsemax_loss(jnp.array([[0.0, 2.0]]), jnp.array([0]))
      WeightedMean(mean=2.0, weight=1.0)

    Source:
      `optax.losses.multiclass_sparsemax_loss`; Martins and Astudillo, From Softmax to
      Sparsemax, 2016.
    """

    def elementwise(scores: jax.Array, labels: jax.Array) -> jax.Array:
        # In x64, optax's projection makes float64 of float32, and of its gradient an
        # error: hence all of it in the default dtype.
        rows = scores.reshape(-1, scores.shape[-1]).astype(float)
        values: jax.Array = optax.losses.multiclass_sparsemax_loss(rows, labels.ravel())
        return values.reshape(labels.shape).astype(scores.dtype)

    return _with_labels(elementwise, scores, labels, reduction)


def _with_labels(
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array],
    scores: ArrayLike,
    labels: ArrayLike,
    reduction: Reduction,
) -> WeightedMean:
    (scores,) = _event_last(-1, scores=scores)
    labels = check_labels(labels, scores.shape[:-1])

    def elementwise(scores: jax.Array, labels: jax.Array) -> jax.Array:
        return loss_fn(scores, labels) * nan_unless_class(labels, scores.shape[-1])

    return _masked(elementwise, event_ndim=1, hides_nan=True)(
        scores, labels, **reduction
    )


def check_labels(labels: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Checks integer class labels against the shape of the elements."""
    mend = (
        f"`labels` must be integer classes of shape {shape}, one for each element; got "
        "{}. One-hot labels are for `softmax_cross_entropy`."
    )
    labels = check_array("labels", labels)
    came = describe(labels)
    chex.assert_type(labels, int, custom_message=mend.format(came))
    chex.assert_shape(labels, shape, custom_message=mend.format(came))
    return check_array("labels", labels, int)


def nan_unless_class(labels: jax.Array, num_classes: int) -> jax.Array:
    """Gives 1 for a label in range and NaN for one that is not, as a factor."""
    return nan_unless((labels >= 0) & (labels < num_classes))


@jit_compiled()  # or `jax_debug_nans` would take the constant for a mistake
def nan_unless(condition: jax.Array) -> jax.Array:
    """Gives 1 or NaN: a factor, so that the gradient is NaN too."""
    return jnp.where(condition, jnp.float32(1), jnp.float32(math.nan))


def counted_labels(
    labels: jax.Array, ignore_index: int, where: ArrayLike | None
) -> jax.Array:
    """Folds ``ignore_index`` into ``where``."""
    check_label("ignore_index", ignore_index)
    counts = ~is_label(labels, ignore_index)
    if where is None:
        return counts
    where = check_array("where", where, bool)
    return counts & expand_leading("where", where, labels.shape)


def own_class_weights(
    logits: jax.Array,
    labels: jax.Array,
    class_weights: ArrayLike,
    weights: ArrayLike | None,
) -> jax.Array:
    """Folds the weight of each element's own class into ``weights``."""
    class_weights = check_array("class_weights", class_weights, float)
    chex.assert_shape(
        class_weights,
        logits.shape[-1:],
        custom_message="`class_weights` must have one weight for each class.",
    )
    # A product of two weights is as precise as the sum that it goes into.
    dtype = jnp.result_type(class_weights, logits, jnp.float32)
    own = class_weights.astype(dtype).at[labels].get(mode="clip")
    if weights is None:
        return own
    weights = check_array("weights", weights, float)
    return own * expand_leading("weights", weights, labels.shape)


def _event_last(axis: Axis, **arrays: ArrayLike) -> list[jax.Array]:
    """Moves the axes of one event to the end of each array, as one axis."""
    check_axis("axis", axis)
    checked = {name: check_array(name, array) for name, array in arrays.items()}
    (first_name, first), *others = checked.items()
    for name, array in others:
        chex.assert_equal(
            array.shape,
            first.shape,
            custom_message=f"`{name}` and `{first_name}` must have the same shape.",
        )
    chex.assert_rank(
        first,
        set(range(1, 33)),
        custom_message=f"`{first_name}` needs an axis for the classes or components.",
    )
    event = tuple(range(first.ndim)) if axis is None else axis
    event = np.lib.array_utils.normalize_axis_tuple(event, first.ndim, argname="axis")
    size = math.prod(first.shape[i] for i in event)
    chex.assert_equal(
        size > 0,
        True,
        custom_message=f"`{first_name}` has shape {first.shape}: it needs at least one "
        "class or component.",
    )
    if axis == -1:
        return list(checked.values())
    batch = tuple(i for i in range(first.ndim) if i not in event)
    shape = (*(first.shape[i] for i in batch), size)
    return [array.transpose(batch + event).reshape(shape) for array in checked.values()]


# ------------------------------------------------------------------- distributions


@_public
def kl_divergence(
    log_predictions: ArrayLike,
    targets: ArrayLike,
    *,
    axis: Axis = -1,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the Kullback-Leibler divergence of a prediction from a target.

    ``sum_v t_v * (log(t_v) - log_p_v)`` with ``0 * log(0) = 0``

    Args:
      log_predictions: floating ``[..., D]``, logarithms of probabilities; one
        distribution is one element.
      targets: floating, of the same shape: probabilities.
      axis: the axis or axes of a distribution; None for all.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> log_predictions = jnp.log(jnp.array([[0.5, 0.5]]))
      >>> loss = wl.kl_divergence(log_predictions, jnp.array([[1.0, 0.0]]))
      >>> print(f"{loss.compute():.4f}")
      0.6931

    Source:
      `optax.losses.kl_divergence`.
    """
    return _masked(optax.losses.kl_divergence, event_ndim=1, hides_nan=True)(
        *_event_last(axis, log_predictions=log_predictions, targets=targets),
        **reduction,
    )


@_public
def kl_divergence_with_log_targets(
    log_predictions: ArrayLike,
    log_targets: ArrayLike,
    *,
    axis: Axis = -1,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes `kl_divergence` for targets that are logarithms too.

    ``sum_v exp(log_t_v) * (log_t_v - log_p_v)``

    Args:
      log_predictions: floating ``[..., D]``, logarithms of probabilities; one
        distribution is one element.
      log_targets: floating, of the same shape: logarithms of probabilities.
      axis: the axis or axes of a distribution; None for all.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> log_half = jnp.log(jnp.array([[0.5, 0.5]]))
      >>> wl.kl_divergence_with_log_targets(log_half, log_half)
      WeightedMean(mean=0.0, weight=1.0)

    Source:
      `optax.losses.kl_divergence_with_log_targets`.
    """
    return _masked(
        optax.losses.kl_divergence_with_log_targets, event_ndim=1, hides_nan=True
    )(
        *_event_last(axis, log_predictions=log_predictions, log_targets=log_targets),
        **reduction,
    )


@_public
def generalized_kl_divergence(
    log_predictions: ArrayLike,
    targets: ArrayLike,
    *,
    axis: Axis = -1,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the divergence of measures that need not sum to 1.

    ``sum_v t_v * (log(t_v) - log_p_v) + exp(log_p_v) - t_v``

    Args:
      log_predictions: floating ``[..., D]``, logarithms; one measure is one element.
      targets: floating, of the same shape.
      axis: the axis or axes of a measure; None for all.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> wl.generalized_kl_divergence(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]))
      WeightedMean(mean=1.0, weight=1.0)

    Source:
      `optax.losses.generalized_kl_divergence`.
    """
    return _masked(optax.losses.generalized_kl_divergence, event_ndim=1)(
        *_event_last(axis, log_predictions=log_predictions, targets=targets),
        **reduction,
    )


# ------------------------------------------------------------- embeddings, sequences


@_public
def triplet_margin_loss(
    anchors: ArrayLike,
    positives: ArrayLike,
    negatives: ArrayLike,
    *,
    axis: int = -1,
    norm_degree: float = 2,
    margin: float = 1.0,
    eps: float = 1e-6,
    **reduction: Unpack[Reduction],
) -> WeightedMean:
    """Computes the triplet loss: positives nearer to the anchor than negatives.

    ``max(d(anchor, positive) - d(anchor, negative) + margin, 0)`` with
    ``d(a, b) = (sum_i (a_i - b_i)**n + eps)**(1/n)``

    Args:
      anchors: floating ``[..., D]``; one triplet is one element.
      positives: floating, of the same shape.
      negatives: floating, of the same shape.
      axis: the axis of an embedding.
      norm_degree: n, even.
      margin: by how much nearer.
      eps: keeps the gradient of a distance of 0 finite.
      **reduction: the keywords of `weighted_mean`.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> anchor, positive = jnp.zeros((1, 2)), jnp.zeros((1, 2))
      >>> loss = wl.triplet_margin_loss(anchor, positive, jnp.array([[0.0, 0.4]]))
      >>> print(f"{loss.compute():.2f}")
      0.60

    Source:
      `optax.losses.triplet_margin_loss`; Balntas et al., Learning shallow
      convolutional feature descriptors with triplet losses, 2016.
    """
    check_number("norm_degree", norm_degree, 1)
    check_number("margin", margin)
    check_number("eps", eps, 0)
    arrays = _event_last(
        axis, anchors=anchors, positives=positives, negatives=negatives
    )
    return _masked(optax.losses.triplet_margin_loss, event_ndim=1, hides_nan=True)(
        *arrays, norm_degree=norm_degree, margin=margin, eps=eps, **reduction
    )


@_public
def ctc_loss(
    logits: ArrayLike,
    logit_paddings: ArrayLike,
    labels: ArrayLike,
    label_paddings: ArrayLike,
    *,
    blank_id: int = 0,
    log_epsilon: float = -1e5,
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
    chex.assert_rank(
        arrays["logits"],
        set(range(2, 33)),
        custom_message="`logits` needs an axis for the frames and one for the classes.",
    )
    *batch_axes, frame_count, num_classes = arrays["logits"].shape
    chex.assert_equal(
        frame_count > 0,
        True,
        custom_message=f"`logits` of shape {arrays['logits'].shape} has no frames: pad "
        "to at least one.",
    )
    check_number("log_epsilon", log_epsilon, high=0)
    check_count("blank_id", blank_id)
    chex.assert_equal(
        blank_id < num_classes,
        True,
        custom_message=f"`blank_id` is {blank_id}, of {num_classes} classes.",
    )
    batch, time, length = tuple(batch_axes), (frame_count,), arrays["labels"].shape[-1:]
    for name, event in (
        ("logit_paddings", time),
        ("labels", length),
        ("label_paddings", length),
    ):
        chex.assert_shape(
            arrays[name],
            batch + event,
            custom_message=f"`{name}` does not fit logits of shape "
            f"{arrays['logits'].shape}.",
        )
    if not all(length):  # optax wants a label, which may be padding
        arrays["labels"] = jnp.zeros((*batch, 1), jnp.int32)
        arrays["label_paddings"] = jnp.ones((*batch, 1), jnp.int32)
    mask = valid_mask(batch, **_without_weights(reduction))
    if mask is not None:
        arrays = {name: make_safe(array, mask) for name, array in arrays.items()}
    frames, symbols = arrays["logit_paddings"] < 1, arrays["label_paddings"] < 1
    labels = arrays["labels"]
    visible_nan = jnp.where(symbols, nan_unless_class(labels, num_classes), 1)
    logits = make_safe(_at_least_float32(arrays["logits"]), frames)
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
    return weighted_mean(values, **reduction)


def _rows(array: jax.Array, event_ndim: int) -> jax.Array:
    """Flattens the batch axes to one."""
    return array.reshape(-1, *array.shape[array.ndim - event_ndim :])
