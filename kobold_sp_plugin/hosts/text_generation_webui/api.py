"""Requests to the host's API: the field that names their soft prompts, and how a request is refused."""

import contextlib
import importlib
import sys
from types import ModuleType
from typing import Any, Callable, List, Union

from ...errors import SoftPromptError
from .host import log

REQUEST_FIELD = "soft_prompt"
"""Of a request to the host's API: a file name, or several in order; "" is none; without it, the selection."""

TYPES = ("modules.api.typing", "extensions.openai.typing")
"""Where releases declare what a request may hold, and the requests that lead to a generation."""
REQUESTS = ("CompletionRequest", "ChatCompletionRequest", "LogitsRequest", "AnthropicRequest")


def extend(module: ModuleType, resolve: Callable[[Any], Any], undo: contextlib.ExitStack) -> None:
    """Give the requests that ``module`` declares the field, until ``undo``; before routes are built from them.

    ``resolve`` makes of the field's value what the generation gets. Raises :class:`SoftPromptError`.
    """
    pydantic: Any = importlib.import_module("pydantic")
    package = module.__name__.rpartition(".")[0]
    if not hasattr(pydantic, "field_validator"):
        log().warning("Requests to the API cannot name a %s: that takes pydantic 2.", REQUEST_FIELD)
        return
    if hasattr(sys.modules.get(f"{package}.script"), "app"):
        log().warning("Requests to the API can name a %s once the program is started anew.", REQUEST_FIELD)

    def resolved(cls: Any, value: Any) -> Any:
        try:
            return resolve(value)
        except SoftPromptError as error:
            raise refusal(module.__name__, str(error)) from error

    field = pydantic.Field(
        default=None,
        description="The file name of a soft prompt, or several in order, for this request alone; empty for none.",
    )
    for name in REQUESTS:
        before = getattr(module, name, None)
        if before is None:
            continue
        extended = pydantic.create_model(
            name,
            __base__=before,
            __module__=module.__name__,
            __validators__={"resolve_soft_prompt": pydantic.field_validator(REQUEST_FIELD)(resolved)},
            **{REQUEST_FIELD: (Union[str, List[str], None], field)},
        )
        setattr(module, name, extended)
        undo.callback(setattr, module, name, before)


def refusal(module: str, message: str) -> Exception:
    """The error for a request that cannot be served, of the API that ``module`` belongs to.

    Releases before 4.1 do not answer their own error; a wrong value they do.
    """
    package = module.rpartition(".")[0]
    error: Any = importlib.import_module(f"{package}.errors").InvalidRequestError
    app = getattr(sys.modules.get(f"{package}.script"), "app", None)
    if any(isinstance(kind, type) and issubclass(error, kind) for kind in getattr(app, "exception_handlers", [error])):
        refusal: Exception = error(message=message, param=REQUEST_FIELD)
        return refusal
    return ValueError(message)
