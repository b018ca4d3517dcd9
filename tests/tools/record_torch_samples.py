"""What the losses of `torch.nn.functional` are of PyTorch's own sample inputs.

    python -m tests.tools.record_torch_samples

takes the samples that PyTorch tests its losses with (torch and its test dependency
`expecttest` are expected), and a few at kinks and ends, and writes
``torch_samples.json``, which test_torch_losses.py holds the losses here to: of every
reduction the value, and the gradient of the mean, in float64. Inputs are rounded, so
that they are the same in float32; weights are made positive.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = Path(__file__).parents[1] / "oracle" / "torch_samples.json"
REDUCTIONS = ("mean", "sum", "none")
# Others have tests of their own: they are not of arrays that line up.
LEFT_OUT = ("ctc_loss", "linear_cross_entropy")
MOST, MOST_ELEMENTS = 8, 50

inf = float("inf")
AT_KINKS: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("l1_loss", [[1.0, 2.0, 0.0], [1.0, 3.0, 0.0]], {}),
    ("smooth_l1_loss", [[0.0, 1.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0]], {}),
    ("smooth_l1_loss", [[0.0, 1.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0]], {"beta": 0.0}),
    ("huber_loss", [[0.0, 0.5, -0.5, 2.0], [0.0, 0.0, 0.0, 0.0]], {"delta": 0.5}),
    ("hinge_embedding_loss", [[1.0, 1.0, 0.25, 2.0], [-1, 1, -1, -1]], {}),
    ("hinge_embedding_loss", [[-1.0, -2.0, 0.25], [-1, -1, -1]], {"margin": -1.0}),
    ("margin_ranking_loss", [[1.0, 1.0, 2.0], [1.0, 2.0, 2.0], [1, -1, -1]], {}),
    (
        "margin_ranking_loss",
        [[1.0, 1.0, 2.5], [1.0, 1.5, 2.0], [1, -1, -1]],
        {"margin": -0.5},
    ),
    ("soft_margin_loss", [[0.0, 30.0, -30.0], [1, 1, 1]], {}),
    (
        "cosine_embedding_loss",
        [
            [[1.0, 0.0], [0.0, 0.0], [3.0, 4.0], [1.0, 0.0]],
            [[0.0, 1.0], [0.0, 2.0], [3.0, 4.0], [1.0, 1.0]],
            [-1, 1, 1, -1],
        ],
        {},
    ),
    (
        "multi_margin_loss",
        [[[1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 9.0, 0.5]], [0, 1, 1]],
        {},
    ),
    ("multi_margin_loss", [[[1.0, 0.0, 0.5], [0.0, 0.0, 0.0]], [0, 1]], {"p": 2}),
    (
        "multilabel_margin_loss",
        [
            [[1.0, 0.0, 0.5], [1.0, 0.0, 0.5], [1.0, 2.0, 3.0], [0.0, 0.0, 1.0]],
            [[0, -1, 1], [0, 0, -1], [2, 1, 0], [-1, 2, 2]],
        ],
        {},
    ),
    (
        "binary_cross_entropy",
        [[0.0, 0.0, 1.0, 1.0, 0.5], [0.0, 1.0, 0.0, 1.0, 0.5]],
        {},
    ),
    (
        "binary_cross_entropy_with_logits",
        [[0.0, 0.0, 40.0, -40.0], [0.0, 1.0, 1.0, 1.0]],
        {"pos_weight": 3.0},
    ),
    ("nll_loss", [[[-1.0, -2.0], [-0.5, -3.0], [-7.0, -8.0]], [1, -100, 0]], {}),
    (
        "cross_entropy",
        [[[1.0, 0.0, 0.5], [2.0, 3.0, 1.0]], [[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]]],
        {"label_smoothing": 0.25, "weight": [1.0, 2.0, 0.5]},
    ),
    (
        "cross_entropy",
        [[[1.0, 0.0, 0.5], [2.0, 3.0, 1.0], [1.0, 1.0, 1.0]], [0, -100, 2]],
        {"label_smoothing": 0.25, "weight": [1.0, 2.0, 0.5]},
    ),
    (
        "triplet_margin_with_distance_loss",
        [
            [[1.0, 0.0], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0]],
            [[0.0, 1.0], [0.0, 1.0], [2.0, 0.0], [0.0, 0.0]],
            [[0.0, 1.0], [0.0, 3.0], [2.0, 0.5], [0.0, 0.0]],
        ],
        {"swap": True},
    ),
]


def record(function: Any, arrays: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Calls a loss with every reduction."""
    import torch

    tensors = [torch.from_numpy(_double(array)) for array in arrays]
    differentiable = [i for i, x in enumerate(tensors) if _moves(function, i, x)]
    for i in differentiable:
        tensors[i].requires_grad_()
    keywords = {
        name: torch.from_numpy(_double(value)) if _is_array(name) else value
        for name, value in options.items()
    }
    values = {r: function(*tensors, **keywords, reduction=r) for r in REDUCTIONS}
    gradients = torch.autograd.grad(
        values["mean"], [tensors[i] for i in differentiable]
    )
    return {
        "arrays": arrays,
        "options": options,
        "values": {r: _rounded(value.detach()) for r, value in values.items()},
        "gradients": {
            str(i): _rounded(gradient)
            for i, gradient in zip(differentiable, gradients, strict=True)
        },
    }


def _is_array(name: str) -> bool:
    return name in ("weight", "pos_weight")


def _moves(function: Any, i: int, tensor: Any) -> bool:
    """Whether an argument is differentiated: the first, and those that are like it."""
    name = function.__name__
    if "triplet" in name:
        return True
    return i == 0 or (
        i == 1 and name in ("margin_ranking_loss", "cosine_embedding_loss")
    )


def _double(values: Any) -> np.ndarray:
    """As float32 has it, in float64."""
    array = np.asarray(values)
    return array if array.dtype.kind == "i" else array.astype("f").astype("d")


def _rounded(tensor: Any) -> Any:
    digits = np.vectorize(lambda x: float(f"{x:.9g}"))
    return digits(tensor.numpy()).tolist()


def own_samples(op: Any) -> list[tuple[list[Any], dict[str, Any]]]:
    """PyTorch's samples for a loss, one of each kind."""
    import torch

    torch.manual_seed(0)
    random.seed(0)
    kinds: dict[str, tuple[list[Any], dict[str, Any]]] = {}
    for sample in op.sample_inputs("cpu", torch.float64):
        tensors = [sample.input.detach(), *sample.args]
        options = {
            name: value
            for name, value in sample.kwargs.items()
            if name not in ("reduction", "distance_function") and value is not None
        }
        if max(x.numel() for x in tensors) > MOST_ELEMENTS:
            continue
        if op.name.endswith("hinge_embedding_loss") and (tensors[1].abs() != 1).any():
            continue  # a target that is no sign, which is NaN here
        kind = str(
            (
                [(tuple(x.shape), x.dtype) for x in tensors],
                [(k, getattr(v, "shape", v)) for k, v in sorted(options.items())],
            )
        )
        arrays = [_three_digits(x) for x in tensors]
        plain = {
            name: np.abs(_three_digits(value)).tolist()
            if isinstance(value, torch.Tensor)
            else value
            for name, value in options.items()
        }
        kinds.setdefault(kind, (arrays, plain))
    return list(kinds.values())[:MOST]


def _three_digits(tensor: Any) -> Any:
    array = tensor.detach().numpy()
    return array.round(3).tolist() if array.dtype.kind == "f" else array.tolist()


def main() -> None:
    """Writes the samples."""
    import torch
    from torch.nn import functional
    from torch.testing._internal.common_methods_invocations import op_db

    golden: dict[str, list[dict[str, Any]]] = {}
    for op in op_db:
        name = op.name.removeprefix("nn.functional.")
        words = ("loss", "cross_entropy", "kl_div")
        if op.name != name and any(w in name for w in words) and name not in LEFT_OUT:
            golden.setdefault(name, [])
            golden[name] += [
                record(getattr(functional, name), *sample) for sample in own_samples(op)
            ]
    for name, arrays, options in AT_KINKS:
        golden[name].append(record(getattr(functional, name), arrays, options))
    lines = [
        f"  {json.dumps(name)}: [\n   "
        + ",\n   ".join(map(json.dumps, samples))
        + "\n  ]"
        for name, samples in sorted(golden.items())
    ]
    SAMPLES.write_text(
        f'{{\n "torch": {json.dumps(torch.__version__)},\n "losses": {{\n'
        + ",\n".join(lines)
        + "\n }\n}\n"
    )


if __name__ == "__main__":
    main()
