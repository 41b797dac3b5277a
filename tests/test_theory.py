"""docs/theory.md: its statements against brute force in plain Python, and its text against docs/theory.py."""

import importlib.util
import math
import re
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
import torch

from qae_kernels import PolicyLossConfig, policy_loss
from qae_kernels.reference.objectives import clip

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("theory", ROOT / "docs" / "theory.py")
theory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theory)

TEXT = theory.TEXT.read_text(encoding="utf-8")
LEVELS = [Fraction(i, 10) for i in range(1, 10)]
BASELINES = [None, *(Fraction(i, 5) for i in range(1, 5))]  # None: the mean
PACKAGE = 1e-6  # the package forms advantages in float32


def arguments(k):
    return {"baseline": "mean"} if k is None else {"k": float(k)}


def plain_advantages(rewards, k):
    """In exact arithmetic up to the root; inf{x : F(x) >= k} searched by its definition."""
    size = len(rewards)
    mean = Fraction(sum(rewards), size)
    if k is None:
        baseline = mean
    else:
        baseline = min(x for x in rewards if sum(r <= x for r in rewards) >= k * size)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (size - 1))
    return [0.0 if std == 0 else float(r - baseline) / (std + 1e-6) for r in rewards]


def groups_of(p, size):
    """Every 0/1 group of this size with its probability."""
    for rewards in product((0, 1), repeat=size):
        yield rewards, p ** sum(rewards) * (1 - p) ** (size - sum(rewards))


def random_policy(seed, n=7):
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).softmax(0)


class TestGate:
    @pytest.mark.parametrize("size", [2, 4, 5, 10, 16, 20, 40, 64])
    def test_boundary(self, size):
        """Hard if and only if failures >= K G, in integers; p = 1 - K is hard."""
        for k in LEVELS:
            easy = theory.baselines_by_count(size, float(k)).tolist()
            assert easy == [float(size - s < k * size) for s in range(size + 1)], k
            assert theory.easy_from(size, float(k)) == size - math.ceil(k * size) + 1

    @pytest.mark.parametrize("k", BASELINES)
    def test_share(self, k):
        size, p = 7, 0.3
        expected = sum(chance * sum(a != 0 for a in plain_advantages(rewards, k)) / size
                       for rewards, chance in groups_of(p, size))  # fmt: skip
        assert theory.active_share(theory.binomial(size, p), **arguments(k)) == pytest.approx(expected, rel=1e-12)
        kept = expected / sum(chance for rewards, chance in groups_of(p, size) if 0 < sum(rewards) < size)
        assert theory.active_share(theory.binomial(size, p), kept=True, **arguments(k)) == pytest.approx(
            kept, rel=1e-12
        )

    @pytest.mark.parametrize("a, b", [(1, 1), (0.5, 0.5), (3, 1)])
    def test_beta_binomial_is_the_mixture(self, a, b):
        """Against a midpoint sum over p = sin²(x), which takes the ends of the density away."""
        x = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000 * math.pi / 2
        p = x.sin() ** 2
        weight = x.sin() ** (2 * a - 1) * x.cos() ** (2 * b - 1)
        expected = (weight[:, None] * theory.binomial(8, p)).sum(0) / weight.sum()
        torch.testing.assert_close(theory.beta_binomial(8, a, b), expected, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("p", [0.0, 0.3, 0.6, 0.61, 1.0])
    @pytest.mark.parametrize("size", [4, 5, 8])
    def test_flips(self, p, size):
        k = Fraction(2, 5)
        hard = Fraction(str(p)) <= 1 - k
        wrong = [chance for rewards, chance in groups_of(p, size) if (size - sum(rewards) >= k * size) != hard]
        assert float(theory.flip_probability(size, p, 0.4)) == pytest.approx(sum(wrong), abs=1e-12)


class TestOneStep:
    @pytest.mark.parametrize("seed", range(5))
    def test_monotone_to_first_order(self, seed):
        """dH rises strictly and linearly with b, by Cov(log pi, pi); least at 0 and most at 1."""
        policy, rewards = random_policy(seed), torch.tensor([1.0, 0, 0, 1, 0, 1, 0], dtype=torch.float64)
        grid = torch.linspace(0, 1, 11, dtype=torch.float64)
        change = theory.first_order(policy, theory.uncentred_step(policy, rewards, grid))
        slope = policy @ (policy.log() * policy) - (policy @ policy.log()) * (policy @ policy)
        assert slope > 0
        torch.testing.assert_close(change, change[0] + slope * grid, rtol=0, atol=1e-15)

    @pytest.mark.parametrize("prompt", theory.PROMPTS)
    def test_exact_change_is_monotone_for_the_policy_shown(self, prompt):
        grid = torch.linspace(0, 1, 11, dtype=torch.float64)
        steps = theory.uncentred_step(theory.POLICY, theory.PROMPTS[prompt], grid)
        assert theory.entropy_change(theory.POLICY, steps).diff().min() > 0

    def test_uniform_policy(self):
        """b moves all logits alike."""
        policy, rewards = torch.full((4,), 0.25, dtype=torch.float64), torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)
        change = theory.entropy_change(policy, theory.uncentred_step(policy, rewards, torch.tensor([0.0, 0.5, 1.0])))
        assert change[0] < -0.001 and (change - change[0]).abs().max() < 1e-15

    @pytest.mark.parametrize("eta", [0.02, 0.05, 0.1, 0.2])
    def test_error_is_of_second_order(self, eta):
        assert theory.largest_error(eta) / theory.largest_error(eta / 2) == pytest.approx(4, rel=0.02)

    def test_first_order_is_the_gradient_of_the_entropy(self):
        policy = random_policy(0)
        logits = policy.log().requires_grad_()
        step = random_policy(1)
        (slope,) = torch.autograd.grad(theory.entropy(logits), logits)
        torch.testing.assert_close(theory.first_order(policy, step), slope @ step, rtol=1e-12, atol=0)

    def test_step_of_the_formula_is_no_gradient(self):
        """Its Jacobian is not symmetric: entries (a, c) and (c, a) differ by pi_a pi_c (r_c - r_a)."""
        policy, rewards = random_policy(2, 4), torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)

        def step(logits):
            return theory.uncentred_step(logits.softmax(0), rewards, 0.3)

        jacobian = torch.autograd.functional.jacobian(step, policy.log())
        expected = policy[:, None] * policy * (rewards - rewards[:, None])
        torch.testing.assert_close(jacobian - jacobian.T, expected, rtol=0, atol=1e-15)


class TestInvariance:
    def test_exact_gradient(self):
        assert theory.largest_gradient_difference() < 1e-15
        logits, rewards = theory.POLICY.log().requires_grad_(), theory.PROMPTS["hard, p = 0.2"]
        (logits.softmax(0) @ rewards).backward()
        for baseline in (0.0, 0.2, 1.0):
            step = theory.gradient_step(theory.POLICY, rewards, baseline)
            torch.testing.assert_close(step, logits.grad, rtol=0, atol=1e-15)
        same = theory.uncentred_step(theory.POLICY, rewards, theory.POLICY @ rewards)
        torch.testing.assert_close(same, logits.grad, rtol=0, atol=1e-15)  # b = E[r] and no other

    @pytest.mark.parametrize("k", BASELINES)
    def test_multiplier(self, k):
        """E over all groups of the sampled gradient is c times the gradient of p."""
        policy, outcome, size = [0.5, 0.3, 0.2], [0, 1, 1], 5
        p = policy[1] + policy[2]
        total = [0.0, 0.0, 0.0]
        for group in product(range(3), repeat=size):
            chance = math.prod(policy[a] for a in group)
            for action, advantage in zip(group, plain_advantages([outcome[a] for a in group], k), strict=True):
                for b in range(3):
                    total[b] += chance * advantage / size * ((action == b) - policy[b])
        gradient = [policy[b] * (outcome[b] - p) for b in range(3)]
        c = float(theory.multiplier(size, p, **arguments(k)))
        assert c > 0 and total == pytest.approx([c * g for g in gradient], rel=PACKAGE)

    @pytest.mark.parametrize("k", BASELINES)
    def test_noise(self, k):
        p, size = 0.35, 6
        squares = sum(chance * sum(a * a for a in plain_advantages(rewards, k)) / size
                      for rewards, chance in groups_of(p, size))  # fmt: skip
        c = sum(chance * (plain_advantages((1, *others), k)[0] - plain_advantages((0, *others), k)[0])
                for others, chance in groups_of(p, size - 1))  # fmt: skip
        assert float(theory.noise(size, p, **arguments(k))) == pytest.approx(squares / c**2, rel=PACKAGE)

    @pytest.mark.parametrize("k", BASELINES[1:])
    def test_direction(self, k):
        """Sequences with a prefix, token ratios: staleness turns nothing, clipping does."""
        old, new, rows, tokens = theory.sequence_problem()
        logits = new.clone().requires_grad_()
        logprobs = logits.log_softmax(-1)[rows, tokens].sum(1)
        p = logprobs.exp() @ theory.SEQUENCE_SUCCESSES.double()
        p.backward()
        on_policy = theory.expected_gradient(new, new, 4, None, **arguments(k))
        c = theory.multiplier(4, p.detach(), **arguments(k))
        torch.testing.assert_close(on_policy, c * logits.grad.flatten(), rtol=PACKAGE, atol=PACKAGE)

        def cosine(bounds):
            pair = [theory.expected_gradient(old, new, 4, bounds, **arguments(level)) for level in (None, k)]
            return torch.cosine_similarity(*pair, dim=0)

        assert cosine(None) > 1 - 1e-9
        assert cosine(theory.CLIP) < math.cos(math.radians(1))

    @pytest.mark.parametrize("k", [None, Fraction(2, 5)])
    def test_clipped_gradient(self, k):
        """Against autograd of the package's objective, group by group; tokens are clipped on both sides."""
        old, new, rows, tokens = theory.sequence_problem()
        logits = new.clone().requires_grad_()
        logprobs, old_logprobs = (x.log_softmax(-1)[rows, tokens] for x in (logits, old))
        ratio = (logprobs - old_logprobs).exp()
        success = theory.SEQUENCE_SUCCESSES == 1
        assert ratio[success].max() > 1 + theory.CLIP[1] and ratio[~success].min() < 1 - theory.CLIP[0]
        surrogate = 0.0
        for group in product(range(9), repeat=3):
            credit = plain_advantages([int(theory.SEQUENCE_SUCCESSES[i]) for i in group], k)
            for i, advantage in zip(group, credit, strict=True):
                loss = clip(
                    logprobs[i] - old_logprobs[i], logprobs[i], torch.full((2,), advantage).double(),
                    eps_low=theory.CLIP[0], eps_high=theory.CLIP[1], dual_clip=math.inf,
                )  # fmt: skip
                surrogate = surrogate - old_logprobs[list(group)].sum().exp() * loss.sum() / 3
        surrogate.backward()
        gradient = theory.expected_gradient(old, new, 3, theory.CLIP, **arguments(k))
        torch.testing.assert_close(gradient, logits.grad.flatten(), rtol=PACKAGE, atol=PACKAGE)

    @pytest.mark.parametrize("k", [None, Fraction(1, 5)])
    def test_sampled_step(self, k):
        """Multisets with multinomial weights are all groups."""
        rewards, size, eta = theory.PROMPTS["hard, p = 0.2"], 3, 0.7
        policy = theory.POLICY.tolist()
        c = float(theory.multiplier(size, 0.2, **arguments(k)))
        expected = 0.0
        for group in product(range(6), repeat=size):
            advantages = plain_advantages([int(rewards[a]) for a in group], k)
            step = [sum(a * ((x == b) - policy[b]) for x, a in zip(group, advantages, strict=True)) for b in range(6)]
            weights = [policy[b] * math.exp(eta / c / size * step[b]) for b in range(6)]
            shares = [w / sum(weights) for w in weights]
            change = sum(q * math.log(q) for q in policy) - sum(q * math.log(q) for q in shares)
            expected += math.prod(policy[a] for a in group) * change
        assert theory.expected_entropy_change(size, rewards, eta, **arguments(k))[0] == pytest.approx(
            expected, rel=1e-5
        )


class TestSimulation:
    def test_gradient_is_that_of_the_package(self):
        """`surrogate_gradient` against `policy_loss`, with tokens clipped on both sides and on neither."""
        generator = torch.Generator().manual_seed(0)
        logits, size = torch.randn(2, 3, 4, 8, dtype=torch.float64, generator=generator), 64
        tokens = torch.randint(8, (2, 3, 4, size), generator=generator)
        old = logits.log_softmax(-1).gather(-1, tokens) + 0.3 * torch.randn(tokens.shape, generator=generator)
        advantages = torch.randn(2, 3, 1, size, generator=generator).double()
        gradient, clipped = theory.surrogate_gradient(logits, tokens, old, advantages, theory.CLIP)
        rows = logits[..., None, :].expand(*tokens.shape, 8).reshape(-1, 8).float().requires_grad_()
        config = PolicyLossConfig(aggregation="token-sum", eps_low=theory.CLIP[0], eps_high=theory.CLIP[1])
        credit = advantages.expand_as(old).flatten().float()
        before = old.flatten().float()
        out = policy_loss(rows, tokens.flatten(), credit, old_logprobs=before, config=config, backend="torch")
        out.loss.backward()
        expected = -rows.grad.view(*tokens.shape, 8).sum(-2)
        torch.testing.assert_close(gradient, expected.double(), rtol=1e-4, atol=1e-4)
        assert clipped[advantages.expand_as(old) > 0].any() and clipped[advantages.expand_as(old) < 0].any()

    def test_expected_gradient(self):
        """multiplier(p) times the gradient of p, p the product over tokens."""
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(5, 2, 3, 4, 8, dtype=torch.float64, generator=generator).requires_grad_()
        accepted = torch.rand(2, 3, 4, 8, generator=generator) < 0.6
        p = (logits.softmax(-1) * accepted).sum(-1).prod(-1)
        (gradient,) = torch.autograd.grad(p.sum(), logits)
        scale = torch.stack(
            [theory.multiplier(8, q.detach(), **arguments(k)) for q, k in zip(p, BASELINES, strict=True)]
        )
        expected = scale[..., None, None] * gradient
        torch.testing.assert_close(theory.mean_gradient(logits.detach(), accepted, 8), expected, rtol=1e-9, atol=1e-12)
        entropies, success = theory.measure(logits.detach(), accepted)
        torch.testing.assert_close(success, p.detach().mean(-1))
        torch.testing.assert_close(
            entropies, torch.distributions.Categorical(logits=logits.detach()).entropy().mean((2, 3))
        )

    def test_sample_follows_the_policy(self):
        logits = torch.randn(5, 1, 1, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        even = ((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000).expand(1, 1, 2, 4000).contiguous()
        tokens, logprobs, advantages = theory.sample(logits, torch.ones(1, 1, 2, 8, dtype=torch.bool), even)
        share = torch.nn.functional.one_hot(tokens, 8).double().mean(-2)
        torch.testing.assert_close(share, logits.softmax(-1), rtol=0, atol=1 / 4000)
        torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(-1, tokens))
        assert advantages.shape == (5, 1, 1, 1, 4000) and advantages.eq(0).all()  # every response succeeds

    def test_entropy_at_a_success_rate(self):
        success = torch.tensor([[0.5, 0.5, 0.5], [0.6, 0.7, 0.6], [0.8, 0.6, 0.6]])
        entropies = torch.tensor([[2.0, 2.0, 2.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
        at = theory.entropy_at(success, entropies)
        assert at[:2].tolist() == pytest.approx([0.75, 1.25], rel=1e-5) and at[2].isnan()

    def test_interval(self):
        values = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        middle, half = theory.interval(values)
        assert middle == pytest.approx(float(values.mean())) and half == pytest.approx(
            1.96 * float(values.std()) / 20, rel=0.05
        )


class TestRewards:
    def test_signs(self):
        """Of three values, against every group in plain Python."""
        values, weights, size, k = [0, 1, 3], [0.5, 0.2, 0.3], 5, Fraction(2, 5)
        expected = [0.0, 0.0, 0.0]
        for drawn in product(range(3), repeat=size):
            chance = math.prod(weights[i] for i in drawn)
            for advantage in plain_advantages([values[i] for i in drawn], k):
                expected[0 if advantage > 0 else 1 if advantage == 0 else 2] += chance / size
        assert theory.signs([0.0, 1.0, 3.0], weights, size, 0.4) == pytest.approx(expected, rel=1e-9)

    def test_overlong_trap(self):
        """7 = ceil(0.4 * 16) penalties and not 6; never where the quantile is of the outcomes."""
        for number in range(1, 14):  # of 14 failures: one is plain
            baseline, (success, plain, overlong) = theory.overlong(number, of_outcomes=False)
            assert (baseline == -1) == (number >= 7) and success > 0 and (plain > 0) == (number >= 7)
            baseline, (success, plain, overlong) = theory.overlong(number, of_outcomes=True)
            assert baseline == 0 and success > 0 and plain == 0 and overlong < 0


class TestText:
    def test_exact_blocks_are_what_the_script_computes(self):
        assert theory.rewritten(TEXT, theory.EXACT) == TEXT

    @pytest.mark.slow
    def test_simulated_blocks_are_what_the_script_computes(self):
        """To the digit where the text was made. Another CPU rounds an exponential differently, and a draw at its edge
        falls to the other side: then to one and a half of the last digit."""
        numbers = re.compile(r"\d+\.\d+")
        again = theory.rewritten(TEXT, theory.SIMULATED)
        assert numbers.sub("#", again) == numbers.sub("#", TEXT)
        for got, said in zip(numbers.findall(again), numbers.findall(TEXT), strict=True):
            assert float(got) == pytest.approx(float(said), rel=0, abs=1.5 * 10.0 ** -len(said.split(".")[1]))

    def test_check(self, tmp_path, monkeypatch, capsys):
        """Exit status 1 for a changed number, and nothing written; 0 for the committed text."""
        monkeypatch.setattr(theory, "SIMULATED", {})
        monkeypatch.setattr(theory, "EXACT", {"flips": theory.block_flips})
        monkeypatch.setattr(theory, "TEXT", tmp_path / "theory.md")
        for text, status in ((TEXT, 0), (TEXT.replace("| 0.5 | 31.2% |", "| 0.5 | 31.3% |"), 1)):
            theory.TEXT.write_text(text, encoding="utf-8")
            assert theory.main(["--check"]) == status
            assert ("| 0.5 | 31.2% |" in capsys.readouterr().out) == bool(status)
            assert theory.TEXT.read_text(encoding="utf-8") == text

    def test_every_block_has_its_marks_and_no_other_is_marked(self):
        assert sorted(theory.EXACT | theory.SIMULATED) == sorted(
            line.removeprefix("<!-- theory: ").removesuffix(" -->") for line in TEXT.splitlines()
            if line.startswith("<!-- theory: ")
        )  # fmt: skip
        with pytest.raises(ValueError, match="expected one block 'none'"):
            theory.rewritten(TEXT, {"none": str})

    def test_what_the_prose_says_of_the_settings(self):
        prose = " ".join(TEXT.split())
        assert f"{theory.NUM_PROMPTS} prompts, responses of {theory.LENGTH} tokens out of {theory.VOCAB}" in prose
        assert f"{theory.SEEDS} seeds" in prose and f"{theory.UPDATES} minibatches per rollout" in prose
        for picture in ("gate", "entropy", "simulation"):
            assert f"(figures/theory_{picture}.png)" in TEXT and (theory.FIGURES / f"theory_{picture}.png").exists()
