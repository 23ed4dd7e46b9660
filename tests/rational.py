"""Exact counts of small matrices in rational arithmetic: the truth that needs no margin."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

Rows = Sequence[Sequence[float | Fraction]]


def count_above(G: Rows, shift: float | Fraction) -> int:
    """#{λ(G) > shift} of a symmetric matrix: positive pivots of a congruence of G - shift I to a diagonal."""
    n = len(G)
    a = [[Fraction(G[i][j]) - (Fraction(shift) if i == j else 0) for j in range(n)] for i in range(n)]
    left, positive = list(range(n)), 0
    while left:
        pivot = next((i for i in left if a[i][i] != 0), None)
        if pivot is None:  # a zero diagonal: adding row and column j to i makes a_ii = 2 a_ij
            pair = next(((i, j) for i in left for j in left if a[i][j] != 0), None)
            if pair is None:
                break
            i, j = pair
            for k in left:
                a[i][k] += a[j][k]
            for k in left:
                a[k][i] += a[k][j]
            continue
        d = a[pivot][pivot]
        positive += d > 0
        left.remove(pivot)
        for i in left:
            factor = a[i][pivot] / d
            if factor:
                for k in left:
                    a[i][k] -= factor * a[pivot][k]
    return positive


def gram(A: Rows, *, center: bool = False) -> list[list[Fraction]]:
    """AᵀA, or about the column means, exactly."""
    columns = [[Fraction(x) for x in column] for column in zip(*A, strict=True)]
    if center:
        means = [sum(column) / len(column) for column in columns]
        columns = [[x - mean for x in column] for column, mean in zip(columns, means, strict=True)]
    return [[sum((x * y for x, y in zip(p, q, strict=True)), Fraction(0)) for q in columns] for p in columns]
