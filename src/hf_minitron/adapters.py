"""LoRA adapters (peft): which layers get them, and how they are merged back into plain weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


@dataclass
class LoraArguments:
    """Train low-rank adapters beside frozen weights, by Hu et al. (arXiv 2106.09685); off unless `lora_r` is given.

    A weight W [out, in] becomes W + (lora_alpha / lora_r) B A with A [lora_r, in] and B [out, lora_r]; with `use_dora`
    also rescaled by columns' norms that are trained (Liu et al., arXiv 2402.09353).
    """

    lora_r: int | None = field(
        default=None, metadata={"help": "Rank of LoRA adapters to train instead of all weights (default: none)."}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Adapters are scaled by lora_alpha / lora_r (default: twice lora_r)."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' inputs."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Ends of the names of layers that get adapters, such as q_proj (default: all but the head)."},
    )
    use_dora: bool = field(default=False, metadata={"help": "DoRA: also train the weights' magnitudes."})

    def __post_init__(self) -> None:
        if self.lora_r is None:
            given = {"lora_alpha": self.lora_alpha, "lora_target_modules": self.lora_target_modules}
            given |= {"use_dora": self.use_dora or None, "lora_dropout": self.lora_dropout or None}
            if names := [name for name, value in given.items() if value is not None]:
                raise ValueError(f"{', '.join(names)} without lora_r: there are no adapters. Give --lora-r, say 16.")
            return
        if self.lora_r < 1:
            raise ValueError(f"lora_r={self.lora_r} is no rank: use at least 1, or leave it out to train all weights.")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha={self.lora_alpha} would scale the adapters to nothing: use a number above 0.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout} is not a probability below 1.")


def add_adapters(model: PreTrainedModel, arguments: LoraArguments) -> PeftModel:
    """`model` with fresh adapters, which are all that is left to train; they start as nothing (B = 0).

    Raises ValueError when a target's name matches no linear layer, or is the head's, whose weight the loss reads.
    """
    return get_peft_model(model, adapter_config(model, arguments))


def adapter_config(model: PreTrainedModel, arguments: LoraArguments) -> LoraConfig:
    """peft's own description of the adapters; errors are those of `add_adapters`."""
    targets = arguments.lora_target_modules or ALL_LINEAR
    if targets != ALL_LINEAR:
        _check_targets(model, targets)
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=2 * arguments.lora_r if arguments.lora_alpha is None else arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        use_dora=arguments.use_dora,
        task_type="CAUSAL_LM",
    )


def merged_copy(model: PeftModel, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A whole, plain model with the adapters merged in, from the gathered `state` of one that may be in parts.

    The tensors of `state` are taken over and changed. Quantized weights must have been put back: `plain_state`.
    """
    with torch.device("meta"):
        inner = model.get_base_model()
        config = copy.deepcopy(inner.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        whole = get_peft_model(type(inner)(config), model.active_peft_config)
    whole.load_state_dict(state, assign=True)
    whole.get_base_model().tie_weights()
    return whole.merge_and_unload()


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """A whole model's state on the CPU, the weights of quantized layers as they are used: as floating-point numbers."""
    state = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
    for layer, module in model.named_modules():
        weight = module._parameters.get("weight")  # not that of the layer which an adapter stands beside
        if isinstance(weight, nn.Parameter) and not weight.is_floating_point():
            for name in [name for name in state if name.startswith(f"{layer}.weight") or name == f"{layer}.SCB"]:
                del state[name]
            state[f"{layer}.weight"] = dequantize_module_weight(module).detach().cpu()
    return state


def _check_targets(model: PreTrainedModel, targets: list[str]) -> None:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = model.get_output_embeddings()
    there = sorted({name.rpartition(".")[2] for name in linear if model.get_submodule(name) is not head})
    for target in targets:
        found = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not found:
            raise ValueError(f"lora_target_modules: {target!r} is the name of no linear layer. There are {there}.")
        if any(model.get_submodule(name) is head for name in found):
            raise ValueError(
                f"lora_target_modules: {target!r} is the head, whose own weight the loss reads: what an adapter adds "
                f"would be missed. Use some of {there}."
            )
