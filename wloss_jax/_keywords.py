"""Keywords of other libraries: errors that say what it is called here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

from wloss_jax._checks import ArgumentTypeError

_Function = TypeVar("_Function", bound=Callable[..., Any])


def check_keywords(
    signature: inspect.Signature, keywords: Collection[str], count: int = 0
) -> None:
    """Checks that there are such keywords; names ours for those of other libraries.

    And that no more than there are come by position, of which there are ``count``, and
    that none is missing.
    """
    parameters = list(signature.parameters.values())
    for name in keywords:
        if name not in signature.parameters:
            _refuse_keyword(parameters, name)
    by_position = [p for p in parameters if p.kind in POSITIONAL]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if count > len(by_position) and not takes_any:
        names = [p.name for p in by_position]
        raise ArgumentTypeError(
            f"`{', '.join(names)}` are the positional arguments, {len(names)}; got "
            f"{count}. What comes after them goes by keyword: "
            f"{_by_keyword(parameters)}."
        )
    for p in [*by_position[count:], *parameters[len(by_position) :]]:
        is_one = p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if is_one and p.default is p.empty and p.name not in keywords:
            raise ArgumentTypeError(f"`{p.name}` is missing: {_arguments(parameters)}")


def _refuse_keyword(parameters: list[inspect.Parameter], name: str) -> None:
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        own = {p.name for p in parameters}
        mend = _HABITS.get(name, _arguments(parameters))
        for ours, habits in _HABITS_WITH.items():
            if ours in own and name in habits:
                mend = habits[name]
        raise ArgumentTypeError(f"`{name}` is no argument here: {mend}")


def keywords_checked(function: _Function) -> _Function:
    """Makes ``function`` say of a keyword that it lacks what it is called here."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        check_keywords(signature, keywords, len(args))
        return function(*args, **keywords)

    return cast(_Function, checked)


POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


def _by_keyword(parameters: list[inspect.Parameter]) -> str:
    return ", ".join(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def _arguments(parameters: list[inspect.Parameter]) -> str:
    """Says what a function takes."""
    kinds = (*POSITIONAL, inspect.Parameter.VAR_POSITIONAL)
    names = [
        f"*{p.name}" if p.kind is p.VAR_POSITIONAL else p.name
        for p in parameters
        if p.kind in kinds
    ]
    return (
        f"by position come {', '.join(names)}; the keywords are "
        f"{_by_keyword(parameters)}."
    )


_WHERE = "which elements count is said by `where`, bool, True for those that do."
_WEIGHTS = "how much an element counts is said by `weights`."
_REDUCTION = (
    "a loss returns a `WeightedMean`. Its mean is `.compute()`, its sum `.total`; "
    "`wloss_jax.per_sample(loss)` gives one for each sample."
)
_WEIGHT = (
    "how much an element counts is said by `weights`. They line up with the leading "
    "axes of the loss, and its mean is divided by their sum; PyTorch divides by the "
    "number of elements, `m.total / size`."
)
_AXIS = (
    "a loss reduces all that it is given. `wloss_jax.per_sample(loss)` or `jax.vmap` "
    "keeps the axes that you want kept."
)
_HABITS = {
    **dict.fromkeys(("reduction", "size_average", "reduce"), _REDUCTION),
    **dict.fromkeys(("mask", "masks", "valid", "padding_mask"), _WHERE),
    **dict.fromkeys(("attention_mask", "loss_mask", "label_mask"), _WHERE),
    "key_padding_mask": f"{_WHERE} PyTorch's is True for padding: pass `~` of it.",
    **dict.fromkeys(("sample_weight", "sample_weights"), _WEIGHTS),
    "weight": _WEIGHT,
    **dict.fromkeys(("axis", "dim", "keepdims", "keepdim"), _AXIS),
    **dict.fromkeys(("length", "x_lengths", "input_lengths"), "it is `lengths`."),
    **dict.fromkeys(("seq_lengths", "sequence_lengths"), "it is `lengths`."),
}
# The same where there is a parameter that is meant.
_HABITS_WITH = {
    "class_weights": {
        "weight": "the weights of classes are `class_weights`; how much an element "
        "counts is said by `weights`."
    },
    "axis": {"dim": "it is `axis`, the axis or axes of the classes or components."},
    "every_k": {
        "every_k_schedule": "it is `every_k`, a number or a function of the steps "
        "taken."
    },
}
