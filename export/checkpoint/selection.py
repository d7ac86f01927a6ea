"""Finds the network in a checkpoint file: under which key its state dict is, and which prefix its tensor names have.

Training frameworks wrap both: Lightning names tensors model.*, data-parallel training module.*, torch.compile
_orig_mod.*, in any combination, and scripts save the state dict under a key of their own. The place is found by a
tensor whose name every network of a format has, its mark. Every decision becomes a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vitserve.export.checkpoint.errors import CheckpointError, OptionNeededError
from vitserve.export.checkpoint.state_dict import Tensors

# The usual names of weights that were averaged during the training.
_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?|shadow)([._]|$)")

Groups = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Place:
    """The place of a network: the key of its state dict, and the prefix of its tensor names. Either may be empty."""

    key: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.key}.{self.prefix}".strip(".")

    @property
    def averaged(self) -> bool:
        return bool(_AVERAGED.search(str(self)))

    @property
    def names(self) -> tuple[str, ...]:
        """The names that --weights may have for it."""
        return (str(self), self.key, self.prefix.strip("."), "averaged" if self.averaged else "raw")


def find_network(groups: Groups, marks: Sequence[str], chosen: str, path: Path) -> Tensors:
    """The tensors of the network, without the prefix of their names.

    ``marks`` are names of which every network of the supported formats has one. ``chosen`` is the option --weights: the
    key or the prefix of the weights to take, or raw or averaged.

    If no tensor has one of these names, the result has all tensors, so that the format can report the missing ones.
    Raises CheckpointError if the file holds several networks, or tensors beside the network.
    """
    places = _places(groups, marks)
    if chosen:
        places = [place for place in places if chosen.strip(".") in place.names]
        if not places:
            raise CheckpointError(
                f"{path} has no network under {chosen!r} (--weights); it has {_listed(groups, marks)}"
            )
    if not places:
        return Tensors({name: tensor for named in groups.values() for name, tensor in named.items()})
    place, notes = _choose(places, path)
    if not chosen and str(place):
        notes.append(f"the weights are those under {str(place)!r}")
    prefixes = [candidate.prefix for candidate in _places(groups, marks) if candidate.key == place.key]

    def owner(name: str) -> str | None:
        """The longest prefix of a network that the name has, because one may be empty."""
        return max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)

    owners = {name: owner(name) for name in groups[place.key]}
    outside = {name: tensor for name, tensor in groups[place.key].items() if owners[name] is None}
    notes += _check_outside(outside, place, chosen)
    named = {name: tensor for name, tensor in groups[place.key].items() if owners[name] == place.prefix}
    return Tensors({name.removeprefix(place.prefix): tensor for name, tensor in named.items()}, notes)


def _places(groups: Groups, marks: Sequence[str]) -> list[Place]:
    def places() -> Iterator[Place]:
        for key, named in groups.items():
            for name in named:
                for mark in marks:
                    if name == mark or name.endswith(f".{mark}"):
                        yield Place(key, name.removesuffix(mark))

    return list(dict.fromkeys(places()))


def _choose(places: list[Place], path: Path) -> tuple[Place, list[str]]:
    """The only place; or the averaged weights beside raw ones, as timm's loader takes them."""
    if len(places) == 1:
        return places[0], []
    averaged = [place for place in places if place.averaged]
    if len(averaged) != 1 or len(places) != 2:
        raise OptionNeededError(f"{path} holds several networks: {_names(places)}; name the one to take with --weights")
    (raw,) = (place for place in places if not place.averaged)
    return averaged[0], [
        f"the file holds raw weights ({str(raw) or 'without a prefix'}) and weights averaged during the training"
        f" ({averaged[0]}); the averaged ones are taken, as in timm; --weights raw takes the others"
    ]


def _check_outside(outside: Mapping[str, Tensor], place: Place, chosen: str) -> list[str]:
    tensors = Tensors(outside)
    if chosen:
        tensors.ignore_others(f"they are outside of {place}")
        return tensors.notes
    try:
        tensors.expect_nothing_more()
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}, beside the network under {str(place)!r}; if they are not part of it, pass --weights {place}"
        ) from error
    return tensors.notes


def _listed(groups: Groups, marks: Sequence[str]) -> str:
    return _names(_places(groups, marks)) or f"no network of a supported format, but {', '.join(groups) or 'nothing'}"


def _names(places: Iterable[Place]) -> str:
    return ", ".join(str(place) or "weights without a prefix" for place in places)
