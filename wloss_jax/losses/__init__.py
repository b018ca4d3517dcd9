"""Losses: any of your own by `masked`, and the named ones, a chapter a family.

* `_masked`: `masked`, and what makes any elementwise loss safe to mask
* `_per_sample`: the vmapped form of a loss, which keeps the batch axis
* `_labels`: integer class labels, which several families share
* `_regression`: by the difference of a prediction and a target
* `_likelihoods`: of a target under a predicted distribution
* `_binary`: of yes-or-no labels
* `_cross_entropy`, `_multiclass`: of one class among several, from logits and scores
* `_probabilities`: of probabilities and their logarithms, rather than logits
* `_margins`, `_multilabel`: with a margin, of pairs and of several classes
* `_divergences`: between distributions
* `_embeddings`: of vectors
* `_sequences`: of sequences that are not aligned

Every loss takes the keywords of `weighted_mean` (``where``, ``lengths``, ``weights``,
``segment_ids``, ``num_segments``), raises its errors, and reduces all that it is given
to one `WeightedMean`; `jax.vmap` or `per_sample` keeps the batch axis. Losses are
compiled; numbers among their options are compiled in, traced scalars are not.

Every loss of `optax.losses` that has a value for each element or example stands here
under its name and with its options, and so do those of `torch.nn.functional` that optax
lacks. ``where`` is here about elements, never about the
classes of one element. Left out are:

* losses of a set, which have no value for an element: `ntxent`,
  `ranking_softmax_loss` (see rax, which masks), and the dice losses, quotients of sums
  over a picture;
* `make_fenchel_young_loss`, which makes losses: give what it makes to `masked`;
* `cosine_similarity` and `smooth_labels`, which are not losses;
* `ctc_loss_with_forward_probs`, for its other outputs, and names that optax deprecates.
"""

from wloss_jax.losses._binary import (
    hinge_loss,
    perceptron_loss,
    sigmoid_binary_cross_entropy,
    sigmoid_focal_loss,
    sparsemax_loss,
)
from wloss_jax.losses._cross_entropy import (
    poly_loss_cross_entropy,
    safe_softmax_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    softmax_z_loss,
)
from wloss_jax.losses._divergences import (
    generalized_kl_divergence,
    kl_divergence,
    kl_divergence_with_log_targets,
)
from wloss_jax.losses._embeddings import (
    cosine_distance,
    triplet_margin_loss,
    triplet_margin_with_distance_loss,
)
from wloss_jax.losses._likelihoods import (
    gaussian_nll,
    poisson_nll,
)
from wloss_jax.losses._margins import (
    cosine_embedding_loss,
    hinge_embedding_loss,
    margin_ranking_loss,
    soft_margin_loss,
)
from wloss_jax.losses._masked import (
    masked,
)
from wloss_jax.losses._multiclass import (
    multiclass_hinge_loss,
    multiclass_perceptron_loss,
    multiclass_sparsemax_loss,
)
from wloss_jax.losses._multilabel import (
    multi_margin_loss,
    multilabel_margin_loss,
    multilabel_soft_margin_loss,
)
from wloss_jax.losses._per_sample import (
    per_sample,
)
from wloss_jax.losses._probabilities import (
    binary_cross_entropy,
    nll_loss,
)
from wloss_jax.losses._regression import (
    absolute_error,
    huber_loss,
    l2_loss,
    log_cosh,
    quantile_loss,
    smooth_l1_loss,
    squared_error,
)
from wloss_jax.losses._sequences import (
    ctc_loss,
)

__all__ = [
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
    "log_cosh",
    "margin_ranking_loss",
    "masked",
    "multi_margin_loss",
    "multiclass_hinge_loss",
    "multiclass_perceptron_loss",
    "multiclass_sparsemax_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "per_sample",
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
]
