"""A ComfyUI server that is measured: seconds of each graph and node, and what memory it takes while it runs."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_comfyui_memory import GIB, PERIOD, DeviceMemory, Watch, process_memory

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "scripts")]

from comfyui_server import Result, Server  # noqa: E402
from graphs import schemas  # noqa: E402
from graphs.prompt import prompt_of  # noqa: E402

from srpo_core.files import write_atomic  # noqa: E402

Graph = dict[str, dict[str, Any]]
Row = dict[str, Any]
SEEDS = itertools.count(1000)


class Times:
    """Seconds of each node, off the messages of the server as they come."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._node, self._since = None, 0.0

    def __call__(self, event: Row) -> None:
        if event["type"] not in ("executing", "execution_success", "execution_error", "execution_interrupted"):
            return
        now = time.perf_counter()
        if self._node is not None:
            self.seconds[self._node] = self.seconds.get(self._node, 0.0) + now - self._since
        self._node = event["data"].get("node") if event["type"] == "executing" else None
        self._since = now

    def by_class(self, graph: Graph) -> dict[str, float]:
        """{"12 VAEDecode": seconds} of those that took more than 10 ms."""
        return {
            f"{node} {graph[node]['class_type']}": round(value, 2)
            for node, value in self.seconds.items()
            if node in graph and value > 0.01
        }


class Bench:
    """One server at a time, and the rows measured so far, written after each."""

    def __init__(self, base: Path, out: Path | None, arguments: list[str], cpu: bool) -> None:
        self.base, self.out, self.arguments = base, out, arguments
        self.machine: Row = {}
        self.device_flag = ("--cpu",) if cpu else ()
        self.rows: list[Row] = []
        known = out is not None and out.is_file()
        self.earlier: list[Row] = json.loads(out.read_text(encoding="utf-8"))["runs"] if known else []
        self.memory = DeviceMemory()
        self.idle = self.memory.used()
        self.part = ""
        self._server: Server | None = None
        self.start_seconds = 0.0

    def start(self, *extra: str) -> Server:
        """A new server, ready; `start_seconds` says when it answered."""
        self.stop()
        places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        environment = {"PYTHONPATH": os.pathsep.join(place for place in places if Path(place).resolve() != ROOT)}
        begin = time.perf_counter()
        server = Server(self.base, (*self.arguments, *extra), environment, self.device_flag, run_limit=400)
        self._server = server
        server.wait()
        self.start_seconds = time.perf_counter() - begin
        self.machine = machine_of(server) | {"device_idle_gib": self.idle}
        return server

    @property
    def server(self) -> Server:
        """The running server; a new one if there is none, or if it died."""
        if self._server is not None and self._server.process.poll() is None:
            return self._server
        if self._server is not None:
            self.add("the server had ended by itself", log=self._server.log()[-3000:])
        return self.start()

    def stop(self) -> None:
        """End the server and keep its log."""
        if self._server is None:
            return
        with contextlib.suppress(Exception):
            self._server.stop()
        (self.base / f"server-{time.time():.0f}.log").write_text(self._server.log(), encoding="utf-8")
        self._server = None

    def add(self, what: str, **values: Any) -> Row:
        """A row of results; all are written at once."""
        row = {"part": self.part, "what": what, **values}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self.save()
        return row

    def save(self) -> None:
        """Write what is known so far, behind the runs that the file holds already."""
        if self.out is not None:
            runs = [*self.earlier, {"machine": self.machine, "rows": self.rows}]
            write_atomic(self.out, json.dumps({"runs": runs}, indent=1) + "\n")

    def run_part(self, name: str, work: Callable[[Bench], None]) -> None:
        """A part of the benchmark; if it fails, that is a row too, and the next part runs."""
        self.part, begin = name, time.perf_counter()
        try:
            work(self)
        except Exception as error:
            self.add("failed", error=f"{type(error).__name__}: {error}"[-3000:], trace=traceback.format_exc()[-1500:])
        self.add("whole part", seconds=round(time.perf_counter() - begin, 1))

    def graph(self, name: str) -> Graph:
        """A graph of workflows/ as its page would send it, with this server's nodes."""
        workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        known = schemas.load()
        types = {node["type"] for node in workflow["nodes"]} & set(known)
        return prompt_of(workflow, {**known, **{type: schemas.fetch(self.server.url, type) for type in types}})

    def run(
        self,
        what: str,
        graph: Graph,
        on_event: Callable[[Row], None] | None = None,
        refused: bool = False,
        **values: Any,
    ) -> Result:
        """Run a graph; a row with its seconds, its nodes' seconds and memory. `refused`: it is one that must fail."""
        server, times = self.server, Times()

        def heard(event: Row) -> None:
            times(event)
            if on_event is not None:
                on_event(event)

        before, watch = self.memory.used(), Watch(self.memory, server.process.pid)
        begin = time.perf_counter()
        try:
            result = server.run(graph, heard)
        finally:
            seconds, memory = time.perf_counter() - begin, watch.stop()
        status = "interrupted" if result.of("execution_interrupted") else result.status
        if refused:
            status = "refused" if result.error else "not refused"
        row = {"seconds": round(seconds, 2), "status": status, **values}
        if result.error:
            row["error"] = result.error[:2000]
        if before is not None:
            row["device_before_gib"] = before
        self.add(what, **row, **memory, nodes=times.by_class(graph))
        return result

    def free(self, what: str = "POST /free") -> None:
        """Ask the server to unload its models; how long that takes and what is left."""
        before, begin = self.memory.used(), time.perf_counter()
        self.server.send("/free", {"unload_models": True, "free_memory": True})
        left, changed = before, begin
        while time.perf_counter() - begin < 3.0:
            time.sleep(PERIOD)
            now = self.memory.used()
            if now != left:
                left, changed = now, time.perf_counter()
        row: Row = {"seconds": round(changed - begin, 2), "server_gib": process_memory(self.server.process.pid)}
        if left is not None:
            stats = self.server.get("/system_stats")["devices"][0]
            row |= {"device_before_gib": before, "device_after_gib": left}
            row["torch_holds_gib"] = round(stats["torch_vram_total"] / GIB, 2)
        self.add(what, **row)


def machine_of(server: Server) -> Row:
    """What a server says it runs on, and how this program was called."""
    stats = server.get("/system_stats")
    system, device = stats["system"], stats["devices"][0]
    return {
        "device": device["name"],
        "cores": os.cpu_count(),
        "ram_gib": round(system["ram_total"] / GIB, 1),
        "comfyui": system["comfyui_version"],
        "torch": system["pytorch_version"],
        "python": platform.python_version(),
        "dynamic_vram": "DynamicVRAM support detected and enabled" in server.log(),
        "command": f"python {' '.join(sys.argv)}",
    }


def changed(graph: Graph, kind: str, **inputs: Any) -> Graph:
    """A copy of the graph, with inputs of all nodes of a class set anew."""
    return {
        id: {**node, "inputs": {**node["inputs"], **inputs}} if node["class_type"] == kind else node
        for id, node in graph.items()
    }


def reseeded(graph: Graph) -> Graph:
    """A copy with other seeds, so that nothing that is drawn comes from the cache."""
    copy = {id: {**node, "inputs": dict(node["inputs"])} for id, node in graph.items()}
    for node in copy.values():
        for name in ("seed", "noise_seed"):
            if isinstance(node["inputs"].get(name), int):
                node["inputs"][name] = next(SEEDS)
    return copy


def nodes_of(graph: Graph, kind: str) -> list[str]:
    """Ids of the nodes of a class."""
    return [id for id, node in graph.items() if node["class_type"] == kind]
