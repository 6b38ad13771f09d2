#!/usr/bin/python3
"""The pool and its ends: start in any order, workers that die, hang, cannot load or do not belong, spares, draining,
health."""
import os
import shutil
import signal
import socket
import subprocess
import threading
import time

import strata_e2e as e2e
from strata_e2e import Server, generate, grpc, pb, refused, request, until

PROMPT = "The quick brown fox jumps over the lazy dog, and then"
GREEDY = dict(text=PROMPT, temperature=0)


def long_request(**fields):
    return request(text=PROMPT, ignore_eos=True, **fields)


def test_workers_first():
    with Server(e2e.small_model(), workers=2, start=False) as server:
        server.start_worker(0)
        server.start_worker(1)
        time.sleep(0.5)
        server.start_coordinator()
        server.wait_ready()
        assert generate(server, **GREEDY, max_tokens=4).ids
        assert server.coordinator.lines == [f"ready on {server.address}"], server.coordinator.lines


def test_coordinator_first_says_what_it_waits_for():
    with Server(e2e.small_model(), workers=2, start=False) as server:
        server.start_coordinator()
        pool = server.pool()
        assert pool.state == pb.POOL_STATE_WAITING and "0 of 2 workers" in pool.problem, pool
        assert server.client.health() == "NOT_SERVING"
        assert server.client.health("strata.v1.Inference") == "NOT_SERVING"
        assert server.client.health("liveness") == "SERVING"
        with refused(grpc.StatusCode.UNAVAILABLE, "not ready", "0 of 2 workers"):
            generate(server, **GREEDY)
        assert server.client.model().layers == 4, "the model is known without workers"
        server.start_worker(0)
        until(lambda: "1 of 2 workers" in server.pool().problem, "one has joined")
        assert [s.state for s in server.pool().stages] == ["joined", ""]
        server.start_worker(1)
        server.wait_ready()
        assert server.client.health("strata.v1.Inference") == "SERVING"
        with refused(grpc.StatusCode.NOT_FOUND):
            server.client.health("no.such.service")


def test_health_watch_follows_the_pool():
    with Server(e2e.small_model(), workers=1, start=False) as server:
        server.start_coordinator()
        watch = server.client.channel.unary_stream(
            "/grpc.health.v1.Health/Watch", request_serializer=e2e.health_pb.HealthCheckRequest.SerializeToString,
            response_deserializer=e2e.health_pb.HealthCheckResponse.FromString)(
                e2e.health_pb.HealthCheckRequest(service=""), wait_for_ready=True, timeout=60 * e2e.SLOW)
        seen = []
        reader = threading.Thread(target=lambda: seen.extend(_states(watch)), daemon=True)
        reader.start()
        until(lambda: seen == [2], "not serving yet")
        server.start_worker(0)
        until(lambda: seen == [2, 1], "serving")
        server.workers[0].kill()
        until(lambda: seen == [2, 1, 2], "not serving any more")
        server.workers[0].wait()
        watch.cancel()


def _states(watch):
    try:
        for response in watch:
            yield response.status
    except grpc.RpcError:
        return


def test_a_killed_worker_ends_its_requests_and_comes_back():
    with Server(e2e.small_model(), workers=2) as server:
        before = generate(server, **GREEDY, max_tokens=10).ids
        epoch = server.pool().epoch
        call = server.client.stream(long_request())
        stream = iter(call)
        next(stream)
        server.workers[1].kill()
        server.workers[1].wait()
        with refused(grpc.StatusCode.UNAVAILABLE, "w1"):
            for _ in stream:
                pass
        pool = until(lambda: server.pool() if server.pool().state == pb.POOL_STATE_REASSEMBLING else None,
                     "the pool notices")
        assert "w1" in pool.problem and "1 of 2 workers" in pool.problem, pool.problem
        assert server.client.health() == "NOT_SERVING" and server.client.health("liveness") == "SERVING"
        with refused(grpc.StatusCode.UNAVAILABLE, "w1"):
            generate(server, **GREEDY)
        survivor = server.workers[0].process.pid
        server.start_worker(1)
        server.wait_ready()
        assert server.pool().epoch > epoch and server.workers[0].process.pid == survivor
        assert server.workers[0].alive()
        assert generate(server, **GREEDY, max_tokens=10).ids == before


def test_the_first_stage_may_die_too():
    with Server(e2e.small_model(), workers=3) as server:
        before = generate(server, **GREEDY, max_tokens=10).ids
        for victim in (0, 1):
            stream = iter(server.client.stream(long_request()))
            next(stream)
            server.workers[victim].kill()
            server.workers[victim].wait()
            with refused(grpc.StatusCode.UNAVAILABLE, f"w{victim}"):
                for _ in stream:
                    pass
            server.start_worker(victim)
            server.wait_ready()
            assert generate(server, **GREEDY, max_tokens=10).ids == before


def test_a_spare_takes_over():
    with Server(e2e.small_model(), workers=2) as server:
        before = generate(server, **GREEDY, max_tokens=10).ids
        server.start_worker(2)
        until(lambda: "w2 joined" in server.coordinator.text(), "the spare joins")
        server.workers[0].kill()
        server.workers[0].wait()
        until(lambda: "w2" in [s.worker for s in server.pool().stages], "the spare has a stage")
        server.wait_ready()
        assert [s.worker for s in server.pool().stages] == ["w2", "w1"], "w1 keeps its layers"
        assert generate(server, **GREEDY, max_tokens=10).ids == before


def test_a_stopped_worker_is_found_by_the_watchdog():
    # Well below the 10 s after which a worker counts as silent: the watchdog is to find it first.
    with Server(e2e.small_model(), workers=2, coordinator=["--step-timeout", 3]) as server:
        stream = iter(server.client.stream(long_request()))
        next(stream)
        server.workers[1].kill(signal.SIGSTOP)
        with refused(grpc.StatusCode.UNAVAILABLE, "w1", "did not finish step"):
            for _ in stream:
                pass
        server.workers[1].kill(signal.SIGCONT)
        server.wait_ready()
        assert generate(server, **GREEDY, max_tokens=4).ids


def cpu_seconds(process):
    fields = open(f"/proc/{process.process.pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_waiting_costs_nothing():
    def check(what, *processes):
        before = [cpu_seconds(p) for p in processes]
        time.sleep(2)
        spent = [cpu_seconds(p) - b for p, b in zip(processes, before)]
        assert max(spent) < 0.1 * e2e.SLOW, f"{what}: {spent} of 2 s"
    with Server(e2e.small_model(), workers=2) as server:
        generate(server, **GREEDY, max_tokens=10)
        check("ready", server.coordinator, *server.workers.values())
        server.workers[1].kill()
        server.workers[1].wait()
        until(lambda: server.pool().state == pb.POOL_STATE_REASSEMBLING, "the pool notices")
        check("a worker short", server.coordinator, server.workers[0])


def test_a_worker_with_another_model_is_refused():
    with Server(e2e.small_model(), workers=1, start=False) as server:
        server.start_coordinator()
        wrong = server.start_worker(0, model=e2e.small_model(seed=99, layers=3))
        assert wrong.wait() != 0
        assert "another model file" in wrong.text()
        until(lambda: "another model file" in server.coordinator.text(), "the coordinator says so too")
        server.start_worker(0)
        server.wait_ready()


def test_a_model_that_does_not_fit_is_explained():
    model = e2e.small_model()
    with Server(model, workers=1, coordinator=["--kv-pages", 16777216], ready=False) as server:
        pool = until(lambda: server.pool() if server.pool().state == pb.POOL_STATE_FAILED else None, "the load fails")
        assert "w0" in pool.problem, pool.problem
        with refused(grpc.StatusCode.UNAVAILABLE, "w0"):
            generate(server, **GREEDY)


def test_bad_options_end_with_a_sentence():
    with Server(e2e.small_model(), workers=9, start=False) as server:
        coordinator = server.start_coordinator()
        assert coordinator.wait() == 1 and "9" in coordinator.text(), coordinator.text()
    with Server("/nowhere/model.gguf", start=False) as server:
        assert server.start_coordinator().wait() == 1
        assert "/nowhere/model.gguf" in server.coordinator.text()
    with Server(e2e.small_model(), start=False, coordinator=["--step-budget", 4]) as server:
        assert server.start_coordinator().wait() == 1
        assert "--step-budget" in server.coordinator.text()


# --- the end ---

def test_sigterm_drains():
    with Server(e2e.small_model(), workers=2, coordinator=["--drain-timeout", 60 * e2e.SLOW]) as server:
        call = server.client.stream(long_request(max_tokens=1500))
        stream = iter(call)
        tokens = len(next(stream).token_ids)
        server.coordinator.kill(signal.SIGTERM)
        until(lambda: "stopping" in server.coordinator.text(), "the signal is taken")

        def turned_away():
            try:
                generate(server, **GREEDY, max_tokens=1)
            except grpc.RpcError as error:
                return "shutting down" in error.details()
        until(turned_away, "new requests are refused")
        pool = server.pool()
        assert pool.state == pb.POOL_STATE_DRAINING, pool
        assert server.client.health() == "NOT_SERVING"
        tokens += sum(len(response.token_ids) for response in stream)
        assert tokens == 1500, tokens
        assert server.coordinator.wait() == 0


def test_a_second_signal_ends_at_once():
    with Server(e2e.small_model(), workers=1) as server:
        stream = iter(server.client.stream(long_request()))
        next(stream)
        server.coordinator.kill(signal.SIGTERM)
        until(lambda: "stopping" in server.coordinator.text(), "the signal is taken")
        server.coordinator.kill(signal.SIGINT)
        with refused(grpc.StatusCode.UNAVAILABLE, "shutting down"):
            for _ in stream:
                pass
        assert server.coordinator.wait() == 0


def test_the_drain_timeout_ends_what_is_left():
    with Server(e2e.small_model(), workers=1, coordinator=["--drain-timeout", 0.3]) as server:
        stream = iter(server.client.stream(long_request(n=4)))
        next(stream)
        server.coordinator.kill(signal.SIGTERM)
        with refused(grpc.StatusCode.UNAVAILABLE, "shutting down"):
            for _ in stream:
                pass
        assert server.coordinator.wait() == 0


def test_a_coordinator_comes_back_to_its_workers():
    with Server(e2e.small_model(), workers=2) as server:
        before = generate(server, **GREEDY, max_tokens=10).ids
        server.coordinator.kill()
        server.coordinator.wait()
        server.client.close()
        server.start_coordinator()
        server.wait_ready()
        assert all(worker.alive() for worker in server.workers.values())
        assert generate(server, **GREEDY, max_tokens=10).ids == before


def free_addresses():
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{s.getsockname()[1]}" for s in (probe, other)]


def test_a_connection_grows_old():
    """Behind a load balancer clients are to spread: an old connection is left, a running answer is not cut."""
    with Server(e2e.small_model(), workers=1, coordinator=["--max-connection-age", 0.2]) as server:
        states, tokens, began = [], 0, time.monotonic()
        server.client.channel.subscribe(states.append)
        try:
            for response in server.client.stream(long_request(n=8, max_tokens=1500)):
                tokens += len(response.token_ids)
        except grpc.RpcError as error:
            # gRPC's server closes the old connection behind the last byte; a client that writes just then
            # (a window, a ping) hears of the closed socket before it has read the status. The answer is whole.
            assert tokens == 12000 and error.details() == "Broken pipe", (tokens, error)
        assert tokens == 12000, tokens
        assert time.monotonic() - began > 0.3, "the answer was over before the connection was old"
        until(lambda: grpc.ChannelConnectivity.IDLE in states, f"{states}: it was never asked to leave")
        assert generate(server, **GREEDY, max_tokens=4).ids, "and it is welcome again"


def test_tcp_ports():
    client, pool = free_addresses()
    with Server(e2e.small_model(), workers=2, start=False) as server:
        server.address, server.pool_address = client, pool
        server.start_coordinator()
        server.start_worker(0)
        server.start_worker(1)
        server.wait_ready()
        assert server.coordinator.lines == [f"ready on {client}"]
        assert generate(server, **GREEDY, max_tokens=4).ids


def test_tls_on_both_ports():
    if not shutil.which("openssl"):
        print("   skipped: no openssl to make certificates with")
        return
    with Server(e2e.small_model(), workers=1, start=False) as server:
        cert, key = server.home / "cert.pem", server.home / "key.pem"
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
                        "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out",
                        cert], check=True, stderr=subprocess.DEVNULL)
        server.address, server.pool_address = free_addresses()
        server.coordinator_arguments += ["--tls-cert", cert, "--tls-key", key, "--pool-tls-cert", cert,
                                         "--pool-tls-key", key]
        server.worker_arguments += ["--tls-ca", cert]
        server.start_coordinator()
        plain = server.client
        server.client = e2e.Client(server.address, tls_ca=cert)
        server.start_worker(0)
        server.wait_ready()
        assert generate(server, **GREEDY, max_tokens=4).ids
        with refused(grpc.StatusCode.UNAVAILABLE):
            plain.pool()
        plain.close()


def test_a_full_house():
    with Server(e2e.small_model(), workers=1, coordinator=["--max-sequences", 1, "--max-waiting", 1]) as server:
        running = server.client.stream(long_request())
        next(running)
        waiting = server.client.stream(long_request(max_tokens=3))
        until(lambda: server.pool().waiting == 1, "one waits")
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "2"):
            generate(server, **GREEDY, max_tokens=1)
        running.cancel()
        assert sum(len(response.token_ids) for response in waiting) == 3, "its turn came"
        server.idle()
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "n is 2"):
            generate(server, **GREEDY, n=2)


if __name__ == "__main__":
    e2e.main(globals())
