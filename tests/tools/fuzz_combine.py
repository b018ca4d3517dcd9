"""Draws combined losses, batches and splits at random, and asks the float64 oracle.

    python -m tests.tools.fuzz_combine --cases 80     # prints its seed
    python -m tests.tools.fuzz_combine --seed 7 --case 12

A *program* is all that is static: some losses of `tests.oracle.combined`, the size of
the batch, the number of microbatches, devices and how the batch is spread over them.
Cases 8 n to 8 n + 7 share one, and draw lengths, contents and parameters for it.
"""

import argparse
import functools
import os
import secrets
import sys
import traceback
from typing import NamedTuple

# As in `tests.conftest`: said before JAX starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import wloss_jax as wl
from tests.oracle import combined

CASES_PER_PROGRAM = 8
WAYS = ("jit", "eager", "auto", "explicit", "shard_map", "unchecked", "pmap", "vmap")


class Program(NamedTuple):
    names: tuple[str, ...]
    rows: int
    num_microbatches: int
    way: str
    devices: int


def draw_program(rng):
    rows = int(rng.choice([8, 12, 16]))
    way = str(rng.choice(WAYS))
    devices = [n for n in (1, 2, 4, 8) if rows % n == 0]
    devices = 1 if way in ("jit", "eager") else int(rng.choice(devices))
    own = rows // devices
    counts = [k for k in range(1, own + 2) if way != "explicit" or own % k == 0]
    names = rng.choice(combined.NAMES, 2, replace=False)
    return Program(tuple(map(str, names)), rows, int(rng.choice(counts)), way, devices)


def make_step(program):
    """A function of parameters, batch and which of the losses to value and gradient."""
    is_mapped = program.way in ("shard_map", "unchecked", "pmap", "vmap")

    def parts(params, batch):
        return {name: combined.PARTS[name](params, batch) for name in program.names}

    def step(params, batch, which):
        def combine(parts, params):
            losses = [combined.COMBINE[n](parts[n], params) for n in program.names]
            return which @ jnp.stack(losses)

        return wl.value_and_grad(
            parts,
            combine=combine,
            num_microbatches=program.num_microbatches,
            axis_name="data" if is_mapped else None,
        )(params, batch)

    devices = jax.devices()[: program.devices]
    if program.way == "eager":
        return step
    if program.way in ("pmap", "vmap"):
        options = {"axis_name": "data", "in_axes": (None, 0, None)}
        mapped = (
            jax.pmap(step, devices=devices, **options)
            if program.way == "pmap"
            else jax.jit(jax.vmap(step, **options))
        )
        return functools.partial(_of_shards, mapped, program.devices)
    if is_mapped:
        step = jax.shard_map(
            step,
            mesh=Mesh(np.array(devices), ("data",)),
            in_specs=(P(), P("data"), P()),
            out_specs=P(),
            check_vma=program.way == "shard_map",
        )
    jitted = jax.jit(step)
    if program.way not in ("auto", "explicit"):
        return jitted
    axis_type = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[program.way]
    mesh = jax.make_mesh(
        (program.devices,), ("data",), axis_types=(axis_type,), devices=devices
    )
    return functools.partial(_of_mesh, jitted, mesh)


def _of_shards(mapped, count, params, batch, which):
    shards = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
    return jax.tree.map(lambda x: x[-1], mapped(params, shards, which))


def _of_mesh(jitted, mesh, params, batch, which):
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    return jitted(jax.device_put(params, NamedSharding(mesh, P())), batch, which)


def draw_data(program, rng):
    """Parameters and samples, such that every group and column has something."""
    params = combined.draw_params(int(rng.integers(2**31)))
    while True:
        lengths = rng.integers(0, combined.SIZE + 1, program.rows)
        samples = combined.draw_samples(lengths, int(rng.integers(2**31)))
        groups = {
            s.group for s in samples if len(s.y) and not np.isnan(s.y[:, 0]).all()
        }
        second = any(len(s.y) and not np.isnan(s.y[:, 1]).all() for s in samples)
        died = any(s.event for s in samples)
        if len(groups) == combined.GROUPS and second and died:
            return params, samples


@functools.lru_cache(maxsize=1)
def program_of(seed, number):
    program = draw_program(np.random.default_rng([seed, number]))
    return program, make_step(program)


def run_case(seed, number):
    """Runs a case, and says in words what is off."""
    program, step = program_of(seed, number // CASES_PER_PROGRAM)
    params, samples = draw_data(program, np.random.default_rng([seed, number, 1]))
    batch = combined.pad(samples)
    expected = combined.oracle(params, samples, program.names)
    found = []
    for i, name in enumerate(program.names):
        which = np.eye(len(program.names), dtype=np.float32)[i]
        try:
            result = jax.tree.map(np.asarray, step(params, batch, which))
            worse = combined.condition(name, params, samples)
            combined.assert_exact(name, result, expected, worse)
        except AssertionError as error:
            found.append(str(error))
        except Exception:
            found.append(traceback.format_exc(limit=-4))
    return found, program


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=80)
    parser.add_argument("--seed", type=int, help="drawn, and printed, if not given")
    parser.add_argument("--case", type=int, help="only this one")
    options = parser.parse_args(arguments)
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    one = options.case
    numbers = range(options.cases) if one is None else range(one, one + 1)
    failed = 0
    for number in numbers:
        if number % 100 == 99:
            # Each case compiles programs of its own. Kept, those of a thousand cases
            # are more pieces of memory than Linux maps for one process.
            jax.clear_caches()
        found, program = run_case(seed, number)
        if found:
            failed += 1
            again = f"python -m tests.tools.fuzz_combine --seed {seed} --case {number}"
            print("FAILED:", again, program, *found, sep="\n  ", flush=True)
    print(f"{len(numbers)} cases, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
