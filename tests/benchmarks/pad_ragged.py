"""Ragged samples to one padded array, on the host."""

from collections.abc import Callable

import numpy as np

import wloss_jax as wl
from tests.benchmarks.timing import OURS, Case, keep_memory

TITLE = "`pad_ragged`, lengths log-normal of mean about 300"


def cases(quick: bool) -> dict[str, Callable[[], Case]]:
    counts = [100] if quick else [1_000, 100_000]
    return {f"{n} samples": lambda n=n: _case(n) for n in counts}


def _case(count: int) -> Case:
    keep_memory(False)  # as in a data loader; and zeros are then free
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.4, 0.8, count).astype(int) + 1, 2048)
    samples = [rng.standard_normal(n, np.float32) for n in lengths]
    size = int(lengths.max())

    def loop():
        padded = np.zeros((count, size), np.float32)
        for row, sample in zip(padded, samples, strict=True):
            row[: len(sample)] = sample
        return padded, np.array([len(sample) for sample in samples])

    def list_of_pads():
        rows = [np.pad(sample, (0, size - len(sample))) for sample in samples]
        return np.stack(rows), np.array([len(sample) for sample in samples])

    return Case(
        {
            OURS: lambda: wl.pad_ragged(samples),
            "NumPy, a loop over rows": loop,
            "np.pad in a list": list_of_pads,
            "PyTorch, pad_sequence": _torch(samples),
        },
        "the samples copied once",
        lambda: np.concatenate(samples),
    )


def _torch(samples):
    try:
        import torch
    except ImportError:
        return "not installed"
    tensors = [torch.from_numpy(sample) for sample in samples]

    def step():
        padded = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        return padded, torch.tensor([len(tensor) for tensor in tensors])

    return step
