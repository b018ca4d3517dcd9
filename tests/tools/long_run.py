"""A long training run on ragged batches: what is compiled, and what memory it takes.

``python -m tests.tools.long_run --steps 10000`` prints, ten times, how many programs
XLA has compiled so far, how many arrays are alive, and the resident memory; all three
must stand still once every padded length has come up.
"""

import argparse
import os
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wloss_jax as wl

BATCH_SIZE, MAX_LENGTH, EVERY_K = 8, 96, 4

compiled = 0


def count_compilation(event: str, _: float, **__: object) -> None:
    global compiled
    compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(count_compilation)


class Reading(NamedTuple):
    """What has piled up after so many steps."""

    step: int
    compiled: int
    arrays: int
    mebibytes: float


def read(step: int) -> Reading:
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    resident = pages * os.sysconf("SC_PAGESIZE") / 2**20
    return Reading(step, compiled, len(jax.live_arrays()), resident)


optimizer = wl.multi_steps(optax.adamw(1e-3), EVERY_K)


def loss_fn(params, batch):
    x, targets, heads, lengths = batch
    hidden = jnp.tanh(x @ params["kernel"])
    predictions = wl.select_head((hidden[..., 0], hidden[..., 1]), heads)
    where = wl.observed_mask(targets)
    return wl.per_sample(wl.huber_loss)(
        predictions, targets, where=where, lengths=lengths
    ).merge()


@jax.jit
def train_step(params, state, running, batch):
    mean, grads = wl.value_and_grad(loss_fn, num_microbatches=2)(params, batch)
    updates, state = optimizer.update(grads, state, params, weight=mean.weight)
    return optax.apply_updates(params, updates), state, running.update(mean)


def ragged_batches(steps):
    """Batches whose lengths, holes and contents are never twice the same."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, MAX_LENGTH + 1, 1000)
    buckets = wl.bucket_sizes(drawn, 3, multiple_of=8)
    for _ in range(steps):
        longest = rng.choice(buckets)
        lengths = rng.integers(0, longest + 1, BATCH_SIZE)
        samples = [rng.normal(size=(n, 4)).astype(np.float32) for n in lengths]
        x, lengths = wl.pad_ragged(samples, buckets=buckets)
        targets = np.where(rng.random(x.shape[:2]) < 0.9, x.sum(-1), np.nan)
        yield x, targets.astype(np.float32), rng.integers(0, 2, BATCH_SIZE), lengths


def run(steps: int, readings: int = 10) -> Iterator[Reading]:
    """Trains, with a flush and a new epoch at each reading."""
    params = {"kernel": jnp.ones((4, 2)) / 4}
    state, running = optimizer.init(params), wl.RunningMean.zeros()
    for step, batch in enumerate(ragged_batches(steps), start=1):
        params, state, running = train_step(params, state, running, batch)
        if step % 10 == 0:  # eager calls too
            x, targets, _, lengths = batch
            where = wl.observed_mask(targets)
            error = wl.absolute_error(x[..., 0], targets, where=where, lengths=lengths)
            running.update(error).to_host()
        if step % (steps // readings) == 0:
            updates, state = optimizer.flush(state, params)
            params = optax.apply_updates(params, updates)
            running = wl.RunningMean.zeros()
            yield read(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000, metavar="N")
    print(f"{'step':>8} {'compiled':>9} {'arrays':>7} {'resident MiB':>13}")
    for step, programs, arrays, mebibytes in run(parser.parse_args().steps):
        print(f"{step:8} {programs:9} {arrays:7} {mebibytes:13.1f}", flush=True)


if __name__ == "__main__":
    main()
