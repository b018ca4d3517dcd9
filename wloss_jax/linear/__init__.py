"""Losses of logits from features and a kernel, never holding the whole logits array.

The tokens that count are taken a chunk at a time, over the full vocabulary. One product
makes a chunk's logits; and as the loss of a total has one scalar cotangent, two more
make its gradient on the spot. Where each token has a cotangent of its own (totals of
segments, `jax.vmap`, log-probabilities), the gradient waits for it and makes the logits
again: four products. Either way nothing of the size of the logits outlives its chunk.

What is asked for is known only to the transformations that JAX applies later, and so
are the platform and the number of devices. Hence primitives, with rules for what
becomes of them. The chapters:

- `_cross_entropy`: of integer labels, the loss of language models;
- `_probabilities`: of labels that are distributions over the classes;
- `_log_probs`: the log-probability of each label, for policy gradients;
- `_user`: `linear_masked`, which makes one of any loss of logits;
- `_arguments`: what those four have in common: arguments, what counts, reductions;
- `_softmax`: the losses of a chunk's logits, with slopes of their own;
- `_classes`: what they ask of rows of logits, sharded or not;
- `_logits`: what a loss of logits is to the engine;
- `_chunks`: the sweep over the tokens that count;
- `_programs`: what each primitive computes, by that sweep;
- `_derivatives`, `_vmap`: what becomes of a primitive under transformations;
- `_primitives`: how a primitive is made: all that stands on JAX's less public modules.
"""

from wloss_jax.linear._cross_entropy import linear_softmax_cross_entropy
from wloss_jax.linear._log_probs import linear_log_probs
from wloss_jax.linear._probabilities import (
    linear_softmax_cross_entropy_with_probabilities,
)
from wloss_jax.linear._user import linear_masked

__all__ = [
    "linear_log_probs",
    "linear_masked",
    "linear_softmax_cross_entropy",
    "linear_softmax_cross_entropy_with_probabilities",
]
