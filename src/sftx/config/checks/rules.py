"""Settings that are each right but cannot go together."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from sftx.config.untrusted.allowlist import pattern_problem
from sftx.config.values import show
from sftx.errors import did_you_mean

Tree = dict[str, Any]
NO_EVALUATION = "needs an evaluation: set eval_ratio above 0 or eval_file_name"


@dataclass(frozen=True)
class Rule:
    """A test of a resolved configuration; the first of its keys is the one that a problem is reported at."""

    keys: tuple[str, ...]
    problem: Callable[[Tree], str | None]


RULES: list[Rule] = []


def rule(*keys: str) -> Callable[[Callable[[Tree], str | None]], Callable[[Tree], str | None]]:
    """Register a rule over some keys: it is checked only if each of these is valid itself."""

    def register(problem: Callable[[Tree], str | None]) -> Callable[[Tree], str | None]:
        RULES.append(Rule(keys, problem))
        return problem

    return register


def broken_rules(tree: Tree, wrong: set[str] = frozenset()) -> Iterator[tuple[Rule, str]]:  # type: ignore[assignment]
    """Yield the rules that a resolved configuration breaks, each with its message; `wrong` keys are left out."""
    for one in RULES:
        if not wrong.intersection(one.keys) and all(k in tree for k in one.keys):
            text = one.problem(tree)
            if text:
                yield one, text


def evaluates(tree: Tree) -> bool:
    """Return True if something is held out to evaluate on."""
    return tree["eval_ratio"] > 0 or tree["eval_file_name"] is not None


@rule("lora_target_modules")
def _targets_are_names(tree: Tree) -> str | None:
    wanted = tree["lora_target_modules"]
    words = wanted if isinstance(wanted, list) else [wanted]
    for word in words:
        try:
            re.compile(word)
        except re.error as error:
            return f"`lora_target_modules`: {word!r} is neither a layer's name nor a regular expression: {error}."
    return None if words and all(words) else "`lora_target_modules` names no layer: leave it out, or write all-linear."


@rule("template_date")
def _date_of_a_template(tree: Tree) -> str | None:
    with suppress(ValueError, TypeError):
        if date.fromisoformat(tree["template_date"]).isoformat() == tree["template_date"]:
            return None
    return f"`template_date`: expected a date as YYYY-MM-DD, got {show(tree['template_date'])}."


@rule("keep_best", "eval_ratio", "eval_file_name")
def _best_by_evaluation(tree: Tree) -> str | None:
    return f"`keep_best=true` {NO_EVALUATION}." if tree["keep_best"] and not evaluates(tree) else None


@rule("keep_best", "save_strategy")
def _best_of_checkpoints(tree: Tree) -> str | None:
    nothing_kept = tree["keep_best"] and tree["save_strategy"] == "no"
    return "`keep_best=true` needs checkpoints: set save_strategy=steps or epoch." if nothing_kept else None


@rule("on_nonfinite", "on_loss_spike", "save_strategy")
def _rollback_to_checkpoints(tree: Tree) -> str | None:
    key = next((k for k in ("on_nonfinite", "on_loss_spike") if tree[k] == "rollback"), None)
    nothing_kept = key is not None and tree["save_strategy"] == "no"
    return f"`{key}=rollback` needs checkpoints: set save_strategy=steps or epoch." if nothing_kept else None


@rule("callback", "eval_ratio", "eval_file_name")
def _stopping_by_evaluation(tree: Tree) -> str | None:
    stops = "early_stopping" in tree["callback"] and not evaluates(tree)
    return f"`callback=early_stopping` {NO_EVALUATION}." if stops else None


@rule("lr_scheduler_type", "eval_ratio", "eval_file_name")
def _plateau_by_evaluation(tree: Tree) -> str | None:
    blind = tree["lr_scheduler_type"] == "reduce_lr_on_plateau" and not evaluates(tree)
    return f"`scheduler=reduce_lr_on_plateau` {NO_EVALUATION}." if blind else None


@rule("adapter", "train_mode")
def _adapter_to_train(tree: Tree) -> str | None:
    lost = tree["adapter"] is not None and tree["train_mode"] == "full"
    return "`adapter` needs mode=lora or mode=qlora: full mode trains no adapter." if lost else None


@rule("optimizer")
def _nesterov_momentum(tree: Tree) -> str | None:
    optimizer = tree["optimizer"]
    nothing = optimizer.get("nesterov") is True and optimizer.get("momentum") == 0
    return "`optimizer.nesterov=true` needs a momentum: set optimizer.momentum above 0." if nothing else None


@rule("data", "max_steps")
def _steps_of_a_stream(tree: Tree) -> str | None:
    endless = tree["data"].get("streaming") and tree["max_steps"] is None
    return "`data.streaming=true` needs max_steps: a pass has no known length." if endless else None


@rule("data", "eval_ratio", "eval_file_name")
def _held_out_of_a_stream(tree: Tree) -> str | None:
    if not tree["data"].get("streaming") or tree["eval_ratio"] == 0 or tree["eval_file_name"] is not None:
        return None
    return "`data.streaming=true` cannot hold rows out of what is not read first: set eval_file_name or eval_ratio=0."


@rule("data", "save_strategy")
def _epochs_of_a_stream(tree: Tree) -> str | None:
    unknown = tree["data"].get("streaming") and tree["save_strategy"] == "epoch"
    return "`data.streaming=true`: when a pass ends is not known: set save_strategy=steps." if unknown else None


WHOLE_CORPUS: Tree = {
    "duplicates": "keep", "conflicts": "keep", "cap_per_category": None, "cap_per_source": None,
    "category_weights": {}, "source_weights": {}, "temperature": 1.0,
}  # fmt: skip
"""Keys of `data` that look at all records before the first is used, and what turns them off."""


@rule("data")
def _policies_of_a_stream(tree: Tree) -> str | None:
    data = tree["data"]
    set_ = [k for k, off in WHOLE_CORPUS.items() if k in data and data[k] != off]
    if not data.get("streaming") or not set_:
        return None
    named = ", ".join(f"data.{k}" for k in set_)
    return f"`data.streaming=true` cannot look at all records first, as {named} must: leave one out."


@rule("allow_targets")
def _patterns(tree: Tree) -> str | None:
    return next(filter(None, map(pattern_problem, tree["allow_targets"])), None)


@rule("warmup_steps")
def _whole_warmup(tree: Tree) -> str | None:
    warmup = tree["warmup_steps"]
    if warmup > 1 and warmup != int(warmup):
        return f"`warmup_steps`: expected an integer number of steps, or a share < 1, got {show(warmup)}."
    return None


@rule("resume")
def _checkpoint_to_resume(tree: Tree) -> str | None:
    resume = tree["resume"]
    if resume in ("auto", "never") or Path(resume).is_dir():
        return None
    hint = did_you_mean(resume, ["auto", "never"])
    return f"`resume`: expected auto, never, or the folder of a run or of a checkpoint, got {resume!r}.{hint}"


def _splits(tree: Tree) -> bool:
    return str(tree["parallel"].get("_target_", "")).endswith(".Zero3")


@rule("parallel", "optim")
def _splittable_optimizer(tree: Tree) -> str | None:
    if not _splits(tree) or tree["optim"] in ("adamw", "sgd"):
        return None
    return (
        f"`parallel=zero3` splits the optimizer's state value by value: "
        f"expected adamw or sgd, got optim={tree['optim']}."
    )


@rule("parallel", "train_mode")
def _splittable_base(tree: Tree) -> str | None:
    quantized = _splits(tree) and tree["train_mode"] == "qlora"
    return "`parallel=zero3` cannot split a 4-bit base: use mode=lora, or parallel=ddp." if quantized else None


@rule("parallel")
def _as_many_as_were_started(tree: Tree) -> str | None:
    requested, started = tree["parallel"].get("num_processes"), os.environ.get("WORLD_SIZE", "1")
    if "RANK" not in os.environ or requested is None or started == str(requested):
        return None
    return (
        f"`parallel.num_processes={requested}`, but a launcher (torchrun) has started {started} processes: "
        "leave it out, or start without the launcher."
    )


@rule("parallel")
def _one_process_or_more(tree: Tree) -> str | None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and str(tree["parallel"].get("_target_", "")).endswith(".Single"):
        return f"{world} processes were started, but parallel=single trains alone in each: add parallel=ddp."
    return None
