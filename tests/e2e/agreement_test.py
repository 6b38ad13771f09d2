#!/usr/bin/python3
"""Greedy ids of many prompts: the backend under test with 1, 2 and 4 workers gives one answer, and that answer agrees
with the portable CPU level's as far as rounding lets it. The rate is printed. Random weights have many near ties, so it
is far from what a trained model shows, and only an answer that has little to do with the other fails the test."""
import concurrent.futures

import strata_e2e as e2e
from strata_e2e import Server, generate

PROMPTS, NEW, LEAST = 64 if e2e.BACKEND != "cpu" else 12, 24, 0.2
WORDS = ("the of and a to in he was that it his her with as had for she not at but be on they have him which said "
         "from all this one would you there so were are or when if who what by an more up then into them time only "
         "little out some could like than other about very man over after first where even").split()


def prompts():
    """Some words each, of different number, always the same."""
    for i in range(PROMPTS):
        yield " ".join(WORDS[(i * 31 + j * (7 + i % 5)) % len(WORDS)] for j in range(1 + i * 5 % 23))


def greedy(model, workers, worker=()):
    with Server(model, workers=workers, worker=worker) as server:
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda text: list(generate(server, text=text, temperature=0, max_tokens=NEW).ids),
                                 prompts()))


def agreement(ids, reference):
    """How many prompts agree in all tokens, and the part of all tokens that stand before the first difference."""
    same = 0
    for one, other in zip(ids, reference):
        same += next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), len(other))
    return sum(a == b for a, b in zip(ids, reference)), same / sum(len(other) for other in reference)


def check(name, model):
    reference = greedy(model, 1, worker=["--backend", "cpu", "--level", "portable"])
    ids = greedy(model, 1)
    whole, part = agreement(ids, reference)
    print(f"{name}, {e2e.BACKEND} and the portable CPU: {whole} of {PROMPTS} prompts agree in all {NEW} tokens, "
          f"{part:.1%} of the tokens stand before the first difference", flush=True)
    assert part >= LEAST, part
    for workers in (2, 4):
        assert greedy(model, workers) == ids, f"{workers} workers"


def test_llama():
    check("llama q4_k_m", e2e.small_model(mix="q4_k_m", embd=256, heads=4, ffn=256))


def test_qwen2():
    check("qwen2 q8_0", e2e.small_model(arch="qwen2", embd=128, heads=4, ffn=256))


if __name__ == "__main__":
    e2e.main(globals())
