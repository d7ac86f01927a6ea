"""Fetching from the hub: only what a model consists of, of one commit, whole, and from the cache when the hub is out of reach.

Each fetch is a process of its own, because huggingface_hub reads its environment when it is imported.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.hub_server import Cut, HubServer, Request
from tests.support.paths import ROOT

SCRIPT = """
import json, sys
from vitserve.export.checkpoint.hub import HubError, fetch
try:
    located = fetch(sys.argv[1])
except HubError as error:
    sys.exit(f"HubError: {error}")
print(json.dumps([str(located.path), located.revision]))
"""
CHUNK = (
    10 * 1024 * 1024
)  # bytes that huggingface_hub reads before it writes: what is cut off earlier leaves nothing to resume
CONFIG, PREPROCESSING, WEIGHTS = b'{"model_type": "vit"}', b'{"size": 224}', random.Random(0).randbytes(2_000_000)
PLAIN = {"config.json": CONFIG, "preprocessor_config.json": PREPROCESSING, "model.safetensors": WEIGHTS}
UNWANTED = {
    "README.md": b"# A model",
    "modeling_x.py": b"raise SystemExit",
    "tf_model.h5": b"h5",
    "pytorch_model.bin": b"pickle",
    "model.fp16.safetensors": b"half",
    "onnx/config.json": b"{}",
}
SHARDS = {f"model-0000{index}-of-00002.safetensors": random.Random(index).randbytes(1_000_000) for index in (1, 2)}


def index_of(*shards: str) -> bytes:
    return json.dumps(
        {"metadata": {}, "weight_map": {f"tensor.{number}": shard for number, shard in enumerate(shards * 2)}}
    ).encode()


SHARDED = {"config.json": CONFIG, "model.safetensors.index.json": index_of(*SHARDS), **SHARDS}


@dataclass(frozen=True)
class Fetched:
    files: dict[str, bytes]
    revision: str
    told: str  # standard error


@dataclass(frozen=True)
class Machine:
    """A user's: with a cache, and a hub that it may or may not reach."""

    home: Path
    endpoint: str

    def _run(self, source: str, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
        # Nothing inherited but the path: no proxy, token or setting of whoever runs the tests.
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "HF_HOME": str(self.home / "hf"),
            "HF_ENDPOINT": self.endpoint,
            **settings,
        }
        command = [sys.executable, "-W", "error", "-c", SCRIPT, source]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    def fetch(self, source: str, **settings: str) -> Fetched:
        done = self._run(source, settings)
        assert done.returncode == 0, done.stderr
        path, revision = json.loads(done.stdout)
        return Fetched(
            {str(each.relative_to(path)): each.read_bytes() for each in Path(path).rglob("*") if each.is_file()},
            revision,
            done.stderr,
        )

    def rejection(self, source: str, **settings: str) -> str:
        done = self._run(source, settings)
        last = done.stderr.strip().rsplit("\n", 1)[-1]
        assert (done.returncode, last[:10]) == (1, "HubError: "), done.stderr
        return last


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def machine(hub: HubServer, tmp_path: Path) -> Machine:
    return Machine(tmp_path, hub.url)


@pytest.fixture
def stranded(tmp_path: Path) -> Machine:
    """The same cache, and a hub that is gone: its port was free a moment ago."""
    with HubServer() as server:
        return Machine(tmp_path, server.url)


def test_only_what_the_model_consists_of_is_fetched(hub: HubServer, machine: Machine) -> None:
    commit = hub.commit("owner/name", PLAIN | UNWANTED)
    fetched = machine.fetch("owner/name", TQDM_POSITION="-1")  # the bar, although standard error is no terminal
    assert (fetched.files, fetched.revision) == (PLAIN, commit)
    assert sorted(hub.downloaded()) == sorted(PLAIN)
    assert "model.safetensors: 100%" in fetched.told, "the progress of what may take long is shown"


def test_what_is_cached_is_not_downloaded_again(hub: HubServer, machine: Machine) -> None:
    hub.commit("owner/name", PLAIN)
    first = machine.fetch("owner/name")
    again = machine.fetch("owner/name")
    assert (again.files, again.revision) == (first.files, first.revision)
    assert sorted(hub.downloaded()) == sorted(PLAIN)


def test_without_safetensors_the_pickle_is_fetched(hub: HubServer, machine: Machine) -> None:
    wanted = {"config.json": CONFIG, "pytorch_model.bin": WEIGHTS}
    hub.commit("owner/name", wanted | {"tf_model.h5": b"h5"})
    assert machine.fetch("owner/name").files == wanted


def test_shards_are_fetched_as_the_index_names_them(hub: HubServer, machine: Machine) -> None:
    hub.commit("owner/name", SHARDED | UNWANTED | {"model-00003-of-00003.safetensors": b"of another time"})
    assert machine.fetch("owner/name").files == SHARDED


@pytest.mark.parametrize(
    "named", ["model-00009-of-00009.safetensors", "modeling_x.py", "../config.json", "onnx/model.safetensors"]
)
def test_an_index_cannot_name_anything_but_weights_that_are_there(hub: HubServer, machine: Machine, named: str) -> None:
    there = {"modeling_x.py": b"raise SystemExit", "onnx/model.safetensors": b"another model"}
    hub.commit("owner/name", SHARDED | there | {"model.safetensors.index.json": index_of(*SHARDS, named)})
    assert f"names {named!r}, which is not among its weights" in machine.rejection("owner/name")
    assert hub.downloaded() == ["config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize("index", [b"<html>", b'{"weight_map": 1}'])
def test_a_broken_index_is_refused(hub: HubServer, machine: Machine, index: bytes) -> None:
    hub.commit("owner/name", SHARDED | {"model.safetensors.index.json": index})
    assert "model.safetensors.index.json of owner/name is not an index of shards" in machine.rejection("owner/name")


def test_a_pinned_revision_stays_what_it_was_while_main_moves(hub: HubServer, machine: Machine) -> None:
    first = hub.commit("owner/name", PLAIN)
    assert machine.fetch("owner/name").revision == first
    second = hub.commit("owner/name", PLAIN | {"config.json": b'{"model_type": "deit"}'})
    pinned, newest = machine.fetch(f"owner/name@{first}"), machine.fetch("owner/name")
    assert (pinned.revision, pinned.files["config.json"]) == (first, CONFIG)
    assert (newest.revision, newest.files["config.json"]) == (second, b'{"model_type": "deit"}')
    assert hub.downloaded().count("model.safetensors") == 1, "both commits share it"


def test_a_branch_with_a_slash_is_a_revision(hub: HubServer, machine: Machine, stranded: Machine) -> None:
    hub.commit("owner/name", PLAIN)
    other = hub.commit("owner/name", PLAIN | {"config.json": b"{}"}, branch="refs/pr/1")
    assert machine.fetch("owner/name@refs/pr/1").revision == other
    assert stranded.fetch("owner/name@refs/pr/1").revision == other


def test_a_cut_connection_is_resumed_where_it_was_cut(hub: HubServer, machine: Machine) -> None:
    weights = random.Random(1).randbytes(2 * CHUNK + 1_000_000)
    commit = hub.commit("owner/name", PLAIN | {"model.safetensors": weights})
    hub.cuts["model.safetensors"] = Cut(after=CHUNK + 3_000_000, reset=False)
    assert machine.fetch("owner/name").files["model.safetensors"] == weights
    path = f"/owner/name/resolve/{commit}/model.safetensors"
    assert [each for each in hub.requests if each.method == "GET" and each.path == path] == [
        Request("GET", path, None),
        Request("GET", path, f"bytes={CHUNK}-"),
    ]
    assert hub.sent["model.safetensors"] == len(weights) + 3_000_000, (
        "only what was cut off in the midst of a chunk is sent twice"
    )


def test_a_connection_that_is_reset_is_a_refusal_and_the_next_run_fetches_what_is_missing(
    hub: HubServer, machine: Machine
) -> None:
    hub.commit("owner/name", SHARDED)
    second = max(SHARDS)
    hub.cuts[second] = Cut(after=500_000, reset=True)
    assert f"{second} of owner/name could not be fetched" in machine.rejection("owner/name")
    assert machine.fetch("owner/name").files == SHARDED
    assert {name: hub.downloaded().count(name) for name in SHARDED} == {
        name: 2 if name == second else 1 for name in SHARDED
    }


def test_out_of_reach_the_cache_is_used(hub: HubServer, machine: Machine, stranded: Machine) -> None:
    commit = hub.commit("owner/name", PLAIN)
    machine.fetch("owner/name")
    for source in ("owner/name", "owner/name@main", f"owner/name@{commit}"):
        fetched = stranded.fetch(source)
        assert (fetched.files, fetched.revision, fetched.told) == (PLAIN, commit, "")


def test_told_to_be_offline_the_cache_is_used_and_nobody_asked(hub: HubServer, machine: Machine) -> None:
    commit = hub.commit("owner/name", SHARDED)
    machine.fetch("owner/name")
    asked = len(hub.requests)
    fetched = machine.fetch("owner/name", HF_HUB_OFFLINE="1")
    assert (fetched.files, fetched.revision, fetched.told) == (SHARDED, commit, "")
    assert len(hub.requests) == asked


def test_offline_after_a_download_that_broke_off_the_model_before_it_is_used(
    hub: HubServer, machine: Machine, stranded: Machine
) -> None:
    first = hub.commit("owner/name", PLAIN)
    machine.fetch("owner/name")
    second = hub.commit("owner/name", SHARDED)
    hub.cuts[max(SHARDS)] = Cut(after=500_000, reset=True)
    machine.rejection("owner/name")
    assert stranded.fetch("owner/name").revision == first
    assert f"owner/name@{second} is only partly in the cache" in stranded.rejection(f"owner/name@{second}")


def test_neither_reachable_nor_cached_is_a_refusal(hub: HubServer, machine: Machine, stranded: Machine) -> None:
    hub.commit("owner/name", PLAIN)
    rejection = stranded.rejection("owner/name")
    assert (
        f"owner/name@main is not in the cache ({stranded.home / 'hf' / 'hub'}), and {stranded.endpoint} cannot be reached"
        in rejection
    )
    assert rejection.endswith("Connection rejected)")
    assert machine.rejection("owner/name", HF_HUB_OFFLINE="1").endswith("and HF_HUB_OFFLINE is set")
    assert not hub.downloaded()


def test_an_unknown_repository_and_an_unknown_revision_are_named(hub: HubServer, machine: Machine) -> None:
    hub.commit("owner/name", PLAIN)
    assert f"{hub.url} has no model owner/other" in machine.rejection("owner/other")
    assert "owner/name has no revision v9" in machine.rejection("owner/name@v9")


def test_a_gated_repository_wants_a_token_that_has_access(hub: HubServer, machine: Machine) -> None:
    hub.commit("owner/name", PLAIN)
    hub.repositories["owner/name"].token = "hf_granted"
    for settings in ({}, {"HF_TOKEN": "hf_another"}):
        rejection = machine.rejection("owner/name", **settings)
        assert f"owner/name is gated: ask for access at {hub.url}/owner/name, then set HF_TOKEN" in rejection
    assert machine.fetch("owner/name", HF_TOKEN="hf_granted").files == PLAIN


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "has no config.json"), ("model.safetensors", "has no weights: none of model.safetensors,")],
)
def test_a_model_without_configuration_or_weights_is_refused_before_anything_is_downloaded(
    hub: HubServer, machine: Machine, missing: str, message: str
) -> None:
    hub.commit(
        "owner/name",
        {name: body for name, body in PLAIN.items() if name != missing} | {"tf_model.h5": b"h5", "modeling_x.py": b""},
    )
    assert f"owner/name {message}" in machine.rejection("owner/name")
    assert not hub.downloaded()


def test_a_page_where_the_hub_should_be_is_a_refusal(hub: HubServer, machine: Machine) -> None:
    hub.instead = (200, b"<html>Log in to the network</html>")
    assert f"{hub.url} does not answer owner/name as a hub does" in machine.rejection("owner/name")


def test_a_hub_that_is_down_is_out_of_reach(hub: HubServer, machine: Machine) -> None:
    commit = hub.commit("owner/name", PLAIN)
    hub.instead = (503, b"")
    assert machine.rejection("owner/name").endswith(f"and {hub.url} answers 503")
    hub.instead = None
    machine.fetch("owner/name")
    hub.instead = (503, b"")
    fetched = machine.fetch("owner/name")
    assert (fetched.files, fetched.revision, fetched.told) == (PLAIN, commit, "")


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
        *(f"owner/name@{bad}" for bad in ("", "a b", "../x", "/x", "a/../../x")),
    ],
)
def test_a_malformed_source_shows_the_form(source: str) -> None:
    from vitserve.export.checkpoint.hub import (
        HubError,
        fetch,
    )  # asks nobody: so it may run here, whatever the environment

    with pytest.raises(HubError, match="looks like owner/name or owner/name@revision"):
        fetch(source)
