"""Two processes of two devices each, with unequal batches, against the oracle.

Run as a script, this file is one of the processes.
"""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import wloss_jax as wl
from tests.oracle import combined, two_terms

SIZE, ROWS = 6, 8  # padded; the rows of a process, on two devices
LENGTHS = [[6, 5, 6, 4, 6, 3, 1], [1, 0, 2]]  # of each process: 31 tokens, and 3


def main(process, port):
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    assert (jax.process_count(), jax.local_device_count()) == (2, 2)
    mesh = Mesh(np.array(jax.devices()), ("data",))

    params = two_terms.draw_params()
    samples = [two_terms.draw_samples(lengths, i) for i, lengths in enumerate(LENGTHS)]
    expected = two_terms.oracle(params, samples[0] + samples[1])

    own = samples[process]
    empty = two_terms.draw_samples([0] * (ROWS - len(own)), seed=0)
    batch = jax.make_array_from_process_local_data(
        NamedSharding(mesh, P("data")), two_terms.pad(own + empty, SIZE)
    )
    step = two_terms.make_step(num_microbatches=2)
    mapped = two_terms.make_step(num_microbatches=2, axis_name="data")
    ways = {
        "jit": step,
        "shard_map": jax.shard_map(
            mapped, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
        ),
        "shard_map that does not check": jax.shard_map(
            mapped, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
        ),
    }
    for name, way in ways.items():
        result = jax.tree.map(np.asarray, jax.jit(way)(params, batch))
        two_terms.assert_exact(result, expected)
        print("exact:", name)

    params = combined.draw_params()
    samples = combined.draw_samples([3, 1, 5, 2, 4, 1, 5, 3, 2, 2, 4, 1, 5, 5, 3, 1])
    expected = combined.oracle(params, samples)
    own = samples[process * ROWS : (process + 1) * ROWS]
    batch = jax.make_array_from_process_local_data(
        NamedSharding(mesh, P("data")), combined.pad(own)
    )
    for name in ("clip", "rmse by column"):
        parts, combine = combined.PARTS[name], combined.COMBINE[name]
        options = {"combine": combine, "num_microbatches": 2}
        of_devices = jax.shard_map(
            wl.value_and_grad(parts, axis_name="data", **options),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
        )
        for way in (wl.value_and_grad(parts, **options), of_devices):
            result = jax.tree.map(np.asarray, jax.jit(way)(params, batch))
            combined.assert_exact(name, result, expected)
            print("exact:", name)


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.mark.program
def test_two_processes_with_unequal_batches_are_one():
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(i), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        logs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, log in zip(processes, logs, strict=True):
        assert process.returncode == 0, log
        assert log.count("exact:") == 3 + 4, log


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
