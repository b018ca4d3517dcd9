"""Keywords of other libraries: errors that say what it is called here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from wloss_jax._checks import ArgumentTypeError

_Function = TypeVar("_Function", bound=Callable[..., Any])


def check_keywords(
    signature: inspect.Signature,
    keywords: Mapping[str, Any],
    arrays: Sequence[Any] = (),
) -> None:
    """Checks that there are such keywords; names ours for those of other libraries.

    And that no more ``arrays`` come by position than there are.
    """
    parameters = signature.parameters
    for name in keywords:
        if name not in parameters:
            _refuse_keyword(signature, name)
    last = list(parameters.values())[: len(arrays)][-1:]
    if len(arrays) > len(parameters) or (last and last[0].kind not in _POSITIONAL):
        _refuse_positional(signature, arrays)


def _refuse_keyword(signature: inspect.Signature, name: str) -> None:
    parameters = signature.parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        mend = _HABITS.get(name, f"the keywords are {_by_keyword(signature)}.")
        raise ArgumentTypeError(f"`{name}` is no argument here: {mend}")


def _refuse_positional(signature: inspect.Signature, arrays: Sequence[Any]) -> None:
    parameters = signature.parameters.values()
    if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        names = [p.name for p in parameters if p.kind in _POSITIONAL]
        raise ArgumentTypeError(
            f"`{', '.join(names)}` are the positional arguments, {len(names)}; got "
            f"{len(arrays)}. What comes after them goes by keyword: "
            f"{_by_keyword(signature)}."
        )


def keywords_checked(function: _Function) -> _Function:
    """Makes ``function`` say of a keyword that it lacks what it is called here."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        check_keywords(signature, keywords, args)
        return function(*args, **keywords)

    return cast(_Function, checked)


_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


def _by_keyword(signature: inspect.Signature) -> str:
    parameters = signature.parameters.values()
    return ", ".join(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


_WHERE = "which elements count is said by `where`, bool, True for those that do."
_WEIGHTS = "how much an element counts is said by `weights`."
_REDUCTION = (
    "a loss returns a `WeightedMean`. Its mean is `.compute()`, its sum `.total`; "
    "`wloss_jax.per_sample(loss)` gives one for each sample."
)
_AXIS = (
    "a loss reduces all that it is given. `wloss_jax.per_sample(loss)` or `jax.vmap` "
    "keeps the axes that you want kept."
)
_HABITS = {
    **dict.fromkeys(("reduction", "size_average", "reduce"), _REDUCTION),
    **dict.fromkeys(("mask", "masks", "valid", "padding_mask"), _WHERE),
    **dict.fromkeys(("weight", "sample_weight", "sample_weights"), _WEIGHTS),
    **dict.fromkeys(("axis", "dim", "keepdims", "keepdim"), _AXIS),
    **dict.fromkeys(("length", "x_lengths", "input_lengths"), "it is `lengths`."),
}
