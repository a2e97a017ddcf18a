"""Judges over HTTP, so that each can live in an environment and on a machine of its own.

    POST /v1/judges/{name}/score   `rewards.wire.ScoreRequest` -> `ScoreResponse`
    GET  /v1/judges                the cards
    GET  /healthz                  200 while the process answers
    GET  /readyz                   200 while every judge takes samples, else 503 and why

Refusals: 401 without the token, 404 for a judge that is not here, 413 for a body or list that is
too large, 422 for one that is malformed (it names the item; nothing of the request is scored), 503
with Retry-After when the queue is full or the server stops. What a judge does wrong is no refusal:
its samples come back `failed`, each with a reason, and never with a number.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import signal
import socket
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from rewards import wire
from rewards.errors import ImageError, JudgeBusy, RewardConfigError
from rewards.judge import Judge
from rewards.lane import Lane, LaneConfig
from rewards.types import Score

RETRY_AFTER_S = 1  # what a refused client is asked to wait
CLOSE_S = 1.0  # for calls that nobody waits for any more, when the server stops
CONNECTIONS = 1024  # at once; the next ones are refused


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where judges are served, and the limits of a request. `lane` holds those of each judge.

    Raises:
        RewardConfigError: a host that others can reach and no token, or impossible limits.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    lane: LaneConfig = field(default_factory=LaneConfig)
    max_samples: int = 64  # of one request
    max_body_mb: int = 64
    max_side: int = 4096  # px of a picture
    drain_s: float = 10.0  # for what is being scored when the server is stopped

    def __post_init__(self) -> None:
        if not wire.check_token(self.token) and not _loopback(self.host):
            raise RewardConfigError(
                f"host: expected a token for {self.host!r}, which other machines can reach, got "
                f"none: set {wire.TOKEN} (openssl rand -hex 32), or host=127.0.0.1"
            )
        if min(self.max_body_mb, self.max_side) < 1 or not 0 <= self.drain_s:
            raise RewardConfigError("expected max_body_mb and max_side above 0, drain_s from 0")
        if not 1 <= self.max_samples <= self.lane.queue:
            raise RewardConfigError(
                f"max_samples: expected 1 to lane.queue = {self.lane.queue}, got "
                f"{self.max_samples}: a larger request could never be taken"
            )


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Desk:
    """The lanes by name, and what every request passes."""

    def __init__(self, judges: Mapping[str, Judge], config: ServerConfig) -> None:
        wrong = [n for n in judges if not n.replace("-", "").replace("_", "").isalnum()]
        if wrong or not judges:
            raise RewardConfigError(
                f"judges: expected names of letters, digits, - and _, got {wrong or 'none'}: "
                "write judges={fidelity: oracle/fidelity}"
            )
        self.config = config
        self.lanes = {name: Lane(judge, config.lane) for name, judge in judges.items()}

    async def authorise(self, authorization: Annotated[str | None, Header()] = None) -> None:
        """Raise 401 unless the header has the token."""
        if not self.config.token:
            return
        scheme, _, given = (authorization or "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self.config.token.encode())
        if scheme.lower() != "bearer" or not same:
            raise HTTPException(
                401,
                "expected the header 'Authorization: Bearer TOKEN' with the token of this server",
                {"WWW-Authenticate": "Bearer"},
            )

    def lane(self, name: str) -> Lane:
        """The lane of a judge. Raises 404."""
        if name not in self.lanes:
            raise HTTPException(404, f"expected a judge among {sorted(self.lanes)}, got {name!r}")
        return self.lanes[name]

    async def body(self, request: Request) -> bytes:
        """All of a request's body. Raises 413 past the limit, 408 if it does not arrive."""
        limit, data = self.config.max_body_mb * 2**20, bytearray()
        try:
            async with asyncio.timeout(self.config.lane.timeout_s):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > limit:
                        raise HTTPException(
                            413,
                            f"expected a body of at most {self.config.max_body_mb} MB, got more: "
                            "send fewer samples at a time",
                        )
        except (TimeoutError, ClientDisconnect) as error:
            raise HTTPException(408, "expected a whole body, it did not arrive") from error
        return bytes(data)

    def submit(self, lane: Lane, body: bytes) -> list[Future[Score]]:
        """The futures of a request's scores. Raises 413, 422 or 503; then none is judged."""
        most = self.config.max_samples
        try:
            items = wire.ScoreRequest.model_validate_json(body).samples
            if len(items) > most:
                raise HTTPException(413, f"expected at most {most} samples, got {len(items)}")
            samples = [
                wire.decode_sample(item, f"samples[{i}]", self.config.max_side)
                for i, item in enumerate(items)
            ]
            return lane.submit(samples)
        except ValidationError as error:
            raise HTTPException(422, wire.complaint(error)) from error
        except ImageError as error:
            raise HTTPException(422, str(error)) from error
        except JudgeBusy as error:
            raise _later(error) from error


def _later(error: JudgeBusy) -> HTTPException:
    return HTTPException(503, str(error), {"Retry-After": str(RETRY_AFTER_S)})


def make_app(judges: Mapping[str, Judge], config: ServerConfig) -> FastAPI:
    """The application that serves judges under their names. `app.state.desk` holds its lanes.

    Raises:
        RewardConfigError: no judge, or a name that does not fit into a URL.
    """
    desk = Desk(judges, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        for lane in desk.lanes.values():
            await run_in_threadpool(lane.close, CLOSE_S)  # requests have ended before this

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.desk = desk
    guarded = APIRouter(prefix="/v1", dependencies=[Depends(desk.authorise)])

    @app.get("/healthz")
    async def healthz() -> dict[str, bool]:
        return {"alive": True}

    @app.get("/readyz")
    async def readyz(response: Response) -> dict[str, object]:
        troubles = {name: lane.trouble() for name, lane in desk.lanes.items()}
        response.status_code = 503 if any(troubles.values()) else 200
        return {"ready": not any(troubles.values()), "judges": troubles}

    @guarded.get("/judges")
    async def cards() -> wire.JudgesResponse:
        return wire.JudgesResponse(judges={name: lane.card for name, lane in desk.lanes.items()})

    @guarded.post("/judges/{name}/score")
    async def score(name: str, request: Request) -> Response:
        lane = desk.lane(name)
        body = await desk.body(request)
        futures = await run_in_threadpool(desk.submit, lane, body)
        answers = map(asyncio.wrap_future, futures)
        scores: list[Score] = []
        for answer in await asyncio.gather(*answers, return_exceptions=True):
            if isinstance(answer, JudgeBusy):  # the server was stopped while this one waited
                raise _later(answer)
            if isinstance(answer, BaseException):
                raise answer
            scores.append(answer)
        return Response(wire.encode_scores(lane.card, scores), media_type="application/json")

    app.include_router(guarded)
    return app


def listen(config: ServerConfig) -> socket.socket:
    """The socket of a server. Raises OSError if the port is taken."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    found = socket.create_server((config.host, config.port), family=family, backlog=CONNECTIONS)
    # Without it every answer waits 40 ms for the client's delayed acknowledgement of its header.
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


def make_server(app: FastAPI, config: ServerConfig) -> uvicorn.Server:
    """A server for `run(sockets=[listen(config)])`; SIGINT and SIGTERM end it and are raised again
    at the end.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=max(1, round(config.drain_s)),
            server_header=False,
        )
    )


def serve(judges: Mapping[str, Judge], config: ServerConfig) -> dict[str, dict[str, int]]:
    """Serve judges until SIGINT or SIGTERM; what each counted: samples by state, `again` (answered
    from the cache or by waiting for a twin), `refused`, and `calls` of the judge.

    Requests that are being answered have `drain_s` seconds.

    Raises:
        RewardConfigError: see `make_app`. OSError: the port is taken.
    """
    app = make_app(judges, config)
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        make_server(app, config).run(sockets=[listen(config)])
    except KeyboardInterrupt:
        pass
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
    return {name: dict(lane.counts) for name, lane in app.state.desk.lanes.items()}
