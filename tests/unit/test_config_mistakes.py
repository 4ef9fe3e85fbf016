"""Each kind of mistake in each place where it can stand: one message, with key, finding, cure and place."""

import json
import os

import pytest

from sftx.config.composition.args_file import read_args_file
from sftx.config.composition.prepare import prepare
from sftx.config.composition.yaml_file import read_yaml
from sftx.errors import ConfigError

PLACES = ["command line", "experiment", "sweep", "JSON"]
MISTAKES = {
    "unknown key": ({"lora_rnk": 8}, ["unknown key `lora_rnk` (value 8). Did you mean `lora_rank`?"]),
    "unknown nested key": (
        {"scheduler.warmup_stps": 8},
        ["`scheduler.warmup_stps` (value 8). Did you mean `warmup_steps`?", "takes: warmup_steps"],
    ),
    "key of another option": (
        {"scheduler.poewr": 2},
        ["unknown key `scheduler.poewr` (value 2). Did you mean `power`?", "scheduler=polynomial"],
    ),
    "renamed key": (
        {"data.shape": "alpaca"},
        ["unknown key `data.shape` (value alpaca). It is now `data.schema`.", "`data` takes: format"],
    ),
    "another renamed key": (
        {"data.learn": "last"},
        ["unknown key `data.learn` (value last). It is now `data.train_on`."],
    ),
    "unknown group": ({"schedulr": "cosine"}, ["unknown key `schedulr` (value cosine). Did you mean `scheduler`?"]),
    "wrong type": ({"seed": "abc"}, ["`seed`: expected an integer >= 0 and <= 9223372036854775807, got 'abc'"]),
    "wrong choice": (
        {"save_strategy": "stpes"},
        ["`save_strategy`: expected one of steps, epoch, no, got 'stpes'. Did you mean `steps`?"],
    ),
    "wrong nested type": ({"mode.use_rslora": 3}, ["`mode.use_rslora`: expected true or false, got 3"]),
    "out of bounds": ({"lora_dropout": 1.5}, ["`lora_dropout`: expected a number >= 0 and < 1, got 1.5"]),
    "below its bound": ({"learning_rate": 0}, ["`learning_rate`: expected a number > 0, got 0"]),
    "unknown option": (
        {"optimizer": "adamw_tourch"},
        ["`optimizer` has no option 'adamw_tourch'. Did you mean `adamw_torch`?", "Allowed: adafactor, adamw, "],
    ),
    "unknown option of several": (
        {"tracker": ["wandb", "tensorbord"]},
        ["`tracker` has no option 'tensorbord'. Did you mean `tensorboard`?", "Allowed: none, tensorboard, wandb"],
    ),
    "bad interpolation": ({"max_steps": "${nope}"}, ["`max_steps`: ${nope} cannot be resolved", "'nope' not found"]),
    "broken interpolation": ({"max_steps": "${"}, ["max_steps`", "${", "is no interpolation"]),
    "impossible: keep_best": ({"keep_best": True, "eval_ratio": 0}, ["`keep_best=true` needs an evaluation"]),
    "impossible: checkpoints": (
        {"keep_best": True, "save_strategy": "no"},
        ["`keep_best=true` needs checkpoints: set save_strategy=steps or epoch"],
    ),
    "impossible: rollback": (
        {"on_nonfinite": "rollback", "save_strategy": "no"},
        ["`on_nonfinite=rollback` needs checkpoints: set save_strategy=steps or epoch"],
    ),
    "impossible: plateau": (
        {"eval_ratio": 0, "scheduler": "reduce_lr_on_plateau"},
        ["`scheduler=reduce_lr_on_plateau` needs an evaluation"],
    ),
    "impossible: stopping": (
        {"eval_ratio": 0, "callback": ["early_stopping"]},
        ["`callback=early_stopping` needs an evaluation"],
    ),
    "impossible: adapter": ({"adapter": "x", "mode": "full"}, ["`adapter` needs mode=lora or mode=qlora"]),
    "impossible: targets": (
        {"lora_target_modules": "(q_proj"},
        ["`lora_target_modules`: '(q_proj' is neither a layer's name nor a regular expression: missing )"],
    ),
    "impossible: share and number": (
        {"warmup_steps": 2.5},
        ["`warmup_steps`: expected an integer number of steps, or a share < 1, got 2.5"],
    ),
    "impossible: resume": (
        {"resume": "nevr"},
        [
            "`resume`: expected auto, never, or the folder of a run or of a checkpoint, got 'nevr'",
            "Did you mean `never`?",
        ],
    ),
}


def text(value):
    """Write a value as YAML and the command line both read it."""
    return value if isinstance(value, str) else json.dumps(value).replace('"', "").replace(" ", "")


def plant(folder, place, values):
    """Put settings into a place, one a line from line 2 on; return the command line that reads them."""
    if place == "command line":
        return [f"{k}={text(v)}" for k, v in values.items()]
    if place == "JSON":
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in values.items())
        (folder / "planted.json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")
        return [f"args_file={folder}/planted.json"]
    (folder / place).mkdir(exist_ok=True)
    if place == "experiment":
        body = "# @package _global_\n" + "".join(f"{k}: {text(v)}\n" for k, v in values.items())
    else:
        head = "# a sweep\nhydra: {sweeper: {params: {\n"
        body = head + ",\n".join(f"{json.dumps(k)}: {json.dumps(text(v))}" for k, v in values.items()) + "\n}}}\n"
    (folder / place / "planted.yaml").write_text(body, encoding="utf-8")
    return ["--config-dir", str(folder), f"{place}=planted"]


def place_of(folder, place, values, key):
    """Return how a message must name the origin of a key."""
    line = list(values).index(key)
    return {
        "command line": f"command line: `{key}={text(values[key])}`: ",
        "JSON": f"{folder}/planted.json:{line + 2}: ",
        "experiment": f"{folder}/experiment/planted.yaml:{line + 2}: ",
        "sweep": f"{folder}/sweep/planted.yaml:{line + 3}: ",
    }[place]


def problems(argv):
    with pytest.raises(ConfigError) as error:
        prepare(argv)
    return error.value.problems


ALONE = ["impossible: share and number", "impossible: resume"]
RULES = [k for k in MISTAKES if k.startswith("impossible") and k not in ALONE] + ["broken interpolation"]
TOGETHER = [[k for k in MISTAKES if k not in RULES], RULES]


def test_no_kind_is_left_out():
    assert sorted(k for kinds in TOGETHER for k in kinds) == sorted(MISTAKES)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kinds", TOGETHER, ids=["values", "rules"])
def test_each_kind_in_each_place(tmp_path, place, kinds):
    """Every mistake is one message, and hides none of the others."""
    planted = {k: v for kind in kinds for k, v in MISTAKES[kind][0].items()}
    found = problems(plant(tmp_path, place, planted))
    for kind in kinds:
        values, said = MISTAKES[kind]
        places = tuple(place_of(tmp_path, place, planted, key) for key in values)
        about = [p for p in found if p.startswith(places) and all(s in p for s in said)]
        assert len(about) == 1, (kind, found)
    assert len(found) == len(kinds), found


def test_all_kinds_in_all_places_are_reported_together(tmp_path):
    """Nothing hides anything else, wherever it stands."""
    spread = {
        "command line": ["unknown key", "unknown option", "bad interpolation", "unknown group"],
        "experiment": ["wrong type", "unknown nested key"],
        "sweep": ["out of bounds", "wrong choice", "impossible: keep_best"],
        "JSON": ["below its bound", "impossible: share and number"],
    }
    argv, wanted = [], []
    for place, kinds in spread.items():
        values = {k: v for kind in kinds for k, v in MISTAKES[kind][0].items()}
        argv += plant(tmp_path, place, values)
        wanted += [(place_of(tmp_path, place, values, next(iter(MISTAKES[k][0]))), MISTAKES[k][1][0]) for k in kinds]
    argv += ["mode.rnk=3", "novalue", "hydra.swep.dir=x", "hydra/launcher=baisc", "learning_rat=1,2", "--cgf"]
    found = problems(argv)
    for origin, said in wanted:
        assert [p for p in found if p.startswith(origin) and said in p], (origin, said, found)
    for said in ("`mode.rnk`", "`novalue`", "`hydra.swep`", "'baisc'", "`learning_rat", "`--cgf`"):
        assert [p for p in found if said in p], (said, found)


def test_a_wrong_knob_is_not_blamed_on_the_components_that_use_it():
    assert len(problems(["lora_rank=abc", "mode=qlora"])) == 1
    assert len(problems(["weight_decay=${nope}"])) == 1
    assert len(problems(["lora_rank=${lora_alpha}", "lora_alpha=${lora_rank}"])) > 0


@pytest.mark.parametrize(
    ("group", "content", "said"),
    [
        ("experiment", b"seed: 3\nlora_rank: [8\n", "planted.yaml:3: not valid YAML"),
        ("sweep", b"seed: 3\nlora_rank:\t- 8: 3\n", "planted.yaml:2: not valid YAML"),
        ("scheduler", b"seed: 3\nlora_rank: 8\nseed: 4\n", "planted.yaml:3: `seed` is repeated, first in line 1"),
        (
            "experiment",
            b"hydra:\n  verbose: true\n  verbose: true\n",
            "planted.yaml:3: `verbose` is repeated, first in line 2",
        ),
        ("sweep", "种子: 3".encode("gb18030"), "is not UTF-8"),
        ("scheduler", b"- a\n- b\n", "planted.yaml:1: expected `key: value` lines, got a list"),
        ("experiment", b"!!python/object:os.system {}\n", "planted.yaml:1: not valid YAML"),
    ],
)
def test_broken_yaml(tmp_path, group, content, said):
    (tmp_path / group).mkdir()
    (tmp_path / group / "planted.yaml").write_bytes(content)
    file = read_yaml(tmp_path / group / "planted.yaml")
    assert len(file.problems) == 1
    assert file.problems[0].startswith(f"{tmp_path}/{group}/")
    assert said in file.problems[0]


@pytest.mark.parametrize("group", ["experiment", "sweep", "debug", "scheduler", "callback"])
def test_a_broken_file_hides_nothing(tmp_path, group):
    (tmp_path / group).mkdir()
    (tmp_path / group / "planted.yaml").write_bytes(b"floor: [\n")
    found = problems(["--config-dir", str(tmp_path), f"{group}=planted", "lora_rnk=3", "seed=x"])
    for said in (f"{tmp_path}/{group}/planted.yaml:2: not valid YAML", "`lora_rnk=3`", "`seed=x`"):
        assert [p for p in found if said in p], (said, found)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "defaults:\n  - override /mode: qlra\n  - override /modee: lora\n  - baze\n",
            [
                "planted.yaml:2: `mode` has no option 'qlra'. Did you mean `qlora`?",
                "planted.yaml:3: there is no group `modee`. Did you mean `mode`?",
                "planted.yaml:4: `baze`: there is no such file beside this one. Did you mean `base`?",
            ],
        ),
        (
            "defaults: {mode: lora}\nhydra: 3\nexperiment: base\n",
            [
                "planted.yaml:1: `defaults`: expected a list such as",
                "planted.yaml:2: `hydra`: expected a mapping, got",
                "planted.yaml:3: `experiment` is chosen on the command line",
            ],
        ),
        (
            "defaults:\n  - override /mode: lora\nmode: full\n",
            ["planted.yaml:3: the defaults list chooses mode=lora"],
        ),
        (
            "hydra:\n  swep: {dir: x}\n  mode: FOO\n  callbacks: {x: {_target_: nope.Y}}\n",
            [
                "planted.yaml:2: unknown key `hydra.swep`. Did you mean `sweep`?",
                "planted.yaml:3: `hydra.mode`: cannot be 'FOO'",
                "planted.yaml:4: `hydra.callbacks.x._target_=nope.Y`: not an sftx component",
            ],
        ),
        (
            "output_dir: 2024\nmode: {rank: abc}\nscheduler: {_target_: sftx.training.schedulers.Cosin}\n",
            [
                "planted.yaml:1: `output_dir`: expected null or a string, got 2024. Put it in quotes.",
                "planted.yaml:2: `mode.rank`: expected an integer >= 1, got 'abc'",
                "not an sftx component. Did you mean `sftx.training.schedulers.Cosine`?",
            ],
        ),
    ],
    ids=["defaults", "kinds", "conflict", "hydra", "values"],
)
def test_what_only_a_file_can_hold(tmp_path, body, said):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/base.yaml").write_text("seed: 1\n")
    (tmp_path / "experiment/planted.yaml").write_text(body, encoding="utf-8")
    found = problems(["--config-dir", str(tmp_path), "experiment=planted"])
    for words in said:
        assert [p for p in found if words in p], (words, found)
    assert len(found) == len(said), found


def test_a_components_file_cannot_choose_another_group(tmp_path):
    (tmp_path / "mode").mkdir()
    (tmp_path / "mode/mine.yaml").write_text(
        "# @package _global_\noptim: sgd\nmode: {_target_: sftx.model.modes.Full}\n"
    )
    [found] = problems(["--config-dir", str(tmp_path), "mode=mine"])
    assert "mode/mine.yaml:2: `optim` is for the command line" in found
    assert "an option of `mode` cannot choose one of `optimizer`; write `optimizer: sgd` in an experiment." in found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "args_file: cannot read"),
        (b"", ":1: not valid JSON"),
        (b'{\n"lora_rank": 8,\n}', ":3: not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"[1]", ":1: expected an object"),
        (b'{\n"seed": 1,\n"seed": 2}', ":3: `seed` is repeated, first in line 2"),
        ('{"路径": 1}'.encode("gb18030"), "is not UTF-8"),
        ('{\n"秩 1": 1}'.encode(), ":2: unknown key '秩 1'"),
    ],
)
def test_broken_json(tmp_path, content, said):
    path = tmp_path / "my.json"
    if content is not None:
        path.write_bytes(content)
    read = read_args_file(str(path))
    assert len(read.problems) == 1
    assert str(path) in read.problems[0]
    assert said in read.problems[0]


def test_a_broken_json_file_hides_nothing(tmp_path):
    (tmp_path / "my.json").write_text('{"scheduler":\n {\n"poewr": 2},\n"seed": NaN}')
    found = problems([f"args_file={tmp_path}/my.json", "args_file=nowhere.json", "lora_rnk=3"])
    for said in (
        f"{tmp_path}/my.json:3: unknown key `scheduler.poewr`",
        f"{tmp_path}/my.json:4: `seed`: expected an integer >= 0 and <= 9223372036854775807, got nan",
        "args_file: cannot read nowhere.json",
        "`lora_rnk`",
    ):
        assert [p for p in found if said in p], (said, found)
    assert len(found) == 4


ON_THE_COMMAND_LINE = {
    "--config-dir nowhere": "`--config-dir nowhere`: no such folder",
    "args_file=": "`args_file` names no file",
    "experiment=quickstrat": "`experiment` has no option 'quickstrat'. Did you mean `quickstart`?",
    "sweep=rate": "`sweep` has no option 'rate'",
    "debug=overfitt": "Did you mean `overfit`?",
    "hydra/launcher=baisc": "`hydra/launcher` has no option 'baisc'. Did you mean `basic`?",
    "hydra/lancher=basic": "`hydra/lancher` has no option",
    "modle/x=y": "there is no config group `modle/x`",
    "hydra.mode=FOO": "expected one of [RUN, MULTIRUN]",
    "hydra.job.nam=x": "unknown key `hydra.job.nam`. Did you mean `name`?",
    "--cfg jb": "`--cfg`: expected one of job, hydra, all, got jb. Did you mean `job`?",
    "--config-name x": "choose it by experiment=NAME",
    "lora_rank=8,16": "several values are a sweep: add -m",
    "mode=lora,qlora": "several values are a sweep: add -m",
    "data.formt=csv": "Did you mean `format`?",
    "--cgf": "Did you mean `--cfg`?",
    "--train_args_file": "`args_file` names no file",
}


def test_what_only_the_command_line_can_hold():
    found = problems([word for words in ON_THE_COMMAND_LINE for word in words.split()])
    for words, said in ON_THE_COMMAND_LINE.items():
        about = [p for p in found if said in p]
        assert about, (words, found)
    assert len(found) == len(ON_THE_COMMAND_LINE) - 1  # the two that name no file say the same


def test_a_sweep_over_nothing_and_a_flag_without_its_word():
    [found] = problems(["-m", "lora_rank=range(1,1)"])
    assert "a sweep over no values" in found
    [found] = problems(["--config-dir"])
    assert "no such folder" in found


def test_several_processes_need_a_parallel_setting(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    [found] = problems([])
    assert "2 processes were started" in found
    assert prepare(["parallel=ddp"]).overrides == ["parallel=ddp"]


def test_options_of_plugins_that_are_not_installed_say_what_to_install() -> None:
    found = problems(["hydra/launcher=joblib", "hydra/sweeper=nevergrad"])
    assert len(found) == 2
    assert "is not tested with sftx: pip install hydra-joblib-launcher." in found[0]
    assert "sftx does not support. Leave it out" in found[1]
