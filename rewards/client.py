"""A judge that lives elsewhere: `RemoteJudge("http://host:8000/fidelity")` is one like any other.

No wait is unbounded and no failure becomes a number. What the server did not answer for, within the
retries and the time given, is `failed` with the reason; what it refused for good, and a server that
has become another judge, raise JudgeError.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydantic import ValidationError

from rewards import wire
from rewards.errors import ImageError, JudgeError, RewardConfigError
from rewards.types import JudgeCard, Sample, Score, failed

START_S = 30.0  # most that is waited for a server when the judge is made
_CONNECT_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0


class _Unreachable(JudgeError):
    """Retries or time are used up."""


class RemoteJudge:
    """A judge of a server (`rewards.server`); its card is the served judge's own.

    Args:
        url: http(s)://host:port/<name>, the name under which the server has it.
        token: by default the environment variable RLHF_REWARD_TOKEN, if it is set.
        timeout_s: for one request; asking again then waits for the same scores, not for new ones.
        patience_s: for one call of `score`, all requests and pauses together.
        retries: of a request after lost connections and 5xx. Refusals of a busy server (503 with
            Retry-After) are bounded by `patience_s` alone.
        batch: most samples of one request.

    `troubles` counts what went wrong and was asked again: by status, or by name of the error.

    Raises:
        RewardConfigError: no such URL, or the server has no judge of this name.
        JudgeError: no server within half a minute, or it refuses, for instance the token.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout_s: float = 120.0,
        patience_s: float = 300.0,
        retries: int = 8,
        batch: int = 16,
    ) -> None:
        self.url, self._base, self._name = url, *_parts(url)
        self._token = wire.check_token(token or os.environ.get(wire.TOKEN))
        if min(timeout_s, patience_s) <= 0 or retries < 0 or batch < 1:
            raise RewardConfigError(
                "RemoteJudge: expected timeout_s and patience_s above 0, retries from 0 and batch "
                f"from 1, got {timeout_s}, {patience_s}, {retries} and {batch}"
            )
        self.timeout_s, self.patience_s = timeout_s, patience_s
        self.retries, self.batch = retries, batch
        self.troubles: Counter[str] = Counter()
        self._http: httpx.Client | None = None
        self.card = self._fetch_card()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_http": None}  # connections stay here

    def __del__(self) -> None:
        if self.__dict__.get("_http") is not None:
            self._http.close()  # type: ignore[union-attr]

    def __repr__(self) -> str:
        return f"RemoteJudge({self.url!r})"

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score per sample, in order.

        Raises:
            JudgeError: the server refuses, or its card is no longer the one that was fetched.
        """
        deadline = time.monotonic() + self.patience_s
        out: list[Score] = []
        for start in range(0, len(samples), self.batch):
            part = samples[start : start + self.batch]
            try:
                out += self._score(part, deadline)
            except _Unreachable as error:  # nor will it be there for the rest
                return out + [failed(str(error))] * (len(samples) - len(out))
        return out

    def _score(self, samples: Sequence[Sample], deadline: float) -> list[Score]:
        """Scores of one request; those that cannot be sent are `failed`."""
        items: dict[int, wire.WireSample] = {}
        reasons: dict[int, str] = {}
        for i, sample in enumerate(samples):
            try:
                items[i] = wire.encode_sample(sample)
            except (JudgeError, ImageError) as error:
                reasons[i] = f"not sent: {error}"
        scores = iter(self._send(list(items.values()), deadline) if items else [])
        return [failed(reasons[i]) if i in reasons else next(scores) for i in range(len(samples))]

    def _send(self, items: list[wire.WireSample], deadline: float) -> list[Score]:
        body = wire.ScoreRequest(samples=items).model_dump_json().encode()
        status, text = self._ask(f"/v1/judges/{self._name}/score", body, deadline)
        if status == 413 and len(items) > 1:  # too much for one request of this server
            half = len(items) // 2
            return self._send(items[:half], deadline) + self._send(items[half:], deadline)
        if status != 200:
            raise JudgeError(f"{self.url}: refused with {status}: {_detail(text)}")
        try:
            card, scores = wire.decode_scores(text, len(items))
        except JudgeError as error:
            raise JudgeError(f"{self.url}: {error}") from error
        if changed := wire.changes(self.card, card):
            raise JudgeError(
                f"{self.url}: expected the judge this run began with, but {changed}: serve that "
                "judge again, or start a new run"
            )
        return scores

    def _fetch_card(self) -> JudgeCard:
        deadline = time.monotonic() + min(START_S, self.patience_s)
        status, text = self._ask("/v1/judges", None, deadline)
        if status != 200:
            raise JudgeError(f"{self.url}: refused with {status}: {_detail(text)}")
        try:
            cards = wire.JudgesResponse.model_validate_json(text).judges
        except ValidationError as error:
            raise JudgeError(
                f"{self.url}: expected the cards of judges, got {wire.complaint(error)}: is this "
                "the address of `rlhf reward serve`?"
            ) from error
        if self._name not in cards:
            raise RewardConfigError(
                f"{self.url}: expected a judge that is served there ({', '.join(cards)}), got "
                f"{self._name!r}: write {self._base}/{next(iter(cards), 'NAME')}"
            )
        return cards[self._name]

    # --- one request, bounded ---------------------------------------------------------------------

    def _ask(self, path: str, body: bytes | None, deadline: float) -> tuple[int, bytes]:
        """Status and body of an answer that asking again would not change.

        Raises:
            JudgeError: (_Unreachable) none within `retries` and the deadline.
        """
        faults, pause, said = 0, _FIRST_PAUSE_S, "no time was left to ask"
        while time.monotonic() < deadline:
            wait: float | None = None
            try:
                status, text, wait = self._once(path, body, deadline)
                if status < 500:
                    return status, text
                trouble, said = str(status), f"{status}: {_detail(text)}"
            except httpx.HTTPError as error:
                trouble, said = type(error).__name__, f"{type(error).__name__}: {error}"
            self.troubles[trouble] += 1
            faults += wait is None  # a server that is busy and says so is no fault
            if faults > self.retries:
                break
            rest = (wait or 0.0) + pause * random.SystemRandom().uniform(
                0.5, 1.0
            )  # come back apart
            if time.monotonic() + rest > deadline:
                break
            time.sleep(rest)
            pause = min(2 * pause, _LONGEST_PAUSE_S) if wait is None else _FIRST_PAUSE_S
        raise _Unreachable(
            f"{self.url}: expected an answer within {self.retries} retries and "
            f"{self.patience_s:g} s, got {said}: start the server with `rlhf reward serve`"
        )

    def _once(
        self, path: str, body: bytes | None, deadline: float
    ) -> tuple[int, bytes, float | None]:
        """Status, body and Retry-After in seconds. Raises httpx.HTTPError."""
        end = min(deadline, time.monotonic() + self.timeout_s)
        left = max(0.001, end - time.monotonic())
        limit = httpx.Timeout(left, connect=min(left, _CONNECT_S))
        request = self._client().build_request(
            "GET" if body is None else "POST", self._base + path, content=body, timeout=limit
        )
        answer, data = self._client().send(request, stream=True), bytearray()
        try:
            for chunk in answer.iter_bytes():
                data += chunk
                if time.monotonic() > end:  # httpx bounds the time between chunks only
                    raise httpx.ReadTimeout(f"an answer that took longer than {left:.1f} s")
        finally:
            answer.close()
        return answer.status_code, bytes(data), _seconds(answer.headers.get("retry-after"))

    def _client(self) -> httpx.Client:
        if self._http is None:
            headers = {"Content-Type": "application/json"}
            if self._token is not None:
                headers["Authorization"] = f"Bearer {self._token}"
            # Judges are asked directly: no proxy of the environment sees pictures or the token.
            self._http = httpx.Client(headers=headers, trust_env=False)
        return self._http


def _parts(url: str) -> tuple[str, str]:
    """Where the server is, and the judge's name. Raises RewardConfigError."""
    try:
        parts = urlsplit(url)
        base, _, name = url.rpartition("/")
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        good, parts, base, name = False, urlsplit(""), "", ""
    if not good or not re.fullmatch(r"[\w-]+", name) or not urlsplit(base).netloc or parts.username:
        raise RewardConfigError(
            f"expected a judge's address such as http://127.0.0.1:8000/fidelity, got {url!r}: "
            "write http(s)://host:port/<name of the judge on the server>"
        )
    return base, name


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds, at most a minute; None if it is absent or a date."""
    return min(float(text), 60.0) if text is not None and text.isdigit() else None


def _detail(text: bytes) -> str:
    """What a server says is wrong, shortened."""
    said = text.decode("utf-8", "replace")
    found = re.match(r'\{"detail":"(.*)"\}$', said)
    return (found.group(1) if found else said)[:500]
