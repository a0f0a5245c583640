import pytest

from shared.rl.summary import at_reward, entropy_shape, log_spike, window_mean

ROWS = [{"step": float(k), "reward": k / 10, "entropy": 1 - k / 20, "grad": 8.0 if k == 4 else 2.0} for k in range(10)]


def test_windows_are_inclusive_and_skip_rows_without_the_metric():
    assert window_mean(ROWS, "reward", 2, 4) == pytest.approx(0.3)
    assert window_mean([*ROWS[:2], {"step": 2.0}], "reward", 0, 2) == pytest.approx(0.05)
    assert window_mean(ROWS, "absent", 0, 9) is None


def test_matched_reward_uses_the_trailing_window():
    step, entropy = at_reward(ROWS, "entropy", 0.5, width=3)
    assert step == 6  # mean of 0.4, 0.5, 0.6
    assert entropy == pytest.approx(1 - 5 / 20)
    assert at_reward(ROWS, "entropy", 2.0) == (None, None)


def test_spike_is_the_log_of_largest_over_median():
    assert log_spike(ROWS, "grad") == pytest.approx(1.3863, abs=1e-4)
    assert entropy_shape(2.0, 0.5) == {"entropy_change": -1.5, "entropy_kept": 0.25}
