"""Models: building, fetching and loading them, whatever family they are of."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench import documents
from kvbench.errors import InputError
from kvbench.measurement import startup

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: File that says how a folder's weights come about when it holds none.
RECIPE = "kvbench.json"
#: Built models up to this size also write their weights, so that any program can load them.
WRITE_WEIGHTS_UP_TO = 64 * 2**20
#: Longest block of random numbers that is drawn; larger models repeat it. The length is odd and
#: near a power of two, so that rows of a weight matrix never line up with the repetition.
_BLOCK = 2**24 - 3
#: Names of tokens that end a reply, in one family or another.
_END_NAMES = ("<|end|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>")
#: Files of a checkpoint that are never taken: pickled weights, other frameworks' weights, and code.
_NEVER_TAKEN = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".py", ".pkl"}


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, ready to generate.

    Attributes
    ----------
    model:
        The module, in evaluation mode, with end-of-sequence stopping switched off.
    architecture:
        The model's Hugging Face configuration as a plain mapping.
    parameter_bytes:
        Bytes of all parameters; tied ones count once.
    end_ids:
        Tokens that end a reply. The reply that is shown stops there.
    """

    model: PreTrainedModel
    architecture: dict[str, Any]
    parameter_bytes: int
    end_ids: frozenset[int]
    _tokenizer: Any = field(default=None, repr=False)
    #: Outcomes of :mod:`kvbench.strategies.trial`, by strategy.
    trials: dict[str, str | None] = field(default_factory=dict, repr=False, compare=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of a reply, up to the first token that ends it."""
        kept = self.reply(tokens)
        # Vocabularies are padded, and random weights choose such ids too.
        known = [token for token in kept if self._tokenizer.id_to_token(token) is not None]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def reply(self, tokens: Sequence[int]) -> list[int]:
        """The tokens before the first one that ends a reply."""
        for position, token in enumerate(tokens):
            if token in self.end_ids:
                return list(tokens[:position])
        return list(tokens)


def prepare(document: Mapping[str, Any], target: Path, root: Path) -> None:
    """Make a model folder in Hugging Face format: built, copied, linked, or downloaded.

    Parameters
    ----------
    document:
        A checked model file (``config/models/<name>.yaml``).
    target:
        Folder to make; whatever is there is replaced, whole or not at all.
    root:
        The repository, where ``resources/`` lies and relative paths start.

    Raises
    ------
    InputError
        A missing folder or file, weights that are not safetensors or are truncated, a checksum
        that differs, no network, no token.
    """
    startup.skip_unused_imports()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        {"built": _build, "shipped": _take, "local": _take, "hub": _download}[document["source"]](
            document, fresh, root
        )
        shutil.rmtree(target, ignore_errors=True)
        fresh.chmod(0o755)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _build(document: Mapping[str, Any], target: Path, root: Path) -> None:
    architecture = dict(document["architecture"])
    embedded = root / "resources" / "embedded-llama"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(embedded / name, target / name)
    special = json.loads((embedded / "special_ids.json").read_text(encoding="utf-8"))
    architecture |= special
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    kind = known.get(architecture["model_type"])
    if kind is None:
        raise InputError(
            f"config/models/{document['name']}.yaml: architecture.model_type is "
            f"{architecture['model_type']!r}; transformers has no causal language model of that type"
        )
    architecture["architectures"] = [kind]
    documents.write_json(target / "config.json", architecture)
    recipe = {key: document[key] for key in ("seed", "initializer_range")}
    documents.write_json(target / RECIPE, recipe)
    named_by = f"config/models/{document['name']}.yaml: architecture"
    if _built_bytes(architecture, target, named_by) <= WRITE_WEIGHTS_UP_TO:
        model = _from_recipe(target, "float32", "cpu")
        model.save_pretrained(target)


def _built_bytes(architecture: Mapping[str, Any], folder: Path, named_by: str) -> int:
    """Bytes of a built model's weights in float32; those of an unknown family are counted, not computed."""
    from kvbench import physics

    try:
        return physics.parameters(physics.Architecture.from_config(architecture, named_by)) * 4
    except physics.UnknownFamily:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
        return sum(weight.numel() for weight in model.parameters()) * 4


def _take(document: Mapping[str, Any], target: Path, root: Path) -> None:
    """Copy a checkpoint that ships with the repository; link the files of a folder of the user's."""
    source = Path(document["path"]).expanduser()
    source = source if source.is_absolute() else root / source
    name = f"config/models/{document['name']}.yaml"
    if not source.is_dir():
        raise InputError(f"{name}: path {document['path']} is not a folder; correct the key path")
    check_checkpoint(source, name)
    for file, expected in document.get("sha256", {}).items():
        found = documents.sha256_of_file(source / file) if (source / file).exists() else "missing"
        if found != expected:
            raise InputError(
                f"{source / file}: SHA-256 is {found[:12]} but {name} says {expected[:12]}; "
                "restore the file (git checkout) or correct the key sha256"
            )
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.suffix in _NEVER_TAKEN or path.name.startswith("."):
            continue
        if document["source"] == "local":
            (target / path.name).symlink_to(path.resolve())
        else:
            shutil.copyfile(path, target / path.name)


def _download(document: Mapping[str, Any], target: Path, root: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    name, repo = f"config/models/{document['name']}.yaml", document["repo"]
    if document["gated"] and not (os.environ.get("HF_TOKEN") or _stored_token()):
        raise InputError(
            f"{name}: {repo} is gated and no HF_TOKEN is set; accept its licence on the hub and "
            "export HF_TOKEN, or take the model llama-3.2-1b-geometry, which needs no download"
        )
    try:
        snapshot_download(
            repo,
            revision=document["revision"],
            local_dir=target,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer.model"],
        )
    except (GatedRepoError, RepositoryNotFoundError):
        raise InputError(
            f"{name}: the hub refuses {repo} at {document['revision'][:12]}; check the name, and "
            "that HF_TOKEN belongs to an account that accepted its licence"
        ) from None
    except Exception as error:
        # Whatever the client or its transport raises, the user needs the same remedy.
        raise InputError(
            f"{name}: {repo} could not be downloaded ({type(error).__name__}); check the network, "
            "or take a model with source built, shipped or local"
        ) from None
    shutil.rmtree(target / ".cache", ignore_errors=True)
    check_checkpoint(target, name)


def _stored_token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def check_checkpoint(folder: Path, named_by: str) -> None:
    """Refuse a folder without ``config.json``, without safetensors, or with a truncated file.

    Raises
    ------
    InputError
        One line naming the file and the remedy.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{named_by}: {folder} has no config.json; it is not a model folder")
    _check_config(folder / "config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        others = [p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"}]
        found = f"only {', '.join(sorted(others))}" if others else "no weights"
        raise InputError(
            f"{named_by}: {folder} holds {found}; only safetensors are loaded: convert with "
            "model.save_pretrained(folder)"
        )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = set(documents.read_json(index).get("weight_map", {}).values())
        if missing := sorted(listed - {path.name for path in weights}):
            raise InputError(
                f"{named_by}: {folder} lacks {missing[0]}, which {index.name} names; fetch it again"
            )
    from safetensors import SafetensorError, safe_open

    for path in weights:
        try:
            with safe_open(path, framework="np") as archive:
                archive.keys()
        except SafetensorError as error:
            raise InputError(
                f"{path}: not a whole safetensors file ({error}); fetch it again"
            ) from None


def _check_config(path: Path) -> None:
    """Refuse sizes of which no model can be made; those of an unknown family are not looked at."""
    from kvbench import physics

    config = documents.read_json(path, remedy="fetch the checkpoint again")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{path}: model_type is missing; fetch the checkpoint again")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rotary = rope if isinstance(rope, dict) else {}
    for name, value, fits, wanted in (
        ("dtype", config.get("dtype", config.get("torch_dtype")), _is_text, "a text"),
        ("architectures", config.get("architectures"), _are_texts, "a list of texts"),
        ("rope_parameters", rope, lambda v: isinstance(v, dict), "an object"),
        ("rope_theta", rotary.get("rope_theta", config.get("rope_theta")), _is_size, "above zero"),
    ):
        if value is not None and not fits(value):
            raise InputError(
                f"{path}: {name} is {value!r}; it must be {wanted}; fetch the checkpoint again"
            )
    with suppress(physics.UnknownFamily):
        physics.Architecture.from_config(config, str(path))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_size(value: Any) -> bool:
    """Whether a value is a finite number above zero."""
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
    )


@startup.collector_paused()
def load(folder: Path, device: str, dtype: str, keep: Sequence[str] = ()) -> LoadedModel:
    """Load a prepared model.

    Parameters
    ----------
    folder:
        What :func:`prepare` made, or any folder in Hugging Face format.
    device:
        ``cpu`` or ``cuda``.
    dtype:
        ``float32``, ``bfloat16`` or ``float16``.
    keep:
        Optional packages that transformers shall see (``hqq``).

    Raises
    ------
    InputError
        CUDA is asked for and absent, or the folder is no model.
    """
    startup.skip_unused_imports(keep)
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "kv.device is cuda but torch sees no GPU; set kv.device to cpu, or install a CUDA build "
            "of torch and a driver"
        )
    if (folder / RECIPE).exists() and not list(folder.glob("*.safetensors")):
        model = _from_recipe(folder, dtype, device)
    else:
        check_checkpoint(folder, str(folder))
        from transformers import AutoModelForCausalLM

        # device_map makes accelerate place the weights straight where they are needed.
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            device_map={"": device},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    return adopt(model, _fast_tokenizer(folder), _named_end(folder))


def adopt(model: PreTrainedModel, tokenizer: Any, *end_names: str) -> LoadedModel:
    """Take over a model in memory: evaluation mode, greedy, and no stop before the full length.

    Parameters
    ----------
    model:
        The module; whatever its ``generation_config`` says of sampling and stopping no longer holds, nor
        does a window that its attention does not read (:func:`unread_windows`).
    tokenizer:
        A fast tokenizer, or a :class:`kvbench.inputs.tokens.SlowTokenizer`.
    end_names:
        Further tokens that end a reply.
    """
    from transformers import GenerationConfig

    ends: set[int] = set()
    text = model.config.get_text_config(decoder=True)
    for config in (model.generation_config, model.config, text):
        # Zero is an id like any other; what is said first holds.
        found = getattr(config, "eos_token_id", None)
        if found is not None and not ends:
            ends = {found} if isinstance(found, int) else set(found)
    named = (tokenizer.token_to_id(name) for name in (*_END_NAMES, *end_names) if name)
    ends |= {number for number in named if number is not None}
    for name in unread_windows(model, text):
        setattr(text, name, None)
    model.eval()
    model.config.eos_token_id = text.eos_token_id = None
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=None, pad_token_id=0, bos_token_id=None
    )
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return LoadedModel(model, model.config.to_dict(), size, frozenset(ends), tokenizer)


def unread_windows(model: PreTrainedModel, config: Any) -> list[str]:
    """Names of windows in a configuration that the model's own attention does not read.

    A checkpoint converted from another family may carry one. The library's caches and masks are made by
    it, also those of ``generate``, and drop keys that the model attends to when nothing is kept.
    """
    carried = [
        name
        for name in ("sliding_window", "attention_chunk_size")
        if getattr(config, name, None) is not None
        and name not in getattr(type(config), "__dataclass_fields__", {})
    ]
    if not carried:
        return []
    source = Path(inspect.getfile(type(model))).read_text(encoding="utf-8")
    return [name for name in carried if name not in source]


def _fast_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").exists():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    from kvbench.inputs import tokens

    return tokens.backend(tokens.load_tokenizer(folder))


def _named_end(folder: Path) -> str:
    """The token that the tokenizer's configuration calls the end, or nothing."""
    path = folder / "tokenizer_config.json"
    found = documents.read_json(path).get("eos_token") if path.exists() else None
    return str(found.get("content", "") if isinstance(found, Mapping) else found or "")


def _from_recipe(folder: Path, dtype: str, device: str) -> PreTrainedModel:
    """Build a model with seeded random weights, placed straight on its device."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe = documents.read_json(folder / RECIPE)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.tie_weights()
    total = sum(weight.numel() for weight in model.parameters())
    generator = torch.Generator().manual_seed(recipe["seed"])
    block = torch.randn(min(total, _BLOCK), generator=generator) * recipe["initializer_range"]
    block = block.to(device=device, dtype=getattr(torch, dtype))
    position = 0
    for name, weight in list(model.named_parameters()):
        filled = torch.empty(weight.shape, dtype=weight.dtype, device=device)
        if "norm" in name:
            filled.fill_(1.0)
        elif name.endswith("bias"):
            filled.zero_()
        else:
            position = _fill(filled.view(-1), block, position)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(filled, requires_grad=False))
    model.tie_weights()
    for owner in model.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to(device))
    return model


def _fill(target: torch.Tensor, block: torch.Tensor, position: int) -> int:
    """Copy the block into ``target`` from ``position`` on, going round; return the next position."""
    done = 0
    while done < target.numel():
        count = min(target.numel() - done, block.numel() - position)
        target[done : done + count] = block[position : position + count]
        done += count
        position = (position + count) % block.numel()
    return position
