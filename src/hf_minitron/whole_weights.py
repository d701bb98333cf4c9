"""Whole weights out of a Trainer, whichever engine holds them in parts."""

from __future__ import annotations

from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import Trainer

from hf_minitron.adapters import merged_copy, plain_state


def save_whole(trainer: Trainer, folder: str) -> None:
    """Like `Trainer.save_model` after training, but always whole weights, and DeepSpeed's in fp32 where it trains so.

    Every process must call it; the first one holds the student once more, in its main memory. Settings by which
    checkpoints stay in parts (`zero3_save_16bit_model: false`, `SHARDED_STATE_DICT`) do not matter. Adapters of a
    PeftModel are merged into the weights, so that plain transformers loads what was trained.
    """
    state = _whole_state(trainer)
    if state is None:
        trainer.save_model(folder)
        return
    if isinstance(trainer.model, PeftModel):
        if trainer.is_world_process_zero():
            merged_copy(trainer.model, state).save_pretrained(folder)
        return
    names: dict[int, str] = {}
    for name, parameter in trainer.model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if name in state:  # gathering made copies of tied weights, which would be written twice
            state[name] = state[first]
    trainer._save(folder, state_dict=state)


def save_adapters(trainer: Trainer, folder: str, model: str, revision: str | None) -> None:
    """Writes the adapters of a PeftModel alone, as peft does; they are said to be for `model` at `revision`.

    Every process must call it, as with `save_whole`.
    """
    state = _whole_state(trainer)
    if trainer.is_world_process_zero():
        for config in trainer.model.peft_config.values():
            config.base_model_name_or_path, config.revision = model, revision
        trainer.model.save_pretrained(folder, state_dict=state)


def zero_stage(accelerator: Accelerator) -> int | None:
    """1 to 3 under DeepSpeed, else None."""
    return accelerator.state.deepspeed_plugin.zero_stage if accelerator.distributed_type == "DEEPSPEED" else None


def _whole_state(trainer: Trainer) -> dict[str, Tensor] | None:
    """The trained model's state, gathered; None where the Trainer writes whole weights by itself."""
    if trainer.is_deepspeed_enabled:
        return _zero_state_dict(trainer)
    if trainer.accelerator.is_fsdp2:
        return trainer.accelerator.get_state_dict(trainer.model)
    return plain_state(trainer.model) if isinstance(trainer.model, PeftModel) else None


def _zero_state_dict(trainer: Trainer) -> dict[str, Tensor]:
    """The optimizer's weights, gathered one by one; frozen weights and buffers are those of the model."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    parameters = dict(trainer.model.named_parameters(remove_duplicate=False))
    state = {name: buffer for name, buffer in trainer.model.state_dict().items() if name not in parameters}
    for name, parameter in parameters.items():
        exact = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        with deepspeed.zero.GatheredParameters([parameter], enabled=exact is None and hasattr(parameter, "ds_id")):
            if trainer.is_world_process_zero():
                state[name] = (parameter if exact is None else exact).detach().to("cpu", copy=True)
    return state
