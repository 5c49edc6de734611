"""From a plan to a soft prompt in its folder, and a report: what ``kobold-sp train`` does."""

import errno
import os
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, Callable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .. import formats
from ..compatibility.matrix import matrix_of, nearest
from ..errors import AlreadyRunning
from ..formats.writing import remove_unfinished
from ..softprompt import OWN_KEY, SoftPrompt
from . import processes
from .loading import load_model
from .places import alone_in
from .preflight import Plan
from .report import Result, write_report
from .samples import openings, samples, written
from .trainer import Progress, Training

REPORT = "report.html"


class Made(NamedTuple):
    """What there is now."""

    output: Path
    report: Path
    result: Result


def make(
    plan: Plan,
    metadata: Mapping[str, Any],
    on_begun: Callable[[Training], None],
    on_progress: Callable[[Progress], None],
    on_sample: Callable[[str], None],
    is_stopped: Callable[[], bool],
    remarks: Sequence[str] = (),
) -> Optional[Made]:
    """Train what is planned, and write the soft prompt, with ``metadata`` and its own, and the report.

    ``on_sample`` gets a text three times on the way. None where ``is_stopped`` ended it after a step: the same plan
    goes on from there. Of several processes each does all of it, and the first one writes.

    Raises a :class:`~kobold_sp_plugin.errors.SoftPromptError` or :class:`OSError`; what was trained until then is kept.
    """
    output, work, _ = plan.places
    with alone_in(work) if processes.is_first() else nullcontext():
        if processes.is_first():
            remove_unfinished(str(work))
        if os.path.lexists(output):
            raise AlreadyRunning(f"{output} is there since a moment ago. Start again for another version.")
        start = [SoftPrompt.load(path) for path in plan.start_from] or None
        model, tokenizer, name = load_model(plan.model, plan.precision, plan.sharded)
        with closing(Training(model, tokenizer, plan.data, plan.settings, work, start)) as training, closing(
            training.run()
        ) as steps:
            on_begun(training)
            beginnings = openings(training.dataset, training.openings_from, tokenizer)
            for progress in steps:
                on_progress(progress)
                if beginnings and _is_time_for_a_sample(progress):
                    text = written(model, tokenizer, [training.softprompt()], beginnings[0], seed=plan.settings.seed)
                    on_sample(beginnings[0] + text)
                asked, *_ = processes.sums((float(is_stopped()),), training.rows.parameter.device)
                if asked and progress.step < progress.steps:
                    return None
            trained = training.softprompt()
            own = {**trained.metadata[OWN_KEY]}
            own["training"] = {**own["training"], "model": metadata.get("model") or name, "precision": plan.precision}
            about = {key: value for key, value in metadata.items() if key != "model"}
            softprompt = SoftPrompt(trained.rows, {**about, OWN_KEY: own})
            result = Result(
                softprompt,
                training.history,
                own["training"]["model"],
                _nearest(model, tokenizer, softprompt.rows),
                samples(model, tokenizer, softprompt, beginnings, plan.settings.seed),
                remarks,
            )
        if processes.is_first():
            # The zip comes last: once it is there, the same command begins the next version.
            write_report(result, work / REPORT)
            _put(softprompt, output, work)
        return Made(output, work / REPORT, result)


def _put(softprompt: SoftPrompt, output: Path, work: Path) -> None:
    """Write the zip in ``work`` and move it: a process that is killed leaves nothing in a folder of soft prompts.

    But where that folder is on another disk, nothing can be moved there in one step: the zip is written there, and a
    process that is killed meanwhile may leave a hidden file beside it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    written = work / "softprompt.zip"
    formats.save(softprompt, written)
    try:
        os.replace(written, output)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        formats.save(softprompt, output)  # the folder is on another disk
        written.unlink()


def _is_time_for_a_sample(progress: Progress) -> bool:
    """After a quarter, a half and three quarters, of trainings that take long enough to wonder."""
    return progress.steps >= 20 and progress.step in {progress.steps * part // 4 for part in (1, 2, 3)}


def _nearest(model: Any, tokenizer: Any, rows: np.ndarray) -> List[List[Tuple[str, float]]]:
    found = nearest(rows, matrix_of(model))
    return [[(tokenizer.decode([number]), cosine) for number, cosine in each] for each in found]
