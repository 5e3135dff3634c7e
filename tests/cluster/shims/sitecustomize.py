"""Makes the cluster stack run on a machine without a GPU: for tests only, first on PYTHONPATH.

Python imports this file when any process starts, and so it reaches the job's driver, Ray's workers and vLLM's processes. It
changes nothing by itself: each function below runs once, right after the module that it is about was imported, and was needed:

- CUDA's device calls are made harmless, and "cuda" means the CPU.
- The weights go from trainer to engines over gloo. With NCCL missing nothing fails: the engines would receive garbage in silence.
- vLLM on a CPU repacks linear weights and drops the originals, so that new weights would be lost: it gets plain `F.linear`.
- Packing asks for flash attention; transformers' sdpa builds the same block-diagonal mask from the position ids.
- With ATOMMEM_FLOAT32 set trainer and engines compute in float32, in which they can be compared digit by digit.
"""

import importlib.abc
import importlib.machinery
import os
import sys

FLOAT32 = bool(os.environ.get("ATOMMEM_FLOAT32"))
_after_import = {}


def after_import(module):
    def register(function):
        _after_import[module] = function
        return function

    return register


class _Loader(importlib.abc.Loader):
    def __init__(self, loader, then):
        self.loader, self.then = loader, then

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        module.__loader__ = module.__spec__.loader = self.loader  # as if this one had never been there
        self.then(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        then = _after_import.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if then else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, then)
        return spec


sys.meta_path.insert(0, _Finder())


class _Cpu(str):
    """The current device: good for `device=`, and "cuda:0" where a number is pasted behind "cuda:"."""

    def __format__(self, spec):
        return "0"


@after_import("torch")
def _devices(torch):
    torch.cuda.current_device = lambda: _Cpu("cpu")
    for name in ("set_device", "synchronize", "empty_cache", "current_stream"):
        setattr(torch.cuda, name, lambda *args, **options: None)


@after_import("torch.distributed.device_mesh")
def _device_mesh(module):
    real = module.init_device_mesh
    module.init_device_mesh = lambda kind, *args, **options: real("cpu", *args, **options)


@after_import("openrlhf.utils.distributed_util")
def _weights_over_gloo(module):
    class Gloo:
        """What OpenRLHF uses of vLLM's PyNcclCommunicator."""

        def __init__(self, host, port, rank, world_size):
            from datetime import timedelta

            from torch import distributed

            wait = timedelta(seconds=300)
            self.store = distributed.TCPStore(host, port, world_size, is_master=rank == 0, timeout=wait)
            self.group = distributed.ProcessGroupGloo(self.store, rank, world_size, wait)

        def broadcast(self, tensor, src, stream=None):
            from torch import distributed

            options = distributed.BroadcastOptions()
            options.rootRank, options.rootTensor = src, 0
            self.group.broadcast([tensor], options).wait()

    module.stateless_init_process_group = lambda host, port, rank, world_size, device: Gloo(
        host, port, rank, world_size
    )


@after_import("openrlhf.trainer.ray.vllm_worker_wrap")
def _receive_on_cpu(module):
    real = module.WorkerWrap.update_weight

    def update_weight(self, *args, **options):
        import torch

        empty = torch.empty
        torch.empty = lambda *a, **o: empty(*a, **{**o, "device": "cpu"})
        try:
            return real(self, *args, **options)
        finally:
            torch.empty = empty

    module.WorkerWrap.update_weight = update_weight


@after_import("openrlhf.models.actor")
def _packing_by_sdpa(module):
    real = module.Actor.__init__

    def __init__(self, model, attn_implementation="sdpa", *args, **options):
        flash = "flash" in attn_implementation
        real(self, model, "sdpa" if flash else attn_implementation, *args, **options)

    module.Actor.__init__ = __init__


@after_import("vllm.model_executor.layers.utils")
def _keep_weights(module):
    def dispatch_cpu_unquantized_gemm(layer, remove_weight):
        from torch.nn import functional

        layer.cpu_linear = functional.linear

    module.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


if FLOAT32:

    @after_import("openrlhf.utils.utils")
    def _train_in_float32(module):
        import torch

        module.convert_to_torch_dtype = lambda name: torch.float32

    @after_import("openrlhf.utils.deepspeed.deepspeed_utils")
    def _deepspeed_in_float32(module):
        for name in ("get_train_ds_config", "get_eval_ds_config"):
            real = getattr(module, name)

            def without_bf16(*args, real=real, **options):
                return {**real(*args, **options), "bf16": {"enabled": False}}

            setattr(module, name, without_bf16)

    @after_import("vllm.engine.arg_utils")
    def _sample_in_float32(module):
        real = module.AsyncEngineArgs.__init__

        def __init__(self, *args, **options):
            real(self, *args, **{**options, "dtype": "float32"})

        module.AsyncEngineArgs.__init__ = __init__
