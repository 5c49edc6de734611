"""For users of the Hugging Face ``Trainer``: a model whose one parameter is the soft prompt.

::

    model = TrainableSoftPrompt(causal_model, tokenizer, n_tokens=20)
    Trainer(model=model, args=arguments, train_dataset=dataset).train()
    model.softprompt({"name": "Noir"}).save("noir.zip")

Its checkpoints hold the rows and not the model.
"""

from typing import Any, Dict, Mapping, Optional

import numpy as np
import torch

from ..compatibility import fingerprint
from ..errors import BadSetting, UnsupportedCall
from ..softprompt import OWN_KEY, Order, Scale, SoftPrompt
from .initial import rows_of
from .trainable import TrainableRows, matrix_rows


class TrainableSoftPrompt(torch.nn.Module):
    """A causal model with rows that learn before its text; ``model`` is frozen, in place, and stays where it is.

    ``model`` is no submodule: it is neither moved, nor saved, nor seen by an optimizer, nor put into training mode.
    It has to be on its device already. :attr:`soft_rows` is the one parameter, float32 ``[n_tokens, width]``, in
    units of the embedding matrix's root mean square; a learning rate of about 0.3 suits most models.

    The rows begin as those of ``start_from``, else as the embedded words of ``initial_text``, else as sampled rows of
    the vocabulary. Raises :class:`BadSetting`, :class:`WidthMismatch`, :class:`UnknownScale` or a
    :class:`~kobold_sp_plugin.errors.ModelError`.
    """

    accepts_loss_kwargs = True  # so that Trainer says over how many tokens of several batches a loss is a mean

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        n_tokens: int = 20,
        initial_text: str = "",
        start_from: Optional[SoftPrompt] = None,
        order: Order = Order.BEFORE_BOS,
        seed: int = 0,
    ):
        super().__init__()
        if not 1 <= n_tokens <= 2047:
            raise BadSetting(f"n_tokens is {n_tokens}; it has to be between 1 and 2047")
        if initial_text and tokenizer is None:
            raise BadSetting("initial_text needs a tokenizer")
        model.requires_grad_(False)
        model.eval()
        self._base = (model,)  # in a tuple, torch does not take it for a submodule
        rows = _rows(model, tokenizer, n_tokens, initial_text, start_from, seed)
        learning = TrainableRows(model, rows)
        self._rows = (learning,)
        self.soft_rows = learning.parameter
        self._order = order

    def _apply(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        applied = super()._apply(function, *args, **kwargs)
        self._rows[0].parameter = self.soft_rows  # moving may have made another tensor of it
        return applied

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.soft_rows.device

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        labels: Optional[torch.Tensor] = None,
        num_items_in_batch: Optional[Any] = None,
    ) -> Dict[str, torch.Tensor]:
        """Give "logits" ``[batch, length, vocabulary]`` of the text, and "loss", a mean in nats, if there are labels.

        ``labels``: as the model itself has them, -100 where nothing is learned. The first text token is predicted by
        the last soft token. Padding has to stand on the right. Raises :class:`UnsupportedCall`.
        """
        model, learning = self._base[0], self._rows[0]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if bool((mask[:, 0] == 0).any()):
            raise UnsupportedCall('texts padded on the left; set tokenizer.padding_side = "right"')
        start = 1 if self._order is Order.AFTER_BOS else 0
        n_tokens = learning.n_tokens
        with learning.read_by(model, start) as soft_id:
            soft = input_ids.new_full((len(input_ids), n_tokens), soft_id)
            ids = torch.cat([input_ids[:, :start], soft, input_ids[:, start:]], dim=1)
            whole = torch.cat([mask[:, :start], mask.new_ones(soft.shape), mask[:, start:]], dim=1)
            device = model.get_input_embeddings().weight.device
            logits = model(input_ids=ids.to(device), attention_mask=whole.to(device), use_cache=False).logits
        at = [*range(start), *range(start + n_tokens, ids.shape[1])]
        text = logits[:, at]
        if labels is None:
            return {"logits": text}
        before = logits[:, start + n_tokens - 1 : -1].flatten(0, 1).float()
        wanted = labels[:, start:].to(before.device).flatten()
        total = torch.nn.functional.cross_entropy(before, wanted, reduction="sum")
        count = (wanted != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / torch.as_tensor(count, device=total.device), "logits": text}

    def softprompt(self, metadata: Optional[Mapping[str, Any]] = None) -> SoftPrompt:
        """The rows as they are now, with ``metadata`` and the model's fingerprint."""
        own = {
            "order": self._order.value,
            "scale": Scale.MATRIX.value,
            "fingerprint": fingerprint(self._base[0]),
        }
        return SoftPrompt(self._rows[0].rows, {**(metadata or {}), OWN_KEY: own})

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: what ``Trainer`` would switch on has no effect on a model in evaluation mode."""
        raise BadSetting("gradient_checkpointing is for models in training mode; use kobold_sp_plugin.training.train")


def _rows(
    model: Any, tokenizer: Any, n_tokens: int, initial_text: str, start_from: Optional[SoftPrompt], seed: int
) -> np.ndarray:
    embedding = model.get_input_embeddings()
    if start_from is not None:
        return rows_of(start_from, model, n_tokens)
    if initial_text:
        ids = tokenizer(initial_text, add_special_tokens=False)["input_ids"]
        return matrix_rows(embedding, np.resize(np.asarray(ids), n_tokens))
    count = int(embedding.weight.shape[0])
    return matrix_rows(embedding, np.random.default_rng(seed).choice(min(5000, count), n_tokens))
