"""Runs an image that docker/try-build made as a container engine would: `try_run.py IMAGE [--env NAME=VALUE]… [ARGUMENT]…`. Used by tests/deploy/test_image.py.

Namespaces of its own for processes and mounts, a root that is mounted read-only, the image's user, environment and entry point, no capability, a /dev/shm of
64 MiB and the image's volumes as memory. The network is this machine's. Wants root, buildah and util-linux; ends with the status of the container's pid 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

BUILDAH = ("buildah", "--storage-driver", "vfs")
# Every path is an argument: $1 the root, $2 the user's id, $3 the directories that may be written to; what follows is run.
_INSIDE = """
set -eu
root=$1 user=$2 volumes=$3; shift 3
mount --make-rprivate /
mount --bind "$root" "$root" && mount -o remount,bind,ro,nosuid "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o size=64k,mode=755 tmpfs "$root/dev"
for each in null zero urandom random; do touch "$root/dev/$each" && mount --bind "/dev/$each" "$root/dev/$each"; done
mkdir "$root/dev/shm" && mount -t tmpfs -o size=64m,mode=1777 tmpfs "$root/dev/shm"
for each in $volumes; do mount -t tmpfs -o "uid=$user,gid=$user,mode=755" tmpfs "$root$each"; done
cd "$root"
exec chroot "$root" /usr/bin/setpriv --reuid "$user" --regid "$user" --clear-groups --no-new-privs --bounding-set -all --inh-caps -all \
    /usr/bin/env -i "$@"
"""


def config(image: str) -> dict[str, Any]:
    """What the image says of how it wants to be run: User, Env, Entrypoint, Cmd, Volumes, Healthcheck, Labels. Raises CalledProcessError if there is none."""
    inspected = subprocess.run(
        [*BUILDAH, "inspect", "--type", "image", image], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(inspected.stdout)["Docker"]["config"]
    return found


def mounted(image: str) -> tuple[str, Path]:
    """A container made of the image, and the directory where its files are; to be given to ``remove``."""
    container = subprocess.run(
        [*BUILDAH, "from", "--pull-never", image], capture_output=True, text=True, check=True
    ).stdout.strip()
    return container, Path(
        subprocess.run([*BUILDAH, "mount", container], capture_output=True, text=True, check=True).stdout.strip()
    )


def remove(container: str) -> None:
    subprocess.run([*BUILDAH, "rm", container], capture_output=True, check=True)


def command(root: Path, said: dict[str, Any], environment: list[str], arguments: list[str]) -> list[str]:
    """What to run for it. The process that it starts is `unshare`, whose one child is the container's pid 1."""
    user = said["User"].partition(":")[0]
    inside = [
        str(root),
        user,
        " ".join(said["Volumes"]),
        *said["Env"],
        *environment,
        *said["Entrypoint"],
        *(arguments or said["Cmd"]),
    ]
    return ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "/bin/sh", "-c", _INSIDE, "inside", *inside]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("--env", action="append", default=[])
    asked, arguments = parser.parse_known_args()
    container, root = mounted(asked.image)
    try:
        return subprocess.run(
            command(root, config(asked.image), asked.env, arguments), env={"PATH": os.environ["PATH"]}, check=False
        ).returncode
    finally:
        remove(container)


if __name__ == "__main__":
    raise SystemExit(main())
