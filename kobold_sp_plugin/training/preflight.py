"""Everything that can be told to be wrong before a model is loaded, all at once."""

import json
import os
import shutil
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from ..compatibility import ModelFacts, facts
from ..errors import FormatError, ModelError, TrainingError
from ..softprompt import SoftPrompt
from . import processes
from .initial import words_of
from .loading import BYTES_PER_WEIGHT, PRECISIONS
from .loss import CHUNK_VALUES
from .places import Places, filename
from .settings import Settings
from .texts import files_of, in_order, left_out, passages

INSTALL = 'pip install "kobold_sp_plugin[training]"'
_TINY_BYTES = 100_000
_ADVISED_BYTES = 8_000_000
_LEAST_BLOCK = 64
"""Tokens of a text; nobody is advised to train on shorter ones."""
_LIBRARIES_BYTES = 100_000_000
"""What the libraries, the tokenizer and the optimizer take besides, whatever the model: 80 to 120 MB were seen."""
_HOLES = 1.6
"""What the C library's heap grows to, of what is kept in it: it does not put a tensor where one of its size was. Seen:
1.3 to 1.7, the more the longer a training takes."""
_HEAP_BYTES = 2**25
"""Of a tensor of this size or more the system gets the memory back at once; such leave no holes."""
_DOUBT = 1.25
"""What is free may be this much less than what a training is estimated to need, and it may fit all the same."""
_SIZES = (
    ("decoder_layers", "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    ("hidden_size", "n_embd", "d_model"),
    ("intermediate_size", "decoder_ffn_dim", "ffn_dim", "n_inner", "ffn_hidden_size"),
    ("decoder_attention_heads", "num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads"),
)
"""What configurations call the number of layers, their width, the width inside them, and their attention heads."""
_FOUR_NORMS = ("gemma2", "gemma3")
"""Families with a norm after each half of a layer, too."""
_NORMS_IN_ATTENTION = ("qwen3", "gemma3")
"""Families that normalise queries and keys."""
_PACKED = ("accelerate", "bitsandbytes")
"""What a model in 8 or 4 bit needs."""


@dataclass
class Plan:
    """A training as it was asked for, before anything of it is there."""

    name: str
    data: Path
    model: str
    """A folder, or a name on the hub."""
    places: Places
    settings: Settings
    precision: str = "auto"
    start_from: Tuple[Path, ...] = ()
    """Several: a mixture of them."""
    sharded: bool = False
    """The model's layers on all GPUs and in memory, and not the whole of it on one."""


@dataclass
class Findings:
    """What was found."""

    problems: List[str] = field(default_factory=list)
    """Sentences; with any of them the training cannot be."""
    remarks: List[str] = field(default_factory=list)
    """Sentences; good to know."""


def look(plan: Plan) -> Findings:
    """Everything that is wrong with ``plan``, as far as it can be told without loading a model. Writes nothing."""
    found = Findings()
    _look_at_name(plan, found)
    _look_at_places(plan, found)
    n_bytes = _look_at_data(plan, found)
    config = _look_at_model(plan, found)
    known = facts_of(plan.model)
    _look_at_context(plan, known, found)
    _look_at_start(plan, known, found)
    _look_at_disk(plan, n_bytes, found)
    _look_at_packages(plan, found)
    if config is not None:
        _look_at_memory(plan, config, found)
        base = base_model(plan.model, config)
        if base:
            found.remarks.append(
                f"{plan.model} is a fine-tune of {base}. A soft prompt trained on {base} serves all of its fine-tunes, "
                f"this one too: --model {base}"
            )
    return found


def facts_of(model: str) -> Optional[ModelFacts]:
    """The facts of a model's folder; None for a name on the hub, or a folder that tells none."""
    try:
        return facts(model) if Path(model).is_dir() else None
    except (ModelError, OSError):
        return None


def base_model(model: str, config: Dict[str, Any]) -> str:
    """The model that ``model`` says it was made of, by its card or configuration, or ""."""
    folder = Path(model)
    try:
        if folder.is_dir():
            card = folder / "README.md"
        else:
            from huggingface_hub import hf_hub_download

            card = Path(hf_hub_download(model, "README.md"))
        text = card.read_text(encoding="utf-8", errors="replace")[:100_000]
        import yaml

        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        base = front.get("base_model", "") if isinstance(front, dict) else ""
    except Exception:  # no card, no network, no YAML: then nothing is known
        base = ""
    if isinstance(base, list):
        base = base[0] if len(base) == 1 else ""  # a merge has no one base
    base = base or config.get("base_model") or ""
    return base if isinstance(base, str) and base not in (model, folder.name) else ""


def _look_at_name(plan: Plan, found: Findings) -> None:
    if not plan.name.strip():
        found.problems.append("The soft prompt has no name. Give it one with --name.")
    elif not filename(plan.name):
        found.problems.append(f"No file name can be made of the name {plan.name!r}. Use letters or digits.")


def _look_at_places(plan: Plan, found: Findings) -> None:
    for folder, what in ((plan.places.output.parent, "soft prompt"), (plan.places.work, "training")):
        there = _nearest(folder)
        if not there.is_dir():
            found.problems.append(f"{there} is a file, and the folder of the {what} would have to be there.")
        elif not os.access(there, os.W_OK | os.X_OK):
            found.problems.append(f"{there} cannot be written to, and the {what} goes there. Choose another --output.")


def _look_at_data(plan: Plan, found: Findings) -> int:
    """Bytes of the data."""
    try:
        files = files_of(plan.data)
    except (TrainingError, OSError) as error:
        found.problems.append(str(error))
        return 0
    others = left_out(plan.data)
    if others:
        found.remarks.append(f"{others}.")
    closed = [file for file in files if not os.access(file, os.R_OK)]
    found.problems += [f"{file} cannot be read: no permission." for file in closed[:5]]
    if closed:
        return 0
    n_bytes = sum(file.stat().st_size for file in files)
    tokenizer = _Templates(plan.model)
    letters = 0
    for file in files:
        try:
            letters += sum(len(passage.text) for passage in passages(file, tokenizer))
        except (TrainingError, OSError) as error:
            found.problems.append(str(error))
            letters += 1
    if not letters:
        found.problems.append(f"The files in {plan.data} hold no text.")
    elif n_bytes < _TINY_BYTES:
        found.remarks.append(
            f"The data are {size(n_bytes)} of text. That is very little: the soft prompt learns to repeat it "
            "more than to write like it, and keeps few facts of it; 8 MB or more work best."
        )
    elif n_bytes < _ADVISED_BYTES:
        found.remarks.append(f"The data are {size(n_bytes)} of text; 8 MB or more, on one theme, work best.")
    return n_bytes


def _look_at_model(plan: Plan, found: Findings) -> Optional[Dict[str, Any]]:
    """The model's configuration, if it is a causal model."""
    folder = Path(plan.model)
    is_folder = folder.is_dir()
    if folder.is_file():
        found.problems.append(
            f"{folder} is a file. Training needs the folder of the model's original files (config.json and so on)."
        )
        return None
    if not is_folder and (folder.is_absolute() or plan.model.startswith((".", "~")) or plan.model.count("/") > 1):
        found.problems.append(f"There is no folder {plan.model}. Check --model.")
        return None
    if is_folder and not (folder / "config.json").is_file():
        hint = " The .gguf file in it is for llama.cpp; training needs the model's original files." * any(
            folder.glob("*.gguf")
        )
        found.problems.append(f"There is no config.json in {folder}, so it is no model that transformers loads.{hint}")
        return None
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(plan.model)
    except Exception as error:  # each release has errors of its own for each kind of trouble
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        found.problems.append(f"The configuration of {plan.model} cannot be read: {reason}")
        return None
    masked = [str(each).endswith("ForMaskedLM") for each in config.architectures or ()]
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not (masked and all(masked))
    if not is_causal or getattr(config, "is_encoder_decoder", False):
        found.problems.append(
            f"{plan.model} is no causal language model but a {config.model_type}. Soft prompts are for models that "
            "continue text, such as GPT-J, OPT or Llama."
        )
        return None
    if is_folder:
        if not _weights(folder):
            found.problems.append(f"There are no weights (.safetensors, .bin) in {folder}; the download is incomplete.")
        names = (
            "tokenizer.json",
            "tokenizer.model",
            "vocab.json",
            "tokenizer_config.json",
            "vocab.txt",
            "spiece.model",
        )
        if not any((folder / name).is_file() for name in names):
            found.problems.append(f"There is no tokenizer in {folder} (tokenizer.json or the like).")
    known: Dict[str, Any] = config.to_dict()
    return known


def _look_at_context(plan: Plan, known: Optional[ModelFacts], found: Findings) -> None:
    settings = plan.settings
    if known is None or known.context is None or settings.n_tokens + settings.block <= known.context:
        return
    if settings.n_tokens >= known.context - 8:
        found.problems.append(
            f"{settings.n_tokens} tokens of soft prompt leave no room in a context of {known.context}. Lower --tokens."
        )
    else:
        found.problems.append(
            f"{settings.n_tokens} tokens of soft prompt and {settings.block} of text are more than the model's context "
            f"of {known.context}. Try --block {known.context - settings.n_tokens}."
        )


def _look_at_start(plan: Plan, known: Optional[ModelFacts], found: Findings) -> None:
    settings = plan.settings
    words = words_of(settings.initial_text) if settings.initial == "words" else []
    if len(words) > settings.n_tokens and not plan.places.is_begun:
        found.remarks.append(
            f"Words that are left out, for want of rows: the last {len(words) - settings.n_tokens} of {len(words)}. "
            f"For all of them: --tokens {len(words)}"
        )
    for path in plan.start_from:
        try:
            start = SoftPrompt.load(path)
        except FormatError as error:
            found.problems.append(f"The soft prompt to start from cannot be read: {error}.")
        except OSError as error:
            found.problems.append(f"The soft prompt to start from, {path}: {error.strerror or error}.")
        else:
            if known is not None and known.width is not None and start.width != known.width:
                found.problems.append(
                    f"The soft prompt to start from, {path}, is made for {start.width} columns, this model has "
                    f"{known.width}."
                )


def _look_at_disk(plan: Plan, n_bytes: int, found: Findings) -> None:
    # Three bytes of text make about a token, of at most five bytes on the disk; and the checkpoint.
    needed = 2 * n_bytes + 50_000_000
    there = _nearest(plan.places.work)
    free = shutil.disk_usage(there).free
    if free < needed:
        found.problems.append(f"The disk of {there} has {size(free)} left; this training needs about {size(needed)}.")


def _look_at_packages(plan: Plan, found: Findings) -> None:
    needed = _PACKED if plan.precision in ("8bit", "4bit") else ()
    for option, names in ((f"--precision {plan.precision}", needed), ("--sharded", ("accelerate",) * plan.sharded)):
        missing = [name for name in names if find_spec(name) is None]
        if missing:
            found.problems.append(f"{option} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if plan.sharded and processes.count() > 1:
        if plan.precision in ("8bit", "4bit"):
            found.problems.append(
                f"--sharded with several processes takes no --precision {plan.precision}: start the command by itself, "
                "without accelerate launch or torchrun, or choose another precision."
            )
        if not processes.can_share():
            found.problems.append("--sharded with several processes needs torch 2.6 or newer.")
    if in_order("&amp;") == "&amp;":
        found.remarks.append(
            f"ftfy is not installed: characters from a wrong encoding are learned as they are. {INSTALL}"
        )


def _look_at_memory(plan: Plan, config: Dict[str, Any], found: Findings) -> None:
    folder = Path(plan.model)
    several = processes.count()
    free, where = free_memory(plan.sharded and several == 1)
    stored = _stored_bytes_per_weight(config)
    count = sum(file.stat().st_size for file in _weights(folder)) / stored if folder.is_dir() else 0
    if not count or not free:
        return
    is_gpu = where != "memory"
    if not is_gpu:
        free //= several  # each holds a model of its own; of one to be shared, while it loads
    elif plan.sharded:
        count /= several

    def needs(settings: Settings, precision: str) -> float:
        return _needed(count, config, settings, precision, stored, is_gpu)

    needed = needs(plan.settings, plan.precision)
    if needed <= free:
        return
    fitting, smallest = [], float("inf")
    for precision in (plan.precision, *PRECISIONS[1:]):
        per_weight = BYTES_PER_WEIGHT.get(precision) or (stored if is_gpu else 4.0)
        if per_weight >= smallest:
            continue
        smallest = per_weight
        option = [f"--precision {precision}"] if precision != plan.precision else []
        for changed in _smaller(plan.settings, is_gpu):
            would = needs(changed, precision)
            options = " ".join(option + _options(changed, plan.settings))
            if would <= free:
                fitting.append((would, options))
                break
    if is_gpu and not plan.sharded and several == 1 and needed <= free_memory(True)[0]:
        fitting.append((needed, "--sharded, spread over all GPUs and the memory, slower"))
    if is_gpu and not plan.sharded and several > 1:
        would = _needed(count / several, config, plan.settings, plan.precision, stored, is_gpu)
        fitting += [(would, "--sharded, a part of the model on each GPU")] * (would <= free)
    is_begun = plan.places.is_begun
    advice = "Close other programs: with other settings this training cannot go on. " * is_begun
    if fitting:
        advice += f"With {'another --name and ' * is_begun}one of these added to the command it would fit: "
        advice += "; ".join(f"{options} ({size(would)})" for would, options in fitting) + "."
        missing = [name for name in _PACKED if find_spec(name) is None]
        if missing and any("bit" in options for _, options in fitting):
            advice += f" 8bit and 4bit need {' and '.join(missing)}: pip install {' '.join(missing)}"
    elif not is_begun:
        advice = "No settings would make it fit: take a smaller model, or close other programs."
    weights = f"{count / 1e9:.2g} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"
    is_sure = needed > _DOUBT * free
    (found.problems if is_sure else found.remarks).append(
        f"The {where} has {size(free)} left; this model of {weights} weights and its training need about "
        f"{size(needed)}{'' if is_sure else ', so it may not fit'}. {advice.strip()}"
    )


def size(n_bytes: float) -> str:
    """Of a file or of memory: "840 bytes", "4.2 kB", "64 MB", "12.3 GB"."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:.1f} GB"
    unit, name = (1e6, "MB") if n_bytes >= 1e6 else (1e3, "kB")
    if n_bytes < unit:
        return f"{n_bytes:.0f} bytes"
    return f"{n_bytes / unit:.{1 if n_bytes < 10 * unit else 0}f} {name}"


def _smaller(settings: Settings, is_gpu: bool) -> Iterator[Settings]:
    """``settings``, and others that take less memory: the ones that change least first.

    Smaller batches are as good and about as fast, layers that are computed again take a third more time, and of
    shorter texts less is learned of how one goes on.
    """
    yield settings
    row = settings.block + settings.n_tokens
    tokens = max(settings.batch_tokens or (row if is_gpu else 1024), row)
    batches = [replace(settings, batch_tokens=row * count) for count in range((tokens - 1) // row, 0, -1)]
    yield from batches
    yield replace(settings, checkpoint_layers=True)
    for each in batches:
        yield replace(each, checkpoint_layers=True)
    for layers in (settings.checkpoint_layers, True):
        block = settings.block // 2
        while block >= _LEAST_BLOCK:
            yield replace(settings, block=block, batch_tokens=block + settings.n_tokens, checkpoint_layers=layers)
            block //= 2


def _options(changed: Settings, settings: Settings) -> List[str]:
    """What is to be added to the command line for ``changed`` instead of ``settings``."""
    numbers = [("--block", "block"), ("--batch-tokens", "batch_tokens")]
    options = [
        f"{option} {getattr(changed, name)}"
        for option, name in numbers
        if getattr(changed, name) != getattr(settings, name)
    ]
    return options + ["--checkpoint-layers"] * (changed.checkpoint_layers and not settings.checkpoint_layers)


def free_memory(sharded: bool = False) -> Tuple[int, str]:
    """Bytes that are free where the model would be, and what to call that; 0 where nothing tells.

    ``sharded``: on all GPUs and in memory.
    """
    import torch

    if torch.cuda.is_available() and not sharded:
        return int(torch.cuda.mem_get_info()[0]), "GPU's memory"
    if torch.cuda.is_available():
        on_gpus = sum(int(torch.cuda.mem_get_info(number)[0]) for number in range(torch.cuda.device_count()))
        return on_gpus + _free_main_memory(), "memory of the GPUs and the machine"
    return _free_main_memory(), "memory"


def _free_main_memory() -> int:
    free = 0
    try:
        import psutil

        free = int(psutil.virtual_memory().available)
    except ImportError:
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
            free = next(int(each.split()[1]) * 1024 for each in lines if each.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return 0
    try:  # a container may be given less than its machine has
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(1, free)


def _needed(
    count: float, config: Dict[str, Any], settings: Settings, precision: str, stored: float, is_gpu: bool
) -> float:
    """Bytes, roughly, at the peak: the weights, what the layers keep for the backward pass, and the more of a chunk of
    logits, with all of that kept, and of one layer's gradients.

    ``count``: weights; ``stored``: bytes of each in the file.
    """
    config = {**config, **(config.get("text_config") or {})}
    per_weight = BYTES_PER_WEIGHT.get(precision) or (stored if is_gpu else 4.0)
    is_half = per_weight <= 2 and (is_gpu or precision != "4bit")  # 4 bit computes in float32 on a CPU
    value = 2.0 if is_half else 4.0
    layers, columns, inner, heads = (
        next((value for value in map(config.get, names) if isinstance(value, int)), None) for names in _SIZES
    )
    columns = columns or 4096
    inner = inner or 4 * columns
    row = settings.block + settings.n_tokens
    tokens = max(settings.batch_tokens or (row if is_gpu else 1024), row)  # a long text is a batch by itself

    def kept(width: float) -> float:
        return tokens * width * (_HOLES if not is_gpu and tokens * width < _HEAP_BYTES else 1.0)

    of_attention, scores = _of_attention(config, columns, heads or max(1, columns // 64), value)
    has_gate = "rms_norm_eps" in config or config.get("hidden_act") in ("silu", "swish")
    # What enters each norm (RMSNorm works in float32) and the activation, and with a gate both sides of their product.
    norms = 4 if str(config.get("model_type")).startswith(_FOUR_NORMS) else 2
    of_norms = norms * kept(columns * (4.0 if "rms_norm_eps" in config else value))
    of_inside = (3 if has_gate else 1) * kept(inner * value)
    of_layer = of_norms + sum(map(kept, of_attention)) + of_inside + kept(scores * row)
    # Above the layers: what enters the last norm and the head, and the gradient of that.
    above = 3 * kept(columns * value)
    gradients = tokens * (3 * inner * value + 2 * scores * row)
    # The logits; of a model in half precision they are there in that, too, and so are their gradients; and with a
    # soft cap its slope.
    vocabulary = config.get("vocab_size")
    values = CHUNK_VALUES + (vocabulary if isinstance(vocabulary, int) else 0)
    chunk = values * ((8.0 if is_half else 4.0) + 4.0 * bool(config.get("final_logit_softcapping")))
    layers = layers or 32
    if settings.checkpoint_layers:
        at_most = layers * kept(columns * value) + above + max(chunk, of_layer + gradients)
    else:
        at_most = layers * of_layer + above + max(chunk, gradients)
    return count * per_weight + at_most + _LIBRARIES_BYTES


def _of_attention(config: Dict[str, Any], columns: int, heads: int, value: float) -> Tuple[List[float], float]:
    """Bytes that attention keeps for each token: of each tensor; and for each token that it looks at."""
    import transformers

    queries = heads * (config.get("head_dim") or columns // heads)
    keys = queries * (config.get("num_key_value_heads") or heads) // heads
    names = config.get("architectures") or [""]
    # What the class can do; releases from 4.36 on need more of torch for it than they need else, and newer ones do not.
    is_there = getattr(transformers.utils, "is_torch_sdpa_available", lambda: True)()
    is_fused = is_there and getattr(getattr(transformers, str(names[0]), None), "_supports_sdpa", False)
    if not is_fused:
        keys = queries  # repeated for each head
    tensors = [queries * value, queries * value, keys * value, keys * value]
    if str(config.get("model_type")).startswith(_NORMS_IN_ATTENTION):
        tensors += [queries * 4.0, keys * 4.0]
    # Without a fused operator: the probabilities, in float32, again in half precision, and before the soft cap.
    of_score = 4.0 + (value if value < 4 else 0.0) + value * bool(config.get("attn_logit_softcapping"))
    return tensors, 0.0 if is_fused else heads * of_score


def _stored_bytes_per_weight(config: Dict[str, Any]) -> float:
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return next((size for name, size in (("float16", 2.0), ("bfloat16", 2.0), ("float64", 8.0)) if name in stored), 4.0)


def _weights(folder: Path) -> List[Path]:
    """The files with the weights; of two forms of the same, one."""
    for pattern in ("model*.safetensors", "*.safetensors", "pytorch_model*.bin"):
        files = sorted(folder.glob(pattern))
        if files:
            return files
    return []


def _nearest(folder: Path) -> Path:
    """``folder``, or the nearest above it that is there."""
    folder = folder.absolute()
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


class _Templates:
    """The model's tokenizer as far as chat messages need it, loaded when there are any.

    Where it cannot be loaded, which is said elsewhere, it writes messages as they are.
    """

    def __init__(self, model: str):
        self._model = model
        self._tokenizer: Any = None
        self._failed = False

    @property
    def chat_template(self) -> Any:
        """None where the model has none."""
        if self._tokenizer is None and not self._failed:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self._model)
            except Exception:  # each release has errors of its own for each kind of trouble
                self._failed = True  # there is a message in each line of the data
        return "none" if self._failed else getattr(self._tokenizer, "chat_template", None)

    def apply_chat_template(self, messages: List[Any], **options: Any) -> str:
        """The text of ``messages``."""
        if self._tokenizer is None:
            return "\n".join(json.dumps(message["content"]) + message["role"] for message in messages)
        return str(self._tokenizer.apply_chat_template(messages, **options))
