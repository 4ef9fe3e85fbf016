"""A setting that has no effect is said; a sweep over one is refused, and trials that repeat others are counted."""

import pytest

from sftx.config.composition.prepare import prepare
from sftx.config.options import options
from sftx.errors import ConfigError

IDLE = [
    ("data.near_threshold=0.9", "data.duplicates=drop_near"),
    ("save_strategy=no eval_ratio=0 save_steps=5", "save_strategy=no saves no checkpoints"),
    ("save_strategy=epoch eval_steps=3 save_steps=5", "save_strategy=epoch"),
    ("save_strategy=no save_total_limit=2", "save_strategy=no saves no checkpoints"),
    ("save_strategy=no async_save=false", "save_strategy=no saves no checkpoints"),
    ("lost_work_minutes=3", "it is for save_steps=auto"),
    ("model.template=chatml", "qwen-tiny brings its own template"),
    ("template_name=chatml model.template=chatml", "template_name=chatml is used"),
    ("max_steps=5 num_train_epochs=3", "max_steps=5 ends the run"),
    ("mode=full lora_alpha=3", "mode=full does not use it"),
    ("mode.rank=4 lora_rank=8", "mode.rank=4 is used instead"),
    ("scheduler=constant warmup_steps=3", "scheduler=constant does not use it"),
    ("eval_ratio=0 eval_steps=3", "there is no evaluation"),
    ("eval_ratio=0 eval_max_rows=3", "there is no evaluation"),
    ("eval_file_name=aspcoder_eval.csv eval_ratio=0.1", "aspcoder_eval.csv is held out"),
    ("report_to=none on_tracker_error=continue", "no tracker is chosen"),
    ("data.shuffle_window=3", "data.streaming=true"),
    ("data.format=jsonl data.delimiter=,", "only CSV"),
    ("data.format=parquet data.encoding=utf-8", "only text files"),
    ("parallel=ddp parallel.num_processes=1 parallel.hang_seconds=9", "waits for no other"),
    ("callback=generate_samples callback.generate_samples.prompts=[x] callback.generate_samples.count=2", "given"),
]


@pytest.mark.parametrize(("words", "reason"), IDLE)
def test_a_setting_without_effect_is_said_once(words, reason):
    key = words.split()[-1].partition("=")[0]
    [note] = [n for n in prepare(words.split()).notes if n.startswith(f"{key}=")]
    assert " has no effect: " in note
    assert reason in note


def test_a_setting_that_acts_through_another_is_said_to():
    notes = prepare(["save_strategy=no", "save_steps=5"]).notes
    assert notes == ["save_steps=5 only sets eval_steps: save_strategy=no saves no checkpoints"]


@pytest.mark.parametrize(
    "words",
    [
        "", "eval_steps=3", "save_steps=5", "data.duplicates=drop_near data.near_threshold=0.9", "lora_rank=8",
        "save_steps=auto eval_steps=3 lost_work_minutes=3", "num_train_epochs=2", "debug=fast_dev", "debug=overfit",
        "scheduler=constant weight_decay=${warmup_steps} warmup_steps=3",
    ],
)  # fmt: skip
def test_a_setting_with_an_effect_is_not_said(words):
    assert [n for n in prepare(words.split()).notes if "no effect" in n or "only sets" in n] == []


@pytest.mark.parametrize("name", options("experiment"))
def test_no_experiment_sets_what_has_no_effect(name):
    assert [n for n in prepare([f"experiment={name}"]).notes if "no effect" in n or "only sets" in n] == []


def test_an_experiment_and_a_json_file_are_named(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nlora_rank: 8\nmode: full\n")
    assert prepare(["--config-dir", str(tmp_path), "experiment=mine"]).notes == [
        f"lora_rank=8 ({tmp_path}/experiment/mine.yaml:2) has no effect: mode=full does not use it"
    ]
    (tmp_path / "my.json").write_text('{\n"lora_rank": 8,\n"train_mode": "full"}\n')
    assert prepare([f"args_file={tmp_path}/my.json"]).notes == [
        f"lora_rank=8 ({tmp_path}/my.json:2) has no effect: mode=full does not use it"
    ]


@pytest.mark.parametrize(
    "words",
    [
        "mode=full lora_rank=8,16", "max_steps=5 num_train_epochs=1,2", "data.near_threshold=0.8,0.9",
        "mode.rank=4 lora_rank=8,16", "save_strategy=no,epoch save_steps=5,6 eval_steps=3",
    ],
)  # fmt: skip
def test_a_sweep_over_a_setting_without_effect_is_refused(words):
    with pytest.raises(ConfigError) as caught:
        prepare(["-m", *words.split()])
    [problem] = caught.value.problems
    assert "all its values train the same model: " in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("mode=lora,full lora_rank=8,16", "1 of 4 trials repeats another: lora_rank has no effect where mode=full"),
        ("mode=lora,full lora_rank=8,16 seed=1,2,3", "3 of 12 trials repeat another: lora_rank has no effect"),
        ("data.duplicates=keep,drop_near data.near_threshold=0.7,0.8,0.9", "2 of 6 trials repeat another"),
        ("optim=adamw_torch,adamw_hf", "1 of 2 trials repeats another: a value is listed twice"),
    ],
)
def test_trials_that_repeat_others_are_counted(words, said):
    assert [n for n in prepare(["-m", *words.split()]).notes if n.startswith(said)]


def test_nothing_is_said_of_a_sweep_that_repeats_nothing():
    assert prepare(["-m", "mode=lora,qlora", "lora_rank=8,16", "save_strategy=no,steps", "save_steps=4,5"]).notes == []
    assert prepare(["-m", "mode=full", "lora_rank=8", "seed=1,2"]).notes == [
        "lora_rank=8 has no effect: mode=full does not use it"
    ]
