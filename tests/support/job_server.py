"""The part of Ray's job server that `nsnet submit` talks to, without a cluster: it starts nothing."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from aiohttp import WSCloseCode, web


class FakeJobServer:
    """Jobs by id; `answer` is the status of every request if it is not 200, `asks` whether a token is asked for."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.packages: dict[str, bytes] = {}
        self.submitted: list[dict[str, Any]] = []
        self.answer = 200
        self.asks = False
        self.hides = False
        """Whether it knows no job when it is asked, as before another command submits it."""
        self.logs: list[list[str]] = []
        """What each connection sends of the log. All but the last one break off; one that ends with "" says no more."""
        self.stopped: list[str] = []
        self.address = ""

    def has(self, name: str, status: str, code: int | None = None, message: str = "") -> None:
        """Let it know a job."""
        self.jobs[name] = {
            "type": "SUBMISSION", "submission_id": name, "status": status, "entrypoint": "", "message": message,
            "driver_exit_code": code, "start_time": 1_796_000_000_000,
        }  # fmt: skip

    async def _version(self, request: web.Request) -> web.Response:
        self._check(request)
        return web.json_response({"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""})

    def _check(self, request: web.Request) -> None:
        if self.asks and "Authorization" not in request.headers:
            raise web.HTTPUnauthorized(text="Unauthorized: Missing authentication token")
        if self.answer == 403:
            raise web.HTTPForbidden(text="Forbidden: Invalid authentication token")
        if self.answer == 500:
            raise web.HTTPInternalServerError(text="Traceback:\n  File x\nValueError: the disk is full\n")

    async def _info(self, request: web.Request) -> web.Response:
        self._check(request)
        name = request.match_info["name"]
        if name not in self.jobs or self.hides:
            raise web.HTTPNotFound(text=f"Job {name} does not exist")
        return web.json_response(self.jobs[name])

    async def _submit(self, request: web.Request) -> web.Response:
        self._check(request)
        job = await request.json()
        name = job["submission_id"]
        if name in self.jobs:
            raise web.HTTPBadRequest(text=f"ValueError: Job with submission_id {name} already exists. Please …")
        self.submitted.append(job)
        self.has(name, "PENDING")
        self.jobs[name]["entrypoint"] = job["entrypoint"]
        return web.json_response({"job_id": name, "submission_id": name})

    async def _stop(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.stopped.append(name)
        self.has(name, "STOPPED")
        return web.json_response({"stopped": True})

    async def _package(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if request.method == "PUT":
            self.packages[name] = await request.read()
        elif name not in self.packages:
            raise web.HTTPNotFound
        return web.Response()

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        connection = web.WebSocketResponse()
        await connection.prepare(request)
        is_last = len(self.logs) == 1
        for text in self.logs[0] if is_last else self.logs.pop(0):
            await (connection.send_str(text) if text else connection.receive())  # until the client leaves
        if is_last:
            await connection.close(code=WSCloseCode.OK)
        elif request.transport is not None:
            request.transport.close()
        return connection

    def application(self) -> web.Application:
        application = web.Application(client_max_size=2**26)
        application.router.add_get("/api/version", self._version)
        application.router.add_post("/api/jobs/", self._submit)
        application.router.add_get("/api/jobs/{name}", self._info)
        application.router.add_post("/api/jobs/{name}/stop", self._stop)
        application.router.add_get("/api/jobs/{name}/logs/tail", self._tail)
        application.router.add_route("*", "/api/packages/gcs/{name}", self._package)
        return application


@contextmanager
def fake_job_server() -> Iterator[FakeJobServer]:
    """A server that answers on a port of its own until the block ends."""
    server, ready, loop = FakeJobServer(), threading.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        runner = web.AppRunner(server.application())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ended.set_result(runner)
        ready.set()

    ended: asyncio.Future[web.AppRunner] = loop.create_future()
    loop.create_task(serve())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(ended.result().cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
