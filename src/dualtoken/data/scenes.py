"""The bundled world: pictures drawn from a seed, at any resolution, with everything that is true of them.

A scene is a background and 1 to 4 objects; an object has a shape, a named color with an own shade, a texture,
a size and a place. Reconstruction needs texture and exact color, meaning needs shape and relations, so the two
vocabularies of the tokenizer both have work to do. Nothing is stored: scene `index` of a split is a function of
(split, seed, index), so the world is endless, any worker may draw any part of it, and the splits never meet.

Objects are signed distance fields evaluated on the pixel grid; a picture of 48 px takes under a millisecond.
What is said about a scene (captions, questions, edits) is in `scene_text.py`.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from dualtoken.core.errors import UserError
from dualtoken.data.images import Sample

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {  # name -> RGB in [0, 1]
    "red": (0.85, 0.12, 0.12),
    "orange": (0.97, 0.55, 0.08),
    "yellow": (0.95, 0.90, 0.15),
    "green": (0.15, 0.62, 0.20),
    "cyan": (0.15, 0.80, 0.85),
    "blue": (0.15, 0.25, 0.85),
    "purple": (0.52, 0.15, 0.68),
    "pink": (0.98, 0.55, 0.75),
}
TEXTURES = ("plain", "striped", "barred", "checkered", "dotted")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "gray", "black", "sky", "wood", "tiles")
SPLITS = {"train": 0, "test": 1, "probe": 2}
RADII = {1: (0.22, 0.32), 2: (0.16, 0.22), 3: (0.12, 0.17), 4: (0.12, 0.17)}  # objects -> (small, large)
MAX_OBJECTS = 4
KEPT = 64  # largest side of pictures that are kept once they are drawn


@dataclass(frozen=True)
class SceneObject:
    """One thing in a scene. `x`, `y` and `radius` are shares of the side of the picture, y grows downwards."""

    shape: str
    color: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    shade: tuple[float, float, float]  # the exact RGB in [0, 1], a little off the named color

    @property
    def name(self) -> str:
        """Short name: "red star"."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What is in a picture: a background, its brightness, and the objects, in order of drawing."""

    background: str
    tone: float  # brightness offset of the background, about -0.05 to 0.05
    objects: tuple[SceneObject, ...]

    def render(self, resolution: int) -> np.ndarray:
        """Draw the scene as uint8 RGB [resolution, resolution, 3]."""
        canvas = _background(self.background, resolution) + np.float32(self.tone)
        for thing in self.objects:
            _draw(canvas, thing, resolution)
        return (np.clip(canvas, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


@lru_cache(maxsize=64)
def _background(name: str, resolution: int) -> np.ndarray:
    """The background at tone 0, float32 RGB [R, R, 3] (shared: copy before writing)."""
    axis = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
    x, y = np.meshgrid(axis, axis)
    flat = {"white": (0.94, 0.94, 0.94), "gray": (0.55, 0.55, 0.55), "black": (0.08, 0.08, 0.08)}
    if name in flat:
        image = np.broadcast_to(np.array(flat[name]), (resolution, resolution, 3))
    elif name == "sky":
        image = _mix((0.62, 0.74, 0.88), (0.90, 0.93, 0.96), y)
    elif name == "wood":
        grain = 0.5 + 0.5 * np.sin(2 * np.pi * (4 * y + 0.12 * np.sin(2 * np.pi * x)))
        image = _mix((0.46, 0.33, 0.22), (0.62, 0.47, 0.33), grain)
    else:  # tiles: squares of a sixth of the side, soft edges
        wave = np.sin(6 * np.pi * x) * np.sin(6 * np.pi * y)
        image = _mix((0.36, 0.38, 0.42), (0.66, 0.68, 0.70), np.clip(0.5 + 2.0 * wave, 0.0, 1.0))
    return np.ascontiguousarray(image, dtype=np.float32)


def _mix(first: tuple[float, ...], second: tuple[float, ...], share: np.ndarray) -> np.ndarray:
    """Blend two colors by `share` [R, R] -> [R, R, 3]."""
    return np.array(first) * (1 - share[..., None]) + np.array(second) * share[..., None]


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) to a shape of radius 1 at the origin; u to the right, v downwards."""
    if shape == "circle":
        return np.hypot(u, v) - 0.95
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.72) - 0.27
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.82
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 0.95, b - 0.32), np.maximum(a - 0.32, b - 0.95))
    if shape == "triangle":  # apex up, three half planes
        return np.maximum(v - 0.72, 0.866 * np.abs(u) - 0.5 * v - 0.5)
    # star: five points; fold the plane into one tenth and take the half plane of the outer edge
    angle = np.arctan2(u, -v)
    fold = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(u, v)
    a, b = radius * np.cos(fold), radius * np.sin(fold)
    outer, inner = 1.05, 0.46
    tip, notch = (outer, 0.0), (inner * np.cos(np.pi / 5), inner * np.sin(np.pi / 5))
    edge = (notch[0] - tip[0], notch[1] - tip[1])
    return ((a - tip[0]) * edge[1] - b * edge[0]) / np.hypot(*edge)


def _texture(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray | None:
    """How dark the second tone is, 0 to 1, or None for plain. Anchored to the object, so it moves with it."""
    turn = 2 * np.pi * 0.78  # periods in units of the object's radius, so texture grows with the object
    if texture == "striped":
        wave = np.sin(turn * 2 * u)
    elif texture == "barred":
        wave = np.sin(turn * 2 * v)
    elif texture == "checkered":
        wave = 1.6 * np.sin(turn * u * 1.3) * np.sin(turn * v * 1.3)
    elif texture == "dotted":
        wave = 1.5 * (np.cos(turn * 1.6 * u) + np.cos(turn * 1.6 * v)) - 1.4
    else:
        return None
    return np.clip(0.5 + 1.2 * wave, 0.0, 1.0)


def _draw(canvas: np.ndarray, thing: SceneObject, resolution: int) -> None:
    """Blend one object into the canvas [R, R, 3] in place, antialiased over one pixel."""
    reach = thing.radius * 1.1 + 1.0 / resolution
    x0, x1 = (max(0, int(np.floor((thing.x + s * reach) * resolution))) for s in (-1, 1))
    y0, y1 = (max(0, int(np.floor((thing.y + s * reach) * resolution))) for s in (-1, 1))
    x1, y1 = min(resolution, x1 + 1), min(resolution, y1 + 1)
    u = (((np.arange(x0, x1, dtype=np.float32) + 0.5) / resolution - thing.x) / thing.radius)[None, :]
    v = (((np.arange(y0, y1, dtype=np.float32) + 0.5) / resolution - thing.y) / thing.radius)[:, None]
    u, v = np.broadcast_arrays(u, v)
    pixel = 1.0 / (resolution * thing.radius)
    cover = np.clip(0.5 - _distance(thing.shape, u, v) / pixel, 0.0, 1.0)[..., None].astype(np.float32)
    color = np.array(thing.shade, dtype=np.float32)
    dark = _texture(thing.texture, u, v)
    paint = color if dark is None else color * (1 - 0.62 * dark[..., None]).astype(np.float32)
    window = canvas[y0:y1, x0:x1]
    window += cover * (paint - window)


def scene(index: int, split: str = "train", seed: int = 0) -> Scene:
    """Scene number `index` of a split; the same arguments give the same scene everywhere.

    One object in 60 % of the scenes, two in 20 %, three in 12 %, four in 8 %.
    Raises UserError for an unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is unknown: choose one of {', '.join(SPLITS)}")
    rng = np.random.default_rng((SPLITS[split], seed, index))
    count = int(rng.choice(4, p=(0.60, 0.20, 0.12, 0.08))) + 1
    drawn = Scene(str(rng.choice(BACKGROUNDS)), float(rng.uniform(-0.05, 0.05)), ())
    for _ in range(count):
        thing = place(random_object(rng, count), drawn, rng)
        drawn = replace(drawn, objects=(*drawn.objects, thing))
    return drawn


def random_object(rng: np.random.Generator, count: int) -> SceneObject:
    """An object with every factor drawn alone and uniformly, for a scene of `count` objects; not yet placed."""
    color = tuple(COLORS)[rng.integers(len(COLORS))]
    size = int(rng.integers(len(SIZES)))
    shade = np.clip(np.array(COLORS[color]) + rng.uniform(-0.06, 0.06, 3), 0, 1)
    return SceneObject(
        shape=SHAPES[rng.integers(len(SHAPES))],
        color=color,
        texture=TEXTURES[rng.integers(len(TEXTURES))],
        size=SIZES[size],
        x=0.5,
        y=0.5,
        radius=RADII[count][size] * float(rng.uniform(0.94, 1.06)),
        shade=tuple(float(c) for c in shade),
    )


def place(thing: SceneObject, scene: Scene, rng: np.random.Generator) -> SceneObject:
    """Put an object where it overlaps no other: random places first, then the best of those tried."""
    best, best_gap = thing, -np.inf
    for _ in range(40):
        x, y = rng.uniform(thing.radius, 1 - thing.radius, 2)
        gaps = [np.hypot(x - o.x, y - o.y) - o.radius - thing.radius for o in scene.objects]
        gap = min(gaps, default=1.0)
        if gap > best_gap:
            best, best_gap = replace(thing, x=float(x), y=float(y)), gap
        if best_gap > 0.02:
            break
    return best


class Scenes:
    """The world as an endless image source (see `data.images.step_batches`): index -> Sample with a caption.

    Args: size: side in pixels; split: "train", "test" or "probe"; seed: another world with the same rules.
    `label` is color x shape of the first object of one-object scenes, else -1.
    """

    endless = True
    damaged = ()
    classes = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

    def __init__(self, size: int, split: str = "train", seed: int = 0):
        self.size, self.split, self.seed = size, split, seed

    def __getitem__(self, index: int) -> Sample:
        draw = _sample if self.size <= KEPT else _sample.__wrapped__
        return draw(self.size, self.split, self.seed, index)


@lru_cache(maxsize=8192)  # tables train many models on the same few thousand; 57 MB of 48 px in each process
def _sample(size: int, split: str, seed: int, index: int) -> Sample:
    from dualtoken.data.scene_text import caption  # scene_text builds on this file

    drawn = scene(index, split, seed)
    pixels = torch.from_numpy(drawn.render(size)).permute(2, 0, 1).contiguous()
    label = -1
    if len(drawn.objects) == 1:
        label = Scenes.classes.index(drawn.objects[0].name)
    rng = np.random.default_rng((SPLITS[split], seed, index, 1))
    return Sample(pixels, caption(drawn, rng), label, f"scene-{split}-{index}")
