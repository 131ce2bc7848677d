"""Says in one line what is wrong with a section of a spec and what would work, from pydantic's errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from tpcompiler.spec.located import Key, Origin

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

S = TypeVar("S", bound=BaseModel)


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggests a name that would have worked: `did you mean 'tensor'?`, or the list of those that there are."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known[:12])}{', …' if len(known) > 12 else ''}" if known else "there is none"


def validate(model: type[S], value: Any, origin: Origin, prefix: Key = ()) -> S:
    """Turns `value` into a `model`. Raises `SpecError`, one line, for the mistake that comes first in the file."""
    if not isinstance(value, Mapping):
        raise origin.error(prefix, f"{_shown(value)} is not a mapping; write keys and values, `key: value`")
    try:
        return model.model_validate(dict(value))
    except ValidationError as e:
        errors = e.errors(include_url=False)
    # A misspelt key leaves the right one missing; of the two mistakes, the misspelling is shown.
    first = min(errors, key=lambda err: (err["type"] != "extra_forbidden", origin.line((*prefix, *err["loc"])) or 0))
    key, what = _explain(first, model)
    raise origin.error((*prefix, *key), what)


_FACTS = {
    "int_type": "is not an integer",
    "int_from_float": "is not an integer",
    "float_type": "is not a number",
    "finite_number": "is not a finite number",
    "bool_type": "is neither true nor false",
    "string_type": "is not a string",
    "tuple_type": "is not a list",
    "list_type": "is not a list",
    "dict_type": "is not a mapping",
    "model_type": "is not a mapping",
    "model_attributes_type": "is not a mapping",
    "string_too_short": "is empty",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def _explain(error: ErrorDetails, model: type[BaseModel]) -> tuple[Key, str]:
    """Words one of pydantic's errors: the key, and what is wrong with it and would work."""
    kind, got, context = error["type"], error["input"], error.get("ctx", {})
    key, owner, field = _locate(error["loc"], model)
    examples = (field.examples if field else None) or []
    example = f"; write e.g. {key[-1]}: {_yaml(examples[0])}" if examples and isinstance(key[-1], str) else ""
    if kind == "extra_forbidden":
        known = [f.alias or n for n, f in owner.model_fields.items()]
        return key, f"unknown key {key[-1]!r}; {nearest(str(key[-1]), known)}"
    if kind == "missing":
        return key, f"is missing{example}"
    if kind == "literal_error":
        return key, f"{_shown(got)} is not a choice; write {context['expected']}"
    if kind in _BOUNDS:
        word, bound = _BOUNDS[kind]
        return key, f"{_shown(got)} is out of range; it must be {word} {context[bound]}"
    if got is None:
        return key, f"has no value{example}"
    if kind in _FACTS:
        return key, f"{_shown(got)} {_FACTS[kind]}{example}"
    if kind == "value_error":
        return key, str(context["error"])
    general = error["msg"].startswith("Input should")  # pydantic's own message, which does not say what it got
    return key, f"{error['msg']}, not {_shown(got)}{example}" if general else error["msg"]


def _locate(loc: tuple[int | str, ...], model: type[BaseModel]) -> tuple[Key, type[BaseModel], Any]:
    """The key of the file at pydantic's location, and the model and the field that it belongs to.

    The location of a union ends in the name of one of its members (`int`, `str`), which is not a key.
    """
    key: list[int | str] = []
    owner, field = model, None
    inner: type[BaseModel] | None = model
    for part in loc:
        if inner is None and isinstance(part, str) and field is not None and not _holds_keys(field.annotation):
            break
        key.append(part)
        if isinstance(part, int):
            continue
        if inner is not None:
            owner = inner
            field = next((f for n, f in owner.model_fields.items() if part in (n, f.alias)), None)
            inner = _model_in(field.annotation) if field is not None else None
    return tuple(key), owner, field


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, (_model_in(a) for a in getattr(annotation, "__args__", ()))), None)


def _holds_keys(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is dict or annotation is dict


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _yaml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
