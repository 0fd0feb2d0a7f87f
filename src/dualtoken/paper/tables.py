"""Tables of the tokenizer that need no training (table1)."""

from pathlib import Path

from dualtoken.core.errors import UserError
from dualtoken.eval.commands import reconstruction, retrieval, zero_shot
from dualtoken.eval.reconstruction import INCEPTION
from dualtoken.paper.experiment import Result, Row, Setting
from dualtoken.paper.measure import check_measuring
from dualtoken.paper.numbers import paper_table


def table1(setting: Setting) -> Result:
    """Zero-shot accuracy, retrieval and reconstruction of one tokenizer, beside the rows of the paper."""
    told = {"model": setting.model, "encoder": setting.encoder}
    told |= {"data": setting.source, "images": setting.count(500, 50000)}
    names = {} if setting.scale == "mini" else {"classes": "imagenet", "templates": "openai"}
    seen = zero_shot(**told, **names)
    found = {}
    if setting.scale == "mini":
        found = retrieval(**told)
    elif setting.flickr8k:
        found = retrieval(setting.model, setting.encoder, **flickr8k(setting.flickr8k))
        setting.protocol["retrieval"] = found["protocol"]
        setting.skipped.extend(found["skipped"])
    back = reconstruction(**told, inception_weights=setting.inception)
    setting.skipped.extend(seen["skipped"] + back["skipped"])
    setting.protocol.update({"zero_shot": seen["protocol"], "reconstruction": back["protocol"]})
    accuracy = seen["jointly" if setting.source == "scenes" else "accuracy"]
    rows = []
    for who, name in (("codes", f"DualToken, {setting.model}"), ("teacher", "its continuous encoder")):
        measured = {"zero_shot": 100 * accuracy[who]}
        measured |= {key: 100 * found[key][who] for key in ("text_to_image", "image_to_text") if key in found}
        if who == "codes":
            measured |= {key: back[key] for key in ("psnr", "ssim", "teacher_frechet")} | {"rfid": back["fid"]}
        rows.append(Row(name, measured))
    rows += [Row(row.name, {}, row.values) for row in paper_table("table1").rows]
    lost = 100 * (accuracy["teacher"] - accuracy["codes"])
    said = [f"Codes lose {lost:.1f} points of zero-shot accuracy to the continuous encoder."]
    if setting.source == "scenes":
        said.append(
            "The miniature is measured on drawn scenes of 48 classes, the paper on ImageNet: the two sides of the "
            "table cannot be compared. `teacher_frechet` is a distance in the encoder's features, no FID."
        )
    if setting.scale == "full":
        said += [] if setting.flickr8k else ["No retrieval without --flickr8k, the folder of that dataset."]
        said += [] if setting.inception else [f"No rFID without --inception: {INCEPTION}."]
    return Result(rows, said)


def check_table1(setting: Setting) -> None:
    """Raise UserError where something given does not do, before 50000 pictures are measured."""
    check_measuring(setting)
    if setting.flickr8k:
        flickr8k(setting.flickr8k)


def flickr8k(folder: str) -> dict[str, str]:
    """Where a folder of Flickr8k has its pictures, captions and test names, as `eval retrieval` takes them.

    As published first (Flicker8k_Dataset/, Flickr8k.token.txt) or at Kaggle (Images/, captions.txt); the latter
    lacks the test names, which Flickr8k_text.zip has. Raises UserError for what is not there.
    """
    root = Path(folder)
    found = {}
    for option, names in {
        "data": ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images"),
        "captions": ("Flickr8k.token.txt", "captions.txt"),
        "split_file": ("Flickr_8k.testImages.txt",),
    }.items():
        places = [place for name in names for place in (root / name, *sorted(root.glob(f"*/{name}")))]
        there = [place for place in places if place.exists()]
        if not there:
            raise UserError(
                f"--flickr8k {folder}: no {' or '.join(names)} in it; Flickr8k_Dataset.zip and Flickr8k_text.zip are "
                "published at https://github.com/jbrownlee/Datasets/releases/tag/Flickr8k"
            )
        found[option] = str(there[0])
    return found
