"""What the linear losses have in common before and after the sweep over chunks.

Their arguments are checked here, options are told apart (numbers are compiled in,
traced scalars are arrays), tokens that count are marked, and what comes back of each
token is reduced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from wloss_jax._checks import (
    Option,
    check_array,
    check_count,
    check_known,
    check_number,
    check_rank,
    check_shape,
    check_type,
    check_value,
    is_traced,
)
from wloss_jax._counting import WhatCounts
from wloss_jax._devices import check_mapped, vary

# Nothing here calls these two: importing them gives the primitives their rules, without
# which JAX could neither differentiate nor vmap what is bound below.
from wloss_jax.linear import _derivatives, _vmap  # noqa: F401 (for their rules)
from wloss_jax.linear._logits import LogitLoss, Task
from wloss_jax.linear._primitives import varying
from wloss_jax.linear._programs import largest_weight, losses_p, total_p
from wloss_jax.means import WeightedMean

Named = dict[str, Any]
_Result = TypeVar("_Result")


# ----------------------------------------------------------------------------- options

_LIMITS: dict[str, dict[str, Any]] = {
    "label_smoothing": {"low": 0, "high": 1},
    "softcap": {"low": 0, "strictly": True},
    "temperature": {"low": 0, "strictly": True},
    "z_loss": {"low": 0},
}
# What an option does nothing at, and is left out at.
_NEUTRAL = {"label_smoothing": 0.0, "z_loss": 0.0, "temperature": 1.0}


def split_options(
    **options: Option | None,
) -> tuple[tuple[tuple[str, float], ...], Named]:
    """Numbers that are compiled in, checked, and scalars that may be traced."""
    fixed, traced = [], {}
    for name, value in options.items():
        if value is None and name not in _NEUTRAL:
            continue
        check_number(name, value, **_LIMITS.get(name, {}))
        if is_traced(value):
            traced[name] = value
        # A number that does nothing is left out, so that it costs nothing either.
        elif value != _NEUTRAL.get(name):
            fixed.append((name, float(cast(float, value))))
    return tuple(fixed), traced


def scalars(traced: Named, features: jax.Array) -> list[jax.Array]:
    """Options that may be traced, in the precision of the logits."""
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    return [jnp.asarray(option, dtype) for option in traced.values()]


def check_static(chunk_size: int | None, vocab_axis_name: str | None = None) -> None:
    """Checks the options that can only be static."""
    if chunk_size is not None:
        check_count("chunk_size", chunk_size, at_least=1)
    check_type(
        "vocab_axis_name",
        vocab_axis_name is None or isinstance(vocab_axis_name, str),
        "must be the name of one mapped axis, or None for a vocabulary that is not "
        f"sharded; got {vocab_axis_name!r}.",
    )
    check_mapped("vocab_axis_name", vocab_axis_name or ())


# -------------------------------------------------------------------------------- data


def check_data(
    features: ArrayLike, kernel: ArrayLike, bias: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Checks what makes the logits; a bias that is not there is 0."""
    features = check_array("features", features, float)
    kernel = check_array("kernel", kernel, float)
    due = (
        f"has shape {kernel.shape} and `features` {features.shape}: they must be "
        "(D, V) and (..., D)."
    )
    check_rank("kernel", kernel, [2], due)
    check_rank(
        "features",
        features,
        range(1, 33),
        f"has shape {features.shape}: it must be (..., D).",
    )
    check_value(
        "kernel",
        features.shape[-1] == kernel.shape[0],
        f"{due} Transpose a kernel of (V, D), an embedding table say.",
    )
    for name, array in (("features", features), ("kernel", kernel)):
        check_known(
            name,
            array.shape,
            "tokens are taken a chunk at a time, and how many chunks there are must be "
            "known. Export one program for each size, or the loss of logits, "
            "`softmax_cross_entropy_with_integer_labels` say.",
        )
    check_value("kernel", kernel.size > 0, f"{due} D and V are at least 1.")
    # One program for both: the addition is a small part of the product before it.
    if bias is None:
        bias = jnp.zeros(kernel.shape[1:], jnp.float32)
    bias = check_array("bias", bias, float)
    check_shape(
        "bias",
        bias,
        kernel.shape[1:],
        f"has shape {bias.shape}: it must be (V,), {kernel.shape[1:]} for this "
        "`kernel`.",
    )
    return features, kernel, bias


def check_class_mask(
    class_mask: ArrayLike | None, shape: tuple[int, ...], num_classes: int
) -> tuple[str | None, list[jax.Array]]:
    """Checks a mask of the classes, for all tokens (shared) or for each (arrays)."""
    if class_mask is None:
        return None, []
    class_mask = check_array("class_mask", class_mask, bool)
    full = (*shape, num_classes)
    check_value(
        "class_mask",
        class_mask.shape in ((num_classes,), full),
        f"has shape {class_mask.shape}: it must be (V,), {(num_classes,)} for this "
        f"`kernel`, or {full}, a mask for each token.",
    )
    return "shared" if class_mask.ndim == 1 else "arrays", [class_mask]


def mask_of(counts: WhatCounts) -> jax.Array:
    """Which tokens count, also where all do."""
    return jnp.ones(counts.shape, bool) if counts.mask is None else counts.mask


# ----------------------------------------------------------------------------- results


class Problem(NamedTuple):
    """A loss of logits and all that it is made of: the operands of a primitive.

    ``shared_varies`` says whether what is shared may be typed as differing over more
    mapped axes than it came with.
    """

    loss: LogitLoss
    features: jax.Array
    kernel: jax.Array
    bias: jax.Array
    arrays: list[jax.Array]
    shared: list[jax.Array]
    chunk_size: int | None = None
    vocab_axis_name: str | None = None
    shared_varies: bool = True

    def bind(self, primitive: Any, mask: jax.Array, *rest: jax.Array) -> list[Any]:
        """Calls the primitive, with operands that differ over the same mapped axes.

        A derivative inside of it, by what differs over fewer axes than the result does,
        would be added up over devices there, and then once more outside. Over the axis
        of the vocabulary operands differ as they came: results do not.
        """
        task = Task(
            self.loss,
            len(self.arrays),
            len(self.shared),
            None if self.chunk_size is None else int(self.chunk_size),
            self.vocab_axis_name,
            cast(Any, jax.config).jax_default_matmul_precision,
        )
        first = [self.features, self.kernel, self.bias, mask, *self.arrays]
        axes = frozenset[str]().union(*map(varying, (*first, *self.shared, *rest)))
        names = tuple(axes - {self.vocab_axis_name})
        shared = self.shared
        if self.shared_varies:
            shared = [vary(x, names) for x in shared]
        first, last = ([vary(x, names) for x in some] for some in (first, rest))
        return cast(list[Any], primitive.bind(*first, *shared, *last, task=task))


def values_of(
    problem: Problem, mask: jax.Array
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The outputs and the residuals of each token, 0 where none counts."""
    values = problem.bind(losses_p, mask)
    num_outputs = problem.loss.num_outputs
    residuals = jax.lax.stop_gradient(values[num_outputs:])
    return values[:num_outputs], residuals


def mean_of(
    problem: Problem, counts: WhatCounts
) -> tuple[WeightedMean, list[jax.Array]]:
    """The mean of the loss, and the residuals of each token."""
    mask = mask_of(counts)
    # Sums by segment need the loss of each token; one total of all does not, and its
    # gradient comes in the same sweep.
    if counts.segment_ids is not None:
        (loss,), residuals = values_of(problem, mask)
        return reduced(loss, counts), residuals
    weights = jnp.ones(mask.shape, jnp.promote_types(problem.features.dtype, "float32"))
    weight = reduced(weights, counts).weight
    if counts.weights is not None:
        weights = counts.weights.astype(weight.dtype)
    # In float16 weights are divided by the largest before the sweep, and the total is
    # multiplied by it behind: else a weight of 1e-9 would be none.
    largest = largest_weight(problem.features.dtype, [weights], mask)
    total, *residuals = problem.bind(total_p, mask, weights / largest)
    residuals = jax.lax.stop_gradient(residuals)
    return WeightedMean(total * largest, weight), residuals


def reduced(values: jax.Array, counts: WhatCounts) -> WeightedMean:
    """The mean of the values of tokens."""
    return WeightedMean(*counts.add_up(values))


# ------------------------------------------------------------------------------ meshes


def in_auto(
    function: Callable[[Named], _Result], arrays: Named, *, of_tokens: bool = False
) -> _Result:
    """Calls ``function(arrays)``, with explicit axes of a mesh given to the compiler.

    What shardings the primitives have inside is the compiler's to choose. The result is
    replicated, or sharded as the tokens are.
    """
    for leaf in jax.tree.leaves(arrays):
        sharding = jax.typeof(leaf).sharding
        if sharding.mesh.explicit_axes:
            break
    else:
        return function(arrays)
    mesh = sharding.mesh
    spec = PartitionSpec()
    if of_tokens:
        features = jax.typeof(arrays["features"]).sharding.spec
        spec = PartitionSpec(*features[:-1])
    in_auto_mode = jax.sharding.auto_axes(
        function, axes=mesh.explicit_axes, out_sharding=NamedSharding(mesh, spec)
    )
    return cast(_Result, in_auto_mode(arrays))
