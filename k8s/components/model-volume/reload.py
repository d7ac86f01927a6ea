"""Reloads the bundle when its manifest changes: ``reload.py [SECONDS BETWEEN CHECKS]``. Runs as the container `reload`.

It uses the standard library only. A bundle that the service rejects is not retried until its manifest changes again;
the reason is logged.
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
class Watcher:
    manifest: Path
    port: int
    key: str
    processed: bytes = b""  # the last manifest that the service opened or rejected
    compared: bool = False  # whether the first manifest was compared with the model that the service reports

    def check(self) -> None:
        """Reload if the manifest changed.

        Raises OSError, HTTPException or ValueError while the volume or the service is not available.
        """
        content = self.manifest.read_bytes()
        self.processed = self.processed or content  # the service opens the first manifest itself
        if not self.compared:
            self._compare(json.loads(content))
        if content != self.processed:
            status, response = self._request("POST", "/v1/admin/reload")
            level = logging.INFO if status == 200 else logging.ERROR
            log.log(level, "%s changed; the service responded %d: %s", self.manifest, status, json.dumps(response))
            if status in (200, 409):
                self.processed = content

    def _compare(self, description: dict[str, object]) -> None:
        """Notice a manifest that changed after the service had read it and before the first check."""
        status, model = self._request("GET", "/v1/model")
        if status == 200:
            self.compared = True
            if any(model[key] != description[key] for key in ("name", "version")):
                self.processed = b"another manifest"

    def _request(self, method: str, path: str) -> tuple[int, dict[str, object]]:
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
    # Process 1 has no default action for SIGTERM: block the signal, and receive it between two checks.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    watcher = Watcher(
        Path(os.environ["VITSERVE_BUNDLE"]) / "bundle.json",
        int(os.environ.get("VITSERVE_ADMIN_PORT", "0")) or int(os.environ["VITSERVE_PORT"]),
        os.environ["VITSERVE_ADMIN_KEY"],
    )
    while signal.sigtimedwait({signal.SIGTERM}, seconds) is None:
        try:
            watcher.check()
        except (OSError, http.client.HTTPException, ValueError) as error:
            log.warning("retrying at the next check: %s", error)


if __name__ == "__main__":
    main()
