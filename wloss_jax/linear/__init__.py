"""Losses of logits from features and a kernel, never holding the whole logits array.

The tokens that count are taken a chunk at a time, over the full vocabulary. One product
makes a chunk's logits; and as the loss of a total has one scalar cotangent, two more
make its gradient on the spot. Where each token has a cotangent of its own (totals of
segments, `jax.vmap`), the gradient waits for it and makes the logits again: four
products. Either way nothing of the size of the logits outlives its chunk.

What is asked for is known only to the transformations that JAX applies later, and so
are the platform and the number of devices. Hence primitives, with rules for what
becomes of them. The chapters:

- `_cross_entropy`: the public loss, and what its arguments must be;
- `_logits`: one chunk of tokens, its logits, losses and slopes;
- `_chunks`: the sweep over the tokens that count;
- `_programs`: what each primitive computes, by that sweep;
- `_derivatives`, `_vmap`: what becomes of a primitive under transformations;
- `_primitives`: how a primitive is made: all that stands on JAX's less public modules.
"""

from wloss_jax.linear._cross_entropy import linear_softmax_cross_entropy

__all__ = ["linear_softmax_cross_entropy"]
