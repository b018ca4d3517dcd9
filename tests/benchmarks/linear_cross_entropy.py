"""Features times kernel to cross-entropy, value and both gradients.

Tokens that do not count are labels of -100, at random places. On a GPU the sizes are
those of Gemma 2 (2B) and Llama 3 (8B), in bfloat16.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import wloss_jax as wl
from tests.benchmarks.timing import OURS, Case, torch_and_device

TITLE = "Linear cross-entropy, value and both gradients"
IGNORED = -100
CHUNK, LARGE = 512, 2048
EVERY = "which averages over what does not count too"


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    if quick:
        sizes, shares, dtype = [(64, 8, 128)], (1.0, 0.34), "float32"
    elif jax.default_backend() == "cpu":
        sizes, shares, dtype = [(4096, 512, 32768)], (1.0, 0.34), "float32"
    else:
        models = (2304, 256000), (4096, 128256)
        sizes = [(n, *model) for model in models for n in (8192, 32768)]
        shares, dtype = (1.0, 0.35), "bfloat16"
    return {
        f"{', '.join(map(str, size))}, {dtype}, {share:.0%} valid": functools.partial(
            _case, *size, share, dtype, chunk=16 if quick else CHUNK
        )
        for size in sizes
        for share in shares
    }


def _case(tokens, features, classes, share, dtype, chunk) -> Case:
    of_x, of_kernel, of_labels, of_share = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(of_x, (tokens, features), dtype)
    kernel = jax.random.normal(of_kernel, (features, classes), dtype) / features**0.5
    labels = jax.random.randint(of_labels, tokens, 0, classes)
    counts = jax.random.uniform(of_share, tokens) < share
    labels = jnp.where(counts, labels, IGNORED)

    def ours(x, kernel, chunk_size=None):
        return wl.linear_softmax_cross_entropy(
            x, kernel, labels, ignore_index=IGNORED, chunk_size=chunk_size
        ).compute()

    def naive(x, kernel):
        return _sum_where(x @ kernel, labels) / (labels != IGNORED).sum()

    def remat_scan(x, kernel):
        @jax.checkpoint
        def add(total, rows):
            return total + _sum_where(rows[0] @ kernel, rows[1]), None

        rows = x.reshape(-1, chunk, features), labels.reshape(-1, chunk)
        total, _ = jax.lax.scan(add, jnp.float32(0), rows)
        return total / (labels != IGNORED).sum()

    def of(mean):
        step = jax.jit(jax.value_and_grad(mean, (0, 1)))
        return lambda: step(x, kernel)

    return Case(
        {
            OURS: of(ours),
            f"{OURS}, chunk_size={LARGE}": of(
                functools.partial(ours, chunk_size=LARGE)
            ),
            "naive": of(naive),
            f"remat scan, chunks of {chunk}": of(remat_scan),
            "tokamax" if share == 1 else f"tokamax, {EVERY}": _tokamax(
                x, kernel, labels
            ),
            **{
                name: _torch(loss, x, kernel, labels)
                for name, loss in TORCH_LOSSES.items()
            },
        },
        "three products of the tokens that count",
        _three_products(x, kernel),
        share,
    )


def _sum_where(logits, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.maximum(labels, 0)
    )
    return jnp.where(labels != IGNORED, losses, 0).sum()


def _three_products(x, kernel):
    """The products of the forward and the backward pass, in their fastest form.

    On CPU, XLA takes more than twice as long for ``x.T @ g`` as with a transpose that
    is really done before it.
    """
    backend = jax.default_backend()

    @jax.jit
    def step(x, kernel):
        logits = x @ kernel
        transposed = jax.lax.optimization_barrier(x.T) if backend == "cpu" else x.T
        return logits @ kernel.T, transposed @ logits

    return lambda: step(x, kernel)


def _tokamax(x, kernel, labels):
    try:
        import tokamax
        from absl import flags
    except ImportError:
        return "not installed"
    flags.FLAGS(["tokamax"])  # else it reads this program's own arguments

    def mean(x, kernel):
        return tokamax.linear_softmax_cross_entropy_loss(
            x, jnp.maximum(labels, 0), kernel, reduction="mean", implementation="xla"
        )

    step = jax.jit(jax.value_and_grad(mean, (0, 1)))
    return lambda: step(x, kernel)


def _torch_eager():
    from torch.nn import functional

    return lambda x, weight, labels: functional.cross_entropy(x @ weight.T, labels)


def _torch_chunked():
    from torch.nn import LinearCrossEntropyOptions, functional

    options = LinearCrossEntropyOptions()
    return lambda *data: functional.linear_cross_entropy(*data, options=options)


def _liger():
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)
    return lambda x, weight, labels: loss(weight, x, labels)


def _cut():
    # Leaves out what it takes for too small to matter in the gradient.
    from cut_cross_entropy import linear_cross_entropy

    return functools.partial(linear_cross_entropy, ignore_index=IGNORED)


TORCH_LOSSES = {
    "PyTorch": _torch_eager,
    "PyTorch, linear_cross_entropy": _torch_chunked,
    "Liger Kernel": _liger,
    "Cut Cross-Entropy": _cut,
}


def _torch(make, x, kernel, labels):
    found = torch_and_device()
    if isinstance(found, str):
        return found
    torch, device = found
    try:
        loss_of = make()
    except (ImportError, AttributeError):
        return "not installed"
    if device == "cpu" and make not in (_torch_eager, _torch_chunked):
        return "for GPUs"
    dtype = getattr(torch, str(x.dtype))
    features, weight = (
        torch.from_numpy(np.array(array.astype(jnp.float32))).to(device, dtype)
        for array in (x, kernel)
    )
    weight = weight.T.contiguous()
    targets = torch.from_numpy(np.array(labels)).to(device).long()
    features.requires_grad_(), weight.requires_grad_()

    def step():
        features.grad = weight.grad = None
        loss = loss_of(features, weight, targets)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item(), features.grad, weight.grad

    return step
