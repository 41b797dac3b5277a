"""Schedules of K, the controller that holds an entropy, K by prompt; that their states are taken back to the bit."""

import json
import math
import random
from dataclasses import FrozenInstanceError
from itertools import pairwise
from math import comb

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qae_kernels import DifficultyK, EntropyTargetK, KSchedule, group_advantages

DRAWN = settings(deadline=None, derandomize=True)
inside = st.floats(0, 1, exclude_min=True, exclude_max=True)


def through_json(state):
    return json.loads(json.dumps(state, allow_nan=False))


# ---- KSchedule


def test_values_of_each_kind():
    assert [KSchedule.constant(0.4)(step) for step in (0, 1, 10**9)] == [0.4] * 3
    linear = KSchedule.linear(0.6, 0.4, 4)
    assert [linear(step) for step in range(7)] == pytest.approx([0.6, 0.55, 0.5, 0.45, 0.4, 0.4, 0.4], abs=1e-15)
    cosine = KSchedule.cosine(0.2, 0.8, 6)
    expected = [0.5 - 0.3 * math.cos(math.pi * min(step, 6) / 6) for step in range(8)]
    assert [cosine(step) for step in range(8)] == pytest.approx(expected, abs=1e-15)
    jump = KSchedule.two_phase(0.6, 0.4, 3)
    assert [jump(step) for step in range(6)] == [0.6, 0.6, 0.6, 0.4, 0.4, 0.4]
    ramp = KSchedule.two_phase(0.6, 0.4, 2, ramp=2)
    assert [ramp(step) for step in range(6)] == pytest.approx([0.6, 0.6, 0.6, 0.5, 0.4, 0.4], abs=1e-15)
    assert KSchedule.two_phase(0.6, 0.4, 0)(0) == 0.4


def test_rounding_does_not_carry_it_outside():
    assert KSchedule.cosine(0.9, 1e-20, 10**9)(10**9 - 1) == 1e-20


@pytest.mark.parametrize(("share", "total", "step"), [(0.7, 10, 7), (0.29, 100, 29), (0.5, 5, 2), (0.25, 8, 2)])
def test_a_share_is_the_nearest_step(share, total, step):
    schedule = KSchedule.two_phase(0.6, 0.4, share, total_steps=total)
    assert schedule == KSchedule.two_phase(0.6, 0.4, step)


@DRAWN
@given(inside, inside, st.integers(0, 30), st.integers(0, 30), st.sampled_from(["linear", "cosine"]))
def test_it_goes_from_start_to_end_and_never_outside(k_start, k_end, hold, ramp, shape):
    schedule = KSchedule(k_start, k_end, hold, ramp, shape)
    values = [schedule(step) for step in range(hold + ramp + 3)]
    assert all(type(k) is float and 0 < k < 1 and min(k_start, k_end) <= k <= max(k_start, k_end) for k in values)
    assert values[:hold] == [k_start] * hold and values[hold + ramp :] == [k_end] * 3
    rising = values if k_start <= k_end else values[::-1]
    assert all(a <= b + 1e-16 for a, b in pairwise(rising))
    assert schedule(10**12) == k_end
    if ramp:
        assert schedule(hold) == k_start


def test_a_schedule_is_its_state():
    schedule = KSchedule.two_phase(0.1 + 0.2, 2 / 3, 100, ramp=7)
    state = through_json(schedule.state_dict())
    assert KSchedule(**state) == schedule
    schedule.load_state_dict(state)
    with pytest.raises(ValueError, match=r"of another KSchedule: k_end is 0\.5, here 0\.666\d*; ramp is 8, here 7"):
        schedule.load_state_dict(state | {"k_end": 0.5, "ramp": 8})
    for wrong in ({}, state | {"x": 1}, {"k": 0.4}, None, [1]):
        with pytest.raises(ValueError, match="the state of a KSchedule has the keys"):
            schedule.load_state_dict(wrong)
    with pytest.raises(FrozenInstanceError):
        schedule.k_end = 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KSchedule.constant(0), "k_start must be a number strictly between 0 and 1; got 0"),
        (lambda: KSchedule.constant(1.0), "k_start must be a number strictly between 0 and 1; got 1.0"),
        (lambda: KSchedule.linear(0.4, math.nan, 5), "k_end must be a number strictly between 0 and 1; got nan"),
        (lambda: KSchedule.linear(0.4, "0.5", 5), "k_end must be a number strictly between 0 and 1; got '0.5'"),
        (lambda: KSchedule.linear(0.4, 0.6, 0), "steps must be an integer >= 1; got 0"),
        (lambda: KSchedule.cosine(0.4, 0.6, 2.0), "steps must be an integer >= 1; got 2.0"),
        (lambda: KSchedule(0.4, 0.6, hold=-1), "hold must be an integer >= 0; got -1"),
        (lambda: KSchedule(0.4, 0.6, ramp=True), "ramp must be an integer >= 0; got True"),
        (lambda: KSchedule(0.4, 0.6, shape="step"), "shape must be one of 'linear', 'cosine'; got 'step'"),
        (lambda: KSchedule.two_phase(0.4, 0.6, 0.5), "until=0.5 is a share: it needs total_steps"),
        (lambda: KSchedule.two_phase(0.4, 0.6, 1.5, total_steps=3), "must be a finite number in (0, 1); got 1.5"),
        (lambda: KSchedule.two_phase(0.4, 0.6, -3), "until must be an integer >= 0; got -3"),
        (lambda: KSchedule.two_phase(0.4, 0.6, 3, total_steps=9), "total_steps goes with a share of it"),
        (lambda: KSchedule.constant(0.4)(-1), "step must be an integer >= 0; got -1"),
        (lambda: KSchedule.constant(0.4)(0.5), "step must be an integer >= 0; got 0.5"),
    ],
)
def test_wrong_schedules_are_named(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


# ---- EntropyTargetK


def test_one_update_by_hand():
    controller = EntropyTargetK(0.5, k=0.4, gain=0.1, damping=0.2, max_step=0.05, smoothing=0.75)
    assert controller.k == 0.4 and controller.entropy is None
    assert controller.update(0.3) == pytest.approx(0.4 + 0.1 * 0.2)  # nothing to smooth, nothing moved yet
    smooth = 0.75 * 0.3 + 0.25 * 0.7
    expected = 0.42 + 0.1 * (0.5 - smooth) - 0.2 * (smooth - 0.3)
    assert controller.update(torch.tensor(0.7, dtype=torch.float64)) == pytest.approx(expected)
    assert controller.entropy == pytest.approx(smooth) and controller.k == pytest.approx(expected)


def test_low_entropy_raises_k_and_high_entropy_lowers_it():
    assert EntropyTargetK(0.5).update(0.4) > 0.4 > EntropyTargetK(0.5).update(0.6)


def test_dead_band():
    controller = EntropyTargetK(0.5, dead_band=0.1, smoothing=0)
    assert [controller.update(entropy) for entropy in (0.41, 0.59, 0.45)] == [0.4] * 3
    assert controller.update(0.3) > 0.4


@DRAWN
@given(
    st.lists(st.floats(-1e300, 1e300, allow_nan=False), max_size=30),
    st.floats(1e-6, 1e6), st.floats(0, 1e6), st.floats(1e-6, 10), st.floats(0, 0.99),
)  # fmt: skip
def test_bounds_and_steps_hold_whatever_comes(entropies, gain, damping, max_step, smoothing):
    controller = EntropyTargetK(
        0.5, k_min=0.3, k_max=0.7, gain=gain, damping=damping, max_step=max_step, smoothing=smoothing
    )
    before = controller.k
    for entropy in entropies:
        k = controller.update(entropy)
        assert 0.3 <= k <= 0.7 and abs(k - before) <= max_step + 1e-15
        before = k


def simulate(controller, respond, *, mirrored=False, steps=600, delay=3, noise=0.03):
    """Entropies of a policy that answers to the K of some steps ago; the controller sees them with noise.

    mirrored: it sees them mirrored at its target, as if the sign in its formula were wrong.
    """
    drawn = random.Random(0)
    entropy, entropies, levels = 1.2, [], [controller.k] * (delay + 1)
    for _ in range(steps):
        entropy = max(0.0, respond(entropy, levels[-1 - delay]))
        entropies.append(entropy)
        seen = entropy + drawn.gauss(0, noise)
        levels.append(controller.update(2 * controller.target - seen if mirrored else seen))
    return entropies, levels


RESPONSES = {
    "K sets the level": lambda entropy, k: entropy + 0.05 * (0.1 + 1.5 * k - entropy),
    "K sets the drift": lambda entropy, k: entropy + 0.05 * (k - 0.45),
}


@pytest.mark.parametrize("respond", RESPONSES.values(), ids=RESPONSES.keys())
def test_it_reaches_the_target_and_stays(respond):
    entropies, levels = simulate(EntropyTargetK(0.5), respond, steps=800)
    assert max(abs(entropy - 0.5) for entropy in entropies[500:]) < 0.03
    assert all(0.2 <= k <= 0.8 for k in levels)
    assert max(abs(a - b) for a, b in pairwise(levels)) <= 0.02 + 1e-15


@pytest.mark.parametrize("respond", RESPONSES.values(), ids=RESPONSES.keys())
def test_with_the_sign_turned_around_it_would_run_away(respond):
    entropies, levels = simulate(EntropyTargetK(0.5), respond, mirrored=True)
    assert min(abs(entropy - 0.5) for entropy in entropies[200:]) > 0.4 and set(levels[200:]) == {0.8}


def test_without_damping_it_would_swing_where_k_sets_the_drift():
    entropies, _ = simulate(EntropyTargetK(0.5, damping=0), RESPONSES["K sets the drift"])
    assert max(entropies[200:]) > 0.8 and min(entropies[200:]) < 0.2


def test_it_leaves_a_bound_at_once():
    """Nothing has wound up in a long time at the bound."""
    controller = EntropyTargetK(0.5, smoothing=0, damping=0)
    for _ in range(1000):
        controller.update(0.0)
    assert controller.k == 0.8
    assert controller.update(0.6) < 0.8


def test_a_broken_entropy_changes_nothing():
    controller = EntropyTargetK(0.5)
    controller.update(0.3)
    before = controller.state_dict()
    for entropy in (math.nan, math.inf, -math.inf, torch.tensor(math.nan), None, "0.3", True):
        with pytest.raises(ValueError, match="entropy must be a finite number"):
            controller.update(entropy)
        assert controller.state_dict() == before
    with pytest.raises(ValueError, match=r"entropy must be one number; got a tensor of shape \(2,\)"):
        controller.update(torch.zeros(2))


def test_a_controller_goes_on_from_its_state():
    entropies = [0.3 + 0.1 * math.sin(i) for i in range(40)]
    whole = EntropyTargetK(0.5, k=0.35)
    expected = [whole.update(entropy) for entropy in entropies]
    first = EntropyTargetK(0.5, k=0.35)
    assert EntropyTargetK(0.5).load_state_dict(through_json(first.state_dict())) is None  # before any update
    begun = [first.update(entropy) for entropy in entropies[:17]]
    second = EntropyTargetK(0.5)
    second.load_state_dict(through_json(first.state_dict()))
    assert second.k == first.k and second.entropy == first.entropy
    assert begun + [second.update(entropy) for entropy in entropies[17:]] == expected


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"k": 0.4}, "the state of a EntropyTargetK has the keys ['entropy', 'k']; got ['k']"),
        ({"k": 0.4, "entropy": 0.1, "x": 0}, "the keys ['entropy', 'k']; got ['entropy', 'k', 'x']"),
        ([0.4, 0.1], "has the keys ['entropy', 'k']; got list"),
        ({"k": 0.9, "entropy": 0.1}, "k of the state must lie in [0.2, 0.8]; got 0.9"),
        ({"k": math.nan, "entropy": 0.1}, "k of the state must be a number strictly between 0 and 1; got nan"),
        ({"k": "0.4", "entropy": 0.1}, "k of the state must be a number strictly between 0 and 1; got '0.4'"),
        ({"k": 0.4, "entropy": math.inf}, "entropy of the state must be a finite number in (-inf, inf); got inf"),
    ],
)
def test_wrong_states_of_a_controller_change_nothing(state, message):
    controller = EntropyTargetK(0.5)
    controller.update(0.3)
    before = controller.state_dict()
    with pytest.raises(ValueError) as error:
        controller.load_state_dict(state)
    assert message in str(error.value) and controller.state_dict() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": -0.1}, "target must be a finite number in (0, inf); got -0.1"),
        ({"target": math.nan}, "target must be a finite number in (0, inf); got nan"),
        ({"k": 0.9}, "k must lie in [k_min, k_max]; got k=0.9, k_min=0.2, k_max=0.8"),
        ({"k_min": 0}, "k_min must be a number strictly between 0 and 1; got 0"),
        ({"k_max": 1.0}, "k_max must be a number strictly between 0 and 1; got 1.0"),
        ({"gain": 0}, "gain must be a finite number in (0, inf); got 0"),
        ({"gain": -0.1}, "gain must be a finite number in (0, inf); got -0.1"),
        ({"damping": -1}, "damping must be a finite number in [0, inf); got -1"),
        ({"max_step": 0.0}, "max_step must be a finite number in (0, inf); got 0.0"),
        ({"smoothing": 1}, "smoothing must be a finite number in [0, 1); got 1"),
        ({"dead_band": math.inf}, "dead_band must be a finite number in [0, inf); got inf"),
    ],
)
def test_wrong_settings_of_a_controller_are_named(settings, message):
    with pytest.raises(ValueError) as error:
        EntropyTargetK(**{"target": 0.5} | settings)
    assert message in str(error.value)


# ---- DifficultyK


def test_k_by_hand():
    difficulty = DifficultyK(0.2, 0.8, k=0.4, prior_weight=2, decay=0.5)
    difficulty.update(["a", 7], [0.25, 1.0])
    difficulty.update(["a"], torch.tensor([0.75]))
    got = difficulty.k_for([7, "b", "a", "7", 7])
    assert got.dtype == torch.float32 and got.device.type == "cpu"
    weight, successes = 0.5 + 1, 0.5 * 0.25 + 0.75
    a = (2 * 0.4 + weight * (0.2 + 0.6 * successes / weight)) / (2 + weight)
    seven = (2 * 0.4 + 0.8) / 3
    torch.testing.assert_close(got, torch.tensor([seven, 0.4, a, 0.4, seven]), rtol=1e-7, atol=0)
    assert difficulty.k_for([]).shape == (0,)


def test_without_a_prior_the_history_decides_alone():
    difficulty = DifficultyK(0.2, 0.8, prior_weight=0, decay=1)
    difficulty.update([1, 2, 3], [0.0, 1.0, 0.5])
    torch.testing.assert_close(difficulty.k_for([1, 2, 3, 4]), torch.tensor([0.2, 0.8, 0.5, 0.4]))
    extreme = DifficultyK(0.9, 1e-20, prior_weight=0)
    extreme.update([1], [1.0])
    assert extreme.k_for([1]).item() == pytest.approx(1e-20, rel=1e-6, abs=0)


@DRAWN
@example(5e-236, 0.5, 0.5, 0.0, 1.0, [0.0])
@example(0.5, 1 - 1e-16, 0.5, 0.0, 1.0, [1.0])
@given(inside, inside, inside, st.floats(0, 10), st.floats(0.01, 1), st.lists(st.floats(0, 1), max_size=30))
def test_k_stays_between_its_settings(k_hard, k_easy, k, prior_weight, decay, rates):
    difficulty = DifficultyK(k_hard, k_easy, k=k, prior_weight=prior_weight, decay=decay)
    for rate in rates:
        difficulty.update([0], [rate])
        got = difficulty.k_for([0]).double().item()
        assert 0 < got < 1
        smallest = torch.finfo(torch.float32).tiny
        assert min(k, k_hard, k_easy) * (1 - 1e-7) <= got <= max(smallest, max(k, k_hard, k_easy) * (1 + 1e-7))


def test_a_prompt_goes_from_the_prior_to_its_history_and_forgets():
    difficulty = DifficultyK(0.2, 0.8, k=0.5, decay=0.9)
    rising = []
    for _ in range(60):
        rising.append(difficulty.k_for([0]).item())
        difficulty.update([0], [1.0])
    assert rising[0] == 0.5 and rising == sorted(rising)
    assert rising[-1] == pytest.approx((0.5 + 10 * 0.8) / 11, abs=1e-3)  # a history is worth 1 / (1 - decay) groups
    for _ in range(60):
        difficulty.update([0], [0.0])
    assert difficulty.k_for([0]).item() == pytest.approx((0.5 + 10 * 0.2) / 11, abs=2e-3)


def gate_by(k, rewards):
    """0 hard, 1 easy, of each group [groups, G], by the operation itself."""
    return group_advantages(rewards.flatten(), rewards.shape[1], k=k, backend="torch").baseline


def test_one_lucky_group_does_not_turn_the_gate():
    """Two prompts that succeed one time in eight and seven times in eight, and a group of each that does not."""
    difficulty = DifficultyK(0.1, 0.9)
    for _ in range(20):
        difficulty.update(["hard", "easy"], [1 / 8, 7 / 8])
    rewards = torch.tensor([[1.0] * 5 + [0.0] * 3, [1.0] * 3 + [0.0] * 5])
    assert gate_by(0.4, rewards).tolist() == [1, 0]
    assert gate_by(difficulty.k_for(["hard", "easy"]), rewards).tolist() == [0, 1]
    assert gate_by(DifficultyK(0.9, 0.1).k_for(["hard", "easy"]), rewards).tolist() == [1, 0]  # never seen: 0.4


def flips(k_of, size):
    """Mean over success rates p in (0, 1) of how often a group of this size has the rarer gate of that p: exact."""
    rates = [(i + 0.5) / 200 for i in range(200)]
    total = 0.0
    for p in rates:
        gates = gate_by(k_of(p), torch.tensor([[1.0] * n + [0.0] * (size - n) for n in range(size + 1)]))
        hard = sum(comb(size, n) * p**n * (1 - p) ** (size - n) for n, easy in enumerate(gates.tolist()) if not easy)
        total += min(hard, 1 - hard)
    return total / len(rates)


@pytest.mark.parametrize("size", [4, 8, 16])
def test_gates_flip_less_with_a_history(size):
    def settled(k_hard, k_easy):
        def k_of(p):
            difficulty = DifficultyK(k_hard, k_easy, prior_weight=0)
            difficulty.update([0], [p])
            return difficulty.k_for([0]).item()

        return k_of

    fixed = flips(lambda p: 0.4, size)
    assert flips(settled(0.1, 0.9), size) < 0.7 * fixed
    assert flips(settled(0.9, 0.1), size) > 1.3 * fixed


def test_a_history_goes_on_from_its_state():
    rates = [[0.1, 0.9, 1 / 3], [0.3, 0.7, 2 / 3], [1.0, 0.0, 0.5]]
    ids = ["7", 7, 'prompt, with "quotes" \u00e9']
    whole, first, second = (DifficultyK(0.2, 0.8, decay=0.7) for _ in range(3))
    for batch in rates:
        whole.update(ids, batch)
    first.update(ids, rates[0])
    second.update(["forgotten"], [1.0])
    second.load_state_dict(through_json(first.state_dict()))
    for batch in rates[1:]:
        second.update(ids, batch)
    assert second.state_dict() == whole.state_dict()
    assert torch.equal(second.k_for([*ids, "forgotten"]), whole.k_for([*ids, "forgotten"]))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "the state of a DifficultyK has the keys ['history']; got []"),
        ({"k": 0.4, "entropy": None}, "has the keys ['history']; got ['entropy', 'k']"),
        ({"history": {"a": [1, 1]}}, "history of the state must be a list; got dict"),
        ({"history": [["a", 1]]}, "history of the state must hold [id, weight, successes]; got ['a', 1]"),
        ({"history": [[1.5, 1.0, 1.0]]}, "prompt_ids must be str or int; prompt_ids[0] is 1.5"),
        ({"history": [["a", 0.0, 0.0]]}, "weight of 'a' must be a finite number in (0, inf); got 0.0"),
        ({"history": [["b", 1.0, 1.0], ["a", 1.0, 1.5]]}, "successes of 'a' must be a finite number in [0, 1.0]"),
        ({"history": [["a", math.nan, 0.0]]}, "weight of 'a' must be a finite number in (0, inf); got nan"),
    ],
)
def test_wrong_states_of_a_history_change_nothing(state, message):
    difficulty = DifficultyK(0.2, 0.8)
    difficulty.update(["a"], [0.5])
    before = difficulty.state_dict()
    with pytest.raises(ValueError) as error:
        difficulty.load_state_dict(state)
    assert message in str(error.value) and difficulty.state_dict() == before


@pytest.mark.parametrize(
    ("ids", "rates", "message"),
    [
        (["a", "b"], [0.5], "success_rates must be as many as the prompt ids, 2; got 1"),
        (["a"], 0.5, "success_rates must be as many as the prompt ids, 1; got 0.5"),
        (["a"], torch.tensor(0.5), "success_rates must be as many as the prompt ids, 1; got 0.5"),
        (["b", "a"], [0.5, 1.5], "success_rates[1] must be a finite number in [0, 1]; got 1.5"),
        (["b", "a"], [0.5, -0.5], "success_rates[1] must be a finite number in [0, 1]; got -0.5"),
        (["b", "a"], torch.tensor([0.5, math.nan]), "success_rates[1] must be a finite number in [0, 1]; got nan"),
        ("ab", [0.5, 0.5], "prompt_ids must be a list of str or int; got str"),
        (torch.tensor([1, 2]), [0.5, 0.5], "prompt_ids must be a list of str or int; got Tensor"),
        ([1, None], [0.5, 0.5], "prompt_ids must be str or int; prompt_ids[1] is None"),
        ([1, True], [0.5, 0.5], "prompt_ids must be str or int; prompt_ids[1] is True"),
    ],
)
def test_wrong_updates_change_nothing(ids, rates, message):
    difficulty = DifficultyK(0.2, 0.8)
    difficulty.update(["a"], [0.5])
    before = difficulty.state_dict()
    with pytest.raises(ValueError) as error:
        difficulty.update(ids, rates)
    assert message in str(error.value) and difficulty.state_dict() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k_hard": 0.0}, "k_hard must be a number strictly between 0 and 1; got 0.0"),
        ({"k_easy": 1}, "k_easy must be a number strictly between 0 and 1; got 1"),
        ({"k": None}, "k must be a number strictly between 0 and 1; got None"),
        ({"prior_weight": -1}, "prior_weight must be a finite number in [0, inf); got -1"),
        ({"decay": 0}, "decay, if not 1, must be a finite number in (0, 1); got 0"),
        ({"decay": 1.1}, "decay, if not 1, must be a finite number in (0, 1); got 1.1"),
    ],
)
def test_wrong_settings_of_a_history_are_named(settings, message):
    with pytest.raises(ValueError) as error:
        DifficultyK(**{"k_hard": 0.2, "k_easy": 0.8} | settings)
    assert message in str(error.value)
