"""Lines of ops that look at a neighbourhood: convolutions, pooling, unfolding. Places stay whole, channels need not."""

from __future__ import annotations

from collections.abc import Callable

from tpcompiler.ops.call import Call, Line, letters


def convolution(call: Call) -> Line:
    """Output channels may be split, and groups of channels; a channel of each group is a batch (depthwise)."""
    x, weight = call.shape(0), call.shape(1)
    places = len(weight) - 2
    if len(x) != places + 2:
        return None
    groups, inner, outer = call.args["groups"], weight[1], weight[0] // call.args["groups"]
    before, after, out = (" ".join(f"{name}{k}!" for k in range(places)) for name in "xwy")
    if groups == 1:
        channels, made, sizes = "i!", "o", {"i": inner, "o": outer}
    else:
        channels, made, sizes = "(g i!)", "(g o)", {"g": groups, "i": inner, "o": outer}
    bias = f", {made}" if call.operands[2] is not None else ""
    return f"b {channels} {before}, {made} i! {after}{bias} -> b {made} {out}", sizes


def pooled(places: int) -> Callable[[Call], Line]:
    """An op on the last dimensions, whose sizes change; all results are alike."""

    def rule(call: Call) -> Line:
        lead = letters(call.rank() - places)
        before, after = (" ".join([*lead, *(f"{name}{k}!" for k in range(places))]) for name in "xy")
        return f"{before} -> {', '.join([after] * len(call.results))}"

    return rule


def im2col(call: Call) -> Line:
    """`F.unfold`: a window's elements become the minor factor of its channel."""
    if call.rank() != 4:
        return None
    c = call.shape()[1]
    return "b c y! x! -> b (c k!) n!", {"c": c, "k": call.results[0][1] // c}


def unfold(call: Call) -> Line:
    d, i = letters(call.rank()), call.dim("dimension")
    before = " ".join([*d[:i], d[i] + "!", *d[i + 1 :]])
    return f"{before} -> {' '.join([*d[:i], f'm{i}!', *d[i + 1 :], 'k!'])}"
