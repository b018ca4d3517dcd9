"""Applies deliberate faults to copies of the package, and runs the tests that notice.

    python -m tests.tools.mutants           # all of them
    python -m tests.tools.mutants epsilon   # those whose name holds this

First all of these tests run on an unchanged copy, where they must pass.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]


class Fault(NamedTuple):
    """One change to one module, and the tests of one file that should notice."""

    name: str
    module: str  # its path in the package, without .py: "heads", "losses/_masked"
    old: str
    new: str
    test_file: str
    tests: str  # a substring of their names, or an expression of pytest's -k


GRID = "test_losses"
ORACLES = "test_value_and_gradients_are_the_oracles and "
FAULTS = [
    # what counts
    Fault(
        "mask on the output only",
        "losses/_masked",
        "data = fill_masked(data, counts.mask)",
        "pass",
        GRID,
        "gradient_where_nothing_counts and masked_singular",
    ),
    Fault(
        "mask on the output only, of a loss of ours",
        "losses/_masked",
        "[freeze(array, counts.mask) for array in data]",
        "data",
        GRID,
        "gradient_where_nothing_counts and squared_error",
    ),
    Fault(
        "a slope where nothing counts of what a user's loss closes over",
        "losses/_masked",
        "jax.lax.select(found, constant, jax.lax.stop_gradient(constant))",
        "constant",
        GRID,
        "closes_over_has_no_gradient and arccosh",
    ),
    Fault(
        "harmless values of a user's loss all alike",
        "masks",
        "1 / (2 + i) if jnp",
        "1 / 2 if jnp",
        GRID,
        "sees_no_two_alike",
    ),
    Fault(
        "masked leaves its user's domain",
        "masks",
        "jnp.where(found, own, jnp.asarray(constant, x.dtype))",
        "jnp.asarray(constant, x.dtype)",
        GRID,
        "stays_in_the_domain",
    ),
    Fault(
        "a weight of 0 that is there",
        "_counting",
        "is_there = expanded != 0",
        "is_there = expanded == expanded",
        "test_weighted_mean",
        "weight_of_exactly_0",
    ),
    Fault(
        "a total without a weight is empty",
        "_division",
        "jax.lax.select(jax.lax.eq(constant, zero), empty, infinite)",
        "empty",
        "test_weighted_mean",
        "total_without_a_weight",
    ),
    Fault(
        "a distance of the option leaves out what is masked",
        "losses/_masked",
        "fills = fills_masked or any(map(is_traced, options.values()))",
        "fills = fills_masked",
        "test_options",
        "no_part_in_the_gradient",
    ),
    Fault(
        "auto axes are not taken",
        "_devices",
        "        if mesh is None:\n            return function(*args",
        "        if True:\n            return function(*args",
        "test_meshes",
        "every_loss_on_explicit_axes and absolute_error",
    ),
    Fault(
        "an option that is traced is compiled in",
        "losses/_regression",
        "    return errors * slope",
        "    return errors * jax.lax.stop_gradient(slope)",
        "test_options",
        "is_differentiated and quantile",
    ),
    Fault(
        "0 times the logarithm of 0 is NaN",
        "losses/_classes",
        "is_due = differs(shares, 0)",
        "return log_probs",
        "test_classes",
        "minus_infinity and dense",
    ),
    Fault(
        "a class that is out has a share of the smoothing",
        "losses/_classes",
        "is_in = logits != -math.inf",
        "is_in = logits == logits",
        "test_classes",
        "minus_infinity and smoothed",
    ),
    Fault(
        "a label that is out has a gradient",
        "losses/_classes",
        "return make_safe(loss, stays, math.inf)",
        "return loss",
        "test_classes",
        "label_that_is_out",
    ),
    Fault(
        "a share that is out has a slope",
        "losses/_classes",
        "return select(logits != -math.inf, shares, jax.lax.stop_gradient(shares))",
        "return shares",
        "test_classes",
        "no_slope_where and dense",
    ),
    Fault(
        "smoothing has a slope by a label that is out",
        "losses/_cross_entropy",
        "target = finite_score(score)",
        "target = score",
        "test_classes",
        "no_slope_where and smoothed",
    ),
    Fault(
        "smoothing of 1 forgets a label that is out",
        "losses/_cross_entropy",
        "labels = jnp.where(logits != -math.inf, smoothed, labels)",
        "labels = smoothed",
        "test_classes",
        "smoothing_of_1",
    ),
    Fault(
        "the soft cap has a slope by a class that is out",
        "linear/_softmax",
        "logits = jnp.where(is_out, 0, logits)",
        "pass",
        "test_linear_losses",
        "beside_a_class",
    ),
    Fault(
        "of no classes at all the entropy is NaN",
        "linear/_classes",
        "jnp.log(jnp.where(total == 0, 1, total))",
        "jnp.log(total)",
        "test_linear_losses",
        "nothing_is_nan",
    ),
    Fault(
        "an entry that a scheme weighs with 0 stays",
        "_division",
        "new_total = jnp.where(new_weight == 0, 0, new_total)",
        "pass",
        "test_weighting",
        "weighs_with_0",
    ),
    Fault(
        "a total without a weight is lost among others",
        "_division",
        "jnp.where(no_weight, _divide(total, size, 0.0), new_total)",
        "jnp.where(no_weight, jax.lax.stop_gradient(total), new_total)",
        "test_weighted_mean",
        "total_without_a_weight",
    ),
    Fault(
        "rounding below 0 stays",
        "losses/_masked",
        "return jax.lax.sub(values, select(is_rounding, constant, zero))",
        "return values",
        "test_classes",
        "below_0",
    ),
    Fault(
        "a sequence too short for its labels costs a finite number",
        "losses/_sequences",
        "unaligned = too_short | impossible | none_in",
        "unaligned = impossible | none_in",
        "test_sequences",
        "cannot_be_aligned",
    ),
    Fault(
        "an odd norm without absolute values",
        "losses/_embeddings",
        "if is_traced(norm_degree) or norm_degree % 2:",
        "if False:",
        "test_options",
        "norm_of_any_degree",
    ),
    Fault(
        "mask by multiplication",
        "_counting",
        "values = make_safe(values, self.mask)",
        "values = values * self.mask",
        GRID,
        "test_without_jit and absolute_error",
    ),
    Fault(
        "weights masked by multiplication",
        "_counting",
        "weights = make_safe(weights, self.mask)",
        "weights = weights * self.mask",
        GRID,
        "test_without_jit and absolute_error",
    ),
    Fault(
        "mask after the alignment of NumPy, trailing axes",
        "masks",
        "return jax.lax.broadcast_in_dim(array, shape, range(array.ndim))",
        "return jnp.broadcast_to(array, shape)",
        "test_masks",
        "line_up_with_leading_axes",
    ),
    Fault(
        "lengths that count one position too few",
        "masks",
        "mask: jax.Array = jax.lax.le(",
        "mask: jax.Array = jax.lax.lt(",
        "test_masks",
        "marks_the_first_positions",
    ),
    Fault(
        "segment ids below 0 wrap",
        "masks",
        "masks.append((ids >= 0) & (ids < num_segments))",
        "masks.append(ids < num_segments)",
        GRID,
        "packed_rows_are_the_oracles and squared_error",
    ),
    Fault(
        "segment 0 takes what pads the rows of a device",
        "_sums",
        "return sums.reshape(num_segments + 1, lanes)[1:]",
        "sums = sums.reshape(num_segments + 1, lanes)\n"
        "    return sums.at[1].add(sums[0])[1:]",
        "test_devices",
        "row_of_segments_is_shared_out",
    ),
    Fault(
        "segments added up in float32",
        "_sums",
        "dtype=jnp.float64, lanes=lanes, piece=_PIECE",
        "dtype=jnp.float32, lanes=lanes, piece=_PIECE",
        "test_sums",
        "long_segments_are_as_exact and sorted",
    ),
    Fault(
        "segments added up in whole numbers of one digit",
        "_sums",
        "for i in range(digits, 0, -1):",
        "for i in range(1, 0, -1):",
        "test_sums",
        "both_ways_of_adding_up",
    ),
    Fault(
        "one unit for the whole numbers of all segments",
        "_sums",
        "unit = jnp.where(unit == 0, 1, unit)",
        "unit = jnp.full_like(unit, unit.max())",
        "test_sums",
        "both_ways_of_adding_up",
    ),
    Fault(
        "segments without the rest of the last piece",
        "_sums",
        "if ids.size % piece:",
        "if False:",
        "test_sums",
        "derivatives_of_every_mode",
    ),
    Fault(
        "tangents added up one after the other",
        "_sums",
        "lanes=_many(ids, num_segments),",
        "lanes=1,",
        "test_sums",
        "derivatives_of_every_mode",
    ),
    Fault(
        "counts by segment that wrap at 2**31",
        "_sums",
        "if not is_below(mask.size, 2**31):",
        "if False:",
        "test_counting",
        "segments_of_more_elements",
    ),
    Fault(
        "counts that wrap at 2**31",
        "_counting",
        "if is_below(counts.size * most * times, 2**31):",
        "if True:",
        "test_counting",
        "of_more_elements and (where or lengths)",
    ),
    Fault(
        "targets negated in a dtype without a minus sign",
        "losses/_margins",
        "-(targets * logits)",
        "-targets * logits",
        "test_counting",
        "unsigned_targets",
    ),
    Fault(
        "a label out of range weighs what the class next to it does",
        "losses/_labels",
        "make_safe(own, is_class_of(labels, class_weights.size), 1)",
        "own",
        "test_classes",
        "out_of_range_is_there",
    ),
    Fault(
        "infinity of a label that is out hides NaN",
        "losses/_classes",
        "jax.lax.bitwise_or(differs(score, -math.inf), jax.lax.ne(loss, loss))",
        "differs(score, -math.inf)",
        "test_classes",
        "no_infinity_where",
    ),
    Fault(
        "steps divide a total without a weight by 1",
        "_multi_steps",
        "total / jnp.where(total == 0, 1, state.acc_weight)",
        "total / jnp.where(state.acc_weight == 0, 1, state.acc_weight)",
        "test_accumulation",
        "total_without_a_weight",
    ),
    Fault(
        "integers compared in their own few bits",
        "_checks",
        "return widen(array) if kind is int else array",
        "return array",
        "test_counting",
        "test_segment_ids or test_labels",
    ),
    Fault(
        "a size in NumPy's few bits",
        "masks",
        'size = check_size("size", size)',
        'check_size("size", size)',
        "test_counting",
        "sizes_and_numbers",
    ),
    Fault(
        "a number of segments in NumPy's few bits",
        "_counting",
        "None if num_segments is None else int(num_segments)",
        "num_segments",
        "test_counting",
        "sizes_and_numbers",
    ),
    Fault(
        "weights whose sum has no inverse go through",
        "testing/_values",
        "> 2.0**126",
        "> 2.0**200",
        "test_counting",
        "weights_past_the_largest",
    ),
    Fault(
        "narrow sentinels compared as narrow ones",
        "_checks",
        "return integers.astype(jnp.int32) if narrow else integers",
        "return integers",
        "test_masks",
        "narrow_integers or uint8",
    ),
    Fault(
        "ignored labels count",
        "losses/_labels",
        "counts = ~is_label(labels, ignore_index)",
        "counts = labels == labels",
        GRID,
        "ignore_index_is_where",
    ),
    Fault(
        "a label of -1 wraps",
        "losses/_labels",
        "return nan_unless(is_class_of(labels, num_classes))",
        "return nan_unless(labels < num_classes)",
        GRID,
        "label_out_of_range and perceptron",
    ),
    Fault(
        "NaN that counts has no gradient",
        "losses/_masked",
        "if not marks_nan:",
        "if True:",
        GRID,
        "nan_that_counts and hinge",
    ),
    Fault(
        "a head that is not there is the first",
        "heads",
        "selected = jnp.full_like(heads[0], jnp.nan)",
        "selected = heads[0]",
        "test_heads",
        "out_of_range",
    ),
    # the denominator
    Fault(
        "clamp at 1",
        "_division",
        "jax.lax.div(total, jax.lax.select(no_weight, one, weight))",
        "jax.lax.div(total, jax.lax.max(weight, one))",
        "test_weighted_mean",
        "no_epsilon_and_no_floor",
    ),
    Fault(
        "epsilon in the denominator",
        "_division",
        "jax.lax.div(total, jax.lax.select(no_weight, one, weight))",
        "jax.lax.div(total, weight + 1e-8)",
        "test_weighted_mean",
        "no_epsilon_and_no_floor",
    ),
    Fault(
        "nothing divided by nothing",
        "_division",
        "no_weight = jax.lax.eq(weight, zero)",
        "no_weight = jax.lax.lt(weight, zero)",
        "test_weighted_mean",
        "empty_mean_is_exactly_0",
    ),
    Fault(
        "gradient through the weight",
        "_division",
        "weight, constant = jax.lax.stop_gradient((weight, total))",
        "constant = total",
        "test_weighted_mean",
        "no_gradient_through_the_weight",
    ),
    Fault(
        "count in bfloat16",
        "_counting",
        "return convert(total if times == 1 else total * times, dtype)",
        "return convert(convert(total, jnp.bfloat16) * times, dtype)",
        "test_weighted_mean",
        "counted_and_summed_in_float32",
    ),
    Fault(
        "sum in the dtype of the values",
        "_counting",
        "dtype = jnp.result_type(values, jnp.float32)",
        "dtype = values.dtype",
        "test_weighted_mean",
        "counted_and_summed_in_float32",
    ),
    Fault(
        "an empty entry is given weight by a scheme",
        "_division",
        "new_weight = jnp.where(no_weight, 0, jax.lax.stop_gradient(new_weight))",
        "new_weight = jax.lax.stop_gradient(new_weight)",
        "test_weighted_mean",
        "empty_entry_stays_empty",
    ),
    Fault(
        "class weights without the others",
        "losses/_labels",
        'return own * expand_leading("weights", weights, labels.shape)',
        "return own",
        GRID,
        "class_weights_are_in_the_denominator",
    ),
    Fault(
        "a kernel mapped like data",
        "losses/_per_sample",
        '_UNMAPPED = ("kernel", "bias", ',
        '_UNMAPPED = ("bias", ',
        GRID,
        "per_sample_shares_kernel",
    ),
    Fault(
        "the gradient of |x| at 0 is 1",
        "losses/_regression",
        "return errors * jax.lax.stop_gradient(jnp.sign(errors))",
        "return jnp.abs(errors)",
        GRID,
        "gradient_at_an_error_of_0",
    ),
    # microbatches and devices
    Fault(
        "slopes of the microbatch instead of the batch",
        "_microbatches",
        "            grads = back(\n",
        "            slopes = self._differentiate(treedef, jax.tree.leaves(parts))[1]\n"
        "            grads = back(\n",
        "test_gradients",
        "a_lone_term_is_the_oracle",
    ),
    Fault(
        "coefficients forgotten",
        "_parts",
        "factors.get(name, 1.0) * mean.compute()",
        "mean.compute()",
        "test_devices",
        "test_each_device_cuts_its_rows",
    ),
    Fault(
        "the last row of a longer microbatch is another's",
        "_rows",
        "least * self.count + step, 0)",
        "least * self.count, 0)",
        "test_gradients",
        "every_row_is_seen",
    ),
    Fault(
        "rows stay in strided order",
        "_rows",
        "rows = head.swapaxes(0, 1).reshape(",
        "rows = head.reshape(",
        "test_combine",
        "parts_of_every_kind",
    ),
    Fault(
        "slopes of the rows are not strided",
        "_microbatches",
        "cut.take_along(slope, place, step, rows)",
        "jax.lax.dynamic_slice_in_dim(slope, step * rows, rows, place)",
        "test_combine",
        "arguments_are_those",
    ),
    Fault(
        "what the batch's axis is, is told by one size",
        "_places",
        "if other == shape:",
        "if False:",
        "test_combine",
        "as_many_groups",
    ),
    Fault(
        "means of rows in aux are added up",
        "_aux",
        "places.append(place_of_mean(name, leaf, sizes, AUX, i))",
        "places.append(None)",
        "test_gradients",
        "aux_of_the_batch",
    ),
    Fault(
        "a weight that is no sum is not told",
        "_places",
        "not asked[index] or any(",
        "True or any(",
        "test_gradients",
        "does_not_see_the_size",
    ),
    Fault(
        "gradient through the weights of parts",
        "_parts",
        "return WeightedMean(x.total, jax.lax.stop_gradient(x.weight))",
        "return x",
        "test_combine",
        "no_gradient_flows_through",
    ),
    Fault(
        "slopes of weights, which cost a forward pass",
        "_parts",
        "return WeightedMean.tree_unflatten(None, (True, False))",
        "return WeightedMean.tree_unflatten(None, (True, True))",
        "test_compiled",
        "slopes_that_hang_on_weights",
    ),
    Fault(
        "the gradient of combine itself is lost",
        "_microbatches",
        "grad.astype(dtype) + share * direct.astype(dtype)",
        "grad.astype(dtype)",
        "test_combine",
        "arguments_are_those",
    ),
    Fault(
        "the gradient of combine itself is added once a device",
        "_microbatches",
        "share = 1 / count_devices(self.axes)",
        "share = 1",
        "test_combine",
        "axis_of_vmap",
    ),
    Fault(
        "rows are not gathered",
        "_devices",
        "jax.lax.all_gather(own, names, axis=axis, tiled=True)",
        "jnp.concatenate([own] * count_devices(names), axis)",
        "test_combine",
        "axis_of_vmap",
    ),
    Fault(
        "the slopes of the first device's rows for all",
        "_devices",
        "start = jax.lax.axis_index(names) * rows",
        "start = 0",
        "test_combine",
        "axis_of_vmap",
    ),
    Fault(
        "gradients added up in the dtype of the parameters",
        "_microbatches",
        "return jnp.where(False, param, 0).astype(dtype)",
        "return jnp.where(False, param, 0).astype(param.dtype)",
        "test_gradients",
        "half_precision_gradients",
    ),
    Fault(
        "missing psum of sums",
        "_microbatches",
        "psum(x, self.axes) if place is None else",
        "x if place is None else",
        "test_devices",
        "test_shard_map_that_does_not_check",
    ),
    Fault(
        "missing psum of gradients",
        "_microbatches",
        "return psum(summed, axes).astype(param.dtype)",
        "return summed.astype(param.dtype)",
        "test_devices",
        "test_shard_map_that_does_not_check and 1",
    ),
    Fault(
        "parameters that do not vary, summed twice",
        "_microbatches",
        "self.varying = self._vary(params)",
        "self.varying = params",
        "test_devices",
        "test_each_device_cuts_its_rows",
    ),
    Fault(
        "parts that do not vary have the slopes of all devices",
        "_microbatches",
        "parts = treedef.unflatten(self._vary(whole))",
        "parts = treedef.unflatten(whole)",
        "test_combine",
        "under_shard_map and 8-1-True",
    ),
    # across steps
    Fault(
        "calls count alike",
        "_multi_steps",
        "term = scalar.astype(total.dtype) * jnp.asarray(grad, total.dtype)",
        "term = jnp.asarray(grad, total.dtype)",
        "test_accumulation",
        "by_their_weight_and_not_alike",
    ),
    Fault(
        "a call of no weight adds its NaN",
        "_multi_steps",
        "return jnp.where(scalar == 0, total, total + term)",
        "return total + term",
        "test_accumulation",
        "call_of_weight_0",
    ),
    Fault(
        "what rounding leaves over is dropped",
        "running_mean",
        "return _two_sum(high, error + (a_low + b_low))",
        "return _two_sum(high, 0 * error)",
        "test_accumulation",
        "counts_are_exact",
    ),
    # features times kernel
    Fault(
        "linear: the filler has a gradient",
        "linear/_programs",
        "(jnp.where(valid, w, 0) / largest)",
        "(jnp.where(True, w, 0) / largest)",
        "test_linear",
        "chunks_change_nothing and 1000",
    ),
    Fault(
        "linear: values where no token counts",
        "linear/_chunks",
        "jnp.pad(jnp.where(valid, order, block), padding, constant_values=block)",
        "jnp.pad(order, padding, constant_values=block)",
        "test_linear",
        "chunks_change_nothing and 1000",
    ),
    Fault(
        "linear: a class that is out is smoothed over",
        "linear/_classes",
        "is_in = logits != -jnp.inf",
        "is_in = logits == logits",
        "test_linear_losses",
        "class_that_is_out and cross",
    ),
    Fault(
        "linear: a label that is out makes NaN",
        "linear/_softmax",
        "loss = jnp.where(score == -jnp.inf, jnp.inf, log_sum - target)",
        "loss = log_sum - target",
        "test_linear_losses",
        "label_that_is_out",
    ),
    Fault(
        "linear: a label that is out has a gradient",
        "linear/_classes",
        "jnp.where(is_out, 0, change)",
        "change",
        "test_linear_losses",
        "label_that_is_out",
    ),
    Fault(
        "linear: the log-sum-exp as one number",
        "linear/_classes",
        "return top, jnp.log(jnp.where(total == 0, 1, total))",
        "return 0 * top, jax.nn.logsumexp(logits, axis=-1)",
        "test_linear_losses",
        "digits_are_kept",
    ),
    Fault(
        "linear: the entropy's gradient lacks the entropy",
        "linear/_softmax",
        "of_entropy[:, None] * (log_probs + entropy[:, None])",
        "of_entropy[:, None] * (log_probs + 0 * entropy[:, None])",
        "test_linear_losses",
        "are_the_oracles and log_probs",
    ),
    Fault(
        "linear: the temperature is not in the gradient",
        "linear/_softmax",
        "slope = slope / temperature",
        "slope = slope / 1",
        "test_linear_losses",
        "are_the_oracles and log_probs_and_options",
    ),
    Fault(
        "linear: what a loss closes over has a gradient",
        "linear/_user",
        "[jax.lax.stop_gradient(jnp.asarray(const)) for const in closed.consts]",
        "[jnp.asarray(const) for const in closed.consts]",
        "test_linear_losses",
        "closes_over_is_hoisted and grad",
    ),
    Fault(
        "linear: operands differ over unlike axes",
        "linear/_arguments",
        "names = tuple(axes - {self.vocab_axis_name})",
        "names = ()",
        "test_linear_sharded",
        "added_up_once",
    ),
    Fault(
        "linear: what is closed over differs over no more axes",
        "linear/_user",
        "if not of_consts <= axes:",
        "if False:",
        "test_linear_sharded",
        "added_up_once and closes",
    ),
    Fault(
        "linear: the change of a total has its gradient's dtype",
        "linear/_derivatives",
        "jnp.asarray(_add_changes(change, task), total.dtype)",
        "_add_changes(change, task)",
        "test_linear_losses",
        "weights_of_float64_of and kl",
    ),
    Fault(
        "linear: the last of several largest is predicted",
        "linear/_classes",
        "predicted = -place.largest(-predicted)",
        "predicted = place.largest(jnp.where(predicted == behind_all, -1, predicted))",
        "test_linear_losses",
        "aux_of_a_sharded",
    ),
    Fault(
        "linear: tokens over the axes of the vocabulary",
        "linear/_spread",
        "tokens = tuple(name for name in sizes if name not in vocab)",
        "tokens = tuple(sizes)",
        "test_linear_sharded",
        "small_sums and plain",
    ),
    Fault(
        "linear: the kernel gathered in each round",
        "linear/_spread",
        "return self._placed(kernel, None, self.vocab or None)",
        "return kernel",
        "test_linear_sharded",
        "fsdp_gathers and mean",
    ),
    Fault(
        "linear: one device's sum for that of all",
        "linear/_spread",
        "jax.lax.psum_scatter(slabs[:, i], self.tokens)",
        "slabs[0, i]",
        "test_linear_sharded",
        "no_layout and fsdp and mean and Auto and True",
    ),
    # on the host
    Fault(
        "samples padded in front",
        "padding",
        "row[:length] = array",
        "row[-length:] = array",
        "test_padding",
        "rows_hold_the_samples",
    ),
]


def occurrences(fault, package):
    """How often each module holds the text that the fault replaces."""
    return {
        path.relative_to(package).with_suffix("").as_posix(): count
        for path in package.rglob("*.py")
        if (count := path.read_text().count(fault.old))
    }


def apply(fault, package):
    """Writes the fault into a copy of the package."""
    counts = occurrences(fault, package)
    if counts.get(fault.module) != 1:
        raise ValueError(
            f"{fault.name!r}: its old text must occur once in {fault.module!r}, and "
            f"occurs this often: {counts}. Adapt the fault to the code: {fault.old!r}"
        )
    path = package / f"{fault.module}.py"
    path.write_text(path.read_text().replace(fault.old, fault.new))


def copied(directory):
    """A copy of the checkout, as far as tests need it."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("wloss_jax", "tests"):
        shutil.copytree(ROOT / name, directory / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", directory)
    return directory


def run_tests(directory, test_file, tests):
    """Runs some tests there: pytest's exit status, and its last lines."""
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    path = f"tests/{test_file}.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, path, "-k", tests],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout[-2000:] + done.stderr[-500:]


def try_fault(fault, parent):
    """Who noticed, or None."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        directory = copied(pathlib.Path(name))
        apply(fault, directory / "wloss_jax")
        status, output = run_tests(directory, fault.test_file, fault.tests)
    if status == 0:
        return None
    failed = re.search(r"^FAILED tests/(\S+?\.py::\w+)", output, re.MULTILINE)
    if status != 1 or failed is None:
        raise RuntimeError(f"{fault.name!r}: its tests did not run:\n{output}")
    return failed.group(1)


def try_none(faults, parent):
    """All tests that should notice must pass where there is nothing to notice."""
    by_file = {}
    for fault in faults:
        by_file.setdefault(fault.test_file, set()).add(f"({fault.tests})")
    with tempfile.TemporaryDirectory(dir=parent) as name:
        directory = copied(pathlib.Path(name))
        for test_file, tests in by_file.items():
            status, output = run_tests(directory, test_file, " or ".join(sorted(tests)))
            if status:
                raise RuntimeError(f"without any fault, {test_file} fails:\n{output}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="?", default="")
    chosen = parser.parse_args(arguments).name
    faults = [fault for fault in FAULTS if chosen in fault.name]
    survived = 0
    with (
        tempfile.TemporaryDirectory() as parent,
        concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 2)) as pool,
    ):
        unchanged = pool.submit(try_none, faults, parent)
        outcomes = pool.map(lambda fault: try_fault(fault, parent), faults)
        for fault, noticed_by in zip(faults, outcomes, strict=True):
            survived += noticed_by is None
            print(f"{fault.name:52}{noticed_by or 'NOT NOTICED'}", flush=True)
        unchanged.result()
    print(f"{len(faults)} faults, {survived} not noticed")
    return survived > 0


if __name__ == "__main__":
    sys.exit(main())
