"""Teachers and heads under DeepSpeed and FSDP: sharded like the student, and read without gathering whole models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer

from hf_minitron.whole_weights import zero_stage


def prepare_teacher(teacher: PreTrainedModel, accelerator: Accelerator | None, device: torch.device) -> nn.Module:
    """Puts a teacher where it is called: sharded as the student will be, else whole on this process's device.

    Under ZeRO-3 and FSDP every process holds a part of it, and gathers one layer at a time while it runs. ZeRO-1 and 2
    shard gradients and optimizer states, of which a frozen teacher has none. One that is spread by ``device_map`` stays
    there.
    """
    if getattr(teacher, "hf_device_map", None) is not None:
        return teacher
    if accelerator is None:
        return teacher.to(device)
    if zero_stage(accelerator) == 3:
        from trl.models.utils import prepare_deepspeed

        return prepare_deepspeed(teacher, accelerator)
    if accelerator.distributed_type == "FSDP":
        return _prepare_fsdp(teacher, accelerator)
    return teacher.to(device)


@contextmanager
def prepared_evaluation(trainer: Trainer) -> Iterator[None]:
    """Lets a student be evaluated before it was trained, where transformers 5.23 and accelerate 1.15 refuse to.

    FSDP2 wants an optimizer beside the model, which there is none of yet: the student is sharded without. DeepSpeed
    evaluates under ZeRO-3 only: under the others every process holds a whole student, which runs as it is.
    """
    accelerator = trainer.accelerator
    if accelerator.is_fsdp2:
        if not accelerator._models:
            trainer.model = trainer.model_wrapped = _prepare_fsdp(trainer.model, accelerator)
            accelerator._models.append(trainer.model)
        yield
        # accelerate keeps the head gathered for a backward pass: an optimizer built now would take it for whole.
        for module in trainer.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    elif trainer.is_deepspeed_enabled and trainer.deepspeed is None and zero_stage(accelerator) != 3:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        trainer.deepspeed = trainer.model.to(trainer.args.device)
        accelerator._models.append(trainer.model)
        try:
            with torch.autocast(trainer.args.device.type, dtype, enabled=dtype is not None):
                yield
        finally:
            trainer.deepspeed = None
            accelerator._models.pop()
    else:
        yield


@contextmanager
def gathered(head: nn.Module) -> Iterator[Tensor]:
    """The whole weight of a frozen, perhaps sharded head, as long as the block runs."""
    if hasattr(head.weight, "ds_id"):  # ZeRO-3 leaves an empty tensor where a parameter is not gathered
        import deepspeed

        with deepspeed.zero.GatheredParameters([head.weight]):
            yield head.weight
        return
    yield whole(head.weight)
    if isinstance(head, FSDPModule):  # accelerate keeps heads gathered for a backward pass, which no teacher has
        head.reshard()


@contextmanager
def redirected_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Lets `module` run `forward` while called through its wrapper, whose hooks (DDP, DeepSpeed, FSDP) still run."""
    own = module.__dict__.get("forward")  # accelerate sets one for mixed precision
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether every process holds only a part of each weight: ZeRO-3 and FSDP."""
    return zero_stage(accelerator) == 3 or accelerator.distributed_type == "FSDP"


def whole(weight: Tensor) -> Tensor:
    """A weight as one plain tensor; gradients flow back to the shards of FSDP2."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _prepare_fsdp(teacher: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """By accelerate's own wrapping for version 2, layer by layer; TRL's for version 1."""
    if accelerator.is_fsdp2:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, teacher)
    from trl.models.utils import prepare_fsdp

    return prepare_fsdp(teacher, accelerator)
