"""Pretrain the quickstart's teacher: a small Llama that writes Python, from the standard library's source.

Makes     recipes/quickstart/teacher/: 6.7M parameters, 8 layers, grouped-query attention, untied head, bf16 weights.
Data      stdlib_corpus.py: modules (twice per epoch) and their tests (once), held-out modules never.
Method    next-token cross-entropy on packed rows; Muon for the matrices inside the layers (Jordan et al., 2024,
          kellerjordan.github.io/posts/muon), AdamW for the rest; constant learning rate, then linear decay to zero.
Needs     nothing but the installed packages. CPU: about 3 hours for 20M tokens on 2 idle cores without bf16 units.
Command   python recipes/quickstart/train_teacher.py --work-dir work/teacher --steps 2500
          Stopped at any point, the same command goes on from the last saved step; a larger --steps goes on further.
          At the end it measures the model on the held-out modules and writes it with its card to --output-dir.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from stdlib_corpus import write_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_minitron.data import load_text
from hf_minitron.evaluate.perplexity import evaluate_perplexity
from hf_minitron.hardware import describe_hardware, versions
from hf_minitron.publish.tables import markdown_table

VOCAB_SIZE, CONTEXT = 3072, 512  # tokens
ROWS_PER_STEP, ROWS_PER_CHUNK = 16, 8  # sequences of CONTEXT tokens
MUON_LR, ADAM_LR, WARMUP_STEPS, DECAY_FRACTION = 0.02, 3e-3, 50, 0.7
SAVE_EVERY = 50  # steps


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written with it and is read back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<|endoftext|>", "<|pad|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by Newton–Schulz steps.

    torch.optim.Muon does the same but casts to bf16, which takes minutes a step on a CPU without bf16 units.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(momentum, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * max(1, weight.shape[0] / weight.shape[1]) ** 0.5)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly: five steps of the quintic Newton–Schulz iteration of Muon."""
    x = matrix / (matrix.norm() + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def learning_rate_factor(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / max(1, int(DECAY_FRACTION * steps)))


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.open(encoding="utf-8")]


def load_tokens(work_dir: Path) -> torch.Tensor:
    """One epoch's rows of CONTEXT tokens; trains the tokenizer on the training modules if that is still to do."""
    paths = write_corpus(work_dir / "corpus")
    modules, tests = read_texts(paths["train"]), read_texts(paths["tests"])
    folder = work_dir / "tokenizer"
    if not folder.exists():
        train_tokenizer(modules).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    texts = modules + modules + tests
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    ids = tokenizer([texts[i] for i in order], add_special_tokens=False)["input_ids"]
    stream = torch.tensor([token for text in ids for token in (tokenizer.bos_token_id, *text)])
    rows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return rows


def save(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(work_dir: Path, steps: int, device: str, max_minutes: float) -> LlamaForCausalLM:
    rows = load_tokens(work_dir)
    torch.manual_seed(0)
    model = build_model().to(device).train()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in model.named_parameters() if p.ndim == 1 or ".layers." not in name]
    optimizers = [Muon(matrices, MUON_LR), torch.optim.AdamW(rest, ADAM_LR, betas=(0.9, 0.95), weight_decay=0.01)]
    checkpoint, first, seconds = work_dir / "training.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
        print(f"resumed at step {first}", flush=True)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {rows.numel():,} tokens an epoch", flush=True)
    compiled = torch.compile(model)
    per_epoch, start, log = len(rows) // ROWS_PER_STEP, time.time(), (work_dir / "log.jsonl").open("a")
    for step in range(first, steps):
        epoch, index = divmod(step, per_epoch)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
        batch = rows[order[index * ROWS_PER_STEP : (index + 1) * ROWS_PER_STEP]].to(device)
        factor, total = learning_rate_factor(step, steps), 0.0
        for optimizer, lr in zip(optimizers, (MUON_LR, ADAM_LR), strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.zero_grad(set_to_none=True)
        for chunk in batch.split(ROWS_PER_CHUNK):
            logits = compiled(input_ids=chunk, use_cache=False).logits
            loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), chunk[:, 1:].flatten())
            loss = loss * len(chunk) / len(batch)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if not math.isfinite(total):
            raise FloatingPointError(f"loss is {total} at step {step}")
        if step % 10 == 0:
            spent = seconds + time.time() - start
            print(json.dumps({"step": step, "loss": round(total, 4), "seconds": round(spent)}), file=log, flush=True)
        out_of_time = time.time() - start > 60 * max_minutes
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps or out_of_time:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            save(state | {"step": step + 1, "seconds": seconds + time.time() - start}, checkpoint)
        if out_of_time:
            break
    log.close()
    return model


def write_teacher(work_dir: Path, output_dir: Path) -> None:
    """Writes the trained model in bf16 with tokenizer and card; measures it as it is written."""
    state = torch.load(work_dir / "training.pt", weights_only=True, map_location="cpu")
    model = build_model()
    model.load_state_dict(state["model"])
    model.generation_config.max_length = CONTEXT
    model.to(torch.bfloat16).save_pretrained(output_dir)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work_dir / "tokenizer")
    tokenizer.save_pretrained(output_dir)
    model = LlamaForCausalLM.from_pretrained(output_dir, dtype=torch.float32)
    held_out = load_text(work_dir / "corpus" / "held_out.jsonl")
    result = evaluate_perplexity(model, tokenizer, held_out, context_length=CONTEXT, stride=CONTEXT // 2)
    losses = [json.loads(line)["loss"] for line in (work_dir / "log.jsonl").open()][-10:]
    hardware, installed = describe_hardware(), versions()
    facts = {
        "parameters": f"{model.num_parameters():,}",
        "training tokens": (
            f"{state['step'] * ROWS_PER_STEP * CONTEXT:,} ({state['step']:,} steps of {ROWS_PER_STEP} × {CONTEXT})"
        ),
        "training loss": (
            f"{sum(losses) / len(losses):.3f} nats per token (modules and tests, mean of the last {len(losses)} "
            "logged steps)"
        ),
        "held-out loss": f"{result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}",
        "held-out bits per byte": (
            f"{result.bits_per_byte:.4f} ({result.num_tokens:,} tokens, {result.num_bytes:,} bytes, "
            f"{result.num_documents} modules)"
        ),
        "wall-clock time": (
            f"{state['seconds'] / 60:.0f} minutes on {hardware['cpu_cores']} cores ({hardware['cpu']}), shared "
            "with other work"
        ),
        "versions": (
            f"Python {installed['python']}, torch {installed['torch']}, transformers {installed['transformers']}"
        ),
    }
    table = markdown_table(("fact", "value"), list(facts.items()))
    (output_dir / "README.md").write_text(
        CARD.format(table=table, command=f"--steps {state['step']}"), encoding="utf-8"
    )
    print(table)


CARD = """---
license: apache-2.0
language: code
library_name: transformers
pipeline_tag: text-generation
tags: [python, test-model]
---
# The quickstart's teacher

A small Llama that continues Python source. It exists so that hf-minitron can be tried and tested offline on a model
that really was trained; it knows the style of the standard library and nothing about the world.

{table}

Architecture: 8 layers, hidden size 256, feed-forward 576, 8 query and 4 key/value heads of 32, context 512, byte-level
BPE of 3,072 tokens, untied head, bf16.

Data: the source of the Python standard library (PSF licence) as installed with the Python named above, without
`encodings` and `pydoc_data`: modules twice per epoch, their tests once.
Modules whose name hashes into the held-out 8 % were never seen (`stdlib_corpus.py`); they are measured in windows of
512 tokens with a stride of 256. Training by next-token cross-entropy with Muon and AdamW, constant learning rate with
linear decay over the last 70 % of the steps.

Made by `python recipes/quickstart/train_teacher.py {command}`.

Limits: a few million parameters and one kind of text. Its completions look like Python; do not run them.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("work/teacher"))
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps of 8,192 tokens in all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="save and stop after so many minutes")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "teacher")
    args = parser.parse_args()
    train(args.work_dir, args.steps, args.device, args.max_minutes)
    write_teacher(args.work_dir, args.output_dir)


if __name__ == "__main__":
    main()
