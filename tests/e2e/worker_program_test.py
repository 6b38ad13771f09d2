#!/usr/bin/python3
"""strata-worker as a program: help, exit codes, --bench, --logits, signals. No coordinator takes part."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tools"))
try:
    import numpy as np
    import models
    import reference
except ImportError:
    print("needs python3 with numpy")
    sys.exit(77)

PROGRAM = str(pathlib.Path(os.environ.get("STRATA_TEST_BIN", "build")) / "strata-worker")
NOBODY = "127.0.0.1:1"


def run(*arguments, **options):
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=300, **options)


class Worker(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.model = models.make(arch="llama", mix="q8_0", layers=2, vocab_size=300, tied=True, context=512)

    def test_help(self):
        done = run("--help")
        self.assertEqual(done.returncode, 0)
        for word in ("--coordinator", "--listen-link", "--memory", "--bench", "--logits", "codes: 0 stopped"):
            self.assertIn(word, done.stdout)

    def test_wrong_options(self):
        for arguments in ([], ["--modle", "x"], [self.model, "--level", "mmx"], [self.model, "--log-level", "loud"],
                          [self.model, "another"], [self.model, "--threads", "-1"], [self.model, "--logits", "1,2"],
                          [self.model, "--listen-link", "nowhere"], [self.model, "--coordinator", "nowhere"],
                          [self.model, "--bench", "--bench-batch", "1,,2"], [self.model, "--trace", "/nowhere/x"]):
            done = run(*arguments)
            self.assertEqual(done.returncode, 2, (arguments, done.stderr))
            self.assertIn("strata-worker: ", done.stderr, arguments)

    def test_unusable_models(self):
        self.assertEqual(run("/no/such/file.gguf").returncode, 3)
        with tempfile.TemporaryDirectory() as folder:
            cut = pathlib.Path(folder) / "cut.gguf"
            whole = pathlib.Path(self.model).read_bytes()
            cut.write_bytes(whole[:len(whole) // 2])
            done = run(str(cut))
            self.assertEqual(done.returncode, 3)
            self.assertIn("cut.gguf", done.stderr)

    def test_no_coordinator(self):
        done = run(self.model, "--coordinator", NOBODY, "--connect-timeout", "0.3")
        self.assertEqual(done.returncode, 5)
        self.assertIn(NOBODY, done.stderr)

    def test_signals_end_it_cleanly(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            worker = subprocess.Popen([PROGRAM, self.model, "--coordinator", NOBODY], stderr=subprocess.PIPE, text=True)
            line = worker.stderr.readline()
            self.assertIn("links at", line)
            time.sleep(0.3)
            worker.send_signal(number)
            self.assertEqual(worker.wait(timeout=30), 0)
            worker.stderr.close()

    def test_devices(self):
        done = run("--list-devices")
        self.assertEqual(done.returncode, 0, done.stderr)
        lines = [line.split(" ", 3) for line in done.stdout.splitlines()]
        self.assertEqual(lines[-1][:2], ["cpu", "0"])
        self.assertTrue(all(int(memory) > 0 and text for _, _, memory, text in lines))
        listed = json.loads(run("--list-devices", "--json").stdout)
        self.assertEqual([(d["backend"], str(d["index"])) for d in listed], [(b, i) for b, i, _, _ in lines])

    def test_bench(self):
        done = run(self.model, "--bench", "--bench-prompt", "20", "--bench-new", "5", "--bench-batch", "1,3",
                   "--bench-repeat", "1", "--bench-step", "16", "--threads", "1", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        report = json.loads(done.stdout)
        self.assertTrue(report["device"])
        self.assertEqual([r["batch"] for r in report["results"]], [1, 3])
        for result in report["results"]:
            self.assertGreater(result["prefill_tokens_per_second"], 0)
            self.assertGreater(result["decode_tokens_per_second"], 0)
        self.assertIn("prefill tok/s", run(self.model, "--bench", "--bench-prompt", "4", "--bench-new", "2",
                                           "--bench-batch", "1", "--bench-repeat", "1").stdout)

    def test_logits(self):
        tokens = [(7 * i + 3) % 300 for i in range(40)]
        with tempfile.TemporaryDirectory() as folder:
            path = str(pathlib.Path(folder) / "logits")
            done = run(self.model, "--level", "portable", "--logits", ",".join(map(str, tokens)), "--save", path)
            self.assertEqual(done.returncode, 0, done.stderr)
            logits = np.fromfile(path, "<f4").reshape(len(tokens), 300)
        oracle = reference.Model(self.model).forward(tokens)
        self.assertLess(np.linalg.norm(logits - oracle) / np.linalg.norm(oracle - oracle.mean()), 0.002)

    def test_logits_refusals(self):
        with tempfile.TemporaryDirectory() as folder:
            path = str(pathlib.Path(folder) / "logits")
            self.assertEqual(run(self.model, "--logits", "1,x", "--save", path).returncode, 2)
            done = run(self.model, "--logits", "1,300", "--save", path)
            self.assertNotEqual(done.returncode, 0)
            self.assertIn("token 300, of 300", done.stderr)
            self.assertEqual(run(self.model, "--logits", "1", "--save", folder + "/no/such").returncode, 1)


if __name__ == "__main__":
    unittest.main()
