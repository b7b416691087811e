"""A Ray head that tests start, kill and start again, and a proxy to it that can die without a word."""

import asyncio
import os
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing, suppress
from pathlib import Path
from typing import Self

import psutil

from infra.local.ports import free_ports, is_free

SECONDS_TO_START = 180


class Head:
    """A Ray of one node with a job server, on ports of its own; one that is started again keeps its address, and no jobs.

    Args:
        has_usual_ports: on the ports that Ray takes where it is not told otherwise, so far as they are free.
    """

    def __init__(self, *, has_usual_ports: bool = False) -> None:
        ports = zip((8265, 52365, 10001), free_ports(3), strict=True)
        self._port, self._agent, self._client = (
            usual if has_usual_ports and is_free(usual) else free for usual, free in ports
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.address = f"http://127.0.0.1:{self._port}"

    def start(self, **environment: str) -> None:
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus", "2", "--port", "0",
            "--node-ip-address", "127.0.0.1", "--dashboard-port", str(self._port),
            "--dashboard-agent-listen-port", str(self._agent), "--ray-client-server-port", str(self._client),
        ]  # fmt: skip
        ours = {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        }  # fmt: skip
        self._process = subprocess.Popen(
            command, env=os.environ | ours | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + SECONDS_TO_START
        while not self._answers():
            assert self._process.poll() is None, "Ray has ended"
            assert time.monotonic() < deadline, "Ray does not start"
            time.sleep(0.3)

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def kill(self) -> None:
        """Ends every process of the node at once, as a power cut does."""
        assert self._process is not None
        ours = psutil.Process(self._process.pid)
        for process in [ours, *ours.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/api/version", timeout=5):
                return True
        except OSError:
            return False


class Proxy:
    """Passes connections on to a head, until it falls silent: then they stay open, and nothing comes through."""

    def __init__(self, head: Head) -> None:
        self._target = int(head.address.rpartition(":")[2])
        self._num_cuts, self._is_silent = 0, False
        self._connections: set[asyncio.Task[None] | None] = set()  # asyncio does not keep a task that waits for ever
        self._started, self._over = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),), daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def cut(self) -> None:
        """Lets the connections that are open die without a word; new ones work."""
        self._num_cuts += 1

    def fall_silent(self) -> None:
        """Lets the connections that are open die without a word, and those to come until `heal`."""
        self._is_silent = True
        self.cut()

    def heal(self) -> None:
        self._is_silent = False

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._started.set()
        await self._over.wait()
        server.close()  # and `asyncio.run` cancels the connections

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        num_cuts = -1 if self._is_silent else self._num_cuts
        self._connections.add(asyncio.current_task())
        with closing(writer):
            head_reader, head_writer = await asyncio.open_connection("127.0.0.1", self._target)
            with closing(head_writer), suppress(OSError, asyncio.CancelledError):
                await asyncio.gather(
                    self._pass_on(reader, head_writer, num_cuts), self._pass_on(head_reader, writer, num_cuts)
                )

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, num_cuts: int) -> None:
        while data := await reader.read(2**16):
            if num_cuts == self._num_cuts:
                writer.write(data)
                await writer.drain()
        if num_cuts == self._num_cuts:
            writer.close()
