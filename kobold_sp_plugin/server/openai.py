"""OpenAI's API, as far as a model that continues texts has it: models, completions and conversations."""

import time
import uuid
from typing import Any, Dict, Iterator, Tuple

from flask import Flask, request

from ..session import Session
from .characters import Characters
from .fields import GenerationRequest, read_chat, read_completion, read_object
from .generation_queue import GenerationQueue
from .refusals import openai_error, refusal, status_of
from .replies import Texts, as_json, stream


def add_openai(app: Flask, session: Session, queue: GenerationQueue, characters: Characters) -> None:
    """Add ``/v1/models``, ``/v1/completions`` and ``/v1/chat/completions``."""
    since = int(time.time())

    @app.get("/v1/models")
    def models() -> Dict[str, Any]:
        engine = session.engine
        names = [engine.name] if engine is not None else []
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": since, "owned_by": "kobold_sp"} for name in names],
        }

    @app.post("/v1/completions")
    def completions() -> Any:
        wanted, values = read_completion(read_object(request.get_data()))
        return answer(wanted, values, is_chat=False)

    @app.post("/v1/chat/completions")
    def chat_completions() -> Any:
        wanted, values = read_chat(read_object(request.get_data()), session.engine)
        return answer(wanted, values, is_chat=True)

    def answer(wanted: GenerationRequest, values: Dict[str, Any], is_chat: bool) -> Any:
        texts = Texts(queue)
        try:
            texts.begin(wanted, session, characters, values.get("user", ""))
            written = _Answer(session.engine.name if session.engine is not None else "", values, wanted, is_chat)
            if values.get("stream"):
                texts.wait_for_first()
            else:
                for _ in texts.events():
                    pass
        except BaseException:
            texts.close()
            raise
        if texts.error is not None:
            texts.close()
            return refusal(texts.error)
        if values.get("stream"):
            return stream(texts, lambda: written.pieces(texts))
        texts.close()
        return written.whole(texts)


class _Answer:
    """One answer, written whole or piece by piece."""

    def __init__(self, model: str, values: Dict[str, Any], wanted: GenerationRequest, is_chat: bool):
        self._wanted = wanted
        self._echo = bool(values.get("echo"))
        self._tells_usage = bool((values.get("stream_options") or {}).get("include_usage"))
        self._is_chat = is_chat
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: Texts) -> Dict[str, Any]:
        choices = []
        for number, each in enumerate(texts.generations):
            text = self._before(number) + each.text
            said: Dict[str, Any] = (
                {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
            )
            choices.append({"index": number, **said, "logprobs": None, "finish_reason": each.reason})
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": _usage(texts)}

    def pieces(self, texts: Texts) -> Iterator[str]:
        for number in range(len(texts.generations)):
            if self._is_chat or self._before(number):
                yield self._piece(number, self._before(number), None, begins=True)
        for said in texts.events():
            if not said.ended:
                yield self._piece(said.number, said.text, None)
            elif said.generation.error is not None:
                yield f"data: {as_json(openai_error(status_of(said.generation.error)[1]))}\n\n"
            else:
                yield self._piece(said.number, "", said.generation.reason)
        if self._tells_usage:
            yield self._event({"choices": [], "usage": _usage(texts)})
        yield "data: [DONE]\n\n"

    def _piece(self, number: int, text: str, reason: Any, begins: bool = False) -> str:
        said: Dict[str, Any] = {"text": text}
        if self._is_chat:
            role = {"role": "assistant"} if begins else {}
            said = {"delta": {**role, "content": text} if reason is None else {}}
        return self._event({"choices": [{"index": number, **said, "logprobs": None, "finish_reason": reason}]})

    def _event(self, content: Dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return f"data: {as_json({**self._head, 'object': kind, **content})}\n\n"

    def _before(self, number: int) -> str:
        return self._wanted.settings[number].prompt if self._echo else ""


def _usage(texts: Texts) -> Dict[str, int]:
    n_prompt, n_new = _counted(texts)
    return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}


def _counted(texts: Texts) -> Tuple[int, int]:
    """Tokens that were read and that were written, where the engine tells."""
    endings = [each.ending for each in texts.generations if each.ending is not None]
    return sum(each.n_prompt for each in endings), sum(each.n_new for each in endings)
