"""Results files in the layout of R1-V's evaluation scripts, for programs that read those.

    {"accuracy": 48.0, "results": [
        {"question": {"image_path": …, "question": …, "ground_truth": 4},
         "ground_truth": 4, "model_output": …, "extracted_answer": 4}, …]}

The layout is that of src/eval/test_qwen2vl_counting_superclevr.py and test_qwen2vl_geoqa.py in
R1-V's repository, which differ by task:

- counting: `ground_truth` is an integer; `extracted_answer` is the integer in the first answer tag,
  or null; `is_correct` is left out; the file is ASCII.
- geometry: `ground_truth` is text; `extracted_answer` is the `str` of the first expression that
  math-verify finds in the output, or null; `is_correct` is there; the file is UTF-8.
"""

import json
from pathlib import Path

from ..accuracy import judged
from ..files import write_text
from ..rewards.math_check import math_answer
from ..rewards.r1v import tagged_integer
from ..tasks import get_task


def write_r1v_results(path: Path, records: list[dict], task: str) -> None:
    """Write the first output of each record as R1-V's script for `task` would, whole or not at all.

    `records` (at least one) are those of `evaluate`; a record's `key` becomes the image_path. A
    task other than geometry gets the layout of counting. The verdicts are those of R1-V's rule,
    whatever judge the records have. Raises UserError where the file cannot be
    written, or where geometry finds no math-verify.
    """
    geometry = task == "geometry"
    records = judged(records, get_task(task).judge("r1v"))
    outputs = [record["outputs"][0] for record in records]
    answers = map(math_answer if geometry else tagged_integer, outputs)
    results = []
    for record, output, answer in zip(records, outputs, answers, strict=True):
        truth = record["ground_truth"]
        if not geometry and truth.isdecimal():
            truth = int(truth)
        question = {
            "image_path": record["key"],
            "question": record["question"],
            "ground_truth": truth,
        }
        result = {
            "question": question,
            "ground_truth": truth,
            "model_output": output,
            "extracted_answer": answer,
        }
        results.append(result | ({"is_correct": record["correct"][0]} if geometry else {}))
    accuracy = sum(record["correct"][0] for record in records) / len(records) * 100
    text = json.dumps(
        {"accuracy": accuracy, "results": results}, indent=2, ensure_ascii=not geometry
    )
    # Half a surrogate pair, which data may hold, is not UTF-8.
    text = text.encode(errors="replace").decode()
    write_text(path, text)
