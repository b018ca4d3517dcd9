"""The guide from PyTorch: its JAX lines against what its PyTorch lines compute.

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
TABLE_ARRAYS, TABLE = record_torch.table()
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


def test_the_golden_values_are_of_the_lines_that_the_guide_has():
    recorded = [row["lines"] for row in GOLDEN["rows"]]
    assert recorded == [row.torch for row in ROWS], (
        "run python -m tests.tools.record_torch"
    )
    recorded = [row["line"] for row in GOLDEN["table"]]
    assert recorded == [row.torch for row in TABLE], (
        "run python -m tests.tools.record_torch"
    )


# ------------------------------------------------------------------------- the table


def test_every_loss_of_pytorch_has_its_line():
    assert {row.name for row in TABLE} == set(GOLDEN["losses"])
    assert len(GOLDEN["losses"]) >= 22


@pytest.fixture(scope="module")
def in_table():
    namespace = {}
    exec(TABLE_ARRAYS, namespace)
    return namespace


@pytest.mark.program
@pytest.mark.parametrize("i", range(len(TABLE)), ids=lambda i: f"{i}-{TABLE[i].name}")
def test_a_line_of_the_table_is_what_pytorch_computes(in_table, i):
    row, golden = TABLE[i], GOLDEN["table"][i]
    values, slopes = golden["values"], golden["gradients"]
    each = np.asarray(values["none"])
    if row.name == "kl_div":  # an element is a distribution here, and there an outcome
        each = each.sum(-1)
    ids = np.arange(each.size).reshape(each.shape)
    by_element = f"{row.jax[:-1]}, segment_ids=ids, num_segments={each.size})"
    namespace = in_table | {"ids": ids}
    assert_close(eval(by_element, namespace).total.reshape(each.shape), each, "none")
    assert_close(eval(row.jax, namespace).total, values["sum"], "sum")

    def mean(inputs):
        namespace = in_table | inputs
        if "frames" in inputs:
            namespace["by_word"] = inputs["frames"].swapaxes(0, 1)
        return eval(row.mean, namespace | {"m": eval(row.jax, namespace)})

    inputs = {name: jnp.asarray(in_table[name]) for name in slopes}
    value, gradients = jax.value_and_grad(mean)(inputs)
    assert_close(value, values["mean"], "mean")
    assert inputs
    for name, gradient in gradients.items():
        assert_close(gradient, slopes[name], f"gradient of {name}")


@pytest.mark.parametrize("i", range(len(TABLE)))
def test_pytorch_still_computes_what_the_table_has(in_table, i):
    pytest.importorskip("torch")
    assert record_torch.losses_of_torch() == GOLDEN["losses"]
    got = record_torch.run_torch_table(TABLE[i], in_table)
    for part in "values", "gradients":
        golden = GOLDEN["table"][i][part]
        assert got[part].keys() == golden.keys()
        for name, expected in golden.items():
            assert_close(got[part][name], expected, name)


# ---------------------------------------------------------------------- line by line


@pytest.mark.program
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


@pytest.mark.program
@pytest.mark.parametrize("i", range(len(ROWS)))
def test_pytorch_still_computes_what_was_recorded(names, i):
    pytest.importorskip("torch")
    got = record_torch.run_torch(ROWS[i], names[0][0])
    for part in "values", "gradients":
        golden = GOLDEN["rows"][i][part]
        assert got[part].keys() == golden.keys()
        for name, expected in golden.items():
            assert_close(got[part][name], expected, name)
