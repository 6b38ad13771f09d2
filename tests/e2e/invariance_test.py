#!/usr/bin/python3
"""The same bits whatever the pool looks like: 1, 2, 3 and 4 workers, any chunking of the prompt, alone and among
others; greedy ids, drawn ids and logprobs."""
import threading

import strata_e2e as e2e
from strata_e2e import Server, generate

PROMPTS = ["The quick brown fox", "In the beginning there was nothing but a long prompt " * 12, "x",
           "def main():\n    return", "1, 2, 3, 4, 5, 6,"]


def ask_all(server, together):
    """What every prompt gets, greedily and drawn: ids and the bits of their logprobs."""
    jobs = [(text, seed) for text in PROMPTS for seed in (None, 7)] if not together else \
        [(text, seed) for text in PROMPTS for seed in (None, 7)] + [(f"noise {i}", i) for i in range(6)]
    results = [None] * len(jobs)

    def ask(i):
        text, seed = jobs[i]
        how = dict(temperature=0) if seed is None else dict(seed=seed, temperature=1.2, top_p=0.95)
        answer = generate(server, text=text, max_tokens=16, logprobs=True, **how)
        results[i] = (answer.ids, [l.logprob for l in answer.logprobs])
    if together:
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        for i in range(len(jobs)):
            ask(i)
    return results[:2 * len(PROMPTS)]


def check(model):
    with Server(model, workers=1) as server:
        expected = ask_all(server, together=False)
        assert ask_all(server, together=True) == expected, "among others"
    for workers in (2, 3, 4):
        with Server(model, workers=workers) as server:
            assert ask_all(server, together=True) == expected, f"{workers} workers"
    with Server(model, workers=2, coordinator=["--chunk", 7, "--step-budget", 40, "--max-sequences", 9],
                worker=["--threads", 2]) as server:
        assert ask_all(server, together=True) == expected, "small chunks, two threads"


def test_llama():
    check(e2e.small_model(mix="q4_k_m", embd=256, heads=4, ffn=256))


def test_gpt2():
    check(e2e.small_model(arch="gpt2", mix="q8_0", tied=True))


if __name__ == "__main__":
    e2e.main(globals())
