"""Cross-entropy of integer labels from logits, value and gradient."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wloss_jax as wl
from tests.benchmarks.timing import OURS, Case, copy_of, torch_and_device

TITLE = "Cross-entropy from logits, value and gradient"


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    shape = (16, 64) if quick else (2048, 32768)
    return {
        f"{shape[0]}x{shape[1]} {dtype}": functools.partial(_case, shape, dtype)
        for dtype in ("float32", "bfloat16")
    }


def _case(shape: tuple[int, int], dtype: str) -> Case:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)
    labels = jnp.asarray(rng.integers(0, shape[1], shape[0], np.int32))

    def ours(logits):
        return wl.softmax_cross_entropy_with_integer_labels(logits, labels).compute()

    def integer(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def integer_float32(logits):
        return integer(logits.astype(jnp.float32))

    def one_hot(logits):
        targets = jax.nn.one_hot(labels, shape[1], dtype=dtype)
        return optax.softmax_cross_entropy(logits, targets).mean()

    def of(mean):
        step = jax.jit(jax.value_and_grad(mean))
        return lambda: step(logits)

    contestants = {
        OURS: of(ours),
        "optax, integer labels": of(integer),
        "optax, one-hot labels": of(one_hot),
        "PyTorch": _torch(logits, labels, dtype),
    }
    if dtype == "bfloat16":  # what is as exact as ours: the sums are in float32
        contestants["optax, integer labels, cast to float32"] = of(integer_float32)
    return Case(
        contestants,
        "logits read twice and written, over copy bandwidth",
        copy_of(logits),
        1.5,
    )


def _torch(logits, labels, dtype):
    found = torch_and_device()
    if isinstance(found, str):
        return found
    torch, device = found
    x = torch.from_numpy(np.array(logits.astype(jnp.float32)))
    x = x.to(device, getattr(torch, dtype)).requires_grad_()
    y = torch.from_numpy(np.array(labels)).to(device).long()

    def step():
        x.grad = None
        loss = torch.nn.functional.cross_entropy(x, y)
        loss.backward()
        return loss.item(), x.grad

    return step
