"""Rewards, and the file of prompts."""

import math
import threading

import pytest
import torch

from lightning_grad.sampling import BoxedAnswerReward, ExactNumberReward, JSONLPrompts, MathAnswerReward
from lightning_grad.sampling.rewards import resolve_reward, score


def judged(reward, text, reference):
    return float(reward(["q"], [text], [reference])[0])


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [
        ("so 3 + 4 = 7.", "7", 1),
        ("It costs $1,234.50 in all.", 1234.5, 1),
        ("7 apples", "8", 0),
        ("-3", "3", 0),
        ("none", "3", 0),
        ("", "3", 0),
        ("12 then 5", "12", 0),
        ("7", "seven", math.nan),
    ],
)
def test_exact_number(text, reference, value):
    assert judged(ExactNumberReward(), text, reference) == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}", 1),
        (r"\boxed{ x + 1 }", "x+1", 1),
        (r"\boxed{2}", r"\boxed{2}", 1),
        (r"\boxed{2} and \boxed{3", "2", 1),
        ("2", "2", 0),
        (r"\boxed{2}", "", math.nan),
    ],
)
def test_boxed(text, reference, value):
    assert judged(BoxedAnswerReward(), text, reference) == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [
        (r"Therefore the answer is \boxed{\frac{1}{2}}.", "0.5", 1),
        ("The answer is 1/2", r"\frac{1}{2}", 1),
        (r"$(x+1)^2$", "x^2+2x+1", 1),
        (r"$(x+1)^2$", "x^2+1", 0),
        (r"we try 3, then \boxed{4}", 4, 1),
        (r"\boxed{5}", "4", 0),
        ("", "4", 0),
        ("no idea", "4", 0),
    ],
)
def test_mathematical_equality(text, reference, value):
    pytest.importorskip("math_verify")
    assert judged(MathAnswerReward(), text, reference) == value


def test_mathematical_equality_in_a_thread_and_without_a_reference():
    pytest.importorskip("math_verify")
    reward, found = MathAnswerReward(), []
    thread = threading.Thread(target=lambda: found.append(judged(reward, r"\boxed{4}", "4")))
    thread.start()
    thread.join(60)
    assert found == [1.0]
    assert math.isnan(judged(reward, r"\boxed{4}", ""))


def test_by_import_path():
    assert isinstance(resolve_reward("lightning_grad.sampling.ExactNumberReward"), ExactNumberReward)
    assert resolve_reward("math.hypot") is math.hypot
    with pytest.raises(ValueError, match=r"`reward` must be something to call, got 3\.14"):
        resolve_reward("math.pi")
    with pytest.raises(ValueError, match="import path of a function"):
        resolve_reward("reward")


def test_a_reward_that_raises_for_some():
    def picky(prompts, completions, references):
        return [1 / len(c) for c in completions]

    rewards, problem = score(picky, ["", ""], ["ab", ""], [1, 1])
    assert rewards[0] == 0.5
    assert math.isnan(rewards[1])
    assert problem == "it raised for 1 of 2 samples, ZeroDivisionError: division by zero"
    with pytest.raises(RuntimeError, match="raised for every one of 1 samples; the first: ZeroDivisionError"):
        score(picky, [""], [""], [1])
    assert len(score(picky, [], [], [])[0]) == 0


@pytest.mark.parametrize("value", [1.0, torch.ones(3, 1), [1.0, 2.0], ["a", "b", "c"], None])
def test_a_reward_of_another_shape_is_refused(value):
    with pytest.raises(ValueError, match="must return"):
        score(lambda p, c, r: value, ["p"] * 3, ["c"] * 3, [0] * 3)


def write(tmp_path, text):
    path = tmp_path / "p.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_good_file(tmp_path):
    text = '\ufeff{"prompt": "é =", "answer": 2}\r\n\n{"prompt": [{"role": "user", "content": "x"}], "answer": "y"}'
    data = JSONLPrompts(write(tmp_path, text))
    assert [p.answer for p in data.loader.prompts] == [2, "y"]
    assert data.loader.prompts[0].text == "é ="
    assert data.loader.difficulty is None
    more = "".join(f'{{"q": "{i}", "a": {i}, "level": {i % 2}}}\n' for i in range(5))
    data = JSONLPrompts(write(tmp_path, more), "q", "a", "level", limit=3)
    assert data.loader.difficulty.tolist() == [0, 1, 0]


GOOD = '{"prompt": "a", "answer": "b"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "\n{oops", r"p.jsonl:3: not JSON: .*, column 2"),
        (GOOD + "[1]", r"p.jsonl:2: must be a JSON object, got list"),
        (GOOD + '{"question": "a", "answer": "b"}', r"p.jsonl:2: has no 'prompt'; it has 'question', 'answer'"),
        (GOOD + '{"prompt": "a"}', r"p.jsonl:2: has no 'answer'"),
        ('{"prompt": 3, "answer": "b"}', r"p.jsonl:1: 'prompt' must be a text or a list of chat messages, got 3"),
        ('{"prompt": " ", "answer": "b"}', r"p.jsonl:1: 'prompt' must be a text"),
        ('{"prompt": "a", "answer": null}', r"p.jsonl:1: 'answer' must be a text or a number, got None"),
        (GOOD.encode() + b'{"prompt": "\xff"}', r"p.jsonl:2: not UTF-8"),
        ('{"prompt": "a", "answer": 1, "difficulty": "x"}', r"p.jsonl:1: 'difficulty' must be an integer, got 'x'"),
        (
            GOOD + '{"prompt": "a", "answer": 1, "difficulty": 1}',
            r"p.jsonl:2: .* on all lines or on none; this one has",
        ),
        ("\n\n", "holds no prompts"),
    ],
)
def test_errors_name_the_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        JSONLPrompts(write(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"`path` must be a readable JSONL file, got .*: No such file"):
        JSONLPrompts(str(tmp_path / "none.jsonl"))
