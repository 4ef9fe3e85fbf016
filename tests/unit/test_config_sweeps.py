"""A sweep is refused as a whole, before its first trial, whatever is wrong at whatever point."""

import itertools
import json
import time

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from sftx.config.composition import by_hydra
from sftx.config.composition.prepare import prepare
from sftx.errors import ConfigError


def problems(*argv):
    with pytest.raises(ConfigError) as error:
        prepare(list(argv))
    return error.value.problems


def sweep_file(folder, params, head=""):
    (folder / "sweep").mkdir(exist_ok=True)
    lines = "".join(f"      {line}\n" for line in params)
    (folder / "sweep/mine.yaml").write_text(f"{head}hydra:\n  sweeper:\n    params:\n{lines}", encoding="utf-8")
    return ["--config-dir", str(folder), "sweep=mine"]


WRONG = {
    "lora_rank": (["8", "16"], "abc", "`lora_rank`: expected an integer >= 1, got 'abc'"),
    "lora_dropout": (["0", "0.5"], "1.5", "`lora_dropout`: expected a number >= 0 and < 1, got 1.5"),
    "mode.use_rslora": (["true", "false"], "5", "`mode.use_rslora`: expected true or false, got 5"),
    "optimizer": (["sgd", "adamw"], "lino", "`optimizer` has no option 'lino'. Did you mean `lion`?"),
}
ALIASES = {
    "optim": (["sgd", "adamw_torch"], "lino", "`optimizer` has no option 'lino'. Did you mean `lion`?"),
    "fp16": (["true", "false"], "maybe", "`fp16`: expected true or false, got 'maybe'"),
}


@pytest.mark.parametrize("position", range(3))
def test_a_wrong_value_at_any_position(tmp_path, position):
    space = {}
    for key, (right, wrong, _) in WRONG.items():
        values = list(right)
        values.insert(position, wrong)
        space[key] = ",".join(values)
    typed = problems("-m", *(f"{key}={values}" for key, values in space.items()))
    written = problems(*sweep_file(tmp_path, [f"{key}: '{values}'" for key, values in space.items()]))
    for line, (key, (_, _, said)) in enumerate(WRONG.items(), 4):
        assert [p for p in typed if p.startswith(f"command line: `{key}={space[key]}`: {said}")], (key, typed)
        assert [p for p in written if p.startswith(f"{tmp_path}/sweep/mine.yaml:{line}: {said}")], (key, written)
    assert len(typed) == len(written) == len(WRONG)


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("key", ALIASES)
def test_a_wrong_value_of_an_alias_at_any_position(key, position):
    values, wrong, said = ALIASES[key]
    typed = ",".join([*values[:position], wrong, *values[position:]])
    assert problems("-m", f"{key}={typed}")[0].startswith(f"command line: `{key}={typed}`: {said}")


def test_points_of_an_alias():
    assert prepare(["-m", "fp16=true,false"]).overrides == ["precision=fp16,fp32"]
    assert prepare(["-m", "bf16=true,false"]).overrides == ["precision=bf16,fp16"]
    assert prepare(["-m", "optim=sgd,adamw_torch"]).overrides == ["optimizer=sgd,adamw"]
    [found] = problems("-m", "fp16=true,false", "bf16=true,false")
    assert "sweep precision=fp16,bf16,fp32 instead" in found


def test_all_wrong_values_together():
    found = problems("-m", "lora_rank=x,8,0", "mode=lora,nope", "seed=1,y", "lora_rnk=1,2")
    for said in ("got 'x'", "got 0", "'nope'", "got 'y'", "`lora_rnk`"):
        assert [p for p in found if said in p], (said, found)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("keep_best=false,true eval_ratio=0.05,0", "So it is at keep_best=true eval_ratio=0."),
        ("mode=lora,full adapter=null,folder", "So it is at mode=full adapter=folder."),
        ("scheduler=linear,reduce_lr_on_plateau eval_ratio=0.1,0", "at scheduler=reduce_lr_on_plateau eval_ratio=0."),
        ("callback=[],[early_stopping] eval_ratio=0.1,0 seed=1,2,3", "at callback=[early_stopping] eval_ratio=0."),
        ("warmup_steps=10,2.5", "at warmup_steps=2.5."),
        ("keep_best=true eval_ratio=0,0.1 save_strategy=steps,no", "save_strategy=no"),
    ],
)
def test_a_combination_that_only_one_point_has(typed, said):
    found = problems("-m", *typed.split())
    assert [p for p in found if said in p], found


def test_an_option_that_a_nested_axis_does_not_fit():
    found = problems("-m", "scheduler=polynomial,cosine", "scheduler.power=1,2")
    assert any("unknown key `scheduler.power`" in p for p in found), found


def test_values_that_name_other_keys():
    assert prepare(["-m", "lora_alpha=16,${lora_rank}"]).multirun
    [found] = problems("-m", "lora_alpha=16,${nope}")
    assert "'nope' not found" in found


def test_a_sweep_file_runs_as_a_multirun_without_m(tmp_path):
    argv = sweep_file(tmp_path, ["lora_rank: 8,16"])
    assert prepare(argv).multirun
    assert prepare(["sweep=lr_and_rank"]).multirun
    assert not prepare([]).multirun
    assert not prepare(["--cfg", "job", "sweep=lr_and_rank"]).multirun
    with_comma = prepare(["sweep=lr_and_rank", "seed=1,2"])
    assert with_comma.multirun
    assert "seed=1,2" in with_comma.overrides


def test_hydra_sees_the_same_space(tmp_path):
    """What was checked is what Hydra's sweeper reads: quoted where it must be."""
    params = [
        "mode: qlora,lora",
        "optimizer: adamw",
        "train_file_name: 训练(1).csv,b.csv",
        "scheduler.floor: 0,0.5",
    ]
    argv = [*sweep_file(tmp_path, params), "scheduler=cosine"]
    _, hydra = by_hydra.load(prepare(argv).overrides)
    assert dict(hydra.sweeper.params) == {
        "mode": "qlora,lora",
        "optimizer": "adamw",
        "train_file_name": "'训练(1).csv',b.csv",
        "scheduler.floor": "0,0.5",
    }
    assert str(hydra.mode) == "RunMode.MULTIRUN"


def test_the_command_line_wins_over_a_sweep_file(tmp_path):
    argv = sweep_file(tmp_path, ["lora_rank: 8,wrong", "optimizer: nope,sgd"])
    assert len(problems(*argv)) == 2
    assert prepare([*argv, "lora_rank=4", "optimizer=lion"]).overrides == [
        "lora_rank=4",
        "sweep=mine",
        "optimizer=lion",
    ]


def test_an_experiments_space_without_m_is_said_to_be_unused(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/e.yaml").write_text("hydra: {sweeper: {params: {lora_rank: '8,16'}}}\n")
    argv = ["--config-dir", str(tmp_path), "experiment=e"]
    assert "is not used: add -m" in prepare(argv).notes[0]
    assert prepare([*argv, "-m"]).notes == []


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (["lora_rank: [8, 16]"], "are written `lora_rank: 8,16`"),
        (["'lora rank': 8,16"], "cannot be read as the values of a sweep"),
        (["lora_rank: range(2,2)"], "a sweep over no values"),
        (["lora_rank: interval(2,4)"], "an interval needs a search algorithm"),
    ],
)
def test_a_space_that_is_not_one(tmp_path, params, said):
    [found] = problems(*sweep_file(tmp_path, params))
    assert said in found
    assert f"{tmp_path}/sweep/mine.yaml:" in found


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("lora_rank=interval(1,4)", "an interval needs a search algorithm"),
        ("hydra.sweep.dir=a,b", "Hydra's own settings cannot be swept"),
        ("experiment=null,quickstart", "null cannot be one of several"),
        ("model_name_or_path={llama},{qwen}", "of different families (llama, qwen)"),
    ],
)
def test_what_cannot_be_swept(tmp_path, typed, said):
    for family in ("llama", "qwen"):
        (tmp_path / family).mkdir()
        (tmp_path / family / "config.json").write_text(f'{{"model_type": "{family}"}}')
    [found] = problems("-m", typed.format(llama=tmp_path / "llama", qwen=tmp_path / "qwen"))
    assert said in found


def test_ranges_and_globs_are_listed():
    request = prepare(["-m", "lora_rank=range(1,4)", "mode=glob(*lora)", "seed=choice(5,6)"])
    assert request.overrides == ["lora_rank=1,2,3", "seed=5,6", "mode=lora,qlora"]


def test_a_large_space_is_checked_quickly():
    """Plain values are not composed one by one: 10^6 points, the last of them wrong."""
    hundred = ",".join(map(str, range(1, 101)))
    start = time.process_time()
    [found] = problems("-m", f"seed={hundred}", f"lora_rank={hundred}", f"lora_alpha={hundred},x")
    assert "`lora_alpha`: expected a number > 0, got 'x'" in found
    assert time.process_time() - start < 3


MAPPING = {"html": 2, "css": 0.5}


@pytest.mark.parametrize(
    "typed",
    [
        ["data.category_weights={html:2,css:0.5}"],
        ["+data.category_weights={html:2,css:0.5}"],
        ["data.category_weights={html:2,css:0.5},{html:3}"],
        ["data={category_weights:{html:2,css:0.5}}"],
        ["args_file={folder}/weights.json"],
        ["experiment=weights"],
        ["sweep=weights"],
    ],
)
def test_hydra_composes_each_trial_of_a_sweep_with_a_mapping(tmp_path, typed):
    """Hydra composes each trial by itself, from the overrides that it was given."""
    written = json.dumps({"data": {"category_weights": MAPPING}})
    (tmp_path / "weights.json").write_text(written)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/weights.yaml").write_text(written)
    (tmp_path / "sweep").mkdir()
    params = "{data.category_weights: '{html:2,css:0.5},{html:3}'}"
    (tmp_path / "sweep/weights.yaml").write_text(f"hydra: {{sweeper: {{params: {params}}}}}")
    words = [word.replace("{folder}", str(tmp_path)) for word in typed]
    request = prepare(["-m", "--config-dir", str(tmp_path), "seed=1,2", *words])
    read = OverridesParser.create().parse_overrides
    fixed = [o.input_line for o in read(request.overrides) if not o.is_sweep_override()]
    in_file = [f"{key}={value}" for key, value in (by_hydra.load(fixed)[1].sweeper.params or {}).items()]
    parsed = read([*request.overrides, *in_file])
    points = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in parsed
    ]
    trials = [by_hydra.load(list(point))[0] for point in itertools.product(*points)]
    assert [trial.seed for trial in trials[:: len(trials) // 2]] == [1, 2]
    weights = [trial.data.category_weights for trial in trials]
    assert weights[0] == MAPPING
    assert [w for w in weights if w not in (MAPPING, {"html": 3})] == []
