"""A class that is out, for `tests.tools.fuzz`: in the data, and not for the oracle.

A loss of classes gets one more: by a logit of -infinity, or by a ``class_mask`` over
whatever the logits hold. The oracle never sees it.
"""

import dataclasses
import functools

import numpy as np

WAYS = ("infinity", "mask")
# By the name of the loss: what becomes of each array after the first.
LABEL, LABELS, SHARES, LOGARITHMS, AS_IT_IS = range(5)
KINDS = {
    "softmax_cross_entropy_with_integer_labels": (LABEL,),
    "softmax_cross_entropy_with_integer_labels_and_all_options": (LABEL,),
    "softmax_cross_entropy": (SHARES,),
    "softmax_cross_entropy_smoothed_and_weighted": (SHARES,),
    "safe_softmax_cross_entropy": (SHARES,),
    "poly_loss_cross_entropy": (SHARES,),
    "softmax_z_loss": (),
    "multiclass_hinge_loss": (LABEL,),
    "multiclass_perceptron_loss": (LABEL,),
    "multiclass_sparsemax_loss": (LABEL,),
    "multi_margin_loss": (LABEL,),
    "multilabel_margin_loss": (LABELS,),
    "multilabel_soft_margin_loss": (SHARES,),
    "nll_loss": (LABEL,),
    "kl_divergence": (SHARES,),
    "kl_divergence_with_log_targets": (LOGARITHMS,),
    "generalized_kl_divergence": (SHARES,),
    "ctc_loss": (AS_IT_IS, LABEL, AS_IT_IS),
    "linear_softmax_cross_entropy": (LABEL,),
    "linear_softmax_cross_entropy_with_bias": (LABEL,),
    "linear_softmax_cross_entropy_some_ignored": (LABEL,),
}


def with_one_out(loss, rng):
    """The ``loss`` with one class more, which is out; itself where it has no classes.

    It is never the first class, where the blank of `ctc_loss` is, and what is wrong.
    """
    kinds = KINDS.get(loss.name)
    if kinds is None:
        return loss
    column, way = int(rng.integers(1, 4)), WAYS[rng.integers(2)]
    is_linear = loss.name.startswith("linear")
    if loss.name == "linear_softmax_cross_entropy":  # has no bias to be -infinity
        way = "mask"
    fill = -np.inf if way == "infinity" else rng.choice([np.nan, np.inf, 3.0])
    # The features of a linear loss are finite, and so are their products.
    of_first = (lambda x: x) if is_linear else functools.partial(_with, column, fill)
    of_kernel = functools.partial(_with, column, 0.5)
    of_bias = functools.partial(_with, column, fill if way == "infinity" else 0.5)

    def data(rng, n):
        first, *others = loss.data(rng, n)
        changed = [
            _changed(kind, column, x) for kind, x in zip(kinds, others, strict=True)
        ]
        return of_first(first), *changed

    def shared(rng):
        changes = (of_kernel, of_bias)
        return tuple(
            change(x) for change, x in zip(changes, loss.shared(rng), strict=False)
        )

    def without(element):
        first, *others = element
        rows, rest = others[: len(kinds)], others[len(kinds) :]
        rows = [_restored(kind, column, x) for kind, x in zip(kinds, rows, strict=True)]
        if not is_linear:
            first = np.delete(first, column, -1)
        return first, *rows, *(np.delete(x, column, -1) for x in rest)

    def reference(*element, **options):
        return loss.reference(*without(element), **options)

    def own_weight(*element):
        return loss.own_weight(*without(element))

    given = dict(getattr(loss.loss, "keywords", {}))
    if "class_weights" in given:
        given["class_weights"] = _with(column, np.float32(7), given["class_weights"])
    if way == "mask":
        size = 6 if is_linear else 4
        given["class_mask"] = np.arange(size) != column
    public = getattr(loss.loss, "func", loss.loss)
    return dataclasses.replace(
        loss,
        name=f"{loss.name}_less_class_{column}_by_{way}",
        loss=functools.partial(public, **given),
        reference=reference,
        data=data,
        own_weight=own_weight,
        **({"shared": shared} if is_linear else {}),
    )


def _with(column, fill, array):
    return np.insert(array, column, fill, axis=-1)


def _changed(kind, column, array):
    if kind == LABEL:
        return np.where(array >= column, array + 1, array)
    if kind == LABELS:  # as many as there are classes, and -1 after the last
        return _with(array.shape[-1], -1, _changed(LABEL, column, array))
    fills = {SHARES: 0, LOGARITHMS: -np.inf}
    return _with(column, fills[kind], array) if kind in fills else array


def _restored(kind, column, x):
    x = np.asarray(x)
    if kind == LABEL:
        x = np.where(x > column, x - 1, x)
        return x if x.ndim else int(x)
    if kind == LABELS:
        return _restored(LABEL, column, x[:-1])
    return np.delete(x, column, -1) if kind in (SHARES, LOGARITHMS) else x
