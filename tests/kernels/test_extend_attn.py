import pytest
import torch

from hybridkv_kernels.extend_attn import extend_attn
from tests.builders import NAN, fresh_generator, full_attention, poisoned_memory

NOWHERE = 2**30  # a slot far outside the pool: whoever reads it fails
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# (prefix, extend) of each request; without new tokens it has no output
MIXED = [(0, 1), (0, 33), (7, 0), (40, 1), (5, 17), (0, 0), (130, 20), (1, 1)]


class Batch:
    """Requests on random slots of one layer; slots that are nobody's are NaN, as is all beyond their ends."""

    def __init__(self, requests, *, heads=2, group=2, head_dim=32, dtype=torch.float32, window=0):
        generator = fresh_generator()
        num_tokens = sum(map(sum, requests))

        def randn(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        self.requests, self.scaling, self.group, self.window = requests, 0.2, group, window
        self.k_rows, self.v_rows = (torch.full((2 * num_tokens, heads, head_dim), NAN, dtype=dtype) for _ in "kv")
        self.q = randn(sum(extend for _, extend in requests), heads * group, head_dim)
        self.req_rows = torch.randperm(len(requests), generator=generator)
        longest = max(map(sum, requests))
        self.req_to_token = torch.full((len(requests), longest + 1), NOWHERE, dtype=torch.int32)
        free = torch.randperm(2 * num_tokens, generator=generator)
        for row, (prefix, extend) in zip(self.req_rows.tolist(), requests, strict=True):
            slots, free = free[: prefix + extend], free[prefix + extend :]
            self.req_to_token[row, : len(slots)] = slots.int()
            self.k_rows[slots], self.v_rows[slots] = (randn(len(slots), heads, head_dim) for _ in "kv")

    def arguments(self):
        return {
            "q": self.q,
            "k_rows": self.k_rows,
            "v_rows": self.v_rows,
            "req_to_token": self.req_to_token,
            "req_rows": self.req_rows,
            "prefix_lens": [prefix for prefix, _ in self.requests],
            "extend_lens": [extend for _, extend in self.requests],
            "scaling": self.scaling,
            "window": self.window,
        }

    def exact(self):
        """Token by token, each over what came before it."""
        out, queries = [], iter(self.q)
        for row, (prefix, extend) in zip(self.req_rows.tolist(), self.requests, strict=True):
            for position in range(prefix, prefix + extend):
                slots = self.req_to_token[row, : position + 1].long()[-self.window :]  # -0: all
                keys, values = self.k_rows[slots].transpose(0, 1), self.v_rows[slots].transpose(0, 1)
                out.append(full_attention(next(queries), keys, values, self.scaling))
        return torch.stack(out)

    def check(self):
        tolerance = TOLERANCE[self.q.dtype]
        before = [tensor.clone() for tensor in (self.q, self.k_rows, self.v_rows)]
        with poisoned_memory():
            out = extend_attn(**self.arguments())
        assert out.dtype == self.q.dtype
        assert out.shape == self.q.shape
        torch.testing.assert_close(out.double(), self.exact(), rtol=tolerance, atol=tolerance)
        for tensor, copy in zip((self.q, self.k_rows, self.v_rows), before, strict=True):
            torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


each_implementation = pytest.mark.usefixtures("fast_kernels")  # Triton has none: on CUDA it is the reference


@each_implementation
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [1, 2, 17, 33, 47, 149, 1000])
def test_with_a_window_over_the_last_tokens_only(window, dtype):
    Batch(MIXED, window=window, dtype=dtype).check()


@each_implementation
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group", [*range(1, 9), 16])
def test_causal_over_prefix_and_new_tokens(group, dtype):
    Batch(MIXED, group=group, dtype=dtype).check()


@each_implementation
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [1, 3])
def test_model_shapes(heads, head_dim, dtype):
    Batch([(20, 9), (0, 4)], heads=heads, head_dim=head_dim, dtype=dtype).check()


@each_implementation
@pytest.mark.parametrize("prefix", [0, 1, 31, 32, 33, 511, 512, 1100])
@pytest.mark.parametrize("extend", [1, 2, 33])
def test_prefixes_around_the_blocks_of_flash_attention(prefix, extend):
    Batch([(prefix, extend)]).check()


@each_implementation
def test_many_new_tokens():
    Batch([(300, 600), (0, 700)], group=1, heads=1).check()


@each_implementation
def test_chunks_of_a_prompt_equal_the_whole():
    batch = Batch([(0, 90)])
    whole = extend_attn(**batch.arguments())
    parts = [
        extend_attn(**batch.arguments() | {"q": batch.q[a:b], "prefix_lens": [a], "extend_lens": [b - a]})
        for a, b in ((0, 40), (40, 41), (41, 90))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


@each_implementation
def test_queries_that_are_not_contiguous():
    """A projection's output may be a slice of queries, keys and values together."""
    batch = Batch(MIXED)
    expected = extend_attn(**batch.arguments())
    sliced = torch.cat((batch.q, torch.full_like(batch.q, NAN)), dim=1)[:, : batch.q.shape[1]]
    assert torch.equal(extend_attn(**batch.arguments() | {"q": sliced}), expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda t: t[:0]),
        ("q", lambda t: t[0]),
        ("q", lambda t: t.double()),
        ("q", lambda t: t[:, :3]),
        ("k_rows", lambda t: t[..., :16]),
        ("k_rows", lambda t: t[:, 0]),
        ("k_rows", torch.Tensor.half),
        ("v_rows", lambda t: t[1:]),
        ("v_rows", torch.Tensor.half),
        ("v_rows", lambda t: t.to("meta")),
        ("extend_lens", lambda lens: [lens[0] + 1, *lens[1:]]),
    ],
)
def test_bad_arguments_are_named(name, change):
    arguments = Batch(MIXED).arguments()
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        extend_attn(**arguments | {name: change(arguments[name])})


@pytest.mark.parametrize("name", ["req_rows", "prefix_lens", "extend_lens"])
def test_one_entry_a_request(name):
    arguments = Batch(MIXED).arguments()
    with pytest.raises(ValueError, match=r"^req_rows, prefix_lens, extend_lens: expected one entry a request"):
        extend_attn(**arguments | {name: arguments[name][1:]})
