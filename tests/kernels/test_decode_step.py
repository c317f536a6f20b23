"""Retrieval and attention of one decode step, replayed while requests come, go, grow and are compressed.

On a GPU the step is a CUDA graph, captured with a batch of padding rows; elsewhere it is the same calls.
"""

import random

import pytest
import torch

from benchmarks.gpu_check.step import DecodeStep
from tests.builders import TinyPool, eager_config, fresh_generator
from tests.kernels.test_retrieve_chunks import check_attention, check_buffer, check_selection, held_by

BATCH_SIZE, MOST_RUNNING, PROMPT_PAGES = 5, 6, 12


class Traffic:
    """Requests of which no two batches are composed alike."""

    def __init__(self, pool, seed):
        self.pool, self.random, self.running = pool, random.Random(seed), []

    def next_batch(self):
        """At most a batch of them, each one token longer."""
        page_size = self.pool.config.page_size
        if len(self.running) > 3:
            self.pool.remove(self.running.pop(self.random.randrange(len(self.running))))
        while len(self.running) < self.random.randint(1, MOST_RUNNING):
            prompt = self.pool.add_prompt(self.random.randint(4 * page_size, PROMPT_PAGES * page_size))
            if self.random.random() < 0.75:
                heads = self.pool.layout.num_layers, self.pool.layout.num_kv_heads
                self.pool.compress(prompt, self.pool.rand(*heads).round())
            self.running.append(prompt)
        batch = self.random.sample(self.running, self.random.randint(1, min(BATCH_SIZE, len(self.running))))
        for prompt in batch:
            self.pool.append_token(prompt)
        return batch


@pytest.mark.parametrize(
    ("dtype", "page_size", "group_size", "head_dim"),
    [(torch.float32, 16, 2, 64), (torch.bfloat16, 8, 7, 128), (torch.float16, 32, 16, 80)],
)
@pytest.mark.parametrize("chunk_score", ["mean_max", "key_codes"])
def test_every_replay_attends_to_what_it_should(fast_kernels, chunk_score, dtype, page_size, group_size, head_dim):
    stored = {"mean_max": "same", "key_codes": "int8"}[chunk_score]
    config = eager_config(budget=0.3, theta=0.5, page_size=page_size, chunk_score=chunk_score, host_dtype=stored)
    generator, shape = fresh_generator(), {"dtype": dtype, "group_size": group_size, "head_dim": head_dim}
    pool = TinyPool(generator, config, **shape, pages=240, host_pages=120)
    pool.keys[:, :page_size], pool.values[:, :page_size] = 0, 0  # where padding rows read; SGLang's pool has zeros, too
    step, traffic, compositions = DecodeStep(pool, BATCH_SIZE), Traffic(pool, generator.initial_seed()), set()
    num_steps = 24 if fast_kernels == "cuda" else 6
    for _ in range(num_steps):
        batch = traffic.next_batch()
        compositions.add(tuple((prompt.row, prompt.seq_len) for prompt in batch))
        step.load(batch)
        places = [(layer, i) for layer in range(pool.layout.num_layers) for i in range(len(batch))]
        had = {(layer, i): held_by(pool, batch[i], layer) for layer, i in places if batch[i].reservation}
        step.run()
        for layer, i in places:
            prompt, q = batch[i], step.q[layer, i]
            if prompt.reservation:
                for head in range(pool.layout.num_kv_heads):
                    check_buffer(pool, prompt, layer, head)
                if dtype == torch.float32:  # the summaries of other types are rounded
                    check_selection(pool, prompt, layer, q, had[layer, i])
            check_attention(pool, prompt, layer, q, step.out[layer, i])
    assert len(compositions) > num_steps // 2, "the batches were composed alike"


def test_no_step_attends_by_the_plan_of_another(kernels):
    """Of the same tensors with other rows and lengths in them, of a step that ended early, of another batch."""
    generator = fresh_generator()
    pool = TinyPool(generator, eager_config(budget=0.3, theta=0.5), pages=240, host_pages=120)
    step, traffic = DecodeStep(pool, BATCH_SIZE), Traffic(pool, generator.initial_seed())
    for _ in range(3):
        batch = traffic.next_batch()
        step.load(batch)
        step.run()
        for layer in range(pool.layout.num_layers):
            for i, prompt in enumerate(batch):
                check_attention(pool, prompt, layer, step.q[layer, i], step.out[layer, i])
        step.attend(0, step.rows, step.lens)
        last = batch[-1:]
        q = pool.queries(1)
        check_attention(pool, last[0], 1, q[0], pool.attend(last, 1, q)[0])
