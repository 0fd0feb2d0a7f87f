"""FSDP2: weights, gradients and moments of the MLLM split over the processes (accelerate on torch's fully_shard).

What is frozen and small stays whole: the vision tokenizer, of which training on stored codes needs two projections.
Every layer of the LLM is a group of its own, gathered when it is its turn; embeddings, projector and heads are
gathered for the whole pass, because a batch may draw nothing, and then some processes would wait for a gathering
of the heads that others never ask for.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from dualtoken.core.checkpoint import finish_draft, flatten, read_shards, readable, start_draft, unflatten
from dualtoken.core.distributed import on_main
from dualtoken.core.errors import UserError


def shard_plugin() -> FullyShardedDataParallelPlugin:
    """How accelerate is to shard; what it does not say (offloading, resharding) comes from `accelerate config`."""
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )


def allow_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Shard on CPUs too, as tests do: accelerate knows FSDP on accelerators alone, torch's works on both."""
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin


def shard(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
    """Split a `DualTokenForConditionalGeneration`, in place, and give its optimizer the pieces to learn."""
    plugin = accelerator.state.fsdp_plugin
    layers = set(model.llm._no_split_modules or ())
    present = {type(module).__name__ for module in model.llm.modules()}
    plugin.transformer_cls_names_to_wrap = sorted(layers & present)
    plugin.ignored_modules = [model.vision_tokenizer]
    if accelerator.mixed_precision != "no":  # sums over many processes need more than 16 bits
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.device.type == "cpu":  # gloo has no mean
        for module in _sharded(model):
            module.set_force_sum_reduction_for_comms(True)
    return model, optimizer


def save_shards(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """`save_state` where tensors are split: every process writes its pieces. The folder is one that all see.

    Raises OSError on all processes where one of them cannot write.
    """
    draft = on_main(lambda: start_draft(folder, step, "draft"))
    tree, tensors = flatten(state)
    split = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    try:
        dcp.save(split, storage_writer=dcp.HuggingFaceStorageWriter(str(draft), save_distributed=True))
    except dcp.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((c for c in causes if isinstance(c, OSError)), causes[0]) from None
    whole = {name: tensor for name, tensor in tensors.items() if name not in split}
    return on_main(lambda: finish_draft(draft, step, tree, whole, keep))


def load_shards(place: Path, weights: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state, split or whole on disk, read into split weights and into moments for them: each process reads its own.

    Raises UserError where the folder is damaged.
    """
    _fill_moments(getattr(optimizer, "optimizer", optimizer))
    split = flatten({"model": weights, "optimizer": optimizer.state_dict()})[1]
    split = {name: tensor for name, tensor in split.items() if isinstance(tensor, DTensor)}
    try:
        with readable(place) as head:
            read_shards(place, split)
            return unflatten(head["tree"], load_file(place / "state.safetensors") | split)
    except UserError:
        optimizer.state.clear()
        raise


def _fill_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make the moments, which else come with the first step, so that a state can be read into them."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def gather(model: nn.Module, keep: bool) -> None:
    """Put whole parameters, on the CPU, in the place of split ones; `keep` them on the main process alone.

    All processes must call it, and where they are kept the model is an ordinary one again.
    """
    for module in _sharded(model):
        module.reshard()
    whole: dict[int, nn.Parameter | None] = {}  # tied ones stay tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in whole:
                full = parameter.detach().full_tensor()
                whole[id(parameter)] = nn.Parameter(full.cpu(), parameter.requires_grad) if keep else None
            if keep:
                module._parameters[name] = whole[id(parameter)]
    for module in _sharded(model) if keep else ():
        module.__class__ = type(module).__mro__[type(module)._orig_cls_mro_index]


def _sharded(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
