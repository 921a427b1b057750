"""The masked ops inside PyTorch: opcheck, gradcheck, compile, autocast, DDP, launches, memory."""

import gc
import os
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from brainflow.kernels import MaskSpec, linear_masked_loss, mask_tokens, masked_loss
from brainflow.kernels.linear_loss import cpu as linear_cpu
from brainflow.kernels.loss import cpu as loss_cpu
from brainflow.kernels.masking import cpu as tokens_cpu

CU_SEQLENS = torch.tensor([0, 5, 6, 17], dtype=torch.int32)
NETWORKS = MaskSpec.networks(0.4, seed=2**60 + 1)
TIME_POINTS = MaskSpec.time_points(0.4, seed=2**60 + 1)


def leaves(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def test_opcheck():
    pred, target, token = *leaves((17, 33)), torch.randn(17, 33), *leaves(33)
    hidden, weight, bias = leaves((17, 8), (33, 8), 33)
    code, rows = NETWORKS.code(), torch.arange(5)
    calls = [
        (loss_cpu.masked_loss, (pred, target, CU_SEQLENS, 0, code, 0, True)),
        (tokens_cpu.mask_tokens, (pred, token, CU_SEQLENS, 0, code)),
        (tokens_cpu.mask_tokens_backward, (target, CU_SEQLENS, 0, code, 0, True, True)),
        (linear_cpu.linear_masked_loss,
         (hidden, weight, bias, target, rows, None, CU_SEQLENS, 0, [0, 0, 1, 0, 0], 2, True)),
        (linear_cpu.linear_masked_loss,
         (hidden, weight, None, target, None, None, CU_SEQLENS, 0, code, 1, True)),
    ]  # fmt: skip
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("mask", [TIME_POINTS, NETWORKS], ids=["rows", "columns"])
@pytest.mark.parametrize("loss", ["mse", "huber", "l1"])
def test_gradcheck(mask, loss):
    pred, hidden, weight, bias, token = leaves((17, 6), (17, 3), (6, 3), 6, 6, dtype=torch.float64)
    target = torch.randn(17, 6, dtype=torch.float64) * 3
    keywords = {"loss": loss, "cu_seqlens": CU_SEQLENS}
    assert torch.autograd.gradcheck(lambda p: 3 * masked_loss(p, target, mask, **keywords), pred)
    assert torch.autograd.gradcheck(
        lambda *inputs: 3 * linear_masked_loss(*inputs, target, mask, **keywords), (hidden, weight, bias)
    )
    assert torch.autograd.gradcheck(
        lambda x, t: mask_tokens(x, mask, t, cu_seqlens=CU_SEQLENS), (pred, token)
    )


@pytest.mark.parametrize("mask", [TIME_POINTS, NETWORKS], ids=["rows", "columns"])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_second_derivative_is_refused(mask, factor):
    """Gradients come from the forward pass: as constants they would make it silently wrong."""
    pred, hidden, weight = leaves((17, 33), (17, 8), (33, 8))
    target = torch.randn(17, 33)
    calls = [
        (lambda p: masked_loss(p, target, mask, loss="mse"), pred),
        (lambda w: linear_masked_loss(hidden, w, None, target, mask, loss="mse"), weight),
    ]
    for call, leaf in calls:
        (grad,) = torch.autograd.grad(call(leaf) * factor, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="loss: got a second derivative"):
            torch.autograd.grad((grad * leaf).sum(), leaf)


@pytest.mark.parametrize("mask", [TIME_POINTS, NETWORKS, MaskSpec.position(seed=1)], ids=lambda m: m.kind)
def test_fake_tensors(mask):
    with FakeTensorMode():
        x, bounds = torch.empty(17, 33), torch.empty(4, dtype=torch.int32)
        token, weight = torch.empty(33, requires_grad=True), torch.empty(33, 33, requires_grad=True)
        masked = mask_tokens(x, mask, token, cu_seqlens=bounds)
        loss = linear_masked_loss(masked, weight, None, x, mask, cu_seqlens=bounds)
        loss = loss + masked_loss(masked, x, mask, cu_seqlens=bounds)
        grads = torch.autograd.grad(loss, (token, weight))
    assert [g.shape for g in grads] == [(33,), (33, 33)]


def test_compile_equals_eager_without_compiling_every_step():
    hidden, weight, bias, token = leaves((17, 8), (33, 8), 33, 33)
    x, counter = torch.randn(17, 33), Counter()

    def step(mask, rows):
        masked = mask_tokens(x, mask, token, cu_seqlens=CU_SEQLENS)
        loss = linear_masked_loss(hidden, weight, bias, x, mask, rows=rows)
        return loss + masked_loss(masked * token, x, mask, cu_seqlens=CU_SEQLENS)

    def count(graph, inputs):
        counter["graphs"] += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    counted = torch.compile(step, fullgraph=True, backend=count, dynamic=True)
    for offset in range(5):
        mask = MaskSpec.time_points(0.4, seed=2**50, offset=offset)
        rows = mask.rows(CU_SEQLENS)
        expected, value = step(mask, rows), compiled(mask, rows)
        torch.testing.assert_close(value, expected)
        inputs = (hidden, weight, bias, token)
        pairs = zip(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), strict=True)
        for actual, wanted in pairs:
            torch.testing.assert_close(actual, wanted)
        counted(mask, rows)
    assert counter["graphs"] <= 3


def test_autocast_projects_in_its_dtype():
    hidden, weight, bias = leaves((17, 8), (33, 8), 33)
    bias.data = bias.data.bfloat16().float()  # it is added in float32
    target = torch.randn(17, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = linear_masked_loss(hidden, weight, bias, target, TIME_POINTS)
    low = [t.detach().bfloat16() for t in (hidden, weight, bias)]
    assert torch.equal(value, linear_masked_loss(*low, target, TIME_POINTS))
    grads = torch.autograd.grad(value, (hidden, weight, bias))
    assert all(g.dtype == torch.float32 for g in grads)


def test_no_gradient_work_without_grad():
    hidden, weight, bias = leaves((17, 8), (33, 8), 33)
    with torch.no_grad():
        linear_masked_loss(hidden, weight, bias, torch.randn(17, 33), TIME_POINTS)
        outputs = linear_cpu.linear_masked_loss(
            hidden,
            weight,
            bias,
            torch.randn(17, 33),
            torch.arange(3),
            None,
            CU_SEQLENS,
            0,
            [0, 0, 1, 0, 0],
            0,
            False,
        )
    assert [o.numel() for o in outputs[2:]] == [0, 0, 0]


class _Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.token = torch.nn.Parameter(torch.ones(33))
        self.inner, self.head = torch.nn.Linear(33, 8), torch.nn.Linear(8, 33)

    def forward(self, x, mask):
        hidden = self.inner(mask_tokens(x, mask, self.token))
        return linear_masked_loss(hidden, self.head.weight, self.head.bias, x, mask)


def _ddp_rank(rank, folder, shares):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    module = torch.nn.parallel.DistributedDataParallel(_Head())
    module(shares[rank], MaskSpec.time_points(0.4, seed=rank)).backward()
    torch.save([p.grad for p in module.parameters()], f"{folder}/{rank}.pt")
    # As at the end of a training: DDP before its group (brainflow.training.parallel.process_group).
    del module
    gc.collect()
    dist.destroy_process_group()


def test_ddp_on_two_ranks_gives_the_mean_of_their_gradients(tmp_path):
    shares = torch.randn(2, 17, 33)
    torch.multiprocessing.start_processes(
        _ddp_rank, args=(str(tmp_path), shares), nprocs=2, start_method="fork"
    )
    torch.manual_seed(0)
    module = _Head()
    for rank in range(2):
        (module(shares[rank], MaskSpec.time_points(0.4, seed=rank)) / 2).backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for p, grad in zip(module.parameters(), found, strict=True):
            torch.testing.assert_close(grad, p.grad)


class _Seen(TorchDispatchMode):
    """Operators by name, and the storages of large results."""

    def __init__(self):
        super().__init__()
        self.names, self.large = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        values = [value for value in pytree.tree_leaves(out) if isinstance(value, torch.Tensor)]
        self.large += [value for value in values if value.numel() >= 3200 * 1024]
        return out

    def allocations(self):
        return len({value.untyped_storage()._cdata for value in self.large})


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiled kernels")
@pytest.mark.parametrize("mask", [TIME_POINTS, NETWORKS, MaskSpec.position(seed=1)], ids=lambda m: m.kind)
def test_launches_syncs_and_allocations(mask, monkeypatch):
    """What an op does around its launches, which are counted here and not made, with fake tensors."""
    jit = pytest.importorskip("triton.runtime.jit")
    from brainflow.kernels.linear_loss import triton as linear
    from brainflow.kernels.loss import triton as loss
    from brainflow.kernels.masking import triton as tokens

    launched = []
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *a, grid, warmup, **k: launched.append(grid))
    size, code = (3200, 1024), mask.code()
    with FakeTensorMode():
        data, token, one = torch.empty(size), torch.empty(1024), torch.empty(())
        bounds, rows = torch.empty(65, dtype=torch.int32), torch.empty(640, dtype=torch.int64)
        hidden, weight = torch.empty(3200, 768), torch.empty(1024, 768)
        taken = rows if mask.by_rows else None
        calls = {
            "mask": lambda: tokens.forward_impl(data, token, bounds, 0, code),
            "loss": lambda: loss.forward_impl(data, data, bounds, 0, code, 0),
            "gradient": lambda: loss.backward_impl(one, one, data, data, bounds, 0, code, 0),
            "linear": lambda: linear.forward_impl(
                hidden, weight, token, data, taken, None, bounds, 0, code, 0, True
            ),
        }
        kernels, allocations = Counter(), {}
        for name, call in calls.items():
            launched.clear()
            with _Seen() as seen:
                call()
            kernels[name], allocations[name] = len(launched), seen.allocations()
            assert not any(
                "_local_scalar_dense" in n or "nonzero" in n or "_to_copy" in n for n in seen.names
            )
    predicted = 0 if mask.by_rows else 1
    assert allocations == {"mask": 1, "loss": 0, "gradient": 1, "linear": predicted}
    assert (kernels["mask"], kernels["loss"], kernels["gradient"]) == (1, 2, 1)
    assert kernels["linear"] == 2


def test_no_synchronisation_on_cuda():
    """The public functions run on fake CUDA tensors, whose values cannot be read, with few operators."""
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace != "prim" and not function.is_view:
                seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for mask in (TIME_POINTS, NETWORKS, MaskSpec.position(seed=1), MaskSpec.all_valid()):
        seen.clear()
        with FakeTensorMode(), torch.no_grad():
            x, token = torch.empty(3200, 1024, device="cuda"), torch.empty(1024, device="cuda")
            bounds = torch.empty(65, dtype=torch.int32, device="cuda")
            hidden, weight = torch.empty(3200, 8, device="cuda"), torch.empty(1024, 8, device="cuda")
            rows = torch.empty(640, dtype=torch.int64, device="cuda") if mask.by_rows else None
            with Log():
                mask_tokens(x, mask, token, cu_seqlens=bounds)
                masked_loss(x, x, mask, cu_seqlens=bounds)
                linear_masked_loss(hidden, weight, None, x, mask, cu_seqlens=bounds, rows=rows)
        names = [name.split(".")[1] for name in seen]
        assert names == ["mask_tokens_triton", "masked_loss_triton", "linear_masked_loss_triton"]


@pytest.mark.parametrize("mask", [TIME_POINTS, NETWORKS, MaskSpec.position(seed=1)], ids=lambda m: m.kind)
def test_extra_memory_is_the_gradient(mask):
    pred, target = torch.randn(3200, 1024, requires_grad=True), torch.randn(3200, 1024)
    cu_seqlens = torch.arange(0, 3201, 50, dtype=torch.int32)
    masked_loss(pred, target, mask, cu_seqlens=cu_seqlens)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        value = masked_loss(pred, target, mask, cu_seqlens=cu_seqlens)
        grads = torch.autograd.grad(value, pred)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    # The gradient of one position a window lies in a map of its own, which the profiler does not see.
    gradient = 0 if mask.kind == "position" else grads[0].nbytes
    assert gradient <= peak <= gradient + 0.1 * grads[0].nbytes
