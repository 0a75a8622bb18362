"""Drawn scenes: one to four coloured shapes and, in many, a printed word or number, on an uneven background.

A scene is drawn from one seed with NumPy's PCG64 and Pillow alone: the same everywhere, up to Pillow's rasterizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..config import PATCH_SIZE
from .backgrounds import draw_background

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

SCENE_SIZE = 256
"""Side of a scene, in pixels."""

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
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")
CENTRE = "centre"
BORDERS = (*(SCENE_SIZE * i / 3 for i in (1, 2)), *range(PATCH_SIZE, SCENE_SIZE, PATCH_SIZE))
"""Between places, and between the patches of the image tokens."""
MARGIN = 6
"""No centre is nearer to a border, in pixels: each thing belongs clearly to one place and to one image token."""

RADII = (20.0, 42.0)
"""Smallest and largest distance from a shape's centre to its rim, in pixels."""
MIN_DISTANCE = 0.85
"""Centres are at least this share of the sum of both radii apart: shapes may overlap, but not hide each other."""

TEXT_SIZES = (36, 56)
"""Smallest and largest font size, in pixels."""
TEXT_SHARE = 0.7
"""Share of the scenes that hold text."""
DIGITS_SHARE = 0.5
"""Share of the texts that are numbers."""

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
MAX_CHARACTERS = 4

ATTEMPTS = 60
"""Tries to place one thing before the whole scene is laid out anew."""


@dataclass(frozen=True)
class Shape:
    shape: str
    colour: str
    x: float
    y: float
    """Centre, in pixels from the left and the top."""
    radius: float
    angle: float
    """Turn, in radians."""

    @property
    def place(self) -> str:
        return place_of(self.x, self.y)

    @property
    def patch(self) -> tuple[int, int]:
        return patch_of(self.x, self.y)


@dataclass(frozen=True)
class Text:
    content: str
    x: float
    y: float
    size: int
    bold: bool

    @property
    def place(self) -> str:
        return place_of(self.x, self.y)

    @property
    def patch(self) -> tuple[int, int]:
        return patch_of(self.x, self.y)

    @cached_property
    def extent(self) -> tuple[float, float]:
        """Half the width and half the height of its ink, in pixels."""
        left, top, right, bottom = font(self.size).getbbox(self.content, anchor="lt", stroke_width=int(self.bold))
        return (right - left) / 2, (bottom - top) / 2

    def spans(self) -> list[tuple[float, float]]:
        """Where each character begins and ends, in pixels from the left of the scene."""
        left = self.x - self.extent[0]
        edges = [left + font(self.size).getlength(self.content[:i]) for i in range(len(self.content) + 1)]
        return list(pairwise(edges))


@dataclass(frozen=True)
class Scene:
    """What is to be seen, and how to draw it.

    At most one thing is in each of the nine places, and at most one shape is centred in the patch of an image token.
    """

    seed: int
    objects: tuple[Shape, ...]
    """In reading order of their places."""
    text: Text | None

    def image(self) -> Image.Image:
        """The picture: RGB, 256 x 256."""
        draw = np.random.Generator(np.random.PCG64([self.seed, 1]))
        canvas = Image.fromarray(draw_background(SCENE_SIZE, draw))
        for thing in self.in_painting_order():
            paint_shape(canvas, thing, draw)
        if self.text:
            paint_text(canvas, self.text, draw)
        return add_grain(canvas, draw)

    def in_painting_order(self) -> list[Shape]:
        """Small shapes first: where two overlap, the larger one covers the other."""
        return sorted(self.objects, key=lambda one: one.radius)


def place_of(x: float, y: float) -> str:
    """The name of the ninth of the scene that holds a point: 'top left', 'left', 'centre', ..."""
    third = SCENE_SIZE / 3
    row, column = ROWS[min(2, int(y / third))], COLUMNS[min(2, int(x / third))]
    return f"{row} {column}".strip() or CENTRE


def patch_of(x: float, y: float) -> tuple[int, int]:
    """Row and column of the image token whose patch holds a point."""
    return int(y) // PATCH_SIZE, int(x) // PATCH_SIZE


PLACES = tuple(place_of(85.0 * column + 40, 85.0 * row + 40) for row in range(3) for column in range(3))
"""The nine places in reading order."""


@lru_cache(maxsize=64)
def font(size: int) -> FreeTypeFont:
    """Pillow's embedded Aileron."""
    found = ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return found


def draw_scene(seed: int) -> Scene:
    """The scene of a seed (see `splits`)."""
    draw = np.random.Generator(np.random.PCG64([seed, 0]))
    while True:
        text = draw_text(draw) if draw.random() < TEXT_SHARE else None
        objects = draw_objects(draw, int(draw.integers(1, 5)), text)
        if objects is not None:
            ordered = sorted(objects, key=lambda one: PLACES.index(one.place))
            return Scene(seed, tuple(ordered), text)


def draw_text(draw: np.random.Generator) -> Text:
    """A word or number that lies within the scene."""
    if draw.random() < DIGITS_SHARE:
        digits = int(draw.integers(1, MAX_CHARACTERS + 1))
        content = str(draw.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
    else:
        content = WORDS[int(draw.integers(len(WORDS)))]
    size, bold = int(draw.integers(TEXT_SIZES[0], TEXT_SIZES[1] + 1)), bool(draw.random() < 0.5)
    half_width, half_height = Text(content, 0, 0, size, bold).extent
    while True:
        x = draw.uniform(half_width + 4, SCENE_SIZE - half_width - 4)
        y = draw.uniform(half_height + 4, SCENE_SIZE - half_height - 4)
        if is_clear(x) and is_clear(y):
            return Text(content, float(x), float(y), size, bold)


def draw_objects(draw: np.random.Generator, count: int, text: Text | None) -> list[Shape] | None:
    """`count` shapes, each in a place of its own; None when they do not fit."""
    found: list[Shape] = []
    for _ in range(count * ATTEMPTS):
        candidate = draw_shape(draw)
        if all(fits(candidate, other) for other in found) and (text is None or is_beside(candidate, text)):
            found.append(candidate)
            if len(found) == count:
                return found
    return None


def draw_shape(draw: np.random.Generator) -> Shape:
    radius = float(draw.uniform(*RADII))
    while True:
        x, y = (float(value) for value in draw.uniform(radius + 2, SCENE_SIZE - radius - 2, 2))
        if is_clear(x) and is_clear(y):
            break
    shape = SHAPES[int(draw.integers(len(SHAPES)))]
    colour = list(COLOURS)[int(draw.integers(len(COLOURS)))]
    return Shape(shape, colour, x, y, radius, float(draw.uniform(-0.25, 0.25)))


def is_clear(position: float) -> bool:
    """Whether a coordinate of a centre is clear of the borders."""
    return all(abs(position - border) >= MARGIN for border in BORDERS)


def fits(one: Shape, other: Shape) -> bool:
    distance = math.hypot(one.x - other.x, one.y - other.y)
    apart = one.place != other.place and one.patch != other.patch
    return apart and distance >= MIN_DISTANCE * (one.radius + other.radius)


def is_beside(shape: Shape, text: Text) -> bool:
    """Whether a shape leaves the text legible and the place of the text to it."""
    half_width, half_height = text.extent
    gap_x, gap_y = abs(shape.x - text.x) - half_width, abs(shape.y - text.y) - half_height
    return shape.place != text.place and math.hypot(max(gap_x, 0), max(gap_y, 0)) > shape.radius + 2


SUPERSAMPLING = 4


def paint_shape(canvas: Image.Image, thing: Shape, draw: np.random.Generator) -> None:
    """Draws a shape with smooth edges, its colour a little off the palette's."""
    side = 2 * math.ceil(thing.radius + 2)
    left, top = round(thing.x) - side // 2, round(thing.y) - side // 2
    mask = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    outline(ImageDraw.Draw(mask), thing, side * SUPERSAMPLING / 2)
    mask = mask.resize((side, side), Image.Resampling.BOX)
    colour = tuple(int(v) for v in np.clip(np.array(COLOURS[thing.colour]) + draw.integers(-9, 10, 3), 0, 255))
    canvas.paste(colour, (left, top), mask)


def outline(pen: ImageDraw.ImageDraw, thing: Shape, middle: float) -> None:
    """Fills the shape in a mask around its middle."""
    radius = thing.radius * SUPERSAMPLING
    box = (middle - radius, middle - radius, middle + radius, middle + radius)
    if thing.shape == "circle":
        pen.ellipse(box, fill=255)
    elif thing.shape == "ring":
        pen.ellipse(box, outline=255, width=round(0.36 * radius))
    else:
        pen.polygon([(middle + radius * x, middle + radius * y) for x, y in corners(thing)], fill=255)


def corners(thing: Shape) -> list[tuple[float, float]]:
    """The corners of a shape of radius 1 around the origin, turned by its angle; y points down."""
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


def paint_text(canvas: Image.Image, text: Text, draw: np.random.Generator) -> None:
    """Prints the text, dark on a light ground and light on a dark one."""
    half_width, half_height = text.extent
    box = (
        int(text.x - half_width),
        int(text.y - half_height),
        int(text.x + half_width) + 1,
        int(text.y + half_height) + 1,
    )
    is_light = float(np.asarray(canvas.crop(box).convert("L")).mean()) > 127
    ink = int(draw.integers(0, 40)) if is_light else int(draw.integers(216, 256))
    ImageDraw.Draw(canvas).text(
        (text.x - half_width, text.y - half_height),
        text.content,
        fill=(ink, ink, ink),
        font=font(text.size),
        anchor="lt",
        stroke_width=int(text.bold),
    )


def add_grain(canvas: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Noise like a sensor's over the whole picture."""
    strength = draw.uniform(0, 6)
    noise = draw.standard_normal((SCENE_SIZE, SCENE_SIZE, 1), dtype=np.float32) * np.float32(strength)
    return Image.fromarray((np.asarray(canvas) + noise).clip(0, 255).astype(np.uint8))
