"""lm-evaluation-harness on a guided model, beside the plain one.

    qvgpt demo                                                # writes runs/demo
    pip install 'qvgpt[harness]'
    python examples/harness/run.py runs/demo                  # the model's recommended guidance
    python examples/harness/run.py MODEL --beta 8 --tasks my_task --include my_tasks

Run from the root of the repository: paths in the task files of this directory start there. Needs
no network for tasks whose data are local. Options that follow belong to the harness's `HFLM`.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from qvgpt.decode.guided_head import load_guided
from qvgpt.decode.policy import Guidance


def main() -> None:
    """Evaluate, print a line for each metric, and write all of it where `--output` says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("model", help="a directory written by qvgpt")
    parser.add_argument("--beta", type=float, help="default: the model's recommended guidance")
    parser.add_argument("--top_k", type=int, help="candidates; others have probability 0")
    parser.add_argument("--tasks", nargs="+", default=["walk_step", "walk"])
    parser.add_argument("--include", default=str(Path(__file__).parent), help="task files")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "auto"])
    parser.add_argument("--device_map", help="such as auto; default: the CPU")
    parser.add_argument("--output", help="a JSON file: results and every answer")
    options = parser.parse_args()
    guidance = None
    if options.beta is not None:
        guidance = Guidance(beta=options.beta, top_k=options.top_k)
    found = {
        "plain": evaluate(options, Guidance()),
        "guided": evaluate(options, guidance),
    }
    for task in options.tasks:
        for metric in found["plain"]["results"][task]:
            values = [found[name]["results"][task][metric] for name in found]
            if all(isinstance(value, float) for value in values):
                print(f"{task:20} {metric:28} plain {values[0]:.4f}   guided {values[1]:.4f}")
    if options.output:
        kept = {
            name: {key: results[key] for key in ("results", "samples")}
            for name, results in found.items()
        }
        Path(options.output).write_text(json.dumps(kept, indent=1, default=str) + "\n")


def evaluate(options: argparse.Namespace, guidance: Guidance | None) -> dict[str, Any]:
    """What the harness says of the model with this guidance."""
    model = load_guided(options.model, guidance, options.dtype, options.device_map)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
    tasks = TaskManager(include_path=options.include, include_defaults=False)
    found = lm_eval.simple_evaluate(harness, tasks=options.tasks, task_manager=tasks)
    assert found is not None
    return dict(found)


if __name__ == "__main__":
    main()
