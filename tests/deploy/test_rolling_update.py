"""A rolling update of two real services under load.

They are behind a balancer of TCP connections, which is how a Kubernetes Service distributes requests.
"""

from __future__ import annotations

import itertools
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

from tests.support.load import Load, expectations
from tests.support.server import Server, start_server
from vitserve.model.bundle.bundle import Bundle


class Balancer:
    """Sends every new connection to the next backend. Open connections stay at theirs."""

    def __init__(self, *backends: Server) -> None:
        self.backends = list(backends)
        self.connections: Counter[str] = Counter()

    def __enter__(self) -> Balancer:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._listener:
            self._listener.shutdown(socket.SHUT_RDWR)  # ends the accepting thread
            self._threads[0].join()
        for thread in self._threads:
            thread.join(60)

    def _accept(self) -> None:
        for number in itertools.count():
            try:
                client, _ = self._listener.accept()
            except OSError:  # the listener was shut down
                return
            backends = list(self.backends)
            url = backends[number % len(backends)].url
            self.connections[url] += 1
            self._threads.append(threading.Thread(target=self._proxy, args=(client, url)))
            self._threads[-1].start()

    def _proxy(self, client: socket.socket, url: str) -> None:
        host, _, port = url.removeprefix("http://").rpartition(":")
        with client, socket.create_connection((host, int(port))) as server:
            upstream = threading.Thread(target=self._copy, args=(client, server))
            upstream.start()
            self._copy(server, client)
            upstream.join()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):  # the connection broke, and the other direction ends as well
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def two_services(*arguments: str) -> Iterator[list[Server]]:
    """A list of two running services. Every service in the list at the end is killed."""
    with ThreadPoolExecutor() as pool:
        services = list(pool.map(lambda _: start_server(*arguments), range(2)))
    try:
        yield services
    finally:
        for service in services:
            service.process.kill()
            service.process.wait()


@pytest.mark.slow
def test_rolling_update_fails_no_request(bundle: Bundle) -> None:
    arguments = ("--bundle", str(bundle.path), "--timeout-ms", "60000")
    expected = expectations(bundle)
    with two_services(*arguments) as services, Balancer(*services) as balancer:
        old_urls = {service.url for service in services}
        with Load(balancer.url, expected, connections=8) as load:
            load.wait_for(50)
            for removed_before_sigterm in (True, False):
                services.append(start_server(*arguments))  # as maxSurge: the new one is ready before an old one stops
                balancer.backends.append(services[-1])
                leaving = services[0]
                if removed_before_sigterm:  # preStop gives the balancers time for that
                    balancer.backends.remove(leaving)
                    load.wait_for(20)
                leaving.process.send_signal(signal.SIGTERM)
                if not removed_before_sigterm:  # a balancer that is updated late
                    leaving.wait_for("draining")
                    load.wait_for(20)
                    balancer.backends.remove(leaving)
                assert leaving.process.wait(60) == 0
                services.remove(leaving)
                load.wait_for(50)
        assert set(load.counts) == {"200"}, f"{load.counts} {load.complaints[:3]}"
        assert load.counts["200"] > 200
        assert not {service.url for service in services} & old_urls
        assert all(balancer.connections[service.url] for service in services), balancer.connections
