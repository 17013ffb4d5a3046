"""Where weights come from: what a folder or a repository holds, and whether its weights fit its configuration.

`from_pretrained` gives tensors that it does not find random values, and only logs that. So with a
file of another model, a training would start from random weights, and a prediction would be nonsense.
"""

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    AutoConfig,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import logging as transformers_logging

from gi_segmentation.errors import one_line
from gi_segmentation.models.configuration import LOAD_ERRORS, NO_CODE
from gi_segmentation.models.heads import find_encoder

logger = logging.getLogger(__name__)

# Names that wrappers put before those of a model: DataParallel, torch.compile, FSDP, and modules that hold a model.
WRAPPERS = "module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|model|net|network"
# For `from_pretrained`, which replaces what a pattern finds by the text. A part of a model may be wrapped too.
WITHOUT_WRAPPERS = {
    rf"^(?:(?:{WRAPPERS})\.)+": "",
    r"(?<=\.)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.": "",
}
# Files by which other programs and formats are known, and what to say about them.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Characters of another library's message that are shown.
MAX_LINE = 240
# Number formats of tensors that are quantized, as safetensors calls them. Their scale is elsewhere.
QUANTIZED = re.compile(r"[IU][48]|F[48].*")
SAFETENSORS = (".safetensors", ".safetensors.index.json")


def list_families() -> str:
    """Return the families of models that this project trains, for a message."""
    return ", ".join(sorted(config.model_type for config in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING))


def find_model_problem(names: Collection[str]) -> str | None:
    """Return why the files of a folder or a repository are no model that can be loaded; None if they may be one.

    Args:
        names: Paths of the files, with `/` between folders.

    Example:
        >>> find_model_problem(["config.json", "model.safetensors"])
        >>> find_model_problem(["adapter_config.json", "adapter_model.safetensors"])[:37]
        'it holds a PEFT adapter and no whole '
    """
    top = {name for name in names if "/" not in name}
    if "adapter_config.json" in top:
        return "it holds a PEFT adapter and no whole model; merge it with `merge_and_unload()`, and save the result"
    if "model_index.json" in top:
        return f"it holds a pipeline of diffusers; expected a model of transformers ({list_families()})"
    if any(name.endswith(SAFETENSORS) for name in top):
        return None if "config.json" in top else "it has weights but no config.json; copy the one of its model"
    if any(re.match(r"checkpoint-\d+/", name) for name in names):
        return "it is the folder of a training that has not ended; name one of its folders checkpoint-N"
    pickles = sorted(name for name in top if name.endswith(PICKLES))
    if pickles:
        return (
            f"its weights are a pickle ({pickles[0]}), which may run any code and is never loaded; convert it to "
            f"model.safetensors, with `save_pretrained` of transformers"
        )
    if any(name.endswith(".onnx") for name in names):
        return "it holds an ONNX file, which cannot be loaded; name the checkpoint from which it was exported"
    if other := sorted(name for name in top if name.endswith((".h5", ".msgpack", ".gguf", ".tflite"))):
        return f"its weights are in another format ({other[0]}); expected a model.safetensors"
    if "config.json" in top:
        return "no file named model.safetensors"
    return "no config.json and no model.safetensors"


def list_model_files(name: str, revision: str | None) -> list[str] | None:
    """Return the paths of the files of a folder, or of a repository of the Hub; None if there is no such thing."""
    folder = Path(name)
    if folder.is_dir():
        return [path.relative_to(folder).as_posix() for depth in ("*", "*/*") for path in folder.glob(depth)]
    try:
        return HfApi().list_repo_files(name, revision=revision)
    # The caller reports the error that it has already. A second one from the Hub would only hide it.
    except Exception:
        return None


def load_config(name: str, revision: str | None) -> PreTrainedConfig:
    """Load the configuration of a model for semantic segmentation.

    Args:
        name: Folder or Hub id.
        revision: Branch, tag or commit on the Hub; None: the main branch.

    Raises:
        ValueError: If there is no such folder or repository, or if it holds anything else. The message is one line.
    """
    path = Path(name)
    if path.is_dir() and (problem := find_model_problem(list_model_files(name, revision) or [])):
        raise ValueError(problem)
    if path.is_file():
        raise ValueError("expected a folder or a Hub id, got a file; name its folder")
    try:
        settings, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except LOAD_ERRORS as error:
        raise ValueError(explain_failure(name, revision, error)) from error
    check_family(settings)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, **NO_CODE)
    except LOAD_ERRORS as error:
        raise ValueError(f"its config.json cannot be used ({first_line(error)})") from error
    check_channels(config)
    return config


def explain_failure(name: str, revision: str | None, error: BaseException) -> str:
    """Return why a configuration or weights cannot be loaded, in one line."""
    # Such a name can only be a path, so the Hub was not asked. The library complains about its form.
    if not Path(name).is_dir() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        return "there is no such folder"
    files = None if Path(name).is_dir() else list_model_files(name, revision)
    if files is not None and (problem := find_model_problem(files)):
        return problem
    damaged = isinstance(error, SafetensorError)
    return f"its weights are damaged ({first_line(error)}); copy them again" if damaged else first_line(error)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, or its beginning. The others are about offline use."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    # A heading says nothing without what follows.
    line = one_line(error) if line.endswith(":") else line
    # Some lines list all models that `transformers` knows.
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..."


def check_family(settings: Mapping[str, Any]) -> None:
    """Check that a configuration is that of a model for semantic segmentation.

    Args:
        settings: The content of its `config.json`.

    Raises:
        ValueError: If not. The message names the families that are.
    """
    if not isinstance(settings, dict):
        raise ValueError("its config.json is no JSON object; copy the one of its model")
    family, expected = settings.get("model_type"), f"expected one of the families {list_families()}"
    if not isinstance(family, str):
        raise ValueError(f"its config.json has no model_type; {expected}")
    if settings.get("quantization_config"):
        raise ValueError(f"its weights are quantized; name the {family} from which it was made, in 32 or 16 bits")
    if family in {config.model_type for config in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING}:
        return
    classes = settings.get("architectures")
    what = f"{family} ({', '.join(map(str, classes))})" if isinstance(classes, list) and classes else family
    if family not in CONFIG_MAPPING:
        code = ", and its own code is never run" if settings.get("auto_map") else ""
        raise ValueError(f"it is a {what:.120}, which transformers does not know{code}; {expected}")
    is_encoder = CONFIG_MAPPING[family] in MODEL_FOR_BACKBONE_MAPPING
    remedy = "; as an encoder, it can be the --backbone of --model_type upernet" if is_encoder else ""
    raise ValueError(f"it is a {what:.120}, which is no model for semantic segmentation; {expected}{remedy}")


def check_channels(config: PreTrainedConfig) -> None:
    """Check that a model takes three channels.

    Raises:
        ValueError: If not.
    """
    backbone = getattr(config, "backbone_config", None) or config
    channels = getattr(backbone, "num_channels", 3)
    if channels != 3:
        raise ValueError(
            f"expected a model with 3 input channels, which show a slice and its neighbours, but its configuration "
            f"has num_channels {channels!r:.20}"
        )


def load_segmentation_model(
    name: str, revision: str | None, **settings: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model for semantic segmentation in 32 bits; arguments and result as `load_tensors`."""
    from_pretrained = AutoModelForSemanticSegmentation.from_pretrained
    return load_tensors(from_pretrained, name, revision, **NO_CODE, **settings)


def load_tensors(
    from_pretrained: Any, name: str, revision: str | None, **settings: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model in 32 bits, and never a pickle. Prefixes of known wrappers are taken off the names of its tensors.

    Args:
        from_pretrained: The method of a class of models.
        name: Folder or Hub id.
        revision: Branch, tag or commit on the Hub; None: the main branch.
        **settings: More arguments for `from_pretrained`.

    Returns:
        The model, and the loading info of `from_pretrained`.

    Raises:
        ValueError: If the model cannot be loaded, or if a tensor has values that are not finite.
    """

    def load(**more: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        # `from_pretrained` keeps the number format of the file if it is not told another one. It looks for a file that
        # the Hub itself has converted only if the branch has a name.
        fixed = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        # Its report of missing tensors has a hundred lines. `log_loading` and the errors here say what matters.
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        try:
            return from_pretrained(name, revision=revision or "main", **fixed, **settings, **more)
        except LOAD_ERRORS as error:
            raise ValueError(explain_failure(name, revision, error)) from error
        finally:
            transformers_logging.set_verbosity(verbosity)

    model, info = load()
    if any(re.search(pattern, key) for key in info["unexpected_keys"] for pattern in WITHOUT_WRAPPERS):
        bare, bare_info = load(key_mapping=WITHOUT_WRAPPERS)
        if len(bare_info["missing_keys"]) < len(info["missing_keys"]):
            key = min(info["unexpected_keys"])
            logger.warning("its tensors have names of a wrapper, such as %s; these parts are taken off", key)
            model, info = bare, bare_info
    check_not_quantized(name, revision)
    check_finite(model.state_dict())
    return model, info


def check_not_quantized(name: str, revision: str | None) -> None:
    """Check that the weights in a file are not quantized; arguments as `load_tensors`, which has loaded the file.

    Raises:
        ValueError: If they are. `from_pretrained` would take their integers for weights.
    """
    cached = try_to_load_from_cache(name, "model.safetensors", revision=revision) if not Path(name).is_dir() else None
    paths = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else [cached]
    for path in paths:
        if not isinstance(path, str | Path):
            continue
        with safe_open(path, framework="pt") as file:
            formats = {key: str(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
        for key, number_format in formats.items():
            if QUANTIZED.fullmatch(number_format):
                raise ValueError(
                    f"{key} is quantized (its numbers are {number_format}); name the model from which it was made, in "
                    f"32 or 16 bits"
                )


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that all weights are numbers.

    Raises:
        ValueError: If not. The message names the first tensor with NaN or infinite values.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            wrong = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"{wrong:,} of the {tensor.numel():,} values of {name} are NaN or infinite; use another checkpoint"
            )


def check_share(tensors: Mapping[str, torch.Tensor], missing: Collection[str], family: str) -> None:
    """Check that most of an encoder was loaded.

    Args:
        tensors: All tensors of the encoder by name.
        missing: Names of those that were not loaded.
        family: Name of the encoder's family.

    Raises:
        ValueError: If less than half of the tensors, or of the weights in them, were loaded.
    """
    loaded = [name for name in tensors if name not in missing]
    found, all_weights = (sum(tensors[name].numel() for name in names) for names in (loaded, tensors))
    if 2 * len(loaded) < len(tensors) or 2 * found < all_weights:
        first = next(name for name in tensors if name in missing)
        raise ValueError(
            f"its file has only {len(loaded)} of the {len(tensors)} tensors of a {family} ({found:,} of "
            f"{all_weights:,} weights); the first missing one is {first}. It holds another model, or other names"
        )


def check_complete(model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Check that a model and its file have the same tensors. Only an auxiliary head may be left out.

    Args:
        model: From `load_segmentation_model`.
        info: The loading info.

    Raises:
        ValueError: If a tensor is missing, has another shape, or is in the file only. A prediction would be nonsense.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"lacks {len(missing)} tensors, the first {missing[0]}; use a checkpoint that is complete")
    for name, theirs, ours in sorted(info["mismatched_keys"], key=str):
        raise ValueError(describe_mismatch(name, theirs, ours))
    parts = {name for name, _ in model.named_children()}
    foreign = sorted(name for name in info["unexpected_keys"] if name.split(".")[0] in parts)
    if foreign:
        raise ValueError(
            f"its file has {len(foreign)} tensors for which its config.json makes no place, the first {foreign[0]}; "
            f"the two files do not belong together"
        )


def describe_mismatch(name: str, theirs: Any, ours: Any) -> str:
    """Return a message about a tensor whose file has another shape than its configuration says."""
    return (
        f"{name} has the shape {list(theirs)} in its file, but its config.json makes it {list(ours)}; the two files "
        f"do not belong together"
    )


def check_encoder(model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Check that the encoder of a model was loaded. Its head may be new.

    Args:
        model: From `load_segmentation_model`.
        info: The loading info.

    Raises:
        ValueError: As `check_share`, or if a tensor has another shape than the configuration says.
    """
    encoder = find_encoder(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is encoder)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}
    shapes = {name: (theirs, ours) for name, theirs, ours in info["mismatched_keys"] if name in tensors}
    check_share(tensors, {*info["missing_keys"], *shapes}, f"{model.config.model_type}'s encoder")
    for name, (theirs, ours) in sorted(shapes.items()):
        raise ValueError(describe_mismatch(name, theirs, ours))
