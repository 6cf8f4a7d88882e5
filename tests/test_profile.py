"""The record of where the time went, on the host and on a device whose work outlives its call."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from late import Late, LateStream
from torch import Tensor

import fpwap.profile
from fpwap.device import Cpu, Device, Event, Stream
from fpwap.profile import PHASES, Profile, Recorder, Span


class Clocked(Late):
    """A device whose time is moved by hand. waited: moments that somebody waited for."""

    def __init__(self) -> None:
        super().__init__(0)
        self.now, self.waited = 0.0, list[float]()
        self.compute: Stream = _Clock(self)


class _Clock(LateStream):
    def record(self, *used: Tensor) -> Event:
        assert isinstance(self.device, Clocked)
        return _Moment(self.device)


class _Moment:
    def __init__(self, device: Clocked) -> None:
        self.device, self.at = device, device.now

    def synchronize(self) -> None:
        self.device.waited.append(self.at)

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, _Moment)
        assert max(self.device.waited, default=-1.0) >= self.at, "asked of a moment that nobody knows to have come"
        return self.at - earlier.at


def finished(recorder: Recorder) -> Profile:
    return recorder.finish(prompts=1, tokens=2)


def test_the_innermost_span_gets_the_device_s_time() -> None:
    device = Clocked()
    recorder = Recorder(device)
    device.now += 100  # before all spans
    with recorder.span("forward", "0"):
        device.now += 1
        with recorder.span("callback"):
            device.now += 10
        device.now += 2
    device.now += 200  # between
    with recorder.span("forward", "1"):
        device.now += 4
    assert device.waited == []
    found = {(span.layer, span.phase): span.device_s for span in finished(recorder).spans}
    assert found == {("0", "forward"): 3.0, ("0", "callback"): 10.0, ("1", "forward"): 4.0}


@given(st.lists(st.tuples(st.sampled_from(PHASES), st.integers(0, 9)), max_size=40), st.integers(2, 8), st.data())
def test_old_events_become_seconds_while_it_runs(spans: list[tuple[str, int]], kept: int, data: st.DataObject) -> None:
    device, expected = Clocked(), dict.fromkeys(PHASES, 0.0)
    recorder = Recorder(device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fpwap.profile, "EDGES", kept)
        for phase, seconds in spans:
            with recorder.span(phase):
                device.now += seconds
                expected[phase] += seconds
            assert recorder._edges is not None
            assert len(recorder._edges._edges) < 2 * kept
            if data.draw(st.booleans()):
                finished(recorder)  # recording goes on
        found = finished(recorder).on_device()
    assert found == (expected if spans else dict.fromkeys(PHASES, 0.0))


def test_only_moments_long_past_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fpwap.profile, "EDGES", 10)
    device = Clocked()
    recorder = Recorder(device)
    for _ in range(100):
        with recorder.span("forward"):
            device.now += 1
        assert all(at <= device.now - 5 for at in device.waited[-1:])
    assert len(device.waited) > 5


@pytest.mark.parametrize("device", [None, Cpu()])
def test_where_nothing_outlives_its_call_there_is_one_clock(device: Device | None) -> None:
    recorder = Recorder(device)
    with recorder.span("forward", "0"):
        pass
    profile = finished(recorder)
    assert profile.on_device() is None
    assert "on device" not in profile.summary()


def test_on_a_late_device() -> None:
    recorder = Recorder(Late(3))
    with recorder.span("forward", "0"), recorder.span("callback"):
        pass
    assert finished(recorder).on_device() == dict.fromkeys(PHASES, 0.0)


def profile() -> Profile:
    spans = (Span("0", "forward", 6.0, 5.5), Span("0", "callback", 1.0, 0.25), Span("run", "verify", 1.0, 0.0))
    return Profile(
        wall_s=9.0,
        reading_s=1.0,
        prompts=3,
        tokens=8,
        predicted_s=5.0,
        spans=spans,
        moved={"weights": 10**9},
        predicted={"start": 0.5, "forward": 4.0, "write": 0.5},
        peaks={"memory": {"planned": 2_000_000, "measured": 1_500_000}},
    )


def test_the_plan_beside_what_came() -> None:
    text = profile().summary()
    assert text.splitlines() == [
        "layer        forward  callback     write    verify     total",
        "0              6.000     1.000     0.000     0.000     7.000",
        "run            0.000     0.000     0.000     1.000     1.000",
        "all            6.000     1.000     0.000     1.000     9.000",
        "on device      5.500     0.250     0.000     0.000     5.750",
        "predicted      4.000         -     0.500         -     5.000",
        "unattributed 1.000 s (11.1 %)",
        "moved: weights 1,000.0 MB; weights at 1.00 GB/s",
        "peaks: memory 1.5 MB of 2.0 MB planned",
        "3 prompts, 8 tokens in 9.00 s (predicted 5.0 s): 1 tokens/s",
    ]


def test_the_error_of_a_prediction_leaves_out_what_is_not_predicted() -> None:
    assert profile().prediction_error() == (9.0 - 1.0 - 1.0) / 5.0
    assert finished(Recorder()).prediction_error() is None


def test_there_and_back_as_json() -> None:
    for one in (profile(), finished(Recorder())):
        assert Profile.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_a_record_of_an_earlier_version_is_read() -> None:
    old = {"wall_s": 2.0, "reading_s": 1.0, "prompts": 3, "tokens": 8, "predicted_s": 1.0}
    spans = [{"layer": "0", "phase": "forward", "seconds": 1.5}]
    found = Profile.from_json({**old, "spans": spans, "moved": {"weights": 7}})
    assert found.by_phase()["forward"] == 1.5
    assert (found.on_device(), found.predicted, found.peaks) == (None, {}, {})
    assert "predicted 1.0 s" in found.summary()
