"""Chat templates: those that a base model can be given, and what training needs of any."""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass

from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl.chat_template_utils import get_training_chat_template

logger = logging.getLogger(__name__)

_MARKERS = re.compile(r"{% (?:end)?generation %}")
_ALIGNED_ROWS = 64  # embeddings whose rows are a multiple of this stay so: it is what fast kernels want


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with marks around the assistant's words; `end` closes a turn (None: the tokenizer's eos)."""

    jinja: str
    special_tokens: tuple[str, ...] = ()
    end: str | None = None


def _headed(before: str, after: str, end: str, between: str) -> str:
    """Every message as `before` role `after` content `end` `between`; the assistant says content and `end`."""
    words = "message['content'] + " + end
    turn = (
        "{% if message['role'] == 'assistant' %}{% generation %}{{ " + words + " }}{% endgeneration %}"
        "{% else %}{{ " + words + " }}{% endif %}{{ '" + between + "' }}"
    )
    head = "{{ '" + before + "' + %s + '" + after + "' }}"
    return (
        "{% for message in messages %}" + head % "message['role']" + turn + "{% endfor %}"
        "{% if add_generation_prompt %}" + head % "'assistant'" + "{% endif %}"
    )


CHAT_TEMPLATES = {
    "chatml": ChatTemplate(
        _headed("<|im_start|>", "\\n", "'<|im_end|>'", "\\n"), ("<|im_start|>", "<|im_end|>"), "<|im_end|>"
    ),
    "llama3": ChatTemplate(
        _headed("<|start_header_id|>", "<|end_header_id|>\\n\\n", "'<|eot_id|>'", ""),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "plain": ChatTemplate(_headed("### ", ":\\n", "eos_token", "\\n")),
}


def add_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """Gives a tokenizer that has none one of CHAT_TEMPLATES, and the special tokens that it lacks, which are returned.

    The token that ends a turn becomes its eos. bos stands in front if the tokenizer adds it by itself. The same
    template twice changes nothing; a tokenizer with another one is refused by a ValueError.
    """
    if name not in CHAT_TEMPLATES:
        raise ValueError(f"chat_template={name!r} is unknown: use one of {', '.join(CHAT_TEMPLATES)}.")
    template = CHAT_TEMPLATES[name]
    jinja = ("{{ bos_token }}" if _starts_with_bos(tokenizer) else "") + _MARKERS.sub("", template.jinja)
    if tokenizer.chat_template is not None:
        if tokenizer.chat_template == jinja:
            return []
        raise ValueError(
            f"chat_template={name}: the tokenizer has a chat template of its own, which the model knows. Leave the "
            "option out to use that."
        )
    if template.end is None and tokenizer.eos_token is None:
        raise ValueError(f"chat_template={name} ends turns by eos, which the tokenizer lacks. Use chatml.")
    added = [token for token in template.special_tokens if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added], special_tokens=True)
    tokenizer.chat_template = jinja
    if template.end is not None:
        tokenizer.eos_token = template.end
    example = [{"role": role, "content": f"({role}'s words)"} for role in ("system", "user", "assistant")]
    shown = tokenizer.apply_chat_template(example, tokenize=False)
    what = f"with the new tokens {', '.join(added)}" if added else "without new tokens"
    logger.info("The chat template %s is added, %s. A conversation reads:\n%s", name, what, shown)
    return added


def fit_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Rows for tokens that are new, and the tokenizer's eos beside the model's own, so that generation ends on both.

    New rows, of embeddings and head (one matrix where they are tied), are drawn around the mean of the old ones, by
    transformers. Spare rows are used first; rows that are a multiple of 64 stay one.
    """
    rows = model.get_input_embeddings().num_embeddings  # whole under every engine, unlike the weight's own shape
    if len(tokenizer) > rows:
        set_seed(seed)
        model.resize_token_embeddings(
            len(tokenizer), pad_to_multiple_of=None if rows % _ALIGNED_ROWS else _ALIGNED_ROWS
        )
        now = model.get_input_embeddings().num_embeddings
        logger.info("Embeddings grow from %d to %d rows for the new tokens.", rows, now)
    old = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *([old] if isinstance(old, int) else old or [])]
    ends = list(dict.fromkeys(ends))
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


def training_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy whose template marks the assistant's words, from which the loss's mask is made.

    Ours and those that TRL knows are exchanged for marked ones. Raises ValueError for other templates without marks.
    """
    marked = copy.deepcopy(tokenizer)
    for template in CHAT_TEMPLATES.values():
        bare = tokenizer.chat_template.removeprefix("{{ bos_token }}") if tokenizer.chat_template else None
        if bare == _MARKERS.sub("", template.jinja):
            marked.chat_template = tokenizer.chat_template.replace(bare, template.jinja)
            return marked
    try:
        marked.chat_template = get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError:
        raise ValueError(
            "The chat template has no {% generation %} marks around the assistant's words, so that a loss on these "
            "alone cannot be had from messages, and it is none that TRL can mark. Add the marks to the template, or "
            "give the data as prompt and completion."
        ) from None
    return marked


def check_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None, conversational: bool) -> None:
    """Raises ValueError for conversations without a template to write them by."""
    if conversational and tokenizer.chat_template is None and chat_template is None:
        raise ValueError(
            "The data are conversations, and the tokenizer has no chat template. Add one by --chat-template: "
            f"{', '.join(CHAT_TEMPLATES)}."
        )


def _starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
