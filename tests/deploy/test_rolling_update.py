"""A rolling update rehearsed: two real services behind a balancer of TCP connections, as a Service of Kubernetes is, replaced one by one under load."""

from __future__ import annotations

import itertools
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from tests.support.load import Load, expectations
from tests.support.server import Server, start_server
from vitserve.model.bundle.bundle import Bundle


class Balancer:
    """Sends each new connection to the next backend; those that are open stay where they are."""

    def __init__(self, *backends: Server) -> None:
        self.backends = list(backends)
        self.sent: Counter[str] = Counter()

    def __enter__(self) -> Balancer:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._listener:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            self._threads[0].join()
        for thread in self._threads:
            thread.join(60)

    def _accept(self) -> None:
        for turn in itertools.count():
            try:
                client, _ = self._listener.accept()
            except OSError:  # shut down
                return
            backends = list(self.backends)
            chosen = backends[turn % len(backends)].url
            self.sent[chosen] += 1
            self._threads.append(threading.Thread(target=self._carry, args=(client, chosen)))
            self._threads[-1].start()

    def _carry(self, client: socket.socket, url: str) -> None:
        host, _, port = url.removeprefix("http://").rpartition(":")
        with client, socket.create_connection((host, int(port))) as server:
            there = threading.Thread(target=self._pump, args=(client, server))
            there.start()
            self._pump(server, client)
            there.join()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):  # the other direction broke, and its end sees that
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def two_services(*arguments: str) -> Iterator[list[Server]]:
    """All that are in the list at the end are stopped."""
    with ThreadPoolExecutor() as starting:
        running = list(starting.map(lambda _: start_server(*arguments), range(2)))
    try:
        yield running
    finally:
        for each in running:
            each.process.kill()
            each.process.wait()


def test_a_rolling_update_fails_no_request(bundle: Bundle) -> None:
    arguments = ("--bundle", str(bundle.path), "--timeout-ms", "60000")
    expected = expectations(bundle)
    with two_services(*arguments) as running, Balancer(*running) as balancer:
        old = [each.url for each in running]
        with Load(balancer.url, expected, connections=8) as load:
            load.wait_for(50)
            for told_first in (True, False):
                running.append(start_server(*arguments))  # maxSurge: ready before another goes
                balancer.backends.append(running[-1])
                leaving = running[0]
                if told_first:  # as preStop sees to
                    balancer.backends.remove(leaving)
                    load.wait_for(20)
                leaving.process.send_signal(signal.SIGTERM)
                if not told_first:  # as when a node's proxy hears of it late
                    leaving.wait_for("draining")
                    load.wait_for(20)
                    balancer.backends.remove(leaving)
                assert leaving.process.wait(60) == 0
                running.remove(leaving)
                load.wait_for(50)
        assert set(load.counts) == {"200"}, f"{load.counts} {load.complaints[:3]}"
        assert load.counts["200"] > 200
        assert not {each.url for each in running} & set(old)
        assert all(balancer.sent[each.url] for each in running), f"the new ones were not asked: {balancer.sent}"
