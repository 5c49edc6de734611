from typing import List, Optional, Union

from pydantic import BaseModel


class GenerationOptions(BaseModel):
    truncation_length: int = 0


class CompletionRequest(GenerationOptions):
    prompt: Union[str, List[str], None] = None
    max_tokens: Optional[int] = 8
    n: Optional[int] = 1
    logprobs: Optional[int] = None
    echo: Optional[bool] = False
    stream: Optional[bool] = False


class ChatCompletionRequest(GenerationOptions):
    messages: List[dict]


def to_dict(obj):
    return obj.__dict__
