"""Claims: every flag is read, wins over the preset, and a wrong value says what is expected."""

import re
from dataclasses import asdict

import pytest

import train_pretrain
import train_sft
from model.pretrained.checkpoint import newest_checkpoint, read_run
from tests.tiny import ROOT, make_world, metrics
from training.presets import PRESETS, read_flags, resolve, settings_of_preset
from training.schedules import SCHEDULES
from training.settings import CHANGES_CURVE, FIXED, FREE, PRESET, SETTINGS, TRACKERS

# Every flag with a value that no preset has; booleans have both of theirs.
VALUES = {
    "preset": [("smollm2-dinov2", "smollm2-dinov2")], "model": [("some/dir", "some/dir")],
    "language_model": [("L", "L")], "vision_tower": [("V", "V")],
    "vision_feature_layer": [("-3", -3)],
    "vision_feature_select": [("class", "class"), ("pooled", "pooled"), ("patches", "patches")],
    "projector": [("linear", "linear"), ("mlp", "mlp"), ("norm_mlp", "norm_mlp")],
    "pretrained_projector": [("P", "P")],
    "pixel_shuffle": [("3", 3)], "template": [("qwen3", "qwen3")], "image_token": [("@", "@")],
    "system": [("S", "S"), ("", "")], "data": [("D", "D"), (["D:2", "E"], ["D:2", "E"])],
    "image_folder": [("I", "I")], "approximate_resize": [(True, True), (False, False)],
    "follow_links": [(True, True), (False, False)],
    "feature_cache": [("F", "F")], "feature_cache_gb": [("2.5", 2.5)],
    "out": [("O", "O")], "resume": [(True, True), (False, False)], "steps": [("7", 7)],
    "epochs": [("1.5", 1.5)], "batch_size": [("5", 5)], "gradient_accumulation_steps": [("9", 9)],
    "max_length": [("77", 77)], "learning_rate": [("0.5", 0.5)],
    "projector_learning_rate": [("0.25", 0.25)], "vision_learning_rate": [("0.125", 0.125)],
    "weight_decay": [("0.3", 0.3)], "warmup_ratio": [("0.4", 0.4)], "max_grad_norm": [("2.5", 2.5)],
    "schedule": [(name, name) for name in SCHEDULES],
    "dtype": [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32")],
    "gradient_checkpointing": [(True, True), (False, False)], "seed": [("8", 8)],
    "save_steps": [("6", 6)],
    "save_total_limit": [("4", 4)], "num_workers": [("0", 0)], "max_skip_ratio": [("0.2", 0.2)],
    "log_samples": [(True, True), (False, False)],
    "train_projector": [(True, True), (False, False)],
    "train_language": [("last:2", "last:2"), ("none", "none"), ("all", "all"),
                       ("first:1+last:1", "first:1+last:1")],
    "train_vision": [(True, True), (False, False)], "lora": [(True, True), (False, False)],
    "lora_rank": [("3", 3)], "lora_alpha": [("5", 5.0)], "lora_dropout": [("0.5", 0.5)],
    "lora_targets": [("q_proj", ["q_proj"]), (["k_proj", "up_proj"], ["k_proj", "up_proj"])],
    "lora_from": [("A", "A")], "full_checkpoint": [(True, True), (False, False)],
    "eval_steps": [("12", 12)], "eval_data": [("E", "E")], "eval_samples": [("13", 13)],
    "eval_answers": [("3", 3), ("0", 0)], "overfit": [("14", 14)],
    "report_to": [(name, name) for name in TRACKERS],
    "parallel": [("fsdp", "fsdp"), ("ddp", "ddp")],
}


def settings(*flags, stage="pretrain", earlier=None):
    return vars(resolve(read_flags("", stage, flags), stage, earlier or {}))


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_every_flag_reaches_the_settings(stage):
    assert VALUES.keys() == vars(read_flags("", stage, [])).keys(), "the list above is complete"
    for name, pairs in VALUES.items():
        for given, expected in pairs:
            flags = ([f"--{name}" if given else f"--no-{name}"] if isinstance(given, bool)
                     else [f"--{name}", *([given] if isinstance(given, str) else given)])
            assert settings(*flags, stage=stage)[name] == expected, flags


def test_every_setting_is_read_by_the_code():
    # The flags themselves stand in settings.py, which reads none of them.
    sources = [ROOT / "train_pretrain.py", *(
        path for room in ("training", "extras") for path in (ROOT / room).rglob("*.py")
        if path.name != "settings.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    unread = [name for name in settings() if not re.search(rf"(settings|flags)\.{name}\b", code)]
    # These are read by name, in a loop over names or by resolve() itself.
    assert set(unread) <= {"language_model", "vision_tower", "projector_learning_rate"}, unread
    assert "getattr(settings, TOWER_SETTINGS[part])" in code


def test_presets_are_complete():
    for name in PRESETS:
        for stage in ("pretrain", "sft"):
            assert settings("--preset", name, stage=stage)["preset"] == name
            assert settings_of_preset(name, stage).keys() >= asdict(PRESETS[name].sft).keys()
    assert settings()["preset"] == "emoji", "bare commands are the embedded default"
    assert (settings()["train_language"], settings()["lora"]) == ("none", False)
    assert settings(stage="sft")["train_language"] == "all"
    assert settings("--lora", stage="sft")["train_language"] == "none"
    lora = settings("--preset", "qwen2.5-siglip", stage="sft")
    assert (lora["train_language"], lora["lora"]) == ("none", True)
    whole = settings("--preset", "qwen2.5-siglip", "--train_language", "all", stage="sft")
    assert (whole["train_language"], whole["lora"]) == ("all", False), "one puts the other out"
    with pytest.raises(SystemExit):
        settings("--preset", "nothing")


def test_explicit_flags_win_over_the_checkpoint_and_that_over_the_preset():
    earlier = {"language_model": "theirs", "preset": "qwen2.5-siglip"}
    told = settings(stage="sft", earlier=earlier)
    assert told["language_model"] == "theirs" and told["learning_rate"] == 3e-4
    told = settings("--language_model", "mine", "--preset", "emoji", stage="sft", earlier=earlier)
    assert told["language_model"] == "mine" and told["data"] == "emoji"
    assert settings("--epochs", "2")["steps"] is None
    assert settings("--epochs", "2", "--steps", "5")["steps"] == 5
    assert settings()["dtype"] == "auto"
    assert settings("--dtype", "auto", earlier={"dtype": "bf16"})["dtype"] == "bf16"


@pytest.mark.parametrize("flags", [
    ["--batch_size", "0"], ["--gradient_accumulation_steps", "0"], ["--steps", "0"],
    ["--epochs", "0"],
    ["--learning_rate", "0"], ["--max_grad_norm", "-1"], ["--save_total_limit", "0"],
    ["--save_steps", "0"],
    ["--max_length", "0"], ["--warmup_ratio", "1"], ["--lora_dropout", "1"], ["--lora_rank", "0"],
    ["--eval_steps", "-1"], ["--eval_samples", "0"], ["--eval_answers", "-1"], ["--overfit", "0"],
    ["--feature_cache_gb", "0"], ["--max_skip_ratio", "-0.1"], ["--num_workers", "-1"],
    ["--learning_rate", "nan"]])
def test_impossible_numbers_are_refused(flags):
    with pytest.raises(SystemExit, match=f"{flags[0]} .*expected"):
        settings(*flags)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def told_by(out, script, flags):
    script.main([*flags, "--out", str(out)])
    return metrics(out), read_run(newest_checkpoint(out))


@pytest.mark.parametrize("flags", [
    ["--projector", "linear"], ["--pixel_shuffle", "2"], ["--vision_feature_layer", "-2"],
    ["--system", "Say it"], ["--batch_size", "3"], ["--gradient_accumulation_steps", "2"],
    ["--seed", "1"],
    ["--learning_rate", "0.02"], ["--projector_learning_rate", "0.02"], ["--warmup_ratio", "0.5"],
    ["--max_grad_norm", "0.001"], ["--weight_decay", "5.0"], ["--max_length", "45"]])
def test_flags_change_the_run(world, tmp_path, flags):
    """The losses are those of another run, so the flag was not only parsed."""
    plain, _ = told_by(tmp_path / "plain", train_pretrain, world)
    told, run = told_by(tmp_path / "told", train_pretrain,
                        [*world, "--max_skip_ratio", "1", *flags])
    assert [m["loss"] for m in plain] != [m["loss"] for m in told]
    assert str(run["settings"][flags[0][2:]]) == flags[1]


def test_workers_change_nothing(world, tmp_path):
    alone, _ = told_by(tmp_path / "0", train_pretrain, world)
    helped, _ = told_by(tmp_path / "1", train_pretrain, [*world, "--num_workers", "1"])
    assert [m["loss"] for m in alone] == [m["loss"] for m in helped]


def test_wrong_words_are_explained(world, tmp_path):
    for flags, message in (
        (["--train_language", "last:9"], "--train_language last:9.*last:N"),
        (["--train_language", "some"], "--train_language some"),
        (["--train_language", "first:1+last:3"], "--train_language first:1.*first:N.*1 to 2"),
        (["--no-train_projector", "--train_language", "none"], "nothing to train"),
        (["--lora", "--train_language", "all"], "--lora .*leave one of them out"),
        (["--lora", "--lora_targets", "c_attn"], "--lora: .*c_attn.*there are: .*q_proj"),
        (["--vision_tower", str(tmp_path)], "cannot build the model: .*config.json"),
        (["--data", str(tmp_path / "none.json")], "--data .*none.json"),
        (["--model", str(tmp_path)], "not a checkpoint"),
    ):
        with pytest.raises(SystemExit, match=message):
            train_sft.main([*world, "--model", "none", "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_the_table_is_the_only_list():
    """Every flag is a row, every preset field is one, and each row says what a resume may do."""
    names = [setting.name for setting in SETTINGS]
    assert len(names) == len(set(names))
    assert set(names) == vars(read_flags("", "sft", [])).keys() == settings().keys()
    assert {s.on_resume for s in SETTINGS} == {FIXED, FREE, CHANGES_CURVE}
    from_preset = {s.name for s in SETTINGS if s.default is PRESET}
    assert from_preset == settings_of_preset("emoji", "sft").keys()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_range_is_checked_at_its_border(setting):
    for limit, good in ((setting.above, False), (setting.at_least, True), (setting.below, False)):
        if limit is not None and good:
            setting.check(limit)
        elif limit is not None:
            with pytest.raises(SystemExit, match=f"--{setting.name} .*expected"):
                setting.check(limit)
    setting.check(None)
