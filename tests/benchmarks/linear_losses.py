"""Losses of features times kernel: a divergence from a teacher, log-probabilities.

The naive ones make the logits. Tokens that do not count are at random places.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import wloss_jax as wl
from tests.benchmarks.timing import OURS, Case

TITLE = "Losses of features times kernel"


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    sizes = (64, 8, 128) if quick else (4096, 512, 32768)
    make = functools.partial(functools.partial, sizes=sizes)
    return {
        "KL to a teacher, 100% valid": make(_divergence, share=1.0),
        "KL to a teacher, 34% valid": make(_divergence, share=0.34),
        "log-probabilities, value": make(_log_probs, gradients=False),
        "log-probabilities, both gradients": make(_log_probs, gradients=True),
        "cross-entropy of any loss, both gradients": make(_cross_entropy),
    }


def _data(sizes, share=1.0):
    tokens, features, classes = sizes
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (tokens, features)),
        jax.random.normal(keys[1], (features, classes)) / features**0.5,
        jax.random.randint(keys[2], tokens, 0, classes),
        jax.random.uniform(keys[3], tokens) < share,
    )


def _gradients(loss, *arrays):
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return lambda: step(*arrays)


def _products(number, x, kernel):
    """So many products, in the form that each is fastest in."""
    on_cpu = jax.default_backend() == "cpu"

    @jax.jit
    def step(x, kernel):
        logits = x @ kernel
        transposed = jax.lax.optimization_barrier(x.T) if on_cpu else x.T
        others = (
            logits @ kernel.T,
            transposed @ logits,
            jax.lax.optimization_barrier(x) @ kernel,
        )
        return logits, others[: number - 1]

    return lambda: step(x, kernel)


def _divergence(sizes, share):
    x, kernel, _, where = _data(sizes, share)
    teacher_x, teacher_kernel = x[:, ::2], kernel[::2]

    def divergence(logits, teacher):
        log_p = jax.nn.log_softmax(logits)
        log_q = jax.nn.log_softmax(teacher @ teacher_kernel)
        return (jnp.exp(log_q) * (log_q - log_p)).sum(-1)

    distilled = wl.linear_masked(divergence)

    def ours(x, kernel):
        return distilled(x, kernel, teacher_x, where=where).compute()

    def naive(x, kernel):
        values = divergence(x @ kernel, teacher_x)
        return jnp.where(where, values, 0).sum() / where.sum()

    return Case(
        {OURS: _gradients(ours, x, kernel), "naive": _gradients(naive, x, kernel)},
        "three products of the tokens that count",
        _products(3, x, kernel),
        share,
    )


def _log_probs(sizes, gradients):
    x, kernel, labels, _ = _data(sizes)
    weights = jnp.arange(labels.size) / labels.size

    def ours(x, kernel, **options):
        return wl.linear_log_probs(x, kernel, labels, **options)

    def naive(x, kernel):
        log_p = jax.nn.log_softmax(x @ kernel)
        return jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]

    def of(log_probs):
        if gradients:
            return _gradients(lambda x, k: log_probs(x, k) @ weights, x, kernel)
        return functools.partial(jax.jit(log_probs), x, kernel)

    def with_entropy(x, kernel):
        log_probs, entropies = ours(x, kernel, with_entropy=True)
        return log_probs + 0 * entropies  # the same number, for the same work

    number = 4 if gradients else 1
    return Case(
        {
            OURS: of(ours),
            f"{OURS}, with the entropy": of(with_entropy),
            "naive": of(naive),
        },
        f"{number} product{'s' * gradients}",
        _products(number, x, kernel),
    )


def _cross_entropy(sizes):
    x, kernel, labels, _ = _data(sizes)
    any_loss = wl.linear_masked(optax.softmax_cross_entropy_with_integer_labels)

    def tuned(x, kernel):
        return wl.linear_softmax_cross_entropy(x, kernel, labels).compute()

    def general(x, kernel):
        return any_loss(x, kernel, labels).compute()

    return Case(
        {
            OURS: _gradients(tuned, x, kernel),
            "optax's, by linear_masked": _gradients(general, x, kernel),
        },
        "three products",
        _products(3, x, kernel),
    )
