"""Every YAML file is composed and checked, every component's keys are its class's, and the documents are current."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sftx import PROJECT_ROOT
from sftx.config.checks.check import freeze
from sftx.config.checks.signature import read_signature
from sftx.config.composition.aliases import MIRRORS
from sftx.config.composition.prepare import compose_checked
from sftx.config.composition.yaml_file import read_yaml
from sftx.config.help.reference import knob_defaults, parameters
from sftx.config.help.text import asks_for_help, help_text
from sftx.config.options import component_of, file_of, options
from sftx.config.schema import GROUPS, KNOBS, LIST_GROUPS, OVERLAYS, TrainConfig

FILES = sorted(p.relative_to(PROJECT_ROOT) for top in ("conf", "sweeps") for p in (PROJECT_ROOT / top).rglob("*.yaml"))
COMPONENTS = [(p.parent.name, p.stem) for p in FILES if p.parent.name in GROUPS and p.stem != "none"]


def choice(path: Path) -> list[str]:
    """Return the command line that composes a file."""
    group = "sweep" if path.parts[0] == "sweeps" else path.parent.name
    return [] if path.name == "train.yaml" else [f"{group}={path.stem}"]


def test_no_file_is_missed():
    """A file that no group of the schema would ever reach is an error."""
    assert len(FILES) > 45
    reached = {(g, o) for g in (*GROUPS, *OVERLAYS) for o in options(g)}
    assert {tuple(c[0].split("=")) for c in map(choice, FILES) if c} == reached
    assert len(reached) == len(FILES) - 1


CHOOSY = {("parallel", "zero3")}
"""Options that do not go with every option of the other groups."""


@cache
def composed(*argv: str) -> TrainConfig:
    return freeze(compose_checked(list(argv)))


def with_file(path: Path) -> TrainConfig:
    """Compose a file; components are taken in rounds, one option of each group at a time, which is faster."""
    if not choice(path):
        return composed()
    group, option = choice(path)[0].split("=")
    if group in OVERLAYS or (group, option) in CHOOSY:
        return composed(f"{group}={option}")
    number = options(group).index(option)
    round_ = [(g, options(g)[number]) for g in GROUPS if number < len(options(g))]
    return composed(*(f"{g}={o}" for g, o in round_ if (g, o) not in CHOOSY))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_composes_to_a_right_configuration(path):
    config = with_file(path)
    group = choice(path)[0].split("=")[0] if choice(path) else ""
    if group in GROUPS and path.stem != "none":
        node = getattr(config, group)
        written = component_of(group, path.stem)
        composed_node = node[path.stem] if group in LIST_GROUPS else node
        assert written.keys() == composed_node.keys()
        assert all(composed_node[k] == v for k, v in written.items() if "${" not in str(v))
    if group in MIRRORS:
        assert getattr(config, MIRRORS[group]) == path.stem
    if group in LIST_GROUPS:
        assert list(getattr(config, group)) == [path.stem] * (path.stem != "none")
    if group == "precision":
        assert {"fp16": config.fp16, "bf16": config.bf16} == {half: half == path.stem for half in ("fp16", "bf16")}
    if group in OVERLAYS:
        written = OmegaConf.load(PROJECT_ROOT / path)
        assert all(getattr(config, key) == value for key, value in written.items() if key in KNOBS)


@pytest.mark.parametrize(("group", "option"), COMPONENTS, ids=["/".join(c) for c in COMPONENTS])
def test_a_components_keys_are_those_of_its_class(group, option):
    """Each value has one home: no key that the class lacks, no default that only the class knows."""
    node = component_of(group, option)
    assert next(iter(node)) == "_target_"
    signature = read_signature(node["_target_"])
    assert not signature.open
    assert set(node) - {"_target_"} == set(signature.arguments)
    assert all(a.kind for a in signature.arguments.values())


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "train.yaml"], ids=str)
def test_every_file_says_what_it_is(path):
    group, option = choice(path)[0].split("=")
    assert len(file_of(group, option).comment()) > 15


def test_the_manuals_defaults():
    manual = {
        "model_name_or_path": "qwen-tiny", "train_file_path": "data", "train_file_name": "aspcoder_train.csv",
        "train_mode": "lora", "num_train_epochs": 1, "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16, "learning_rate": 2e-4, "max_seq_length": 1024, "logging_steps": 100,
        "save_steps": 100, "save_strategy": "steps", "save_total_limit": 1,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 100, "lora_rank": 64, "lora_alpha": 16,
        "lora_dropout": 0.05, "gradient_checkpointing": True, "disable_tqdm": False, "optim": "paged_adamw_32bit",
        "seed": 42, "fp16": True, "bf16": False, "report_to": ["tensorboard"], "dataloader_num_workers": 0,
        "weight_decay": 0, "max_grad_norm": 0.3, "remove_unused_columns": False, "output_dir": None,
        "template_name": None,
    }  # fmt: skip
    config = freeze(compose_checked([]))
    assert {key: getattr(config, key) for key in manual} == manual
    shown = knob_defaults()
    assert {key: shown[key] for key in manual} == manual
    assert freeze(compose_checked(["train_mode=full"])).learning_rate == 1e-5


def test_the_reference_is_current():
    written = (PROJECT_ROOT / "docs/parameters.md").read_text(encoding="utf-8")
    assert written == parameters(), "run: make docs"


def test_the_reference_is_what_the_module_prints():
    out = subprocess.run([sys.executable, "-m", "sftx.config.help.reference"], capture_output=True, check=True)
    assert out.stdout.decode("utf-8") == parameters()


def test_the_reference_holds_everything():
    text = parameters()
    for knob in KNOBS.values():
        assert f"| `{knob.name}` |" in text
        assert knob.metadata["zh"].split("<")[0] in text
    for group, option in COMPONENTS:
        path = f"{group}.{option}" if group in LIST_GROUPS else group
        for key, value in component_of(group, option).items():
            assert key == "_target_" or f"`{path}.{key}`: `" in text, (group, option, key, value)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_help_mentions_every_key_group_and_option(monkeypatch, language):
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8" if language == "zh" else "C")
    lines = help_text().splitlines()
    joined = "".join(line.strip() for line in lines)
    for name, knob in KNOBS.items():
        assert any(line.startswith(f"  {name}=") for line in lines), name
        assert knob.metadata[language].replace(" ", "")[:30] in joined.replace(" ", ""), name
    for name in (*GROUPS, *OVERLAYS):
        assert any(line.startswith(f"  {name}=") for line in lines), name
        assert all(option in joined for option in options(name)), name


@pytest.mark.parametrize(("argv", "asks"), [(["--help"], True), (["x=1", "-h"], True), (["--hydra-help"], False)])
def test_help_is_asked_for(argv, asks):
    assert asks_for_help(argv) is asks


@pytest.mark.parametrize("text", ["1e3", "2e-4", ".5", "1_000.5", ".inf", "-.INF", ".nan", "2024-07-26", "1:30.5", "0x1F", "yes", "~", "1.", "e5", "1e", "+.e3", "1e+5", "007", "a: b", "-1E5"])  # fmt: skip
def test_scalars_are_read_as_omegaconf_reads_them(tmp_path, text):
    file = tmp_path / "one.yaml"
    file.write_text(f"key:\n  {text}\n", encoding="utf-8")
    assert repr(read_yaml(file).body) == repr(OmegaConf.to_container(OmegaConf.load(file)))
