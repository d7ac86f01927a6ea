"""Delete the parts of an installed OpenVINO that vitserve never loads, about 65 MB: ``strip_openvino.py ENVIRONMENT``.

vitserve runs OpenVINO on CPUs only, so the plug-ins for Intel GPUs and NPUs and the kernel cache of the GPU plug-in are
unused, and so are the C++ headers. OpenVINO works without these files: its list of devices then names the CPU alone.
To restore them, run ``pip install --force-reinstall openvino``.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

UNUSED = ("libs/*intel_gpu_plugin*", "libs/*intel_npu*", "libs/cache.json", "include", "cmake")


def strip(environment: Path) -> int:
    """Delete the unused files of every OpenVINO under ``environment``; return how many bytes they held."""
    freed_bytes = 0
    for package in environment.glob("lib/python3*/site-packages/openvino"):
        for path in (path for pattern in UNUSED for path in package.glob(pattern)):
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            freed_bytes += sum(file.stat().st_size for file in files)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    return freed_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("environment", type=Path, help="directory of a Python virtual environment")
    freed_bytes = strip(parser.parse_args().environment)
    print(f"openvino: deleted {freed_bytes / 1e6:.0f} MB of files that vitserve does not use")  # noqa: T201


if __name__ == "__main__":
    main()
