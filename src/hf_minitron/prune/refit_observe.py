"""The pass of the source in which refit sees what its residual stream is like, and chooses the directions to keep."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_minitron.prune.layerwise import LayerwiseModel, LoadedLayer
from hf_minitron.prune.refit_basis import Basis, StreamStatistics, rotate, select_channels
from hf_minitron.prune.refit_moments import CrossMoments
from hf_minitron.prune.refit_streams import Batch, StreamStore
from hf_minitron.prune.target import PruneConfig

logger = logging.getLogger(__name__)


class StreamObserver:
    """Chooses the basis of ``hidden_size`` directions for ``model`` from the batches that are fitted.

    Afterwards ``info`` says in the lineage's words what the stream is like, and ``energies`` (d,) holds the mean square
    of every channel, as read.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        batches: Sequence[Batch],
        prune: PruneConfig,
        hidden_size: int,
        max_bytes: float,
    ):
        self._model, self._prune, self._hidden_size, self._max_bytes = model, prune, hidden_size, max_bytes
        self._family, self._batches = model.family, [batch for batch in batches if not batch.held_out]
        self._statistics = StreamStatistics()
        self.info: dict[str, Any] = {}
        self.energies: Tensor | None = None

    def choose(self, bar: tqdm | None = None) -> Basis:
        """A rotation where family and embedding allow it, else a selection of channels."""
        scale = self._tied_scale()
        rotates = self._family.can_rotate and scale is not None and "rotation" not in self._prune.refit_without
        self._observe(scale if rotates else None, bar)
        statistics = self._statistics
        self.energies = statistics.covariance.diagonal() / (scale.square() if rotates else 1.0)
        if rotates:
            reader_aware = "readers_in_basis" not in self._prune.refit_without
            basis = rotate(statistics, self._hidden_size, scale, reader_aware)
        else:
            basis = select_channels(statistics, self._hidden_size, "elimination" not in self._prune.refit_without)
        self.info = {"basis": "rotated" if rotates else "selected"} | statistics.describe(basis)
        logger.info(
            "the stream has an effective rank of %.1f of %d; %d directions keep %.2f %% of its energy",
            self.info["effective_rank"],
            len(statistics.covariance),
            self._hidden_size,
            100 * self.info["energy_kept"],
        )
        return basis

    def _tied_scale(self) -> Tensor | None:
        """The diagonal of D: ones, or √final gain where the head is tied; None where a gain is not positive."""
        gain = self._final_norm.weight + self._family.gain_offset
        if not self._model.config.tie_word_embeddings:
            return torch.ones_like(gain)
        return gain.sqrt() if bool((gain > 0).all()) else None

    @property
    def _final_norm(self) -> nn.Module:
        return self._model.model.get_submodule(self._family.final_norm)

    def _observe(self, scale: Tensor | None, bar: tqdm | None) -> None:
        """Moments of all that reads the stream, layer by layer: of n(D h) with ``scale``, else of what norms give."""
        states = StreamStore(self._max_bytes)
        for number, batch in enumerate(self._batches):
            states[number] = self._model.embed(batch.input_ids)
        for index in range(self._model.num_layers):
            with self._model.layer(index) as layer:
                for half in (0, 1):
                    self._observe_half(layer, half, states, scale)
            if bar is not None:
                bar.update()
        moments = CrossMoments()
        for number in range(len(self._batches)):
            last = states[number].to(self._model.device)
            moments.add(self._model.normalize(last) if scale is None else self._unit(last, scale))
        head = self._model.model.get_parameter(self._family.head)
        self._note(moments, self._gram([head], self._final_norm, scale))

    def _observe_half(self, layer: LoadedLayer, half: int, states: StreamStore, scale: Tensor | None) -> None:
        moments = CrossMoments()
        for number in range(len(self._batches)):
            before = states[number].to(self._model.device)
            x = layer.read(half, before)
            moments.add(x if scale is None else self._unit(before, scale))
            states[number] = layer.add(half, before, layer.core(half, x)[1])
        norm = self._family.read_norms[half]
        readers = [layer.module.get_parameter(f"{name}.weight") for name in self._family.readers(half)]
        self._note(moments, self._gram(readers, norm and layer.module.get_submodule(norm), scale))

    def _note(self, moments: CrossMoments, gram: Tensor) -> None:
        covariance = moments.xx
        if self._family.read_norms[0] is None:  # raw streams grow along the layers: every place is to count the same
            covariance = covariance / covariance.trace()
        self._statistics.add(covariance, gram)

    def _unit(self, states: Tensor, scale: Tensor) -> Tensor:
        """n(D h): what a norm without gain makes of the scaled stream."""
        scaled = states * scale
        return scaled * torch.rsqrt(scaled.square().mean(-1, keepdim=True) + self._model.config.rms_norm_eps)

    def _gram(self, weights: list[Tensor], norm: nn.Module | None, scale: Tensor | None) -> Tensor:
        """Σ WᵀW of readers, in the coordinates of the moments: with ``scale``, of D h and with gains folded in."""
        factor = 1.0 if scale is None else (norm.weight + self._family.gain_offset) / scale
        return sum(((weight * factor).T @ (weight * factor)).double() for weight in weights)
