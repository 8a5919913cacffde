"""
Synthetic scenes with exact ground truth: ten kinds of objects, told apart by their outline alone, in front of six
kinds of textured ground. Colour and texture are drawn independently of the kind (three kinds have a favourite hue,
which they often do not wear), so that recognising a large object takes a look at many of its parts. In coloured scenes
two kinds each share a range of hues, so that the outline only has to tell these two apart, which a model learns sooner.

Letters: n objects in a scene; (h, w) the box around one object; all lengths in pixels. Pixel (x, y) covers the square
[x, x + 1) x [y, y + 1).
"""

import colorsys
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import cv2
import numpy as np

# Raise it whenever a change alters what is drawn: files of another recipe are drawn anew.
RECIPE, COLOURED_RECIPE = 1, 2
SIZE = 512

THINGS = ("disc", "ring", "triangle", "square", "star", "cross", "crescent", "heart", "arrow", "leaf")
STUFF = ("cloud", "gradient", "planks", "tiles", "grass", "gravel")

_MIN_VISIBLE_SHARE, _MIN_VISIBLE_AREA = 0.35, 110
# (share, shortest, longest): the square root of an object's whole area. The two borders are COCO's.
_SIDES = ((0.34, 13.0, 32.0), (0.40, 33.0, 96.0), (0.26, 100.0, 175.0))
_FAVOURITE_HUES = {"heart": 0.98, "leaf": 0.33, "star": 0.14}
_SUPERSAMPLING = 4
# The standard normal distribution at 256 even quantiles: a random byte looks up a sample, ten times faster than
# RandomState.normal.
_NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)], np.float32)


class Scene(NamedTuple):
    image: np.ndarray  # (512, 512, 3) uint8, RGB
    masks: np.ndarray  # (n, 512, 512) bool: the visible pixels of each object, disjoint
    labels: list[int]  # n indices into THINGS
    stuff: np.ndarray  # (512, 512) uint8, indices into STUFF: the ground, also where objects hide it


def draw_scene(seed: int | Sequence[int], coloured: bool = False) -> Scene:
    """
    Draw one scene of 3 to 12 objects.

    Args:
        seed: an integer or a sequence of integers, each in [0, 2**32). Equal seeds give equal scenes.
        coloured: whether an object's hue shows that it is of one of two kinds. The layout is the same either way.

    Returns:
        the image and its ground truth. A pixel belongs to the last object painted that covers more than half of it.
    """
    # RandomState and not Generator: numpy promises that the streams of RandomState never change.
    rng = np.random.RandomState(seed)
    canvas, stuff = _ground(rng)
    objects, owner = _lay_out(rng, count=rng.randint(3, 13))
    for item in objects:
        _paint(rng, canvas, item, coloured)
    masks = owner[None] == np.arange(len(objects), dtype=owner.dtype)[:, None, None]
    return Scene(_photograph(rng, canvas), masks, [item.label for item in objects], stuff)


# --- outlines -------------------------------------------------------------------------------------------------------


def _arc(centre: tuple[float, float], radius: float, start: float, stop: float, points: int = 64) -> np.ndarray:
    angles = np.linspace(start, stop, points)
    return np.stack([centre[0] + radius * np.cos(angles), centre[1] + radius * np.sin(angles)], axis=1)


def _star() -> np.ndarray:
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _cross() -> np.ndarray:
    a = 0.3
    return np.array(
        [(a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a), (-a, -1), (a, -1), (a, -a), (1, -a), (1, a)]
    )


def _crescent() -> np.ndarray:
    offset, radius = 0.48, 0.8  # of the circle that is cut out of the unit circle
    x = (1 - radius**2 + offset**2) / (2 * offset)
    y = np.sqrt(1 - x**2)
    outer, inner = np.arctan2(y, x), np.arctan2(y, x - offset)
    return np.concatenate(
        [
            _arc((0, 0), 1, outer, 2 * np.pi - outer),
            _arc((offset, 0), radius, 2 * np.pi - inner, inner),
        ]
    )


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 16


def _leaf() -> np.ndarray:
    t = np.linspace(0, 1, 48)
    half = 0.62 * np.sin(np.pi * t) * (1 - 0.35 * t) + 0.05 * (1 - t)  # the last term gives the stem its width
    x = 1.9 * t - 0.8
    blade = np.concatenate([np.stack([x, half], axis=1), np.stack([x, -half], axis=1)[::-1]])
    return np.concatenate([blade, [(-1.2, -0.06), (-1.2, 0.06)]])


def _unit_area(*contours: np.ndarray) -> list[np.ndarray]:
    """Scale an outline, the first contour less the others, to an area of one."""
    first, *holes = [abs(cv2.contourArea(contour.astype(np.float32))) for contour in contours]
    return [contour / np.sqrt(first - sum(holes)) for contour in contours]


_OUTLINES: dict[str, list[np.ndarray]] = {
    "disc": _unit_area(_arc((0, 0), 1, 0, 2 * np.pi)),
    "ring": _unit_area(_arc((0, 0), 1, 0, 2 * np.pi), _arc((0, 0), 0.56, 0, 2 * np.pi)),
    "triangle": _unit_area(_arc((0, 0), 1, 0, 2 * np.pi, points=4)[:3]),
    "square": _unit_area(_arc((0, 0), 1, 0, 2 * np.pi, points=5)[:4]),
    "star": _unit_area(_star()),
    "cross": _unit_area(_cross()),
    "crescent": _unit_area(_crescent()),
    "heart": _unit_area(_heart()),
    "arrow": _unit_area(np.array([(1.1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3), (-1, -0.3), (0.1, -0.3), (0.1, -0.8)])),
    "leaf": _unit_area(_leaf()),
}


# --- the layout -----------------------------------------------------------------------------------------------------


class _Object(NamedTuple):
    label: int
    pose: np.ndarray  # (2, 2), takes an outline of unit area into the image
    coverage: np.ndarray  # (h, w) float32 in [0, 1]
    rim: np.ndarray | None  # (h, w) float32 in [0, 1]: the dark outline, None for none
    origin: tuple[float, float]  # (x, y) of the outline's origin in the box
    corner: tuple[int, int]  # (x, y) of the box in the image; the box may stick out


def _new_object(rng: np.random.RandomState, side: float) -> _Object:
    """An object of area side**2 at no place yet."""
    label = rng.randint(len(THINGS))
    pose = side * _rotation(rng.uniform(0, 2 * np.pi)) @ _stretch(rng)
    contours = [contour @ pose.T for contour in _OUTLINES[THINGS[label]]]
    points = np.concatenate(contours)
    origin = 2 - np.floor(points.min(axis=0)) + rng.uniform(0, 1, 2)
    width, height = (int(extent) for extent in np.ceil(points.max(axis=0) + origin) + 2)
    coverage = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), np.uint8)
    # OpenCV has whole numbers in the middle of a pixel; `shift` is the number of fractional bits.
    polygons = [np.round(((contour + origin) * _SUPERSAMPLING - 0.5) * 16).astype(np.int32) for contour in contours]
    cv2.fillPoly(coverage, polygons, 255, shift=4)
    rim = None
    if rng.uniform() < 0.3:
        rim = np.zeros_like(coverage)
        thickness = max(1.2, 0.03 * side) * rng.uniform(1, 1.5)
        cv2.polylines(rim, polygons, True, 255, thickness=round(2 * thickness * _SUPERSAMPLING), shift=4)
        rim = _downsample(np.minimum(rim, coverage))
    return _Object(label, pose, _downsample(coverage), rim, (origin[0], origin[1]), (0, 0))


def _rotation(angle: float) -> np.ndarray:
    return np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])


def _stretch(rng: np.random.RandomState) -> np.ndarray:
    """A mild change of aspect and a mild shear, which keep the area."""
    aspect = np.exp(rng.uniform(-0.16, 0.16))
    return np.array([(aspect, rng.uniform(-0.18, 0.18)), (0, 1 / aspect)])


def _downsample(image: np.ndarray) -> np.ndarray:
    height, width = image.shape
    size = (width // _SUPERSAMPLING, height // _SUPERSAMPLING)
    return cv2.resize(image.astype(np.float32) / 255, size, interpolation=cv2.INTER_AREA)


def _lay_out(rng: np.random.RandomState, count: int) -> tuple[list[_Object], np.ndarray]:
    """
    Choose objects and places such that every object stays well visible under those painted after it.

    Returns:
        the objects in painting order and (512, 512) int8, the index of the object seen at each pixel, -1 for none.
    """
    shares, shortest, longest = zip(*_SIDES)
    kinds = rng.choice(len(_SIDES), count, p=shares)
    sides = [np.exp(rng.uniform(np.log(shortest[kind]), np.log(longest[kind]))) for kind in kinds]
    # Mostly the large ones first, as a later large one would find no place among small ones.
    sides.sort(key=lambda side: -side * np.exp(0.5 * rng.uniform(-1, 1)))
    objects: list[_Object] = []
    areas: list[int] = []  # whole
    owner = np.full((SIZE, SIZE), -1, np.int8)
    visible = np.zeros(0, np.int64)
    for side in sides:
        item = _new_object(rng, side)
        area = int(np.count_nonzero(item.coverage > 0.5))
        for _ in range(20):
            centre = rng.uniform(min(0.45 * side, 60), SIZE - min(0.45 * side, 60), 2)
            left_edge, top = (int(c - o) for c, o in zip(centre, item.origin))
            item = item._replace(corner=(left_edge, top))
            box, part = _overlap(item)
            mask = item.coverage[part] > 0.5
            hidden = np.bincount(owner[box][mask] + 1, minlength=len(objects) + 1)[1:]
            remaining = np.append(visible - hidden, np.count_nonzero(mask))
            if np.all(remaining >= np.maximum(_MIN_VISIBLE_SHARE * np.array(areas + [area]), _MIN_VISIBLE_AREA)):
                owner[box][mask] = len(objects)
                objects.append(item)
                areas.append(area)
                visible = remaining
                break
    return objects, owner


def _overlap(item: _Object) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where the object's box and the image meet: in the image, and in the box."""
    (x, y), (height, width) = item.corner, item.coverage.shape
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, SIZE), min(y + height, SIZE)
    return (slice(y0, y1), slice(x0, x1)), (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))


# --- painting an object ---------------------------------------------------------------------------------------------


def _paint(rng: np.random.RandomState, canvas: np.ndarray, item: _Object, coloured: bool) -> None:
    """Paint the object, and perhaps its shadow, onto the canvas, (512, 512, 3) float32 in 0..255."""
    box, part = _overlap(item)
    side = np.sqrt(abs(np.linalg.det(item.pose)))
    if rng.uniform() < 0.35:
        _cast_shadow(rng, canvas, item, side)
    coverage = item.coverage[part]
    under = canvas[box]
    colour = _vivid_colour(rng, _hue(rng, THINGS[item.label], coloured), cv2.mean(under)[:3])
    second = _related_colour(rng, colour)
    weight = _TEXTURES[rng.randint(len(_TEXTURES))](rng, *_object_coordinates(item, part), side)
    paint = colour + weight[..., None] * (second - colour)
    if rng.uniform() < 0.4:  # light from one side
        u, v = _object_coordinates(item, part)
        angle = rng.uniform(0, 2 * np.pi)
        light = 1 + rng.uniform(0.1, 0.25) * np.clip(u * np.cos(angle) + v * np.sin(angle), -1, 1)
        paint *= light[..., None].astype(np.float32)
    if item.rim is not None:
        paint *= (1 - rng.uniform(0.6, 0.85) * item.rim[part])[..., None].astype(np.float32)
    canvas[box] = under + coverage[..., None] * (np.clip(paint, 0, 255) - under)


def _cast_shadow(rng: np.random.RandomState, canvas: np.ndarray, item: _Object, side: float) -> None:
    reach = int(np.clip(0.08 * side, 2, 10))
    around = 2 * reach
    shadow = cv2.copyMakeBorder(item.coverage, around, around, around, around, cv2.BORDER_CONSTANT, value=0)
    shadow = cv2.GaussianBlur(shadow, (0, 0), 0.6 * reach)
    dx, dy = rng.randint(-reach, reach + 1), rng.randint(1, reach + 1)
    x, y = item.corner
    cast = item._replace(coverage=shadow, corner=(x + dx - 2 * reach, y + dy - 2 * reach))
    box, part = _overlap(cast)
    canvas[box] *= (1 - np.float32(rng.uniform(0.25, 0.5)) * shadow[part])[..., None]


def _object_coordinates(item: _Object, part: tuple[slice, slice]) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel lies in the frame of the outline, in which the object has an area of one: two of (h, w)."""
    rows, columns = part
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None] + np.float32(0.5 - item.origin[0])
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + np.float32(0.5 - item.origin[1])
    inverse = np.linalg.inv(item.pose).astype(np.float32)
    return inverse[0, 0] * x + inverse[0, 1] * y, inverse[1, 0] * x + inverse[1, 1] * y


def _hue(rng: np.random.RandomState, name: str, coloured: bool) -> Callable[[], float]:
    """What draws the hues of a kind of objects, in [0, 1)."""
    if coloured:  # a fifth of the circle for each two kinds, with gaps of a fifth of that
        return lambda: ((THINGS.index(name) // 2 + rng.uniform(-0.4, 0.4)) / (len(THINGS) // 2)) % 1

    def draw() -> float:
        hue = rng.uniform()
        if name in _FAVOURITE_HUES and rng.uniform() < 0.3:
            hue = (_FAVOURITE_HUES[name] + rng.uniform(-0.04, 0.04)) % 1
        return hue

    return draw


def _vivid_colour(rng: np.random.RandomState, hue: Callable[[], float], under: Sequence[float]) -> np.ndarray:
    """A saturated colour that stands out against the one under it; (3,) float32 in 0..255, like all colours here."""
    best, best_distance = np.zeros(3, np.float32), -1.0
    for _ in range(12):
        colour = _rgb(hue(), rng.uniform(0.65, 1), rng.uniform(0.6, 1))
        distance = float(np.linalg.norm(colour - under))
        if distance > best_distance:
            best, best_distance = colour, distance
        if distance > 120:
            break
    return best


def _related_colour(rng: np.random.RandomState, colour: np.ndarray) -> np.ndarray:
    """A darker or paler companion, for textures that leave the object in one piece."""
    goal = rng.choice([0, 255])
    return (colour + rng.uniform(0.3, 0.6) * (goal - colour)).astype(np.float32)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)


# A texture takes the random state, the coordinates (h, w) in the object's frame and the side of the object, and gives
# the share of the second colour, (h, w) float32 in [0, 1]. Periods are no finer than a few pixels.


def _plain(rng, u, v, side):
    return np.zeros_like(u)


def _shaded(rng, u, v, side):
    angle = rng.uniform(0, 2 * np.pi)
    return np.clip(0.5 + 0.8 * (u * np.float32(np.cos(angle)) + v * np.float32(np.sin(angle))), 0, 1)


def _stripes(rng, u, v, side):
    angle = rng.uniform(0, np.pi)
    return _wave(u * np.float32(np.cos(angle)) + v * np.float32(np.sin(angle)), _period(rng, side), side)


def _checks(rng, u, v, side):
    period = _period(rng, side)
    a, b = _wave(u, period, side), _wave(v, period, side)
    return a + b - 2 * a * b


def _dots(rng, u, v, side):
    period = _period(rng, side)
    a, b = (np.float32(1 / period) * x for x in (u, v))
    radius = np.hypot(a - np.round(a), b - np.round(b))
    return np.clip((0.3 - radius) * np.float32(period * side) + 0.5, 0, 1)


def _speckle(rng, u, v, side):
    cell = rng.randint(2, 5)
    height, width = u.shape
    noise = _uniform(rng, (height // cell + 1, width // cell + 1))
    return cv2.resize((noise > 0.7).astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)


_TEXTURES: tuple[Callable, ...] = (_plain, _shaded, _stripes, _checks, _dots, _speckle)


def _period(rng: np.random.RandomState, side: float) -> float:
    return max(rng.uniform(0.18, 0.4), 6 / side)


def _wave(x: np.ndarray, period: float, side: float) -> np.ndarray:
    """0 and 1 in turn, with edges about a pixel wide."""
    distance = np.abs((x * np.float32(1 / period)) % 1 - 0.5) - 0.25  # from the edge, in periods
    return np.clip(distance * np.float32(period * side) + 0.5, 0, 1)


# --- the ground -----------------------------------------------------------------------------------------------------


def _ground(rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """
    One kind of ground, or a calm one above another one, divided by a wavy horizon.

    Returns:
        (512, 512, 3) float32 in 0..255, and (512, 512) uint8, indices into STUFF.
    """
    if rng.uniform() < 0.55:
        kind = rng.randint(len(STUFF))
        return _covered_ground(rng, kind), np.full((SIZE, SIZE), kind, np.uint8)
    above, below = rng.randint(0, 2), rng.randint(2, len(STUFF))
    x = np.arange(SIZE) / SIZE
    horizon = rng.uniform(0.3, 0.7) + rng.uniform(-0.15, 0.15) * (x - 0.5)
    for waves in (1, 2, 5):
        horizon += rng.uniform(0, 0.06) / waves * np.sin(2 * np.pi * (waves * x + rng.uniform()))
    is_below = np.arange(SIZE)[:, None] >= SIZE * horizon
    canvas = np.where(is_below[..., None], _covered_ground(rng, below), _covered_ground(rng, above))
    return canvas, np.where(is_below, below, above).astype(np.uint8)


def _covered_ground(rng: np.random.RandomState, kind: int) -> np.ndarray:
    """(512, 512, 3) float32: one kind of ground in two muted colours."""
    hue, saturation, value = rng.uniform(), rng.uniform(0.05, 0.3), rng.uniform(0.25, 0.8)
    first = _rgb(hue, saturation, value)
    second = _rgb((hue + rng.uniform(-0.08, 0.08)) % 1, saturation, value + rng.choice([-1, 1]) * rng.uniform(0.1, 0.2))
    return first + _GROUNDS[STUFF[kind]](rng)[..., None] * (second - first)


# A ground takes the random state and gives the share of its second colour, (512, 512) float32 about [0, 1].


def _cloud(rng):
    tone = np.zeros((SIZE, SIZE), np.float32)
    cells = rng.randint(3, 7)
    for octave in range(4):
        noise = _uniform(rng, (cells << octave, cells << octave))
        tone += 0.5**octave * cv2.resize(noise, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    return np.clip(1.6 * (tone / 1.875 - 0.5) + 0.5, 0, 1)


def _gradient(rng):
    u, v = _turned_grid(rng)
    if rng.uniform() < 0.5:
        return (u - u.min()) / np.ptp(u)
    return np.hypot(u - rng.uniform(-200, 200), v - rng.uniform(-200, 200)) / (1.4 * SIZE)


def _planks(rng):
    u, v = _turned_grid(rng)
    width = rng.uniform(24, 60)
    index = np.floor(u / width)
    plank = index.astype(np.int32) % 64
    tone = rng.uniform(0.15, 0.85, 64).astype(np.float32)[plank]
    grain = rng.uniform(-0.25, 0.25, 2048).astype(np.float32)
    tone += grain[np.int32(u * 0.8 + 2 * np.sin(v * np.float32(0.02) + plank)) % 2048]
    tone[u - index * width < 2.5] -= 0.9
    return tone


def _tiles(rng):
    u, v = _turned_grid(rng)
    width = rng.uniform(28, 72)
    a, b = np.floor(u / width), np.floor(v / width)
    i, j = a.astype(np.int32), b.astype(np.int32)
    jitter = rng.uniform(0, 0.35, (64, 64)).astype(np.float32)
    tone = np.float32(rng.choice([0, 0.65])) * ((i + j) % 2) + jitter[i % 64, j % 64]
    tone[(u - a * width < 2.5) | (v - b * width < 2.5)] = 1.3
    return tone.astype(np.float32)


def _grass(rng):
    tone = np.full((SIZE, SIZE), 110, np.uint8)
    roots = rng.randint(-10, SIZE + 10, (1800, 2))
    tips = roots + np.stack([rng.randint(-7, 8, 1800), -rng.randint(10, 30, 1800)], axis=1)
    shades = rng.randint(0, 256, 1800)
    for root, tip, shade in zip(roots.tolist(), tips.tolist(), shades.tolist()):
        cv2.line(tone, root, tip, shade, 2)
    return tone.astype(np.float32) / 255


def _gravel(rng):
    tone = np.full((SIZE, SIZE), 60, np.uint8)
    centres, radii, shades = rng.randint(0, SIZE, (2200, 2)), rng.randint(3, 8, 2200), rng.randint(40, 256, 2200)
    for centre, radius, shade in zip(centres.tolist(), radii.tolist(), shades.tolist()):
        cv2.circle(tone, centre, radius, shade, -1)
    return tone.astype(np.float32) / 255


_GROUNDS: dict[str, Callable] = dict(zip(STUFF, (_cloud, _gradient, _planks, _tiles, _grass, _gravel)))


def _turned_grid(rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """The pixels' coordinates around the image's centre in a turned frame: two of (512, 512) float32."""
    axis = np.arange(SIZE, dtype=np.float32) + np.float32(0.5 - SIZE / 2)
    angle = rng.uniform(0, 2 * np.pi)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * axis[None] + s * axis[:, None], c * axis[:, None] - s * axis[None]


def _uniform(rng: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 in [0, 1] in steps of 1/255, from bytes: the cheapest the random state has."""
    return np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8).reshape(shape) / np.float32(255)


# --- the camera -----------------------------------------------------------------------------------------------------


def _photograph(rng: np.random.RandomState, canvas: np.ndarray) -> np.ndarray:
    """Blur, contrast, brightness and noise of a camera: float32 -> uint8, both (512, 512, 3)."""
    blur, noise = rng.uniform(0, 1.2), rng.uniform(0, 10)
    if blur > 0.2:
        canvas = cv2.GaussianBlur(canvas, (0, 0), blur)
    canvas = canvas * np.float32(rng.uniform(0.8, 1.2)) + np.float32(rng.uniform(-20, 20))
    grain = cv2.LUT(np.frombuffer(rng.bytes(canvas.size), np.uint8).reshape(canvas.shape), _NORMAL * np.float32(noise))
    return np.clip(np.rint(canvas + grain), 0, 255).astype(np.uint8)
