"""Checks models with onnx.checker (full) and strict shape inference. usage: check.py MODEL…

Prints one JSON object: of each model what is wrong; empty if nothing is. A flaw that strict
inference finds in the original too (second of a pair "converted:original") is not reported.
"""

import json
import sys

import onnx


def problems(path):
    found = []
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:
        found.append("checker: " + str(error).splitlines()[0][:300])
    try:
        model = onnx.load(path)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:
        found.append("inference: " + str(error).splitlines()[0][:300])
    return found


report = {}
for argument in sys.argv[1:]:
    converted, original = argument.split(":")
    wrong = problems(converted)
    if wrong and len(problems(original)) >= len(wrong):
        # Contrib operators of an optimizer, which onnx does not know.
        wrong = []
        report.setdefault("_flawed_originals", []).append(original)
    if wrong:
        report[converted] = wrong
print(json.dumps(report))
