"""Fits one number to ragged data, by three losses, with the padding of two batches.

Measured are 1, 1, 1, 1 in one sample and 6 in the other: the mean of the five is 2, and
there their squared errors are least. It prints what each loss has learned:

                  padded to 4  padded to 8
    jnp.mean            1.250        0.625
    mean of means       3.500        3.500
    wloss_jax           2.000        2.000

    In two microbatches, too: WeightedMean(mean=4.0, weight=5.0)
"""

import jax
import jax.numpy as jnp
import numpy as np

import wloss_jax as wl

SAMPLES = [np.ones(4, np.float32), np.full(1, 6, np.float32)]


def errors(param, batch):
    """The squared error of each sample: a `WeightedMean` of ``[B]``."""
    predictions = jnp.broadcast_to(param, batch["targets"].shape)
    return wl.per_sample(wl.squared_error)(
        predictions, batch["targets"], lengths=batch["lengths"]
    )


def mean_of_all(param, batch):
    """Counts the padding, zeros, as measured."""
    return jnp.mean((param - batch["targets"]) ** 2)


def mean_of_means(param, batch):
    """Gives the one value of the second sample as much say as the four of the first."""
    return jnp.mean(errors(param, batch).compute())


def weighted(param, batch):
    """Gives every measured value the same say: the sums are divided last."""
    return errors(param, batch).merge()


def fit(gradient_fn, batch):
    """Takes a hundred steps down the gradient."""
    param = jnp.float32(0.0)
    for _ in range(100):
        param -= 0.2 * gradient_fn(param, batch)
    return param


def main():
    """Prints the table."""
    batches = []
    for size in 4, 8:
        targets, lengths = wl.pad_ragged(SAMPLES, size=size)
        batches.append({"targets": targets, "lengths": lengths})

    step = wl.value_and_grad(weighted, num_microbatches=2)
    print(f"{'':13} padded to 4  padded to 8")
    for name, gradient_fn in {
        "jnp.mean": jax.grad(mean_of_all),
        "mean of means": jax.grad(mean_of_means),
        "wloss_jax": lambda *args: step(*args)[1],
    }.items():
        narrow, wide = (fit(jax.jit(gradient_fn), batch) for batch in batches)
        print(f"{name:13}{narrow:12.3f}{wide:13.3f}")

    mean, _ = step(jnp.float32(2.0), batches[0])
    print("\nIn two microbatches, too:", mean)


if __name__ == "__main__":
    main()
