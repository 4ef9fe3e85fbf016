"""sftx's own templates against the strings that the models' publishers render, typed by hand."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
from tests.unit.test_template import byte_tokenizer

from sftx.config.options import component_of
from sftx.data.encode.policy import EncodePolicy
from sftx.data.encode.template import TEMPLATES, ChatTemplate, template_source
from sftx.data.records.record import Message, Record
from sftx.errors import ConfigError
from sftx.model.loading.family import family_named
from sftx.model.loading.markers import check_markers

IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHATML = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
CHATML_NEXT = "\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Golden:
    """What a family's template makes of: system S, user hi, assistant yo, user bye, assistant ok."""

    special: tuple[str, ...]
    prompt: str
    """Before `yo`."""
    first: str
    """What is learned of the first answer."""
    between: str | None
    """From there to the second answer, which shares the row; None when it has its own."""
    second: str
    named: dict[str, str] = field(default_factory=dict)
    last_prompt: str = ""
    """Before `ok`, where that is not the beginning of the row's text."""
    bare: str = ""
    """The prompt of `hi` alone, where the template has a system turn of its own."""


S2 = {"bos_token": "<s>", "eos_token": "</s>"}
DEEP = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
DEEP2 = {"bos_token": DEEP[0], "eos_token": DEEP[1]}
GLM = ("[gMASK]", "<sop>", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>")

FAMILIES = {
    "chatml": Golden(IM, CHATML, "yo<|im_end|>", CHATML_NEXT, "ok<|im_end|>", {"eos_token": "<|im_end|>"}),
    "qwen1_5": Golden(
        IM, CHATML, "yo<|im_end|>", CHATML_NEXT, "ok<|im_end|>", {"eos_token": "<|im_end|>"},
        bare="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen2": Golden(
        IM, CHATML, "yo<|im_end|>", CHATML_NEXT, "ok<|im_end|>", {"eos_token": "<|im_end|>"},
        bare="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen2_5": Golden(
        IM, CHATML, "yo<|im_end|>", CHATML_NEXT, "ok<|im_end|>", {"eos_token": "<|im_end|>"},
        bare="<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "smollm2": Golden(
        IM, CHATML, "yo<|im_end|>", CHATML_NEXT, "ok<|im_end|>", {"eos_token": "<|im_end|>"},
        bare="<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen3": Golden(
        IM, CHATML + "<think>\n\n</think>\n\n", "yo<|im_end|>", None, "ok<|im_end|>", {"eos_token": "<|im_end|>"},
        last_prompt=CHATML + "yo<|im_end|>" + CHATML_NEXT + "<think>\n\n</think>\n\n",
    ),
    "internlm2": Golden(
        ("<s>", "</s>", *IM[:2]), "<s>" + CHATML, "yo<|im_end|>", CHATML_NEXT, "ok<|im_end|>", S2
    ),
    "llama3": Golden(
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "yo<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nbye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "ok<|eot_id|>",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "llama3_1": Golden(
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "yo<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\nbye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "ok<|eot_id|>",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        bare="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "llama2": Golden(
        ("<s>", "</s>"), "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nhi [/INST]", " yo </s>", "<s>[INST] bye [/INST]",
        " ok </s>", S2,
    ),
    "mistral": Golden(
        ("<s>", "</s>"), "<s> [INST] S\n\nhi [/INST]", " yo</s>", " [INST] bye [/INST]", " ok</s>", S2
    ),
    "mistral_v3": Golden(
        ("<s>", "</s>", "[INST]", "[/INST]"), "<s>[INST] S\n\nhi[/INST]", " yo</s>", None, " ok</s>", S2,
        last_prompt="<s>[INST] hi[/INST] yo</s>[INST] S\n\nbye[/INST]",
    ),
    "mistral_v7": Golden(
        ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]hi[/INST]", "yo</s>", "[INST]bye[/INST]", "ok</s>", S2,
    ),
    "gemma": Golden(
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos><start_of_turn>user\nS\n\nhi<end_of_turn>\n<start_of_turn>model\n", "yo<end_of_turn>",
        "\n<start_of_turn>user\nbye<end_of_turn>\n<start_of_turn>model\n", "ok<end_of_turn>",
        {"bos_token": "<bos>", "eos_token": "<eos>"},
    ),
    "phi3": Golden(
        ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|system|>\nS<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\n", "yo<|end|>",
        "\n<|user|>\nbye<|end|>\n<|assistant|>\n", "ok<|end|>", {"eos_token": "<|endoftext|>"},
    ),
    "phi3_5": Golden(
        ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|system|>\nS<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\n", "yo<|end|>",
        "\n<|user|>\nbye<|end|>\n<|assistant|>\n", "ok<|end|>", {"eos_token": "<|endoftext|>"},
    ),
    "phi4": Golden(
        ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>hi<|im_end|><|im_start|>assistant<|im_sep|>",
        "yo<|im_end|>", "<|im_start|>user<|im_sep|>bye<|im_end|><|im_start|>assistant<|im_sep|>", "ok<|im_end|>",
        {"eos_token": "<|im_end|>"},
    ),
    "phi4_mini": Golden(
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|system|>S<|end|><|user|>hi<|end|><|assistant|>", "yo<|end|>", "<|user|>bye<|end|><|assistant|>",
        "ok<|end|>", {"eos_token": "<|endoftext|>"},
    ),
    "yi": Golden(
        IM, "S<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "yo<|im_end|>", CHATML_NEXT, "ok<|im_end|>",
        {"eos_token": "<|im_end|>"},
    ),
    "chatglm3": Golden(
        GLM, "[gMASK]sop<|system|>\n S<|user|>\n hi<|assistant|>", "\n yo<|user|>", "\n bye<|assistant|>",
        "\n ok<|user|>", {"eos_token": "<|endoftext|>"},
    ),
    "glm4": Golden(
        GLM, "[gMASK]<sop><|system|>\nS<|user|>\nhi<|assistant|>", "\nyo<|user|>", "\nbye<|assistant|>",
        "\nok<|user|>", {"eos_token": "<|endoftext|>"},
    ),
    "glm4_5": Golden(
        (*GLM[:2], *GLM[3:]), "[gMASK]<sop><|system|>\nS<|user|>\nhi/nothink<|assistant|>\n<think></think>",
        "\nyo<|user|>", "\nbye/nothink<|assistant|>\n<think></think>", "\nok<|user|>", {"eos_token": "<|endoftext|>"},
    ),
    "baichuan2": Golden(
        ("<s>", "</s>", "<reserved_106>", "<reserved_107>"), "S<reserved_106>hi<reserved_107>", "yo</s>", None,
        "ok</s>", S2, last_prompt="S<reserved_106>hi<reserved_107>yo<reserved_106>bye<reserved_107>",
    ),
    "deepseek_v2": Golden(
        DEEP[:2], "<｜begin▁of▁sentence｜>S\n\nUser: hi\n\nAssistant:", " yo<｜end▁of▁sentence｜>",
        "User: bye\n\nAssistant:", " ok<｜end▁of▁sentence｜>", DEEP2,
    ),
    "deepseek_v3": Golden(
        DEEP, "<｜begin▁of▁sentence｜>S<｜User｜>hi<｜Assistant｜>", "yo<｜end▁of▁sentence｜>",
        "<｜User｜>bye<｜Assistant｜>", "ok<｜end▁of▁sentence｜>", DEEP2,
    ),
}  # fmt: skip
"""By template."""
REGISTRY = [
    ("qwen1_5", "qwen1_5"), ("qwen2_5", "qwen2_5"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("qwen3_moe", "qwen3"),
    ("llama2", "llama2"), ("llama", "llama3"), ("llama3_1", "llama3_1"), ("mistral", "mistral"), ("mixtral", "mistral"),
    ("mistral_v3", "mistral_v3"), ("mistral_v7", "mistral_v7"), ("gemma", "gemma"), ("gemma2", "gemma"),
    ("gemma3_text", "gemma"), ("chatglm", "chatglm3"), ("glm", "glm4"), ("glm4_moe", "glm4_5"), ("baichuan", "baichuan2"),
    ("internlm2", "internlm2"), ("deepseek_v2", "deepseek_v2"), ("deepseek_v3", "deepseek_v3"), ("yi", "yi"),
    ("phi3", "phi3"), ("phi3_5", "phi3_5"), ("phi4", "phi4"), ("phi4_mini", "phi4_mini"),
]  # fmt: skip
"""Family or model type, and the template it is trained with when the model brings none."""
TALK = tuple(
    Message(role, text)  # type: ignore[arg-type]
    for role, text in (("system", "S"), ("user", "hi"), ("assistant", "yo"), ("user", "bye"), ("assistant", "ok"))
)


def template_of(name: str, without: str = "") -> ChatTemplate:
    golden = FAMILIES[name]
    special = [t for t in golden.special if t != without]
    option = {"chatml": "qwen", "llama3": "llama", "phi3": "phi"}.get(name, name)
    family = component_of("model", option)
    assert family["template"] == name
    return ChatTemplate(byte_tokenizer(*special, **golden.named), template_source(name), family["stop_tokens"])


def spans(template: ChatTemplate, record: Record) -> list[list[str]]:
    """Return each row as texts that are in turn not learned and learned."""
    rows = template.encode(record, EncodePolicy(10_000))
    assert isinstance(rows, list), rows
    out = []
    for row in rows:
        texts: list[list[int]] = [[]]
        before = False
        for token, learned in zip(row.ids_T.tolist(), row.supervised_T.tolist(), strict=True):
            if learned != before:
                texts.append([])
            texts[-1].append(token)
            before = learned
        out.append([template.tokenizer.decode(t) for t in texts])
    return out


def test_every_own_template_has_its_strings() -> None:
    assert sorted(FAMILIES) == sorted(p.stem for p in TEMPLATES.glob("*.jinja"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_is_what_the_publisher_renders(name: str) -> None:
    golden, template = FAMILIES[name], template_of(name)
    found = spans(template, Record(TALK, "c", "f", 1, {}))
    if golden.between is None:
        assert found == [[golden.prompt, golden.first], [golden.last_prompt, golden.second]]
    else:
        assert found == [[golden.prompt, golden.first, golden.between, golden.second]]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_stands_before_each_answer_is_inferences_prompt(name: str) -> None:
    template = template_of(name)
    rows = template.encode(Record(TALK, "c", "f", 1, {}), EncodePolicy(10_000))
    assert isinstance(rows, list)
    starts = [
        row.ids_T[: i + 1].tolist()
        for row in rows
        for i in range(len(row.ids_T) - 1)
        if row.supervised_T[i + 1] and not row.supervised_T[i]
    ]
    thinking = False if name in ("qwen3", "glm4_5") else None
    asked = [{"role": m.role, "content": m.content} for m in TALK]
    assert starts == [template.prompt_ids(asked[:k], thinking=thinking) for k in (2, 4)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_control_tokens_are_those_of_its_tokenizer_and_each_is_missed(name: str) -> None:
    assert check_markers(template_of(name), model="m", own=False) is None
    text = FAMILIES[name].prompt + FAMILIES[name].first
    for token in (t for t in FAMILIES[name].special if t in text and t not in FAMILIES[name].named.values()):
        if token.startswith("<"):  # [INST] is plain text to many
            with pytest.raises(ConfigError, match=rf"writes .*{re.escape(token)}"):
                check_markers(template_of(name, without=token), model="m", own=False)


@pytest.mark.parametrize("name", [n for n, g in FAMILIES.items() if g.bare])
def test_a_template_with_a_system_turn_of_its_own_writes_it(name: str) -> None:
    found = spans(template_of(name), Record(TALK[1:3], "c", "f", 1, {}))
    assert found == [[FAMILIES[name].bare, FAMILIES[name].first]]


@pytest.mark.parametrize("name", sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
def test_a_template_cites_the_copy_it_was_compared_with(name: str) -> None:
    head = " ".join(template_source(name).partition("-#}")[0].split())
    assert re.match(r"\{#- [\w-]+/[\w.-]+|\{#- ChatML", head), "the model comes first"
    assert re.search(r"\b[\w-]+/[\w.-]+ [\w./-]+ @ [0-9a-f]{8}\b", head), "then repository, path and commit"


@pytest.mark.parametrize(("name", "template"), REGISTRY)
def test_a_common_family_has_its_template(name: str, template: str) -> None:
    family = family_named(name)
    assert family is not None, f"no family covers {name}"
    assert family.template == template
    assert template_source(template)


def test_deepseek_joins_what_several_system_turns_say() -> None:
    asked = [{"role": "system", "content": "S"}, {"role": "system", "content": "T"}, {"role": "user", "content": "hi"}]
    found = template_of("deepseek_v3").render(asked, generation_prompt=True)
    assert found == "<｜begin▁of▁sentence｜>S\n\nT<｜User｜>hi<｜Assistant｜>"


def test_llama_3_1_renders_tools_before_the_first_question_and_calls_as_parameters() -> None:
    function = {"name": "w", "description": "d", "parameters": {"type": "object", "properties": {}}}
    call = {"type": "function", "function": {"name": "w", "arguments": {"city": "Bern"}}}
    talk = (
        Message("user", "hi"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "18"),
        Message("assistant", "yo"),
    )
    record = Record(talk, "c", "f", 1, {}, tools=({"type": "function", "function": function},))
    user, answer, tool = (f"<|start_header_id|>{r}<|end_header_id|>\n\n" for r in ("user", "assistant", "ipython"))
    assert spans(template_of("llama3_1"), record) == [
        [
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
            f"Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>{user}"
            "Given the following functions, please respond with a JSON for a function call with its proper arguments "
            "that best answers the given prompt.\n\nRespond in the format "
            '{"name": function name, "parameters": dictionary of argument name and its value}.'
            'Do not use variables.\n\n{\n    "type": "function",\n    "function": {\n        "name": "w",\n'
            '        "description": "d",\n        "parameters": {\n            "type": "object",\n'
            f'            "properties": {{}}\n        }}\n    }}\n}}\n\nhi<|eot_id|>{answer}',
            '{"name": "w", "parameters": {"city": "Bern"}}<|eot_id|>',
            f'{tool}"18"<|eot_id|>{answer}',
            "yo<|eot_id|>",
        ]
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_encoded_as_its_records_are(name: str) -> None:
    template = template_of(name)
    texts = ["hi", "  a\n", "\nb", "<think>", "</think>x", "".join(FAMILIES[name].special), "é\u0301 你好", '"\\']
    records = [
        Record(
            (*TALK[:1] * (i % 2), *(Message(m.role, t + m.content) for m in TALK[1:] for t in texts[i:])),
            "c",
            "f",
            1,
            {},
        )
        for i in range(len(texts))
    ]
    records = [Record(tuple(_alternating(r.messages)), "c", "f", 1, {}) for r in records]
    policy = EncodePolicy(10_000, faults="ignore")
    for record, found in zip(records, template.encode_batch(records, policy), strict=True):
        alone = template.encode(record, policy)
        assert [r.ids_T.tolist() for r in found] == [r.ids_T.tolist() for r in alone]  # type: ignore[union-attr]
        assert [r.weights_T.tolist() for r in found] == [r.weights_T.tolist() for r in alone]  # type: ignore[union-attr]


def _alternating(messages: tuple[Message, ...]) -> list[Message]:
    """Give the turns after the system's the roles of a conversation."""
    first = messages[:1] if messages[0].role == "system" else ()
    rest = messages[len(first) :]
    return [*first, *(Message(("user", "assistant")[i % 2], m.content) for i, m in enumerate(rest[: len(rest) & ~1]))]  # type: ignore[arg-type]


def test_qwen3_groups_tool_responses_and_drops_thinking_before_the_last_question() -> None:
    """The strings of huggingface/trl trl/chat_templates/qwen3.jinja @ f2cd5771, for the same messages."""
    call = {"type": "function", "function": {"name": "w", "arguments": {"city": "é"}}}
    answered = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "sure", "reasoning_content": "\nhm\n", "tool_calls": [call, call]},
        {"role": "tool", "content": "18"},
        {"role": "tool", "content": "19"},
    ]
    further = [{"role": "assistant", "content": "yo", "reasoning_content": "ha"}, {"role": "user", "content": "bye"}]
    user, start, end = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
    calls = "\n".join(["sure", *['<tool_call>\n{"name": "w", "arguments": {"city": "é"}}\n</tool_call>'] * 2])
    results = f"{user}<tool_response>\n18\n</tool_response>\n<tool_response>\n19\n</tool_response>{end}"
    template = template_of("qwen3")
    assert template.render(answered, generation_prompt=True) == (
        f"{user}hi{end}{start}<think>\nhm\n</think>\n\n{calls}{end}{results}{start}"
    )
    assert template.render([*answered, *further], generation_prompt=True, thinking=False) == (
        f"{user}hi{end}{start}{calls}{end}{results}{start}yo{end}{user}bye{end}{start}<think>\n\n</think>\n\n"
    )
