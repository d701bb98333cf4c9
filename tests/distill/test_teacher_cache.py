"""A cached teacher: the live one's targets, loss and gradient; what a cache holds; and caches that do not fit."""

from __future__ import annotations

import copy
import hashlib
import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from hf_minitron.distill import cache_writer, teacher_cache
from hf_minitron.distill.cache_files import checksum
from hf_minitron.distill.cache_writer import CacheFormat, TeacherFacts, write_cache
from hf_minitron.distill.collator import CausalLMCollator
from hf_minitron.distill.config import DistillationConfig
from hf_minitron.distill.fingerprints import dataset_keys, hash_tokenizer, keys_tensor, row_key
from hf_minitron.distill.teacher import LiveTeacher
from hf_minitron.distill.teacher_cache import CachedTeacher
from hf_minitron.distill.trainer import DistillationTrainer

helpers = runpy.run_path(str(Path(__file__).with_name("distillation_run.py")))
tiny_llama, uneven_rows, GradientCapture = (helpers[n] for n in ("tiny_llama", "uneven_rows", "GradientCapture"))

FACTS = TeacherFacts(teacher={"path": "tiny", "sha256": "f" * 64}, context={"max_length": 20, "packing": "wrapped"})
EXACT = CacheFormat("exact", dtype=torch.float32, max_shard_bytes=6000)
TOP_K = CacheFormat("topk", top_k=8, dtype=torch.float32, max_shard_bytes=4000)
ROWS = uneven_rows(40)
EVAL_ROWS = uneven_rows(7, seed=1)


@pytest.fixture(scope="module")
def teacher():
    return tiny_llama(24, seed=2)


@pytest.fixture(scope="module")
def caches(tmp_path_factory, teacher):
    """One folder for each kind, in fp32, of training and evaluation rows; read only."""
    root = tmp_path_factory.mktemp("caches")
    for name, form in {"exact": EXACT, "topk": TOP_K, "all": CacheFormat("topk", 64, torch.float32)}.items():
        write_cache(teacher, ROWS + EVAL_ROWS, root / name, form, FACTS, batch_size=3)
    return root


def make_trainer(folder, teacher, rows=ROWS, student=None, **options):
    defaults = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1}
    defaults |= {"save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    config = DistillationConfig(output_dir=str(folder), **(defaults | options))
    return DistillationTrainer(
        student or tiny_llama(16, seed=1), teacher, config, train_dataset=rows, eval_dataset=EVAL_ROWS,
        callbacks=[GradientCapture()],
    )  # fmt: skip


def gradient(trainer) -> dict[str, torch.Tensor]:
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, GradientCapture))
    return {name: torch.tensor(values) for name, values in callback.values.items()}


def logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# --- the same loss and gradient


@pytest.mark.parametrize("tied", [False, True])
def test_an_exact_cache_trains_as_the_live_teacher(tmp_path, teacher, caches, tied):
    runs, metrics = {}, {}
    for name, source in {"live": copy.deepcopy(teacher), "cached": CachedTeacher.open(caches / "exact")}.items():
        options = {"temperature": 2.0, "ce_weight": 0.25, "gradient_accumulation_steps": 2, "max_steps": 1}
        runs[name] = make_trainer(tmp_path / name, source, student=tiny_llama(16, seed=1, tied=tied), **options)
        metrics[name] = runs[name].evaluate()
        runs[name].train()
    for one, other in zip(logs(runs["live"]), logs(runs["cached"]), strict=True):
        for key in ("loss", "kl", "lm_loss", "teacher_lm_loss", "top1_agreement", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-6), key
    expected = gradient(runs["live"])
    for name, values in gradient(runs["cached"]).items():
        assert (values - expected[name]).norm() <= 1e-6 * expected[name].norm(), name
    for key in ("eval_kl", "eval_loss", "eval_teacher_perplexity", "eval_num_tokens"):
        assert metrics["cached"][key] == pytest.approx(metrics["live"][key], rel=1e-6), key


def test_one_batch_has_the_live_teachers_targets_bit_for_bit(tmp_path, teacher):
    """Rows that were cached in the same batch; other batches round the matrix products differently."""
    rows = ROWS[:4]
    cache = write_cache(teacher, rows, tmp_path / "cache", CacheFormat("exact", dtype=torch.float32), FACTS)
    batch = CausalLMCollator(row_keys=True)(rows)
    keys = batch.pop("row_keys")
    del batch["labels"]
    live, cached = LiveTeacher(teacher, torch.device("cpu")).targets(batch), cache.targets(batch, keys)
    used = batch["attention_mask"].flatten().bool()
    assert torch.equal(live.hidden[used], cached.hidden[used]) and torch.equal(live.weight, cached.weight)
    assert not cached.hidden[~used].any() and live.bias is None and cached.bias is None


def test_rounding_the_states_to_bf16_changes_the_loss_by_less_than_a_thousandth(tmp_path, teacher, caches):
    form = CacheFormat("exact", dtype=torch.bfloat16)
    rounded = write_cache(teacher, ROWS + EVAL_ROWS, tmp_path / "bf16", form, FACTS)
    exact = CachedTeacher.open(caches / "exact")
    kls = [make_trainer(tmp_path / str(i), c).evaluate()["eval_kl"] for i, c in enumerate((exact, rounded))]
    assert kls[0] != kls[1] and kls[1] == pytest.approx(kls[0], rel=1e-3)


def test_a_top_k_cache_of_the_whole_vocabulary_gives_the_full_kl_and_gradient(tmp_path, teacher, caches):
    runs = {}
    for name, source in {"live": copy.deepcopy(teacher), "cached": CachedTeacher.open(caches / "all")}.items():
        runs[name] = make_trainer(tmp_path / name, source, ce_weight=0.25, max_steps=1)
        runs[name].train()
    one, other = (logs(run)[0] for run in runs.values())
    for key in ("loss", "kl", "lm_loss", "top1_agreement"):
        assert other[key] == pytest.approx(one[key], rel=2e-6), key
    assert "teacher_lm_loss" in one and "teacher_lm_loss" not in other
    expected = gradient(runs["live"])
    for name, values in gradient(runs["cached"]).items():
        assert (values - expected[name]).norm() <= 2e-6 * expected[name].norm(), name


def test_a_top_k_cache_trains_and_leaves_out_what_it_does_not_know(tmp_path, teacher, caches):
    full = make_trainer(tmp_path / "live", copy.deepcopy(teacher)).evaluate()
    trainer = make_trainer(tmp_path / "cached", CachedTeacher.open(caches / "topk"), max_steps=40, rows=EVAL_ROWS)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert 0 < before["eval_kl"] < full["eval_kl"] and before["eval_lm_loss"] == pytest.approx(full["eval_lm_loss"])
    assert after["eval_kl"] < 0.5 * before["eval_kl"]
    assert before["eval_top1_agreement"] == full["eval_top1_agreement"]
    assert not {"eval_teacher_lm_loss", "eval_teacher_perplexity"} & before.keys()
    _, outputs = trainer.compute_loss(trainer.model, trainer.data_collator(EVAL_ROWS[:2]), return_outputs=True)
    assert set(outputs) == {"token_kl", "token_ce", "top1_agreement"}


# --- rows by content


def test_rows_are_found_in_any_order_batch_and_subset(teacher, caches):
    cache = CachedTeacher.open(caches / "exact")
    assert cache.num_rows == 47 and len(cache.manifest["shards"]) > 3
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    for start, stop in ((0, 1), (1, 8), (8, 40)):
        rows = [ROWS[i] for i in order[start:stop]]
        batch = CausalLMCollator(row_keys=True)(rows)
        keys = batch.pop("row_keys")
        del batch["labels"]
        found = cache.targets(batch, keys).hidden.view(len(rows), -1, 24)
        for row, states in zip(rows, found, strict=True):
            alone = teacher.model(torch.tensor([row["input_ids"]])).last_hidden_state[0]
            torch.testing.assert_close(states[: len(alone)], alone, rtol=1e-4, atol=1e-5)


def test_resuming_in_shuffled_order_is_bit_for_bit(tmp_path, caches):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "warmup_steps": 0}
    runs = [make_trainer(tmp_path / n, CachedTeacher.open(caches / "topk"), **options) for n in ("straight", "resumed")]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert [log["loss"] for log in logs(runs[0])] == [log["loss"] for log in logs(runs[1])]
    assert all(torch.equal(*pair) for pair in zip(*(run.model.parameters() for run in runs), strict=True))


def test_keys_follow_content_alone():
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2], "attention_mask": [1, 1]}, {"input_ids": [1, 2]}]
    keys = dataset_keys(rows)
    assert keys[0] != keys[1] == keys[2] and len(keys[0]) == 16
    masked = {"input_ids": [1, 2], "attention_mask": [1, 0]}
    assert dataset_keys([masked])[0] != keys[2]
    assert dataset_keys(Dataset.from_list(rows[:1] + rows[2:] + rows[2:])) == [keys[0], keys[2], keys[2]]
    with_masks = Dataset.from_list([masked, {"input_ids": [5], "attention_mask": [1]}]).select([1, 0])
    assert dataset_keys(with_masks)[1] == dataset_keys([masked])[0]
    batch = CausalLMCollator(row_keys=True)([*rows, masked])
    assert torch.equal(batch["row_keys"], keys_tensor([*keys, dataset_keys([masked])[0]]))
    assert "row_keys" not in CausalLMCollator()(rows)
    assert row_key(torch.tensor([7]).numpy()) == dataset_keys([{"input_ids": [7]}])[0]


def test_a_row_is_stored_once(tmp_path, teacher):
    cache = write_cache(teacher, ROWS[:3] + ROWS[1:2] * 5, tmp_path / "cache", EXACT, FACTS)
    assert cache.num_rows == 3 and cache.manifest["num_tokens"] == sum(len(row["input_ids"]) for row in ROWS[:3])


def test_open_shards_are_few(monkeypatch, caches):
    monkeypatch.setattr(teacher_cache, "MAX_OPEN_SHARDS", 2)
    cache = CachedTeacher.open(caches / "exact")
    batch = CausalLMCollator(row_keys=True)(ROWS)
    hidden = cache.targets(batch, batch["row_keys"]).hidden
    assert len(cache._open) == 2 and len(cache._verified) > 3
    assert torch.equal(cache.targets(batch, batch["row_keys"]).hidden, hidden)


# --- what a cache holds


def test_the_files_of_a_top_k_cache(caches, teacher):
    manifest = json.loads((caches / "topk" / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("kind", "top_k", "dtype", "vocab_size", "bytes_per_token")} == {
        "kind": "topk", "top_k": 8, "dtype": "float32", "vocab_size": 64, "bytes_per_token": 8 * 8 + 4,
    }  # fmt: skip
    assert CacheFormat("topk").bytes_per_token(4096) == 388 and CacheFormat("exact").bytes_per_token(4096) == 8192
    assert manifest["teacher"] == FACTS.teacher and manifest["context"] == FACTS.context
    assert manifest["versions"]["torch"] and manifest["teacher_config"]["model_type"] == "llama"
    names = {"manifest.json", "index.safetensors", *(shard["file"] for shard in manifest["shards"])}
    assert {path.name for path in (caches / "topk").iterdir()} == names
    ids = torch.tensor([ROWS[0]["input_ids"]])
    log_probs = teacher(ids).logits[0].double().log_softmax(-1)
    with safe_open(caches / "topk" / manifest["shards"][0]["file"], "pt") as shard:
        tensors = {name: shard.get_tensor(name)[: ids.shape[1]] for name in ("token_ids", "log_probs", "tail_mass")}
    assert [tensor.dtype for tensor in tensors.values()] == [torch.uint32, torch.float32, torch.float32]
    expected, order = log_probs.topk(8)
    assert torch.equal(tensors["token_ids"].long(), order)
    torch.testing.assert_close(tensors["log_probs"].double(), expected, rtol=1e-5, atol=1e-5)
    rest = log_probs.exp().scatter(-1, order, 0).sum(-1)
    torch.testing.assert_close(tensors["tail_mass"].double(), rest, rtol=1e-5, atol=0)
    for shard in manifest["shards"]:
        path = caches / "topk" / shard["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        assert shard["num_tokens"] * manifest["bytes_per_token"] <= 4000 and path.stat().st_size == shard["num_bytes"]


def test_log_probabilities_come_from_precise_logits_and_the_heads_bias(tmp_path, monkeypatch):
    """A bias, a limited vocabulary, chunks of logits of one token, and half-precision storage."""
    monkeypatch.setattr(cache_writer, "LOGITS_BYTES", 1)
    model = tiny_llama(24, seed=3)
    model.lm_head = nn.Linear(24, 64, bias=True)
    rows, form = ROWS[:3], CacheFormat("topk", 5, torch.float16, vocab_limit=50)
    cache = write_cache(model, rows, tmp_path / "cache", form, FACTS)
    batch = CausalLMCollator(row_keys=True)(rows)
    targets = cache.targets(batch, batch["row_keys"])
    with torch.no_grad():
        hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        log_probs = (model.lm_head(hidden)[..., :50]).log_softmax(-1).flatten(0, 1)
    used = batch["attention_mask"].flatten().bool()
    assert torch.equal(targets.token_ids[used].long(), log_probs.topk(5).indices[used])
    torch.testing.assert_close(targets.log_probs[used].float(), log_probs.topk(5).values[used], rtol=1e-3, atol=1e-3)
    assert targets.log_probs.dtype == torch.float16 and targets.vocab_size == 50


def test_an_exact_cache_keeps_the_head_and_its_bias(tmp_path):
    model = tiny_llama(24, seed=3)
    model.lm_head = nn.Linear(24, 64, bias=True)
    cache = write_cache(model, ROWS[:2], tmp_path / "cache", EXACT, FACTS)
    batch = CausalLMCollator(row_keys=True)(ROWS[:2])
    assert torch.equal(cache.targets(batch, batch["row_keys"]).bias, model.lm_head.bias)


def test_a_capped_and_scaled_teacher_says_the_same_from_both_kinds(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "tie_word_embeddings": False}
    torch.manual_seed(4)
    for model in (
        Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=2.0, **sizes, **heads)),
        GraniteForCausalLM(
            GraniteConfig(logits_scaling=3.0, **{k: v for k, v in sizes.items() if k != "head_dim"}, **heads)
        ),
    ):
        student = copy.deepcopy(model)
        with torch.no_grad():
            student.lm_head.weight.mul_(0.5)
        name = type(model).__name__
        found = [make_trainer(tmp_path / name, model, student=student).evaluate()["eval_kl"]]
        for form in (CacheFormat("exact", dtype=torch.float32), CacheFormat("topk", 64, torch.float32)):
            cache = write_cache(model, ROWS + EVAL_ROWS, tmp_path / name / form.kind, form, FACTS)
            found.append(make_trainer(tmp_path / name, cache, student=student).evaluate()["eval_kl"])
        assert found[0] > 0.01 and found[1:] == pytest.approx([found[0]] * 2, rel=1e-5)


# --- going on, and refusing


def test_a_finished_cache_is_opened_and_another_one_refused(tmp_path, teacher, caches, monkeypatch):
    folder = tmp_path / "cache"
    shutil.copytree(caches / "topk", folder)
    monkeypatch.setattr(cache_writer._Writer, "write_shard", None)
    write_cache(teacher, ROWS + EVAL_ROWS, folder, TOP_K, FACTS)  # nothing is computed
    with pytest.raises(FileExistsError, match=r"differs in bytes_per_token, top_k: there .*'top_k': 8.*asked for .*9"):
        write_cache(teacher, ROWS + EVAL_ROWS, folder, CacheFormat("topk", 9, torch.float32, None, 4000), FACTS)
    with pytest.raises(FileExistsError, match="differs in num_rows, num_tokens, rows_sha256"):
        write_cache(teacher, ROWS, folder, TOP_K, FACTS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_cache(teacher, ROWS, tmp_path / "other", TOP_K, FACTS)


def test_an_unfinished_cache_goes_on_with_the_missing_shards(tmp_path, teacher, caches, monkeypatch):
    folder, written = tmp_path / "cache", []
    write = cache_writer._Writer.write_shard

    def stop_at_the_third(self, folder, number):
        if number == 2:
            raise KeyboardInterrupt
        write(self, folder, number)

    monkeypatch.setattr(cache_writer._Writer, "write_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        write_cache(teacher, ROWS + EVAL_ROWS, folder, TOP_K, FACTS, batch_size=3)
    with pytest.raises(FileNotFoundError, match="unfinished cache: run the same"):
        CachedTeacher.open(folder)
    with pytest.raises(FileExistsError, match="unfinished cache that differs in max_shard_bytes"):
        write_cache(teacher, ROWS + EVAL_ROWS, folder, CacheFormat("topk", 8, torch.float32), FACTS)
    (folder / "rows-00001.safetensors").write_bytes(b"half")
    (folder / ".rows-00002.safetensors.1.tmp").write_bytes(b"half")
    monkeypatch.setattr(
        cache_writer._Writer, "write_shard", lambda self, *rest: (written.append(rest[1]), write(self, *rest))
    )
    write_cache(teacher, ROWS + EVAL_ROWS, folder, TOP_K, FACTS, batch_size=3)
    assert written == list(range(1, len(list(folder.glob("rows-*")))))
    assert content(folder) == content(caches / "topk")


def test_overwriting_starts_again(tmp_path, teacher):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / ".plan.json.1.tmp").write_text("half")  # killed before anything was there
    write_cache(teacher, ROWS, folder, TOP_K, FACTS)
    cache = write_cache(teacher, ROWS[:5], folder, EXACT, FACTS, overwrite=True)
    assert (cache.kind, cache.num_rows) == ("exact", 5) and not (folder / "rows-00005.safetensors").exists()


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_flipped_byte_anywhere_is_noticed(tmp_path, caches):
    for name in ("rows-00001.safetensors", "index.safetensors", "head.safetensors", "manifest.json"):
        folder = tmp_path / name
        shutil.copytree(caches / "exact", folder)
        content = bytearray((folder / name).read_bytes())
        content[-40] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged|not a whole manifest"):
            CachedTeacher.open(folder).verify()
    trainer = make_trainer(tmp_path, CachedTeacher.open(tmp_path / "rows-00001.safetensors"), max_steps=20)
    with pytest.raises(ValueError, match=r"rows-00001.safetensors is damaged: its SHA-256"):
        trainer.train()


def test_a_missing_shard_and_other_versions_are_refused(tmp_path, caches):
    folder = tmp_path / "cache"
    shutil.copytree(caches / "exact", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "rows-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of \d+ shards, such as rows-00002"):
        CachedTeacher.open(folder)
    del manifest["checksum"]
    manifest["format_version"] = 99
    (folder / "manifest.json").write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))
    with pytest.raises(ValueError, match="format_version=99"):
        CachedTeacher.open(folder)
    with pytest.raises(FileNotFoundError, match="no teacher's cache"):
        CachedTeacher.open(tmp_path)


@pytest.mark.parametrize("kind", ["list", "dataset", "dict"])
def test_rows_that_are_not_cached_are_counted_before_training(tmp_path, caches, kind):
    cache = CachedTeacher.open(caches / "topk")
    rows = [*ROWS[:5], *uneven_rows(6, seed=9)]
    wrap = {"list": list, "dataset": Dataset.from_list, "dict": list}[kind]
    with pytest.raises(ValueError, match=r"6 of 11 rows of train_dataset are not in the cache"):
        make_trainer(tmp_path, cache, rows=wrap(rows))
    if kind == "dict":
        with pytest.raises(ValueError, match=r"6 of 11 rows of eval_dataset\['b'\]"):
            cache.check_rows({"a": ROWS, "b": rows}, "eval_dataset")
    with pytest.raises(ValueError, match="lacks 1 of 2 rows of a batch"):
        trainer = make_trainer(tmp_path, cache)
        trainer.compute_loss(trainer.model, trainer.data_collator([ROWS[0], rows[-1]]))


def test_a_batch_without_keys_is_refused(tmp_path, caches):
    trainer = make_trainer(tmp_path, CachedTeacher.open(caches / "topk"))
    with pytest.raises(ValueError, match=r"no row_keys.*row_keys=True"):
        trainer.compute_loss(trainer.model, CausalLMCollator()(ROWS[:2]))


def test_students_and_settings_that_do_not_fit_are_refused(tmp_path, caches, tiny_tokenizer):
    exact, top_k = CachedTeacher.open(caches / "exact"), CachedTeacher.open(caches / "topk")
    bigger = tiny_llama(16, seed=1, vocab_size=72)
    with pytest.raises(ValueError, match="student has 72 vocabulary entries and the teacher 64"):
        make_trainer(tmp_path, exact, student=bigger)
    with pytest.raises(ValueError, match=r"student's distribution has 72 entries.*cached teacher's 64.*vocab_limit=64"):
        make_trainer(tmp_path, top_k, student=bigger)
    make_trainer(tmp_path, top_k, student=bigger, vocab_limit=64).evaluate()
    with pytest.raises(ValueError, match=r"temperature=2.0 needs the teacher's whole distribution"):
        make_trainer(tmp_path, top_k, temperature=2.0)
    with pytest.raises(ValueError, match=r"divergence=reverse_kl needs the teacher's whole distribution"):
        make_trainer(tmp_path, top_k, divergence="reverse_kl")
    make_trainer(tmp_path, exact, divergence="reverse_kl").evaluate()
    exact.manifest["tokenizer_sha256"] = "0" * 64
    with pytest.raises(ValueError, match="made with another tokenizer: vocabulary and merges 000000000000"):
        exact.check_student(tiny_llama(16, seed=1), None, tiny_tokenizer)


def test_tokenizers_are_known_by_vocabulary_and_merges(tiny_tokenizer):
    other = copy.deepcopy(tiny_tokenizer)
    other.padding_side = "left"
    assert hash_tokenizer(other) == hash_tokenizer(tiny_tokenizer)
    backend = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    backend["model"]["merges"] = backend["model"]["merges"][::-1]
    swapped = copy.deepcopy(tiny_tokenizer)
    swapped._tokenizer = type(swapped.backend_tokenizer).from_str(json.dumps(backend))
    assert len(swapped) == len(other) and hash_tokenizer(swapped) != hash_tokenizer(other)
    other.add_tokens(["<new>"])
    assert hash_tokenizer(other) != hash_tokenizer(tiny_tokenizer)


def test_teachers_that_cannot_be_cached_are_refused(tmp_path, teacher):
    with pytest.raises(ValueError, match=r"top_k=65.*64 vocabulary entries"):
        write_cache(teacher, ROWS, tmp_path / "a", CacheFormat("topk", 65), FACTS)
    cohere = CohereForCausalLM(CohereConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                            num_attention_heads=2))  # fmt: skip
    with pytest.raises(ValueError, match=r"logit_scale=0.0625 of model_type='cohere'"):
        write_cache(cohere, ROWS, tmp_path / "a", TOP_K, FACTS)
    broken = copy.deepcopy(teacher)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"hidden for rows 0 to 4 are not finite in torch.float32"):
        write_cache(broken, ROWS, tmp_path / "b", EXACT, FACTS)
    with pytest.raises(ValueError, match="no rows"):
        write_cache(teacher, [], tmp_path / "a", TOP_K, FACTS)
    with pytest.raises(ValueError, match="batch_size=0"):
        write_cache(teacher, ROWS, tmp_path / "a", TOP_K, FACTS, batch_size=0)
    assert not (tmp_path / "a").exists()
    for options, message in (
        ({"kind": "some"}, "kind='some'"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
        ({"vocab_limit": 5}, "vocab_limit=5 is for top-k"),
        ({"kind": "topk", "top_k": 0}, "top_k=0"),
    ):
        with pytest.raises(ValueError, match=message):
            CacheFormat(**options)


def test_too_little_memory_or_disk_says_what_to_lower(tmp_path, teacher, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache_writer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(OSError, match=r"0.0 GB free.*96 bytes a token.*smaller --top-k"):
            write_cache(teacher, ROWS, tmp_path / "a", EXACT, FACTS)

    def exhausted(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(cache_writer, "last_hidden", exhausted)
    with pytest.raises(ValueError, match=r"5 rows of up to 14 tokens. Lower --batch-size"):
        write_cache(teacher, ROWS, tmp_path / "b", EXACT, FACTS)
