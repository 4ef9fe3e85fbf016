"""sftx's own templates against the strings that the models' publishers render, typed by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from tests.unit.test_template import byte_tokenizer

from sftx.config.options import component_of
from sftx.data.policy import EncodePolicy
from sftx.data.record import Message, Record
from sftx.data.template import TEMPLATES, ChatTemplate, template_source

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
        bare="<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
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
    "llama2": Golden(
        ("<s>", "</s>"), "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nhi [/INST]", " yo </s>", "<s>[INST] bye [/INST]",
        " ok </s>", S2,
    ),
    "mistral": Golden(
        ("<s>", "</s>"), "<s>[INST] S\n\nhi [/INST]", " yo</s>", "[INST] bye [/INST]", " ok</s>", S2
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
    "chatglm3": Golden(
        GLM, "[gMASK]sop<|system|>\n S<|user|>\n hi<|assistant|>", "\n yo<|user|>", "\n bye<|assistant|>",
        "\n ok<|user|>", {"eos_token": "<|endoftext|>"},
    ),
    "glm4": Golden(
        GLM, "[gMASK]<sop><|system|>\nS<|user|>\nhi<|assistant|>\n", "yo<|user|>", "\nbye<|assistant|>\n",
        "ok<|user|>", {"eos_token": "<|endoftext|>"},
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
TALK = tuple(
    Message(role, text)  # type: ignore[arg-type]
    for role, text in (("system", "S"), ("user", "hi"), ("assistant", "yo"), ("user", "bye"), ("assistant", "ok"))
)


def template_of(name: str) -> ChatTemplate:
    golden = FAMILIES[name]
    option = {"chatml": "qwen", "llama3": "llama", "phi3": "phi"}.get(name, name)
    family = component_of("model", option)
    assert family["template"] == name
    return ChatTemplate(byte_tokenizer(*golden.special, **golden.named), template_source(name), family["stop_tokens"])


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
    thinking = False if name == "qwen3" else None
    asked = [{"role": m.role, "content": m.content} for m in TALK]
    assert starts == [template.prompt_ids(asked[:k], thinking=thinking) for k in (2, 4)]


@pytest.mark.parametrize("name", [n for n, g in FAMILIES.items() if g.bare])
def test_a_template_with_a_system_turn_of_its_own_writes_it(name: str) -> None:
    found = spans(template_of(name), Record(TALK[1:3], "c", "f", 1, {}))
    assert found == [[FAMILIES[name].bare, "yo<|im_end|>"]]


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
    for record, found in zip(records, template.encode_batch(records, EncodePolicy(10_000)), strict=True):
        alone = template.encode(record, EncodePolicy(10_000))
        assert [r.ids_T.tolist() for r in found] == [r.ids_T.tolist() for r in alone]  # type: ignore[union-attr]
        assert [r.weights_T.tolist() for r in found] == [r.weights_T.tolist() for r in alone]  # type: ignore[union-attr]


def _alternating(messages: tuple[Message, ...]) -> list[Message]:
    """Give the turns after the system's the roles of a conversation."""
    first = messages[:1] if messages[0].role == "system" else ()
    rest = messages[len(first) :]
    return [*first, *(Message(("user", "assistant")[i % 2], m.content) for i, m in enumerate(rest[: len(rest) & ~1]))]  # type: ignore[arg-type]
