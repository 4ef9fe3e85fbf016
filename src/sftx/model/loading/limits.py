"""What a loaded model holds, compared with its folder and with the rows that it is to be trained on."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from torch import nn

from sftx.config.schema import TrainConfig
from sftx.data.encode.template import ChatTemplate
from sftx.data.prepare import Data
from sftx.data.store.rows import Rows
from sftx.errors import ModelError
from sftx.model.loading.load import Source


def check_model(model: Any, source: Source, data: Data, template: ChatTemplate, config: TrainConfig) -> list[str]:
    """Compare a loaded model with its rows and its folder; return what is to be stated.

    Raises:
        ModelError: a row has a token id or a position that the model has no embedding for.
    """
    padding = _pad_within(model, template)
    _check_rows(model, data, template.tokenizer, config)
    found = [*padding, *_beyond_training(model, data, config), *_batch_dependent_rope(model, data, config)]
    if config.train_mode == "full":
        found += _parts_left_out(model, source)
    return found


def _pad_within(model: Any, template: ChatTemplate) -> list[str]:
    """Pad with the token that ends a turn where the tokenizer's pad token has no embedding; state it."""
    tokenizer, size = template.tokenizer, vocabulary_of(model)
    pad, end = tokenizer.pad_token, template.stop_tokens[0]
    if tokenizer.convert_tokens_to_ids(pad) < size or tokenizer.convert_tokens_to_ids(end) >= size:
        return []
    tokenizer.pad_token = end
    template.changed["pad_token"] = end
    return [f"the tokenizer's pad token {pad} has no embedding in this model: {end} pads instead, masked by position."]


def _check_rows(model: Any, data: Data, tokenizer: Any, config: TrainConfig) -> None:
    """Raise if a row has a token id without an embedding, or is longer than the model's table of positions.

    Of a corpus that is streamed the rows are not known: its tokenizer and `max_seq_length` must fit the model.

    Raises:
        ModelError: a row does not fit; it is named.
    """
    size, length = vocabulary_of(model), positions_of(model)
    known = _known(data)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= size:
        where = f"the tokenizer of {config.model_name_or_path}"
        if not data.stream:
            where, largest = _largest_id(known)
        if largest >= size:
            raise ModelError(
                f"{where}: token id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) has no embedding: "
                f"{config.model_name_or_path} has {size}. Its tokenizer belongs to another model, or the embedding "
                f"was not resized after tokens were added: repair the model's folder, or choose another template_name."
            )
    if length is None:
        return
    if data.stream and config.max_seq_length > length:
        raise ModelError(
            f"max_seq_length={config.max_seq_length}: {config.model_name_or_path} has learned positions for {length} "
            f"tokens only. Set max_seq_length={length}."
        )
    for rows in known:
        if len(rows) and rows.lengths.max() > length:
            row = int(rows.lengths.argmax())
            raise ModelError(
                f"{rows.origin(row)}: this row has {rows.lengths[row]} tokens, and {config.model_name_or_path} has "
                f"learned positions for {length} only. Set max_seq_length={length}."
            )


def vocabulary_of(model: Any) -> int:
    """Return the number of token ids that a model has an embedding for."""
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", model.config.get_text_config().vocab_size))


def positions_of(model: Any) -> int | None:
    """Return the number of positions in a model's learned table; None where positions are computed (RoPE, ALiBi)."""
    tokens = model.get_input_embeddings()
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for module in model.modules():
        # a table may have rows in front that stand for no position (two in OPT)
        if (
            limit
            and isinstance(module, nn.Embedding)
            and module is not tokens
            and 0 <= module.num_embeddings - limit < 4
        ):
            return int(limit)
    return None


def _beyond_training(model: Any, data: Data, config: TrainConfig) -> list[str]:
    """State that rows may be longer than the model's `max_position_embeddings`, or than its scaled RoPE reaches."""
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or config.max_seq_length
    scaled = [r.get("factor", 1) * r.get("original_max_position_embeddings", 0) for r in _ropes(text)]
    if config.max_seq_length <= max([limit, *scaled]):
        return []
    return [
        f"max_seq_length={config.max_seq_length} is above the model's max_position_embeddings={limit}: "
        f"{_longer(data, limit)}."
    ]


def _batch_dependent_rope(model: Any, data: Data, config: TrainConfig) -> list[str]:
    """State what depends on the batch where RoPE is chosen by the longest row of a batch.

    Padding does not help: the positions of the whole batch count. Rows up to the threshold never change it.
    """
    text, found = model.config.get_text_config(), []
    for rope in _ropes(text):
        kind = rope.get("rope_type")
        threshold = rope.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", 0)
        reach = config.max_seq_length if data.stream else max(int(r.lengths.max()) for r in _known(data) if len(r))
        if kind not in ("longrope", "dynamic") or not threshold or reach <= threshold:
            continue
        if kind == "longrope":
            how = "is rotated as a whole with the long factors, another one with the short ones"
        else:
            how = (
                "is rotated as a whole by the longest row until then, also of earlier batches, so that a resumed run "
                "is not bitwise equal"
            )
        apart = "batching=padding_free and " if config.batching == "packed" else ""
        found.append(
            f"RoPE {kind}: a batch with a row beyond {threshold} tokens {how} ({_longer(data, threshold)}). The loss "
            f"of a row depends on the rows beside it, however they are padded. {apart}per_device_train_batch_size=1 "
            f"keeps them apart in training; evaluation groups rows of like length."
        )
    return list(dict.fromkeys(found))


def _parts_left_out(model: Any, source: Source) -> list[str]:
    """State the parts of a model, such as a vision tower, that are not loaded and that a full final/ leaves out."""
    stored = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    usual = {"text_config", "quantization_config"}
    parts = [k for k, v in stored.items() if k.endswith("_config") and isinstance(v, dict) and k not in usual]
    parts = [k.removesuffix("_config") for k in parts if not hasattr(model.config, k)]
    if not parts:
        return []
    return [
        f"mode=full: {source.name} has other parts ({', '.join(parts)}), which are not loaded: final/ will hold the "
        f"language model alone ({type(model).__name__}, model_type {model.config.model_type})."
    ]


def _ropes(text: Any) -> list[dict[str, Any]]:
    """Return a configuration's RoPE parameters: one set, or one for each type of layer."""
    found = getattr(text, "rope_parameters", None) or {}
    return [found] if "rope_type" in found else [r for r in found.values() if isinstance(r, dict)]


def _longer(data: Data, limit: int) -> str:
    """Count the rows beyond a length."""
    if data.stream:
        return "of a streamed corpus it is not known how many rows are longer"
    rows = data.train.lengths
    return f"{int((rows > limit).sum())} of {len(rows)} rows are longer"


def _known(data: Data) -> list[Rows]:
    return [data.held_out] if data.stream else [data.train, data.held_out]


def _largest_id(known: list[Rows]) -> tuple[str, int]:
    """Return where the largest token id of all rows is, and the id."""
    found = ("", 0)
    for rows in known:
        for i in range(len(rows)):
            if (top := int(np.max(rows.row(i).ids_T, initial=0))) > found[1]:
                found = rows.origin(i), top
    return found
