"""Judges the tasks of a test in a process of its own, which the test kills: python judge_in_a_process.py LEDGER URL COUNT."""

import sys

from app.config import JudgeSection
from app.evaluation.judge_prompts import JudgeTask, compare
from app.evaluation.judges import EndpointJudge
from app.ledger import Ledger


def tasks(prompts: int) -> list[JudgeTask]:
    """Both games on each prompt."""
    return [
        compare("compare/1", (f"question {i}",), sides[:1], sides[1:])
        for i in range(prompts)
        for sides in (("mine", "yours"), ("yours", "mine"))
    ]


def main() -> None:
    """Judge everything that the ledger does not know yet."""
    url, endpoint, prompts = sys.argv[1:]
    section = JudgeSection(url=endpoint, model="scripted", api_key_variable=None, concurrency=8)
    found = EndpointJudge(section).judge(Ledger.open(url), tasks(int(prompts)))
    sys.stdout.write(f"{len(found.replies)} {len(found.failures)} {found.asked}\n")


if __name__ == "__main__":
    main()
