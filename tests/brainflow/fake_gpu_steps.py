"""Optimizer steps of every framework on fake CUDA tensors: what they launch, where they would stop the GPU.

A script of test_fake_gpu.py, started with fake_gpu.cpp in LD_PRELOAD; writes JSON to standard output. What
lies on the host is real, what lies on the GPU has shape and type alone. The operators' own Python runs, the
Triton launches in it are counted; a pass of cuDNN's LSTM counts as one launch each way. Blocks are not
compiled.
"""

import collections
import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._foreach_utils import _foreach_supported_types as foreach_types
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from brainflow.config import DataConfig, PretrainConfig, TrainConfig
from brainflow.data import make_loader
from brainflow.data.sampler import MicrobatchSampler, WindowSampler
from brainflow.frameworks import model_config
from brainflow.kernels.gathering import triton as gather
from brainflow.kernels.linear_loss import triton as linear
from brainflow.kernels.loss import triton as loss
from brainflow.kernels.masking import triton as tokens
from brainflow.kernels.varlen_attention import backends
from brainflow.kernels.varlen_attention import triton as window
from brainflow.models import autoencoder
from brainflow.recipes import today
from brainflow.storage import BoldStore
from brainflow.training.compute import describe_compute, settle_precision
from brainflow.training.loop import _Run
from brainflow.training.meters import Clock, Readback
from brainflow.training.parallel import Ranks
from brainflow.training.step import TrainingStep

GPU = torch.device("cuda", 0)
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
FREE = ("detach", "alias", "_unsafe_view", "lift_fresh")
OPS = (
    loss._forward, loss._backward, linear.linear_masked_loss, tokens.mask_tokens, tokens.mask_tokens_backward,
    gather.gather_windows, backends.attention, backends.attention_backward, backends.shifted_attention,
    backends.shifted_attention_backward, window.window_attention, window.window_attention_backward,
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
        self.launches, self.attention = collections.Counter(), 0
        self.stops, self.backends = [], set()

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
            before = self.launches.total()
            with self, torch.no_grad():
                out = BODIES[func._schema.name](*args, **kwargs)
            if "attention" in name:
                asked = {x for x in args if x in backends.BACKENDS}
                self.backends |= {"window"} if "window" in name else asked
                self.attention += self.launches.total() - before
            return out
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


class CudnnPass(torch.autograd.Function):
    """A pass of cuDNN: one launch each way, whose results have the right shapes."""

    @staticmethod
    def forward(ctx, gpu, width, x, h, c, *weights):
        ctx.gpu = gpu
        ctx.save_for_backward(x, h, c, *weights)
        gpu.launches["cudnn"] += 1
        return x.new_empty(len(x), h.shape[0], width), torch.empty_like(h), torch.empty_like(c)

    @staticmethod
    def backward(ctx, *upstream):
        ctx.gpu.launches["cudnn_backward"] += 1
        return None, None, *(torch.empty_like(x) for x in ctx.saved_tensors)


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

    def run_packed(module, x, steps, state):
        out, h, c = CudnnPass.apply(gpu, module.hidden_size, x, *state, *module.parameters())
        return out, (h, c)

    foreach_types.append(FakeTensor)
    autoencoder.run_packed = run_packed
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
    torch.cuda.max_memory_allocated = lambda device: 0


def take(store, framework, gpu, *, loader, model, parts=1, **train):
    """Return what the second of two steps does, and the line of metrics after it."""
    config = PretrainConfig(
        store=store.path,
        out="absent",
        model=model_config(framework, networks=store.networks, **{**SIZE, **model}),
        data=DataConfig(batch_size=WINDOWS),
        train=TrainConfig(micro_batches=parts, compile="off", **train),
    )
    config = settle_precision(config, Path("absent"), GPU, resume="never")
    samplers = [
        WindowSampler(store.runs, batch=WINDOWS, seq_min=10, seq_max=50, seed=1, rank=i, world=parts,
                      pairs="bert" in framework)
        for i in range(parts)
    ]  # fmt: skip
    run = SimpleNamespace(
        ranks=Ranks(), device=GPU, step=2, peak=1.0, one_step=TrainingStep(config, Ranks(), GPU)
    )
    model_launches = collections.Counter()

    def backward(*given, real=run.one_step._backward):
        before, attention = gpu.launches.total(), gpu.attention
        out = real(*given)
        model_launches["all"] += gpu.launches.total() - before
        model_launches["attention"] += gpu.attention - attention
        return out

    run.one_step._backward = backward
    loaded = make_loader(store, MicrobatchSampler(samplers), kind=loader, device="cuda:0")
    batches, clock, readback = iter(loaded), Clock(loaded), Readback()
    for number in range(2):
        gpu.clear()
        model_launches.clear()
        numbers = run.one_step(batches, number, 1e-3, stop=False)
        step_launches = gpu.launches.total()
        _Run._push(run, readback, numbers, 1e-3, clock)
    return {
        "model": model_launches["all"] - model_launches["attention"],
        "attention": model_launches["attention"],
        "update": step_launches - model_launches["all"],
        "stops": list(gpu.stops),
        "backends": sorted(gpu.backends),
        "said": describe_compute(config, GPU),
        "on the host": [n for n, p in run.one_step.module.named_parameters() if p.device.type != "cuda"],
    }


SIZE = {"width": 64, "layers": 4, "heads": 2}
WINDOWS = 192


def recipe(framework, **model):
    """Return the settings of a model that `pretrain` takes by default."""
    return {**today(framework)["model"], **model}


FORCED, FREE_RUNNING = {"layers": 2, "teacher_forcing": 1.0}, {"layers": 2, "teacher_forcing": 0.0}
MODERN = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "time_encoding": "fourier"}
CASES = {
    "csm": ("csm", {}),
    "csm, 12 layers": ("csm", {"model": {"layers": 12}}),
    "csm single": ("csm", {"model": {"masking": "single"}}),
    "csm today": ("csm", {"model": recipe("csm")}),
    "csm today, 12 layers": ("csm", {"model": recipe("csm", layers=12)}),
    "csm modern": ("csm", {"model": {**MODERN, "recompute": True, "coordinates": True, "loss": "huber"}}),
    "csm fp16, averaged": ("csm", {"precision": "fp16", "ema": 0.9}),
    "seq-bert": ("seq-bert", {}),
    "seq-bert today": ("seq-bert", {"model": recipe("seq-bert")}),
    "seq-bert in parts": ("seq-bert", {"parts": 2, "loader": "host", "model": {"mask_span": 3}}),
    "net-bert": ("net-bert", {}),
    "net-bert today": ("net-bert", {"model": recipe("net-bert")}),
    "net-bert in parts": ("net-bert", {"parts": 2, "model": {"mask_span": 3, "late_read": True}}),
    "autoencoder forced": ("autoencoder", {"model": FORCED}),
    "autoencoder free": ("autoencoder", {"model": FREE_RUNNING}),
    "autoencoder today, forced": ("autoencoder", {"model": recipe("autoencoder", **FORCED)}),
    "autoencoder today, free": ("autoencoder", {"model": recipe("autoencoder", **FREE_RUNNING)}),
}


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
