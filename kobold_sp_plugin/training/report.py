"""One page on a training, in one file that needs no other and no network."""

from html import escape
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..formats.writing import write_file
from ..softprompt import OWN_KEY, SoftPrompt
from .samples import Sample

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 260, 48, 28
_MOST_POINTS = 600
_MOST_ROWS = 100
_STYLE = """
:root{color-scheme:light dark;--ink:#1d2430;--dim:#5b6675;--line:#d6dbe2;--page:#fff;--a:#b3541e;--b:#1f6f8b}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--dim:#9aa5b5;--line:#39424f;--page:#14181e;--a:#f0a068;
--b:#6cc3df}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:760px;margin:2rem auto;
padding:0 1rem}
h1{margin-bottom:.2rem}h2{margin-top:2.2rem;font-size:1.15rem}p.answer{font-size:1.1rem}.dim{color:var(--dim)}
table{border-collapse:collapse;width:100%}td,th{padding:.25rem .6rem .25rem 0;border-bottom:1px solid var(--line);
text-align:left;vertical-align:top;overflow-wrap:anywhere}td:first-child,th:first-child{overflow-wrap:normal}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem;margin:1rem 0}
.pair p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
@media (max-width:560px){.pair{grid-template-columns:1fr}}
svg{width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--dim)}
code{background:color-mix(in srgb,var(--line) 45%,transparent);padding:0 .25em;border-radius:3px}
"""


class Result(NamedTuple):
    """What became of a training."""

    softprompt: SoftPrompt
    history: Sequence[Mapping[str, float]]
    model: str
    nearest: Sequence[Sequence[Tuple[str, float]]] = ()
    """For each row, the tokens nearest to it, each with the cosine."""
    samples: Sequence[Sample] = ()
    remarks: Sequence[str] = ()

    @property
    def about(self) -> Mapping[str, Any]:
        """What the soft prompt's metadata say of its training."""
        about: Mapping[str, Any] = self.softprompt.metadata[OWN_KEY]["training"]
        return about

    @property
    def helps(self) -> Optional[bool]:
        """Whether texts that it has not seen are likelier with the soft prompt; None where nothing was held out."""
        about = self.about
        if about["held_out_after"] is None:
            return None
        return bool(about["held_out_after"] < about["held_out_without"])

    @property
    def sentence(self) -> str:
        """The answer, for a user."""
        about = self.about
        if self.helps is None:
            return "Nothing was held out, so nothing tells whether this soft prompt helps with texts it has not seen."
        without, after = about["held_out_without"], about["held_out_after"]
        numbers = f"the loss on texts held out is {after:.4f} nats per token, without it {without:.4f}"
        if self.helps:
            return f"This soft prompt helps: {numbers} ({1 - after / without:.1%} less)."
        return (
            f"This soft prompt does not help: {numbers}. More steps, more and cleaner data on one theme, or another "
            "seed may change that."
        )


def write_report(result: Result, path: Path) -> None:
    """Write the page to ``path``, in one step; below 200 kB."""
    write_file(str(path), page(result).encode("utf-8", errors="replace"))


def page(result: Result) -> str:
    """The page; whatever comes from files, models and users is escaped."""
    softprompt, about = result.softprompt, result.about
    name = softprompt.name or "A soft prompt"
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width,initial-scale=1">',
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{_text(name)}: training</title><style>{_STYLE}</style>",
        f"<h1>{_text(name)}</h1><p class=dim>{_text(softprompt.description)}</p>",
        f"<p class=answer>{_text(result.sentence)}</p>",
        *(f"<p class=dim>{_text(remark)}</p>" for remark in result.remarks),
        "<h2>Loss</h2>",
        _curves(result.history, about["held_out_without"]),
        _table(
            ("held-out loss, nats per token", ""),
            [
                ("without a soft prompt", _number(about["held_out_without"])),
                ("with its rows as they began", _number(about["held_out_before"])),
                ("with its best rows", _number(about["held_out_after"])),
            ],
        ),
    ]
    if result.samples:
        parts.append("<h2>From the same openings and seeds</h2>")
        for sample in result.samples:
            parts.append(
                f"<p><strong>{_text(sample.opening[:300])}</strong></p><div class=pair>"
                f"<div><span class=dim>with</span><p>{_text(sample.having[:2000].strip())}</p></div>"
                f"<div><span class=dim>without</span><p>{_text(sample.without[:2000].strip())}</p></div></div>"
            )
    if result.nearest:
        parts.append("<h2>Tokens nearest to its rows</h2>")
        rows = [
            (str(number), ", ".join(f"{token[:40]!r} {cosine:.2f}" for token, cosine in near))
            for number, near in enumerate(result.nearest[:_MOST_ROWS])
        ]
        parts.append(_table(("row", "tokens, and the cosine"), rows, first_is_number=True))
    settings = [(key.replace("_", " "), str(value)) for key, value in about["settings"].items()]
    facts = [
        ("model", result.model),
        ("rows", f"{softprompt.n_tokens} of width {softprompt.width}"),
        ("steps done", str(about["steps"])),
        ("documents", str(about["documents"])),
        ("tokens", str(about["tokens"])),
        ("data, SHA-256 of its tokens", about["data_sha256"]),
        *((key, str(value)) for key, value in about["versions"].items()),
    ]
    parts += ["<h2>What it was made of</h2>", _table(("", ""), facts), "<h2>Settings</h2>", _table(("", ""), settings)]
    return "\n".join(parts) + "</html>\n"


def _curves(history: Sequence[Mapping[str, float]], without: Optional[float]) -> str:
    """An SVG: the loss of each step, faint, and its mean; the held-out loss, with dots, and without a soft prompt.

    Its height is for the means and the held-out loss: single steps, of easy and of hard texts, would dwarf these.
    """
    losses = [(each["step"], each["loss"]) for each in history if "loss" in each]
    held = [(each["step"], each["held_out"]) for each in history if "held_out" in each]
    losses = _thinned(losses)
    if not losses:
        return "<p class=dim>No step was done.</p>"
    means = _means(losses, -(-len(losses) // 20))
    values = [value for _, value in means + held] + ([without] if without is not None else [])
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or 0.1
    low, high = low - margin, high + margin
    last = max(step for step, _ in losses + held) or 1

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 12) * step / last

    def y(value: float) -> float:
        return (_HEIGHT - _BOTTOM) * min(1.0, max(0.0, (high - value) / (high - low)))

    def line(points: Sequence[Tuple[float, float]]) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="Loss by step">']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + (high - low) * (0.05 + 0.9 * share)
        parts.append(
            f'<line x1={_LEFT} x2={_WIDTH} y1={y(value):.1f} y2={y(value):.1f} stroke="var(--line)" />'
            f"<text x={_LEFT - 6} y={y(value) + 4:.1f} text-anchor=end>{value:.2f}</text>"
        )
        step = round(last * share)
        anchor = "end" if share == 1.0 else "middle"
        parts.append(f"<text x={x(step):.1f} y={_HEIGHT - 8} text-anchor={anchor}>{step}</text>")
    if without is not None:
        parts.append(
            f'<line x1={_LEFT} x2={_WIDTH} y1={y(without):.1f} y2={y(without):.1f} stroke="var(--dim)" '
            f'stroke-dasharray="6 4" />'
        )
    parts.append(f'<polyline points="{line(losses)}" fill=none stroke="var(--b)" stroke-opacity=.25 />')
    parts.append(f'<polyline points="{line(means)}" fill=none stroke="var(--b)" />')
    parts.append(f'<polyline points="{line(held)}" fill=none stroke="var(--a)" stroke-width=2 />')
    parts += [f'<circle cx={x(step):.1f} cy={y(value):.1f} r=3 fill="var(--a)" />' for step, value in held]
    parts.append("</svg>")
    legend = "<p class=dim><span style='color:var(--b)'>&#9644;</span> training, and its mean "
    legend += "<span style='color:var(--a)'>&#9679;</span> held out" if held else ""
    legend += " <span>- -</span> held out, without a soft prompt" if without is not None else ""
    return "".join(parts) + legend + "</p>"


def _means(points: List[Tuple[float, float]], count: int) -> List[Tuple[float, float]]:
    """At each point the mean of the last ``count``."""
    values = [value for _, value in points]
    parts = [values[max(0, number - count) : number] for number in range(1, len(points) + 1)]
    return [(step, sum(part) / len(part)) for (step, _), part in zip(points, parts)]


def _thinned(points: List[Tuple[float, float]]) -> List[Tuple[float, float]]:
    """At most ``_MOST_POINTS``: means of neighbours."""
    size = -(-len(points) // _MOST_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _table(head: Tuple[str, str], rows: Sequence[Tuple[str, str]], first_is_number: bool = False) -> str:
    mark = " class=n" if first_is_number else ""
    top = f"<tr><th{mark}>{_text(head[0])}</th><th>{_text(head[1])}</th></tr>" if any(head) else ""
    body = "".join(f"<tr><td{mark}>{_text(left)}</td><td>{_text(right[:2000])}</td></tr>" for left, right in rows)
    return f"<table>{top}{body}</table>"


def _number(value: Optional[float]) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _text(text: str) -> str:
    return escape("".join(each if each.isprintable() or each == "\n" else "\ufffd" for each in text))
