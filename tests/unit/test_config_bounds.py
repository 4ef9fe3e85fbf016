"""Every number of a configuration has bounds, beside its field, and the command line holds it to them."""

import math
import re
from importlib import import_module
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest

from sftx.config.bounds import Bounds
from sftx.config.checks.signature import read_signature
from sftx.config.composition.prepare import prepare
from sftx.config.options import component_of, options
from sftx.config.schema import GROUPS, KNOBS, LIST_GROUPS, TrainConfig
from sftx.errors import ConfigError

CHOICES = [
    (group, option) for group in GROUPS for option in options(group) if "_target_" in component_of(group, option)
]


def fields_of(group, option):
    """Return the fields that a configuration may set, each with its type as Python sees it."""
    target = component_of(group, option)["_target_"]
    module, _, name = target.rpartition(".")
    hints = get_type_hints(getattr(import_module(module), name), include_extras=True)
    return {key: hints[key] for key in read_signature(target).arguments}


def is_number(kind):
    """Return True if a number may stand anywhere in a value of this type."""
    if get_origin(kind) is Literal:
        return False
    return kind in (int, float) or any(is_number(part) for part in get_args(kind))


def bounds_of(kind):
    found = [b for b in getattr(kind, "__metadata__", ()) if isinstance(b, Bounds)]
    return found + [b for part in get_args(kind) if get_origin(kind) is not Literal for b in bounds_of(part)]


def numbers(kinds):
    return {key: kind for key, kind in kinds.items() if is_number(kind)}


def outside(bounds, kind):
    """Return values just outside the bounds: each side that has one."""
    whole = is_number(kind) and not any(part is float for part in flat(kind))
    step = 1 if whole else 1e-3
    out = []
    if bounds.at_least is not None:
        out.append(bounds.at_least - step)
    if bounds.above is not None:
        out.append(bounds.above)
    if bounds.at_most is not None:
        out.append(bounds.at_most + step)
    if bounds.below is not None:
        out.append(bounds.below)
    return out


def flat(kind):
    return [kind, *(inner for part in get_args(kind) for inner in flat(part))]


def typed(kind, number):
    """Write a number as a value of the type."""
    core = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(core) is tuple:
        return f"[0.5,{number}]"
    return f"{{x:{number}}}" if get_origin(core) is dict else str(number)


def problems(argv):
    with pytest.raises(ConfigError) as caught:
        prepare(argv)
    return caught.value.problems


def test_every_key_that_holds_a_number_has_bounds():
    hints = get_type_hints(TrainConfig, include_extras=True)
    assert [k for k in KNOBS if is_number(hints[k]) and not bounds_of(hints[k])] == []


@pytest.mark.parametrize(("group", "option"), CHOICES, ids=map("=".join, CHOICES))
def test_every_number_of_a_component_has_bounds(group, option):
    """A number that may be anything has no place yet; the first one adds an explicit exception, with its reason."""
    assert [k for k, kind in numbers(fields_of(group, option)).items() if not bounds_of(kind)] == []


def test_each_key_is_held_to_its_bounds():
    hints = get_type_hints(TrainConfig, include_extras=True)
    for side in range(2):
        values = {k: outside(bounds_of(kind)[0], kind) for k, kind in numbers(hints).items() if k in KNOBS}
        values = {k: v[side] for k, v in values.items() if len(v) > side}
        found = problems([f"{k}={v}" for k, v in values.items()])
        for key, value in values.items():
            start = f"command line: `{key}={value}`: `{key}`: expected "
            assert [p for p in found if p.startswith(start) and p.endswith(f", got {value}.")], (key, value, found)
        assert len(found) == len(values), found


@pytest.mark.parametrize(("group", "option"), CHOICES, ids=map("=".join, CHOICES))
def test_each_number_of_a_component_is_held_to_its_bounds(group, option):
    kinds = numbers(fields_of(group, option))
    path = f"{group}.{option}" if group in LIST_GROUPS else group
    choice = [f"{group}=[{option}]" if group in LIST_GROUPS else f"{group}={option}"]
    for side in range(2):
        values = {k: outside(bounds_of(kind)[0], kind) for k, kind in kinds.items()}
        values = {f"{path}.{k}": typed(kinds[k], v[side]) for k, v in values.items() if len(v) > side}
        if not values:
            continue
        found = problems([*choice, *(f"++{k}={v}" for k, v in values.items())])
        for key, value in values.items():
            start = f"command line: `++{key}={value}`: `{key}`: expected "
            assert [p for p in found if p.startswith(start) and ", got " in p], (key, value, found)
        assert len(found) == len(values), found


def test_both_names_of_a_setting_have_the_same_bounds():
    hints = get_type_hints(TrainConfig, include_extras=True)
    pairs = 0
    for group, option in CHOICES:
        kinds = fields_of(group, option)
        for key, value in component_of(group, option).items():
            knob = re.fullmatch(r"\$\{(\w+)\}", str(value))
            if knob and is_number(kinds[key]):
                pairs += 1
                assert bounds_of(kinds[key]) == bounds_of(hints[knob[1]]), (group, option, key)
    assert pairs > 20


TRAINED_SILENTLY = [
    "mode.alpha=-1", "optimizer.weight_decay=-1", "scheduler=cosine scheduler.floor=-1",
    "scheduler=polynomial scheduler.power=-1", "callback=early_stopping callback.early_stopping.patience=-1",
    "mode.dropout=-0.1", "data.temperature=-1", "data.near_threshold=2", "data.num_workers=-1", "mode.rank=0",
    "optimizer.eps=-1", "optimizer.betas=[0.9,1.5]", "optimizer.betas=[0.9]", "mode.dropout=1.5", f"seed={2**70}",
    "mode=qlora mode.quant_type=foo", "optimizer=sgd optimizer.momentum=-1",
    "optimizer=sgd optimizer.nesterov=true optimizer.momentum=0", "data.category_weights={code:-1}",
    "optimizer=adafactor optimizer.beta2_decay=0.8", "optimizer=adafactor optimizer.d=0.5",
    "parallel=ddp parallel.timeout_seconds=0", "dataloader_num_workers=-1", "parallel=ddp parallel.num_processes=0",
]  # fmt: skip


@pytest.mark.parametrize("words", TRAINED_SILENTLY)
def test_what_trained_silently_or_ended_in_a_traceback_is_one_line(words):
    [found] = problems(words.split())
    assert "\n" not in found
    assert ("expected" in found and "got" in found) or "needs a momentum" in found


@pytest.mark.parametrize("words", ["lora_rank=8,0", "mode.rank=8,0", "scheduler=cosine scheduler.floor=0.1,-1"])
def test_bounds_hold_at_every_point_of_a_sweep(words):
    [found] = problems(["-m", *words.split()])
    assert ", got " in found


OWN = """
from dataclasses import dataclass
from typing import Annotated

import sftx.config.bounds
import sftx.training.schedulers
from sftx.config.bounds import Bounds

MOST = 9

@dataclass
class Sawtooth(sftx.training.schedulers.Schedule):
    free: int = 5
    teeth: Annotated[int, Bounds(at_least=1)] = 5
    low: Annotated[float, "a share", sftx.config.bounds.Bounds(at_least=0, below=1)] = 0.2
    named: Annotated[int, Bounds(at_most=MOST)] = 3
"""


def test_bounds_of_a_users_own_component(tmp_path, monkeypatch):
    """They are held; a number without them is not refused."""
    (tmp_path / "own_bounds.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    own = ["scheduler._target_=own_bounds.Sawtooth", "allow_targets=[own_bounds.*]", "~scheduler.warmup_steps"]
    assert prepare([*own, "+scheduler.free=-1", "+scheduler.teeth=1", "+scheduler.named=9"])
    found = problems([*own, "+scheduler.teeth=0", "+scheduler.low=1", "+scheduler.named=10"])
    assert [p.partition("`: ")[2] for p in found] == [
        "`scheduler.teeth`: expected an integer >= 1, got 0.",
        "`scheduler.low`: expected a number >= 0 and < 1, got 1.",
        "`scheduler.named`: expected an integer <= 9, got 10.",
    ]


def test_a_refusal_is_one_line_with_exit_code_2(cli):
    done = cli("mode.alpha=-1", "optimizer.betas=[0.9,1.5]")
    assert done.returncode == 2
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert "Traceback" not in done.stderr
    assert [line for line in lines if "`mode.alpha`: expected a number > 0, got -1." in line]
    assert [line for line in lines if "expected a list of 2 numbers, each >= 0 and < 1, got [0.9,1.5]." in line]


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        (Bounds(at_least=1), [1, 2, None, "auto", True], [0, -math.inf, [1, 0], {"x": 0}]),
        (Bounds(above=0, at_most=1), [1, 0.5, [0.1, 1]], [0, 1.1, [[2]]]),
        (Bounds(below=1), [0.99], [1]),
    ],
)
def test_bounds(bounds, inside, outside):
    assert all(map(bounds.allow, inside))
    assert not any(map(bounds.allow, outside))
