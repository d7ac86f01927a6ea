"""Runs an image as a container engine would, without one: ``python -m tests.support.container IMAGE [ARGUMENT]…``.

tests/deploy/try-build makes such images. The container has its own process and mount namespaces, a read-only root
filesystem, the image's user, environment and entry point, no capabilities, a /dev/shm of 64 MiB, and tmpfs volumes.
It uses the network of this machine. Needs root, buildah and util-linux. The exit status is that of the container's
process 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

_BUILDAH = ("buildah", "--storage-driver", "vfs")
# Arguments: $1 the root directory, $2 the user id, $3 the writable directories, then the environment and the command.
_SCRIPT = """
set -eu
root=$1 user=$2 volumes=$3; shift 3
mount --make-rprivate /
mount --bind "$root" "$root" && mount -o remount,bind,ro,nosuid "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o size=64k,mode=755 tmpfs "$root/dev"
for name in null zero urandom random; do touch "$root/dev/$name" && mount --bind "/dev/$name" "$root/dev/$name"; done
mkdir "$root/dev/shm" && mount -t tmpfs -o size=64m,mode=1777 tmpfs "$root/dev/shm"
for name in $volumes; do mount -t tmpfs -o "uid=$user,gid=$user,mode=755" tmpfs "$root$name"; done
cd "$root"
exec chroot "$root" /usr/bin/setpriv --reuid "$user" --regid "$user" --clear-groups --no-new-privs \
    --bounding-set -all --inh-caps -all /usr/bin/env -i "$@"
"""

Config = dict[str, Any]


def _buildah(*arguments: str) -> str:
    return subprocess.run([*_BUILDAH, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def image_config(image: str) -> Config:
    """The image's User, Env, Entrypoint, Cmd, Volumes, Healthcheck and Labels. Raises CalledProcessError if missing."""
    config: Config = json.loads(_buildah("inspect", "--type", "image", image))["Docker"]["config"]
    return config


def mount(image: str) -> tuple[str, Path]:
    """A new container of the image and its root directory. Pass the container to ``remove``."""
    container = _buildah("from", "--pull-never", image)
    return container, Path(_buildah("mount", container))


def remove(container: str) -> None:
    _buildah("rm", container)


def run_command(root: Path, config: Config, environment: list[str], arguments: list[str]) -> list[str]:
    """The command that runs the container: ``unshare``, whose only child is the container's process 1."""
    user = config["User"].partition(":")[0]
    command = [*config["Env"], *environment, *config["Entrypoint"], *(arguments or config["Cmd"])]
    namespaces = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork"]
    return [*namespaces, "/bin/sh", "-c", _SCRIPT, "container", str(root), user, " ".join(config["Volumes"]), *command]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    options, arguments = parser.parse_known_args()
    container, root = mount(options.image)
    try:
        command = run_command(root, image_config(options.image), options.env, arguments)
        return subprocess.run(command, env={"PATH": os.environ["PATH"]}, check=False).returncode
    finally:
        remove(container)


if __name__ == "__main__":
    raise SystemExit(main())
