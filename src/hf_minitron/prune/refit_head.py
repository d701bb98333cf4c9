"""The head's end of refit: the untied head is solved like any reader, then the last norm's gain is fitted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_minitron.architectures import get_logit_transform
from hf_minitron.prune.layerwise import LayerwiseModel
from hf_minitron.prune.refit_gain import HeadInputs, Heads, fit_gain, num_gain_tokens
from hf_minitron.prune.refit_half import Walk
from hf_minitron.prune.refit_moments import Evidence
from hf_minitron.prune.refit_solve import Linear, fit_linear


class HeadRefit:
    """Fits what reads the last states of ``small``, once all its layers are solved, to what ``big`` predicts.

    ``walk.before`` and the student's stream have left the last layers; the outer tensors of ``small`` are its own.
    ``report`` is for the lineage.
    """

    def __init__(self, walk: Walk, big: LayerwiseModel, small: LayerwiseModel):
        self.walk, self.big, self.small, self.family = walk, big, small, big.family
        self.report: dict[str, Any] = {}

    def fit(self) -> dict[str, Tensor]:
        """The tensors that change, by name."""
        found: dict[str, Tensor] = {}
        walk, head = self.walk, self.small.model.get_parameter(self.family.head)
        reads_other_states = not walk.basis.is_identity or walk.student_states is not None
        if walk.uses("readers") and reads_other_states and not self.small.config.tie_word_embeddings:
            head = found[self.family.head] = self._fit_head(head)
        if walk.uses("gain") and not self._keeps_everything:
            found |= self._fit_gain(head)
        return found

    @property
    def _keeps_everything(self) -> bool:
        return self.walk.kept.sizes == self.walk.kept.source_sizes and self.walk.student_states is None

    def _fit_head(self, sliced: Tensor) -> Tensor:
        evidence = Evidence()
        for held_out in (False, True):
            for number, batch in enumerate(self.walk.batches):
                if batch.held_out == held_out:
                    x = self.small.normalize(self.walk.student(number))
                    evidence.add(x, self.big.normalize(self.walk.load(self.walk.before, number)), held_out)
        self.walk.fingerprint.update(evidence.fitted)
        teacher = Linear(self.big.model.get_parameter(self.family.head))
        fit = fit_linear(evidence, Linear(sliced), teacher, ridge=self.walk.prune.refit_ridge, guard=self.walk.guards)
        self.report["head"] = fit.as_dict()
        return fit.linear.weight

    def _fit_gain(self, head: Tensor) -> dict[str, Tensor]:
        """The last norm's weight (and bias), so that predictions come as near to the source's as they can."""
        transform = get_logit_transform(self.big.config)
        heads = Heads(head, self.big.model.get_parameter(self.family.head), transform)
        fitted, held_out = (self._sample(part, head.shape[1]) for part in (False, True))
        gain, self.report["final_gain"] = fit_gain(heads, fitted, held_out, self.walk.prune.refit_ridge)
        found = {}
        for name, parameter in self.small.model.get_submodule(self.family.final_norm).named_parameters():
            offset = self.family.gain_offset if name == "weight" else 0.0
            found[f"{self.family.final_norm}.{name}"] = (parameter + offset) * gain - offset
        return found

    def _sample(self, held_out: bool, width: int) -> HeadInputs | None:
        """What the two heads read in evenly spaced rows: the small model is run on its own stream, in either mode."""
        numbers = [number for number, batch in enumerate(self.walk.batches) if batch.held_out == held_out]
        num_tokens = sum(self.walk.batches[number].input_ids.numel() for number in numbers)
        wanted = num_gain_tokens(width) // (2 if held_out else 1)
        stride, first, ids, targets = max(1, num_tokens // wanted), 0, [], []
        for number in numbers:
            rows = self.walk.batches[number].input_ids
            chosen = torch.tensor(range(first, len(rows), stride), dtype=torch.long)
            first += len(chosen) * stride - len(rows)
            if len(chosen):
                ids.append(rows[chosen])
                targets.append(
                    self.big.normalize(self.walk.load(self.walk.before, number)[chosen.to(self.walk.device)])
                )
        if not ids:
            return None
        states = [self.small.normalize(each).flatten(0, 1) for each in self._run_small(ids)]
        return HeadInputs(torch.cat(states), torch.cat([target.flatten(0, 1) for target in targets]))

    def _run_small(self, batches: list[Tensor]) -> list[Tensor]:
        """The states that leave the last layer."""
        states = [self.small.embed(batch) for batch in batches]
        for index in range(self.small.num_layers):
            with self.small.layer(index) as layer:
                states = [layer.run(each) for each in states]
        return states
