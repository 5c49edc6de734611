"""What clients ask for, in tables: each field with what it may be and what it means.

The tables check requests and describe them (:mod:`.openapi`), so that the two agree. Names, ranges and messages are
those of KoboldAI United; fields that only KoboldCpp or OpenAI have are named so.
"""

import json
import math
import sys
from dataclasses import replace
from typing import Any, Callable, Dict, Generic, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

from ..engines import Engine, GenerationSettings, Tokenizing
from ..errors import SoftPromptError
from ..session import MOST_SELECTED, Session
from ..softprompt import SoftPrompt, read_tags
from .characters import Characters

LONGEST_BODY = 4 * 1024 * 1024
"""Bytes of a request's body; a longer one is refused."""

LONGEST_TEXT = 65536
"""New tokens that may be asked for; where a model's context is unknown, nothing else limits them."""

MOST_AT_ONCE = 5
"""Texts that one request may ask for."""

_LARGEST_SEED = 2**64 - 1

Value = TypeVar("Value")


class InvalidRequest(SoftPromptError):
    """Fields that are missing, or not of the type or range they have to be; ``detail`` lists them as KoboldAI does."""

    def __init__(self, detail: Dict[str, List[str]]):
        self.detail = detail
        super().__init__("; ".join(f"{field}: {' '.join(messages)}" for field, messages in detail.items()))


class Kind(Generic[Value]):
    """What a field may be: ``read`` takes a JSON value or raises :class:`ValueError`; ``schema`` is JSON Schema's."""

    def __init__(self, read: Callable[[Any], Value], schema: Dict[str, Any]):
        self.read = read
        self.schema = schema


class Field(NamedTuple):
    """One field of a request."""

    kind: Kind[Any]
    meaning: str
    setting: str = ""
    """Of :class:`GenerationSettings`, where it is one."""
    required: bool = False


def number(
    whole: bool = False, least: float = -math.inf, most: float = math.inf, above: float = -math.inf
) -> Kind[float]:
    """A number of this range; ``above`` itself is not in it."""
    too_wide = f"Must be greater than or equal to {least:g}" if least > -math.inf else "Must be"
    if most < math.inf:
        too_wide += f"{' and' if least > -math.inf else ''} less than or equal to {most}"

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
            raise ValueError("Not a valid integer." if whole else "Not a valid number.")
        if whole and value != int(value):
            raise ValueError("Not a valid integer.")
        if not least <= value <= most:
            raise ValueError(f"{too_wide}.")
        if not value > above:
            raise ValueError(f"Must be greater than {above:g}.")
        return int(value) if whole else float(value)

    schema: Dict[str, Any] = {"type": "integer" if whole else "number"}
    if least > -math.inf:
        schema["minimum"] = least
    if above > -math.inf:
        schema.update(minimum=above, exclusiveMinimum=True)
    if most < math.inf:
        schema["maximum"] = most
    return Kind(read, schema)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("Not a valid string.")
    return _whole(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("Not a valid boolean.")
    return value


def _texts(value: Any) -> Tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError("Not a valid list of strings.")
    return tuple(_whole(text) for text in value)


def _text_or_texts(value: Any) -> Tuple[str, ...]:
    return (_whole(value),) if isinstance(value, str) else _texts(value)


def _one_or_more_texts(value: Any) -> Tuple[str, ...]:
    texts = _text_or_texts(value)
    if not 1 <= len(texts) <= MOST_AT_ONCE:
        raise ValueError(f"Length must be between 1 and {MOST_AT_ONCE}.")
    return texts


def _file_names(value: Any) -> Tuple[str, ...]:
    names = _text_or_texts(value)
    if len(names) > MOST_SELECTED:
        raise ValueError(f"Longer than maximum length {MOST_SELECTED}.")
    return tuple(name for name in names if name.strip())


def _order(value: Any) -> Tuple[int, ...]:
    if not isinstance(value, list) or len(value) < 6:
        raise ValueError("Shorter than minimum length 6.")
    order = tuple(int(_ANY_WHOLE.read(each)) for each in value)
    if sorted(order) != list(range(len(order))):
        raise ValueError("Must be a permutation of the first N non-negative integers, where N is its length.")
    return order if len(order) > 6 else (6, *order)


def _biases(value: Any) -> Tuple[Tuple[int, float], ...]:
    if not isinstance(value, dict) or len(value) > 1024:
        raise ValueError("Not a valid mapping of token ids to numbers.")
    biases = []
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ValueError(f"{token[:20]!r} is not a token id.")
        biases.append((int(token), min(100.0, max(-100.0, _ANY_NUMBER.read(bias)))))
    return tuple(biases)


def _object(value: Any) -> Dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("Not a valid object.")
    return value


def _messages(value: Any) -> List[Dict[str, str]]:
    """``{"role", "content"}`` each, the content as one text."""
    if not isinstance(value, list) or not value:
        raise ValueError("Not a valid list of messages.")
    messages = []
    for each in value:
        role, content = (each.get("role"), each.get("content")) if isinstance(each, dict) else (None, None)
        if role not in _ROLES:
            raise ValueError(f"Every message needs a role, one of: {', '.join(_ROLES)}.")
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            is_text = len(parts) == len(content) and all(isinstance(part, str) for part in parts)
            content = "".join(map(str, parts)) if is_text else None
        if not isinstance(content, str):
            raise ValueError("Every message needs a content: text, or a list of parts of the type text.")
        messages.append({"role": "system" if role == "developer" else role, "content": _whole(content)})
    return messages


_ANY_NUMBER = number()
_ANY_WHOLE = number(whole=True)
TEXT = Kind(_text, {"type": "string"})
FLAG = Kind(_flag, {"type": "boolean"})
_TEXT_LIST: Dict[str, Any] = {"type": "array", "items": {"type": "string"}}
TEXTS = Kind(_texts, _TEXT_LIST)
TEXT_OR_TEXTS = Kind(_text_or_texts, {"anyOf": [TEXT.schema, _TEXT_LIST]})
PROMPTS = Kind(_one_or_more_texts, {"anyOf": [TEXT.schema, {**_TEXT_LIST, "minItems": 1, "maxItems": MOST_AT_ONCE}]})
FILE_NAMES = Kind(_file_names, {"anyOf": [TEXT.schema, {**_TEXT_LIST, "maxItems": MOST_SELECTED}]})
"""One soft prompt or several in order, blank ones left out."""
ORDER = Kind(
    _order,
    {
        "type": "array",
        "items": {"type": "integer"},
        "minItems": 6,
        "description": "A permutation of the first N whole numbers, N at least 6",
    },
)
BIASES = Kind(
    _biases,
    {"type": "object", "additionalProperties": {"type": "number"}, "propertyNames": {"pattern": "^[0-9]{1,9}$"}},
)

OBJECT = Kind(_object, {"type": "object"})
_ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGES = Kind(
    _messages,
    {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "required": ["role", "content"],
            "properties": {
                "role": {"type": "string", "enum": list(_ROLES)},
                "content": {
                    "anyOf": [
                        TEXT.schema,
                        {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["type", "text"],
                                "properties": {"type": {"type": "string", "enum": ["text"]}, "text": TEXT.schema},
                            },
                        },
                    ]
                },
            },
        },
    },
)

_POSITIVE = number(whole=True, least=1)
_NOT_NEGATIVE = number(whole=True, least=0)
_SHARE = number(least=0, most=1)
_AT_LEAST_0 = number(least=0)
_NEW_TOKENS = number(whole=True, least=1, most=LONGEST_TEXT)
_N = number(whole=True, least=1, most=MOST_AT_ONCE)
_PENALTY = number(least=-100, most=100)

_TAGS = "a soft prompt is read where `<softprompt:NAME>` stands in it."

_OURS = {
    "soft_prompt": Field(
        FILE_NAMES,
        "For this request alone: a soft prompt's file name, several in order, or blank for none. "
        "Where it is missing: what the character has, else what is selected.",
    ),
    "character": Field(TEXT, "Who speaks next: the soft prompts that are kept for this name are used."),
    "memory": Field(TEXT, f"Stands before the prompt and is never cut (KoboldCpp); {_TAGS}", "memory"),
    "genkey": Field(TEXT, "A key by which the text can be asked for and stopped (KoboldCpp)."),
}

GENERATION: Dict[str, Field] = {
    "prompt": Field(TEXT, f"The text to continue; {_TAGS}", "prompt", required=True),
    **_OURS,
    "max_length": Field(_NEW_TOKENS, "New tokens; fewer where the context has no room for them.", "max_length"),
    "max_context_length": Field(_POSITIVE, "Tokens in all, where fewer than the model has.", "max_context_length"),
    "n": Field(_N, "Texts that are wanted."),
    "temperature": Field(number(above=0), "Temperature.", "temperature"),
    "top_k": Field(_NOT_NEGATIVE, "Top-k sampling; 0: off.", "top_k"),
    "top_a": Field(_AT_LEAST_0, "Top-a sampling; 0: off.", "top_a"),
    "top_p": Field(_SHARE, "Top-p sampling; 1: off.", "top_p"),
    "min_p": Field(_SHARE, "Min-p sampling, after top-p; 0: off (KoboldCpp).", "min_p"),
    "tfs": Field(_SHARE, "Tail free sampling; 1: off.", "tfs"),
    "typical": Field(_SHARE, "Typical sampling; 1: off.", "typical"),
    "rep_pen": Field(number(least=1), "Repetition penalty; 1: off.", "rep_pen"),
    "rep_pen_range": Field(_NOT_NEGATIVE, "Last tokens that it looks at; 0: all.", "rep_pen_range"),
    "rep_pen_slope": Field(_AT_LEAST_0, "How it rises over its range; 0: not at all.", "rep_pen_slope"),
    "presence_penalty": Field(_PENALTY, "Off the scores of new tokens that came (KoboldCpp).", "presence_penalty"),
    "frequency_penalty": Field(_PENALTY, "The same, each time that they came.", "frequency_penalty"),
    "sampler_order": Field(ORDER, "Samplers by KoboldAI's numbers; of six, 6 is put in front.", "sampler_order"),
    "sampler_seed": Field(number(whole=True, least=0, most=_LARGEST_SEED), "The same seed, the same text.", "seed"),
    "logit_bias": Field(BIASES, "Added to the scores of tokens, by their ids (KoboldCpp).", "logit_bias"),
    "stop_sequence": Field(TEXTS, "Texts that end the text, which holds them unless `trim_stop`.", "stop_sequence"),
    "trim_stop": Field(FLAG, "Ends the text before the stop sequence (KoboldCpp)."),
    "banned_tokens": Field(TEXTS, "Words that must not come (KoboldCpp)."),
    "use_default_badwordsids": Field(FLAG, "Bans brackets and the end of the text, which do a story no good."),
    "ban_eos_token": Field(FLAG, "Bans the end of the text (KoboldCpp)."),
    "bypass_eos": Field(FLAG, "The same (KoboldCpp)."),
    "singleline": Field(FLAG, "Ends the text with its first line."),
    **{
        name: Field(FLAG, "Of KoboldAI's own story, which this server has not; makes no difference here.")
        for name in ("use_story", "use_memory", "use_authors_note", "use_world_info", "use_userscripts")
    },
    "quiet": Field(FLAG, "Keeps the text out of the log, where it never is here."),
}
"""``POST generate`` of KoboldAI and of KoboldCpp."""

_SEED = number(whole=True, least=-(2**63), most=_LARGEST_SEED)

_OPENAI: Dict[str, Field] = {
    "model": Field(TEXT, "Makes no difference: there is one model."),
    **_OURS,
    "max_tokens": Field(_NEW_TOKENS, "New tokens; fewer where the context has no room for them.", "max_length"),
    "truncation_length": Field(_POSITIVE, "Tokens in all, where fewer than the model has.", "max_context_length"),
    "max_context_length": Field(_POSITIVE, "The same.", "max_context_length"),
    "n": Field(_N, "Texts that are wanted."),
    "stream": Field(FLAG, "The text as it comes, as server-sent events."),
    "stream_options": Field(
        OBJECT,
        "`include_usage`: a last event with the numbers of tokens.",
    ),
    "temperature": Field(_AT_LEAST_0, "Temperature; 0: always the likeliest token.", "temperature"),
    "top_p": Field(_SHARE, "Top-p sampling; 1: off.", "top_p"),
    "top_k": Field(number(whole=True, least=-1), "Top-k sampling; 0 and -1: off.", "top_k"),
    "top_a": GENERATION["top_a"],
    "min_p": GENERATION["min_p"],
    "tfs": GENERATION["tfs"],
    "typical": GENERATION["typical"],
    "typical_p": GENERATION["typical"],
    "rep_pen": Field(number(above=0), "Repetition penalty; 1: off.", "rep_pen"),
    "repetition_penalty": Field(number(above=0), "The same.", "rep_pen"),
    "rep_pen_range": Field(number(whole=True, least=-1), "Last tokens it looks at; 0 and -1: all.", "rep_pen_range"),
    "rep_pen_slope": GENERATION["rep_pen_slope"],
    "presence_penalty": Field(_PENALTY, "Off the scores of new tokens that came.", "presence_penalty"),
    "frequency_penalty": GENERATION["frequency_penalty"],
    "sampler_order": GENERATION["sampler_order"],
    "seed": Field(_SEED, "The same seed, the same text; below 0: drawn.", "seed"),
    "sampler_seed": Field(_SEED, "The same (KoboldCpp).", "seed"),
    "logit_bias": GENERATION["logit_bias"],
    "stop": Field(TEXT_OR_TEXTS, "Texts that end the text; it does not hold them.", "stop_sequence"),
    "banned_tokens": GENERATION["banned_tokens"],
    "banned_strings": Field(TEXTS, "The same, as SillyTavern says it."),
    "ban_eos_token": GENERATION["ban_eos_token"],
    "use_default_badwordsids": GENERATION["use_default_badwordsids"],
    "user": Field(TEXT, "Who asks: whoever shares this server takes turns by it."),
}
"""What ``/v1/completions`` and ``/v1/chat/completions`` share; later names go before earlier ones."""

COMPLETION: Dict[str, Field] = {
    "prompt": Field(PROMPTS, f"The text to continue, or several; {_TAGS}", required=True),
    **_OPENAI,
    "echo": Field(FLAG, "The text with the prompt in front."),
}
"""``POST /v1/completions``."""

CHAT: Dict[str, Field] = {
    "messages": Field(MESSAGES, "The conversation so far.", required=True),
    **_OPENAI,
    "max_completion_tokens": Field(_NEW_TOKENS, "The same as `max_tokens`.", "max_length"),
}
"""``POST /v1/chat/completions``."""

SOFT_PROMPT: Dict[str, Field] = {"value": Field(TEXT, "A soft prompt's file name, blank for none.", required=True)}
"""``PUT config/soft_prompt``."""

SELECTION: Dict[str, Field] = {
    "selection": Field(FILE_NAMES, "File names in order; blank or an empty list for none.", required=True)
}
"""``PUT /api/extra/softprompts``."""

CHARACTER: Dict[str, Field] = {
    "character": Field(TEXT, "The character's name, as the front end writes it.", required=True),
    "soft_prompt": Field(FILE_NAMES, "File names in order; missing, blank or empty: nothing is kept for it."),
}
"""``PUT /api/extra/softprompts/characters``."""

KEY: Dict[str, Field] = {"genkey": Field(TEXT, "The key that the request for text had; none: one's own.")}
"""``POST /api/extra/abort`` and ``generate/check``."""

TOKENS: Dict[str, Field] = {"prompt": Field(TEXT, f"The text to count; {_TAGS}")}
"""``POST /api/extra/tokencount``."""


class GenerationRequest(NamedTuple):
    """A checked request for text."""

    settings: Tuple[GenerationSettings, ...]
    """One for each text that is wanted."""
    soft_prompt: Optional[Tuple[str, ...]]
    """For this request alone: file names, none of them for none; None for what is selected."""
    character: str = ""
    key: str = ""

    def softprompts(self, session: Session, characters: Optional[Characters] = None) -> Tuple[SoftPrompt, ...]:
        """The soft prompts as they are now. Raises what :meth:`Session.softprompt` raises, and a character's error."""
        names = self.soft_prompt
        if names is None and characters is not None:
            names = characters.speaking(self.character, self.settings[0].prompt)
        if names is None:
            return session.softprompts
        return tuple(session.softprompt(name) for name in names)

    def with_softprompts(self, session: Session) -> Tuple[GenerationSettings, ...]:
        """The settings, with a soft prompt for each tag in their texts. Raises :class:`InvalidRequest`."""
        return tuple(
            replace(
                each,
                prompt=_read_tags("prompt", each.prompt, session),
                memory=_read_tags("memory", each.memory, session),
            )
            for each in self.settings
        )


def _read_tags(field: str, text: str, session: Session) -> str:
    try:
        return read_tags(text, session.named)
    except SoftPromptError as error:
        raise InvalidRequest({field: [str(error)]}) from error


def fitted(settings: GenerationSettings, engine: Engine, softprompts: Sequence[SoftPrompt]) -> GenerationSettings:
    """``settings`` with no more new tokens than fit: beside all of the text, or beside half of what there is room for.

    Front ends know little of the context that a model has, and ask for more than there is.
    """
    limits = [limit for limit in (engine.context, settings.max_context_length) if limit is not None]
    if not limits:
        return settings
    room = min(limits) - sum(softprompt.n_tokens for softprompt in softprompts)
    if settings.max_length <= room // 2:
        return settings
    text = settings.memory + settings.prompt
    n_text = len(engine.token_ids(text)) if isinstance(engine, Tokenizing) else room
    return replace(settings, max_length=max(1, min(settings.max_length, max(room // 2, room - n_text))))


def read_object(body: bytes) -> Dict[str, Any]:
    """The JSON object of a body; an empty body is an empty object. Raises :class:`InvalidRequest`."""
    if not body.strip():
        return {}
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest({"json": [f"Invalid JSON body: {error}"]}) from error
    if not isinstance(value, dict):
        raise InvalidRequest({"json": ["Expected an object."]})
    return value


def read(table: Dict[str, Field], fields: Dict[str, Any]) -> Dict[str, Any]:
    """The fields that ``table`` has, checked; a null is as good as none, and unknown fields are left aside.

    Raises :class:`InvalidRequest` with everything that is wrong.
    """
    wrong: Dict[str, List[str]] = {}
    values: Dict[str, Any] = {}
    for name, field in table.items():
        if fields.get(name) is None:
            if field.required:
                wrong[name] = ["Missing data for required field."]
            continue
        try:
            values[name] = field.kind.read(fields[name])
        except ValueError as error:
            wrong[name] = [str(error)]
    if wrong:
        raise InvalidRequest(wrong)
    return values


def read_generation(fields: Dict[str, Any]) -> GenerationRequest:
    """KoboldAI's request for text. Raises :class:`InvalidRequest`."""
    values = read(GENERATION, fields)
    settings = GenerationSettings(**_settings(GENERATION, values), keep_stop=not values.get("trim_stop", False))
    if values.get("singleline"):
        settings = replace(settings, stop_sequence=(*settings.stop_sequence, "\n"), keep_stop=False)
    return _request(values, [settings])


def read_completion(fields: Dict[str, Any]) -> Tuple[GenerationRequest, Dict[str, Any]]:
    """OpenAI's request to continue a text, or several, and its other fields. Raises :class:`InvalidRequest`."""
    values = read(COMPLETION, fields)
    settings = _openai_settings(COMPLETION, values, max_length=180)
    return _request(values, [replace(settings, prompt=prompt) for prompt in values["prompt"]]), values


def read_chat(fields: Dict[str, Any], engine: Optional[Engine]) -> Tuple[GenerationRequest, Dict[str, Any]]:
    """OpenAI's request for the next message of a conversation, and its other fields. Raises :class:`InvalidRequest`."""
    values = read(CHAT, fields)
    settings = _openai_settings(CHAT, values, max_length=400)
    prompt = engine.chat_prompt(values["messages"]) if isinstance(engine, Tokenizing) else None
    if prompt is None:
        lines = [f"{_SPEAKERS[each['role']]}{each['content']}\n" for each in values["messages"]]
        prompt = "".join(lines) + _SPEAKERS["assistant"].rstrip()
        settings = replace(settings, stop_sequence=(*settings.stop_sequence, "\nUser:"))
    return _request(values, [replace(settings, prompt=prompt)]), values


_SPEAKERS = {"system": "", "user": "User: ", "assistant": "Assistant: ", "tool": "Result: "}
"""How a conversation is written for a model that has no way of its own."""


def _openai_settings(table: Dict[str, Field], values: Dict[str, Any], max_length: int) -> GenerationSettings:
    given = {"temperature": 1.0, "top_p": 1.0, "max_length": max_length, "prompt": "", **_settings(table, values)}
    given["rep_pen_range"] = max(0, given.get("rep_pen_range", 0))
    if given.get("seed", -1) < 0:
        given["seed"] = None
    return GenerationSettings(**given)


def _settings(table: Dict[str, Field], values: Dict[str, Any]) -> Dict[str, Any]:
    """What of the values are settings, by the settings' names."""
    given = {table[name].setting: value for name, value in values.items() if table[name].setting}
    banned = (*values.get("banned_tokens", ()), *values.get("banned_strings", ()))
    if values.get("use_default_badwordsids"):
        banned += ("[", "]")
    given["bad_words"] = banned
    given["ban_eos"] = any(values.get(name) for name in ("use_default_badwordsids", "ban_eos_token", "bypass_eos"))
    return given


def _request(values: Dict[str, Any], settings: Sequence[GenerationSettings]) -> GenerationRequest:
    """``n`` texts for each of the settings; seeds follow upon one another."""
    several = tuple(
        replace(each, seed=None if each.seed is None else (each.seed + later) % (_LARGEST_SEED + 1))
        for each in settings
        for later in range(values.get("n", 1))
    )
    return GenerationRequest(several, values.get("soft_prompt"), values.get("character", ""), values.get("genkey", ""))


def _whole(text: str) -> str:
    """``text`` with U+FFFD for halves of a character, which JSON can hold and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_finite(value: float) -> bool:
    """Whether a float can hold it; JSON's whole numbers may have any number of digits."""
    return abs(value) <= sys.float_info.max


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
