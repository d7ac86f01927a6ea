"""Renders a Helm chart: ``helm_renderer CHART``. Each line of the input is values in JSON, each of the output a result.

A process of its own, because the library brings the runtime of Go and its signal handlers.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping


def main() -> None:
    helm = importlib.import_module("helm_python")
    respond({"lint": helm.lint(sys.argv[1])["messages"]})
    with helm.Chart.load(sys.argv[1]) as chart:
        for line in sys.stdin:
            try:
                result: dict[str, object] = {
                    "rendered": list(chart.render(json.loads(line), name="my-release").values())
                }
            except helm.HelmError as error:
                result = {"error": str(error)}
            respond(result)


def respond(result: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
