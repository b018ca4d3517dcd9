"""Two-head masked losses, value and gradient: the method that this package ports.

A batch of padded sequences of random lengths; one target in ten was not measured (-1,
as in the original); the sample's type picks the head that is scored; every element that
counts has the same weight. All contestants compute the same number.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import wloss_jax as wl
from tests.benchmarks.timing import OURS, Case, copy_of, torch_and_device

TITLE = "Two-head masked losses, value and gradient"
MISSING = -1


class Loss(NamedTuple):
    """One loss, in each contestant's words."""

    ours: Callable[..., wl.WeightedMean]
    jnp: Callable[..., jax.Array]
    numpy: Callable[..., np.ndarray]
    derivative: Callable[..., np.ndarray]
    torch: str


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _huber(x: Any, y: Any) -> jax.Array:
    size = jnp.abs(x - y)
    return jnp.where(size <= 1, 0.5 * size**2, size - 0.5)


def _huber_numpy(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    size = np.abs(x - y)
    return np.where(size <= 1, 0.5 * size**2, size - 0.5)


LOSSES = {
    "MAE": Loss(
        wl.absolute_error,
        lambda x, y: jnp.abs(x - y),
        lambda x, y: np.abs(x - y),
        lambda x, y: np.sign(x - y),
        "l1_loss",
    ),
    "MSE": Loss(
        wl.squared_error,
        lambda x, y: (x - y) ** 2,
        lambda x, y: (x - y) ** 2,
        lambda x, y: 2 * (x - y),
        "mse_loss",
    ),
    "Huber": Loss(
        wl.huber_loss,
        _huber,
        _huber_numpy,
        lambda x, y: np.clip(x - y, -1, 1),
        "huber_loss",
    ),
    "BCE": Loss(
        wl.sigmoid_binary_cross_entropy,
        lambda x, y: jnp.maximum(x, 0) - x * y + jnp.log1p(jnp.exp(-jnp.abs(x))),
        lambda x, y: np.maximum(x, 0) - x * y + np.log1p(np.exp(-np.abs(x))),
        lambda x, y: _sigmoid(x) - y,
        "binary_cross_entropy_with_logits",
    ),
}


class Batch(NamedTuple):
    """``[B, L]`` predictions and targets, ``[B]`` types and lengths."""

    first: np.ndarray
    second: np.ndarray
    targets: np.ndarray
    head: np.ndarray
    lengths: np.ndarray


def make_batch(rows: int, size: int, *, binary: bool = False, missing: float = 0.1):
    rng = np.random.default_rng(0)
    first, second, targets = rng.standard_normal((3, rows, size), np.float32)
    if binary:
        targets = (targets > 0).astype(np.float32)
    targets[rng.random((rows, size), np.float32) < missing] = MISSING
    head = rng.integers(0, 2, rows, np.int32)
    lengths = rng.integers(size // 4, size + 1, rows, np.int32)
    return Batch(first, second, targets, head, lengths)


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    small, middle, large = (
        [(8, 32)] * 3 if quick else [(64, 512), (256, 2048), (1024, 4096)]
    )
    named = {
        f"MAE {b}x{n}": (lambda b=b, n=n: _case("MAE", b, n))
        for b, n in (small, middle, large)
    }
    named["MAE, no target missing"] = lambda: _case("MAE", *large, missing=0.0)
    named["MAE, one head"] = lambda: _case("MAE", *large, heads=1)
    for name in ("MSE", "Huber", "BCE"):
        named[name] = lambda name=name: _case(name, *middle)
    return named


def _case(name, rows, size, *, heads=2, missing=0.1) -> Case:
    loss = LOSSES[name]
    batch = make_batch(rows, size, binary=name == "BCE", missing=missing)
    if heads == 1:
        batch = batch._replace(second=batch.first, head=np.zeros_like(batch.head))
    on_device = Batch(*map(jnp.asarray, batch))
    argnums = (0, 1)[:heads]

    def of(mean, jit=True):
        step = jax.value_and_grad(mean, argnums)
        step = jax.jit(step) if jit else step
        return lambda: step(*on_device)

    missing_targets = missing > 0
    return Case(
        {
            OURS: of(_ours(loss, heads, missing_targets)),
            "the original: PyTorch, loop over samples": _torch(
                loss, batch, heads, _loop
            ),
            "NumPy, loop over samples": lambda: numpy_loop(loss, batch),
            "PyTorch, vectorised": _torch(loss, batch, heads, _vectorised),
            "jnp by hand, not jitted": of(_by_hand(loss, missing_targets), jit=False),
            "jnp by hand": of(_by_hand(loss, missing_targets)),
            "jnp, both heads": of(_both_heads(loss, missing_targets)),
            "optax style, both heads": of(_optax_style(loss, missing_targets)),
        },
        f"{2 * heads + 1} arrays over copy bandwidth",
        copy_of(on_device.first),
        (2 * heads + 1) / 2,
    )


# --------------------------------------------------------------------- contestants


def _ours(loss, heads, missing):
    def sample_loss(first, second, target, head, length):
        prediction = wl.select_head((first, second), head) if heads == 2 else first
        where = wl.observed_mask(target, MISSING) if missing else None
        return loss.ours(prediction, target, lengths=length, where=where)

    return lambda *batch: jax.vmap(sample_loss)(*batch).merge().compute()


def _mask(targets, lengths, missing):
    mask = jnp.arange(targets.shape[1])[None] < lengths[:, None]
    return mask & (targets != MISSING) if missing else mask


def _by_hand(loss, missing):
    """The fastest that we know: the prediction selected first, one sum."""

    def mean(first, second, targets, head, lengths):
        mask = _mask(targets, lengths, missing)
        prediction = jnp.where((head == 0)[:, None], first, second)
        count = mask.sum() if missing else lengths.sum()
        return jnp.sum(loss.jnp(prediction, targets), where=mask) / count

    return mean


def _both_heads(loss, missing):
    """Both heads scored, one of them chosen, the mean `where` it counts."""

    def mean(first, second, targets, head, lengths):
        mask = _mask(targets, lengths, missing)
        scored = jnp.where(
            (head == 0)[:, None], loss.jnp(first, targets), loss.jnp(second, targets)
        )
        return scored.mean(where=mask)

    return mean


def _optax_style(loss, missing):
    """The original's steps: means of each sample and head, then chosen and weighed."""

    def mean(first, second, targets, head, lengths):
        mask = _mask(targets, lengths, missing)
        means = [
            loss.jnp(prediction, targets).mean(axis=-1, where=mask)
            for prediction in (first, second)
        ]
        count = mask.sum(axis=-1)
        return (jnp.where(head == 0, *means) * count / count.sum()).sum()

    return mean


def numpy_loop(loss, batch):
    total, count = 0.0, 0
    gradients = np.zeros_like(batch.first), np.zeros_like(batch.second)
    for i, (length, head) in enumerate(
        zip(batch.lengths.tolist(), batch.head.tolist(), strict=True)
    ):
        target = batch.targets[i, :length]
        mask = target != MISSING
        prediction = (batch.first, batch.second)[head][i, :length][mask]
        target = target[mask]
        total += loss.numpy(prediction, target).sum()
        count += len(target)
        gradients[head][i, :length][mask] = loss.derivative(prediction, target)
    for gradient in gradients:
        gradient /= count
    return total / count, gradients


def _torch(loss, batch, heads, mean):
    found = torch_and_device()
    if isinstance(found, str):
        return found
    torch, device = found
    tensors = [torch.from_numpy(array).to(device) for array in batch]
    tensors[3] = tensors[3].long()
    loss_fn = getattr(torch.nn.functional, loss.torch)
    leaves = [tensor.requires_grad_() for tensor in tensors[:heads]]

    def step():
        for leaf in leaves:
            leaf.grad = None
        value = mean(torch, loss_fn, leaves[0], leaves[-1], *tensors[2:])
        value.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return value.item(), tuple(leaf.grad for leaf in leaves)

    return step


def _loop(torch, loss_fn, first, second, targets, head, lengths):
    """The forum answer's training function, its two flaws mended."""
    losses, sizes = [], []
    for i in range(len(targets)):
        length = int(lengths[i])
        prediction = (first if head[i] == 0 else second)[i, :length]
        target = targets[i, :length]
        valid = target != MISSING
        losses.append(loss_fn(prediction[valid], target[valid]))
        sizes.append(valid.sum())
    sizes = torch.stack(sizes)
    return (torch.stack(losses) * (sizes / sizes.sum())).sum()


def _vectorised(torch, loss_fn, first, second, targets, head, lengths):
    positions = torch.arange(targets.shape[1], device=targets.device)
    mask = (positions < lengths[:, None]) & (targets != MISSING)
    prediction = torch.where((head == 0)[:, None], first, second)
    losses = loss_fn(prediction, targets, reduction="none")
    return torch.where(mask, losses, 0).sum() / mask.sum()
