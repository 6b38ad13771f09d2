#!/usr/bin/python3
"""Compare one GPU with two, in one run on one machine, through `strata serve` and its clients over gRPC.

Cases. One GPU and two take turns, because a GPU that was busy for long is a slower one; the figure of each is the best
of its --repeat turns:
  one stream    one client, greedy: new tokens a second
  decode        32 clients on one GPU, 64 on two, prompts of 64 and answers of 512: new tokens a second, all together
  prefill       eight prompts of 2048 tokens at all times: prompt tokens a second
  greedy ids    64 prompts must get the same tokens from two GPUs as from one
  killed        one worker of two is killed under 16 streams: the longest pause between two texts of a stream, how many
                streams finished and said what they say undisturbed, and how long until the server was ready again

While two GPUs run the decode case they write traces: how long each stage computed and how long it waited for the other
stands under the table and in the JSON, for the middle half of the better run, and a picture of a few steps beside the
JSON (--timeline).

Exits with 1 when a ratio is below its floor, ids differ, a stream that finished says something else, or the server did
not come back. Streams that the kill ended are counted, not judged. With --backend cpu, one and two workers take the
place of the GPUs; ratios are then not judged either, for both have the same cores.
"""
import argparse
import concurrent.futures
import contextlib
import gzip
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import gpu_bench
import pipeline_timeline

BENCHES = {  # prompt, new, clients with 1 and 2 GPUs, requests of each client, the figure, floor of the ratio
    "one stream": (8, 128, (1, 1), 2, "new_tokens_per_second", 0.95),
    "decode": (64, 512, (32, 64), 1, "new_tokens_per_second", 1.8),
    "prefill": (2048, 1, (8, 8), None, "prompt_tokens_per_second", 1.8),
}
CASES = [*BENCHES, "greedy ids", "killed"]
CASE_SECONDS = 60
STREAMS, STREAM_TOKENS = 16, 200
TRACED, TRACED_STEPS = "decode", 4


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--build", type=pathlib.Path, required=True, help="the folder of strata")
    p.add_argument("--model", type=pathlib.Path, help="a GGUF file; without it one with random weights is made")
    p.add_argument("--models", type=pathlib.Path, default=gpu_bench.models_folder())
    p.add_argument("--keep", action="store_true", help="keep the model that is made")
    p.add_argument("--shape", default="8b", help="8b, 70b or 1b")
    p.add_argument("--mix", default="q4_k_m")
    p.add_argument("--vocab", help="a GGUF file whose tokens the model gets (default: a fixture of the tests)")
    p.add_argument("--backend", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--devices", default="0,1", help="the two GPUs; the first is also the one")
    p.add_argument("--prompts", type=int, default=24, help="of each client of the prefill case: the more, the less "
                   "does it count that the pipeline is filled and drained")
    p.add_argument("--repeat", type=int, default=2)
    p.add_argument("--cases", default="", help="only those whose name has one of these words, separated by commas")
    p.add_argument("--start-timeout", type=float, default=180, help="seconds a server may take until it is ready")
    p.add_argument("--json", type=pathlib.Path, help="where the figures go (default: gpu-pair.json in the build)")
    p.add_argument("--timeline", type=pathlib.Path,
                   help="where the picture of two GPUs decoding goes (default: beside the figures, as .svg)")
    return p.parse_args()


def say(text):
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def model_file(a):
    """The model; one that was made here is removed again. It has names for its tokens, so that streams show text."""
    if a.model:
        yield a.model
        return
    with tempfile.TemporaryDirectory() as scratch:
        if not a.vocab:
            a.vocab = f"{scratch}/vocab.gguf"
            fixture = gpu_bench.SOURCE / "tests" / "fixtures" / "qwen2.gguf.gz"
            with gzip.open(fixture) as packed, open(a.vocab, "wb") as plain:
                shutil.copyfileobj(packed, plain)
            a.models = a.models / "qwen2"  # not the file that gpu_bench.py makes, whose tokens are others
        path, made = gpu_bench.make_model(a, a.shape, a.mix)
    try:
        yield path
    finally:
        if made and not a.keep:
            path.unlink()


class NotServing(Exception):
    pass


class Server:
    """`strata serve` with one or two workers, ready. A context manager."""

    def __init__(self, a, model, count, trace):
        self.a, self.count, self.home = a, count, tempfile.mkdtemp(prefix="strata-pair")
        self.times = {}  # case -> when it began and ended, on the clock of the traces
        self.traces = pathlib.Path(self.home) / "traces" if trace else None
        self.address, self.log = f"unix:{self.home}/strata", pathlib.Path(self.home) / "log"
        where = ["--devices", ",".join(a.devices.split(",")[:count])] if a.backend == "cuda" else ["--workers", count]
        command = [a.build / "strata", "serve", model, "--listen", self.address, "--backend", a.backend, *where,
                   "--max-sequences", 64, "--context", 4096, "--step-budget", 2048, "--chunk", 2048]
        command += ["--trace", self.traces] if trace else []
        began = time.monotonic()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=log, text=True)
        ready = threading.Event()
        threading.Thread(target=self._read, args=(ready,), daemon=True).start()
        try:
            while not ready.wait(0.1):
                late = time.monotonic() - began > a.start_timeout
                if late or self.process.poll() is not None:
                    problem = "was not ready in time" if late else "ended"
                    raise NotServing(f"the server {problem}; its log:\n{self.tail()}")
        except BaseException:
            self.stop()
            raise
        say(f"serving with {count} after {time.monotonic() - began:.1f} s")

    def _read(self, ready):
        for line in self.process.stdout:
            if line.startswith("ready on"):
                ready.set()

    def tail(self):
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])

    def workers(self):
        """Process ids of the strata-workers that are children of the server and alive."""
        found = set()
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                head, _, rest = stat.read_text().rpartition(")")
                state, parent = rest.split()[:2]
                if head.endswith("(strata-worker") and int(parent) == self.process.pid and state != "Z":
                    found.add(int(stat.parent.name))
        return found

    def client(self, command, *arguments, seconds=CASE_SECONDS):
        """What the client printed as JSON; None where it failed or took longer."""
        line = [self.a.build / "strata", command, "--connect", self.address, "--json", *arguments]
        try:
            done = subprocess.run([str(c) for c in line], capture_output=True, text=True, timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            say(f"{command}: no end in {seconds:.0f} s")
            return None
        if done.returncode:
            say(f"{command}: {done.stderr.strip()}")
            return None
        return json.loads(done.stdout)

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.home, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind and kind is not KeyboardInterrupt:
            say(f"the server's log, its end:\n{self.tail()}")
        self.stop()


def bench(server, name):
    """Tokens a second; None where it did not end well."""
    prompt, new, clients, each, figure, _ = BENCHES[name]
    n, began = clients[server.count - 1], time.monotonic()
    out = server.client("bench", "--prompt", prompt, "--new", new, "--concurrency", n, "--requests",
                        n * (each or server.a.prompts))
    server.times[name] = (began, time.monotonic())
    return out and out["sweeps"][0][figure]


def stages_of(server, name):
    """What the stages did in the middle half of a case's run: rows as in pipeline_timeline.py, and the picture."""
    if name not in server.times:
        return None
    time.sleep(0.5)  # the workers write a few times a second
    try:
        traces = [pipeline_timeline.Trace(path) for path in sorted(server.traces.glob("*.json"))]
        begin, end = (1e6 * t for t in server.times[name])
        flight = pipeline_timeline.in_flight([t.within(begin, end) for t in traces])
        if not flight:
            raise pipeline_timeline.BadTrace("there is no step in these traces")
        quarter = (flight[-1][1] - flight[0][0]) / 4
        middle = [t.within(flight[0][0] + quarter, flight[-1][1] - quarter) for t in traces]
        rows = pipeline_timeline.summarize(middle)
        return {"rows": rows, "picture": pipeline_timeline.draw(middle, rows, steps=TRACED_STEPS)}
    except pipeline_timeline.BadTrace as problem:
        say(f"{name}: {problem}")
        return None


def prompts(count):
    draw = random.Random(1)
    return [",".join(str(draw.randrange(10, 500)) for _ in range(draw.randrange(4, 120))) for _ in range(count)]


def greedy_ids(server):
    """The tokens of each prompt; None for those that failed."""
    def one(prompt):
        left = end - time.monotonic()
        return left > 0 and server.client("generate", "-t", 0, "-n", 24, "--ignore-eos", "--tokens", prompt,
                                          seconds=left)
    end = time.monotonic() + CASE_SECONDS
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return [out["token_ids"] if out else None for out in pool.map(one, prompts(64))]


class Stream(threading.Thread):
    """One client that prints text as it comes; the longest time between two pieces of it."""

    def __init__(self, server, prompt):
        super().__init__(daemon=True)
        line = [server.a.build / "strata", "generate", "--connect", server.address, "--timeout", CASE_SECONDS // 2 - 2,
                "-t", 0, "-n", STREAM_TOKENS, "--ignore-eos", "--quiet", "--tokens", prompt]
        self.text, self.pause, self.pieces = b"", 0.0, 0
        self.process = subprocess.Popen([str(c) for c in line], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.start()

    def run(self):
        last = None
        while True:
            piece, now = os.read(self.process.stdout.fileno(), 65536), time.monotonic()
            if not piece:
                break
            self.pause = max(self.pause, now - last) if last else 0.0
            self.text, self.pieces, last = self.text + piece, self.pieces + 1, now
        self.problem = self.process.stderr.read().decode(errors="replace").strip()
        self.ok = self.process.wait() == 0


def start_streams(server):
    return [Stream(server, prompt) for prompt in prompts(STREAMS)]


def wait_back(server, before, victim, killed):
    """Seconds from the kill until the server was ready with another worker in its place; None where it was not."""
    while time.monotonic() < killed + CASE_SECONDS / 2 - 2:
        workers = server.workers()
        if len(workers) == server.count and victim not in workers:
            pool = server.client("status", seconds=5)
            if pool and pool["state"] == "ready" and pool["epoch"] > before["epoch"]:
                return time.monotonic() - killed
        time.sleep(0.02)
    return None


def killed_worker(server):
    began = time.monotonic()
    undisturbed = start_streams(server)
    for stream in undisturbed:
        stream.join()
    whole = time.monotonic() - began
    if not all(s.ok and s.text.strip() for s in undisturbed):
        say(f"killed: streams without text, or failed: {undisturbed[0].problem}")
        return None
    before, victim, delay = server.client("status"), max(server.workers(), default=None), min(2.0, 0.4 * whole)
    if not before or not victim:
        return None
    streams = start_streams(server)
    time.sleep(delay)
    running = sum(s.is_alive() for s in streams)
    os.kill(victim, signal.SIGKILL)
    back = wait_back(server, before, victim, time.monotonic())
    for stream in streams:
        stream.join()
    problems = {s.problem for s in streams if not s.ok}
    for problem in sorted(problems):
        say(f"killed: a stream ended: {problem}")
    finished = [(s, u) for s, u in zip(streams, undisturbed) if s.ok]
    return {"killed_after": delay, "running_then": running, "streams": STREAMS, "finished": len(finished),
            "same_text": sum(s.text == u.text for s, u in finished), "back_seconds": back,
            "longest_pause": max(s.pause for s in streams), "longest_pause_undisturbed": max(
                u.pause for u in undisturbed), "problems": sorted(problems)}


def measure(a, model, count, cases):
    found = {}
    with Server(a, model, count, trace=count == 2 and TRACED in cases) as server:
        for name in cases:
            if name == "killed" and count == 1:
                continue
            began = time.monotonic()
            run = {"greedy ids": greedy_ids, "killed": killed_worker}.get(name, lambda s, n=name: bench(s, n))
            found[name] = run(server)
            shown = f"{found[name]:.1f} tok/s" if isinstance(found[name], float) else "done"
            say(f"{count}: {name}: {shown if found[name] else 'failed'} ({time.monotonic() - began:.1f} s)")
            if server.traces and name == TRACED:
                found["stages"] = stages_of(server, name)
    return found


def best_of(turns):
    """One dictionary of several: of each bench its best figure, with the stages of the same run."""
    best = dict(turns[0])
    for turn in turns[1:]:
        for name in BENCHES:
            if (turn.get(name) or 0) > (best.get(name) or 0):
                best[name] = turn[name]
                if name == TRACED:
                    best["stages"] = turn.get("stages")
    return best


def take_turns(a, model, cases):
    """What one GPU and what two found. Answers and failures are looked at once."""
    turns = ([], [])
    for i in range(a.repeat):
        now = [c for c in cases if i == 0 or c in BENCHES]
        for count in (1, 2):
            if now and (count == 2 or now != ["killed"]):
                turns[count - 1].append(measure(a, model, count, now))
    return [best_of(t) if t else {} for t in turns]


def judge(name, one, two, floors_hold):
    """The row of a case as JSON, and as text."""
    row = {"case": name, "one": one, "two": two, "ok": False}
    if name == "killed":
        if not two:
            return row, "failed"
        row["ok"] = two["back_seconds"] is not None and two["same_text"] == two["finished"]
        back = "not back" if two["back_seconds"] is None else f"back after {two['back_seconds']:.2f} s"
        return row, (f"{two['finished']} of {STREAMS} streams finished, {two['same_text']} with the same text; longest "
                     f"pause {two['longest_pause']:.2f} s ({two['longest_pause_undisturbed']:.2f} s undisturbed); "
                     f"{back}; killed after {two['killed_after']:.2f} s, {two['running_then']} running")
    if name == "greedy ids":
        same = sum(x is not None and x == y for x, y in zip(one, two))
        row |= {"same": same, "ok": same == len(one)}
        return row, f"{same} of {len(one)} prompts agree"
    if not one or not two:
        return row, "failed"
    row |= {"ratio": two / one, "floor": BENCHES[name][5], "ok": not floors_hold or two / one >= BENCHES[name][5]}
    floor = f"  floor {row['floor']}" if floors_hold else ""
    return row, f"{one:>10.1f} {two:>10.1f} {row['ratio']:>6.2f}x{floor}"


def check_files(a):
    out = a.json or a.build / "gpu-pair.json"
    picture = a.timeline or out.with_suffix(".svg")
    for option, path in (("--json", out), ("--timeline", picture)):
        if not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            sys.exit(f"{option}: {path} cannot be written")
    if a.model and not a.model.is_file():
        sys.exit(f"--model: there is no file {a.model}")
    return out, picture


def report_stages(row, stages, picture):
    """Adds them to the case's row, prints them, draws them. Whoever wanted to know them must not get nothing."""
    if not stages:
        row["ok"] = False
        print("the stages while two decode: no traces   FAILED")
        return
    row["stages"], row["timeline"] = stages["rows"], str(picture)
    picture.write_text(stages["picture"])
    print(f"\nthe stages while two decode, drawn in {picture}:")
    print("\n".join(pipeline_timeline.table(stages["rows"])))


def main():
    a = parse()
    out, picture = check_files(a)
    words = [w for w in a.cases.split(",") if w]
    cases = [c for c in CASES if not words or any(w in c for w in words)]
    if not cases or a.backend == "cuda" and len(a.devices.split(",")) != 2:
        sys.exit("no case has such a name" if not cases else "--devices: two numbers, as in 0,1")
    with model_file(a) as model:
        try:
            one, two = take_turns(a, model, cases)
        except NotServing as problem:
            sys.exit(str(problem))
    rows = []
    print(f"{'case':<12} {'one':>10} {'two':>10} {'ratio':>7}   (tok/s)")
    for name in cases:
        row, text = judge(name, one.get(name), two.get(name), a.backend == "cuda")
        rows.append(row)
        print(f"{name:<12} {text}{'' if row['ok'] else '   FAILED'}")
    if TRACED in cases:
        report_stages(next(row for row in rows if row["case"] == TRACED), two.get("stages"), picture)
    out.write_text(json.dumps({"model": str(model), "backend": a.backend, "results": rows}, indent=1) + "\n")
    say(f"figures: {out}")
    sys.exit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
