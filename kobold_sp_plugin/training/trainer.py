"""Training: rows in float32 over a frozen model."""

import hashlib
import math
import os
import tempfile
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import numpy as np
import torch
import transformers

from .. import __version__
from ..compatibility import fingerprint
from ..errors import Diverged, NoData, NotEnoughMemory
from ..softprompt import OWN_KEY, Order, SoftPrompt
from . import checkpoint, processes
from .checkpoint import Checkpoint
from .dataset import IGNORED, Batch, Dataset
from .frozen import frozen
from .initial import initial_rows
from .loss import cross_entropy, head_of
from .muon import Muon
from .settings import Settings
from .texts import Passage, documents, files_of, in_order, passages
from .trainable import TrainableRows

Data = Union[Dataset, str, "os.PathLike[str]", Iterable[str]]
"""A file or folder, texts, or a data set that is tokenised already."""

_BATCH_TOKENS = {"cpu": 1024, "other": 8192}
"""Of a batch that nobody has set, at most. On a GPU more tokens take hardly longer until about there."""
_ENOUGH_STEPS = 200
"""Of little data batches are smaller, down to 512 tokens, until there are as many steps as this: many small steps are
better than few large ones (noir stories, three times over 40,000 tokens, in the same time, with AdamW: 63 steps end at
a held-out loss of 0.607, 132 at 0.599, 294 at 0.596)."""
_SAVE_SECONDS = 60.0
"""A checkpoint at least this often; more often where ``save_every`` steps take less."""


class Progress(NamedTuple):
    """After a step."""

    step: int
    steps: int
    loss: float
    """Of the step's batches, nats per token."""
    held_out: Optional[float]
    """Nats per token; None where this step did not look."""
    best: Optional[float]
    """Best held-out loss until now."""
    tokens_per_second: float
    """Of text, since this run began."""
    seconds_left: float


def train(
    model: Any,
    tokenizer: Any,
    data: Data,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    folder: Union[str, Path, None] = None,
    start_from: Union[SoftPrompt, Sequence[SoftPrompt], None] = None,
    on_progress: Optional[Callable[[Progress], None]] = None,
) -> SoftPrompt:
    """Train a soft prompt for ``model``, a causal model, which is left as it was; ``data`` says what to learn.

    ``folder`` keeps tokens and checkpoints: where one of the same training is, it goes on from there, and on a CPU to
    the same rows as without the interruption. The soft prompt's metadata says what it was trained on, and its
    held-out loss before and after, under "kobold_sp_plugin". Of several soft prompts to start from a mixture is
    trained: all of them, and the weights of their mean; what comes of it is one soft prompt.

    Raises a :class:`~kobold_sp_plugin.errors.TrainingError` or :class:`~kobold_sp_plugin.errors.ModelError`.
    """
    with tempfile.TemporaryDirectory(prefix="kobold-sp-train-") as temporary:
        training = Training(model, tokenizer, data, settings, Path(folder or temporary), start_from)
        with closing(training), closing(training.run()) as steps:
            for progress in steps:
                if on_progress is not None:
                    on_progress(progress)
        return training.softprompt()


class Training:
    """One training; holds the model frozen, and gives it back on :meth:`close`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data: Data,
        settings: Settings,
        folder: Path,
        start_from: Union[SoftPrompt, Sequence[SoftPrompt], None] = None,
    ):
        self.settings = settings
        self.folder = folder
        self._model = model
        newline = "</s>" if getattr(model.config, "model_type", "") == "xglm" else "\n"
        self.dataset = data if isinstance(data, Dataset) else _written(data, tokenizer, settings, folder, newline)
        self._pieces, self._held = self.dataset.split(settings.held_out, settings.seed)
        self._start = len(self.dataset.prefix) if settings.order is Order.AFTER_BOS else 0
        self.resumed_at: Optional[int] = None
        """The step of the checkpoint that this goes on from."""
        self._mid_step = False
        self._restore = frozen(model, settings.checkpoint_layers)
        try:
            probe = torch.as_tensor(self.dataset.batch(self._pieces[:1]).ids[:, :16], device=_device_of(model))
            self._parts = head_of(model, probe)
            rows = initial_rows(model, tokenizer, settings, self.dataset, start_from)
            self.rows = TrainableRows(model, rows)
            self._learning = list(self.rows.parameters())
            self._optimizer = _optimizer(self._learning, settings)
            self._about = {
                **settings.as_json(),
                "data": self.dataset.digest,
                "model": fingerprint(model),
                "initial rows": _digest(rows),
                "format": checkpoint.FORMAT,
            }
            del self._about["save_every"]  # changes no rows
            self._passes = settings.accumulate * processes.count()
            """Batches of one step, of all processes."""
            self._about["accumulate"] = self._passes  # two processes go on where one with twice as many stopped
            found = checkpoint.load(folder, self._about)
            # What was found by trial stays: another machine, or a fuller one, would find another number.
            self.batch_tokens = found.batch_tokens if found else settings.batch_tokens or self._found_batch_tokens()
            self.steps = settings.steps or self._default_steps()
            self._step = 0
            self._best = self.rows.in_units()
            self.best_loss: Optional[float] = None
            self._looks_since_best = 0
            self.history: List[Dict[str, float]] = []
            """One entry a step: "step", "loss", and "held_out" where it looked."""
            if found is not None:
                self._go_on_from(found)
        except BaseException:
            self.close()
            raise

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self._step

    @property
    def openings_from(self) -> Sequence[int]:
        """Pieces whose beginnings show best what was learned: those held out, else the others."""
        return self._held or self._pieces

    def close(self) -> None:
        """Give the model back as it was."""
        self._restore()

    def run(self) -> Generator[Progress, None, None]:
        """Train to the end, saving as it goes; what was done is saved also when this ends early."""
        if self._held and self.best_loss is None and self._step == 0:
            without = self.held_out_loss(with_rows=False)
            self._note_look(self.held_out_loss())
            self.history.append({"step": 0, "held_out": float(self.best_loss or 0), "without": without})
        begun, done, tokens = time.monotonic(), self._step, 0
        saved = begun
        batches = self._batches(self._step * self._passes)
        try:
            while self._step < self.steps and not self._has_given_up():
                mine = [next(batches) for _ in range(self._passes)][processes.number() :: processes.count()]
                loss, count = self._one_step(mine)
                tokens += count
                self._step += 1
                entry: Dict[str, float] = {"step": self._step, "loss": loss}
                held_out = None
                if self._held and (self._step % self._look_every == 0 or self._step == self.steps):
                    held_out = entry["held_out"] = self.held_out_loss()
                    self._note_look(held_out)
                self.history.append(entry)
                self._mid_step = False
                if self._step % self.settings.save_every == 0 or time.monotonic() - saved > _SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
                seconds = max(1e-9, time.monotonic() - begun)
                left = seconds / (self._step - done) * (self.steps - self._step)
                yield Progress(self._step, self.steps, loss, held_out, self.best_loss, tokens / seconds, left)
        finally:
            if not self._mid_step:  # an interruption inside a step leaves rows and optimizer at odds
                self.save()

    def held_out_loss(self, with_rows: bool = True) -> float:
        """Nats per learned token of what is held out, with the rows as they are, or without any."""
        total, count = 0.0, 0
        with torch.no_grad():
            batches = self.dataset.batches(self._held, self.batch_tokens, self.settings.n_tokens, "held out")
            for first in range(0, len(batches), processes.count()):
                mine = first + processes.number()
                # Where none is left for this process it looks all the same: the others may need its part of the model.
                loss, learned = self._loss(self.dataset.batch(batches[min(mine, len(batches) - 1)]), with_rows)
                if mine < len(batches):
                    total += float(loss)
                    count += learned
        total, learned_of_all = processes.sums((total, count), _device_of(self._model))
        return total / max(1, learned_of_all)

    def save(self) -> None:
        """Write the checkpoint; of several processes the first does."""
        if not processes.is_first():
            return
        states = self._optimizer.state_dict()["state"]
        now = Checkpoint(
            about=self._about,
            step=self._step,
            parameters=[each.detach().cpu().numpy() for each in self._learning],
            best=self._best,
            best_loss=self.best_loss,
            looks_since_best=self._looks_since_best,
            history=self.history,
            optimizer=[states.get(number, {}) for number in range(len(self._learning))],
            batch_tokens=self.batch_tokens,
        )
        checkpoint.save(now, self.folder)

    def softprompt(self) -> SoftPrompt:
        """The best rows until now (by held-out loss; the last ones where nothing is held out)."""
        best = self._best if self._held else self.rows.in_units()
        looks = [entry for entry in self.history if "held_out" in entry]
        about = {
            "data_sha256": self.dataset.digest,
            "documents": self.dataset.n_documents,
            "tokens": self.dataset.n_tokens,
            "steps": self._step,
            "processes": processes.count(),
            "mixture": self.rows.weights,
            "settings": self.settings.as_json(),
            "loss": self.history[-1].get("loss") if self.history else None,
            "held_out_without": looks[0]["without"] if looks else None,
            "held_out_before": looks[0]["held_out"] if looks else None,
            "held_out_after": self.best_loss,
            "versions": {
                "kobold_sp_plugin": __version__,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
            },
        }
        own = {
            "order": self.settings.order.value,
            "scale": "matrix",
            "fingerprint": self._about["model"],
            "training": about,
        }
        return SoftPrompt(best * np.float32(self.rows.unit), {OWN_KEY: own})

    # One step

    def _one_step(self, batches: Sequence[Tuple[Dataset, Sequence[int]]]) -> "tuple[float, int]":
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * share_of_rate(self._step, self.steps, self.settings)
        self._optimizer.zero_grad(set_to_none=True)
        total, count = 0.0, 0.0
        for dataset, pieces in batches:
            loss, learned = self._loss(dataset.batch(pieces))
            loss.backward()
            total += float(loss.detach())
            count += learned
        gradients = [each.grad for each in self._learning if each.grad is not None]
        processes.add(gradients)
        total, count = processes.sums((total, count), _device_of(self._model))
        # Here, in float32, and not before: divided among all tokens, the gradients of a model in float16 would vanish.
        for gradient in gradients:
            gradient.div_(max(1, count))
        norm = math.hypot(*(float(torch.linalg.vector_norm(gradient)) for gradient in gradients))
        if not math.isfinite(total) or not math.isfinite(norm):
            raise Diverged(
                f"At step {self._step + 1} the loss is {total / max(1, count):.3g} and the gradient's norm {norm:.3g}. "
                "The best rows until then are kept; try a smaller learning rate, or a model in float32 or bfloat16."
            )
        if self.settings.clip and norm > self.settings.clip:
            for gradient in gradients:
                gradient.mul_(self.settings.clip / norm)
        self._mid_step = True
        self._optimizer.step()
        return total / max(1, count), int(count)

    def _loss(self, batch: Batch, with_rows: bool = True) -> "tuple[torch.Tensor, int]":
        """The loss in nats, summed over the learned tokens, and how many there are.

        Without rows the first text token, which the last soft token would predict, is predicted by what stands before
        it where anything does, and else is not counted.
        """
        device = _device_of(self._model)
        start, n_tokens = self._start, self.settings.n_tokens if with_rows else 0
        with self.rows.read_by(self._model, start) if with_rows else nullcontext(0) as soft_id:
            text = torch.as_tensor(batch.ids, device=device)
            soft = text.new_full((len(text), n_tokens), soft_id)
            ids = torch.cat([text[:, :start], soft, text[:, start:]], dim=1)
            labels = np.concatenate(
                [batch.labels[:, :start], np.full((len(text), n_tokens), IGNORED), batch.labels[:, start:]], axis=1
            )
            # The state at a position predicts the token after it.
            here = np.flatnonzero(labels[:, 1:] != IGNORED)
            rows, columns = np.divmod(here, labels.shape[1] - 1)
            at, next_to = (torch.as_tensor(rows * labels.shape[1] + columns + each, device=device) for each in (0, 1))
            wanted = ids.flatten()[next_to]
            if self._parts is None:
                logits = self._model(input_ids=ids, use_cache=False).logits
                picked = logits.flatten(0, 1)[at.to(logits.device)].float()
                loss = torch.nn.functional.cross_entropy(picked, wanted.to(picked.device), reduction="sum")
            else:
                body, head = self._parts
                hidden = body(input_ids=ids, use_cache=False)[0]
                hidden = hidden.flatten(0, 1)[at.to(hidden.device)].to(head.weight.device)
                loss = cross_entropy(head, hidden, wanted.to(hidden.device))
        return loss, len(here)

    # What follows from the settings

    @property
    def _look_every(self) -> int:
        return self.settings.evaluate_every or max(1, self.steps // 12)

    def _default_steps(self) -> int:
        per_epoch = len(self._epoch(0)[1])
        wanted = math.ceil(self.settings.epochs * per_epoch / self._passes)
        return max(1, min(wanted, self.settings.most_steps))

    def _epoch(self, number: int) -> Tuple[Dataset, Sequence[Sequence[int]]]:
        """What is trained on, cut anew for each epoch, and its batches.

        Always cut at the same places, the rows learn by heart what follows them.
        """
        order = f"{self.settings.seed}:{number}"
        dataset = self.dataset.cut_anew(self._pieces, order)
        return dataset, dataset.batches(range(len(dataset)), self.batch_tokens, self.settings.n_tokens, order)

    def _batches(self, skip: int) -> Iterator[Tuple[Dataset, Sequence[int]]]:
        """Batches without end, epoch after epoch, from the ``skip``-th on."""
        number = 0
        while True:
            dataset, batches = self._epoch(number)
            for pieces in batches[skip:]:
                yield dataset, pieces
            skip = max(0, skip - len(batches))
            number += 1

    def _found_batch_tokens(self) -> int:
        """As many tokens as are good for a step; on a GPU no more than fit its memory, found by trial."""
        device = _device_of(self._model).type
        enough = int(self.settings.epochs * self.dataset.n_tokens / _ENOUGH_STEPS)
        most = min(_BATCH_TOKENS.get(device, _BATCH_TOKENS["other"]), max(512, enough))
        if device == "cpu":
            return most
        longest = max(self._pieces, key=self.dataset.length)
        row = self.dataset.length(longest) + self.settings.n_tokens
        if processes.shares(self._model):  # where one of them runs out of memory in a trial, the others wait for ever
            return row
        fitting, count = 0, 1
        while count == 1 or count * row <= most:
            try:
                loss, _ = self._loss(self.dataset.batch([longest] * count))
                loss.backward()
            except torch.cuda.OutOfMemoryError:
                break
            finally:
                self._optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
            fitting, count = count, count * 2
        if not fitting:
            raise NotEnoughMemory(
                f"Not even one text of {row} tokens fits the memory of {_device_of(self._model)}. Try a smaller "
                "--block, --checkpoint-layers, or a smaller or more coarsely quantised model."
            )
        return processes.least(fitting * row, _device_of(self._model))

    def _has_given_up(self) -> bool:
        return bool(self.settings.patience) and self._looks_since_best >= self.settings.patience

    def _note_look(self, held_out: float) -> None:
        if self.best_loss is None or held_out < self.best_loss:
            self.best_loss = held_out
            self._best = self.rows.in_units()
            self._looks_since_best = 0
        else:
            self._looks_since_best += 1

    def _go_on_from(self, found: Checkpoint) -> None:
        self.resumed_at = found.step
        self._step, self._best, self.best_loss = found.step, found.best, found.best_loss
        self._looks_since_best, self.history = found.looks_since_best, found.history
        with torch.no_grad():
            for each, array in zip(self._learning, found.parameters):
                each.copy_(torch.from_numpy(array))
        state = self._optimizer.state_dict()
        state["state"] = {number: each for number, each in enumerate(found.optimizer) if each}
        self._optimizer.load_state_dict(state)


def share_of_rate(step: int, steps: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to ``settings.final``."""
    warmup = max(1, round(settings.warmup * steps)) if settings.warmup else 0
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * done))


def _written(data: Data, tokenizer: Any, settings: Settings, folder: Path, newline: str) -> Dataset:
    """``data`` as tokens in ``folder``; of several processes that share it the first writes."""
    if not processes.is_first():
        processes.wait()
        if (folder / "tokens.json").is_file():
            return Dataset(folder)
    source = _source(data, tokenizer, settings)
    dataset = Dataset.write(_passages(data, tokenizer), tokenizer, folder, settings.block, newline, source)
    if processes.is_first():
        processes.wait()
    return dataset


def _passages(data: Data, tokenizer: Any) -> Iterable[Passage]:
    if isinstance(data, (str, os.PathLike)):
        return passages(Path(data), tokenizer)
    texts = list(data)  # type: ignore[arg-type]
    if not texts:
        raise NoData("There are no texts to learn from.")
    return (passage for text in texts for passage in documents(text))


def _source(data: Data, tokenizer: Any, settings: Settings) -> Optional[str]:
    """A digest of the files, and of what their tokens depend on besides; None where the data are no files."""
    if not isinstance(data, (str, os.PathLike)):
        return None
    words = getattr(tokenizer, "backend_tokenizer", None)
    about = ["runs", words.to_str() if words is not None else sorted(tokenizer.get_vocab().items()), settings.block]
    about += [getattr(tokenizer, "chat_template", None), in_order("&amp;"), tokenizer.eos_token_id]
    digest = hashlib.sha256(repr(about).encode("utf-8", errors="surrogatepass"))
    for file in files_of(Path(data)):
        digest.update(hashlib.sha256(str(file).encode("utf-8", errors="surrogateescape")).digest())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _optimizer(parameters: Sequence[torch.nn.Parameter], settings: Settings) -> Any:
    if settings.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        options = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        return Adafactor(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, **options)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else Muon
    return kind(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def _device_of(model: Any) -> torch.device:
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def _digest(rows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
