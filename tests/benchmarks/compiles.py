"""How often a training step compiles in an epoch of batches of random lengths."""

from collections.abc import Callable

import jax
import numpy as np

import wloss_jax as wl
from tests.benchmarks.timing import OURS, Counted

TITLE = "Compiles in an epoch of 50 batches of random lengths"
BUCKETS = 4


def cases(quick: bool) -> dict[str, Callable[[], Counted]]:
    batches = 5 if quick else 50
    return {f"{batches} batches": lambda: _case(batches)}


def _case(batches: int) -> Counted:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(4, 0.6, (batches, 8)).astype(int) + 1, 512)
    buckets = wl.bucket_sizes(lengths.max(axis=1), BUCKETS, multiple_of=8)

    def compiles(**options):
        @jax.jit
        def step(x, n):
            return wl.squared_error(x, x, lengths=n).compute()

        for row in lengths:
            samples = [rng.standard_normal(n, np.float32) for n in row]
            step(*wl.pad_ragged(samples, **options))
        return step._cache_size()

    counts = {OURS: compiles(buckets=buckets), "padded to the longest": compiles()}
    return Counted(counts, "buckets", BUCKETS)
