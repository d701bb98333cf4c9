"""Who says how good a response is: constants, a reward model, an OpenAI-compatible endpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_minitron.hardware import fast_dtype

logger = logging.getLogger(__name__)

Messages = str | list[dict[str, Any]]
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_RETRIED = (408, 429, 500, 502, 503, 504)
FIRST_WAIT = 1.0  # seconds before the second try; doubled for every further one


class Exchange(NamedTuple):
    """A prompt and a response to it; texts, or lists of messages with `role` and `content`."""

    prompt: Messages
    response: Messages

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The whole as messages; a text is what a user asked and an assistant said."""
        sides = ((self.prompt, "user"), (self.response, "assistant"))
        return [
            message
            for side, role in sides
            for message in ([{"role": role, "content": side}] if isinstance(side, str) else side)
        ]

    def key(self, scorer: str) -> str:
        """What a scorer's opinion of this exchange is known by: sha256 of both."""
        return hashlib.sha256(json.dumps([scorer, self.prompt, self.response]).encode()).hexdigest()


class Scorer(Protocol):
    """Gives every exchange a number, higher for better; `name` tells it from others whose numbers differ."""

    name: str

    def __call__(self, exchanges: Sequence[Exchange]) -> Sequence[float]: ...


class ConstantRewards:
    """1 for every chosen and 0 for every rejected response: what the pairs themselves say. `label_rewards` knows it."""

    name = "constant"

    def __call__(self, exchanges: Sequence[Exchange]) -> Sequence[float]:
        raise ValueError("Constant rewards know chosen from rejected, not good from bad: use a reward model.")


class RewardModel:
    """A sequence-classification model with one output, such as those trained by trl's RewardTrainer.

    Exchanges go through the tokenizer's chat template if it has one, else prompt and response as one text. Sequences
    longer than `max_length` lose their beginning, where the response is not. Raises ValueError for a model with several
    outputs.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        max_length: int = 4096,
    ) -> None:
        self.name = f"{model}@{revision}" if revision else str(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        self.model = AutoModelForSequenceClassification.from_pretrained(
            model, revision=revision, dtype=dtype or fast_dtype(device), use_safetensors=True
        )
        if self.model.config.num_labels != 1:
            raise ValueError(
                f"{model} has {self.model.config.num_labels} outputs, and a reward is one number. Use a reward model "
                "with num_labels=1, or a function that makes one number of several."
            )
        self.model.to(device).eval()
        self.max_length = max_length
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id

    @torch.no_grad()
    def __call__(self, exchanges: Sequence[Exchange]) -> list[float]:
        ids = [self._tokenize(exchange)[-self.max_length :] for exchange in exchanges]
        batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="right")
        return self.model(**batch.to(self.model.device)).logits[:, 0].float().tolist()

    def _tokenize(self, exchange: Exchange) -> list[int]:
        if self.tokenizer.chat_template is not None:
            return self.tokenizer.apply_chat_template(exchange.messages, tokenize=True, return_dict=True)["input_ids"]
        text = "".join(message["content"] for message in exchange.messages)
        return self.tokenizer(text)["input_ids"]


class RewardEndpoint:
    """A reward model behind an OpenAI-compatible `/chat/completions`, asked once per exchange.

    The reward is the number in the answer's text (`reward: -3.5`, or `-3.5`); with `attribute`, the log-probability
    that the answer gives to the token of that name, as NVIDIA's reward endpoints say helpfulness and the like. The key
    comes from the environment variable `api_key_variable` and is never stored. Answers 408, 429 and 5xx and timeouts
    are tried again, `tries` times in all.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        attribute: str | None = None,
        api_key_variable: str = "REWARD_API_KEY",
        timeout: float = 60.0,
        tries: int = 5,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url={base_url!r} is no address: give one such as http://localhost:8000/v1.")
        self.name = ":".join(filter(None, (model, attribute)))
        self.attribute = attribute
        self.tries = tries
        self._model = model
        key = os.environ.get(api_key_variable) or "none"
        self._client = InferenceClient(base_url=base_url, api_key=key, timeout=timeout)

    def __call__(self, exchanges: Sequence[Exchange]) -> list[float]:
        return [self._read(self._ask(exchange)) for exchange in exchanges]

    def _ask(self, exchange: Exchange) -> Any:
        for turn in range(1, self.tries + 1):
            try:
                return self._client.chat_completion(
                    exchange.messages, model=self._model, logprobs=True if self.attribute else None
                )
            except (HfHubHTTPError, InferenceTimeoutError) as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                if turn == self.tries or status not in (None, *_RETRIED):
                    raise OSError(
                        f"The reward endpoint failed ({status or 'no answer in time'}) after {turn} tries: "
                        f"{type(error).__name__}. What was scored is kept; the same command goes on."
                    ) from None
                wait = FIRST_WAIT * 2 ** (turn - 1)
                logger.warning("The reward endpoint said %s; trying again in %.0f s.", status or "nothing", wait)
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _read(self, answer: Any) -> float:
        choice = answer.choices[0]
        if self.attribute is None:
            text = choice.message.content or ""
            found = _NUMBER.findall(text)
            if len(found) != 1:
                raise ValueError(
                    f"The reward endpoint answered {text[:80]!r}, where one number was expected. For endpoints that "
                    "answer in log-probabilities, name the attribute."
                )
            return float(found[0])
        tokens = {token.token: token.logprob for token in (choice.logprobs.content if choice.logprobs else [])}
        if self.attribute not in tokens:
            raise ValueError(f"The reward endpoint told {sorted(tokens)}, without {self.attribute!r}.")
        return tokens[self.attribute]
