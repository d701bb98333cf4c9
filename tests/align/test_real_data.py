"""The whole chain on real data and a small real model, where ../shared has them: does each stage do what it is for?"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hf_minitron.align.arguments import RPOArguments, SFTArguments
from hf_minitron.align.rounds import align_checkpoint
from hf_minitron.align.rpo import RPOConfig
from hf_minitron.align.sft import SupervisedConfig
from hf_minitron.align.stage import fine_tune_checkpoint

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from alignment import write_data  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"
STORIES = SHARED / "models" / "tinystories-656k"
MAX_KL = 0.5  # nats a token, between a round and its reference
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="../shared is not there")
COMMON = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "seed": 1}
COMMON |= {"gradient_checkpointing": False, "max_length": 256, "per_device_eval_batch_size": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(SHARED, tmp_path_factory.mktemp("data"), 120, 16)


def last(folder: Path) -> list[dict]:
    return json.loads((folder / "minitron.json").read_text())["stages"]


def test_lessons_lower_held_out_loss_and_preferences_raise_held_out_margins(tmp_path, data):
    """Real responses are preferred to their own words in another order; rounds stay within MAX_KL of the last."""
    model, losses = STORIES, {}
    for name, template in (("math-code", "chatml"), ("instructions", None)):
        config = SupervisedConfig(
            output_dir=str(tmp_path / name), learning_rate=3e-3, max_steps=10, per_device_train_batch_size=6, **COMMON
        )
        arguments = SFTArguments(
            str(model), str(data[name][0]), eval_dataset=str(data[name][1]), chat_template=template
        )
        report = fine_tune_checkpoint(arguments, config)
        losses[name] = report.metrics_before["loss"] - report.metrics["loss"]
        model = tmp_path / name
    assert losses["math-code"] > 0.5 and losses["instructions"] > 0.2
    config = RPOConfig(
        output_dir=str(tmp_path / "rpo"), learning_rate=5e-4, max_steps=8, per_device_train_batch_size=4, beta=0.1,
        warmup_steps=2, **COMMON,
    )  # fmt: skip
    train, held_out = map(str, data["shuffled"])
    report = align_checkpoint(
        RPOArguments(str(model), train, eval_dataset=held_out, constant_rewards=True, kl_rows=4), config
    )
    for one in report.rounds:
        before, after = one["metrics"]["before"], one["metrics"]["after"]
        assert after["rewards/margins"] > before["rewards/margins"] + 0.02
        assert after["loss"] < before["loss"] and 0 < after["kl_to_reference"] < MAX_KL
    assert [one["stage"] for one in last(tmp_path / "rpo")] == ["sft", "sft", "rpo", "rpo"]
