"""The rule of views, which no single line can express: it writes both shapes of a view in common factors."""

from __future__ import annotations

from itertools import pairwise

Shape = tuple[int, ...]


def view_pattern(before: Shape, after: Shape) -> tuple[str, dict[str, int]]:
    """The pattern of `x.view(after)` for a tensor of shape `before`, and the sizes of its letters.

    Both shapes are taken apart into the shortest groups of dimensions with equal products. A dimension begins and ends
    at a *cut*: the product of all dimensions of its group to the right. If the cuts of both shapes divide one another,
    the group has common factors. If they do not (4·6 seen as 3·8), its dimensions stay whole.
    """
    left: list[str] = ["1" if n == 1 else "" for n in before]
    right: list[str] = ["1" if n == 1 else "" for n in after]
    sizes: dict[str, int] = {}
    for ins, outs in _groups(before, after):
        cuts = sorted(_cuts(before, ins) | _cuts(after, outs), reverse=True)
        aligned = all(a % b == 0 for a, b in pairwise(cuts))
        for shape, dims, items in ((before, ins, left), (after, outs, right)):
            for d, high, low in _spans(shape, dims):
                if aligned:
                    names = [
                        _letter(sizes, a, a // b, ins[0]) for a, b in pairwise(c for c in cuts if low <= c <= high)
                    ]
                    items[d] = names[0] if len(names) == 1 else f"({' '.join(names)})"
                else:
                    items[d] = f"{'x' if items is left else 'y'}{d}!"
    return f"{' '.join(left)} -> {' '.join(right)}", sizes


def _letter(sizes: dict[str, int], cut: int, size: int, group: int) -> str:
    name = f"g{group}c{cut}"
    sizes[name] = size
    return name


def _groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """The shortest groups of dimensions with equal products. Dimensions of one element are left out."""
    i = [d for d, n in enumerate(before) if n != 1]
    j = [d for d, n in enumerate(after) if n != 1]
    groups: list[tuple[list[int], list[int]]] = []
    a = b = 0
    while a < len(i) and b < len(j):
        a0, b0 = a, b
        left, right = before[i[a]], after[j[b]]
        a, b = a + 1, b + 1
        while left != right:
            if left < right:
                left *= before[i[a]]
                a += 1
            else:
                right *= after[j[b]]
                b += 1
        groups.append((i[a0:a], j[b0:b]))
    assert a == len(i) and b == len(j), f"view of {before} as {after}"
    return groups


def _cuts(shape: Shape, dims: list[int]) -> set[int]:
    cuts, n = {1}, 1
    for d in reversed(dims):
        n *= shape[d]
        cuts.add(n)
    return cuts


def _spans(shape: Shape, dims: list[int]) -> list[tuple[int, int, int]]:
    """(dimension, its upper cut, its lower cut) for each dimension, major first."""
    out, low = [], 1
    for d in reversed(dims):
        high = low * shape[d]
        out.append((d, high, low))
        low = high
    return out[::-1]
