"""The decoder layers of a model, run one by one: with hidden states of our own, and all else as the model gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_minitron.architectures import get_family

LOGIT_BYTES = 1 << 28  # of fp32 logits alive at a time


class LayerReplay:
    """Runs the layers of ``model`` on one batch ``input_ids`` (rows, tokens), in any order and selection.

    Masks, position embeddings and whatever else a layer is given are taken from the model's own forward, in which the
    layers are skipped, so that every family works and the results are the model's, bit for bit. ``states`` are hidden
    states (rows, tokens, hidden_size); ``first`` are those that enter layer 0. ``num_evaluations`` counts layer runs.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor):
        self.model, self.input_ids = model, input_ids
        self._layers = list(model.get_submodule(get_family(model.config).layers))
        self._forwards = [layer.forward for layer in self._layers]
        self._calls: list[tuple[tuple, dict[str, Any]]] = []
        self.num_evaluations = 0
        with self._replaced(self._record):
            model.base_model(input_ids=input_ids, use_cache=False)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def run(self, layer: int, states: Tensor) -> Tensor:
        """What one layer makes of ``states``."""
        args, kwargs = self._calls[layer]
        self.num_evaluations += 1
        return self._forwards[layer](states, *args, **kwargs)

    def call(self, layer: int) -> dict[str, Any]:
        """The keyword arguments that the model gives one layer."""
        return self._calls[layer][1]

    def log_probs(self, states: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
        """Per row, the summed log-probability of the tokens after the ``scored`` positions, and whether all are greedy.

        ``states`` have left the last layer; ``scored`` (rows, tokens) marks positions, never the last. Norm and head
        are the model's own. Logits are made for scored positions only, so many at a time as fit in 256 MB.
        """
        sums = torch.zeros(len(states), dtype=torch.float64)
        greedy = torch.ones(len(states), dtype=torch.bool)
        room = max(1, LOGIT_BYTES // (4 * self.model.config.vocab_size))
        num_scored = max(1, int(scored.sum(1).max()))
        for rows in torch.arange(len(states)).split(max(1, room // num_scored)):
            columns = scored[rows].any(0).nonzero().flatten()
            for positions in columns.split(max(1, room // len(rows))):
                chunk, is_best = self._chunk_log_probs(states, rows, positions)
                counted = scored[rows][:, positions]
                sums[rows] += (chunk * counted).sum(1)
                greedy[rows] &= (is_best | ~counted).all(1)
        if not torch.isfinite(sums).all():
            raise ValueError(
                "log-probabilities are NaN or Inf, so nothing can be ranked. Check the checkpoint's weights, or use a "
                "wider dtype (float32)."
            )
        return sums, greedy

    def _chunk_log_probs(self, states: Tensor, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (rows, positions) of the tokens that follow, in float64 on the CPU; which are greedy."""
        ids, there = self.input_ids[rows.to(self.input_ids.device)], states[rows.to(states.device)]
        with self._replaced(lambda layer, given, *args, **kwargs: there if layer == self.num_layers - 1 else given):
            logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=positions.to(ids.device)).logits.float()
        following = ids[:, positions.to(ids.device) + 1].to(logits.device)
        log_probs = logits.gather(2, following[..., None])[..., 0] - logits.logsumexp(2)
        return log_probs.double().cpu(), (logits.argmax(2) == following).cpu()

    def _record(self, layer: int, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stands for a layer: notes what it is given, and passes the states on."""
        if layer == 0:
            self.first = states
        self._calls.append((args, kwargs))
        return states

    @contextmanager
    def _replaced(self, stand_in: Callable[..., Tensor]) -> Iterator[None]:
        """Every layer's forward becomes ``stand_in(index, states, ...)``; accelerate's hooks on it wait that long."""
        own = [layer.__dict__.get("forward") for layer in self._layers]
        try:
            for index, layer in enumerate(self._layers):
                layer.forward = _with_index(stand_in, index)
            yield
        finally:
            for layer, forward in zip(self._layers, own, strict=True):
                if forward is not None:
                    layer.forward = forward
                elif "forward" in layer.__dict__:
                    del layer.forward


def _with_index(stand_in: Callable[..., Tensor], index: int) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return stand_in(index, hidden_states, *args, **kwargs)

    return forward
