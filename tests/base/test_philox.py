"""The table of Philox streams: no number twice, and the same numbers in Python and C++."""

import re
from pathlib import Path

from illada.philox import Stream

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "common" / "philox.h"
NATIVE = {
    "kStreamSample": Stream.SAMPLE,
    "kStreamSampleLowBits": Stream.SAMPLE_LOW_BITS,
    "kStreamSampleRandom": Stream.SAMPLE_RANDOM_MEASURE,
}


def test_no_two_purposes_share_a_stream():
    assert len(Stream.__members__) == len({int(stream) for stream in Stream.__members__.values()})


def test_cpp_has_the_same_numbers():
    found = {name: int(number) for name, number in re.findall(r"\b(kStream\w+) = (\d+)", HEADER.read_text())}
    assert found == NATIVE
