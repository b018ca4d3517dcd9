"""A contrastive loss over the whole batch, in microbatches: `combine` and GradCache."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import wloss_jax as wl
from tests.benchmarks.timing import OURS, Case

TITLE = "CLIP with two towers of 12 layers, 16 microbatches"
LAYERS, MICROBATCHES = 12, 16


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    sizes = [(32, 8, 8)] if quick else [(256, 256, 64), (2048, 128, 64)]
    return {
        f"{rows} pairs, {width} wide": functools.partial(_case, rows, width, out)
        for rows, width, out in sizes
    }


def _case(rows: int, width: int, out: int) -> Case:
    params, batch = draw(rows, width, out)

    def of(step):
        jitted = jax.jit(step)
        return lambda: jitted(params, batch)

    return Case(
        {
            OURS: of(ours),
            "GradCache by hand": of(by_hand),
            "microbatches apart, which averages": of(apart),
            "a mean without `combine`, which averages pairs": of(of_mean),
        },
        "the full batch",
        of(full_batch),
    )


def draw(rows: int, width: int, out: int):
    rng = np.random.default_rng(0)

    def tower():
        shapes = [(width, width)] * (LAYERS - 1) + [(width, out)]
        return [
            jnp.asarray(rng.standard_normal(shape, np.float32) / width**0.5)
            for shape in shapes
        ]

    params = {"image": tower(), "text": tower(), "log_scale": jnp.float32(1.0)}
    batch = {
        name: jnp.asarray(rng.standard_normal((rows, width), np.float32))
        for name in ("image", "text")
    }
    return params, batch


def embed(params, batch):
    def tower(kernels, x):
        for kernel in kernels:
            x = jnp.tanh(x @ kernel)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    return {name: tower(params[name], batch[name]) for name in ("image", "text")}


def clip(rows, params):
    logits = jnp.exp(params["log_scale"]) * rows["image"] @ rows["text"].T
    of_images = jnp.diag(jax.nn.log_softmax(logits)).mean()
    return -(of_images + jnp.diag(jax.nn.log_softmax(logits.T)).mean()) / 2


def ours(params, batch):
    step = wl.value_and_grad(embed, combine=clip, num_microbatches=MICROBATCHES)
    return step(params, batch)


def of_mean(params, batch):
    """The same towers and microbatches; a pair's loss does not look at the others."""

    def loss_fn(params, batch):
        rows = embed(params, batch)
        return wl.weighted_mean((rows["image"] * rows["text"]).sum(1))

    return wl.value_and_grad(loss_fn, num_microbatches=MICROBATCHES)(params, batch)


def full_batch(params, batch):
    return jax.value_and_grad(lambda params: clip(embed(params, batch), params))(params)


def _microbatches(batch):
    return jax.tree.map(lambda x: x.reshape(MICROBATCHES, -1, *x.shape[1:]), batch)


def by_hand(params, batch):
    """Gao et al., 2021: embed, differentiate the loss of the embeddings, go back."""
    cut = _microbatches(batch)
    _, stacked = jax.lax.scan(lambda _, x: (None, embed(params, x)), None, cut)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked)
    value, (slopes, direct) = jax.value_and_grad(clip, (0, 1))(rows, params)

    def back(so_far, parts):
        x, slopes = parts
        _, pull = jax.vjp(lambda params: embed(params, x), params)
        return jax.tree.map(jnp.add, so_far, pull(slopes)[0]), None

    grads, _ = jax.lax.scan(back, direct, (cut, _microbatches(slopes)))
    return value, grads


def apart(params, batch):
    """Each microbatch by itself, which sees its own negatives only."""

    def add(so_far, x):
        return jax.tree.map(jnp.add, so_far, full_batch(params, x)), None

    zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
    sums, _ = jax.lax.scan(add, zeros, _microbatches(batch))
    return jax.tree.map(lambda x: x / MICROBATCHES, sums)
