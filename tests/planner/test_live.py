"""Every byte is counted from its birth to its end, on real tensors and fake ones."""

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from planner.live import BACKWARD, Live

KIB = 1024


@pytest.fixture(params=["real", "fake"])
def live(request):
    tracker = Live("cpu")
    if request.param == "real":
        with tracker:
            yield tracker
        return
    with FakeTensorMode(), tracker:
        yield tracker


def test_memory_counts_until_the_last_view_of_it_is_gone(live):
    x = torch.empty(256)
    view = x.view(16, 16)[3:]
    assert live.total == KIB
    del x
    gc.collect()
    assert live.total == KIB
    del view
    gc.collect()
    assert live.total == 0 and live.peak.total == KIB


def test_the_peak_is_the_most_that_was_there_at_once(live):
    for _ in range(3):
        x = torch.empty(256)
        y = x + 1
        del x, y
    gc.collect()
    assert live.total == 0 and live.peak.total == 2 * KIB


def test_a_storage_that_is_emptied_and_filled_counts_as_it_is(live):
    x = torch.empty(512)
    x.untyped_storage().resize_(0)
    assert live.total == 0
    y = torch.empty(256)
    x.untyped_storage().resize_(2 * KIB)
    assert live.total == live.peak.total == 3 * KIB
    del y


def test_what_is_in_place_takes_nothing(live):
    x = torch.empty(256)
    x.add_(1).mul_(2)
    torch.add(x, 1, out=x)
    assert live.peak.total == KIB


def test_a_question_about_shapes_takes_nothing(live):
    with live.pause():
        x = torch.empty(256)
    assert live.peak.total == 0
    y = x[1:]  # but from now on it is there
    assert live.total == KIB
    del y


def test_other_devices_do_not_count(live):
    x = torch.empty(256, device="meta")
    assert live.total == 0
    del x


def test_what_was_there_before_counts_under_its_name_once():
    x = torch.empty(256)
    with Live("cpu") as live:
        live.meet(x, label="parameters")
        live.meet(x[1:], label="parameters")
        y = x * 2
        assert live.peak.by == {"parameters": KIB, BACKWARD: KIB}
        assert live.sizes([x, y]).total() == 2 * KIB
        assert live.sizes([x, y, y[1:]], until=1) == {"parameters": KIB}


def test_nothing_of_it_stays_afterwards():
    before = torch.UntypedStorage.resize_
    with pytest.raises(ZeroDivisionError), Live("cpu"):
        assert torch.UntypedStorage.resize_ is not before
        _ = 1 // 0
    assert torch.UntypedStorage.resize_ is before


def test_what_is_elsewhere_counts_nothing():
    x = torch.empty(256)
    with Live("cpu") as live:
        live.leave_out(x)
        y = x[1:].mul_(2)
        assert live.total == 0
        del x, y
        gc.collect()
        assert live.total == 0
