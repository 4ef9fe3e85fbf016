"""What a model can do is probed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sftx.data.batches.collate import Batch
from sftx.model.adapt import AdaptedModel
from sftx.model.probe import ModelProbe
from sftx.training.loss import token_losses
from sftx.training.precision import Numerics

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
CPU = torch.device("cpu")


def adapted(module: Any) -> AdaptedModel:
    return AdaptedModel(module, trained_dtype=torch.float32, gradient_checkpointing=False)


def batch() -> Batch:
    torch.manual_seed(1)
    ids, targets = torch.randint(1, 64, (2, 9)), torch.randint(1, 64, (2, 9))
    targets[0, :4] = targets[1, 7:] = targets[:, 5] = -100
    place = torch.tensor([0, 1])[:, None].expand(2, 9)
    return Batch(ids, targets, torch.rand(2, 9), place, ("a:1", "a:2"), 0, 18, (9, 9))


@pytest.mark.parametrize("capped", [True, False])
def test_losses_are_computed_from_hidden_states_where_the_head_gives_the_logits(capped: bool) -> None:
    torch.manual_seed(0)
    if capped:
        module = Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=0.5, attn_implementation="eager"))
    else:
        module = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    model = adapted(module)
    plain = token_losses(model, batch(), CPU)
    model.computes_losses = ModelProbe(model, Numerics(torch.float32, CPU), CPU).head_gives_logits()
    assert model.computes_losses != capped
    assert module.training
    found = token_losses(model, batch(), CPU)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)
    assert found.weighted_sum.requires_grad
    assert module(input_ids=batch().ids_BT).logits.shape == (2, 9, 64)
