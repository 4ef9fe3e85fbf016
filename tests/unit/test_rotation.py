"""Queries and keys are rotated by a function that gives what the architecture's own gives, or by that one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.glm import modeling_glm
from transformers.models.qwen2 import modeling_qwen2

from sftx.model.rotation import rotate_lean, use_rotation

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def model() -> Iterator[Any]:
    torch.manual_seed(0)
    made = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    yield made
    use_rotation(made, CPU, torch.float32, None)


def gradients(model: Any) -> list[torch.Tensor]:
    model = copy.deepcopy(model)
    logits = model(torch.arange(12)[None]).logits
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_are_the_same(model: Any, dtype: torch.dtype) -> None:
    model.to(dtype)
    wanted = gradients(model)
    assert use_rotation(model, CPU, dtype, rotate_lean) is None
    assert modeling_qwen2.apply_rotary_pos_emb.by is rotate_lean
    for found, other in zip(gradients(model), wanted, strict=True):
        assert (found - other).abs().max() <= (1e-6 if dtype == torch.float32 else 0.05) * other.abs().max()


def test_each_half_keeps_its_own_angle() -> None:
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    cos, sin = torch.randn(2, 1, 5, 8)
    for found, wanted in zip(
        rotate_lean(q, k, cos, sin), modeling_qwen2.apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate_lean(x, x, cos, sin), x)


def test_the_architecture_s_own_comes_back(model: Any) -> None:
    own = modeling_qwen2.apply_rotary_pos_emb
    use_rotation(model, CPU, torch.float32, rotate_lean)
    use_rotation(model, CPU, torch.float32, rotate_lean)  # of the next run in this process
    assert modeling_qwen2.apply_rotary_pos_emb is not own
    use_rotation(model, CPU, torch.float32, None)
    assert modeling_qwen2.apply_rotary_pos_emb is own


def test_another_rotation_stays(model: Any) -> None:
    """GLM's turns neighbours; here it is also of half a head."""
    glm = GlmForCausalLM(GlmConfig(**SHAPE, head_dim=8, pad_token_id=0))
    own = modeling_glm.apply_rotary_pos_emb
    assert "differs" in str(use_rotation(glm, CPU, torch.float32, rotate_lean))
    assert modeling_glm.apply_rotary_pos_emb is own

    def wrong(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return rotate_lean(q, k, cos, -sin)

    assert use_rotation(model, CPU, torch.float32, rotate_lean) is None
    assert "differs" in str(use_rotation(model, CPU, torch.float32, wrong))
    assert modeling_qwen2.apply_rotary_pos_emb.by is rotate_lean
    q, k, (cos, sin) = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(2, 1, 1, 8)
    with pytest.raises(RuntimeError, match="must match"):  # of half a head: what the architecture's own makes of it
        modeling_qwen2.apply_rotary_pos_emb(q, k, cos[..., :4], sin[..., :4])
