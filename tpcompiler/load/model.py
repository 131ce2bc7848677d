"""Resolves MODEL on the command line to a function that builds the model, and to example inputs.

`path/to/model.py[:name]`   a class, or a function that builds the model, in a file that has `example_inputs` too
`hf:DIR`, `hf:TYPE`         Hugging Face: a local directory with config.json, or a model type (`huggingface.py`)

Without `:name`, the model is the file's attribute `Model`, or else its only `nn.Module` class that no other class of
the file uses. Nothing is constructed here. The caller decides when, and on which device.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tpcompiler.errors import ModelError, TpcError
from tpcompiler.load.imports import Importer, failure
from tpcompiler.load.target import Arguments, Inputs, Loaded
from tpcompiler.spec.located import one_line, scalar
from tpcompiler.spec.schema import Spec, nearest


def load_model(ref: str, spec: Spec, overrides: Mapping[str, Any] | None = None) -> Loaded:
    """The model that `ref` names. `overrides` (`--set key=value`) win over the spec's `model:`. Raises `TpcError`."""
    arguments = Arguments(spec, dict(overrides or {}))
    if ref.startswith("hf:"):
        from tpcompiler.load.huggingface import load_hf

        return load_hf(ref, spec, arguments)
    return _load_file(ref, spec, arguments)


def parse_settings(settings: list[str], option: str = "--set") -> dict[str, Any]:
    """Turns `["layers=2", "act=gelu"]` into a dictionary of values, with YAML's types. Raises `ModelError`."""
    out: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            example = "layers=12" if option == "--set" else "steps=100"
            raise ModelError(f"{option} {setting}: not of the form key=value; write e.g. {option} {example}")
        out[name.strip()] = scalar(text, option)
    return out


def _load_file(ref: str, spec: Spec, arguments: Arguments) -> Loaded:
    path, name = _split(ref)
    _readable(path)
    importer = Importer(path)
    with importer:
        module = importer.load()
        target, name = _target(module, path, name)
        inputs = _find_inputs(module, path)
        values = arguments.values
        accept = _constructor(target, name, arguments)

    def build() -> nn.Module:
        if isinstance(target, nn.Module):
            return target
        try:
            with importer:
                model = target(**values)
        except TpcError:
            raise
        except Exception as e:
            raise failure(e, path, f"{name}({accept}) fails: ") from e
        if not isinstance(model, nn.Module):
            raise ModelError(f"{path}:{name}: gives a {type(model).__name__}, not a torch.nn.Module")
        return model

    def make_inputs(sizes: Mapping[str, Any]) -> Inputs:
        with importer:
            return _call_inputs(inputs, sizes, arguments, path)

    return Loaded(
        build, make_inputs, str(path), name, spec.inputs, spec.seed, accepts=_defaults(target), environment=importer
    )


def _split(ref: str) -> tuple[Path, str]:
    """`model.py:GPT2` → path and name; the name may be missing."""
    if not Path(ref).exists() and ":" in ref:
        left, _, name = ref.rpartition(":")
        if not all(part.isidentifier() for part in name.split(".")):
            raise ModelError(f"{one_line(ref)}: {name!r} is not a name; MODEL is path/to/model.py[:name] or hf:DIR")
        return Path(left), name
    return Path(ref), ""


def _readable(path: Path) -> None:
    if path.is_dir():
        kind = f"a Hugging Face directory; write hf:{path}" if (path / "config.json").exists() else "a directory"
        raise ModelError(
            f"{path}: is {kind}" + ("" if "hf:" in kind else "; MODEL is path/to/model.py[:name] or hf:DIR")
        )
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise ModelError(f"{path}: no such file" + (f"; {nearest(path.name, near)}" if near else ""))
    if path.suffix != ".py":
        raise ModelError(f"{path}: not a Python file; MODEL is path/to/model.py[:name] or hf:DIR")


def _target(module: Any, path: Path, name: str) -> tuple[Any, str]:
    """The attribute that builds the model, and its name: `name`, or the one that the rule at the top picks."""
    own = [
        n
        for n, v in vars(module).items()
        if inspect.isclass(v) and issubclass(v, nn.Module) and v.__module__ == module.__name__
    ]
    if not name and hasattr(module, "Model"):
        name = "Model"
    if not name:
        roots = [n for n in own if n not in _used_by_others(path, own)]
        if len(roots) == 1:
            name = roots[0]
        elif not own:
            raise ModelError(f"{path}: defines no torch.nn.Module class; name what builds the model: {path}:NAME")
        else:
            choices = ", ".join(f"{path}:{n}" for n in (roots or own)[:8])
            raise ModelError(f"{path}: several classes could be the model; say which: {choices}")
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            known = own or [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise ModelError(f"{path}: has no {name!r}; {nearest(name, known)}")
        target = getattr(target, part)
    if inspect.isclass(target) and not issubclass(target, nn.Module):
        raise ModelError(f"{path}:{name}: is a class, but not a torch.nn.Module; {nearest(name, own)}")
    if not callable(target):
        raise ModelError(
            f"{path}:{name}: is a {type(target).__name__}, neither a class nor a function; {nearest(name, own)}"
        )
    return target, getattr(target, "__name__", name) if inspect.isclass(target) else name


def _used_by_others(path: Path, classes: list[str]) -> set[str]:
    """The classes of the file that another class of the file mentions, such as layers and base classes."""
    used: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ClassDef):
            names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            used |= names & set(classes) - {node.name}
    return used


def _constructor(target: Any, name: str, arguments: Arguments) -> str:
    """Checks the arguments against the constructor's signature. Returns them as they are written in a call."""
    values = arguments.values
    if isinstance(target, nn.Module):
        if values:
            raise arguments.error(next(iter(values)), f"{name} is a model already built, it takes no arguments")
        return ""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return ", ".join(f"{k}={v!r}" for k, v in values.items())
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in values:
            if key not in named:
                raise arguments.error(key, f"{name} takes no argument {key!r}; {nearest(key, named)}")
    for key, p in named.items():
        if p.default is p.empty and key not in values:
            raise _missing(target, name, key, p, arguments.spec)
    return one_line(", ".join(f"{k}={v!r}" for k, v in values.items()), 120)


def _defaults(target: Any) -> dict[str, Any]:
    """The constructor's arguments with defaults that a spec can express."""
    try:
        parameters = {} if isinstance(target, nn.Module) else inspect.signature(target).parameters
    except (TypeError, ValueError):
        return {}
    return {n: p.default for n, p in parameters.items() if isinstance(p.default, bool | int | float | str)}


def _missing(target: Any, name: str, key: str, parameter: inspect.Parameter, spec: Spec) -> ModelError:
    """The error for an argument that is not given. A plain value can be given in the spec, an object in a function."""
    annotation = parameter.annotation
    plain = {"int", "float", "bool", "str", "list", "tuple", "dict"}
    words = set(re.findall(r"\w+", annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")))
    if annotation is parameter.empty:
        words = {"Config"} if key in ("config", "cfg", "args", "hparams", "params") else {"int"}
    if words & plain:
        return ModelError(f"{name} needs an argument {key!r}; give it under `model:` in the spec, or --set {key}=…")
    kind = next(iter(sorted(words)), "Config")
    return ModelError(
        f"{name} needs an argument {key!r}, an object, which a spec cannot write; add a function that builds the model,"
        f" `def Model(layers=2): return {name}({kind}(layers=layers))`, and write its arguments under `model:`"
    )


def _find_inputs(module: Any, path: Path) -> Any:
    if not hasattr(module, "example_inputs"):
        raise ModelError(
            f"{path}: has no example_inputs; write beside the model `def example_inputs(batch=2, sequence=16): return"
            " {…}`, the keyword arguments of its forward"
        )
    return module.example_inputs


def _call_inputs(inputs: Any, sizes: Mapping[str, Any], arguments: Arguments, path: Path) -> Inputs:
    """The example inputs. If they are a function, its arguments come from `inputs:` and, by name, from `model:`."""
    spec = arguments.spec
    if callable(inputs):
        parameters = inspect.signature(inputs).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for key in sizes:
            if key not in parameters and not takes_any:
                raise spec.error("inputs", key, what=f"example_inputs takes no {key!r}; {nearest(key, parameters)}")
        given = {k: v for k, v in arguments.values.items() if k in parameters}
        for key, p in parameters.items():
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and key not in {**given, **sizes}:
                raise spec.error("inputs", key, what=f"example_inputs needs it; write e.g. inputs: {{{key}: 8}}")
        try:
            value = inputs(**{**given, **sizes})
        except Exception as e:
            raise failure(e, path, "example_inputs fails: ") from e
    else:
        for key in sizes:
            raise spec.error("inputs", key, what=f"{path}: example_inputs is not a function, it takes no arguments")
        value = inputs
    return as_call(value, f"{path}: example_inputs")


def as_call(value: Any, what: str = "example_inputs") -> Inputs:
    """Turns example inputs into (args, kwargs). Raises `ModelError` when they hold no tensor.

    `value` is a tensor, a tuple or list of positional arguments, a dictionary of keyword arguments, or a pair of both.
    """
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    if isinstance(value, Mapping):
        args, kwargs = (), dict(value)
    elif isinstance(value, (tuple, list)):
        pair = len(value) == 2 and isinstance(value[0], (tuple, list)) and isinstance(value[1], dict)
        args, kwargs = (tuple(value[0]), dict(value[1])) if pair else (tuple(value), {})
    else:
        args, kwargs = (value,), {}
    if not all(isinstance(k, str) for k in kwargs):
        raise ModelError(f"{what}: keys must be the names of forward's arguments")
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        raise ModelError(f"{what}: holds no tensor; give a tuple, or a dictionary, of forward's arguments")
    return args, kwargs
