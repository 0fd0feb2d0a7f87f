"""A folder of pictures with a caption file, several captions a picture: Flickr8k as it is published.

Two formats: `captions.txt`, comma-separated with the header "image,caption" (Kaggle), and `Flickr8k.token.txt`, lines
of "NAME.jpg#0<tab>caption" (the first publication; Flickr30k's results_20130124.token is the same).
"""

import csv
from pathlib import Path

from dualtoken.core.errors import UserError
from dualtoken.core.images import fit_image, image_bytes, read_image
from dualtoken.data.images import Sample

PUBLISHED = (
    'captions.txt ("image,caption" lines) of kaggle.com/datasets/adityajn105/flickr8k, or Flickr8k.token.txt '
    '("NAME.jpg#0<tab>caption" lines) of Flickr8k_text.zip'
)


class CaptionedImages:
    """Pictures of a folder in the order of a caption file; `captions` of a picture by its name.

    Args: split: a file with the names of the pictures to use, one a line; None = all of the caption file.
    Raises UserError for missing files, another format, or a split without a picture of the caption file.
    """

    endless = False
    classes: tuple[str, ...] = ()

    def __init__(self, folder: str | Path, captions: str | Path, size: int, split: str | Path | None = None):
        self.root, self.size = Path(folder), size
        if not self.root.is_dir():
            raise UserError(f"--data {folder}: no such folder; it should hold the pictures that {captions} names")
        self.captions = read_captions(captions)
        self.names = list(self.captions)
        if split is not None:
            if not Path(split).is_file():
                raise UserError(f"--split_file {split}: no such file; Flickr8k's is Flickr_8k.testImages.txt")
            wanted = set(Path(split).read_text().split())
            self.names = [name for name in self.names if name in wanted]
            if not self.names:
                raise UserError(f"--split_file {split}: none of its {len(wanted)} names is in {captions}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        name = self.names[index]
        picture = read_image(self.root / name)
        return Sample(image_bytes(fit_image(picture, self.size)), self.captions[name][0], -1, name)


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """Picture name -> its captions, both in the file's order. Raises UserError for another format."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--captions {path}: no such file; give {PUBLISHED}")
    found: dict[str, list[str]] = {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        header = file.readline().strip().lower().replace(" ", "")
        if header == "image,caption":
            pairs = (row for row in csv.reader(file) if len(row) == 2)
        else:
            file.seek(0)
            rows = (line.rstrip("\r\n").split("\t", 1) for line in file)
            pairs = ((row[0].rpartition("#")[0], row[1]) for row in rows if len(row) == 2)
        for name, caption in pairs:
            if name and caption.strip():
                found.setdefault(name.strip(), []).append(caption.strip())
    if not found:
        raise UserError(f"--captions {path}: no caption in it; give {PUBLISHED}")
    return found
