"""Two errors to be low at once: the points that nothing beats, and a knee among them."""

from collections.abc import Sequence

Point = tuple[float, float]


def dominates(one: Point, other: Point) -> bool:
    """Whether `one` is nowhere above `other`, and somewhere below it."""
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates, by their first error; equal ones all."""
    front = [i for i, one in enumerate(points) if not any(dominates(two, one) for two in points)]
    return sorted(front, key=lambda i: (points[i], i))


def knee(points: Sequence[Point], base: Point | None = None) -> int | None:
    """Index of the point of the front where giving way in one error no longer pays in the other.

    Both errors are scaled to [0, 1] between the ends of the front, which so lie at (0, 1) and
    (1, 0). The knee is the point farthest from the line between them, on the side of the origin:
    of the largest 1 - x - y (Das, "On characterizing the 'knee' of the Pareto curve based on
    normal-boundary intersection", Structural Optimization 18, 1999; the same rule is Kneedle's,
    Satopää et al., ICDCSW 2011). The base is an end of the front, too, unless a point dominates
    it: not to adapt is a choice that is always there, and the scale then does not hang on the range
    that was searched. A front of fewer than three points has no shape, and one that nowhere bends
    towards the origin no knee: there it is the point with the lowest mean of the two errors.

    Args:
        points: (new-domain error, backward error) each.
        base: That of the base; never the knee.

    Returns:
        An index into `points`; None if there are none.
    """
    front = pareto_front(points)
    if not front:
        return None
    if base is not None:  # what is worse than not to adapt is a choice only if all is
        front = [i for i in front if not dominates(base, points[i])] or front
    ends = [points[i] for i in front]
    if base is not None and not any(dominates(one, base) for one in ends):
        ends.append(base)
    ends = sorted(set(ends))
    (left, top), (right, bottom) = ends[0], ends[-1]

    def height(i: int) -> float:
        """Distance to the line, times the square root of 2."""
        first, second = points[i]
        return 1 - (first - left) / (right - left) - (second - bottom) / (top - bottom)

    if len({points[i] for i in front}) >= 3:
        best = max(front, key=height)
        if height(best) > 1e-9:
            return best
    return min(front, key=lambda i: sum(points[i]))
