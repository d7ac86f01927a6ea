"""The time from which the deadline of a request counts, if its body arrives in several parts."""

from __future__ import annotations

# Three quarters of the receive window with which a connection begins (tcp(7), tcp_rmem). If a turn of the event loop
# reads at least this much from one socket, its buffer may have been full, so that the client waited for us.
WINDOW_BYTES = 49_152


class BodyClock:
    """Leaves out the time in which the client sends, and counts the time in which its bytes wait for this worker.

    A deadline must include the time that data waits in a socket's buffer: otherwise an overloaded worker would admit
    requests that are already late. It must not include the time that a slow client takes to send a body: otherwise an
    idle service would reject it as if it were overloaded. Two times are therefore counted:

    - The last bytes may have waited since the previous turn of the event loop began, see Turns.arrived().
    - A body that is larger than the buffer cannot be sent while the buffer is full. So the wait before a read that
      may have found a full buffer counts too.

    Any other wait delays no response, because the client was still sending the rest.
    """

    def __init__(self, arrived: float, started: float, length: int) -> None:
        """The part with the headers. For the arguments see read()."""
        self._arrived, self._started, self._length = arrived, started, length
        self._counted = 0.0  # seconds of earlier turns

    def read(self, arrived: float, started: float, length: int) -> None:
        """A part of ``length`` bytes that this turn has read.

        ``arrived``: the earliest time at which it can have arrived. ``started``: when the turn began to read. Both in
        time.monotonic() seconds.
        """
        if started == self._started:  # more in the same turn
            self._length += length
            return
        if self._length >= WINDOW_BYTES:
            self._counted += self._started - self._arrived
        self._arrived, self._started, self._length = arrived, started, length

    @property
    def start(self) -> float:
        """The deadline counts from here: monotonic seconds. Call it in the turn that has read the last part."""
        return self._arrived - self._counted
