"""What a training is asked for: numbers with defaults that work."""

from dataclasses import asdict, dataclass
from typing import Any, Dict, Optional

from ..errors import BadSetting
from ..softprompt import Order


@dataclass(frozen=True)
class Settings:
    """Of one training; raises :class:`BadSetting`, which names the setting, for a value that cannot be."""

    n_tokens: int = 20
    """Rows of the soft prompt. More than about twenty seldom help, and each is a token less of story."""
    steps: Optional[int] = None
    """Optimizer steps; None: ``epochs`` over the data, but no more than ``most_steps``."""
    epochs: float = 3.0
    most_steps: int = 2000
    learning_rate: float = 0.1
    """In units of the embedding matrix's root mean square, so that one value fits all models."""
    optimizer: str = "muon"
    """"muon", "adamw" or "adafactor"."""
    weight_decay: float = 0.0
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises."""
    final: float = 0.05
    """What the cosine ends at, as a share of ``learning_rate``."""
    clip: float = 1.0
    """Largest norm of the gradient, with the rows in units of the matrix's root mean square; 0: none."""
    block: int = 256
    """Longest text that is read at once, in tokens."""
    batch_tokens: Optional[int] = None
    """Tokens of one forward pass, soft tokens included; None: found by trial."""
    accumulate: int = 1
    """Forward passes of one step."""
    checkpoint_layers: bool = False
    """Gradient checkpointing: less memory, a third more time."""
    initial: str = "text"
    """What the rows begin as: "text" (of the data, or ``initial_text``, repeated), "vocabulary" (sampled), or "words":
    one row for each word of ``initial_text``, parted by commas or line ends, the mean of its tokens; the other rows are
    sampled."""
    initial_text: str = ""
    order: Order = Order.BEFORE_BOS
    held_out: float = 0.05
    """Share of the documents that is kept from training."""
    evaluate_every: Optional[int] = None
    """Steps between two looks at the held-out loss; None: twelve in all."""
    patience: int = 10
    """Looks without a better held-out loss after which training ends; 0: never. Nearly all that there are: while the
    rate is high the loss goes up and down, and as the rate falls so does the loss. The best rows are kept anyway."""
    save_every: int = 50
    """Steps between two checkpoints."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise BadSetting(f"{name} is {value}; it has to be between {least} and {most}")
        for name, choices in (
            ("optimizer", ("muon", "adamw", "adafactor")),
            ("initial", ("text", "vocabulary", "words")),
        ):
            if getattr(self, name) not in choices:
                raise BadSetting(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if self.initial == "words" and not self.initial_text.replace(",", "").strip():
            raise BadSetting(
                'initial is "words", and there are none: give initial_text (--initial-text), "rain, city, night"'
            )
        if self.initial == "vocabulary" and self.initial_text.strip():
            raise BadSetting(
                'initial is "vocabulary", and then initial_text (--initial-text) has no part in it: give one of the two'
            )

    def as_json(self) -> Dict[str, Any]:
        """Every setting, for the metadata of the soft prompt and for a checkpoint."""
        return {**asdict(self), "order": self.order.value}


_RANGES = (
    ("n_tokens", 1, 2047),
    ("steps", 1, 10**7),
    ("epochs", 0.01, 10**4),
    ("most_steps", 1, 10**7),
    ("learning_rate", 1e-6, 100.0),
    ("weight_decay", 0.0, 1.0),
    ("warmup", 0.0, 0.9),
    ("final", 0.0, 1.0),
    ("clip", 0.0, 10**6),
    ("block", 8, 2**20),
    ("batch_tokens", 8, 2**24),
    ("accumulate", 1, 4096),
    ("held_out", 0.0, 0.5),
    ("evaluate_every", 1, 10**7),
    ("patience", 0, 10**6),
    ("save_every", 1, 10**7),
)
