#!/usr/bin/python3
"""The traces of `strata serve --trace`: spans of both stages that fit together, whatever ends the workers."""
import concurrent.futures
import contextlib
import json
import os
import pathlib
import subprocess
import tempfile

import strata_e2e as e2e
from serve_test import Serve, run

REQUESTS, NEW = 6, 12


def read(path):
    """The events of a file, whether or not its array was closed, or is being written."""
    text = pathlib.Path(path).read_text()
    for whole in (text, text + "]"):
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(whole)
    return json.loads(text.rpartition(",\n")[0] + "]")


def spans_of(path):
    """The spans of one worker, which must not overlap; their steps ascend."""
    events = read(path)
    assert events[0]["ph"] == "M" and events[0]["args"]["name"] == pathlib.Path(path).stem, events[0]
    spans = events[1:]
    assert all(s["ph"] == "X" and s["name"] in ("wait", "compute", "send") for s in spans)
    for before, after in zip(spans, spans[1:]):
        assert before["ts"] + before["dur"] <= after["ts"], (before, after)
        order = [(s["args"]["epoch"], s["args"]["step"]) for s in (before, after)]
        assert order[0] <= order[1], (before, after)
    return spans


def steps_of(spans, name):
    return {s["args"]["step"]: s for s in spans if s["name"] == name}


def generate(serve):
    def one(i):
        return run("generate", "--connect", serve.address, "--tokens", f"{i + 1},20,30", "-t", "0", "-n", str(NEW),
                   "--ignore-eos", "--json")
    with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
        for done in pool.map(one, range(REQUESTS)):
            assert done.returncode == 0, done.stderr


def test_spans_of_two_stages_fit_together():
    with tempfile.TemporaryDirectory(prefix="strata-e2e") as folder:
        with Serve("--workers", 2, "--backend", "cpu", "--trace", f"{folder}/made") as serve:
            serve.wait_ready()
            generate(serve)
        stages = []
        for path in sorted(pathlib.Path(folder).glob("made/*")):
            json.loads(path.read_text())  # all of it, now that the worker has ended
            spans = spans_of(path)
            stages.append((spans[0]["args"]["stage"], spans))
        stages.sort()
        assert [stage for stage, _ in stages] == [0, 1]
        first, last = (steps_of(spans, "compute") for _, spans in stages)
        assert first.keys() == last.keys() and len(first) >= NEW
        for step, span in last.items():
            before = first[step]
            assert before["ts"] + before["dur"] <= span["ts"], (before, span)
            assert before["args"]["rows"] == span["args"]["rows"] > 0, (before, span)
        assert sum(span["args"]["rows"] for span in last.values()) >= REQUESTS * NEW
        assert steps_of(stages[1][1], "wait"), "the last stage waits for what it computes"


def test_a_killed_worker_leaves_its_spans():
    with tempfile.TemporaryDirectory(prefix="strata-e2e") as folder:
        trace, kept = pathlib.Path(folder) / "worker-1.json", pathlib.Path(folder) / "kept"
        with Serve("--workers", 2, "--backend", "cpu", "--trace", folder) as serve:
            serve.wait_ready()
            generate(serve)
            e2e.until(lambda: len(steps_of(spans_of(trace), "compute")) >= NEW, "the spans are in the file meanwhile")
            kept.write_bytes(trace.read_bytes())  # the next worker of that name begins it anew
            os.kill(serve.worker("worker-1"), 9)
            e2e.until(lambda: len(steps_of(spans_of(f"{folder}/worker-0.json"), "compute")) >= NEW,
                      "the other one writes down what it did")
        assert not kept.read_text().endswith("]\n")


def test_files_that_cannot_be_written():
    done = subprocess.run([str(e2e.BIN / "strata-worker"), e2e.small_model(), "--trace", "/nowhere/trace.json"],
                          capture_output=True, text=True, timeout=60 * e2e.SLOW)
    assert done.returncode == 2 and "--trace: /nowhere/trace.json cannot be written" in done.stderr, done.stderr
    done = run("serve", e2e.small_model(), "--trace", "/nowhere/traces")
    assert done.returncode == 1 and "--trace: no files can be written to /nowhere/traces" in done.stderr, done.stderr
    assert "--trace" in run("serve", "--help").stdout


if __name__ == "__main__":
    e2e.main(globals())
