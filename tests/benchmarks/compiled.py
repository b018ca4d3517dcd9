"""What compilers make of the losses, for TPUs and an H100, without any at hand.

``python -m tests.benchmarks.compiled [--target-config FILE] [--json FILE]``: TPUs need
the `libtpu` package; H100 needs JAX's CUDA 13 plugin and the facts of the GPU in a
FILE, as `jax.experimental.topologies` takes them. What is not there is left out.

Counted are the kernels that touch an array of the data's size (small sums come on top),
the bytes that all kernels read and write, an element, beside the fewest possible, each
input read and each gradient written once, and the temporary memory, in the same unit.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import wloss_jax as wl
from tests.benchmarks import losses, two_heads

TPUS = {"TPU v5e": "v5e:2x2", "TPU v6e": "v6e:2x2"}
PODS = {"256 chips": "v6e:16x16", "4096 chips": "v5p:16x16x16"}
ROWS, SIZE = 1024, 4096


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and the shapes of its arguments; the first ones are differentiated."""

    mean: Callable[..., jax.Array]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    differentiated: int = 1


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def programs() -> dict[str, Program]:
    """The two-head losses of `two_heads`, and every public loss, with lengths."""
    rows = _array(ROWS, dtype=jnp.int32)
    batch = (*[_array(ROWS, SIZE)] * 3, rows, rows)
    named = {
        f"two heads, {name}": Program(two_heads._ours(loss, 2, missing=False), batch, 2)
        for name, loss in two_heads.LOSSES.items()
    }
    named["two heads, MAE, targets missing"] = Program(
        two_heads._ours(two_heads.LOSSES["MAE"], 2, missing=True), batch, 2
    )
    rng = np.random.default_rng(0)
    for name, loss in losses.LOSSES.items():
        if name != "ctc_loss":  # a loop over frames, of which no element is the unit
            named[name] = _of_loss(name, loss, rng)
    return named


def _of_loss(name: str, loss: losses.Loss, rng: np.random.Generator) -> Program:
    small = loss.arrays(rng, (2, 2, *[4] * (len(loss.shape) - 2)))
    arrays = [
        jax.ShapeDtypeStruct(loss.shape[: array.ndim], array.dtype) for array in small
    ]

    def mean(*arguments):
        *arrays, lengths = arguments
        return getattr(wl, name)(*arrays, lengths=lengths).compute()

    return Program(mean, (*arrays, _array(loss.shape[0], dtype=jnp.int32)))


# ------------------------------------------------------------------------- targets


def targets(config: str | None) -> dict[str, tuple[str, Any]]:
    """The platform and a device of each target that can be compiled for here."""
    found = {}
    if importlib.util.find_spec("libtpu") is not None:
        for name, topology in TPUS.items():
            devices = topologies.get_topology_desc(topology, platform="tpu").devices
            found[name] = "tpu", devices[0]
    if config and importlib.util.find_spec("jax_cuda13_plugin") is not None:
        with open(config) as file:
            description = topologies.get_topology_desc(
                platform="cuda",
                topology_name="h100",
                target_config=file.read(),
                topology="1x1x1",
            )
        found["H100"] = "cuda", description.devices[0]
    return found


def compiled(program: Program, platform: str, device: Any) -> Any:
    sharding = SingleDeviceSharding(device)
    arguments = [
        jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding)
        for one in program.arguments
    ]
    step = jax.value_and_grad(program.mean, tuple(range(program.differentiated)))
    return (
        jax.jit(step).trace(*arguments).lower(lowering_platforms=(platform,)).compile()
    )


# ----------------------------------------------------------------- reading a program

_BYTES = {"pred": 1, "bf16": 2}
_SHAPE = re.compile(r"\b(pred|bf16|[sufc]\d+)\[([\d,]*)\]")
_LINE = re.compile(r"\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
# Nothing is run for these; what moves ahead of time is counted where it is used.
_FREE = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|.*-start|.*-done"
)


def kernels(text: str) -> dict[str, int]:
    """The bytes that each kernel of a compiled program reads and writes, by name."""
    sizes: dict[str, int] = {}
    found = {}
    for line in text[text.index("\nENTRY") :].splitlines():
        match = _LINE.match(line)
        if not match:
            continue
        name, shape, operation, rest = match.groups()
        operands = re.findall(r"%([\w.-]+)", rest.split("metadata=")[0])
        sizes[name] = _size(shape)
        if not _FREE.fullmatch(operation):
            found[name] = sizes[name] + sum(sizes.get(one, 0) for one in operands)
    return found


def _size(shape: str) -> int:
    return sum(
        _BYTES.get(dtype, int(re.sub(r"\D", "", dtype) or 8) // 8)
        * math.prod(int(n) for n in numbers.split(",") if n)
        for dtype, numbers in _SHAPE.findall(shape)
    )


def measure(program: Program, platform: str, device: Any) -> dict[str, float]:
    step = compiled(program, platform, device)
    first = program.arguments[0]
    found = kernels(step.as_text())
    arrays = [*program.arguments, *program.arguments[: program.differentiated]]
    fewest = sum(one.size * one.dtype.itemsize for one in arrays)
    return {
        "kernels": sum(size >= first.size for size in found.values()),
        "bytes": round(sum(found.values()) / first.size, 2),
        "fewest": round(fewest / first.size, 2),
        "temporary": round(step.memory_analysis().temp_size_in_bytes / first.size, 2),
    }


# Tokens, features and classes of the linear cross-entropy, in bfloat16.
LINEAR = {"cuda": (32768, 2560, 128256), "tpu": (8192, 4096, 128256)}


def linear(platform: str, device: Any) -> dict[str, float]:
    """The temporary memory of the linear cross-entropy and its gradients, in GiB."""
    tokens, features, classes = LINEAR[platform]

    def ours(x, kernel, labels):
        return wl.linear_softmax_cross_entropy(x, kernel, labels).compute()

    def naive(x, kernel, labels):
        logits = (x @ kernel.astype(x.dtype)).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    figures = {}
    for name, mean, dtype in (
        ("wloss_jax", ours, jnp.bfloat16),
        ("wloss_jax, float32 masters", ours, jnp.float32),
        ("naive", naive, jnp.bfloat16),
        ("naive, float32 masters", naive, jnp.float32),
    ):
        arguments = (
            _array(tokens, features, dtype=jnp.bfloat16),
            _array(features, classes, dtype=dtype),
            _array(tokens, dtype=jnp.int32),
        )
        step = compiled(Program(mean, arguments, differentiated=2), platform, device)
        figures[name] = step.memory_analysis().temp_size_in_bytes / 2**30
    return figures


# How people shard tokens, and a kernel [D, V], over the chips of one axis.
SHARDED = {
    "vocabulary over the chips": (P(), P(None, "chips")),
    "FSDP": (P("chips"), P("chips")),
    "data parallel": (P("chips"), P()),
}


def sharded(topology: str) -> dict[str, float]:
    """The temporary memory of `linear` on each of four chips, in GiB."""
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = Mesh(np.array(devices), ("chips",))
    tokens, features, classes = LINEAR["tpu"]
    figures = {}
    for name, (of_tokens, of_kernel) in SHARDED.items():
        arguments = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for shape, dtype, spec in (
                ((tokens, features), jnp.bfloat16, of_tokens),
                ((features, classes), jnp.bfloat16, of_kernel),
                ((tokens,), jnp.int32, of_tokens),
            )
        ]

        def mean(x, kernel, labels):
            return wl.linear_softmax_cross_entropy(x, kernel, labels).compute()

        gradients = tuple(one.sharding for one in arguments[:2])
        step = jax.jit(
            jax.value_and_grad(mean, (0, 1)), out_shardings=(None, gradients)
        )
        lowered = step.trace(*arguments).lower(lowering_platforms=("tpu",))
        memory = lowered.compile().memory_analysis()
        figures[name] = memory.temp_size_in_bytes / 2**30
    return figures


def pod(topology: str) -> dict[str, Any]:
    """What a training step moves between the chips of a pod."""
    from tests import test_compiled as step

    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = Mesh(np.array(devices).ravel(), ("data",))
    program = step.compile_step(
        step.mapped(mesh, num_microbatches=4), rows=4 * len(devices), mesh=mesh
    )
    text = program.as_text()
    return {
        "chips": len(devices),
        "parameters": step.NUM_PARAMS,
        "numbers in all-reduces": sorted(map(sum, step.all_reduces(text))),
        "all-reduces in the loop": len(step.all_reduces(step.loops(text))),
        "other collectives": sum(move in text for move in step.MOVES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.compiled", description=__doc__.split("\n")[0]
    )
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help="all by default")
    parser.add_argument("--target-config", metavar="FILE", help="the facts of an H100")
    parser.add_argument("--linear", action="store_true", help="no other program")
    parser.add_argument("--no-pods", action="store_true", help="single chips only")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    options = parser.parse_args()

    everything = programs()
    if options.linear:
        everything = {}
    chosen = {name: everything[name] for name in options.programs or everything}
    found = targets(options.target_config)
    print(f"jax {jax.__version__}; targets: {', '.join(found) or 'none'}\n")
    print("kernels of the data's size / bytes an element (fewest) / temporary bytes\n")
    print("| program | " + " | ".join(found) + " |")
    print("|---" * (len(found) + 1) + "|")
    figures: dict[str, Any] = {}
    for name, program in chosen.items():
        figures[name] = {key: measure(program, *found[key]) for key in found}
        cells = [
            "{kernels} / {bytes:g} ({fewest:g}) / {temporary:g}".format(**one)
            for one in figures[name].values()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if not options.programs:
        figures["linear"] = {key: linear(*found[key]) for key in found}
        print("\nlinear cross-entropy, temporary GiB")
        for key, one in figures["linear"].items():
            sizes = ", ".join(map(str, LINEAR[found[key][0]]))
            memory = "; ".join(f"{name} {gib:.2f}" for name, gib in one.items())
            print(f"{key}, {sizes}: {memory}", flush=True)
        if "TPU v5e" in found:
            figures["sharded"] = sharded(TPUS["TPU v5e"])
            memory = "; ".join(f"{k} {v:.2f}" for k, v in figures["sharded"].items())
            print(f"TPU v5e, four chips, each: {memory}", flush=True)
    if "TPU v6e" in found and not options.no_pods:
        figures["pods"] = {name: pod(topology) for name, topology in PODS.items()}
        print()
        for name, one in figures["pods"].items():
            print(f"{name} ({PODS[name]}): {one}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    # Other programs on the machine may be compiling too; there is no GPU driver to ask.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_platforms", "cpu")
    main()
