"""vLLM in this process: soft prompts stand in the ids of a prompt, and go to the engine as rows beside them."""

import math
import threading
import uuid
from typing import Any, Dict, Generator, Iterator, List, Optional, Sequence, Tuple

import torch

from ..errors import UnsupportedModel
from ..soft_tokens.text import runs_of, without_soft_tokens
from ..softprompt import Order, SoftPrompt
from . import Ending, GenerationSettings
from .vllm import lacking_in_vllm, sampling
from .vllm_model import TOP, VllmModel


class VllmInProcess(VllmModel):
    """Generates with an ``LLM`` that was made with ``enable_prompt_embeds=True``, one text at a time.

    Raises :class:`UnsupportedModel` for one that was not.
    """

    def __init__(self, llm: Any):
        self._engine = llm.llm_engine
        config = self._engine.model_config
        if not getattr(config, "enable_prompt_embeds", False):
            raise UnsupportedModel("this LLM takes no soft prompts: make it with LLM(..., enable_prompt_embeds=True)")
        super().__init__(str(config.model), config.hf_config, llm.get_tokenizer(), config.max_model_len)
        self._placeholder = int(config.get_vocab_size())
        self._one_at_a_time = threading.Lock()

    def _next_tokens(self, probe: str, softprompts: Sequence[SoftPrompt]) -> Dict[str, float]:
        """Probabilities of the likeliest next tokens."""
        body = {"max_tokens": 1, "temperature": 0, "logprobs": TOP}
        prompt = self._prompt(self._reader.ids(probe), softprompts)
        for output in self._outputs(prompt, body, threading.Event()):
            return {str(token): math.exp(each.logprob) for token, each in output.logprobs[0].items()}
        return {}

    def generate(
        self,
        settings: GenerationSettings,
        softprompts: Optional[Sequence[SoftPrompt]] = None,
        stop: Optional[threading.Event] = None,
    ) -> Generator[str, None, Ending]:
        """Text, piece by piece, with these soft prompts in place of the selection unless None.

        Closing the iterator or setting ``stop`` ends it within one token. Samplers as :meth:`VllmServer.generate`
        has them. Soft prompts that stand in the text itself (:class:`TaggedText`) are read there. Raises
        :class:`ContextExceeded`.
        """
        settings, chosen, ids = self._fitted(settings, self._selected if softprompts is None else softprompts)
        n_text = len(without_soft_tokens(ids))
        return self._pieces(self._prompt(ids, chosen), n_text, settings, stop or threading.Event())

    def lacking(self, settings: GenerationSettings) -> Tuple[str, ...]:
        """What of these settings vLLM does not do, or does in its own way: a sentence each."""
        return tuple(lacking_in_vllm(settings))

    def _pieces(
        self, prompt: Dict[str, Any], n_text: int, settings: GenerationSettings, stop: threading.Event
    ) -> Generator[str, None, Ending]:
        body = sampling(settings, self._banned(settings))
        body["logit_bias"] = {int(token): bias for token, bias in body.get("logit_bias", {}).items()} or None
        n_new, reason = 0, "stop"
        for output in self._outputs(prompt, body, stop):
            n_new += len(output.token_ids)
            reason = output.finish_reason or reason
            if output.text:
                yield output.text
        return Ending("length" if reason == "length" and not stop.is_set() else "stop", n_text, n_new)

    def _outputs(self, prompt: Dict[str, Any], body: Dict[str, Any], stop: threading.Event) -> Iterator[Any]:
        """What the engine says after each of its steps."""
        from vllm import SamplingParams  # not at the top: it is an engine's own library
        from vllm.sampling_params import RequestOutputKind

        request = f"kobold-sp-{uuid.uuid4()}"
        with self._one_at_a_time:
            self._engine.add_request(
                request, prompt, SamplingParams(**body, output_kind=RequestOutputKind.DELTA, detokenize=True)
            )
            finished = False
            try:
                while not finished and not stop.is_set():
                    for output in self._engine.step():
                        if output.request_id.startswith(request):
                            finished = output.finished
                            yield output.outputs[0]
            finally:
                if not finished:
                    self._engine.abort_request([request])

    def _prompt(self, ids: List[int], softprompts: Sequence[SoftPrompt]) -> Dict[str, Any]:
        """Ids and rows of one prompt. What stands for a soft token is an id that no text has.

        The prefix cache of vLLM goes by ids and rows, and not by which of them count (its issue 56655): with a
        placeholder of its own nothing else can ever look the same, and no penalty falls on a real token.
        """
        if not softprompts and len(without_soft_tokens(ids)) == len(ids):
            return {"prompt_token_ids": ids}
        before = [each for each in softprompts if each.order is Order.BEFORE_BOS]
        after = [each for each in softprompts if each.order is Order.AFTER_BOS]
        begins = self._reader.begins(ids)
        all_ids: List[int] = []
        rows: List[torch.Tensor] = []
        for part in (*before, ids[:begins], *after, *(each or run for run, each, _ in runs_of(ids[begins:]))):
            if isinstance(part, SoftPrompt):
                all_ids += [self._placeholder] * part.n_tokens
                rows.append(torch.tensor(self._rows_of(part)))
            else:
                all_ids += part
                rows.append(torch.zeros(len(part), self._width))
        return {
            "prompt_token_ids": all_ids,
            "prompt_embeds": torch.cat(rows),
            "prompt_is_token_ids": [token != self._placeholder for token in all_ids],
        }
