"""`RPOTrainer` beside trl's DPOTrainer: the same training in the limit, and all that stays DPOTrainer's.

The trainer counts on how these versions of trl call their models; on a change the first test says what to look at.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from hf_minitron.align.preference import DISTANCES, rpo_loss
from hf_minitron.align.rpo import RPOConfig, RPOTrainer

# sha256 of the source of DPOTrainer's methods that RPOTrainer stands on, by the versions that were read and tested.
TESTED = {"1.16.0": "d578f2c15c73c398"}
METHODS = ("_compute_loss", "compute_loss", "compute_ref_log_probs", "_prepare_dataset", "evaluate",
           "_set_signature_columns_if_needed")  # fmt: skip

OPTIONS = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "max_length": 48}
OPTIONS |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "bf16": False}
OPTIONS |= {"gradient_checkpointing": False, "lr_scheduler_type": "constant", "warmup_steps": 0, "beta": 0.2}


def test_this_version_of_trl_is_one_that_was_read():
    source = "".join(inspect.getsource(getattr(DPOTrainer, name)) for name in METHODS)
    found = hashlib.sha256(source.encode()).hexdigest()[:16]
    assert TESTED.get(trl.__version__, found) == found, f"trl {trl.__version__} is not what was read"
    assert found in TESTED.values(), (
        f"trl {trl.__version__} changed one of DPOTrainer's {METHODS}. Read what changed: RPOTrainer expects the "
        f"policy's and then the reference's forward pass, with `log_probs` in them. Then add {found!r} to TESTED."
    )


@pytest.fixture
def model(tiny_checkpoint):
    """Its folder is where TRL loads the reference from."""
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def rows():
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "owls", "watch"]
    generator = torch.Generator().manual_seed(3)

    def text(count: int) -> str:
        return " ".join(words[i] for i in torch.randint(0, len(words), (count,), generator=generator).tolist())

    rewards = torch.randn(24, 2, generator=generator).tolist()
    return [
        {"prompt": text(4) + " ", "chosen": text(3 + i % 4), "rejected": text(2 + i % 5), "chosen_reward": max(pair),
         "rejected_reward": min(pair)}
        for i, pair in enumerate(rewards)
    ]  # fmt: skip


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.values = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def train(folder, model, rows, tokenizer, trainer=RPOTrainer, config=RPOConfig, **options):
    """Trains and returns the trainer, its last gradient and its losses."""
    extra = {name: options.pop(name) for name in ("peft_config", "eval_dataset") if name in options}
    gradients = Gradients()
    made = trainer(
        model=model,
        args=config(output_dir=str(folder), **({"max_steps": 1} | OPTIONS | options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[gradients],
        **extra,
    )
    made.train()
    return made, gradients.values, [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def test_with_a_large_eta_it_trains_like_dpo(tmp_path, model, rows, tiny_tokenizer):
    other, steps = copy.deepcopy(model), {"max_steps": 20}
    ours, _, losses = train(tmp_path, model, rows, tiny_tokenizer, eta=1e6, **steps)
    theirs, _, expected = train(tmp_path, other, rows, tiny_tokenizer, DPOTrainer, DPOConfig, **steps)
    assert losses == pytest.approx(expected, rel=1e-5) and losses[-1] < 0.9 * losses[0]
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_loss_is_that_of_the_whole_sequences(tmp_path, model, rows, tiny_tokenizer, distance):
    """Log-probabilities by hand, from the model's own logits, of a policy that has left its reference."""
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))

    def log_prob(which, row, name):
        ids = tiny_tokenizer(row["prompt"] + row[name] + tiny_tokenizer.eos_token)["input_ids"]
        start = len(tiny_tokenizer(row["prompt"])["input_ids"])
        with torch.no_grad():
            logs = which(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return logs.gather(1, torch.tensor(ids[1:])[:, None])[start - 1 :].sum()

    eta, weight, expected = 1.7, 0.01, []
    for row in rows[:4]:
        gaps = [log_prob(model, row, name) - log_prob(reference, row, name) for name in ("chosen", "rejected")]
        target = torch.tensor(eta * (row["chosen_reward"] - row["rejected_reward"]))
        expected.append(rpo_loss(gaps[0] - gaps[1], target, 0.2, distance) - weight * log_prob(model, row, "chosen"))
    options = {"distance": distance, "eta": eta, "chosen_sft_weight": weight}
    _, _, losses = train(tmp_path, model, rows[:4], tiny_tokenizer, **options)
    assert losses[0] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_logs_tell_margins_and_their_targets(tmp_path, model, rows, tiny_tokenizer):
    trainer, _, _ = train(tmp_path, model, rows, tiny_tokenizer, max_steps=2, eval_dataset=Dataset.from_list(rows[:6]))
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {"rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen", "entropy"} <= log.keys()
    assert log["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert log["rewards/margin_error"] == pytest.approx(log["rewards/target_margins"], abs=1e-5)
    assert log["rewards/target_margins"] > 0 and log["logratios/chosen"] == pytest.approx(0, abs=1e-5)
    metrics = trainer.evaluate()
    gaps = [row["chosen_reward"] - row["rejected_reward"] for row in rows[:6]]
    assert metrics["eval_rewards/target_margins"] == pytest.approx(sum(gaps) / 6, rel=1e-5)
    assert metrics["eval_loss"] > 0


def test_training_brings_the_margins_to_the_rewards(tmp_path, model, rows, tiny_tokenizer):
    options = {"max_steps": 40, "learning_rate": 3e-3, "per_device_train_batch_size": 8}
    trainer, _, losses = train(tmp_path, model, rows[:8], tiny_tokenizer, **options)
    errors = [entry["rewards/margin_error"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.1 * losses[0] and errors[-1] < 0.4 * errors[0]


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_accumulation_adapters_and_precomputed_references_change_nothing(
    tmp_path, model, rows, tiny_tokenizer, lora, precompute
):
    """Gradients of one batch of 8 pairs and of 4 batches of 2; adapters start as nothing, so their loss is the same."""
    options = {"precompute_ref_log_probs": precompute, "eval_dataset": Dataset.from_list(rows[:2])}
    if lora:
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    one = train(tmp_path, copy.deepcopy(model), rows[:8], tiny_tokenizer, per_device_train_batch_size=8, **options)
    two = train(tmp_path, copy.deepcopy(model), rows[:8], tiny_tokenizer, per_device_train_batch_size=2,
                gradient_accumulation_steps=4, **options)  # fmt: skip
    assert one[1].keys() == two[1].keys() and all(("lora_" in name) == lora for name in one[1])
    for name, value in one[1].items():
        assert (value - two[1][name]).norm() <= 1e-5 * value.norm() + 1e-9, name
    assert one[2] == pytest.approx(two[2], rel=1e-5)
    plain = train(tmp_path, copy.deepcopy(model), rows[:8], tiny_tokenizer, per_device_train_batch_size=8)
    assert one[2] == pytest.approx(plain[2], rel=1e-5)
    assert one[0].evaluate()["eval_loss"] > 0


def test_rewards_may_stand_in_other_columns(tmp_path, model, rows, tiny_tokenizer):
    renamed = [
        {**row, "good": row["chosen_reward"], "bad": row["rejected_reward"], "chosen_reward": 0.0} for row in rows
    ]
    columns = {"chosen_reward_column": "good", "rejected_reward_column": "bad"}
    _, _, losses = train(tmp_path, copy.deepcopy(model), renamed, tiny_tokenizer, **columns)
    assert losses == train(tmp_path, model, rows, tiny_tokenizer)[2]


def test_inverted_and_equal_pairs_are_counted(tmp_path, model, rows, tiny_tokenizer, caplog):
    inverted = {**rows[0], "chosen_reward": -5.0, "rejected_reward": 5.0}
    mixed = [*rows[:4], inverted, {**rows[1], "rejected": rows[1]["chosen"]}]
    with caplog.at_level(logging.WARNING, logger="hf_minitron"):
        trainer, _, _ = train(tmp_path, copy.deepcopy(model), mixed, tiny_tokenizer)
        assert len(trainer.train_dataset) == 5
        dropped, _, _ = train(tmp_path, model, mixed, tiny_tokenizer, drop_inverted=True)
    assert len(dropped.train_dataset) == 4
    assert "train: in 1 of 6 pairs the rejected response has the higher reward: they pull the other way" in caplog.text
    assert "they are left out" in caplog.text and "train: 1 of 6 pairs have two equal responses" in caplog.text


def test_prompts_longer_than_the_context_are_counted(tmp_path, model, rows, tiny_tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_minitron"):
        train(tmp_path, copy.deepcopy(model), [*rows[:4], {**rows[4], "prompt": "fox " * 60}], tiny_tokenizer)
    assert "train: 1 of 5 prompts fill max_length=48 on their own" in caplog.text
    with pytest.raises(ValueError, match="no prompt is shorter than max_length=4"):
        train(tmp_path, model, rows, tiny_tokenizer, max_length=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen_reward": None}, "chosen_reward of row 1 is None"),
        ({"rejected_reward": float("nan")}, "rejected_reward of row 1 is nan"),
    ],
)
def test_rewards_that_are_no_numbers_are_refused(tmp_path, model, rows, tiny_tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, model, [rows[0], rows[1] | change], tiny_tokenizer)


def test_data_without_rewards_is_refused_with_the_remedy(tmp_path, model, rows, tiny_tokenizer):
    bare = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    with pytest.raises(ValueError, match=r"no column chosen_reward or rejected_reward; it has .* label_rewards"):
        train(tmp_path, model, bare, tiny_tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "kl"}, "distance='kl' is unknown"),
        ({"eta": 0.0}, "eta=0.0 is not above 0"),
        ({"beta": -1.0}, "beta=-1.0 is not above 0"),
        ({"chosen_sft_weight": -1.0}, "chosen_sft_weight=-1.0 is below 0"),
        ({"loss_type": ["ipo"]}, r"loss_type=\['ipo'\] shapes DPO's loss"),
        ({"ld_alpha": 0.5}, "ld_alpha=0.5 shapes"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        RPOConfig(output_dir=str(tmp_path), **(OPTIONS | options))


def test_a_plain_dpo_config_is_refused(tmp_path, model, rows, tiny_tokenizer):
    with pytest.raises(TypeError, match="args is a DPOConfig"):
        train(tmp_path, model, rows, tiny_tokenizer, config=DPOConfig)
