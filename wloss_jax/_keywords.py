"""Keywords of other libraries: errors that say what it is called here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from wloss_jax._checks import ArgumentTypeError, check_type

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
    unknown = [name for name in keywords if name not in parameters]
    kinds = {p.kind for p in parameters.values()}
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        name = unknown[0]
        mend = _HABITS.get(name, f"the keywords are {_by_keyword(signature)}.")
        raise ArgumentTypeError(f"`{name}` is no argument here: {mend}")
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        names = [p.name for p in parameters.values() if p.kind in _POSITIONAL]
        check_type(
            ", ".join(names),
            len(arrays) <= len(names),
            lambda: (
                f"are the positional arguments, {len(names)}; got {len(arrays)}. What "
                f"comes after them goes by keyword: {_by_keyword(signature)}."
            ),
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
