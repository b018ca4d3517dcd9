"""The means that policy-gradient methods take, a line each, of the same responses.

Four responses of 8, 2, 6 and 0 tokens to one prompt, each with an advantage, under the
clipped objective of PPO. What differs between the methods is the mean over the tokens:
what the token of a short response weighs beside that of a long one. It prints:

                                       loss   a token of 8 weighs     of 2     of 6
    per token: DAPO, T5              -0.375                0.0625   0.0625   0.0625
    per sequence: GRPO                0.000                0.0417   0.1667   0.0556
    fixed divisor of 10: Dr. GRPO    -0.150                0.0250   0.0250   0.0250
    power 0.5 of the length          -0.211                0.0528   0.1057   0.0610

    Each has the same gradient in one microbatch and in two.
"""

import jax
import jax.numpy as jnp
import numpy as np

import wloss_jax as wl

CLIP = 0.2
MAX_TOKENS = 10.0  # what a response is given: a constant, whatever its length
VOCAB_SIZE = 5


@wl.masked
def clipped_objective(logprobs, old_logprobs, advantages):
    """The loss of each token: ``-min(r A, clip(r, 1 - c, 1 + c) A)``."""
    ratio = jnp.exp(logprobs - old_logprobs)
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def responses(logits, batch):
    """The losses of the responses: a `WeightedMean` of ``[B]``."""
    logprobs = jax.nn.log_softmax(logits)[batch["tokens"]]
    advantages = jnp.broadcast_to(batch["advantages"][:, None], logprobs.shape)
    return wl.per_sample(clipped_objective)(
        logprobs, batch["old_logprobs"], advantages, lengths=batch["lengths"]
    )


def per_token(m):
    """``sum_i sum_t loss_it / sum_i n_i``: a long response says more."""
    return m.merge()


def per_sequence(m):
    """``mean_i (sum_t loss_it / n_i)``: every response says the same."""
    return m.reweight(wl.size_power(0.0)).merge()


def fixed_divisor(m):
    """``mean_i (sum_t loss_it / c)``: a token says the same in every batch."""
    return wl.WeightedMean(m.total, jnp.full_like(m.weight, MAX_TOKENS)).merge()


def power(m):
    """``sum_i n_i**p (sum_t loss_it / n_i) / sum_i n_i**p``: what is between."""
    return m.reweight(wl.size_power(0.5)).merge()


MEANS = {
    "per token: DAPO, T5": per_token,
    "per sequence: GRPO": per_sequence,
    f"fixed divisor of {MAX_TOKENS:.0f}: Dr. GRPO": fixed_divisor,
    "power 0.5 of the length": power,
}


def make_batch(logits):
    """Draws tokens, which ``logits`` themselves have just sampled."""
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, VOCAB_SIZE, n).astype(np.int32) for n in (8, 2, 6, 0)]
    tokens, lengths = wl.pad_ragged(samples)
    return {
        "tokens": tokens,
        "lengths": lengths,
        "advantages": np.array([1.0, -1.0, 0.0, 0.5], np.float32),
        "old_logprobs": jax.nn.log_softmax(logits)[tokens],
    }


def token_weights(mean, m):
    """What a token of each response weighs in the gradient."""

    def reduce(total):
        return mean(wl.WeightedMean(total, m.weight)).compute()

    return jax.grad(reduce)(m.total)


def main():
    """Prints the table."""
    logits = jnp.zeros(VOCAB_SIZE)
    batch = make_batch(logits)
    print(f"{'':32}   loss   a token of 8 weighs     of 2     of 6")
    for name, mean in MEANS.items():

        def loss_fn(logits, batch, mean=mean):
            return mean(responses(logits, batch))

        loss, gradient = wl.value_and_grad(loss_fn)(logits, batch)
        weights = token_weights(mean, responses(logits, batch))
        cells = "".join(f"{weight:9.4f}" for weight in weights[:3])
        print(f"{name:32}{loss.compute():7.3f}{cells:>40}")

        _, in_2 = wl.value_and_grad(loss_fn, num_microbatches=2)(logits, batch)
        np.testing.assert_allclose(in_2, gradient, atol=1e-6)  # whatever the mean
    print("\nEach has the same gradient in one microbatch and in two.")


if __name__ == "__main__":
    main()
