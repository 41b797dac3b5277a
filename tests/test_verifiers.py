"""Verifiers: what is right, which answer counts, and a pool of processes that no answer hangs, crashes or outlives."""

import ast
import inspect
import os
import random
import re
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import reasoning_gym
from hypothesis import given, settings
from hypothesis import strategies as st
from reasoning_gym.utils import extract_answer

from integration import gym_answers, math_answers, verify_pool
from integration.arithmetic import Task, make_tokenizer, worked_answer
from integration.config import TaskConfig, VerifyConfig
from integration.problems import Problem
from integration.verifiers import VERIFIERS, arithmetic, exact, judge, require, tagged_answer
from integration.verify_pool import Verdict, Verifier, VerifierError

ROOT = Path(__file__).parent.parent

# --- math: what is right


@pytest.mark.parametrize(
    ("given", "gold"),
    [
        ("7", "7"), ("07", "7"), ("7.0", "7"), ("+7", "7"), ("-7", "-7"), ("\u22127", "-7"), ("x = 7", "7"),
        (r"7\text{ cm}", "7"), ("7 cm^2", "7"), (r"7^\circ", "7"), (r"\$7", "7"), (r"\text{7}", "7"), ("7.", "7"),
        (r"7\%", "7"), (r"\mathbf{7}", "7"), (r"\frac{14}{2}", "7"), ("14/2", "7"), ("(7)", "7"), (r"\boxed{7}", "7"),
        ("025", "25"), ("25", "025"), ("1,234", "1234"), ("1{,}234", "1234"), (r"1\,234", "1234"),
        (r"\frac{1}{2}", "0.5"), (".5", r"\frac12"), (r"2\frac{1}{2}", "5/2"), (r"\dfrac12", "0.50"), ("7", 7),
        ("7", "$7$"), (r"-\frac{3}{4}", "-0.75"), (r"\sqrt{3}/2", r"\frac{\sqrt3}{2}"), ("2,1", r"\{1,2\}"),
        ("(3,4)", r"\left(3, 4\right)"), ("x^2+2x+1", "(x+1)^2"), (r"x=\sqrt2", r"\sqrt{2}"),
        (r"\pi/4", r"\frac{\pi}{4}"), ("[0,1)", "[0,1)"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"), ("6-5i", "6 - 5i"),
        (r"\text{Monday}", "Monday"), (r"\textbf{(C)}", "C"), ("300000000", r"3 \times 10^8"),
    ],
)  # fmt: skip
def test_the_same_in_another_form_is_right(given, gold):
    assert math_answers.score(rf"So \boxed{{{given}}}", gold) == (1.0, "")


@pytest.mark.parametrize(
    ("given", "gold"),
    [
        ("8", "7"), ("-7", "7"), ("17", "7"), ("77", "7"), ("", "7"), ("seven", "7"), ("6.9999999", "7"),
        ("7 or 8", "7"), ("6, 7, 8", "7"), (r"\{6,7\}", "7"), (r"7 \text{ and } 8", "7"), ("14 or 7", "14"),
        ("0.3333", "1/3"), ("(4,3)", "(3,4)"), (r"\sqrt2, \sqrt3", r"\sqrt{2}"), ("1.42", r"\sqrt{2}"),
        ("x+1", "x+2"), ("Tuesday", "Monday"),
    ],
)  # fmt: skip
def test_something_else_is_wrong(given, gold):
    assert math_answers.score(rf"So \boxed{{{given}}}", gold)[0] == 0.0


@pytest.mark.parametrize(
    ("given", "gold"),
    [
        ("6=7", "7"), (r"7 \approx 8", "7"), ("7, 7", "7"), ("--7", "7"), (r"7 \pm 0", "7"), ("2+5", "7"), ("8-1", "7"),
        (r"\sqrt{49}", "7"), (r"\min(7,8)", "7"), (r"\lfloor 7.5 \rfloor", "7"), (r"\int_0^7 dx", "7"), ("7 7", "14"),
        ("1 234", "235"), (r"\int_0^1 \pi x dx", r"\frac{\pi}{2}"), (r"\sum_{i=1}^{3} \sqrt{2}", r"3\sqrt{2}"),
        (r"6.6 \times 10^{-34}", r"6.7 \times 10^{-34}"), ("0.0", r"10^{-8}"),
    ],
)  # fmt: skip
def test_what_math_verify_takes_and_we_do_not(given, gold):
    """If math-verify has learnt to refuse one of these, its guard may go."""
    theirs = math_answers.verify(math_answers.parsed(gold), math_answers.parsed(given), timeout_seconds=None)
    assert theirs and math_answers.score(rf"\boxed{{{given}}}", gold)[0] == 0.0


# --- math: which answer counts


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Answer: 7", 1), ("Step 1.\nAnswer: $7$", 1), ("**Answer:** 7", 1), ("**Answer**: 7.", 1),
        ("Final answer: 7", 1), ("Answer:\n\n7", 1), ("Answer:\n$$7$$", 1), ("Answer: \\(7\\)", 1),
        ("Answer: \\boxed{7}", 1), ("# Answer: 7", 1),
        ("So the answer is 7.", 1), ("The final answer is $\\boxed{7}$.", 1), ("\\boxed{7}. Bye.", 1), ("\\fbox{7}", 1),
        ("\\boxed{6}\n\nNo: \\boxed{7}", 1), ("\\boxed{7}\n\nNo: \\boxed{6}", 0), ("\\boxed{6}\n\nAnswer: 7", 1),
        ("\\boxed{7} and \\boxed{7}", 1), ("\\boxed{7}\nAnswer: 7", 1), ("\\boxed{7} = \\boxed{14/2}", 1),
        ("Answer: 6\n\nAnswer: 7", 1), ("The answer is 6. No, the answer is 7.", 1), ("Answer: 7\n\nThe answer is.", 1),
        ("<think>\\boxed{6}</think>\\boxed{7}", 1), ("<think>\\boxed{7}</think> I do not know", 0),
        ("7", 0), ("x = 7", 0), ("$7$", 0), ("", 0), ("\\boxed{}", 0), ("\\boxed{7", 1), ("\\boxed 7", 0),
        ("Answer:", 0),
    ],
)  # fmt: skip
def test_which_answer_counts(text, score):
    """One that the text breaks off in is read as far as it goes."""
    assert math_answers.score(text, "7") == (score, "")


@pytest.mark.parametrize("text", ["\\boxed{6} \\boxed{7}", "\\boxed{7} or \\boxed{6}", "\\boxed{6}\nAnswer: 7",
                                  "Answer: 6\nAnswer: 7", "\\boxed{\\boxed{7} \\boxed{6}}"])  # fmt: skip
def test_two_answers_in_one_statement_are_none(text):
    score, reason = math_answers.score(text, "7")
    assert score == 0.0 and (re.fullmatch(r"\d answers in one statement, 1 of them right", reason))


def test_nine_answers_are_too_many():
    boxes = [rf"\boxed{{7 + {i} - {i}}}" for i in range(9)]
    assert math_answers.score(" ".join(boxes), "7") == (0.0, "more than 8 answers in one statement")


# --- reasoning-gym


@pytest.mark.parametrize(
    "task", ["chain_sum", "leg_counting", "spiral_matrix", "n_queens", "string_insertion", "simple_integration",
             "puzzle24", "polynomial_equations", "word_sorting", "sudoku", "decimal_arithmetic", "binary_matrix"]
)  # fmt: skip
def test_scores_are_those_of_reasoning_gym(task):
    """For right answers, wrong ones, and half right ones, whose credit stays partial. An answer that its scorer must
    not see loses the 0.01 that some give to whatever is no formula."""
    dataset = reasoning_gym.create_dataset(task, seed=3, size=3)
    for entry in dataset:
        right = entry["answer"]
        for answer in (right, right + " ", right[: len(right) // 2], str(right.split()), "12", "no idea"):
            expected = dataset.score_answer(answer.strip(), entry)
            for text in (f"<answer>1</answer> so <answer>{answer}</answer>.", answer, f"<think>1</think>{answer}"):
                score, reason = gym_answers.score(text, entry)
                assert score == expected or (reason and score == 0.0 and expected <= 0.01), (answer, text)
        assert gym_answers.score(f"<answer>{right}</answer>", entry) == (1.0, "")


def test_the_scorer_knows_the_options():
    entry = reasoning_gym.create_dataset("puzzle24", seed=0, size=1)[0]
    scores = [gym_answers.score("8+8+4+4", entry | {"options": {"max_value": most}})[0] for most in (7, 8)]
    assert scores == [0.01, 1.0]


@pytest.mark.parametrize("task", gym_answers.EVALUATES_LITERALS + gym_answers.EVALUATES_FORMULAS)
@pytest.mark.parametrize(
    "answer",
    ["__import__('os')", "exit()", "eval('1')", "().__class__", "[].append(1)", "[x for x in (1,)]", "(lambda: 1)()",
     "open('x', 'w')", "f'{1}'", "(x := 1)", "[1][0]", "sin.__class__", "sqrt(S('1'))", "sin(x).diff(x)",
     "sqrt(open)(1)", "exec", "[*map(print, [1])]", "Symbol('x')", "N(2)", "sqrt(x, evaluate=eval)"],
)  # fmt: skip
def test_no_scorer_that_evaluates_sees_what_could_act(task, answer):
    refused = gym_answers.refusal(task, answer)
    assert refused or answer == "exec", "a mere name evaluates to a function that nobody calls"


@pytest.mark.parametrize(
    "answer", ["__import__('os').system('true') + 5!", "lambda: 1", "x.y = 1", "import os", "a\0b"]
)
def test_sympy_does_not_see_what_is_no_python(answer):
    """Its transformations make Python of text that is none."""
    assert gym_answers.refusal("countdown", answer)


def test_scorers_that_evaluate_are_known():
    """A search through the source of reasoning-gym: every module that evaluates anything is either guarded or has been
    read, and evaluates what reasoning-gym itself has written."""
    evaluating = set()
    for name, (dataset, _) in reasoning_gym.factory.DATASETS.items():
        calls = {
            node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(dataset))))
            if isinstance(node, ast.Call)
        }
        if calls & {"eval", "exec", "parse_expr", "sympify", "lambdify", "__import__", "run", "Popen", "system"}:
            evaluating.add(name)
    guarded = {*gym_answers.EVALUATES_LITERALS, *gym_answers.EVALUATES_FORMULAS}
    evaluates_its_own = {"basic_arithmetic", "bitwise_arithmetic", "codeio", "number_sorting"}
    has_a_parser_of_that_name = {"propositional_logic"}
    assert evaluating == guarded | evaluates_its_own | has_a_parser_of_that_name


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "a", " ", "\n", "<", "answer>"]), max_size=12).map("".join))
@settings(max_examples=300, deadline=None)
def test_tagged_answers_are_those_of_reasoning_gym(text):
    assert tagged_answer(text) == extract_answer(text)


# --- exact and arithmetic


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [("blue", "blue", 1), (" blue\n", "blue", 1), ("Blue", "blue", 0), ("blue or red", "blue", 0), ("", "blue", 0),
     ("7", 7, 1), ("I think <answer> blue </answer>.", "blue", 1), ("<answer>red</answer> blue", "blue", 0),
     ("<think>red</think> blue", "blue", 1)],
)  # fmt: skip
def test_exact(text, answer, score):
    assert exact(text, answer) == (score, "")


@pytest.fixture(scope="module")
def task():
    return Task(TaskConfig(min_terms=2, max_terms=3, held_out=8))


@pytest.mark.parametrize(
    "text",
    ["", "7", "#", "##7", "#7#7", "7#", "#8", "#seven", "#7;", "7#8", "#" + "9" * 10_000, "#7 or 8", 
     "#__import__('os')", "#\u0667", "#\x00", "#" * 10_000, "#7.5", "#9**9**9**9"],
)  # fmt: skip
def test_anything_but_the_answer_scores_zero(text, task):
    entry = next(p for p in task.training_problems(0) if p.answer["answer"] == "7").answer
    assert arithmetic(text, entry) == (0.0, "")
    assert arithmetic("6+1=7;#7", entry) == (1.0, "")


def test_worked_answers_are_right_and_prompts_round_trip():
    task, tokenizer, rng = Task(TaskConfig(max_digits=2, held_out=16)), make_tokenizer(), random.Random(0)
    for problem in islice(task.training_problems(1), 200):
        for direct_share in (0.0, 1.0):
            answer = worked_answer(problem, rng, direct_share)
            assert arithmetic(answer, problem.answer) == (1.0, ""), (problem.prompt, answer)
            ids = tokenizer.encode(problem.prompt + answer)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == problem.prompt + answer


# --- names and results


def test_an_unknown_verifier_is_refused():
    with pytest.raises(
        ValueError, match=r"one of math, gym, exact, arithmetic, or .*; got 'maths'; did you mean 'math'\?"
    ):
        require("maths")
    with pytest.raises(ValueError, match=r"'nowhere:score' cannot be loaded: No module named 'nowhere'"):
        require("nowhere:score")
    with pytest.raises(ValueError, match=r"'math:scores' cannot be loaded: .* no attribute 'scores'"):
        require("math:scores")
    for name in VERIFIERS:
        require(name)


@pytest.mark.parametrize(
    ("result", "verdict"),
    [(1, (1.0, "")), (True, (1.0, "")), (0.25, (0.25, "")), ((0.5, "half"), (0.5, "half")),
     (float("nan"), (0.0, "the verifier gave nan; expected a number in [0, 1]")),
     (float("inf"), (0.0, "the verifier gave inf; expected a number in [0, 1]")),
     (2, (0.0, "the verifier gave 2.0; expected a number in [0, 1]")),
     (-0.5, (0.0, "the verifier gave -0.5; expected a number in [0, 1]")),
     ("x", (0.0, "ValueError: could not convert string to float: 'x'")),
     (None, (0.0, "TypeError: float() argument must be a string or a real number, not 'NoneType'"))],
)  # fmt: skip
def test_what_a_verifier_may_give(result, verdict):
    assert judge(lambda text, answer: result, "", None) == verdict


# --- the pool

OWN = """
import ctypes, os, subprocess, sys, time
from resource import RLIMIT_AS, RLIMIT_CORE, getrlimit

def score(text, answer):
    if text == "hang": 
        while True: pass
    if text == "sleep": time.sleep(60)
    if text == "crash": ctypes.string_at(0)
    if text == "exit": os._exit(3)
    if text == "memory": bytearray(10**12)
    if text == "raise": raise KeyError("gone")
    if text == "print": print("x" * 10**6, flush=True)
    if text == "leave": raise SystemExit
    if text == "child": return 1, str(subprocess.Popen(["sleep", "61"]).pid)
    if text == "modules": return 1, " ".join(m for m in ("torch", "transformers", "sympy") if m in sys.modules)
    if text == "limits": return 1, f"{getrlimit(RLIMIT_CORE)} {getrlimit(RLIMIT_AS)}"
    if text == "pid": return 1, str(os.getpid())
    return text == answer
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Name of a verifier in a module that only this process's path leads to."""
    (tmp_path / "own_verifier.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_verifier", raising=False)
    return "own_verifier:score"


def problems(name, count, answer="yes"):
    return [Problem("", answer, name, "test")] * count


def test_order_is_kept_over_verifiers_and_processes(own):
    with Verifier(VerifyConfig(workers=2)) as verifier:
        texts, asked = [], []
        for i in range(60):
            name = ("exact", own, "math")[i % 3]
            texts.append(f"\\boxed{{{i}}}" if name == "math" else str(i))
            asked.append(Problem("", str(i - i % 2), name, "test"))
        verdicts = verifier.score(texts, asked)
        assert verdicts == [Verdict(float(i % 2 == 0)) for i in range(60)]
        assert verifier.score([], []) == []
        assert [len(w) for w in verifier._workers.values()] == [2, 2]


@pytest.mark.parametrize(
    ("text", "reason"),
    [("hang", "timeout after 0.5 s"), ("sleep", "timeout after 0.5 s"), ("exit", "exit status 3"),
     ("leave", "exit status 0"), ("crash", "Segmentation fault"), ("memory", "out of memory"),
     ("raise", "KeyError: 'gone'")],
)  # fmt: skip
def test_an_answer_costs_only_itself(own, text, reason):
    with Verifier(VerifyConfig(timeout=0.5)) as verifier:
        texts = ["yes", "no", text, "yes", text, "no", "yes"]
        started = time.monotonic()
        verdicts = verifier.score(texts, problems(own, 7))
        assert time.monotonic() - started < 15
        assert [v.score for v in verdicts] == [1, 0, 0, 1, 0, 0, 1]
        for text, verdict in zip(texts, verdicts, strict=True):
            assert verdict.reason.endswith(reason if text not in ("yes", "no") else ""), verdict
            assert bool(verdict.reason) == (text not in ("yes", "no"))


def test_the_process_of_a_hanging_answer_is_killed_and_replaced(own):
    with Verifier(VerifyConfig(timeout=0.5)) as verifier:
        before, child, _ = (int(v.reason or 0) for v in verifier.score(["pid", "child", "no"], problems(own, 3)))
        assert not gone(child)
        verifier.score(["hang"], problems(own, 1))
        after = int(verifier.score(["pid"], problems(own, 1))[0].reason)
        assert before != after and gone(before) and not gone(after)
        wait_until(lambda: gone(child))  # what the verifier has started
    assert gone(after)


def test_a_process_that_dies_idle_costs_nothing(own):
    with Verifier(VerifyConfig()) as verifier:
        pid = int(verifier.score(["pid"], problems(own, 1))[0].reason)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: verifier._workers[own][0].process.poll() is not None)
        assert verifier.score(["yes"], problems(own, 1)) == [Verdict(1.0)]


def test_what_a_process_is_given(own):
    """No torch, so no CUDA; no core dumps; bounded memory; what it prints goes nowhere."""
    with Verifier(VerifyConfig()) as verifier:
        modules, limits, printed = verifier.score(["modules", "limits", "print"], problems(own, 3))
        assert modules == Verdict(1.0, "") and printed == Verdict(0.0)
        assert re.fullmatch(r"\(0, 0\) \(\d{10}, \d{10}\)", limits.reason)


@pytest.mark.parametrize("built_in", ["math", "gym"])
def test_no_torch_beside_the_verifiers_of_this_package(built_in):
    code = (
        f"import sys; from integration.verifiers import resolve as r; r({built_in!r}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_verifier_that_does_not_load_is_said(own, tmp_path):
    (tmp_path / "broken_verifier.py").write_text("import no_such_module", encoding="utf-8")
    with Verifier(VerifyConfig()) as verifier:
        with pytest.raises(VerifierError, match=r"'broken_verifier:score' cannot be loaded: No module named 'no_such"):
            verifier.score(["yes"], problems("broken_verifier:score", 1))
        assert verifier.score(["yes"], problems(own, 1)) == [Verdict(1.0)]


def test_an_interrupted_batch_leaves_nothing_behind(own, monkeypatch):
    with Verifier(VerifyConfig()) as verifier:
        pid = int(verifier.score(["pid"], problems(own, 1))[0].reason)

        def interrupt(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(verify_pool, "wait", interrupt)
            verifier.score(["yes"] * 20, problems(own, 20))
        assert gone(pid)
        assert verifier.score(["no", "yes"], problems(own, 2)) == [Verdict(0.0), Verdict(1.0)]


def test_512_short_answers_take_no_time(own):
    """Well under 0.2 s on an idle machine; five times that here."""
    with Verifier(VerifyConfig()) as verifier:
        seconds = []
        for _ in range(4):
            started = time.perf_counter()
            verdicts = verifier.score([f"\\boxed{{{i}}}" for i in range(512)], problems("math", 512, "7"))
            seconds.append(time.perf_counter() - started)
            assert sum(v.score for v in verdicts) == 1
        assert min(seconds) < 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"workers": 0}, "verify.workers must be at least 1; got 0"),
     ({"timeout": 0.0}, "verify.timeout must be positive; got 0.0")],
)  # fmt: skip
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Verifier(VerifyConfig(**settings))


def test_as_many_problems_as_texts():
    with Verifier(VerifyConfig()) as verifier, pytest.raises(ValueError, match="got 2 texts and 1 problems"):
        verifier.score(["a", "b"], problems("exact", 1))


PARENT = """
import sys
from integration.config import VerifyConfig
from integration.problems import Problem
from integration.verify_pool import Verifier

sys.path.insert(0, sys.argv[1])
with Verifier(VerifyConfig(timeout=600)) as verifier:
    problem = Problem("", "yes", "own_verifier:score", "test")
    print(verifier.score(["pid"], [problem])[0].reason, flush=True)
    verifier.score(["hang"], [problem])
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_process_outlives_its_parent(own, tmp_path, ending):
    """Not even one that hangs, when the parent is killed or gets a Ctrl-C."""
    (tmp_path / "parent.py").write_text(PARENT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path)]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env=environment, preexec_fn=heed_interrupts, **quiet) as parent:
        try:
            pid = int(parent.stdout.readline())
            time.sleep(0.3)
            assert not gone(pid)
            parent.send_signal(ending)
            assert parent.wait(20) != 0
            wait_until(lambda: gone(pid))
        finally:
            parent.kill()


def heed_interrupts():
    """Whatever the shell that started the tests in its background had them ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_the_audit_hook_stops_what_changes_the_world(tmp_path):
    """The second line of defence, on its own: while it is there, code that runs nevertheless cannot do these."""
    code = f"""
import os, socket, subprocess, sys
from integration.verify_worker import refuse
sys.addaudithook(refuse)
attempts = [
    lambda: open({str(tmp_path / "canary")!r}, "w"), lambda: os.system("true"), lambda: subprocess.run("true"),
    lambda: socket.create_connection(("localhost", 9)), lambda: os.remove({str(tmp_path / "kept")!r}), os.fork,
    lambda: os.mkdir({str(tmp_path / "folder")!r}), lambda: os.execv("/bin/true", ["true"]), lambda: os.kill(1, 0),
]
for attempt in attempts:
    try:
        attempt()
    except PermissionError as error:
        assert "a verifier must not do this" in str(error)
    else:
        sys.exit("it could")
open({str(tmp_path / "kept")!r}).close()
"""
    (tmp_path / "kept").touch()
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("built_in", [True, False])
def test_the_hook_is_there_for_the_verifiers_of_this_package_only(tmp_path, built_in):
    """A verifier of the user may start processes: a judge of code has to."""
    (tmp_path / "touching.py").write_text(
        f"def score(text, answer):\n    open({str(tmp_path / 'canary')!r}, 'w')\n    return 1.0\n", encoding="utf-8"
    )
    code = f"""
import os, sys
from integration import verifiers, verify_worker
class Connection:
    sent, asked = [], [[("", None)]]
    def send_bytes(self, data): self.sent.append(data)
    def recv(self): return self.asked.pop()
sys.path.insert(0, {str(tmp_path)!r})
if {built_in}:
    verifiers.VERIFIERS["touching"] = "touching:score"
connection = Connection()
try:
    verify_worker.serve(connection, "touching" if {built_in} else "touching:score")
except IndexError:
    os._exit(b"PermissionError" in connection.sent[1])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == built_in and (tmp_path / "canary").exists() == (not built_in)


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
