"""Fails on what would make the host wait for the device, or a shape depend on what the device holds: on CPU tensors.

There is one device here, so "on the device" is what the test says it is, and everything computed from that. Operations
are seen where torch dispatches them; methods that read a CPU tensor without any are replaced while the guard is on.
"""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result the host must have, or whose output's shape depends on contents.
SYNCING = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "argwhere",
    "masked_select",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
    "_unique",
    "_unique2",
    "bincount",
    "histc",
    "combinations",
    "masked_scatter",
    "repeat_interleave.Tensor",  # allowed with an output size, see `_makes_sync`
}
METHODS = ("tolist", "cpu", "numpy", "item", "__bool__", "__int__", "__float__", "__index__", "__array__", "nonzero")
FACTORIES = ("arange", "empty", "full", "linspace", "ones", "zeros")


class HostSync(BaseException):
    """The host waited for the device. No `Exception`: the engine contains those of a prompt's compression."""


class NoSync(TorchDispatchMode):
    """Guard for a decode step, and for the end of prefill.

    What torch makes on another tensor's `device` is on the device, and on "cpu" it is not. A copy to the host that
    nobody waits for (`non_blocking`) leaves its target on the device, too: it must not be read before an event says so.

    Parameters
    ----------
    device_tensors : what lies on the device, and with it all that is computed from it. None: every tensor does, as
        inside a captured graph, where the host has nothing to say.

    Attributes
    ----------
    trace : names and output shapes of the operations seen, in order.
    """

    def __init__(self, device_tensors=None):
        super().__init__()
        self._is_strict = device_tensors is None
        # Kept alive, so that no other tensor gets their memory while the guard is on.
        self._there = list(device_tensors or ())
        self._storages = {_storage(tensor) for tensor in self._there}
        self._is_paused = False
        self.trace = []

    def is_on_device(self, tensor):
        """Whether the device holds `tensor`; an empty one is nowhere."""
        return self._is_strict or (tensor.numel() > 0 and _storage(tensor) in self._storages)

    def to_device(self, tensor, device):
        """What a copy from the host leaves on the device: a tensor of its own, on the device."""
        with self.paused():
            copy = tensor.to(device).clone()
        self._mark(copy)
        return copy

    @contextlib.contextmanager
    def paused(self):
        """For doubles and interpreters, which read tensors on the CPU where a kernel reads them on the device."""
        was_paused, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = was_paused

    def launch(self, function, name):
        """`function` as a kernel: unseen inside, its outputs on the device."""

        def run(*args, **kwargs):
            self.trace.append((f"launch {name}", ()))
            with self.paused():
                out = function(*args, **kwargs)
            self._mark(out)
            return out

        return run

    def __enter__(self):
        self._patches = contextlib.ExitStack()
        for name in METHODS:
            self._patches.enter_context(mock.patch.object(torch.Tensor, name, self._guarded(name)))
        self._patches.enter_context(mock.patch.object(torch.Tensor, "to", self._guarded_to()))
        self._patches.enter_context(mock.patch.object(torch, "tensor", self._guarded_tensor()))
        for name in FACTORIES:
            self._patches.enter_context(mock.patch.object(torch, name, self._marking(getattr(torch, name))))
        self._pause_interpreter()
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        tensors = [x for x in _flat((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_there = any(self.is_on_device(tensor) for tensor in tensors)
        name = func.name().removeprefix("aten::")
        if is_there and _makes_sync(name, args, kwargs):
            raise HostSync(f"{name} waits for the device")
        if is_there and not self._is_strict:
            self._check_host_tensors(name, tensors, args, kwargs)
        out = func(*args, **kwargs)
        if is_there and not (name == "empty_like" and kwargs.get("device") is not None):  # that is a host twin
            self._mark(out)
        self.trace.append((name, tuple(tuple(x.shape) for x in _flat(out) if isinstance(x, torch.Tensor))))
        return out

    def _check_host_tensors(self, name, tensors, args, kwargs):
        """Of what is not a single number: only copies that nobody waits for may join host and device."""
        if name == "copy_":
            is_crossing = self.is_on_device(args[0]) != self.is_on_device(args[1]) and args[1].dim()
            if is_crossing and not _is_async(args, kwargs):
                way = "from the device to the host" if self.is_on_device(args[1]) else "from the host to the device"
                raise HostSync(f"copy_ {way}")
        elif any(x.dim() and x.numel() and not self.is_on_device(x) for x in tensors):
            raise HostSync(f"{name} takes a tensor that the host would have to send")

    def _mark(self, out):
        tensors = [x for x in _flat(out) if isinstance(x, torch.Tensor)]
        self._there += tensors
        self._storages |= {_storage(tensor) for tensor in tensors}

    def _guarded(self, name):
        original = getattr(torch.Tensor, name)

        def method(tensor, *args, **kwargs):
            if not self._is_paused and self.is_on_device(tensor):
                raise HostSync(f"Tensor.{name} waits for the device")
            with self.paused():
                return original(tensor, *args, **kwargs)

        return method

    def _guarded_to(self):
        original = torch.Tensor.to

        def to(tensor, *args, **kwargs):
            wanted = [x for x in (*args, *kwargs.values()) if isinstance(x, str | torch.device)]
            is_sync = not kwargs.get("non_blocking", False)
            if not self._is_paused and is_sync and "cpu" in map(str, wanted) and self.is_on_device(tensor):
                raise HostSync("Tensor.to(cpu) waits for the device")
            return original(tensor, *args, **kwargs)

        return to

    def _guarded_tensor(self):
        original = torch.tensor

        def tensor(data, *args, device=None, **kwargs):
            if not self._is_paused and isinstance(device, torch.device):
                raise HostSync("torch.tensor sends numbers from the host")
            return original(data, *args, device=device, **kwargs)

        return tensor

    def _marking(self, factory):
        def make(*args, device=None, **kwargs):
            made = factory(*args, device=device, **kwargs)
            if not self._is_paused and isinstance(device, torch.device):
                self._mark(made)
            return made

        return make

    def _pause_interpreter(self):
        """Triton's interpreter runs a launch in Python, over the very tensors."""
        try:
            from triton.runtime.interpreter import GridExecutor
        except ImportError:
            return
        original, guard = GridExecutor.__call__, self

        def launch(executor, *args, **kwargs):
            grid = executor.grid
            guard.trace.append(("launch", (tuple(grid) if isinstance(grid, tuple | list) else ())))
            with guard.paused():
                return original(executor, *args, **kwargs)

        self._patches.enter_context(mock.patch.object(GridExecutor, "__call__", launch))


def _makes_sync(name, args, kwargs):
    base = name.split(".")[0]
    if base == "repeat_interleave":
        return kwargs.get("output_size") is None
    if base in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if base == "_to_copy":
        return False  # there is one device here; `Tensor.to` is watched
    return base in SYNCING


def _is_async(args, kwargs):
    return kwargs.get("non_blocking", args[2] if len(args) > 2 else False)


def _flat(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _flat(item)]
    return [value]


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()
