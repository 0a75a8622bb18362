"""Drawn scenes: one to four coloured shapes and often a printed word or number, on an uneven background.

A scene only depends on its seed, NumPy's PCG64 and Pillow, so it is the same everywhere up to Pillow's rasterizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..config import PATCH_SIZE

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

Split = Literal["train", "calibration", "heldout"]
"""The purpose of a scene."""

FIRST_SEED: dict[Split, int] = {"train": 0, "calibration": 1_000_000_000, "heldout": 2_000_000_000}
"""The first seed of each split. No seed is in two splits."""
MAX_SCENES = 1_000_000_000
"""The number of scenes in a split."""

SCENE_SIZE = 256
"""The side of a scene, in pixels."""

COLOURS = {
    "red": (214, 36, 36),
    "green": (34, 160, 60),
    "blue": (36, 76, 220),
    "yellow": (244, 222, 40),
    "orange": (248, 134, 24),
    "purple": (138, 48, 190),
    "black": (18, 18, 18),
    "white": (246, 246, 246),
}
"""RGB values of each colour, 0..255."""
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
CENTRE = "centre"
BORDERS = (*(SCENE_SIZE * i / 3 for i in (1, 2)), *range(PATCH_SIZE, SCENE_SIZE, PATCH_SIZE))
"""Coordinates in pixels of the borders between places, and between the patches of the image tokens."""
MARGIN = 6
"""The smallest distance in pixels of a centre from a border, so that each thing has one place and one image token."""

RADII = (20.0, 42.0)
"""The smallest and largest distance from a shape's centre to its rim, in pixels."""
MIN_DISTANCE = 0.85
"""The smallest distance of two centres, as a share of the sum of both radii. Shapes may overlap, but not hide."""

TEXT_SIZES = (36, 56)
"""The smallest and largest font size, in pixels."""
TEXT_SHARE = 0.7
"""The share of the scenes that have text."""
DIGITS_SHARE = 0.5
"""The share of the texts that are numbers."""

WORDS = """
    A B C D E F G H J K L M N P Q R S T U V W X Y Z
    AM AN AS AT BE BY DO GO HE IF IN IS IT ME MY NO OF ON OR SO TO UP US WE
    ACE ADD AGE AIR ANT APE ARM ART ASK BAG BAR BAT BED BEE BIG BOX BOY BUS CAB CAR CAT COW CUP DAY DOG EAR EAT EGG EYE
    FAN FAR FIG FIX FLY FOX FUN GAS GEM GUM HAT HEN HOT HUT ICE INK JAM JAR JET JOB JOY KEY KID LAB LEG LIP LOG MAP MIX
    MUD NET NUT OAK OIL OWL PAN PEN PIE PIG QUIZ RAT RED ROW RUN SEA SKY SUN TAX TEA TOY TUB VAN WAX WEB WIN YES ZIP ZOO
    ACID AQUA AREA BABY BACK BALL BANK BEAR BIRD BLUE BOAT BOOK CAFE CAKE CITY CLUB COLD CROW DESK DOOR DUCK EAST EXIT
    FACE FILM FISH FIVE FLAG FORK FROG GATE GIFT GOAT GOLD HAND HELP HERO HILL HOME IDEA IRON JAZZ JUMP KING KITE
    KIWI LAKE LAMP LEAF LION LOVE MAIN MENU MILK MOON NAVY NECK NEXT NINE NOSE OPEN OVEN PARK PINK POST PULL PUSH
    QUAY RAIN RICE ROAD ROCK SALE SALT SHIP SHOP SNOW SOAP STAR STOP TAXI TIME TREE UNIT VASE VIEW WALK WEST WIND WOLF
    WOOD YARD YEAR ZERO ZONE
""".split()
"""The words that can be printed."""
MAX_CHARACTERS = 4
"""The highest number of characters of a text."""

BACKGROUNDS = ("plain", "gradient", "stripes", "checks", "mottled", "noise")
"""The textures of the background."""

SUPERSAMPLING = 4
"""The factor by which shapes are drawn larger than they are shown, for smooth edges."""

ATTEMPTS = 60
"""The number of tries to place one shape before the whole scene is laid out again."""


@dataclass(frozen=True)
class Shape:
    """A coloured shape in a scene."""

    shape: str
    colour: str
    x: float
    y: float
    """The centre, in pixels from the left and the top."""
    radius: float
    """The distance from the centre to the rim, in pixels."""
    angle: float
    """The rotation, in radians."""

    @property
    def place(self) -> str:
        """The name of the place of the centre."""
        return place_of(self.x, self.y)

    @property
    def patch(self) -> tuple[int, int]:
        """Row and column of the image token with the centre."""
        return patch_of(self.x, self.y)


@dataclass(frozen=True)
class Text:
    """A printed word or number in a scene."""

    content: str
    x: float
    y: float
    size: int
    bold: bool

    @property
    def place(self) -> str:
        """The name of the place of the centre."""
        return place_of(self.x, self.y)

    @property
    def patch(self) -> tuple[int, int]:
        """Row and column of the image token with the centre."""
        return patch_of(self.x, self.y)

    @cached_property
    def extent(self) -> tuple[float, float]:
        """Half the width and half the height of the printed text, in pixels."""
        left, top, right, bottom = font(self.size).getbbox(self.content, anchor="lt", stroke_width=int(self.bold))
        return (right - left) / 2, (bottom - top) / 2

    def spans(self) -> list[tuple[float, float]]:
        """Returns the left and right edge of each character, in pixels from the left of the scene."""
        left = self.x - self.extent[0]
        edges = [left + font(self.size).getlength(self.content[:i]) for i in range(len(self.content) + 1)]
        return list(pairwise(edges))


@dataclass(frozen=True)
class Scene:
    """The content of a scene, which determines its image.

    Each of the nine places has at most one thing. The patch of an image token has at most one centre of a shape.
    """

    seed: int
    objects: tuple[Shape, ...]
    """The shapes, in reading order of their places."""
    text: Text | None

    def image(self) -> Image.Image:
        """Returns the image, RGB, 256 x 256."""
        rng = np.random.Generator(np.random.PCG64([self.seed, 1]))
        canvas = Image.fromarray(draw_background(SCENE_SIZE, rng))
        for thing in self.in_painting_order():
            paint_shape(canvas, thing, rng)
        if self.text:
            paint_text(canvas, self.text, rng)
        return add_grain(canvas, rng)

    def in_painting_order(self) -> list[Shape]:
        """Returns the shapes, small ones first, so that the larger one of two covers the other."""
        return sorted(self.objects, key=lambda one: one.radius)


def place_of(x: float, y: float) -> str:
    """Returns the name of the ninth of the scene with a point: 'top left', 'left', 'centre', ..."""
    third = SCENE_SIZE / 3
    row, column = ROWS[min(2, int(y / third))], COLUMNS[min(2, int(x / third))]
    return f"{row} {column}".strip() or CENTRE


def patch_of(x: float, y: float) -> tuple[int, int]:
    """Returns row and column of the image token whose patch contains a point."""
    return int(y) // PATCH_SIZE, int(x) // PATCH_SIZE


PLACES = tuple(place_of(85.0 * column + 40, 85.0 * row + 40) for row in range(3) for column in range(3))
"""The nine places, in reading order."""


@lru_cache(maxsize=64)
def font(size: int) -> FreeTypeFont:
    """Returns Pillow's embedded font, Aileron."""
    found = ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return found


def scene_seeds(split: Split, count: int, start: int = 0) -> range:
    """Returns `count` seeds of `split`, beginning with its `start`-th.

    Raises:
        ValueError: the split does not have that many.
    """
    if start < 0 or count < 0 or start + count > MAX_SCENES:
        raise ValueError(f"a split has {MAX_SCENES} scenes, got a request for {count} from {start} on")
    first = FIRST_SEED[split] + start
    return range(first, first + count)


def draw_scene(seed: int) -> Scene:
    """Returns the scene of a seed."""
    rng = np.random.Generator(np.random.PCG64([seed, 0]))
    while True:
        text = draw_text(rng) if rng.random() < TEXT_SHARE else None
        objects = draw_objects(rng, int(rng.integers(1, 5)), text)
        if objects is not None:
            ordered = sorted(objects, key=lambda one: PLACES.index(one.place))
            return Scene(seed, tuple(ordered), text)


def draw_text(rng: np.random.Generator) -> Text:
    """Draws a word or number that is within the scene."""
    if rng.random() < DIGITS_SHARE:
        digits = int(rng.integers(1, MAX_CHARACTERS + 1))
        content = str(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
    else:
        content = WORDS[int(rng.integers(len(WORDS)))]
    size, bold = int(rng.integers(TEXT_SIZES[0], TEXT_SIZES[1] + 1)), bool(rng.random() < 0.5)
    half_width, half_height = Text(content, 0, 0, size, bold).extent
    while True:
        x = rng.uniform(half_width + 4, SCENE_SIZE - half_width - 4)
        y = rng.uniform(half_height + 4, SCENE_SIZE - half_height - 4)
        if is_clear(x) and is_clear(y):
            return Text(content, float(x), float(y), size, bold)


def draw_objects(rng: np.random.Generator, count: int, text: Text | None) -> list[Shape] | None:
    """Draws `count` shapes in different places. Returns None if they do not fit."""
    found: list[Shape] = []
    for _ in range(count * ATTEMPTS):
        candidate = draw_shape(rng)
        if all(fits(candidate, other) for other in found) and (text is None or is_clear_of_text(candidate, text)):
            found.append(candidate)
            if len(found) == count:
                return found
    return None


def draw_shape(rng: np.random.Generator) -> Shape:
    """Draws one shape within the scene."""
    radius = float(rng.uniform(*RADII))
    while True:
        x, y = (float(value) for value in rng.uniform(radius + 2, SCENE_SIZE - radius - 2, 2))
        if is_clear(x) and is_clear(y):
            break
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
    return Shape(shape, colour, x, y, radius, float(rng.uniform(-0.25, 0.25)))


def is_clear(position: float) -> bool:
    """Returns True if a coordinate of a centre is far enough from the borders."""
    return all(abs(position - border) >= MARGIN for border in BORDERS)


def fits(one: Shape, other: Shape) -> bool:
    """Returns True if two shapes are in different places and do not hide each other."""
    distance = math.hypot(one.x - other.x, one.y - other.y)
    apart = one.place != other.place and one.patch != other.patch
    return apart and distance >= MIN_DISTANCE * (one.radius + other.radius)


def is_clear_of_text(shape: Shape, text: Text) -> bool:
    """Returns True if a shape is in another place than the text and does not cover it."""
    half_width, half_height = text.extent
    gap_x, gap_y = abs(shape.x - text.x) - half_width, abs(shape.y - text.y) - half_height
    return shape.place != text.place and math.hypot(max(gap_x, 0), max(gap_y, 0)) > shape.radius + 2


def draw_background(size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns (S, S, 3) uint8: a muted base colour, and a texture that is fainter than any shape or text."""
    base = rng.uniform(70, 200) + rng.uniform(-14, 14, 3)  # (3,)
    kind = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    texture = draw_texture(kind, size, rng)  # (S, S) in -1..1
    strength = rng.uniform(8, 22)
    tint = 1 + rng.uniform(-0.3, 0.3, 3)
    pixels = base.astype(np.float32) + (np.float32(strength) * texture)[:, :, None] * tint.astype(np.float32)
    return pixels.clip(0, 255).astype(np.uint8)


def draw_texture(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns (S, S) float32 in about -1..1."""
    if kind == "plain":
        return np.zeros((size, size), np.float32)
    if kind == "noise":
        return rng.uniform(-1, 1, (size, size)).astype(np.float32)
    if kind == "mottled":
        cells = int(rng.integers(4, 24))
        coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
        return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    if kind == "gradient":
        return (along - along.mean()) / np.float32(size / 2)
    period = rng.uniform(6, 40)
    if kind == "stripes":
        return np.sin(along * np.float32(2 * np.pi / period))
    return np.where((x // period + y // period) % 2 > 0, np.float32(0.7), np.float32(-0.7))


def paint_shape(canvas: Image.Image, thing: Shape, rng: np.random.Generator) -> None:
    """Paints a shape with smooth edges, in a slight variation of its colour."""
    side = 2 * math.ceil(thing.radius + 2)
    left, top = round(thing.x) - side // 2, round(thing.y) - side // 2
    mask = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    outline(ImageDraw.Draw(mask), thing, side * SUPERSAMPLING / 2)
    mask = mask.resize((side, side), Image.Resampling.BOX)
    colour = tuple(int(v) for v in np.clip(np.array(COLOURS[thing.colour]) + rng.integers(-9, 10, 3), 0, 255))
    canvas.paste(colour, (left, top), mask)


def outline(pen: ImageDraw.ImageDraw, thing: Shape, middle: float) -> None:
    """Fills the shape in a mask around the mask's `middle`."""
    radius = thing.radius * SUPERSAMPLING
    box = (middle - radius, middle - radius, middle + radius, middle + radius)
    if thing.shape == "circle":
        pen.ellipse(box, fill=255)
    elif thing.shape == "ring":
        pen.ellipse(box, outline=255, width=round(0.36 * radius))
    else:
        pen.polygon([(middle + radius * x, middle + radius * y) for x, y in corners(thing)], fill=255)


def corners(thing: Shape) -> list[tuple[float, float]]:
    """Returns the corners of a shape of radius 1 around the origin, rotated by its angle. y points down."""
    if thing.shape == "cross":
        arm = 0.3
        ring = [(arm, 1), (arm, arm), (1, arm), (1, -arm), (arm, -arm), (arm, -1)]
        points = ring + [(-x, -y) for x, y in ring]
        scale = 1 / math.hypot(1, arm)
        polar = [(math.hypot(x, y) * scale, math.atan2(y, x)) for x, y in points]
    else:
        count, inner = {"square": (4, None), "triangle": (3, None), "star": (5, 0.42)}[thing.shape]
        start = -math.pi / 2 + (math.pi / 4 if thing.shape == "square" else 0)
        polar = []
        for i in range(count):
            polar.append((1.0, start + 2 * math.pi * i / count))
            if inner:
                polar.append((inner, start + 2 * math.pi * (i + 0.5) / count))
    return [(r * math.cos(a + thing.angle), r * math.sin(a + thing.angle)) for r, a in polar]


def paint_text(canvas: Image.Image, text: Text, rng: np.random.Generator) -> None:
    """Paints the text, dark on a light background and light on a dark one."""
    half_width, half_height = text.extent
    box = (
        int(text.x - half_width),
        int(text.y - half_height),
        int(text.x + half_width) + 1,
        int(text.y + half_height) + 1,
    )
    is_light = float(np.asarray(canvas.crop(box).convert("L")).mean()) > 127
    ink = int(rng.integers(0, 40)) if is_light else int(rng.integers(216, 256))
    ImageDraw.Draw(canvas).text(
        (text.x - half_width, text.y - half_height),
        text.content,
        fill=(ink, ink, ink),
        font=font(text.size),
        anchor="lt",
        stroke_width=int(text.bold),
    )


def add_grain(canvas: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Adds noise like a sensor's to the whole image."""
    strength = rng.uniform(0, 6)
    noise = rng.standard_normal((SCENE_SIZE, SCENE_SIZE, 1), dtype=np.float32) * np.float32(strength)
    return Image.fromarray((np.asarray(canvas) + noise).clip(0, 255).astype(np.uint8))
