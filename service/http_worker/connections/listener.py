"""Ends a listening socket without resetting a connection that a client has opened already."""

from __future__ import annotations

import ctypes
import logging
import socket
import struct

log = logging.getLogger(__name__)

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
# A program of classic BPF (bpf(4) of BSD, linux/filter.h): code, jumps if true and false, constant. A socket of TCP
# shows it the TCP header, whose byte 13 has the flags.
_DROP_SYN = (
    (0x30, 0, 0, 13),  # load the flags
    (0x54, 0, 0, 0x12),  # and SYN | ACK
    (0x15, 0, 1, 0x02),  # only SYN?
    (0x06, 0, 0, 0),  # then drop the segment
    (0x06, 0, 0, 0xFFFFFFFF),  # else keep it
)


def drop_new_connections(listener: socket.socket) -> None:
    """From now on, clients that begin to connect get no response, and an error once the socket is closed.

    Handshakes that have begun are completed: accept these connections a moment later, before closing the socket,
    because the kernel resets those that wait in its backlog. Does nothing where there are no such filters.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in _DROP_SYN))
    try:
        filter_program = struct.pack("HP", len(_DROP_SYN), ctypes.addressof(program))
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_program)
    except OSError as error:
        log.debug("the listening socket has no filter: %s", error)
