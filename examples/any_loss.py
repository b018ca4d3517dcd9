"""Losses that are no means, at every split, beside the averages of microbatches.

CLIP with a learned temperature, Dice and Cox, each of a model of a few parameters. The
loss and the length of its gradient are the same with 1 and 8 microbatches and on four
virtual devices, made here from one CPU. What training loops do, to average the losses
and gradients of microbatches, is another loss: of CLIP it sees the negatives of a
microbatch only. It prints:

                                        CLIP            Dice             Cox
                                loss    grad    loss    grad    loss    grad
    1 microbatch              1.9950  0.8569  0.5347  0.1014  1.9552  0.2714
    8 microbatches            1.9950  0.8569  0.5347  0.1014  1.9552  0.2714
    4 devices                 1.9950  0.8569  0.5347  0.1014  1.9552  0.2714
    8 microbatches, averaged  0.5172  0.4079  0.7533  0.0479  0.4745  0.1522
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import wloss_jax as wl

if __name__ == "__main__":  # before the first array is made
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)

B, L, F = 32, 6, 4
RNG = np.random.default_rng(0)
LENGTHS = np.sort(RNG.integers(1, L + 1, B))  # as batches by length come
X = RNG.normal(size=(B, L, F)).astype(np.float32)
RISK = X[:, 0].sum(1)
BATCH = {
    "x": X,
    "text": X[:, 0] + 0.5 * RNG.normal(size=(B, F)).astype(np.float32),
    "lengths": LENGTHS,
    "inside": (X[..., 0] > 0.5) & (LENGTHS[:, None] > 4),
    "time": RNG.exponential(np.exp(-RISK)).astype(np.float32),
    "died": RNG.random(B) < 0.6,
}
PARAMS = {"w": jnp.eye(F) + 0.3, "v": jnp.eye(F), "log_scale": jnp.float32(1.0)}


def pairs(params, batch):
    """Rows: whatever part of the batch they come of, all of them are put together."""

    def normalized(x):
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)

    return {
        "image": normalized(batch["x"][:, 0] @ params["w"]),
        "text": normalized(batch["text"] @ params["v"]),
    }


def overlaps(params, batch):
    """Sums: those of the parts of the batch are added up."""
    p = jax.nn.sigmoid((batch["x"] @ params["w"])[..., 0])
    y = batch["inside"]
    return {
        "both": wl.weighted_mean(p * y, lengths=batch["lengths"]),
        "each": wl.weighted_mean(p + y, lengths=batch["lengths"]),
    }


def risks(params, batch):
    """Rows again, and what comes with them."""
    risk = (batch["x"][:, 0] @ params["w"]).sum(1) / F
    return {"risk": risk, "time": batch["time"], "died": batch["died"]}


def clip(rows, params):
    """Finds the text of each image, and the image of each text, in the whole batch."""
    logits = jnp.exp(params["log_scale"]) * rows["image"] @ rows["text"].T
    of_images = jnp.diag(jax.nn.log_softmax(logits)).mean()
    return -(of_images + jnp.diag(jax.nn.log_softmax(logits.T)).mean()) / 2


def dice(sums, params):
    """Compares what is inside, and what is said to be, of all samples together."""
    return 1 - 2 * sums["both"].total / sums["each"].total


def cox(rows, params):
    """Compares who died with all that were alive then."""
    at_risk = rows["time"] >= rows["time"][:, None]
    hazard = jax.nn.logsumexp(jnp.where(at_risk, rows["risk"], -jnp.inf), axis=1)
    return -jnp.mean(rows["risk"] - hazard, where=rows["died"])


def on_four_devices(parts, combine):
    """Spreads the batch over the devices."""
    return jax.shard_map(
        wl.value_and_grad(parts, combine=combine, axis_name="data"),
        mesh=Mesh(jax.devices(), ("data",)),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )


def averaged(parts, combine):
    """Averages the losses and gradients of 8 microbatches, as is done by hand."""

    def step(params, batch):
        cut = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
        of_one = wl.value_and_grad(parts, combine=combine)
        results = jax.vmap(of_one, in_axes=(None, 0))(params, cut)
        return jax.tree.map(lambda x: x.mean(0), results)

    return step


def main():
    """Prints the table."""
    print(f"{'':24} {'CLIP':>15} {'Dice':>15} {'Cox':>15}")
    print(f"{'':24}" + 3 * f" {'loss':>7}{'grad':>8}")
    losses = ((pairs, clip), (overlaps, dice), (risks, cox))
    for name, make in {
        "1 microbatch": lambda *f: wl.value_and_grad(f[0], combine=f[1]),
        "8 microbatches": lambda *f: wl.value_and_grad(
            f[0], combine=f[1], num_microbatches=8
        ),
        "4 devices": on_four_devices,
        "8 microbatches, averaged": averaged,
    }.items():
        line = f"{name:24}"
        for parts, combine in losses:
            value, grads = jax.jit(make(parts, combine))(PARAMS, BATCH)
            norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
            line += f" {value:7.4f}{norm:8.4f}"
        print(line)


if __name__ == "__main__":
    main()
