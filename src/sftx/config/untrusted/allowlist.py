"""What a configuration may run: an explicit list of names, looked up before anything is imported.

Hydra calls whatever `_target_` names, some of it before main. So every `_target_` and resolver of a composed
tree, `hydra.*` included, is looked up here. What a person allows beside sftx's own components is typed:
`allow_targets=[my_parts.*]`; only then is `my_parts` imported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

from sftx.config.checks.signature import TargetNotFound, defined_as, find
from sftx.config.schema import COMPONENTS
from sftx.config.trees import nodes
from sftx.config.values import Origin, show
from sftx.errors import did_you_mean

LAUNCHERS = frozenset({
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
})  # fmt: skip
SWEEPERS = frozenset({
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
})  # fmt: skip
OWN_PLUGINS = "hydra_plugins.sftx_"
"""How the modules of sftx's own launchers and sweepers begin: Hydra takes plugins from `hydra_plugins` only."""
SAMPLERS = frozenset(
    f"optuna.samplers.{name}Sampler"
    for name in ("TPE", "Random", "CmaEs", "NSGAII", "Grid", "QMC", "MOTPE", "GP", "BruteForce")
)
RESOLVERS = frozenset({
    "hydra", "now", "python_version", "oc.env", "oc.select", "oc.deprecated", "oc.dict.keys", "oc.dict.values"
})  # fmt: skip
"""`oc.create` and `oc.decode` are not among them: they make a tree out of a text, which no check has seen."""
SPOKEN = ("hydra.overrides.", "hydra.job.override_dirname")
"""Where Hydra repeats the overrides as texts: nothing else can set these."""
SPACES = ("hydra.sweeper.params.", "hydra.sweeper.search_space.")
"""Keys such as `scheduler._target_` in a search space are the job's: each point is checked as the job that it is."""
JOB_NAME = re.compile(r"\w[\w.-]*")
PATTERN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*\.\*|[^\W\d]\w*(\.[^\W\d]\w*)+")


def pattern_problem(pattern: Any) -> str | None:
    """Return what is wrong with one entry of `allow_targets`, or None."""
    if isinstance(pattern, str) and PATTERN.fullmatch(pattern):
        return None
    return f"`allow_targets`: expected `package.*` or the full name of a class, got {show(pattern)}."


def is_allowed(target: str, allow: Sequence[str]) -> bool:
    """Return True if a dotted name is among the patterns."""
    return any(target == p or (p.endswith(".*") and target.startswith(p[:-1])) for p in allow)


def refusal(
    target: Any, allow: Sequence[str], listed: frozenset[str] = COMPONENTS, what: str = "an sftx component"
) -> str | None:
    """Return why a `_target_` may not run, or None; `listed` need no permission, by default sftx's components."""
    if not isinstance(target, str) or not all(p.isidentifier() for p in target.split(".")) or "." not in target:
        return "expected the dotted name of a class, written out."
    if target in allow or target in listed:
        return None
    if is_allowed(target, allow):
        return _not_its_own(target, allow)
    if target.startswith("sftx."):
        return f"not {what}.{did_you_mean(target, listed)}"
    return f"not {what}; configurations may only instantiate those. {cure(target)}"


def cure(target: str) -> str:
    """Return what to type if the target is the user's own."""
    top = target.partition(".")[0]
    if top in sys.stdlib_module_names or top in ("sftx", "hydra", "omegaconf"):
        return "Do not run a configuration that names it."
    return f"If it is yours, or you have read it, type: 'allow_targets=[{top}.*]'"


def _not_its_own(target: str, allow: Sequence[str]) -> str | None:
    """Return why a target that matches a pattern is refused all the same: a package's imports are not its own."""
    try:
        defined = defined_as(find(target))
    except TargetNotFound as error:
        return str(error)
    if defined is None:
        return f"neither a class nor a function. If you trust it, type its whole name: 'allow_targets=[{target}]'"
    if is_allowed(defined, allow):
        return None
    return f"this is another name for `{defined}`, which allow_targets={show(list(allow))} does not cover."


def unlisted(tree: Any, allow: Sequence[str], origin: Origin, path: str = "") -> list[str]:
    """Return a problem for each `_target_` and each resolver of a job's tree that may not run."""
    problems = []
    for key, name, value in nodes(tree, path):
        if name.rpartition(".")[2] == "_target_":
            reason = refusal(value, allow)
            problems += [f"{origin(key)}: `{key}={show(value)}`: {reason}"] if reason else []
        problems += bad_resolvers(key, value, origin)
    return problems


def unlisted_hydra(tree: dict[str, Any], allow: Sequence[str], origin: Origin) -> list[str]:
    """Return a problem for everything in Hydra's own tree that would run and may not."""
    problems = []
    for key, name, value in nodes(tree, "hydra"):
        if key.startswith(SPOKEN):
            continue
        swept = key.startswith(SPACES) and name != "_target_"
        if name.rpartition(".")[2] == "_target_" and not swept:
            reason = _hydra_refusal(key, value, allow)
            problems += [f"{origin(key)}: `{key}={show(value)}`: {reason}"] if reason else []
        problems += bad_resolvers(key, value, origin)
    name = (tree.get("job") or {}).get("name", "train")
    if not JOB_NAME.fullmatch(str(name)):  # Hydra's log file is named after it
        problems.append(f"{origin('hydra.job.name')}: `hydra.job.name={show(name)}`: expected a name without `/`.")
    return problems


def _hydra_refusal(key: str, target: Any, allow: Sequence[str]) -> str | None:
    listed = {"hydra.launcher._target_": LAUNCHERS, "hydra.sweeper._target_": SWEEPERS}.get(key, frozenset())
    if key.startswith("hydra.sweeper.") and not listed:
        listed = SAMPLERS
    if key in ("hydra.launcher._target_", "hydra.sweeper._target_") and str(target).startswith(OWN_PLUGINS):
        return None
    if isinstance(target, str) and target.startswith("sftx.") and not is_allowed(target, allow):
        return "sftx has no component that Hydra itself runs: take it out."
    known = ", ".join(sorted(name.rpartition(".")[2] for name in listed))
    return refusal(target, allow, listed, f"one of {known}" if known else "an sftx component")


def bad_resolvers(key: str, value: Any, origin: Origin) -> list[str]:
    """Return a problem for each resolver in a text that is not among those known to do nothing but look up."""
    if not isinstance(value, str) or "${" not in value:
        return []
    return [
        f"{origin(key)}: `{key}`: the resolver `{name}` of {value} is not allowed: write the value itself. "
        f"Allowed: {', '.join(sorted(RESOLVERS))}."
        for name in resolvers_in(value)
        if name not in RESOLVERS
    ]


@cache
def resolvers_in(text: str) -> tuple[str, ...]:
    """Return the names of all resolvers of a text, nested ones too."""
    if ":" not in text:
        return ()
    try:
        waiting = [parse(text)]
    except OmegaConfBaseException:
        return ()  # a bad interpolation, which is reported as one
    names = []
    while waiting:
        node = waiting.pop()
        if isinstance(node, OmegaConfGrammarParser.InterpolationResolverContext):
            names.append(node.resolverName().getText())
        waiting += list(getattr(node, "children", None) or ())
    return tuple(names)
