"""All that can be told of one soft prompt file, and what a model makes of it."""

import json
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import numpy as np

from . import formats
from .compatibility import Judgement, facts, judge
from .compatibility.matrix import Evidence, Matrix, evidence, lengths_of, nearest, rows_as_in_matrix
from .compatibility.model_facts import matrix_in_folder
from .engines import Engine
from .errors import MissingLibrary, ModelError
from .gguf.reading import is_gguf
from .softprompt import OWN_KEY, SoftPrompt, own_metadata

_MOST_LABELLED = 64
"""Rows that a picture has room to write the nearest token of."""


@dataclass(frozen=True)
class Row:
    """One row of a soft prompt, beside a model."""

    length: float
    """Euclidean, as stored."""
    nearest: Tuple[Tuple[str, float], ...] = ()
    """Tokens in its direction, as text, each with the cosine; the nearest first."""


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found out."""

    filename: str
    header: formats.Header
    softprompt: SoftPrompt = field(repr=False)
    model: str
    judgement: Judgement
    rows: Tuple[Row, ...] = field(repr=False)
    usual: Optional[Tuple[float, float]] = None
    """Between these lengths are nine tenths of the model's tokens; None where its matrix cannot be compared with."""
    hint: Optional[Evidence] = None
    """What the rows say, where no fingerprint tells."""
    effect: Optional[float] = None

    def as_json(self) -> Dict[str, Any]:
        """Everything but the values of the rows."""
        remark = getattr(self.effect, "remark", "")
        return {
            "filename": self.filename,
            "format": self.header.format,
            "name": self.header.name,
            "author": self.header.author,
            "description": self.header.description,
            "supported": self.header.supported,
            "n_tokens": self.header.n_tokens,
            "width": self.header.width,
            "dtype": self.header.dtype,
            "scale": str(self.softprompt.scale),
            "order": str(self.softprompt.order),
            "fingerprint": "fingerprint" in own_metadata(self.softprompt.metadata),
            "metadata": {key: value for key, value in self.softprompt.metadata.items() if key != OWN_KEY},
            "model": self.model,
            "verdict": str(self.judgement.verdict),
            "reason": self.judgement.reason,
            "usable": self.judgement.verdict.usable,
            "hint": None if self.hint is None else {**self.hint._asdict(), "sentence": self.hint.sentence},
            "effect": self.effect,
            "remark": remark,
            "usual_lengths": self.usual,
            "rows": [{"length": row.length, "nearest": [list(each) for each in row.nearest]} for row in self.rows],
        }


def inspect(
    path: Union[str, Path],
    engine: Engine,
    matrix: Optional[Matrix] = None,
    text_of: Callable[[int], str] = str,
    count: int = 3,
    measured: bool = True,
) -> Inspection:
    """Read the file at ``path`` and hold it against the model of ``engine``: its ``matrix``, and its tokens' texts.

    Nearest tokens (``count`` for each row), hint and effect are there where the model can use it; the effect only
    if ``measured``, since that waits for a generation that runs. The engine's selection stays. Raises a
    :class:`~kobold_sp_plugin.errors.FormatError` or :class:`OSError`.
    """
    header, softprompt, known = formats.read_header(path), formats.load(path), engine.facts()
    judgement = judge(softprompt, known)
    lengths = [float(length) for length in lengths_of(softprompt.rows)]
    usable = judgement.verdict.usable
    rows = None
    if matrix is not None and usable and softprompt.width == matrix.width:
        rows = rows_as_in_matrix(softprompt, matrix)
    found: List[Tuple[Tuple[str, float], ...]] = [()] * len(lengths)
    usual = None
    if rows is not None and matrix is not None:
        found = [tuple((text_of(i), cosine) for i, cosine in each) for each in nearest(rows, matrix, count)]
        low, high = np.quantile(matrix.lengths(), (0.05, 0.95))
        usual = (float(low), float(high))
    return Inspection(
        filename=os.path.basename(os.path.normpath(path)),
        header=header,
        softprompt=softprompt,
        model=known.name,
        judgement=judgement,
        rows=tuple(Row(length, each) for length, each in zip(lengths, found)),
        usual=usual,
        hint=evidence(softprompt, matrix) if rows is not None and matrix is not None and _unproven(judgement) else None,
        effect=engine.effect([softprompt]) if usable and measured else None,
    )


def check(path: Union[str, Path], model: Union[str, Path], name: Optional[str] = None) -> Tuple[Judgement, str]:
    """Judge the file at ``path`` for a model that is not loaded: its folder, GGUF file or ``config.json`` alone.

    The second part of the answer is a hint from the rows, where no fingerprint tells and the weights are there,
    else "". Raises a :class:`~kobold_sp_plugin.errors.SoftPromptError` or :class:`OSError`.
    """
    softprompt, known = formats.load(path), facts(model, name)
    judgement = judge(softprompt, known)
    if not _unproven(judgement) or not (Path(model).is_dir() or is_gguf(model)):
        return judgement, ""
    try:
        matrix = matrix_in_folder(model)
        hint = evidence(softprompt, matrix) if matrix.width == softprompt.width else None
    except (MissingLibrary, ModelError, OSError, ValueError) as error:
        return judgement, f"the model's embedding cannot be looked at: {error}"
    return judgement, hint.sentence if hint is not None else ""


def draw(inspection: Inspection, path: Union[str, Path]) -> None:
    """Write one picture of the rows to ``path`` (PNG), in one step: their values, their lengths, the nearest tokens.

    Raises :class:`ImportError` where matplotlib is not installed, or :class:`OSError`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, n_tokens = inspection.softprompt.rows, inspection.softprompt.n_tokens
    labelled = n_tokens <= _MOST_LABELLED
    figure = Figure(figsize=(10, min(14.0, 1.8 + 0.2 * n_tokens)), layout="constrained")
    FigureCanvasAgg(figure)
    values, lengths = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    limit = float(np.quantile(np.abs(rows), 0.99)) or 1.0
    image = values.imshow(rows, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    figure.colorbar(image, ax=values, location="left", shrink=0.8, pad=0.01)
    values.set_xlabel("column")
    values.set_title("values of the rows", fontsize=9)
    lengths.barh(range(n_tokens), [row.length for row in inspection.rows], color="#456990", height=0.7)
    if inspection.usual is not None:
        lengths.axvspan(*inspection.usual, color="#f45b69", alpha=0.25, linewidth=0)
        lengths.set_xlabel("shaded: most tokens")
    lengths.set_title("lengths, nearest tokens", fontsize=9)
    lengths.set_xlim(left=0)
    lengths.yaxis.tick_right()
    if labelled:
        lengths.set_yticks(range(n_tokens), [_label(number, row) for number, row in enumerate(inspection.rows)])
    values.tick_params(axis="y", left=False, labelleft=False)
    lengths.tick_params(axis="y", labelsize=7, left=False, labelleft=False, right=labelled, labelright=labelled)
    figure.suptitle("\n".join(_plain(text) for text in _title(inspection)), fontsize=10, parse_math=False)
    for text in lengths.get_yticklabels():
        text.set_parse_math(False)
    folder, name = os.path.split(os.path.abspath(path))
    sibling = os.path.join(folder, f".{name}-{secrets.token_hex(4)}.tmp")
    try:
        figure.savefig(sibling, format="png", dpi=100)
        os.replace(sibling, path)
    finally:
        if os.path.exists(sibling):
            os.unlink(sibling)


def _unproven(judgement: Judgement) -> bool:
    return judgement.verdict.value == "unproven"


def _title(inspection: Inspection) -> List[str]:
    header = inspection.header
    first = f"{header.name or inspection.filename}: {header.n_tokens} rows of width {header.width}, {header.dtype}"
    effect = "" if inspection.effect is None else f"; moves {inspection.effect:.1%} of the next token's probability"
    return [first, f"{inspection.model}: {inspection.judgement.verdict}{effect}"]


def _label(number: int, row: Row) -> str:
    return _plain(f"{number}  {' '.join(json.dumps(text) for text, _ in row.nearest[:2])}")


def _plain(text: str) -> str:
    """``text`` as matplotlib's own font can draw it: other scripts would be boxes, each with a warning."""
    return "".join(c if c.isprintable() and ord(c) < 0x250 else "\ufffd" for c in text)[:110]
