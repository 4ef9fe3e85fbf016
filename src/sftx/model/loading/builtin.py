"""`qwen-tiny`: a real Qwen2 architecture of three million parameters, built in seconds on first use.

It is randomly initialized: for smoke tests only. The byte-level BPE merges are in
`qwen_tiny_merges.txt`, made once by `tokenizers`' BpeTrainer over the embedded corpus with Qwen2's
pre-tokenizer; the weights come from a fixed seed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from sftx.data.encode.template import template_source
from sftx.files import cache_root, write_folder
from sftx.locks import exclusive
from sftx.model.export.tokenizer_files import save_tokenizer

NAME = "qwen-tiny"
VERSION = 3
"""Part of the cache key: raise it when the built model changes."""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen2's pre-tokenization pattern (transformers, models/qwen2/tokenization_qwen2.py).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ARCHITECTURE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}


def ensure_builtin() -> Path:
    """Return the folder of the embedded model, building it when it is not there yet."""
    merges = (Path(__file__).parent / "qwen_tiny_merges.txt").read_text(encoding="utf-8")
    recipe = json.dumps([VERSION, ARCHITECTURE, PATTERN, merges, template_source("chatml")])
    folder = cache_root() / "models" / f"{NAME}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        with exclusive(
            folder.with_name(f".{folder.name}.lock"), wait=True
        ):  # one process builds, the others wait for it
            if not folder.is_dir():
                for left in folder.parent.glob(f".{folder.name}.*/"):  # of a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                write_folder(folder, lambda into: _build(into, merges))
    return folder


def _build(folder: Path, merges: str) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = _tokenizer(merges)
    save_tokenizer(tokenizer, folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
        **ARCHITECTURE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    # `model.save_pretrained` writes nothing on any rank but the first, and another may be here first.
    config.architectures = [type(model).__name__]
    for part in (config, model.generation_config):
        part.save_pretrained(folder)
    tensors = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}  # tied to the embedding
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tokenizer(merges: str):  # type: ignore[no-untyped-def]  # transformers carries no types
    from tokenizers import pre_tokenizers

    pairs = [(a, b) for a, b in (line.split(" ") for line in merges.splitlines())]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(p) for p in pairs)])}
    return tokenizer_from(backend_of(vocabulary, pairs))


def backend_of(vocabulary: dict[str, int], merges: list[tuple[str, str]]):  # type: ignore[no-untyped-def]
    """Return a `tokenizers` BPE that splits text as Qwen2's does."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.normalizer = normalizers.NFC()  # as Qwen2's, which transformers loads whatever the file says
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def tokenizer_from(backend):  # type: ignore[no-untyped-def]
    """Return a backend as a tokenizer of transformers, with ChatML's tokens and template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
        clean_up_tokenization_spaces=False,
        model_max_length=ARCHITECTURE["max_position_embeddings"],
    )
    tokenizer.chat_template = template_source("chatml")
    return tokenizer
