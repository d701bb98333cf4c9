"""Which weights of a teacher are trained when it is corrected: all, adapters beside them, or only the norms' gains."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, set_seed

from hf_minitron.adapters import LoraArguments, add_adapters

CorrectionMethod = Literal["full", "lora", "norm"]
DEFAULT_RANK = 16


def check_method(option: str, method: str) -> None:
    """Raises ValueError for a method that there is not."""
    if method not in get_args(CorrectionMethod):
        raise ValueError(f"{option}={method!r} is unknown. Use one of {', '.join(get_args(CorrectionMethod))}.")


def check_precision(method: str, quantized: bool, dtype: torch.dtype) -> None:
    """Raises ValueError where weights would be trained whose format cannot hold a correction's small steps."""
    if method == "lora":
        return
    if quantized:
        raise ValueError(
            f"A quantized teacher corrected by the method {method}: steps are smaller than what 8 or 4 bits tell "
            "apart. Use the method lora, whose adapters are in float32, or leave the quantization out."
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"A teacher in {str(dtype).removeprefix('torch.')} corrected by the method {method}: steps are too small "
            "for its rounding. Load it in float32 (teacher_dtype; bf16 still computes in bfloat16), or use the method "
            "lora, whose adapters are in float32."
        )


def choose_trained(
    model: PreTrainedModel, method: CorrectionMethod, lora: LoraArguments, seed: int
) -> PreTrainedModel | PeftModel:
    """`model` with gradients for exactly what `method` trains: all weights, fresh adapters, or `norm_parameters`.

    Adapters get rank 16 unless `lora` says otherwise, and start as nothing, from `seed`. Raises ValueError for weights
    in fewer than 32 bits that would be trained themselves, and when nothing is left to train.
    """
    check_precision(method, getattr(model, "is_quantized", False), model.dtype)
    if method == "lora":
        set_seed(seed)
        return add_adapters(model, dataclasses.replace(lora, lora_r=lora.lora_r or DEFAULT_RANK))
    chosen = {*norm_parameters(model)} if method == "norm" else {name for name, _ in model.named_parameters()}
    if not chosen:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(
            f"method=norm: the teacher has no normalization layers, so that no parameter is left to train. Its modules "
            f"are {kinds}. Use the method lora or full."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return model


def norm_parameters(model: nn.Module) -> list[str]:
    """Names of the gains, and biases, of all normalization layers, those of queries and keys included.

    A normalization layer is a module without children that is named like one (LlamaRMSNorm, LayerNorm, ...).
    """
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and not any(module.children())
        for own, _ in module.named_parameters(recurse=False)
    ]
