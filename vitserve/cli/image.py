"""``vitserve image``: a container image with a model in it."""

from __future__ import annotations

import json
import shutil
import subprocess
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vitserve import __version__
from vitserve.cli.console import one_line_errors


class Builder(StrEnum):
    """A program that builds images."""

    docker = "docker"
    podman = "podman"
    buildah = "buildah"


_DOCKERFILE = """\
# Written by `vitserve image`. The image serves {name} {version}.
ARG BASE={base}
FROM ${{BASE}}
LABEL org.opencontainers.image.title={title} \\
      org.opencontainers.image.version={label}
COPY bundle /models/bundle
ENV VITSERVE_BUNDLE=/models/bundle
"""


def image(
    source: Annotated[
        str, typer.Argument(help="Directory of a bundle, or a source of `vitserve export`, which is exported first.")
    ],
    tag: Annotated[str, typer.Option("--tag", "-t", help="Name of the image, such as registry.example/cats:1.")],
    base: Annotated[
        str, typer.Option(help="Image of vitserve to add the bundle to; docs/deployment.md describes how to build it.")
    ] = f"vitserve:{__version__}-cpu",
    context: Annotated[
        Path | None,
        typer.Option(help="Directory to write Dockerfile and bundle to. Default: image-NAME.", show_default=False),
    ] = None,
    builder: Annotated[
        Builder | None,
        typer.Option(help="Program that builds. Default: the first that is installed.", show_default=False),
    ] = None,
    build: Annotated[bool, typer.Option("--build/--no-build", help="--no-build only writes the directory.")] = True,
) -> None:
    """Put a model into a container image, which then needs no volume.

    Writes a Dockerfile and the bundle to a directory, and builds the image with docker, podman or buildah if one of
    them is installed.
    """
    with one_line_errors("export"):
        from vitserve.model.bundle.bundle import MANIFEST, open_bundle

        directory = context or Path(f"image-{tag.rpartition('/')[2].partition(':')[0]}")
        _check(directory)
        program = builder.value if builder is not None else _installed()
        if build and builder is not None and shutil.which(program) is None:
            raise ValueError(f"{program} is not installed")
        bundle = directory / "bundle"
        if (Path(source) / MANIFEST).exists():
            opened = open_bundle(Path(source))
            shutil.rmtree(bundle, ignore_errors=True)
            shutil.copytree(source, bundle)
        else:
            from vitserve.cli.export import export

            export(source, bundle)
            opened = open_bundle(bundle)
        _make_readable(bundle)
        name, version = opened.manifest.name, opened.manifest.version
        text = _DOCKERFILE.format(
            name=" ".join(name.split()),
            version=version,
            base=base,
            title=json.dumps(name),
            label=json.dumps(version),
        )
        (directory / "Dockerfile").write_text(text, encoding="utf-8")
        command = [program or "docker", "build", "-t", tag, str(directory)]
        if not build or not program:
            missing = "" if not build else " (none of docker, podman and buildah is installed)"
            typer.echo(f"{directory}: build it with: {' '.join(command)}{missing}")
            return
        if subprocess.run(command, check=False).returncode:
            raise RuntimeError(f"{' '.join(command)} failed; --base names the image of vitserve, now {base}")
    typer.echo(f"{tag}: run it with: {program if program != 'buildah' else 'podman'} run -p 127.0.0.1:8000:8000 {tag}")


def _installed() -> str:
    """Empty if there is none."""
    return next((builder.value for builder in Builder if shutil.which(builder.value)), "")


def _check(directory: Path) -> None:
    """Raises ValueError for a directory with other files, which must not get into an image."""
    unexpected = (
        sorted({file.name for file in directory.iterdir()} - {"Dockerfile", "bundle"}) if directory.exists() else []
    )
    if unexpected:
        raise ValueError(f"{directory} has other files ({', '.join(unexpected[:3])}); choose another --context")


def _make_readable(directory: Path) -> None:
    """The server in the image runs as another user."""
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
