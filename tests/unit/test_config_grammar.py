"""Values on the command line: whatever a person types arrives as it was meant, or is refused with a word."""

import os

import pytest
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sftx.config.composition import by_hydra
from sftx.config.composition.command_line import override_text, read_command_line
from sftx.config.composition.grammar import grammar, quote, read_override, split_commas
from sftx.config.composition.prepare import compose_checked, prepare
from sftx.config.values import Sweep
from sftx.errors import ConfigError

PARSER = OverridesParser.create()
NASTY = st.text(st.sampled_from("ab'\"\\ ,=()[]{}:$~+-#?*/.\n\t训练（）1e0_"), max_size=12)
TEXT = NASTY | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]*", fullmatch=True), v)
)


def read_by_hydra(text):
    return PARSER.parse_override(f"key={text}").value()


@given(TEXT)
@example("it's")
@example("\\")
@example("a\\'b\\")
@example("C:\\new\\table\\")
@settings(max_examples=150, deadline=None)
def test_quoted_text_comes_back(text):
    assert read_by_hydra(quote(text)) == text


@given(VALUES)
@example(["true", "null", "1e3", "nan", "inf", ""])
@example({"a": {"b": [True, None, -0.0, 1e300]}})
@example("a训练")
@settings(max_examples=40, deadline=None)
def test_written_values_come_back_with_their_types(value):
    again = read_by_hydra(grammar(value))
    assert again == value
    assert repr(again) == repr(value)


@given(st.lists(SCALARS, min_size=2, max_size=4))
@settings(max_examples=80, deadline=None)
def test_written_sweeps_come_back_point_by_point(values):
    typed = read_override(f"key={grammar(Sweep(tuple(values)))}", multirun=True)
    assert typed.value == Sweep(tuple(values))
    assert repr(typed.value) == repr(Sweep(tuple(values)))


@given(TEXT.filter(lambda t: t == t.strip()))
@settings(max_examples=150, deadline=None)
def test_whatever_is_typed_is_read_or_refused(text):
    typed = read_override(f"train_file_name={text}", multirun=False)
    assert typed is not None
    assert typed.name == "train_file_name"


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("训练数据.csv", "训练数据.csv"),
        ("训练 数据（第1版）.csv", "训练 数据（第1版）.csv"),
        ("训练,数据.csv", "训练,数据.csv"),
        ("my data (1).csv", "my data (1).csv"),
        ("a(1)=2.csv", "a(1)=2.csv"),
        ("a=b.csv", "a=b.csv"),
        ("it's.csv", "it's.csv"),
        ('say "hi".csv', 'say "hi".csv'),
        ("'quoted, with a comma.csv'", "quoted, with a comma.csv"),
        ("C:\\new\\table.csv", "C:\\new\\table.csv"),
        ("data{1}.csv", "data{1}.csv"),
        ("[draft.csv", "[draft.csv"),
        ("2024", "2024"),
        ("007", "007"),
        ("1.10", "1.10"),
        ("true", "true"),
        ("-x.csv", "-x.csv"),
        ("~/a.csv", "~/a.csv"),
        ("50%.csv", "50%.csv"),
        ("a#b.csv", "a#b.csv"),
    ],
)
def test_a_text_key_takes_what_is_typed(typed, value):
    line = read_command_line([f"train_file_name={typed}"])
    assert line.values == {"train_file_name": value}
    assert read_by_hydra(override_text("train_file_name", value).partition("=")[2]) == value


def test_texts_reach_the_composed_configuration():
    cfg = compose_checked(["train_file_name=训练 数据(1)=2,3.csv", "train_file_path=C:\\new\\", "output_dir=2024"])
    assert (cfg.train_file_name, cfg.train_file_path, cfg.output_dir) == ("训练 数据(1)=2,3.csv", "C:\\new\\", "2024")


def test_a_list_of_chinese_texts():
    cfg = compose_checked(["callback=generate_samples", "callback.generate_samples.prompts=[你好（一）,再见, it's]"])
    assert cfg.callback.generate_samples.prompts == ["你好（一）", "再见", "it's"]


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("{human:问题}", {"human": "问题"}),
        ("{human: 问题, assistant:'回答，好'}", {"human": "问题", "assistant": "回答，好"}),
        ('{"human":"问 题",\'a\':b}', {"human": "问 题", "a": "b"}),
        ("{a:{b:问},c:[问,d]}", {"a": {"b": "问"}, "c": ["问", "d"]}),
        ("{a:写（x）:y}", {"a": "写（x）:y"}),
    ],
)
def test_a_mapping_of_chinese_texts(typed, value):
    assert read_override(f"data.columns={typed}", multirun=False).value == value


def test_a_chinese_name_in_a_mapping_goes_to_a_file_and_the_message_says_how(tmp_path):
    problems = read_command_line(["data.category_prefix={a:b,代码:写}"]).problems
    assert len(problems) == 1
    assert "`data: {category_prefix: {代码: ...}}`" in problems[0]
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("data: {category_prefix: {代码: 写}}\n", encoding="utf-8")
    config = compose_checked(["--config-dir", str(tmp_path), "experiment=mine"])
    assert config.data.category_prefix == {"代码": "写"}
    assert not read_command_line(["output_dir={问:b}"]).problems
    (tmp_path / "args.json").write_text('{"data": {"category_prefix": {"代码": "写"}}}', encoding="utf-8")
    assert "experiment=mine" in read_command_line([f"args_file={tmp_path / 'args.json'}"]).problems[0]


@pytest.mark.parametrize(
    ("typed", "points"),
    [
        ("训练.csv,测试(2).csv", ["训练.csv", "测试(2).csv"]),
        ("'a,b.csv',c.csv", ["a,b.csv", "c.csv"]),
        ("f(1,2).csv,训练.csv", ["f(1,2).csv", "训练.csv"]),
        ("it's.csv,b.csv", ["it's.csv", "b.csv"]),
    ],
)
def test_commas_separate_the_points_of_a_multirun(typed, points):
    request = prepare(["-m", f"train_file_name={typed}"])
    override = PARSER.parse_override(request.overrides[0])
    assert [PARSER.parse_override(f"k={s}").value() for s in override.sweep_string_iterator()] == points


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a,b", ["a", "b"]),
        ("[a,b],c", ["[a,b]", "c"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("f(a,(b,c)),d", ["f(a,(b,c))", "d"]),
        ("a(,b", ["a(", "b"]),
        ("", [""]),
    ],
)
def test_split_commas(text, pieces):
    assert split_commas(text) == pieces


PREFIXES = {
    "+lora_rank=8": ["lora_rank=8"],
    "++lora_rank=8": ["lora_rank=8"],
    "+experiment=quickstart": ["experiment=quickstart"],
    "++optim=adamw_torch": ["optimizer=adamw"],
    "~callback": ["callback=[]"],
    "~experiment": ["experiment=null"],
    "save_total_limit=null": ["save_total_limit=null"],
    "report_to=null": ["tracker=[]"],
    "+scheduler.warmup_steps=3": ["scheduler.warmup_steps=3"],
    "hydra.run.dir=somewhere": ["output_dir=somewhere"],
}


@pytest.mark.parametrize(("typed", "overrides"), PREFIXES.items(), ids=PREFIXES)
def test_hydras_prefixes(typed, overrides):
    line = read_command_line(typed.split())
    assert line.problems == []
    assert [override_text(key, value) for key, value in line.values.items()] == overrides


REFUSED = {
    "lora_rank=": "`lora_rank`: expected an integer >= 1, got an empty value",
    "output_dir=": "`output_dir`: expected null or a string, got an empty value",
    "save_steps=null": "`save_steps`: expected auto or an integer >= 1, got null",
    "~lora_alpha": "`lora_alpha` cannot be taken out",
    "~precision": "`precision` cannot be taken out",
    "~optim": "`optim` cannot be taken out",
    "~scheduler.foo": "'scheduler.foo' does not exist",
    "mode=null": "`mode` has no option 'null'",
    "+lora_rnk=8": "Did you mean `lora_rank`?",
    "++experimnt=quickstart": "Did you mean `experiment`?",
    "logging_steps.x=3": "`logging_steps`: expected an integer >= 1, got {x:3}",
    "eval_steps=[8]": "`eval_steps`: expected auto or an integer >= 1, got [8]",
    "lora_rank": "`lora_rank` is not an override",
    "lora rank=8": "`lora rank=8` is not an override",
    "秩=8": "`秩=8` is not an override",
    "--lora_rank=8": "`--lora_rank=8`: settings are typed without dashes: lora_rank=8",
    "-lora_rank": "`-lora_rank`: settings are typed without dashes: lora_rank=VALUE",
    "hydra.searchpath=[x]": "--config-dir",
    "callback.early_stopping.patience=5": "Choose it too: callback=[early_stopping]",
    "tracker.wnadb.name=x": "Did you mean `wandb`?",
    "power=3": "Did you mean `scheduler.power`?",
    "max_steps=${": "`max_steps`: ${ is no interpolation",
}


def test_what_cannot_be_is_said():
    """Each with the words that were typed, and none hiding another."""
    with pytest.raises(ConfigError) as error:
        prepare(list(REFUSED))
    for typed, said in REFUSED.items():
        about = [p for p in error.value.problems if p.startswith(f"command line: `{typed}`") and said in p]
        assert len(about) == 1, (typed, error.value.problems)
    assert len(error.value.problems) == len(REFUSED)


def test_a_key_given_twice():
    with pytest.raises(ConfigError, match="`lora_rank` is given twice, first as `8`"):
        prepare(["lora_rank=8", "lora_rank=16"])
    assert prepare(["lora_rank=8", "lora_rank=8"]).overrides == ["lora_rank=8"]


@pytest.mark.parametrize(
    "argv",
    [
        ["scheduler=cosine", "scheduler.floor=0.5", "+tracker.wandb.name=a b", "tracker=wandb"],
        ["scheduler={warmup_steps:7}", "train_file_name=训练 数据(1)=2,3.csv", "output_dir=2024"],
        ["callback=[early_stopping,generate_samples]", "~callback.early_stopping", "~tracker"],
        ["bf16=true", "optim=adamw_hf", "report_to=all", "save_total_limit=null", "template_name='null'"],
        ["experiment=qwen2_5_7b_qlora", "fp16=false", "lora_alpha=${lora_rank}", "hydra.job.name=mine"],
    ],
)
def test_hydra_composes_what_was_checked(argv):
    """`prepare` composes leniently; Hydra, given its overrides, results in the same configuration strictly."""
    request = prepare(argv)
    cfg, hydra = by_hydra.load(request.overrides)
    assert cfg == compose_checked(argv)
    assert request.composed is not None
    assert OmegaConf.to_container(request.composed[1]) == OmegaConf.to_container(hydra)
    assert request.composed[0] == cfg


def test_what_was_checked_is_what_runs(monkeypatch):
    """Hydra composes nothing again: a file that changes after the check changes nothing."""
    request = prepare(["lora_rank=5", "+hydra.job.env_set.SFTX_TRIED=yes"])
    monkeypatch.setattr(by_hydra, "compose", None)
    monkeypatch.setattr(by_hydra, "main", None)
    monkeypatch.delenv("SFTX_TRIED", raising=False)
    seen = []
    by_hydra.run_once(
        lambda cfg: seen.append((cfg, HydraConfig.get().mode, os.environ["SFTX_TRIED"])), *request.composed
    )
    [(cfg, mode, tried)] = seen
    assert (cfg.lora_rank, mode, tried) == (5, RunMode.RUN, "yes")
    assert "hydra" not in cfg


def test_a_single_run_composes_once(monkeypatch):
    composed = []
    monkeypatch.setattr(by_hydra, "compose", lambda *args, **words: composed.append(args) or compose(*args, **words))
    assert prepare(["lora_rank=5", "mode=qlora", "scheduler.warmup_steps=3"]).composed is not None
    assert len(composed) == 1


CALLBACK = "+hydra.callbacks.mine._target_=hydra.experimental.callbacks.LogJobReturnCallback"


@pytest.mark.parametrize(
    "argv",
    [
        ["lora_rank=1,2", "-m"],
        ["--info"],
        ["lora_rank=1", "hydra.mode=MULTIRUN"],
        [CALLBACK, "allow_targets=[hydra.experimental.callbacks.LogJobReturnCallback]"],
    ],
)
def test_hydra_composes_what_is_not_a_single_run(argv):
    assert prepare(argv).composed is None
