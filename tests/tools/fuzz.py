"""Draws losses, data and transformations at random, and asks the float64 oracle.

    python -m tests.tools.fuzz --cases 500          # prints its seed
    python -m tests.tools.fuzz --seed 7 --case 123  # one of them again

A *program* is all that is static: a loss with its options, dtypes, shapes, keywords,
and the transformations around it. Compiling takes the time, so cases 8 n to 8 n + 7
share a program, and draw data for it: contents, raggedness, weights over 30 orders of
magnitude, and poison wherever nothing counts. With each program comes a row of long
segments, by `tests.tools.fuzz_sums`. A loss of classes may have one that is out, by
`tests.tools.fuzz_classes`, and arrays may be on a mesh of explicit axes, by
`tests.tools.fuzz_meshes`.

Whatever the reduction, the result is linear in the losses of the elements that count:
``value = sum_i a_i loss_i``. So the oracle is a list of these elements, their losses
and derivatives by `tests.oracle.reference`, and a factor ``a_i`` for each, by
`factors`.
"""

import argparse
import dataclasses
import functools
import os
import secrets
import sys
import traceback
from collections.abc import Callable
from typing import Any

# As in `tests.conftest`: said before JAX starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import wloss_jax as wl
from tests.oracle import grid, reference
from tests.tools import fuzz_classes, fuzz_meshes, fuzz_sums

CASES_PER_PROGRAM = 8
SHAPES = ((4, 4), (4,), (4, 3, 2))  # of the losses; the first axis is the batch
B, NUM_SEGMENTS = 4, 3

# ------------------------------------------------------------------------ the losses


@dataclasses.dataclass(frozen=True, repr=False)
class Loss(grid.Case):
    """A row of the grid, and what all elements share: a kernel, or a parameter."""

    shared: Callable[[np.random.Generator], tuple[np.ndarray, ...]] = lambda rng: ()
    bind: Callable[..., Callable[..., Any]] = lambda loss, shared: loss
    options: Callable[[np.random.Generator], dict] = lambda rng: {}
    of_package: Callable[[np.random.Generator], dict] = lambda rng: {}  # no formula has


def one_of(**choices):
    """Draws one of the choices for each option."""
    return lambda rng: {name: pick(rng, values) for name, values in choices.items()}


def pick(rng, choices):
    return choices[rng.integers(len(choices))]


# No error that `grid` draws comes near these deltas, as rounded to bfloat16.
OPTIONS = {
    "huber_loss": one_of(delta=(0.25, 0.7, 1.5)),
    "quantile_loss": one_of(quantile=(0.0, 0.3, 0.5, 1.0)),
    "poisson_nll": one_of(log_input=(True, False), full=(True, False), eps=(0.0, 0.1)),
    "gaussian_nll": one_of(full=(True, False)),
    "sigmoid_focal_loss": one_of(alpha=(None, 0.0, 0.25), gamma=(0.0, 0.5, 1.0, 2.0)),
    "softmax_cross_entropy_with_integer_labels": one_of(
        label_smoothing=(0.0, 0.1, 1.0), z_loss=(0.0, 0.01)
    ),
    "poly_loss_cross_entropy": one_of(epsilon=(-1.0, 0.0, 2.0)),
    "triplet_margin_loss": one_of(norm_degree=(2, 4), margin=(0.5, 1.0)),
    "smooth_l1_loss": one_of(beta=(0.0, 0.25, 0.7)),
    "sigmoid_binary_cross_entropy_with_pos_weight": one_of(pos_weight=(0.0, 0.5, 3.0)),
    "hinge_embedding_loss": one_of(margin=(-0.25, 0.7)),
    "margin_ranking_loss": one_of(margin=(-0.25, 0.2)),
    "multi_margin_loss": one_of(p=(1, 2), margin=(-0.25, 0.7)),
}
FEATURES, VOCAB = 3, 5


def _bound_kernel(loss, shared):
    kernel, *bias = shared

    def bound(features, labels, **keywords):
        named = {"bias": bias[0]} if bias else {}
        return loss(features, kernel, labels, **named, **keywords)

    return bound


def _linear_reference(features, label, kernel, bias=0.0, softcap=None, **options):
    logits = features @ kernel + bias
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    return reference.softmax_cross_entropy_with_integer_labels(logits, label, **options)


def _features(rng, n):
    features = rng.integers(-20, 20, (n, FEATURES)) * 0.13 + 0.03
    return features, rng.integers(0, VOCAB, n)


def _features_some_ignored(rng, n):
    features, labels = _features(rng, n)
    return features, np.where(rng.random(n) < 0.25, grid.IGNORED, labels)


def _kernel(rng):
    return (rng.integers(-20, 20, (FEATURES, VOCAB)) * 0.05,)


def _kernel_and_bias(rng):
    return *_kernel(rng), rng.integers(-20, 20, VOCAB) * 0.1


def _linear(name, data, shared, ignore_index=None):
    return Loss(
        name,
        wl.linear_softmax_cross_entropy,
        _linear_reference,
        data,
        own_weight=lambda x, label, *_: float(label != grid.IGNORED),
        labels=1,
        shared=shared,
        bind=_bound_kernel,
        options=one_of(
            label_smoothing=(0.0, 0.1), z_loss=(0.0, 0.01), softcap=(None, 2.0)
        ),
        of_package=one_of(chunk_size=(None, 3, 7), ignore_index=(ignore_index,)),
    )


def _with_scale(loss_fn, shared):
    return wl.masked(functools.partial(loss_fn, scale=shared[0]))


def _scaled_log(x, y, *, scale):
    return jnp.log(1 + (scale * (x - y)) ** 2)


LOSSES = [
    *(
        Loss(**vars(case), options=OPTIONS.get(case.name, lambda rng: {}))
        for case in grid.CASES
    ),
    _linear("linear_softmax_cross_entropy", _features, _kernel),
    _linear("linear_softmax_cross_entropy_with_bias", _features, _kernel_and_bias),
    _linear(
        "linear_softmax_cross_entropy_some_ignored",
        _features_some_ignored,
        _kernel_and_bias,
        grid.IGNORED,
    ),
    Loss(
        "masked_that_closes_over_a_parameter",
        _scaled_log,
        lambda x, y, scale: np.log(1 + (scale * (x - y)) ** 2),
        grid.CASES[1].data,
        (0, 1),
        shared=lambda rng: (rng.uniform(0.5, 2.0, ()),),
        bind=_with_scale,
    ),
]

# ---------------------------------------------------------------- what is static

# How rows become a `WeightedMean`, and what is around that.
INNER = ("whole", "vmap", "per_sample", "scan", "halves")
OUTER = (
    *("explicit", "eager", "jit", "remat", "jvp", "hvp", "vmap of grad"),
    *("microbatches", "sharded", "pmap", "shard_map", "shard_map without check_vma"),
)
ON_DEVICES = OUTER[-4:]
VALUE_AND_GRAD = OUTER[-5:]
MAPPED = ("vmap", "per_sample")


@dataclasses.dataclass(frozen=True)
class Program:
    """What a case is compiled for."""

    loss: Loss
    options: dict[str, Any]
    of_package: dict[str, Any]
    dtypes: dict[str, str]
    x64: bool
    shape: tuple[int, ...]
    ranks: dict[str, int]  # of the keywords: the leading axes that each has
    inner: str
    reduction: str
    outer: str
    num_microbatches: int
    num_devices: int
    placement: tuple[Any, ...] | None = None  # on a mesh of explicit axes


def draw_program(rng, losses=LOSSES):
    loss, outer = pick(rng, losses), pick(rng, OUTER)
    options, of_package = loss.options(rng), loss.of_package(rng)
    if rng.random() < 0.5:
        loss = fuzz_classes.with_one_out(loss, rng)
    if loss.name.startswith("ctc_loss") and outer == "hvp":
        # In a scan, the second derivative of `jnp.logaddexp` where both are equal is
        # wrong (jax 0.10, 0.12).
        outer = "jvp"
    dtype = pick(rng, ("float32", "float32", "bfloat16", "float16", "float64"))
    x64 = bool(dtype == "float64" or rng.random() < 0.2)
    dtypes = {
        "first": dtype,
        "others": pick(rng, (dtype, "float32")),
        "labels": pick(rng, ("int32", "int8", "int64" if x64 else "int16")),
        "indices": pick(rng, fuzz_sums.DTYPES),
        "weights": pick(
            rng, ("float32", "bfloat16", "float16", "float64" if x64 else "float32")
        ),
    }
    inner = pick(rng, INNER)
    if outer == "vmap of grad" or (outer == "eager" and inner in ("scan", "halves")):
        inner = "whole"
    if outer == "explicit":  # JAX itself maps over no arrays that differ in sharding
        inner = pick(rng, ("whole", "per_sample"))
    shape = pick(rng, SHAPES)
    is_split = inner != "whole" or outer in VALUE_AND_GRAD or outer == "vmap of grad"
    ranks = {}
    for name in ("where", "lengths", "weights", "segment_ids"):
        low, high = int(is_split), len(shape) + (name != "lengths")
        if low < high and rng.random() < (0.3 if name == "segment_ids" else 0.6):
            ranks[name] = int(rng.integers(low, high))
    if outer == "vmap of grad":
        reduction = "entries"
    else:
        reductions = ["merge"]
        if outer not in VALUE_AND_GRAD:
            reductions.append("entries")
        if outer not in VALUE_AND_GRAD or inner in MAPPED:
            reductions += ["power 0", "power 0.5"]
        reduction = pick(rng, reductions)
    num_devices = pick(rng, (2, 4)) if outer in ON_DEVICES else 1
    rows = B if outer == "sharded" else B // num_devices
    may_pad = "where" in ranks or "lengths" in ranks
    divisors = [k for k in range(1, 6) if may_pad or rows % k == 0]
    if inner == "halves":  # takes two rows in each microbatch at least
        divisors = [k for k in divisors if rows > k]
    num_microbatches = pick(rng, divisors or [1]) if outer in VALUE_AND_GRAD else 1
    return Program(
        loss,
        options,
        of_package,
        dtypes,
        x64,
        shape,
        ranks,
        inner,
        reduction,
        outer,
        num_microbatches,
        num_devices,
        fuzz_meshes.draw(rng) if outer == "explicit" else None,
    )


def group_shape(program):
    """The shape of the `WeightedMean` before it is reduced."""
    by_row = program.inner in MAPPED or program.outer == "vmap of grad"
    by_segment = "segment_ids" in program.ranks
    return (B,) * by_row + (NUM_SEGMENTS,) * by_segment


# ------------------------------------------------------------------- what is compiled


def weighted_mean_of(program, arrays, shared, keywords):
    loss = functools.partial(program.loss.loss, **program.options, **program.of_package)
    loss = program.loss.bind(loss, shared)
    static = {"num_segments": NUM_SEGMENTS} if "segment_ids" in keywords else {}

    def of_rows(rows):
        return loss(*rows[0], **rows[1], **static)

    rows = (arrays, keywords)
    if program.inner == "whole":
        return of_rows(rows)
    if program.inner == "vmap":
        return jax.vmap(of_rows)(rows)
    if program.inner == "per_sample":
        return wl.per_sample(loss)(*arrays, **keywords, **static)
    if program.inner == "halves":
        half = len(arrays[0]) // 2
        parts = (slice(None, half), slice(half, None))
        return sum(of_rows(jax.tree.map(lambda x, s=s: x[s], rows)) for s in parts)
    zeros = jax.tree.map(
        lambda x: jnp.zeros_like(x, x.dtype),
        jax.eval_shape(of_rows, jax.tree.map(lambda x: x[0], rows)),
    )
    if program.outer.startswith(("shard_map", "pmap")):
        zeros = jax.tree.map(lambda x: vary_like(x, arrays[0]), zeros)
    return jax.lax.scan(lambda m, row: (m + of_rows(row), None), zeros, rows)[0]


def vary_like(x, other):
    """A carry must vary over devices as what is added to it does."""
    own, wanted = (jax.typeof(y).manual_axis_type.varying for y in (x, other))
    missing = tuple(wanted - own)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def reduced(program, m):
    """To what is divided at last."""
    kind, *power = program.reduction.split()
    if kind == "power":
        m = m.reweight(wl.size_power(float(power[0])))
    return m if kind == "entries" else m.merge()


def in_order(program, parts, rest):
    """Puts the differentiable arrays among the others."""
    arrays = dict(rest) | dict(zip(program.loss.differentiable, parts, strict=True))
    return tuple(arrays[i] for i in sorted(arrays))


def value_of(program, variables, data):
    """The number that is differentiated, and the weight behind it."""
    arrays = in_order(program, variables["parts"], data["rest"])
    m = weighted_mean_of(program, arrays, variables["shared"], data["keywords"])
    m = reduced(program, m)
    means = m.compute(data["empty"])
    if program.reduction == "entries":
        means = fuzz_meshes.whole(means)
        means = (data["cotangents"].astype(means.dtype) * means).sum()
    return means, m.weight


def make_step(program):
    """The function of ``(variables, data)`` that is tested, compiled or not."""
    value = functools.partial(value_of, program)
    outer = program.outer
    if outer in VALUE_AND_GRAD:
        return value_and_grad_step(program)
    if outer in ("jvp", "hvp"):
        return jax.jit(forward_step(value, outer))
    if outer == "vmap of grad":
        return jax.jit(functools.partial(rows_step, value))
    if outer == "remat":
        value = jax.checkpoint(value)
    gradient = jax.value_and_grad(value, has_aux=True)

    def step(variables, data):
        (mean, weight), gradients = gradient(variables, data)
        return {"value": mean, "weight": weight, "gradients": gradients}

    if outer == "eager":
        return step
    jitted = jax.jit(step)
    if program.placement is not None:
        return fuzz_meshes.on_mesh(jitted, program.placement)
    return jitted


def forward_step(value, outer):
    def step(variables, data):
        along = {"shared": data["tangents"]["shared"]} if outer == "jvp" else {}
        moving = {"parts": variables["parts"]} | {k: variables[k] for k in along}
        tangents = {"parts": data["tangents"]["parts"]} | along

        def of_moving(moving):
            return value(variables | moving, data)

        if outer == "jvp":
            mean, change, weight = jax.jvp(
                of_moving, (moving,), (tangents,), has_aux=True
            )
            return {"value": mean, "weight": weight, "change": change}
        gradient = jax.grad(lambda moving: of_moving(moving)[0])
        return {"second": jax.jvp(gradient, (moving,), (tangents,))[1]["parts"]}

    return step


def rows_step(value, variables, data):
    """The gradients of the rows, each by itself."""
    by_row = {k: data[k] for k in ("rest", "keywords", "cotangents")}

    def of_row(parts, shared, row):
        return jax.value_and_grad(value, has_aux=True)(
            {"parts": parts, "shared": shared}, row | {"empty": data["empty"]}
        )

    (means, weights), gradients = jax.vmap(of_row, in_axes=(0, None, 0))(
        variables["parts"], variables["shared"], by_row
    )
    gradients["shared"] = jax.tree.map(lambda x: x.sum(0), gradients["shared"])
    return {"value": means.sum(), "weight": weights, "gradients": gradients}


def value_and_grad_step(program):
    """`wl.value_and_grad` by the arrays themselves, of which the batch names rows."""
    on_mesh = program.outer.startswith("shard_map") or program.outer == "pmap"

    def loss_fn(variables, batch):
        parts = [part[batch["row"]] for part in variables["parts"]]
        arrays = in_order(program, parts, batch["rest"])
        m = weighted_mean_of(program, arrays, variables["shared"], batch["keywords"])
        return reduced(program, m)

    step = wl.value_and_grad(
        loss_fn,
        num_microbatches=program.num_microbatches,
        axis_name="devices" if on_mesh else None,
    )
    mesh = Mesh(np.array(jax.devices()[: program.num_devices]), ("devices",))
    if program.outer.startswith("shard_map"):
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(P(), P("devices")),
            out_specs=P(),
            check_vma=program.outer == "shard_map",
        )
    if program.outer == "pmap":
        step = jax.pmap(
            step,
            axis_name="devices",
            in_axes=(None, 0),
            devices=jax.devices()[: program.num_devices],
        )
    else:
        step = jax.jit(step)

    def run(variables, data):
        batch = {"row": np.arange(B, dtype=np.int32)}
        batch |= {k: data[k] for k in ("rest", "keywords")}
        if program.outer == "pmap":
            batch = jax.tree.map(
                lambda x: x.reshape(program.num_devices, -1, *x.shape[1:]), batch
            )
        if program.outer == "sharded":
            batch = jax.device_put(batch, NamedSharding(mesh, P("devices")))
        m, gradients = step(variables, batch)
        if program.outer == "pmap":  # the same on all devices
            m, gradients = jax.tree.map(lambda x: x[-1], (m, gradients))
        return {
            "value": m.compute(data["empty"]),
            "weight": m.weight,
            "gradients": gradients,
        }

    return run


# -------------------------------------------------------------------------- the data

FLOAT_POISON = (np.nan, np.inf, -np.inf, 1e30, -1e30, -1.0, 0.0)
INTEGER_POISON = (-100, -1, 2**31 - 1, -(2**31), 99, 0)


@dataclasses.dataclass
class Data:
    """What a program is called with, and what of it counts."""

    arrays: list[np.ndarray]
    shared: list[np.ndarray]
    keywords: dict[str, np.ndarray]
    tangents: dict[str, list[np.ndarray]]
    cotangents: np.ndarray
    empty: float
    counts: np.ndarray  # of the shape of the losses, True where an element does
    wrong: tuple[int, ...] | None  # where something that counts is NaN, or no class


def draw_data(program, rng):
    shape, loss = program.shape, program.loss
    keywords, valid = draw_masks(program, rng)
    arrays = [
        cast(program, i, array).reshape(shape + array.shape[1:])
        for i, array in enumerate(loss.data(rng, int(np.prod(shape))))
    ]
    counts = valid.copy()
    for index in np.ndindex(shape):
        counts[index] &= loss.own_weight(*(unpacked(x[index]) for x in arrays)) != 0
    tangents = [rng.normal(size=arrays[i].shape) for i in loss.differentiable]
    tangents = [
        x.astype(arrays[i].dtype)
        for x, i in zip(tangents, loss.differentiable, strict=True)
    ]
    if "weights" in program.ranks:
        shape_of_weights = shape[: program.ranks["weights"]]
        dtype = program.dtypes["weights"]
        weights = draw_weights(rng, shape_of_weights, dtype, dtype == "float16")
        keywords["weights"] = poisoned(rng, weights, ~counts)
        # An element of weight 0 is not there, whatever it holds.
        valid &= expanded(keywords["weights"] != 0, shape)
        counts &= valid
    wrong = None
    # The derivative of plain values does not depend on what they hold.
    may_be_wrong = program.outer != "hvp" and loss.name != "weighted_mean"
    if counts.any() and may_be_wrong and rng.random() < 0.1:
        wrong = tuple(map(int, pick(rng, np.argwhere(counts))))
        put_wrong(program, rng, arrays, wrong)
    # The label that is ignored says so itself; else there is poison wherever nothing
    # counts.
    for i, array in enumerate(arrays):
        arrays[i] = poisoned(rng, array, ~valid if i == loss.labels else ~counts)
    shared = [
        np.asarray(x).astype(program.dtypes["first"]).astype(program.dtypes["others"])
        for x in loss.shared(rng)
    ]
    return Data(
        arrays,
        shared,
        keywords,
        {
            "parts": [poisoned(rng, x, ~counts) for x in tangents],
            "shared": [rng.normal(size=x.shape).astype(x.dtype) for x in shared],
        },
        rng.choice([-1.5, 0.5, 1.0, 3.0], group_shape(program)),
        float(pick(rng, (0.0, 0.0, -1.5))),
        counts,
        wrong,
    )


def draw_masks(program, rng):
    """The keywords that say what counts, and the elements that do by them."""
    shape, ranks = program.shape, program.ranks
    keywords, valid = {}, np.ones(shape, bool)
    nothing = rng.random() < 0.05
    indices = np.dtype(program.dtypes["indices"])
    if "where" in ranks:
        share = 0.0 if nothing else pick(rng, (0.2, 0.8, 1.0))
        keywords["where"] = rng.random(shape[: ranks["where"]]) < share
        valid &= expanded(keywords["where"], shape)
    if "lengths" in ranks:
        rank = ranks["lengths"]
        size = shape[rank]
        # Past the end all count, and below 0 none.
        low, high = (0, 1) if nothing else (-2 * (indices.kind == "i"), size + 3)
        lengths = rng.integers(low, high, shape[:rank]).astype(indices)
        if not nothing and rng.random() < 0.2:
            info = np.iinfo(indices)
            lengths.flat[0] = pick(rng, (info.min, info.max))
        keywords["lengths"] = lengths
        for index in np.ndindex(shape):
            valid[index] &= index[rank] < lengths[index[:rank]]
    if "segment_ids" in ranks:
        ids = rng.integers(-1, NUM_SEGMENTS + 1, shape[: ranks["segment_ids"]])
        ids = poisoned(rng, ids.astype(indices), ~valid)
        keywords["segment_ids"] = ids
        valid &= expanded((ids >= 0) & (ids < NUM_SEGMENTS), shape)
    return keywords, valid


def draw_weights(rng, shape, dtype, narrow):
    kind = pick(rng, ("plain", "scaled", "spread"))
    if kind == "plain":
        weights = rng.choice([0.0, 0.25, 1.0, 2.0], shape)
    elif kind == "scaled":
        scale = 10.0 ** rng.integers(-3, 4) if narrow else 10.0 ** rng.integers(-20, 21)
        weights = scale * rng.choice([0.0, 0.25, 1.0, 2.0], shape)
    else:
        weights = 10.0 ** (rng.uniform(-3, 3, shape) * (1 if narrow else 5))
    return np.asarray(weights).astype(dtype)


def put_wrong(program, rng, arrays, index):
    """Something wrong that counts, in place: NaN, or a label that is no class."""
    loss = program.loss
    # A label that is no class has any class weight; those of ctc are mostly padding.
    may_be_label = loss.labels is not None and not (
        loss.name.startswith("ctc_loss") or "all_options" in loss.name
    )
    if may_be_label and rng.random() < 0.5:
        info = np.iinfo(arrays[loss.labels].dtype)
        arrays[loss.labels][index] = pick(rng, (-1, -100, 99, info.max, info.min))
    else:
        array = arrays[pick(rng, loss.differentiable)]
        event = (0,) * (array.ndim - len(index))
        if loss.name.startswith("nll_loss"):  # no other class has a part in it
            event = (arrays[loss.labels][index],)
        array[index + event] = np.nan


def cast(program, i, array):
    if i == program.loss.labels:
        return array.astype(program.dtypes["labels"])
    if array.dtype.kind != "f":
        return array.astype(np.int32)
    return array.astype(program.dtypes["others" if i else "first"])


def poisoned(rng, array, free):
    """Poison in place of all that is ``free``, lined up with the leading axes."""
    free = free.all(axis=tuple(range(array.ndim, free.ndim)))
    is_integer = np.issubdtype(array.dtype, np.integer)
    choices = np.array(INTEGER_POISON if is_integer else FLOAT_POISON)
    poison = rng.choice(choices, array.shape)
    with np.errstate(over="ignore"):  # 1e30 is infinite in float16
        poison = poison.astype(array.dtype)
    return np.where(expanded(free, array.shape), poison, array)


def expanded(array, shape):
    array = np.asarray(array)
    return np.broadcast_to(
        array.reshape(array.shape + (1,) * (len(shape) - array.ndim)), shape
    )


def unpacked(x):
    return x.tolist() if x.dtype.kind in "iu" else np.asarray(x).astype(np.float64)[()]


def call(program, step, data):
    differentiable = program.loss.differentiable
    variables = {
        "parts": [data.arrays[i] for i in differentiable],
        "shared": data.shared,
    }
    others = {
        "rest": {i: x for i, x in enumerate(data.arrays) if i not in differentiable},
        "keywords": data.keywords,
        "tangents": data.tangents,
        "cotangents": data.cotangents,
        "empty": np.float32(data.empty),
    }
    arguments = jax.tree.map(jnp.asarray, (variables, others))
    return jax.tree.map(np.asarray, step(*arguments))


# ------------------------------------------------------------------------- the oracle


def factors(program, data, weights):
    """The factor of each element that counts, the weight, and what empty groups add.

    ``weights`` are lists of ``(index, weight)`` by group. None is the factor of what is
    in a mean of no weight.
    """
    sums = {group: float(np.sum([w for _, w in own])) for group, own in weights.items()}
    kind, *power = program.reduction.split()
    if kind == "power":
        new = {g: w ** float(power[0]) if w else 0.0 for g, w in sums.items()}
    else:
        new = sums
    whole = sum(new.values())
    found, constant = {}, 0.0
    for group, own in weights.items():
        for index, w in own:
            if not sums[group]:
                found[index] = None if kind == "entries" or not whole else 0.0
            elif kind == "entries":
                found[index] = data.cotangents[group] * (w / sums[group])
            else:
                found[index] = (new[group] / whole) * (w / sums[group])
        if kind == "entries" and not sums[group]:
            constant += data.cotangents[group] * data.empty
    if kind == "entries":
        weight = np.zeros(group_shape(program))
        for group, w in sums.items():
            weight[group] = w
        return found, weight, constant
    return found, np.array(whole), 0.0 if whole else data.empty


def expected(program, data):
    """What the step returns, by the oracle, and the unit of each number's rounding.

    An element's loss and derivatives are made of numbers of size 1 and more, whose
    roundings stay when they cancel: the unit of a number is its factor times 1 plus its
    size.
    """
    loss = program.loss
    formula = functools.partial(loss.reference, **program.options)
    differentiable = loss.differentiable + tuple(
        range(len(data.arrays), len(data.arrays) + len(data.shared))
    )
    weights = {group: [] for group in np.ndindex(group_shape(program))}
    elements = {}
    shared = [x.astype(np.float64) for x in data.shared]
    for index in map(tuple, np.argwhere(data.counts)):
        element = [unpacked(x[index]) for x in data.arrays]
        group = (index[0],) if group_shape(program)[:1] == (B,) else ()
        if "segment_ids" in data.keywords:
            ids = data.keywords["segment_ids"]
            group += (int(ids[index[: ids.ndim]]),)
        own = loss.own_weight(*element)
        if "weights" in data.keywords:
            array = data.keywords["weights"]
            own *= float(array[index[: array.ndim]])
        weights[group].append((index, own))
        elements[index] = [*element, *shared]
    found, weight, constant = factors(program, data, weights)

    parts = [data.arrays[i] for i in loss.differentiable]
    gradients = [np.zeros(x.shape) for x in (*parts, *shared)]
    units = [np.zeros(x.shape) for x in (*parts, *shared)]
    second, second_units = ([np.zeros(x.shape) for x in parts] for _ in range(2))
    value, value_unit = constant, abs(constant)
    change = change_unit = 0.0
    for index, element in elements.items():
        a = found[index]
        if index == data.wrong:
            mark_nan(gradients, index, len(parts))
            # Whatever it is, a mean of no weight is 0, or what `empty` says.
            if a is not None:
                value = change = np.nan
            continue
        a = a or 0.0
        size = formula(*element)
        value, value_unit = value + a * size, value_unit + abs(a) * (1 + abs(size))
        if not a:
            continue
        derivatives = reference.gradients(formula, element, differentiable)
        largest = 1 + max(np.abs(d).max() for d in derivatives)
        for k, d in enumerate(derivatives):
            place = index if k < len(parts) else ...
            gradients[k][place] += a * d
            units[k][place] += abs(a) * largest
        tangents = [x[index].astype(np.float64) for x in data.tangents["parts"]]
        if program.outer == "jvp":
            tangents += [x.astype(np.float64) for x in data.tangents["shared"]]
            for d, t in zip(derivatives, tangents, strict=True):
                change += a * np.sum(d * t)
                change_unit += abs(a) * largest * np.sum(np.abs(t))
        if program.outer == "hvp":
            curved = reference.second_derivatives(
                formula, element, loss.differentiable, tangents
            )
            largest = max(1 + np.abs(d).max() for d in (*curved, *derivatives))
            for k, d in enumerate(curved):
                second[k][index] = a * d
                second_units[k][index] = abs(a) * largest
    n = len(parts)
    return {
        "value": (value, value_unit),
        "weight": (weight, np.abs(weight)),
        "gradients": (
            {"parts": gradients[:n], "shared": gradients[n:]},
            {"parts": units[:n], "shared": units[n:]},
        ),
        "change": (change, change_unit),
        "second": (second, second_units),
    }


def mark_nan(gradients, index, num_parts):
    """NaN stands for "anything": of one wrong element, and of what all share."""
    for k, gradient in enumerate(gradients):
        gradient[index if k < num_parts else ...] = np.nan


# ------------------------------------------------------------------------- comparing


def tolerance(program, key, got):
    """How many units ``got`` may be off, and how much in any case.

    5e-6 is some 40 roundings of float32, as in `tests.test_losses`, and where float32
    targets meet float64 predictions, what looks at the targets alone is float32; the
    oracle's own derivatives are good to about 1e-9, its second ones to 1e-6. In 16 bits
    all is computed in float32 and rounded once, at the end, to 8 or 11 bits; except
    that `linear_softmax_cross_entropy` rounds the slope of the logits before two
    products, and that what the rows of a scan, or microbatches, share is rounded in
    each of them. Below the smallest normal number, anything may be flushed to 0.
    """
    first, others = (jnp.finfo(program.dtypes[name]) for name in ("first", "others"))
    is_wide = first.bits == others.bits == 64 and got.dtype.itemsize == 8
    rtol = 1e-8 if is_wide else 5e-6
    if key == "second":
        rtol = 2e-5
    finfo = jnp.finfo(got.dtype)
    if finfo.bits == 16:
        rtol = max(rtol, float(finfo.eps))
    if first.bits == 16 and program.loss.shared and key not in ("value", "weight"):
        rtol = 0.03
    return rtol, float(finfo.tiny)


def mistakes(program, data, outcome):
    """Compares, and returns what is off, in words."""
    found = []
    oracle = expected(program, data)
    for key, got in outcome.items():
        if key == "weight" and data.wrong:
            continue  # of a label that is no class, a class weight is any
        desired, units = oracle[key]
        paths = jax.tree_util.tree_flatten_with_path(got)[0]
        leaves = zip(
            paths,
            jax.tree.leaves(desired),
            jax.tree.leaves(units),
            strict=True,
        )
        for (path, leaf), wanted, unit in leaves:
            name = key + jax.tree_util.keystr(path)
            if leaf.shape != np.shape(wanted):
                found.append(f"{name} is of {leaf.shape}, not {np.shape(wanted)}")
                continue
            rtol, atol = tolerance(program, key, leaf)
            actual = leaf.astype(np.float64)
            with np.errstate(invalid="ignore"):
                fits = np.abs(actual - wanted) <= rtol * unit + atol * (unit > 0)
            if key in ("value", "change"):
                fits |= np.isnan(actual) & np.isnan(wanted)
            else:
                fits |= np.isnan(wanted)
            if not fits.all():
                where = tuple(map(int, np.argwhere(~fits)[0]))
                found.append(
                    f"{name}{list(where)} is {actual[where]:.9g}, and by the oracle "
                    f"{np.asarray(wanted)[where]:.9g} (in units of "
                    f"{np.asarray(unit)[where]:.3g}; {int((~fits).sum())} of "
                    f"{fits.size} are off)"
                )
    found += wrong_dtypes(program, data, outcome)
    return found


def wrong_dtypes(program, data, outcome):
    """Gradients have the dtypes of what they are of, and a mean 32 bits at least."""
    found = []
    if "value" in outcome:
        least = jnp.promote_types(program.dtypes["first"], jnp.float32)
        dtype = outcome["value"].dtype
        if jnp.promote_types(dtype, least) != dtype:
            found.append(f"the value is {dtype}, not {least}")
    if "gradients" in outcome:
        parts = [data.arrays[i] for i in program.loss.differentiable]
        for got, array in zip(outcome["gradients"]["parts"], parts, strict=True):
            if got.dtype != array.dtype:
                found.append(f"the gradient of {array.dtype} is {got.dtype}")
    return found


# --------------------------------------------------------------------------- running


@functools.lru_cache(maxsize=1)
def program_of(seed, number):
    program = draw_program(np.random.default_rng([seed, number]))
    return program, make_step(program)


def run_case(seed, number):
    """Runs a case, and says in words what is off; also returns program and data."""
    program, step = program_of(seed, number // CASES_PER_PROGRAM)
    data = draw_data(program, np.random.default_rng([seed, number, 1]))
    with jax.enable_x64(program.x64):
        try:
            found = mistakes(program, data, call(program, step, data))
        except Exception:
            found = [traceback.format_exc(limit=-4)]
    if number % CASES_PER_PROGRAM == 0:
        found += fuzz_sums.mistakes(np.random.default_rng([seed, number, 2]))
    return found, program, data


def report(seed, number, found, program, data):
    """The lines that say what failed, and how to see it again."""
    fields = {
        field.name: getattr(program, field.name)
        for field in dataclasses.fields(program)
    }
    keywords = {name: value.tolist() for name, value in data.keywords.items()}
    lines = [
        f"FAILED: case {number} of seed {seed}",
        *(f"  {line}" for message in found for line in message.splitlines()),
        *(f"  {name} = {value}" for name, value in fields.items()),
        *(f"  {name} = {value}" for name, value in keywords.items()),
        f"  counts = {data.counts.tolist()}; wrong at {data.wrong}",
        "Again, from a shell or from Python:",
        f"  python -m tests.tools.fuzz --seed {seed} --case {number}",
        "  from tests.tools import fuzz",
        f"  found, program, data = fuzz.run_case({seed}, {number})",
        f"  step = fuzz.program_of({seed}, {number // CASES_PER_PROGRAM})[1]",
        "  print(fuzz.call(program, step, data), fuzz.expected(program, data))",
    ]
    return "\n".join(lines)


def progress(numbers):
    try:
        import tqdm
    except ImportError:
        return numbers
    return tqdm.tqdm(numbers, disable=not sys.stderr.isatty())


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, help="drawn, and printed, if not given")
    parser.add_argument("--case", type=int, help="only this one")
    options = parser.parse_args(arguments)
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    one = options.case
    numbers = range(options.cases) if one is None else range(one, one + 1)
    failed = 0
    for number in progress(numbers):
        found, program, data = run_case(seed, number)
        if found:
            failed += 1
            print(report(seed, number, found, program, data), flush=True)
    print(f"{len(numbers)} cases, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
