"""A fragment compiled, proven and compared with the module that it builds, in float64, gradients included."""

from __future__ import annotations

import random
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.fuzz.fragments import BATCH, TOKENS, WIDTH, WORDS, Fragment, Whole, drawn
from tpcompiler.api import compile_capture
from tpcompiler.capture import capture, float64
from tpcompiler.errors import ModelError, PlanError, TpcError
from tpcompiler.spec.schema import Spec
from tpcompiler.verification.against_model import Comparison
from tpcompiler.verification.source_model import same_as_module
from tpcompiler.verification.verify import initial_state, inputs_of

GOOD = ("split", "whole")


@dataclass(frozen=True)
class Outcome:
    """`status`: split, whole (nothing can be split), untraced, crashed, unproved or wrong."""

    status: str
    why: str = ""


def inputs(fragment: Fragment) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if fragment.kind == "words":
        return torch.randint(WORDS, (BATCH, TOKENS), generator=generator)
    return torch.randn(BATCH, TOKENS, WIDTH, generator=generator)


def tried(fragment: Fragment, degree: int) -> Outcome:
    example = inputs(fragment)
    try:
        captured = capture(lambda: Whole(fragment), example)
        sharded = compile_capture(float64(captured), Spec.load({"mesh": {"tensor": degree}}))
        checked = sharded.check
    except ModelError as e:
        return Outcome("untraced", str(e))
    except PlanError as e:
        return Outcome("whole", str(e))
    except TpcError as e:
        return Outcome("crashed", str(e))
    except Exception as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        return Outcome("crashed", f"{Path(last.filename).name}:{last.lineno}: {type(e).__name__}: {e}")
    if not checked.passed:
        return Outcome("unproved", str(checked.refused[0]))
    torch.manual_seed(0)
    module = Whole(fragment)
    state = initial_state(captured, module, torch.float64, 0)
    run = Comparison(sharded, state, torch.float64, True)
    cases = [run.case("outputs and gradients", [inputs_of(captured, example, torch.float64)])]
    cases += same_as_module(captured, module, example, True)
    wrong = [c for c in cases if not c.passed]
    return Outcome("wrong", f"{wrong[0].what}: {wrong[0].worst} {wrong[0].notes}") if wrong else Outcome("split")


def shrunk(fragment: Fragment, degree: int, status: str) -> Fragment:
    """The smallest fragment found that ends the same way."""
    while less := next((f for f in fragment.smaller() if tried(f, degree).status == status), None):
        fragment = less
    return fragment


def case(seed: int) -> tuple[Fragment, int]:
    r = random.Random(seed)
    return drawn(r), r.choice((2, 3))
