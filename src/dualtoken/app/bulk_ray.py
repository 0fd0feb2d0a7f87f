"""`dualtoken encode --engine ray`: the shards of a folder over a Ray cluster that sees the same files.

Ray Data, not plain Ray tasks: it keeps a pool of actors, so that the tokenizer is loaded once a device and not once a
shard, hands a shard to whichever actor is free, starts an actor that died again and gives it its shard once more. A
shard is a block of its own, so no finished work is lost with an actor. What is finished is seen from the files, as
with the local engine, and the files are the same.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dualtoken.app.bulk import BulkConfig, Encoder, Job, check_any, encode_jobs, finished, report
from dualtoken.core.errors import UserError

RETRIES = 3  # of a shard whose actor died: one that always kills its actor must not go round for ever


class ShardEncoder:
    """An actor: holds the tokenizer and encodes a shard a call."""

    def __init__(self, config: dict[str, Any]):
        self.encoder = Encoder(BulkConfig(**config), "cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        job = Job(row["source"], row["output"])
        summary = finished(self.encoder, job) or next(encode_jobs(self.encoder, [job], quiet=True))
        return {"summary": json.dumps(summary)}


def encode_with_ray(jobs: Sequence[Job], output: str, config: BulkConfig, processes: int = 0) -> None:
    """Encode the jobs that are not finished on a Ray cluster, or on this machine where none is running.

    Args: processes: actors at once; 0 = one for each GPU of the cluster, without GPUs one for each CPU.
    Raises UserError where ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError("--engine ray needs the extra `ray`: pip install 'dualtoken[ray]'") from None
    if Path(config.model).is_dir():
        config = replace(config, model=str(Path(config.model).resolve()))  # actors have folders of their own
    encoder = Encoder(config, "cpu")
    done = [finished(encoder, job) for job in jobs]
    summaries = [summary for summary in done if summary]
    waiting = [job for job, summary in zip(jobs, done, strict=True) if not summary]
    if waiting:
        if not ray.is_initialized():
            ray.init()  # RAY_ADDRESS, else a cluster running here, else one of this machine
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        actors = min(processes or gpus or int(resources.get("CPU", 1)), len(waiting))
        rows = ray.data.from_items([job._asdict() for job in waiting], override_num_blocks=len(waiting))
        encoded = rows.map(
            ShardEncoder,
            compute=ray.data.ActorPoolStrategy(size=actors),
            fn_constructor_kwargs={"config": asdict(config)},
            num_cpus=None if gpus else 1,
            num_gpus=1 if gpus else None,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        summaries += [json.loads(row["summary"]) for row in encoded.iter_rows()]
    print(report(summaries, output, len(jobs) - len(waiting)))
    check_any(summaries)
