"""A training run that is killed again and again ends like one that never was.

Run as a program, this file is the training run: ``test_interrupted.py DIRECTORY CALLS``
resumes from the last checkpoint in the directory and kills itself after that many
calls, in the middle of writing a checkpoint if it happens so.
"""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import wloss_jax as wl

CALLS, EPOCH, EVERY_K, SAVE_EVERY = 44, 22, 4, 5

optimizer = wl.multi_steps(optax.adamw(0.05), EVERY_K)


def loss_fn(params, batch):
    x, y, lengths = batch
    return wl.huber_loss(x @ params["w"] + params["b"], y, lengths=lengths)


@jax.jit
def train_call(carry, batch):
    m, grads = wl.value_and_grad(loss_fn)(carry["params"], batch)
    updates, state = optimizer.update(
        grads, carry["optimizer"], carry["params"], weight=m.weight
    )
    params = optax.apply_updates(carry["params"], updates)
    return {"params": params, "optimizer": state, "loss": carry["loss"].update(m)}


@jax.jit
def end_epoch(carry):
    updates, state = optimizer.flush(carry["optimizer"], carry["params"])
    params = optax.apply_updates(carry["params"], updates)
    return carry | {"params": params, "optimizer": state}


def make_batch(call):
    rng = np.random.default_rng(call)
    x = np.float32(rng.normal(size=(2, 8, 3)))
    return x, x.sum(-1) + 1, np.int32(rng.integers(0, 9, 2))


def train(directory, die_after):
    params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    carry = {
        "params": params,
        "optimizer": optimizer.init(params),
        "loss": wl.RunningMean.zeros(),
    }
    options = ocp.CheckpointManagerOptions(save_interval_steps=SAVE_EVERY)
    with ocp.CheckpointManager(directory / "checkpoints", options=options) as manager:
        start = manager.latest_step() or 0
        if start:
            carry = manager.restore(start, args=ocp.args.StandardRestore(carry))
        print("starts from", start, flush=True)
        for call in range(start + 1, CALLS + 1):
            carry = train_call(carry, make_batch(call))
            if call % EPOCH == 0:
                carry = end_epoch(carry)
            manager.save(call, args=ocp.args.StandardSave(carry))
            if call == die_after:
                os.kill(os.getpid(), signal.SIGKILL)
    np.savez(directory / "end.npz", *jax.tree.leaves(carry))


def start_run(directory, die_after=0):
    root = str(Path(wl.__file__).parents[1])
    command = [sys.executable, "-P", __file__, str(directory), str(die_after)]
    environment = os.environ | {"PYTHONPATH": root}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(run, code):
    output, errors = run.communicate(timeout=300)
    assert run.returncode == code, errors.decode()[-2000:]
    return int(output.split()[-1])


@pytest.mark.program
def test_killed_runs_end_bit_for_bit_like_the_one_that_was_not(tmp_path):
    seed = random.randrange(10**6)
    print("seed", seed)  # shown if the test fails
    deaths = sorted(random.Random(seed).sample(range(1, CALLS), 3))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()

    uninterrupted = start_run(whole)
    starts = [finish(start_run(killed, death), -signal.SIGKILL) for death in deaths]
    starts.append(finish(start_run(killed), 0))
    assert finish(uninterrupted, 0) == 0

    # A checkpoint that was being written as the run died is not there.
    for start, death in zip(starts[1:], deaths, strict=True):
        assert death - 2 * SAVE_EVERY < start <= death
    expected, got = np.load(whole / "end.npz"), np.load(killed / "end.npz")
    assert expected.files == got.files
    for name in expected.files:
        assert expected[name].tobytes() == got[name].tobytes()


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
