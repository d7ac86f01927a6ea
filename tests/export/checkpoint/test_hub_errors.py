"""Models that cannot be fetched are rejected with a message that names the reason."""

from __future__ import annotations

import errno
import os

import pytest

from tests.support.hub_client import PLAIN, SHARDED, SHARDS, ClientMachine
from tests.support.hub_server import Cut, HubServer
from vitserve.export.checkpoint.errors import HubError
from vitserve.export.checkpoint.hub import fetch


@pytest.mark.parametrize("index", [b"<html>", b'{"weight_map": 1}'])
def test_a_broken_index_is_rejected(hub: HubServer, machine: ClientMachine, index: bytes) -> None:
    hub.commit("owner/name", SHARDED | {"model.safetensors.index.json": index})
    assert "model.safetensors.index.json of owner/name is not an index of shards" in machine.error("owner/name")


def test_an_incomplete_cache_is_rejected_offline(hub: HubServer, machine: ClientMachine) -> None:
    """In offline mode, because huggingface_hub retries for 20 seconds to reach a hub for a missing file."""
    commit = hub.commit("owner/name", SHARDED)
    hub.cuts[max(SHARDS)] = Cut(after_bytes=500_000, reset=True)
    machine.error("owner/name")
    for source in ("owner/name", f"owner/name@{commit}"):
        error = machine.error(source, HF_HUB_OFFLINE="1")
        assert f"{hub.url} cannot be reached" in error
        assert "is not complete in the cache" in error


def test_a_broken_download_keeps_the_commit_before_it(
    hub: HubServer, machine: ClientMachine, offline_machine: ClientMachine
) -> None:
    first = hub.commit("owner/name", PLAIN)
    machine.fetch("owner/name")
    hub.commit("owner/name", SHARDED)
    hub.cuts[max(SHARDS)] = Cut(after_bytes=500_000, reset=True)
    machine.error("owner/name")
    assert offline_machine.fetch(f"owner/name@{first}").files == PLAIN


def test_an_uncached_model_is_rejected_offline(
    hub: HubServer, machine: ClientMachine, offline_machine: ClientMachine
) -> None:
    hub.commit("owner/name", PLAIN)
    error = offline_machine.error("owner/name")
    cache = offline_machine.home / "hf" / "hub"
    assert f"{offline_machine.endpoint} cannot be reached" in error
    assert f"owner/name@main is not complete in the cache ({cache})" in error
    assert error.endswith(os.strerror(errno.ECONNREFUSED))
    assert "HF_HUB_OFFLINE" in machine.error("owner/name", HF_HUB_OFFLINE="1")
    assert not hub.downloaded()


def test_an_unknown_repository_or_revision_is_named(hub: HubServer, machine: ClientMachine) -> None:
    hub.commit("owner/name", PLAIN)
    assert f"{hub.url} has no model owner/other" in machine.error("owner/other")
    assert "owner/name has no revision v9" in machine.error("owner/name@v9")


def test_a_gated_repository_requires_a_token_with_access(hub: HubServer, machine: ClientMachine) -> None:
    hub.commit("owner/name", PLAIN)
    hub.repositories["owner/name"].token = "hf_granted"
    without_access: list[dict[str, str]] = [{}, {"HF_TOKEN": "hf_another"}]
    for settings in without_access:
        error = machine.error("owner/name", **settings)
        assert f"owner/name is gated: request access at {hub.url}/owner/name, then set HF_TOKEN" in error
    assert machine.fetch("owner/name", HF_TOKEN="hf_granted").files == PLAIN


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "has no config.json"), ("model.safetensors", "has no weights: none of model.safetensors,")],
)
def test_a_model_without_config_or_weights_is_rejected(
    hub: HubServer, machine: ClientMachine, missing: str, message: str
) -> None:
    files = {name: body for name, body in PLAIN.items() if name != missing}
    hub.commit("owner/name", files | {"tf_model.h5": b"h5", "modeling_x.py": b""})
    assert f"owner/name {message}" in machine.error("owner/name")
    assert not {"model.safetensors", "tf_model.h5", "modeling_x.py"} & set(hub.downloaded())


def test_a_login_page_instead_of_the_hub_is_rejected(hub: HubServer, machine: ClientMachine) -> None:
    hub.override = (200, b"<html>Log in to the network</html>")
    assert f"cannot download owner/name from {hub.url}" in machine.error("owner/name")


@pytest.mark.parametrize(
    "source",
    [
        "",
        "name",
        "/name",
        "owner/",
        "owner/name/more",
        "owner/na me",
        "own--er/name",
        *(f"owner/name@{revision}" for revision in ("", "a b", "../x", "/x", "a/../../x")),
    ],
)
def test_a_malformed_source_is_rejected_with_the_form(source: str) -> None:
    with pytest.raises(HubError, match="write owner/name or owner/name@revision"):
        fetch(source)
