"""Chats as people write them, brought to what a server would hand to the chat template.

Sources: OpenAI's chat format (parts, tool_calls, the older function_call, weight), ShareGPT (from and value), and what
vLLM's server does with a request: texts of parts joined by a line end, no content as an empty text, a call's arguments
as an object.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from distill_ray.config.sections import CorpusSection
from distill_ray.corpus.columns import messages_column, named
from distill_ray.corpus.refused import RefusedDocument

Message = dict[str, Any]

_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
    "function_call": "function_call",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names that templates read an assistant's reasoning from."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_LEARNED = ("weight", "train", "training")


@dataclass(frozen=True)
class Chat:
    """Messages, and what else the template is given."""

    messages: list[Message]
    given: dict[str, Any] = field(default_factory=dict[str, Any])
    """`tools` and `documents`, where there are any."""
    unlearned: tuple[int, ...] = ()
    """Numbers of the assistant's messages that carry no supervision."""

    def canonical(self) -> Any:
        """Plain values that decide what the chat is; those of messages alone where there is nothing else."""
        if not self.given and not self.unlearned:
            return self.messages
        return {"messages": self.messages, "unlearned": list(self.unlearned), **self.given}


def chat_of(record: dict[str, Any], section: CorpusSection) -> Chat:
    """The chat of a record.

    Raises:
        RefusedDocument: what it holds is no chat, or has parts that are not text.
    """
    column = messages_column(section, [name for name, value in record.items() if value is not None])
    if column not in record:
        raise RefusedDocument(f"key {column!r} is missing; the record has {list(record)[:20]}")
    try:
        return _chat_of(record, column, section)
    except RecursionError:
        raise RefusedDocument("nested too deeply") from None


def _chat_of(record: dict[str, Any], column: str, section: CorpusSection) -> Chat:
    said = _plain(_unpacked(record[column]))
    if not isinstance(said, list) or not all(isinstance(m, dict) for m in said):
        raise RefusedDocument(f"{column!r} is not a list of {{role, content}}")
    if not said:
        raise RefusedDocument("empty: no messages")
    shared = [_as_roles(number, message) for number, message in enumerate(said)]
    system = record.get(named(section, "system"))
    # LLaMA-Factory's form of ShareGPT keeps the system's words beside the turns.
    if "from" in said[0] and shared[0]["role"] != "system" and isinstance(system, str) and system:
        shared.insert(0, {"role": "system", "content": system})
    messages = [_message(number, message) for number, message in enumerate(shared)]
    given = {
        name: found for name in ("tools", "documents") if (found := _listed(name, record.get(named(section, name))))
    }
    return Chat(messages, given, tuple(i for i, message in enumerate(shared) if not _is_learned(i, message)))


def _plain(value: Any) -> Any:
    """Without the keys whose value is null, at every depth: Parquet fills in those that a record lacks."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if each is not None}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _unpacked(value: Any) -> Any:
    """What a JSON text holds, else the value: Parquet has tools and arguments as texts, since each has other keys."""
    if not isinstance(value, str):
        return _plain(value)
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _listed(name: str, value: Any) -> list[Any]:
    found = _unpacked(value)
    if not found:
        return []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise RefusedDocument(f"{name!r} is not a list of objects")
    return [_tool(each) for each in found] if name == "tools" else found


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A bare function schema as a server is sent it."""
    return {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool


def _as_roles(number: int, message: Message) -> Message:
    """A ShareGPT turn by role and content; any other message as it is."""
    if "from" not in message or "role" in message:
        return message
    role = _SHAREGPT.get(str(message["from"]).lower())
    if role is None:
        raise RefusedDocument(f"message {number}: 'from' is {message['from']!r}; known are {', '.join(_SHAREGPT)}")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    value = message.get("value")
    if role != "function_call":
        return {**rest, "role": role, "content": value}
    calls = _unpacked(value)
    return {**rest, "role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _message(number: int, message: Message) -> Message:
    if not isinstance(role := message.get("role"), str):
        raise RefusedDocument(f"message {number}: 'role' is {type(role).__name__}, not text")
    found: Message = {"role": "tool" if role == "function" else role, "content": _content(number, message)}
    rest = {key: value for key, value in message.items() if key not in (*found, *_LEARNED, "function_call")}
    if role == "assistant":
        calls = _unpacked(rest.pop("tool_calls", None)) or [message.get("function_call")]
        if calls != [None]:
            rest["tool_calls"] = [_call(number, call) for call in calls]
        if reasoning := next((rest[name] for name in REASONING if rest.get(name)), None):
            rest |= {name: rest.get(name) or reasoning for name in REASONING}
    return found | rest


def _content(number: int, message: Message) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(_text_of_part(number, part) for part in content)
    says_otherwise = ("tool_calls", "function_call", *REASONING)
    if content is None and (message["role"] != "assistant" or any(message.get(key) for key in says_otherwise)):
        return ""
    raise RefusedDocument(f"message {number}: 'content' is {type(content).__name__}, not text")


def _text_of_part(number: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    raise RefusedDocument(f"message {number}: its content has a part of type {kind!r}, and only text can be learned")


def _call(number: int, call: Any) -> dict[str, Any]:
    """A tool call as templates expect it: {function: {name, arguments}}, arguments an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RefusedDocument(f"message {number}: a tool call is not {{function: {{name, arguments}}}}")
    arguments = _unpacked(function.get("arguments"))
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise RefusedDocument(f"message {number}: the arguments of {function['name']!r} are not a JSON object")
    outer = {
        key: value
        for key, value in call.items()
        if key in ("id", "type") or (function is not call and key != "function")
    }
    inner = {key: value for key, value in function.items() if key not in ("arguments", *outer)}
    return {"type": "function", **outer, "function": {**inner, "arguments": arguments}}


def _is_learned(number: int, message: Message) -> bool:
    if message["role"] != "assistant":
        return True
    flags = {name: message[name] for name in _LEARNED if name in message}
    for name, value in flags.items():
        if value not in (0, 1):
            raise RefusedDocument(f"message {number}: {name!r} is {value!r}; known are 0 (not learned) and 1")
    return all(flags.values())
