"""Which directory may import which. Imports point one way, and no kind of process imports another."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT

# Directory or file → the modules and packages of vitserve that it may import. The longest matching name applies.
MAY_IMPORT: dict[str, set[str]] = {
    "model/config.py": set(),
    "model/arrays.py": set(),
    "model/bundle": {"model.arrays", "model.config", "model.bundle"},
    "model/network": {"model.config", "model.network"},
    "model/training": {"model.arrays", "model.config", "model.bundle", "model.network", "model.training"},
    "service/errors.py": {"model.bundle.preprocess"},
    "service/cgroup.py": set(),
    "service/cache_directory.py": set(),
    "service/machine.py": {"service.cache_directory", "service.cgroup"},
    "service/log_format.py": set(),
    "service/python_process.py": set(),
    "service/reserved_time.py": set(),
    "service/decode_queue.py": {"service.reserved_time"},
    "service/scheduler.py": {"service.reserved_time"},
    "service/metrics.py": {"service.ipc.control_channel"},
    "service/http_settings.py": set(),
    "service/settings.py": {"service.engines.catalog", "service.http_settings"},
    "service/engines/catalog.py": {"model.arrays"},  # while type-checking only
    "service/engines": {
        "model.arrays",
        "model.bundle",
        "model.config",
        "service.engines",
        "service.cache_directory",
        "service.machine",
        "service.python_process",
    },
    "service/ipc/control_messages.py": {"service.settings"},
    "service/credentials": {"service.credentials"},
    "service/ipc": {
        "model.arrays",
        "model.bundle.preprocess",
        "service.ipc",
        "service.log_format",
        "service.scheduler",
    },
    "service/supervisor": {
        "service.credentials",
        "service.engines.catalog",
        "service.ipc.child_runtime",
        "service.ipc.control_channel",
        "service.ipc.control_messages",
        "service.ipc.memory_layout",
        "service.ipc.metrics_directory",
        "service.log_format",
        "service.machine",
        "service.python_process",
        "service.settings",
        "service.supervisor",
    },
    "service/http_worker": {
        "model.arrays",
        "model.bundle",
        "service.credentials",
        "service.decode_queue",
        "service.errors",
        "service.http_worker",
        "service.ipc",
        "service.log_format",
        "service.machine",
        "service.metrics",
        "service.python_process",
        "service.scheduler",
        "service.settings",
    },
    "service/explain_worker": {
        "model.arrays",
        "model.bundle",
        "service.engines.telemetry",
        "service.explain_worker",
        "service.ipc.framed_worker",
        "service.log_format",
    },
    "service/engine_worker": {
        "model.arrays",
        "model.bundle",
        "service.cache_directory",
        "service.engine_worker",
        "service.engines",
        "service.ipc",
        "service.machine",
        "service.metrics",
        "service.scheduler",
        "service.settings",
    },
    "export": {"export", "model", "service.engines", "service.machine", "service.python_process"},
    "bench": {
        "bench",
        "model.arrays",
        "model.bundle",
        "model.config",
        "service.decode_queue",
        "service.engine_worker",
        "service.engines",
        "service.ipc",
        "service.machine",
        "service.scheduler",
        "service.settings",
    },
    "vitserve": {"bench", "cli", "export", "model", "predict", "service"},
    "vitserve/predict": {"model", "predict", "service.engines.engine", "service.machine"},
    "vitserve/client": {"client"},
    "benchmarks": {"bench", "export", "model", "service"},
}
TORCH = {"torch", "onnx", "onnxscript", "safetensors", "timm"}
MAY_USE_TORCH = (
    "export/",
    "model/network/",
    "model/training/",
    "service/engines/torch/",
    "service/http_worker/dispatch/gpu_decoder.py",
    "benchmarks/",
)


def sources() -> list[Path]:
    return [
        path
        for directory in ("model", "export", "service", "bench", "benchmarks", "vitserve/cli", "vitserve/client")
        for path in sorted((ROOT / directory).rglob("*.py"))
    ]


def imported(path: Path) -> set[str]:
    """Every module that the file imports, also inside functions. ``from a import b`` is a.b if that is a module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {
                f"{node.module}.{alias.name}" for alias in node.names if is_module(f"{node.module}.{alias.name}")
            }
            names |= modules or {node.module}
    return names


@cache
def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def rule_of(path: Path) -> set[str]:
    relative = str(path.relative_to(ROOT))
    return MAY_IMPORT[
        max((part for part in MAY_IMPORT if relative == part or relative.startswith(f"{part}/")), key=len)
    ]


def forbidden(path: Path, names: set[str]) -> set[str]:
    ours = {name.removeprefix("vitserve.") for name in names if name.startswith("vitserve.")}
    return {name for name in ours if not any(f"{name}.".startswith(f"{allowed}.") for allowed in rule_of(path))}


def test_imports_point_one_way() -> None:
    violations = {str(path.relative_to(ROOT)): forbidden(path, imported(path)) for path in sources()}
    assert not {path: names for path, names in violations.items() if names}


def test_the_rules_would_notice_an_http_worker_that_imports_an_engine() -> None:
    app = ROOT / "service" / "http_worker" / "app.py"
    assert forbidden(app, {"vitserve.service.engines.openvino_engine"}) == {"service.engines.openvino_engine"}
    assert forbidden(app, {"vitserve.service.engine_worker.main", "vitserve.service.supervisor.supervisor"})
    assert not forbidden(app, {"vitserve.service.ipc.slots", "numpy"})


def test_only_some_directories_use_torch() -> None:
    others = [path for path in sources() if not str(path.relative_to(ROOT)).startswith(MAY_USE_TORCH)]
    assert not [str(path) for path in others if {name.split(".")[0] for name in imported(path)} & TORCH]


def test_no_test_imports_a_test() -> None:
    tests = [path for path in sorted((ROOT / "tests").rglob("*.py")) if "support" not in path.parts]
    assert not [str(path) for path in tests if [name for name in imported(path) if ".test_" in name]]


def test_there_are_no_import_cycles() -> None:
    graph = {
        module_name(path): {name for name in imported(path) if name.startswith(("vitserve.", "benchmarks."))}
        for path in sources()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' → '.join((*trail[trail.index(name) :], name))}"
        if name in done:
            return
        for other in graph.get(name, set()):
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def module_name(path: Path) -> str:
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return dotted if dotted.startswith(("vitserve.", "benchmarks.")) else f"vitserve.{dotted}"


def test_init_files_are_empty() -> None:
    """Except that of the client, which is for programs of others: it names all that they may import."""
    public = ROOT / "vitserve" / "client" / "__init__.py"
    assert all(path.read_text() == "" for path in sources() if path.name == "__init__.py" and path != public)
