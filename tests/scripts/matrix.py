"""Runs converted models in the onnxruntime on PYTHONPATH, with and without the operator library.

usage: matrix.py JOBS.json

JOBS.json: {"library": path, "models": [{"name", "original", "converted", "inputs" (npz),
"expected" (npz or null), "tolerance", "apart"}]}. Prints one JSON object: the version of
onnxruntime, and of each model what went wrong or the differences found.
"""

import json
import sys

import numpy as np
import onnxruntime as ort

ort.set_default_logger_severity(4)


def session(path, library=None):
    options = ort.SessionOptions()
    if library:
        options.register_custom_ops_library(library)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def difference(found, expected):
    if len(found) != len(expected):
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected):
        if a.shape != b.shape:
            return float("inf")
        gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
        # NaN counts as infinitely far.
        worst = max(worst, float(np.nan_to_num(gap, nan=np.inf).max(initial=0.0)))
    return worst


def judge(job, library):
    inputs = dict(np.load(job["inputs"]))
    try:
        session(job["original"]).run(None, inputs)
    except Exception as error:  # an opset or operator this version lacks
        return {"skipped": str(error)[:200]}
    plain = session(job["converted"])
    names = [output.name for output in plain.get_outputs()]
    function = plain.run(None, inputs)
    kernel = session(job["converted"], library).run(None, inputs)
    scale = max([1.0] + [float(np.abs(o.astype(np.float64)).max(initial=0.0)) for o in function])
    result = {"apart": difference(kernel, function) / scale}
    problems = []
    if not result["apart"] <= job["apart"]:
        problems.append(f"library and function body are {result['apart']:.1e} apart, more than {job['apart']:.1e}")
    if job["expected"]:
        expected = np.load(job["expected"])
        expected = [expected[name] for name in names]
        for what, found in (("function", function), ("library", kernel)):
            result[what] = difference(found, expected)
            if not result[what] <= job["tolerance"]:
                problems.append(f"{what}: {result[what]:.1e} from the official output, more than {job['tolerance']:.1e}")
    if problems:
        result["failed"] = problems
    return result


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    report = {"version": ort.__version__, "models": {}}
    for job in jobs["models"]:
        try:
            report["models"][job["name"]] = judge(job, jobs["library"])
        except Exception as error:
            report["models"][job["name"]] = {"failed": [str(error)[:500]]}
    print(json.dumps(report))


main()
