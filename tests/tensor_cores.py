"""A model of the tensor cores of Hopper and Blackwell, and of Triton's products of float32 input on them.

Khattak and Mikaitis (Accurate Models of NVIDIA Tensor Cores, arXiv 2512.07004) found these units to agree
with it bit by bit: the products of a step (16 of 16-bit input, 8 of tf32) are exact; they and the sum so far
are cut off 2 bits below the last place of the largest; what they add up to is cut off to float32. A100: half
of the products, 1 bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

PRODUCTS = {"float16": 16, "bfloat16": 16, "tf32": 8}
EXTRA_BITS = 2


def exponent(x: Fraction) -> int:
    """⌊log2 |x|⌋."""
    n, d = abs(x.numerator), x.denominator
    e = n.bit_length() - d.bit_length()
    return e if Fraction(2) ** e <= abs(x) else e - 1


def cut_off(x: Fraction, place: int) -> Fraction:
    """x towards zero, to a multiple of 2^place."""
    whole = x / Fraction(2) ** place
    return (abs(whole.numerator) // whole.denominator) * Fraction(2) ** place * (1 if x >= 0 else -1)


def step(total: Fraction, products: Sequence[Fraction]) -> Fraction:
    """One step: total and products, cut off at the largest's place."""
    terms = [x for x in (total, *products) if x != 0]
    if not terms:
        return Fraction(0)
    place = max(exponent(x) for x in terms) - 23 - EXTRA_BITS
    found = sum((cut_off(x, place) for x in terms), Fraction(0))
    return cut_off(found, exponent(found) - 23) if found else found


def chain(total: Fraction, products: Sequence[Fraction], each: int) -> Fraction:
    """Steps one after the other."""
    for i in range(0, len(products), each):
        total = step(total, products[i : i + each])
    return total


def nearest(x: Fraction, bits: int) -> Fraction:
    """x to that many bits, ties away from zero: cvt.rna.tf32 of 11."""
    if x == 0:
        return x
    unit = Fraction(2) ** (exponent(x) - bits + 1)
    return cut_off(x + (unit / 2 if x > 0 else -unit / 2), exponent(unit))


def sum_of_float32(x: Sequence[Fraction], y: Sequence[Fraction], block: int, chunk: int) -> Fraction:
    """Σ x y as the kernel adds it: three tf32 products a block, blocks in float32, chunks exactly."""
    total = Fraction(0)
    for first in range(0, len(x), chunk):
        part = Fraction(0)
        for at in range(first, min(first + chunk, len(x)), block):
            a, b = x[at : at + block], y[at : at + block]
            high_a, high_b = [nearest(v, 11) for v in a], [nearest(v, 11) for v in b]
            low_a = [nearest(v - h, 11) for v, h in zip(a, high_a, strict=True)]
            low_b = [nearest(v - h, 11) for v, h in zip(b, high_b, strict=True)]
            found = Fraction(0)
            for left, right in ((low_a, high_b), (high_a, low_b), (high_a, high_b)):
                products = [v * w for v, w in zip(left, right, strict=True)]
                found = chain(found, products, PRODUCTS["tf32"])
            part = nearest(part + found, 24)
        total += part
    return total
