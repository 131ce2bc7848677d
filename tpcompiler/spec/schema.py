"""The YAML spec: what to shard, over which ranks. Schema, defaults, and errors that name file, line and key.

`{"mesh": {"tensor": 2}}` is a whole spec. Everything else has a default, and `tpc schema` prints all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, WithJsonSchema, field_validator

from tpcompiler.errors import SpecError
from tpcompiler.spec.complaints import S, nearest, validate
from tpcompiler.spec.located import Key, Origin, parse, read_text
from tpcompiler.spec.machine import Hardware, resolve

if TYPE_CHECKING:
    from tpcompiler.runtime.mesh import Mesh

Choice = Literal["shard", "replicate"]
KINDS = ("mlp", "attention", "embedding", "head", "other")


class Section(BaseModel):
    """A part of the spec. Unknown keys and wrong types are errors, and a section cannot be changed once it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_by_name=True)


class MeshSpec(Section):
    """How many ranks there are, by mesh dimension. `data` is the outer one: rank = data · tensors + tensor."""

    tensor: int = Field(ge=1, le=65536, description="Ranks that share one copy of the model.", examples=[8])
    data: int = Field(
        default=1, ge=1, le=65536, description="Copies of the model, each on its own batch.", examples=[2]
    )


class ShardSpec(Section):
    """What happens to each kind of block. It is an error if a kind that the spec names as `shard` cannot be split."""

    mlp: Choice = Field(default="shard", description="Feed-forward blocks: split over their hidden width.")
    attention: Choice = Field(default="shard", description="Attention blocks: split over their heads.")
    embedding: Choice = Field(default="shard", description="Embedding tables: split over the vocabulary.")
    head: Choice = Field(default="shard", description="The output layer and the loss: split over the vocabulary.")
    other: Literal["auto", "shard", "replicate"] = Field(
        default="auto",
        description="Any other block (experts, mixers, convolutions). auto: split where that is legal and saves time.",
    )


class Override(Section):
    """An exception by name. Later entries win over earlier ones, and all of them over `shard`."""

    match: str = Field(
        min_length=1,
        description="Glob over module or parameter names; `*` also matches dots. A module stands for all below it.",
        examples=["h.0.mlp"],
    )
    as_: Choice = Field(
        alias="as", description="What to do with the blocks of the parameters it covers.", examples=["replicate"]
    )


class AxisSpec(Section):
    """An axis, named by a dimension of a parameter that contains it."""

    parameter: str = Field(min_length=1, description="Glob over parameter names.", examples=["h.*.attn.c_attn.weight"])
    dimension: int = Field(description="Which dimension of the parameter; negative counts from the end.", examples=[0])
    factor: int | str | None = Field(
        default=None,
        description="Which factor of that dimension: its index, major first, or the axis's name as `tpc explain` "
        "prints it. Default: the first factor that can be split.",
        examples=[0],
    )
    as_: Choice = Field(default="shard", alias="as", description="What to do with the axis.")


Exit = Literal["gather", "shard"]


def _gathered() -> dict[str, Exit]:
    return {"*": "gather"}


Outputs = Annotated[
    dict[str, Exit],
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["gather", "shard"], "type": "string"},
                {"additionalProperties": {"enum": ["gather", "shard"]}, "type": "object"},
            ]
        }
    ),
]


Described = Annotated[
    Hardware,
    BeforeValidator(resolve),
    WithJsonSchema({"anyOf": [{"type": "string"}, Hardware.model_json_schema()]}),
]


class Spec(Section):
    """A tensor-parallel layout for a plain model."""

    mesh: MeshSpec = Field(description="Ranks, by mesh dimension.", examples=[{"tensor": 8}])
    model: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the model's constructor, such as its sizes.",
        examples=[{"layers": 12}],
    )
    inputs: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the example inputs, such as batch and sequence.",
        examples=[{"batch": 8, "sequence": 1024}],
    )
    shard: ShardSpec = Field(
        default_factory=ShardSpec, description="What is split, by kind of block.", examples=[{"mlp": "shard"}]
    )
    override: tuple[Override, ...] = Field(
        default=(), description="Exceptions to `shard`, by name.", examples=[[{"match": "h.0.mlp", "as": "replicate"}]]
    )
    axes: tuple[AxisSpec, ...] = Field(
        default=(),
        description="Single axes, each named by a dimension of a parameter.",
        examples=[[{"parameter": "h.*.w", "dimension": 0}]],
    )
    outputs: Outputs = Field(
        default_factory=_gathered,
        description="Whether outputs that are split (logits) are gathered or left sharded: one word for all outputs, "
        "or a mapping from globs over output names or positions, of which the last match counts.",
        examples=["gather"],
    )
    uneven: Literal["allow", "warn", "error"] = Field(
        default="allow",
        description="What to do when a split axis does not divide by its degree (25 heads over 8 ranks): allow it, "
        "warn, or refuse to compile.",
    )
    allow_empty: bool = Field(
        default=False, description="Whether a rank may hold nothing of an axis (2 heads over 4 ranks)."
    )
    attention_dropout: Literal["fused", "exact"] = Field(
        default="fused",
        description="Dropout inside attention. fused: the kernel draws its own random numbers, which is fast; masks "
        "differ between degrees. exact: attention is written out, which is slower; masks are the same at every degree.",
    )
    overlap: bool | Literal["halves"] = Field(
        default=False,
        description="What runs during communication. true: the all-reduce of a product's input gradient runs while the "
        "weight's gradient is computed. halves: in addition, layers compute one half of a batch while the other half "
        "communicates, forward and backward.",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Seed of the initial weights and of dropout.", examples=[0]
    )
    hardware: Described = Field(
        default_factory=Hardware,
        description="The machine that the program is meant for: a name (h200), a file, or single keys.",
        examples=["h200"],
    )
    train: dict[str, Any] = Field(
        default_factory=dict, description="The trainer's settings; `tpc train` checks them.", examples=[{"steps": 100}]
    )

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @field_validator("override", "axes", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("outputs", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"*": value}
        return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | Spec) -> Spec:
        """A spec from a YAML file's path, a dictionary, or a spec. Raises `SpecError`, one line."""
        if isinstance(source, Spec):
            return source
        if isinstance(source, Mapping):
            return cls._checked(dict(source), Origin())
        if not isinstance(source, (str, Path)):
            raise SpecError(f"a spec is a path, a dictionary or a Spec, not {type(source).__name__}")
        return cls.parse(read_text(Path(source), str(source)), str(source))

    @classmethod
    def parse(cls, text: str, file: str = "spec") -> Spec:
        """A spec from YAML text; `file` is what errors call it."""
        return cls._checked(*parse(text, file))

    @classmethod
    def _checked(cls, value: Any, origin: Origin) -> Spec:
        if value is None:
            raise SpecError(f"{origin.file}: the spec is empty; the least one is `mesh: {{tensor: 2}}`")
        spec = validate(cls, value, origin)
        spec._origin = origin
        return spec

    @property
    def file(self) -> str:
        """What errors call this spec: the path of its file, or `spec`."""
        return self._origin.file

    @property
    def ranks(self) -> Mesh:
        """The mesh of ranks, `data` outermost."""
        from tpcompiler.runtime.mesh import Mesh

        return Mesh.of({"data": self.mesh.data, "tensor": self.mesh.tensor})

    @property
    def explicit(self) -> frozenset[str]:
        """The kinds of block that the spec asks to shard explicitly, so that a failure to split them is an error."""
        if "shard" not in self.model_fields_set:
            return frozenset()
        return frozenset(k for k in self.shard.model_fields_set if getattr(self.shard, k) == "shard")

    def output(self, *names: str) -> Exit:
        """What to do with an output that has these names (its key, its position)."""
        chosen: Exit = "gather"
        for pattern, choice in self.outputs.items():
            if any(fnmatchcase(name, pattern) for name in names):
                chosen = choice
        return chosen

    def check_outputs(self, names: Iterable[tuple[str, str]]) -> None:
        """Raises `SpecError` for a pattern under `outputs` that none of a model's outputs matches.

        `names`: the position and the key of each output; the key is empty where the model gives it none.
        """
        known = list(dict.fromkeys(name for pair in names for name in pair if name))
        for pattern in self.outputs:
            if known and not any(fnmatchcase(name, pattern) for name in known):
                raise self.error("outputs", pattern, what=f"matches no output of the model; {nearest(pattern, known)}")

    def put(self, key: Key, value: Any, said: str) -> Spec:
        """A copy with one value set at `key`, such as `("mesh", "tensor")`. Errors about it name `said`, not the file.

        A mapping is merged into the existing one, key by key.
        """
        *above, last = key
        values = self.dump()
        place: dict[str | int, Any] = values  # type: ignore[assignment]
        for part in above:
            inner = place.get(part)
            place[part] = dict(inner) if isinstance(inner, Mapping) else {}
            place = place[part]
        place[last] = _merged(place.get(last), value)
        return Spec._checked(values, self._origin.given(key, said))

    def error(self, *key: str | int, what: str) -> SpecError:
        """`file:line: key: what` for a key of this spec, ready to raise: `raise spec.error("axes", 0, what=…)`."""
        return self._origin.error(key, what)

    def section(self, model: type[S], name: str = "train") -> S:
        """A section that the spec itself does not check, such as `train`, checked by its own schema `model`."""
        return validate(model, getattr(self, name), self._origin, (name,))

    def with_(self, **changes: Any) -> Spec:
        """A copy with whole sections replaced by plain values: `spec.with_(mesh={"tensor": 4})`."""
        return Spec._checked({**self.dump(), **changes}, self._origin)

    def dump(self) -> dict[str, Any]:
        """Plain values from which `load` makes an equal spec. They hold only what was given; defaults are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON schema of the YAML file, for editors."""
        schema = cls.model_json_schema(by_alias=True)
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "tpcompiler spec"}


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def covers(pattern: str, name: str) -> bool:
    """Whether a glob matches the name of a parameter or of a module around it: `h.*.mlp` covers `h.3.mlp.fc.weight`."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))
