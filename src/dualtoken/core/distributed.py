"""What the code needs to know about other processes; every function is a no-op on one process."""

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def is_distributed() -> bool:
    """True where a process group with more than one member is running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this process, 0 where there is only one."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """True for the one process that writes files and prints."""
    return rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all processes in place and return it."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Mean of `tensor` over all processes, in place; returns it."""
    return all_reduce_sum(tensor).div_(world_size())


def mean_parts(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scalars -> their means over all processes, without gradient: what the joined batch of equal shares has."""
    means = all_reduce_mean(torch.stack([value.detach().float() for value in parts.values()]))
    return dict(zip(parts, means.unbind(), strict=True))


def any_process(flag: bool, device: torch.device | str = "cpu") -> bool:
    """True everywhere where it is true on one process. `device`: one that the process group can send from."""
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)) > 0)


def add_counts(counts: Counter[str]) -> Counter[str]:
    """The counts of all processes together."""
    found: list = [counts] * world_size()
    if is_distributed():
        dist.all_gather_object(found, counts)
    return sum(found, Counter())


def on_main(action: Callable[[], T]) -> T:
    """Do something on the main process while the others wait; its result, or its OSError, on all of them."""
    found: list = [None, None]
    if is_main():
        try:
            found[0] = action()
        except OSError as error:
            found[1] = error
    if is_distributed():
        dist.broadcast_object_list(found, 0)
    if found[1] is not None:
        raise found[1]
    return found[0]
