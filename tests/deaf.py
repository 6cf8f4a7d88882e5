"""Is every wait needed? A late device whose waits can be left out, one place in the source at a time.

    places = waits(scenario)            # of a part, on a sound device
    for place in places:
        assert fails(scenario, place)   # for some seed

A scenario takes a device and raises (`late.Race`, or an assertion of its own) where something went wrong.
"""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any
from unittest import mock

from late import Late, LateEvent, LateStream, Maths

from fpwap.device import Event

Place = tuple[str, int]
"""Name of the function that waits, and the line."""
SEEDS = range(200)


class Deaf(Late):
    """Leaves out the waits of one place. heard: where there was a wait."""

    def __init__(self, seed: int, deaf: Place | None = None) -> None:
        super().__init__(seed)
        self.deaf, self.heard = deaf, set[Place]()

    def hears(self, frame: FrameType) -> bool:
        place = frame.f_code.co_name, frame.f_lineno
        self.heard.add(place)
        return place != self.deaf


def _listening(plain: Callable[..., Any], device: Callable[[Any], Late]) -> Callable[..., Any]:
    def wait(self: Any, *event: Event) -> None:
        deaf = device(self)
        assert isinstance(deaf, Deaf)
        if deaf.hears(sys._getframe(1)):
            plain(self, *event)

    return wait


def _run(scenario: Callable[[Late], None], device: Deaf) -> None:
    with (
        mock.patch.object(LateStream, "wait", _listening(LateStream.wait, lambda stream: stream.device)),
        mock.patch.object(Maths, "wait", _listening(Maths.wait, lambda stream: stream.device)),
        mock.patch.object(
            LateEvent, "synchronize", _listening(LateEvent.synchronize, lambda event: event.stream.device)
        ),
    ):
        scenario(device)


def waits(scenario: Callable[[Late], None], seed: int = 0) -> set[Place]:
    """All places at which the scenario waits."""
    device = Deaf(seed)
    _run(scenario, device)
    return device.heard


def fails(scenario: Callable[[Late], None], place: Place) -> bool:
    """Whether some seed shows that the wait is missing."""
    for seed in SEEDS:
        try:
            _run(scenario, Deaf(seed, place))
        except AssertionError:
            return True
    return False
