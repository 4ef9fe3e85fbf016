"""What a model can do is found by trying it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sftx.data.loader import Batch
from sftx.model.adapt import AdaptedModel
from sftx.model.attention import register
from sftx.model.shortcuts import LeanNorm, lean_norms
from sftx.training.loss import token_losses
from sftx.training.precision import Numerics
from sftx.training.tried import Tried, last_block_shortened

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
def test_losses_are_made_by_the_head_where_its_output_is_the_logits(capped: bool) -> None:
    torch.manual_seed(0)
    if capped:
        module = Gemma2ForCausalLM(Gemma2Config(**SHAPE, final_logit_softcapping=0.5, attn_implementation="eager"))
    else:
        module = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    model = adapted(module)
    plain = token_losses(model, batch(), CPU)
    model.loss_head = Tried(model, Numerics(torch.float32, CPU), CPU).loss_head()
    assert (model.loss_head is None) == capped
    assert module.training
    found = token_losses(model, batch(), CPU)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)
    assert found.weighted_sum.requires_grad
    assert module(input_ids=batch().ids_BT).logits.shape == (2, 9, 64)


def flat(batch: Batch) -> Batch:
    """Lay a batch's two rows end to end."""
    in_line = {name: getattr(batch, name).reshape(1, -1) for name in ("ids_BT", "targets_BT", "weights_BT", "place_BT")}
    return replace(batch, **in_line, positions_BT=torch.arange(9).repeat(2)[None])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", [lambda b: b, flat], ids=["padded", "end to end"])
def test_the_last_block_leaves_out_what_is_not_wanted(checkpointing: bool, layout: Any) -> None:
    name = register("sdpa")
    torch.manual_seed(0)
    module = Qwen2ForCausalLM(Qwen2Config(**SHAPE, attn_implementation=name))
    model = AdaptedModel(module, trained_dtype=torch.float32, gradient_checkpointing=checkpointing)
    asked = layout(batch())
    found = []
    rows: list[int] = []
    module.model.layers[-1].mlp.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    for keeps_early in (False, True):
        if keeps_early:
            model.keeps_early = last_block_shortened(Tried(model, Numerics(torch.float32, CPU), CPU))
            assert model.keeps_early
        module.zero_grad()
        rows.clear()
        losses = token_losses(model, asked, CPU)
        losses.weighted_sum.backward()
        found.append([losses.weighted_sum.detach(), *(p.grad.clone() for p in module.parameters())])
    all_rows = asked.ids_BT.shape[1]
    learned = int((asked.targets_BT != -100).any(0).sum())
    assert rows == [learned] * (1 + checkpointing)
    assert learned < all_rows
    for short, whole in zip(*found, strict=True):
        torch.testing.assert_close(short, whole, rtol=1e-5, atol=1e-6)
    assert module(input_ids=asked.ids_BT).logits.shape[1] == all_rows


def test_a_block_of_another_form_stays_whole() -> None:
    model = adapted(Gemma2ForCausalLM(Gemma2Config(**SHAPE, attn_implementation="eager")))
    before = type(model.module.model.layers[-1])
    assert not last_block_shortened(Tried(model, Numerics(torch.float32, CPU), CPU))
    assert type(model.module.model.layers[-1]) is before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_the_same_and_lean(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).model
    norm = module.norm
    norm.weight.data.normal_()
    x = (3 * torch.randn(2, 7, 16)).to(dtype)
    results = []
    for lean in (False, True):
        if lean:
            assert lean_norms(module) == 5
            assert isinstance(norm, LeanNorm)
        given = x.clone().requires_grad_()
        norm.zero_grad()
        out = norm(given)
        out.float().square().sum().backward()
        results.append([out.detach(), given.grad, norm.weight.grad])
    for mine, reference in zip(results[1], results[0], strict=True):
        assert mine.dtype == reference.dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=10 * tolerance)


def test_gemma_s_norms_are_of_another_kind() -> None:
    assert lean_norms(Gemma2ForCausalLM(Gemma2Config(**SHAPE))) == 0
