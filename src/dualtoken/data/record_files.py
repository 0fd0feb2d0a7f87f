"""Files of records, each read from front to back: tar shards, parquet tables, JSON, CSV, plain text, the hub.

A reader gives (key, record) pairs, keys being unique in a file, and `Skipped` for what it could not read: damage ends
a tar or JSON file at its place, costs one row group of a table, and one line of JSON lines.
"""

import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from webdataset.tariterators import group_by_keys, tar_file_expander

from dualtoken.core.errors import UserError
from dualtoken.data.tar_shards import Skipped, index_tar

Record = dict[str, Any]
ROWS = 16  # rows of a table held at a time; those of Cauldron have some MB each
BETWEEN = re.compile(r"[\s,]*")
BLOCK = 512  # bytes, of a tar file


Entry = tuple[str, Record] | Skipped


def tar_records(path: str, wanted: set[str]) -> Iterator[Entry]:
    """Groups of files with one base name; entries of `.json` become entries of the record."""
    damage: list[Exception] = []
    doubles: list[Exception] = []

    def stop(error: Exception) -> bool:  # behind damage there is nothing to go on with
        damage.append(error)
        return False

    def go_on(error: Exception) -> bool:
        doubles.append(error)
        return True

    with open(path, "rb") as stream:
        files = tar_file_expander([{"url": path, "stream": stream}], handler=stop)
        for group in group_by_keys(files, handler=go_on):
            yield group["__key__"], _unpacked(group)
    yield from (Skipped(f"{path}: {error.args[0]}") for error in doubles)
    if damage:
        reason = str(damage[0].args[0] if damage[0].args else damage[0]).split(" @ ")[0]
        yield Skipped(f"{path}: cut off or damaged, the rest of the shard is lost ({reason})")
    elif path.lower().endswith(".tar") and (found := index_tar(path).damage):  # tarfile may end early in silence
        yield Skipped(f"{path}: {found}; what is behind that is lost")


def _unpacked(group: Record) -> Record:
    record = {name: value for name, value in group.items() if not name.startswith("__")}
    try:
        said = json.loads(record.pop("json", b"{}"))
    except ValueError:  # what it should have said is then missed by name
        said = {}
    for name in record:
        if name.endswith("txt"):
            record[name] = record[name].decode("utf-8", errors="replace")
    return (said if isinstance(said, dict) else {}) | record


def table_records(path: str, wanted: set[str]) -> Iterator[Entry]:
    """Rows of a parquet file, row group by row group; only the wanted columns are read."""
    arrow, parquet = _arrow()
    damaged = (OSError, ValueError, arrow.ArrowException)
    try:
        file = parquet.ParquetFile(path)
    except damaged as error:
        yield Skipped(f"{path}: no readable parquet file ({error})")
        return
    with file:
        columns = [name for name in file.schema_arrow.names if name in wanted] or None
        start = 0
        for group in range(file.num_row_groups):
            number, stop = start, start + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(ROWS, row_groups=[group], columns=columns):
                    for record in batch.to_pylist():
                        yield str(number), record
                        number += 1
            except damaged as error:
                yield Skipped(f"{path}: rows {number} to {stop - 1} cannot be read ({error})")
            start = stop


def table_columns(path: str) -> list[str]:
    """Names of a parquet file's columns; none where it cannot be read."""
    arrow, parquet = _arrow()
    try:
        return parquet.read_schema(path).names
    except (OSError, ValueError, arrow.ArrowException):
        return []


def json_records(path: str, wanted: set[str]) -> Iterator[Entry]:
    """Objects of a JSON list, or of lines; `.gz` is unpacked on the way."""
    opened = gzip.open if path.lower().endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", errors="replace") as file:
            lines = enumerate(file)
            start, first = next(((n, line) for n, line in lines if line.strip()), (0, ""))
            if first.lstrip().startswith("["):
                yield from _listed(first + file.read(), path)
                return
            for number, line in itertools.chain([(start, first)], lines):
                if line.strip():
                    yield _line(line, number, path)
    except (OSError, EOFError, zlib.error) as error:
        yield Skipped(f"{path}: cut off or damaged, the rest of the file is lost ({error})")


def _line(line: str, number: int, path: str) -> Entry:
    try:
        return _object(json.loads(line), number, path)
    except ValueError as error:
        return Skipped(f"{path}: line {number + 1} is no JSON ({error})")


def _listed(text: str, path: str) -> Iterator[Entry]:
    """Objects of a list one by one: only its text is held, and what stands before a cut is used."""
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    for number in itertools.count():
        at = BETWEEN.match(text, at).end()
        if text[at : at + 1] == "]":
            return
        try:
            found, at = decoder.raw_decode(text, at)
        except ValueError as error:
            yield Skipped(f"{path}: cut off or damaged behind {number} records ({error})")
            return
        yield _object(found, number, path)


def _object(found: Any, number: int, path: str) -> Entry:
    if isinstance(found, dict):
        return str(number), found
    return Skipped(f"{path}: record {number} is no object but a {type(found).__name__}")


def csv_records(path: str, wanted: set[str]) -> Iterator[Entry]:
    """Rows of a comma-separated file with a header."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        try:
            for number, row in enumerate(csv.DictReader(file)):
                yield str(number), {name: value for name, value in row.items() if name is not None}
        except csv.Error as error:
            yield Skipped(f"{path}: the rest of the file is lost ({error})")


def text_records(path: str, wanted: set[str]) -> Iterator[Entry]:
    """Paragraphs of a text, which blank lines part."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        paragraphs = (lines for blank, lines in itertools.groupby(file, lambda line: not line.strip()) if not blank)
        for number, lines in enumerate(paragraphs):
            yield str(number), {"text": "".join(lines)}


READERS = {  # by how a file's name ends
    ".tar": tar_records,
    ".tar.gz": tar_records,
    ".tgz": tar_records,
    ".parquet": table_records,
    ".json": json_records,
    ".jsonl": json_records,
    ".json.gz": json_records,
    ".jsonl.gz": json_records,
    ".csv": csv_records,
    ".txt": text_records,
}


def kind_of(path: str) -> str | None:
    """The end of a file's name that has a reader."""
    return next((end for end in READERS if path.lower().endswith(end)), None)


def open_hub(name: str, subset: str, split: str, option: str) -> Any:
    """A dataset of the Hugging Face hub, or a folder laid out as one, streamed and undecoded.

    Raises UserError where `datasets` is not installed or the dataset cannot be opened.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{option}: datasets of the hub need the package datasets: pip install 'dualtoken[data]'"
        ) from None
    try:
        dataset = datasets.load_dataset(name, subset or None, split=split, streaming=True)
        return dataset.decode(False) if dataset.features else dataset  # unknown ones are not decoded anyway
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: cannot open hub:{name} ({str(error).splitlines()[0]})") from None


def hub_records(dataset: Any, shard: int, name: str) -> Iterator[Entry]:
    """Rows of one data file of a streamed dataset."""
    number = 0
    try:
        # By batches of one: plain iteration deals the rows to loading processes a second time.
        for batch in dataset.shard(num_shards=dataset.num_shards, index=shard).iter(batch_size=1):
            yield str(number), {name: values[0] for name, values in batch.items()}
            number += 1
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        yield Skipped(f"{name}: the rest behind row {number} cannot be read ({error})")


def downloads(folder: Path) -> dict[str, str]:
    """Address -> path in `folder` of the pictures that img2dataset loaded into it (its output format "files")."""
    found = {}
    for table in sorted(folder.glob("*.parquet")):
        for _, row in (e for e in table_records(str(table), {"url", "key", "status"}) if not isinstance(e, Skipped)):
            if row.get("status") == "success":
                found[row["url"]] = f"{table.stem}/{row['key']}.jpg"
    return found


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need the package pyarrow: pip install 'dualtoken[data]'") from None
    return pyarrow, pyarrow.parquet
