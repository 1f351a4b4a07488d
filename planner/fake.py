"""One rank of a group of which there are no others, on a device that is not there: everything but the numbers.

Tensors are fake (they have shapes, dtypes and storages of the right size, and no memory), the process group is torch's
fake one (collectives return at once). They say that they are on a CPU, whatever device is meant: torch differentiates
fake tensors of a kind of device only where it is built for it. So what is chosen by device is chosen here for the one
that is meant. All that is put in the place of something else is here, and taken out again at the end.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.pipelining.stage import InferenceMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel import apply, reduce, remat
from parallel.config_fit import Sizes
from parallel.mesh import Mesh, lay_out
from parallel.schedule import Ordered
from planner import attention
from planner.config import DeviceKind
from zoo import kernel_flex, linear, mask, section
from zoo.mask import Mask

KIND = "cpu"
"""What fake tensors say that they are on."""


@contextmanager
def pretended(sizes: Sizes, *, rank: int, kind: DeviceKind) -> Iterator[Mesh]:
    """The mesh as ``rank`` sees it; what is made inside is fake (all axes, in name only)."""
    assert not dist.is_initialized(), "a dry run is a process of its own"
    mesh = Mesh(sizes, torch.device(KIND), None, rank)
    try:
        if sizes.ranks > 1:
            dist.init_process_group("fake", rank=rank, world_size=sizes.ranks, store=FakeStore())
            mesh = lay_out(sizes, device=mesh.device, rank=rank)
        mode = FakeTensorMode(allow_non_fake_inputs=True)  # of meshes, which hold real tensors of ranks
        with ExitStack() as stack:
            stack.enter_context(mode)
            stack.enter_context(replaced(apply, "_materialise", _within(mode, apply._materialise)))
            stack.enter_context(replaced(Ordered, "_warmup_p2p", _opened))
            stack.enter_context(replaced(reduce, "part", _really(reduce.part)))
            if kind is DeviceKind.cuda:
                stack.enter_context(as_on_cuda())
            yield mesh
    finally:
        mesh.close()


@contextmanager
def replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    """Put something in the place of an attribute, for a while."""
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def build(*args: Any, **kwargs: Any) -> Any:
    """As ``parallel.apply.build``; what is made on the meta device is real, as meshes and modules want it."""
    with unset_fake_temporarily():
        return apply.build(*args, **kwargs)


def _within(mode: FakeTensorMode, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return function(*args, **kwargs)

    return run


def _really(function: Callable[..., Any]) -> Callable[..., Any]:
    """With tensors that have values: DTensor looks up with some which rows of a cut dimension a rank has."""

    def run(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args)

    return run


def _opened(schedule: Ordered, stages: list[Any], has_backward: bool, done: bool) -> None:
    """What a pipeline sends before its first update is not of any other."""
    for stage in stages:
        stage._inference_mode = InferenceMode.STATIC


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Kernels are those that CUDA has.

    How many documents rows hold is a value, which some of them ask for: each row is one document.
    """
    with ExitStack() as stack:
        stack.enter_context(replaced(apply, "choose_kernels", _for_cuda(apply.choose_kernels)))
        stack.enter_context(replaced(Mask, "__post_init__", _of_one_document(Mask.__post_init__)))
        # Flex attention is compiled for the device, and its mask made by compiled code.
        stack.enter_context(replaced(kernel_flex, "attention", lambda *, compiled: attention.attend))
        for module in (mask, section):
            stack.enter_context(replaced(module, "tiles", lambda *args, **kwargs: None))
        stack.enter_context(replaced(remat, "KEPT", (*remat.KEPT, attention.NAME)))
        stack.enter_context(_narrow_products())
        yield


def _for_cuda(choose: Callable[..., None]) -> Callable[..., None]:
    def run(*args: Any, device: torch.device, **kwargs: Any) -> None:
        choose(*args, device=torch.device("cuda"), **kwargs)

    return run


def _of_one_document(check: Callable[[Mask], None]) -> Callable[[Mask], None]:
    def run(self: Mask) -> None:
        self.documents = None
        check(self)

    return run


@contextmanager
def _narrow_products() -> Iterator[None]:
    """Multiply bf16 as it is: some CPUs are quicker in fp32 (``zoo.linear.product_dtype``)."""
    linear.product_dtype.cache_clear()
    try:
        with replaced(torch.cpu, "_is_avx512_bf16_supported", lambda: True):
            yield
    finally:
        linear.product_dtype.cache_clear()
