"""`sftx.model`: the embedded model, models that are found, and folders that are no whole model."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sftx.data.encode.template import template_source
from sftx.errors import ConfigError, ModelError
from sftx.model.loading.builtin import NAME, ensure_builtin
from sftx.model.loading.family import Family
from sftx.model.loading.load import Source, find_model, load_base, load_template
from sftx.model_folders import local_folder

QWEN = Family(["qwen2"], "chatml", ["<|im_end|>", "<|endoftext|>"])
GENERIC = Family([], None, [])
CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded model that a test may damage."""
    return Path(shutil.copytree(ensure_builtin(), tmp_path / "model"))


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches of both hubs, empty."""
    for variable in ("HF_HUB_CACHE", "XDG_CACHE_HOME", "USE_MODELSCOPE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def edit(path: Path, **values: object) -> None:
    tree = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in tree.items() if v is not None}), encoding="utf-8")


def refused(name: Path | str) -> str:
    """Return the message by which a model is refused, when it is found or when it is loaded."""
    with pytest.raises(ModelError) as caught:
        load_base(find_model(str(name)), dtype=torch.float32, quantization=None, device=CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The embedded model


def test_any_rank_builds_the_whole_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several ranks with an empty cache any may be first, and transformers saves on the first rank alone."""
    import torch.distributed as dist

    first = ensure_builtin()
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 1)
    second = ensure_builtin()
    assert second.is_relative_to(tmp_path)
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (first, second)]
    assert files[0] == files[1]
    assert "model.safetensors" in files[0]


def test_the_embedded_model_is_the_same_wherever_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    for seed in (1, 2):
        monkeypatch.setenv("SFTX_CACHE", str(tmp_path / str(seed)))
        torch.manual_seed(seed)
        folder = ensure_builtin()
        assert torch.initial_seed() == seed
        built.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()})
        assert [p.name for p in folder.parent.iterdir()] == [folder.name], "temporary files were left"
    assert built[0] == built[1]
    assert {"model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"} <= built[0].keys()


def test_building_the_embedded_model_draws_from_no_global_generator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path))
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    ensure_builtin()
    assert torch.equal(torch.rand(4), wanted)


def test_the_embedded_model_is_a_small_qwen2() -> None:
    source = find_model(NAME)
    assert (source.is_builtin, source.model_type) == (True, "qwen2")
    model = load_base(source, dtype=torch.float32, quantization=None, device=CPU)
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 8e6
    assert model.config.use_cache is True, "config.json of a full final/ would say false"
    assert model.config._attn_implementation == "documents_sdpa"  # sdpa, a call a document


@pytest.mark.parametrize(
    ("device", "sharded", "wanted"),
    [("cuda:0", False, {"": torch.device("cuda", 0)}), ("cuda:0", True, None), ("cpu", False, None)],
)
def test_weights_go_to_a_gpu_one_after_the_other(monkeypatch, device: str, sharded: bool, wanted: object) -> None:
    """Without `device_map` the host would hold them all: 15 or 30 GB for each rank of a 7B."""
    model, asked = SimpleNamespace(config=SimpleNamespace(), modules=list, to=lambda _: model), []

    def load(*_: object, **options: object) -> tuple[object, dict[str, object]]:
        asked.append(options.get("device_map"))
        return model, {}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    load_base(find_model(NAME), dtype=torch.float32, quantization=None, device=torch.device(device), sharded=sharded)
    assert asked == [wanted]


def test_the_embedded_tokenizer_is_the_one_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers builds Qwen2's tokenizer itself: it must not differ from the file that other programs read."""
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path))
    folder = ensure_builtin()
    tokenizer, plain = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Hello 123, 你好！e\u0301 \t\r\n  def f(x):\n\n    return '<b>' <|im_end|>\n"
    assert tokenizer(text).input_ids == plain.encode(text).ids
    assert plain.decode(plain.encode(text).ids, skip_special_tokens=False) == text.replace("e\u0301", "é")


# Folders that are no whole model


def test_a_hub_repository_that_has_only_pickled_weights(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    files = [SimpleNamespace(rfilename=name) for name in ("config.json", "pytorch_model.bin", "tokenizer.json")]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    message = refused("org/name")
    assert "has only pytorch_model.bin, and sftx downloads .safetensors" in message
    assert "hf download org/name" in message


def test_a_folder_without_config(model: Path) -> None:
    (model / "config.json").unlink()
    message = refused(model)
    assert message.startswith(f"model_name_or_path={model}: {model} holds no config.json")
    assert "model.safetensors" in message, "what was found"


def test_an_adapter_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert f"It is an adapter: name its base here, and start from it with adapter={tmp_path}" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    assert "lacks *.safetensors" in refused(tmp_path)


def test_an_adapter_beside_the_model_is_refused(model: Path) -> None:
    """transformers would load both: `mode=full` would then save nothing but the adapter."""
    (model / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "holds an adapter (adapter_config.json) beside the model" in refused(model)


def test_a_folder_without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    message = refused(model)
    assert message.startswith(f"model_name_or_path={model}: ")
    assert "holds no weights" in message
    assert "fetch the model again" in message


def test_a_folder_that_lacks_a_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00003.safetensors")
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = {"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert f"lacks {shards[1]}, {shards[2]}. " in refused(model)


def test_weights_without_a_parameter(model: Path) -> None:
    edit(model / "config.json", num_hidden_layers=5, layer_types=None)
    message = refused(model)
    assert "parameters of the architecture are not in its weights (first: model.layers.4." in message
    assert "not a whole model" in message


def test_weights_of_another_shape(model: Path) -> None:
    edit(model / "config.json", hidden_size=96)
    assert f"{model}: its weights cannot be loaded: " in refused(model)


@pytest.mark.parametrize("kept", [0, 7, 5000])
def test_damaged_weights(model: Path, kept: int) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    message = refused(model)
    assert message.startswith(f"{model}: its weights cannot be loaded: ")
    assert len(message) > len(f"{model}: its weights cannot be loaded: ") + 5


def test_a_type_that_transformers_does_not_know(model: Path) -> None:
    edit(model / "config.json", model_type="qwen99", architectures=None)
    assert "qwen99" in refused(model)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\xff"])
def test_a_config_without_a_type(model: Path, text: str) -> None:
    (model / "config.json").write_text(text, encoding="latin-1")
    assert f"{model / 'config.json'}: no `model_type` can be read from it" in refused(model)


def template_refused(folder: Path, family: Family = QWEN) -> str:
    with pytest.raises((ModelError, ConfigError)) as caught:
        load_template(find_model(str(folder)), family, None, lambda _: None)
    return str(caught.value)


def test_a_folder_without_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert template_refused(model).startswith(f"{model}: holds no tokenizer (tokenizer.json)")


def test_a_damaged_tokenizer(model: Path) -> None:
    path = model / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    assert template_refused(model).startswith(f"{model}: its tokenizer cannot be loaded: ")


# Templates


def test_a_models_own_template_is_used_and_saved(model: Path) -> None:
    own = "{{- 'own: ' -}}" + template_source("chatml")
    (model / "chat_template.jinja").write_text(own, encoding="utf-8")
    template = load_template(find_model(str(model)), QWEN, None, lambda _: None)
    text = template.render([{"role": "user", "content": "hi"}], generation_prompt=True)
    assert text.startswith("own: <|im_start|>user\nhi")
    assert template.tokenizer.chat_template == own
    assert (template.origin, template.remarks) == ("the model's own", [])


def test_the_default_one_of_several_own_templates_is_used(model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("tools", encoding="utf-8")
    template = load_template(find_model(str(model)), GENERIC, None, lambda _: None)
    assert template.source == template_source("chatml")


def test_the_familys_template_is_used_when_there_is_none(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    template = load_template(find_model(str(model)), QWEN, None, lambda _: None)
    assert template.source == template_source("chatml")
    assert template.tokenizer.chat_template == template.source
    assert template.origin == "sftx's chatml; the model brings none"
    message = template_refused(model, GENERIC)
    assert "brings no chat template" in message
    assert "template_name=chatml" in message


def test_a_template_is_named_by_family_or_by_itself(model: Path) -> None:
    families = {"llama": Family(["llama"], "qwen2", ["<|eot_id|>"])}
    for name in ("llama", "qwen2"):
        template = load_template(find_model(str(model)), QWEN, name, families.get)
        assert template.source == template_source("qwen2")
        assert template.stop_tokens == QWEN.stop_tokens, "<|eot_id|> is no token of this model"
        assert template.origin == f"sftx's qwen2, by template_name={name}; not the model's own"
    with pytest.raises(ConfigError, match=r"template_name=llamma.*Did you mean `llama3`"):
        load_template(find_model(str(model)), QWEN, "llamma", families.get)


def test_a_template_whose_control_tokens_the_tokenizer_lacks_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"by template_name=llama3.*writes <\|eot_id\|>, .* does not have as tokens"):
        load_template(find_model(str(model)), QWEN, "llama3", lambda _: None)
    with pytest.raises(ConfigError, match=r"sftx's gemma.*writes <end_of_turn>, <start_of_turn>, which the tokenizer"):
        load_template(find_model(str(model)), QWEN, "gemma", lambda _: None)
    own = model / "chat_template.jinja"
    own.write_text(template_source("llama3"), encoding="utf-8")  # an answer's end would be letters
    with pytest.raises(ConfigError, match=r"\(the model's own\) writes <\|eot_id\|>"):
        load_template(find_model(str(model)), QWEN, None, lambda _: None)
    own.write_text(template_source("chatml").replace("<|im_start|>", "<|turn|>"), encoding="utf-8")
    template = load_template(find_model(str(model)), QWEN, None, lambda _: None)
    assert template.remarks == ["the chat template writes <|turn|> as plain text: no tokens of this model."]


def test_pad_is_another_token_than_the_end(model: Path) -> None:
    edit(model / "tokenizer_config.json", pad_token="<|im_end|>")
    tokenizer = load_template(find_model(str(model)), QWEN, None, lambda _: None).tokenizer
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")


# The fingerprint


def test_a_fingerprint_tells_models_apart(model: Path) -> None:
    seen = {find_model(NAME).fingerprint()}
    assert find_model(str(model)).fingerprint() in seen, "the folder's name is no part of a model"
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    for i in range(len(data) // 2, len(data)):
        data[i] ^= 1
    weights.write_bytes(data)
    seen.add(find_model(str(model)).fingerprint())
    (model / "chat_template.jinja").write_text("another", encoding="utf-8")
    seen.add(find_model(str(model)).fingerprint())
    edit(model / "config.json", rms_norm_eps=1e-5)
    seen.add(find_model(str(model)).fingerprint())
    assert len(seen) == 4


def test_the_code_of_a_trusted_model_is_part_of_it(model: Path) -> None:
    source = find_model(str(model))
    plain, trusted = source.fingerprint(), source.fingerprint(code=True)
    assert plain == trusted, "there is none"
    (model / "sub").mkdir()
    seen = {plain}
    for file, text in (("modeling.py", "a = 1"), ("modeling.py", "a = 2"), ("sub/more.py", "")):
        (model / file).write_text(text)
        seen.add(source.fingerprint(code=True))
    assert len(seen) == 4
    assert source.fingerprint() == plain, "what does not run is no part of it"


# Names


@cache
def small_llama() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(config)


def put_model(folder: Path) -> Path:
    small_llama().save_pretrained(folder)
    return folder


def hub_snapshot(caches: Path, commit: str, repo: str = "models--Qwen--Tiny") -> Path:
    return caches / "hf" / "hub" / repo / "snapshots" / commit


def test_a_model_in_the_hubs_cache_needs_no_network(caches: Path) -> None:
    assert local_folder("Qwen/Tiny") is None
    folder = put_model(hub_snapshot(caches, "abc"))
    assert local_folder("Qwen/Tiny") == folder
    assert find_model("Qwen/Tiny") == Source("Qwen/Tiny", folder, "llama")


def test_the_snapshot_that_main_names_goes_before_newer_ones(caches: Path) -> None:
    main, newer = put_model(hub_snapshot(caches, "aaa")), put_model(hub_snapshot(caches, "bbb"))
    assert local_folder("Qwen/Tiny") in (main, newer)
    refs = caches / "hf" / "hub" / "models--Qwen--Tiny" / "refs"
    refs.mkdir()
    for commit in ("aaa", "bbb"):
        (refs / "main").write_text(commit, encoding="utf-8")
        assert local_folder("Qwen/Tiny") == hub_snapshot(caches, commit)


def test_the_hubs_own_variables_are_followed(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put_model(hub_snapshot(caches, "abc"))
    monkeypatch.delenv("HF_HOME")
    assert local_folder("Qwen/Tiny") is None
    monkeypatch.setenv("HF_HUB_CACHE", str(caches / "hf" / "hub"))
    assert local_folder("Qwen/Tiny") == folder
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches / "xdg"))
    put_model(caches / "xdg" / "huggingface" / "hub" / "models--Qwen--Tiny" / "snapshots" / "abc")
    found = local_folder("Qwen/Tiny")
    assert found is not None
    assert found.is_relative_to(caches / "xdg")


def test_a_download_that_stopped_half_way_is_not_taken_for_the_model(caches: Path) -> None:
    folder = put_model(hub_snapshot(caches, "abc"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert local_folder("Qwen/Tiny") is None
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert local_folder("Qwen/Tiny") == folder
    (folder / "config.json").unlink()
    assert local_folder("Qwen/Tiny") is None


@pytest.mark.parametrize(
    "place", ["hub/models/Qwen/T-0.5B", "hub/Qwen/T-0___5B", "models/Qwen/T-0___5B", "Qwen/T-0.5B", "hub/Qwen/T-0.5B"]
)
def test_a_model_in_modelscopes_cache_needs_no_network(caches: Path, place: str) -> None:
    folder = put_model(caches / "ms" / place)
    assert local_folder("Qwen/T-0.5B") == folder
    assert find_model("Qwen/T-0.5B").folder == folder


def test_modelscopes_default_cache_is_searched(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELSCOPE_CACHE")
    folder = put_model(caches / "home" / ".cache" / "modelscope" / "hub" / "models" / "Qwen" / "Tiny")
    assert local_folder("Qwen/Tiny") == folder


def test_a_folder_of_that_name_goes_before_the_caches(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_model(hub_snapshot(caches, "abc"))
    monkeypatch.chdir(caches)
    put_model(Path("Qwen/Tiny"))
    assert local_folder("Qwen/Tiny") == Path("Qwen/Tiny")


@pytest.mark.parametrize("name", ["models/nothing", "./nothing", "/no/where", "nothing", "a/b/c", "~/nothing"])
def test_a_path_that_is_not_there_is_not_looked_for_on_a_hub(caches: Path, name: str) -> None:
    message = refused(name)
    assert message.startswith(f"model_name_or_path={name}: there is no such folder.")
    assert NAME in message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("modles/Qwen", "Did you mean `models/Qwen`?"),
        ("./modles/Qwen/", "Did you mean `models/Qwen`?"),
        ("models/Qwn", "Did you mean `models/Qwen`?"),
        ("models/llama", "The folders in models: Qwen, SmolLM2-135M."),
        ("xyz", "Give a model's folder"),
    ],
)
def test_a_folder_that_is_not_there_is_named_with_the_nearest(
    caches: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    """Also where the name could be a hub id: then what the hub said comes after it."""
    for folder in ("Qwen", "SmolLM2-135M", ".hidden"):
        put_model(caches / "models" / folder)
    monkeypatch.chdir(caches)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refused(name)
    assert message.startswith(f"model_name_or_path={name}: there is no such folder. {said}")
    assert ("As a hub id it is in no cache of this machine" in message) == (name == "modles/Qwen")


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A hub behind a network that swallows every request."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("network", ["refused", "unknown host", "silent", "offline"])
def test_a_hub_id_without_network_fails_soon_and_says_what_to_do(
    caches: Path, monkeypatch: pytest.MonkeyPatch, silent_server: str, network: str
) -> None:
    from huggingface_hub import constants, hf_api

    endpoint = {"refused": "http://127.0.0.1:9", "unknown host": "http://hub.invalid", "silent": silent_server}
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint.get(network, constants.ENDPOINT))
    monkeypatch.setattr(constants, "ENDPOINT", endpoint.get(network, constants.ENDPOINT))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", network == "offline")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(caches / "hf" / "hub"))
    begin = time.monotonic()
    message = refused("Qwen/Qwen2.5-0.5B-Instruct")
    assert time.monotonic() - begin < 10
    assert message.startswith("model_name_or_path=Qwen/Qwen2.5-0.5B-Instruct: there is no such folder.")
    assert "Without a network give the model's folder; behind a mirror set HF_ENDPOINT, or USE_MODELSCOPE=1." in message


def test_modelscope_that_is_not_installed(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_MODELSCOPE", "1")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert "ModelScope is not installed: pip install modelscope" in refused("Qwen/Tiny")
