"""Fetching a model from the hub: only its files, of one commit, and from the cache without a network."""

from __future__ import annotations

import random

import pytest

from tests.support.hub_client import CONFIG, PLAIN, SHARDED, SHARDS, UNUSED, WEIGHTS, ClientMachine, index_of
from tests.support.hub_server import Cut, HubServer, Request

# huggingface_hub downloads in chunks of this many bytes; an interrupted first chunk leaves nothing to resume.
CHUNK_BYTES = 10 * 1024 * 1024


def test_only_the_files_of_the_model_are_downloaded(hub: HubServer, machine: ClientMachine) -> None:
    commit = hub.commit("owner/name", PLAIN | UNUSED)
    fetched = machine.fetch("owner/name", TQDM_POSITION="-1")  # forces the progress bar without a terminal
    assert (fetched.files, fetched.commit) == (PLAIN, commit)
    assert sorted(hub.downloaded()) == sorted(PLAIN)
    assert "Downloading" in fetched.stderr, "the download shows its progress"


def test_cached_files_are_not_downloaded_again(hub: HubServer, machine: ClientMachine) -> None:
    hub.commit("owner/name", PLAIN)
    first = machine.fetch("owner/name")
    second = machine.fetch("owner/name")
    assert (second.files, second.commit) == (first.files, first.commit)
    assert sorted(hub.downloaded()) == sorted(PLAIN)


def test_the_pickle_is_fetched_if_there_is_no_safetensors(hub: HubServer, machine: ClientMachine) -> None:
    expected = {"config.json": CONFIG, "pytorch_model.bin": WEIGHTS}
    hub.commit("owner/name", expected | {"tf_model.h5": b"h5"})
    fetched = machine.fetch("owner/name")
    assert fetched.files == expected
    assert "No files matched" not in fetched.stderr


def test_the_shards_that_the_index_names_are_fetched(hub: HubServer, machine: ClientMachine) -> None:
    hub.commit("owner/name", SHARDED | UNUSED | {"model-00003-of-00003.safetensors": b"an old shard"})
    assert machine.fetch("owner/name").files == SHARDED


def test_a_pinned_commit_stays_the_same_when_main_moves(hub: HubServer, machine: ClientMachine) -> None:
    first = hub.commit("owner/name", PLAIN)
    assert machine.fetch("owner/name").commit == first
    second = hub.commit("owner/name", PLAIN | {"config.json": b'{"model_type": "deit"}'})
    pinned, newest = machine.fetch(f"owner/name@{first}"), machine.fetch("owner/name")
    assert (pinned.commit, pinned.files["config.json"]) == (first, CONFIG)
    assert (newest.commit, newest.files["config.json"]) == (second, b'{"model_type": "deit"}')
    assert hub.downloaded().count("model.safetensors") == 1, "both commits share the file"


def test_a_revision_may_contain_a_slash(hub: HubServer, machine: ClientMachine, offline_machine: ClientMachine) -> None:
    hub.commit("owner/name", PLAIN)
    other = hub.commit("owner/name", PLAIN | {"config.json": b"{}"}, branch="refs/pr/1")
    assert machine.fetch("owner/name@refs/pr/1").commit == other
    assert offline_machine.fetch("owner/name@refs/pr/1").commit == other


def test_an_interrupted_download_is_resumed(hub: HubServer, machine: ClientMachine) -> None:
    weights = random.Random(1).randbytes(2 * CHUNK_BYTES + 1_000_000)
    commit = hub.commit("owner/name", PLAIN | {"model.safetensors": weights})
    hub.cuts["model.safetensors"] = Cut(after_bytes=CHUNK_BYTES + 3_000_000, reset=False)
    assert machine.fetch("owner/name").files["model.safetensors"] == weights
    path = f"/owner/name/resolve/{commit}/model.safetensors"
    assert [request for request in hub.requests if request.method == "GET" and request.path == path] == [
        Request("GET", path, None),
        Request("GET", path, f"bytes={CHUNK_BYTES}-"),
    ]
    assert hub.sent_bytes["model.safetensors"] == len(weights) + 3_000_000, "only the partial chunk is sent twice"


def test_the_next_run_fetches_only_the_missing_files(hub: HubServer, machine: ClientMachine) -> None:
    hub.commit("owner/name", SHARDED)
    second = max(SHARDS)
    hub.cuts[second] = Cut(after_bytes=500_000, reset=True)
    assert "cannot download owner/name" in machine.error("owner/name")
    assert machine.fetch("owner/name").files == SHARDED
    expected = {name: 2 if name == second else 1 for name in SHARDED}
    assert {name: hub.downloaded().count(name) for name in SHARDED} == expected


def test_the_cache_is_used_when_the_hub_is_unreachable(
    hub: HubServer, machine: ClientMachine, offline_machine: ClientMachine
) -> None:
    commit = hub.commit("owner/name", PLAIN)
    machine.fetch("owner/name")
    for source in ("owner/name", "owner/name@main", f"owner/name@{commit}"):
        fetched = offline_machine.fetch(source)
        assert (fetched.files, fetched.commit) == (PLAIN, commit)


def test_offline_mode_uses_the_cache_without_any_request(hub: HubServer, machine: ClientMachine) -> None:
    commit = hub.commit("owner/name", SHARDED)
    machine.fetch("owner/name")
    requests = len(hub.requests)
    fetched = machine.fetch("owner/name", HF_HUB_OFFLINE="1")
    assert (fetched.files, fetched.commit, fetched.stderr) == (SHARDED, commit, "")
    assert len(hub.requests) == requests


def test_a_cache_filled_by_another_program_is_used_offline(
    hub: HubServer, machine: ClientMachine, offline_machine: ClientMachine
) -> None:
    """Other programs, and earlier versions of huggingface_hub, store no listing of the repository."""
    commit = hub.commit("owner/name", SHARDED)
    machine.fetch("owner/name")
    (listing,) = machine.home.rglob(f"trees/{commit}.json")
    listing.unlink()
    assert offline_machine.fetch("owner/name").files == SHARDED


def test_the_cache_is_used_when_the_hub_is_down(hub: HubServer, machine: ClientMachine) -> None:
    commit = hub.commit("owner/name", PLAIN)
    hub.override = (503, b"")
    assert "503" in machine.error("owner/name")
    hub.override = None
    machine.fetch("owner/name")
    hub.override = (503, b"")
    fetched = machine.fetch("owner/name")
    assert (fetched.files, fetched.commit) == (PLAIN, commit)


@pytest.mark.parametrize(
    "shard", ["model-00009-of-00009.safetensors", "modeling_x.py", "../config.json", "onnx/model.safetensors"]
)
def test_an_index_may_only_name_weights_of_its_directory(hub: HubServer, machine: ClientMachine, shard: str) -> None:
    others = {"modeling_x.py": b"raise SystemExit", "onnx/model.safetensors": b"another model"}
    hub.commit("owner/name", SHARDED | others | {"model.safetensors.index.json": index_of(*SHARDS, shard)})
    error = machine.error("owner/name")
    assert f"names {shard!r}, which is not a weights file" in error or f"outside its directory: {shard!r}" in error
    assert sorted(hub.downloaded()) == ["config.json", "model.safetensors.index.json"]
