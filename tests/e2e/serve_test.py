#!/usr/bin/python3
"""`strata serve` and what a person sees of it: the bar, the ready line, status while a worker is missing, sentences."""
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import threading
import time

import strata_e2e as e2e

STRATA = str(e2e.BIN / "strata")


class Serve:
    """A `strata serve` on a Unix socket in a folder of its own, ended with SIGTERM."""

    def __init__(self, *options, model=None, environment=None):
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="strata-e2e"))
        self.address = f"unix:{self.home}/serve.sock"
        self.process = e2e.Process(
            self.home, "serve", [STRATA, "serve", model or e2e.small_model(), "--listen", self.address, "--threads", 1,
                                 *options], environment)
        self.expected = 0

    def wait_ready(self):
        e2e.until(lambda: self.process.lines or not self.process.alive(), "the ready line, or an end")
        assert self.process.lines == [f"ready on {self.address}"], (self.process.lines, self.process.text())

    def worker(self, name):
        """The process id of one of our own workers."""
        main = self.process.process.pid
        children = pathlib.Path(f"/proc/{main}/task/{main}/children").read_text().split()
        named = [c for c in children if f"--name={name}" in pathlib.Path(f"/proc/{c}/cmdline").read_text()]
        return int(named[0]) if named else None

    def status(self, *options):
        return run("status", "--connect", self.address, *options)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        code = self.process.stop()
        if kind:
            print(self.process.text()[-4000:])
        shutil.rmtree(self.home, ignore_errors=True)
        assert kind or code == self.expected, f"serve ended with {code}"


def run(*arguments):
    return subprocess.run([STRATA, *arguments], capture_output=True, text=True, timeout=60 * e2e.SLOW)


def test_a_bar_while_it_loads():
    # Big enough to be seen loading: some 100 MB.
    with Serve("--workers", 2, "--progress", "--log-level", "warn",
               model=e2e.small_model(layers=8, embd=1024, heads=16, kv_heads=4, ffn=3072)) as serve:
        serve.wait_ready()
        assert "loading on 2 workers [" in serve.process.text(), serve.process.text()


def test_the_environment_is_not_read_twice():
    """--tls-cert of serve is about its clients; the workers, who have an option of that name, must not take it."""
    if not shutil.which("openssl"):
        print("   skipped: no openssl to make certificates with")
        return
    with tempfile.TemporaryDirectory(prefix="strata-e2e") as folder:
        cert, key = f"{folder}/cert.pem", f"{folder}/key.pem"
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
                        "/CN=localhost", "-keyout", key, "-out", cert], check=True, stderr=subprocess.DEVNULL)
        with Serve(environment={"STRATA_TLS_CERT": cert, "STRATA_TLS_KEY": key}) as serve:
            serve.wait_ready()


def test_status_counts_who_is_there():
    with Serve("--workers", 2) as serve:
        serve.wait_ready()
        assert "2 of 2 workers" in serve.status().stdout

        def missed():  # killed again each time it comes back, it is away for longer
            worker = serve.worker("worker-1")
            if worker:
                os.kill(worker, 9)
            text = serve.status().stdout
            return text if "no worker yet" in text else None

        text = e2e.until(missed, "status misses the worker")
        assert ", 1 of 2 workers" in text and "()" not in text, text
        json.loads(serve.status("--json").stdout)
        e2e.until(lambda: json.loads(serve.status("--json").stdout)["state"] == "ready", "the pool comes back")


def test_why_it_ends():
    for options, sentences in [(("--level", "best"), ("--level best is none of", "was given wrong options")),
                               (("--memory-fraction", "7"),
                                ("--memory-fraction: 7 is not between", "the coordinator exited"))]:
        serve = Serve(*options)
        serve.expected = 1
        with serve:
            assert serve.process.wait() == 1
            for sentence in sentences:
                assert sentence in serve.process.text(), serve.process.text()
            assert "SIGTERM" not in serve.process.text(), serve.process.text()


def test_devices():
    with Serve("--devices", "none", "--workers", 2, "--log-level", "warn") as serve:
        serve.wait_ready()
        stages = json.loads(serve.status("--json").stdout)["stages"]
        assert len(stages) == 2 and all(stage["device"].startswith("cpu") for stage in stages), stages
    done = run("serve", e2e.small_model(), "--devices", "first")
    assert done.returncode == 1 and "--devices 'first' is neither" in done.stderr, done.stderr
    done = run("serve", e2e.small_model(), "--devices", "0,63")
    assert done.returncode == 1 and "--devices names GPU " in done.stderr, done.stderr


def test_no_server_is_said_plainly():
    for command in (["generate", "hi"], ["status"], ["score", "hi"], ["bench"]):
        done = run(*command, "--connect", "unix:/nonexistent/socket")
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.startswith("strata: no server there: unix:/nonexistent/socket"), done.stderr
        assert "strata serve" in done.stderr, done.stderr


def test_a_chat_outlives_its_server():
    """On a terminal a failed message ends nothing, and the server is found again when it is back."""
    main, side = os.openpty()
    seen = []

    def read():
        try:
            while part := os.read(main, 4096):
                seen.append(part.decode(errors="replace"))
        except OSError:
            pass  # the other side is closed

    def say(text, awaited):
        """One message; it is answered, or refused, when there is a prompt again."""
        del seen[:]
        os.write(main, text.encode() + b"\n")
        e2e.until(lambda: "".join(seen).endswith("> "), f"an end of {text!r}")
        assert awaited in "".join(seen), "".join(seen)

    threading.Thread(target=read, daemon=True).start()
    with e2e.Server(e2e.small_model(vocab=e2e.vocabulary("qwen2")), workers=1) as server:
        chat = subprocess.Popen([STRATA, "chat", "--connect", server.address, "-t", "0", "-n", "3", "--ignore-eos"],
                                stdin=side, stdout=side, stderr=side)
        os.close(side)
        try:
            e2e.until(lambda: "".join(seen).endswith("> "), "a prompt")
            say("one", "[3 tokens")
            assert server.coordinator.stop() == 0
            time.sleep(0.5)
            say("two", "")  # the connection is found dead
            say("three", "failed to connect")
            server.start_coordinator()
            server.wait_ready()
            say("four", "[3 tokens")
            os.write(main, b"/exit\n")
            assert chat.wait(20 * e2e.SLOW) == 0
        finally:
            chat.kill()
            chat.wait()
    os.close(main)


def test_a_score_of_one_token():
    with Serve() as serve:
        serve.wait_ready()
        done = run("score", "--connect", serve.address, "--tokens", "5")
        assert done.returncode == 0 and "nan" not in done.stdout and "no perplexity" in done.stdout, done.stdout
        scored = json.loads(run("score", "--connect", serve.address, "--tokens", "5", "--json").stdout)
        assert scored["perplexity"] is None, scored


if __name__ == "__main__":
    e2e.main(globals())
