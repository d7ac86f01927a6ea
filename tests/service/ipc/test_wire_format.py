"""The messages between HTTP workers and engine workers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitserve.service.ipc import wire_format

submissions = st.builds(
    wire_format.Submission,
    st.integers(0, 2**32 - 1),
    st.integers(0, 3),
    st.integers(0, 9),
    st.integers(0, 2**64 - 1),
    st.floats(allow_nan=False),
)
seconds = st.floats(allow_nan=False)
completions = st.builds(
    wire_format.Completion,
    st.integers(0, 2**32 - 1),
    st.integers(0, 5),
    st.integers(0, 2**64 - 1),
    seconds,
    seconds,
    seconds,
)


@given(st.integers(0, 2**32 - 1), submissions)
def test_a_submission_survives_packing(incarnation: int, submission: wire_format.Submission) -> None:
    message = next(iter(wire_format.pack_submissions(incarnation, [submission])))
    assert wire_format.unpack_submissions(message) == (incarnation, [submission])


@given(st.integers(0, 2**32 - 1), st.lists(completions, max_size=5), st.integers(1, 2000))
def test_completions_survive_packing_into_bounded_messages(
    incarnation: int, distinct: list[wire_format.Completion], repeats: int
) -> None:
    sent = distinct * repeats
    messages = list(wire_format.pack_completions(incarnation, sent))
    assert all(len(message) <= wire_format.MAX_BYTES for message in messages)
    received = [wire_format.unpack_completions(message) for message in messages]
    assert {sender for sender, _ in received} <= {incarnation}
    assert [completion for _, part in received for completion in part] == sent


@given(submissions, st.integers(0, 100))
def test_a_message_of_the_wrong_length_is_rejected(submission: wire_format.Submission, cut: int) -> None:
    message = next(iter(wire_format.pack_submissions(1, [submission])))
    for damaged in (message[: min(cut, len(message) - 1)], message + b"x" * (cut + 1)):
        with pytest.raises(wire_format.WireFormatError, match=f"a message has {len(damaged)} bytes"):
            wire_format.unpack_submissions(damaged)
