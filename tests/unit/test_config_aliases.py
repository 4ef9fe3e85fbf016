"""The manual's names choose the group on the command line and in JSON, and mirror the choice; in YAML they are an error."""

import json
from functools import cache

import pytest
from omegaconf import OmegaConf

from sftx.config.composition import by_hydra
from sftx.config.composition.aliases import ALIASES, MIRRORS, OTHER_NAMES
from sftx.config.composition.command_line import read_command_line
from sftx.config.composition.prepare import compose_checked, prepare
from sftx.config.options import options
from sftx.errors import ConfigError

PLACES = ["command line", "JSON"]


def plant(folder, place, values):
    """Write settings to one of the places where they can stand, and return the command line that reads them."""
    if place == "command line":
        return [f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in values.items()]
    if place == "JSON":
        (folder / "args.json").write_text(json.dumps(values), encoding="utf-8")
        return [f"args_file={folder}/args.json"]
    group = place
    (folder / group).mkdir(exist_ok=True)
    body = {"hydra": {"sweeper": {"params": values}}} if place == "sweep" else values
    (folder / group / "planted.yaml").write_text(json.dumps(body), encoding="utf-8")
    return ["--config-dir", str(folder), f"{group}=planted"]


def composed(folder, place, values, *more):
    """Return the configuration; of a sweep file, that of its one point."""
    return compose_checked([*plant(folder, place, values), *more])


@cache
def in_one_spelling(*typed):
    return compose_checked(list(typed))


SPELLINGS = [
    (
        {
            "train_mode": "qlora",
            "optim": "adamw_torch",
            "lr_scheduler_type": "cosine",
            "report_to": "wandb",
            "bf16": True,
        },
        ["mode=qlora", "optimizer=adamw", "scheduler=cosine", "tracker=wandb", "precision=bf16"],
    ),
    ({"report_to": "none", "fp16": False}, ["tracker=none", "precision=fp32"]),
    ({"report_to": "all", "fp16": False, "bf16": True}, ["tracker=[tensorboard,wandb]", "precision=bf16"]),
    ({"fp16": True, "bf16": False}, ["precision=fp16"]),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("manual", "groups"), SPELLINGS, ids=["+".join(s[0]) for s in SPELLINGS])
def test_the_manuals_spellings_are_the_groups(tmp_path, place, manual, groups):
    assert composed(tmp_path, place, manual) == in_one_spelling(*groups)


def test_the_spellings_above_choose_different_things():
    assert in_one_spelling("precision=fp16") == in_one_spelling()
    other = in_one_spelling("mode=qlora", "optimizer=adamw", "scheduler=cosine", "tracker=wandb", "precision=bf16")
    for group in ("mode", "optimizer", "scheduler", "tracker", "precision"):
        assert other[group] != in_one_spelling()[group]


@pytest.mark.parametrize("key", MIRRORS.values())
def test_every_option_and_other_name_is_reached_by_the_manuals_key(key):
    group = ALIASES[key]
    for option in options(group):
        assert read_command_line([f"{key}={option}"]).values == {group: option}
    for name, option in OTHER_NAMES.get(group, {}).items():
        assert read_command_line([f"{key}={name}"]).values == {group: option}
        assert option in options(group)


@pytest.mark.parametrize(
    ("typed", "mirrored"),
    [
        ("mode=qlora tracker=[wandb,tensorboard]", {"train_mode": "qlora", "report_to": ["wandb", "tensorboard"]}),
        ("optim=adamw_torch report_to=tensorboard,wandb", {"optim": "adamw", "report_to": ["tensorboard", "wandb"]}),
        ("scheduler=linear tracker=none", {"lr_scheduler_type": "linear", "report_to": []}),
        ("precision=bf16", {"bf16": True, "fp16": False}),
        ("precision=fp32", {"bf16": False, "fp16": False}),
    ],
)
def test_the_key_mirrors_the_choice(typed, mirrored):
    cfg = compose_checked(typed.split())
    assert {key: cfg[key] for key in mirrored} == mirrored


DISAGREEING = [
    (
        {"mode": "lora", "train_mode": "qlora", "optimizer": "sgd", "optim": "adamw_torch"}
        | {"tracker": "wandb", "report_to": "none", "scheduler": "step", "lr_scheduler_type": "linear"}
        | {"fp16": True, "bf16": True},
        [
            "`mode` chooses mode=lora and `train_mode` chooses mode=qlora. They are two spellings of one choice",
            *("`optimizer` chooses", "`tracker` chooses", "`scheduler` chooses", "`fp16` and `bf16` are both true"),
        ],
    ),
    ({"precision": "fp32", "bf16": True}, ["`precision=fp32` and `bf16=true` choose differently"]),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("values", "said"), DISAGREEING, ids=["spellings", "precision"])
def test_spellings_that_disagree(tmp_path, place, values, said):
    with pytest.raises(ConfigError) as error:
        composed(tmp_path, place, values)
    found = error.value.problems
    assert len(found) == len(said), found
    for words in said:
        [problem] = [p for p in found if words in p]
        assert place in problem or str(tmp_path) in problem


def test_spellings_that_agree():
    line = read_command_line(["mode=qlora", "train_mode=qlora", "precision=fp32", "fp16=false"])
    assert (line.problems, line.values) == ([], {"mode": "qlora", "precision": "fp32"})


def test_bf16_alone_replaces_the_default_and_says_so():
    assert "bf16=true replaces the default fp16=true" in prepare(["bf16=true"]).notes
    assert prepare(["bf16=true", "fp16=false"]).notes == []
    assert prepare([]).notes == [], "a note of the run before"


def test_an_obsolete_name_says_what_is_used():
    request = prepare(["optim=adamw_hf"])
    assert request.overrides == ["optimizer=adamw"]
    assert "torch's AdamW is used" in request.notes[0]


@pytest.mark.parametrize(
    ("typed", "precision"),
    [
        ("fp16=false", "bfloat16"),
        ("bf16=false", "float32"),
        ("fp16=true", "float16"),
        ("bf16=true", "bfloat16"),
    ],
)
def test_half_precision_on_top_of_an_experiment(typed, precision):
    assert compose_checked(["experiment=qwen2_5_7b_qlora", typed]).precision.dtype == precision


def test_precision_in_a_file_that_builds_on_another(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/base.yaml").write_text("precision: bf16\n")
    (tmp_path / "experiment/mine.yaml").write_text("defaults: [base]\nprecision: fp32\n")
    assert compose_checked(["--config-dir", str(tmp_path), "experiment=base"]).precision.dtype == "bfloat16"
    assert compose_checked(["--config-dir", str(tmp_path), "experiment=mine"]).precision.dtype == "float32"


IN_YAML = {
    "experiment/mine.yaml": (
        "defaults:\n  - override /optim: adamw_torch\n  - /train_mode: qlora\nlr_scheduler_type: wsd\nreport_to: all\nbf16: true\n",
        ["experiment=mine"],
        [
            "experiment/mine.yaml:2: `optim` is for the command line and args_file: write `optimizer: adamw`.",
            "experiment/mine.yaml:3: `train_mode` is for the command line and args_file: write `mode: qlora`.",
            "experiment/mine.yaml:4: `lr_scheduler_type` is for the command line and args_file: "
            "write `scheduler: warmup_stable_decay`.",
            "experiment/mine.yaml:5: `report_to` is for the command line and args_file: "
            "write `tracker: [tensorboard,wandb]`.",
            "experiment/mine.yaml:6: `bf16` is for the command line and args_file: write `precision: bf16`.",
        ],
    ),
    "debug/mine.yaml": (
        "fp16: false\n",
        ["debug=mine"],
        ["debug/mine.yaml:1: `fp16` is for the command line and args_file: write `precision: fp32`."],
    ),
    "sweep/mine.yaml": (
        "hydra:\n  sweeper:\n    params:\n      optim: sgd,adamw_torch\n      fp16: true,false\n",
        ["sweep=mine"],
        [
            "sweep/mine.yaml:4: `optim` is for the command line and args_file: write `optimizer: sgd,adamw`.",
            "sweep/mine.yaml:5: `fp16` is for the command line and args_file: write `precision: fp16,fp32`.",
        ],
    ),
    "scheduler/mine.yaml": (
        "# @package _global_\noptim: sgd\nscheduler:\n  _target_: sftx.training.schedulers.Constant\n",
        ["scheduler=mine"],
        [
            "scheduler/mine.yaml:2: `optim` is for the command line and args_file: an option of `scheduler` "
            "cannot choose one of `optimizer`; write `optimizer: sgd` in an experiment.",
        ],
    ),
}


@pytest.mark.parametrize("name", IN_YAML)
def test_in_a_file_the_error_gives_the_line_to_write(tmp_path, name):
    text, words, said = IN_YAML[name]
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        prepare(["--config-dir", str(tmp_path), *words])
    assert sorted(error.value.problems) == [f"{tmp_path}/{line}" for line in said]


@pytest.mark.parametrize("form", ["args_file={}", "--train_args_file {}", "--train_args_file={}", "--args_file={}"])
def test_the_command_line_wins_over_the_json_file_wherever_it_stands(tmp_path, form):
    path = tmp_path / "参数 1.json"
    values = {"lora_rank": 8, "train_mode": "qlora", "optim": "sgd", "fp16": True, "seed": 7, "report_to": ["wandb"]}
    path.write_text(json.dumps(values), encoding="utf-8-sig")
    words = form.replace(" ", "\0").format(path).split("\0")
    for argv in (["lora_rank=4", "mode=lora", "bf16=true", *words], [*words, "lora_rank=4", "mode=lora", "bf16=true"]):
        cfg = compose_checked(argv)
        assert (cfg.lora_rank, cfg.train_mode, cfg.bf16, cfg.fp16) == (4, "lora", True, False)
        assert (cfg.seed, cfg.optim, cfg.report_to) == (7, "sgd", ["wandb"])


def test_json_may_nest_or_dot(tmp_path):
    (tmp_path / "a.json").write_text('{"scheduler": "polynomial", "scheduler.power": 3, "hydra": {"verbose": true}}')
    (tmp_path / "b.json").write_text('{"lr_scheduler_type": "cosine", "mode": {"use_rslora": true}}')
    assert compose_checked([f"args_file={tmp_path}/a.json"]).scheduler.power == 3
    cfg = compose_checked([f"args_file={tmp_path}/b.json"])
    assert (cfg.mode.use_rslora, cfg.lr_scheduler_type) == (True, "cosine")


def test_what_json_rules_out_stays_ruled_out(tmp_path):
    (tmp_path / "a.json").write_text('{"bf16": true}')
    assert compose_checked([f"args_file={tmp_path}/a.json", "fp16=false"]).precision.dtype == "bfloat16"


def test_an_experiment_may_choose_in_its_defaults_list_with_or_without_override(tmp_path):
    (tmp_path / "experiment/deep").mkdir(parents=True)
    text = "defaults:\n  - override /optimizer: adamw\n  - /mode: qlora\nscheduler.warmup_steps: 3\n"
    (tmp_path / "experiment/deep/mine.yaml").write_text(text)
    cfg = compose_checked(["--config-dir", str(tmp_path), "experiment=deep/mine"])
    assert (cfg.optim, cfg.train_mode, cfg.scheduler.warmup_steps) == ("adamw", "qlora", 3)


def test_layers_win_in_order(tmp_path):
    """Knobs < group < experiment < debug < command line."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/e.yaml").write_text("learning_rate: 3e-4\nmax_steps: 5\nseed: 1\n")
    folder = ["--config-dir", str(tmp_path)]
    assert compose_checked(["mode=full"]).learning_rate == 1e-5
    assert compose_checked([*folder, "experiment=e", "mode=full"]).learning_rate == 3e-4
    cfg = compose_checked([*folder, "experiment=e", "debug=fast_dev", "seed=9"])
    assert (cfg.max_steps, cfg.seed, cfg.learning_rate) == (2, 9, 3e-4)


def test_an_own_component_by_target(tmp_path, monkeypatch):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/mine.yaml").write_text("_target_: own_schedule.Mine\nslope: 0.5\n")
    (tmp_path / "own_schedule.py").write_text(
        "from sftx.training.schedulers import Schedule\n"
        "class Mine(Schedule):\n    def __init__(self, slope: float, floor: float = 0): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    argv = ["--config-dir", str(tmp_path), "lr_scheduler_type=mine", "allow_targets=[own_schedule.*]"]
    cfg = compose_checked([*argv, "scheduler.floor=0.1"])
    assert OmegaConf.to_container(cfg.scheduler) == {"_target_": "own_schedule.Mine", "slope": 0.5, "floor": 0.1}
    assert cfg.lr_scheduler_type == "mine"
    strictly, _ = by_hydra.load(prepare([*argv, "scheduler.floor=0.1"]).overrides)
    assert strictly == cfg, "Hydra must be told to add a key that only the class knows"
    with pytest.raises(ConfigError, match=r"unknown key `scheduler.flor` \(value 1\). Did you mean `floor`\?"):
        prepare([*argv, "scheduler.flor=1"])


@pytest.mark.parametrize(
    ("place", "config", "family"),
    [
        ("command line", {"model_type": "llama"}, "llama"),
        ("experiment", {"model_type": "novel"}, "generic"),
        ("JSON", None, "qwen"),
        ("sweep", {"model_type": "llama"}, "llama"),
    ],
)
def test_the_family_follows_the_folder_unless_typed(tmp_path, place, config, family):
    (tmp_path / "model").mkdir()
    if config:
        (tmp_path / "model/config.json").write_text(json.dumps(config))
    setting = {"model_name_or_path": f"{tmp_path}/model"}
    assert composed(tmp_path, place, setting).model == in_one_spelling(f"model={family}").model
    assert composed(tmp_path, place, setting, "model=gemma").model.template == "gemma"


def test_a_knob_that_nothing_uses_is_said() -> None:
    """`lora_rank` means nothing to full mode, nor warm-up to a constant rate; where they are used nothing is said."""
    from sftx.config.composition.prepare import prepare

    notes = prepare(["mode=full", "scheduler=constant", "lora_rank=8", "warmup_steps=5", "weight_decay=0.1"]).notes
    assert notes == [
        "lora_rank=8 has no effect: mode=full does not use it",
        "warmup_steps=5 has no effect: scheduler=constant does not use it",
    ]
    assert prepare(["mode=qlora", "scheduler=cosine", "lora_rank=8", "warmup_steps=5"]).notes == []
