"""A server that speaks the OpenAI chat-completions protocol, streamed or not, and says what a test has written for it.

It counts and logs each request, so that a test can tell which ones were sent again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.services.http import HttpServer, Incoming

__all__ = ["Answer", "ChatServer", "Request", "Turn"]


@dataclass(frozen=True)
class Answer:
    """What the model says: a text, and calls of tools as (id, name, arguments)."""

    text: str | None = None
    calls: Sequence[tuple[str, str, Mapping[str, Any]]] = ()


Turn = Answer | Callable[[list[dict[str, Any]]], Answer]


@dataclass(frozen=True)
class Request:
    """A request as it came: for which model, which turn of the conversation it asked for, and its body."""

    model: str
    turn: int
    is_streamed: bool
    body: Mapping[str, Any] = field(repr=False, default_factory=dict)


class ChatServer(HttpServer):
    """Serves on a free port of this host while the block lasts. `script` has the turns of each model, by its name.

    Which turn is asked for follows from the conversation that a request holds: nothing is kept between requests.
    """

    protocol = "HTTP/1.1"

    def __init__(self, script: Mapping[str, Sequence[Turn]]) -> None:
        super().__init__()
        self.script = script
        self.requests: list[Request] = []
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """What a client takes for its base URL."""
        return f"{self.origin}/v1"

    def take(self) -> list[Request]:
        """The requests since it was last asked."""
        with self._lock:
            taken, self.requests = self.requests, []
        return taken

    def answer(self, body: dict[str, Any]) -> Answer:
        """What the model says to a request, which is logged."""
        turn = sum(message["role"] == "assistant" for message in body["messages"])
        with self._lock:
            self.requests.append(Request(body["model"], turn, bool(body.get("stream")), body))
        said = self.script[body["model"]][turn]
        return said if isinstance(said, Answer) else said(body["messages"])

    def serve(self, request: Incoming) -> None:
        body = json.loads(request.body())
        if request.path != "/v1/chat/completions":
            request.send_error(404)
            return
        answer = self.answer(body)
        if body.get("stream"):
            _stream(request, body, answer)
        else:
            request.reply(200, json.dumps(whole(body, answer)).encode())


def _stream(request: Incoming, body: dict[str, Any], answer: Answer) -> None:
    try:
        request.send_response(200)
        request.send_header("content-type", "text/event-stream")
        request.send_header("transfer-encoding", "chunked")
        request.end_headers()
        for event in [*(json.dumps(chunk) for chunk in chunks(body, answer)), "[DONE]"]:
            text = f"data: {event}\n\n".encode()
            request.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
        request.wfile.write(b"0\r\n\r\n")
    except OSError:  # who asked is dead
        request.close_connection = True


def usage_of(body: Mapping[str, Any], answer: Answer) -> dict[str, int]:
    """Tokens as they follow from the request and what is said to it."""
    asked, said = 10 * len(body["messages"]), 5 + len(answer.text or "") + 3 * len(answer.calls)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def whole(body: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    """The response to a request that isn't streamed."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.calls:
        message["tool_calls"] = [
            {"id": call, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for call, name, arguments in answer.calls
        ]
    finish = "tool_calls" if answer.calls else "stop"
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": body["model"],
        "choices": [choice],
        "usage": usage_of(body, answer),
    }


def chunks(body: Mapping[str, Any], answer: Answer) -> Iterator[dict[str, Any]]:
    """The response to a request that is streamed: texts word by word, arguments in two pieces."""
    head = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": body["model"],
    }

    def chunk(delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    yield chunk({"role": "assistant", "content": ""})
    for word in (answer.text or "").split(" ") if answer.text else []:
        yield chunk({"content": f"{word} "})
    for index, (call, name, arguments) in enumerate(answer.calls):
        text = json.dumps(arguments)
        function = {"name": name, "arguments": text[:5]}
        yield chunk({"tool_calls": [{"index": index, "id": call, "type": "function", "function": function}]})
        yield chunk({"tool_calls": [{"index": index, "function": {"arguments": text[5:]}}]})
    yield chunk({}, "tool_calls" if answer.calls else "stop")
    yield {**head, "choices": [], "usage": usage_of(body, answer)}
