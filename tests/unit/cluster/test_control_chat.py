"""Chat and samples against a gateway that replays OpenAI-shaped answers."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.control.ask import Gateway
from cluster.control.chat import answer_once, converse
from cluster.control.samples import base_url, first_answers, next_steps
from cluster.errors import ControlError
from cluster.plan.build import build_plan
from tests.unit.cluster.plan_examples import config, known
from tests.unit.cluster.test_plan_build import both


class Endpoint(BaseHTTPRequestHandler):
    """Echoes the last message word by word; refuses a model named nope; embeds as three numbers; knows two labels."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if body["model"] == "nope":
            return self.reply(404, json.dumps({"error": {"message": "no model nope; served: smollm2"}}))
        if self.path.endswith("/embeddings"):
            return self.reply(200, json.dumps({"data": [{"embedding": [0.5, 0.25, 0.125]}]}))
        if self.path.endswith("/v1/classify"):
            return self.reply(200, json.dumps({"labels": ["sport", "tech"], "data": [{"probs": [0.125, 0.875]}]}))
        if self.path.endswith("/v1/completions"):
            return self.reply(200, json.dumps({"choices": [{"text": f" after {body['prompt']}"}]}))
        words = body["messages"][-1]["content"].split(" ")
        if not body.get("stream"):
            return self.reply(200, json.dumps({"choices": [{"message": {"content": " ".join(words)}}]}))
        events = [{"choices": [{"delta": {"role": "assistant"}}]}]
        events += [{"choices": [{"delta": {"content": word}}]} for word in words]
        events += [{"error": {"message": "the model is gone"}}] if "break" in words else []
        lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        return self.reply(200, f": comment\n\n{lines}data: [DONE]\n\n")

    def reply(self, status: int, text: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Keep the test's output quiet."""


@contextmanager
def endpoint() -> Iterator[tuple[Gateway, list[dict]]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.bodies = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    gateway = Gateway(f"http://127.0.0.1:{server.server_address[1]}/v1")
    try:
        yield gateway, server.bodies
    finally:
        gateway.close()
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_answer_is_written_as_it_comes():
    written: list[str] = []
    with endpoint() as (gateway, _):
        answer_once(gateway, "smollm2", "héllo wörld", written.append)
    assert written == ["héllo", "wörld", "\n"]


def test_a_refusal_is_the_gateways_own_sentence():
    with (
        endpoint() as (gateway, _),
        pytest.raises(ControlError, match="answered 404: no model nope; served: smollm2"),
    ):
        answer_once(gateway, "nope", "hi")


def test_an_error_in_the_middle_of_a_stream_is_an_error():
    with endpoint() as (gateway, _), pytest.raises(ControlError, match="the model is gone"):
        answer_once(gateway, "smollm2", "break", lambda _: None)


def test_nobody_there_is_said_with_the_address():
    with endpoint() as (gateway, _):
        pass
    with pytest.raises(ControlError, match=r"nothing answers at http://127\.0\.0\.1:"):
        gateway.chat("smollm2", [], max_tokens=1)


def test_a_conversation_remembers_and_survives_errors_and_interrupts():
    typed = iter(["one two", "", "break", KeyboardInterrupt, "three", EOFError])

    def read_line(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    written: list[str] = []
    with endpoint() as (gateway, bodies):
        converse(gateway, "smollm2", read_line, written.append)
    assert bodies[-1]["messages"] == [
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "onetwo"},
        {"role": "user", "content": "three"},
    ]
    assert any("the model is gone" in text for text in written)


def test_an_interrupted_answer_stays_in_the_conversation_as_far_as_it_came():
    typed = iter(["one two", "three", EOFError])

    def read_line(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    def write(text: str) -> None:
        if text == "two":
            raise KeyboardInterrupt

    with endpoint() as (gateway, bodies):
        converse(gateway, "smollm2", read_line, write)
    assert bodies[-1]["messages"][1] == {"role": "assistant", "content": "onetwo"}


def test_each_model_is_asked_in_its_own_way_and_the_answers_are_shown():
    with endpoint() as (gateway, _):
        answers = first_answers(gateway, both().models, lambda _: None)
    assert [answer.text for answer in answers][1] == "[0.500, 0.250, 0.125, ...] (3 numbers)"
    text = next_steps(config(), both(), "http://127.0.0.1:8265", answers, "quick.yaml")
    for part in (
        "smollm2 answered:  What is the capital of France?",
        "http://127.0.0.1:8000/v1/chat/completions",
        "http://127.0.0.1:8000/v1/embeddings",
        "manta chat smollm2 --config quick.yaml",
        "http://127.0.0.1:8265",
        "manta down quick.yaml",
    ):
        assert part in text
    assert ".venv/bin/manta down q.yaml" in next_steps(config(), both(), "", (), "q.yaml", ".venv/bin/manta")


def test_a_classifier_answers_with_its_likeliest_labels():
    plan = both()
    plan = plan.model_copy(update={"models": (plan.models[1].model_copy(update={"task": "classify"}),)})
    with endpoint() as (gateway, _):
        (answer,) = first_answers(gateway, plan.models, lambda _: None)
    assert answer.text == "tech 88%, sport 12%"
    assert "/v1/classify -H" in next_steps(config(), plan, "http://127.0.0.1:8265", [answer], "quick.yaml")


def test_a_model_without_a_chat_template_is_given_a_beginning_to_go_on_from():
    version = known().model_copy(update={"chat_template": False})
    plan = build_plan(config(), {"smollm2": version}, "digest")
    with endpoint() as (gateway, _):
        (answer,) = first_answers(gateway, plan.models, lambda _: None)
    assert (answer.question, answer.text) == ("The capital of France is", "after The capital of France is")
    text = next_steps(config(), plan, "http://127.0.0.1:8265", [answer], "quick.yaml")
    assert "http://127.0.0.1:8000/v1/completions" in text
    assert "chat" not in text


@pytest.mark.parametrize(
    ("host", "provider", "url"),
    [
        ("127.0.0.1", "{kind: local}", "http://127.0.0.1:8000"),
        ("0.0.0.0", "{kind: local}", "http://127.0.0.1:8000"),
        ("0.0.0.0", "{kind: existing, dashboard: 'http://ray.example:8265'}", "http://ray.example:8000"),
        ("::1", "{kind: local}", "http://[::1]:8000"),
    ],
)
def test_the_base_url_is_one_that_this_machine_can_reach(host, provider, url):
    data = config(provider=provider).model_dump(mode="json")
    data["gateway"]["http"]["host"] = host
    assert base_url(type(config()).model_validate(data)) == url
