"""Teachers and heads under DeepSpeed and FSDP: sharded like the student, and read without gathering whole models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def prepare_teacher(teacher: PreTrainedModel, accelerator: Accelerator, device: torch.device) -> nn.Module:
    """Puts a frozen teacher where it is called: sharded as the student will be, else whole on this process's device.

    Under ZeRO-3 and FSDP every process holds a part of it, and gathers one layer at a time while it runs. ZeRO-1 and 2
    shard gradients and optimizer states, of which a teacher has none. One that is spread by ``device_map`` stays there.
    """
    teacher.eval().requires_grad_(False)
    if getattr(teacher, "hf_device_map", None) is not None:
        return teacher
    plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == "DEEPSPEED" else None
    if plugin is not None and plugin.zero_stage == 3:
        from trl.models.utils import prepare_deepspeed

        return prepare_deepspeed(teacher, accelerator)
    if accelerator.distributed_type == "FSDP":
        return _prepare_fsdp(teacher, accelerator)
    return teacher.to(device)


@contextmanager
def gathered(weight: Tensor) -> Iterator[Tensor]:
    """The whole of a weight that no gradient is wanted of, as long as the block runs: a sharded teacher's head."""
    if hasattr(weight, "ds_id"):  # ZeRO-3 leaves an empty tensor where a parameter is not gathered
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            yield weight
    else:
        yield whole(weight)


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
