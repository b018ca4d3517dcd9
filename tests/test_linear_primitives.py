"""What `wloss_jax.linear._primitives` stands on, each part by itself.

These fail first when JAX moves: each test uses one part of its less public modules.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wloss_jax.linear import _primitives as primitives


class Task:
    matmul_precision = None


TASK = Task()


def cube(x, *, device, task):
    assert isinstance(device, primitives.Device)
    return [x**3]


@pytest.fixture
def cube_p():
    """A primitive of its own for each test: rules cannot be taken back."""
    return primitives.make_primitive("cube", cube)


def bind(primitive, *arrays):
    return primitive.bind(*arrays, task=TASK)


def test_evaluation_outside_of_a_jit(cube_p):
    (cubed,) = bind(cube_p, np.float32(2.0))
    assert cubed == 8


def test_types_and_lowering(cube_p):
    traced = jax.jit(lambda x: bind(cube_p, x)[0]).trace(jnp.ones(3, jnp.bfloat16))
    assert traced.out_info.dtype == jnp.bfloat16
    for platform in ("cpu", "cuda", "tpu"):
        assert "multiply" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_lowering_knows_the_platform():
    def platform(x, *, device, task):
        return [x + {"cpu": 1.0, "cuda": 2.0, "tpu": 3.0}[device.platform]]

    platform_p = primitives.make_primitive("platform", platform)
    traced = jax.jit(lambda x: bind(platform_p, x)[0]).trace(jnp.float32(0))
    for name, number in (("cpu", "1.0"), ("cuda", "2.0"), ("tpu", "3.0")):
        assert number in traced.lower(lowering_platforms=(name,)).as_text()


def test_lowering_knows_the_number_of_devices():
    def count(x, *, device, task):
        return [x + device.num_devices]

    count_p = primitives.make_primitive("count", count)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(jnp.zeros(jax.device_count()), rows)
    np.testing.assert_array_equal(
        jax.jit(lambda x: bind(count_p, x)[0])(x), jax.device_count()
    )
    each = jax.shard_map(
        lambda x: bind(count_p, x)[0],
        mesh=mesh,
        in_specs=rows.spec,
        out_specs=rows.spec,
    )
    np.testing.assert_array_equal(jax.jit(each)(x), 1)


def test_jvp_and_symbolic_zeros(cube_p):
    pair_p = primitives.make_primitive("pair", lambda x, y, *, device, task: [x * y])
    seen = []

    def rule(primals, tangents, *, task):
        seen.append([primitives.is_zero(t) for t in tangents])
        filled = [primitives.filled(t) for t in tangents]
        return bind(pair_p, *primals), [filled[0] * primals[1] + filled[1] * primals[0]]

    primitives.on_jvp(pair_p, rule)
    slope = jax.grad(lambda x: bind(pair_p, x, jnp.float32(3))[0])(jnp.float32(2))
    assert slope == 3
    assert seen == [[False, True]]

    primitives.on_jvp(
        cube_p, lambda x, t, *, task: (bind(cube_p, *x), [primitives.zero_like(*x)])
    )
    assert jax.grad(lambda x: bind(cube_p, x)[0])(jnp.float32(2)) == 0


def test_transposition():
    double_p = primitives.make_primitive("double", lambda x, *, device, task: [2 * x])
    primitives.on_transpose(
        double_p, lambda cotangents, x, *, task: bind(double_p, *cotangents)
    )
    primitives.on_jvp(
        double_p, lambda x, t, *, task: (bind(double_p, *x), bind(double_p, *t))
    )
    assert jax.grad(lambda x: bind(double_p, x)[0])(jnp.float32(1)) == 2


def test_vmap_is_told_the_axis(cube_p):
    def rule(axis, arrays, dims, *, task):
        assert (axis.name, axis.size) == ("rows", 3)
        return bind(cube_p, *arrays), list(dims)

    primitives.on_vmap(cube_p, rule)
    cubes = jax.vmap(lambda x: bind(cube_p, x)[0], axis_name="rows")(jnp.arange(3.0))
    np.testing.assert_array_equal(cubes, [0, 1, 8])


def test_what_varies_over_devices():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    spec = jax.sharding.PartitionSpec("data")

    def look(x):
        assert primitives.varying(x) == {"data"}
        assert primitives.varying(jnp.zeros(())) == frozenset()
        like = primitives.varying_type((2,), jnp.float32, frozenset({"data"}))
        (doubled,) = jax.make_jaxpr(lambda y: 2 * y)(like).out_avals
        assert primitives.varying(doubled) == {"data"}
        return x

    jax.shard_map(look, mesh=mesh, in_specs=spec, out_specs=spec)(
        jnp.zeros(jax.device_count())
    )
