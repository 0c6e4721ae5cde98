"""More wordings from seed instructions, written by a language model and checked here (section 3.2).

The model is reached through any endpoint that speaks the chat-completions protocol. Of what it writes, a
wording is taken only if it has its seed's placeholders, each as often, is understood as the same instruction
with its placeholders filled, and is new.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .instruction import DEFAULT_RANGE, SET_TASKS, Instruction
from .parse import parse
from .render import PLACEHOLDER, Template

REASONS = ("placeholders", "meaning", "duplicate")
_LIST_MARK = re.compile(r"^\s*(?:[-*•]\s+|\(?\d{1,3}[.)]\s+)")
_MOST_BYTES = 1 << 22  # of an endpoint's answer
_RETRIED = (408, 409, 429, 500, 502, 503, 504)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected request would carry the key to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class EndpointError(RuntimeError):
    """The endpoint cannot be reached, refuses, or answers with something else than a completion."""


@dataclass
class Endpoint:
    """A chat-completions endpoint.

    Attributes:
        url: its base, such as ``http://localhost:8000/v1``, or the full address of ``chat/completions``.
        model: the name it knows the model by.
        key: sent as a bearer token; None sends none.
        temperature: of the sampling.
        timeout: seconds for one answer.
        attempts: how often a busy or failing endpoint is asked.
        wait: seconds before the second attempt, doubled for each further one.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    temperature: float = 1.0
    timeout: float = 120.0
    attempts: int = 4
    wait: float = 1.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint: expected an address with http:// or https://, got {self.url!r}")

    def complete(self, prompt: str) -> str:
        """The model's answer to a prompt.

        Raises:
            EndpointError: there is none.
        """
        url = self.url.rstrip("/")
        url = url if url.endswith("/chat/completions") else url + "/chat/completions"
        content = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
        }
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(url, json.dumps(content).encode(), headers, method="POST")
        for attempt in range(self.attempts):
            try:
                with _OPENER.open(request, timeout=self.timeout) as response:
                    return _content_of(response.read(_MOST_BYTES), url)
            except urllib.error.HTTPError as error:
                said = error.read(200).decode("utf-8", "replace")
                if error.code not in _RETRIED or attempt + 1 == self.attempts:
                    raise EndpointError(f"{url}: status {error.code} {error.reason}: {said}") from error
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts too
                if attempt + 1 == self.attempts:
                    reason = getattr(error, "reason", error)
                    raise EndpointError(f"{url}: no answer: {reason}") from error
            time.sleep(self.wait * 2**attempt)
        raise EndpointError(f"{url}: asked no time, attempts is {self.attempts}")


def _content_of(body: bytes, url: str) -> str:
    try:
        content: Any = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise EndpointError(f"{url}: expected a chat completion, got {body[:80]!r}") from error
    if not isinstance(content, str):
        raise EndpointError(f"{url}: expected text in the completion, got {content!r}")
    return content


def prompt_for(seeds: Sequence[Template], wanted: int) -> str:
    """What the model is asked: ``wanted`` paraphrases of the first seed; the others are examples."""
    seed = seeds[0]
    placeholders = [piece for piece in PLACEHOLDER.split(seed.text) if PLACEHOLDER.fullmatch(piece)]
    kept = ", ".join(f"{piece} ({count} times)" for piece, count in Counter(placeholders).items())
    examples = "\n".join(f"- {other.text}" for other in seeds[1:])
    return (
        f"Here is an instruction for a vision model, for the task {seed.task}:\n\n{seed.text}\n\n"
        f"Write {wanted} instructions that ask for exactly the same in other words and other sentence "
        "structures, some shorter and some longer. Keep these placeholders, exactly as written and as often: "
        f"{kept}. Where the instruction speaks of offsets from the center, keep saying so; where it speaks "
        "of coordinates, too. Answer with one instruction per line and nothing else."
        + (f"\n\nOther instructions for this task, not to be repeated:\n{examples}" if examples else "")
    )


def candidates_of(answer: str) -> list[str]:
    """The instructions of an answer, one per line, without list marks and outer quotes."""
    result = []
    for line in answer.splitlines():
        line = _LIST_MARK.sub("", line).strip()
        if len(line) > 1 and line[0] == line[-1] and line[0] in "\"'`":
            line = line[1:-1].strip()
        if line:
            result.append(line)
    return result


def plain(text: str) -> str:
    """A wording without what does not make it another: case, spaces and marks."""
    return " ".join(re.findall(r"[\w<>]+", text.casefold()))


def sample_instruction(template: Template) -> Instruction:
    """The template with something in every placeholder."""
    task = template.task
    return template.instruction(
        classes=("red car", "dog") if task in SET_TASKS else (),
        range=345 if "<range>" in template.text else DEFAULT_RANGE,
        points=14 if task == "segmentation" else 2,
        keypoints=("nose", "left ear", "tail") if task == "keypoints" else (),
        question="How many dogs are left of the car?" if task == "vqa" else None,
    )


def refusal_of(candidate: str, seed: Template, known: set[str]) -> str | None:
    """Why a wording is not taken, one of REASONS; None if it is.

    Args:
        candidate: the wording.
        seed: what it says in other words.
        known: the wordings that are there, as :func:`plain` gives them.
    """
    if Counter(PLACEHOLDER.findall(candidate)) != Counter(PLACEHOLDER.findall(seed.text)):
        return "placeholders"
    if re.search(r"<[a-z]+>", PLACEHOLDER.sub(" ", candidate)) is not None:
        return "placeholders"  # one that does not exist
    try:
        wanted = sample_instruction(seed)
        filled = sample_instruction(Template(candidate, seed.task))
        if filled != wanted or parse(str(filled.text)) != wanted:
            return "meaning"
    except ValueError:
        return "meaning"
    return "duplicate" if plain(candidate) in known else None


@dataclass
class Multiplication:
    """What came of it.

    Attributes:
        accepted: the new wordings.
        refused: how many were not taken, by reason.
        requests: how often the model was asked.
    """

    accepted: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    requests: int = 0


def multiply(
    seeds: Sequence[Template],
    wanted: int,
    complete: Callable[[str], str],
    known: Iterable[str] = (),
    per_request: int = 10,
    seed: int = 0,
    most_requests: int | None = None,
) -> Multiplication:
    """Asks for paraphrases of the seeds in turn until there are enough new ones.

    Args:
        seeds: wordings of one task.
        wanted: how many new ones.
        complete: a prompt to the model's answer, such as ``Endpoint.complete``.
        known: further wordings not to be repeated, those of evaluation for one.
        per_request: how many to ask for at a time.
        seed: of the order of the seeds and the choice of examples.
        most_requests: after so many, what there is has to do; 4 times as many as needed if all were good
            when None.

    Raises:
        ValueError: there are no seeds, or a number is not positive.
        EndpointError: of ``complete``; what was accepted until then is lost.
    """
    if not seeds:
        raise ValueError("seeds: expected at least one, got none")
    if wanted < 1 or per_request < 1:
        raise ValueError(f"wanted and per_request: expected 1 or more, got {wanted} and {per_request}")
    rng = random.Random(seed)
    result = Multiplication()
    there = {plain(template.text) for template in seeds} | {plain(text) for text in known}
    most = 4 * -(-wanted // per_request) if most_requests is None else most_requests
    order: list[Template] = []
    while len(result.accepted) < wanted and result.requests < most:
        if not order:
            order = rng.sample(list(seeds), len(seeds))
        template = order.pop()
        others = [other for other in seeds if other is not template]
        shown = [template, *rng.sample(others, min(3, len(others)))]
        result.requests += 1
        for candidate in candidates_of(complete(prompt_for(shown, per_request))):
            if len(result.accepted) == wanted:
                break
            reason = refusal_of(candidate, template, there)
            if reason is not None:
                result.refused[reason] += 1
                continue
            there.add(plain(candidate))
            result.accepted.append(candidate)
    return result
