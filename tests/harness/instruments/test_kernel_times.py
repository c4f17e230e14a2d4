"""What the profiler saw is split among executions, or said to be no time."""

from mambench.harness.instruments import kernel_times


def test_kernels_are_split_among_equal_executions() -> None:
    assert kernel_times.per_execution([1.0, 2.0, 3.0, 4.0], 2) == [3.0, 7.0]


def test_unequal_executions_give_their_mean_only() -> None:
    assert kernel_times.per_execution([1.0, 2.0, 3.0], 2) == [3.0]


def test_other_kernels_between_executions_are_not_counted() -> None:
    durations = [9.0, 1.0, 2.0, 9.0, 3.0, 4.0]
    assert kernel_times.per_execution(durations, 2, skip=1) == [3.0, 7.0]


def test_what_cannot_be_told_from_other_kernels_has_no_time() -> None:
    assert kernel_times.per_execution([9.0, 1.0, 9.0], 2, skip=1) == []
    assert kernel_times.per_execution([9.0, 9.0], 2, skip=1) == []
