"""A model of which only the layer in use holds weights, and its layers taken apart into what refit fits.

Each half of a decoder layer, attention (0) and feed-forward (1), is read → core → write:

    x = read_norm(h);  a, z = core(x), where a is what the writer (o_proj, down_proj) reads and z what it gives;
    h ← h + multiplier · write_norm(z)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from hf_minitron.architectures import Family, get_family
from hf_minitron.prune.replay import LayerReplay

Read = Callable[[str], Tensor]


class LayerwiseModel:
    """A model of ``config`` whose tensors come from ``read`` by name: embedding, norm and head now, layers in use.

    Everything is computed in fp32 on ``device``. A tied head is never read.
    """

    def __init__(self, config: PreTrainedConfig, read: Read, device: str | torch.device = "cpu"):
        self.config, self.family, self._read, self.device = config, get_family(config), read, torch.device(device)
        with init_empty_weights(include_buffers=False), no_init_weights():
            # A copy: from_config writes its dtype into the config that it is given.
            self.model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        self._replays: dict[tuple[int, ...], LayerReplay] = {}
        self.load_outer()

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    def load_outer(self) -> None:
        """Reads the tensors outside the layers; again, when they have changed."""
        for name in self.family.outer_tensors:
            if name == self.family.head and self.config.tie_word_embeddings:
                self._put(name, self.model.get_parameter(self.family.embedding))
            else:
                self._put(name, self._read(name))

    def embed(self, input_ids: Tensor) -> Tensor:
        """The states (rows, tokens, hidden) that enter the first layer, multipliers included."""
        return self._replay(input_ids).first

    @contextmanager
    def layer(self, index: int) -> Iterator[LoadedLayer]:
        """One layer with its weights, which are dropped again at the end."""
        module = self.model.get_submodule(f"{self.family.layers}.{index}")
        names = [name for name, _ in module.named_parameters()]
        for name in names:
            self._put(self.family.layer_name(index, name), self._read(self.family.layer_name(index, name)))
        try:
            yield LoadedLayer(self, module, index)
        finally:
            for name in names:
                parent, _, leaf = name.rpartition(".")
                parameter = module.get_submodule(parent)._parameters[leaf]
                module.get_submodule(parent)._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def normalize(self, states: Tensor) -> Tensor:
        """What the head reads, of states that have left the last layer."""
        return self.model.get_submodule(self.family.final_norm)(states)

    def loss(self, states: Tensor, input_ids: Tensor) -> Tensor:
        """Summed next-token loss in nats per row, of states that have left the last layer."""
        scored = torch.ones(input_ids.shape, dtype=torch.bool)
        scored[:, -1] = False
        return -LayerReplay(self.model, input_ids.to(self.device)).log_probs(states, scored)[0]

    def call(self, index: int, rows_and_tokens: tuple[int, ...]) -> dict:
        """The keyword arguments that the model gives its layer ``index``, for a batch of a shape once embedded."""
        return self._replays[rows_and_tokens].call(index)

    def _replay(self, input_ids: Tensor) -> LayerReplay:
        replay = LayerReplay(self.model, input_ids.to(self.device))
        self._replays.setdefault(tuple(input_ids.shape), replay)
        return replay

    def _put(self, name: str, tensor: Tensor) -> None:
        parent, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(parent)
        module._parameters[leaf] = nn.Parameter(tensor.to(self.device, torch.float32), requires_grad=False)


class LoadedLayer:
    """The parts of one decoder layer; ``half`` is 0 for attention and 1 for feed-forward."""

    def __init__(self, owner: LayerwiseModel, module: nn.Module, index: int):
        self._owner, self.module, self.index = owner, module, index
        self.family: Family = owner.family
        key = self.family.residual_multiplier
        self.multiplier: float = getattr(owner.config, key) if key else 1.0

    def put(self, name: str, tensor: Tensor) -> None:
        """Replaces a tensor by its name inside the layer, until the layer is dropped."""
        self._owner._put(self.family.layer_name(self.index, name), tensor)

    def read(self, half: int, states: Tensor) -> Tensor:
        """What the readers of one half get: (rows, tokens, hidden), normed where the family norms."""
        norm = self.family.read_norms[half]
        return states if norm is None else self.module.get_submodule(norm)(states)

    def core(self, half: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the writer reads, (rows, tokens, q or ffn), and what it gives, (rows, tokens, hidden)."""
        site = (self.family.head_site, self.family.neuron_site)[half]
        seen: list[Tensor] = []
        handle = self.module.get_submodule(site).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            block = self.module.get_submodule(site.rpartition(".")[0])
            kwargs = self._owner.call(self.index, tuple(x.shape[:2])) if half == 0 else {}
            found = block(hidden_states=x, **kwargs) if half == 0 else block(x)
        finally:
            handle.remove()
        return seen[0], found[0] if half == 0 else found

    def normalize_written(self, half: int, z: Tensor) -> Tensor:
        """What the write norm makes of ``z``, where there is one."""
        norm = self.family.write_norms[half]
        return z if norm is None else self.module.get_submodule(norm)(z)

    def add(self, half: int, states: Tensor, z: Tensor) -> Tensor:
        """The stream after one half has written ``z``."""
        return states + self.multiplier * self.normalize_written(half, z)

    def run(self, states: Tensor) -> Tensor:
        """The stream after the whole layer."""
        for half in (0, 1):
            states = self.add(half, states, self.core(half, self.read(half, states))[1])
        return states
