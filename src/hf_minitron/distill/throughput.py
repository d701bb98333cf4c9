"""Tokens per second and model FLOP utilisation between two logs."""

from __future__ import annotations

import time

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_minitron.hardware import peak_flops


class Throughput:
    """Counts wall-clock seconds of training, evaluations left out.

    A step takes 6·N FLOPs per token for a student of N parameters (2·N forward, 4·N backward) and 2·N for a teacher,
    heads included, input embeddings (look-ups) and attention scores not; recomputed activations do not count, as in
    PaLM (arXiv 2204.02311, appendix B). A model with frozen weights, such as with LoRA, gets 4·N and 2·N for what
    trains; so does a teacher that is corrected meanwhile. Tokens are targets: padding and the first token of a row are
    no use.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, device: torch.device, processes: int
    ) -> None:
        self.flops_per_token = sum(_flops_per_token(model) for model in (student, teacher) if model is not None)
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_flops(gpu)
        self.peak = None if peak is None else peak * processes
        self.restart()

    def restart(self) -> None:
        """Begins a new interval."""
        self._start = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Takes an evaluation out of the interval."""
        self._start += seconds

    def measures(self, num_tokens: int) -> dict[str, float]:
        """`tokens_per_second` of all processes and, on known GPUs, `flop_utilisation` (0 to 1). Restarts."""
        speed = num_tokens / max(time.perf_counter() - self._start, 1e-9)
        self.restart()
        known = {} if self.peak is None else {"flop_utilisation": speed * self.flops_per_token / self.peak}
        return {"tokens_per_second": speed} | known


def _flops_per_token(model: PreTrainedModel) -> int:
    trained = count_matrix_parameters(model, trained=True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return 2 * count_matrix_parameters(model)
    return 4 * count_matrix_parameters(model) + 2 * trained


def count_matrix_parameters(model: PreTrainedModel, trained: bool = False) -> int:
    """Parameters that a token is multiplied with: all but input embeddings, unless those are the head too.

    Sharded ones count whole. With `trained`, only those that require a gradient.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    skipped = {id(p) for p in embeddings.parameters()} - {id(p) for p in head.parameters()}
    parameters = (p for p in model.parameters() if id(p) not in skipped and (p.requires_grad or not trained))
    return sum(_numel(p) for p in parameters)


def count_trained(model: nn.Module) -> int:
    """Parameters that require a gradient; sharded ones count whole."""
    return sum(_numel(parameter) for parameter in model.parameters() if parameter.requires_grad)


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", None) or parameter.numel()
