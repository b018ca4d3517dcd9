"""What PyTorch computes from the PyTorch lines of the porting guide, line by line.

    python -m tests.tools.record_torch

runs them, in float64, and writes ``torch_golden.json``, which test_porting.py holds the
JAX lines to: the values of the names that both assign, and the gradient of their sum.
Of the guide's table, it is every reduction and the gradient of the mean.
"""

import ast
import contextlib
import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.test_readme import README, blocks

GUIDE = README.parent / "examples" / "from_pytorch.md"

GOLDEN = Path(__file__).parents[1] / "oracle" / "torch_golden.json"
DIFFERENTIABLE = ("pred", "logits", "y_first", "y_second", "scale", "slope", "offset")
IN_THE_TABLE = ("x", "p", "log_p", "kernel", "frames")
REDUCTIONS = ("mean", "sum", "none")


class TableRow(NamedTuple):
    """A loss of PyTorch's, `m` here, and how its mean is read from that."""

    torch: str
    jax: str
    mean: str

    @property
    def name(self) -> str:
        """The name that it has in PyTorch."""
        return self.torch.removeprefix("F.").partition("(")[0]


def table() -> tuple[str, list[TableRow]]:
    """The block that makes the arrays, and the rows."""
    _, section = GUIDE.read_text().split("\n## Every loss by name\n")
    section = section.partition("\n## ")[0]
    rows = []
    for line in re.findall(r"^\| (`F\..*) \|$", section, re.M):
        torch, jax, mean = (cell.strip(" `") for cell in line.split("|"))
        rows.append(TableRow(torch, jax, mean or "m.compute()"))
    return blocks(section)[0][1], rows


def losses_of_torch() -> list[str]:
    """The names of the losses of `torch.nn.functional`."""
    from torch.nn import functional

    is_loss = re.compile(r"[a-z].*_loss|.*cross_entropy(_with_logits)?|kl_div")
    return sorted(filter(is_loss.fullmatch, dir(functional)))


def run_torch_table(row: TableRow, arrays: dict[str, Any]) -> dict[str, Any]:
    """What PyTorch computes of a row: by reduction, and the gradient of the mean."""
    import torch

    names = _names_in_torch(_arrays_in(arrays), IN_THE_TABLE)
    with _without_warnings():
        values = {
            reduction: eval(f"{row.torch[:-1]}, reduction={reduction!r})", names)
            for reduction in REDUCTIONS
        }
    grads = torch.autograd.grad(
        values["mean"], [names[name] for name in IN_THE_TABLE], allow_unused=True
    )
    return {
        "values": {name: value.tolist() for name, value in values.items()},
        "gradients": {
            name: grad.tolist()
            for name, grad in zip(IN_THE_TABLE, grads, strict=True)
            if grad is not None
        },
    }


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Lets PyTorch say in peace that the mean of `kl_div` is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _arrays_in(names: dict[str, Any]) -> dict[str, Any]:
    kinds = (np.ndarray, np.generic, list)
    return {name: x for name, x in names.items() if isinstance(x, kinds)}


class Row(NamedTuple):
    """Some lines of PyTorch, or another library, and those here that stand below."""

    torch: str
    jax: str

    def names(self) -> list[str]:
        """The names that the lines of both assign, not counting those in functions."""
        return sorted(_assigned(self.torch) & _assigned(self.jax))


def _assigned(source: str) -> set[str]:
    targets = [
        target
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
    ]
    nodes = (node for target in targets for node in ast.walk(target))
    return {node.id for node in nodes if isinstance(node, ast.Name)}


def porting_section() -> tuple[str, list[Row]]:
    """The block that makes the arrays, and the rows."""
    return pairs(GUIDE, "Line by line")


def pairs(guide: Path, section: str) -> tuple[str, list[Row]]:
    """The first block of a section, and its pairs of before and after."""
    _, text = guide.read_text().split(f"\n## {section}\n")
    (_, arrays), *rest = blocks(text.partition("\n## ")[0])
    languages = [language for language, _ in rest]
    assert languages == ["py", "python"] * (len(rest) // 2), languages
    texts = [text for _, text in rest]
    return arrays, [Row(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]


def run_torch(row: Row, arrays: dict[str, Any]) -> dict[str, Any]:
    """Runs the PyTorch lines: their values, and the gradient of the sum of these."""
    import torch  # only here, as JAX users need not have it

    arrays = _arrays_in(arrays)
    if "dist." not in row.torch:
        return _values_and_gradients(row, _names_in_torch(arrays))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run_rank, (row, arrays, folder), nprocs=2)
        return json.loads(Path(folder, "result").read_text())


def _run_rank(rank: int, row: Row, arrays: dict[str, Any], folder: str) -> None:
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    class Scale(torch.nn.Module):
        def __init__(self, scale: Any):
            super().__init__()
            self.scale = torch.nn.Parameter(scale.detach())

        def forward(self, logits: Any) -> Any:
            return self.scale * logits

    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    names = _names_in_torch(arrays)
    model = DistributedDataParallel(Scale(names["scale"]))
    names |= {"model": model, "dist": distributed, "rank": rank}
    result = _values_and_gradients(row, names)
    if rank == 0:
        Path(folder, "result").write_text(json.dumps(result))
    distributed.destroy_process_group()


def _names_in_torch(
    arrays: dict[str, Any], differentiable: tuple[str, ...] = DIFFERENTIABLE
) -> dict[str, Any]:
    import torch
    from torch.nn import functional
    from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(item) for item in value]
        tensor = torch.from_numpy(np.array(value))
        return tensor.double() if tensor.is_floating_point() else tensor

    tensors = {name: convert(value) for name, value in arrays.items()}
    for name in differentiable:
        tensors[name].requires_grad_()
    return tensors | {
        "torch": torch,
        "F": functional,
        "pad_sequence": pad_sequence,
        "pack_padded_sequence": pack_padded_sequence,
    }


def _values_and_gradients(row: Row, names: dict[str, Any]) -> dict[str, Any]:
    import torch

    inputs = {name: names[name] for name in DIFFERENTIABLE}
    with _without_warnings():
        exec(row.torch, names)
    values = {name: names[name] for name in row.names()}
    values = {k: x for k, x in values.items() if isinstance(x, torch.Tensor)}
    gradients = {}
    moving = [value.sum() for value in values.values() if value.requires_grad]
    if moving:
        grads = torch.autograd.grad(
            sum(moving), list(inputs.values()), allow_unused=True
        )
        gradients = {
            name: grad.tolist()
            for name, grad in zip(inputs, grads, strict=True)
            if grad is not None
        }
    return {
        "values": {name: value.tolist() for name, value in values.items()},
        "gradients": gradients,
    }


def main() -> None:
    """Writes the golden values."""
    import torch

    source, rows = porting_section()
    arrays: dict[str, Any] = {}
    exec("import numpy as np\n" + source, arrays)
    table_source, table_rows = table()
    in_table: dict[str, Any] = {}
    exec(table_source, in_table)
    golden = {
        "torch": torch.__version__,
        "losses": losses_of_torch(),
        "table": [
            {"line": row.torch} | run_torch_table(row, in_table) for row in table_rows
        ],
        "rows": [{"lines": row.torch} | run_torch(row, arrays) for row in rows],
    }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
