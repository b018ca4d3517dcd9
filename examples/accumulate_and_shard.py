"""One loss and one gradient at every split, beside recipes that are off by factors.

Eight sequences of 0 to 8 tokens, a model of one parameter, and eight virtual devices,
made here from one CPU. It prints:

    wl.value_and_grad                  loss gradient
    1 device                       3.437500 0.875000
    8 devices, shard_map           3.437500 0.875000
    8 devices, jit                 3.437500 0.875000
    4 microbatches                 3.437500 0.875000
    4 devices, 2 microbatches      3.437500 0.875000
    4 optimizer calls              3.437500 0.875000

    4 optimizer calls, optax.MultiSteps: 3.89 times the gradient

    4 devices, times the gradient             check_vma=True      False       pmap
    wl.value_and_grad                                   1.00       1.00       1.00
    pmean of per-device means                          15.56       3.89       3.89
    local sum / psum(count), psum of gradients          4.00       1.00       1.00
    psum / psum inside the function                     1.00      -1.90      -1.90
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import wloss_jax as wl

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

SAMPLES = [
    [1, 2, 0, 1, -1, 2, 1, 2], [1, 0, 2, -1], [-8], [],
    [-4], [-6], [-1, -2, -3, 0, -2], [-2, -1, 0, -2],
]  # fmt: skip
targets, lengths = wl.pad_ragged([np.array(sample, np.float32) for sample in SAMPLES])
BATCH = {"targets": targets, "lengths": lengths}
PARAM = jnp.float32(0.0)


def loss_fn(param, batch):
    """Scores a model that predicts ``param`` everywhere."""
    predictions = jnp.broadcast_to(param, batch["targets"].shape)
    return wl.l2_loss(predictions, batch["targets"], lengths=batch["lengths"])


def cut(count):
    """Cuts the batch into ``count`` parts, on a new axis 0."""
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), BATCH)


def spread(step, devices, check_vma=True):
    """Maps ``step`` over devices, each with its part of the batch."""
    mesh = Mesh(jax.devices()[:devices], ("data",))
    return jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )


def four_calls(optimizer):
    """Returns the loss, and the gradient as the step that the optimizer takes."""
    state, seen = optimizer.init(PARAM), wl.WeightedMean.zeros()
    for i in range(4):
        call = jax.tree.map(lambda x, i=i: x[i], cut(4))
        mean, grad = wl.value_and_grad(loss_fn)(PARAM, call)
        step, state = optimizer.update(grad, state, PARAM, weight=mean.weight)
        seen += mean
    return seen, -step


def ours(param, batch):
    """Returns the gradient, as the recipes below try to."""
    return wl.value_and_grad(loss_fn, axis_name="data")(param, batch)[1]


def pmean_of_means(param, batch):
    """Averages the gradients of the devices."""
    grad = jax.grad(lambda param: loss_fn(param, batch).compute())(param)
    return jax.lax.pmean(grad, "data")


def local_sum_over_count(param, batch):
    """Divides by the global count, then adds up gradients: right if unchecked."""

    def share(param):
        mean = loss_fn(param, batch)
        return mean.total / jax.lax.psum(mean.weight, "data")

    return jax.lax.psum(jax.grad(share)(param), "data")


def sum_over_count(param, batch):
    """Adds up inside of what is differentiated: right if checked."""

    def whole(param):
        mean = loss_fn(param, batch)
        return jax.lax.psum(mean.total, "data") / jax.lax.psum(mean.weight, "data")

    return jax.grad(whole)(param)


def main():
    """Prints the tables."""
    step = wl.value_and_grad(loss_fn)
    in_4 = wl.value_and_grad(loss_fn, num_microbatches=4)
    on_all = wl.value_and_grad(loss_fn, axis_name="data")
    in_2_on_all = wl.value_and_grad(loss_fn, axis_name="data", num_microbatches=2)
    mesh = Mesh(jax.devices(), ("data",))
    sharded = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
    sgd = optax.sgd(1.0)

    print(f"{'wl.value_and_grad':29} {'loss':>9} gradient")
    for split, (mean, grad) in {
        "1 device": jax.jit(step)(PARAM, BATCH),
        "8 devices, shard_map": jax.jit(spread(on_all, 8))(PARAM, BATCH),
        "8 devices, jit": jax.jit(step)(PARAM, sharded),
        "4 microbatches": jax.jit(in_4)(PARAM, BATCH),
        "4 devices, 2 microbatches": jax.jit(spread(in_2_on_all, 4))(PARAM, BATCH),
        "4 optimizer calls": four_calls(wl.multi_steps(sgd, 4)),
    }.items():
        print(f"{split:29} {mean.compute():9.6f} {grad:8.6f}")

    _, true = step(PARAM, BATCH)
    _, grad = four_calls(optax.MultiSteps(sgd, 4).gradient_transformation())
    print(
        f"\n4 optimizer calls, optax.MultiSteps: {grad / true:.2f} times the gradient"
    )

    print(
        f"\n{'4 devices, times the gradient':41} check_vma=True      False       pmap"
    )
    for name, recipe in {
        "wl.value_and_grad": ours,
        "pmean of per-device means": pmean_of_means,
        "local sum / psum(count), psum of gradients": local_sum_over_count,
        "psum / psum inside the function": sum_over_count,
    }.items():
        checked, unchecked = (
            jax.jit(spread(recipe, 4, check_vma))(PARAM, BATCH) / true
            for check_vma in (True, False)
        )
        pmapped = jax.pmap(recipe, "data", in_axes=(None, 0))(PARAM, cut(4))[0] / true
        print(f"{name:44} {checked:11.2f} {unchecked:10.2f} {pmapped:10.2f}")


if __name__ == "__main__":
    main()
