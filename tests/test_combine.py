"""`combine`: any loss at every split, against the float64 oracle of the whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import wloss_jax as wl
from tests.oracle import combined

B = 16
LENGTHS = [3, 0, 5, 1, 2, 4, 1, 5, 5, 2, 4, 3, 1, 1, 5, 2]
PARAMS = combined.draw_params()
SAMPLES = combined.draw_samples(LENGTHS)
BATCH = combined.pad(SAMPLES)

needs_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


@functools.cache
def expected():
    return combined.oracle(PARAMS, SAMPLES)


def all_losses(**options):
    """A step for all losses, one compiled program: ``which`` is 1 for one of them.

    What that one's gradient is made of is not what the others' are, so that to share a
    program hides nothing.
    """

    def parts(params, batch):
        return {name: of(params, batch) for name, of in combined.PARTS.items()}

    def step(params, batch, which):
        def combine(parts, params):
            losses = [combined.COMBINE[n](parts[n], params) for n in combined.NAMES]
            return which @ jnp.stack(losses)

        return wl.value_and_grad(parts, combine=combine, **options)(params, batch)

    return step


def check(step, params=PARAMS, batch=BATCH, expected=expected, of_result=lambda x: x):
    for i, name in enumerate(combined.NAMES):
        which = np.eye(len(combined.NAMES), dtype=np.float32)[i]
        result = of_result(step(params, batch, which))
        combined.assert_exact(name, result, expected())


def line(count):
    return Mesh(np.array(jax.devices()[:count]), ("data",))


def mapped(count, check_vma=True, **options):
    return jax.jit(
        jax.shard_map(
            all_losses(axis_name="data", **options),
            mesh=line(count),
            in_specs=(P(), P("data"), P()),
            out_specs=P(),
            check_vma=check_vma,
        )
    )


# ------------------------------------------------------------------- every split


@pytest.mark.core
@pytest.mark.parametrize("num_microbatches", [1, 2, 8, B, 3])
def test_every_loss_is_the_oracle_in_any_number_of_microbatches(num_microbatches):
    check(jax.jit(all_losses(num_microbatches=num_microbatches)))


@needs_devices
@pytest.mark.parametrize(
    ("devices", "num_microbatches", "check_vma"),
    [
        (2, 1, True),
        (2, 8, False),
        (2, 3, True),
        (8, 1, True),
        (8, 1, False),
        (8, 2, True),
    ],
)
def test_every_loss_is_the_oracle_under_shard_map(devices, num_microbatches, check_vma):
    check(mapped(devices, check_vma, num_microbatches=num_microbatches))


@needs_devices
@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_every_loss_is_the_oracle_under_pmap(num_microbatches):
    step = jax.pmap(
        all_losses(num_microbatches=num_microbatches, axis_name="data"),
        axis_name="data",
        in_axes=(None, 0, None),
    )
    shards = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), BATCH)
    check(step, batch=shards, of_result=lambda x: jax.tree.map(lambda x: x[-1], x))


@needs_devices
@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_every_loss_is_the_oracle_under_plain_jit(axis_type, num_microbatches):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    check(jax.jit(all_losses(num_microbatches=num_microbatches)), params, batch)
