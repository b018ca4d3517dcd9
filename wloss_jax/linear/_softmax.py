"""The losses of logits that this package brings: those of a softmax over classes.

Each has a slope of its own, which is faster than JAX's and knows of a vocabulary that
is sharded over devices.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from wloss_jax.linear._classes import (
    add_to_label,
    entropy_of,
    is_first_of_largest,
    log_probs_of,
    log_sum_exp,
    mean_of_classes,
    score_of_label,
)
from wloss_jax.linear._logits import Arrays, Place
from wloss_jax.losses._classes import constant_where_out, finite_score
from wloss_jax.losses._labels import nan_unless_class


@dataclasses.dataclass(frozen=True)
class Softmax:
    """What these losses share: the classes that are in, and how logits are bounded.

    Attributes:
      fixed: the names and values of numeric options that are compiled in.
      traced: the names of those that come as the first of the ``shared`` arrays.
      class_mask: where the mask of the classes is, if there is one: the last of the
        ``shared`` arrays, or of the ``arrays`` of the tokens.
    """

    fixed: tuple[tuple[str, float], ...] = ()
    traced: tuple[str, ...] = ()
    class_mask: str | None = None

    has_slope = True

    def option(self, name: str, shared: Arrays) -> jax.Array | float | None:
        """The value of a numeric option; None if it was not given."""
        if name in self.traced:
            option: jax.Array = shared[self.traced.index(name)]
            return option
        return dict(self.fixed).get(name)

    def is_given(self, name: str) -> bool:
        """Whether a numeric option was given."""
        return name in self.traced or name in dict(self.fixed)

    def bounded(self, logits: jax.Array, arrays: Arrays, shared: Arrays) -> jax.Array:
        """Logits after the soft cap, over the temperature; -infinity is out."""
        softcap = self.option("softcap", shared)
        temperature = self.option("temperature", shared)
        if softcap is not None or temperature is not None:
            # Of infinity over an option, the derivative by that would be NaN.
            is_out = logits == -jnp.inf
            logits = jnp.where(is_out, 0, logits)
            if softcap is not None:
                logits = softcap * jnp.tanh(logits / softcap)
            if temperature is not None:
                logits = logits / temperature
            logits = jnp.where(is_out, -jnp.inf, logits)
        if self.class_mask is not None:
            mask = (shared if self.class_mask == "shared" else arrays)[-1]
            logits = jnp.where(jnp.broadcast_to(mask, logits.shape), logits, -jnp.inf)
        return logits

    def by_logits(
        self, slope: jax.Array, bounded: jax.Array, shared: Arrays
    ) -> jax.Array:
        """The slope by the logits as they came, from that by the bounded ones."""
        softcap = self.option("softcap", shared)
        temperature = self.option("temperature", shared)
        if softcap is not None:
            capped = bounded if temperature is None else bounded * temperature
            # The derivative of tanh is 1 less its square.
            within = 1 - (capped / softcap) ** 2
            slope = slope * jnp.where(bounded == -jnp.inf, 0, within)
        if temperature is not None:
            slope = slope / temperature
        return slope


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Softmax):
    """The cross-entropy of integer labels, ``arrays[0]``.

    Its residuals are the two parts of the log-sum-exp, with smoothing the number of
    classes that are in, and with ``has_aux`` whether the prediction is correct and the
    entropy.
    """

    has_aux: bool = False

    num_outputs = 1

    @property
    def num_residuals(self) -> int:
        """The two parts of the log-sum-exp, and what comes with options."""
        return 2 + self.is_given("label_smoothing") + 2 * self.has_aux

    def values(
        self, logits: jax.Array, arrays: Arrays, shared: Arrays, place: Place
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The loss; the residuals above."""
        smoothing = self.option("label_smoothing", shared)
        z_loss = self.option("z_loss", shared)
        logits = self.bounded(logits, arrays, shared)
        top, log_sum = log_sum_exp(logits, place)
        score = score_of_label(logits, arrays[0], place) - top
        target, residuals = finite_score(score), [top, log_sum]
        if smoothing is not None:
            count, mean = mean_of_classes(logits, top, place)
            target = (1 - smoothing) * target + smoothing * mean
            residuals.append(count)
        # A label that is out costs infinity, and has no slope by any option.
        loss = jnp.where(score == -jnp.inf, jnp.inf, log_sum - target)
        if z_loss is not None:
            loss += z_loss * (top + log_sum) ** 2
        if self.has_aux:
            residuals += [
                is_first_of_largest(logits, arrays[0], place),
                entropy_of(logits, top, log_sum, place),
            ]
        return [loss], residuals

    def slope(
        self,
        logits: jax.Array,
        arrays: Arrays,
        shared: Arrays,
        residuals: Arrays,
        weights: Arrays,
        place: Place,
    ) -> jax.Array:
        """Softmax minus the label, with its smoothing."""
        smoothing = self.option("label_smoothing", shared)
        z_loss = self.option("z_loss", shared)
        logits = self.bounded(logits, arrays, shared)
        # The log-sum-exp was kept, two numbers a token, so that only exponentials are
        # made again. A label out of range makes NaN of all of its token's slope.
        top, log_sum = residuals[:2]
        of_label = weights[0] * nan_unless_class(arrays[0], place.num_classes(logits))
        slope = jnp.exp(log_probs_of(logits, top, log_sum))
        if z_loss is not None:
            slope *= 1 + 2 * z_loss * (top + log_sum)[:, None]
        if smoothing is not None:
            slope -= smoothing / residuals[2][:, None]
        slope *= of_label[:, None]
        slope = jnp.where(logits == -jnp.inf, 0, slope)
        if smoothing is not None:
            of_label = (1 - smoothing) * of_label
        slope = add_to_label(slope, -of_label, logits, arrays[0], place)
        return self.by_logits(slope, logits, shared)


@dataclasses.dataclass(frozen=True)
class SoftCrossEntropy(Softmax):
    """The cross-entropy of class probabilities, ``arrays[0]`` of ``[n, V]``.

    Its residuals are the two parts of the log-sum-exp, the sum of the probabilities,
    and with smoothing the number of classes that are in.
    """

    num_outputs = 1

    @property
    def num_residuals(self) -> int:
        """Those of the log-sum-exp, the sum of the labels, the number of classes."""
        return 3 + self.is_given("label_smoothing")

    def values(
        self, logits: jax.Array, arrays: Arrays, shared: Arrays, place: Place
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The loss; the residuals above."""
        smoothing = self.option("label_smoothing", shared)
        z_loss = self.option("z_loss", shared)
        logits = self.bounded(logits, arrays, shared)
        labels = constant_where_out(arrays[0].astype(logits.dtype), logits)
        top, log_sum = log_sum_exp(logits, place)
        # 0 log 0 is 0; a class that is out, of a probability above 0, costs infinity.
        gone = (logits == -jnp.inf) & (labels == 0)
        scores = labels * jnp.where(gone, 0, logits - top[:, None])
        score = place.add(scores.sum(axis=-1))
        mass = place.add(labels.sum(axis=-1))
        target, residuals = finite_score(score), [top, log_sum, mass]
        if smoothing is not None:
            count, mean = mean_of_classes(logits, top, place)
            target = (1 - smoothing) * target + smoothing * mean
            mass = (1 - smoothing) * mass + smoothing
            residuals.append(count)
        loss = jnp.where(score == -jnp.inf, jnp.inf, mass * log_sum - target)
        if z_loss is not None:
            loss += z_loss * (top + log_sum) ** 2
        return [loss], residuals

    def slope(
        self,
        logits: jax.Array,
        arrays: Arrays,
        shared: Arrays,
        residuals: Arrays,
        weights: Arrays,
        place: Place,
    ) -> jax.Array:
        """Softmax, times the sum of the labels, minus these."""
        smoothing = self.option("label_smoothing", shared)
        z_loss = self.option("z_loss", shared)
        logits = self.bounded(logits, arrays, shared)
        labels = arrays[0].astype(logits.dtype)
        top, log_sum, mass = residuals[:3]
        if smoothing is not None:
            labels = (1 - smoothing) * labels + smoothing / residuals[3][:, None]
            mass = (1 - smoothing) * mass + smoothing
        factor = mass if z_loss is None else mass + 2 * z_loss * (top + log_sum)
        log_probs = log_probs_of(logits, top, log_sum)
        slope = jnp.exp(log_probs) * factor[:, None] - labels
        slope = jnp.where(logits == -jnp.inf, 0, slope * weights[0][:, None])
        return self.by_logits(slope, logits, shared)


@dataclasses.dataclass(frozen=True)
class LogProbs(Softmax):
    """The log-probability of integer labels, ``arrays[0]``, and the entropy.

    Its residuals are the two parts of the log-sum-exp, and the entropy if that is an
    output too.
    """

    with_entropy: bool = False

    @property
    def num_outputs(self) -> int:
        """The log-probability, and the entropy if it is asked for."""
        return 1 + self.with_entropy

    @property
    def num_residuals(self) -> int:
        """The two parts of the log-sum-exp, and the entropy if it is asked for."""
        return 2 + self.with_entropy

    def values(
        self, logits: jax.Array, arrays: Arrays, shared: Arrays, place: Place
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """The outputs; the residuals above."""
        logits = self.bounded(logits, arrays, shared)
        top, log_sum = log_sum_exp(logits, place)
        score = score_of_label(logits, arrays[0], place) - top
        # Chosen rather than computed: a label that is out has no derivative.
        log_prob = jnp.where(score == -jnp.inf, -jnp.inf, score - log_sum)
        if not self.with_entropy:
            return [log_prob], [top, log_sum]
        entropy = entropy_of(logits, top, log_sum, place)
        return [log_prob, entropy], [top, log_sum, entropy]

    def slope(
        self,
        logits: jax.Array,
        arrays: Arrays,
        shared: Arrays,
        residuals: Arrays,
        weights: Arrays,
        place: Place,
    ) -> jax.Array:
        """The label minus the softmax; of the entropy ``-p (log p + H)``."""
        logits = self.bounded(logits, arrays, shared)
        of_label = weights[0] * nan_unless_class(arrays[0], place.num_classes(logits))
        log_probs = log_probs_of(logits, *residuals[:2])
        factor = of_label[:, None]
        if self.with_entropy:
            entropy, of_entropy = residuals[2], weights[1]
            factor += of_entropy[:, None] * (log_probs + entropy[:, None])
        slope = jnp.where(logits == -jnp.inf, 0, -jnp.exp(log_probs) * factor)
        slope = add_to_label(slope, of_label, logits, arrays[0], place)
        return self.by_logits(slope, logits, shared)
