"""Has the service beside it open the bundle again when its manifest changes: `reload.py [seconds between looks]`. Run by the pod's container `reload`.

Of the standard library alone. What the service rejects is not asked for again until the manifest changes once more; its reason goes to the log.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("reload")


@dataclass
class Watch:
    manifest: Path
    port: int
    key: str
    settled: bytes = b""  # the manifest that the service has opened or rejected, as far as is known
    compared: bool = False  # whether what it served at first has been held against the manifest

    def look(self) -> None:
        """Once. Raises OSError, HTTPException or ValueError where the volume or the service does not answer (yet)."""
        found = self.manifest.read_bytes()
        self.settled = self.settled or found  # the service opens that one itself when it starts
        if not self.compared:
            status, served = self._ask("GET", "/v1/model")
            if status == 200:
                self.compared = True
                described = json.loads(found)
                if any(served[name] != described[name] for name in ("name", "version")):
                    self.settled = b"another"  # it changed before this container first looked
        if found != self.settled:
            status, answer = self._ask("POST", "/v1/admin/reload")
            log.log(
                logging.INFO if status == 200 else logging.ERROR,
                "%s changed; the service answers %d: %s",
                self.manifest,
                status,
                json.dumps(answer),
            )
            if status in (200, 409):
                self.settled = found

    def _ask(self, method: str, path: str) -> tuple[int, dict[str, object]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            connection.request(method, path, headers={"Authorization": f"Bearer {self.key}"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGTERM}
    )  # pid 1 has no default for it: it is waited for instead, between two looks
    watch = Watch(
        Path(os.environ["VITSERVE_BUNDLE"]) / "bundle.json",
        int(os.environ["VITSERVE_PORT"]),
        os.environ["VITSERVE_ADMIN_KEY"],
    )
    while signal.sigtimedwait({signal.SIGTERM}, seconds) is None:
        try:
            watch.look()
        except (OSError, http.client.HTTPException, ValueError) as error:
            log.warning("will look again: %s", error)


if __name__ == "__main__":
    main()
