"""What an engine does not do of what a request asks for, told instead of passed over."""

from typing import List, Sequence

from . import GREEDY_BELOW, GenerationSettings


def is_drawn(settings: GenerationSettings) -> bool:
    """Whether a token is drawn from several, so that it matters which are left."""
    return min(settings.temperature, settings.top_p) >= GREEDY_BELOW and settings.top_k != 1


def lacking(settings: GenerationSettings, unknown: Sequence[str], engine: str) -> List[str]:
    """A sentence for each of the fields ``unknown`` that would change something in a text; ``engine``: its name."""
    drawn, penalised = is_drawn(settings), settings.rep_pen != 1
    changing = {
        "top_a": drawn and settings.top_a > 0,
        "tfs": drawn and settings.tfs < 1,
        "typical": drawn and settings.typical < 1,
        "rep_pen_range": penalised and settings.rep_pen_range > 0,
        "rep_pen_slope": penalised and settings.rep_pen_slope != 0 and settings.rep_pen_range > 1,
    }
    return [f"{engine} has no {name}; it was left out." for name in unknown if changing[name]]
