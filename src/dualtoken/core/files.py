"""Files that are there whole, or not at all, whatever stops the program."""

import glob
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_or_not_at_all(path: Path) -> Iterator[Path]:
    """A draft to write in place of `path`: it takes that name where the block ends well, and goes otherwise.

    Drafts that killed processes left of the same file are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.draft"):
        left.unlink(missing_ok=True)
    draft = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.draft")
    try:
        yield draft
        with open(draft, "rb") as written:
            os.fsync(written.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
