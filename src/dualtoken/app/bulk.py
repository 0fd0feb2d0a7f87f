"""`dualtoken encode SHARDS --out DIR`: shards of pictures to shards of codes, each whole or not there.

A process goes through its shards in one line of work, so that the device does not wait between two of them:

    headers of a shard -> lists of pictures -> decoded by worker processes -> codes on the device -> draft -> shard

Beside `DIR/000.tar` stands `DIR/000.json`, written after it: what was encoded, what was skipped, by which tokenizer.
A shard with that file is finished, so the same command goes on where a killed one stopped. Shards are dealt to the
processes of `accelerate launch` by number; they never wait for each other.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dualtoken.core.errors import UserError, whole_number
from dualtoken.core.files import whole_or_not_at_all
from dualtoken.core.images import IMAGE_SUFFIXES, fit_image, image_bytes, read_image, to_float
from dualtoken.data.code_shards import CARRIED, CodeFormat, CodeShardWriter
from dualtoken.data.tar_shards import TarSample, find_shards, index_tar
from dualtoken.tokenizer.fingerprint import fingerprint
from dualtoken.tokenizer.presets import open_tokenizer

AHEAD = 4  # batches that each worker decodes ahead
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True)
class BulkConfig:
    """How pictures become codes.

    Args: batch_size: pictures at once; workers: processes that decode pictures, 0 = none beside this one.
    """

    model: str = "mini"
    batch_size: int = 64
    workers: int = 4
    precision: Precision = "no"

    def __post_init__(self) -> None:
        whole_number("--batch_size", self.batch_size, 1)
        whole_number("--workers", self.workers, 0)


class Job(NamedTuple):
    """A shard of pictures and the shard of codes to make of it."""

    source: str
    output: str

    @property
    def summary(self) -> Path:
        """Where the summary stands: the last thing written of a finished shard."""
        return Path(self.output).with_suffix(".json")


class Encoder:
    """The tokenizer on its device, and what its codes are."""

    def __init__(self, config: BulkConfig, device: torch.device | str):
        tokenizer = open_tokenizer(config.model)
        self.config, self.size = config, tokenizer.image_size
        branches = tokenizer.pixel.quantizer.config, tokenizer.semantic.quantizer.config
        self.format = CodeFormat(
            pixel=(tokenizer.positions, branches[0].depth),
            semantic=(tokenizer.positions + tokenizer.backbone.prefix, branches[1].depth),
            codebooks=(branches[0].codebook_size, branches[1].codebook_size),
            tokenizer=fingerprint(tokenizer),
        )
        tokenizer.decoder = None  # codes do not need it
        self.tokenizer = tokenizer.to(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> list[bytes]:
        """Images uint8 [B, 3, S, S] -> the packed codes of each. Quantisers compute in float32 at any precision."""
        device, dtype = self.tokenizer.device, DTYPES[self.config.precision]
        images = to_float(images.to(device, non_blocking=True))
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return self.format.pack(self.tokenizer.encode(images))


class Part(NamedTuple):
    """What a worker is asked for: some pictures of one shard, by number of its job."""

    job: int
    source: str
    samples: list[TarSample]


class Decoded(NamedTuple):
    """What a worker made of it."""

    job: int
    images: Tensor  # uint8 [B, 3, S, S]
    keys: list[str]
    beside: list[dict[str, bytes]]  # files that are taken along, by suffix
    skipped: list[dict[str, str]]  # name and reason


class Parts:
    """Lists of pictures of every job in turn, at least one a job; headers are read when a shard's turn comes."""

    def __init__(self, jobs: Sequence[Job], batch_size: int):
        self.jobs, self.batch_size = jobs, batch_size
        self.damage: dict[int, str] = {}

    def __iter__(self) -> Iterator[Part]:
        for number, job in enumerate(self.jobs):
            index = index_tar(job.source)
            self.damage[number] = index.damage
            samples = [sample for sample in index.samples if sample.picture]
            for start in range(0, max(1, len(samples)), self.batch_size):
                yield Part(number, job.source, samples[start : start + self.batch_size])


class Decoding(Dataset):
    """A part -> its decoded pictures, in a worker process.

    A picture that cannot be decoded, for whatever reason, is skipped and named. A shard that cannot be read raises
    OSError and ends the run: a disk that fails is not a damaged picture, and the run can go on later.
    """

    def __init__(self, size: int):
        self.size = size

    def __getitem__(self, part: Part) -> Decoded:
        images, keys, beside, skipped = [], [], [], []
        with open(part.source, "rb") as shard:
            for sample in part.samples:
                content = sample.picture.read(shard)
                files = {k: sample.parts[k].read(shard) for k in CARRIED if k in sample.parts}
                try:
                    images.append(image_bytes(fit_image(read_image(content, sample.key), self.size)))
                except Exception as error:  # Pillow raises many kinds; one odd file of millions must not end a run
                    reason = str(error).removeprefix(f"{sample.key}: ") or type(error).__name__
                    skipped.append({"name": sample.key, "reason": reason})
                    continue
                keys.append(sample.key)
                beside.append(files)
        stacked = torch.stack(images) if images else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return Decoded(part.job, stacked, keys, beside, skipped)


def encode_jobs(encoder: Encoder, jobs: Sequence[Job], quiet: bool | None = None) -> Iterator[dict[str, Any]]:
    """Encode shards, one after the other, and give the summary of each once it is finished."""
    if not jobs:
        return
    config, parts = encoder.config, Parts(jobs, encoder.config.batch_size)
    loader = DataLoader(
        Decoding(encoder.size),
        batch_size=None,
        sampler=parts,
        num_workers=config.workers,
        prefetch_factor=AHEAD if config.workers else None,
        pin_memory=encoder.tokenizer.device.type == "cuda",
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(0),
    )
    with tqdm(desc="pictures", unit=" pictures", position=1, disable=quiet) as progress:
        for number, batches in itertools.groupby(loader, lambda batch: batch.job):
            job, encoded, skipped = jobs[number], 0, []
            with CodeShardWriter(Path(job.output), encoder.format) as shard:
                for batch in batches:
                    packed = encoder(batch.images) if batch.keys else []
                    for key, codes, beside in zip(batch.keys, packed, batch.beside, strict=True):
                        shard.add(key, codes, beside)
                    encoded, skipped = encoded + len(packed), skipped + batch.skipped
                    progress.update(len(packed))
            summary = {
                **_settings(encoder, job),
                **asdict(encoder.format),
                "bytes": Path(job.output).stat().st_size,
                "encoded": encoded,
                "skipped": skipped,
                "damage": parts.damage[number],
            }
            with whole_or_not_at_all(job.summary) as draft:
                draft.write_text(json.dumps(summary, indent=1) + "\n")
            yield summary


def _as_it_is(decoded: Decoded) -> Decoded:
    return decoded


def _settings(encoder: Encoder, job: Job) -> dict[str, Any]:
    """What a finished shard must have been made of and by, to be passed over."""
    return {
        "tokenizer": encoder.format.tokenizer,
        "precision": encoder.config.precision,
        "source": Path(job.source).name,
        "source_bytes": Path(job.source).stat().st_size,
    }


def finished(encoder: Encoder, job: Job) -> dict[str, Any] | None:
    """The summary of a finished shard, None of another. Raises UserError where it was made otherwise."""
    if not job.summary.is_file():
        return None
    try:
        summary = json.loads(job.summary.read_text())
        found = {name: summary[name] for name in ("bytes", "encoded", "skipped", *_settings(encoder, job))}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--output: {job.summary} is no summary of a shard of codes; take another folder") from None
    for name, wanted in _settings(encoder, job).items():
        if found[name] != wanted:
            raise UserError(
                f"--output: {job.output} was made with another {name} ({found[name]} there, {wanted} here); take "
                f"another folder, or remove {job.summary.name} to encode it again"
            )
    whole = Path(job.output).is_file() and Path(job.output).stat().st_size == summary["bytes"]
    return summary if whole else None


def find_jobs(path: str, output: str | None) -> list[Job]:
    """The shards of a folder or pattern with their places below `output`; none where `path` has no tars.

    Raises UserError for shards without an output, for one that would replace them, and for a folder that also holds
    pictures.
    """
    shards = find_shards(path, "PATH")
    if not shards:
        return []
    if output is None:
        raise UserError("--output: give the folder for the shards of codes (--out DIR)")
    if Path(path).is_dir():
        if Path(output).resolve() == Path(path).resolve():
            raise UserError(f"--output {output}: is the folder of the shards; give another one")
        inside = Path(output).resolve()
        shards = {name: shard for name, shard in shards.items() if not shard.resolve().is_relative_to(inside)}
        pictures = (p for p in Path(path).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if any(not picture.resolve().is_relative_to(inside) for picture in pictures):
            raise UserError(f"PATH {path}: holds pictures and shards; give {Path(path) / '*.tar'}, or only pictures")
    jobs = [Job(str(shard.resolve()), str((Path(output) / name).resolve())) for name, shard in shards.items()]
    same = next((job for job in jobs if job.source == job.output), None)
    if same:
        raise UserError(f"--output {output}: would replace the shard {same.source}; give another folder")
    return jobs


def encode_shards(jobs: Sequence[Job], output: str, config: BulkConfig) -> None:
    """Encode this process's share of the jobs that are not finished, and say what came of it."""
    without = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=without)
    encoder = Encoder(config, state.device)
    share = jobs[state.process_index :: state.num_processes]
    done = {job: finished(encoder, job) for job in share}  # before any work, as it may raise
    waiting = [job for job in share if done[job] is None]
    quiet = None if state.is_main_process else True
    summaries = [summary for summary in done.values() if summary]
    with tqdm(desc="shards", unit=" shards", total=len(share), initial=len(summaries), disable=quiet) as progress:
        for summary in encode_jobs(encoder, waiting, quiet):
            summaries.append(summary)
            progress.update()
    who = f"process {state.process_index} of {state.num_processes}: " if state.num_processes > 1 else ""
    print(who + report(summaries, output, len(share) - len(waiting)))
    if state.num_processes == 1:
        check_any(summaries)


def report(summaries: Sequence[dict[str, Any]], output: str, before: int) -> str:
    """What was encoded and skipped, in a few lines; `before` shards were finished already."""
    skipped = [f"{s['source']}:{skip['name']}: {skip['reason']}" for s in summaries for skip in s["skipped"]]
    damaged = [f"{s['source']}: {s['damage']}" for s in summaries if s["damage"]]
    earlier = f", {before} of them before" if before else ""
    lines = [f"{sum(s['encoded'] for s in summaries)} pictures of {len(summaries)} shards{earlier} -> {output} "
             f"({sum(s['bytes'] for s in summaries):,} bytes)"]  # fmt: skip
    if skipped:
        lines.append(f"skipped {len(skipped)} pictures (listed in {output}/*.json), the first: {skipped[0]}")
    if damaged:
        lines.append(f"{len(damaged)} shards are damaged, used as far as they go, the first: {damaged[0]}")
    return "\n".join(lines)


def check_any(summaries: Sequence[dict[str, Any]]) -> None:
    """Raise UserError where not one picture was encoded."""
    if not any(summary["encoded"] for summary in summaries):
        raise UserError(f"no picture could be used of {len(summaries)} shards")
