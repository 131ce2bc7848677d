"""The machine that a program is meant for: one device, and its links within a host and between hosts.

`hardware: h200` names a description in `machines/`, and `hardware: machine.yaml` names a file, such as one that
`tpc calibrate` writes. A mapping gives single keys; the others come from its `base:`, or from the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from tpcompiler.errors import SpecError
from tpcompiler.spec.complaints import nearest
from tpcompiler.spec.located import parse, read_text

MACHINES = Path(__file__).with_name("machines")


class Hardware(BaseModel):
    """The machine that the program is meant for. The defaults are one H100 (SXM, bf16) in an NVSwitch host of 8.

    `tpc shard` compares a rank's memory with `memory_gib`. `tpc plan` predicts seconds from all keys. `measured` names
    the keys that were measured on such a machine, and `fitted` those that were chosen so that predicted steps take as
    long as measured ones. The others are assumed, from data sheets or from similar machines.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    base: str = Field(default="", description="The description that the other keys change.", examples=["h200"])
    peak_tflops: float = Field(default=989.0, gt=0, description="Peak rate of 16-bit matrix products, TFLOP/s.")
    efficiency: float = Field(default=0.79, gt=0, le=1, description="Share of it that large products reach.")
    narrow: float = Field(
        default=450.0,
        ge=0,
        description="A product whose shortest side is d runs at d / (d + narrow) of the rate of large ones.",
    )
    attention_efficiency: float = Field(
        default=0.3, gt=0, le=1, description="Share of the peak that fused attention reaches, forward."
    )
    memory_gib: float = Field(default=80.0, gt=0, description="Memory of one device, GiB.")
    usable: float = Field(
        default=0.94, gt=0, le=1, description="Share of the memory that a plan may fill; the rest is the driver's."
    )
    bandwidth_gbps: float = Field(
        default=3350.0, gt=0, description="Memory bandwidth of one device, gigabytes a second."
    )
    bandwidth_efficiency: float = Field(
        default=0.8, gt=0, le=1, description="Share of the bandwidth that elementwise kernels reach."
    )
    kernel_us: float = Field(default=4.0, ge=0, description="Fixed time of every kernel, microseconds.")
    host: int = Field(default=8, ge=1, description="Devices in a host.")
    alpha_us: float = Field(default=50.0, ge=0, description="Latency of one collective in a host, microseconds.")
    beta_gbps: float = Field(
        default=300.0,
        gt=0,
        description="Rate of a device's link in a host, gigabytes a second: an all-reduce of n bytes over k ranks "
        "takes alpha + 2 (k - 1) / k · n / beta.",
    )
    between_alpha_us: float = Field(default=60.0, ge=0, description="The latency between hosts, microseconds.")
    between_beta_gbps: float = Field(
        default=40.0, gt=0, description="A device's share of the links between hosts, gigabytes a second."
    )
    hidden: float = Field(
        default=0.43,
        ge=0,
        le=1,
        description="Share of a collective's time that a long enough computation hides.",
    )
    measured: tuple[str, ...] = Field(default=(), description="The keys that were measured.")
    fitted: tuple[str, ...] = Field(
        default=(), description="The keys that were fitted to measured steps. All others are assumed."
    )

    @field_validator("measured", "fitted", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


def known_machines() -> list[str]:
    """The names of the descriptions that come with the package."""
    return sorted(path.stem for path in MACHINES.glob("*.yaml"))


def resolve(value: Any) -> Any:
    """Turns `h200`, `machine.yaml`, or a mapping with a `base:` into plain keys. Raises pydantic's error, one line."""
    try:
        return _resolved(value)
    except SpecError as e:
        raise PydanticCustomError("machine", "{why}", {"why": str(e)}) from e


def _resolved(value: Any) -> Any:
    """The plain keys without `base:` when it is a file, because a dumped spec is read in other places too."""
    if isinstance(value, str):
        return {**described(value), "base": value if value in known_machines() else ""}
    if isinstance(value, Mapping) and isinstance(value.get("base"), str) and value["base"]:
        return {**_resolved(value["base"]), **value}
    return value


def described(name: str) -> dict[str, Any]:
    """The keys of the description with this name or in this file. Raises `SpecError`."""
    path = MACHINES / f"{name}.yaml"
    if name not in known_machines():
        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            raise SpecError(f"{name}: not a machine; {nearest(name, known_machines())}, or give a .yaml file")
    value, origin = parse(read_text(path, str(path)), str(path))
    if not isinstance(value, Mapping):
        raise SpecError(f"{origin.file}: is not a mapping; `tpc calibrate` writes one")
    unknown = [key for key in value if key not in Hardware.model_fields]
    if unknown:
        raise origin.error((unknown[0],), f"is not known; {nearest(str(unknown[0]), Hardware.model_fields)}")
    return _resolved(dict(value))
