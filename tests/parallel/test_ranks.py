"""Three and four ranks: what does not divide by them, and ranks that have nothing to do.

As in test_sharded_run.py every case is trained in this process too, and one is continued at
another number of ranks.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from sharded_run_worker import run_cases
from small_runs import LORA, losses, small_config
from tiny_models import build_tiny

from fastsd.checkpoint import checkpoints, load_latest
from fastsd.tasks.chain_sum import ChainSum

STEPS = 6
HALF = 3
RESUMED = "uneven"
TOLERANCE = 1e-5
# A random model's prompts are longer in tokens, and its answers all wrong.
RANDOM = {
    "prompt": {"max_prompt_tokens": 512, "max_feedback_tokens": 512},
    "guard": {"collapse": "off"},
}


def settings(condition: str, **changes) -> dict:
    """Some updates with a checkpoint after the third, completions of each."""
    fixed = {"optim": {"steps": STEPS, **changes.pop("optim", {})}}
    fixed |= {"checkpoint": {"every": HALF, "keep": 9}, "log": {"completions_every": 1}}
    return small_config(condition, **fixed, **changes).model_dump(mode="json")


def some_spread(prompts: int) -> dict:
    return settings(
        "grpo",
        rollout={"prompts_per_step": prompts},
        reward={"function": "reward_functions:coin_for_some"},
    )


def cases(folder: Path, ranks: int) -> dict[str, dict]:
    """Written for so many ranks; `folder` has the models and the critiques."""
    odd, moe = ({"name": str(folder / name)} for name in ("odd", "moe"))
    uneven = {"prompts_per_step": ranks + 1, "steps_per_batch": 2}
    # All rollouts come from the first weights, so that critiques of another run fit them.
    each = {"prompts_per_step": ranks}
    at_once = {**each, "steps_per_batch": STEPS}
    file = folder / f"critiques-{ranks}.jsonl"
    replayed = {"kind": "replay", "file": str(file)}
    return {
        "uneven": settings("reference", teacher={"kind": "ema"}, rollout=uneven),
        "written": settings("critique", rollout=at_once),
        "first rank dropped": settings("critique", rollout=at_once, critic=replayed),
        "some spread": some_spread(ranks),
        # Every question is asked of one rank alone, however often.
        "two questions": settings(
            "reference",
            rollout=each,
            data={
                "task": None,
                "train": str(folder / "two.jsonl"),
                "eval": str(folder / "two.jsonl"),
            },
            reward={"function": "reward_functions:coin"},
        ),
        "odd": settings("reference", model=odd, rollout=each, **RANDOM),
        # The vocabulary of the head over the ranks, and of the teacher's own.
        "odd, head sharded": settings(
            "reference",
            model=odd,
            rollout=each,
            teacher={"kind": "ema"},
            parallel={"head": "sharded"},
            **RANDOM,
        ),
        # Matrices with two rows: the last rank has none of them.
        "two rows": settings("critique", model={"lora": {**LORA, "r": 2}}, rollout=each),
        "experts": settings(
            "reference", model=moe, rollout=each, teacher={"kind": "live"}, **RANDOM
        ),
    }


NAMES = tuple(cases(Path("none"), 3))


def rows(run_dir: Path) -> list[list[dict]]:
    """The rollouts of each update."""
    files = sorted(run_dir.glob("completions/*.parquet"))
    return [pq.read_table(file).to_pylist() for file in files]


def forget_the_first_rank(written: Path, file: Path, ranks: int) -> None:
    """The critiques of a run, but for those that the first rank would have asked for."""
    kept = []
    questions = {}
    for row in (row for update in rows(written) for row in update):
        question = row["prompt"][-1]["content"]
        rank = questions.setdefault(question, len(questions)) % ranks
        response, critique = row["completion"][0]["content"], row["critique"]
        if rank:
            kept.append({"question": question, "response": response, "critique": critique})
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))


def in_one_process(folder: Path, ranks: int) -> dict[str, dict]:
    """The cases for so many ranks, run by this process."""
    trees = cases(folder, ranks)
    run_cases(folder, 1, {"written": trees.pop("written")})
    forget_the_first_rank(folder / "written-1", folder / f"critiques-{ranks}.jsonl", ranks)
    run_cases(folder, 1, trees)
    return trees


def inputs(folder: Path) -> Path:
    """Writes the models and the questions that cases name."""
    # Neither vocabulary nor hidden size nor the layers' width divides by 3 or 4.
    sizes = {"hidden_size": 30, "intermediate_size": 50, "vocab_size": 301}
    build_tiny("qwen3", folder / "odd", **sizes)
    build_tiny("qwen3_moe", folder / "moe")
    task = ChainSum()
    chosen = [task.prompt("train", index) for index in range(2)]
    lines = [json.dumps({"question": each.question, "solution": each.solution}) for each in chosen]
    (folder / "two.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = inputs(tmp_path_factory.mktemp("three"))
    trees = in_one_process(folder, 3)
    resumed = {f"{RESUMED}-resumed": trees[RESUMED]}
    run_cases(folder, 2, {name: trees[name] for name in (RESUMED, "experts")})
    run_cases(folder, 3, trees | resumed, {f"{RESUMED}-resumed": (f"{RESUMED}-2", HALF)})
    run_cases(folder, 2, resumed, {f"{RESUMED}-resumed": (f"{RESUMED}-3", HALF)})
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = inputs(tmp_path_factory.mktemp("four"))
    run_cases(folder, 4, in_one_process(folder, 4))
    return folder


def assert_same(got: Path, want: Path, tolerance: float = TOLERANCE) -> None:
    """Losses and, relative to their norms, weights and the averaged teacher's."""
    assert not list(got.glob("error-*")), [path.read_text() for path in got.glob("error-*")]
    ours, theirs = losses(got), losses(want)
    assert len(ours) == len(theirs) == STEPS
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=tolerance)
    a, b = load_latest(got), load_latest(want)
    assert a is not None and b is not None and a.step == b.step == STEPS
    assert a.tensors.keys() == b.tensors.keys()
    for name in b.tensors:
        if "exp_avg" not in name and name != "torch_rng":
            ours, theirs = a.tensors.whole(name), b.tensors.whole(name)
            assert (ours - theirs).norm() <= tolerance * theirs.norm(), name


@pytest.mark.parametrize("name", [name for name in NAMES if name != "written"])
def test_three_ranks_are_one_process(three, name):
    assert len({loss for _, loss in losses(three / f"{name}-1")}) > 2
    assert_same(three / f"{name}-3", three / f"{name}-1")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "written"])
def test_four_ranks_are_one_process(four, name):
    assert_same(four / f"{name}-4", four / f"{name}-1")


def test_experts_are_those_of_one_process_on_two_ranks(three):
    assert_same(three / "experts-2", three / "experts-1")


@pytest.mark.parametrize("ranks", [2, 3])
def test_resume_between_two_and_three_ranks(three, ranks):
    resumed, before = (three / f"{RESUMED}{end}" for end in (f"-resumed-{ranks}", f"-{5 - ranks}"))
    gaps = [abs(a - b) for (_, a), (_, b) in zip(losses(resumed), losses(before), strict=True)]
    assert gaps[HALF] <= 1e-6 and max(gaps) <= 1e-4
    assert_same(resumed, before, 1e-4)
    assert [step for step, _ in checkpoints(resumed)] == [STEPS, HALF]


def test_the_cases_leave_ranks_without_work(three):
    """Updates with nothing to train on, with one group and with two; critiques of no response that
    the first rank has asked for, of some or all of the others'."""
    groups = [
        {row["prompt"][-1]["content"] for row in update if row["advantage"]}
        for update in rows(three / "some spread-1")
    ]
    assert set(map(len, groups)) == {0, 1, 2}
    given = [
        [row["critique"] is not None for row in update]
        for update in rows(three / "first rank dropped-1")
    ]
    assert all(any(update[4:]) and not any(update[:4]) for update in given)
    assert given[0] == 4 * [False] + 8 * [True]
