"""What processes tell each other."""

import json
from collections import Counter

import torch.distributed as dist
import torch.multiprocessing as mp

from dualtoken.core.distributed import add_counts


def _process(number, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    found = add_counts(Counter({"damaged picture": number + 1, f"only {number}": 1}))
    (folder / f"{number}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_counts_of_two_processes_are_added_up_on_both(tmp_path):
    mp.spawn(_process, (tmp_path,), nprocs=2)
    for number in range(2):
        assert json.loads((tmp_path / f"{number}.json").read_text()) == {"damaged picture": 3, "only 0": 1, "only 1": 1}
    assert add_counts(Counter(alone=1)) == {"alone": 1}
