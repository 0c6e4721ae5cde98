"""`visionllm instructions multiply` against a server of the chat-completions protocol in this process."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from visionllm.cli import main
from visionllm.instruction import EVAL_TEMPLATES, TRAIN_TEMPLATES, Template, parse
from visionllm.instruction.corpus import load_templates
from visionllm.instruction.multiply import (
    Endpoint,
    EndpointError,
    candidates_of,
    multiply,
    prompt_for,
    refusal_of,
    sample_instruction,
)

SEED = Template("In <image>, find <class>. Give offsets within <range>.")
GOOD = "Please look for <class> in <image>, with offsets within <range>."


class Server:
    """A server that answers with what ``replies`` has, in turn, and notes the requests."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, bytes]] = []
        self.requests: list[tuple[str, dict, str | None]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, body, self.headers["Authorization"]))
                status, reply = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def say(self, *texts: str) -> None:
        self.replies += [
            (200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()) for text in texts
        ]


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (GOOD, None),
        ("Please look for <class>, with offsets within <range>.", "placeholders"),
        ("<image> <image> <class> offsets within <range>", "placeholders"),
        ("<image> <class> offsets within <range>, <format>", "placeholders"),
        ("<image> <class> offsets within <range>, <picture>", "placeholders"),
        ("Find <class> in <image> by coordinates within <range>.", "meaning"),
        ("Segment <class> in <image>, offsets within <range>.", "meaning"),
        ("Find <class> in <image>, 24 dots each, offsets within <range>.", "meaning"),
        ("in  <image> find <class>: give Offsets within <range>", "duplicate"),
        (EVAL_TEMPLATES["detection"][0].text, "duplicate"),
    ],
)
def test_what_is_taken(candidate, reason):
    known = {"in <image> find <class> give offsets within <range>"}
    known |= {"inside <image> point out each of <class> with a rectangle corner offsets stay within <range>"}
    assert refusal_of(candidate, SEED, known) == reason


def test_every_wording_of_the_corpus_would_be_taken_of_itself():
    for templates in TRAIN_TEMPLATES.values():
        for template in templates[:10]:
            assert refusal_of(template.text, template, set()) is None, template.text
            instruction = sample_instruction(template)
            assert parse(instruction.text) == instruction


def test_candidates_lose_list_marks_and_quotes():
    answer = '1. "Find <class>."\n\n- Look.\n(3) `Box it`\n12 dogs\n* "a" and "b"'
    assert candidates_of(answer) == ["Find <class>.", "Look.", "Box it", "12 dogs", 'a" and "b']


def test_the_prompt_names_every_placeholder():
    prompt = prompt_for([SEED, Template("Another <image> <class>")], 7)
    assert "Write 7" in prompt and SEED.text in prompt and "- Another <image> <class>" in prompt
    for placeholder in ("<image>", "<class>", "<range>"):
        assert f"{placeholder} (1 times)" in prompt


def test_multiply_stops_when_there_are_enough_or_no_more_come():
    answers = iter([f"{GOOD}\n{GOOD}\nnonsense", "Detect <class> in <image>. Offsets within <range>!"])
    result = multiply([SEED], 2, lambda prompt: next(answers))
    assert result.accepted == [GOOD, "Detect <class> in <image>. Offsets within <range>!"]
    assert result.refused == {"duplicate": 1, "placeholders": 1}
    assert result.requests == 2
    stuck = multiply([SEED], 25, lambda prompt: GOOD, per_request=10)
    assert (stuck.accepted, stuck.requests) == ([GOOD], 12)
    with pytest.raises(ValueError, match="seeds"):
        multiply([], 1, str)
    with pytest.raises(ValueError, match="1 or more"):
        multiply([SEED], 0, str)


def test_the_command_writes_what_can_be_loaded(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SOME_KEY", "secret")
    seeds = tmp_path / "seeds.json"
    seeds.write_text(
        json.dumps({"detection": {"train": [SEED.text]}, "captioning": {"train": ["Caption <image>"]}})
    )
    server.say(f"1. {GOOD}\n2. bad", "Describe <image> in short\nA detailed description of <image>")
    output = tmp_path / "more.json"
    command = [
        "instructions",
        "multiply",
        "--endpoint",
        server.url,
        "--model",
        "writer",
        "--output",
        str(output),
    ]
    assert main([*command, "--count", "1", "--seeds", str(seeds), "--key-variable", "SOME_KEY"]) == 0
    assert json.loads(output.read_text()) == {
        "detection": {"train": [GOOD]},
        "captioning": {"train": ["Describe <image> in short"]},
    }
    assert [template.text for template in load_templates(output)["detection"]] == [GOOD]
    path, body, authorization = server.requests[0]
    assert (path, body["model"], authorization) == ("/v1/chat/completions", "writer", "Bearer secret")
    assert "secret" not in capsys.readouterr().out + repr(Endpoint("http://x", "m", "secret"))


def test_the_command_says_when_there_are_too_few(server, tmp_path, capsys):
    server.say("nothing of use")
    output = tmp_path / "more.json"
    command = [
        "instructions",
        "multiply",
        "--endpoint",
        server.url,
        "--model",
        "writer",
        "--output",
        str(output),
    ]
    assert main([*command, "--count", "3", "--task", "vqa"]) == 1
    captured = capsys.readouterr()
    assert "vqa: 0 of 3 new in 4 requests; refused: 4 placeholders" in captured.out
    assert "fewer than asked for" in captured.err
    assert main([*command[:-1], str(output), "--seeds", str(output), "--task", "grounding"]) == 1
    assert "expected seeds for grounding" in capsys.readouterr().err


def test_a_busy_endpoint_is_asked_again(server):
    server.replies = [(429, b"later"), (503, b"")]
    server.say("hello")
    assert Endpoint(server.url + "/chat/completions", "m", wait=0.0).complete("hi") == "hello"
    assert [path for path, _, _ in server.requests] == ["/v1/chat/completions"] * 3


@pytest.mark.parametrize(
    ("status", "reply", "message", "requests"),
    [
        (401, b"no such key", "status 401 .*: no such key", 1),
        (302, b"", "status 302", 1),
        (500, b"broken", "status 500", 2),
        (200, b"<html>", "expected a chat completion", 1),
        (200, b'{"choices": []}', "expected a chat completion", 1),
        (200, b'{"choices": [{"message": {"content": null}}]}', "expected text", 1),
    ],
)
def test_what_an_endpoint_can_do_wrong(server, status, reply, message, requests):
    server.replies = [(status, reply)]
    with pytest.raises(EndpointError, match=message):
        Endpoint(server.url, "m", "key", wait=0.0, attempts=2).complete("hi")
    assert len(server.requests) == requests


def test_an_endpoint_that_is_not_there(tmp_path, capsys):
    with pytest.raises(EndpointError, match="127.0.0.1:9.*no answer"):
        Endpoint("http://127.0.0.1:9/v1", "m", wait=0.0, attempts=2).complete("hi")
    with pytest.raises(ValueError, match="http://"):
        Endpoint("localhost:8000", "m")
    output = tmp_path / "more.json"
    assert (
        main(["instructions", "multiply", "--endpoint", "file:///x", "--model", "m", "--output", str(output)])
        == 1
    )
    assert "expected an address" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("[]", "expected an object"),
        ('{"flying": {}}', "'flying'"),
        ('{"vqa": []}', "vqa: expected"),
        ('{"vqa": {"train": [1]}}', "vqa: expected"),
        ('{"vqa": {"train": ["<image>"]}}', "expected <question> once"),
    ],
)
def test_files_of_wordings_are_checked(tmp_path, content, message):
    path = tmp_path / "wordings.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_templates(path)
