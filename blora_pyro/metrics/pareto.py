"""The Pareto front of two errors, and its knee."""

from collections.abc import Sequence

Point = tuple[float, float]


def dominates(one: Point, other: Point) -> bool:
    """Whether `one` is at most `other` in both errors, and below it in one."""
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates, sorted by first error; ties are all kept."""
    front = [i for i, one in enumerate(points) if not any(dominates(two, one) for two in points)]
    return sorted(front, key=lambda i: (points[i], i))


def knee(points: Sequence[Point], base: Point | None = None) -> int | None:
    """Index of the knee: beyond it, giving up one error gains little in the other.

    Both errors are scaled to [0, 1] between the ends of the front, which then lie at (0, 1) and
    (1, 0). The knee is the point farthest from the line between them on the origin's side, that
    with the largest 1 - x - y (Das, "On characterizing the 'knee' of the Pareto curve based on
    normal-boundary intersection", Structural Optimization 18, 1999; Kneedle uses the same rule,
    Satopää et al., ICDCSW 2011). The base is an end of the front, too, unless a point dominates it
    or it dominates all: not adapting is always an option, and the scale then does not depend on the
    searched range. If the front has fewer than three points, or nowhere bends towards the origin,
    the result is the point with the lowest mean of the two errors.

    Args:
        points: (new-domain error, backward error) of each point.
        base: Those of the base, which is never the knee.

    Returns:
        An index into `points`; None if there are no points.
    """
    front = pareto_front(points)
    if not front:
        return None
    if base is not None:  # a point worse than the base is chosen only if all are
        front = [i for i in front if not dominates(base, points[i])] or front
    ends = [points[i] for i in front]
    if base and not any(dominates(end, base) or dominates(base, end) for end in ends):
        ends.append(base)
    ends = sorted(set(ends))
    (left, top), (right, bottom) = ends[0], ends[-1]

    def height(i: int) -> float:
        """Distance to the line between the ends, times √2."""
        first, second = points[i]
        return 1 - (first - left) / (right - left) - (second - bottom) / (top - bottom)

    if len({points[i] for i in front}) >= 3:
        best = max(front, key=height)
        if height(best) > 1e-9:
            return best
    return min(front, key=lambda i: sum(points[i]))
