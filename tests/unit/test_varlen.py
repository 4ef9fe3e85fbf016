"""The kernel that takes all documents in one call is used where it is tried and right."""

from __future__ import annotations

from functools import wraps
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from sftx.model.kernels import attention
from sftx.model.kernels.attention import varlen_unusable

CONFIG: Any = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
CONFIG.get_text_config = lambda: CONFIG


def kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends_q: torch.Tensor, ends_k: torch.Tensor, max_q: int,
    max_k: int, *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Stand in for torch's, which needs a GPU."""
    assert ends_q.dtype == torch.int32
    assert torch.equal(ends_q, ends_k)
    assert max_q == max_k == ends_q.diff().max()
    left, right = window_size
    assert right == 0
    out = []
    for first, last in pairwise(ends_q.tolist()):
        at = torch.arange(last - first)
        behind = at[:, None] - at[None]
        seen = (behind >= 0) & ((behind <= left) | torch.tensor(left < 0))
        parts = [x[first:last].transpose(0, 1)[None] for x in (q, k, v)]
        out.append(F.scaled_dot_product_attention(*parts, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)[0])
    return torch.cat(out, dim=1).transpose(0, 1)


@pytest.fixture
def on_a_gpu() -> Any:
    """Return a device that says that it is a GPU, and is not."""

    class Device(str):
        type = "cuda"

    return Device("cpu")


@pytest.mark.parametrize("window", [None, 4])
def test_one_call_gives_what_a_call_a_document_gives(
    on_a_gpu: torch.device, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    assert varlen_unusable(CONFIG, on_a_gpu, torch.bfloat16) is None
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 23, 8) for heads in (4, 2, 2))
    lengths, module = (6, 12, 5), SimpleNamespace(num_key_value_groups=2, training=True, is_causal=True)
    called = []

    @wraps(kernel)
    def counted(*arguments: Any, **named: Any) -> torch.Tensor:
        called.append(1)
        return kernel(*arguments, **named)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
    found, _ = attention.attention(attention._sdpa, module, q, k, v, None, lengths, window, together=True, scaling=0.3)
    assert called == [1]
    wanted, _ = attention.attention(attention._sdpa, module, q, k, v, None, lengths, window, scaling=0.3)
    assert called == [1]
    assert found.shape == wanted.shape == (1, 23, 4, 8)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_kernel_that_is_wrong_or_missing_is_not_used(on_a_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    @wraps(kernel)
    def leaky(q: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        return kernel(q, *rest, **named).roll(1, 0)

    def missing(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nsecond line")

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", leaky)
    assert "differs" in str(varlen_unusable(CONFIG, on_a_gpu, torch.bfloat16))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", missing)
    assert varlen_unusable(CONFIG, on_a_gpu, torch.bfloat16) == "FlashAttention only supports Ampere GPUs or newer."
    assert varlen_unusable(CONFIG, on_a_gpu, torch.float32) == "it needs bf16 or fp16"


def test_a_cpu_has_none() -> None:
    assert varlen_unusable(CONFIG, torch.device("cpu"), torch.bfloat16) == "it needs an NVIDIA GPU"


def test_a_kernel_before_torch_2_12_is_not_told_that_heads_share_keys(
    on_a_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(*arguments: Any, scale: float | None, window_size: tuple[int, int]) -> torch.Tensor:
        return kernel(*arguments, scale=scale, window_size=window_size, enable_gqa=True)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", older)
    assert varlen_unusable(CONFIG, on_a_gpu, torch.bfloat16) is None


def test_the_windows_and_dropout_of_a_model_are_tried_too(on_a_gpu: torch.device, monkeypatch) -> None:
    @wraps(kernel)
    def blind(*arguments: Any, window_size: tuple[int, int], **named: Any) -> torch.Tensor:
        return kernel(*arguments, window_size=(-1, 0), **named)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", blind)
    assert varlen_unusable(CONFIG, on_a_gpu, torch.bfloat16) is None
    monkeypatch.setattr(CONFIG, "sliding_window", 4096, raising=False)
    assert "differs" in str(varlen_unusable(CONFIG, on_a_gpu, torch.bfloat16))
    monkeypatch.setattr(CONFIG, "attention_dropout", 0.1, raising=False)
    assert "attention_dropout=0.1" in str(varlen_unusable(CONFIG, on_a_gpu, torch.bfloat16))


def test_the_kernel_is_a_model_s_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an attention of its own name: another model of this process keeps its own."""
    called = []

    @wraps(kernel)
    def counted(*arguments: Any, **named: Any) -> torch.Tensor:
        called.append(1)
        return kernel(*arguments, **named)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    plain, fast = (
        Qwen2ForCausalLM(Qwen2Config(**shape, attn_implementation=attention.register("sdpa"))).eval() for _ in range(2)
    )
    fast.load_state_dict(plain.state_dict())
    fast.set_attn_implementation(attention.register("varlen"))
    ids, positions = torch.arange(9)[None], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    inputs = attention.padding_free_inputs(positions, (4, 5))
    with torch.no_grad():
        wanted = plain(input_ids=ids, **inputs).logits
        assert not called
        torch.testing.assert_close(fast(input_ids=ids, **inputs).logits, wanted, rtol=1e-5, atol=1e-6)
        assert len(called) == 2
        plain(input_ids=ids, **inputs)
    assert len(called) == 2
