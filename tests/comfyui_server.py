"""A real ComfyUI server with this pack linked in and no other, asked over HTTP and its websocket."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHECKOUT = os.environ.get("COMFYUI_PATH", "")
PACK = Path(__file__).parents[1]
NAME = "ComfyUI-SRPO"
START_LIMIT = 180
"""Seconds in which a server on a busy machine is there."""
RUN_LIMIT = 300


@dataclass
class Result:
    """What came of a graph."""

    status: str
    """success or error, as ComfyUI's history says."""
    outputs: dict[str, dict[str, Any]]
    """What each node shows, by its id."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """Messages of the websocket about this graph, in order; a picture that came in between has type "preview"."""

    @property
    def cached(self) -> list[str]:
        """Ids of nodes that did not run again."""
        return [node for event in self.events if event["type"] == "execution_cached" for node in event["data"]["nodes"]]

    @property
    def error(self) -> str:
        """The exception's type and message, as the page shows it; empty if there was none."""
        for event in self.events:
            if event["type"] == "execution_error":
                return f"{event['data']['exception_type']}: {event['data']['exception_message']}".strip()
        return ""

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The data of all events of a type."""
        return [event["data"] for event in self.events if event["type"] == kind]


class Server:
    """ComfyUI in a process of its own; its base directory holds models/, input/, output/ and custom_nodes/."""

    def __init__(
        self,
        base: Path,
        arguments: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        device: tuple[str, ...] = ("--cpu",),
        run_limit: float = RUN_LIMIT,
    ) -> None:
        self.base, self.client, self.run_limit = base, uuid.uuid4().hex, run_limit
        nodes = base / "custom_nodes"
        nodes.mkdir(parents=True, exist_ok=True)
        (base / "user").mkdir(exist_ok=True)  # for ComfyUI's database, which 0.9.0 looks for in its checkout
        if not (nodes / NAME).exists():
            (nodes / NAME).symlink_to(PACK, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [
            sys.executable, str(Path(CHECKOUT).resolve() / "main.py"), *device, "--listen", "127.0.0.1",
            "--port", str(self.port), "--base-directory", str(base), "--disable-api-nodes", "--preview-method", "auto",
            "--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}", *arguments,
        ]  # fmt: skip
        self._log = (base / "server.log").open("w+b")
        environment = {**os.environ, "PYTHONPATH": "", **(environment or {})}
        self.process = subprocess.Popen(command, cwd=base, env=environment, stdout=self._log, stderr=subprocess.STDOUT)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> Server:
        """Until it answers. AssertionError with its log if it ends before."""
        end = time.monotonic() + START_LIMIT
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log()
            try:
                self.get("/system_stats")
                return self
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"no answer in {START_LIMIT} s\n{self.log()}")

    def log(self) -> str:
        return (self.base / "server.log").read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def get(self, path: str) -> Any:
        """A GET's JSON."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def bytes(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def send(self, path: str, data: Any) -> tuple[int, Any]:
        """(status, JSON or None) of a POST."""
        body = json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def object_info(self) -> dict[str, Any]:
        return self.get("/object_info")

    def post(self, graph: dict[str, Any]) -> tuple[int, Any]:
        """(status, answer) of a graph in the API's form, put into the queue."""
        return self.send("/prompt", {"prompt": graph, "client_id": self.client})

    def interrupt(self) -> None:
        self.send("/interrupt", {})

    def view(self, picture: dict[str, str]) -> bytes:
        """The file of a picture that a node shows."""
        return self.bytes("/view?" + urllib.parse.urlencode(picture))

    def run(self, graph: dict[str, Any], on_event: Any = None) -> Result:
        """Queue a graph and wait for its end; `on_event(event)` is called for each message as it comes."""
        events: list[dict[str, Any]] = []
        ready, done = threading.Event(), threading.Event()
        thread = threading.Thread(target=self._listen, args=(events, ready, done, on_event), daemon=True)
        thread.start()
        assert ready.wait(30), "no websocket"
        status, answer = self.post(graph)
        assert status == 200, answer
        assert done.wait(self.run_limit), f"not done in {self.run_limit} s\n{self.log()[-3000:]}"
        thread.join(10)
        prompt_id = answer["prompt_id"]
        history = self._history(prompt_id)
        return Result(history["status"]["status_str"], history["outputs"], events)

    def seconds_to_stop(self, graph: dict[str, Any], node: str = "", value: float = 1, tries: int = 3) -> float:
        """Seconds from an interrupt, once a node's progress (any node's) is at `value`, until the graph is over.

        The shortest of some tries, if the first takes a second or more: on a busy machine the two processes may wait
        for a processor. AssertionError unless it is the interrupt that ended the graph.
        """
        found = []
        while not found or (min(found) >= 1 and len(found) < tries):
            times: dict[str, float] = {}

            def watch(event: dict[str, Any], times: dict[str, float] = times) -> None:
                told = event["data"] if event["type"] == "progress" else {"node": None, "value": 0}
                if "asked" not in times and told["value"] >= value and node in ("", told["node"]):
                    times["asked"] = time.monotonic()
                    self.interrupt()
                times[event["type"]] = time.monotonic()

            self.run(graph, watch)
            assert "asked" in times, "no such progress"
            assert "execution_interrupted" in times, "the graph went on to its end"
            found.append(times["execution_interrupted"] - times["asked"])
        return min(found)

    def _history(self, prompt_id: str) -> dict[str, Any]:
        end = time.monotonic() + 30  # written a moment after the last message
        while time.monotonic() < end:
            if history := self.get(f"/history/{prompt_id}").get(prompt_id):
                return history
            time.sleep(0.02)
        raise AssertionError("the graph is not in the history")

    def _listen(self, events: list, ready: threading.Event, done: threading.Event, on_event: Any) -> None:
        import aiohttp

        last = {"execution_success", "execution_error", "execution_interrupted"}

        async def listen() -> None:
            url = f"{self.url}/ws?clientId={self.client}"
            async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
                ready.set()
                async for message in socket:
                    binary = message.type == aiohttp.WSMsgType.BINARY
                    event = {"type": "preview", "data": message.data} if binary else json.loads(message.data)
                    events.append(event)
                    if on_event is not None:
                        on_event(event)
                    if event["type"] in last:
                        return

        try:
            asyncio.run(listen())
        finally:
            done.set()
