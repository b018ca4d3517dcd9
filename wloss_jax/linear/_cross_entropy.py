"""`linear_softmax_cross_entropy`."""

from __future__ import annotations

import sys
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from wloss_jax._checks import (
    check_array,
    check_count,
    check_number,
    check_rank,
    check_shape,
    check_type,
    check_value,
)
from wloss_jax._devices import check_mapped, jit_compiled
from wloss_jax.linear import _derivatives, _vmap  # noqa: F401  the primitives' rules
from wloss_jax.linear._chunks import Arrays
from wloss_jax.linear._logits import Options
from wloss_jax.linear._programs import largest_weight, losses_p, total_p
from wloss_jax.losses._labels import check_labels, counted_labels
from wloss_jax.masks import expand_leading, valid_mask
from wloss_jax.means import WeightedMean, weighted_mean


@jit_compiled(
    "num_segments",
    "ignore_index",
    "label_smoothing",
    "z_loss",
    "softcap",
    "chunk_size",
    "vocab_axis_name",
)
def linear_softmax_cross_entropy(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    vocab_axis_name: str | None = None,
) -> WeightedMean:
    """Computes the cross-entropy of ``features @ kernel + bias``, without those logits.

    ``lse - (1 - s) * x_y - s * mean_v(x_v) + z_loss * lse**2`` with
    ``x = c * tanh((features @ kernel + bias) / c)``, ``lse = logsumexp_v(x)``,
    ``s = label_smoothing`` and ``c = softcap`` (no ``tanh`` where that is None)

    Tokens that do not count cost nothing: those that do are gathered to the front, and
    the loop ends behind the last of them, so that time follows the tokens that count
    while shapes stay static. Memory is that of the gradients (in float32 for
    ``kernel``) and of one chunk of logits. The value alone takes one matrix product; it
    and the gradients of features and kernel three; with ``segment_ids``, or under
    `jax.vmap`, four. What is not differentiated is not multiplied either.

    Products have the dtype of ``features``, and so has the gradient of the logits
    before its own two; the log-sum-exp, the loss and the sum of the kernel's gradient
    are float32 (or float64). A kernel of float32 masters under bfloat16 features gets
    its gradient in float32, unrounded.

    **Devices.** Each device keeps to its own tokens and makes as many rounds as the one
    with most of them: under `jax.shard_map` and `jax.pmap`, and under plain `jax.jit`
    where the leading axis of the tokens is the one that is spread over devices. With
    ``vocab_axis_name``, under `jax.shard_map`, ``kernel`` and ``bias`` are a device's
    shard of the vocabulary and ``labels`` count through all of it; two small reductions
    of a chunk (maximum, sums) are all that passes between devices, and every device of
    the axis gets the whole loss. The gradient of a kernel's shard stays where it is;
    that of the features, which these devices share, is added up over them. With
    ``check_vma=False`` both hold for a gradient taken *inside* the `jax.shard_map`; one
    taken outside of it needs ``check_vma=True``, or the kernel's is a fraction of it.

    Args:
      features: floating ``[..., D]``: bfloat16, float32, ....
      kernel: floating ``[D, V]``, of any dtype; cast to that of ``features``.
      labels: integer ``[...]``.
      bias: floating ``[V]``; -infinity takes a class out, unless a ``softcap`` bounds
        it.
      where: bool; this and the next four are as in `weighted_mean`, for losses
        ``[...]``.
      lengths: integer.
      weights: floating.
      segment_ids: integer.
      num_segments: static; the result then has the shape ``[num_segments]``.
      ignore_index: a label that marks a token as masked, -100 say; None for none.
      label_smoothing: the share of the label that is spread evenly over all classes.
      z_loss: the factor of ``lse**2``, which keeps logits from drifting.
      softcap: bounds the logits softly, to ``-softcap .. softcap``.
      chunk_size: tokens taken at a time on each device. None chooses, for ``n`` tokens
        on each device: 512 on CPU, ``D / 8`` on TPU, in steps of 256, but at
        least 512, ``2 D / 3`` on GPU, in steps of 1024, but at least 1024; at most
        8192, and ``n``. A chunk's logits then take less memory than the kernel's
        gradient. Where there is plenty, 2048 is faster on GPU for a small ``D``.
      vocab_axis_name: the mapped axis that the vocabulary is sharded over.

    Returns:
      A scalar `WeightedMean`, or one of ``[num_segments]`` with ``segment_ids``.

    Raises:
      AssertionError: a shape, a dtype or an option that does not fit; the message names
        the argument, what came, what was expected, and how to mend it.
      NotImplementedError: a second derivative with ``vocab_axis_name``; without, all
        derivatives exist, those after the first by a plain program of more memory.

    Example:
      >>> import jax.numpy as jnp
      >>> import wloss_jax as wl
      >>> features, kernel = jnp.ones((3, 2)), jnp.zeros((2, 4))
      >>> labels = jnp.array([0, 3, -100])
      >>> loss = wl.linear_softmax_cross_entropy(
      ...     features, kernel, labels, ignore_index=-100
      ... )
      >>> print(f"{loss.compute():.4f} over {loss.weight} labels")
      1.3863 over 2.0 labels

    Source:
      The gradient in the forward pass: Hsu et al., Liger Kernel, 2024; skipping what
      does not count: Wijmans et al., Cut Your Losses in Large-Vocabulary Language
      Models, 2024; the sharded vocabulary: Shoeybi et al., Megatron-LM, 2019.
    """
    features, kernel, labels, bias = _check_data(features, kernel, labels, bias)
    _check_options(label_smoothing, z_loss, softcap, chunk_size, vocab_axis_name)
    shape = labels.shape
    if ignore_index is not None:
        where = counted_labels(labels, ignore_index, where)
    mask = valid_mask(
        shape,
        where=where,
        lengths=lengths,
        segment_ids=segment_ids,
        num_segments=num_segments,
    )
    options = Options(
        label_smoothing,
        z_loss,
        softcap,
        None if chunk_size is None else int(chunk_size),
        vocab_axis_name,
        cast(Any, jax.config).jax_default_matmul_precision,
    )

    def reduce(
        primals: Arrays, weights: jax.Array | None, segment_ids: jax.Array | None
    ) -> WeightedMean:
        mask = primals[-1]
        if segment_ids is not None:
            losses, _ = losses_p.bind(*primals, options=options)
            return weighted_mean(
                losses,
                where=mask,
                weights=weights,
                segment_ids=segment_ids,
                num_segments=num_segments,
            )
        ones = jnp.ones(shape, jnp.promote_types(features.dtype, jnp.float32))
        weight = weighted_mean(ones, where=mask, weights=weights).weight
        if weights is not None:
            weights = expand_leading("weights", weights, shape)
            ones = jax.lax.stop_gradient(weights).astype(ones.dtype)
        largest = largest_weight(features.dtype, ones, mask)
        (total,) = total_p.bind(*primals, ones / largest, options=options)
        return WeightedMean(total * largest, weight)

    if mask is None:
        mask = jnp.ones(shape, bool)
    if weights is not None:
        weights = check_array("weights", weights, float)
    if segment_ids is not None:
        segment_ids = check_array("segment_ids", segment_ids, int)
    mesh = jax.typeof(features).sharding.mesh
    if mesh.explicit_axes:
        # What shardings the primitives have inside is the compiler's to choose.
        reduce = jax.sharding.auto_axes(
            reduce,
            axes=mesh.explicit_axes,
            out_sharding=NamedSharding(mesh, PartitionSpec()),
        )
    return reduce((features, kernel, bias, labels, mask), weights, segment_ids)


def _check_data(
    features: ArrayLike, kernel: ArrayLike, labels: ArrayLike, bias: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    features = check_array("features", features, float)
    kernel = check_array("kernel", kernel, float)
    check_kernel(features, kernel)
    labels = check_labels(labels, features.shape[:-1])
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
    return features, kernel, labels, bias


def check_kernel(features: jax.Array, kernel: jax.Array) -> None:
    """Checks the shapes of a kernel and of the features that it is for."""
    came = f"`features` has shape {features.shape} and `kernel` {kernel.shape}"
    due = f"{came}: they must be (..., D) and (D, V)."
    check_rank("kernel", kernel, [2], f"has shape {kernel.shape}. {due}")
    has = f"has shape {features.shape}. {due}"
    check_rank("features", features, range(1, 33), has)
    check_value(
        "kernel",
        features.shape[-1] == kernel.shape[0],
        f"does not fit. {due} Transpose a kernel of (V, D), an embedding table say.",
    )
    check_value("kernel", kernel.size > 0, f"is empty. {due} D and V are at least 1.")


def _check_options(
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    chunk_size: int | None,
    vocab_axis_name: str | None,
) -> None:
    check_number("label_smoothing", label_smoothing, 0, 1)
    check_number("z_loss", z_loss)
    if softcap is not None:
        check_number("softcap", softcap, low=sys.float_info.min)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size, at_least=1)
    check_type(
        "vocab_axis_name",
        vocab_axis_name is None or isinstance(vocab_axis_name, str),
        "must be the name of one mapped axis, or None for a vocabulary that is not "
        f"sharded; got {vocab_axis_name!r}.",
    )
    check_mapped("vocab_axis_name", vocab_axis_name or ())
