#!/usr/bin/python3
"""scripts/pipeline_timeline.py on traces made by hand, whose shares are known."""
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree

SOURCE = pathlib.Path(os.environ.get("STRATA_TEST_SOURCE") or pathlib.Path(__file__).resolve().parents[2])
SCRIPT = SOURCE / "scripts" / "pipeline_timeline.py"
STEPS, EPOCH, START = 10, 4, 5_000_000


def event(kind, begin, length, step, stage):
    return {"name": kind, "ph": "X", "ts": START + begin, "dur": length, "pid": 1 + stage, "tid": 0,
            "args": {"step": step, "rows": 32, "positions": 32, "epoch": EPOCH, "stage": stage}}


def traces():
    """Two stages, a step every 1000 us: 700 on the first, then 600 on the second, which waits 400 before it."""
    first = [{"name": "process_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": "worker-0"}}]
    second = [{"name": "process_name", "ph": "M", "pid": 2, "tid": 0, "args": {"name": "worker-1"}}]
    for step in range(STEPS):
        at = step * 1000
        first.append(event("compute", at, 700, step, 0))
        first.append(event("send", at + 700, 100, step, 0))
        second.append(event("wait", at + 300, 400, step, 1))
        second.append(event("compute", at + 700, 600, step, 1))
    return first, second


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


class Timeline(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.home = pathlib.Path(self.folder.name)
        self.files = [self.home / f"w{i}.json" for i in range(2)]
        for path, events in zip(self.files, traces()):
            path.write_text("[\n" + ",\n".join(json.dumps(e) for e in events))  # not closed: the worker still runs

    def tearDown(self):
        self.folder.cleanup()

    def check_table(self, text):
        rows = [line.split() for line in text.splitlines()[1:]]
        # In flight: from 0 to 10300. Stage 0 computes 7000 and sends 1000, stage 1 computes 6000 and waits 4000.
        self.assertEqual(rows, [
            ["0", "worker-0", "10", "7.0", "0.0", "1.0", "2.3", "68.0%", "0.0%"],
            ["1", "worker-1", "10", "6.0", "4.0", "0.0", "0.3", "58.3%", "38.8%"]])

    def test_table(self):
        done = run(*self.files)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.check_table(done.stdout)

    def test_traces_that_end_anyhow(self):
        whole = self.files[0].read_text()
        self.files[0].write_text(whole + "\n]\n")
        self.files[1].write_text(self.files[1].read_text() + ",\n{\"name\":\"wai")
        done = run(*reversed(self.files))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.check_table(done.stdout)

    def draw(self, *options):
        out = self.home / "timeline.svg"
        done = run(*self.files, "-o", out, *options)
        self.assertEqual(done.returncode, 0, done.stderr)
        root = xml.etree.ElementTree.parse(out).getroot()
        space = "{http://www.w3.org/2000/svg}"
        self.assertEqual(root.tag, space + "svg")
        return [t.text or "" for t in root.iter(space + "text")]

    def test_picture(self):
        words = self.draw("--from-step", 4, "--steps", 2)
        # Of two steps 2300 us are seen: 4 and 5 on both lanes, what there is of 3 and 6 besides.
        self.assertEqual(words.count("step 4"), 2)
        self.assertEqual(words.count("step 5"), 2)
        self.assertEqual(words.count("step 3"), 1)
        self.assertEqual(words.count("step 6"), 1)
        self.assertEqual(words.count("step 2") + words.count("step 7"), 0)
        self.assertEqual(words.count("bubble: waits for stage 0"), 2)
        self.assertEqual(words.count("idle"), 2)
        for word in ("stage 0", "stage 1", "worker-0", "worker-1", "ms", "0.6", "2.2", "Steps 4 to 5 of epoch 4"):
            self.assertIn(word, words)

    def test_the_middle_is_drawn(self):
        words = self.draw()
        self.assertIn("Steps 3 to 5 of epoch 4", words)

    def test_what_cannot_be_drawn(self):
        (self.home / "other").write_text("[1, 2]")
        for arguments, sentence in [([*self.files, "--from-step", 99], "step 99 is not in these traces: they have 0"),
                                    ([self.home / "none"], "cannot be read"),
                                    ([self.home / "other"], "is no trace of a worker"),
                                    ([self.files[0], "-o", self.home / "no" / "x.svg"], "cannot be written")]:
            done = run(*arguments)
            self.assertEqual(done.returncode, 1, done)
            self.assertIn(sentence, done.stderr)
        done = run("--help")
        self.assertEqual(done.returncode, 0)
        self.assertIn("--from-step", done.stdout)


if __name__ == "__main__":
    unittest.main()
