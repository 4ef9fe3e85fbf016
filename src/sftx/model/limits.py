"""What a model's tables hold, compared with the rows that it is to be trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from sftx.config.schema import TrainConfig
from sftx.data.prepare import Data
from sftx.data.store import Rows
from sftx.errors import ModelError


def check_rows(model: Any, data: Data, tokenizer: Any, config: TrainConfig) -> None:
    """Raise if a row has a token id without an embedding, or is longer than the model's table of positions.

    Of a corpus that is streamed the rows are not known: its tokenizer and `max_seq_length` must fit the model.

    Raises:
        ModelError: a row does not fit; it is named.
    """
    size, length = vocabulary_of(model), positions_of(model)
    known = [data.held_out] if data.stream else [data.train, data.held_out]
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


def _largest_id(known: list[Rows]) -> tuple[str, int]:
    """Return where the largest token id of all rows is, and the id."""
    found = ("", 0)
    for rows in known:
        for i in range(len(rows)):
            if (top := int(np.max(rows.row(i).ids_T, initial=0))) > found[1]:
                found = rows.origin(i), top
    return found
