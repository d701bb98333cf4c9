"""Model cards: whole texts against golden files, metadata by the Hub's rules, and what must not be said or shared."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from lineages import CONFIG, CORRECT, DISTILL, FILES, LINEAGES, MEASURED, PRUNE, RPO, SOURCE, TEXT, stage
from local_hub import read_card
from safetensors.numpy import save_file

from hf_minitron import cli
from hf_minitron.mixes import read_mix
from hf_minitron.publish.card import MARK, refresh_card, render_model_card, write_model_card
from hf_minitron.publish.card_facts import results
from hf_minitron.publish.commands import stage_command
from hf_minitron.publish.energy import estimate_energy

GOLDEN = Path(__file__).with_name("golden")


def write_folder(folder: Path, stages: list, plots: bool = False) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file({"w": np.zeros((3, 5), np.float32)}, folder / "model.safetensors")
    if stages:
        (folder / "minitron.json").write_text(json.dumps({"format_version": 1, "stages": stages}), encoding="utf-8")
        (folder / "prune_plan.json").write_text("{}")
    if plots:
        (folder / "plots").mkdir()
        for name in ("loss.png", "loss.svg", "shape_before_after.svg"):
            (folder / "plots" / name).write_text("x")
        (folder / "distill_log.json").write_text("[]")
    return folder


@pytest.mark.parametrize("kind", list(LINEAGES))
def test_the_whole_card(tmp_path, kind):
    """UPDATE_GOLDEN=1 writes the files anew; read the difference before committing it."""
    text = render_model_card(write_folder(tmp_path / kind, LINEAGES[kind], kind == "distilled"), name=f"acme/{kind}")
    golden = GOLDEN / f"{kind}.md"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", list(LINEAGES))
def test_the_metadata_is_valid_for_the_hub(hub, kind):
    text = (GOLDEN / f"{kind}.md").read_text(encoding="utf-8")
    assert read_card(text)[1] == []
    ModelCard(text).validate(repo_type="model")  # by the server's answer
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    if kind != "plain":
        assert (data.base_model, data.base_model_relation, data.license) == (SOURCE["id"], "finetune", "llama3.1")
    assert hub.requests[-1]["status"] == 200


def test_results_reach_the_model_index():
    data = ModelCard((GOLDEN / "distilled.md").read_text(encoding="utf-8")).data
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in data.eval_results}
    assert found["winogrande", "acc"] == 0.735 and found["cais/mmlu", "acc"] == 0.605
    assert found["acme/web-text", "lm_loss"] == 2.25
    assert not any(metric.startswith("teacher_") for _, metric in found)
    assert data.datasets == ["acme/web-text"] and data.language == ["en", "de"]


def test_only_what_was_measured_of_these_weights_is_their_result():
    assert results([PRUNE, MEASURED, DISTILL])[0].metric == "kl"
    assert results([PRUNE, DISTILL, MEASURED, RPO]) == []
    assert len(results([PRUNE, DISTILL, MEASURED])) == len(results([PRUNE, DISTILL])) + 2


def test_the_base_model_is_the_nearest_one_on_the_hub(tmp_path):
    again = {**PRUNE, "inputs": {"source": {"id": "acme/4b", "commit": "a" * 40, "card": {"license": "mit"}}}}
    folder = write_folder(tmp_path / "m", [PRUNE, DISTILL, again])
    data = ModelCard(render_model_card(folder)).data
    assert (data.base_model, data.license) == ("acme/4b", "mit")


def test_a_license_that_forbids_derived_works_stops(tmp_path, capsys):
    for license in ({"license": "cc-by-nc-nd-4.0"}, {"license": "other", "license_name": "acme-nd"}):
        source = SOURCE | {"card": license}
        folder = write_folder(tmp_path / license["license"], [{**PRUNE, "inputs": {"source": source}}])
        for make in (write_model_card, refresh_card):
            with pytest.raises(ValueError, match=r"-nd.* of the source forbids to share what is derived.*--license ID"):
                make(folder)
        (folder / "README.md").write_text("by hand")  # does not help
        with pytest.raises(ValueError, match="forbids to share"):
            refresh_card(folder)
        (folder / "README.md").unlink()
        assert cli.main(["card", str(folder)]) == 2 and "forbids to share" in capsys.readouterr().err
        assert ModelCard.load(write_model_card(folder, license="cc-by-4.0")).data.license == "cc-by-4.0"


def test_a_license_with_a_name_and_an_unknown_one(tmp_path, caplog):
    card = {"license": "other", "license_name": "acme-open", "license_link": "LICENSE"}
    named = write_folder(tmp_path / "named", [{**PRUNE, "inputs": {"source": SOURCE | {"card": card}}}])
    text = render_model_card(named)
    assert "[acme-open](LICENSE)." in text and ModelCard(text).data.license_name == "acme-open"
    unknown = write_folder(tmp_path / "unknown", [{**PRUNE, "inputs": {"source": {"id": "acme/x"}}}])
    text = render_model_card(unknown)
    assert "## License" not in text and "license" not in ModelCard(text).data.to_dict()
    assert "license is not known" in caplog.text
    write_model_card(unknown, license="mit")
    assert ModelCard(refresh_card(unknown)).data.license == "mit"  # said once


def test_a_card_by_hand_is_kept_and_ours_is_made_anew(tmp_path):
    folder = write_folder(tmp_path / "m", [PRUNE])
    path = write_model_card(folder)
    first = path.read_text(encoding="utf-8")
    assert refresh_card(folder) == first == path.read_text(encoding="utf-8")
    (folder / "minitron.json").write_text(json.dumps({"format_version": 1, "stages": [PRUNE, DISTILL]}))
    assert "### 2. Distillation" in refresh_card(folder) and "### 2. Distillation" in path.read_text(encoding="utf-8")
    path.write_text(first.replace(MARK, "") + "\nMine.\n", encoding="utf-8")
    assert refresh_card(folder) is None and path.read_text(encoding="utf-8").endswith("Mine.\n")
    with pytest.raises(FileExistsError, match="was written or edited by hand"):
        write_model_card(folder)
    assert write_model_card(folder, overwrite=True).read_text(encoding="utf-8") != first


def test_what_is_unknown_is_left_out(tmp_path):
    bare = write_folder(tmp_path / "bare", [{"stage": "prune"}, {"stage": "something-new", "settings": {"x": 1}}])
    text = render_model_card(bare)
    for word in ("None", "null", "unknown", "## Evaluation", "kWh", "hf-minitron prune"):
        assert word not in text
    assert "### 2. something-new" in text and "- `x`: `1`" in text
    assert "base_model" not in ModelCard(text).data.to_dict()


def test_energy_is_seconds_times_rated_power():
    eight = estimate_energy([stage("distill", 3600.0, 1)])[0]
    assert eight.kwh == pytest.approx(8 * 0.7 * 1.2) and eight.kg_co2 == pytest.approx(8 * 0.7 * 1.2 * 0.48)
    assert eight.machine == "8 × NVIDIA H100 80GB HBM3"
    cpu = {"stage": "prune", "seconds": 36.0, "hardware": {"cpu": "EPYC", "cpu_cores": 2}}
    assert estimate_energy([cpu])[0].kwh == pytest.approx(36 * 20 * 1.2 / 3.6e6)
    other = {**cpu, "hardware": {"gpus": [{"name": "Some GPU"}]}}
    assert estimate_energy([other, {"stage": "prune", "seconds": 1.0}, {**cpu, "seconds": None}]) == []


def test_rebuilt_commands_parse_into_the_recorded_settings():
    words = shlex.split(stage_command(PRUNE, "out").replace("\\\n", ""))
    model, calibration, prune, output, _ = cli._parse("prune", cli.COMMANDS["prune"], words[2:])
    assert (model.model, model.revision) == (SOURCE["id"], SOURCE["commit"])
    assert (prune.hidden_size, prune.intermediate_size, prune.num_hidden_layers) == (3072, 9216, None)
    assert (calibration.calibration_dataset, calibration.calibration_config) == ("acme/web-text", "clean")
    assert (calibration.num_samples, calibration.sequence_length, output.output_dir) == (1024, 4096, "out")
    words = shlex.split(stage_command(DISTILL, "out").replace("\\\n", ""))
    parsed = cli._parse("distill", cli.COMMANDS["distill"], [*words[2:], "--use-cpu", "true", "--bf16", "false"])
    arguments, config = parsed[:2]
    assert (arguments.student_model, arguments.teacher_revision) == ("llama-3.1-4b-pruned", SOURCE["commit"])
    assert (config.lr_scheduler_kwargs, config.max_steps, config.push_to_hub) == ({"min_lr_rate": 0.1}, 9961, False)


def test_commands_of_corrections_and_alignment_parse_too():
    def parse(stage):
        name, *words = shlex.split(stage_command(stage, "out").replace("\\\n", ""))[1:]
        return cli._parse(name, cli.COMMANDS[name], [*words, "--use-cpu", "true", "--bf16", "false"])

    arguments, config, _ = parse(CORRECT)
    assert (arguments.teacher_model, arguments.teacher_revision) == (SOURCE["id"], SOURCE["commit"])
    assert (config.method, config.learning_rate, config.max_steps) == ("full", 2e-5, 100)
    arguments, config, _ = parse({**RPO, "inputs": {"source": SOURCE, "reference": SOURCE}})
    assert (arguments.model, arguments.model_revision, arguments.rounds) == (SOURCE["id"], SOURCE["commit"], 1)
    assert (config.beta, config.learning_rate, config.output_dir) == (0.05, 9e-7, "out")
    arguments, _, lora = parse({**RPO, "stage": "sft", "settings": {"lora_r": 4, "chat_template": "chatml"}})
    assert (arguments.model, arguments.chat_template, lora.lora_r) == ("llama-3.1-4b-sft", "chatml", 4)
    while_teaching = {**CORRECT, "settings": {"teacher_correction": "lora"}}
    assert stage_command(while_teaching, "out") is None  # the student's record has the command


def test_a_streamed_mix_is_told_and_can_be_repeated(tmp_path):
    sources = [{**TEXT, "weight": 0.7, "num_tokens": 700}, {**FILES, "weight": 0.3}]
    stream = {"kind": "stream", "sources": sources, "shuffle_buffer": 10000, "epochs": 2, "stopping": "all"}
    distill = {**DISTILL, "data": {"train": stream}}
    text = render_model_card(write_folder(tmp_path / "m", [PRUNE, distill]))
    assert "- training text: a stream of 70 % [acme/web-text]" in text and ", 30 % `a.jsonl`" in text
    assert ModelCard(text).data.datasets == ["acme/web-text"]
    (tmp_path / "mix.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    mix = read_mix(tmp_path / "mix.yaml")
    assert [(entry.source, entry.weight, entry.config_name) for entry in mix] == [
        ("acme/web-text", 0.7, "clean"),
        ("a.jsonl", 0.3, None),
    ]
    assert "--dataset-mix mix.yaml --shuffle-buffer 10000 --dataset-epochs 2 --stopping all" in " ".join(
        stage_command(distill, "out").replace("\\\n", "").split()
    )


def test_depth_and_refit_are_in_the_command():
    def command(**settings):
        given = {**PRUNE["settings"], "sizes": PRUNE["settings"]["sizes"] | {"num_hidden_layers": 30}, **settings}
        return " ".join(shlex.split(stage_command({**PRUNE, "settings": given}, "out").replace("\\\n", "")))

    scan = {"task": {"task": "winogrande", "metric": "acc"}}
    by_task = command(depth={"pattern": "contiguous", "metric": "accuracy"}, scans={"a": scan}, kept_layers=[0])
    assert (
        "--num-hidden-layers 30 --depth-metric accuracy --depth-pattern contiguous --depth-task winogrande" in by_task
    )
    by_hand = command(depth={"drop_layers": [3, 5]}, kept_layers=[i for i in range(32) if i not in (3, 5)])
    assert "--drop-layers 3 5" in by_hand and "--num-hidden-layers" not in by_hand
    refit = command(method="refit", mode="sequential", ridge=0.01, without=["basis"], kept_layers=list(range(30)))
    assert (
        "--drop-layers 30 31 --method refit --refit-mode sequential --refit-ridge 0.01 --refit-without basis" in refit
    )
    assert stage_command({**PRUNE, "data": {"kind": "dataset", "fingerprint": "x"}}, "out") is None
    assert stage_command({**PRUNE, "inputs": {}}, "out") is None


def test_the_command_line_writes_a_card(tmp_path, capsys):
    folder = write_folder(tmp_path / "m", [PRUNE])
    assert cli.main(["card", str(folder), "--name", "acme/tiny"]) == 0
    assert "a pruned model, of 1 recorded stages; license llama3.1" in capsys.readouterr().out
    assert 'from_pretrained("acme/tiny")' in (folder / "README.md").read_text(encoding="utf-8")
    assert cli.main(["card", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
