"""`dualtoken demo`: the bundled miniature on unseen scenes, on photographs and on your pictures, as a report.

Everything in the report is computed when the command runs; nothing is trained.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dualtoken.app.demo_mllm import show_model
from dualtoken.app.figures import code_colors, draw_code_maps, draw_neighbors, draw_reconstructions, draw_zero_shot
from dualtoken.app.report import Page, typed
from dualtoken.core.codes import DualCodes
from dualtoken.core.errors import UserError
from dualtoken.core.images import ImageError, fit_image, image_bytes, list_images, read_image, to_bytes, to_float
from dualtoken.data.images import photographs
from dualtoken.data.scenes import Scene, Scenes, scene
from dualtoken.eval.commands import reconstruction, retrieval, zero_shot
from dualtoken.eval.report import table, write_json
from dualtoken.eval.scene_factors import FACTORS
from dualtoken.eval.zero_shot import class_vectors
from dualtoken.mllm.assistant import Assistant
from dualtoken.tokenizer.encoder import load_text_tokenizer
from dualtoken.tokenizer.presets import BUNDLED, encoder_directory, open_encoder, open_tokenizer
from dualtoken.tokenizer.tokenizer import DualTokenVisionTokenizer

SHOWN, QUERIES, NEIGHBORS = 8, 6, 5
COLUMNS = ("", "zero-shot, %", "T2I R@1, %", "I2T R@1, %", "rFID", "PSNR, dB", "SSIM")
PAPER = (  # Table 1; zero-shot on ImageNet, the rest on the data named there
    ("paper: SigLIP2-So/16-256 (continuous)", 83.4, 21.5, 22.0, None, None, None),
    ("paper: DualToken (SigLIP2-So/16-256)", 82.3, 21.1, 21.9, 0.52, 28.03, 0.726),
)


@dataclass
class Gallery:
    """Unseen one-object scenes with everything the comparisons need."""

    scenes: list[Scene]
    images: Tensor  # uint8 [M, 3, S, S]
    codes: DualCodes
    appearance: Tensor  # [M, N * code_dim], unit vectors from pixel codes, place by place
    meaning: Tensor  # [M, C], unit vectors: the pooled feature from semantic codes


def demo(
    model: str = "mini",
    image: str | list[str] | None = None,
    output: str = "demo",
    images: int = 400,
    seed: int = 0,
) -> None:
    """Show a model at work: it looks, draws, edits, tells a story; and its tokenizer, with measures.

    Args:
        model: a preset (it brings its image-text encoder).
        image: a picture of yours, a folder, or a list of them.
        output: folder for index.html, the pictures and metrics.json.
        images: unseen scenes that are measured.
        seed: another draw of scenes.
    """
    command, started = typed("dualtoken demo", demo, locals()), time.time()
    if model not in BUNDLED:
        raise UserError(
            f"--model {model}: the demo needs a preset ({', '.join(BUNDLED)}); see dualtoken eval for others"
        )
    if images < 50:
        raise UserError(f"--images {images}: give at least 50, neighbours are looked up among them")
    torch.manual_seed(seed)
    own = _own_pictures(image)
    tokenizer = open_tokenizer(model)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    page = Page("DualToken: two vocabularies of pictures, one model that reads and writes both", "mini", command)
    page.text(
        "Pixel codes are taken from a shallow layer of a vision transformer, semantic codes from a deep layer of the "
        "same one. Only pixel codes are turned back into pictures; only semantic codes are asked what is in them. The "
        f"model is the bundled miniature: pictures of {tokenizer.image_size} px, trained on drawn scenes alone."
    )
    metrics: dict = {"model": model, "seed": seed}

    print("1/6 the model looks, draws, edits, tells")
    metrics["model_at_work"] = show_model(page, folder, Assistant.open(model), own, seed)
    print("2/6 pictures through their codes")
    gallery = _gallery(tokenizer, images, seed)
    _show_pictures(page, folder, tokenizer, gallery, own)
    print("3/6 code maps")
    _show_codes(page, folder, tokenizer, gallery)
    print("4/6 neighbours by pixel and by semantic codes")
    metrics["neighbors"] = _show_neighbors(page, folder, gallery)
    print("5/6 zero-shot labels")
    _show_labels(page, folder, model, tokenizer, gallery, own)
    print("6/6 measures\n")
    metrics |= _measure(page, model, images)
    metrics["seconds"] = round(time.time() - started, 1)
    page.text(f"Made in {metrics['seconds']:.0f} s. The same numbers as JSON: metrics.json.")
    page.write(folder / "index.html")
    write_json(folder / "metrics.json", metrics)
    print(f"look at {folder / 'index.html'} ({metrics['seconds']:.0f} s)")


def _own_pictures(image: str | list[str] | None) -> dict[str, Path]:
    """Names and files of --image. Raises UserError where none can be read."""
    listed = [image] if isinstance(image, str) else image or []
    found: dict[str, Path] = {}
    for path in (file for entry in listed for file in list_images(entry, "--image")):
        try:
            read_image(path)
        except ImageError as error:
            print(f"skipped: {error}")
            continue
        short = path.name[:18]
        same = sum(name.startswith(short) for name in found)
        found[f"{short} {same + 1}" if same else short] = path
    if listed and not found:
        raise UserError(f"--image {image}: no picture in it could be read")
    return found


@torch.no_grad()
def _gallery(tokenizer: DualTokenVisionTokenizer, images: int, seed: int) -> Gallery:
    """The first `images` unseen scenes of one object from a place that the seed chooses."""
    source, first = Scenes(tokenizer.image_size, "test"), 100_000 * seed
    numbers = (i for i in range(first, first + 10 * images) if len(scene(i, "test").objects) == 1)
    chosen = [next(numbers) for _ in range(images)]
    pictures = torch.stack([source[i].image for i in chosen])
    codes = DualCodes.cat([tokenizer.encode(to_float(part)) for part in pictures.split(64)])
    appearance = tokenizer.pixel.quantizer.lookup(codes.pixel).flatten(1)
    meaning = tokenizer.pool(tokenizer.semantic.lookup(codes.semantic))
    return Gallery(
        [scene(i, "test") for i in chosen],
        pictures,
        codes,
        F.normalize(appearance, dim=-1),
        F.normalize(meaning, dim=-1),
    )


def _decoded(tokenizer: DualTokenVisionTokenizer, pictures: Tensor) -> Tensor:
    with torch.no_grad():
        return to_bytes(tokenizer.decode(tokenizer.encode(to_float(pictures))))


def _files(tokenizer: DualTokenVisionTokenizer, files: list[Path]) -> Tensor:
    """Files as uint8 [M, 3, S, S]."""
    return torch.stack([image_bytes(fit_image(read_image(file), tokenizer.image_size)) for file in files])


def _psnr(first: Tensor, second: Tensor) -> list[str]:
    error = (first.float() - second.float()).square().mean((1, 2, 3)).clamp_min(1e-3)
    return [f"{float(20 * torch.log10(255 / e.sqrt())):.1f} dB" for e in error]


def _show_pictures(
    page: Page, folder: Path, tokenizer: DualTokenVisionTokenizer, gallery: Gallery, own: dict[str, Path]
) -> None:
    page.heading("Pictures through their codes")
    source = Scenes(tokenizer.image_size, "test")
    several = [i for i in range(200) if len(scene(i, "test").objects) > 1][: SHOWN // 2]
    mixed = torch.cat([gallery.images[: SHOWN - len(several)], torch.stack([source[i].image for i in several])])
    photos = photographs(tokenizer.image_size).files[:SHOWN]
    sets = [("scenes", mixed, "Scenes that the model has never seen: one object, then several."),
            ("photographs", _files(tokenizer, photos), "Photographs that scikit-image ships. The miniature was trained "
             "on drawn scenes only: of a photograph it keeps coarse light and color only.")]  # fmt: skip
    if own:
        sets.append(("yours", _files(tokenizer, list(own.values())[:SHOWN]), "Your pictures, cut to a square."))
    for name, pictures, caption in sets:
        found = _decoded(tokenizer, pictures)
        path = draw_reconstructions(folder / f"{name}.png", pictures, found, _psnr(pictures, found))
        page.picture(path, f"{caption} PSNR above each column.")


def _show_codes(page: Page, folder: Path, tokenizer: DualTokenVisionTokenizer, gallery: Gallery) -> None:
    page.heading("Code maps")
    grid, maps = tokenizer.backbone.grid, {}
    for name in ("pixel", "semantic"):
        codes = getattr(gallery.codes, name)[:SHOWN, -grid * grid :, 0]
        maps[name] = code_colors(getattr(tokenizer, name).quantizer.codebook.weight)[codes].view(-1, grid, grid, 3)
    names = [thing.objects[0].name for thing in gallery.scenes[:SHOWN]]
    path = draw_code_maps(folder / "code_maps.png", gallery.images[:SHOWN], maps, names)
    page.picture(
        path,
        "Codes of depth 1, each code with its own color, near codes with near colors. Pixel codes follow what is at a "
        "place; semantic codes of the same place have seen the whole picture.",
    )


def _nearest(vectors: Tensor) -> Tensor:
    """Numbers [M, k] of the nearest others by cosine."""
    return (vectors @ vectors.t()).fill_diagonal_(-2).topk(NEIGHBORS, 1).indices


def _show_neighbors(page: Page, folder: Path, gallery: Gallery) -> dict[str, dict[str, float]]:
    page.heading("Neighbours: appearance against meaning")
    nearest = {"pixel": _nearest(gallery.appearance), "semantic": _nearest(gallery.meaning)}
    found = {name: gallery.images[numbers[:QUERIES]] for name, numbers in nearest.items()}
    path = draw_neighbors(folder / "neighbors.png", gallery.images[:QUERIES], found)
    page.picture(
        path,
        f"Nearest of {len(gallery.images)} unseen scenes. By pixel codes, compared place by place: same background, "
        "same place, same brightness. By the pooled feature of semantic codes: same kind of thing (compare Fig. 3 of "
        "the paper).",
    )
    factors = {
        "color": [s.objects[0].color for s in gallery.scenes],
        "shape": [s.objects[0].shape for s in gallery.scenes],
        "texture": [s.objects[0].texture for s in gallery.scenes],
        "background": [s.background for s in gallery.scenes],
    }
    shares: dict[str, dict[str, float]] = {}
    for factor, values in factors.items():
        numbers = torch.tensor([sorted(set(values)).index(v) for v in values])
        same = numbers[:, None] == numbers[None]
        by_chance = float((same.sum(1) - 1).float().mean() / (len(values) - 1))
        shares[factor] = {
            name: float((numbers[rows] == numbers[:, None]).float().mean()) for name, rows in nearest.items()
        } | {"chance": by_chance}
    rows = [(factor, *values.values()) for factor, values in shares.items()]
    page.text(f"Share of the {NEIGHBORS} nearest that agree with the query, over all scenes:")
    page.table(("factor", "by pixel codes", "by semantic codes", "by chance"), rows)
    print(table(("same as query", "pixel codes", "semantic codes", "chance"), rows))
    return shares


@torch.no_grad()
def _show_labels(
    page: Page, folder: Path, model: str, tokenizer: DualTokenVisionTokenizer, gallery: Gallery, own: dict[str, Path]
) -> None:
    page.heading("Zero-shot labels from semantic codes")
    encoder, texts = open_encoder(model), load_text_tokenizer(encoder_directory(model))
    classes = class_vectors(encoder, texts, Scenes.classes)

    def scores(vectors: Tensor) -> Tensor:
        return encoder.logits(vectors, classes).softmax(1)

    def show(name: str, pictures: Tensor, caption: str) -> None:
        semantic = tokenizer.semantic.lookup(tokenizer.encode(to_float(pictures)).semantic)
        both = {
            "semantic codes": scores(F.normalize(tokenizer.pool(semantic), dim=-1)),
            "continuous teacher": scores(encoder.embed_image(to_float(pictures))),
        }
        page.picture(draw_zero_shot(folder / f"{name}.png", pictures, both, Scenes.classes), caption)

    show("zero_shot", gallery.images[:SHOWN], f"The likeliest of {len(classes)} classes, as a share of 1.")
    if own:
        mine = _files(tokenizer, list(own.values())[:SHOWN])
        show("zero_shot_yours", mine, "Your pictures. The miniature has words for drawn shapes only.")


def _measure(page: Page, model: str, images: int) -> dict:
    """The paper's columns for the miniature and its teacher, on unseen scenes; reconstruction of photographs."""
    page.heading("Measured")
    scenes = reconstruction(model, "scenes", images)
    photos = reconstruction(model, "photographs")
    labels, pairs = zero_shot(model, images=images), retrieval(model, images=images)
    rows = [
        (
            f"miniature, {who}",
            100 * labels["jointly"][key],
            100 * pairs["text_to_image"][key],
            100 * pairs["image_to_text"][key],
            None,
            *((scenes["psnr"], scenes["ssim"]) if key == "codes" else (None, None)),
        )
        for key, who in (("teacher", "continuous teacher"), ("codes", "dual codes"))
    ]
    page.table(COLUMNS, [*rows, *PAPER], quiet=(2, 3))
    page.text(
        f"The miniature's numbers are on {images} unseen scenes ({labels['classes']} classes of color and shape; R@1 "
        "among as many pairs), the paper's on photographs: the columns are the same, the tasks are not. The miniature "
        f"has no rFID, which needs Inception weights; its Frechet distance in its teacher's features is "
        f"{scenes['teacher_frechet']:.3g}."
    )
    page.table(
        ("", "PSNR, dB", "SSIM, 1 = equal", "pixel codebook used, share of 1", "semantic codebook used, share of 1"),
        [
            (name, m["psnr"], m["ssim"], m["pixel_usage"], m["semantic_usage"])
            for name, m in ((f"{images} unseen scenes", scenes), (f"{photos['images']} photographs", photos))
        ],
    )
    page.table(
        ("zero-shot accuracy", "semantic codes", "continuous teacher"),
        [(name, labels[name]["codes"], labels[name]["teacher"]) for name in ("jointly", *FACTORS)],
    )
    chance = ", ".join(f"{name} {1 / len(values):.3g}" for name, values in FACTORS.items())
    page.text(
        f"As shares of 1; by chance: {chance}. A factor that the teacher does not know, its codes cannot know either: "
        "what is lost in quantisation is the difference of the two columns."
    )
    return {"scenes": scenes, "photographs": photos, "zero_shot": labels, "retrieval": pairs}
