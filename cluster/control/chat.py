"""A conversation on the terminal: lines typed in, the model's words out as they come."""

import sys
from collections.abc import Callable

from cluster.control.ask import ChatMessage, Gateway
from cluster.errors import ControlError

Write = Callable[[str], None]


def write_at_once(text: str) -> None:
    """Write to standard output without waiting for the end of the line."""
    sys.stdout.write(text)
    sys.stdout.flush()


def answer_once(gateway: Gateway, model: str, prompt: str, write: Write = write_at_once) -> None:
    """Stream the answer to one prompt."""
    for piece in gateway.stream_chat(model, [{"role": "user", "content": prompt}]):
        write(piece)
    write("\n")


def converse(
    gateway: Gateway, model: str, read_line: Callable[[str], str] = input, write: Write = write_at_once
) -> None:
    """Talk until the input ends (Ctrl-D). Ctrl-C stops an answer; what was said of it stays in the conversation.

    An error of one turn is shown, and the turn is taken back; the conversation goes on.
    """
    messages: list[ChatMessage] = []
    while True:
        try:
            prompt = read_line("> ").strip()
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n")
            continue
        if not prompt:
            continue
        messages.append({"role": "user", "content": prompt})
        try:
            messages.append({"role": "assistant", "content": _turn(gateway, model, messages, write)})
        except ControlError as error:
            messages.pop()
            write(f"\n{error}\n")


def _turn(gateway: Gateway, model: str, messages: list[ChatMessage], write: Write) -> str:
    pieces: list[str] = []
    answer = gateway.stream_chat(model, messages)
    try:
        for piece in answer:
            pieces.append(piece)
            write(piece)
    except KeyboardInterrupt:
        write(" [stopped]")
    finally:
        answer.close()
    write("\n\n")
    return "".join(pieces)
