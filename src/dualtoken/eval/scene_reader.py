"""What a picture of the bundled world shows, read by rules alone: no learned model judges a drawing.

Every pixel of an object is `(1 - a) b + a s c`: background b, cover a, shade c, and s from 0.38 to 1 for the dark
tone of its texture (`data.scenes`). So the reader (1) fits every background at any tone and keeps the best,
(2) gives each differing pixel the named color that explains it best at any s, (3) takes patches of one color,
solves their pixels for the cover a, and (4) fits the outline of every shape to that cover. Texture never matters.

An object is reported only where the best shape's soft intersection over union (IoU) with the cover is at least
`ACCEPT`, set between two groups (split "train"): single objects score 0.93 or more, 99 in 100 of those in
reconstructions by the bundled tokenizer 0.78 or more; of patches of one color, ovals of one to two stay below 0.72
and mosaics of 5 px bricks below 0.79 in 99 of 100. `DEBRIS` stops most of the latter. Pictures are read at 48 px.

Shapes: S side of the picture given, R = 48, h and w sides of a window, K candidate places, P pixels.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

from dualtoken.core.errors import UserError
from dualtoken.data.scenes import BACKGROUNDS, COLORS, SHAPES, _background, _distance

R = 48
ACCEPT = 0.77  # least IoU of an object
DEBRIS = 0.4  # most pixels of a color beside its objects, as a share of those in them
RADIUS = (0.108, 0.36)  # the world's are 0.113 to 0.339; an 8 px patch of plain color would be a square of 0.102
DARKEST = 0.38  # s of the dark tone of a texture
PATCH = 18  # px; the smallest object of the world, a star of 0.113, has 41
WORDS = ("left of", "right of", "above", "below")
TIE = 1.0 / R  # centers are found to a fraction of a pixel, so a lead of one axis below that is none
_BLOCK = np.ones((3, 3), bool)


@dataclass(frozen=True)
class SeenObject:
    """One thing found in a picture; `x`, `y`, `radius` as in `scenes.SceneObject`; `score` is the IoU of its fit."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    score: float


def background(picture: np.ndarray) -> str:
    """Which of BACKGROUNDS lies behind the objects of a picture, uint8 RGB [S, S, 3]."""
    return _behind(_pixels(picture))[0]


def shows(picture: np.ndarray, color: str, shape: str) -> bool:
    """Whether an object of that color and shape is in a picture, uint8 RGB [S, S, 3]; UserError for unknown words."""
    _check((color, shape))
    return any((seen.color, seen.shape) == (color, shape) for seen in read_scene(picture))


def shows_relation(picture: np.ndarray, first: tuple[str, str], words: str, second: tuple[str, str]) -> bool:
    """Whether two (color, shape) are both there and the first lies `words` ("left of", ...) the second.

    As `scene_text.relation`: the axis on which they differ more counts; where the two differences are equal within
    a pixel, either axis does. Of several objects of one name any pair will do, but never one object twice.
    """
    _check(first, words)
    _check(second, words)
    seen = read_scene(picture)
    for a in (thing for thing in seen if (thing.color, thing.shape) == tuple(first)):
        for b in (thing for thing in seen if (thing.color, thing.shape) == tuple(second) and thing is not a):
            dx, dy = a.x - b.x, a.y - b.y
            along, across = (dx, dy) if words in WORDS[:2] else (dy, dx)
            if abs(along) + TIE >= abs(across) and (along < 0) == (words in ("left of", "above")) and along:
                return True
    return False


def read_scene(picture: np.ndarray) -> list[SeenObject]:
    """The objects of a picture, uint8 RGB [S, S, 3], largest first; UserError for any other kind of array."""
    pixels = _pixels(picture)
    behind = _behind(pixels)[1]
    labels = _named(pixels, behind)
    patches = []
    for number, color in enumerate(COLORS):
        parts, count = ndimage.label(labels == number, _BLOCK)
        patches += [(color, parts == part, False) for part in range(1, count + 1)]
    patches = sorted((p for p in patches if p[1].sum() >= PATCH), key=lambda patch: -patch[1].sum())
    found, free = [], np.ones((R, R), bool)  # free: not yet explained by an object found
    while patches:
        color, patch, cut = patches.pop(0)
        patch = patch & free
        if patch.sum() < PATCH:
            continue
        cover, foreign = _cover(pixels, behind, COLORS[color], patch)
        cover = cover * free
        seen = None
        if not cut:  # with the shade known, dark stripes join in that the named color did not explain
            parts, _ = ndimage.label(patch | (cover > 0.5), _BLOCK)
            seen = _fit(color, cover, np.isin(parts, parts[patch]), foreign | ~free)
        seen = seen or _fit(color, cover, patch, foreign | ~free)
        if seen is not None:
            found.append(seen)
            place = np.array([[seen.x, seen.y, seen.radius]])
            free &= _outlines(seen.shape, place, np.arange(R), np.arange(R))[0] < 0.1
        else:  # two of one color may touch: try what a cut of one pixel separates
            parts, count = ndimage.label(ndimage.binary_erosion(patch))
            pieces = [ndimage.binary_dilation(parts == part) & patch for part in range(1, count + 1)]
            pieces = [piece for piece in pieces if 2 * PATCH <= piece.sum() < 0.85 * patch.sum()]
            patches = [(color, piece, True) for piece in pieces] + patches
    # Pieces of a mosaic look like small squares now and then, but most of their color then lies about unexplained.
    left = ndimage.binary_erosion(free, _BLOCK, border_value=1)
    for number, color in enumerate(COLORS):
        same = labels == number
        if (same & left).sum() > DEBRIS * (same & ~free).sum():
            found = [seen for seen in found if seen.color != color]
    return sorted(found, key=lambda seen: -seen.radius)


def _check(pair: tuple[str, str], words: str = WORDS[0]) -> None:
    for kind, word, known in (("color", pair[0], COLORS), ("shape", pair[1], SHAPES), ("relation", words, WORDS)):
        if word not in known:
            raise UserError(f"{kind} {word!r} is unknown: choose one of {', '.join(known)}")


def _pixels(picture: np.ndarray) -> np.ndarray:
    """uint8 RGB [S, S, 3] -> float32 in [0, 1] [R, R, 3]."""
    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.shape[0] != picture.shape[1] or picture.dtype != np.uint8:
        raise UserError(f"picture {picture.dtype} {list(picture.shape)}: give uint8 RGB [S, S, 3]")
    if len(picture) != R:
        way = Image.Resampling.BOX if len(picture) > R else Image.Resampling.BICUBIC
        picture = np.asarray(Image.fromarray(picture).resize((R, R), way))
    return picture.astype(np.float32) / 255.0


def _behind(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and picture [R, R, 3] of the background, at the tone that fits most pixels."""
    fits = []
    for name in BACKGROUNDS:
        drawn = _background(name, R)
        tone = np.clip(np.median(pixels - drawn), -0.08, 0.08)
        miss = np.abs(pixels - drawn - tone).max(-1)
        fits.append((float(np.minimum(miss, 0.15).mean()), name, np.clip(drawn + tone, 0, 1)))
    return min(fits, key=lambda fit: fit[0])[1:]


def _mixed(points: np.ndarray, behind: np.ndarray, shade: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cover [P] and distance in RGB [P] of points [P, 3] explained as background [P, 3] and shade [3] at any s."""
    dark = np.linspace(DARKEST, 1.0, 6, dtype=np.float32)[:, None, None] * np.asarray(shade, np.float32)  # [6, 1, 3]
    way = dark - behind  # [6, P, 3]
    off = points - behind
    share = np.clip((way * off).sum(-1) / np.maximum((way * way).sum(-1), 1e-6), 0, 1)
    miss = np.sqrt(((off - share[..., None] * way) ** 2).sum(-1))
    # On black, a dark pixel is fully covered or half covered with nearly the same color: lean to fully covered.
    best = (miss - 0.03 * share).argmin(0)[None]
    return np.take_along_axis(share, best, 0)[0], np.take_along_axis(miss, best, 0)[0]


def _named(pixels: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """Number of the named color [R, R] of each pixel, -1 for background and what is no color of the world."""
    labels = np.full((R, R), -1)
    differs = np.abs(pixels - behind).max(-1) > 0.08
    if differs.any():
        tried = [_mixed(pixels[differs], behind[differs], shade) for shade in COLORS.values()]
        share, miss = (np.stack(part) for part in zip(*tried, strict=True))  # [colors, P]
        best = miss.argmin(0)[None]
        there = (np.take_along_axis(share, best, 0)[0] > 0.5) & (miss.min(0) < 0.2)
        labels[differs] = np.where(there, best[0], -1)
    return labels


def _cover(pixels: np.ndarray, behind: np.ndarray, named: tuple, patch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the object of a patch covers each pixel, 0 to 1 [R, R], and which pixels something else covers [R, R].

    The shade is taken from the brighter pixels of the patch, where its texture is not dark.
    """
    light = pixels[patch] @ np.array(named, np.float32)
    shade = np.median(pixels[patch][light >= np.quantile(light, 0.6)], 0)
    share, miss = _mixed(pixels.reshape(-1, 3), behind.reshape(-1, 3), shade)
    share, miss = share.reshape(R, R), miss.reshape(R, R)
    return share * np.clip((0.25 - miss) / 0.1, 0, 1), miss > 0.2


def _outlines(shape: str, places: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Cover [K, h, w] of a shape at places [K, 3] = (x, y, radius), antialiased as `scenes` draws it."""
    x, y, radius = (part[:, None, None] for part in places.T.astype(np.float32))
    u = ((columns[None, None, :].astype(np.float32) + 0.5) / R - x) / radius
    v = ((rows[None, :, None].astype(np.float32) + 0.5) / R - y) / radius
    u, v = np.broadcast_arrays(u, v)
    return np.clip(0.5 - _distance(shape, u, v) * (R * radius), 0.0, 1.0)


def _blur(outline: np.ndarray, axis: int) -> np.ndarray:
    """Mean with weights 1, 2, 1 along an axis, the ends left as they are."""
    outline = outline.swapaxes(axis, -1)
    middle = outline[..., 1:-1] / 2 + outline[..., :-2] / 4 + outline[..., 2:] / 4
    return np.concatenate([outline[..., :1], middle, outline[..., -1:]], -1).swapaxes(axis, -1)


@lru_cache(maxsize=len(SHAPES))
def _extent(shape: str) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of a shape of radius 1."""
    axis = np.linspace(-1.2, 1.2, 481)
    v, u = np.nonzero(_distance(shape, *np.meshgrid(axis, axis)) <= 0)
    return float(axis[u.min()]), float(axis[u.max()]), float(axis[v.min()]), float(axis[v.max()])


def _fit(color: str, cover: np.ndarray, patch: np.ndarray, foreign: np.ndarray) -> SeenObject | None:
    """The shape whose outline agrees best with a cover [R, R] around a patch [R, R], or None below `ACCEPT`.

    Pixels that something else covers (`foreign`) count neither for nor against; three in ten at most may be so.
    """
    own = cover * ndimage.binary_dilation(patch, _BLOCK, iterations=2)
    v, u = np.nonzero(patch)
    rows = np.arange(max(0, v.min() - 4), min(R, v.max() + 5))
    columns = np.arange(max(0, u.min() - 4), min(R, u.max() + 5))
    window = np.ix_(rows, columns)
    cover, own, known = cover[window], own[window], 1.0 - foreign[window]

    def agreement(shape: str, places: np.ndarray, soft: bool) -> np.ndarray:
        outline = _outlines(shape, places, rows, columns)
        if soft:  # as a decoder draws it
            outline = _blur(_blur(outline, 1), 2)
        both = (np.minimum(outline, cover) * known).sum((1, 2))
        either = (np.maximum(outline, own) * known).sum((1, 2))
        seen = (outline * known).sum((1, 2)) / np.maximum(outline.sum((1, 2)), 1e-6)
        return np.where(seen >= 0.7, both / np.maximum(either, 1e-6), 0.0)

    steps = np.stack(np.meshgrid(*[(-1, 0, 1)] * 3), -1).reshape(-1, 3).astype(np.float64)
    fits = []
    for shape in SHAPES:
        left, right, top, bottom = _extent(shape)
        wide, high = (u.max() + 1 - u.min()) / R, (v.max() + 1 - v.min()) / R
        radius = (wide + high) / (right - left + bottom - top)
        x, y = (u.max() + 1 + u.min()) / 2 / R, (v.max() + 1 + v.min()) / 2 / R
        place = np.array([x - radius * (left + right) / 2, y - radius * (top + bottom) / 2, radius])
        fits.append((0.0, shape, place, False))
    for step, keep in ((0.8, 3), (0.8, 3), (0.4, 2), (0.2, 1)):  # pixels; how many stay: the rest is far behind
        better = []
        for _, shape, place, soft in fits:
            places = place + steps * step / R
            places[:, 2] = np.clip(places[:, 2], 0.05, 0.5)
            scores = agreement(shape, places, soft)
            better.append((float(scores.max()), shape, places[scores.argmax()], soft))
        fits = sorted(better, key=lambda fit: -fit[0])[:keep]
        fits += [(*fit[:3], True) for fit in fits] if keep == len(better) else []  # once: each shape blurred too
    score, shape, (x, y, radius), _ = fits[0]
    if score < ACCEPT or not RADIUS[0] <= radius <= RADIUS[1]:
        return None
    return SeenObject(shape, color, float(x), float(y), float(radius), score)
