"""The means that policy-gradient methods take, a line each, of the same responses.

Four responses of 8, 2, 6 and 0 tokens to one prompt, each with an advantage, under the
clipped objective of PPO. The policy is a table of features and a kernel, and its
log-probabilities come from `linear_log_probs`, without the logits. What differs between
the methods is the mean over the tokens: what the token of a short response weighs
beside that of a long one. Last, two of the responses as a pair, under the loss of DPO.
The gain is what 10 steps add to the log-probability of a token of the first response,
which is better, over that of the second, which is worse. It prints:

                                     loss   a token of 8 weighs     of 2     of 6   gain
    per token: DAPO, T5            -0.375                0.0625   0.0625   0.0625   0.17
    per sequence: GRPO              0.000                0.0417   0.1667   0.0556   0.47
    fixed divisor of 10: Dr. GRPO  -0.150                0.0250   0.0250   0.0250   0.09
    power 0.5 of the length        -0.211                0.0528   0.1057   0.0610   0.30
    a pair: DPO                     0.693                                           0.68

    Each has the same gradient in one microbatch and in two.
"""

import jax
import jax.numpy as jnp
import numpy as np

import wloss_jax as wl

CLIP, BETA = 0.2, 0.5
MAX_TOKENS = 10.0  # what a response is given: a constant, whatever its length
VOCAB_SIZE, FEATURES, STEPS, RATE = 5, 4, 10, 1.0


def log_probs(policy, tokens, lengths):
    """The log-probability of each token after the one before it: ``[B, L]``."""
    before = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    features = policy["features"][before]
    return wl.linear_log_probs(features, policy["kernel"], tokens, lengths=lengths)


@wl.masked
def clipped_objective(log_probs, old_log_probs, advantages):
    """The loss of each token: ``-min(r A, clip(r, 1 - c, 1 + c) A)``."""
    ratio = jnp.exp(log_probs - old_log_probs)
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def responses(policy, batch):
    """The losses of the responses: a `WeightedMean` of ``[B]``."""
    now = log_probs(policy, batch["tokens"], batch["lengths"])
    advantages = jnp.broadcast_to(batch["advantages"][:, None], now.shape)
    return wl.per_sample(clipped_objective)(
        now, batch["old_log_probs"], advantages, lengths=batch["lengths"]
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


def preference(policy, pairs):
    """DPO: ``-log sigmoid(beta * (gain of the chosen - gain of the rejected))``.

    A pair is one packed row, the chosen response before the rejected one; a response's
    log-probability is a sum over its segment.
    """
    now = log_probs(policy, pairs["tokens"], pairs["lengths"])
    gains = jax.vmap(
        lambda gain, ids: wl.weighted_mean(gain, segment_ids=ids, num_segments=2).total
    )(now - pairs["old_log_probs"], pairs["segment_ids"])
    return wl.weighted_mean(-jax.nn.log_sigmoid(BETA * (gains[:, 0] - gains[:, 1])))


def make_batches(policy):
    """Draws the responses; a pair is the first, which is better, and the second."""
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, VOCAB_SIZE, n).astype(np.int32) for n in (8, 2, 6, 0)]
    tokens, lengths = wl.pad_ragged(samples)
    batch = {"tokens": tokens, "lengths": lengths}
    row = np.concatenate(samples[:2])
    pairs = {
        "tokens": np.stack([row, row]),  # two alike, for the microbatches
        "lengths": np.array([len(row)] * 2),
        "segment_ids": np.repeat([0, 1], [8, 2])[None].repeat(2, axis=0),
    }
    for rows in (batch, pairs):
        rows["old_log_probs"] = log_probs(policy, rows["tokens"], rows["lengths"])
    advantages = np.array([1.0, -1.0, 0.0, 0.5], np.float32)
    return batch | {"advantages": advantages}, pairs


def token_weights(mean, m):
    """What a token of each response weighs in the gradient."""

    def reduce(total):
        return mean(wl.WeightedMean(total, m.weight)).compute()

    return jax.grad(reduce)(m.total)


def train(loss_fn, policy, batch):
    """The loss at first, and the policy after some steps."""
    step = jax.jit(wl.value_and_grad(loss_fn))
    in_2 = jax.jit(wl.value_and_grad(loss_fn, num_microbatches=2))
    first, gradient = step(policy, batch)
    for name, of_2 in in_2(policy, batch)[1].items():  # whatever the mean
        np.testing.assert_allclose(of_2, gradient[name], atol=1e-6)
    for _ in range(STEPS):
        _, gradient = step(policy, batch)
        policy = jax.tree.map(lambda p, g: p - RATE * g, policy, gradient)
    return first.compute(), policy


def main():
    """Prints the table."""
    key = jax.random.key(0)
    policy = {
        "features": jax.random.normal(key, (VOCAB_SIZE, FEATURES)),
        "kernel": jnp.zeros((FEATURES, VOCAB_SIZE)),
    }
    batch, pairs = make_batches(policy)

    def gain(trained):
        """Of the first response over the second, a token."""
        now = log_probs(trained, batch["tokens"], batch["lengths"])
        gains = (now - batch["old_log_probs"]).sum(axis=1)
        return gains[0] / 8 - gains[1] / 2

    print(f"{'':30}   loss   a token of 8 weighs     of 2     of 6   gain")
    for name, mean in MEANS.items():

        def loss_fn(policy, batch, mean=mean):
            return mean(responses(policy, batch))

        loss, trained = train(loss_fn, policy, batch)
        weights = token_weights(mean, responses(policy, batch))
        cells = "".join(f"{weight:9.4f}" for weight in weights[:3])
        print(f"{name:30}{loss:7.3f}{cells:>40}{gain(trained):7.2f}")
    loss, trained = train(preference, policy, pairs)
    print(f"{'a pair: DPO':30}{loss:7.3f}{'':40}{gain(trained):7.2f}")
    print("\nEach has the same gradient in one microbatch and in two.")


if __name__ == "__main__":
    main()
