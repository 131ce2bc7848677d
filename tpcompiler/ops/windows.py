"""Lines of ops that read a neighbourhood (convolutions, pooling, unfolding): space stays whole, channels may split."""

from __future__ import annotations

from collections.abc import Callable

from tpcompiler.ops.record import Line, OpCall, letters


def convolution(call: OpCall) -> Line:
    """Output channels may be split, and so may groups of channels: with one channel a group, each is a batch. Without
    groups, input channels are summed over."""
    places = call.rank(1) - 2
    if call.rank() != places + 2 or call.args.get("transposed"):
        return None
    before, after, out = (" ".join(f"{name}{k}!" for k in range(places)) for name in "xwy")
    if call.args["groups"] == 1:
        bias = "" if call.operands[2] is None else ", o"
        return f"b i {before}, o i {after}{bias} -> b o {out}"
    bias = "" if call.operands[2] is None else ", (g o)"
    return f"b (g i!) {before}, (g o) i! {after}{bias} -> b (g o) {out}"


def im2col(call: OpCall) -> Line:
    """`F.unfold`: the elements of a window become the minor factor of its channel."""
    return "b c y! x! -> b (c k!) n!" if call.rank() == 4 else None


def pooled(places: int) -> Callable[[OpCall], Line]:
    """The line of an op that changes the sizes of the last `places` dimensions. All its results have one shape."""

    def rule(call: OpCall) -> Line:
        lead = letters(call.rank() - places)
        before, after = (" ".join([*lead, *(f"{name}{k}!" for k in range(places))]) for name in "xy")
        return f"{before} -> {', '.join([after] * len(call.results))}"

    return rule
