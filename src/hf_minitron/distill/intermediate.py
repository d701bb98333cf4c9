"""P1's losses between intermediate states of teacher and student (arXiv 2407.14679, section 3 and appendix A.4).

    L = L_logits + ce_weight * L_CLM + alpha * L_is,    L_is = 1/l * sum over states k and tokens i of Loss_k

over the states chosen, all after the norm that reads them:

    emb  the embeddings' output, as the first layer's attention reads it
    o    the output of a layer, as the next one's attention reads it, or as the final norm leaves it
    i    the input of a layer's feed-forward
    att  relations between queries, keys and values of a layer's tokens (MiniLMv2, arXiv 2012.15828, section 3)

emb, o and i are compared by 1 - cosine, or by the squared difference averaged over channels. Where the student is
narrower, one learnt linear map, shared by all of them, takes its states to the teacher's width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.kd_head import KDOutput
from hf_minitron.distill.kd_inputs import IGNORE_INDEX
from hf_minitron.distill.layer_pairs import StudentOrigin, choose_pairs
from hf_minitron.distill.layer_states import REENTRANT, StateRecorder
from hf_minitron.distill.state_losses import relation_distance, state_distance
from hf_minitron.distill.state_weight import StateWeight

PROJECTION = "intermediate_projection"  # the student's attribute while it trains
PROJECTION_FILE = f"{PROJECTION}.safetensors"
logger = logging.getLogger(__name__)


class NoIntermediateStates:
    """A run on logits alone: no hooks, no parameters, nothing added."""

    names: tuple[str, ...] = ()

    def join(self, trainer: Trainer) -> None:
        """Once, when the trainer has its accelerator."""

    def watch(self, role: str) -> AbstractContextManager[Any]:
        """Around the forward pass of the "student" or the "teacher"."""
        return nullcontext()

    def add_to(self, kd: KDOutput, following: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of every token, [tokens], by name; in training their weighted sum joins `kd.loss`."""
        return {}

    def training(self) -> AbstractContextManager[None]:
        """Around the whole training."""
        return nullcontext()

    def detached(self) -> AbstractContextManager[None]:
        """Around what must see the student alone."""
        return nullcontext()

    def student_alone(self, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """A state dict without what is not the student's."""
        return state_dict

    def save(self, folder: str) -> None:
        """Beside the optimizer, in a checkpoint of the training."""

    def load(self, folder: str) -> None:
        """What `save` wrote."""

    def logs(self) -> dict[str, float]:
        """Beside the means of `names`."""
        return {}


class IntermediateStates(NoIntermediateStates):
    """The losses that a run asks for, with their hooks, their projection and their weight.

    A token counts where its logits do: its next token is a target. So L_is and L_logits have the same divisor, as with
    P1's l, and neither accumulation nor padding nor the number of processes changes them.

    The projection is part of the student while that trains, so that its optimizer, its wrapper (DDP, DeepSpeed, FSDP)
    and the training's checkpoints have it; what is published never does. It starts as the selection of the channels
    that the student kept, where they are known, else as a random orthonormal map.

    Raises ValueError for a cached teacher, layers that do not exist, and models of families outside the table.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: Any, args: DistillationConfig, origin: StudentOrigin | None = None
    ) -> None:
        self.losses = tuple(args.intermediate_losses or ())
        check_has_states(not isinstance(teacher, nn.Module), args)
        if args.activation_checkpointing and (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(REENTRANT)
        origin = origin or StudentOrigin()
        models = {"student": student, "teacher": teacher}
        counts = [model.config.num_hidden_layers for model in models.values()]
        self.pairs = choose_pairs(args.intermediate_layers, *counts, origin)
        self._recorders = {
            role: StateRecorder(model, self.losses, [pair[side] for pair in self.pairs])
            for side, (role, model) in enumerate(models.items())
        }
        self.names = tuple(f"intermediate_{name}" for name in self.losses)
        self.weight = StateWeight(args)
        self._metric, self._ce_weight = args.intermediate_metric, args.ce_weight
        self._student, self._states, self._saves_itself = student, {}, False
        widths = [model.config.hidden_size for model in models.values()]
        narrower = widths[0] != widths[1] and self.losses != ("att",)
        self.projection = _make_projection(student, *widths, origin, args.seed) if narrower else None
        self._attach(True)
        logger.info(
            "Intermediate losses %s between layers %s of student and teacher%s.",
            ", ".join(self.losses),
            ", ".join(f"{s}:{t}" for s, t in self.pairs),
            f", through a projection from {widths[0]} to {widths[1]} channels" if narrower else "",
        )

    def join(self, trainer: Trainer) -> None:
        if self.projection is not None and trainer.is_fsdp_enabled and isinstance(self._student, PeftModel):
            raise ValueError(
                f"intermediate_losses={list(self.losses)} learn a projection to the teacher's width, and the "
                "checkpoints of adapters under FSDP leave it out, so that the run could not be resumed. Use DDP or "
                "DeepSpeed, train without adapters, or leave intermediate_losses out."
            )
        self._saves_itself = not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)
        self.weight.join(trainer)

    @contextmanager
    def watch(self, role: str) -> Iterator[None]:
        with self._recorders[role].recording() as states:
            yield
        if role == "teacher":  # a teacher that is corrected meanwhile has a graph of its own, gone by now
            states = {key: tuple(state.detach() for state in found) for key, found in states.items()}
        self._states[role] = states

    def add_to(self, kd: KDOutput, following: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        student, teacher = self._states.pop("student"), self._states.pop("teacher")
        used = (following != IGNORE_INDEX).nonzero().squeeze(-1)
        values = {}
        for name in self.losses:
            pairs = [(0, 0)] if name == "emb" else self.pairs
            found = [((name, s), (name, t)) for s, t in pairs]
            if name == "att":
                each = [self._relations(student[s], teacher[t], inputs)[used] for s, t in found]
            else:
                each = [self._distance(student[s][0], teacher[t][0], used) for s, t in found]
            total = torch.stack(each).sum(0)
            values[f"intermediate_{name}"] = total.new_zeros(len(following)).index_copy(0, used, total)
        if self._student.training:
            states = torch.stack([*values.values()]).sum()
            logits = (kd.token_loss - self._ce_weight * kd.token_ce).sum()
            kd.loss = kd.loss + self.weight.used_on(logits, states, kd.num_tokens) * states
        return values

    def _distance(self, student: Tensor, teacher: Tensor, used: Tensor) -> Tensor:
        student, teacher = student.flatten(0, 1)[used], teacher.flatten(0, 1).to(student.device)[used]
        if self.projection is not None:
            student = self.projection(student.to(self.projection.weight.dtype))
        with torch.autocast(student.device.type, enabled=False):
            return state_distance(student, teacher, self._metric)

    def _relations(self, student: Sequence[Tensor], teacher: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        device = student[0].device
        heads = [self._recorders[role].num_heads for role in ("student", "teacher")]
        with torch.autocast(device.type, enabled=False):
            taught = [state.to(device) for state in teacher]
            return relation_distance(student, taught, *heads, inputs.get("attention_mask")).flatten()

    @contextmanager
    def training(self) -> Iterator[None]:
        self._attach(True)
        try:
            yield
        finally:
            self._attach(False)

    @contextmanager
    def detached(self) -> Iterator[None]:
        before = hasattr(self._student, PROJECTION)
        self._attach(False)
        try:
            yield
        finally:
            self._attach(before)

    def student_alone(self, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        if state_dict is None:
            return None
        return {name: value for name, value in state_dict.items() if PROJECTION not in name.split(".")}

    def save(self, folder: str) -> None:
        if self.projection is not None and self._saves_itself:
            save_file({"weight": self.projection.weight.detach().cpu()}, Path(folder) / PROJECTION_FILE)

    def load(self, folder: str) -> None:
        if self.projection is None or not self._saves_itself:
            return
        path = Path(folder) / PROJECTION_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {PROJECTION_FILE}: it was written by a run without these intermediate_losses. Go on "
                "with that run's settings, or start again."
            )
        with torch.no_grad():
            self.projection.weight.copy_(load_file(path)["weight"])

    def logs(self) -> dict[str, float]:
        return {"intermediate_weight": self.weight.last}

    def _attach(self, wanted: bool) -> None:
        if wanted and self.projection is not None:
            setattr(self._student, PROJECTION, self.projection)  # also over that of a trainer that never trained
        elif hasattr(self._student, PROJECTION):
            delattr(self._student, PROJECTION)


def check_has_states(cached: bool, args: DistillationConfig) -> None:
    """Raises ValueError when states are asked for of a teacher that is cached."""
    if cached and args.intermediate_losses:
        raise ValueError(
            f"intermediate_losses={args.intermediate_losses} asks for hidden states of the teacher's layers, and "
            f"{args.intermediate_layers or 'the default'} maps them, but this is a teacher without the hidden states a "
            "mapping asks for: a cache holds what its head read or said. Give the teacher itself (--teacher-model), or "
            "leave intermediate_losses out."
        )


def _make_projection(
    student: PreTrainedModel, student_width: int, teacher_width: int, origin: StudentOrigin, seed: int
) -> nn.Linear:
    """From the student's channels to the teacher's, in the dtype that the student trains in; alike in all processes."""
    projection = nn.Linear(student_width, teacher_width, bias=False)
    with torch.no_grad():
        if origin.kept_channels is not None:
            projection.weight.zero_()
            projection.weight[list(origin.kept_channels), range(student_width)] = 1
        else:
            nn.init.orthogonal_(projection.weight, generator=torch.Generator().manual_seed(seed))
    trained = next(parameter for parameter in student.parameters() if parameter.requires_grad)
    return projection.to(trained.dtype)
