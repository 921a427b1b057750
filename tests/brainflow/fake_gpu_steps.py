"""Optimizer steps of every framework on fake CUDA tensors: what they launch, where they would stop the GPU.

A script of test_fake_gpu.py, started with fake_gpu.cpp in LD_PRELOAD; writes JSON to standard output. What
lies on the host is real, what lies on the GPU has shape and type alone. The operators' own Python runs, the
Triton launches in it are counted; a cuDNN LSTM is one call that is made up here.
"""

import collections
import contextlib
import json
import sys
from pathlib import Path

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from brainflow.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from brainflow.data import make_loader
from brainflow.data.sampler import MicrobatchSampler, WindowSampler
from brainflow.kernels.gathering import triton as gather
from brainflow.kernels.linear_loss import triton as linear
from brainflow.kernels.loss import triton as loss
from brainflow.kernels.masking import triton as tokens
from brainflow.kernels.varlen_attention import backends, ops, shifted
from brainflow.models import autoencoder
from brainflow.storage import BoldStore
from brainflow.training.compute import describe_compute, settle_precision
from brainflow.training.meters import Readback
from brainflow.training.parallel import Ranks
from brainflow.training.step import TrainingStep

GPU = torch.device("cuda", 0)
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
FREE = ("detach", "alias", "_unsafe_view", "lift_fresh")
OPS = (
    loss._forward, loss._backward, linear.linear_masked_loss, tokens.mask_tokens, tokens.mask_tokens_backward,
    gather.gather_windows, ops.attention, ops.attention_backward, shifted.shifted_attention,
    shifted.shifted_attention_backward,
)  # fmt: skip
BODIES = {op._qualname: op._init_fn for op in OPS}


class Fakes(FakeTensorMode):
    avoid_device_init = True  # there is no driver, whatever torch.cuda.is_available has been told to say


class FakeGpu(TorchDispatchMode):
    """Runs what touches the GPU on fake tensors, and counts it."""

    def __init__(self):
        super().__init__()
        self.fake = Fakes(allow_non_fake_inputs=True)
        self.pinned = set()
        self.kept = []
        self.clear()

    def clear(self):
        self.launches, self.stops, self.backends = collections.Counter(), [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[1]
        if kwargs.pop("pin_memory", None):
            buffer = func(*args, **kwargs)
            self.pinned.add(buffer.untyped_storage()._cdata)
            self.kept.append(buffer)  # so that no other takes its place
            return buffer
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        device = kwargs.get("device")
        on_gpu = any(isinstance(x, FakeTensor) for x in given) or (
            device is not None and torch.device(device).type == "cuda"
        )
        if not on_gpu:
            return func(*args, **kwargs)
        if func._schema.name in BODIES:
            self.backends |= {x for x in args if x in backends.BACKENDS} if "attention" in name else set()
            with self, torch.no_grad():
                return BODIES[func._schema.name](*args, **kwargs)
        self._look(name, args, kwargs, given)
        with self.fake:
            out = func(*args, **kwargs)
        if not (func.is_view or func.namespace == "prim" or "empty" in name or name in FREE):
            self.launches[name] += 1
        return out

    def _look(self, name, args, kwargs, given):
        """Note what would make the host wait."""
        if name in READS:
            self.stops.append(f"{name} reads from the GPU")
        if name == "_to_copy" and "device" in kwargs:
            self._copied(args[0], torch.device(kwargs["device"]).type, kwargs.get("non_blocking", False))
        if name == "copy_":
            self._copied(args[1], args[0].device.type, bool(args[2]) if len(args) > 2 else False, args[0])

    def _copied(self, source, to, non_blocking, target=None):
        if source.device.type == to:
            return
        host = source if source.device.type == "cpu" else target
        pinned = host is not None and host.untyped_storage()._cdata in self.pinned
        if not (pinned and non_blocking):
            self.stops.append(f"a copy {source.device.type} to {to}, pinned {pinned}, {non_blocking=}")


def lstm(module, x, steps, state):
    """A cuDNN pass: its results have the right shapes and depend on all that they should."""
    used = sum(p.sum() for p in module.parameters()) + x.sum() + sum(s.sum() for s in state)
    out = x.new_zeros(len(x), state[0].shape[0], module.hidden_size) + used
    return out, (state[0] + used, state[1] + used)


class Event:
    def record(self):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


def pretend(gpu):
    """Put stand-ins where torch would ask a driver."""

    def launch(kernel, *arguments, grid, warmup, **options):
        gpu.launches[kernel.fn.__name__] += 1

    JITFunction.run = launch
    autoencoder.run_packed = lstm
    backends._capability = lambda index: (9, 0)
    for name in ("fa2", "fa4"):
        backends.BACKENDS[name].installed = lambda: False
    fake_tensor.init_gpu_context = lambda device: None
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = lambda: True
    torch.cuda.Event = Event
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.cuda.get_device_name = lambda device: "a fake GPU"


def take(store, framework, gpu, *, loader, model, parts=1, **train):
    """Return what the second of two steps does."""
    config = PretrainConfig(
        store=store.path,
        out="absent",
        model=ModelConfig(framework=framework, networks=store.networks, width=64, layers=2, heads=2, **model),
        data=DataConfig(batch_size=8, seq_min=10, seq_max=30),
        train=TrainConfig(micro_batches=parts, **train),
    )
    config = settle_precision(config, Path("absent"), GPU, resume="never")
    pairs = "bert" in framework
    samplers = [
        WindowSampler(store.runs, batch=8, seq_min=10, seq_max=30, seed=1, rank=i, world=parts, pairs=pairs)
        for i in range(parts)
    ]
    step = TrainingStep(config, Ranks(), GPU)
    batches = iter(make_loader(store, MicrobatchSampler(samplers), kind=loader, device="cuda:0"))
    readback = Readback()
    for number in range(2):
        gpu.clear()
        step(batches, number, 1e-3, stop=False)
        readback.push(step.meters.read(), {})
    return {
        "launches": gpu.launches.total(),
        "stops": list(gpu.stops),
        "backends": sorted(gpu.backends),
        "said": describe_compute(config, GPU),
        "on the host": [n for n, p in step.module.named_parameters() if p.device.type != "cuda"],
    }


CASES = {
    "csm": ("csm", {}),
    "csm single": ("csm", {"model": {"masking": "single"}}),
    "csm next": ("csm", {"model": {"masking": "next"}}),
    "csm modern": (
        "csm",
        {"model": {"positions": "rotary", "norm": "rms", "activation": "swiglu", "time_encoding": "fourier",
                   "recompute": True}},
    ),
    "csm fp16, averaged": ("csm", {"precision": "fp16", "ema": 0.9}),
    "seq-bert": ("seq-bert", {}),
    "seq-bert in parts": ("seq-bert", {"parts": 2, "loader": "host"}),
    "net-bert": ("net-bert", {}),
    "net-bert in parts": ("net-bert", {"parts": 2, "model": {"mask_span": 3}}),
    "autoencoder forced": ("autoencoder", {"model": {"teacher_forcing": 1.0}}),
    "autoencoder free": ("autoencoder", {"model": {"teacher_forcing": 0.0}}),
}  # fmt: skip


def main():
    store, gpu, found = BoldStore.open(sys.argv[1]), FakeGpu(), {}
    torch.set_num_threads(1)
    pretend(gpu)
    names = sys.argv[2:] or list(CASES)
    with gpu, torch.autograd.set_multithreading_enabled(False):
        for name in names:
            framework, options = CASES[name]
            found[name] = take(store, framework, gpu, **{"loader": "resident", "model": {}, **options})
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
