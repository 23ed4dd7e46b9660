"""A synthetic image set: textured shapes among clutter, 32×32 RGB, drawn from a seed.

The class of an image is the shape of its largest object together with the texture on it, each of which occurs
in several classes. Position, size, rotation, colours, contrast, background, smaller textured shapes, strokes
and noise say nothing about the class; `difficulty` says how far they go. A mirror image has the same class.

Image i of a split is a function of (seed, split, i) and of classes and difficulty alone: a larger set begins
with the images of the smaller one. Random numbers are raw words of Philox, whose stream NumPy keeps, and
images are made of IEEE float32 operations that round alike everywhere (+ - × ÷ √, min, max, floor; no
trigonometry, no matrix product), so that the bytes should be the same on every machine.

The default difficulty was set on pilot seeds, not those of any study: benchmarks/procedural_pilot.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bsgap_kernels.lab.data.images import ImageData, byte_data
from bsgap_kernels.lab.data_options import ProceduralOptions

SIZE = 32
_PIXELS = 3 * SIZE * SIZE
_PARAMETERS = 192  # words an image: more than are used, so that a new parameter moves no old one
_NOISE = 2 * _PIXELS // 8  # words an image: two bytes a value
_WORDS = _PARAMETERS + _NOISE
_WORDS_A_COUNT = 4  # one step of Philox's counter
_CHUNK = 50  # images at a time: planes of 200 KiB fit the cache, and their memory is reused
_DISTRACTORS = 4
_STROKES = 3

Array = npt.NDArray[Any]  # float32 throughout
_Field = Callable[[Array, Array], Array]
"""A value at each (u, v)."""


def load_procedural(options: ProceduralOptions) -> ImageData:
    """The procedural set of these options; classes are balanced within one image, in both splits.

    With `label_noise` p, each training label is replaced with probability p by one of the other classes, each
    as likely; test labels are always right.
    """
    train, train_labels = _split(options, "train")
    test, test_labels = _split(options, "test")
    return byte_data(
        "procedural",
        torch.from_numpy(train),
        torch.from_numpy(train_labels),
        torch.from_numpy(test),
        torch.from_numpy(test_labels),
        options.classes,
        synthetic=True,
    )


def class_names(classes: int) -> list[str]:
    """Texture and shape of every class, e.g. `across disc`."""
    shapes, textures = list(SHAPES), list(TEXTURES)
    return [f"{textures[texture]} {shapes[shape]}" for shape, texture in map(_kinds(classes), range(classes))]


def _kinds(classes: int) -> Callable[[Any], tuple[Any, Any]]:
    """Shape and texture of a label: the cells of a square of shapes × textures, row by row."""
    shapes = math.isqrt(classes - 1) + 1
    return lambda label: (label % shapes, label // shapes)


def _split(options: ProceduralOptions, split: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images (N, 3, 32, 32) and labels (N,) of `train` or `test`."""
    count = getattr(options, split)
    images = np.empty((count, 3, SIZE, SIZE), np.uint8)
    labels = np.arange(count) % options.classes
    noisy = labels.copy()
    for start in range(0, count, _CHUNK):
        rows = slice(start, min(start + _CHUNK, count))
        words = _words(options.seed, split, rows)
        draws = _Draws(words[:, :_PARAMETERS])
        # The label's own numbers come first: noise leaves the images as they are.
        replaced, by = draws.uniform().ravel() < options.label_noise, draws.uniform().ravel()
        if split == "train":
            step = 1 + (by * (options.classes - 1)).astype(np.int64)
            noisy[rows] = np.where(replaced, (labels[rows] + step) % options.classes, labels[rows])
        scene = _Scene(options.classes, options.difficulty, labels[rows], draws)
        images[rows] = scene.bytes(words[:, _PARAMETERS:])
    return images, noisy


# -- random numbers


def _words(seed: int, split: str, rows: slice) -> npt.NDArray[np.uint64]:
    """The random words (images, _WORDS) of some images of a split: counters of Philox keyed by the split."""
    key = np.array([seed, ("train", "test").index(split)], np.uint64)
    generator = np.random.Philox(counter=rows.start * (_WORDS // _WORDS_A_COUNT), key=key)
    return generator.random_raw((rows.stop - rows.start) * _WORDS).reshape(-1, _WORDS)


class _Draws:
    """Hands out the words of each image, one after the other, as columns (images, 1, 1)."""

    def __init__(self, words: npt.NDArray[np.uint64]) -> None:
        # 24 bits are what a float32 holds.
        self._values = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
        self._columns: Iterator[int] = iter(range(words.shape[1]))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Array:
        """Uniform in [low, high)."""
        values = self._values[:, next(self._columns), None, None]
        return values * np.float32(high - low) + np.float32(low)

    def choice(self, count: int) -> npt.NDArray[np.int64]:
        """Integers (images,) from 0 to count - 1."""
        return (self.uniform().ravel() * np.float32(count)).astype(np.int64)

    def direction(self, most: float) -> tuple[Array, Array]:
        """Cosine and sine of an angle whose half has its tangent uniform in [-most, most)."""
        half = self.uniform(-most, most)
        square = half * half
        return (1 - square) / (1 + square), 2 * half / (1 + square)


# -- shapes: about the signed distance to the edge, in units of the object's radius, negative inside


def _box(u: Array, v: Array, width: float, height: float) -> Array:
    return np.maximum(np.abs(u) - width, np.abs(v) - height)


def _length(u: Array, v: Array) -> Array:
    return np.sqrt(u * u + v * v)


def _triangle(u: Array, v: Array) -> Array:
    # Tip up, flanks with normals (±0.866, -0.5).
    return np.maximum(0.8660254 * np.abs(u) - 0.5 * v - 0.52, v - 0.62)


def _plus(u: Array, v: Array) -> Array:
    return np.minimum(_box(u, v, 1.0, 0.36), _box(u, v, 0.36, 1.0))


SHAPES: dict[str, _Field] = {
    "disc": lambda u, v: _length(u, v) - 0.95,
    "square": lambda u, v: _box(u, v, 0.83, 0.83),
    "triangle": _triangle,
    "plus": _plus,
    "ring": lambda u, v: np.abs(_length(u, v) - 0.7) - 0.3,
    "bar": lambda u, v: _box(u, v, 1.05, 0.45),
    "rhombus": lambda u, v: 0.8 * np.abs(u) + 0.6 * np.abs(v) - 0.62,
    "half disc": lambda u, v: np.maximum(_length(u, v) - 1.05, -v),
}


# -- textures: how much of the second colour, from 0 to 1, at (u, v) in periods


def _wave(t: Array) -> Array:
    """0 and 1 in turn, half a period each, with a ramp of about a pixel for periods of 5."""
    triangle = np.abs(t - np.floor(t) - 0.5)
    return np.clip((triangle - 0.25) * 5 + 0.5, 0, 1)


def _checks(u: Array, v: Array) -> Array:
    a, b = _wave(u), _wave(v)
    return a + b - 2 * a * b


def _dots(u: Array, v: Array) -> Array:
    a, b = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
    return np.clip((0.33 - _length(a, b)) * 5 + 0.5, 0, 1)


def _grid(u: Array, v: Array) -> Array:
    a, b = np.abs(u - np.floor(u) - 0.5), np.abs(v - np.floor(v) - 0.5)
    return np.clip((0.17 - np.minimum(a, b)) * 5 + 0.5, 0, 1)


def _sectors(u: Array, v: Array) -> Array:
    a, b = np.clip(u * 5 + 0.5, 0, 1), np.clip(v * 5 + 0.5, 0, 1)
    return a + b - 2 * a * b


TEXTURES: dict[str, _Field] = {
    "across": lambda u, v: _wave(v),
    "along": lambda u, v: _wave(u),
    "checked": _checks,
    "dotted": _dots,
    "grid": _grid,
    "target": lambda u, v: _wave(_length(u, v)),
    "sectors": _sectors,
    "plain": lambda u, v: np.zeros_like(u),
}
_CENTRED = ("target", "sectors")
"""Textures whose phase is that of the object."""


# -- scenes


class _Scene:
    """Images of some labels, painted from the back to the front on planes (images, 32, 32) in [0, 1]."""

    def __init__(self, classes: int, difficulty: float, labels: npt.NDArray[np.int64], draws: _Draws) -> None:
        self._draws = draws
        self._difficulty = difficulty
        middle = (SIZE - 1) / 2
        self._y = (np.arange(SIZE, dtype=np.float32) - np.float32(middle)).reshape(1, SIZE, 1)
        self._x = self._y.reshape(1, 1, SIZE)
        self._planes = [self._background() for _ in range(3)]
        shape_of, texture_of = _kinds(classes)(np.arange(classes))
        shapes, textures = int(shape_of.max()) + 1, int(texture_of.max()) + 1
        amount = min(difficulty, 1.0)
        radius = draws.uniform(12.0 - 3.75 * difficulty, 12.5 - 1.25 * difficulty)
        for _ in range(_DISTRACTORS):
            there = (draws.uniform() < 0.75 * amount).astype(np.float32)
            small = radius * draws.uniform(0.2, 0.3 + 0.15 * difficulty)
            centre = draws.uniform(-15, 15), draws.uniform(-15, 15)
            self._stamp(draws.choice(shapes), draws.choice(textures), small, centre, 1.0, there)
        reach = np.minimum(15.5 - radius, 7.5 * difficulty)
        centre = draws.uniform(-1, 1) * reach, draws.uniform(-1, 1) * reach
        shape, texture = _kinds(classes)(labels)
        # Beyond 0.4 (44°) stripes across would pass for stripes along.
        self._stamp(shape, texture, radius, centre, min(0.25 * difficulty, 0.4), np.float32(1))
        for _ in range(_STROKES):
            self._stroke((draws.uniform() < 0.6 * amount).astype(np.float32))

    def bytes(self, noise: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """The images (images, 3, 32, 32), with noise of a triangular distribution from two bytes a value."""
        pairs = noise.astype("<u8", copy=False).view(np.uint8).reshape(-1, 3, SIZE, SIZE, 2)
        amount = np.float32(30.0 * self._difficulty / 104.5)  # 104.5: deviation of a sum of two bytes
        out = np.empty((len(noise), 3, SIZE, SIZE), np.uint8)
        for channel, plane in enumerate(self._planes):
            both = pairs[:, channel, :, :, 0].astype(np.float32) + pairs[:, channel, :, :, 1]
            out[:, channel] = np.clip(np.rint(plane * 255 + (both - 255) * amount), 0, 255)
        return out

    def _background(self) -> Array:
        """One channel: a colour and a slope across the image."""
        draws = self._draws
        steep = 0.025 * self._difficulty
        slopes = draws.uniform(-steep, steep), draws.uniform(-steep, steep)
        return draws.uniform(0.1, 0.9) + slopes[0] * self._x + slopes[1] * self._y

    def _stamp(
        self,
        shape: npt.NDArray[np.int64],
        texture: npt.NDArray[np.int64],
        radius: Array,
        centre: tuple[Array, Array],
        turn: float,
        opacity: Array | np.float32,
    ) -> None:
        """Paint a textured shape; `turn` bounds the tangent of half its angle."""
        draws = self._draws
        cosine, sine = draws.direction(turn)
        x, y = self._x - centre[0], self._y - centre[1]
        u, v = cosine * x + sine * y, cosine * y - sine * x
        period = draws.uniform(4.5, 6.0)
        phases = draws.uniform(), draws.uniform()
        cover = np.empty_like(u)
        second = np.empty_like(u)
        for kind, distance in enumerate(SHAPES.values()):
            if len(rows := np.flatnonzero(shape == kind)):
                size = radius[rows]
                edge = distance(u[rows] / size, v[rows] / size) * size
                cover[rows] = np.clip(0.5 - edge, 0, 1)
        for kind, (name, pattern) in enumerate(TEXTURES.items()):
            if len(rows := np.flatnonzero(texture == kind)):
                free = np.float32(0 if name in _CENTRED else 1)
                across, along = (
                    t[rows] / period[rows] + free * phase[rows]
                    for t, phase in zip((u, v), phases, strict=True)
                )
                second[rows] = pattern(across, along)
        cover *= opacity
        low = max(0.55 - 0.3 * self._difficulty, 0.05)
        for plane in self._planes:
            first = draws.uniform(0.0, 1.0)
            contrast = draws.uniform(low, low + 0.35)
            other = np.where(first < 0.5, first + contrast, first - contrast)
            plane += cover * (first + second * (other - first) - plane)

    def _stroke(self, opacity: Array) -> None:
        """Paint a straight stroke of one colour."""
        draws = self._draws
        x, y = self._x - draws.uniform(-16, 16), self._y - draws.uniform(-16, 16)
        dx, dy = draws.uniform(-14, 14), draws.uniform(-14, 14)
        along = np.clip((x * dx + y * dy) / (dx * dx + dy * dy + 1), 0, 1)
        distance = _length(x - along * dx, y - along * dy)
        cover = np.clip(draws.uniform(0.7, 1.4) - distance, 0, 1) * opacity
        for plane in self._planes:
            plane += cover * (draws.uniform() - plane)


def contact_sheet(options: ProceduralOptions, rows: int) -> npt.NDArray[np.uint8]:
    """The first training images as one picture (rows·32, classes·32, 3), a column a class."""
    shown = ProceduralOptions(
        train=rows * options.classes,
        test=1,
        classes=options.classes,
        difficulty=options.difficulty,
        seed=options.seed,
    )
    images = _split(shown, "train")[0].reshape(rows, options.classes, 3, SIZE, SIZE)
    return images.transpose(0, 3, 1, 4, 2).reshape(rows * SIZE, options.classes * SIZE, 3)
