"""``vitserve serve``: one option per setting, each also an environment variable."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from vitserve import __version__
from vitserve.cli.console import one_line_errors
from vitserve.service.log_format import is_json, set_up_logging
from vitserve.service.settings import Settings, SettingsError

log = logging.getLogger("vitserve.serve")

_PREFIX = "VITSERVE_"
# Kubernetes sets these in every pod of a namespace that has a Service called vitserve (enableServiceLinks).
_SERVICE_LINK = re.compile(r"VITSERVE_(SERVICE_(HOST|PORT\w*)|PORT_\d+_(TCP|UDP)\w*)")


def serve(source: str, **values: Any) -> None:
    """Serve a model over HTTP.

    SOURCE is a bundle, or a checkpoint, which is exported into the cache first. Without a source and without --bundle,
    the bundled demonstration model is served.
    """
    with one_line_errors():
        _check_environment(os.environ)
        if source and values["bundle"]:
            raise SettingsError(
                f"a source ({source}) and a bundle ({values['bundle']}) are both given; give one of them"
            )
        settings = Settings(**values)
        if settings.log_format == "json":
            set_up_logging("supervisor", settings.log_level, settings.log_format)
        if source:
            settings = dataclasses.replace(settings, bundle=_bundle_of(source))
        if settings.bundle:
            _check_bundle(Path(settings.bundle))
        from vitserve.service.supervisor.launch import serve as run

        status = run(settings)
    raise typer.Exit(status)


def _bundle_of(source: str) -> str:
    """The path of the source's bundle: the source itself, or the bundle exported from it."""
    if (Path(source) / "bundle.json").exists():
        return source
    from vitserve.export.cache import cached_bundle

    return str(cached_bundle(source, __version__, _report))


def _report(step: str) -> None:
    if is_json():
        log.info("%s", step)
    else:
        typer.echo(step, err=True)


def _check_bundle(path: Path) -> None:
    """Raises SettingsError if there is no bundle. The engine worker verifies its files."""
    if not path.is_dir():
        raise SettingsError(f"{path} is not a directory; a bundle is a directory made by `vitserve export`")
    if not (path / "bundle.json").is_file():
        raise SettingsError(f"{path} is not a bundle: it has no bundle.json; `vitserve export` makes bundles")


def _check_environment(environment: Mapping[str, str]) -> None:
    """Raises SettingsError for a variable that begins as ours do and names no setting."""
    known = [_variable(setting.name) for setting in dataclasses.fields(Settings)]
    unknown = [name for name in environment if name.startswith(_PREFIX) and name not in known]
    for name in sorted(unknown):
        if not _SERVICE_LINK.fullmatch(name):
            similar = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {similar[0]}?" if similar else "`vitserve serve --help` lists all settings"
            raise SettingsError(f"the environment variable {name} is not a setting; {hint}")


def _variable(setting: str) -> str:
    return f"{_PREFIX}{setting.upper()}"


def _signature() -> inspect.Signature:
    """One option per setting, --like-this, with VITSERVE_LIKE_THIS as its environment variable."""
    hints = get_type_hints(Settings)
    help_text = (
        "Directory or file of a checkpoint or bundle, hf:owner/name[@revision], or timm:NAME. See docs/models.md."
    )
    source = Annotated[str, typer.Argument(help=help_text, show_default=False)]
    parameters = [inspect.Parameter("source", inspect.Parameter.POSITIONAL_OR_KEYWORD, default="", annotation=source)]
    for setting in dataclasses.fields(Settings):
        option = typer.Option(help=setting.metadata["help"], envvar=_variable(setting.name))
        parameters.append(
            inspect.Parameter(
                setting.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=setting.default,
                annotation=Annotated[hints[setting.name], option],
            )
        )
    return inspect.Signature(parameters)


serve.__signature__ = _signature()  # type: ignore[attr-defined]  # typer reads it
serve.__annotations__ = {parameter.name: parameter.annotation for parameter in _signature().parameters.values()}
