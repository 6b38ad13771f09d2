#!/usr/bin/python3
"""`strata tokenize` on vocabulary-only files: ids out, text back, and what it says when it cannot."""
import gzip
import json
import os
import subprocess
import tempfile
import unittest

SOURCE = os.environ.get("STRATA_TEST_SOURCE", os.path.join(os.path.dirname(__file__), "..", ".."))
STRATA = os.path.join(os.environ.get("STRATA_TEST_BIN", os.path.join(SOURCE, "build")), "strata")


def strata(*words, text=b""):
    return subprocess.run([STRATA, "tokenize", *words], input=text, capture_output=True, timeout=120)


class Tokenize(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        for name in ("gpt-2", "qwen2"):
            with gzip.open(os.path.join(SOURCE, "tests", "fixtures", name + ".gguf.gz")) as packed:
                with open(cls.model(name), "wb") as file:
                    file.write(packed.read())

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    @classmethod
    def model(cls, name):
        return os.path.join(cls.folder.name, name + ".gguf")

    def out(self, *words, text=b""):
        done = strata(*words, text=text)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        return done.stdout

    def fails(self, code, part, *words, text=b""):
        done = strata(*words, text=text)
        self.assertEqual(done.returncode, code, done.stderr)
        self.assertIn(part.encode(), done.stderr)
        self.assertEqual(done.stdout, b"")

    def test_vectors(self):
        with open(os.path.join(SOURCE, "tests", "fixtures", "gpt-2.inp"), "rb") as file:
            texts = file.read().split(b"\n__ggml_vocab_test__\n")
        with open(os.path.join(SOURCE, "tests", "fixtures", "gpt-2.out"), encoding="ascii") as file:
            ids = file.read().split("\n")
        for text, expected in list(zip(texts, ids))[:20]:
            self.assertEqual(self.out(self.model("gpt-2"), text=text).decode(), ",".join(expected.split()) + "\n")

    def test_there_and_back(self):
        text = "Grüße, 世界!\n\t<|im_start|> \U0001F600 1234\r\n".encode() + bytes([0])
        for flags in ([], ["--special"]):
            ids = self.out(self.model("qwen2"), *flags, text=text)
            self.assertEqual(b"151644" in ids, bool(flags))
            self.assertEqual(self.out(self.model("qwen2"), "--detokenize", *flags, text=ids), text)
        # Without --special the control token is found neither in text nor in ids.
        self.assertEqual(self.out(self.model("qwen2"), "-d", text=ids), text.replace(b"<|im_start|>", b""))

    def test_json(self):
        answer = json.loads(self.out(self.model("qwen2"), "--json", text="hé".encode()))
        self.assertEqual(list(answer), ["token_ids"])
        back = json.loads(self.out(self.model("qwen2"), "-d", "-j",
                                   text=" ".join(map(str, answer["token_ids"])).encode()))
        self.assertEqual(back, {"text": "hé"})
        self.assertEqual(json.loads(self.out(self.model("qwen2"), "-j")), {"token_ids": []})

    def test_broken_characters(self):
        ids = self.out(self.model("gpt-2"), text=b"a\xff\xe4\xb8")
        self.assertEqual(self.out(self.model("gpt-2"), "-d", text=ids).decode(), "a\ufffd\ufffd")

    def test_add_special(self):
        self.assertEqual(self.out(self.model("qwen2"), "--add-special"), b"\n")  # this model adds none

    def test_refusals(self):
        self.fails(1, "'x' on standard input is no token id", self.model("qwen2"), "-d", text=b"1,x,2")
        self.fails(1, "'99999999999' on", self.model("qwen2"), "-d", text=b"99999999999")
        self.fails(1, "'-1' on", self.model("qwen2"), "-d", text=b"-1")
        self.fails(1, "151669 tokens", self.model("qwen2"), "-d", text=b"151669")
        self.fails(1, "takes one model file")
        self.fails(1, "no/such", "/no/such.gguf")
        self.fails(2, "--special", self.model("qwen2"), "--specal")
        with open(self.model("broken"), "wb") as file:
            file.write(b"GGUF" + bytes(100))
        self.fails(1, "broken.gguf", self.model("broken"))

    def test_help(self):
        self.assertIn(b"--detokenize", self.out("--help"))


if __name__ == "__main__":
    unittest.main()
