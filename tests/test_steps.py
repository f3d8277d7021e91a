"""Durations and periods."""

import pytest

from beit_jax.steps import is_time, to_steps

CONTEXT = {"total_steps": 2000, "steps_per_epoch": 390.625, "batch_size": 128}


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (0, 0),
        (700, 700),
        (None, 0),
        ("700", 700),
        ("1000st", 1000),
        ("1000 st", 1000),
        ("10ep", 3906.25),
        ("0.5ep", 195.3125),
        (".5ep", 195.3125),
        ("0ep", 0),
        ("50000ex", 390.625),
        ("5%", 100),
        ("0.1%", 2),
        ("100%", 2000),
        ("1ex", 1),
        ("0.0001ep", 1),
    ],
)
def test_to_steps(duration, steps):
    assert to_steps(duration, **CONTEXT) == steps


@pytest.mark.parametrize(
    "duration",
    ["", "ep", "10 epochs", "-3", -3, "1.5.0ep", "5%%", "ep10", "nan", 2.5, True, "1,0ep"],
)
def test_malformed_duration_names_key_and_value(duration):
    with pytest.raises(ValueError, match=r"warmup must be an int .*10ep") as error:
        to_steps(duration, name="warmup", **CONTEXT)
    assert repr(duration) in str(error.value)


def test_part_of_a_step_is_an_error():
    with pytest.raises(ValueError, match="steps are whole"):
        to_steps("1.5st")


@pytest.mark.parametrize(
    ("duration", "needed"), [("5%", "total_steps"), ("1ep", "training examples"), ("8ex", "batch")]
)
def test_unit_without_context_says_what_is_missing(duration, needed):
    with pytest.raises(ValueError, match=needed):
        to_steps(duration)


def test_is_time_at_each_multiple_and_at_the_end():
    assert [step for step in range(11) if is_time(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(9) if is_time(step, 4, 8)] == [4, 8]
    assert [step for step in range(9) if is_time(step, 4, None)] == [4, 8]


@pytest.mark.parametrize("epoch", [45000 / 32, 100 / 64, 1437 / 32, 100 / 3, 1.0, 1.01, 2.5])
def test_periods_that_are_no_whole_steps_neither_drift_nor_miss_each_other(epoch):
    total = round(40 * epoch)
    ends = [step for step in range(1, total + 1) if is_time(step, epoch, total)]
    assert len(ends) == 40 and ends[-1] == total
    assert all(abs(end - i * epoch) <= 0.5 for i, end in enumerate(ends, start=1))
    tenths = [step for step in range(1, total + 1) if is_time(step, 10 * epoch, total)]
    assert tenths == ends[9::10]


@pytest.mark.parametrize(("images", "batch"), [(59, 10), (55, 6), (45000, 32), (100, 64)])
def test_ties_are_decided_alike(images, batch):
    epoch = images / batch
    for k in range(1, 40):
        end = next(s for s in range(1, round(k * epoch) + 2) if is_time(s, k * epoch, None))
        assert is_time(end, epoch, None)


@pytest.mark.parametrize("every", [None, 0])
def test_is_time_without_a_period_only_at_the_end(every):
    assert [step for step in range(11) if is_time(step, every, 10)] == [10]
