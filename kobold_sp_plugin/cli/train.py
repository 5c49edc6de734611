"""``kobold-sp train``."""

import errno
import json
import logging
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple

import click

from .common import WrongUse, line

_LINE_SECONDS = 10.0
"""How often a progress line is written where there is no terminal to redraw one in."""
_FORMAT = re.compile(r"\.([a-z]\w{0,6}|safetensors)", re.IGNORECASE)
"""What ends a file's name; a folder may be "St. Petersburg" or "Noir v1.5"."""
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


@click.command()
@click.option("--data", metavar="FOLDER", required=True, type=click.Path(path_type=Path), help="Texts; or one file.")
@click.option("--name", metavar="NAME", required=True, help="What the soft prompt is called, and its file.")
@click.option("--model", metavar="PATH", help="A folder, or a name on the hub. [default: the demonstration model]")
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The zip, or its folder. [default: ./softprompts/NAME.zip; a number is added to a name that is taken]",
)
@click.option("--epochs", type=float, help="How often it goes over the data. [default: 3, and at most 2000 steps]")
@click.option("--steps", type=int, help="Optimizer steps, instead of --epochs.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same rows.")
@click.option("--tokens", type=int, help="Rows of the soft prompt. [default: 20, or those of --from]")
@click.option("--learning-rate", type=float, help="In units of the embedding's root mean square. [default: 0.1]")
@click.option("--optimizer", type=click.Choice(["muon", "adamw", "adafactor"]), help="[default: muon]")
@click.option(
    "--order",
    type=click.Choice(["before_bos", "after_bos"]),
    help="Where its rows stand, also when it is served. [default: before_bos, as in KoboldAI, or that of --from]",
)
@click.option(
    "--initial-text", metavar="TEXT", default="", help="What the rows begin as, or @FILE. [default: words of the data]"
)
@click.option(
    "--initial",
    type=click.Choice(["text", "vocabulary", "words"]),
    help='Or sampled vocabulary; or words, of --initial-text "rain, city, night", one for each row. [default: text]',
)
@click.option(
    "--from",
    "start_from",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A soft prompt, or .mtjsp, to start from; of several a mixture is trained.",
)
@click.option("--block", type=int, help="Longest text that is read at once, in tokens. [default: 256]")
@click.option("--batch-tokens", type=int, help="Tokens of one forward pass. [default: found by trial]")
@click.option("--accumulate", type=int, default=1, show_default=True, help="Forward passes of one step.")
@click.option("--checkpoint-layers", is_flag=True, help="Less memory, a third more time.")
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16", "8bit", "4bit"]),
    help="What the model is loaded in; the soft prompt is trained in float32 anyway.",
)
@click.option("--sharded", is_flag=True, help="Spread a model that is too large for one GPU over all.")
@click.option("--author", default="", help="For the menu, as are the next two.")
@click.option("--description", default="")
@click.option("--supported", default="", help="The models it is for, separated by commas. [default: the model's name]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--json-lines", "as_lines", is_flag=True, help="Print a line of JSON for each step, for programs.")
def train(as_lines: bool, **given: Any) -> None:
    """Train a soft prompt on the texts in FOLDER, and put it into the folder of soft prompts.

    Texts are .txt files in any encoding (documents apart at <|endoftext|>), .jsonl with "text", "prompt" and
    "completion", or "messages", and World Info files. What can be told to be wrong is told before anything begins.
    An interruption, even a power cut, loses a minute at most: the same command goes on from there. Beside the folder
    of soft prompts, in training/NAME, are the checkpoint and a report with curves and samples.

    Exit status 1: the soft prompt does not help with texts that were held out, or training was interrupted.

    On several GPUs, or with several processes on one machine: `accelerate launch -m kobold_sp_plugin.cli train ...`,
    with --sharded where no one of them can hold the model.

    \b
    Example:
      kobold-sp train --data ./texts --name Noir --model ./my-model
    """
    from ..training import processes

    processes.join()
    try:
        with (_Lines() if as_lines else _Shown()) if processes.is_first() else _Silent() as shown:
            _train(shown, **given)
    except WrongUse as error:
        if not processes.is_first():
            sys.exit(error.exit_code)  # the first one says it
        if as_lines:
            click.echo(json.dumps({"event": "error", "message": error.message}))
        raise
    finally:
        processes.leave()


def _train(
    shown: "_Shown",
    data: Path,
    name: str,
    model: Optional[str],
    output: Optional[Path],
    tokens: Optional[int],
    initial_text: str,
    start_from: Tuple[Path, ...],
    block: Optional[int],
    epochs: Optional[float],
    order: Optional[str],
    precision: str,
    sharded: bool,
    author: str,
    description: str,
    supported: str,
    as_json: bool,
    **settings: Any,
) -> None:
    from ..demonstration import MODEL
    from ..errors import SoftPromptError, TrainingError
    from ..softprompt import Order
    from ..training.making import make
    from ..training.places import filename, of_version, places
    from ..training.preflight import Plan, facts_of, look

    path = model or str(MODEL)
    known = facts_of(path)
    context = known.context if known is not None else None
    file = f"{filename(name) or 'unnamed'}.zip"
    if output is not None and (output.is_dir() or not _FORMAT.fullmatch(output.suffix)):
        output = output / file
    if start_from and (initial_text or settings.get("initial")):
        raise WrongUse("--from says what the rows begin as: leave out --initial and --initial-text, or --from.")
    try:
        start_settings = _of_start(start_from)
        n_tokens = tokens or start_settings.get("n_tokens", 20)
        plan = Plan(
            name=name,
            data=data,
            model=path,
            places=places(output or Path("softprompts") / file),
            settings=_settings(
                n_tokens=n_tokens,
                initial_text=_text(initial_text),
                block=block or max(8, min(256, (context or 10**6) - n_tokens)),
                order=Order(order) if order else start_settings.get("order"),
                epochs=epochs,
                most_steps=10**7 if epochs else None,  # which were asked for
                **settings,
            ),
            precision=precision,
            start_from=start_from,
            sharded=sharded,
        )
    except TrainingError as error:
        raise WrongUse(line(str(error))) from error
    _quiet()
    found = look(plan)
    if output is not None and output.suffix.lower() != ".zip":
        found.problems.append(
            f"The soft prompt is written as a zip, and {output.name} is named otherwise: "
            f'--output "{output.with_suffix(".zip")}". `kobold-sp convert` makes other formats of it.'
        )
    if found.problems:
        raise WrongUse("\n".join(["This training cannot be:", *(f"  - {line(each)}" for each in found.problems)]))
    shown.remarks(found.remarks)
    model_name = "demonstration" if model is None else (Path(model).name if Path(model).is_dir() else model)
    title = of_version(name, plan.places.version, " v")  # a menu shows names, and two alike could not be told apart
    metadata = {"name": title, "model": model_name, "supported": _parts(supported) or [model_name]}
    metadata.update({key: text for key, text in (("author", author), ("description", description)) if text})
    try:
        with _interruptible(shown) as is_stopped:
            made = make(plan, metadata, shown.begun, shown.progress, shown.sample, is_stopped, found.remarks)
    except TrainingError as error:
        raise WrongUse(line(str(error))) from error
    except (SoftPromptError, OSError) as error:
        why = line(str(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            why = f"the disk of {line(str(_full_folder(error, plan.places)))} is full. Make room on it"
        raise WrongUse(f"Training stopped: {why}. The same command goes on from where it was.") from error
    except KeyboardInterrupt:
        shown.ended_at_once()
        sys.exit(1)
    if made is None:
        shown.interrupted()
        sys.exit(1)
    shown.done(made, as_json)
    if made.result.helps is False:
        sys.exit(1)


class _Shown:
    """Progress for a person: a bar in a terminal, else a line now and then; all of it on standard error."""

    def __init__(self) -> None:
        self.step = 0
        self.has_begun = False
        self.resumed_at: Optional[int] = None
        self._bar: Any = None
        self._last = 0.0
        self._held: Optional[float] = None

    def __enter__(self) -> "_Shown":
        return self

    def __exit__(self, *exception: object) -> None:
        self._close_bar()

    def remarks(self, remarks: Sequence[str]) -> None:
        """Say what is good to know."""
        for remark in remarks:
            _tell(line(remark))

    def begun(self, training: Any) -> None:
        """Say what begins, or from where it goes on."""
        self.has_begun, self.step, self.resumed_at = True, training.step, training.resumed_at
        if self.resumed_at is not None:
            _tell(f"Going on from step {self.resumed_at} of {training.steps}.")
        data = training.dataset
        _tell(
            f"{data.n_documents} documents, {data.n_tokens} tokens; {training.steps} steps of {training.batch_tokens}."
        )
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=training.steps, initial=training.step, unit="step", dynamic_ncols=True)

    def progress(self, progress: Any) -> None:
        """Show a step."""
        self.step = progress.step
        self._held = self._held if progress.held_out is None else progress.held_out
        held = "" if self._held is None else f", held out {self._held:.4f}"
        told = f"loss {progress.loss:.4f}{held}, {progress.tokens_per_second:.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(told, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last > _LINE_SECONDS or progress.step == progress.steps:
            self._last = time.monotonic()
            minutes, seconds = divmod(round(progress.seconds_left), 60)
            _tell(f"step {progress.step} of {progress.steps}: {told}, {minutes}:{seconds:02d} left")

    def sample(self, text: str) -> None:
        """Show what the model writes by now."""
        told = "\n".join(f"    {line(part)}" for part in text.strip().split("\n"))
        if self._bar is not None:
            self._bar.write(told, file=sys.stderr)
        else:
            _tell(told)

    def interrupted(self) -> None:
        """Say that it was."""
        self._close_bar()
        _tell(f"Interrupted at step {self.step}; saved. The same command goes on from there.")

    def ended_at_once(self) -> None:
        """Say that it was interrupted, and not at the end of a step."""
        self._close_bar()
        _tell("Ended. The same command goes on from the last checkpoint, if there was one.")

    def done(self, made: Any, as_json: bool) -> None:
        """Print the answer, on standard output."""
        self._close_bar()
        if as_json:
            click.echo(json.dumps(_answer(made, self.resumed_at), indent=2))
        else:
            click.echo(line(made.result.sentence))
            click.echo(f"Soft prompt: {line(str(made.output))}")
            click.echo(f"Report: {line(str(made.report))}")

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Lines(_Shown):
    """Progress for a program: a line of JSON for each thing that happens, on standard output."""

    def remarks(self, remarks: Sequence[str]) -> None:
        self._remarks = list(remarks)

    def begun(self, training: Any) -> None:
        self.has_begun, self.step, self.resumed_at = True, training.step, training.resumed_at
        data = training.dataset
        counts = {"step": training.step, "steps": training.steps, "resumed_at": training.resumed_at}
        counts.update(documents=data.n_documents, tokens=data.n_tokens)
        self._say("begun", **counts, remarks=self._remarks)

    def progress(self, progress: Any) -> None:
        self.step = progress.step
        self._say("step", **progress._asdict())

    def sample(self, text: str) -> None:
        self._say("sample", text=text)

    def interrupted(self) -> None:
        self._say("interrupted", step=self.step)

    def ended_at_once(self) -> None:
        pass  # which step is saved is not known here; the exit status tells

    def done(self, made: Any, as_json: bool) -> None:
        self._say("done", sentence=made.result.sentence, **_answer(made, self.resumed_at))

    def _say(self, event: str, **facts: Any) -> None:
        click.echo(json.dumps({"event": event, **facts}))


class _Silent(_Lines):
    """Nothing, of all processes but the first."""

    def _say(self, event: str, **facts: Any) -> None:
        pass


def _answer(made: Any, resumed_at: Optional[int]) -> Dict[str, Any]:
    about = made.result.about
    numbers = {key: about[key] for key in ("steps", "held_out_without", "held_out_before", "held_out_after")}
    files = {"softprompt": str(made.output), "report": str(made.report), "resumed_at": resumed_at}
    return {**files, **numbers, "helps": made.result.helps}


@contextmanager
def _interruptible(shown: _Shown) -> Iterator[Callable[[], bool]]:
    """Ctrl-C, or a request to end, lets the step end first; a second one, or one before training begins, does not wait.

    Yields what tells.
    """
    from ..training import processes

    stopped = threading.Event()

    def stop(number: int, frame: Any) -> None:
        # What starts several processes tells each of them twice.
        if processes.count() == 1 and (stopped.is_set() or not shown.has_begun):
            raise KeyboardInterrupt
        if processes.is_first() and not stopped.is_set():
            _tell("Ending after this step ..." + " (again: at once)" * (processes.count() == 1))
        stopped.set()

    if threading.current_thread() is not threading.main_thread():
        yield stopped.is_set
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _full_folder(error: OSError, places: Any) -> Path:
    """A folder on the disk that is full: an error from writing, and not from opening, names no file."""
    if isinstance(error.filename, str):
        return Path(error.filename).parent
    folders = [folder for folder in (places.work, places.output.parent) if folder.is_dir()]
    return min(folders or [places.work], key=lambda folder: shutil.disk_usage(folder).free)


def _settings(**given: Any) -> Any:
    from ..training.settings import Settings

    return Settings(**{key: value for key, value in given.items() if value is not None})


def _of_start(start_from: Tuple[Path, ...]) -> Any:
    """Rows and order of the first soft prompt to start from; {} where there is none, or it cannot be read."""
    from ..errors import FormatError
    from ..formats import read_header

    if not start_from:
        return {}
    try:
        header = read_header(start_from[0])
    except (FormatError, OSError):
        return {}  # the look at everything says so, with the rest
    return {"n_tokens": header.n_tokens, "order": header.order}


def _text(given: str) -> str:
    """A text, or that of the file that it names with @."""
    if not given.startswith("@"):
        return given
    from ..training.texts import decoded

    try:
        return decoded(Path(given[1:]).read_bytes()).text
    except OSError as error:
        raise WrongUse(f"--initial-text {line(given)}: {error.strerror or error}.") from error


def _parts(text: str) -> Tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _quiet() -> None:
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says at every layer of every step that it casts


def _tell(text: str) -> None:
    click.echo(text, err=True)
