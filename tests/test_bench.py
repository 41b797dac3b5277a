"""The benchmarks: they check before they time, peers compute the same update, no contestant stops the others, the
README's tables are those of the committed results, and `make gpu` keeps what it measured whatever fails."""

import argparse
import copy
import json
import os
import subprocess
import sys
import time
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import __main__ as cli
from bench import (
    bench_advantages,
    bench_linear,
    bench_policy_loss,
    bench_step,
    bench_token_logprobs,
    gpu,
    harness,
    linear_peers,
    memory,
    peers,
    report,
    truth,
    tune,
)
from bench.harness import WARM_UPS, Comparison, Contestant, Goal, about, compare
from bench.linear_peers import LINEAR_PEERS, LinearProblem
from bench.peers import LOGITS_PEERS, Problem
from qae_kernels.fused import policy_loss, token_stats

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
OPTIONS = argparse.Namespace(
    n=8, dim=[12], vocab=101, zero_credit=[0.0, 0.5], dtype="float32", sweep=False, model="tiny"
)  # fmt: skip
SHARES = (0.0, 0.5, 0.8)


def problem(device="cpu", dtype=torch.float32, zero_credit=0.5) -> Problem:
    """Many of its ratios are clipped, on both sides."""
    return Problem.random(64, 301, zero_credit, dtype, device, log_ratio_std=0.3)


def compared(runs, check=lambda name, result: {}, **keywords):
    contestants = {name: Contestant(run, **keywords) for name, run in runs.items()}
    return {row["contestant"]: row for row in compare(Comparison("c", contestants, check), CPU, repeats=3)}


class TestHarness:
    def test_contestants_are_timed_in_turn_and_prepared_every_time(self):
        calls = []
        contestants = {
            name: Contestant(calls.append, prepare=lambda name=name: calls.append(f"prepare {name}") or name)
            for name in ("a", "b")
        }
        rows = compare(Comparison("c", contestants, lambda name, result: {}), CPU, repeats=3)
        turns = ["prepare a", "a", "prepare b", "b"]
        assert calls == turns * (1 + WARM_UPS + 3)
        assert all(0 < r["p20_ms"] <= r["median_ms"] <= r["p80_ms"] for r in rows)

    def test_what_fails_is_named_and_does_not_stop_the_others(self):
        calls = {"late": 0}

        def fails(_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

        def fails_late(_):
            calls["late"] += 1
            assert calls["late"] < 4, "now"

        def check(name, result):
            assert name != "wrong", "gradient is off"
            return {"loss": 1e-9}

        rows = compared({"good": abs, "memory": fails, "late": fails_late, "wrong": abs}, check, prepare=lambda: -1)
        assert rows["good"]["median_ms"] > 0 and rows["good"]["errors"] == {"loss": 1e-9}
        assert rows["memory"]["failed"] == "OutOfMemoryError: CUDA out of memory. Tried"
        assert rows["wrong"]["failed"] == "AssertionError: gradient is off"
        assert rows["late"]["failed"].startswith("AssertionError: now")
        assert not any("median_ms" in rows[name] for name in ("memory", "wrong", "late"))

    def test_a_peer_is_compared_with_the_one_of_ours_that_delivers_the_same(self):
        rows = [
            {"contestant": f"{harness.OURS}, a", "delivers": "a", "median_ms": 1.0},
            {"contestant": f"{harness.OURS}, b", "delivers": "b", "median_ms": 4.0},
            {"contestant": "peer", "delivers": "b", "median_ms": 8.0},
            {"contestant": "other", "delivers": "c", "median_ms": 3.0},
            {"contestant": "broken", "delivers": "b", "failed": "x"},
        ]
        harness.add_ratios(rows)
        assert [row.get("times_ours") for row in rows] == [None, None, 2, 3, None]
        assert rows[2]["ours"] == f"{harness.OURS}, b"

    def test_names_what_it_ran_on(self, monkeypatch):
        facts = about(CPU)
        assert facts["torch"] == torch.__version__ and facts["paths"] == "PyTorch paths" and facts["date"]
        assert isinstance(facts["dirty"], bool)
        monkeypatch.setenv("QAE_COMMIT", "abc123-dirty")
        assert {"commit": "abc123", "dirty": True}.items() <= about(CPU).items()

    def test_bytes_at_the_floor(self):
        given = problem(dtype=torch.bfloat16, zero_credit=0.5)
        assert given.logits.nbytes == 64 * 301 * 2
        assert bench_policy_loss.floor_bytes(given, "all") == 4 * 64 * 301
        assert bench_policy_loss.floor_bytes(given, "active") == bench_policy_loss.floor_bytes(given, "none")
        assert bench_policy_loss.floor_bytes(given, "none") == 3 * 64 * 301

    def test_a_goal_is_judged_by_runs_that_followed_one_another(self):
        """Of a machine that becomes ten times slower half-way every ratio is still that of the two."""
        times = [harness.Times(ms, 2 * ms) for ms in (1.0, 1.0, 10.0)]
        reference = [harness.Times(ms, 3 * ms) for ms in (4.0, 4.0, 40.0)]
        row = harness.reached(Goal("a", "b", 0.5), times, reference)
        assert row == {"relative_to": "b", "at_most": 0.5, "ratio": 0.25, "cpu_ratio": pytest.approx(1 / 6)}

    def test_ratios_are_of_this_run_and_of_contestants_that_were_timed(self):
        def spin(factor):
            return lambda _: sum(range(factor * 20_000))

        def fails(_):
            raise ValueError("no")

        contestants = {"a": Contestant(spin(1)), "b": Contestant(spin(10)), "c": Contestant(fails)}
        goals = (Goal("a", "b", 0.5), Goal("a", "c"), Goal("c", "b"), Goal("b", "absent"))
        rows = {r["contestant"]: r for r in compare(Comparison("c", contestants, check_nothing, goals=goals), CPU, 9)}
        (goal,) = rows["a"]["goals"]
        assert "goals" not in rows["b"] and "goals" not in rows["c"]
        assert 0.02 < goal["cpu_ratio"] < 0.5 and 0.02 < goal["ratio"] < 0.5
        assert 0 < rows["a"]["cpu_ms"] < rows["b"]["cpu_ms"]
        assert f"{goal['ratio']:.2f}x b, CPU {goal['cpu_ratio']:.2f}x; goal at most 0.50x" in cli.line(rows["a"], 1.0)

    def test_cpu_time_leaves_out_waiting_and_includes_every_thread(self):
        waiting = harness.timed(Contestant(lambda _: time.sleep(0.05)), CPU, torch.empty(0))
        assert waiting.ms > 50 and waiting.cpu_ms < 25

    def test_memory_alone(self):
        made = Comparison("c", {"a": Contestant(abs, lambda: -1)}, check_nothing, timed=False)
        (row,) = compare(made, CPU, 2)
        assert row["errors"] == {} and "median_ms" not in row and "failed" not in row


def check_nothing(name, result):
    return {}


def allocating(mebibytes: int, kept: int, name: str = "a") -> Contestant:
    """Needs so much at its peak, of which it keeps so much as its result; the first run leaves a cache behind."""
    cache = []

    def run(_):
        cache.append(torch.ones(2**21) if not cache else None)
        temporary = torch.ones(mebibytes - kept, 2**18)
        return torch.ones(kept, 2**18), temporary.sum()

    return Contestant(run)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is Linux's")
class TestMemory:
    @pytest.mark.parametrize("mebibytes", [40, 160])
    def test_an_allocation_of_known_size_is_seen(self, mebibytes):
        found = memory.in_fresh_process(partial(allocating, mebibytes, 10), "a")
        assert abs(found / 2**20 - mebibytes) < 4

    def test_what_was_there_before_is_not(self):
        before = torch.ones(64, 2**18)
        assert memory.extra_bytes(lambda: before.add_(1)) < 2**23

    def test_it_is_measured_where_contestants_can_be_made_anew(self):
        made = {"a": allocating(8, 4)}
        comparison = Comparison("c", made, check_nothing, remake=partial(allocating, 64, 32), timed=False)
        (row,) = compare(comparison, CPU, 2)
        assert abs(row["extra_memory_bytes"] / 2**20 - 64) < 4
        (row,) = compare(replace(comparison, remake=None), CPU, 2)
        assert row["extra_memory_bytes"] is None

    def test_the_environment_is_left_as_it_was(self, monkeypatch):
        monkeypatch.setenv("MKL_DISABLE_FAST_MM", "0")
        before = dict(os.environ)
        with memory.handing_back():
            assert os.environ["MKL_DISABLE_FAST_MM"] == "1" and os.environ["MALLOC_MMAP_THRESHOLD_"] == "65536"
        assert dict(os.environ) == before


class TestProblem:
    def test_whole_responses_are_without_credit(self):
        given = Problem.random(128, 11, 0.8)
        assert given.logits.shape == (64, 2, 11) and given.zero_credit == 51 / 64
        assert Problem.random(9, 11).logits.shape == (1, 9, 11)

    def test_no_ratio_is_at_a_clip_bound(self):
        given = Problem.random(4096, 5)
        logprobs = given.logits.detach().log_softmax(-1).gather(-1, given.tokens[..., None])[..., 0]
        log_ratio = (logprobs - given.old_logprobs).detach()
        bounds = torch.tensor([0.8, 1.28]).log()
        assert (log_ratio[..., None] - bounds).abs().min() > peers.CLIP_MARGIN / 2
        assert (log_ratio < bounds[0]).any() and (log_ratio > bounds[1]).any()


class TestTruth:
    @pytest.fixture
    def update(self):
        given = problem()
        return given, bench_policy_loss.ours(given, in_place=False, entropy="all")

    @pytest.mark.parametrize("chunk_bytes", [1, 8 * 301 * 5, 2**24])
    def test_right_answers_pass_in_any_chunks(self, update, monkeypatch, chunk_bytes):
        monkeypatch.setitem(truth.CHUNK_BYTES, "cpu", chunk_bytes)
        errors = truth.assert_within(truth.update_errors(*update), torch.float32)
        assert set(errors) == {"loss", "gradient", "entropy"} and max(errors.values()) < 5e-6

    @pytest.mark.parametrize("which", ["loss", "entropy", "gradient"])
    @pytest.mark.parametrize("wrong", [1.001, torch.nan])
    def test_a_wrong_answer_is_found_in_the_last_row(self, update, monkeypatch, which, wrong):
        monkeypatch.setitem(truth.CHUNK_BYTES, "cpu", 8 * 301)
        given, (loss, entropy, gradient) = update
        gradient, entropy = gradient.clone(), entropy.clone()
        if which == "loss":
            loss = loss + 0.01 * wrong
        elif which == "entropy":
            entropy[-1, -1] *= wrong
        else:
            gradient[-1, -1, 7] += 0.001 * wrong * gradient.abs().max()
        with pytest.raises(AssertionError, match=f"{which} is off by"):
            truth.assert_within(truth.update_errors(given, (loss, entropy, gradient)), torch.float32)

    def test_entropy_is_checked_only_where_it_is_claimed(self, update):
        given, (loss, entropy, gradient) = update
        active = (given.advantages != 0)[:, None].expand_as(given.tokens)
        partly = loss, torch.where(active, entropy, 0), gradient
        assert truth.update_errors(given, partly, active)["entropy"] < 1e-5
        assert truth.update_errors(given, partly)["entropy"] == 1
        assert "entropy" not in truth.update_errors(given, (loss, None, gradient))

    def test_wrong_logprobs_and_their_gradient_are_found(self):
        given, upstream = problem(), torch.randn(64, 1)
        result = bench_token_logprobs.forward_backward(given, bench_token_logprobs.eager, upstream)
        assert max(truth.logprobs_errors(given, *result, upstream).values()) < 1e-5
        for i, name in enumerate(("logprobs", "entropy", "gradient")):
            wrong = [x.clone() for x in result]
            wrong[i].view(-1)[-1] += wrong[i].abs().max()
            assert truth.logprobs_errors(given, *wrong, upstream)[name] > 0.5


def linear_problem(device="cpu", dtype=torch.float32, zero_credit=0.5) -> LinearProblem:
    return LinearProblem.random(64, 24, 301, zero_credit, dtype, device, log_ratio_std=0.3)


class TestLinearTruth:
    @pytest.fixture
    def update(self):
        given = linear_problem()
        return given, linear_peers.eager(given)

    @pytest.mark.parametrize("chunk_bytes", [1, 8 * 301 * 5, 2**24])
    def test_right_answers_pass_in_any_chunks(self, update, monkeypatch, chunk_bytes):
        monkeypatch.setitem(truth.CHUNK_BYTES, "cpu", chunk_bytes)
        given, result = update
        errors = truth.assert_within(truth.LinearTruth.of(given).errors(result), torch.float32)
        assert set(errors) == {"loss", "gradient of hidden", "gradient of weight", "entropy"}
        assert max(errors.values()) < 5e-6

    def test_it_is_that_of_the_logits(self, update):
        """The same problem with its logits written out, by the reference's other caller."""
        given, (loss, entropy, dhidden, _) = update
        hidden, weight = given.hidden.detach().double(), given.weight.detach().double()
        logits = (hidden @ weight.t()).requires_grad_()
        same = Problem(logits, given.tokens, given.advantages, given.old_logprobs)
        *_, dlogits = peers.eager(same)
        from_logits = torch.einsum("btv,btd->vd", dlogits.double(), hidden)
        assert truth.relative_error(from_logits, truth.LinearTruth.of(given).dweight) < 1e-6
        assert max(truth.update_errors(same, (loss, entropy, dlogits)).values()) < 1e-5

    @pytest.mark.parametrize("which", ["loss", "entropy", "gradient of hidden", "gradient of weight"])
    @pytest.mark.parametrize("wrong", [1e-4, torch.nan])
    def test_a_wrong_answer_is_found_in_the_last_row(self, update, monkeypatch, which, wrong):
        monkeypatch.setitem(truth.CHUNK_BYTES, "cpu", 8 * 301)
        given, result = update
        result = [x.clone() for x in result]
        x = result[["loss", "entropy", "gradient of hidden", "gradient of weight"].index(which)]
        x.view(-1)[-1] += wrong * x.abs().max().clamp(min=1)
        with pytest.raises(AssertionError, match=f"{which} is off by"):
            truth.assert_within(truth.LinearTruth.of(given).errors(result), torch.float32)

    def test_entropy_is_checked_only_where_it_is_claimed(self, update):
        given, (loss, entropy, *gradients) = update
        exact, active = truth.LinearTruth.of(given), (given.advantages != 0)[:, None].expand_as(given.tokens)
        partly = loss, torch.where(active, entropy, 0), *gradients
        assert exact.errors(partly, active)["entropy"] < 1e-5 and exact.errors(partly)["entropy"] > 0.5
        assert "entropy" not in exact.errors((loss, None, *gradients))

    def test_wider_limits_are_for_rounded_logits_only(self):
        assert truth.rounded_logits_limits(torch.float32, 12.0) == truth.limits(torch.float32)
        wide = truth.rounded_logits_limits(torch.bfloat16, 12.0)
        assert all(truth.limits(torch.bfloat16)[name] < limit < 0.12 for name, limit in wide.items())

    def test_sixteen_bit_ratios_keep_clear_of_the_clip_bounds(self):
        given = LinearProblem.random(4096, 8, 5, dtype=torch.bfloat16)
        logits = given.hidden.detach().float() @ given.weight.detach().float().t()
        log_ratio = logits.log_softmax(-1).gather(-1, given.tokens[..., None])[..., 0] - given.old_logprobs
        bounds = torch.tensor([0.8, 1.28]).log()
        assert (log_ratio[..., None] - bounds).abs().min() > 0.99 * linear_peers.ROUNDED_CLIP_MARGIN
        assert (log_ratio < bounds[0]).any() and (log_ratio > bounds[1]).any()


class TestLinear:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "name",
        [pytest.param(n, marks=pytest.mark.slow) if n == "cut_cross_entropy" else n for n in LINEAR_PEERS],  # compiles
    )
    def test_peers_compute_our_update(self, device, name, dtype):
        if reason := linear_peers.missing(device).get(name):
            pytest.skip(reason)
        given = linear_problem(device, dtype)
        update = LINEAR_PEERS[name].update(given)
        assert (update[1] is not None) == LINEAR_PEERS[name].has_entropy
        assert max(bench_linear.check(given)(name, update).values()) > 0
        assert given.hidden.grad is None and given.weight.grad is None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", bench_linear.OUR_VARIANTS)
    def test_ours_agree_within_the_narrow_limits(self, device, name, dtype):
        given = linear_problem(device, dtype)
        entropy = bench_linear.OUR_VARIANTS[name]
        errors = bench_linear.check(given)(name, bench_linear.ours(given, entropy=entropy))
        assert ("entropy" in errors) == (entropy != "none")

    def test_a_wrong_gradient_is_not_timed(self):
        def wrong(problem):
            loss, entropy, dhidden, dweight = linear_peers.eager(problem)
            dweight[17] = 0
            return loss, entropy, dhidden, dweight

        comparison = bench_linear.comparison(16, 12, 101, 0.0, "float32", CPU)
        chosen = {"wrong": replace(comparison.contestants["eager PyTorch"], run=wrong),
                  bench_linear.GEMMS: comparison.contestants[bench_linear.GEMMS]}  # fmt: skip
        rows = compare(replace(comparison, contestants=chosen, remake=None, missing={}), CPU, 2)
        assert rows[0]["failed"].startswith("AssertionError: gradient of weight is off by") and "median_ms" in rows[1]

    @pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 64), (torch.float32, 25), (torch.bfloat16, 64)])
    def test_the_floor_is_three_products_of_every_row(self, device, dtype, size):
        given = linear_problem(device, dtype)
        floor = replace(bench_linear.Floor.of(given), size=size)
        if floor.dlogits is not None:
            floor.dlogits.copy_(given.hidden.detach().flatten(0, 1) @ given.weight.detach().t())
        logits = given.hidden.detach().flatten(0, 1).double() @ given.weight.detach().double().t()
        dhidden, dweight = bench_linear.gemms(floor)
        for got, exact in ((dhidden, logits @ given.weight.detach().double()),
                           (dweight, logits.t() @ given.hidden.detach().flatten(0, 1).double())):  # fmt: skip
            assert truth.relative_error(got, exact) < 2 * torch.finfo(dtype).eps + 1e-6

    def test_the_sweep_measures_memory_at_other_n(self, monkeypatch):
        monkeypatch.setitem(bench_linear.SWEEP, "cpu", (4, 8, 16))
        options = argparse.Namespace(**{**vars(OPTIONS), "sweep": True})
        found = [(c.facts["n"], c.facts["zero_credit"], c.timed) for c in bench_linear.comparisons(options, CPU)]
        assert found == [(8, 0, True), (8, 0.5, True), (4, 0, False), (16, 0, False)]

    def test_memory_of_ours_is_measured_in_another_process(self):
        comparison = bench_linear.comparison(64, 16, 4096, 0.0, "float32", CPU, timed=False)
        chosen = {bench_linear.OURS: comparison.contestants[bench_linear.OURS]}
        (row, *_) = compare(replace(comparison, contestants=chosen), CPU, 2)
        assert row["extra_memory_bytes"] >= 64 * 4096 * 4  # one chunk of logits, at least
        assert "goal at most" not in cli.line(row, 1.0)  # those are of the default shape

    def test_goals_are_those_of_the_default_shape(self, monkeypatch):
        def goals(rows):
            found = bench_linear.comparison(rows, 12, 101, 0.0, "float32", CPU)
            ours = found.contestants[bench_linear.OURS]
            return [goal.at_most for goal in found.goals[:2]], "extra_memory_goal_bytes" in ours.facts

        assert goals(16) == ([None, None], False)
        for name, value in (("ROWS", {"cpu": 16}), ("DIMS", {"cpu": (12,)}), ("VOCAB", 101)):
            monkeypatch.setattr(bench_linear, name, value)
        assert goals(16) == ([1.12, 0.45], True) and goals(8) == ([None, None], True)


@pytest.fixture(scope="module")
def given():
    return bench_step.StepProblem.random(bench_step.TINY)


class TestStep:
    def test_credit_is_lost_in_the_same_order_at_every_share(self, given):
        idle = [set((given.advantages(share) == 0).nonzero()[:, 0].tolist()) for share in (0.2, 0.5, 0.8)]
        assert [len(x) for x in idle] == [2, 5, 8] and idle[0] < idle[1] < idle[2]

    def test_gradients_of_all_shares_in_one_pass(self, given):
        """Each as if it had been computed alone."""
        exact = bench_step.exact_gradients(given, (0.0, 0.8))
        model = copy.deepcopy(given.model).double()
        for share in (0.0, 0.8):
            model.zero_grad()
            bench_step.from_logits(given, model, bench_step.eager_statistics, share)
            alone = {name: p.grad for name, p in model.named_parameters()}
            assert bench_step.gradient_error(alone, exact[share]) < 1e-12
        assert bench_step.gradient_error(exact[0.8], exact[0.0]) > 0.1

    def test_every_contestant_is_right_and_ratios_are_of_one_run(self, given):
        comparison = bench_step.comparison(bench_step.TINY, "float32", SHARES, CPU)
        rows = compare(replace(comparison, remake=None), CPU, repeats=2)
        assert all(row["median_ms"] > 0 for row in rows), rows
        assert {row["zero_credit"] for row in rows} == set(SHARES)
        for row in rows:
            if "sparse" in row["contestant"]:
                goal = row["goals"][0]
                assert goal["relative_to"] == bench_step.DENSE
                assert goal["at_most"] == pytest.approx((1 - row["zero_credit"]) / 0.85)

    def test_a_wrong_gradient_is_found_in_any_parameter(self, given):
        gradients = bench_step.with_gradients(bench_step.dense, bench_step.without_gradients(given))
        errors = bench_step.check(given, SHARES)
        errors(bench_step.DENSE, gradients)
        for name, gradient in gradients.items():
            for wrong in (gradient * 1.001, torch.full_like(gradient, torch.nan), None):
                with pytest.raises(AssertionError, match="gradients is off"):
                    errors(bench_step.DENSE, gradients | {name: wrong})
        with pytest.raises(AssertionError, match="gradients is off"):  # those of another share
            errors(bench_step.sparse_name(0.8), gradients)

    def test_the_model_with_a_fused_head_has_the_same_parameters(self, given):
        pytest.importorskip("trl")
        fused = bench_step.with_fused_lm_head(given.model)
        pairs = zip(fused.named_parameters(), given.model.named_parameters(), strict=True)
        assert all(a is b for (_, a), (_, b) in pairs) and fused.forward != given.model.forward


class TestPeers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "name", [pytest.param(n, marks=pytest.mark.slow) if n == "torch.compile" else n for n in LOGITS_PEERS]
    )
    def test_they_compute_our_update_and_leave_the_problem_alone(self, monkeypatch, device, name, dtype):
        if name == "flash-attn" and device == "cpu":  # its kernels run in the interpreter, its launcher asks for CUDA
            monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
            reason = peers.why_not(peers.load_flash_attn, None, CPU)
            if dtype == torch.bfloat16:
                reason = reason or "Triton's interpreter multiplies the bits of a scalar bfloat16, not its value"
        else:
            reason = peers.missing(device).get(name)
        if reason:
            pytest.skip(reason)
        given = problem(device, dtype)
        before = given.logits.detach().clone()
        update = LOGITS_PEERS[name](given)
        assert (update[1] is not None) == LOGITS_PEERS[name].has_entropy
        truth.assert_within(truth.update_errors(given, update), dtype)
        assert torch.equal(given.logits, before) and given.logits.grad is None

    def test_advantages(self):
        rewards = bench_advantages.random_rewards(16, 8, "cpu")
        rows = compare(bench_advantages.comparison(16, 8, CPU), CPU, repeats=2)
        assert len(rows) == 5 and not any("failed" in row for row in rows)
        assert max(row["errors"]["advantages"] for row in rows if "errors" in row) < 1e-6
        with pytest.raises(AssertionError, match="advantages is off"):
            wrong = peers.vectorised_advantages(rewards, 8)
            bench_advantages.errors(rewards, 8, {"x": "quantile"}, "x", wrong)

    def test_the_missing_are_named_with_the_reason(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert "needs a GPU" in peers.missing("cpu")["Liger"] and "CUDA" in peers.missing("cpu")["flash-attn"]
        monkeypatch.setitem(sys.modules, "trl.kernels", None)
        assert "trl" in peers.missing("cuda")["TRL"]
        assert "eager PyTorch" not in peers.missing("cpu")

    @pytest.mark.parametrize("name", bench_policy_loss.OUR_VARIANTS)
    @pytest.mark.parametrize("backend", ["triton", "torch"])
    def test_ours_agree(self, device, name, backend):
        given = problem(device)
        in_place, entropy = bench_policy_loss.OUR_VARIANTS[name]
        run = partial(bench_policy_loss.ours, in_place=in_place, entropy=entropy, backend=backend)
        before = given.logits.detach().clone()
        errors = bench_policy_loss.check(given)(name, run(given.copy() if in_place else given))
        assert torch.equal(given.logits, before) and ("entropy" in errors) == (entropy != "none")


class TestStages:
    @pytest.mark.parametrize("stage", cli.STAGES.values(), ids=cli.STAGES)
    def test_every_contestant_is_right(self, monkeypatch, stage):
        monkeypatch.setitem(LOGITS_PEERS, "torch.compile", LOGITS_PEERS["eager PyTorch"])  # compiling takes long
        monkeypatch.delitem(LINEAR_PEERS, "cut_cross_entropy")
        monkeypatch.setitem(bench_step.MODELS, "tiny", bench_step.TINY)
        for comparison in stage.comparisons(OPTIONS, CPU):
            rows = compare(replace(comparison, remake=None), CPU, repeats=2)
            measured = [row for row in rows if "missing" not in row]
            assert measured[0]["contestant"].startswith(harness.OURS) and len(measured) > 1
            assert all(row["median_ms"] > 0 for row in measured), rows
            assert any("times_ours" in row for row in measured)

    def test_sweep_varies_one_thing_at_a_time(self, monkeypatch):
        monkeypatch.setattr(bench_policy_loss, "SWEEP", {"n": (4,), "vocab": (5, 6), "zero_credit": (0.5,)})
        options = argparse.Namespace(**{**vars(OPTIONS), "sweep": True})
        facts = [c.facts for c in bench_policy_loss.comparisons(options, CPU)]
        shapes = [(x["n"], x["vocab"], x["zero_credit"]) for x in facts]
        assert shapes == [(4, 101, 0), (8, 101, 0), (8, 5, 0), (8, 6, 0), (8, 101, 0.5)]

    def test_command_line_writes_what_it_measured(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(harness, "COPY_BYTES", {"cpu": 2**16, "cuda": 2**16})
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        path = tmp_path / "result.json"
        arguments = "policy_loss --device cpu --n 8 --vocab 101 --repeats 3 --without torch.compile --json"
        cli.main([*arguments.split(), str(path)])
        result = json.loads(path.read_text())
        assert result["about"]["torch"] == torch.__version__ and result["about"]["copy_gb_per_s"] > 0
        measured = [row for row in result["rows"] if "median_ms" in row]
        assert len(measured) == 2 * 5 and {row["zero_credit"] for row in measured} == {0, 0.75}
        printed = capsys.readouterr().out
        assert "CPU: the PyTorch paths are timed" in printed and "missing: a Triton kernel" in printed

    def test_command_line_refuses(self, capsys):
        for arguments, said in ((["nothing"], "no such benchmark: nothing"), (["--repeats", "1"], "at least 2")):
            with pytest.raises(SystemExit):
                cli.main(arguments)
            assert said in capsys.readouterr().err


def fake_results(folder: Path) -> list[dict]:
    """As `make gpu` would leave them: dense and zero credit, a sweep, one peer that failed, one missing."""
    facts = {**about(CPU), "device": "NVIDIA X", "paths": report.ON_GPU, "copy_gb_per_s": 2000.0}

    def row(name, delivers, n, share, median_ms, **more):
        return {"benchmark": f"policy_loss, N = {n}", "n": n, "vocab": 1000, "dtype": "bfloat16", "zero_credit": share,
                "contestant": name, "delivers": delivers, "floor_bytes": 4 * n * 1000, "extra_memory_bytes": 2**29,
                "median_ms": median_ms, "p20_ms": median_ms * 0.9, "p80_ms": median_ms * 1.1, **more}  # fmt: skip

    rows = [
        row("qae_kernels", "all", 1000, share, 0.004 * (1 - share / 2)) for share in (0.0, 0.8)
    ] + [row("eager PyTorch", "all", 1000, share, 0.04, times_ours=10.0) for share in (0.0, 0.8)]  # fmt: skip
    broken = {k: v for k, v in rows[0].items() if not k.endswith("_ms")} | {"contestant": "TRL", "failed": "Error: x"}
    absent = {k: rows[0][k] for k in ("benchmark", "n", "vocab", "dtype", "zero_credit")} | {"contestant": "Liger"}
    sweep = [row("qae_kernels", "all", n, 0.0, n / 1000) for n in (1000, 2000)]
    files = {"policy_loss": [*rows, broken, absent | {"missing": "not here"}], "sweep": sweep}
    for name, found in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"about": facts, "rows": found}))
    (folder / "validate.json").write_text("[]")
    return report.load(folder)


def fake_linear_results(folder: Path) -> list[dict]:
    """As `python -m bench linear --sweep` would leave them on a CPU."""

    def row(name, n, megabytes, **more):
        return {"benchmark": "linear", "n": n, "dim": 64, "vocab": 5000, "zero_credit": 0.0, "dtype": "float32",
                "contestant": name, "delivers": "all", "floor_bytes": None, "extra_memory_bytes": megabytes * 10**6,
                **more}  # fmt: skip

    def times(median_ms, cpu_ms):
        return {"median_ms": median_ms, "p20_ms": 0.9 * median_ms, "p80_ms": 1.1 * median_ms, "cpu_ms": cpu_ms}

    goal = {"relative_to": bench_linear.GEMMS, "at_most": 1.12, "ratio": 2.0, "cpu_ratio": 1.1}
    limit = {"extra_memory_goal_bytes": 450 * 10**6}
    rows = [
        row("qae_kernels", 1000, 400, **times(20.0, 38.0), goals=[goal], **limit),
        row(bench_linear.GEMMS, 1000, 400, **times(10.0, 19.0)),
        row("TRL", 1000, 1200, **times(40.0, 70.0)),
        row("qae_kernels", 500, 390, memory_only=True, **limit),
    ]
    facts = {**about(CPU), "copy_gb_per_s": 1.0}
    (folder / "linear_cpu.json").write_text(json.dumps({"about": facts, "rows": rows}))
    return report.load(folder)


class TestReport:
    @pytest.mark.parametrize(("page", "text"), [(report.README, report.summary), (report.PAGE, report.block)])
    def test_the_pages_are_those_of_the_committed_results(self, page, text):
        written = page.read_text(encoding="utf-8")
        assert written == report.with_block(written, text(report.load(report.RESULTS)))
        for path in report.plots(report.load(report.RESULTS)):
            assert path.exists()

    def test_without_a_gpu_it_says_so(self, tmp_path):
        text = report.block([], tmp_path)
        assert text.startswith("GPU: not measured.\n\n") and text.count("not measured") == 1 + len(report.ON_CPU)
        results = [{"about": {**about(CPU), "copy_gb_per_s": 1.0}, "rows": [], "file": "linear_cpu"}]
        text = report.block(results, tmp_path)
        assert text.startswith("GPU: not measured.\n\nOn a CPU, the PyTorch paths")
        assert "bench linear" not in text and "`python -m bench step` on a CPU: not measured." in text
        assert report.plots(results) == {}

    def test_what_is_proven_without_a_gpu(self):
        """Every contestant with its own numbers; a renamed case in one of the files would leave a gap."""
        lines = [line.strip("| ").split(" | ") for line in report.proofs(report.RESULTS)[0].splitlines()[2:]]
        assert [line[0] for line in lines] == list(report.PROVEN)
        for name, instructions, ex2, dense, sparse, *launches in lines:
            assert len(launches) == 2 and float(sparse) <= float(dense), name
            if name.startswith("qae_kernels"):
                assert "?" not in instructions + ex2 and float(dense) < 6.1 and float(sparse) < 4.5, name

    def test_tables(self, tmp_path):
        text = report.block(fake_results(tmp_path), tmp_path)
        assert "Not measured: Liger (not here)." in text and "Failed: TRL (Error: x)." in text
        assert "GPU: not measured" not in text
        ours, eager, failed = (next(x for x in text.splitlines() if x.startswith(f"| {name} "))
                               for name in ("qae_kernels", "eager PyTorch", "TRL"))  # fmt: skip
        # 4 MB in 4 us are 1000 GB/s: half a copy's 2000
        dense, idle = "0.004 (0.0036 to 0.0044) | 50% |  | 0.50", "0.0024 (0.00216 to 0.00264) | 83% |  | 0.50"
        assert ours == f"| qae_kernels | all | {dense} | {idle} |"
        assert "| 10.00x |" in eager
        assert failed.startswith("| TRL | all | failed |") and "not measured" in failed
        assert "N = 2,000" not in text  # the sweep is in the plots

    def test_tables_from_hidden_states(self, tmp_path):
        results = fake_linear_results(tmp_path)
        text = report.block(results, tmp_path)
        lines = text.splitlines()
        columns = "ms (p20 to p80) | dense: CPU ms | dense: of the GEMMs | dense: times ours | dense: extra GiB"
        assert f"| linear, N = 1,000, D = 64, V = 5,000, float32 | delivers | dense: {columns} |" in lines[0:9]
        assert "| qae_kernels | all | 20 (18 to 22) | 38 | 1.10 |  | 0.37 |" in lines
        assert "| the three GEMMs alone | all | 10 (9 to 11) | 19 |  |  | 0.37 |" in lines
        time = "qae_kernels, dense: 1.10 of the three GEMMs alone, at most 1.12 reached"
        space = "qae_kernels, dense: 400 MB extra, the most of ours, at most 450 reached"
        assert f"Ratios are of CPU time, run by run. Goals: {time}; {space}." in lines
        head = "| linear, D = 64, V = 5,000, float32, dense: peak extra MB | N = 500 | N = 1,000 |"
        table = lines[lines.index(head) :]
        assert table[2] == "| qae_kernels | 390 | 400 |" and table[4] == "| TRL | not measured | 1,200 |"
        results[0]["rows"][0]["goals"][0]["cpu_ratio"] = 1.13
        assert "1.13 of the three GEMMs alone, at most 1.12 missed" in report.block(results, tmp_path)

    def test_tables_of_steps(self, tmp_path):
        common = {"benchmark": "step, Qwen3 of 1 M", "delivers": "x", "floor_bytes": None, "p20_ms": 1.0, "p80_ms": 9.0,
                  "extra_memory_bytes": None}  # fmt: skip
        goal = {"relative_to": bench_step.DENSE, "at_most": 0.24, "ratio": 0.3, "cpu_ratio": 0.25}
        sparse = {"zero_credit": 0.8, "active_share": 0.2, "goals": [goal], "median_ms": 2.0, "cpu_ms": 4.0}
        rows = [
            {**common, **sparse, "contestant": "sparse"},
            {**common, "contestant": bench_step.DENSE, "zero_credit": 0.0, "median_ms": 8.0, "cpu_ms": 16.0},
        ]
        facts = {**about(CPU), "copy_gb_per_s": 1.0}
        (tmp_path / "step_cpu.json").write_text(json.dumps({"about": facts, "rows": rows}))
        lines = report.block(report.load(tmp_path), tmp_path).splitlines()
        assert "| sparse | x | 2 (1 to 9) | 4 | 0.25 | 80% |  |" in lines  # 1 / 0.25 of 1 / 0.2
        assert f"| {bench_step.DENSE} | x | 8 (1 to 9) | 16 |  |  |  |" in lines
        assert any("sparse: 0.25 of qae_kernels, dense, at most 0.24 missed." in line for line in lines)

    def test_plots_are_drawn_from_what_is_there_and_do_not_change(self, tmp_path):
        drawn = report.plots(fake_results(tmp_path))
        assert [path.name for path in drawn] == ["bench_nvidia_x.png", "bench_nvidia_x_scaling.png"]
        for path, draw in drawn.items():
            assert f"](docs/{path.name})" in report.summary(report.load(tmp_path), tmp_path)
            assert f"]({path.name})" in report.block(report.load(tmp_path), tmp_path)
            draw(tmp_path / "a.png")
            draw(tmp_path / "b.png")
            assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    def test_only_what_varies_alone_is_a_line(self):
        rows = [{"n": n, "vocab": v, "zero_credit": 0} for n, v in ((1, 5), (2, 5), (3, 5), (2, 7))]
        assert [row["n"] for row in report.varying(rows, "n")] == [1, 2, 3]
        assert [row["vocab"] for row in report.varying(rows, "vocab")] == [5, 7]
        assert report.varying(rows, "zero_credit") == []

    def test_markers(self):
        text = f"a\n{report.BEGIN}\nold\n{report.END}\nb"
        assert report.with_block(text, "new") == f"a\n{report.BEGIN}\nnew\n{report.END}\nb"
        with pytest.raises(ValueError, match="once each"):
            report.with_block("no markers", "new")


def wheel(folder: Path, name: str) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


class TestGPU:
    @pytest.fixture
    def here(self, monkeypatch):
        """Pretends that there is a GPU; steps are the given lines of Python."""
        monkeypatch.setattr(gpu, "FIND_DEVICE", 'print(\'{"device": "NVIDIA X 80GB"}\')')

        def choose(**code):
            chosen = {name: gpu.Step(["-c", line], 20, name == "bench") for name, line in code.items()}
            monkeypatch.setattr(gpu, "steps", lambda out, scratch: chosen)
            return chosen

        return choose

    def test_without_a_gpu_one_clear_line(self):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.startswith("make gpu: no GPU for ") and done.stderr.count("\n") == 1

    def test_every_step_is_attempted_and_kept(self, here, tmp_path):
        forever = "import subprocess, sys, time\nprint('begun', flush=True)\n" \
                  "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"  # fmt: skip
        chosen = here(good="print('fine')", bad="import sys; sys.exit('broken')", slow=forever, last="print('end')")
        chosen["slow"] = replace(chosen["slow"], limit_s=1)
        assert gpu.main(["--out", str(tmp_path)]) == 1
        written = json.loads((tmp_path / "nvidia-x-80gb" / "gpu.json").read_text())
        outcomes = {name: step["outcome"] for name, step in written["steps"].items()}
        assert outcomes == {"good": "passed", "bad": "failed with exit status 1", "slow": "stopped after 1 s",
                            "last": "passed"}  # fmt: skip
        assert written["steps"]["bad"]["tail"] == ["broken"] and written["steps"]["slow"]["tail"] == ["begun"]
        assert written["steps"]["slow"]["seconds"] < 4  # longer if what the step had started lives on
        assert gpu.main(["good", "last", "--out", str(tmp_path)]) == 0
        assert gpu.main(["good", "--out", str(tmp_path), "--seconds", "0"]) == 1

    def test_wheels_are_seen_and_flash_attn_by_the_benchmarks_only(self, here, tmp_path):
        wheel(tmp_path, "some_peer")
        wheel(tmp_path, "flash_attn")
        unseen = "import sys, some_peer; assert not any(path.endswith('flash_attn') for path in sys.path)"
        here(tests=unseen, bench="import some_peer, flash_attn")
        assert gpu.main(["--wheels", str(tmp_path), "--out", str(tmp_path)]) == 0

    def test_its_steps_exist(self, tmp_path, capsys):
        for step in gpu.steps(tmp_path, tmp_path).values():
            dash_m, module, *_ = step.arguments
            is_package = module in ("bench", "pytest")
            assert dash_m == "-m" and (is_package or (ROOT / f"{module.replace('.', '/')}.py").exists())
        with pytest.raises(SystemExit):
            gpu.main(["nothing"])
        assert "no such step: nothing" in capsys.readouterr().err

    def test_tuning_reaches_the_kernels(self, device):
        given, seen = problem(device), []

        def run(given):
            seen.append([module.launch_config(301, torch.float32) for module in (policy_loss, token_stats)])
            return bench_policy_loss.ours(given, in_place=False, entropy="all", backend="triton")

        contestants = {"ours": Contestant(run, lambda: given)}
        base = Comparison("c", contestants, lambda _, result: bench_policy_loss.check(given)(harness.OURS, result))
        tuned = tune.comparison(base, [(256, 32), (96, 32)], "ours")  # a tile of 96 is not a power of two
        rows = compare(tuned, torch.device(device), repeats=2)
        assert ["failed" in row for row in rows] == [False, False, True]
        assert [(256, 32)] * 2 in seen and seen[0] == [token_stats.launch_config(301, torch.float32)] * 2
