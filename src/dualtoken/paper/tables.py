"""Tables of the tokenizer that need no training (table1)."""

from dualtoken.eval.commands import reconstruction, retrieval, zero_shot
from dualtoken.eval.reconstruction import INCEPTION
from dualtoken.paper.experiment import Result, Row, Setting
from dualtoken.paper.numbers import paper_table


def table1(setting: Setting) -> Result:
    """Zero-shot accuracy, retrieval and reconstruction of one tokenizer, beside the rows of the paper."""
    told = {"model": setting.model, "encoder": setting.encoder}
    told |= {"data": setting.source, "images": setting.count(500, 50000)}
    names = {} if setting.scale == "mini" else {"classes": "imagenet", "templates": "openai"}
    seen = zero_shot(**told, **names)
    found = retrieval(**told) if setting.scale == "mini" else {}
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
    if setting.scale == "mini":
        said.append(
            "The miniature is measured on drawn scenes of 48 classes, the paper on ImageNet: the two sides of the "
            "table cannot be compared. `teacher_frechet` is a distance in the encoder's features, no FID."
        )
    else:
        said.append("Retrieval wants pictures with captions: dualtoken eval retrieval (docs/evaluation.md).")
        said += [] if setting.inception else [f"No rFID without --inception: {INCEPTION}."]
    return Result(rows, said)
