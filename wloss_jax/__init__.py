"""Masked, weighted losses whose mean and gradient do not depend on how data is split.

From ragged samples to the gradient step, each line with the module that it lives in::

    padded, lengths = wl.pad_ragged(samples, buckets=(128, 256))       # padding
    where = wl.observed_mask(targets)                                  # masks
    prediction = wl.select_head((first, second), head)                 # heads
    m = wl.absolute_error(prediction, targets, lengths=n, where=where) # losses
    m = per_sample.reweight(wl.size_power(0.5)).merge()                # weighting
    loss = (m + another).compute()                                     # means
    m = wl.linear_softmax_cross_entropy(features, kernel, labels)      # linear
    m, grads = wl.value_and_grad(loss_fn, num_microbatches=8)(params, b)   # gradients
    optimizer = wl.multi_steps(optax.adamw(1e-3), every_k=8)           # _multi_steps
    running = running.update(m)                                        # running_mean
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from wloss_jax import testing
from wloss_jax._multi_steps import multi_steps
from wloss_jax.gradients import value_and_grad
from wloss_jax.heads import select_head
from wloss_jax.linear import (
    linear_log_probs,
    linear_masked,
    linear_softmax_cross_entropy,
    linear_softmax_cross_entropy_with_probabilities,
)
from wloss_jax.losses import (
    absolute_error,
    binary_cross_entropy,
    cosine_distance,
    cosine_embedding_loss,
    ctc_loss,
    gaussian_nll,
    generalized_kl_divergence,
    hinge_embedding_loss,
    hinge_loss,
    huber_loss,
    kl_divergence,
    kl_divergence_with_log_targets,
    l2_loss,
    log_cosh,
    margin_ranking_loss,
    masked,
    multi_margin_loss,
    multiclass_hinge_loss,
    multiclass_perceptron_loss,
    multiclass_sparsemax_loss,
    multilabel_margin_loss,
    multilabel_soft_margin_loss,
    nll_loss,
    per_sample,
    perceptron_loss,
    poisson_nll,
    poly_loss_cross_entropy,
    quantile_loss,
    safe_softmax_cross_entropy,
    sigmoid_binary_cross_entropy,
    sigmoid_focal_loss,
    smooth_l1_loss,
    soft_margin_loss,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    softmax_z_loss,
    sparsemax_loss,
    squared_error,
    triplet_margin_loss,
    triplet_margin_with_distance_loss,
)
from wloss_jax.masks import length_mask, observed_mask
from wloss_jax.means import WeightedMean, weighted_mean
from wloss_jax.padding import bucket_sizes, pad_ragged
from wloss_jax.running_mean import RunningMean, compute
from wloss_jax.weighting import loss_power, mean_of_means_bias, size_power

if TYPE_CHECKING:
    from wloss_jax import nnx as nnx

__version__ = "0.2.0"

__all__ = [
    # ragged samples to padded arrays
    "bucket_sizes",
    "pad_ragged",
    # which elements count, and whose prediction
    "length_mask",
    "observed_mask",
    "select_head",
    # the value that adds up, and schemes for its weight
    "WeightedMean",
    "weighted_mean",
    "size_power",
    "loss_power",
    "mean_of_means_bias",
    # the gradient step
    "value_and_grad",
    # across steps: optimizer calls, and evaluation
    "multi_steps",
    "RunningMean",
    "compute",
    # losses: any of your own, and the named ones
    "masked",
    "per_sample",
    "linear_masked",
    "absolute_error",
    "binary_cross_entropy",
    "cosine_distance",
    "cosine_embedding_loss",
    "ctc_loss",
    "gaussian_nll",
    "generalized_kl_divergence",
    "hinge_embedding_loss",
    "hinge_loss",
    "huber_loss",
    "kl_divergence",
    "kl_divergence_with_log_targets",
    "l2_loss",
    "linear_softmax_cross_entropy",
    "linear_softmax_cross_entropy_with_probabilities",
    "log_cosh",
    "margin_ranking_loss",
    "multi_margin_loss",
    "multiclass_hinge_loss",
    "multiclass_perceptron_loss",
    "multiclass_sparsemax_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "perceptron_loss",
    "poisson_nll",
    "poly_loss_cross_entropy",
    "quantile_loss",
    "safe_softmax_cross_entropy",
    "sigmoid_binary_cross_entropy",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "softmax_z_loss",
    "sparsemax_loss",
    "squared_error",
    "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
    # one number a token, for policy gradients
    "linear_log_probs",
    # the Flax room, and the laws as assertions on your own losses
    "nnx",
    "testing",
]


def __getattr__(name: str) -> ModuleType:
    if name == "nnx":  # imported when first named, as it imports flax
        return importlib.import_module("wloss_jax.nnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "nnx"]
