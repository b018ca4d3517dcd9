"""The README's porting section: its JAX lines against what its PyTorch lines compute.

The golden values are PyTorch's, recorded by record_torch.py.
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wloss_jax as wl
from tests.tools import record_torch

ARRAYS, ROWS = record_torch.porting_section()
GOLDEN = json.loads(record_torch.GOLDEN.read_text())
# float32 against float64: a few roundings of 6e-8, relative to the largest entry.
TOLERANCE = 2e-6


def assert_close(got, expected, what):
    expected = np.asarray(expected, np.float64)
    scale = np.abs(expected).max(initial=0.0)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE * scale, err_msg=what)


@pytest.fixture(scope="module")
def names():
    """For each row, the names before its lines ran, and after."""
    namespace = {"jax": jax, "jnp": jnp, "np": np, "optax": optax, "wl": wl}
    namespace |= {"Mesh": jax.sharding.Mesh, "P": jax.sharding.PartitionSpec}
    exec(ARRAYS, namespace)
    snapshots = [dict(namespace)]
    for row in ROWS:
        exec(row.jax, namespace)
        snapshots.append(dict(namespace))
    return list(itertools.pairwise(snapshots))


def test_the_golden_values_are_of_the_lines_that_the_readme_has():
    recorded = [row["lines"] for row in GOLDEN["rows"]]
    assert recorded == [row.torch for row in ROWS], (
        "run python -m tests.tools.record_torch"
    )


@pytest.mark.parametrize("i", range(len(ROWS)))
def test_values_and_gradients_are_those_of_pytorch(names, i):
    before, after = names[i]
    golden = GOLDEN["rows"][i]
    assert golden["values"]
    for name, expected in golden["values"].items():
        assert_close(after[name], expected, name)

    def total(inputs):
        namespace = before | inputs
        exec(ROWS[i].jax, namespace)
        return sum(jnp.sum(namespace[name]) for name in golden["values"])

    inputs = {name: jnp.asarray(before[name]) for name in golden["gradients"]}
    for name, gradient in jax.grad(total)(inputs).items() if inputs else ():
        assert_close(gradient, golden["gradients"][name], f"gradient of {name}")


@pytest.mark.parametrize("i", range(len(ROWS)))
def test_pytorch_still_computes_what_was_recorded(names, i):
    pytest.importorskip("torch")
    got = record_torch.run_torch(ROWS[i], names[0][0])
    for part in "values", "gradients":
        golden = GOLDEN["rows"][i][part]
        assert got[part].keys() == golden.keys()
        for name, expected in golden.items():
            assert_close(got[part][name], expected, name)
