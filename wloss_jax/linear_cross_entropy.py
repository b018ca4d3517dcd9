"""Features times kernel to cross-entropy, never holding the whole logits array.

The tokens that count are taken a chunk at a time, over the full vocabulary. One product
makes a chunk's logits; and as the loss of a total has one scalar cotangent, two more
make its gradient on the spot. Where each token has a cotangent of its own (totals of
segments, `jax.vmap`), the gradient waits for it and makes the logits again: four
products. Either way nothing of the size of the logits outlives its chunk.

What is asked for is known only to the transformations that JAX applies later, and so
are the platform and the number of devices. Hence primitives: functions of arrays that
are traced when they are lowered, with rules for what becomes of them::

    total ----jvp--->  gradients, times the tangents         three products
      |
     vmap
      v
    losses ---jvp--->  losses, tangents -transpose-> gradients        four
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from wloss_jax._checks import check_array, check_number
from wloss_jax._devices import check_mapped, jit_compiled, vary
from wloss_jax.losses._labels import check_labels, counted_labels, nan_unless_class
from wloss_jax.masks import expand_leading, valid_mask
from wloss_jax.means import WeightedMean, weighted_mean

Arrays = Sequence[Any]


class _Options(NamedTuple):
    """What is static; the parameters of the primitives."""

    label_smoothing: float
    z_loss: float
    softcap: float | None
    chunk_size: int | None
    vocab_axis_name: str | None
    # The caller's: the primitives are traced when the caller's context may be gone.
    matmul_precision: str | None


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
    options = _Options(
        label_smoothing,
        z_loss,
        softcap,
        chunk_size,
        vocab_axis_name,
        cast(Any, jax.config).jax_default_matmul_precision,
    )

    def reduce(
        primals: Arrays, weights: jax.Array | None, segment_ids: jax.Array | None
    ) -> WeightedMean:
        mask = primals[-1]
        if segment_ids is not None:
            losses, _ = _losses_p.bind(*primals, options=options)
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
        largest = _largest(features.dtype, ones, mask)
        (total,) = _total_p.bind(*primals, ones / largest, options=options)
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
    came = f"`features` has shape {features.shape} and `kernel` {kernel.shape}"
    mend = f"{came}: they must be (..., D) and (D, V)."
    chex.assert_rank(kernel, 2, custom_message=mend)
    chex.assert_rank(features, set(range(1, 33)), custom_message=mend)
    chex.assert_equal(
        features.shape[-1],
        kernel.shape[0],
        custom_message=f"{mend} Transpose a kernel of (V, D), an embedding table say.",
    )
    chex.assert_equal(
        kernel.size > 0, True, custom_message=f"{mend} D and V must be at least 1."
    )
    labels = check_labels(labels, features.shape[:-1])
    if bias is None:
        bias = jnp.zeros(kernel.shape[1:], jnp.float32)
    bias = check_array("bias", bias, float)
    chex.assert_shape(
        bias,
        kernel.shape[1:],
        custom_message=f"`bias` has shape {bias.shape}: it must be (V,), "
        f"{kernel.shape[1:]} for this `kernel`.",
    )
    return features, kernel, labels, bias


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
    is_size = type(chunk_size) is int and chunk_size > 0
    chex.assert_equal(
        chunk_size is None or is_size,
        True,
        custom_message=f"`chunk_size` must be a positive Python integer, or None to "
        f"have one chosen; got {chunk_size!r}.",
    )
    chex.assert_equal(
        vocab_axis_name is None or isinstance(vocab_axis_name, str),
        True,
        custom_message="`vocab_axis_name` must be the name of one mapped axis, or None "
        f"for a vocabulary that is not sharded; got {vocab_axis_name!r}.",
    )
    check_mapped("vocab_axis_name", vocab_axis_name or ())


class _Device(NamedTuple):
    """What is known once a program is lowered."""

    platform: str
    num_devices: int = 1  # that the compiler may spread the program over
    mesh: Any = None


# ------------------------------------------------------------------ one chunk of tokens


def _logits(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, options: _Options
) -> jax.Array:
    logits = _product(x, kernel)
    logits += bias.astype(logits.dtype)[None, :]
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    return logits


def _cross_entropy(
    logits: jax.Array, labels: jax.Array, options: _Options, device: _Device
) -> tuple[jax.Array, jax.Array]:
    """The loss of each token, and its log-sum-exp."""
    add = functools.partial(_add_shards, options.vocab_axis_name)
    vocab = _full_vocab(logits, options)
    top = jax.lax.stop_gradient(logits.max(axis=-1))
    if options.vocab_axis_name is not None:
        top = jax.lax.pmax(top, options.vocab_axis_name)
    top = jnp.where(jnp.isfinite(top), top, 0)
    lse = top + jnp.log(add(jnp.exp(logits - top[:, None]).sum(axis=-1)))
    own = _own_labels(logits, labels, options)
    if device.platform == "cpu":
        target = logits.at[jnp.arange(own.size), own].get(mode="fill", fill_value=0)
    else:
        target = jnp.where(_one_hot(logits, own), logits, 0).sum(axis=-1)
    target = add(target) * nan_unless_class(labels, vocab)
    if options.label_smoothing:
        mean = add(logits.sum(axis=-1)) / vocab
        target += options.label_smoothing * (mean - target)
    loss = lse - target
    if options.z_loss:
        loss += options.z_loss * lse**2
    return loss, lse


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.dot(a, b.astype(a.dtype), preferred_element_type=dtype)


def _slope(
    logits: jax.Array,
    labels: jax.Array,
    lse: jax.Array,
    weights: jax.Array,
    options: _Options,
    device: _Device,
) -> jax.Array:
    """The derivative of the weighted losses by the logits before the soft cap."""
    vocab = _full_vocab(logits, options)
    weights = weights * nan_unless_class(labels, vocab)
    slope = jnp.exp(logits - lse[:, None])
    if options.z_loss:
        slope *= 1 + 2 * options.z_loss * lse[:, None]
    if options.label_smoothing:
        slope -= options.label_smoothing / vocab
    slope *= weights[:, None]
    own = _own_labels(logits, labels, options)
    of_label = (1 - options.label_smoothing) * weights
    if device.platform == "cpu":
        slope = slope.at[jnp.arange(own.size), own].add(-of_label, mode="drop")
    else:
        slope -= jnp.where(_one_hot(logits, own), of_label[:, None], 0)
    if options.softcap is not None:
        slope *= 1 - (logits / options.softcap) ** 2
    return slope


def _own_labels(logits: jax.Array, labels: jax.Array, options: _Options) -> jax.Array:
    """Labels as columns of ``logits``; past its last where they are another shard's.

    On CPU that one column is read and written by its index, in half the time (19 for 35
    ms for 512 x 32768 float32 logits) of the comparison of all with it that keeps a
    program for accelerators free of scatters.
    """
    shard_size = logits.shape[1]
    if options.vocab_axis_name is not None:
        shard = jax.lax.axis_index(options.vocab_axis_name).astype(labels.dtype)
        labels = labels - shard * shard_size
    return jnp.where(labels < 0, shard_size, labels)


def _one_hot(logits: jax.Array, own_labels: jax.Array) -> jax.Array:
    classes = jax.lax.broadcasted_iota(own_labels.dtype, logits.shape, 1)
    return classes == own_labels[:, None]


def _full_vocab(logits: jax.Array, options: _Options) -> int:
    if options.vocab_axis_name is None:
        return logits.shape[1]
    return logits.shape[1] * jax.lax.axis_size(options.vocab_axis_name)


def _add_shards(axis_name: str | None, x: jax.Array) -> jax.Array:
    if axis_name is None:
        return x
    return cast(jax.Array, jax.lax.psum(vary(x, axis_name), axis_name))


# ------------------------------------------------------------ all the tokens that count


def _chunk_size(device: _Device, tokens: int, features: int) -> int:
    if device.platform == "cpu":
        chunk = 512
    elif device.platform == "tpu":
        chunk = max(features // 8 // 256 * 256, 512)
    else:
        chunk = max(features * 2 // 3 // 1024 * 1024, 1024)
    return min(chunk, 8192, tokens)


def _sweep(
    step: Callable[..., tuple[list[jax.Array], list[jax.Array]]],
    tokens: Arrays,
    mask: jax.Array,
    kernel_size: int,
    options: _Options,
    device: _Device,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Calls ``step`` for the tokens that count, a chunk of them at a time.

    ``step(*tokens)`` returns arrays of a value for each token, which come back in the
    places of their tokens, 0 where none counts, and arrays to be added up. The last
    chunk is half a one where that is enough (for 35% of 8192 tokens whole chunks alone
    took 1.2 times as long on an H100). What is missing in it is filled with tokens of
    zeros: their values are dropped, and they must add nothing.
    """
    # Tokens in as many blocks as there are devices that they might be spread over, each
    # gone through by itself: then no device needs a token, or a sum, of another's.
    num_blocks = math.gcd(mask.size, device.num_devices)
    outer = (num_blocks,) if num_blocks > 1 else ()
    block = mask.size // num_blocks
    each_block = jax.vmap if outer else lambda function, in_axes=0: function
    chunk = options.chunk_size or _chunk_size(device, block, kernel_size)
    chunk = max(1, min(chunk, block))

    def valid_first(mask: jax.Array) -> jax.Array:
        order = jnp.argsort(~mask, stable=True)
        order = jnp.where(jnp.arange(block) < mask.sum(), order, block)
        return jnp.pad(order, (0, chunk), constant_values=block)

    mask_blocks = mask.reshape(*outer, block)
    token_blocks = [t.reshape(*outer, block, *t.shape[mask.ndim :]) for t in tokens]
    orders = each_block(valid_first)(mask_blocks)
    num_valid = mask_blocks.sum(axis=-1, dtype=jnp.int32).max()
    if options.vocab_axis_name is not None:
        num_valid = jax.lax.pmax(num_valid, options.vocab_axis_name)

    def advance(
        size: int, start: jax.Array, order: jax.Array, tokens: Arrays, so_far: Any
    ) -> Any:
        index = jax.lax.dynamic_slice_in_dim(order, start, size)
        taken = [t.at[index].get(mode="fill", fill_value=0) for t in tokens]
        values, sums = step(*taken)
        return (
            [
                old.at[index].set(new, mode="drop", unique_indices=True)
                for old, new in zip(so_far[0], values, strict=True)
            ],
            [old + new for old, new in zip(so_far[1], sums, strict=True)],
        )

    def body(size: int, carry: Any) -> Any:
        start, so_far = carry
        so_far = each_block(functools.partial(advance, size), in_axes=(None, 0, 0, 0))(
            start, orders, token_blocks, so_far
        )
        return start + size, so_far

    def has_more_than(size: int, carry: Any) -> Any:
        return carry[0] + size < num_valid

    # A chunk of which only the type is looked at; there may be no token to take.
    first = [t.reshape(-1, *t.shape[mask.ndim :])[:1] for t in tokens]
    first = [jnp.broadcast_to(t.sum(axis=0), (chunk, *t.shape[1:])) for t in first]
    jaxpr, shapes = jax.make_jaxpr(step, return_shape=True)(*first)
    values, sums = jax.tree.unflatten(jax.tree.structure(shapes), jaxpr.out_avals)
    zeros = (
        [_zeros(v, *outer, block, *v.shape[1:]) for v in values],
        [_zeros(s, *outer, *s.shape) for s in sums],
    )
    carry = jnp.int32(0), zeros
    if block:
        half = max(1, chunk // 2)
        for size, left in ((chunk, half), (half, 0)):
            carry = jax.lax.while_loop(
                functools.partial(has_more_than, left),
                functools.partial(body, size),
                carry,
            )
    values, sums = carry[1]
    return (
        [v.reshape(*mask.shape, *v.shape[len(outer) + 1 :]) for v in values],
        [s.sum(axis=0) for s in sums] if outer else sums,
    )


def _zeros(like: Any, *shape: int) -> jax.Array:
    return vary(jnp.zeros(shape, like.dtype), tuple(_varying(like)))


def _varying(x: Any) -> frozenset[str]:
    aval = x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)
    return cast(frozenset[str], aval.manual_axis_type.varying)


def _whole_columns(kernel: jax.Array, device: _Device) -> jax.Array:
    """Gathers a kernel whose feature axis is sharded, before the rounds.

    Without a mesh in the context, when that happens is left to the compiler.
    """
    if device.num_devices == 1 or device.mesh is None:
        return kernel
    spec = PartitionSpec(None, PartitionSpec.UNCONSTRAINED)
    sharding = NamedSharding(device.mesh, spec)
    return cast(jax.Array, jax.lax.with_sharding_constraint(kernel, sharding))


# --------------------------------------------- the functions of arrays, one a primitive


def _losses(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
    options: _Options,
    device: _Device,
) -> list[jax.Array]:
    """The loss and the log-sum-exp of each token."""
    kernel = _whole_columns(kernel, device)

    def step(x: jax.Array, labels: jax.Array) -> Any:
        logits = _logits(x, kernel, bias, options)
        return list(_cross_entropy(logits, labels, options, device)), []

    tokens = (features, labels)
    values, _ = _sweep(step, tokens, mask, kernel.shape[0], options, device)
    return values


def _total(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    weights: jax.Array,
    *,
    options: _Options,
    device: _Device,
) -> list[jax.Array]:
    """The weighted sum of the losses."""
    losses, _ = _losses(
        features, kernel, bias, labels, mask, options=options, device=device
    )
    return [_weighted(losses, mask, weights).sum()]


def _weighted(losses: jax.Array, mask: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.where(mask, weights * losses, 0)


def _gradients(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    weights: jax.Array,
    *lse: jax.Array,
    wrt: tuple[bool, ...],
    options: _Options,
    device: _Device,
) -> list[jax.Array]:
    """The gradient of the weighted sum by those ``wrt`` of features, kernel and bias.

    Without a log-sum-exp from before, the losses come first.
    """
    kernel = _whole_columns(kernel, device)
    largest = _largest(features.dtype, weights, mask)

    def step(
        x: jax.Array, labels: jax.Array, weights: jax.Array, *lse: jax.Array
    ) -> Any:
        logits = _logits(x, kernel, bias, options)
        values, sums = [], []
        if lse:
            (own_lse,) = lse
        else:
            loss, own_lse = _cross_entropy(logits, labels, options, device)
            values.append(loss)
        slope = _slope(logits, labels, own_lse, weights / largest, options, device)
        slope = slope.astype(x.dtype)
        if wrt[0]:
            # Not `.T`: a kernel spread over devices would be gathered twice.
            of_x = jnp.einsum(
                "nv,dv->nd",
                slope,
                kernel.astype(x.dtype),
                preferred_element_type=logits.dtype,
            )
            values.append((of_x * largest).astype(x.dtype))
        if wrt[1]:
            transposed = x.T
            if device.platform == "cpu":
                # A transpose that is really done: folded into the product it made that
                # 1.1 to 2.8 times slower, by the version of XLA and the processor.
                transposed = jax.lax.optimization_barrier(transposed)
            sums.append(_product(transposed, slope))
        if wrt[2]:
            sums.append(slope.sum(axis=0, dtype=logits.dtype))
        return values, sums

    tokens = (features, labels, weights, *lse)
    values, sums = _sweep(step, tokens, mask, kernel.shape[0], options, device)
    return [*values, *(s * largest for s in sums)]


def _largest(dtype: Any, weights: jax.Array, mask: jax.Array) -> jax.Array | float:
    """What to divide weights by in float16, which has no room for 1e9 or 1e-9."""
    if dtype != jnp.float16:
        return 1.0
    sizes = jnp.where(mask & jnp.isfinite(weights), jnp.abs(weights), 0)
    largest = jax.lax.stop_gradient(sizes.max(initial=0))
    return jnp.where(largest > 0, largest, 1)


def _tangents(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    lse: jax.Array,
    *tangents: jax.Array,
    wrt: tuple[bool, ...],
    options: _Options,
    device: _Device,
) -> list[jax.Array]:
    """What the losses change by; with a sharded vocabulary, this shard's part of it."""
    kernel = _whole_columns(kernel, device)
    dfeatures, dkernel, dbias = _place(tangents, wrt)

    def step(x: jax.Array, labels: jax.Array, lse: jax.Array, *dx: jax.Array) -> Any:
        logits = _logits(x, kernel, bias, options)
        change = jnp.zeros_like(logits)
        if wrt[0]:
            change += _product(dx[0], kernel)
        if wrt[1]:
            change += _product(x, dkernel)
        if wrt[2]:
            change += dbias.astype(logits.dtype)[None, :]
        ones = jnp.ones_like(lse)
        slope = _slope(logits, labels, lse, ones, options, device)
        return [(slope * change).sum(axis=-1)], []

    tokens = (features, labels, lse, *((dfeatures,) if wrt[0] else ()))
    values, _ = _sweep(step, tokens, mask, kernel.shape[0], options, device)
    return values


def _place(some: Arrays, wrt: tuple[bool, ...]) -> list[Any]:
    """Puts the few that are wanted in their places among three."""
    remaining = iter(some)
    return [next(remaining) if wanted else None for wanted in wrt]


def _scaled(
    gradient: jax.Array, factor: jax.Array, *, options: _Options, device: _Device
) -> list[jax.Array]:
    """The gradient times its scalar cotangent, in place.

    XLA does that by itself, but not on TPU, where the copy of a float32 kernel's
    gradient is more than all else: 3.2 GiB instead of 1.2 for D 4096 and V 128256.
    """
    if device.platform != "tpu" or device.num_devices > 1:
        return _times(gradient, factor)

    num_slabs = math.gcd(gradient.shape[0], 16)
    rows = gradient.shape[0] // num_slabs

    def scale_slab(i: jax.Array, gradient: jax.Array) -> jax.Array:
        slab = jax.lax.dynamic_slice_in_dim(gradient, i * rows, rows)
        (slab,) = _times(slab, factor)
        return jax.lax.dynamic_update_slice_in_dim(gradient, slab, i * rows, axis=0)

    return [jax.lax.fori_loop(0, num_slabs, scale_slab, gradient)]


def _times(gradient: jax.Array, factor: jax.Array) -> list[jax.Array]:
    return [(gradient * factor).astype(gradient.dtype)]


def _primitive(name: str, function: Callable[..., list[jax.Array]]) -> Primitive:
    """Makes a primitive of a function that wants to know its device."""
    primitive = Primitive(f"linear_cross_entropy_{name}")
    primitive.multiple_results = True

    def run(*arrays: ArrayLike, **params: Any) -> list[jax.Array]:
        # Outside of a jit, constants may come as NumPy's arrays.
        device = _Device(jax.default_backend())
        return function(*map(jnp.asarray, arrays), device=device, **params)

    def infer(*avals: Any, **params: Any) -> Any:
        on_device = functools.partial(function, device=_Device("cpu"), **params)
        return jax.make_jaxpr(on_device)(*avals).out_avals

    def lower(platform: str, ctx: Any, *arrays: Any, **params: Any) -> Any:
        device = _lowered_for(platform, ctx.module_context.axis_context)
        on_device = functools.partial(function, device=device, **params)
        with jax.default_matmul_precision(params["options"].matmul_precision):
            return mlir.lower_fun(on_device, multiple_results=True)(ctx, *arrays)

    primitive.def_impl(run)
    primitive.def_abstract_eval(infer)
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        rule = functools.partial(lower, platform)
        mlir.register_lowering(primitive, rule, platform=platform)
    return primitive


def _lowered_for(platform: str, context: Any) -> _Device:
    if isinstance(context, mlir.SPMDAxisContext):
        # Under `jax.shard_map` the program is one device's, but for the axes left out.
        sizes = dict(context.mesh.shape)
        left_out = [sizes[name] for name in sizes if name not in context.manual_axes]
        return _Device(platform, math.prod(left_out))
    if isinstance(context, mlir.ShardingContext):
        return _Device(platform, context.num_devices, context.abstract_mesh)
    return _Device(platform)


_losses_p = _primitive("losses", _losses)
_total_p = _primitive("total", _total)
_gradients_p = _primitive("gradients", _gradients)
_tangents_p = _primitive("tangents", _tangents)
_scaled_p = _primitive("scaled", _scaled)

# ---------------------------------------------------------------- the first derivatives


def _total_jvp(primals: Arrays, tangents: Arrays, *, options: _Options) -> Any:
    wrt, tangents = _differentiated(primals, tangents, options)
    losses, *gradients = _gradients_p.bind(*primals, wrt=wrt, options=options)
    total = _weighted(losses, *primals[4:]).sum()
    if wrt[0]:
        # Tangents too may be NaN where nothing counts.
        valid = jnp.broadcast_to(primals[4][..., None], tangents[0].shape)
        tangents[0] = jnp.where(valid, tangents[0], 0)
    change = sum(
        _inner_p.bind(*pair, options=options)
        for pair in zip(gradients, tangents, strict=True)
    )
    return [total], [_add_changes(change, options)]


def _losses_jvp(primals: Arrays, tangents: Arrays, *, options: _Options) -> Any:
    wrt, tangents = _differentiated(primals, tangents, options)
    losses, lse = _losses_p.bind(*primals, options=options)
    (change,) = _tangents_p.bind(*primals, lse, *tangents, wrt=wrt, options=options)
    return [losses, lse], [_add_changes(change, options), ad.Zero(jax.typeof(lse))]


def _tangents_transpose(
    cotangents: Arrays, *arrays: Any, wrt: tuple[bool, ...], options: _Options
) -> list[Any]:
    *primals, lse = arrays[:6]
    gradients = _gradients_p.bind(*primals, *cotangents, lse, wrt=wrt, options=options)
    return [None] * 6 + [
        gradient.astype(tangent.aval.dtype)
        for gradient, tangent in zip(gradients, arrays[6:], strict=True)
    ]


def _inner(gradient: jax.Array, tangent: jax.Array, **_: Any) -> jax.Array:
    dtype = jnp.promote_types(gradient.dtype, jnp.float32)
    return (gradient.astype(dtype) * tangent.astype(dtype)).sum()


def _inner_transpose(
    cotangent: jax.Array, gradient: jax.Array, tangent: Any, *, options: _Options
) -> list[Any]:
    dtype = tangent.aval.dtype
    if gradient.dtype != dtype:
        return [None, (gradient * cotangent).astype(dtype)]
    gradient = vary(gradient, tuple(_varying(cotangent)))
    return [None, *_scaled_p.bind(gradient, cotangent, options=options)]


def _inner_jvp(primals: Arrays, tangents: Arrays, *, options: _Options) -> Any:
    changes = [
        _inner_p.bind(primal, tangent, options=options)
        for primal, tangent in zip(primals, reversed(tangents), strict=True)
        if type(tangent) is not ad.Zero
    ]
    return _inner_p.bind(*primals, options=options), sum(changes)


_inner_p = Primitive("linear_cross_entropy_inner")
_inner_p.def_impl(_inner)
_inner_p.def_abstract_eval(
    lambda *avals, **_: jax.make_jaxpr(_inner)(*avals).out_avals[0]
)
mlir.register_lowering(_inner_p, mlir.lower_fun(_inner, multiple_results=False))
ad.primitive_jvps[_inner_p] = _inner_jvp
ad.primitive_transposes[_inner_p] = _inner_transpose
ad.primitive_jvps[_total_p] = _total_jvp
ad.primitive_jvps[_losses_p] = _losses_jvp
ad.primitive_transposes[_tangents_p] = _tangents_transpose


def _differentiated(
    primals: Arrays, tangents: Arrays, options: _Options
) -> tuple[tuple[bool, ...], list[Any]]:
    """Which of features, kernel and bias have a tangent, and those tangents.

    They vary over all mapped axes over which anything does: what is transposed later
    has no other way to say that the gradients do.
    """
    wrt = tuple(type(t) is not ad.Zero for t in tangents[:3])
    axis_name = options.vocab_axis_name
    if wrt[0] and _is_untracked(axis_name):
        add = functools.partial(_add_shards, axis_name)
        shared = linear_call(lambda _, t: t, lambda _, ct: add(ct), (), tangents[0])
        tangents = [shared, *tangents[1:]]
    tangents = [t for t, wanted in zip(tangents[:3], wrt, strict=True) if wanted]
    axes = frozenset().union(*map(_varying, (*primals, *tangents)))
    return wrt, [vary(t, tuple(axes)) for t in tangents]


def _add_changes(change: Any, options: _Options) -> Any:
    """Adds the changes of a loss that the shards of the vocabulary make."""
    add = functools.partial(_add_shards, options.vocab_axis_name)
    if _is_untracked(options.vocab_axis_name):
        return linear_call(lambda _, t: add(t), lambda _, ct: ct, (), change)
    return add(change)


def _is_untracked(axis_name: str | None) -> bool:
    """Whether JAX leaves it to us what differs along a mapped axis.

    With ``check_vma`` on it knows, and adds up the gradient of features that all shards
    of the vocabulary share. With it off, and under `jax.pmap`, it takes the loss of
    each device for one of its own, and transposes a sum over devices to another: then
    the sums are laid by hand, as in Megatron-LM.
    """
    if axis_name is None:
        return False
    return axis_name not in _varying(jax.lax.axis_index(axis_name))


# ------------------------------------------ the second derivatives, by a plain program


def _plain_losses(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    options: _Options,
) -> jax.Array:
    if options.vocab_axis_name is not None:
        raise NotImplementedError(
            "`linear_softmax_cross_entropy` has no second derivative where the "
            "vocabulary is sharded: leave out `vocab_axis_name`."
        )
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    kernel, bias = kernel.astype(dtype), bias.astype(dtype)

    @jax.checkpoint
    def token_loss(token: Any) -> jax.Array:
        x, label, valid = token
        x = jnp.where(valid, x, 0).astype(dtype)
        label = jnp.where(valid, label, 0)
        logits = _logits(x[None], kernel, bias, options)
        (loss,), _ = _cross_entropy(logits, label[None], options, _Device("any"))
        return jnp.where(valid, loss, 0)

    tokens = (features.reshape(-1, features.shape[-1]), labels.ravel(), mask.ravel())
    losses: jax.Array = jax.lax.map(token_loss, tokens, batch_size=512)
    return losses.reshape(mask.shape)


def _gradients_jvp(
    primals: Arrays, tangents: Arrays, *, wrt: tuple[bool, ...], options: _Options
) -> Any:
    outs = _gradients_p.bind(*primals, wrt=wrt, options=options)
    labels, mask = primals[3:5]

    def plain(*arrays: jax.Array) -> list[jax.Array]:
        *inputs, weights = arrays
        plain_losses = functools.partial(
            _plain_losses, labels=labels, mask=mask, options=options
        )
        losses, pull = jax.vjp(plain_losses, *inputs)
        gradients = pull(jnp.where(mask, weights, 0).astype(losses.dtype))
        gradients = [g for g, wanted in zip(gradients, wrt, strict=True) if wanted]
        return [losses, *gradients][-len(outs) :]

    changes = _jvp(plain, (*primals[:3], primals[5]), (*tangents[:3], tangents[5]))
    return outs, [c.astype(out.dtype) for c, out in zip(changes, outs, strict=True)]


def _tangents_jvp(
    primals: Arrays, tangents: Arrays, *, wrt: tuple[bool, ...], options: _Options
) -> Any:
    outs = _tangents_p.bind(*primals, wrt=wrt, options=options)
    labels, mask = primals[3:5]

    def plain(*arrays: jax.Array) -> list[jax.Array]:
        inputs = arrays[:3]
        directions = [
            jnp.zeros_like(x) if direction is None else direction
            for x, direction in zip(inputs, _place(arrays[3:], wrt), strict=True)
        ]
        plain_losses = functools.partial(
            _plain_losses, labels=labels, mask=mask, options=options
        )
        return [jax.jvp(plain_losses, inputs, tuple(directions))[1]]

    inputs = (*primals[:3], *primals[6:])
    return outs, _jvp(plain, inputs, (*tangents[:3], *tangents[6:]))


def _scaled_jvp(primals: Arrays, tangents: Arrays, *, options: _Options) -> Any:
    outs = _scaled_p.bind(*primals, options=options)
    return outs, _jvp(_times, primals, tangents)


def _jvp(function: Callable[..., Any], primals: Arrays, tangents: Arrays) -> Any:
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    return jax.jvp(function, tuple(primals), tangents)[1]


ad.primitive_jvps[_gradients_p] = _gradients_jvp
ad.primitive_jvps[_tangents_p] = _tangents_jvp
ad.primitive_jvps[_scaled_p] = _scaled_jvp

# --------------------------------------------------------------------- under `jax.vmap`


def _total_merged(*arrays: jax.Array, options: _Options) -> list[jax.Array]:
    *primals, mask, weights = arrays
    losses, _ = _losses_p.bind(*primals, mask, options=options)
    sums = _weighted(losses, mask, weights)
    return [sums.sum(axis=tuple(range(1, sums.ndim)))]


def _batch(
    primitive: Primitive, axis: Any, arrays: Arrays, dims: Sequence[Any], **params: Any
) -> tuple[Any, list[Any]]:
    """The rule for `jax.vmap`.

    Where kernel and bias are shared, and no gradient of theirs is wanted for each
    element of the batch, the axis becomes one more of the tokens. Else the elements are
    gone through one after the other.
    """
    options, wrt = params["options"], params.get("wrt", (False,) * 3)
    if axis.name is not None and axis.name == options.vocab_axis_name:
        raise NotImplementedError(
            f"`vocab_axis_name`={axis.name!r} is an axis of `jax.vmap`: it must be one "
            "of devices, under `jax.shard_map` or `jax.pmap`."
        )
    is_shared = [dim is None for dim in dims]
    if all(is_shared):
        outs = primitive.bind(*arrays, **params)
        return outs, [None] * len(outs)
    arrays = [
        x if dim is None else jnp.moveaxis(x, dim, 0)
        for x, dim in zip(arrays, dims, strict=True)
    ]
    # The places of the kernel, the bias, and the tangents of both.
    keep = [1, 2]
    if primitive is _tangents_p:
        keep += range(6 + wrt[0], len(arrays))
    by_token = primitive is not _gradients_p or not (wrt[1] or wrt[2])
    if by_token and all(is_shared[i] for i in keep):
        arrays = [
            jnp.broadcast_to(x, (axis.size, *x.shape))
            if is_shared[i] and i not in keep
            else x
            for i, x in enumerate(arrays)
        ]
        function = _total_merged if primitive is _total_p else primitive.bind
        outs = function(*arrays, **params)
    else:
        outs = jax.lax.map(
            lambda own: primitive.bind(
                *(own.get(i, x) for i, x in enumerate(arrays)), **params
            ),
            {i: x for i, x in enumerate(arrays) if not is_shared[i]},
        )
    return outs, [0] * len(outs)


def _inner_batch(arrays: Arrays, dims: Sequence[Any], **_: Any) -> Any:
    return jax.vmap(_inner, tuple(dims))(*arrays), 0


def _scaled_batch(arrays: Arrays, dims: Sequence[Any], **_: Any) -> Any:
    return jax.vmap(_times, tuple(dims))(*arrays), [0]


for _p in (_losses_p, _total_p, _gradients_p, _tangents_p):
    batching.fancy_primitive_batchers[_p] = functools.partial(_batch, _p)
batching.primitive_batchers[_inner_p] = _inner_batch
batching.primitive_batchers[_scaled_p] = _scaled_batch
