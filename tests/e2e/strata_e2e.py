"""What the end-to-end tests share: a coordinator and its workers as processes, the API as Python messages, and a
small runner. Every test listens on Unix sockets in a folder of its own and ends only the processes it started.

    import strata_e2e as e2e

    def test_something(server):
        assert e2e.generate(server, text="hi", max_tokens=4).ids

    if __name__ == "__main__":
        e2e.main(globals(), workers=2)
"""
import contextlib
import gzip
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

SOURCE = pathlib.Path(os.environ.get("STRATA_TEST_SOURCE") or pathlib.Path(__file__).resolve().parents[2])
BIN = pathlib.Path(os.environ.get("STRATA_TEST_BIN") or SOURCE / "build")
BACKEND = os.environ.get("STRATA_TEST_BACKEND") or "cpu"
SLOW = 10 if os.environ.get("STRATA_TEST_SLOW") else 1  # sanitizers: everything takes longer
sys.path.insert(0, str(SOURCE / "tests" / "tools"))
# All workers share one GPU: each with memory of its own, so that none plans with what another is about to take.
ON_BACKEND = {"cpu": [], "cuda": ["--backend", "cuda", "--device", 0, "--memory", "3G"]}[BACKEND]

try:
    import grpc
    import models
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)


# --- the API -----------------------------------------------------------------------------------------------------

def _stubs():
    """The messages: $STRATA_TEST_STUBS as make_stubs filled it, or made here with protoc, as any client would."""
    carried = os.environ.get("STRATA_TEST_STUBS")
    out = carried or tempfile.mkdtemp(prefix="strata-stubs")
    try:
        for root, name in ((SOURCE / "proto", "strata/v1/inference.proto"),
                           ("/usr/share/grpc-proto/grpc/health/v1", "health.proto")):
            if not carried:
                subprocess.run(["protoc", f"--proto_path={root}", f"--python_out={out}", name], check=True)
        sys.path.insert(0, out)
        import health_pb2
        from strata.v1 import inference_pb2
        return inference_pb2, health_pb2
    finally:
        if not carried:
            shutil.rmtree(out, ignore_errors=True)


pb, health_pb = _stubs()
INFERENCE = "/strata.v1.Inference/"


class Client:
    """One channel to a server."""

    def __init__(self, address, tls_ca=None, **options):
        if tls_ca:
            credentials = grpc.ssl_channel_credentials(pathlib.Path(tls_ca).read_bytes())
            self.channel = grpc.secure_channel(address, credentials, options=list(options.items()))
        else:
            self.channel = grpc.insecure_channel(address, options=list(options.items()))

    def unary(self, method, request, reply, timeout=30 * SLOW):
        call = self.channel.unary_unary(method, request_serializer=type(request).SerializeToString,
                                        response_deserializer=reply.FromString)
        return call(request, timeout=timeout)

    def stream(self, request, timeout=60 * SLOW, metadata=None):
        """The call itself: iterate over it, cancel() it."""
        call = self.channel.unary_stream(INFERENCE + "Generate",
                                         request_serializer=pb.GenerateRequest.SerializeToString,
                                         response_deserializer=pb.GenerateResponse.FromString)
        return call(request, timeout=timeout, metadata=metadata)

    def pool(self):
        return self.unary(INFERENCE + "GetPool", pb.GetPoolRequest(), pb.GetPoolResponse)

    def model(self):
        return self.unary(INFERENCE + "GetModel", pb.GetModelRequest(), pb.GetModelResponse)

    def tokenize(self, **fields):
        return self.unary(INFERENCE + "Tokenize", pb.TokenizeRequest(**fields), pb.TokenizeResponse)

    def detokenize(self, ids, **fields):
        return self.unary(INFERENCE + "Detokenize", pb.DetokenizeRequest(ids=ids, **fields), pb.DetokenizeResponse).text

    def health(self, service=""):
        reply = self.unary("/grpc.health.v1.Health/Check", health_pb.HealthCheckRequest(service=service),
                           health_pb.HealthCheckResponse)
        return health_pb.HealthCheckResponse.ServingStatus.Name(reply.status)

    def close(self):
        self.channel.close()


def request(text=None, tokens=None, messages=None, stop=(), stop_ids=(), logit_bias=None, **fields):
    made = pb.GenerateRequest(stop=list(stop), stop_ids=list(stop_ids), **fields)
    if text is not None:
        made.text = text
    if tokens is not None:
        made.tokens.ids.extend(tokens)
    for role, content in messages or ():
        made.messages.messages.add(role=role, content=content)
    for token, bias in (logit_bias or {}).items():
        made.logit_bias.add(token=token, bias=bias)
    return made


class Choice:
    """The responses of one choice, put together."""

    def __init__(self):
        self.text, self.ids, self.logprobs, self.responses = "", [], [], 0
        self.finish = self.usage = self.timings = self.stop = self.stop_id = None

    def take(self, response):
        assert self.finish is None, "a response after the last one of its choice"
        self.responses += 1
        self.text += response.text
        self.ids += response.token_ids
        self.logprobs += response.logprobs
        if response.finish_reason:
            self.finish = pb.FinishReason.Name(response.finish_reason)[len("FINISH_REASON_"):].lower()
            self.usage, self.timings = response.usage, response.timings
            matched = response.WhichOneof("matched")
            self.stop = response.stop if matched == "stop" else None
            self.stop_id = response.stop_id if matched == "stop_id" else None


class Answer:
    def __init__(self, responses, n=1):
        self.choices = [Choice() for _ in range(n)]
        self.prompt_logprobs, self.prompt_ids = [], []
        for response in responses:
            if response.prompt_logprobs:
                assert not any(c.ids for c in self.choices), "prompt logprobs after text"
            self.prompt_logprobs += response.prompt_logprobs
            self.prompt_ids += response.prompt_token_ids
            if response.token_ids or response.text or response.finish_reason:
                self.choices[response.choice].take(response)
        assert all(c.finish for c in self.choices), "a choice without an end"

    def __getattr__(self, name):  # of the only choice
        return getattr(self.choices[0], name)


def generate(server, timeout=60 * SLOW, **fields):
    made = request(**fields)
    return Answer(server.client.stream(made, timeout=timeout), made.n or 1)


@contextlib.contextmanager
def refused(code, *parts):
    """The block must fail with this gRPC status, and a sentence that has these parts."""
    try:
        yield
    except grpc.RpcError as error:
        assert error.code() == code, f"{error.code()}, not {code}: {error.details()}"
        for part in parts:
            assert part in error.details(), f"{part!r} is not in: {error.details()}"
    else:
        raise AssertionError(f"nothing was refused; {code} was expected")


def until(condition, what, seconds=20):
    """Waits for a condition; returns its first true value."""
    end = time.monotonic() + seconds * SLOW
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"in vain: {what}"
        time.sleep(0.02)


# --- the processes ------------------------------------------------------------------------------------------------

class Process:
    def __init__(self, home, name, arguments, environment=None):
        self.name, self.log_path, self.lines = name, home / f"{name}.log", []
        self.log = open(self.log_path, "ab")
        self.process = subprocess.Popen([str(a) for a in arguments], stdout=subprocess.PIPE, stderr=self.log,
                                        env=dict(os.environ, **(environment or {})), text=True)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def alive(self):
        return self.process.poll() is None

    def kill(self, number=signal.SIGKILL):
        if self.alive():
            self.process.send_signal(number)

    def wait(self, seconds=30):
        code = self.process.wait(timeout=seconds * SLOW)
        self.reader.join(timeout=5)
        return code

    def stop(self):
        """Ends it whatever it takes; the exit status."""
        self.kill(signal.SIGTERM)
        try:
            return self.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.wait()
        finally:
            self.log.close()

    def text(self):
        return self.log_path.read_text(errors="replace")


class Server:
    """A coordinator and its workers over one model. Use it as a context manager."""

    def __init__(self, model, workers=1, coordinator=(), worker=(), start=True, ready=True):
        self.model, self.n_workers = model, workers
        self.coordinator_arguments, self.worker_arguments = list(coordinator), list(worker)
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="strata-e2e"))
        self.address = f"unix:{self.home}/client.sock"
        self.pool_address = f"unix:{self.home}/pool.sock"
        self.coordinator, self.workers, self.past = None, {}, []
        self.client = None
        if start:
            self.start_coordinator()
            for index in range(workers):  # one after the other, so that worker i gets stage i
                self.start_worker(index)
                until(lambda: f"worker w{index} joined" in self.coordinator.text(), "the worker joins")
            if ready:
                self.wait_ready()

    def start_coordinator(self):
        arguments = [BIN / "strata-coordinator", "--model", self.model, "--workers", self.n_workers, "--listen",
                     self.address, "--pool-listen", self.pool_address, *self.coordinator_arguments]
        began = self.coordinator.text().count(" serving ") if self.coordinator else 0  # the log is the same
        self.coordinator = Process(self.home, "coordinator", arguments)
        self.past.append(self.coordinator)
        until(lambda: self.coordinator.text().count(" serving ") > began or not self.coordinator.alive(),
              "the coordinator listens, or gives up")
        self.client = Client(self.address)
        return self.coordinator

    def start_worker(self, index, *extra, model=None):
        arguments = [BIN / "strata-worker", "--model", model or self.model, "--coordinator", self.pool_address,
                     "--name", f"w{index}", "--threads", 1, *ON_BACKEND, *self.worker_arguments, *extra]
        self.workers[index] = Process(self.home, f"w{index}", arguments)
        self.past.append(self.workers[index])
        return self.workers[index]

    def wait_ready(self, seconds=60):
        def serving():
            assert self.coordinator.alive(), "the coordinator ended"
            try:
                return self.client.pool().state == pb.POOL_STATE_READY and self.client.health() == "SERVING"
            except grpc.RpcError:
                return False
        until(serving, "the pool becomes ready", seconds)

    def pool(self):
        return self.client.pool()

    def names(self):
        return [f"w{index}" for index in self.workers]

    def idle(self):
        """Waits until nothing runs and every page is free."""
        def quiet():
            pool = self.pool()
            return pool.running == 0 and pool.waiting == 0 and pool.pages_free == pool.pages
        until(quiet, "everything is given back")

    def stop(self):
        """Ends everything. Returns what did not end well of its own: a sanitizer's finding, a crash, a hang."""
        if self.client:
            self.client.close()
        bad = []
        for process in self.past:
            if process.alive() and process.stop() != 0:
                bad.append(f"{process.name} ended with status {process.process.returncode}")
        return bad

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        bad = self.stop()
        if kind or bad:
            for process in dict.fromkeys(p.name for p in self.past):
                text = (self.home / f"{process}.log").read_text(errors="replace")
                print(f"--- the log of {process}, its end:\n{text[-4000:]}", file=sys.stderr)
        shutil.rmtree(self.home, ignore_errors=True)
        assert kind or not bad, ", ".join(bad)


# --- models -------------------------------------------------------------------------------------------------------

def vocabulary(name):
    """A real vocabulary as a file: of the fixtures, unpacked once into the build folder."""
    out = models.folder() / f"{name}.gguf"
    if not out.exists():
        scratch = out.with_suffix(f".{os.getpid()}")
        with gzip.open(SOURCE / "tests" / "fixtures" / f"{name}.gguf.gz") as packed, open(scratch, "wb") as plain:
            shutil.copyfileobj(packed, plain)
        os.rename(scratch, out)
    return str(out)


def small_model(**options):
    """Four small layers with the vocabulary of gpt-2: quick, and its text is real text."""
    defaults = dict(arch="llama", layers=4, embd=64, heads=4, kv_heads=2, ffn=128, mix="q8_0",
                    vocab=vocabulary("gpt-2"), seed=3)
    return models.make(**{**defaults, **options})


# --- the runner ---------------------------------------------------------------------------------------------------

def workers(usual):
    """How many workers a test takes whose answers do not depend on it; $STRATA_TEST_WORKERS decides."""
    return int(os.environ.get("STRATA_TEST_WORKERS") or usual)


def main(names, model=None, **server):
    """Runs every test_* of a module. Those with an argument share one server; the others make their own. Words on
    the command line choose among them."""
    if "workers" in server:
        server["workers"] = workers(server["workers"])
    tests = [(name, test) for name, test in names.items() if name.startswith("test_") and callable(test)]
    wanted = sys.argv[1:]
    tests = [(name, test) for name, test in tests if not wanted or any(word in name for word in wanted)]
    failures = 0

    def run(name, test, *arguments):
        nonlocal failures
        began = time.monotonic()
        try:
            test(*arguments)
            print(f"ok {name} ({time.monotonic() - began:.1f} s)", flush=True)
        except Exception:
            failures += 1
            print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)

    def run_shared():
        with Server(model or small_model(), **server) as running:
            before = failures
            for name, test in shared:
                run(name, test, running)
            assert failures == before, "the logs of the shared server are above"

    shared = [(name, test) for name, test in tests if test.__code__.co_argcount]
    if shared:
        run("the shared server", run_shared)
    for name, test in tests:
        if not test.__code__.co_argcount:
            run(name, test)
    print(f"{len(tests)} tests, {failures} failed")
    sys.exit(1 if failures else 0)
